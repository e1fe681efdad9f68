"""Summary: what does a probe measure over a whole corpus, without keeping a row per token?

    histogram[q, c, layer, bin] = number of tokens of class c with q in this bin
    count[q, c, layer], total[q, c, layer] = number of tokens with a value, and its sum
    value[q, layer, token] = q at the tokens of sampled words

for every quantity q `[layer token]` that the probe's result declares. Counts, sums and histograms are of all tokens:
`distribution()` has means and, to the width of a bin, quartiles. Whatever needs an interval is of two samples of
`words` words per class, with all their layers: one in which every word is as likely as any other (for
`weigh="tokens"`), and one that takes a word of every type, then a second of each, and so on (for `weigh="types"`).
Tables and tests are those of a run that keeps all rows, asked of these samples: their intervals allow for prompts, for
word types, and for sampling. A class of fewer words is kept whole, and then nothing differs from that run.

Which words are kept depends on keys made from the ids of their prompt and their place in it, so it does not depend on
batches, on the order of prompts, or on how a corpus is cut into shards. With the default of 4,096 words, four classes,
30 layers and four quantities a result takes at most 50 MB, however long the corpus; a test of an effect then has a
standard error of about 0.01 or that of the corpus, whichever is larger.

Source of samples by lowest keys: Cohen & Kaplan 2007, "Summarizing data using bottom-k sketches".
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, NoReturn

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

from lens_probes.maths import inference, sampling
from lens_probes.messages import brief
from lens_probes.model import ModelView
from lens_probes.probe import Hooks, Probe, result_class
from lens_probes.reading import Reading
from lens_probes.result import Shown, measured, schema, summed
from lens_probes.result.schema import Quantity
from lens_probes.result.tokens import LayerTokenResult
from lens_probes.settings import Positive, described
from lens_probes.text.prompts import Tokens, content_number

BINS = 64
SMALLEST, LARGEST = 1e-3, 1e5  # of quantities without bounds; what lies beyond is in the last bins

By = Callable[[Tokens], Sequence[str]]


@dataclass(frozen=True, eq=False, repr=False)
class SampledTokens(Tokens):
    """Tokens of sampled words: `key` is made from a word's prompt and place, `type_key` from its type."""

    key: Int[Tensor, " token"]
    type_key: Int[Tensor, " token"]


class SummaryResult(LayerTokenResult):
    """Counts, sums and histograms of all tokens, and the values of sampled words. It stays small.

    `by_word_class`, `compare` and `figure` are asked of the sample with their weights, `distribution` of all tokens.
    `strata` of `compare` are one per token that is kept, those of `words()`.
    """

    headline = "histogram"
    words_kept: int
    declared: tuple[tuple[str | int | float | bool | None, ...], ...]
    quantities: tuple[str, ...]
    word_class: tuple[str, ...]
    token: SampledTokens
    value: Float[Tensor, "quantities layer token"] = measured("value of a sampled token")
    edge: Float64[Tensor, "quantities bound"] = measured("lower end of a bin, and the upper one of the last")
    count: Float64[Tensor, "quantities word_class layer"] = summed("number of tokens with a value")
    total: Float64[Tensor, "quantities word_class layer"] = summed("sum of values")
    histogram: Float64[Tensor, "quantities word_class layer bin"] = summed("number of tokens in a bin")

    def shown(self) -> dict[str, Shown]:
        """Nothing by token: the page draws the classes of words over layers."""
        return {}

    def compared(self) -> list[str]:
        """The quantities of the probe."""
        return list(self.quantities)

    def quantity(self, name: str) -> Quantity:
        """What the numbers of a quantity of the probe are, or of a tensor of this result."""
        if name in self.quantities:
            return Quantity(*self.declared[self.quantities.index(name)])  # pyright: ignore[reportArgumentType]
        return super().quantity(name)

    def known(self, name: str) -> Float64[np.ndarray, "..."]:
        """A quantity of the sampled tokens, NaN where it is missing."""
        if name not in self.quantities:
            return super().known(name)
        return self.value[self.quantities.index(name)].double().numpy()

    def by_word_class(self, *, special: bool = False, weigh: inference.Weigh = "types") -> pd.DataFrame:
        """As of a run that keeps all rows, asked of the sample with these weights; `all_tokens` is how many there were.

        `tokens`, `words`, `types` and `prompts` count what the sample holds.
        """
        table = super().by_word_class(special=special, weigh=weigh)
        of_all = self.distribution().rename(columns={"tokens": "all_tokens"})
        return table.merge(of_all.filter(["quantity", "word_class", "layer", "all_tokens"]), how="left")

    def sampled(
        self, weigh: inference.Weigh, strata: inference.Strata | None = None
    ) -> tuple["SummaryResult", inference.Strata | None]:
        """The sample with these weights, and of strata of all tokens that are kept those of its own."""
        by_words, by_types = _kept(self.token, self.words_kept)
        rows = by_types if weigh == "types" else by_words
        given = None if strata is None else np.asarray(strata)
        if given is not None and given.shape != rows.shape:
            raise ValueError(
                f"strata must have one label or number per token that is kept, {len(rows)} in all; got an array of "
                f"shape {given.shape}: make them from result.words()"
            )
        own = self._of(rows)
        named = zip(own.token.word_class, own.token.special.tolist(), strict=True)
        classes = tuple("" if special and name == "special" else name for name, special in named)  # as of the rows
        own = replace(own, token=replace(own.token, word_class=classes))
        return own, None if given is None else given[rows.numpy()]

    def distribution(self) -> pd.DataFrame:
        """Per quantity, class and layer: tokens, mean, and quartiles to the width of a bin, of all tokens."""
        cells = self.cells("quantities", "word_class", "layer")
        columns = {"tokens": self.count.long(), "mean": self.total / self.count}
        columns |= {name: self._quantile(q) for name, q in _QUARTILES.items()}
        cells = cells.assign(**{name: each.flatten().numpy() for name, each in columns.items()})
        return cells.rename(columns={"quantities": "quantity"}).query("tokens > 0").reset_index(drop=True)

    def figure_paths(self, prompt: int = 0, token: int | str | None = None, **other: Any) -> NoReturn:
        """Refused: tokens of a prompt are not kept."""
        raise ValueError("a figure of one prompt needs all its tokens; got a sample of words: run the probe itself")

    def rows_shown(self, prompt: int, first: int) -> NoReturn:
        """Refused: tokens of a prompt are not kept."""
        self.figure_paths(prompt)

    def conditions(self) -> str:
        """How many words a sample has at most."""
        return f"samples of at most {self.words_kept:,} words per class"

    @classmethod
    def merged(cls, parts: Sequence[Any]) -> "SummaryResult":
        """All parts, and of their sampled words those with the lowest keys. Classes are in the order of all tables."""
        whole = super().merged(parts)
        classes = inference.classes_of(whole.word_class)
        order = [whole.word_class.index(each) for each in classes]
        sums = {name: getattr(whole, name)[:, order] for name in ("count", "total", "histogram")}
        rows = _kept(whole.token, whole.words_kept).any(0)
        return replace(whole, word_class=tuple(classes), **sums)._of(rows)

    def _of(self, rows: Bool[Tensor, " token"]) -> "SummaryResult":
        return replace(self, token=self.token[rows], value=self.value[:, :, rows])

    def _quantile(self, q: float) -> Float64[Tensor, "quantities word_class layer"]:
        """The middle of the bin in which the q-quantile lies; NaN without tokens."""
        reached = self.histogram.cumsum(-1)
        at = (reached < q * reached[..., -1:]).sum(-1).clamp(max=BINS - 1)
        middle = (self.edge[:, :-1] + self.edge[:, 1:]) / 2
        found = middle[torch.arange(len(middle))[:, None, None], at]
        return found.masked_fill(reached[..., -1] == 0, torch.nan)


_QUARTILES = {"median": 0.5, "lower_quartile": 0.25, "upper_quartile": 0.75}


class Summary(Probe[SummaryResult]):
    """The quantities `[layer token]` of a probe by class, for corpora of any length.

    `by`: word classes, or a function that gives a label for each row of a table of tokens (a decile of frequency, a
    part of speech, a position); tokens with the label "" are left out. `words`: the size of each sample.

    >>> import lens_probes as lp
    >>> result = lp.Summary(lp.RankShift()).run(lp.tiny.bridge(), lp.demo.sentences()[:6], progress=False)
    >>> result.quantities, tuple(result.histogram.shape)[2:]
    (('rank', 'score', 'norm', 'null_rank', 'shift'), (3, 64))
    >>> rows = lp.RankShift().run(lp.tiny.bridge(), lp.demo.sentences()[:6], progress=False)
    >>> result.compare()["effect"].equals(rows.compare()["effect"])  # few words: all are in the sample
    True
    """

    probe: Annotated[Probe[Any], described("a probe, such as RankShift()")]
    by: Annotated[Literal["word_class"] | By, described("'word_class', or a function of a table of tokens")] = (
        "word_class"
    )
    words: Positive = 4096

    def __post_init__(self) -> None:
        kind = result_class(type(self.probe))
        if not issubclass(kind, LayerTokenResult):
            small = "sum" in schema(kind).kind.values() and "rows" not in schema(kind).kind.values()
            hint = "it stays small by itself" if small else "it keeps its own rows"
            raise ValueError(
                f"Summary(probe=...) must have quantities [layer token]; got {brief(self.probe)}, whose result has "
                f"none: pass the probe without Summary ({hint})"
            )
        object.__setattr__(self, "reads_head", self.probe.reads_head)

    def hooks(self, model: ModelView) -> Hooks:
        """The activations that the probe reads."""
        return self.probe.hooks(model)

    def measure(self, reading: Reading) -> SummaryResult:
        """The probe's result on the batch, counted and sampled."""
        found = self.probe.measure(reading)
        names = found.compared()
        declared = [found.quantity(name) for name in names]
        edges = np.stack([edges_of(each) for each in declared])
        words = self._labelled(found)
        values = np.stack([found.known(name) for name in names])
        label = np.asarray(words.word_class, dtype=object)
        classes = inference.classes_of(label)
        rows = np.flatnonzero(label != "")
        values, words = values[:, :, rows], words[torch.from_numpy(rows)]
        count, total = np.zeros((2, len(names), len(classes), len(found.layer)))
        histogram = np.zeros((*count.shape, BINS))
        for c, name in enumerate(classes):
            own = values[:, :, label[rows] == name]
            count[:, c], total[:, c] = (~np.isnan(own)).sum(-1), np.nansum(own, axis=-1)
            histogram[:, c] = [counted(each, bounds) for each, bounds in zip(own, edges, strict=True)]
        part = self.result(
            reading,
            words_kept=self.words,
            declared=tuple(tuple(each) for each in declared),
            quantities=tuple(names),
            word_class=tuple(classes),
            layer=found.layer,
            token=words,
            value=torch.from_numpy(values).float(),
            edge=torch.from_numpy(edges),
            count=torch.from_numpy(count),
            total=torch.from_numpy(total),
            histogram=torch.from_numpy(histogram),
        )
        return SummaryResult.merged([part])

    def _labelled(self, found: LayerTokenResult) -> SampledTokens:
        """The words that the probe's numbers are about, with their classes and keys; special tokens are one class."""
        try:
            words = found.words()
        except ValueError:  # no token of this batch has a target
            words = replace(found.token, word_class=("",) * len(found.token))
        if self.by == "word_class":
            own = (
                "special" if special else each for each, special in zip(words.word_class, words.special, strict=True)
            )
        else:
            given = self.by(words)
            own = list(given) if isinstance(given, Iterable) and not isinstance(given, str) else []
            if len(own) != len(words) or not all(isinstance(each, str) for each in own):
                raise ValueError(
                    f"Summary(by=...) must give one label per token, {len(words)} texts; got {brief(given)}: return a "
                    f"list as long as the table"
                )
        place = np.where(words.word < 0, words.position, -1 - words.word)
        forms = inference.forms(words)
        types = {form: content_number(form.encode()) for form in set(forms)}
        return SampledTokens(
            **{**words.columns(), "word_class": tuple(map(str, own))},
            key=torch.from_numpy(sampling.mixed(words.prompt_keys().numpy(), place)),
            type_key=torch.tensor([types[form] for form in forms], dtype=torch.int64),
        )


def _kept(tokens: SampledTokens, n: int) -> Bool[Tensor, "sample token"]:
    """The tokens of the two samples: of words, and of types."""
    label = np.unique(np.asarray(tokens.word_class, dtype=object), return_inverse=True)[1].ravel()
    columns = [tokens.prompt.numpy(), tokens.key.numpy(), label]
    (_, first, of_token) = np.unique(np.stack(columns), axis=1, return_index=True, return_inverse=True)
    words = sampling.Words(label[first], tokens.type_key.numpy()[first], tokens.key.numpy()[first])
    kept = np.stack([sampling.of_words(words, n), sampling.of_types(words, n)])
    return torch.from_numpy(kept[:, of_token.ravel()])


def edges_of(quantity: Quantity) -> Float64[np.ndarray, " bound"]:
    """The edges of the bins of a quantity: equal widths between its bounds; logarithmic for counts and without bounds.

    >>> edges_of(Quantity("share", low=0, high=1))[[0, 1, -1]].tolist()
    [0.0, 0.015625, 1.0]
    """
    low, high = quantity.low, quantity.high
    if quantity.logarithmic or (low == 0 and not np.isfinite(high)):
        first = 1.0 if quantity.missing is not None or quantity.logarithmic else SMALLEST
        return np.append(low, low + np.geomspace(first, high - low if np.isfinite(high) else LARGEST, BINS))
    if np.isfinite(low) and np.isfinite(high):
        return np.linspace(low, high, BINS + 1)
    half = np.append(0, np.geomspace(SMALLEST, LARGEST, BINS // 2))
    return np.concatenate([-half[:0:-1], half])


def counted(
    values: Float[np.ndarray, "layer token"], edges: Float64[np.ndarray, " bound"]
) -> Float64[np.ndarray, "layer bin"]:
    """How many tokens of each layer are in each bin; what lies beyond is in the first or last, NaN in none.

    >>> counted(np.array([[-1.0, 0.5, 2.5, np.nan]]), np.array([0.0, 1.0, 2.0])).tolist()
    [[2.0, 1.0]]
    """
    n = len(edges) - 1
    bins = np.clip(np.searchsorted(edges, values, side="right") - 1, 0, n - 1) + n * np.arange(len(values))[:, None]
    return np.bincount(bins[~np.isnan(values)], minlength=n * len(values)).reshape(len(values), n).astype(float)
