"""LayerSkip against Hugging Face's modules, its invariants, its null, and its refusals."""

import numpy as np
import pytest
import torch
from torch.nn.functional import kl_div

import lens_probes as lp
from lens_probes.examples import tiny
from lens_probes.experiments.layer_skip import PLACES, halves_of_prompts
from lens_probes.maths.ascent import seeded
from lens_probes.model import ModelView
from lens_probes.text.prompts import tokenize

TEXTS = lp.demo.sentences()[:6]
ARCHITECTURES = ["gpt2", "llama", "gemma2", "neox", "bert"]


def read(model, ids, layer=-1, replace=torch.add):
    """The states before and after every block, and the log-probabilities, of Hugging Face's model."""
    blocks = next(part for part in model.modules() if isinstance(part, torch.nn.ModuleList) and len(part) == 3)
    before, after = {}, {}

    def kept(number):
        def keep(module, given, named, output):
            state = output[0] if isinstance(output, tuple) else output
            before[number] = (given[0] if given else named["hidden_states"])[0]
            after[number] = state[0] if number != layer else replace(before[number], state[0])
            now = after[number][None]
            return (now, *output[1:]) if isinstance(output, tuple) else now

        return keep

    handles = [block.register_forward_hook(kept(i), with_kwargs=True) for i, block in enumerate(blocks)]
    with torch.no_grad():
        log_prob = model(ids[None]).logits[0].log_softmax(-1)
    for handle in handles:
        handle.remove()
    return [after[i] - before[i] for i in range(3)], log_prob


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_changes_and_divergences_are_those_of_hugging_faces_modules(architecture):
    result = lp.LayerSkip(layers=[0, 1], seed=3).run(tiny.bridge(architecture), TEXTS[0], progress=False)
    tokens = tokenize(TEXTS[0], ModelView(tiny.bridge(architecture)))
    reference, ids = tiny.huggingface(architecture), tokens.id
    steps, log_prob = read(reference, ids)
    earlier, later = halves_of_prompts(tokens)
    for row, layer in enumerate((0, 1)):
        drawn = torch.randn(len(ids), 32, generator=seeded(f"{layer} {ids.tolist()}", 3))
        random = steps[layer].norm(dim=-1, keepdim=True) * drawn / drawn.norm(dim=-1, keepdim=True)
        for place, (where, measured) in enumerate(((torch.ones_like(earlier), ~tokens.special), (earlier, later))):
            for kind, divergence, change in (
                (lambda before, after: before, result.divergence, result.change),
                (lambda before, after, random=random: after + random, result.random_divergence, result.random_change),
            ):
                now, log_q = read(
                    reference, ids, layer, lambda b, a, w=where, k=kind: torch.where(w[:, None], k(b, a), a)
                )
                kl = kl_div(log_q, log_prob, reduction="none", log_target=True).sum(-1)[measured].mean()
                assert float(divergence[place, row, 0]) == pytest.approx(float(kl), rel=1e-3, abs=1e-5)
                for after in range(layer + 1, 3):
                    ratio = (now[after] - steps[after]).norm(dim=-1) / steps[after].norm(dim=-1)
                    expected = float(ratio[measured].mean())
                    assert float(change[place, row, after, 0]) == pytest.approx(expected, rel=1e-3, abs=1e-5)


def test_the_second_half_and_all_that_comes_before_it(gpt2):
    tokens = tokenize([[0, 7, 8, 9], [0, 7, 8, 9, 10], [0, 7]], ModelView(gpt2))
    earlier, later = halves_of_prompts(tokens)
    assert tokens.special.int().tolist() == [1, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0]
    assert earlier.int().tolist() == [1, 1, 0, 0, 1, 1, 1, 0, 0, 1, 0]
    assert later.int().tolist() == [0, 0, 1, 1, 0, 0, 0, 1, 1, 0, 1]


@pytest.mark.parametrize("architecture", ["gpt2", "bert"])
def test_no_later_token_sees_what_earlier_ones_did_in_the_last_layer(architecture):
    result = lp.LayerSkip().run(tiny.bridge(architecture), TEXTS, progress=False)
    assert result.divergence[1, -1].tolist() == pytest.approx([0.0] * 6, abs=1e-6)
    assert (result.divergence[0, -1] > 1e-4).all() and (result.divergence[1, 0] > 0).all()
    for row in range(3):  # a layer changes those after it only
        assert result.change[:, row, : row + 1].isnan().all() and result.change[:, row, row + 1 :].isfinite().all()


def test_layers_that_add_nothing_can_be_skipped(idle):
    result = lp.LayerSkip(layers=[1]).run(idle, TEXTS, progress=False)
    assert result.divergence.abs().max() < 1e-6 and result.random_divergence.abs().max() < 1e-6
    assert result.change[:, :, 2].isnan().all()  # 0 / 0: there is no step to change


def test_a_prompt_counts_alone_as_among_others(decoder):
    model, asked = decoder.build(), lp.LayerSkip(layers=[0, 2])
    together = asked.run(model, TEXTS, progress=False)
    for number in (0, 3):
        alone = asked.run(model, TEXTS[number], progress=False)
        for name in ("change", "divergence", "random_change", "random_divergence"):
            own, among = getattr(alone, name)[..., 0], getattr(together, name)[..., number]
            torch.testing.assert_close(own, among, rtol=2e-3, atol=1e-4, equal_nan=True)


def test_half_precision_tells_the_same_story():
    exact, half = (
        lp.LayerSkip().run(tiny.bridge("llama", dtype=dtype), TEXTS, progress=False)
        for dtype in (torch.float32, torch.bfloat16)
    )
    near = ("divergence", "random_divergence", "change")
    for name in near:
        torch.testing.assert_close(getattr(half, name).nanmean(), getattr(exact, name).nanmean(), rtol=0.15, atol=0.01)


def test_the_table_sets_each_divergence_beside_its_null_and_splits_changes_into_near_and_far(gpt2):
    result = lp.LayerSkip().run(gpt2, TEXTS, progress=False)
    table = result.table()
    assert table[["place", "skipped"]].values.tolist() == [[place, str(i)] for place in PLACES for i in range(3)]
    own, random = result.divergence.double(), result.random_divergence.double()
    assert table["effect"].tolist() == pytest.approx((own - random).mean(-1).flatten().tolist())
    change = result.change.double().mean(-1)
    assert table["next"].tolist()[:2] == pytest.approx([float(change[0, 0, 1]), float(change[0, 1, 2])])
    assert table["beyond"].iloc[0] == pytest.approx(float(change[0, 0, 2]))
    assert table[["next", "beyond"]].iloc[2].isna().all() and np.isnan(table["beyond"].iloc[1])
    assert table.attrs["null"].startswith("skipping a layer changes predictions no more")


def test_the_halves_are_those_of_the_layers_without_the_middle_one(gpt2):
    result = lp.LayerSkip().run(gpt2, TEXTS, progress=False)
    own, random = result.divergence.double().mean(-1), result.random_divergence.double().mean(-1)
    table = result.halves()
    assert table["first_half"].tolist() == pytest.approx(own[:, 0].tolist())
    assert table["random_second_half"].tolist() == pytest.approx(random[:, 2].tolist())
    assert table["effect"].tolist() == pytest.approx((own[:, 0] - own[:, 2]).tolist())
    for place, finding in zip(PLACES, result.findings(), strict=True):
        assert finding.startswith(f"Skipping one of the first half of the layers changes the prediction of {place} by ")
    assert lp.LayerSkip(layers=[1]).run(gpt2, TEXTS, progress=False).findings() == []


def test_the_figures_show_both_places(gpt2):
    result = lp.LayerSkip().run(gpt2, TEXTS, progress=False)
    figure = result.figure()
    assert [axis.title.text for axis in figure.select_yaxes()] == [f"KL of {place} (nats)" for place in PLACES]
    grids = [trace.name for trace in result.figure_layers().data]
    assert grids == [*PLACES, *(f"{place}, random" for place in PLACES)]


def test_an_interrupt_leaves_the_layers_done(gpt2, monkeypatch):
    from lens_probes.experiments import layer_skip

    original, calls = layer_skip._Part.skipped, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(layer_skip._Part, "skipped", interrupted)
    assert lp.LayerSkip().run(gpt2, TEXTS, progress=False).skipped == ("0", "1")


def test_a_model_that_does_not_obey_is_refused():
    model = tiny.bridge("gpt2")
    model.blocks[1].register_forward_pre_hook(lambda module, given: (given[0] + 1, *given[1:]))
    with pytest.raises(ValueError, match=r"layer 1 of .* must read what layer 0 was replaced by"):
        lp.LayerSkip(layers=[0]).run(model, TEXTS, progress=False)


@pytest.mark.usefixtures("as_users_run_it")
def test_what_cannot_be_asked_is_said(gpt2):
    with pytest.raises(ValueError, match="two tokens or more, the last of them not special; got 1 token in prompt 0"):
        lp.LayerSkip().run(gpt2, [[7]])
    with pytest.raises(ValueError, match="two skipped layers or more; got one"):
        lp.LayerSkip(layers=[1]).run(gpt2, TEXTS, progress=False).halves()
    with pytest.raises(ValueError, match="layer 3 is out of range"):
        lp.LayerSkip(layers=[3]).run(gpt2, TEXTS)
