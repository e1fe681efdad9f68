"""Summaries: equal to the rows where all are kept, the same however merged, and calibrated where they are samples."""

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import lens_probes as lp
from lens_probes.examples import tiny
from lens_probes.maths import inference, sampling
from lens_probes.result.schema import Quantity
from lens_probes.summary import counted, edges_of
from lens_probes.testing import check_probe

TEXTS = lp.demo.sentences()[:24]


def same(one: pd.DataFrame, other: pd.DataFrame) -> None:
    pd.testing.assert_frame_equal(one.filter(list(other)), other, check_dtype=False, atol=1e-6)


@pytest.mark.parametrize(
    "probe", [lp.RankShift(layers=[0, 2]), lp.LogitLens(top_k=0, layers=[1])], ids=["ranks", "lens"]
)
def test_where_all_words_are_kept_tables_and_tests_are_those_of_the_rows(probe: Any) -> None:
    model = tiny.bridge("llama")
    rows = probe.run(model, TEXTS, progress=False)
    summary = lp.Summary(probe).run(model, TEXTS, progress=False)
    for weigh in ("types", "tokens"):
        same(summary.by_word_class(weigh=weigh), rows.by_word_class(weigh=weigh))
        same(summary.compare(weigh=weigh), rows.compare(weigh=weigh))
    same(summary.by_word_class(special=True), rows.by_word_class(special=True))
    last = summary.compared()[-1]
    same(summary.compare(quantity=last), rows.compare(quantity=last))


@pytest.mark.parametrize(
    "prompts",
    [
        pytest.param(
            ["the of and in to of", "of the and in to", "to the and of", "in of the", "and in"], id="one class"
        ),
        pytest.param([[50] * n for n in (6, 4, 9, 3, 5)], id="one type"),
        pytest.param([[5], [6], [7], [5]], id="one token each"),
        pytest.param(TEXTS[:1] * 6, id="copies of a prompt", marks=pytest.mark.matrix),
        pytest.param(["!!! ??? ...", "42 + 17 = 59"], id="no words", marks=pytest.mark.matrix),
    ],
)
def test_a_poor_corpus_has_the_tables_of_the_rows_or_is_refused_in_their_words(prompts: Any) -> None:
    model, probe = tiny.bridge("llama"), lp.RankShift(layers=[1])
    rows, summary = (each.run(model, prompts, progress=False) for each in (probe, lp.Summary(probe)))
    for weigh in ("types", "tokens"):
        same(summary.by_word_class(special=True, weigh=weigh), rows.by_word_class(special=True, weigh=weigh))
        try:
            expected = rows.compare(weigh=weigh)
        except ValueError as error:
            with pytest.raises(ValueError, match=f"^{re.escape(str(error))}$"):
                summary.compare(weigh=weigh)
        else:
            same(summary.compare(weigh=weigh), expected)


def test_counts_sums_and_histograms_are_of_all_tokens_though_few_words_are_kept() -> None:
    model, probe = tiny.bridge("gpt2"), lp.RankShift(layers=[1])
    rows = probe.run(model, TEXTS, progress=False)
    summary = lp.Summary(probe, words=5).run(model, TEXTS, progress=False)
    assert len(summary.token) < len(rows.token) / 4
    table = summary.distribution().set_index(["quantity", "word_class", "layer"])
    own = rows.token.of_class("content").numpy()
    for name in ("rank", "score", "null_rank"):
        values = rows.known(name)[0, own]
        values = values[~np.isnan(values)]
        row: Any = table.loc[(name, "content", "1_mid"), :]
        assert row["tokens"] == len(values) and row["mean"] == pytest.approx(values.mean())
        edges = edges_of(rows.quantity(name))
        width = np.diff(edges)[np.searchsorted(edges, np.median(values), side="right") - 1]
        assert abs(row["median"] - np.median(values)) <= width
    counted_tokens = table.query("quantity == 'rank'")["tokens"].sum()
    assert counted_tokens == rows.token.special.sum() + sum(each != "" for each in rows.token.word_class)
    all_tokens = summary.by_word_class().query("quantity == 'rank' and word_class == 'content'")["all_tokens"]
    assert all_tokens.tolist() == [own.sum()]


def kept(summary: lp.SummaryResult) -> set[tuple[Any, ...]]:
    columns = summary.token
    return set(zip(columns.key.tolist(), columns.position.tolist(), columns.id.tolist(), strict=True))


def test_batches_order_and_parts_change_neither_the_sample_nor_the_counts() -> None:
    model, probe = tiny.bridge("llama"), lp.Summary(lp.ResidualUpdate(layers=[1]), words=20)
    whole = probe.run(model, TEXTS, progress=False)
    in_batches = probe.run(model, TEXTS, batch_size=2, progress=False)
    other_order = probe.run(model, TEXTS[::-1], progress=False)
    parts = [probe.run(model, TEXTS[i : i + 8], progress=False) for i in (0, 8, 16)]
    left = lp.SummaryResult.merge([lp.SummaryResult.merge(parts[:2]), parts[2]])
    right = lp.SummaryResult.merge([parts[0], lp.SummaryResult.merge(parts[1:])])
    for other in (in_batches, other_order, left, right):
        assert kept(other) == kept(whole)
        torch.testing.assert_close(other.histogram, whole.histogram, atol=0, rtol=0)
        same(other.compare(weigh="tokens"), whole.compare(weigh="tokens"))
        same(other.compare(), whole.compare())


def random_words(random: np.random.Generator, n: int) -> sampling.Words:
    types = random.zipf(1.5, n)
    return sampling.Words(types % 2, sampling.mixed(types), sampling.mixed(np.arange(n), types))


def by_hand(words: sampling.Words, n: int) -> tuple[set[int], set[int]]:
    """The two samples, by their definitions, one word after the other."""
    of_words, of_types = set(), set()
    for name in set(words.word_class.tolist()):
        own = [i for i in range(len(words.key)) if words.word_class[i] == name]
        of_words |= set(sorted(own, key=lambda i: words.key[i])[:n])
        seen: dict[int, int] = {}
        slots = []
        for i in sorted(own, key=lambda i: words.key[i]):
            type_key = int(words.type_key[i])
            slots.append((seen.get(type_key, 0), type_key, i))
            seen[type_key] = seen.get(type_key, 0) + 1
        of_types |= {i for *_, i in sorted(slots)[:n]}
    return of_words, of_types


@pytest.mark.parametrize("seed", range(5))
def test_samples_are_those_of_their_definition_and_those_of_parts_hold_those_of_the_whole(seed: int) -> None:
    random = np.random.default_rng(seed)
    words = random_words(random, 300)
    n = int(random.integers(1, 60))
    samples = [np.flatnonzero(each(words, n)) for each in (sampling.of_words, sampling.of_types)]
    assert tuple(set(each.tolist()) for each in samples) == by_hand(words, n)
    part = random.integers(0, 3, 300)
    rows = []
    for number in range(3):
        own = np.flatnonzero(part == number)
        some = sampling.Words(*(each[own] for each in words))
        rows.append(own[sampling.of_words(some, n) | sampling.of_types(some, n)])
    union = np.sort(np.concatenate(rows))
    some = sampling.Words(*(each[union] for each in words))
    for each, whole in zip((sampling.of_words, sampling.of_types), samples, strict=True):
        assert union[each(some, n)].tolist() == whole.tolist()


def test_every_word_is_kept_as_often_as_any_other() -> None:
    """500 corpora of 100 words, of which 20 are kept: each 100 times in the mean, standard deviation 9."""
    times = np.zeros(100)
    for corpus in range(500):
        words = sampling.Words(
            np.zeros(100, int), np.zeros(100, int), sampling.mixed(np.full(100, corpus), np.arange(100))
        )
        times += sampling.of_words(words, 20)
    assert times.sum() == 10_000 and times.min() > 100 - 4.5 * 9 and times.max() < 100 + 4.5 * 9
    assert times.std() == pytest.approx(9, abs=2)


def test_copies_of_a_prompt_and_pieces_of_a_document_count_as_one_prompt() -> None:
    model, probe = tiny.bridge("llama"), lp.RankShift(layers=[1])
    pieces = [lp.Prompt(text, document=f"document {i // 2}") for i, text in enumerate(TEXTS)]
    separate = probe.run(model, TEXTS, progress=False).compare()
    together = probe.run(model, pieces, progress=False).compare()
    assert separate["effect"].equals(together["effect"]) and (separate["low"] != together["low"]).all()
    summary = lp.Summary(probe).run(model, pieces, progress=False)
    same(summary.compare(), together)
    five = [lp.Prompt(text, document=f"document {i % 4}") for i, text in enumerate(TEXTS)]
    assert probe.run(model, five, progress=False).compare()["low"].isna().all()  # four documents give no interval


def test_a_function_of_the_tokens_says_what_is_compared() -> None:
    def early(tokens: lp.Tokens) -> list[str]:
        return [
            "" if special else "early" if i < 5 else "late"
            for i, special in zip(tokens.position, tokens.special, strict=True)
        ]

    model, probe = tiny.bridge("gpt2"), lp.ResidualUpdate(layers=[0])
    summary = lp.Summary(probe, by=early).run(model, TEXTS, progress=False)
    assert summary.word_class == ("early", "late") and "early" in repr(lp.Summary(probe, by=early))
    rows = probe.run(model, TEXTS, progress=False)
    relabelled = replace(rows, token=replace(rows.token, word_class=tuple(early(rows.token))))
    same(summary.compare("early", "late"), relabelled.compare("early", "late"))
    for wrong in (
        lambda tokens: ["a"],
        lambda tokens: "a" * len(tokens),
        lambda tokens: [1] * len(tokens),
        lambda tokens: [float("nan")] * len(tokens),
        lambda tokens: None,
    ):
        with pytest.raises(ValueError, match=r"Summary\(by=\.\.\.\) must give one label per token, \d+ texts; got"):
            lp.Summary(probe, by=wrong).run(model, TEXTS[:2], progress=False)


def test_it_says_which_probes_it_summarises_and_what_it_does_not_hold() -> None:
    with pytest.raises(
        ValueError, match=r"must have quantities \[layer token\]; got ResidualMean.*stays small by itself"
    ):
        lp.Summary(lp.ResidualMean())
    with pytest.raises(
        ValueError, match=r"must have quantities \[layer token\]; got EmbeddingDensity.*keeps its own rows"
    ):
        lp.Summary(lp.EmbeddingDensity())
    with pytest.raises(
        TypeError, match=r"Summary\(probe=\.\.\.\) must be a probe, such as RankShift\(\); got 'RankShift'"
    ):
        lp.Summary("RankShift")  # pyright: ignore[reportArgumentType]
    summary = lp.Summary(lp.RankShift(layers=[0])).run(tiny.bridge("gpt2"), TEXTS[:2], progress=False)
    for ask in (lambda: summary.figure_paths(), lambda: summary.figure_prompt()):
        with pytest.raises(ValueError, match="a figure of one prompt needs all its tokens; got a sample of words"):
            ask()
    with pytest.raises(ValueError, match=r"strata must have one label or number per token that is kept, \d+"):
        summary.compare(strata=[1.0, 2.0])
    with pytest.raises(ValueError, match="quantity must be one of rank, score"):
        summary.compare(quantity="length")


def test_a_batch_without_targets_adds_nothing() -> None:
    model, probe = tiny.bridge("llama"), lp.Summary(lp.LogitLens(top_k=0, layers=[0]))
    ids = model.to_tokens(TEXTS[0])[0].tolist()
    one, both = (probe.run(model, each, batch_size=1, progress=False) for each in ([ids], [[5], ids]))
    assert torch.equal(one.count, both.count) and len(one.token) == len(both.token)


def test_it_is_saved_and_drawn_like_any_result(tmp_path: Any) -> None:
    summary = lp.Summary(lp.RankShift(), words=30).run(tiny.bridge("gpt2"), TEXTS, progress=False)
    summary.save(tmp_path / "summary.safetensors")
    loaded = lp.load(tmp_path / "summary.safetensors")
    assert repr(loaded) == repr(summary)
    same(loaded.by_word_class(), summary.by_word_class())
    figure = loaded.figure()
    assert "samples of at most 30 words per class" in figure.layout.title.text and len(figure.data) > 4


@pytest.mark.matrix
def test_it_keeps_the_contract() -> None:
    check_probe(lp.Summary(lp.RankShift(), words=6))
    check_probe(lp.Summary(lp.LogitLens(top_k=0)))


def test_a_corpus_in_shards_gives_what_a_run_gives(tmp_path: Any) -> None:
    model, probes = (
        tiny.bridge("llama"),
        [lp.Summary(lp.RankShift(), words=15), lp.MaxActivatingExamples(k=3, sample=9)],
    )
    folder = tmp_path / "run"
    summary, examples = lp.run_corpus(probes, model, TEXTS, folder, shard_size=5, progress=False).results
    own_summary, own_examples = lp.run(probes, model, TEXTS, progress=False)
    assert kept(summary) == kept(own_summary) and torch.equal(summary.histogram, own_summary.histogram)
    same(summary.compare(), own_summary.compare())
    torch.testing.assert_close(examples.value, own_examples.value, atol=1e-5, rtol=1e-5)
    assert sorted(examples.key.tolist()) == sorted(own_examples.key.tolist())
    again = lp.open_run(folder).results
    assert [repr(each) for each in again] == [repr(summary), repr(examples)]


@pytest.mark.parametrize(
    "quantity",
    [
        Quantity("rank", low=0, high=49_151, missing=-1, logarithmic=True),
        Quantity("share", low=0, high=1),
        Quantity("length", low=0),
        Quantity("logit"),
        Quantity("log-probability", high=0),
    ],
)
def test_bins_rise_and_hold_every_value(quantity: Quantity) -> None:
    edges = edges_of(quantity)
    assert len(edges) == 65 and (np.diff(edges) > 0).all()
    low, high = max(quantity.low, -1e4), min(quantity.high, 1e4)
    values = np.linspace(low, high, 1001)[None]
    own = counted(values, edges)
    assert own.sum() == 1001
    inside = (edges[:-1] <= high) & (edges[1:] >= low)
    assert not own[0, ~inside].any()


def corpora(random: np.random.Generator, effect: float) -> tuple[lp.Tokens, np.ndarray]:
    """A corpus of 600 prompts and 400 types with effects of prompts and types: 24,000 words of two classes."""
    n_prompts, n_types, length = 600, 400, 40
    share = 1 / np.arange(1, n_types + 1)
    types = random.choice(n_types, (n_prompts, length), p=share / share.sum())
    label = random.permutation(np.repeat([0, 1], n_types // 2))
    values = random.normal(size=types.shape) + random.normal(size=(n_prompts, 1))
    values += (random.normal(size=n_types) + effect * label)[types]
    n = types.size
    prompt = torch.arange(n_prompts).repeat_interleave(length)
    tokens = lp.Tokens(
        prompt=prompt,
        position=torch.arange(length).repeat(n_prompts),
        id=torch.from_numpy(types.ravel()),
        text=tuple(f"t{i}" for i in types.ravel()),
        word=torch.arange(length).repeat(n_prompts),
        word_class=tuple(np.where(label[types.ravel()] == 1, "content", "function")),
        special=torch.zeros(n, dtype=torch.bool),
        topic=("",) * n,
        document=prompt,
    )
    return tokens, values.reshape(1, n)


def sampled(tokens: lp.Tokens, values: np.ndarray, rows: Sequence[int] | np.ndarray) -> tuple[np.ndarray, lp.Tokens]:
    return values[:, rows], tokens[torch.from_numpy(np.asarray(rows))]


@pytest.mark.trials
@pytest.mark.parametrize("weigh", ["types", "tokens"])
@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_intervals_of_samples_hold_the_truth_of_a_large_corpus(weigh: inference.Weigh, shift: float) -> None:
    """Words of 600 prompts, 200 per class kept. At most 18 of 200 intervals may miss (5 % expected)."""
    missed = 0
    for trial in range(200):
        random = np.random.default_rng([trial, int(10 * shift)])
        tokens, values = corpora(random, shift)
        # The truth of two normal populations of variance 3 whose means are `shift` apart.
        truth = 0.5 * (1 + torch.erf(torch.tensor(shift / 6**0.5 / 2**0.5))).item()
        label = (np.asarray(tokens.word_class) == "content").astype(int)
        words = sampling.Words(
            label,
            sampling.mixed(tokens.id.numpy(), np.full(len(tokens), trial)),
            random.integers(0, 2**62, len(tokens)),
        )
        take = sampling.of_types if weigh == "types" else sampling.of_words
        rows = np.flatnonzero(take(words, 200))
        table = inference.compare(*sampled(tokens, values, rows), "content", "function", weigh=weigh, permutations=199)
        missed += not table["low"].item() <= truth <= table["high"].item()
    assert missed <= 18
