"""Inference for all probes: group comparisons and descriptions, means, and p values with their corrections.

A statement about classes of words ("content words ...") must hold for other prompts and for other words. Tokens are not
independent: they share prompts, and word types recur across prompts (Clark 1973, "The language-as-fixed-effect
fallacy"). Two things follow for `compare` and `describe`:

- Labels are permuted among word *types*, all occurrences of a type together, and the statistic is studentised with a
  variance that has a part by prompt and a part by type. The interval inverts that test.
- Types have equal weights by default. With equal weights of tokens, the few commonest function words would dominate.

A *type* is the case-folded form of a whole word. A form that occurs in two classes gets two labels, and is one cluster
of the variance.

Everything random is seeded, and prompts are first sorted by their token ids, so the order in which prompts are given
changes no digit. A unit without a value (NaN) has no p, and is ignored by corrections and maxima.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Literal, NamedTuple, get_args

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int, Shaped
from scipy import sparse, special, stats
from torch import Tensor

from lens_probes.messages import brief
from lens_probes.stopping import may_stop
from lens_probes.text.prompts import Tokens

RESAMPLES = 1000
PERMUTATIONS = 999
CLUSTERS_FOR_INTERVAL = 5  # prompts, or word types: with fewer, the variance is not known
EFFECTIVE_TYPES = 3  # with fewer, one type dominates: 12 to 25 % false positives where it has 70 to 90 % of the tokens
CLASSES = ("content", "function", "number", "punctuation")  # the order of tables and legends
ALPHA = 0.05
CELLS_AT_ONCE = 2**22  # tokens times permutations in memory
TYPE_NULL = "values do not depend on the class of a word type; labels permuted among word types (within a stratum)"

Strata = Sequence[str] | Sequence[float] | np.ndarray | Tensor
Weigh = Literal["types", "tokens"]
"""What has equal weights in a median or an effect: every word type, or every token."""
Values = Float[np.ndarray, "unit token"]
PerToken = Shaped[np.ndarray, " token"]
PerUnit = Float[np.ndarray, " unit"]


# Groups described


def describe(values: Values, tokens: Tokens, word_classes: Sequence[str], *, weigh: Weigh = "types") -> pd.DataFrame:
    """Median and quartiles of each unit's values by word class, and the interval of the median.

    One row per word class and unit: `unit` (its number), `word_class`, `tokens`, `words`, `types`, `effective_types`,
    `prompts`, `median`, `lower_quartile`, `upper_quartile`, `low`, `high`. Weights are as in `compare`.

    The 95 % interval is Woodruff's: with f the weights over their sum and m the median, the share below m has the
    influences e = f (1[x < m] + 1[x = m]/2 - 1/2), and V is their two-way variance by prompt and type; the bounds are
    the weighted quantiles at 1/2 +- t sqrt(V), with min(prompts, types) - 1 degrees of freedom. With fewer than five
    prompts or types it is NaN. Missing values (NaN) are excluded, also from the counts.
    """
    order, tokens = in_own_order(tokens)
    values = values[:, order]
    label, form, prompt = np.asarray(tokens.word_class), _numbers(forms(tokens)), _prompts(tokens)
    known = ~np.isnan(values).all(axis=0)
    frames = []
    for word_class in word_classes:
        member = (label == word_class) & known
        if member.any():
            group = tokens[torch.from_numpy(member)]
            frames.append(_description(values[:, member], group, word_class, form[member], prompt[member], weigh))
    if not frames:
        raise ValueError(f"a token of class {' or '.join(word_classes)} must have a value; got none: pass longer text")
    return pd.concat(frames, ignore_index=True)


def means(values: Values, tokens: Tokens, *, weigh: Weigh = "types") -> pd.DataFrame:
    """The mean of each unit's values, its interval, and p for a mean of 0: one row per unit.

        mean = sum_i f_i x_i,     V = two-way variance of sum_i f_i (x_i - mean),     t = mean / sqrt(V)

    f are the weights of `compare` over their sum, V is by prompt and word type (`TwoWay`), and t has
    min(prompts, types) - 1 degrees of freedom. With fewer than five prompts or types there is neither interval nor p,
    and none where all values are equal. Missing values (NaN) are excluded, also from the counts. Prompts with the same
    ids count as one.

    >>> from lens_probes.text.prompts import tokenize
    >>> import lens_probes as lp
    >>> tokens = tokenize(lp.demo.sentences()[:8], lp.ModelView(lp.tiny.bridge()))
    >>> table = means(np.ones((1, len(tokens))) + 0.1 * np.arange(len(tokens)) % 1, tokens)
    >>> bool(table["p"][0] < 0.05), int(table["prompts"][0])
    (True, 8)
    """
    if weigh not in get_args(Weigh):
        raise ValueError(f"weigh must be 'types' or 'tokens'; got {brief(weigh)}")
    order, tokens = in_own_order(tokens)
    values, form = values[:, order], _numbers(forms(tokens))
    known = ~np.isnan(values)
    weights = known * (_weights(known, form) if weigh == "types" else 1.0)
    share = weights / weights.sum(1, keepdims=True).clip(min=1e-300)
    filled = np.where(known, values, 0.0)
    mean = np.where(known.any(1), (share * filled).sum(1), np.nan)
    groups = TwoWay.of(_prompts(tokens), form)
    influence = np.where(known, share * (filled - mean[:, None]), 0.0)
    deviation, fewest = np.sqrt(groups.variance(influence.T, known.T)), groups.fewest(known.T)
    freedom = (fewest - 1).clip(min=1)
    enough = (fewest >= CLUSTERS_FOR_INTERVAL) & (deviation > NOTHING * np.abs(mean))
    reach = np.where(enough, stats.t.ppf(1 - ALPHA / 2, freedom) * deviation, np.nan)
    t = np.abs(mean) / np.where(enough, deviation, np.nan)
    return pd.DataFrame(
        {
            "unit": np.arange(len(values)),
            "mean": mean,
            "low": mean - reach,
            "high": mean + reach,
            "p": 2 * stats.t.sf(t, freedom),
            **pd.DataFrame([counts(tokens[torch.from_numpy(each)], form[each]) for each in known]),
        }
    )


def describe_types(values: Values, tokens: Tokens) -> pd.DataFrame:
    """`describe` for quantities that depend on the token id alone: each id counts once, ids of several classes never.

    The interval is over word types: it generalises to other words. Prompts play no part.
    """
    order, tokens = in_own_order(tokens)
    values = values[:, order]
    own = _of_one_class(tokens) & ~np.isnan(values).all(axis=0)
    label, form = np.where(own, tokens.word_class, ""), _numbers(forms(tokens))
    frames = []
    for word_class in classes_of(label):
        member = label == word_class
        group = tokens[torch.from_numpy(member)]
        once, _ = _ids(group)
        frames.append(_description(values[:, member], group, word_class, form[member], None, "types", once=once))
    if not frames:
        raise ValueError("a token id must belong to words of one class; got none that does: pass text with more words")
    return pd.concat(frames, ignore_index=True)


def _description(
    values: Values,
    group: Tokens,
    word_class: str,
    form: Int[np.ndarray, " token"],
    prompt: Int[np.ndarray, " token"] | None,
    weigh: Weigh,
    *,
    once: Int[np.ndarray, " type"] | None = None,
) -> pd.DataFrame:
    """The rows of one word class. With `once`, only these rows count, with equal weights and regardless of prompts."""
    known = ~np.isnan(values)
    n = pd.DataFrame([counts(group[torch.from_numpy(each)], form[each]) for each in known])
    if once is not None:
        values, known, form, weigh = values[:, once], known[:, once], form[once], "tokens"
    if weigh not in get_args(Weigh):
        raise ValueError(f"weigh must be 'types' or 'tokens'; got {brief(weigh)}")
    weights = known * (_weights(known, form) if weigh == "types" else 1.0)
    n.insert(3, "effective_types", [_effective(each, form) for each in weights])
    quantile = quantiles(values)
    median = quantile(0.5, weights)
    groups = TwoWay.of(prompt, form)
    share = weights / weights.sum(1, keepdims=True).clip(min=1e-300)
    below = (values < median[:, None]) + (values == median[:, None]) / 2 - 0.5
    deviation = np.sqrt(groups.variance((share * below).T, known.T))
    fewest = groups.fewest(known.T)
    reach = stats.t.ppf(0.975, (fewest - 1).clip(min=1)) * deviation
    low, high = (
        np.where(fewest >= CLUSTERS_FOR_INTERVAL, quantile(np.clip(0.5 + side * reach, 0, 1), weights), np.nan)
        for side in (-1, 1)
    )
    return pd.DataFrame(
        {
            "unit": np.arange(len(values)),
            "word_class": word_class,
            **n,
            "median": median,
            "lower_quartile": quantile(0.25, weights),
            "upper_quartile": quantile(0.75, weights),
            "low": low,
            "high": high,
        }
    )


def by_word_class(
    quantities: Mapping[str, Values],
    layer: Sequence[str],
    tokens: Tokens,
    *,
    special: bool,
    weigh: Weigh = "types",
) -> pd.DataFrame:
    """`describe` for several quantities: one row per quantity, class and layer. Special tokens are a class."""
    label = ["special" if each else own for own, each in zip(tokens.word_class, tokens.special.tolist(), strict=True)]
    tokens = replace(tokens, word_class=tuple(label))
    classes = [each for each in classes_of(label) if special or each != "special"]
    frames = []
    for quantity, values in quantities.items():
        known = ~np.isnan(values).all(axis=0)
        if any(known & np.isin(label, classes)):
            frames.append(with_layers(describe(values, tokens, classes, weigh=weigh), layer).assign(quantity=quantity))
    if not frames:
        raise ValueError("tokens must belong to words; got none that does: pass text, or ids that decode to text")
    frame = pd.concat(frames, ignore_index=True)
    first = ["quantity", "layer"]
    return frame.reindex(columns=[*first, *(column for column in frame.columns if column not in first)])


def with_layers(frame: pd.DataFrame, layer: Sequence[str]) -> pd.DataFrame:
    """The same table with the layers' labels in place of unit numbers."""
    named = frame.rename(columns={"unit": "layer"})
    named["layer"] = pd.Categorical.from_codes(frame["unit"], categories=list(layer), ordered=True)
    return named


def classes_of(label: Iterable[str]) -> list[str]:
    """The word classes that occur: the built-in ones first, then those of the user."""
    found = set(label) - {""}
    return [*(each for each in CLASSES if each in found), *sorted(found - set(CLASSES))]


def counts(tokens: Tokens, form: Int[np.ndarray, " token"]) -> dict[str, int]:
    """The numbers of tokens, words, word types and prompts; `form` is the number of each token's type."""
    return {
        "tokens": len(tokens),
        "words": len(np.unique(_words(tokens))),
        "types": len(np.unique(form)),
        "prompts": len(tokens.prompt.unique()),
    }


def quantiles(values: Values) -> Callable[[float | PerUnit, Float[np.ndarray, "#unit token"]], PerUnit]:
    """The q-quantile (0 to 1) of each unit's values, as a function of q and of weights, one per token.

    Midway between two values if q falls between them; NaN values are ignored.

    >>> quantiles(np.array([[1.0, 2.0, 10.0]]))(0.5, np.array([[1.0, 1.0, 2.0]]))
    array([6.])
    """
    order = np.argsort(values, axis=1)  # NaN last
    ordered = np.take_along_axis(values, order, axis=1)
    counted = ~np.isnan(ordered)
    rows = np.arange(len(values))

    def quantile(q: float | PerUnit, weights: Float[np.ndarray, "#unit token"]) -> PerUnit:
        own = np.take_along_axis(np.broadcast_to(weights, values.shape), order, axis=1) * counted
        reached = np.cumsum(own, axis=1)
        total = reached[:, -1:]
        slack = 1e-9 * total  # otherwise rounding would distinguish 3 * 0.25 from 0.75
        goal = np.maximum(np.broadcast_to(q, len(values))[:, None] * total, 2 * slack)  # at 0, the first that counts
        last = (counted & (own > 0)).cumsum(axis=1).argmax(axis=1)  # the last value that counts
        below = np.minimum((reached < goal - slack).sum(axis=1), last)
        above = np.minimum((reached <= goal + slack).sum(axis=1), last)
        middle = (ordered[rows, below] + ordered[rows, above]) / 2
        return np.where(total[:, 0] > 0, middle, np.nan)

    return quantile


# Two groups compared


def compare(
    values: Values,
    tokens: Tokens,
    first: str,
    second: str,
    *,
    strata: Strata | None = None,
    weigh: Weigh = "types",
    permutations: int = PERMUTATIONS,
    seed: int = 0,
) -> pd.DataFrame:
    """Do words of class `first` tend to have larger values than words of class `second`? One row per unit.

        effect = P(x_first > x_second) + P(x_first = x_second) / 2      common-language effect size; 0.5 is none

    over pairs of tokens with weights w: 1 / (tokens of its type), so that types weigh equally, or 1 with
    `weigh="tokens"`. `effective_types` is Kish's (sum W)^2 / sum W^2 over the weights W of types: the number of equally
    weighted types with the same precision. The influence of a token on the effect, its studentised value and its
    variance are

        psi_i = w_i sum_j w_j (h_ij - effect) / sum over pairs of w w      j of the other class; h = 1, 1/2 or 0
        V     = max(Vp, Vt, Vp + Vt - Vc)       sums of squared sums of psi by prompt, type, and prompt x type
        t     = logit(effect) effect (1 - effect) / sqrt(V)

    `p` is two-sided, (b+1)/(m+1): effect, V and t are computed anew for labels permuted among word types. `low` and
    `high` invert that test: logit(effect) +- c sqrt(V) / (effect (1 - effect)), c the 95 % quantile of |t| over
    permutations. The interval excludes 0.5 exactly when p < 0.05. It is NaN with fewer than five prompts or five word
    types of either class. With five to nine prompts of the rarer class it covers the true effect in 89 to 95 of
    100 data sets (fewer, the more prompts differ). Prompts with the same ids count as one. With `weigh="tokens"`
    and fewer than three effective types of a class there is neither interval nor p: one type would dominate. If every
    pair has the same winner, V is 0, and t is computed as if one pair of types were lost; if all values are equal, t is
    0 and there is no interval. With fewer than five prompts, p holds for other words in these prompts. `q` is the
    false-discovery rate over units. The null is in `attrs["null"]`.

    With `strata` (a label or a number per token; numbers are cut into deciles, NaN is excluded) pairs are compared
    within a stratum only. If all tokens of an id have the same stratum (frequency), labels too are permuted within
    strata, each type in the stratum of its first token; other strata (position) restrict the pairs only. `strata` is
    the number of strata used, `strata_with_one_class` that of strata excluded because they lack one class. A token
    whose value is missing (NaN) in any unit is excluded, and a unit without any value has no effect, p or q.

    `benchmarks/inference.py` simulates false positives, coverage and power. With 30 of the package's sentences, an
    effect of 0.60 is found in 77 % of trials, one of 0.64 in 97 % (with `weigh="tokens"` in 54 % and 75 %).
    """
    order, tokens = in_own_order(tokens)
    values = values[:, order]
    stratum, present, n_strata = _strata_of(strata, order, tokens, _known(values), first, second)
    chosen, stratum, form = tokens[torch.from_numpy(present)], stratum[present], _numbers(forms(tokens))[present]
    return _compared(
        values[:, present], chosen, form, stratum, _prompts(tokens)[present], first, second, weigh, permutations, seed
    ).assign(strata=n_strata[0], strata_with_one_class=n_strata[1], permutations=permutations)


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
    """`compare` for quantities that depend on the token id alone: each id counts once, ids of several classes never.

    It generalises to other words, and prompts play no part: the variance is over word types, and five types of either
    class are enough for an interval. A type has the stratum of its first token, and deciles are of types.
    """
    order, tokens = in_own_order(tokens)
    values = values[:, order]
    known = _of_one_class(tokens) & _known(values) & _is_first_of_id(tokens)
    stratum, present, n_strata = _strata_of(strata, order, tokens, known, first, second)
    chosen, form = tokens[torch.from_numpy(present)], _numbers(forms(tokens))
    frame = _compared(
        values[:, present], chosen, form[present], stratum[present], None, first, second, "tokens", permutations, seed
    )
    everywhere = torch.isin(tokens.id, chosen.id)
    n = {
        f"{name}_{what}": number
        for name in (first, second)
        for own in [everywhere & tokens.of_class(name)]
        for what, number in counts(tokens[own], form[own.numpy()]).items()
    }
    return frame.assign(**n, strata=n_strata[0], strata_with_one_class=n_strata[1], permutations=permutations)


def _compared(
    values: Values,
    chosen: Tokens,
    form: Int[np.ndarray, " token"],
    stratum: Int[np.ndarray, " token"],
    prompt: Int[np.ndarray, " token"] | None,
    first: str,
    second: str,
    weigh: Weigh,
    permutations: int,
    seed: int,
) -> pd.DataFrame:
    """The test, the interval and the counts of the included tokens."""
    if weigh not in get_args(Weigh):
        raise ValueError(f"weigh must be 'types' or 'tokens'; got {brief(weigh)}")
    is_first = np.asarray(chosen.word_class) == first
    # The items that are labelled are forms of one class. The stratum of a type is that of its first token.
    _, start, item = np.unique(form * 2 + is_first, return_index=True, return_inverse=True)
    moved = permuted(is_first[start], _held(chosen, stratum)[start], permutations, seed=seed)
    labels = np.concatenate([is_first[start][None], moved]).T[item]  # token, 1 + permutations
    heavy = np.ones(len(form)) if weigh == "tokens" else _weights(np.ones((1, len(form)), dtype=bool), item)[0]
    clusters = TwoWay.of(prompt, form)
    n_types = [len(np.unique(item[own])) for own in (is_first, ~is_first)]
    effect, low, high, p = np.full((4, len(values)), np.nan)
    for i in np.flatnonzero(~np.isnan(values).any(axis=1)):
        may_stop()
        tested = _tested(values[i], stratum, heavy, labels, clusters, lost_pair(*n_types))
        effect[i], low[i], high[i], p[i] = tested
    groups = {first: is_first, second: ~is_first}
    fewest = min(n_types if prompt is None else [*n_types, *(len(set(prompt[own])) for own in groups.values())])
    if fewest < CLUSTERS_FOR_INTERVAL:
        low, high = np.full((2, len(values)), np.nan)
    effective = [_effective(heavy[own], form[own]) for own in groups.values()]
    if weigh == "tokens" and prompt is not None and min(effective) < min(EFFECTIVE_TYPES, *n_types):
        low, high, p = np.full((3, len(values)), np.nan)
    n = {}
    for name, own in groups.items():
        n |= {f"{name}_{what}": number for what, number in counts(chosen[torch.from_numpy(own)], form[own]).items()}
        n[f"{name}_effective_types"] = _effective(heavy[own], form[own])
    unit = np.arange(len(values))
    frame = pd.DataFrame(
        {"unit": unit, "effect": effect, "low": low, "high": high, "p": p, "q": false_discovery(p), **n}
    )
    frame.attrs["null"] = TYPE_NULL
    return frame


def _tested(
    values: PerToken,
    stratum: Int[np.ndarray, " token"],
    weights: PerToken,
    labels: Bool[np.ndarray, "token draw"],
    clusters: "TwoWay",
    lost: tuple[float, float],
) -> tuple[float, float, float, float]:
    """The effect of the first labelling, its interval and its p. The other labellings are the permutations."""
    effect_of = common_language(values, stratum, weights)
    draws = max(1, CELLS_AT_ONCE // len(values))
    found = []
    for start in range(0, labels.shape[1], draws):
        effects, influence = effect_of(labels[:, start : start + draws])
        found.append((effects, clusters.variance(influence)))
    effects, variance = (np.concatenate(each) for each in zip(*found, strict=True))
    if not np.isfinite(effects[0]):
        return math.nan, math.nan, math.nan, math.nan
    t, slope = studentised(effects, variance, lost)
    beyond = np.abs(t[1:][np.isfinite(t[1:])])
    p = (1 + (beyond >= abs(t[0]) - TIE).sum()) / (1 + len(beyond))
    # The number of b with (b+1)/(m+1) < 0.05, computed as in the test, so that interval and test agree.
    allowed = ((1 + np.arange(len(beyond))) / (1 + len(beyond)) < ALPHA).sum()
    if allowed == 0 or (variance[0] <= NOTHING and abs(effects[0] - 0.5) < TIE):
        return effects[0], math.nan, math.nan, p
    reach = (np.sort(beyond)[-allowed] + TIE) * slope[0]
    at = special.logit(_within(effects[:1], variance[:1], lost[0]))[0]
    return effects[0], min(effects[0], special.expit(at - reach)), max(effects[0], special.expit(at + reach)), p


NOTHING = 1e-24  # a variance of rounding errors
TIE = 1e-12  # two t that differ by less are equal: the same tokens, summed in another order


def studentised(
    effect: Float[np.ndarray, " draw"], variance: Float[np.ndarray, " draw"], lost: tuple[float, float]
) -> tuple[Float[np.ndarray, " draw"], Float[np.ndarray, " draw"]]:
    """logit(effect) divided by its standard error, and that standard error.

    An effect without variance has no standard error: all pairs have the same winner (or all are equal, and t is 0). It
    is treated as if one pair of types were lost, with the effect and the variance of `lost`.

    >>> studentised(np.array([0.75]), np.array([0.01]), lost_pair(20, 20))[0].round(2)
    array([2.06])
    """
    inside = _within(effect, variance, lost[0])
    error = np.sqrt(np.where(variance <= NOTHING, lost[1], variance)) / (inside * (1 - inside))
    return special.logit(inside) / error, error


def _within(
    effect: Float[np.ndarray, " draw"], variance: Float[np.ndarray, " draw"], lost: float
) -> Float[np.ndarray, " draw"]:
    tied = np.abs(effect - 0.5) < TIE  # rounding may move the effect of equal values away from a half
    return np.where(variance <= NOTHING, np.where(tied, 0.5, effect.clip(1 - lost, lost)), effect)


def lost_pair(n_first: int, n_second: int) -> tuple[float, float]:
    """The effect if the first class wins all pairs of types but one, and its variance by type."""
    pairs, n = n_first * n_second, n_first + n_second
    if pairs == 1:
        return 0.5, 1.0
    return 1 - 1 / pairs, n / (n - 1) * (2 - 1 / n_first - 1 / n_second) / pairs**2


class TwoWay(NamedTuple):
    """Tokens clustered by prompt, by word type, and by both: the three parts of the variance of a sum."""

    by_prompt: sparse.csr_array | None
    by_type: sparse.csr_array
    by_cell: sparse.csr_array

    @classmethod
    def of(cls, prompt: Int[np.ndarray, " token"] | None, form: Int[np.ndarray, " token"]) -> "TwoWay":
        """The clusters of these prompts and forms; without prompts, of the forms alone."""
        if prompt is None:
            return cls(None, _indicator(form), _indicator(form))
        return cls(_indicator(prompt), _indicator(form), _indicator(_numbered(prompt, form)))

    def variance(
        self, influence: Float[np.ndarray, "token draw"], known: Bool[np.ndarray, "token #draw"] | None = None
    ) -> Float[np.ndarray, " draw"]:
        """max(Vp, Vt, Vp + Vt - Vc) of a sum of influences; Vp and Vt are G/(G-1) sum (sum over a group)^2.

        Without prompts, or with one, there is no Vp. G is the number of groups with a `known` value.
        """
        known = np.ones((len(influence), 1), dtype=bool) if known is None else known
        of_types = _corrected(_groups(self.by_type, known)) * _squares(self.by_type, influence)
        if self.by_prompt is None:
            return of_types
        of_prompts = _corrected(_groups(self.by_prompt, known)) * _squares(self.by_prompt, influence)
        both = of_prompts + of_types - _squares(self.by_cell, influence)
        return np.maximum(np.maximum(of_prompts, of_types), both)

    def fewest(self, known: Bool[np.ndarray, "token draw"]) -> PerUnit:
        """The number of prompts or of types with a known value: the smaller of the two."""
        types = _groups(self.by_type, known)
        return types if self.by_prompt is None else np.minimum(types, _groups(self.by_prompt, known))


def _groups(by: sparse.csr_array, known: Bool[np.ndarray, "token draw"]) -> Float[np.ndarray, " draw"]:
    """The number of groups with a known value."""
    return ((by @ known.astype(float)) > 0).sum(0).astype(float)


def _squares(by: sparse.csr_array, influence: Float[np.ndarray, "token draw"]) -> Float[np.ndarray, " draw"]:
    return np.square(by @ influence).sum(0)


def _corrected(groups: Float[np.ndarray, " draw"]) -> Float[np.ndarray, " draw"]:
    """G/(G-1), and 0 for a single group: the influences of all tokens sum to 0."""
    return np.where(groups > 1, groups / (groups - 1).clip(min=1), 0.0)


def _indicator(group: Int[np.ndarray, " token"]) -> sparse.csr_array:
    """[group token], 1 where a token belongs to a group."""
    _, number = np.unique(group, return_inverse=True)
    n = len(group)
    return sparse.csr_array((np.ones(n), (number, np.arange(n))), shape=(int(number.max()) + 1, n))


def _weights(known: Bool[np.ndarray, "unit token"], group: Int[np.ndarray, " token"]) -> Values:
    """For every token, 1 / (number of tokens of its group that have a value)."""
    of_group = _indicator(group)
    return 1 / (of_group.T @ (of_group @ known.T.astype(float))).T.clip(min=1)


def _effective(weights: PerToken, form: Int[np.ndarray, " token"]) -> float:
    """Kish's effective number of types: (sum W)^2 / sum W^2 over the weights of types."""
    of_types = np.bincount(form, weights)
    return float(of_types.sum() ** 2 / max(np.square(of_types).sum(), 1e-300))


def _known(values: Values) -> Bool[np.ndarray, " token"]:
    """Which tokens have a value in every unit that has values at all."""
    missing = np.isnan(values)
    some = ~missing.all(axis=1)
    return ~missing[some].any(axis=0) & np.full(values.shape[1], some.any())


def _held(tokens: Tokens, stratum: Int[np.ndarray, " token"]) -> Int[np.ndarray, " token"]:
    """The strata within which labels are permuted: those of the pairs if they depend on the id alone, else one."""
    of_id: dict[int, set[int]] = defaultdict(set)
    for i, own in zip(tokens.id.tolist(), stratum.tolist(), strict=True):
        of_id[i].add(own)
    return stratum if all(len(each) == 1 for each in of_id.values()) else np.zeros_like(stratum)


def _strata_of(
    strata: Strata | None,
    order: Int[np.ndarray, " token"],
    tokens: Tokens,
    known: Bool[np.ndarray, " token"],
    first: str,
    second: str,
) -> tuple[Int[np.ndarray, " token"], Bool[np.ndarray, " token"], tuple[int, int]]:
    """The stratum of each token, which tokens are included, and the numbers of strata used and excluded."""
    if first == second:
        raise ValueError(f"compare needs two different word classes; got {first!r} twice")
    label = np.asarray(tokens.word_class)
    present = known & np.isin(label, (first, second))
    stratum = np.zeros(len(order), dtype=np.int64) if strata is None else _strata(strata, order, present)
    present &= stratum >= 0
    for name in (first, second):
        if not (present & (label == name)).any():
            classes = ", ".join(classes_of(label)) or "none"
            raise ValueError(
                f"a token of each class must have a value; got none of class {name!r}: choose from {classes}"
            )
    both = set(stratum[present & (label == first)]) & set(stratum[present & (label == second)])
    if not both:
        raise ValueError(
            f"a stratum must have tokens of both {first!r} and {second!r}; got none that has: use coarser strata"
        )
    dropped = len(set(stratum[present]) - both)
    return stratum, present & np.isin(stratum, list(both)), (len(both), dropped)


def common_language(
    values: PerToken, stratum: Int[np.ndarray, " token"], weights: PerToken
) -> Callable[[Bool[np.ndarray, "token draw"]], tuple[Float[np.ndarray, " draw"], Float[np.ndarray, "token draw"]]]:
    """P(x_first > x_second) + P(equal)/2 over the pairs within a stratum, and each token's influence on it.

    Returned as a function of many labellings at once: tokens are sorted once, and sums over pairs are differences of
    cumulative weights.

    >>> labels = np.array([[True], [True], [False]])
    >>> common_language(np.array([3.0, 1.0, 1.0]), np.zeros(3, int), np.ones(3))(labels)[0]
    array([0.75])
    """
    order = np.lexsort((values, stratum))
    ordered, stratum_of, heavy = values[order], stratum[order], weights[order][:, None]
    new_stratum = np.diff(stratum_of, prepend=stratum.min() - 1) != 0
    new_value = new_stratum | (ordered != np.roll(ordered, 1))
    # For each token, in sorted order: where its stratum and its run of equal values start and end.
    start, end = _bounds_of_runs(new_stratum)
    equal, after = _bounds_of_runs(new_value)
    everyone = np.concatenate([np.zeros((1, 1)), np.cumsum(heavy, axis=0)])

    def effect(
        is_first: Bool[np.ndarray, "token draw"],
    ) -> tuple[Float[np.ndarray, " draw"], Float[np.ndarray, "token draw"]]:
        first = is_first[order]
        of_first = np.concatenate([np.zeros((1, first.shape[1])), np.cumsum(heavy * first, axis=0)])
        of_second = everyone - of_first
        smaller = (of_second[equal] + of_second[after]) / 2 - of_second[start]
        larger = of_first[end] - (of_first[equal] + of_first[after]) / 2
        won = np.where(first, smaller, larger)  # for the second class: the weight of larger values
        pairs = np.where(first, of_second[end] - of_second[start], of_first[end] - of_first[start])
        total = (heavy * first * pairs).sum(0)
        with np.errstate(invalid="ignore", divide="ignore"):
            found = ((heavy * first * won).sum(0) / total).clip(0, 1)  # rounding may leave the range
            influence = np.empty_like(won)
            influence[order] = heavy * (won - found * pairs) / total
        return found, influence

    return effect


def _bounds_of_runs(starts: Bool[np.ndarray, " token"]) -> tuple[Int[np.ndarray, " token"], Int[np.ndarray, " token"]]:
    """Where each item's run starts, and where the next run starts."""
    first = np.flatnonzero(starts)
    run = np.cumsum(starts) - 1
    return first[run], np.append(first[1:], len(starts))[run]


def permuted(
    label: Shaped[np.ndarray, " item"], cell: Int[np.ndarray, " item"], permutations: int, *, seed: int = 0
) -> Shaped[np.ndarray, "permutation item"]:
    """Labels permuted at random among the items of the same cell."""
    if permutations < 1:
        raise ValueError(f"permutations must be a whole number, 1 or more; got {permutations}")
    by_cell = np.argsort(cell, kind="stable")
    random = np.random.default_rng(seed)
    moved = np.empty((permutations, len(label)), dtype=label.dtype)
    for row in moved:
        row[by_cell] = label[np.lexsort((random.random(len(cell)), cell))]
    return moved


def permutation_p(observed: PerUnit, permuted: Float[np.ndarray, "permutation unit"]) -> PerUnit:
    """Two-sided p, (b+1)/(m+1): how often a permuted value is at least as far from the overall mean as the observed.

    Permutations without a value are not counted. A unit without an observed value, or without any permuted value, has
    no p (NaN).
    """
    known = np.isfinite(permuted)
    m = known.sum(axis=0)
    middle = (observed + np.where(known, permuted, 0).sum(axis=0)) / (m + 1)
    with np.errstate(invalid="ignore"):
        as_far = known & (np.abs(permuted - middle) >= np.abs(observed - middle) * (1 - 1e-9))
    return np.where(np.isfinite(observed) & (m > 0), (as_far.sum(axis=0) + 1) / (m + 1), np.nan)


def one_sided_p(observed: PerUnit, permuted: Float[np.ndarray, "permutation other"]) -> PerUnit:
    """One-sided p, (b+1)/(m+1), where larger is more extreme. `permuted` has one column per unit, or one for all.

    Missing values (NaN) are treated as in `permutation_p`.

    >>> one_sided_p(np.array([2.0, 0.0, np.nan]), np.array([[1.0], [0.5], [3.0]]))
    array([0.5, 1. , nan])
    """
    known = np.isfinite(permuted)
    m = known.sum(axis=0)
    with np.errstate(invalid="ignore"):
        beyond = known & (permuted >= observed - 1e-6 * np.abs(observed))  # float32 rounding
    return np.where(np.isfinite(observed) & (m > 0), (beyond.sum(axis=0) + 1) / (m + 1), np.nan)


def sign_flip_p(
    differences: Float[np.ndarray, "unit pair"], permutations: int = PERMUTATIONS, *, seed: int = 0
) -> PerUnit:
    """Two-sided p of each unit's mean difference over pairs, by swapping the members of each pair at random."""
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], size=(permutations, differences.shape[1]))
    null = signs @ differences.T / differences.shape[1]
    return one_sided_p(np.abs(differences.mean(1)), np.abs(null))


def false_discovery(p: PerUnit) -> PerUnit:
    """The q of each p: the false-discovery rate if it and all smaller p are called significant.

    A unit without a p (NaN) has no q, and is not counted.

    >>> false_discovery(np.array([0.01, np.nan, 0.5]))
    array([0.02,  nan, 0.5 ])
    """
    q, known = np.full(len(p), np.nan), ~np.isnan(p)
    if known.any():
        q[known] = stats.false_discovery_control(p[known])
    return q


def maximum_p(observed: PerUnit, permuted: Float[np.ndarray, "permutation unit"]) -> PerUnit:
    """The p of each unit against the largest of all units in each permutation: the family-wise error rate.

    Units are first put on one scale: the distance from the mean over permutations, in standard deviations. A unit that
    no permutation changes has p 1. A unit without a value, or with permutations that have none, has no p (NaN), and is
    excluded from the maximum.
    """
    known = np.isfinite(observed) & np.isfinite(permuted).all(axis=0)
    p = np.full(len(observed), np.nan)
    if not known.any():
        return p
    everything = np.concatenate([observed[None], permuted])[:, known]
    spread = everything.std(axis=0)
    moves = spread > 1e-12 * np.abs(everything).max(axis=0)
    apart = np.abs(everything - everything.mean(axis=0)) / np.where(moves, spread, np.inf)
    largest = apart[1:].max(axis=1)
    p[known] = ((largest[:, None] >= apart[0] - 1e-9).sum(axis=0) + 1) / (len(permuted) + 1)
    return p


# Means over prompts, resampled statistics


def mean_interval(values: Float[np.ndarray, "unit prompt"]) -> Float[np.ndarray, "bound unit"]:
    """The 95 % interval of each unit's mean over prompts, mean +- t s / sqrt(n); NaN with fewer than five.

    Student's t: percentiles of resamples would cover 84, 90 and 92 % with 5, 10 and 30 prompts. Coverage is lower for
    very skewed values (for lognormal ones 82, 84 and 88 %). If all prompts have the same value, the width is 0.
    """
    n = values.shape[1]
    if n < CLUSTERS_FOR_INTERVAL:
        return np.full((2, len(values)), np.nan)
    reach = stats.t.ppf(1 - ALPHA / 2, n - 1) * values.std(axis=1, ddof=1) / n**0.5
    return values.mean(axis=1) + np.stack([-reach, reach])


def student(estimate: PerUnit, error: PerUnit, n_prompts: int) -> tuple[PerUnit, PerUnit, PerUnit]:
    """The 95 % interval of estimates with these standard errors over prompts, and p for 0; NaN with fewer than five.

    >>> low, high, p = student(np.array([2.0]), np.array([1.0]), 5)
    >>> low.round(2).tolist(), high.round(2).tolist(), p.round(2).tolist()
    ([-0.78], [4.78], [0.12])
    """
    freedom = max(n_prompts - 1, 1)
    error = error if n_prompts >= CLUSTERS_FOR_INTERVAL else np.full(len(error), np.nan)
    reach = stats.t.ppf(1 - ALPHA / 2, freedom) * error
    p = 2 * stats.t.sf(np.abs(estimate) / np.where(error > 0, error, np.nan), freedom)
    return estimate - reach, estimate + reach, p


def prompt_interval(
    statistic: Callable[[PerToken], PerUnit], tokens: Tokens, *, seed: int = 0
) -> Float[np.ndarray, "bound unit"]:
    """The interval of a statistic of weights, one per token, from resampling prompts; NaN with fewer than five."""
    _, prompt_of = np.unique(tokens.prompt.numpy(), return_inverse=True)
    return interval(lambda times: statistic(times[prompt_of]), int(prompt_of.max()) + 1, seed=seed)


def interval(
    statistic: Callable[[Float[np.ndarray, " prompt"]], PerUnit], n_prompts: int, *, seed: int = 0
) -> Float[np.ndarray, "bound unit"]:
    """`prompt_interval` for a statistic of how often each prompt was drawn."""
    if n_prompts < CLUSTERS_FOR_INTERVAL:
        return np.full((2, len(statistic(np.ones(n_prompts)))), np.nan)
    return bounds(np.stack([statistic(times) for times in resamples(n_prompts, seed=seed)]), n_prompts)


def resamples(n_prompts: int, *, seed: int = 0) -> Float[np.ndarray, "draw prompt"]:
    """How often each prompt is drawn, for many resamples of all prompts."""
    drawn = np.random.default_rng(seed).multinomial(n_prompts, np.full(n_prompts, 1 / n_prompts), size=RESAMPLES)
    return drawn.astype(float)


def resamples_within(cell: Int[np.ndarray, " prompt"], *, seed: int = 0) -> Float[np.ndarray, "draw prompt"]:
    """`resamples` that draw within cells: each cell keeps its number of prompts."""
    random, drawn = np.random.default_rng(seed), np.empty((RESAMPLES, len(cell)))
    for each in np.unique(cell):
        own = np.flatnonzero(cell == each)
        drawn[:, own] = random.multinomial(len(own), np.full(len(own), 1 / len(own)), size=RESAMPLES)
    return drawn


def bounds(
    of_drawn: Float[np.ndarray, "draw unit"], n: int, *, degrees: int | None = None
) -> Float[np.ndarray, "bound unit"]:
    """The 95 % interval of a statistic from its values over resamples of n: expanded percentiles.

    Plain percentiles are too narrow, by the factor sqrt((n-1)/n) and by using the normal in place of Student's t. The
    share cut off on each side is therefore Phi(-sqrt(n/(n-1)) t), t with n - 1 degrees of freedom (Hesterberg 2015,
    "What teachers should know about the bootstrap", arXiv 1411.5279). If several cells are resampled, n is the size of
    the smallest, and the degrees of freedom add up.
    """
    degrees = n - 1 if degrees is None else degrees
    cut = stats.norm.cdf(-math.sqrt(n / (n - 1)) * stats.t.ppf(1 - ALPHA / 2, degrees))
    known = ~np.isnan(of_drawn).all(axis=0)  # nanquantile warns if a unit has no value
    found = np.full((2, of_drawn.shape[1]), np.nan)
    found[:, known] = np.nanquantile(of_drawn[:, known], (cut, 1 - cut), axis=0)
    return found


def prompt_means(values: Float[np.ndarray, "unit prompt"], tokens: Tokens) -> tuple[PerUnit, PerUnit, PerUnit, int]:
    """The mean over prompts of each unit's values, the bounds of its 95 % interval, and the number of prompts.

    `values` has one column per prompt, in the order of their numbers. Prompts with a missing value (NaN) are excluded.
    """
    ordered = values[:, prompt_order(tokens)]
    known = ordered[:, ~np.isnan(ordered).any(axis=0)]
    n = known.shape[1]
    if n == 0:
        missing = np.full(len(values), np.nan)
        return missing, missing, missing, 0
    low, high = mean_interval(known)
    return known.mean(axis=1), low, high, n


def token_means(values: Values, tokens: Tokens, *, seed: int = 0) -> tuple[PerUnit, PerUnit, PerUnit]:
    """The mean over tokens of each unit's values and the bounds of its 95 % interval, by resampling prompts."""
    order, tokens = in_own_order(tokens)
    values = values[:, order]
    low, high = prompt_interval(lambda weights: values @ weights / weights.sum(), tokens, seed=seed)
    return values.mean(axis=1), low, high


# Prompts, words, types


def in_own_order(tokens: Tokens) -> tuple[Int[np.ndarray, " token"], Tokens]:
    """The row order that sorts prompts by their token ids, and the tokens in that order, renumbered."""
    place = _places(tokens)
    prompt = np.asarray([place[number] for number in tokens.prompt.tolist()], dtype=np.int64)
    order = np.lexsort((tokens.position.numpy(), prompt))
    return order, replace(tokens[torch.from_numpy(order)], prompt=torch.from_numpy(prompt[order]))


def prompt_order(tokens: Tokens) -> list[int]:
    """The order that sorts prompts by their token ids, so that resamples do not depend on the order given."""
    places = list(_places(tokens).values())
    return sorted(range(len(places)), key=places.__getitem__)


def _places(tokens: Tokens) -> dict[int, int]:
    """The rank of each prompt when prompts are sorted by their ids, and by document where these are equal."""
    ids = _ids_by_prompt(tokens)
    document = dict(zip(tokens.prompt.tolist(), tokens.document.tolist(), strict=True))
    ordered = sorted(ids, key=lambda number: (ids[number], document[number], number))
    place = {number: i for i, number in enumerate(ordered)}
    return {number: place[number] for number in sorted(ids)}


def _ids_by_prompt(tokens: Tokens) -> dict[int, list[int]]:
    """The ids of each prompt, by its number."""
    ids: dict[int, list[int]] = defaultdict(list)
    for number, i in zip(tokens.prompt.tolist(), tokens.id.tolist(), strict=True):
        ids[number].append(i)
    return ids


def forms(tokens: Tokens) -> tuple[str, ...]:
    """The word type of each token: the case-folded text of its whole word, or of the token if it belongs to none."""
    whole: dict[tuple[int, int], str] = defaultdict(str)
    keys = list(zip(tokens.prompt.tolist(), tokens.word.tolist(), strict=True))
    for key, text in zip(keys, tokens.text, strict=True):
        whole[key] += text
    return tuple(_folded(text if key[1] < 0 else whole[key]) for key, text in zip(keys, tokens.text, strict=True))


def _folded(word: str) -> str:
    """The word in lower case, without the space before it.

    A token that is part of a character has a byte symbol for text (Ģ, ģ ...). These symbols are case-sensitive, so a
    word that contains one is not folded.
    """
    word = word.strip()
    return word if any("\u0100" <= character <= "\u0143" for character in word) else word.casefold()


def _prompts(tokens: Tokens) -> Int[np.ndarray, " token"]:
    """The number of each token's document. Prompts with the same ids share it: a copy is no new evidence."""
    return np.unique(tokens.document.numpy(), return_inverse=True)[1].ravel()


def _words(tokens: Tokens) -> Int[np.ndarray, " token"]:
    """A number per word of a prompt, for each token. A token that belongs to no word has its own number."""
    word = tokens.word.numpy()
    return _numbered(tokens.prompt.numpy(), np.where(word < 0, -1 - tokens.position.numpy(), word))


def _numbered(*keys: Int[np.ndarray, " item"]) -> Int[np.ndarray, " item"]:
    """A number for each distinct combination of keys."""
    return np.unique(np.stack(keys), axis=1, return_inverse=True)[1].ravel()


def _numbers(labels: Sequence[str]) -> Int[np.ndarray, " item"]:
    """A number for each distinct label, in sorted order."""
    return np.unique(np.asarray(labels, dtype=object), return_inverse=True)[1].ravel()


def _ids(tokens: Tokens) -> tuple[Int[np.ndarray, " type"], Int[np.ndarray, " token"]]:
    """The row of the first token of each id, and the number of each token's id."""
    _, first, number = np.unique(tokens.id.numpy(), return_index=True, return_inverse=True)
    return first, number


def _is_first_of_id(tokens: Tokens) -> Bool[np.ndarray, " token"]:
    """Which tokens are the first of their id."""
    return np.isin(np.arange(len(tokens)), _ids(tokens)[0])


def _of_one_class(tokens: Tokens) -> Bool[np.ndarray, " token"]:
    """Which tokens have an id with the same word class wherever it occurs."""
    classes: dict[int, set[str]] = defaultdict(set)
    for i, word_class in zip(tokens.id.tolist(), tokens.word_class, strict=True):
        classes[i].add(word_class)
    return np.asarray([len(classes[i]) == 1 and "" not in classes[i] for i in tokens.id.tolist()], dtype=bool)


def _strata(
    strata: Strata, order: Int[np.ndarray, " token"], present: Bool[np.ndarray, " token"]
) -> Int[np.ndarray, " token"]:
    """The stratum of each token, -1 if missing. Labels are strata; numbers are cut at the deciles of those present."""
    raw = strata.tolist() if isinstance(strata, Tensor) else strata
    shape = np.shape(np.asarray(raw, dtype=object))
    if shape != order.shape:
        raise ValueError(
            f"strata must have one label or number per token, special tokens included, {len(order)} in all; got an "
            f"array of shape {shape}"
        )
    labels = pd.Series(raw if isinstance(raw, np.ndarray) else list(raw)).iloc[order]
    if not pd.api.types.is_numeric_dtype(labels) or pd.api.types.is_bool_dtype(labels):
        return pd.factorize(labels.astype("string"), sort=True)[0]  # -1 where missing
    given = labels.to_numpy(dtype=float, na_value=np.nan)
    number = given.astype(float)
    known = present & ~np.isnan(number)
    deciles = np.arange(1, 10) / 10  # no interpolation: a value may be -inf, the log of a count of 0
    edges = np.unique(np.quantile(number[known], deciles, method="inverted_cdf")) if known.any() else np.empty(0)
    return np.where(np.isnan(number), -1, np.searchsorted(edges, number, side="left"))
