"""Statistics against scipy, brute force and cases by hand; simulated data where the truth is known."""

import importlib.util
from collections import Counter
from dataclasses import replace
from itertools import combinations, product
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pandas as pd
import pytest
import torch
from pandas.testing import assert_frame_equal
from scipy import stats

from lens_probes.maths import inference
from lens_probes.text.prompts import Tokens, content_number

pytestmark = pytest.mark.filterwarnings("error")

NAN = np.nan
MOST_BY_CHANCE = 18  # of 200 trials at 5 %: the 99.4 % point of the binomial

_SPEC = importlib.util.spec_from_file_location(
    "inference_benchmark", Path(__file__).parents[1] / "benchmarks" / "inference.py"
)
assert _SPEC is not None and _SPEC.loader is not None
BENCHMARK = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(BENCHMARK)

Word = tuple[Any, ...]  # a class and the ids of the word's tokens; "" is no word, "special" a special token


def judged(observed, permuted):
    """Each unit's p, its q over units, and its p against the largest of all."""
    p = inference.permutation_p(observed, permuted)
    return {"p": p, "q": inference.false_discovery(p), "p_max": inference.maximum_p(observed, permuted)}


def table(*prompts: list[Word]) -> Tokens:
    """The tokens of prompts written as words: [("content", 7, 8), ("", 9)] is a word of two tokens, then no word."""
    rows = [
        (number, token, -1 if name in ("", "special") else word, name)
        for number, words in enumerate(prompts)
        for word, (name, *ids) in enumerate(words)
        for token in ids
    ]
    number, ids, word, name = zip(*rows, strict=True)
    return Tokens(
        prompt=torch.tensor(number),
        position=torch.tensor([i for words in prompts for i in range(sum(len(ids) for _, *ids in words))]),
        id=torch.tensor(ids),
        text=tuple(f" {token}" for token in ids),
        word=torch.tensor(word),
        word_class=tuple("" if each == "special" else each for each in name),
        special=torch.tensor([each == "special" for each in name]),
        topic=("",) * len(rows),
        document=torch.tensor([content_number(repr(prompts[i]).encode()) for i in number]),
    )


def corpus(
    random: np.random.Generator, prompts: int, words: int, *, pieces: int = 3, types: int = 10**6, share: float = 0.5
) -> Tokens:
    """Prompts of content words (that share of them) and function words of one to `pieces` tokens, at least one each."""
    made = []
    for _ in range(prompts):
        is_content = random.random(words) < share
        is_content[:2] = True, False
        made.append(
            [
                ("content" if content else "function", *random.integers(types, size=random.integers(1, pieces + 1)))
                for content in random.permutation(is_content)
            ]
        )
    return table(*made)


def in_another_order(tokens: Tokens, seed: int) -> tuple[Tokens, np.ndarray]:
    """The same prompts in another order and with other numbers, and which rows they were."""
    numbers = tokens.prompt.unique().numpy()
    moved = np.random.default_rng(seed).permutation(numbers)
    assert (moved != numbers).any()
    rows = np.concatenate([np.flatnonzero(tokens.prompt.numpy() == number) for number in moved])
    renumbered = np.repeat(3 * np.arange(len(moved)) + 5, [(tokens.prompt == number).sum().item() for number in moved])
    return replace(tokens[torch.from_numpy(rows)], prompt=torch.from_numpy(renumbered)), rows


def form_of_each(tokens: Tokens) -> list[str]:
    """The text of the word that each token belongs to."""
    words = word_of_each(tokens)
    whole = {word: "".join(t for t, own in zip(tokens.text, words, strict=True) if own == word) for word in words}
    return [whole[word].strip().lower() for word in words]


def recurring(random: np.random.Generator, prompts: int, words: int, types: int = 16) -> Tokens:
    """Prompts of words that come back in other prompts, some more often; some have several tokens, some two classes."""
    share = 1 / np.arange(1, types + 1)
    vocabulary = [(("content", "function"), ("content",), ("function",))[random.integers(3)] for _ in range(types)]
    vocabulary[:3] = [("content",), ("function",), ("content", "function")]
    return table(
        *[
            [
                (str(random.choice(vocabulary[i])), *range(10 * i, 10 * i + 1 + i % 3))
                for i in [0, 1, *random.choice(types, words, p=share / share.sum())]
            ]
            + [(("content", "function")[number % 2], 20, 21, 22)]
            for number in range(prompts)
        ]
    )


def won(values: Any, is_first: Any, stratum: Any = None, weights: Any = None) -> float:
    """P(x_first > x_second) + P(x_first = x_second) / 2 over all pairs within a stratum, one pair at a time."""
    stratum = [0] * len(values) if stratum is None else stratum
    weights = [1] * len(values) if weights is None else weights
    points = pairs = 0.0
    for i, j in product(range(len(values)), repeat=2):
        if is_first[i] and not is_first[j] and stratum[i] == stratum[j]:
            weight = weights[i] * weights[j]
            pairs += weight
            points += weight * (1.0 if values[i] > values[j] else 0.5 if values[i] == values[j] else 0.0)
    return points / pairs if pairs else NAN


def influences(values: Any, is_first: Any, stratum: Any, weights: Any) -> np.ndarray:
    """What each token adds to the deviation of `won`, one pair at a time."""
    theta, psi, pairs = won(values, is_first, stratum, weights), np.zeros(len(values)), 0.0
    for i, j in product(range(len(values)), repeat=2):
        if is_first[i] and not is_first[j] and stratum[i] == stratum[j]:
            h = 1.0 if values[i] > values[j] else 0.5 if values[i] == values[j] else 0.0
            pairs += weights[i] * weights[j]
            psi[i] += weights[i] * weights[j] * (h - theta)
            psi[j] += weights[i] * weights[j] * (h - theta)
    return psi / pairs


def two_way(psi: Any, prompt: Any, form: Any) -> float:
    """max(Vp, Vt, Vp + Vt - Vc) of a sum of influences; no Vp without prompts (None) or with one."""

    def squares(labels: list[Any]) -> float:
        sums: dict[Any, float] = {}
        for label, own in zip(labels, psi, strict=True):
            sums[label] = sums.get(label, 0.0) + own
        return sum(own**2 for own in sums.values())

    def corrected(labels: list[Any]) -> float:
        groups = len(set(labels))
        return groups / (groups - 1) * squares(labels) if groups > 1 else 0.0

    by_type = corrected(list(form))
    if prompt is None:
        return by_type
    by_prompt = corrected(list(prompt))
    return max(by_prompt, by_type, by_prompt + by_type - squares(list(zip(prompt, form, strict=True))))


def share_of_types(form: Any, is_first: Any) -> list[float]:
    """1 / (occurrences of its type), where a form of two classes is two types."""
    types = list(zip(form, is_first, strict=True))
    return [1 / types.count(own) for own in types]


def by_loops(values: Any, labels: list[Any], form: Any, prompt: Any, stratum: Any, weights: Any) -> list[float]:
    """Effect, low, high and p of the first labels, the others being the permutations: issue 13, section 2, by loops."""
    t, error = [], []
    types = set(zip(form, labels[0], strict=True))
    lost_one = 1 / (sum(bool(own) for _, own in types) * sum(not own for _, own in types))
    for is_first in labels:
        theta = won(values, is_first, stratum, weights)
        variance = two_way(influences(values, is_first, stratum, weights), prompt, form)
        if variance < 1e-20:  # every pair has one winner: as if one pair of types of all had the other
            theta, variance = min(max(theta, lost_one), 1 - lost_one), 2 * lost_one**2
        error.append(np.sqrt(variance) / (theta * (1 - theta)))
        t.append(np.log(theta / (1 - theta)) / error[-1])
    away = sorted((abs(own) for own in t[1:]), reverse=True)
    n = len(labels)
    p = (1 + sum(own >= abs(t[0]) - 1e-9 for own in away)) / n
    c = ([NAN] + [own for b, own in enumerate(away) if (b + 1) / n < 0.05])[-1]
    bounds = [1 / (1 + np.exp(-(t[0] + side * c) * error[0])) for side in (-1, 1)]
    return [won(values, labels[0], stratum, weights), *bounds, p]


def recorded(monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray]:
    """Where the labels go that a comparison makes, [token draw], tokens in their own order."""
    seen: list[np.ndarray] = []
    common_language = inference.common_language

    def recording(*args):
        effect = common_language(*args)
        return lambda labels: (seen.append(labels), effect(labels))[1]

    monkeypatch.setattr(inference, "common_language", recording)
    return seen


def is_content(tokens: Tokens) -> np.ndarray:
    return np.asarray(tokens.word_class) == "content"


def word_of_each(tokens: Tokens) -> list[tuple[int, int]]:
    return list(zip(tokens.prompt.tolist(), tokens.word.tolist(), strict=True))


def numbers(frame: pd.DataFrame, *columns: str) -> np.ndarray:
    """Some columns of a table as an array, [row column]."""
    return np.stack([frame[column].to_numpy(dtype=float) for column in columns], axis=1)


def bounds(frame: pd.DataFrame) -> np.ndarray:
    return numbers(frame, "low", "high")


# Quantiles


@pytest.mark.parametrize("seed", range(20))
def test_a_weighted_quantile_is_that_of_repeated_values(seed):
    random = np.random.default_rng(seed)
    n = int(random.integers(1, 30))
    values = random.integers(-4, 4, (6, n)) / 3  # many ties
    values[random.random((6, n)) < 0.2] = NAN
    quantile = inference.quantiles(values)
    for _ in range(5):
        weights = random.integers(0, 4, (6, n))
        # Fractions that are exact in binary, or the reference would depend on its own rounding.
        for q in (0.0, 1 / 16, 0.25, 0.375, 0.5, 0.75, 15 / 16, 1.0):
            expected = []
            for row, times in zip(values, weights, strict=True):
                repeated = np.repeat(row, times)
                known = repeated[~np.isnan(repeated)]
                expected.append(np.quantile(known, q, method="averaged_inverted_cdf") if len(known) else NAN)
            np.testing.assert_allclose(quantile(q, weights.astype(float)), expected, rtol=1e-15)


@pytest.mark.parametrize("scale", [1.0, 0.1, 1 / 3, 1e-3, 7e5])
def test_rounding_of_fractions_and_of_weights_moves_no_quantile(scale):
    quantile = inference.quantiles(np.arange(1.0, 11.0)[None, ::-1].copy())
    weights = np.full((1, 10), scale)
    for tenths in range(1, 10):  # q falls between the values number `tenths` and `tenths` + 1
        assert quantile(tenths / 10, weights) == tenths + 0.5
        assert quantile(tenths / 10 + 0.05, weights) == tenths + 1


def test_a_quantile_of_nothing_is_missing():
    quantile = inference.quantiles(np.array([[NAN, NAN], [1.0, NAN]]))
    np.testing.assert_array_equal(quantile(0.5, np.array([[1.0, 1.0]])), [NAN, 1.0])
    np.testing.assert_array_equal(quantile(0.5, np.array([[0.0, 1.0]])), [NAN, NAN])


def test_a_value_without_weight_is_no_neighbour_of_the_median():
    quantile = inference.quantiles(np.array([[1.0, 2.0, 50.0, 4.0, 8.0]]))
    assert quantile(0.5, np.array([[1.0, 1.0, 0.0, 0.0, 2.0]])) == 5.0  # midway between 2 and 8, over 4
    assert quantile(0.5, np.array([[0.0, 1.0, 1.0, 0.0, 0.0]])) == 26.0


def test_each_unit_may_have_a_fraction_of_its_own():
    quantile = inference.quantiles(np.array([[1.0, 2.0, 3.0], [3.0, 1.0, 2.0]]))
    assert quantile(np.array([0.5, 1.0]), np.ones((1, 3))).tolist() == [2.0, 3.0]
    assert quantile(0.5, np.array([[1.0, 1.0, 1.0], [0.0, 1.0, 0.0]])).tolist() == [2.0, 1.0]


# Numbers of tokens, words, types and prompts


def test_tokens_words_types_and_prompts_are_counted_as_by_hand():
    tokens = table(
        [("content", 5, 6), ("function", 7), ("content", 5)],
        [("content", 5, 6), ("", 8), ("", 8)],
        [("function", 7), ("function", 7)],
    )
    form = np.array([0, 0, 1, 2, 0, 0, 3, 3, 1, 1])
    # Words: 3 in the first prompt; 1 and two tokens that stand alone in the second; 2 in the third.
    assert inference.counts(tokens, form) == {"tokens": 10, "words": 8, "types": 4, "prompts": 3}
    some = [0, 1, 3, 4, 5]
    assert inference.counts(tokens[torch.tensor(some)], form[some]) == {
        "tokens": 5,
        "words": 3,
        "types": 2,
        "prompts": 2,
    }


def test_the_type_of_a_token_is_its_whole_word_in_lower_case():
    tokens = Tokens(
        prompt=torch.tensor([0, 0, 0, 0, 0, 0, 1, 1, 1]),
        position=torch.tensor([0, 1, 2, 3, 4, 5, 0, 1, 2]),
        id=torch.arange(9),
        text=("<s>", "The", " Straß", "e", ",", "\n", "the", " STRASSE", " e"),
        word=torch.tensor([-1, 0, 1, 1, -1, -1, 0, 1, 2]),
        word_class=("", "function", "content", "content", "", "", "function", "content", "content"),
        special=torch.tensor([True] + [False] * 8),
        topic=("",) * 9,
        document=torch.tensor([10] * 6 + [20] * 3),
    )
    # Pieces are put together, in their own word only; what is of no word stands alone, and is not joined.
    expected = ("<s>", "the", "strasse", "strasse", ",", "", "the", "strasse", "e")
    assert inference.forms(tokens) == expected


def test_the_type_of_a_token_is_that_of_its_whole_word_where_a_piece_has_no_value():
    # " 5 6" and " 5 7" are two types, whatever of them is known; the type " 5" is a third.
    tokens = table(*[[("content", 5, 6), ("content", 5, 7), ("content", 5), ("function", 8)] for _ in range(2)])
    values = np.arange(12.0)[None]
    values[0, [1, 9]] = NAN  # the piece " 6" of the first prompt, " 7" of the second
    described = inference.describe(values, tokens, ["content"])
    assert described["types"].tolist() == [3] and described["tokens"].tolist() == [8]
    compared = inference.compare(values, tokens, "content", "function", permutations=9)
    assert compared["content_types"].tolist() == [3]
    weights = [1 / 3, NAN, 1 / 3, 1 / 3, 1 / 2, 1 / 2, 1 / 3, 1 / 3, 1 / 3, NAN, 1 / 2, 1 / 2]
    known = ~np.isnan(values[0])
    expected = won(values[0, known], is_content(tokens)[known], weights=np.array(weights)[known])
    assert compared["effect"].iloc[0] == pytest.approx(expected)


# Groups described


@pytest.mark.parametrize("weigh", ["types", "tokens"])
def test_a_description_is_as_by_hand(weigh):
    tokens = table(
        [("special", 0), ("content", 5, 6), ("function", 7)],
        [("special", 0), ("content", 5), ("", 9), ("content", 8)],
    )
    #                   bos  content   f    bos  c    none c
    values = np.array([[99.0, 1.0, 3.0, 8.0, 99.0, 7.0, 99.0, 5.0], [0.0, 4.0, 4.0, 2.0, 0.0, 6.0, 0.0, 9.0]])
    frame = inference.describe(values, tokens, ["function", "content"], weigh=weigh)
    columns = ["unit", "word_class", "tokens", "words", "types", "effective_types", "prompts"]
    assert list(frame) == [*columns, "median", "lower_quartile", "upper_quartile", "low", "high"]
    assert list(frame["word_class"]) == ["function", "function", "content", "content"]
    assert list(frame["unit"]) == [0, 1, 0, 1]
    counted = numbers(frame, "tokens", "words", "types", "prompts").tolist()
    assert counted == [[1, 1, 1, 1]] * 2 + [[4, 3, 3, 2]] * 2
    found = numbers(frame, "effective_types", "median", "lower_quartile", "upper_quartile").tolist()
    assert found[0] == [1.0, 8.0, 8.0, 8.0]
    # content: 1 3 5 7 and 4 4 6 9; by types the first two count half.
    if weigh == "tokens":
        assert found[2:] == [[16 / 6, 4.0, 2.0, 6.0], [16 / 6, 5.0, 4.0, 7.5]]
    else:
        assert found[2:] == [[3.0, 5.0, 3.0, 7.0], [3.0, 6.0, 4.0, 9.0]]
    assert np.isnan(bounds(frame)).all()  # two prompts


def test_missing_values_are_left_out_of_a_description_and_of_its_numbers():
    tokens = table([("content", 5), ("content", 6), ("content", 7)], [("content", 5)])
    values = np.array([[1.0, NAN, 3.0, NAN], [NAN, NAN, 2.0, 10.0], [1.0, NAN, 5.0, 9.0]])
    frame = inference.describe(values, tokens, ["content"])
    assert frame["median"].tolist() == [2.0, 6.0, 5.0]
    counted = numbers(frame, "tokens", "words", "types", "effective_types", "prompts").tolist()
    assert counted == [[2, 2, 2, 2, 1], [2, 2, 2, 2, 2], [3, 3, 2, 2, 2]]
    # The type 5 has two values in the last unit and counts as much as 7, which has one.
    by_token = inference.describe(values, tokens, ["content"], weigh="tokens")
    assert by_token["effective_types"].tolist() == [2, 2, 9 / 5]


def test_a_unit_that_has_no_value_of_a_class_is_described_as_missing():
    tokens = corpus(np.random.default_rng(0), 6, 8)
    values = np.random.default_rng(1).normal(size=(2, len(tokens)))
    values[1, is_content(tokens)] = NAN
    frame = inference.describe(values, tokens, ["content", "function"])
    assert list(zip(frame["word_class"], frame["unit"], strict=True))[1] == ("content", 1)
    assert numbers(frame, "tokens", "words", "types", "prompts").tolist()[1] == [0, 0, 0, 0]
    missing = np.isnan(numbers(frame, "median", "lower_quartile", "upper_quartile", "low", "high"))
    assert missing[1].all() and not missing[[0, 2, 3]].any()


def test_a_description_has_an_interval_from_five_prompts_with_the_class():
    random = np.random.default_rng(0)
    prompts: list[list[Word]] = [[("content", i), ("function", 50 + i), ("function", 60)] for i in range(5)]
    tokens = table(*prompts, [("function", 52)])
    values = random.normal(size=(2, len(tokens)))
    frame = inference.describe(values, tokens, ["content", "function"])
    assert frame["prompts"].tolist() == [5, 5, 6, 6]
    assert not np.isnan(bounds(frame)).any()
    assert (np.diff(numbers(frame, "low", "median", "high")) >= 0).all()

    fewer = table(*prompts[:3], [*prompts[3], ("content", 7, 8), ("content", 9)], [("function", 53)])
    frame = inference.describe(random.normal(size=(1, len(fewer))), fewer, ["content", "function"])
    assert numbers(frame, "types", "prompts").tolist() == [[6, 4], [5, 5]]
    assert frame["low"].isna().tolist() == frame["high"].isna().tolist() == [True, False]

    values[1, tokens.prompt.numpy() < 2] = NAN  # this unit knows three prompts of content and four of function words
    frame = inference.describe(values, tokens, ["content", "function"])
    assert frame["prompts"].tolist() == [5, 3, 6, 4]
    assert frame["low"].isna().tolist() == frame["high"].isna().tolist() == [False, True, False, True]


def test_a_description_has_an_interval_from_five_types():
    random = np.random.default_rng(0)
    for types in (4, 5):
        tokens = table(*[[("content", i % types), ("content", i % types)] for i in range(9)])
        for weigh in ("types", "tokens"):
            frame = inference.describe(random.normal(size=(1, 18)), tokens, ["content"], weigh=weigh)
            assert np.isnan(bounds(frame)).all() == (types == 4)


def naive_quantile(values: Any, weights: Any, q: float) -> float:
    """The q-quantile: the mean of the first value that reaches this share of the weight, and the first beyond it."""
    reached, total, found = 0.0, sum(weights), []
    for value, weight in sorted(zip(values, weights, strict=True)):
        reached += weight
        found += [value] if reached >= q * total - 1e-9 * total and not found else []
        if reached > q * total + 1e-9 * total:
            return (found[0] + value) / 2
    return found[0]


@pytest.mark.parametrize("weigh", ["types", "tokens"])
@pytest.mark.parametrize("seed", range(6))
def test_the_interval_of_a_median_is_that_of_woodruff(seed, weigh):
    random = np.random.default_rng(seed)
    tokens = recurring(random, 8, 9)
    values = random.integers(0, 9, (3, len(tokens))) + random.normal(size=8)[tokens.prompt.numpy()].round()
    values[random.random(values.shape) < 0.15] = NAN
    if seed == 0:
        values[1, tokens.prompt.numpy() > 4] = NAN
    frame = inference.describe(values, tokens, ["function", "content"], weigh=weigh)
    form, prompt = np.array(form_of_each(tokens)), tokens.prompt.numpy()
    for row, (word_class, unit) in enumerate(product(["function", "content"], range(3))):
        own = (np.asarray(tokens.word_class) == word_class) & ~np.isnan(values[unit])
        x, types, prompts = values[unit, own], form[own].tolist(), prompt[own].tolist()
        w = np.array([1 / types.count(each) if weigh == "types" else 1.0 for each in types])
        m = naive_quantile(x, w, 0.5)
        e = [f * ((each < m) + (each == m) / 2 - 0.5) for each, f in zip(x, w / w.sum(), strict=True)]
        reach = stats.t.ppf(0.975, min(len(set(types)), len(set(prompts))) - 1) * np.sqrt(two_way(e, prompts, types))
        low, high = (naive_quantile(x, w, min(max(0.5 + side * reach, 0.0), 1.0)) for side in (-1, 1))
        heavy = [sum(w[np.array(types) == each]) for each in set(types)]
        expected = [sum(heavy) ** 2 / sum(each**2 for each in heavy), m, low, high]
        expected += [naive_quantile(x, w, q) for q in (0.25, 0.75)]
        columns = ("effective_types", "median", "low", "high", "lower_quartile", "upper_quartile")
        np.testing.assert_allclose(numbers(frame, *columns)[row], expected, rtol=1e-12)


def test_a_median_of_two_way_data_has_an_interval_that_ends_at_most_at_its_extremes():
    # Every prompt has one value, and the share below the median has so large a variance that the bounds are clipped.
    tokens = table(*[[("content", i), ("content", i + 10)] for i in range(5)])
    values = np.repeat([1.0, 2.0, 3.0, 4.0, 5.0], 2)[None]
    assert bounds(inference.describe(values, tokens, ["content"])).tolist() == [[1.0, 5.0]]


def test_special_tokens_are_left_out_or_a_class_of_their_own():
    tokens = table(
        [("special", 0), ("content", 5), ("function", 6)], [("special", 0), ("content", 7), ("", 8), ("special", 1)]
    )
    values = np.array([[90.0, 1.0, 2.0, 92.0, 3.0, 50.0, 97.0]])
    frame = inference.by_word_class({"rank": values}, ["0_mid"], tokens, special=False)
    assert list(zip(frame["word_class"], frame["median"], strict=True)) == [("content", 2.0), ("function", 2.0)]
    frame = inference.by_word_class({"rank": values}, ["0_mid"], tokens, special=True)
    assert list(frame["word_class"]) == ["content", "function", "special"]
    # 90 and 92 are one type, 97 another, and these weigh as much.
    assert frame.iloc[2][["tokens", "types", "prompts", "median"]].tolist() == [3, 2, 2, 94.5]
    # A special token is special also where a table made by hand gives it the class of a word.
    both = replace(tokens, word_class=("content",) * 7)
    frame = inference.by_word_class({"rank": values}, ["0_mid"], both, special=False)
    assert frame["tokens"].tolist() == [4]


def test_classes_of_the_user_come_after_ours():
    names = ["zebra", "punctuation", "function", "adverb", "number", "content"]
    tokens = table([(name, i) for i, name in enumerate(names)])
    expected = ["content", "function", "number", "punctuation", "adverb", "zebra"]
    frame = inference.by_word_class({"rank": np.arange(6.0)[None]}, ["0_mid"], tokens, special=False)
    assert list(frame["word_class"]) == expected
    assert frame["median"].tolist() == [5.0, 2.0, 4.0, 1.0, 3.0, 0.0]
    assert list(inference.describe_types(np.arange(6.0)[None], tokens)["word_class"]) == expected


def test_a_table_by_word_class_has_a_row_for_each_quantity_class_and_layer():
    tokens = table([("content", 5), ("function", 6)])
    quantities = {
        "rank": np.array([[1.0, 2.0], [3.0, 4.0]]),
        "never": np.full((2, 2), NAN),
        "null": np.array([[5.0, NAN], [6.0, NAN]]),
    }
    frame = inference.by_word_class(quantities, ["0_mid", "1_mid"], tokens, special=False)
    assert list(frame)[:3] == ["quantity", "layer", "word_class"]
    rows = frame[["quantity", "layer", "word_class", "median"]].to_numpy().tolist()
    assert rows == [
        ["rank", "0_mid", "content", 1.0],
        ["rank", "1_mid", "content", 3.0],
        ["rank", "0_mid", "function", 2.0],
        ["rank", "1_mid", "function", 4.0],
        ["null", "0_mid", "content", 5.0],
        ["null", "1_mid", "content", 6.0],
    ]


def test_units_get_the_labels_of_their_layers():
    frame = pd.DataFrame({"unit": [1, 0, 1], "n": [7, 8, 9]})
    named = inference.with_layers(frame, ["3_mid", "3_post"])
    assert named.to_dict("list") == {"layer": ["3_post", "3_mid", "3_post"], "n": [7, 8, 9]}
    assert list(frame) == ["unit", "n"]


# Types


def types_by_hand() -> tuple[Tokens, np.ndarray]:
    tokens = table(
        [("content", 1), ("content", 1), ("content", 1), ("content", 2), ("function", 3)],
        [("content", 4, 5), ("function", 3), ("function", 6), ("function", 7), ("", 8), ("", 9)],
        [("function", 2), ("content", 8), ("content", 1), ("special", 0)],
    )  # id 2 is of two classes, id 8 a content word and no word
    return tokens, tokens.id.numpy().astype(float)[None] * 10


def test_a_type_is_described_once_and_ids_of_two_classes_are_left_out():
    tokens, values = types_by_hand()
    frame = inference.describe_types(values, tokens)
    assert list(frame["word_class"]) == ["content", "function"]
    # content: the ids 1 (four tokens), 4 and 5, which are one word; function: 3 (two tokens), 6, 7.
    assert frame["types"].tolist() == [2, 3]
    assert frame["tokens"].tolist() == [6, 4]
    assert frame["words"].tolist() == [5, 4]
    assert frame["prompts"].tolist() == [3, 2]
    assert frame["median"].tolist() == [40.0, 60.0]
    assert frame["lower_quartile"].tolist() == [10.0, 30.0]
    assert frame["upper_quartile"].tolist() == [50.0, 70.0]


def test_an_id_is_compared_once_and_ids_of_two_classes_are_left_out():
    tokens, values = types_by_hand()
    frame = inference.compare_types(values, tokens, "content", "function", permutations=2000)
    # 10, 40, 50 against 30, 60, 70: two of nine pairs.
    assert frame["effect"].tolist() == [pytest.approx(2 / 9)]
    counted = ("types", "tokens", "words", "prompts")
    assert numbers(frame, *(f"content_{what}" for what in counted)).tolist() == [[2, 6, 5, 3]]
    assert numbers(frame, *(f"function_{what}" for what in counted)).tolist() == [[3, 4, 4, 2]]
    # All ten ways to label two of the words (1), (4 5), (3), (6), (7); observed are the first two.
    of_id, word = [10, 40, 50, 30, 60, 70], [0, 1, 1, 2, 3, 4]
    ways = [(0, 1), *(two for two in combinations(range(5), 2) if two != (0, 1))]
    expected = by_loops(of_id, [[own in two for own in word] for two in ways], word, None, [0] * 6, [1] * 6)
    assert abs(frame["p"].iloc[0] - expected[3]) < 4 * np.sqrt(0.25 / 2000)
    assert frame.attrs["null"] == inference.TYPE_NULL


def test_the_interval_of_types_is_over_types_however_often_they_occur():
    random = np.random.default_rng(0)
    of_type = random.permutation(25).astype(float)
    once = table([("content", i) for i in range(25)])
    often = table(*[[("content", i), *[("content", own)] * 30] for own, i in enumerate(random.permutation(25))])
    # The share below 12: 12 types of 1/25 each below and above, e = +-1/50; V = 25/24 * 24 / 50^2.
    reach = stats.t.ppf(0.975, 24) / 10
    expected = [12.0, np.ceil(25 * (0.5 - reach)) - 1, np.ceil(25 * (0.5 + reach)) - 1]
    for tokens in (once, often):
        frame = inference.describe_types(of_type[tokens.id.numpy()][None], tokens)
        assert numbers(frame, "median", "low", "high").tolist() == [expected]


def test_missing_values_are_left_out_of_types():
    tokens = table([("content", 1), ("content", 2), ("content", 3), ("function", 4), ("function", 5)])
    values = np.array([[5.0, NAN, 1.0, 3.0, NAN]])
    described = inference.describe_types(values, tokens)
    assert described["types"].tolist() == [2, 1] and described["median"].tolist() == [3.0, 3.0]
    compared = inference.compare_types(values, tokens, "content", "function", permutations=9)
    assert numbers(compared, "effect", "content_types", "function_types").tolist() == [[0.5, 2, 1]]


def test_types_whose_first_tokens_share_no_stratum_are_not_compared():
    # Each stratum has tokens of both classes; but a type is in the stratum of its first token, and those differ.
    tokens = table([("content", 1), ("function", 2), ("function", 2), ("content", 1)])
    values = tokens.id.numpy().astype(float)[None]
    with pytest.raises(ValueError, match="a stratum must have tokens of both 'content' and 'function'; got none"):
        inference.compare_types(values, tokens, "content", "function", strata=["a", "b", "a", "b"])


def test_types_are_compared_within_strata_and_deciles_are_of_types():
    random = np.random.default_rng(3)
    # 40 types with the frequencies 0 to 39; type 39 makes nine tenths of all tokens.
    frequency = random.permutation(40)
    name = np.where(random.random(40) < 0.5, "content", "function")
    common = int(np.flatnonzero(frequency == 39)[0])
    words: list[Word] = [(name[i], i) for i in range(40)] + [(name[common], common)] * 360
    tokens = table(words[:200], words[200:])
    values = random.normal(size=40)[tokens.id.numpy()][None]
    frame = inference.compare_types(
        values, tokens, "content", "function", strata=frequency[tokens.id.numpy()], permutations=9
    )
    expected = won(values[0, :40], name == "content", frequency // 4)
    assert frame["effect"].iloc[0] == pytest.approx(expected)
    both = sum(len(set(name[frequency // 4 == decile])) == 2 for decile in range(10))
    assert numbers(frame, "strata", "strata_with_one_class").tolist() == [[both, 10 - both]]


# The effect


@pytest.mark.parametrize("seed", range(10))
def test_the_effect_is_the_u_statistic_over_the_number_of_pairs(seed):
    random = np.random.default_rng(seed)
    n = int(random.integers(2, 40))
    values = random.integers(0, 5, n) / 3  # many ties
    labels = np.stack([random.permutation(np.arange(n) < random.integers(1, n)) for _ in range(4)], axis=1)
    effect, _ = inference.common_language(values, np.zeros(n, dtype=np.int64), np.ones(n))(labels)
    for is_first, found in zip(labels.T, effect, strict=True):
        u = stats.mannwhitneyu(values[is_first], values[~is_first]).statistic
        assert found == pytest.approx(u / (is_first.sum() * (~is_first).sum()), abs=1e-12)


@pytest.mark.parametrize("seed", range(10))
def test_a_weighted_effect_is_that_of_repeated_tokens_within_strata(seed):
    random = np.random.default_rng(seed)
    n = 30
    values, stratum = random.integers(0, 8, n).astype(float), random.integers(-2, 3, n)
    weights, labels = random.integers(0, 4, n), random.random((n, 4)) < 0.4
    repeated = np.repeat(np.arange(n), weights)
    effect, influence = inference.common_language(values, stratum, weights.astype(float))(labels)
    expected = [won(values[repeated], own[repeated], stratum[repeated]) for own in labels.T]
    np.testing.assert_allclose(effect, expected, rtol=1e-12)
    np.testing.assert_allclose([won(values, own, stratum, weights) for own in labels.T], expected, rtol=1e-12)
    expected = [influences(values, own, stratum, weights) for own in labels.T]
    np.testing.assert_allclose(influence.T, expected, rtol=0, atol=1e-14)


def test_an_influence_is_what_a_little_more_weight_of_a_token_adds_to_the_effect():
    random = np.random.default_rng(0)
    values, stratum, weights = random.integers(0, 9, 20).astype(float), random.integers(0, 2, 20), random.random(20)
    is_first = random.random(20) < 0.5
    _, influence = inference.common_language(values, stratum, weights)(is_first[:, None])
    for i in range(20):
        more = weights * np.where(np.arange(20) == i, 1 + 1e-6, 1)
        added = won(values, is_first, stratum, more) - won(values, is_first, stratum, weights)
        assert influence[i, 0] == pytest.approx(added / 1e-6, abs=1e-6)


def test_an_effect_without_pairs_is_missing():
    values, stratum = np.array([1.0, 2.0, 3.0]), np.array([0, 0, 1])
    effect = inference.common_language(values, stratum, np.ones(3))
    assert np.isnan(effect(np.array([[True, False], [True, False], [False, True]]))[0]).all()
    effect = inference.common_language(values, stratum, np.array([0.0, 1.0, 1.0]))
    assert np.isnan(effect(np.array([[True], [False], [False]]))[0]).all()


@pytest.mark.parametrize("values", [[np.inf, np.inf, 1.0, 1.0], [-np.inf, 0.0, -np.inf, 0.0]])
def test_equal_infinite_values_are_ties(values):
    first = np.array([True, False, True, False])
    effect, _ = inference.common_language(np.array(values), np.zeros(4, dtype=np.int64), np.ones(4))(first[:, None])
    assert effect.tolist() == [won(values, first)]


def test_an_effect_is_a_probability_whatever_rounding_does():
    random = np.random.default_rng(0)
    for _ in range(300):
        first, second = random.integers(2, 12, size=2)
        values = np.concatenate([random.random(first) + 1, random.random(second)])
        heavy = 1 / random.choice([3.0, 7.0, 10.0, 49.0], size=first + second)
        labels = np.arange(first + second)[:, None] < first
        effect, _ = inference.common_language(values, np.zeros(len(values), dtype=np.int64), heavy)(labels)
        assert 0 <= effect[0] <= 1


def test_a_repeated_prompt_is_no_new_evidence():
    random = np.random.default_rng(0)
    once = corpus(random, 4, 10, types=20)
    prompts = [own for _, own in once.by_prompt()]
    n = len(once)
    again = replace(
        once[torch.arange(n).repeat(3)], prompt=torch.cat([once.prompt + copy * len(prompts) for copy in range(3)])
    )
    values = random.normal(size=(1, n))
    alone = inference.compare(values, once, "content", "function", permutations=99).iloc[0]
    thrice = inference.compare(np.tile(values, 3), again, "content", "function", permutations=99).iloc[0]
    assert thrice["content_prompts"] == 12 and np.isnan(thrice["low"])  # of four different ones
    assert (thrice["effect"], thrice["p"]) == pytest.approx((alone["effect"], alone["p"]))
    assert np.isnan(inference.describe(np.tile(values, 3), again, ["content", "function"])["low"].to_numpy()).all()


def test_one_type_that_makes_up_most_tokens_decides_nothing_by_tokens():
    words = [
        [("content", 10 * i + j) for j in range(4)] + [("function", 1)] * 6 + [("function", 2 + i)] for i in range(8)
    ]
    tokens = table(*words)
    values = np.random.default_rng(0).normal(size=(1, len(tokens)))
    by_tokens = inference.compare(values, tokens, "content", "function", weigh="tokens", permutations=99).iloc[0]
    assert by_tokens["function_effective_types"] < 3 and by_tokens["effect"] > 0
    assert by_tokens[["low", "high", "p", "q"]].isna().all()
    by_types = inference.compare(values, tokens, "content", "function", permutations=99).iloc[0]
    assert by_types[["low", "high", "p", "q"]].notna().all()


def test_words_cut_inside_a_character_stay_the_words_they_are():
    pieces = ("\u00e4\u00b8\u0122", "\u00e4\u00b8\u0123")  # the names of the bytes of two characters that end in 80, 81
    assert inference.forms(replace(table([("content", 1)], [("content", 2)]), text=pieces)) == pieces
    assert inference.forms(replace(table([("content", 1)], [("content", 2)]), text=(" Été", "été"))) == ("été", "été")


def test_a_missing_label_is_in_no_stratum():
    tokens = table([("content", 1), ("function", 2), ("content", 3), ("function", 4), ("content", 5)])
    values = np.array([[1.0, 2.0, 3.0, 4.0, 9.0]])
    for strata in (["a", "a", "b", "b", None], ["a", "a", "b", "b", NAN], pd.Categorical(["a", "a", "b", "b", None])):
        given: Any = np.asarray(strata, dtype=object)
        frame = inference.compare(values, tokens, "content", "function", strata=given, permutations=9).iloc[0]
        assert (frame["strata"], frame["content_tokens"], frame["effect"]) == (2, 2, 0)


@pytest.mark.parametrize("scale", [1e-9, 1e-6, 1.0, 1e6])
def test_p_does_not_depend_on_the_unit_of_measurement(scale):
    random = np.random.default_rng(0)
    apart = np.abs(random.normal(1, 0.1, (1, 20)))
    null = random.normal(size=(99, 1))
    assert inference.sign_flip_p(apart * scale)[0] == inference.sign_flip_p(apart)[0] == 0.001
    for judge in (inference.permutation_p, inference.maximum_p):
        assert judge(np.array([9.0 * scale]), null * scale)[0] == judge(np.array([9.0]), null)[0] == 0.01


def test_complete_separation_counts_as_one_lost_pair_of_types():
    words = [("content", i) for i in range(8)] + [("function", i) for i in range(20, 28)]
    tokens = table(*[words[i:] + words[:i] for i in range(8)])
    complete = np.where(is_content(tokens), 100.0 - tokens.id.numpy(), 0.0 - tokens.id.numpy())
    lost = np.where(tokens.id.numpy() == 7, -20.5, complete)  # the lowest content type is below one function type
    frame = inference.compare(np.stack([complete, lost]), tokens, "content", "function")
    assert frame["effect"].tolist() == pytest.approx([1, 1 - 1 / 64])
    low, high, p = (frame[column].tolist() for column in ("low", "high", "p"))
    assert low[0] == pytest.approx(low[1], abs=0.01) and low[0] > 0.7
    assert high[0] == 1 and max(p) < 0.02


@pytest.mark.parametrize("weigh", get_args(inference.Weigh))
def test_equal_values_have_no_interval_in_any_strata(weigh):
    random = np.random.default_rng(0)
    tokens = corpus(random, 9, 12, types=15)
    strata = [f"stratum {i}" for i in random.integers(3, size=len(tokens))]
    values = np.full((1, len(tokens)), 0.3)
    frame = inference.compare(values, tokens, "content", "function", strata=strata, weigh=weigh, permutations=99).iloc[
        0
    ]
    assert frame["effect"] == pytest.approx(0.5) and frame["p"] == 1
    assert np.isnan(frame["low"]) and np.isnan(frame["high"])


@pytest.mark.usefixtures("as_users_run_it")
def test_only_types_and_tokens_can_weigh_equally():
    tokens = table([("content", 1), ("function", 2)])
    other: Any = "words"
    for ask in (
        lambda: inference.describe(np.ones((1, 2)), tokens, ["content"], weigh=other),
        lambda: inference.compare(np.ones((1, 2)), tokens, "content", "function", weigh=other),
    ):
        with pytest.raises(ValueError, match="weigh must be 'types' or 'tokens'; got 'words'"):
            ask()


# Permutations


def test_permuted_labels_keep_their_number_in_every_cell_and_every_arrangement_is_as_likely():
    label = np.array([True, False, True, False, False, True, True, False])
    cells = np.array([2, 0, 0, 2, 2, 0, 2, 5])  # cell 2 has two of four, cell 0 two of three, cell 5 none of one
    moved = inference.permuted(label, cells, 6000, seed=0)
    for labels in moved:
        for number in (0, 2, 5):
            assert labels[cells == number].sum() == label[cells == number].sum()
    together = Counter((tuple(labels[cells == 2]), tuple(labels[cells == 0])) for labels in moved)
    assert len(together) == 6 * 3  # the cells move independently
    assert stats.chisquare(list(together.values())).pvalue > 0.001


def test_permutations_are_seeded_and_differ_from_each_other():
    label, cells = np.arange(40) % 2 == 0, np.zeros(40, dtype=np.int64)
    one, same, other = (inference.permuted(label, cells, 20, seed=seed) for seed in (1, 1, 2))
    assert (one == same).all() and (one != other).any()
    assert len(np.unique(one, axis=0)) == 20


@pytest.mark.parametrize("permutations", [0, -1])
def test_no_permutation_is_refused(permutations):
    tokens = table([("content", 1), ("function", 2)])
    for compare in (inference.compare, inference.compare_types):
        with pytest.raises(ValueError, match=f"permutations must be a whole number, 1 or more; got {permutations}"):
            compare(np.array([[1.0, 2.0]]), tokens, "content", "function", permutations=permutations)


def test_p_is_the_share_of_values_as_far_from_the_mean_the_observed_one_among_them():
    # Column 0: the mean of 10, 2, -6, 10, -1 is 3; 7 away is the observed one, and are -6 (9) and 10 (7), not 2, -1.
    # Column 1: the mean of 0, 4, -4, 4, -4 is 0: the observed one is at the mean and all are as far.
    # Column 2: the mean of 7, 1, 2, 3, 2 is 3: none is as far.
    observed = np.array([10.0, 0.0, 7.0])
    permuted = np.array([[2.0, 4.0, 1.0], [-6.0, -4.0, 2.0], [10.0, 4.0, 3.0], [-1.0, -4.0, 2.0]])
    np.testing.assert_allclose(inference.permutation_p(observed, permuted), [3 / 5, 1.0, 1 / 5])


def test_p_is_two_sided_and_rounding_breaks_no_tie():
    permuted = np.array([[0.3], [0.1 + 0.2], [0.7], [0.5]])  # 0.1 + 0.2 is not 0.3 in binary
    for observed in (0.3, 0.1 + 0.2):
        # The mean is 0.42 and the observed one 0.12 away; 0.5 is 0.08 away.
        assert inference.permutation_p(np.array([observed]), permuted) == pytest.approx(4 / 5)
    symmetric = np.linspace(-1, 1, 19)[:, None]
    for observed in (3.0, -3.0):
        assert inference.permutation_p(np.array([observed]), symmetric) == 1 / 20


def test_missing_values_have_no_p_and_missing_permutations_are_not_counted():
    observed = np.array([3.0, NAN, 3.0, np.inf, 3.0])
    permuted = np.array([[0.0, 0.0, NAN, 0.0, NAN], [1.0, 0.0, NAN, 0.0, 4.0], [2.0, 9.0, NAN, 1.0, -1.0]])
    # Column 0: the mean of 3, 0, 1, 2 is 1.5, and 0 is as far. Column 4: the mean of 3, 4, -1 is 2, and both are.
    np.testing.assert_allclose(inference.permutation_p(observed, permuted), [2 / 4, NAN, NAN, NAN, 3 / 3])
    np.testing.assert_allclose(inference.one_sided_p(observed, permuted), [1 / 4, NAN, NAN, NAN, 2 / 3])


def test_a_p_of_larger_values_is_by_column_or_against_one_for_all():
    observed = np.array([2.0, 0.0, NAN, 5.0])
    largest = np.array([[1.0], [2.0], [3.0], [NAN]])
    np.testing.assert_allclose(inference.one_sided_p(observed, largest), [3 / 4, 1.0, NAN, 1 / 4])
    each = np.array([[1.0, 0.0, 1.0, 6.0], [3.0, -1.0, 1.0, 7.0]])
    np.testing.assert_allclose(inference.one_sided_p(observed, each), [2 / 3, 2 / 3, NAN, 1.0])


def test_p_of_swapped_pairs_is_that_of_all_signs():
    differences = np.array([[1.0, 2.0, 4.0, 8.0], [1.0, -2.0, 4.0, 8.0], [0.0, 0.0, 0.0, 0.0], [NAN, 1.0, 1.0, 1.0]])
    found = inference.sign_flip_p(differences, 4000)
    # Of 16 signs, the sum 15 is reached by 2 (both sides); 11 or more by 15, 13, 11 and their negatives.
    np.testing.assert_allclose(found[:3], [2 / 16, 6 / 16, 1.0], atol=4 * np.sqrt(0.25 / 4000))
    assert np.isnan(found[3])
    assert (found[:3] == inference.sign_flip_p(differences[:3], 4000)).all()
    assert (found[:2] != inference.sign_flip_p(differences[:2], 4000, seed=1)).any()


def test_a_family_wise_p_is_against_the_largest_of_all_in_the_same_permutation():
    # Distances from the mean of all five, in deviations. Unit 0: 8 | 0 0 1 1, unit 1 ten times its mirror image.
    one = np.array([8.0, 0.0, 0.0, 1.0, 1.0])
    everything = np.stack([one, -10 * one, np.array([1.0, 9.0, 1.0, 1.0, 1.0]), np.full(5, 3.0)], axis=1)
    # The third unit is as far out in its first permutation as the first (4 against 2 of four equal and one apart):
    # 2 deviations; the first has (8 - 2) / std(8 0 0 1 1) = 6 / 3.03 = 1.98.
    found = inference.maximum_p(everything[0], everything[1:])
    np.testing.assert_allclose(found, [2 / 5, 2 / 5, 1.0, 1.0])
    alone = inference.maximum_p(everything[0, :2], everything[1:, :2])
    np.testing.assert_allclose(alone, [1 / 5, 1 / 5])


@pytest.mark.parametrize("where", ["observed", "permuted", "both", "infinite"])
def test_a_unit_without_a_value_is_no_maximum_and_in_no_correction(where):
    random = np.random.default_rng(0)
    observed, permuted = random.normal(size=5) + 1, random.normal(size=(99, 5))
    expected = judged(observed, permuted)
    np.testing.assert_allclose(expected["p"], inference.permutation_p(observed, permuted))
    np.testing.assert_array_equal(expected["q"], stats.false_discovery_control(expected["p"]))
    np.testing.assert_array_equal(expected["p_max"], inference.maximum_p(observed, permuted))
    assert (expected["p_max"] >= expected["p"]).all()
    more, null = np.insert(observed, 2, 0.0), np.insert(permuted, 2, random.normal(size=99), axis=1)
    if where in ("observed", "both"):
        more[2] = NAN
    if where in ("permuted", "both"):
        null[:, 2] = NAN
    if where == "infinite":
        more[2], null[:, 2] = np.inf, np.inf
    found = judged(more, null)
    for name, own in expected.items():
        assert np.isnan(found[name][2])
        np.testing.assert_array_equal(np.delete(found[name], 2), own)
    nothing = judged(np.full(3, NAN), permuted[:, :3])
    assert all(np.isnan(own).all() for own in nothing.values())


def test_a_unit_with_some_permutations_without_a_value_has_a_p_of_its_own_and_no_family_wise_one():
    observed, permuted = np.array([3.0, 1.0]), np.random.default_rng(0).normal(size=(19, 2))
    permuted[4, 0] = NAN
    found = judged(observed, permuted)
    assert not np.isnan(found["p"]).any() and not np.isnan(found["q"]).any()
    assert np.isnan(found["p_max"]).tolist() == [True, False]
    assert found["p_max"][1] == inference.maximum_p(observed[1:], permuted[:, 1:])[0]


def test_false_discovery_leaves_out_what_has_no_p():
    p = np.array([0.04, NAN, 0.01, 0.03, NAN, 0.5])
    expected = stats.false_discovery_control([0.04, 0.01, 0.03, 0.5])
    found = inference.false_discovery(p)
    assert np.isnan(found[[1, 4]]).all()
    np.testing.assert_array_equal(found[[0, 2, 3, 5]], expected)
    assert np.isnan(inference.false_discovery(np.full(3, NAN))).all()
    assert inference.false_discovery(np.empty(0)).tolist() == []


def test_the_smallest_p_is_one_over_the_permutations_and_one():
    tokens = table(*[[("content", 10 * i + j), ("function", 10 * i + j + 5)] for i in range(20) for j in range(5)])
    values = np.where(is_content(tokens), 1.0, 0.0)[None]
    for permutations in (9, 99):
        frame = inference.compare(values, tokens, "content", "function", permutations=permutations)
        assert frame["p"].tolist() == [1 / (permutations + 1)]
        assert frame["permutations"].tolist() == [permutations]
        assert frame["effect"].tolist() == [1.0]


def test_a_permutation_that_leaves_no_pair_is_not_counted():
    # Pairs are within a prompt, labels move among all: two of the six ways put both content words into one prompt.
    tokens = table([("content", 1), ("function", 2)], [("content", 3), ("function", 4)])
    values, strata = np.array([[9.0, 1.0, 8.0, 2.0]]), tokens.prompt.numpy()
    frame = inference.compare(values, tokens, "content", "function", strata=strata, permutations=2000)
    assert frame["effect"].tolist() == [1.0]
    assert frame["p"].iloc[0] == pytest.approx(2 / 4, abs=4 * np.sqrt(0.25 / 1300))


@pytest.mark.parametrize("strata", [None, "frequency", "position"])
def test_labels_move_with_whole_types_within_strata_that_the_id_decides(strata, monkeypatch):
    random = np.random.default_rng(0)
    _, tokens = inference.in_own_order(recurring(random, 8, 12, types=24))
    of_type = tokens.id.numpy() // 10 % 2
    given = {"frequency": np.array(["rare", "common"])[of_type], "position": tokens.position.numpy() % 3}
    seen = recorded(monkeypatch)
    values = random.normal(size=(1, len(tokens)))
    inference.compare(values, tokens, "content", "function", strata=given.get(strata or ""), permutations=50)
    labels = np.concatenate(seen, axis=1)
    assert labels.shape == (len(tokens), 51)
    assert (labels[:, 0] == is_content(tokens)).all()
    items = list(zip(form_of_each(tokens), labels[:, 0].tolist(), strict=True))
    assert len({form for form, _ in items}) < len(set(items)) < len(tokens)  # forms of two classes, and of many tokens
    cell = of_type if strata == "frequency" else np.zeros(len(tokens), dtype=int)
    expected = Counter((own, label) for own, (_, label) in set(zip(cell.tolist(), items, strict=True)))
    for moved in labels.T:
        of_item = dict(zip(items, moved.tolist(), strict=True))
        assert [of_item[item] for item in items] == moved.tolist()  # one label an item, all its tokens together
        found = {(own, item, of_item[item]) for own, item in zip(cell.tolist(), items, strict=True)}
        assert Counter((own, label) for own, _, label in found) == expected
    assert len({moved.tobytes() for moved in labels.T}) > 40
    if strata != "frequency":  # labels leave the strata that do not hold them
        assert len({moved[of_type == 0].sum() for moved in labels.T}) > 5


def test_a_type_of_two_strata_holds_no_labels_and_one_id_is_enough(monkeypatch):
    words: list[list[Word]] = [[("content", 1), ("content", 2), ("function", 3), ("function", 4)] for _ in range(6)]
    tokens = table(*words)
    values = np.random.default_rng(0).normal(size=(1, 24))
    strata = np.where(np.isin(tokens.id.numpy(), (1, 3)), "rare", "common")
    for own, held in ((strata, True), (np.where(np.arange(24) == 20, "common", strata), False)):
        with monkeypatch.context() as patch:
            seen = recorded(patch)
            inference.compare(values, tokens, "content", "function", strata=own, permutations=60)
        moved = np.concatenate(seen, axis=1)[:4]  # held: one of 1 and 3, one of 2 and 4
        assert len(np.unique(moved, axis=1).T) == (4 if held else 6)


@pytest.mark.parametrize("seed", range(4))
def test_p_is_that_of_all_arrangements_of_types(seed):
    random = np.random.default_rng(seed)
    _, tokens = inference.in_own_order(
        table(
            [("content", 1, 2), ("function", 4), ("function", 5), ("content", 1, 2)],
            [("function", 4), ("content", 6), ("content", 1, 2), ("function", 7, 8)],
            [("content", 6), ("content", 9), ("function", 5), ("function", 4)],
        )
    )
    values = random.normal(size=len(tokens)) + is_content(tokens)
    form = form_of_each(tokens)
    types = sorted(set(form))
    own = {name for name, content in zip(form, is_content(tokens), strict=True) if content}
    ways = [own, *(set(some) for some in combinations(types, 3) if set(some) != own)]
    assert len(ways) == 20
    weights = [1 / form.count(name) for name in form]
    labels = [[name in way for name in form] for way in ways]
    exact = by_loops(values, labels, form, tokens.prompt.tolist(), [0] * len(form), weights)
    frame = inference.compare(values[None], tokens, "content", "function", permutations=3000)
    assert frame["effect"].iloc[0] == pytest.approx(exact[0])
    assert abs(frame["p"].iloc[0] - exact[3]) < 4 * np.sqrt(0.25 / 3000)


# Two groups compared


def test_a_comparison_says_its_numbers_and_its_null():
    tokens = table(
        [("content", 5, 6), ("function", 7), ("special", 0)],
        [("content", 5), ("", 9), ("function", 8), ("number", 4), ("function", 8)],
    )
    values = np.array([[1.0, 5.0, 2.0, 9.0, 3.0, 9.0, 3.0, 9.0, 4.0], [2.0, 2.0, 1.0, 0.0, 2.0, 0.0, 2.0, 0.0, 1.0]])
    # 1 5 3 against 2 3 4: 5 beats all, 3 beats 2 and ties; then 2 2 2 against 1 2 1. Weights of types: 1/2 1/2 1
    # against 1 1/2 1/2.
    expected = {"tokens": ([4.5 / 9, 7.5 / 9], [9 / 5, 9 / 5]), "types": ([2.25 / 4, 3.5 / 4], [2, 2])}
    for weigh in get_args(inference.Weigh):
        effect, effective = expected[weigh]
        frame = inference.compare(values, tokens, "content", "function", weigh=weigh, permutations=19)
        assert frame["effect"].tolist() == pytest.approx(effect)
        assert frame[["content_effective_types", "function_effective_types"]].iloc[0].tolist() == effective
        assert frame["unit"].tolist() == [0, 1]
        for name, own in {"content": [3, 2, 2, 2], "function": [3, 3, 2, 2]}.items():
            for row in (0, 1):
                found = [frame[f"{name}_{what}"].iloc[row] for what in ("tokens", "words", "types", "prompts")]
                assert found == own
        assert frame["strata"].tolist() == [1, 1] and frame["strata_with_one_class"].tolist() == [0, 0]
        assert frame.attrs["null"] == inference.TYPE_NULL
    by_default = inference.compare(values, tokens, "content", "function", permutations=19)
    assert by_default["effect"].tolist() == pytest.approx(expected["types"][0])


def test_a_token_with_a_missing_value_is_left_out_of_a_comparison():
    random = np.random.default_rng(0)
    tokens = corpus(random, 6, 10, pieces=1, types=40)
    values = random.normal(size=(2, len(tokens)))
    values[0, 1::5], values[1, 3::7] = NAN, NAN
    values[:, tokens.position.numpy() == 0] = 0.0  # prompts are put in order by their first ids
    known = torch.from_numpy(~np.isnan(values).any(axis=0))
    assert_frame_equal(
        inference.compare(values, tokens, "content", "function", permutations=19),
        inference.compare(values[:, known.numpy()], tokens[known], "content", "function", permutations=19),
    )


def test_the_effect_of_the_second_class_is_one_minus_that_of_the_first():
    random = np.random.default_rng(0)
    tokens = corpus(random, 6, 10)
    values = random.integers(0, 9, (3, len(tokens))).astype(float)
    one = inference.compare(values, tokens, "content", "function", permutations=19)
    other = inference.compare(values, tokens, "function", "content", permutations=19)
    np.testing.assert_allclose(one["effect"], 1 - other["effect"])
    np.testing.assert_allclose(one["low"], 1 - other["high"])


def test_q_is_the_false_discovery_rate_of_scipy():
    random = np.random.default_rng(0)
    tokens = corpus(random, 6, 20)
    values = random.normal(size=(7, len(tokens))) + np.linspace(0, 1, 7)[:, None] * is_content(tokens)
    frame = inference.compare(values, tokens, "content", "function", permutations=199)
    assert len(set(frame["p"])) > 3
    np.testing.assert_array_equal(frame["q"], stats.false_discovery_control(frame["p"]))
    # Benjamini and Hochberg by hand: the smallest over larger p of p * units / place.
    p = np.sort(frame["p"])
    np.testing.assert_allclose(np.sort(frame["q"]), [min(p[i:] * 7 / np.arange(i + 1, 8)) for i in range(7)])


def test_a_comparison_has_an_interval_from_five_prompts_and_five_types_of_either_class():
    prompts: list[list[Word]] = [[("content", i), ("function", 50 + i), ("function", 80 + i)] for i in range(5)]
    values = np.random.default_rng(0).normal(size=(2, 15))
    frame = inference.compare(values, table(*prompts), "content", "function", permutations=39)
    assert not np.isnan(bounds(frame)).any()
    assert (np.diff(numbers(frame, "low", "effect", "high")) >= 0).all()
    fewer_prompts = [[("function", 1), *prompts[0][1:]], [("content", 0), ("content", 1), ("function", 51)]]
    fewer_types = [[("content", 1), *prompts[0][1:]], prompts[1]]
    for some, counted in ((fewer_prompts, [4, 5, 5]), (fewer_types, [5, 5, 4])):
        for first, second in (("content", "function"), ("function", "content")):
            frame = inference.compare(values, table(*some, *prompts[2:]), first, second, permutations=39)
            columns = ["content_prompts", "function_prompts", "content_types"]
            assert frame[columns].iloc[0].tolist() == counted
            assert np.isnan(bounds(frame)).all()
            assert not np.isnan(numbers(frame, "effect", "p", "q")).any()


def test_a_comparison_of_ids_has_an_interval_from_five_types_in_one_prompt():
    for types in (4, 5):
        tokens = table([("content", i) for i in range(types)] + [("function", 50 + i) for i in range(6)])
        values = np.random.default_rng(0).normal(size=(1, types + 6))
        for first, second in (("content", "function"), ("function", "content")):
            frame = inference.compare_types(values, tokens, first, second, permutations=39)
            assert np.isnan(bounds(frame)).all() == (types == 4)


def test_twenty_permutations_are_the_fewest_that_can_bound_an_interval():
    tokens = table(*[[("content", i), ("function", 50 + i)] for i in range(8)])
    values = np.random.default_rng(0).normal(size=(1, 16))
    for permutations in (19, 20):
        frame = inference.compare(values, tokens, "content", "function", permutations=permutations)
        assert np.isnan(bounds(frame)).all() == (permutations == 19)  # 1/20 is not below 0.05


@pytest.mark.parametrize("weigh", ["types", "tokens"])
@pytest.mark.parametrize("strata", [None, "frequency", "position"])
@pytest.mark.parametrize("seed", range(3))
def test_a_comparison_is_that_of_loops_over_pairs(seed, strata, weigh, monkeypatch):
    monkeypatch.setattr(inference, "EFFECTIVE_TYPES", 1)
    random = np.random.default_rng(seed)
    _, tokens = inference.in_own_order(recurring(random, 6, 4))
    given = {"frequency": tokens.id.numpy() // 10 % 2, "position": random.integers(0, 3, len(tokens))}.get(strata or "")
    values = random.integers(0, 7, (2, len(tokens))) + random.normal(size=6)[tokens.prompt.numpy()].round()
    values += np.outer([0, 3], is_content(tokens))
    stratum = np.zeros(len(tokens), dtype=int) if given is None else given
    content = is_content(tokens)
    both = set(stratum[content]) & set(stratum[~content])
    used = np.isin(stratum, list(both))
    seen = recorded(monkeypatch)
    frame = inference.compare(values, tokens, "content", "function", strata=given, weigh=weigh, permutations=39)
    form, prompt = np.array(form_of_each(tokens))[used].tolist(), tokens.prompt.numpy()[used].tolist()
    assert len(set(form)) < len(set(zip(form, content[used], strict=True)))  # a form of two classes
    weights = share_of_types(form, content[used]) if weigh == "types" else [1.0] * len(form)
    for unit in (0, 1):
        labels = seen[unit].T.tolist()
        expected = by_loops(values[unit][used].tolist(), labels, form, prompt, stratum[used].tolist(), weights)
        found = numbers(frame, "effect", "low", "high", "p")[unit]
        if min(len({f for f, own in zip(form, content[used], strict=True) if own == each}) for each in (0, 1)) < 5:
            expected[1:3] = [NAN, NAN]
        np.testing.assert_allclose(found, expected, rtol=1e-9)
    assert not np.isnan(found).all()


@pytest.mark.parametrize("seed", range(3))
def test_a_comparison_of_ids_is_that_of_loops_over_pairs(seed, monkeypatch):
    random = np.random.default_rng(seed)
    names = np.where(random.random(18) < 0.5, "content", "function")
    words: list[Word] = [(names[i], *range(10 * i, 10 * i + 1 + i % 3)) for i in random.integers(0, 18, 90)]
    _, tokens = inference.in_own_order(table(words[:50], words[50:]))
    values = random.integers(0, 9, (1, 200))[:, tokens.id.numpy()].astype(float)
    seen = recorded(monkeypatch)
    frame = inference.compare_types(values, tokens, "content", "function", permutations=39)
    once = np.sort(np.unique(tokens.id.numpy(), return_index=True)[1])
    form = np.array(form_of_each(tokens))[once].tolist()
    n = [0] * len(once), [1.0] * len(once)
    expected = by_loops(values[0, once].tolist(), seen[0].T.tolist(), form, None, *n)
    np.testing.assert_allclose(numbers(frame, "effect", "low", "high", "p")[0], expected, rtol=1e-9)


@pytest.mark.parametrize("permutations", [39, 99, 139, 999])
@pytest.mark.parametrize("levels", [2, 10**6])
def test_an_interval_excludes_one_half_exactly_where_p_is_below_five_hundredths(permutations, levels):
    # 0.05 * 140 is more than 7 in binary. Few types and few values make many equal t, of effects on both sides.
    tokens = table(*[[("content", i), ("function", 50 + i % 5)] for i in range(6)])
    random = np.random.default_rng(permutations)
    values = random.integers(0, levels, (150, len(tokens))) + levels * random.random((150, 1)) * is_content(tokens)
    values = values.round()
    frame = inference.compare(values, tokens, "content", "function", permutations=permutations)
    known = ~np.isnan(bounds(frame)).any(axis=1)
    assert known.sum() > 140
    low, high = bounds(frame).T
    excludes = (low > 0.5) | (high < 0.5)
    assert excludes[known].tolist() == (frame["p"] < 0.05)[known].tolist()
    assert 10 < excludes.sum() < 140


@pytest.mark.parametrize("weigh", ["types", "tokens"])
def test_a_complete_separation_has_a_finite_interval(weigh):
    words: list[list[Word]] = [[("content", i), ("content", i + 1), ("function", 50 + i)] for i in range(10)]
    tokens = table(*words)
    values = np.stack([is_content(tokens), ~is_content(tokens)]).astype(float)
    frame = inference.compare(values, tokens, "content", "function", weigh=weigh, permutations=199)
    assert frame["effect"].tolist() == [1.0, 0.0]
    assert frame["p"].tolist() == [1 / 200] * 2
    (low, one), (zero, high) = bounds(frame)
    assert (zero, one) == (0.0, 1.0) and 0.5 < low < 0.99 and high == pytest.approx(1 - low)


def test_a_lead_without_variance_is_that_of_one_lost_pair_of_types():
    t, error = inference.studentised(np.array([1.0, 0.0, 0.5]), np.zeros(3), inference.lost_pair(5, 5))
    # One content type loses to one function type, of five each: influences -4/5 and +1/5 (four times) of 1/25 by class.
    of_class = np.array([-4 / 5, *[1 / 5] * 4]) / 25
    variance = 10 / 9 * 2 * (of_class**2).sum()
    expected = np.sqrt(variance) / (24 / 25 * 1 / 25)
    np.testing.assert_allclose(t, np.array([1, -1, 0]) * np.log(24) / expected)
    np.testing.assert_allclose(error[:2], expected)


def test_equal_values_say_nothing_and_have_no_interval():
    tokens = table(*[[("content", i), ("function", 50 + i)] for i in range(8)])
    frame = inference.compare(np.full((2, 16), 0.1), tokens, "content", "function", permutations=99)
    assert numbers(frame, "effect", "p", "q").tolist() == [[0.5, 1.0, 1.0]] * 2
    assert np.isnan(bounds(frame)).all()


@pytest.mark.parametrize("compare", [inference.compare, inference.compare_types])
def test_a_unit_without_a_value_changes_nothing_of_the_others(compare):
    random = np.random.default_rng(0)
    tokens = table(*[[("content", i), ("function", 50 + i)] for i in range(12)])
    values = random.normal(size=(4, 24)) + is_content(tokens)
    values[2, 3] = NAN
    without = compare(values, tokens, "content", "function", permutations=99)
    frame = compare(np.insert(values, 1, NAN, axis=0), tokens, "content", "function", permutations=99)
    columns = [column for column in without if column != "unit"]
    known = frame[frame["unit"] != 1].reset_index(drop=True)
    assert_frame_equal(known[columns], without[columns], check_exact=True)
    assert numbers(frame, "effect", "low", "high", "p", "q")[1].tolist() == pytest.approx([NAN] * 5, nan_ok=True)
    assert without["content_tokens"].tolist() == [12] * 4 and without["function_tokens"].tolist() == [11] * 4


@pytest.mark.parametrize(
    ("values", "first", "second", "message"),
    [
        ([1.0, 2.0, 3.0], "content", "content", "compare needs two different word classes; got 'content' twice"),
        ([1.0, 2.0, 3.0], "verb", "function", "got none of class 'verb': choose from content, function, adverb"),
        ([1.0, 2.0, 3.0], "content", "", "got none of class ''"),
        ([NAN, 2.0, 3.0], "content", "function", "must have a value; got none of class 'content'"),
        ([1.0, NAN, 3.0], "content", "function", "got none of class 'function'"),
    ],
)
@pytest.mark.parametrize("compare", [inference.compare, inference.compare_types])
def test_what_cannot_be_compared_is_refused(compare, values, first, second, message):
    tokens = table([("content", 1), ("function", 2), ("adverb", 3)])
    with pytest.raises(ValueError, match=message):
        compare(np.array([values]), tokens, first, second)


def test_without_any_word_a_comparison_says_that_there_are_no_classes():
    with pytest.raises(ValueError, match=r"got none of class 'content': choose from none"):
        inference.compare(np.array([[1.0]]), table([("", 1)]), "content", "function")


def test_what_cannot_be_described_is_refused():
    tokens = table([("special", 0), ("content", 1), ("function", 1)])
    values = np.array([[1.0, NAN, 3.0]])
    with pytest.raises(ValueError, match="a token of class content or number must have a value"):
        inference.describe(values, tokens, ["content", "number"])
    with pytest.raises(ValueError, match="must belong to words of one class; got none"):
        inference.describe_types(values, tokens)
    nothing = table([("special", 0), ("", 1)])
    with pytest.raises(
        ValueError, match="must belong to words; got none that does: pass text, or ids that decode to text"
    ):
        inference.by_word_class({"rank": np.array([[1.0, 2.0]])}, ["0_mid"], nothing, special=False)


# Strata


@pytest.mark.parametrize("seed", range(4))
def test_numbers_are_cut_into_deciles_of_the_tokens_compared(seed):
    random = np.random.default_rng(seed)
    number = random.permutation(80) // 2  # each of 0 to 39 twice: deciles are 0 to 3, 4 to 7, ...
    name = np.where(random.random(80) < 0.4, "content", "function")
    values = random.integers(0, 20, (2, 80)).astype(float)
    # More tokens, of other classes or without a value, whose numbers are all above: they must move no decile.
    more = [("number", 100 + i) for i in range(50)] + [("", 200), ("content", 201), ("function", 202)]
    tokens = table([(name[i], i) for i in range(80)] + more)
    all_values = np.concatenate([values, np.zeros((2, 53))], axis=1)
    all_values[:, -2:] = NAN
    strata = np.concatenate([number, np.full(53, 1000)])
    expected = [won(row, name == "content", number // 4) for row in values]
    both = sum(len(set(name[number // 4 == decile])) == 2 for decile in range(10))
    for given in (strata, strata.astype(np.float32), -strata, torch.from_numpy(strata), strata.astype(float).tolist()):
        frame = inference.compare(all_values, tokens, "content", "function", strata=given, permutations=9)
        np.testing.assert_allclose(frame["effect"], expected, rtol=1e-12)
        assert frame["strata"].tolist() == [both] * 2 and frame["strata_with_one_class"].tolist() == [10 - both] * 2
        assert frame["content_tokens"].iloc[0] + frame["function_tokens"].iloc[0] == sum(
            (number // 4 == decile).sum() for decile in range(10) if len(set(name[number // 4 == decile])) == 2
        )


def test_few_different_numbers_are_as_many_strata():
    random = np.random.default_rng(0)
    number = random.integers(0, 3, 60) ** 2  # 0, 1 and 4
    name = np.where(random.random(60) < 0.5, "content", "function")
    tokens = table([(name[i], i) for i in range(60)])
    values = random.normal(size=(1, 60))
    expected = won(values[0], name == "content", number)
    for given in (number, torch.from_numpy(number).bfloat16(), torch.from_numpy(number).half()):
        frame = inference.compare(values, tokens, "content", "function", strata=given, permutations=9)
        assert frame["effect"].iloc[0] == pytest.approx(expected)
        assert frame["strata"].tolist() == [3]


def test_numbers_may_be_infinite():
    # The logarithm of a count is -inf for what was never counted.
    count = np.repeat([0, 0, 0, 1, 1, 2, 2, 8, 8, 9], 4)
    name = np.tile(["content", "function"], 20)
    tokens = table([(name[i], i) for i in range(40)])
    values = np.random.default_rng(0).normal(size=(1, 40))
    with np.errstate(divide="ignore"):
        logarithm = np.log(count)
    frame = inference.compare(values, tokens, "content", "function", strata=logarithm, permutations=9)
    assert frame["effect"].iloc[0] == pytest.approx(won(values[0], name == "content", count))
    assert frame["strata"].tolist() == [5]


def test_labels_are_strata_as_they_are_and_those_without_both_classes_are_dropped():
    tokens = table(
        [("content", 1), ("content", 2), ("function", 3), ("function", 4)],
        [("content", 5), ("function", 6), ("content", 7), ("number", 8)],
    )
    values = np.array([[5.0, 1.0, 3.0, 9.0, 2.0, 2.0, 8.0, 0.0]])
    strata = ["a", "b", "a", "b", "c", "d", "a", "e"]
    # a: 5 and 8 against 3; b: 1 against 9; c and d lack a class, and nothing of e is compared.
    for given in (strata, np.array(strata), np.array(strata, dtype=object), pd.Series(strata).to_numpy()):
        frame = inference.compare(values, tokens, "content", "function", strata=given, permutations=9)
        assert frame["effect"].tolist() == [2 / 3]
        assert numbers(frame, "strata", "strata_with_one_class").tolist() == [[2, 2]]
        assert numbers(frame, "content_tokens", "function_tokens").tolist() == [[3, 2]]
        assert numbers(frame, "content_prompts", "function_prompts").tolist() == [[2, 1]]


def test_a_truth_value_is_a_label():
    random = np.random.default_rng(0)
    tokens = corpus(random, 3, 10)
    values, rare = random.normal(size=(1, len(tokens))), random.random(len(tokens)) < 0.03
    rare[[0, -1]] = True
    labels = np.where(rare, "rare", "common")
    for given in (rare, torch.from_numpy(rare)):
        assert_frame_equal(
            inference.compare(values, tokens, "content", "function", strata=given, permutations=9),
            inference.compare(values, tokens, "content", "function", strata=labels, permutations=9),
        )


def test_tokens_without_a_number_are_left_out():
    random = np.random.default_rng(0)
    tokens = corpus(random, 6, 20, pieces=1)
    values, number = random.normal(size=(2, len(tokens))), random.normal(size=len(tokens))
    number[(random.random(len(tokens)) < 0.3) & (tokens.position.numpy() > 0)] = NAN  # first ids order the prompts
    known = torch.from_numpy(~np.isnan(number))
    assert_frame_equal(
        inference.compare(values, tokens, "content", "function", strata=number, permutations=19),
        inference.compare(
            values[:, known.numpy()],
            tokens[known],
            "content",
            "function",
            strata=number[known.numpy()],
            permutations=19,
        ),
    )
    with pytest.raises(ValueError, match="must have a value; got none of class 'content'"):
        inference.compare(values, tokens, "content", "function", strata=np.full(len(tokens), NAN))


@pytest.mark.parametrize("compare", [inference.compare, inference.compare_types])
def test_strata_of_another_length_are_refused(compare):
    tokens = table([("content", 1), ("function", 2), ("special", 0)])
    values = np.array([[1.0, 2.0, 3.0]])
    with pytest.raises(
        ValueError, match=r"one label or number per token, special .*, 3 in all; got .* of shape \(2,\)"
    ):
        compare(values, tokens, "content", "function", strata=["a", "a"])
    with pytest.raises(ValueError, match=r"3 in all; got an array of shape \(1, 3\)"):
        compare(values, tokens, "content", "function", strata=torch.zeros(1, 3))


@pytest.mark.parametrize("compare", [inference.compare, inference.compare_types])
def test_strata_that_separate_the_classes_are_refused(compare):
    tokens = table([("content", 1), ("function", 2), ("number", 0)])
    with pytest.raises(
        ValueError, match=r"a stratum must have tokens of both 'content' and 'function'; .*: use coarser strata"
    ):
        compare(np.array([[1.0, 2.0, 3.0]]), tokens, "content", "function", strata=["a", "b", "a"])


def test_strata_take_away_what_frequency_alone_explains():
    # The value depends on the frequency only, and so does the class: no effect of the class at a given frequency.
    random = np.random.default_rng(0)
    frequency = random.random((20, 60))
    tokens = table(
        *[[("function" if random.random() < f else "content", int(f * 1e6)) for f in row] for row in frequency]
    )
    values = (frequency.ravel() + random.normal(size=1200) * 0.2)[None]
    plain = inference.compare(values, tokens, "content", "function", permutations=199)
    within = inference.compare(values, tokens, "content", "function", permutations=199, strata=frequency.ravel())
    assert plain["effect"].iloc[0] < 0.3 and plain["p"].iloc[0] == 1 / 200
    assert abs(within["effect"].iloc[0] - 0.5) < 0.04
    assert within["low"].iloc[0] < 0.5 < within["high"].iloc[0]


# Intervals


def test_four_prompts_have_no_interval_and_five_have_one():
    def mean(values):
        return lambda weights: values @ weights / weights.sum()

    for n in range(1, 8):
        tokens = table(*[[("content", i), ("content", 50 + i)] for i in range(n)])
        values = np.random.default_rng(0).normal(size=(3, 2 * n))
        found = inference.prompt_interval(mean(values), tokens)
        assert found.shape == (2, 3)
        assert np.isnan(found).all() if n < 5 else (found[0] < found[1]).all()
        alike = inference.interval(mean(values[:, :n]), n)
        assert np.isnan(alike).all() if n < 5 else (alike[0] < alike[1]).all()


def test_an_interval_is_the_percentile_interval_of_scipy_expanded():
    x = np.random.default_rng(0).exponential(size=15)
    share = stats.norm.cdf(-np.sqrt(15 / 14) * stats.t.ppf(0.975, 14))  # Hesterberg 2015, section 5.3
    reference = stats.bootstrap(
        (x,),
        np.mean,
        confidence_level=float(1 - 2 * share),
        n_resamples=9999,
        method="percentile",
        rng=np.random.default_rng(1),
    )
    expected = [reference.confidence_interval.low, reference.confidence_interval.high]
    tokens = table(*[[("content", i)] * 4 for i in range(15)])  # four equal tokens a prompt change nothing
    found = inference.prompt_interval(lambda weights: (np.repeat(x, 4) @ weights / weights.sum())[None], tokens)
    np.testing.assert_allclose(found[:, 0], expected, atol=0.25 * float(reference.standard_error))


def test_bounds_are_expanded_percentiles():
    of_drawn = np.random.default_rng(0).normal(size=(999, 2))
    for n, degrees in ((5, None), (10, None), (30, None), (4, 17)):
        share = stats.norm.cdf(-np.sqrt(n / (n - 1)) * stats.t.ppf(0.975, degrees or n - 1))
        assert share < 0.025
        expected = np.quantile(of_drawn, [share, 1 - share], axis=0)
        np.testing.assert_allclose(inference.bounds(of_drawn, n, degrees=degrees), expected)
    with_missing = np.insert(of_drawn, 1, NAN, axis=1)
    with_missing[::3, 0] = NAN
    found = inference.bounds(with_missing, 10)
    assert np.isnan(found[:, 1]).all()
    np.testing.assert_array_equal(found[:, 0], inference.bounds(of_drawn[np.arange(999) % 3 > 0], 10)[:, 0])


def test_resamples_within_cells_keep_the_number_of_each_cell():
    cell = np.array([4, 1, 4, 1, 4, 9])
    drawn = inference.resamples_within(cell)
    assert drawn.shape == (inference.RESAMPLES, 6)
    for number, size in ((4, 3), (1, 2), (9, 1)):
        assert (drawn[:, cell == number].sum(axis=1) == size).all()
    np.testing.assert_allclose(drawn.mean(axis=0), 1, atol=4 * np.sqrt(2 / 3 / inference.RESAMPLES))
    assert Counter(map(tuple, drawn[:, cell == 1].tolist())).keys() == {(0, 2), (1, 1), (2, 0)}
    assert (drawn == inference.resamples_within(cell)).all()
    assert (drawn != inference.resamples_within(cell, seed=1)).any()
    together = inference.resamples(6)
    assert (together.sum(axis=1) == 6).all() and together.shape == (inference.RESAMPLES, 6)
    assert (together[:, :3].sum(axis=1) != 3).any()


def test_an_interval_is_seeded():
    x = np.random.default_rng(0).normal(size=(1, 9))
    one, same, other = (inference.interval(lambda times: x @ times / 9, 9, seed=seed) for seed in (1, 1, 2))
    assert (one == same).all() and (one != other).all()


def test_resamples_without_a_value_are_left_out_of_an_interval():
    # Two of five prompts have the class: a resample without either (8 %) has no mean.
    x, has = np.array([1.0, 2.0, 0.0, 0.0, 0.0]), np.array([1.0, 1.0, 0.0, 0.0, 0.0])

    def mean(times):
        n = (has * times).sum()
        return np.array([(x * times).sum() / n if n else NAN, NAN])

    found = inference.interval(mean, 5)
    assert found[:, 0].tolist() == [1.0, 2.0]
    assert np.isnan(found[:, 1]).all()


def test_an_interval_covers_the_true_median_in_ninety_five_of_a_hundred_data_sets():
    random = np.random.default_rng(2024)
    prompts, data_sets = 40, 400
    tokens = table(*[[("content", 3 * i + j) for j in range(3)] for i in range(prompts)])
    # Tokens of a prompt share three quarters of their variance; the true median is 0. Each unit is a data set.
    of_prompt = random.normal(size=(data_sets, prompts))[:, tokens.prompt.numpy()] * np.sqrt(3)
    values = of_prompt + random.normal(size=(data_sets, 3 * prompts))
    frame = inference.describe(values, tokens, ["content"])
    low, high = bounds(frame).T
    covered = int(((low <= 0) & (high >= 0)).sum())
    # A percentile interval of 40 prompts covers a little less than it says: 93 to 97 %, and binomial slack.
    least, most = stats.binom.ppf(0.003, data_sets, 0.93), stats.binom.ppf(0.997, data_sets, 0.97)
    assert least <= covered <= most


def test_the_interval_of_a_median_allows_for_other_prompts_where_tokens_of_a_prompt_are_equal():
    random = np.random.default_rng(0)
    prompts, each = 20, 50
    # All content tokens of a prompt are equal, all function tokens 0; every prompt has the same types.
    words: list[Word] = [("content", i) for i in range(each)] + [("function", 50 + i) for i in range(each)]
    tokens = table(*[[*words, ("", 100 + i)] for i in range(prompts)])
    values = (random.normal(size=prompts)[tokens.prompt.numpy()] * is_content(tokens))[None]
    content = values[0, is_content(tokens)]
    by_token = np.std([np.median(random.choice(content, len(content))) for _ in range(300)])
    by_prompt = np.std([np.median(random.choice(content[::each], prompts)) for _ in range(500)])
    assert by_prompt > 4 * by_token
    described = inference.describe(values, tokens, ["content"]).iloc[0]
    # A 95 % interval is about four standard errors wide.
    assert 2.5 * by_prompt < described["high"] - described["low"] < 6 * by_prompt


def test_intervals_allow_for_other_types_where_tokens_of_a_type_are_equal():
    random = np.random.default_rng(0)
    types, prompts = 20, 50
    words: list[Word] = [("content", i) for i in range(types)] + [("function", 50 + i) for i in range(types)]
    tokens = table(*[[*words, ("", 100 + i)] for i in range(prompts)])
    of_type = random.normal(size=types)
    values = np.where(is_content(tokens), of_type[tokens.id.numpy() % 50 % types], 0.0)[None]
    by_type = np.std([np.median(random.choice(of_type, types)) for _ in range(500)])
    described = inference.describe(values, tokens, ["content"]).iloc[0]
    assert 2.5 * by_type < described["high"] - described["low"] < 6 * by_type
    won_by_type = [np.mean(random.choice(of_type, types) > 0) for _ in range(500)]
    compared = inference.compare(values, tokens, "content", "function", permutations=199).iloc[0]
    assert compared["high"] - compared["low"] > 3 * np.std(won_by_type)


# Means over prompts


def test_a_mean_over_prompts_leaves_out_prompts_with_a_missing_value():
    tokens = table(*[[("content", i)] * (1 + i % 3) for i in range(7)])
    values = np.array([[1.0, 2.0, NAN, 4.0, 5.0, 6.0, 9.0], [2.0, 2.0, 2.0, NAN, 4.0, 4.0, 8.0]])
    mean, low, high, n = inference.prompt_means(values, tokens)
    assert n == 5
    np.testing.assert_allclose(mean, [(1 + 2 + 5 + 6 + 9) / 5, (2 + 2 + 4 + 4 + 8) / 5])
    known = values[:, [0, 1, 4, 5, 6]]
    for row, lower, upper in zip(known, low, high, strict=True):
        expected = stats.t.interval(0.95, 4, loc=row.mean(), scale=stats.sem(row))
        np.testing.assert_allclose([lower, upper], expected)


def test_an_interval_of_a_mean_is_that_of_student():
    values = np.random.default_rng(0).exponential(size=(3, 5))
    values[2] = NAN
    low, high = inference.mean_interval(values)
    expected = stats.t.interval(0.95, 4, loc=values.mean(axis=1), scale=stats.sem(values, axis=1))
    np.testing.assert_allclose((low, high), expected)
    assert np.isnan([low[2], high[2]]).all()
    assert np.isnan(inference.mean_interval(values[:, :4])).all()


def test_a_mean_over_tokens_resamples_prompts():
    random = np.random.default_rng(0)
    tokens = table(*[[("content", 10 * i + j) for j in range(1 + i % 3)] for i in range(12)])
    values = random.normal(size=12)[tokens.prompt.numpy()] + random.normal(size=(2, len(tokens))) / 9
    mean, low, high = inference.token_means(values, tokens)
    np.testing.assert_allclose(mean, values.mean(axis=1))
    drawn = []
    for _ in range(3000):
        rows = np.concatenate([np.flatnonzero(tokens.prompt.numpy() == own) for own in random.integers(0, 12, 12)])
        drawn.append(values[:, rows].mean(axis=1))
    expected = inference.bounds(np.stack(drawn), 12)
    np.testing.assert_allclose((low, high), expected, atol=0.25 * np.std(drawn, axis=0).max())


def test_a_mean_over_four_prompts_has_no_interval_and_over_none_is_missing():
    tokens = table(*[[("content", i)] for i in range(6)])
    values = np.array([[1.0, 2.0, NAN, NAN, 5.0, 8.0]])
    mean, low, high, n = inference.prompt_means(values, tokens)
    assert (mean.tolist(), n) == ([4.0], 4) and np.isnan(low).all() and np.isnan(high).all()
    mean, low, high, n = inference.prompt_means(np.full((2, 6), NAN), tokens)
    assert n == 0 and all(np.isnan(each).all() and each.shape == (2,) for each in (mean, low, high))


# Order


@pytest.mark.parametrize("seed", range(2))
def test_the_order_of_prompts_changes_no_digit(seed, monkeypatch):
    monkeypatch.setattr(inference, "RESAMPLES", 200)
    random = np.random.default_rng(seed)
    tokens = corpus(random, 9, 12, types=60)  # few types, so that prompts share many
    prompts = len(tokens.prompt.unique())
    values = random.normal(size=(3, len(tokens)))
    values[:, ::11] = NAN
    of_type = random.normal(size=(1, 60))[:, tokens.id.numpy()]
    frequency = random.random(len(tokens))
    of_prompt = random.normal(size=(2, prompts))
    other, rows = in_another_order(tokens, seed)
    place = tokens.prompt.numpy()[rows][np.unique(other.prompt.numpy(), return_index=True)[1]]

    for strata in (None, frequency):
        again = None if strata is None else strata[rows]
        for compare, data in ((inference.compare, values), (inference.compare_types, of_type)):
            assert_frame_equal(
                compare(data, tokens, "content", "function", strata=strata, permutations=49),
                compare(data[:, rows], other, "content", "function", strata=again, permutations=49),
                check_exact=True,
            )
    classes = ["content", "function"]
    one, same = inference.describe(values, tokens, classes), inference.describe(values[:, rows], other, classes)
    assert_frame_equal(one, same, check_exact=True)
    assert not np.isnan(bounds(one)).any()
    assert_frame_equal(
        inference.describe_types(of_type, tokens), inference.describe_types(of_type[:, rows], other), check_exact=True
    )
    for mean, alike in zip(
        inference.prompt_means(of_prompt, tokens), inference.prompt_means(of_prompt[:, place], other), strict=True
    ):
        np.testing.assert_array_equal(mean, alike)


def test_prompts_are_put_in_the_order_of_their_ids():
    tokens = table([("content", 5), ("content", 9)], [("content", 5), ("content", 2), ("content", 1)], [("content", 5)])
    order, own = inference.in_own_order(tokens)
    assert order.tolist() == [5, 2, 3, 4, 0, 1]
    assert own.id.tolist() == [5, 5, 2, 1, 5, 9]
    assert own.prompt.tolist() == [0, 1, 1, 1, 2, 2]
    again, same = inference.in_own_order(own)
    assert again.tolist() == list(range(6)) and same.prompt.tolist() == own.prompt.tolist()


def test_the_seed_changes_intervals_and_p_and_nothing_else():
    random = np.random.default_rng(0)
    tokens = corpus(random, 8, 12)
    values = random.normal(size=(4, len(tokens)))
    one, other = (
        inference.compare(values, tokens, "content", "function", permutations=99, seed=seed) for seed in (0, 1)
    )
    changed = [column for column in one if not one[column].equals(other[column])]
    assert changed == ["low", "high", "p", "q"]


# What chance does, and what it hides


def simulated(n_trials: int, n_prompts: int, effect: float) -> tuple[int, int]:
    """How many trials of the benchmark's scenario (d) have p < 0.05, and how many intervals hold the effect."""
    trial = BENCHMARK.compared(BENCHMARK.SCENARIOS["d real recurrence"], n_prompts, effect)
    found = [trial(np.random.default_rng([n_prompts, number])) for number in range(n_trials)]
    return sum(bool(p) for p, _ in found), sum(bool(held) for _, held in found)


@pytest.mark.trials
def test_words_that_recur_are_no_evidence_and_intervals_hold_the_effect():
    # Real sentences and classes, half of the variance by word type and a fifth by prompt.
    rejected, covered = simulated(200, 10, 0.5)
    assert 0 < rejected <= MOST_BY_CHANCE
    assert covered >= 181
    rejected, covered = simulated(200, 10, 0.65)
    assert covered >= 181
    assert rejected > 200 * 0.6


@pytest.mark.trials
def test_a_stratum_that_explains_class_and_value_is_no_evidence_within_strata():
    random = np.random.default_rng(20240501)
    found = 0
    for _ in range(200):
        words: list[list[Word]] = [
            [(("content", "function")[own % 2], int(own)) for own in random.integers(0, 60, 15)] for _ in range(8)
        ]
        tokens = table(*words)
        # Content words stand early more often, early words have larger values, and so do some types and prompts.
        early = random.random(len(tokens)) < np.where(is_content(tokens), 0.7, 0.3)
        values = 2 * early + random.normal(size=60)[tokens.id.numpy()] + random.normal(size=len(tokens))
        values += random.normal(size=8)[tokens.prompt.numpy()]
        strata = np.where(early, "early", "late")
        frame = inference.compare(values[None], tokens, "content", "function", strata=strata, permutations=99)
        found += bool(frame["p"].iloc[0] < 0.05)
    assert 0 < found <= MOST_BY_CHANCE


def test_a_planted_shift_of_six_tenths_of_a_standard_deviation_is_found(monkeypatch):
    monkeypatch.setattr(inference, "RESAMPLES", 300)
    random = np.random.default_rng(7)
    planted = np.array([0.6, 0.0, -0.6, 0.0, 0.6])
    expected = stats.norm.cdf(planted / np.sqrt(2))  # P(x > y) of two normal values this far apart
    found, effects, inside = np.zeros(5), np.zeros(5), np.zeros(5)
    trials = 12
    for _ in range(trials):
        tokens = corpus(random, 12, 24, pieces=1)
        values = random.normal(size=(5, len(tokens))) + planted[:, None] * is_content(tokens)
        frame = inference.compare(values, tokens, "content", "function", permutations=199)
        found += frame["q"] < 0.05
        effects += frame["effect"] / trials
        inside += (frame["low"] <= expected) & (expected <= frame["high"])
    assert (found[planted != 0] >= 11).all()
    assert (found[planted == 0] <= 3).all()
    np.testing.assert_allclose(effects, expected, atol=0.04)
    assert inside.sum() >= 50  # of 60 intervals
