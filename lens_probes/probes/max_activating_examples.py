"""MaxActivatingExamples: which tokens of a corpus activate a unit most, and in which contexts?

    value[layer, unit, i] = the i-th largest activation of the unit over all tokens of the corpus
    histogram[layer, unit, bin] = number of tokens whose activation lies in a bin
    sample_value[layer, unit, draw] = its activation at tokens drawn at random

A list of the largest activations looks like a concept for almost any unit, and says nothing of all other tokens. So the
same tokens drawn at random, and the whole distribution, stand beside it. `share_above` says for how many tokens of the
random sample a unit is at least half as active as for its first example. Special tokens are excluded. Equal activations
are ordered by a number made from prompt and position, so neither batches nor the order of prompts change the list.

Units are neurons, heads (the length of a head's mixed values), dimensions of a read point, or directions (dot
products). Bins are half an octave wide, from 2^-8 to 2^8 on either side of 0; smaller and larger values are in the end
bins. Activations are dimensionless. The result stays as large as for one batch, however long the corpus: layers x units
x (k + draws + 64) numbers, and the contexts.

Lists alone mislead: Bolukbasi et al. 2021, "An interpretability illusion for BERT", arXiv 2104.07143.
"""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, Literal, NamedTuple, Unpack

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from lens_probes import figures
from lens_probes.directions import Directions, check_directions, hooks_of_units, named_units, units_at
from lens_probes.maths import sampling
from lens_probes.model import ModelView
from lens_probes.model.hooks import ReadPoint
from lens_probes.probe import Probe
from lens_probes.reading import Reading
from lens_probes.result import Quantity, Result, Shown, derived, measured, summed
from lens_probes.result.merging import merged_fields
from lens_probes.settings import Count, Layers, Positive, Units
from lens_probes.text.prompts import Tokens

OCTAVES = 8  # of bins on either side of 1, and on either side of 0
BINS = 8 * OCTAVES
LOWEST, LAST = -(2**31), 2**31 - 1  # of 32 bits: what stands for NaN, and the place of no example
NONE = -(2**63)  # both, packed


class MaxActivatingExamplesResult(Result):
    """The k examples of every unit, a random sample, and histograms. It does not grow with the corpus."""

    layer: tuple[str, ...]
    unit: tuple[str, ...]
    vocab: dict[int, str]
    n_examples: int
    n_random: int
    value: Float[Tensor, "layer unit k"] = measured("activation, the largest first")
    example: Int[Tensor, "layer unit k"] = measured("number of the example", low=0, missing=-1, into="example")
    sample_value: Float[Tensor, "layer unit draw"] = measured("activation at random tokens")
    sample_example: Int[Tensor, " draw"] = measured("number of the example", low=0, into="example")
    key: Int[Tensor, " example"] = measured("number made from prompt and position")
    position: Int[Tensor, " example"] = measured("position of the token in its prompt", low=0)
    context: Int[Tensor, "example window"] = measured("ids around the token", low=0, missing=-1, into="vocab")
    histogram: Float64[Tensor, "layer unit bin"] = summed("number of tokens")

    @derived("share of random tokens with at least half of the largest activation", low=0, high=1)
    def share_above(self) -> Float[Tensor, "layer unit"]:
        """NaN without a random sample, and for units whose largest activation is not above 0."""
        first = self.value[..., :1]
        share = (self.sample_value >= first / 2).float().mean(-1)
        return torch.where(first[..., 0] > 0, share, torch.nan)

    def shown(self) -> dict[str, Shown]:
        """Examples, random tokens and the histogram of each unit, and the contexts that they name."""
        shown = super().shown()
        del shown["key"]
        for name, axes in (("sample_value", ("layer", "unit", "sample")), ("sample_example", ("sample",))):
            shown[name] = shown[name]._replace(axes=axes)
        shown["histogram"] = Shown(self.quantity("histogram"), ("layer", "unit", "bin"), self.known("histogram"))
        shown["edge"] = Shown(Quantity("edge of a bin"), ("edge",), edges().numpy())
        return shown

    def foremost(self) -> list[tuple[int, int]]:
        """Units of which the fewest random tokens come near the first example, in every layer in turn."""
        ranked = self.share_above.nan_to_num(2).argsort(dim=-1, stable=True).T.tolist()
        return [(layer, unit) for units in ranked for layer, unit in enumerate(units)]

    def examples(self, layer: int | str, unit: int | str) -> pd.DataFrame:
        """The examples of a unit: activation, position, token, and the text before and after it."""
        row, column = self.index_of("layer", layer), self.index_of("unit", unit)
        known = self.example[row, column] >= 0
        return self._table(self.value[row, column][known], self.example[row, column][known])

    def random_examples(self, layer: int | str, unit: int | str) -> pd.DataFrame:
        """The same of tokens drawn at random: the same tokens for every unit, the most active first."""
        values = self.sample_value[self.index_of("layer", layer), self.index_of("unit", unit)]
        order = values.argsort(descending=True, stable=True)
        return self._table(values[order], self.sample_example[order])

    def figure(
        self, layer: int | str | None = None, unit: int | str | None = None, **look: Unpack[figures.Look]
    ) -> go.Figure:
        """The contexts of one unit, the token bold, and the histogram of its activations; None: the first."""
        layer, unit = self.layer[0] if layer is None else layer, self.unit[0] if unit is None else unit
        row, column = self.index_of("layer", layer), self.index_of("unit", unit)
        table = self.examples(layer, unit)
        name = f"{self.unit[column]} of layer {self.layer[row]}"
        share = float(self.share_above[row, column])
        told = "" if np.isnan(share) else f"\n{share:.0%} of random tokens reach half of the first"
        texts = [
            figures.Example(value, *(_shown(text) for text in (before, token, after)))
            for value, _, before, token, after in table.itertuples(index=False)
        ]
        return figures.examples(
            texts,
            self.histogram[row, column].tolist(),
            edges().tolist(),
            title=self.title(f"Tokens that activate {name} most{told}"),
            value_title="activation",
            **look,
        )

    @classmethod
    def merged(cls, parts: Sequence[Any]) -> "MaxActivatingExamplesResult":
        """The k largest of all parts, and of the random tokens those with the lowest keys."""
        k, n_random, no_draws = parts[0].n_examples, parts[0].n_random, parts[0].sample_value[..., :0]
        key, position, context = (torch.cat([getattr(part, name) for part in parts]) for name in _OF_EXAMPLES)
        order = key.argsort(stable=True)
        places = order.argsort().split([len(part.key) for part in parts])
        places = [torch.cat([place, torch.tensor([LAST])]) for place in places]  # the last, -1: that of no example
        lists = [packed(part.value, place[part.example]) for part, place in zip(parts, places, strict=True)]
        drawn = torch.cat([place[part.sample_example] for part, place in zip(parts, places, strict=True)])
        chosen = drawn.argsort()[:n_random]
        draws = [draw for part in parts for draw in part.sample_value.unbind(-1)]
        in_order = {"key": key[order], "position": position[order], "context": context[order]}
        widest = max(part.value.shape[-1] for part in parts)
        examples = _examples(first(torch.cat(lists, -1), k), drawn[chosen], widest, in_order)
        fields = merged_fields([_without_examples(part) for part in parts])
        shown = set(examples["context"].unique().tolist())
        return cls(
            **{
                **fields,
                **examples,
                "vocab": {i: text for i, text in fields["vocab"].items() if i in shown},
                "sample_value": _stacked([draws[i] for i in chosen.tolist()], no_draws),
            }
        )

    def _table(self, values: Float[Tensor, " row"], numbers: Int[Tensor, " row"]) -> pd.DataFrame:
        middle, rows = self.context.shape[1] // 2, self.context[numbers]
        texts = [["" if i < 0 else self.vocab[i] for i in row] for row in rows.tolist()]
        return pd.DataFrame(
            {
                "activation": values.numpy(),
                "position": self.position[numbers].numpy(),
                "before": ["".join(row[:middle]) for row in texts],
                "token": [row[middle] for row in texts],
                "after": ["".join(row[middle + 1 :]) for row in texts],
            }
        )


_OF_EXAMPLES = ("key", "position", "context")


class MaxActivatingExamples(Probe[MaxActivatingExamplesResult]):
    """The tokens of a corpus that activate each unit most.

    `at`: neurons, heads, or a read point, of which `units` are numbers (None: all). `directions`: vectors
    `[unit d_model]` that are multiplied with the states at a read point. `k`: examples per unit. `sample`: random
    tokens. `context`: tokens shown before and after an example.

    >>> import lens_probes as lp
    >>> probe = lp.MaxActivatingExamples(layers=[1], k=3, sample=20)
    >>> result = probe.run(lp.tiny.bridge(), lp.demo.sentences()[:8], progress=False)
    >>> result.examples(1, 5).columns.tolist(), bool((result.value.diff(dim=-1) <= 0).all())
    (['activation', 'position', 'before', 'token', 'after'], True)
    """

    at: Literal["neuron", "head"] | ReadPoint = "neuron"
    units: Units | None = None
    directions: Directions | None = None
    k: Positive = 20
    sample: Count = 200
    context: Count = 8
    layers: Layers = None

    def __post_init__(self) -> None:
        check_directions(self)

    def hooks(self, model: ModelView) -> dict[str, str]:
        """The component's activation in every layer."""
        return hooks_of_units(self, model)

    def measure(self, reading: Reading) -> MaxActivatingExamplesResult:
        """The largest of the batch."""
        return self._measured(reading)

    def measure_after(self, reading: Reading, before: MaxActivatingExamplesResult) -> MaxActivatingExamplesResult:
        """Those of them that are as large as the last of the lists until now: few, which saves most of the work."""
        return self._measured(reading, before)

    def _measured(
        self, reading: Reading, before: MaxActivatingExamplesResult | None = None
    ) -> MaxActivatingExamplesResult:
        tokens = reading.tokens
        counted = (~tokens.special).nonzero().flatten()
        key = torch.from_numpy(sampling.mixed(tokens.prompt_keys().numpy(), tokens.position.numpy()))[counted]
        key, order = key.sort(stable=True)
        counted, places = counted[order], torch.arange(len(order))  # the place of a token is that of its key
        least, n_drawn = [None] * len(reading.points), self.sample
        if before is not None:
            last = before.value[..., self.k - 1 :]
            least = least if not last.shape[-1] or last.isnan().any() else list(last[..., 0])
            if self.sample and len(before.sample_example) == self.sample:
                n_drawn = min(n_drawn, int((key < before.key[before.sample_example[-1]]).sum()))

        def of_layer(enough: Tensor | None, hook: str) -> tuple[Tensor, Tensor, Tensor]:
            """The numbers of its list, its values at random tokens, and its histogram."""
            values = units_at(self, reading, hook, counted).cpu()
            found = at_least(values, places, kth(values, self.k) if enough is None else enough)
            return first(side_by_side(found, values.shape[1]), self.k), values[:n_drawn].clone(), histogram(values)

        found, draws, counts = zip(*two_at_a_time(of_layer, least, reading.points.values()), strict=True)
        reading.check_widths(map(len, counts))
        in_order = {"key": key, "position": tokens.position[counted]}
        in_order["context"] = contexts(tokens, self.context)[counted]
        longest = max(listed.shape[1] for listed in found)
        listed = torch.stack([_filled(listed, longest, NONE) for listed in found])
        examples = _examples(listed, places[:n_drawn], self.k if least[0] is None else 0, in_order)
        shown = examples["context"].unique()
        return self.result(
            reading,
            layer=reading.layer,
            unit=named_units(self, len(counts[0])),
            vocab=reading.model.texts_of(shown[shown >= 0]),
            n_examples=self.k,
            n_random=self.sample,
            sample_value=torch.stack(draws, 1).permute(1, 2, 0),
            histogram=torch.stack(counts).double(),
            **examples,
        )


def two_at_a_time(do: Callable[..., Any], *of_layers: Iterable[Any]) -> list[Any]:
    """What this gives of each layer: most of it runs on one thread."""
    with ThreadPoolExecutor(min(2, torch.get_num_threads())) as two:
        return list(two.map(torch.no_grad()(do), *of_layers))  # gradients are a switch of each thread


def kth(values: Float[Tensor, "token unit"], k: int) -> Float[Tensor, " unit"]:
    """The k-th largest value of each unit, or the least if there are fewer; -Inf without any.

    >>> kth(torch.tensor([[1.0], [3.0], [2.0]]), 2).tolist()
    [2.0]
    """
    if not len(values):
        return torch.full(values.shape[1:], -torch.inf)
    from_below = max(0, len(values) - k)
    return torch.from_numpy(np.partition(values.numpy(), from_below, axis=0)[from_below])  # far quicker than topk


class Found(NamedTuple):
    """Values and their places as packed numbers, with the number of the unit of each."""

    unit: Int[Tensor, " number"]
    packed: Int[Tensor, " number"]


def at_least(
    values: Float[Tensor, "token unit"], places: Int[Tensor, " token"], least: Float[Tensor, " unit"]
) -> Found:
    """The values that are as large as those of `least`.

    >>> found = at_least(torch.tensor([[1.0, 5.0], [3.0, 4.0]]), torch.tensor([0, 1]), torch.tensor([2.0, 4.0]))
    >>> found.unit.tolist(), [each.tolist() for each in unpacked(found.packed)]
    ([1, 0, 1], [[5.0, 3.0, 4.0], [0, 1, 1]])
    """
    at = torch.from_numpy(np.flatnonzero(values.numpy() >= least.numpy()))  # three times as quick as nonzero
    n_units = values.shape[1]
    return Found(at % n_units, packed(values.flatten()[at], places[at // n_units]))


def side_by_side(found: Found, n_units: int) -> Int[Tensor, "unit n"]:
    """The numbers of each unit in a row of its own, filled with the number of no example."""
    rows, order = found.unit.sort(stable=True)
    counts = rows.bincount(minlength=n_units)
    column = torch.arange(len(rows)) - (counts.cumsum(0) - counts)[rows]
    table = torch.full((n_units, int(counts.max())), NONE)
    table[rows, column] = found.packed[order]
    return table


def first(numbers: Int[Tensor, "*unit n"], k: int) -> Int[Tensor, "*unit k"]:
    """The k largest numbers of each row, the largest first."""
    return torch.from_numpy(np.sort(numbers.numpy())[..., ::-1][..., :k].copy())


def packed(values: Float[Tensor, "*unit n"], places: Int[Tensor, "*unit n"]) -> Int[Tensor, "*unit n"]:
    """Value and place in one whole number: larger for a larger value, and of equal values for a lower place.

    A float32 has the order of its bits as a whole number, once those of negative ones are flipped. NaN comes last.

    >>> numbers = packed(torch.tensor([1.0, 3.0, 3.0, torch.nan]), torch.tensor([0, 2, 1, 3]))
    >>> numbers.argsort(descending=True).tolist(), unpacked(numbers)[1].tolist()
    ([2, 1, 0, 3], [0, 2, 1, 3])
    """
    ordered = _flipped((values + 0.0).view(torch.int32))  # -0 becomes 0
    ordered.masked_fill_(values.isnan(), LOWEST)
    return (ordered.long() << 32) + (LAST - places)


def unpacked(numbers: Int[Tensor, "*unit n"]) -> tuple[Float[Tensor, "*unit n"], Int[Tensor, "*unit n"]]:
    """The values and places of packed numbers."""
    return _flipped((numbers >> 32).int()).view(torch.float32), LAST - (numbers & LAST)


def _flipped(bits: Int[Tensor, "*unit n"]) -> Int[Tensor, "*unit n"]:
    """The bits of floats in the order of their values, and back."""
    return bits ^ ((bits >> 31) & LAST)


def histogram(values: Float[Tensor, "token unit"]) -> Int[Tensor, "unit bin"]:
    """How many values of each unit are in each bin: sign, exponent and first binary digit of a float32 say which.

    >>> histogram(torch.tensor([[0.0, 1.0, 1.4, -1.0]]).T).nonzero()[:, 1].tolist(), edges()[[15, 32, 48]].tolist()
    ([15, 32, 48], [-1.5, 0.0, 1.0])
    """
    half, n_units, code = (
        BINS // 2,
        values.shape[1],
        torch.arange(-512, 512),
    )  # ten bits, of which the first is the sign
    size = ((code & 511) - 2 * (127 - OCTAVES)).clamp(0, half - 1)
    bin_of = torch.where(code < 0, half - 1 - size, half + size).int()
    bin_of[0] = half  # -0 is 0 (and so is what is nearer to it than any float32 of full precision)
    codes = values.contiguous().view(torch.int32) >> 22
    codes += 512
    bins = bin_of.index_select(0, codes.flatten()).view_as(codes)
    bins += torch.arange(0, n_units * BINS, BINS, dtype=torch.int32)
    counts, one = torch.zeros(n_units * BINS, dtype=torch.int32), torch.ones(1, dtype=torch.int32)
    return counts.index_add_(0, bins.flatten(), one.expand(bins.numel())).view(n_units, BINS)  # quicker than bincount


def edges() -> Float64[Tensor, " bound"]:
    """The edges of the bins: 0, and 2^e and 1.5 2^e on both sides."""
    octave = 2.0 ** torch.arange(-OCTAVES, OCTAVES, dtype=torch.float64)
    above = torch.stack([octave, 1.5 * octave], dim=1).flatten()[1:]
    last = torch.tensor([2.0**OCTAVES], dtype=torch.float64)
    side = torch.cat([above, last])
    return torch.cat([-side.flip(0), torch.zeros(1, dtype=torch.float64), side])


def contexts(tokens: Tokens, n: int) -> Int[Tensor, "token window"]:
    """The ids of n tokens before each token, its own, and n after it; -1 outside its prompt.

    >>> from lens_probes.examples import tiny
    >>> from lens_probes.text.prompts import tokenize
    >>> contexts(tokenize([[5, 6]], ModelView(tiny.bridge())), 1).tolist()
    [[-1, 5, 6], [5, 6, -1]]
    """
    around = torch.arange(len(tokens))[:, None] + torch.arange(-n, n + 1)
    inside = (around >= 0) & (around < len(tokens))
    around = around.clamp(0, max(len(tokens) - 1, 0))
    return torch.where(inside & (tokens.prompt[around] == tokens.prompt[:, None]), tokens.id[around], -1)


def _filled(values: Tensor, k: int, missing: int | float) -> Tensor:
    """Values of k places, the last of them missing."""
    return torch.nn.functional.pad(values, (0, k - values.shape[-1]), value=missing)


def _examples(
    listed: Int[Tensor, "layer unit n"], drawn: Int[Tensor, " draw"], width: int, in_order: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Lists and draws by the numbers of their examples, and of `in_order`, by place, those that they name.

    Lists are as long as the longest of them, `width` or more.
    """
    value, place = unpacked(listed)
    n = len(in_order["key"])
    place = place.clamp_(max=n)
    width = max(width, int((place < n).sum(-1).max()))
    used = torch.zeros(n + 1, dtype=torch.bool)
    used.numpy()[place.flatten().numpy()] = True  # twice as quick as with tensors
    used[drawn] = True
    number, used = used.cumsum(0) - 1, used[:n]
    number[n] = -1
    return {
        "value": _filled(value[..., :width], width, torch.nan),
        "example": _filled(number[place[..., :width]], width, -1),
        "sample_example": number[drawn],
        **{name: column[used] for name, column in in_order.items()},
    }


def _stacked(draws: Sequence[Float[Tensor, "layer unit"]], none: Float[Tensor, "layer unit 0"]) -> Tensor:
    """Draws side by side, each whole in memory, so that it is copied quickly."""
    return torch.stack(list(draws)).permute(1, 2, 0) if draws else none


def _without_examples(part: MaxActivatingExamplesResult) -> MaxActivatingExamplesResult:
    """What is merged as in any result: histograms, texts, labels, provenance."""
    empty = {name: getattr(part, name)[..., :0] for name in ("value", "example", "sample_value", "sample_example")}
    return replace(part, **empty, **{name: getattr(part, name)[:0] for name in _OF_EXAMPLES})


def _shown(text: str) -> str:
    return figures.spelled(text, 80)
