"""The tokens that activate a unit most: against sorting everything, however batches fall, with ties and few tokens."""

from typing import Any

import numpy as np
import pytest
import torch

import lens_probes as lp
from lens_probes import directions
from lens_probes.examples import tiny
from lens_probes.model import ModelView
from lens_probes.probes.max_activating_examples import (
    at_least,
    edges,
    first,
    histogram,
    kth,
    packed,
    side_by_side,
    unpacked,
)
from lens_probes.testing import assert_same

TEXTS = lp.demo.sentences()[:20]


def activations(model: Any, hook: str) -> list[torch.Tensor]:
    """`[token unit]` of every prompt, from the model's own cache."""
    return [model.run_with_cache(model.to_tokens(text))[1][hook][0] for text in TEXTS]


@pytest.mark.parametrize("architecture", ["gpt2", "llama", pytest.param("gemma2", marks=pytest.mark.matrix)])
def test_examples_are_those_of_sorting_all_activations(architecture: str) -> None:
    model = tiny.bridge(architecture)
    view = ModelView(model)
    result = lp.MaxActivatingExamples(k=4, sample=10).run(model, TEXTS, batch_size=3, progress=False)
    for layer in range(3):
        found = [each[1:] for each in activations(model, view.hook_neurons(layer))]  # without the token prepended
        everything = torch.cat(found)
        torch.testing.assert_close(result.value[layer], everything.topk(4, dim=0).values.T, atol=1e-5, rtol=1e-5)
        assert result.histogram[layer].sum(-1).unique().tolist() == [len(everything)]
        own = np.stack([np.histogram(each, edges().numpy())[0] for each in everything.T.double().numpy()])
        inside = (everything.abs() < 256).all()
        assert inside and np.abs(result.histogram[layer].numpy() - own).max() <= 1  # a value at an edge may be rounded
    row = result.examples(1, 7).iloc[0]
    prompt = next(
        i
        for i, each in enumerate(activations(model, view.hook_neurons(1)))
        if each[1:, 7].max() == pytest.approx(row["activation"], abs=1e-5)
    )
    position = int(row["position"])
    text = model.to_str_tokens(model.to_tokens(TEXTS[prompt]))
    assert row["token"] == text[position]
    assert row["before"] == "".join(text[max(0, position - 8) : position])
    assert row["after"] == "".join(text[position + 1 : position + 9])


def same(one: lp.MaxActivatingExamplesResult, other: lp.MaxActivatingExamplesResult) -> None:
    torch.testing.assert_close(one.value, other.value, equal_nan=True, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(one.sample_value, other.sample_value, atol=1e-5, rtol=1e-5)
    assert torch.equal(one.key[one.sample_example], other.key[other.sample_example])
    torch.testing.assert_close(one.histogram, other.histogram, atol=1, rtol=0)
    assert sorted(one.key.tolist()) == sorted(other.key.tolist()) and one.vocab == other.vocab
    known = one.example >= 0
    assert torch.equal(known, other.example >= 0)
    assert torch.equal(one.key[one.example[known]], other.key[other.example[known]])


@pytest.mark.parametrize("at", ["neuron", "head", "resid_post"])
def test_neither_batches_nor_the_order_of_prompts_nor_of_merging_change_the_lists(at: Any) -> None:
    model, probe = tiny.bridge("llama"), lp.MaxActivatingExamples(at=at, k=5, sample=7, layers=[0, 2])
    whole = probe.run(model, TEXTS, progress=False)
    same(whole, probe.run(model, TEXTS, batch_size=1, progress=False))
    same(whole, probe.run(model, TEXTS[::-1], progress=False))
    parts = [probe.run(model, TEXTS[i : i + 5], progress=False) for i in range(0, 20, 5)]
    merge = lp.MaxActivatingExamplesResult.merge
    same(whole, merge([merge(parts[:1]), merge([merge(parts[1:3]), parts[3]])]))


def test_a_later_batch_holds_only_what_may_still_be_among_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    model, probe, found = tiny.bridge("llama"), lp.MaxActivatingExamples(k=4, sample=20, layers=[1]), []
    after = lp.MaxActivatingExamples.measure_after
    monkeypatch.setattr(
        lp.MaxActivatingExamples, "measure_after", lambda *given: found.append(after(*given)) or found[-1]
    )
    whole = probe.run(model, TEXTS, batch_size=4, progress=False)
    held = [int((part.example >= 0).sum()) for part in found]
    assert len(found) == 4 and sum(held) < 0.7 * 4 * whole.example.numel() and held[-1] < 0.5 * whole.example.numel()
    assert len(found[-1].sample_example) < 12
    monkeypatch.setattr(lp.MaxActivatingExamples, "measure_after", lambda self, reading, _: self.measure(reading))
    same(whole, probe.run(model, TEXTS, batch_size=4, progress=False))


def test_equal_activations_are_ordered_by_prompt_and_position_alone() -> None:
    """A neuron that is always 0: the list is a random sample, the same for any order."""
    model = tiny.bridge("gpt2")
    model.blocks[1].mlp.original_component.c_fc.weight.data[:, 3] = 0
    model.blocks[1].mlp.original_component.c_fc.bias.data[3] = 0
    probe = lp.MaxActivatingExamples(units=[3], layers=[1], k=6, sample=6)
    one, other = (probe.run(model, texts, batch_size=n, progress=False) for texts, n in ((TEXTS, 2), (TEXTS[::-1], 20)))
    assert one.value.eq(0).all() and torch.equal(one.key[one.example], other.key[other.example])
    assert one.key[one.example].flatten().tolist() == one.key[one.sample_example].tolist()  # both have the lowest keys
    assert one.share_above.isnan().all()


def test_directions_are_dot_products_and_heads_lengths_of_mixed_values() -> None:
    model = tiny.bridge("llama")
    view = ModelView(model)
    along = torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
    result = lp.MaxActivatingExamples(at="resid_post", directions=along, layers=[1], k=2).run(
        model, TEXTS, progress=False
    )
    states = torch.cat([each[1:] for each in activations(model, view.hook("resid_post", 1))])
    torch.testing.assert_close(result.value[0], (states @ along.T).topk(2, dim=0).values.T, atol=1e-5, rtol=1e-5)
    heads = lp.MaxActivatingExamples(at="head", layers=[1], k=2).run(model, TEXTS, progress=False)
    z = torch.cat([each[1:] for each in activations(model, view.hook_z(1))])
    torch.testing.assert_close(heads.value[0], z.norm(dim=-1).topk(2, dim=0).values.T, atol=1e-5, rtol=1e-5)


def test_fewer_tokens_than_examples_leave_places_empty() -> None:
    model, probe = tiny.bridge("gpt2"), lp.MaxActivatingExamples(k=9, sample=30, units=[1], layers=[0])
    ids = model.to_tokens("Time flies")[0].tolist()
    result = probe.run(model, [ids], progress=False)
    n = len(ids) - 1
    assert result.value[0, 0].isnan().tolist() == [False] * n + [True] * (9 - n)
    assert (result.example[0, 0] == -1).sum() == 9 - n and result.sample_value.shape[-1] == n
    assert len(result.examples(0, 1)) == n and len(result.random_examples(0, 1)) == n
    assert len(result.figure(0, 1).data) == 2
    both = lp.MaxActivatingExamplesResult.merge([result, probe.run(model, TEXTS[:2], progress=False)])
    assert both.value.isfinite().all() and not (both.example < 0).any()


def test_the_share_above_is_that_of_random_tokens_with_half_of_the_largest() -> None:
    result = lp.MaxActivatingExamples(k=1, sample=40, layers=[2]).run(tiny.bridge("gpt2"), TEXTS, progress=False)
    first, drawn = result.value[0, :, :1], result.sample_value[0]
    expected = (drawn >= first / 2).float().mean(-1).masked_fill(first[:, 0] <= 0, torch.nan)
    torch.testing.assert_close(result.share_above[0], expected, equal_nan=True)
    assert 0 < float(result.share_above.nanmean()) < 1


def test_random_tokens_are_drawn_as_often_as_any_other() -> None:
    """Of 60 corpora with 40 tokens each 10 are drawn: every place about 15 times, standard deviation 3.4."""
    model, times = tiny.bridge("llama"), np.zeros(40)
    probe = lp.MaxActivatingExamples(units=[0], layers=[0], k=1, sample=10)
    random = np.random.default_rng(0)
    for _ in range(60):
        ids = random.integers(10, 90, (1, 40))
        result = probe.run(model, torch.from_numpy(ids), progress=False)
        times[result.position[result.sample_example].numpy()] += 1
    assert times.sum() == 600 and times.max() < 15 + 4 * 3.4 and times.min() > 15 - 4 * 3.4


def test_two_threads_give_what_one_gives_also_of_a_cache_with_gradients() -> None:
    model, probe, threads = tiny.bridge("llama"), lp.MaxActivatingExamples(k=4, sample=10), torch.get_num_threads()
    by_threads: list[list[Any]] = []
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            _, found = model.run_with_cache(TEXTS[0])
            cache = {name: each.clone().requires_grad_() for name, each in found.items() if "mlp" in name}
            by_threads.append([probe.run(model, TEXTS, progress=False), probe.from_cache(model, TEXTS[0], cache)])
    finally:
        torch.set_num_threads(threads)
    for of_one, of_two in zip(*by_threads, strict=True):
        assert_same(of_two, of_one, "one thread")


@pytest.mark.parametrize("seen", [0, 6, 40])
def test_lists_are_those_of_sorting_by_value_then_place_whatever_was_seen_before(seen: int) -> None:
    random = torch.Generator().manual_seed(0)
    values = torch.randint(-3, 4, (50, 5), generator=random).float() * 0.5  # many ties
    places = torch.randperm(50, generator=random)
    expected = [sorted(range(50), key=lambda i: (-row[i], places[i]))[:6] for row in values.T]
    least = kth(values[:seen], 6) if seen else kth(values, 6)
    of_all = [at_least(some, own, least) for some, own in ((values[:20], places[:20]), (values[20:], places[20:]))]
    tables = [side_by_side(found, 5) for found in of_all]
    value, place = unpacked(first(torch.cat(tables, -1), 6))
    assert place.tolist() == [[int(places[i]) for i in own] for own in expected]
    assert value.tolist() == [[float(row[i]) for i in own] for row, own in zip(values.T, expected, strict=True)]
    assert first(torch.tensor([[3, 9, 1, 5]]), 9).tolist() == [[9, 5, 3, 1]]


def test_packed_numbers_keep_value_and_place_and_have_their_order() -> None:
    values = torch.tensor([-torch.inf, -3.5, -1e-40, -0.0, 0.0, 1e-40, 2.0, 3e38, torch.inf])
    numbers = packed(values, torch.zeros(9, dtype=torch.int64))
    assert (numbers.diff() >= 0).all() and (numbers.diff() == 0).tolist() == [i == 3 for i in range(8)]
    back, place = unpacked(packed(values, torch.arange(9)))
    assert torch.equal(back, values) and place.tolist() == list(range(9))
    nothing, place = unpacked(packed(torch.tensor([torch.nan, -torch.nan]), torch.tensor([0, 2**31 - 1])))
    assert nothing.isnan().all() and place.tolist() == [0, 2**31 - 1]
    assert (packed(torch.tensor([torch.nan]), torch.tensor([0])) < numbers).all()


def test_bins_are_those_of_the_edges() -> None:
    random = torch.Generator().manual_seed(0)
    values = torch.randn(3, 4000, generator=random) * torch.tensor([[0.01], [1.0], [30.0]])
    own = np.stack([np.histogram(row, edges().numpy())[0] for row in values.double().numpy()])
    assert np.array_equal(histogram(values.T).numpy(), own)
    assert histogram(torch.tensor([[1e9], [-1e9], [0.0], [1e-30]])).nonzero()[:, 1].tolist() == [0, 32, 63]


def test_what_is_asked_must_fit_the_model() -> None:
    model = tiny.bridge("gpt2")
    with pytest.raises(ValueError, match=r"directions=\.\.\.\) must have units=None and a read point; got at='neuron'"):
        lp.MaxActivatingExamples(directions=torch.eye(32))
    with pytest.raises(
        ValueError, match=r"must be a tensor \[unit d_model\] with d_model 32; got one of shape \(3, 5\)"
    ):
        lp.MaxActivatingExamples(at="resid_post", directions=torch.zeros(3, 5)).run(model, "one two")
    with pytest.raises(ValueError, match=r"MaxActivatingExamples\(directions=\.\.\.\) must be finite; got NaN or Inf"):
        lp.MaxActivatingExamples(at="resid_post", directions=torch.eye(32) / 0).run(model, "one two")
    with pytest.raises(ValueError, match=r"unit 500 is out of range: .* has units 0 to 127"):
        lp.MaxActivatingExamples(units=[500]).run(model, "one two")
    result = lp.MaxActivatingExamples(layers=[1], k=2).run(model, TEXTS[:3], progress=False)
    assert result.figure() == result.figure(1, 0)
    with pytest.raises(ValueError, match=r"unit must be one of N0, N1, \.\.\., N127"):
        result.examples(1, 128)


def test_markup_in_a_text_stays_text() -> None:
    result = lp.MaxActivatingExamples(layers=[1], k=2).run(tiny.bridge("gpt2"), "a <b>bold</b> word", progress=False)
    shown = "".join(result.figure(1, 3).data[0].cells["values"][1]).replace("<b>", "").replace("</b>", "")
    assert "<" not in shown and "&lt;" in shown


def test_layers_of_different_widths_are_refused(gpt2, monkeypatch):
    read = directions.units_at
    monkeypatch.setattr(
        "lens_probes.probes.max_activating_examples.units_at",
        lambda probe, reading, hook, rows: read(probe, reading, hook, rows)[:, : 64 if ".1." in hook else None],
    )
    with pytest.raises(
        ValueError, match="must have as many units as each other; got 64 and 128 in tiny-gpt2: ask some"
    ):
        lp.MaxActivatingExamples().run(gpt2, "one two")
