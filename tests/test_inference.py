"""Statistics against scipy, brute force and cases by hand; simulated data where the truth is known."""

from collections import Counter
from dataclasses import replace
from itertools import combinations, product
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from pandas.testing import assert_frame_equal
from scipy import stats

from lens_probes import inference
from lens_probes.prompts import Tokens

pytestmark = pytest.mark.filterwarnings("error")

NAN = np.nan
MOST_BY_CHANCE = 18  # of 200 trials at 5 %: the 99.4 % point of the binomial

Word = tuple[Any, ...]  # a class and the ids of the word's tokens; "" is no word, "special" a special token


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
    vocabulary[:2] = [("content",), ("function",)]
    return table(
        *[
            [
                (str(random.choice(vocabulary[i])), *range(10 * i, 10 * i + 1 + i % 3))
                for i in [0, 1, *random.choice(types, words, p=share / share.sum())]
            ]
            for _ in range(prompts)
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


def tested(values: Any, labels: list[Any], form: Any, prompt: Any, stratum: Any, weights: Any) -> list[float]:
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
    c = [own for b, own in enumerate(away) if (b + 1) / n < 0.05][-1]
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

    fewer = table(*prompts[:4], [("content", 7, 8), ("content", 9)], [("function", 53)])
    of_first = replace(fewer, prompt=fewer.prompt.clamp(max=4) - (fewer.prompt == 4).long())  # [0 1 2 3 3 4]
    frame = inference.describe(random.normal(size=(1, len(fewer))), of_first, ["content", "function"])
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
    assert frame.iloc[2][["tokens", "types", "prompts", "median"]].tolist() == [3, 2, 2, 92.0]
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
    # content: the types 1 (four tokens), 4, 5; function: 3 (two tokens), 6, 7.
    assert frame["types"].tolist() == [3, 3]
    assert frame["tokens"].tolist() == [6, 4]
    assert frame["words"].tolist() == [5, 4]
    assert frame["prompts"].tolist() == [3, 2]
    assert frame["median"].tolist() == [40.0, 60.0]
    assert frame["lower_quartile"].tolist() == [10.0, 30.0]
    assert frame["upper_quartile"].tolist() == [50.0, 70.0]


def test_a_type_is_compared_once_and_ids_of_two_classes_are_left_out():
    tokens, values = types_by_hand()
    frame = inference.compare_types(values, tokens, "content", "function", permutations=2000)
    # 10, 40, 50 against 30, 60, 70: two of nine pairs.
    assert frame["effect"].tolist() == [2 / 9]
    counted = ("types", "tokens", "words", "prompts")
    assert numbers(frame, *(f"content_{what}" for what in counted)).tolist() == [[3, 6, 5, 3]]
    assert numbers(frame, *(f"function_{what}" for what in counted)).tolist() == [[3, 4, 4, 2]]
    # All 20 ways to choose three of six types, whose effects are symmetric about 1/2. The mean of 2000 of them is not
    # quite 1/2, so 7/9 may count as far as 2/9 or as a little less.
    ordered = [10, 30, 40, 50, 60, 70]
    effects = np.array([won(ordered, [i in chosen for i in range(6)]) for chosen in combinations(range(6), 3)])
    least, most = (np.mean(np.abs(effects - middle) >= abs(2 / 9 - middle) - 1e-9) for middle in (0.51, 0.5))
    slack = 4 * np.sqrt(0.25 / 2000)
    assert most - least < 3 * slack and least - slack < frame["p"].iloc[0] < most + slack
    assert frame.attrs["null"] == inference.TYPE_NULL


def test_the_interval_of_types_counts_a_type_once_in_each_resample():
    # Every prompt has the same types, each prompt one of them many times: any prompts drawn have all types once.
    types = {i: float(i) for i in range(1, 8)}
    tokens = table(*[[("content", i) for i in types] + [("content", own)] * 30 for own in types])
    values = tokens.id.numpy().astype(float)[None]
    frame = inference.describe_types(values, tokens)
    assert numbers(frame, "median", "low", "high").tolist() == [[4.0, 4.0, 4.0]]
    by_token = inference.describe(values, tokens, ["content"])
    assert by_token["high"].iloc[0] - by_token["low"].iloc[0] > 1


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
    with pytest.raises(ValueError, match="no stratum has tokens of both 'content' and 'function'"):
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
    assert numbers(frame, "strata", "strata_dropped").tolist() == [[both, 10 - both]]


# The effect


@pytest.mark.parametrize("seed", range(10))
def test_the_effect_is_the_u_statistic_over_the_number_of_pairs(seed):
    random = np.random.default_rng(seed)
    n = int(random.integers(2, 40))
    values = random.integers(0, 5, (4, n)) / 3  # many ties
    is_first = np.arange(n) < random.integers(1, n)
    effect = inference.common_language(values, np.zeros(n, dtype=np.int64))(is_first, np.ones(n))
    for row, found in zip(values, effect, strict=True):
        u = stats.mannwhitneyu(row[is_first], row[~is_first]).statistic
        assert found == pytest.approx(u / (is_first.sum() * (~is_first).sum()), abs=1e-12)


@pytest.mark.parametrize("seed", range(10))
def test_a_weighted_effect_is_that_of_repeated_tokens_within_strata(seed):
    random = np.random.default_rng(seed)
    n = 30
    values = random.integers(0, 8, (3, n)).astype(float)
    stratum = random.integers(-2, 3, n)
    effect = inference.common_language(values, stratum)
    for _ in range(4):
        is_first, weights = random.random(n) < 0.4, random.integers(0, 4, n)
        repeated = np.repeat(np.arange(n), weights)
        expected = [won(row[repeated], is_first[repeated], stratum[repeated]) for row in values]
        np.testing.assert_allclose(effect(is_first, weights.astype(float)), expected, rtol=1e-12)
        alike = [won(row, is_first, stratum, weights) for row in values]
        np.testing.assert_allclose(expected, alike, rtol=1e-12)


def test_an_effect_without_pairs_is_missing():
    effect = inference.common_language(np.array([[1.0, 2.0, 3.0]]), np.array([0, 0, 1]))
    assert np.isnan(effect(np.array([True, True, False]), np.ones(3))).all()
    assert np.isnan(effect(np.array([True, False, False]), np.array([0.0, 1.0, 1.0]))).all()


def test_equal_infinite_values_are_ties():
    values = np.array([[np.inf, np.inf, 1.0, 1.0], [-np.inf, 0.0, -np.inf, 0.0]])
    effect = inference.common_language(values, np.zeros(4, dtype=np.int64))
    first = np.array([True, False, True, False])
    np.testing.assert_array_equal(effect(first, np.ones(4)), [won(row, first) for row in values])


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
    one, same, other = (np.stack(inference.permuted(label, cells, 20, seed=seed)) for seed in (1, 1, 2))
    assert (one == same).all() and (one != other).any()
    assert len(np.unique(one, axis=0)) == 20


@pytest.mark.parametrize("permutations", [0, -1])
def test_no_permutation_is_refused(permutations):
    tokens = table([("content", 1), ("function", 2)])
    for compare in (inference.compare, inference.compare_types):
        with pytest.raises(ValueError, match=f"permutations is .* at least 1; {permutations} came"):
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


def test_the_smallest_p_is_one_over_the_permutations_and_one():
    tokens = table(*[[("content", 10 * i + j), ("function", 10 * i + j + 5)] for i in range(20) for j in range(5)])
    values = np.where(is_content(tokens), 1.0, 0.0)[None]
    for permutations in (9, 99):
        frame = inference.compare(values, tokens, "content", "function", permutations=permutations)
        assert frame["p"].tolist() == [1 / (permutations + 1)]
        assert frame["permutations"].tolist() == [permutations]
        assert frame["effect"].tolist() == [1.0]


def test_a_prompt_with_words_of_one_class_only_says_nothing_against_the_null():
    # All content words in one prompt, all function words in another: nothing can be permuted.
    tokens = table([("content", 1), ("content", 2), ("content", 3)], [("function", 4), ("function", 5)])
    frame = inference.compare(np.array([[9.0, 8.0, 7.0, 1.0, 2.0]]), tokens, "content", "function", permutations=99)
    assert frame["effect"].tolist() == [1.0]
    assert frame["p"].tolist() == [1.0]


@pytest.mark.parametrize("strata", [None, "label", "number"])
def test_labels_move_with_whole_words_within_a_prompt_and_stratum(strata, monkeypatch):
    random = np.random.default_rng(0)
    tokens = corpus(random, 6, 12)
    stratum = random.integers(0, 3, len(tokens))
    given = {"label": np.array(list("abc"))[stratum], "number": stratum.astype(float)}.get(strata or "")
    seen = []
    common_language = inference.common_language

    def recording(values, strata):
        effect = common_language(values, strata)
        return lambda labels, weights: (seen.append((labels, weights)), effect(labels, weights))[1]

    monkeypatch.setattr(inference, "common_language", recording)
    values = random.normal(size=(1, len(tokens)))
    inference.compare(values, tokens, "content", "function", strata=given, permutations=50)
    _, ordered = inference.in_own_order(tokens)
    words = word_of_each(ordered)
    starts = [i for i, word in enumerate(words) if i == 0 or words[i - 1] != word]
    order, _ = inference.in_own_order(tokens)
    cells = [(words[i][0], stratum[order][i] if strata else 0) for i in starts]
    observed, moved = seen[0][0], [labels for labels, weights in seen[1:51]]
    assert (observed == is_content(ordered)).all()
    expected = Counter(cell for cell, i in zip(cells, starts, strict=True) if observed[i])
    for labels in moved:
        assert len({(word, bool(label)) for word, label in zip(words, labels, strict=True)}) == len(starts)
        assert Counter(cell for cell, i in zip(cells, starts, strict=True) if labels[i]) == expected
    assert len({labels.tobytes() for labels in moved}) > 40
    for labels, weights in seen[51:]:  # resamples move no label
        assert (labels == observed).all() and len(set(zip(ordered.prompt.tolist(), weights, strict=True))) == 6


@pytest.mark.parametrize("seed", [0, 2, 3, 9, 11])
def test_p_is_that_of_all_arrangements_of_whole_words(seed):
    random = np.random.default_rng(seed)
    tokens = table(
        [("content", 1, 2, 3), ("function", 4), ("function", 5, 6), ("function", 7)],
        [("function", 11), ("content", 12, 13), ("content", 14), ("function", 15, 16, 17), ("function", 18, 19)],
    )
    values = random.normal(size=len(tokens))
    words = word_of_each(tokens)
    effects = {}
    for one, two in product(range(4), combinations(range(5), 2)):
        content = {(0, one), *((1, word) for word in two)}
        effects[one, two] = won(values, [word in content for word in words])
    away = np.abs(np.array(list(effects.values())) - np.mean(list(effects.values())))
    observed = abs(effects[0, (1, 2)] - np.mean(list(effects.values())))
    # The mean is estimated from 3000 of them: these seeds have no arrangement that is nearly as far.
    assert not ((np.abs(away - observed) < 0.01) & (away < observed - 1e-9)).any()
    exact = np.mean(away >= observed - 1e-9)
    frame = inference.compare(values[None], tokens, "content", "function", permutations=3000)
    assert frame["effect"].iloc[0] == pytest.approx(effects[0, (1, 2)])
    assert abs(frame["p"].iloc[0] - exact) < 4 * np.sqrt(0.25 / 3000)


# Two groups compared


def test_a_comparison_says_its_numbers_and_its_null():
    tokens = table(
        [("content", 5, 6), ("function", 7), ("special", 0)],
        [("content", 5), ("", 9), ("function", 8), ("number", 4), ("function", 8)],
    )
    values = np.array([[1.0, 5.0, 2.0, 9.0, 3.0, 9.0, 3.0, 9.0, 4.0], [2.0, 2.0, 1.0, 0.0, 2.0, 0.0, 2.0, 0.0, 1.0]])
    frame = inference.compare(values, tokens, "content", "function", permutations=19)
    # 1 5 3 against 2 3 4: 5 beats all, 3 beats 2 and ties; then 2 2 2 against 1 2 1.
    assert frame["effect"].tolist() == pytest.approx([4.5 / 9, 7.5 / 9])
    assert frame["unit"].tolist() == [0, 1]
    for name, expected in {"content": [3, 2, 2, 2], "function": [3, 3, 2, 2]}.items():
        for row in (0, 1):
            found = [frame[f"{name}_{what}"].iloc[row] for what in ("tokens", "words", "types", "prompts")]
            assert found == expected
    assert frame["strata"].tolist() == [1, 1] and frame["strata_dropped"].tolist() == [0, 0]
    assert frame.attrs["null"] == inference.WORD_NULL


def test_a_token_with_a_missing_value_is_left_out_of_a_comparison():
    random = np.random.default_rng(0)
    tokens = corpus(random, 6, 10)
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


def test_a_comparison_has_an_interval_from_five_prompts_of_either_class():
    prompts: list[list[Word]] = [[("content", i), ("function", 50 + i), ("function", 80 + i)] for i in range(5)]
    values = np.random.default_rng(0).normal(size=(2, 15))
    frame = inference.compare(values, table(*prompts), "content", "function", permutations=9)
    assert not np.isnan(bounds(frame)).any()
    assert (np.diff(numbers(frame, "low", "effect", "high")) >= 0).all()
    prompts[0] = [("function", 1), ("function", 2), ("function", 3)]
    for first, second in (("content", "function"), ("function", "content")):
        frame = inference.compare(values, table(*prompts), first, second, permutations=9)
        assert frame[["content_prompts", "function_prompts"]].iloc[0].tolist() == [4, 5]
        assert np.isnan(bounds(frame)).all()
        assert not np.isnan(numbers(frame, "p")).any()


def test_the_compared_interval_is_that_of_prompts_drawn_and_laid_end_to_end():
    random = np.random.default_rng(0)
    tokens = corpus(random, 10, 8)
    prompt, content = tokens.prompt.numpy(), is_content(tokens)
    values = random.normal(size=10)[prompt] * content + random.normal(size=len(tokens))
    effects = []
    for _ in range(1500):
        drawn = np.concatenate([np.flatnonzero(prompt == number) for number in random.integers(10, size=10)])
        x, y = values[drawn][content[drawn]], values[drawn][~content[drawn]]
        effects.append(stats.mannwhitneyu(x, y, method="asymptotic").statistic / (len(x) * len(y)))
    frame = inference.compare(values[None], tokens, "content", "function", permutations=9)
    np.testing.assert_allclose(
        bounds(frame)[0], np.quantile(effects, [0.025, 0.975]), atol=0.4 * float(np.std(effects))
    )


@pytest.mark.parametrize(
    ("values", "first", "second", "message"),
    [
        ([1.0, 2.0, 3.0], "content", "content", "compare takes two different word classes; 'content' came twice"),
        ([1.0, 2.0, 3.0], "verb", "function", "no token of class 'verb' .* classes here are content, function, adverb"),
        ([1.0, 2.0, 3.0], "content", "", "no token of class ''"),
        ([NAN, 2.0, 3.0], "content", "function", "no token of class 'content' has a value to compare"),
        ([1.0, NAN, 3.0], "content", "function", "no token of class 'function' has a value to compare"),
    ],
)
@pytest.mark.parametrize("compare", [inference.compare, inference.compare_types])
def test_what_cannot_be_compared_is_refused(compare, values, first, second, message):
    tokens = table([("content", 1), ("function", 2), ("adverb", 3)])
    with pytest.raises(ValueError, match=message):
        compare(np.array([values]), tokens, first, second)


def test_without_any_word_a_comparison_says_that_there_are_no_classes():
    with pytest.raises(ValueError, match=r"no token of class 'content' .* the classes here are none"):
        inference.compare(np.array([[1.0]]), table([("", 1)]), "content", "function")


def test_what_cannot_be_described_is_refused():
    tokens = table([("special", 0), ("content", 1), ("function", 1)])
    values = np.array([[1.0, NAN, 3.0]])
    with pytest.raises(ValueError, match="no token of class content or number has a value"):
        inference.describe(values, tokens, ["content", "number"])
    with pytest.raises(ValueError, match="no token here belongs to a word of one class"):
        inference.describe_types(values, tokens)
    nothing = table([("special", 0), ("", 1)])
    with pytest.raises(ValueError, match="no token here belongs to a word: pass text, or ids that decode to text"):
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
        assert frame["strata"].tolist() == [both] * 2 and frame["strata_dropped"].tolist() == [10 - both] * 2
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
        assert numbers(frame, "strata", "strata_dropped").tolist() == [[2, 2]]
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
    tokens = corpus(random, 6, 20)
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
    with pytest.raises(ValueError, match="no token of class 'content' has a value to compare"):
        inference.compare(values, tokens, "content", "function", strata=np.full(len(tokens), NAN))


@pytest.mark.parametrize("compare", [inference.compare, inference.compare_types])
def test_strata_of_another_length_are_refused(compare):
    tokens = table([("content", 1), ("function", 2), ("special", 0)])
    values = np.array([[1.0, 2.0, 3.0]])
    with pytest.raises(ValueError, match=r"one label or number a token, special .* 3 tokens, .* of shape \(2,\) came"):
        compare(values, tokens, "content", "function", strata=["a", "a"])
    with pytest.raises(ValueError, match=r"there are 3 tokens, and an array of shape \(1, 3\) came"):
        compare(values, tokens, "content", "function", strata=torch.zeros(1, 3))


@pytest.mark.parametrize("compare", [inference.compare, inference.compare_types])
def test_strata_that_separate_the_classes_are_refused(compare):
    tokens = table([("content", 1), ("function", 2), ("number", 0)])
    with pytest.raises(ValueError, match="no stratum has tokens of both 'content' and 'function': use coarser strata"):
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


def test_an_interval_is_the_percentile_interval_of_scipy():
    x = np.random.default_rng(0).exponential(size=15)
    reference = stats.bootstrap((x,), np.mean, n_resamples=9999, method="percentile", rng=np.random.default_rng(1))
    expected = [reference.confidence_interval.low, reference.confidence_interval.high]
    tokens = table(*[[("content", i)] * 4 for i in range(15)])  # four equal tokens a prompt change nothing
    found = inference.prompt_interval(lambda weights: (np.repeat(x, 4) @ weights / weights.sum())[None], tokens)
    np.testing.assert_allclose(found[:, 0], expected, atol=0.25 * float(reference.standard_error))


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


def test_intervals_resample_prompts_and_not_tokens():
    random = np.random.default_rng(0)
    prompts, each = 20, 50
    # All content tokens of a prompt are equal, all function tokens 0.
    words: list[Word] = [("content", 1)] * each + [("function", 2)] * each
    tokens = table(*[[*words, ("", 100 + i)] for i in range(prompts)])
    values = (random.normal(size=prompts)[tokens.prompt.numpy()] * is_content(tokens))[None]
    content = values[0, is_content(tokens)]
    by_token = np.std([np.median(random.choice(content, len(content))) for _ in range(300)])
    by_prompt = np.std([np.median(random.choice(content[::each], prompts)) for _ in range(500)])
    assert by_prompt > 4 * by_token
    described = inference.describe(values, tokens, ["content"]).iloc[0]
    # A 95 % interval is about four standard errors wide.
    assert 2.5 * by_prompt < described["high"] - described["low"] < 6 * by_prompt

    won_by_token = [np.mean(random.choice(content, len(content)) > 0) for _ in range(500)]
    won_by_prompt = [np.mean(random.choice(content[::each], prompts) > 0) for _ in range(500)]
    compared = inference.compare(values, tokens, "content", "function", permutations=9).iloc[0]
    width = compared["high"] - compared["low"]
    assert 3 * np.std(won_by_prompt) < width < 5 * np.std(won_by_prompt)
    assert width > 4 * 4 * np.std(won_by_token)


# Means over prompts


def test_a_mean_over_prompts_leaves_out_prompts_with_a_missing_value():
    tokens = table(*[[("content", i)] * (1 + i % 3) for i in range(7)])
    values = np.array([[1.0, 2.0, NAN, 4.0, 5.0, 6.0, 9.0], [2.0, 2.0, 2.0, NAN, 4.0, 4.0, 8.0]])
    mean, low, high, n = inference.prompt_means(values, tokens)
    assert n == 5
    np.testing.assert_allclose(mean, [(1 + 2 + 5 + 6 + 9) / 5, (2 + 2 + 4 + 4 + 8) / 5])
    known = values[:, [0, 1, 4, 5, 6]]
    for row, lower, upper in zip(known, low, high, strict=True):
        reference = stats.bootstrap((row,), np.mean, method="percentile", rng=np.random.default_rng(1))
        expected = [reference.confidence_interval.low, reference.confidence_interval.high]
        np.testing.assert_allclose([lower, upper], expected, atol=0.3 * float(reference.standard_error))


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


@pytest.mark.parametrize("strata", [False, True])
def test_permuted_classes_are_taken_for_different_as_rarely_as_stated(strata):
    random = np.random.default_rng(20240501)
    layers, found = 8, 0
    for _ in range(200):
        prompts, share = [], random.uniform(0.2, 0.8, 4)
        for number in range(4):
            names = np.where(np.arange(12) < max(1, round(12 * share[number])), "content", "function")
            prompts.append([(name, *random.integers(10**6, size=random.integers(1, 4))) for name in names])
        tokens = table(*prompts)
        # No token says anything of its class: words share most of their value, prompts with more content words have
        # larger values, and so has the first stratum, which has other shares of the classes in each prompt.
        words = np.unique(word_of_each(tokens), axis=0, return_inverse=True)[1].ravel()
        of_word = random.normal(size=(layers, words.max() + 1)) + random.normal(size=words.max() + 1)
        values = of_word[:, words] + random.normal(size=(layers, len(tokens))) / 3
        values += 6 * share[tokens.prompt.numpy()]
        given = None
        if strata:
            is_rare = (random.random(words.max() + 1) < 0.4)[words] ^ (is_content(tokens) & (random.random() < 0.5))
            given = np.where(is_rare, "rare", "common")
            values += 3 * is_rare
        frame = inference.compare(values, tokens, "content", "function", strata=given, permutations=199)
        found += bool((frame["q"] < 0.05).any())
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
