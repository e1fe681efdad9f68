"""AttentionWindow: Hugging Face with the same masks, the model's own window, random keys, tables by hand, refusals."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import HAS_HOOKED

import lens_probes as lp
from lens_probes.examples import tiny
from lens_probes.experiments import attention_window
from lens_probes.experiments.attention_window import kept
from lens_probes.model import ModelView
from lens_probes.model.masking import Masking
from lens_probes.testing import PROMPTS, assert_same
from lens_probes.text.prompts import tokenize

TEXTS = lp.demo.sentences()[:6]
MAKERS = ["bridge", *(["hooked"] if HAS_HOOKED else [])]
DEAF = ("opt", "gpt_neo", "gptj")  # decoders whose attention a Bridge leaves to Hugging Face


def huggingface_loss(architecture, tokens, keep, only=None):
    """Mean loss of a prompt whose queries attend to `keep`: a 4-D additive mask, of all layers or `only` one."""
    model = tiny.huggingface(architecture)
    additive = torch.zeros(keep.shape[-3:]).masked_fill(~keep, torch.finfo(torch.float32).min)[None]
    masked = {"attention_mask": additive}
    base = getattr(model, "model", None) or getattr(model, "transformer", None) or model.gpt_neox
    base = getattr(base, "decoder", base)
    for number, block in enumerate(base.layers if hasattr(base, "layers") else base.h):
        if only == number or (only is None and architecture == "opt"):  # OPT would take positions from a 4-D mask
            part = next(getattr(block, name) for name in ("self_attn", "attn", "attention") if hasattr(block, name))
            part.register_forward_pre_hook(lambda part, args, named: (args, named | masked), with_kwargs=True)
    with torch.no_grad():
        log_prob = (
            model(tokens.id[None], **(masked if only is None and architecture != "opt" else {}))
            .logits[0]
            .float()
            .log_softmax(-1)
        )
    counted = ~tokens.special[1:]
    return -log_prob[:-1].gather(1, tokens.id[1:, None])[:, 0][counted].mean()


def window(n, radius, first=False):
    """The keys of each query, counted one by one."""
    return torch.tensor([[k <= q and (q - k < radius or (first and k == 0)) for k in range(n)] for q in range(n)])


def test_losses_are_those_of_huggingface_with_a_mask_and_at_full_radius_the_models_own(decoder):
    model, architecture = decoder.build(), decoder.architecture
    experiment = lp.AttentionWindow(radii=[1, 5, 60])
    if decoder.maker == "bridge" and architecture in DEAF:
        with pytest.raises(ValueError, match=f"must change what the heads of layer 0 of tiny-{architecture} put out"):
            experiment.run(model, TEXTS[:2], progress=False)
        return
    result = experiment.run(model, TEXTS[:2], progress=False)
    for number, tokens in tokenize(TEXTS[:2], ModelView(model)).by_prompt():
        n = len(tokens)
        for radius, at in ((1, 0), (5, 1), (60, 2)):
            for first in (False, True):
                expected = huggingface_loss(architecture, tokens, window(n, radius, first)[None])
                found = result.windowed[int(first), 0, at, number]
                torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
        torch.testing.assert_close(
            result.loss[number], huggingface_loss(architecture, tokens, window(n, n)[None]), rtol=0, atol=1e-4
        )
    whole = result.loss.expand(2, -1)
    torch.testing.assert_close(result.windowed[:, 0, 2], whole, rtol=0, atol=1e-5)
    torch.testing.assert_close(result.random[:, 0, 2], whole, rtol=0, atol=1e-5)
    assert ((result.windowed[:, 0, 0] - whole).abs() > 1e-3).all()


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "neox"])
def test_one_layer_or_some_of_its_heads_have_the_window_and_no_others(architecture):
    model = tiny.bridge(architecture)
    tokens = tokenize(TEXTS[0], ModelView(model))
    n = len(tokens)
    whole, near = window(n, n), window(n, 3)
    by_layer = lp.AttentionWindow(at="layer", radii=[3]).run(model, TEXTS[0], progress=False)
    assert by_layer.place == ("L0", "L1", "L2", "all layers")
    for layer in range(3):
        expected = huggingface_loss(architecture, tokens, near[None], only=layer)
        torch.testing.assert_close(by_layer.windowed[0, layer, 0, 0], expected, rtol=0, atol=1e-4)
    by_head = lp.AttentionWindow(at="head", heads=["L1H2", "L1H0"], radii=[3]).run(model, TEXTS[0], progress=False)
    assert by_head.place == ("L1H2", "L1H0", "2 heads")
    for place, heads in enumerate(([2], [0], [0, 2])):
        keep = torch.stack([near if head in heads else whole for head in range(4)])
        expected = huggingface_loss(architecture, tokens, keep, only=1)
        torch.testing.assert_close(by_head.windowed[0, place, 0, 0], expected, rtol=0, atol=1e-4)
    every = lp.AttentionWindow(at="head", layers=[1], radii=[3]).run(model, TEXTS[0], progress=False)
    assert every.place == ("L1H0", "L1H1", "L1H2", "L1H3", "1 layer")
    torch.testing.assert_close(every.windowed[:, [2, 0, 4]][:, :2], by_head.windowed[:, :2], rtol=0, atol=1e-5)
    torch.testing.assert_close(every.windowed[:, 4], by_layer.windowed[:, 1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("own", ["MistralForCausalLM", "Gemma2ForCausalLM"])
def test_a_window_as_wide_as_the_models_own_changes_nothing_and_none_makes_it_wider(own, monkeypatch):
    _, sizes = tiny._MODELS["gemma2"]
    if own == "MistralForCausalLM":
        sizes = {name: sizes[name] for name in ("intermediate_size", "num_key_value_heads", "head_dim")}
    monkeypatch.setitem(tiny._MODELS, "gemma2", (own, sizes | {"sliding_window": 8}))
    model = tiny.bridge("gemma2")
    local = [0, 1, 2] if own == "MistralForCausalLM" else [0, 2]  # of Gemma 2, every second layer
    result = lp.AttentionWindow(layers=local, radii=[4, 8, 16]).run(model, TEXTS[:3], progress=False)
    whole = result.loss.expand(2, 2, -1)  # with the first token too, where it is beyond the model's window
    torch.testing.assert_close(result.windowed[:, 0, 1:], whole, rtol=0, atol=1e-5)
    torch.testing.assert_close(result.random[:, 0, 1:], whole, rtol=0, atol=1e-5)
    assert ((result.windowed[:, 0, 0] - result.loss).abs() > 1e-4).all()
    others = lp.AttentionWindow(radii=[8]).run(model, TEXTS[:3], progress=False).windowed[0, 0, 0]
    same = torch.allclose(others, result.loss, rtol=0, atol=1e-4)
    assert same == (own == "MistralForCausalLM")


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("architecture", [*tiny.RARE, "opt"])
def test_a_model_that_does_not_obey_masks_is_refused(maker, architecture):
    if maker == "hooked" and architecture not in ("gpt_neo", "gptj", "opt"):
        pytest.skip("no HookedTransformer of it")
    try:
        view = ModelView(getattr(tiny, maker)(architecture))
        view.activations(torch.zeros(1, 2, dtype=torch.int64), torch.ones(1, 2, dtype=torch.bool), [view.hook_z(0)])
    except AttributeError:
        pytest.skip("TransformerLens cannot run CodeGen with these transformers")
    if maker == "bridge" and architecture in DEAF:
        with pytest.raises(
            ValueError, match=r"masking attention scores must change .*Hugging Face, where edits do noth"
        ):
            Masking(view, [1])
    else:
        assert Masking(view, [0, 2]).hooks == ["blocks.0.attn.hook_attn_scores", "blocks.2.attn.hook_attn_scores"]


def test_a_layer_whose_edits_are_ignored_is_refused_by_its_number(monkeypatch):
    view = ModelView(tiny.bridge("llama"))
    original, z = view.edited, view.hook_z(1)

    def ignored(ids, mask, names, edits):
        own = original(ids, mask, [z], {}) if z in names else {}
        return original(ids, mask, names, edits) | own

    monkeypatch.setattr(view, "edited", ignored)
    assert len(Masking(view, [0, 2]).hooks) == 2
    with pytest.raises(
        ValueError, match="what the heads of layer 1 of tiny-llama put out; got outputs that are off by"
    ):
        Masking(view, [0, 1])


def test_random_keys_are_as_many_of_those_that_the_query_may_attend_to():
    n, first = 9, torch.zeros(2, 9, dtype=torch.bool)
    first[0, 0] = first[1, 3] = True  # the second prompt is padded on the left, and has a window of its own
    may = torch.stack([window(n, n), window(n, 4)])
    may[1, :, :3] = False
    random = torch.rand(2, n, n, generator=torch.Generator().manual_seed(0))
    before = torch.zeros_like(may)
    for radius in range(1, n + 1):
        for always in (torch.zeros_like(first), first):
            own, drawn = kept(may, radius, always), kept(may, radius, always, random)
            assert torch.equal(own.sum(-1), drawn.sum(-1)) and not (drawn & ~may).any()
            assert ((drawn & may & always[:, None]) == (may & always[:, None])).all()
        drawn = kept(may, radius, torch.zeros_like(first), random)
        assert (drawn | ~before).all()  # those of a smaller radius are among them
        before = drawn
    assert torch.equal(before, may)
    for row, keep in enumerate(kept(may, 2, first)):
        start = 3 * row
        for query in range(start, n):
            expected = {query, max(query - 1, start)} | ({start} if may[row, query, start] else set())
            assert set(keep[query].nonzero().flatten().tolist()) == expected


def test_random_keys_are_seeded_by_the_prompt_and_the_layer(monkeypatch):
    model, seen = tiny.bridge("llama"), []
    original = attention_window.kept

    def remembered(may, radius, always, order=None):
        if order is not None and radius == 2 and not always.any():
            seen.append(original(may, radius, always, order))
        return original(may, radius, always, order)

    monkeypatch.setattr(attention_window, "kept", remembered)
    lp.AttentionWindow(radii=[2]).run(model, TEXTS[0], progress=False)
    alone, seen[:] = list(seen), []
    lp.AttentionWindow(radii=[2]).run(model, [TEXTS[1], TEXTS[0]], progress=False)
    n = alone[0].shape[-1]
    assert len(alone) == 3 and not torch.equal(alone[0], alone[1])  # one per layer
    for one, both in zip(alone, seen, strict=True):
        assert torch.equal(both[1, :n, :n], one[0])
    seen[:] = []
    lp.AttentionWindow(radii=[2], seed=1).run(model, TEXTS[0], progress=False)
    assert not torch.equal(seen[0], alone[0])


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize(
    "architecture", ["gemma2", *(pytest.param(a, marks=pytest.mark.matrix) for a in ("gpt2", "neox"))]
)
def test_a_prompt_has_the_same_numbers_in_any_company_and_padded_on_either_side(maker, architecture):
    build, experiment = getattr(tiny, maker), lp.AttentionWindow(radii=[4])
    if maker == "hooked" and architecture == "neox":
        pytest.skip("one rotary model is enough")
    model = build(architecture)
    together = experiment.run(model, TEXTS[:3], progress=False)
    left = experiment.run(build(architecture, padding_side="left"), TEXTS[:3], progress=False)
    assert_same(together, left, "left padding")
    turned = experiment.run(model, TEXTS[2::-1], progress=False)
    alone = experiment.run(model, TEXTS[1], progress=False)
    for name in ("windowed", "random"):
        found = getattr(together, name)
        torch.testing.assert_close(getattr(turned, name).flip(-1), found, rtol=0, atol=1e-4)
        torch.testing.assert_close(getattr(alone, name)[..., 0], found[..., 1], rtol=0, atol=1e-4)


def by_hand(windowed, random, epsilon=0.1):
    """A result of one place with these increases, one row per radius and one column per prompt."""
    n = len(windowed[0])
    result = lp.AttentionWindow(radii=[1, 2, 4, 8], epsilon=epsilon).run(tiny.bridge("gpt2"), TEXTS[:n], progress=False)
    both = [torch.tensor([[each], [each]]) + 2 for each in (windowed, random)]
    return replace(result, loss=torch.full((n,), 2.0), windowed=both[0], random=both[1])


def test_what_is_needed_by_hand():
    means = [0.5, 0.05, 0.3, 0.02]  # 2 would do, but 4 does not: from 8 on
    spread = np.array([-0.1, 0.0, 0.1, 0.0, 0.0])
    windowed = [(mean + spread).tolist() for mean in means]
    result = by_hand(windowed, [[0.01] * 5, [0.2] * 5, [0.05] * 5, [0.0] * 5])
    table = result.needed()
    assert table["first_token"].tolist() == ["masked", "kept"] and table["epsilon"].tolist() == [0.1] * 2
    half = 2.776 * spread.std(ddof=1) / 5**0.5  # Student's t of four degrees of freedom
    assert 0.02 + half > 0.1 and 0.3 - half > 0.1
    assert table.loc[0, ["radius", "low", "random"]].tolist() == [8, 8, 4] and table["high"].isna().all()
    wide = result.needed(0.35)
    assert wide.loc[0, ["radius", "low", "high", "random"]].tolist() == [2, 2, 8, 1]
    assert result.needed(1).loc[0, ["radius", "low", "high"]].tolist() == [1, 1, 1]
    half_a_nat = by_hand([[0.5] * 4] * 4, [[0.5] * 4] * 4)
    assert half_a_nat.needed(0.5)["radius"].tolist() == [1, 1]  # epsilon itself is allowed
    never = half_a_nat.needed()
    assert never[["radius", "low", "high", "random"]].isna().all(axis=None)
    assert str(never["radius"].dtype) == "Int64" and never["prompts"].tolist() == [4, 4]


def test_the_table_by_hand():
    windowed = [[0.5, 0.7, 0.9, 0.6, 0.8, 0.7]] + [[0.1, 0.1, 0.0, 0.2, 0.1, 0.1]] * 3
    random = [[0.2, 0.1, 0.3, 0.2, 0.3, 0.1]] * 4
    result = by_hand(windowed, random)
    table = result.table()
    assert list(table)[:8] == ["first_token", "place", "radius", "effect", "low", "high", "p", "q"]
    row = table.iloc[0]
    assert row["increase"] == pytest.approx(0.7) and row["random"] == pytest.approx(0.2)
    assert row["effect"] == pytest.approx(0.5) and row["p"] == pytest.approx(2 / 64, abs=0.02)
    low, high = lp.inference.mean_interval(np.array([windowed[0]]))
    assert [row["increase_low"], row["increase_high"]] == pytest.approx([low[0], high[0]])
    apart = np.array([windowed[0]]) - np.array([random[0]])
    assert [row["low"], row["high"]] == pytest.approx(lp.inference.mean_interval(apart).flatten().tolist())
    assert table.attrs["null"] == "the last tokens are worth no more than as many random ones"
    assert result.increase[0, 0].tolist() == pytest.approx([0.7, 0.1, 0.1, 0.1])
    frame = result.to_frame()
    assert list(frame) == ["first_token", "place", "radius", "increase", "random_increase"] and len(frame) == 8


def test_the_table_does_not_depend_on_the_order_of_prompts():
    texts, experiment = lp.demo.sentences()[:14], lp.AttentionWindow(radii=[4])
    one, turned = (experiment.run(tiny.bridge("gpt2"), each, progress=False) for each in (texts, texts[::-1]))
    pd.testing.assert_frame_equal(one.table(), turned.table(), rtol=1e-4, atol=1e-5)


def test_a_missing_loss_is_missing_everywhere():
    windowed = [[0.5] * 6, [0.1] * 5 + [float("nan")], [0.1] * 6, [0.0] * 6]
    result = by_hand(windowed, [[0.2] * 6] * 4)
    table = result.table()
    assert table.loc[1, ["effect", "low", "high", "p", "q", "increase"]].isna().all()
    assert table.loc[[0, 2, 3], ["effect", "p", "q"]].notna().all(axis=None)
    assert result.needed().loc[0, "radius"] == 4  # what is not known is not enough


def test_half_precision_gives_nearly_the_same_and_at_full_radius_the_models_own():
    exact, half = (
        lp.AttentionWindow(radii=[2, 64]).run(tiny.bridge("llama", dtype=dtype), TEXTS[:3], progress=False)
        for dtype in (torch.float32, torch.bfloat16)
    )
    torch.testing.assert_close(half.windowed, exact.windowed, rtol=0, atol=0.2)
    torch.testing.assert_close(half.windowed[:, 0, 1], half.loss.expand(2, -1), rtol=0, atol=1e-5)


def test_radii_are_powers_of_two_and_the_longest_prompt():
    result = lp.AttentionWindow().run(tiny.bridge("gpt2"), [list(range(5, 14)), [5, 6]], progress=False)
    assert result.radius == ("1", "2", "4", "8", "9") and result.place == ("all layers",)
    assert lp.AttentionWindow().run(tiny.bridge("gpt2"), [[5, 6]], progress=False).radius == ("1", "2")
    assert lp.AttentionWindow(layers=[-1]).run(tiny.bridge("gpt2"), [[5, 6]], progress=False).place == ("1 layer",)
    one = lp.AttentionWindow(at="layer", layers=[-1]).run(tiny.bridge("gpt2"), [[5, 6]], progress=False)
    assert one.place == ("L2",)


def test_an_interrupt_leaves_the_radii_done(monkeypatch):
    original, calls = attention_window.batch_loss, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 10:  # four passes per radius
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(attention_window, "batch_loss", interrupted)
    result = lp.AttentionWindow(radii=[1, 2, 4, 64]).run(tiny.bridge("gpt2"), list(PROMPTS), progress=False)
    assert result.radius == ("1", "2") and result.increase.shape == (2, 1, 2)


def test_it_takes_as_many_passes_as_it_says(monkeypatch):
    calls, original = [], ModelView.logits
    monkeypatch.setattr(ModelView, "logits", lambda *args: calls.append(args) or original(*args))
    experiment = lp.AttentionWindow(at="layer", layers=[0, 2], radii=[1, 2])
    experiment.run(tiny.bridge("gpt2"), list(PROMPTS), progress=False)
    assert len(calls) == 1 + 4 * 2 * 3


def test_figures_show_what_is_stored():
    result = lp.AttentionWindow(at="layer", radii=[1, 8]).run(tiny.bridge("llama"), TEXTS, progress=False)
    drawn = {(trace.name, trace.xaxis): list(trace.y) for trace in result.figure().data if trace.name}
    assert drawn["last tokens", "x2"] == pytest.approx(result.increase[1, 3].tolist(), abs=1e-6)
    assert drawn["as many random tokens", "x"] == pytest.approx(result.random_increase[0, 3].tolist(), abs=1e-6)
    assert drawn["epsilon, 0.05", "x"] == [0.05, 0.05]
    second = {(trace.name, trace.xaxis): list(trace.y) for trace in result.figure("L1").data if trace.name}
    assert second["last tokens", "x"] == pytest.approx(result.increase[0, 1].tolist(), abs=1e-6)
    grids = result.figure_places().data
    assert [list(row) for row in grids[1].z] == result.increase[1].tolist()


@pytest.mark.usefixtures("as_users_run_it")
def test_what_cannot_be_asked_is_said():
    for radii in ([], [0, 1], [4, 2], [2, 2]):
        with pytest.raises(ValueError, match=r"radii=...\) must be a list of whole numbers, 1 or more, in ascending"):
            lp.AttentionWindow(radii=radii)
    with pytest.raises(ValueError, match=r"at=...\) must be 'all', 'layer' or 'head'; got 'heads'"):
        lp.AttentionWindow(at="heads")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"epsilon=...\) must be a number above 0; got 0"):
        lp.AttentionWindow(epsilon=0)
    with pytest.raises(TypeError, match=r'heads=...\) must be a list of heads such as \["L3H1"\], or None; got \[1\]'):
        lp.AttentionWindow(heads=[1])  # pyright: ignore[reportArgumentType]
    model = tiny.bridge("gpt2")
    for name in ("L3H0", "L0H4", "H1", "L1", "L-1H0", "l0h0"):
        with pytest.raises(ValueError, match=rf"heads must be names from L0H0 to L2H3, such as L1H0; got '{name}'"):
            lp.AttentionWindow(heads=[name]).run(model, TEXTS)
    for heads in ([], ["L0H1", "L0H1"]):
        with pytest.raises(ValueError, match="heads must name one head or more, each once; got"):
            lp.AttentionWindow(heads=heads).run(model, TEXTS)
    with pytest.raises(ValueError, match=r"takes layers=... or heads=...; got both: heads name their layers"):
        lp.AttentionWindow(heads=["L0H1"], layers=[0]).run(model, TEXTS)
    with pytest.raises(ValueError, match="predicts masked ones"):
        lp.AttentionWindow().run(tiny.bridge("bert"), TEXTS)
    with pytest.raises(ValueError, match="prompts need two tokens or more"):
        lp.AttentionWindow().run(model, [[5]])
    result = lp.AttentionWindow(radii=[1]).run(model, TEXTS[:2], progress=False)
    for wrong in (0, -1, "x", float("nan")):
        with pytest.raises(ValueError, match="epsilon must be a number above 0, in nats; got"):
            result.needed(wrong)
    with pytest.raises(ValueError, match="place must be one of all layers, by label or number; got 'L1'"):
        result.figure("L1")
    assert isinstance(result.needed(), pd.DataFrame)
