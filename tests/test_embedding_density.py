"""EmbeddingDensity: brute force over a tiny model's embedding, copied rows, types and not tokens."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from pandas.testing import assert_frame_equal

import lens_probes as lp
from lens_probes.examples import tiny
from lens_probes.maths import inference
from lens_probes.probes.embedding_density import density

PROMPTS = [
    "Time flies like an arrow.",
    "Fruit flies like a banana, and the cat likes none of it.",
    "The old man the boat.",
    "The cat sat on the mat, and the old man sat on the cat.",
    "It is not the time for a banana.",
]


def by_brute_force(token: int, entries: torch.Tensor, k: int) -> float:
    """The mean of the k largest cosines with other entries, one at a time in float64."""
    vectors = entries.double().numpy()
    lengths = [math.hypot(*vector) for vector in vectors]
    cosines = [
        math.fsum(vectors[token] * vector) / (lengths[token] * length)
        for other, (vector, length) in enumerate(zip(vectors, lengths, strict=True))
        if other != token
    ]
    return math.fsum(sorted(cosines, reverse=True)[:k]) / k


def all_densities(entries: torch.Tensor, k: int) -> list[float]:
    return density(torch.arange(len(entries)), entries, k).tolist()


@pytest.mark.parametrize("k", [1, 3, 10, 399])
def test_density_is_that_of_brute_force_over_the_embedding(gpt2, k):
    result = lp.EmbeddingDensity(k=k).run(gpt2, PROMPTS[:2], progress=False)
    expected = {i: by_brute_force(i, gpt2.W_E.detach(), k) for i in result.token.id.unique().tolist()}
    np.testing.assert_allclose(result.density, [expected[i] for i in result.token.id.tolist()], atol=1e-6)


@pytest.mark.parametrize("architecture", ["llama", "bert"])
def test_density_is_about_the_embedding_of_other_architectures_too(architecture):
    model = tiny.bridge(architecture)
    result = lp.EmbeddingDensity(k=4).run(model, PROMPTS[0], progress=False)
    expected = [by_brute_force(i, model.W_E.detach(), 4) for i in result.token.id.tolist()]
    np.testing.assert_allclose(result.density, expected, atol=1e-6)


def test_density_by_hand():
    # Directions at 0, 60, 90 and 180 degrees, of various lengths.
    entries = torch.tensor([[2.0, 0.0], [0.5, math.sqrt(0.75)], [0.0, 3.0], [-1.0, 0.0]])
    high = math.sqrt(0.75)
    assert all_densities(entries, 1) == pytest.approx([0.5, high, high, 0.0], abs=1e-6)
    assert all_densities(entries, 2) == pytest.approx([0.25, (high + 0.5) / 2, high / 2, -0.25], abs=1e-6)
    assert all_densities(entries, 3) == pytest.approx([-0.5 / 3, high / 3, high / 3, -1.5 / 3], abs=1e-6)


@pytest.mark.parametrize("copies", [2, 3, 4, 5, 9, 30])
@pytest.mark.parametrize("k", [1, 3, 8])
def test_a_copy_under_another_id_is_a_neighbour_however_many_there_are(copies, k):
    entries = torch.randn(30, 12, generator=torch.Generator().manual_seed(copies)) + 0.2
    entries[:copies] = entries[0]
    entries[copies // 2] *= 3  # the same direction, another length
    found = all_densities(entries, k)
    np.testing.assert_allclose(found, [by_brute_force(i, entries, k) for i in range(30)], atol=1e-6)
    if copies > k:
        assert found[:copies] == pytest.approx([1.0] * copies, abs=1e-6)


def test_rows_of_zeros_have_density_zero_and_change_no_other():
    entries = torch.rand(12, 5, generator=torch.Generator().manual_seed(0))  # all cosines are above 0
    plain = all_densities(entries, 3)
    found = all_densities(torch.cat([entries, torch.zeros(6, 5)]), 3)
    assert found == pytest.approx([*plain, *[0.0] * 6], abs=1e-6)


def test_half_precision_gives_the_density_of_its_float32_copy():
    entries = torch.randn(50, 12, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert all_densities(entries, 5) == all_densities(entries.float(), 5)


def test_equal_ids_have_equal_density_wherever_they_are(gpt2):
    result = lp.EmbeddingDensity(k=5).run(gpt2, PROMPTS, progress=False)
    one_by_one = [lp.EmbeddingDensity(k=5).run(gpt2, prompt, progress=False).density for prompt in PROMPTS]
    torch.testing.assert_close(result.density, torch.cat(one_by_one))
    of_type = dict(zip(result.token.id.tolist(), result.density.tolist(), strict=True))
    assert [of_type[i] for i in result.token.id.tolist()] == result.density.tolist()
    assert len(of_type) < len(result.token)


def test_saying_a_word_again_changes_nothing_but_the_number_of_tokens(gpt2):
    prompts = PROMPTS[:3]
    once = lp.EmbeddingDensity(k=5).run(gpt2, prompts, progress=False)
    again = lp.EmbeddingDensity(k=5).run(gpt2, prompts + prompts[:1] * 6, progress=False)
    one, more = once.by_word_class(), again.by_word_class()
    columns = ["word_class", "types", "median", "lower_quartile", "upper_quartile"]
    assert_frame_equal(one[columns], more[columns])
    assert (more["tokens"] > one["tokens"]).all()
    one, more = once.compare(permutations=49), again.compare(permutations=49)
    columns = ["effect", "content_types", "function_types"]
    assert_frame_equal(one[columns], more[columns])


def test_word_classes_are_described_and_compared_as_types(gpt2):
    result = lp.EmbeddingDensity(k=5).run(gpt2, PROMPTS, progress=False)
    classes: dict[int, set[str]] = {}
    for i, word_class in zip(result.token.id.tolist(), result.token.word_class, strict=True):
        classes.setdefault(i, set()).add(word_class)
    of_type = dict(zip(result.token.id.tolist(), result.density.tolist(), strict=True))
    own = {
        name: [of_type[i] for i, found in classes.items() if found == {name}]
        for name in ("content", "function", "punctuation")
    }
    assert sum(map(len, own.values())) < len(classes)  # some ids are of two classes, or of no word
    frame = result.by_word_class()
    assert list(frame["word_class"]) == list(own)
    forms = list(zip(result.token.id.tolist(), inference.forms(result.token), strict=True))
    types = [len({form for i, form in forms if classes[i] == {name}}) for name in own]
    assert frame["types"].tolist() == types and sum(types) < sum(map(len, own.values()))  # words of several ids
    np.testing.assert_allclose(frame["median"], [np.median(values) for values in own.values()])
    compared = result.compare("content", "function", permutations=49)
    won = [(one > other) + (one == other) / 2 for one in own["content"] for other in own["function"]]
    assert compared["effect"].tolist() == pytest.approx([np.mean(won)])
    assert "unit" not in compared and compared["q"].tolist() == compared["p"].tolist()
    assert compared.attrs["null"] == inference.TYPE_NULL


def test_a_comparison_takes_strata_permutations_and_a_seed(gpt2):
    result = lp.EmbeddingDensity(k=5).run(gpt2, PROMPTS, progress=False)
    strata = result.token.id % 2
    expected = inference.compare_types(
        result.density[None].double().numpy(),
        result.token,
        "function",
        "content",
        strata=strata,
        permutations=29,
        seed=3,
    ).drop(columns="unit")
    found = result.compare("function", "content", strata=strata, permutations=29, seed=3)
    assert isinstance(found, pd.DataFrame)
    assert_frame_equal(found, expected)
    assert found["strata"].tolist() == [2] and found["permutations"].tolist() == [29]


def test_the_figure_draws_the_medians_of_the_table(gpt2):
    result = lp.EmbeddingDensity(k=5).run(gpt2, PROMPTS, progress=False)
    figure = result.figure()
    drawn = [value for trace in figure.data for value in np.atleast_1d(trace.y)]
    np.testing.assert_allclose(drawn, result.by_word_class()["median"])


@pytest.mark.parametrize("k", [400, 401])
def test_as_many_neighbours_as_the_vocabulary_has_entries_are_refused(gpt2, k):
    with pytest.raises(ValueError, match=f"must be below 400, the size of the vocabulary; got {k}"):
        lp.EmbeddingDensity(k=k).run(gpt2, PROMPTS, progress=False)


@pytest.mark.parametrize("k", [0, -2])
def test_no_neighbours_are_refused(k):
    with pytest.raises(ValueError, match=f"must be a whole number, 1 or more; got {k}"):
        lp.EmbeddingDensity(k=k)


def test_no_activation_is_read(gpt2, monkeypatch):
    def refuse(*arguments, **settings):
        raise AssertionError("the model was run")

    monkeypatch.setattr(type(gpt2), "forward", refuse)
    assert lp.EmbeddingDensity().run(gpt2, PROMPTS, progress=False).density.isfinite().all()
