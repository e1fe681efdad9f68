"""Groups of tokens compared, with the number of everything, an interval, a named null and a correction.

Tokens of one prompt are not independent: the prompt is what intervals resample, and the whole word within its prompt is
what permutations move. Everything random is seeded, and prompts are first put in an order of their own (by token ids),
so the order in which they came changes no digit.

Every statistic is a function of *weights*, one a token: to resample prompts is to count each token as often as its
prompt was drawn. scipy.stats resamples single observations and permutes across prompts, so these two loops are ours;
the correction for many units is scipy's.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int, Shaped
from scipy import stats
from torch import Tensor

from lens_probes.prompts import Tokens

RESAMPLES = 1000
PERMUTATIONS = 1000
PROMPTS_FOR_INTERVAL = 5
CLASSES = ("content", "function", "number", "punctuation")  # the order of tables and legends
BOUNDS = (0.025, 0.975)
WORD_NULL = "within a prompt (and stratum) a word's values do not depend on its class; labels permuted among words"
TYPE_NULL = "a type's value does not depend on its class (within a stratum); labels permuted among types"

Strata = Sequence[str] | Sequence[float] | np.ndarray | Tensor
Values = Float[np.ndarray, "unit token"]
PerToken = Shaped[np.ndarray, " token"]
PerUnit = Float[np.ndarray, " unit"]


# Groups described


def describe(values: Values, tokens: Tokens, word_classes: Sequence[str], *, seed: int = 0) -> pd.DataFrame:
    """Median and quartiles of each unit's values by word class, and the interval of the median.

    One row a word class and unit: `unit` (its number), `word_class`, `tokens`, `words`, `types`, `prompts`, `median`,
    `lower_quartile`, `upper_quartile`, `low`, `high`. The 95 % interval resamples the prompts that have the class;
    with fewer than five it is NaN. Missing values (NaN) are left out, of the numbers of tokens to prompts too.
    """
    order, tokens = in_own_order(tokens)
    values = values[:, order]
    label = np.asarray(tokens.word_class)
    known = ~np.isnan(values).all(axis=0)
    frames = []
    for word_class in word_classes:
        member = (label == word_class) & known
        if member.any():
            frames.append(_description(values[:, member], tokens[torch.from_numpy(member)], word_class, seed))
    if not frames:
        raise ValueError(f"no token of class {' or '.join(word_classes)} has a value: there is nothing to describe")
    return pd.concat(frames, ignore_index=True)


def describe_types(values: Values, tokens: Tokens, *, seed: int = 0) -> pd.DataFrame:
    """`describe` for a fact about a token's id: each type counts once, ids of more than one class are left out.

    In a resample of prompts a type counts if any drawn prompt has it.
    """
    order, tokens = in_own_order(tokens)
    values = values[:, order]
    own = _of_one_class(tokens) & ~np.isnan(values).all(axis=0)
    label = np.where(own, tokens.word_class, "")
    frames = []
    for word_class in _classes(label):
        member = label == word_class
        group = tokens[torch.from_numpy(member)]
        frames.append(_description(values[:, member], group, word_class, seed, by_type=True))
    if not frames:
        raise ValueError("no token here belongs to a word of one class: there is nothing to describe")
    return pd.concat(frames, ignore_index=True)


def _description(values: Values, group: Tokens, word_class: str, seed: int, *, by_type: bool = False) -> pd.DataFrame:
    """The rows of one word class, each token counted or each type."""
    first, once = _types(group)
    quantile = quantiles(values[:, first] if by_type else values)

    def counted(q: float, weights: PerToken) -> PerUnit:
        return quantile(q, once(weights) if by_type else weights)

    everyone = np.ones(len(group))
    n = pd.DataFrame([counts(group[torch.from_numpy(known)]) for known in ~np.isnan(values)])
    bounds = prompt_interval(lambda weights: counted(0.5, weights), group, seed=seed)
    low, high = np.where(n["prompts"] >= PROMPTS_FOR_INTERVAL, bounds, np.nan)
    return pd.DataFrame(
        {
            "unit": np.arange(len(values)),
            "word_class": word_class,
            **n,
            "median": counted(0.5, everyone),
            "lower_quartile": counted(0.25, everyone),
            "upper_quartile": counted(0.75, everyone),
            "low": low,
            "high": high,
        }
    )


def by_word_class(
    quantities: Mapping[str, Values], layer: Sequence[str], tokens: Tokens, *, special: bool
) -> pd.DataFrame:
    """`describe` for several quantities by layer, one row a quantity, class and layer; special tokens are a class."""
    label = ["special" if each else own for own, each in zip(tokens.word_class, tokens.special.tolist(), strict=True)]
    tokens = replace(tokens, word_class=tuple(label))
    classes = [each for each in _classes(label) if special or each != "special"]
    frames = []
    for quantity, values in quantities.items():
        known = ~np.isnan(values).all(axis=0)
        if any(known & np.isin(label, classes)):
            frames.append(with_layers(describe(values, tokens, classes), layer).assign(quantity=quantity))
    if not frames:
        raise ValueError("no token here belongs to a word: pass text, or ids that decode to text")
    frame = pd.concat(frames, ignore_index=True)
    first = ["quantity", "layer"]
    return frame.reindex(columns=[*first, *(column for column in frame.columns if column not in first)])


def with_layers(frame: pd.DataFrame, layer: Sequence[str]) -> pd.DataFrame:
    """The same table with the layers' labels for the numbers of units."""
    named = frame.rename(columns={"unit": "layer"})
    named["layer"] = [layer[unit] for unit in frame["unit"]]
    return named


def _classes(label: Iterable[str]) -> list[str]:
    """The word classes that occur, our own first, then those of the user."""
    found = set(label) - {""}
    return [*(each for each in CLASSES if each in found), *sorted(found - set(CLASSES))]


def counts(tokens: Tokens) -> dict[str, int]:
    """How many tokens, words, types (distinct ids) and prompts there are."""
    return {
        "tokens": len(tokens),
        "words": len(np.unique(_words(tokens))),
        "types": len(tokens.id.unique()),
        "prompts": len(tokens.prompt.unique()),
    }


def quantiles(values: Values) -> Callable[[float, PerToken], PerUnit]:
    """The q-quantile (0 < q < 1) of each unit's values as a function of q and of weights, one a token.

    Midway between two values where q falls between them; NaN values do not count.

    >>> quantiles(np.array([[1.0, 2.0, 10.0]]))(0.5, np.array([1.0, 1.0, 2.0]))
    array([6.])
    """
    order = np.argsort(values, axis=1)  # NaN last
    ordered = np.take_along_axis(values, order, axis=1)
    counted = ~np.isnan(ordered)
    rows = np.arange(len(values))

    def quantile(q: float, weights: PerToken) -> PerUnit:
        reached = np.cumsum(weights[order] * counted, axis=1)
        goal = q * reached[:, -1:]
        slack = 1e-9 * reached[:, -1:]  # or rounding would tell 3 * 0.25 from 0.75
        below = (reached < goal - slack).sum(axis=1)
        above = (reached <= goal + slack).sum(axis=1).clip(max=values.shape[1] - 1)
        middle = (ordered[rows, below.clip(max=values.shape[1] - 1)] + ordered[rows, above]) / 2
        return np.where(reached[:, -1] > 0, middle, np.nan)

    return quantile


# Two groups compared


def compare(
    values: Values,
    tokens: Tokens,
    first: str,
    second: str,
    *,
    strata: Strata | None = None,
    permutations: int = PERMUTATIONS,
    seed: int = 0,
) -> pd.DataFrame:
    """Does a token of class `first` tend to have a larger value than one of class `second`? One row a unit.

        effect = P(x_first > x_second) + P(x_first = x_second) / 2      common-language effect size; 0.5 is none

    `low`, `high`: its 95 % interval, from resampling prompts (NaN with fewer than five prompts of either class). `p`:
    two-sided, (b+1)/(m+1), from permuting the labels among whole words within each prompt and stratum. `q`: the false-
    discovery rate over units. Then the numbers of tokens, words, types and prompts, and the null in `attrs["null"]`.

    With `strata` (a label or a number a token; numbers are cut into deciles, NaN is left out) pairs are compared within
    a stratum only. Strata that lack one class are dropped; `strata` and `strata_dropped` count them. A token whose
    value is missing (NaN) in any unit is left out.
    """
    order, tokens = in_own_order(tokens)
    values = values[:, order]
    stratum, present, n_strata = _strata_of(
        strata, order, tokens, np.asarray(np.isfinite(values).all(axis=0)), first, second
    )
    chosen, stratum, values = tokens[torch.from_numpy(present)], stratum[present], values[:, present]
    is_first = np.asarray(chosen.word_class) == first
    effect = common_language(values, stratum)
    everyone = np.ones(len(chosen))
    # Labels move among whole words: a word has the label and the stratum of its first token.
    _, start, word_of = np.unique(_words(chosen), return_index=True, return_inverse=True)
    cell = _numbered(chosen.prompt.numpy()[start], stratum[start])
    return _comparison(
        effect(is_first, everyone),
        [effect(labels[word_of], everyone) for labels in permuted(is_first[start], cell, permutations, seed=seed)],
        lambda weights: effect(is_first, weights),
        {first: chosen[torch.from_numpy(is_first)], second: chosen[torch.from_numpy(~is_first)]},
        chosen,
        n_strata,
        seed,
    ).pipe(_with_null, WORD_NULL)


def compare_by_layer(
    quantities: Mapping[str, Values],
    of: str,
    layer: Sequence[str],
    tokens: Tokens,
    first: str,
    second: str,
    *,
    strata: Strata | None = None,
    permutations: int = PERMUTATIONS,
    seed: int = 0,
) -> pd.DataFrame:
    """`compare` for one of several quantities, with the layers' labels."""
    if of not in quantities:
        raise ValueError(f"compare takes one of {', '.join(quantities)}; {of!r} came")
    frame = compare(quantities[of], tokens, first, second, strata=strata, permutations=permutations, seed=seed)
    return with_layers(frame, layer)


def compare_types(
    values: Values,
    tokens: Tokens,
    first: str,
    second: str,
    *,
    strata: Strata | None = None,
    permutations: int = PERMUTATIONS,
    seed: int = 0,
) -> pd.DataFrame:
    """`compare` for a fact about a token's id: each type counts once, ids of more than one class are left out.

    A type has the stratum of its first token, and deciles are of types. Labels are permuted among the types of a
    stratum; intervals resample prompts, and a type counts if any drawn prompt has it.
    """
    order, tokens = in_own_order(tokens)
    values = values[:, order]
    known = _of_one_class(tokens) & ~np.isnan(values).any(axis=0) & _is_first_of_type(tokens)
    stratum, present, n_strata = _strata_of(strata, order, tokens, known, first, second)
    again = torch.isin(tokens.id, tokens.id[torch.from_numpy(present)])  # every token of the types that take part
    chosen, stratum, values = tokens[again], stratum[again.numpy()], values[:, again.numpy()]
    is_first = np.asarray(chosen.word_class) == first
    start, once = _types(chosen)
    effect = common_language(values[:, start], stratum[start])
    everyone = np.ones(len(start))
    moved = permuted(is_first[start], stratum[start], permutations, seed=seed)
    return _comparison(
        effect(is_first[start], everyone),
        [effect(labels, everyone) for labels in moved],
        lambda weights: effect(is_first[start], once(weights)),
        {first: chosen[torch.from_numpy(is_first)], second: chosen[torch.from_numpy(~is_first)]},
        chosen,
        n_strata,
        seed,
    ).pipe(_with_null, TYPE_NULL)


def _comparison(
    observed: PerUnit,
    permutations: Sequence[PerUnit],
    of_weights: Callable[[PerToken], PerUnit],
    groups: Mapping[str, Tokens],
    tokens: Tokens,
    n_strata: tuple[int, int],
    seed: int,
) -> pd.DataFrame:
    enough = min(len(group.prompt.unique()) for group in groups.values()) >= PROMPTS_FOR_INTERVAL
    low, high = prompt_interval(of_weights, tokens, seed=seed) if enough else np.full((2, len(observed)), np.nan)
    p = permutation_p(observed, np.stack(permutations))
    return pd.DataFrame(
        {
            "unit": np.arange(len(observed)),
            "effect": observed,
            "low": low,
            "high": high,
            "p": p,
            "q": false_discovery(p),
            **{f"{name}_{what}": n for name, group in groups.items() for what, n in counts(group).items()},
            "strata": n_strata[0],
            "strata_dropped": n_strata[1],
            "permutations": len(permutations),
        }
    )


def _with_null(frame: pd.DataFrame, null: str) -> pd.DataFrame:
    frame.attrs["null"] = null
    return frame


def _strata_of(
    strata: Strata | None,
    order: Int[np.ndarray, " token"],
    tokens: Tokens,
    known: Bool[np.ndarray, " token"],
    first: str,
    second: str,
) -> tuple[Int[np.ndarray, " token"], Bool[np.ndarray, " token"], tuple[int, int]]:
    """The stratum of each token, which tokens take part, and how many strata are used and dropped."""
    if first == second:
        raise ValueError(f"compare takes two different word classes; {first!r} came twice")
    label = np.asarray(tokens.word_class)
    present = known & np.isin(label, (first, second))
    stratum = np.zeros(len(order), dtype=np.int64) if strata is None else _strata(strata, order, present)
    present &= stratum >= 0
    for name in (first, second):
        if not (present & (label == name)).any():
            classes = ", ".join(_classes(label)) or "none"
            raise ValueError(f"no token of class {name!r} has a value to compare; the classes here are {classes}")
    both = set(stratum[present & (label == first)]) & set(stratum[present & (label == second)])
    if not both:
        raise ValueError(f"no stratum has tokens of both {first!r} and {second!r}: use coarser strata")
    dropped = len(set(stratum[present]) - both)
    return stratum, present & np.isin(stratum, list(both)), (len(both), dropped)


def common_language(
    values: Values, stratum: Int[np.ndarray, " token"]
) -> Callable[[Bool[np.ndarray, " token"], PerToken], PerUnit]:
    """P(x_first > x_second) + P(equal)/2 over the pairs within a stratum, as a function of labels and weights.

    >>> common_language(np.array([[3.0, 1.0, 1.0]]), np.zeros(3, int))(np.array([True, True, False]), np.ones(3))
    array([0.75])
    """
    n = values.shape[1]
    order = np.stack([np.lexsort((row, stratum)) for row in values])
    ordered = np.take_along_axis(values, order, axis=1)
    stratum_of = stratum[order]
    new_stratum = np.diff(stratum_of, axis=1, prepend=stratum.min() - 1) != 0
    new_value = new_stratum | (ordered != np.roll(ordered, 1, axis=1))
    at = np.broadcast_to(np.arange(n), values.shape)
    # For each token, in sorted order: where its stratum starts, and where its run of equal values starts and ends.
    start = np.maximum.accumulate(np.where(new_stratum, at, 0), axis=1)
    equal = np.maximum.accumulate(np.where(new_value, at, 0), axis=1)
    next_run = np.where(np.roll(new_value, -1, axis=1), at + 1, n)
    next_run[:, -1] = n
    after = np.minimum.accumulate(next_run[:, ::-1], axis=1)[:, ::-1]
    n_strata, which = np.unique(stratum, return_inverse=True)

    def effect(is_first: Bool[np.ndarray, " token"], weights: PerToken) -> PerUnit:
        one, other = weights * is_first, weights * ~is_first
        passed = np.concatenate([np.zeros((len(values), 1)), np.cumsum(other[order], axis=1)], axis=1)
        smaller = np.take_along_axis(passed, equal, axis=1) - np.take_along_axis(passed, start, axis=1)
        ties = np.take_along_axis(passed, after, axis=1) - np.take_along_axis(passed, equal, axis=1)
        won = (one[order] * (smaller + ties / 2)).sum(axis=1)
        size = len(n_strata)
        pairs = np.bincount(which, one, size) @ np.bincount(which, other, size)
        return won / pairs if pairs > 0 else np.full(len(values), np.nan)

    return effect


def permuted(
    label: Shaped[np.ndarray, " item"], cell: Int[np.ndarray, " item"], permutations: int, *, seed: int = 0
) -> list[Shaped[np.ndarray, " item"]]:
    """Labels moved at random among the items of the same cell."""
    if permutations < 1:
        raise ValueError(f"permutations is the number of times that labels are moved, at least 1; {permutations} came")
    by_cell = np.argsort(cell, kind="stable")
    random = np.random.default_rng(seed)
    labels = []
    for _ in range(permutations):
        moved = np.empty_like(label)
        moved[by_cell] = label[np.lexsort((random.random(len(cell)), cell))]
        labels.append(moved)
    return labels


def permutation_p(observed: PerUnit, permuted: Float[np.ndarray, "permutation unit"]) -> PerUnit:
    """Two-sided p, (b+1)/(m+1): how often a permuted value is as far from the mean of all as the observed one."""
    middle = (observed + permuted.sum(axis=0)) / (len(permuted) + 1)
    as_far = np.abs(permuted - middle) >= np.abs(observed - middle) - 1e-12
    return (as_far.sum(axis=0) + 1) / (len(permuted) + 1)


def exceeding_p(observed: PerUnit, permuted: Float[np.ndarray, "permutation other"]) -> PerUnit:
    """One-sided p, (b+1)/(m+1), of values where larger is farther out: against a column each, or one for all.

    >>> exceeding_p(np.array([2.0, 0.0]), np.array([[1.0], [0.5], [3.0]]))
    array([0.5, 1. ])
    """
    return ((permuted >= observed - 1e-6).sum(axis=0) + 1) / (len(permuted) + 1)


def swapping_p(
    differences: Float[np.ndarray, "unit pair"], permutations: int = PERMUTATIONS, *, seed: int = 0
) -> PerUnit:
    """Two-sided p of each unit's mean difference over pairs, from swapping the two of each pair at random."""
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], size=(permutations, differences.shape[1]))
    null = signs @ differences.T / differences.shape[1]
    return exceeding_p(np.abs(differences.mean(1)), np.abs(null))


def false_discovery(p: PerUnit) -> PerUnit:
    """The q of each of many p: the false-discovery rate if it and all smaller ones are called findings."""
    return stats.false_discovery_control(p)


def judged(observed: PerUnit, permuted: Float[np.ndarray, "permutation unit"]) -> dict[str, PerUnit]:
    """Each unit's `p`, its false-discovery rate `q` over units, and its `p_max` against the largest of all."""
    p = permutation_p(observed, permuted)
    return {"p": p, "q": false_discovery(p), "p_max": maximum_p(observed, permuted)}


def maximum_p(observed: PerUnit, permuted: Float[np.ndarray, "permutation unit"]) -> PerUnit:
    """The p of each unit against the largest of all units in the same permutations: the family-wise error rate.

    Units are first put on one scale, as distances from their mean over the permutations in standard deviations; one
    that no permutation moves has p 1.
    """
    everything = np.concatenate([observed[None], permuted])
    spread = everything.std(axis=0)
    apart = np.abs(everything - everything.mean(axis=0)) / np.where(spread > 1e-12, spread, np.inf)
    largest = apart[1:].max(axis=1)
    return ((largest[:, None] >= apart[0] - 1e-9).sum(axis=0) + 1) / (len(permuted) + 1)


# Prompts, words, types


def prompt_interval(
    statistic: Callable[[PerToken], PerUnit], tokens: Tokens, *, seed: int = 0
) -> Float[np.ndarray, "bound unit"]:
    """The 95 % percentile interval of a statistic of weights, from resampling prompts; NaN with fewer than five."""
    _, prompt_of = np.unique(tokens.prompt.numpy(), return_inverse=True)
    return interval(lambda times: statistic(times[prompt_of]), int(prompt_of.max()) + 1, seed=seed)


def interval(
    statistic: Callable[[Float[np.ndarray, " prompt"]], PerUnit], n_prompts: int, *, seed: int = 0
) -> Float[np.ndarray, "bound unit"]:
    """The same for a statistic of how often each prompt was drawn."""
    if n_prompts < PROMPTS_FOR_INTERVAL:
        return np.full((2, len(statistic(np.ones(n_prompts)))), np.nan)
    return bounds(np.stack([statistic(times) for times in resamples(n_prompts, seed=seed)]))


def mean_interval(values: Float[np.ndarray, "unit prompt"], *, seed: int = 0) -> Float[np.ndarray, "bound unit"]:
    """The same for the mean over prompts of each unit's values."""
    return interval(lambda times: values @ times / times.sum(), values.shape[1], seed=seed)


def resamples(n_prompts: int, *, seed: int = 0) -> Float[np.ndarray, "draw prompt"]:
    """How often each prompt is drawn, in each of many resamples of all prompts."""
    drawn = np.random.default_rng(seed).multinomial(n_prompts, np.full(n_prompts, 1 / n_prompts), size=RESAMPLES)
    return drawn.astype(float)


def bounds(of_drawn: Float[np.ndarray, "draw unit"]) -> Float[np.ndarray, "bound unit"]:
    """The 95 % percentile interval of a statistic's values over resamples."""
    known = ~np.isnan(of_drawn).all(axis=0)  # nanquantile warns of what is never known
    found = np.full((2, of_drawn.shape[1]), np.nan)
    found[:, known] = np.nanquantile(of_drawn[:, known], BOUNDS, axis=0)
    return found


def prompt_means(
    values: Float[np.ndarray, "unit prompt"], tokens: Tokens, *, seed: int = 0
) -> tuple[PerUnit, PerUnit, PerUnit, int]:
    """The mean over prompts of each unit's values, the bounds of its 95 % interval, and the number of prompts.

    `values` has a column a prompt, in the order of their numbers. Prompts with a missing value (NaN) are left out.
    """
    ordered = values[:, prompt_order(tokens)]
    known = ordered[:, ~np.isnan(ordered).any(axis=0)]
    n = known.shape[1]
    if n == 0:
        missing = np.full(len(values), np.nan)
        return missing, missing, missing, 0
    low, high = mean_interval(known, seed=seed)
    return known.mean(axis=1), low, high, n


def token_means(values: Values, tokens: Tokens, *, seed: int = 0) -> tuple[PerUnit, PerUnit, PerUnit]:
    """The mean over tokens of each unit's values and the bounds of its 95 % interval, from resampling prompts."""
    order, tokens = in_own_order(tokens)
    values = values[:, order]
    low, high = prompt_interval(lambda weights: values @ weights / weights.sum(), tokens, seed=seed)
    return values.mean(axis=1), low, high


def in_own_order(tokens: Tokens) -> tuple[Int[np.ndarray, " token"], Tokens]:
    """The tokens with their prompts sorted and numbered by their ids, and which rows they were."""
    place = _places(tokens)
    prompt = np.asarray([place[number] for number in tokens.prompt.tolist()], dtype=np.int64)
    order = np.lexsort((tokens.position.numpy(), prompt))
    return order, replace(tokens[torch.from_numpy(order)], prompt=torch.from_numpy(prompt[order]))


def prompt_order(tokens: Tokens) -> list[int]:
    """Where the prompts stand, numbers in order, sorted by their ids: what is resampled in it knows no other order."""
    places = list(_places(tokens).values())
    return sorted(range(len(places)), key=places.__getitem__)


def _places(tokens: Tokens) -> dict[int, int]:
    """The place of each prompt among all when they are sorted by their ids."""
    ids: dict[int, list[int]] = defaultdict(list)
    for number, i in zip(tokens.prompt.tolist(), tokens.id.tolist(), strict=True):
        ids[number].append(i)
    ordered = sorted(ids, key=lambda number: (ids[number], number))
    place = {number: i for i, number in enumerate(ordered)}
    return {number: place[number] for number in sorted(ids)}


def _words(tokens: Tokens) -> Int[np.ndarray, " token"]:
    """A number for each token, the same within a word of a prompt; a token of no word stands alone."""
    word = tokens.word.numpy()
    return _numbered(tokens.prompt.numpy(), np.where(word < 0, -1 - tokens.position.numpy(), word))


def _numbered(*keys: Int[np.ndarray, " item"]) -> Int[np.ndarray, " item"]:
    """A number for each distinct combination of keys."""
    return np.unique(np.stack(keys), axis=1, return_inverse=True)[1].ravel()


def _types(tokens: Tokens) -> tuple[Int[np.ndarray, " type"], Callable[[PerToken], PerToken]]:
    """The first token of each type, and what turns weights of tokens into 1 for a type that is there and 0 else."""
    _, first, type_of = np.unique(tokens.id.numpy(), return_index=True, return_inverse=True)
    return first, lambda weights: (np.bincount(type_of, weights) > 0).astype(float)


def _is_first_of_type(tokens: Tokens) -> Bool[np.ndarray, " token"]:
    """Which tokens are the first of their type."""
    return np.isin(np.arange(len(tokens)), _types(tokens)[0])


def _of_one_class(tokens: Tokens) -> Bool[np.ndarray, " token"]:
    """Which tokens have an id that is of one word class wherever it occurs."""
    classes: dict[int, set[str]] = defaultdict(set)
    for i, word_class in zip(tokens.id.tolist(), tokens.word_class, strict=True):
        classes[i].add(word_class)
    return np.asarray([len(classes[i]) == 1 and "" not in classes[i] for i in tokens.id.tolist()], dtype=bool)


def _strata(
    strata: Strata, order: Int[np.ndarray, " token"], present: Bool[np.ndarray, " token"]
) -> Int[np.ndarray, " token"]:
    """A stratum number a token, -1 where it is missing: labels as they are, numbers by the deciles of those present."""
    given = np.asarray(strata.tolist() if isinstance(strata, Tensor) else strata)
    if given.shape != order.shape:
        raise ValueError(
            f"strata is one label or number a token, special tokens too: there are {len(order)} tokens, and an array "
            f"of shape {given.shape} came"
        )
    given = given[order]
    if given.dtype.kind not in "iuf":
        return np.unique(given, return_inverse=True)[1]
    number = given.astype(float)
    known = present & ~np.isnan(number)
    deciles = np.arange(1, 10) / 10  # as values that occur: between -inf (the log of no count) and another lies none
    edges = np.unique(np.quantile(number[known], deciles, method="inverted_cdf")) if known.any() else np.empty(0)
    return np.where(np.isnan(number), -1, np.searchsorted(edges, number, side="left"))
