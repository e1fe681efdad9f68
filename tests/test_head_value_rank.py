"""HeadValueRank: Hugging Face's modules, cases by hand, blocks that do nothing, tables, what is missing, refusals."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import HAS_HOOKED
from reference import attention
from torch.nn.functional import normalize

import lens_probes as lp
from lens_probes.examples import tiny
from lens_probes.maths import inference
from lens_probes.model import ModelView
from lens_probes.probes.head_value_rank import margins
from lens_probes.probes.rank_shift import null_ids
from lens_probes.text.prompts import tokenize

TEXTS = lp.demo.sentences()[:6]
IDS = torch.tensor([5, 40, 300, 41, 7, 40, 120, 5, 333])
OLD = "The old man the boat."


def huggingface_cosines(architecture, layer):
    """Cosines of every head's output with all entries' values and with the values of the run, from modules alone."""
    model = tiny.huggingface(architecture)
    with torch.no_grad():
        found = attention(architecture, IDS)[layer]
        base = model.model if hasattr(model, "model") else model.transformer
        block = (base.layers if hasattr(base, "layers") else base.h)[layer]
        own = block.self_attn if hasattr(block, "self_attn") else block.attn
        norm = block.input_layernorm if hasattr(block, "input_layernorm") else block.ln_1
        rows = model.get_input_embeddings().weight * getattr(model.config, "embedding_multiplier", 1.0)
        values = own.c_attn(norm(rows)).chunk(3, -1)[2] if architecture == "gpt2" else own.v_proj(norm(rows))
        if (clip := getattr(model.config, "clip_qkv", None)) is not None:
            values = values.clamp(-clip, clip)
        values = values.unflatten(-1, (-1, found.value.shape[-1]))
        values = values.repeat_interleave(found.value.shape[1] // values.shape[1], 1)  # entry head d_head
        outputs = normalize(torch.einsum("hqk,khd->hqd", found.pattern, found.value), dim=-1)
        with_entries = torch.einsum("hqd,vhd->hqv", outputs, normalize(values, dim=-1))
        return with_entries, torch.einsum("hqd,khd->hqk", outputs, normalize(found.value, dim=-1))


@pytest.mark.parametrize("maker", ["bridge", "hooked"])
@pytest.mark.parametrize(
    "architecture",
    ["llama", "gpt2", *(pytest.param(a, marks=pytest.mark.matrix) for a in ("granite", "olmo", "gptj"))],
)
def test_numbers_are_those_of_huggingfaces_modules(maker, architecture):
    if maker == "hooked" and not (HAS_HOOKED and architecture in ("llama", "gpt2", "gptj")):
        pytest.skip("no HookedTransformer of it")
    result = lp.HeadValueRank(layers=[0, 2], neighbours=2).run(getattr(tiny, maker)(architecture), [IDS])
    null = null_ids(result.token, 0)
    assert result.layer == ("0", "2") and result.head == ("H0", "H1", "H2", "H3")
    for at, layer in enumerate((0, 2)):
        entries, run = huggingface_cosines(architecture, layer)
        for ids, ranks in ((IDS, result.rank), (null, result.null_rank)):
            own = entries.gather(-1, ids[None, :, None].expand(4, -1, 1))
            closer = (entries > own + 2e-6).sum(-1), (entries > own - 2e-6).sum(-1) - 1  # near ties on either side
            assert ((ranks[at] >= closer[0]) & (ranks[at] <= closer[1].clamp(min=0)))[:, ids >= 0].all()
        own = entries.gather(-1, IDS[None, :, None].expand(4, -1, 1))[..., 0]
        torch.testing.assert_close(result.score[at], own, rtol=0, atol=1e-5)
        best = entries.topk(2).values
        torch.testing.assert_close(result.neighbour_score[at], best, rtol=0, atol=1e-5)
        for head in range(4):
            for query in range(len(IDS)):
                own_margins = {}
                for key in range(query):
                    if IDS[key] != IDS[query]:
                        others = torch.arange(entries.shape[-1]) != IDS[key]
                        own_margins[key] = float(run[head, query, key] - entries[head, query, others].max())
                found = result.other_margin[at, head, query]
                if not own_margins:
                    assert found.isnan() and result.other[at, head, query] == -1
                    continue
                assert float(found) == pytest.approx(max(own_margins.values()), abs=1e-5)
                assert own_margins[int(result.other[at, head, query])] == pytest.approx(float(found), abs=1e-5)
                null_margin = float(result.null_other_margin[at, head, query])
                assert min(abs(null_margin - each) for each in own_margins.values()) < 1e-5


def test_margins_by_hand():
    tokens = tokenize([[7, 8, 9, 8]], ModelView(tiny.bridge("gpt2")))
    outputs = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [0.6, 0.8], [0.0, 2.0]]])
    values = torch.tensor([[[3.0, 0.0], [0.0, 5.0], [1.0, 0.0], [1.0, 1.0]]])
    closest = torch.tensor([[[0, 1], [7, 3], [8, 2], [4, 7]]])
    closeness = torch.tensor([[[0.9, 0.8], [0.95, 0.5], [0.9, 0.7], [0.99, 0.3]]])
    found = margins(outputs, values, closest, closeness, tokens, 0)
    # Token 1: only token 0, whose id 7 is the closest entry: 1 - 0.5. Token 2: 0.6 - 0.9, or 0.8 - 0.7, 8 the closest.
    # Token 3: tokens 0 and 2 (token 1 has its id), both at a right angle: 0 - 0.99.
    assert found["other_margin"][0, 1:].tolist() == pytest.approx([0.5, 0.1, -0.99])
    assert found["other"][0].tolist()[:3] == [-1, 0, 1] and found["other_margin"][0, 0].isnan()
    assert found["null_other_margin"][0, 1] == found["other_margin"][0, 1]
    assert round(float(found["null_other_margin"][0, 2]), 4) in (0.1, -0.3)
    drawn = {
        round(float(margins(outputs, values, closest, closeness, tokens, seed)["null_other_margin"][0, 2]), 4)
        for seed in range(20)
    }
    assert drawn == {0.1, -0.3}
    marked = replace(tokens, special=torch.tensor([True, False, False, False]))  # the first is a special token
    assert margins(outputs, values, closest, closeness, marked, 0)["other"][0].tolist() == [-1, -1, 1, 2]


def test_every_model_makes_the_values_that_it_is_said_to_make_or_is_refused(decoder):
    model = decoder.build()
    view = ModelView(model)
    result = lp.HeadValueRank(layers=[0, 1]).run(model, TEXTS[0])  # raises unless they are W_V of the normed states
    if not hasattr(model, "pos_embed"):  # the first token attends to itself: its value is its embedding's
        assert result.rank[0, :, 0].tolist() == [0] * 4
        torch.testing.assert_close(result.score[0, :, 0], torch.ones(4), rtol=0, atol=1e-5)
    ids = result.token.id
    name = view.hook_value(0)
    found = view.activations(ids[None], torch.ones(1, len(ids), dtype=torch.bool), [name])[name][0]
    own = torch.stack([view.token_values(0, head)[ids] for head in range(view.n_kv_heads)], dim=1)
    assert torch.allclose(own, view.mixed(found), rtol=0, atol=1e-4) == (not hasattr(model, "pos_embed"))


def test_values_of_rare_models_are_made_in_the_same_way(rare):
    assert lp.HeadValueRank(layers=[0, 2]).run(rare.build(), TEXTS[0]).score.abs().max() <= 1 + 1e-5


def test_where_blocks_do_nothing_every_layers_first_token_is_its_own(idle):
    result = lp.HeadValueRank().run(idle, TEXTS[0])
    assert (result.rank[:, :, 0] == 0).all() and (result.rank[:, :, 1:] > 0).any()
    # An earlier token's value is that of its entry, so an output is closest to it exactly if it is the closest entry.
    closest = lp.HeadValueRank(neighbours=1).run(idle, TEXTS[0]).neighbour_ids[..., 0]
    assert ((result.other_margin > 1e-6) <= (closest == result.token.id[result.other.clamp(min=0)])).all()


def test_half_precision_gives_nearly_the_same():
    exact, half = (
        lp.HeadValueRank(layers=[0]).run(tiny.bridge("llama", dtype=dtype), TEXTS[:2])
        for dtype in (torch.float32, torch.bfloat16)
    )
    torch.testing.assert_close(half.score, exact.score, rtol=0, atol=0.05)
    assert half.score.dtype == torch.float32 and half.rank[0, :, 0].tolist() == [0] * 4


def by_hand(model, texts=TEXTS):
    return lp.HeadValueRank(layers=[0, 1]).run(model, texts)


def test_heads_by_hand(gpt2):
    result = by_hand(gpt2)
    n = len(result.token)
    known = result.null_rank[0, 0] >= 0
    rank = torch.where(known, 3, 5).expand(2, 4, n)
    null = torch.where(known, 4, -1).expand(2, 4, n).clone()
    null[1, 2] = torch.where(known, 2, -1)
    table = replace(result, rank=rank, null_rank=null).by_head().set_index(["layer", "head"])
    assert table.loc[("0", "H1"), ["effect", "rank", "null_rank", "prompts"]].tolist() == [1, 3, 4, 6]
    assert table.loc[("1", "H2"), ["effect", "rank", "null_rank"]].tolist() == [-1, 3, 2]
    assert table["p"].iloc[0] == pytest.approx(2 / 64, abs=0.02)
    assert table.attrs["effect"] == "own value closer minus control's closer (share)"
    real, first = result.by_head(), []
    for number, own in result.token.by_prompt():
        rows = (result.token.prompt == number) & ~result.token.special & known
        first.append(float((result.null_rank[0, 0, rows] - result.rank[0, 0, rows]).sign().double().mean()))
        assert len(own)
    assert real["effect"].iloc[0] == pytest.approx(np.mean(first))
    low, high = inference.mean_interval(np.array([first]))
    assert [real["low"].iloc[0], real["high"].iloc[0]] == pytest.approx([low[0], high[0]])


def test_shares_by_hand_and_against_an_untrained_model(gpt2):
    result = by_hand(gpt2)
    known = ~result.other_margin.isnan()
    above = torch.where(known, 0.5, torch.nan)
    below = torch.where(known, -0.5, torch.nan)
    one = replace(result, other_margin=above, null_other_margin=below)
    assert (one.by_other()[["share", "low", "high"]] == 1).all(axis=None)
    assert (one.by_other()[["null_share", "null_low", "null_high"]] == 0).all(axis=None)
    real = result.by_other()
    assert (real["share"] >= real["null_share"]).all() and (real["prompts"] == 6).all()
    table = one.compare_with(replace(result, other_margin=below))
    assert (table["effect"] == 1).all() and (table["other_share"] == 0).all() and len(table) == 8
    assert (one.compare_with(one)["effect"] == 0).all()
    with pytest.raises(ValueError, match="two models must be compared on the same prompts"):
        one.compare_with(by_hand(gpt2, TEXTS[:5]))


def test_what_is_missing_stays_missing(gpt2):
    result = by_hand(gpt2)
    margin = result.other_margin.clone()
    margin[0, 1, 5] = torch.nan  # of one head
    table = replace(result, other_margin=margin).by_other()
    assert table["share"].isna().tolist() == [False, True] + [False] * 6
    short = lp.HeadValueRank(layers=[0]).run(gpt2, [[5, 5]])
    assert short.other_margin.isnan().all() and (short.other == -1).all() and (short.null_rank == -1).all()
    for ask in (short.by_head, short.by_other):
        with pytest.raises(ValueError, match="prompts must have two tokens that are not special, with different ids"):
            ask()
    assert short.figure().data


def test_tokens_have_the_same_control_in_any_company(gpt2):
    probe = lp.HeadValueRank(layers=[1])
    together, alone = probe.run(gpt2, TEXTS[:3]), probe.run(gpt2, TEXTS[1])
    rows = together.token.prompt == 1
    for name in ("null_other_margin", "other_margin", "score"):
        torch.testing.assert_close(
            getattr(together, name)[..., rows], getattr(alone, name), rtol=0, atol=1e-4, equal_nan=True
        )
    other = lp.HeadValueRank(layers=[1], null_seed=3).run(gpt2, TEXTS[1])
    assert not torch.equal(other.null_other_margin.nan_to_num(), alone.null_other_margin.nan_to_num())
    assert torch.equal(other.other_margin.nan_to_num(), alone.other_margin.nan_to_num())


def test_tables_do_not_depend_on_the_order_of_prompts(gpt2):
    texts = lp.demo.sentences()[:14]
    one, turned = by_hand(gpt2, texts), by_hand(gpt2, texts[::-1])
    for own, other in ((one.by_head(), turned.by_head()), (one.by_other(), turned.by_other())):
        pd.testing.assert_frame_equal(own, other, rtol=1e-6)


def test_figures_show_what_is_stored(gpt2):
    result = by_hand(gpt2)
    spoken = ~result.token.special
    grid, null = result.figure().data
    assert grid.text[0][1] == f"{np.median(result.rank[0, 1, spoken].numpy()):,.0f}"
    assert list(grid.customdata[1]) == [np.median(result.rank[1, head, spoken].numpy()) for head in range(4)]
    known = result.null_rank[1, :, spoken]
    assert list(null.customdata[1]) == [np.median(each[each >= 0].numpy()) for each in known]
    control = np.median(result.null_rank[..., spoken][result.null_rank[..., spoken] >= 0].numpy())
    assert f"{control:,.0f}" in result.figure().layout.title.text
    table, panels = result.by_other(), result.figure_others().data
    assert [value for row in panels[0].z for value in row] == table["share"].tolist()
    assert [value for row in panels[1].z for value in row] == table["null_share"].tolist()


@pytest.mark.usefixtures("as_users_run_it")
def test_what_cannot_be_asked_is_said(monkeypatch, gpt2):
    with pytest.raises(
        ValueError, match="must be a decoder, whose layers norm their input; got tiny-bert, where embed"
    ):
        lp.HeadValueRank().run(tiny.bridge("bert"), OLD)
    with pytest.raises(ValueError, match=r"neighbours=...\) must be at most 400, the size of the vocabulary; got 401"):
        lp.HeadValueRank(neighbours=401).run(gpt2, OLD)
    with pytest.raises(ValueError, match=r"null_seed=...\) must be a whole number, 0 or more; got -1"):
        lp.HeadValueRank(null_seed=-1)
    model = tiny.bridge("gpt2")
    original = ModelView.values
    monkeypatch.setattr(ModelView, "values", lambda view, layer, states: original(view, layer, states) * 1.01)
    with pytest.raises(
        ValueError, match="the values of layer 2 of tiny-gpt2 must be W_V of its normed input; got valu"
    ):
        lp.HeadValueRank(layers=[2]).run(model, OLD)
