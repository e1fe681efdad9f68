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

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, Unpack

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from lens_probes import figures
from lens_probes.directions import Directions, check_directions, directions_for
from lens_probes.maths import sampling
from lens_probes.model import ModelView
from lens_probes.model.hooks import ReadPoint
from lens_probes.probe import Probe
from lens_probes.reading import Reading
from lens_probes.result import Result, derived, measured, summed
from lens_probes.result.merging import merged_fields
from lens_probes.settings import Count, Layers, Positive, Units
from lens_probes.text.prompts import Tokens

OCTAVES = 8  # of bins on either side of 1, and on either side of 0
BINS = 8 * OCTAVES


class MaxActivatingExamplesResult(Result):
    """The k examples of every unit, a random sample, and histograms. It does not grow with the corpus."""

    layer: tuple[str, ...]
    unit: tuple[str, ...]
    vocab: dict[int, str]
    n_examples: int
    n_random: int
    value: Float[Tensor, "layer unit k"] = measured("activation, the largest first")
    example: Int[Tensor, "layer unit k"] = measured("number of the example", low=0, missing=-1)
    sample_value: Float[Tensor, "layer unit draw"] = measured("activation at random tokens")
    sample_example: Int[Tensor, " draw"] = measured("number of the example", low=0)
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

    def figure(self, layer: int | str = 0, unit: int | str = 0, **look: Unpack[figures.Look]) -> go.Figure:
        """The contexts of one unit, the token bold, and the histogram of its activations."""
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
        sizes = np.cumsum([0, *(len(part.key) for part in parts)])
        moved = [
            torch.where(part.example < 0, -1, part.example + first) for part, first in zip(parts, sizes, strict=False)
        ]
        drawn = torch.cat([part.sample_example + first for part, first in zip(parts, sizes, strict=False)])
        key, position, context = (torch.cat([getattr(part, name) for part in parts]) for name in _OF_EXAMPLES)
        value, example = torch.cat([part.value for part in parts], -1), torch.cat(moved, -1)
        at = largest(value, _places(key)[example], parts[0].n_examples)
        sampled = key[drawn].argsort(stable=True)[: parts[0].n_random]
        drawn, values = drawn[sampled], torch.cat([part.sample_value for part in parts], -1)[..., sampled]
        example = example.gather(-1, at)
        used, number = torch.cat([example.flatten(), drawn]).unique(return_inverse=True)
        if (used < 0).any():  # -1, where there is no example
            used, number = used[1:], number - 1
        in_order = key[used].argsort(stable=True)  # so that numbers, too, do not depend on the order of parts
        used, place = used[in_order], torch.cat([in_order.argsort(), torch.tensor([-1])])
        number = place[number]  # the last place is that of -1
        shown = {i for i in context[used].unique().tolist() if i >= 0}
        fields = merged_fields([_without_examples(part) for part in parts])
        return cls(
            **{
                **fields,
                "vocab": {i: text for i, text in fields["vocab"].items() if i in shown},
                "value": value.gather(-1, at),
                "example": number[: example.numel()].view_as(example),
                "sample_value": values,
                "sample_example": number[example.numel() :],
                "key": key[used],
                "position": position[used],
                "context": context[used],
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
        if self.directions is not None:
            directions_for(self, model)
        layers = model.layers(self.layers)
        if self.at == "head":
            return {str(layer): model.hook_z(layer) for layer in layers}
        return {str(layer): model.hook_units(self.at, layer) for layer in layers}

    def measure(self, reading: Reading) -> MaxActivatingExamplesResult:
        """The largest of the batch, layer by layer."""
        tokens = reading.tokens
        counted = (~tokens.special).nonzero().flatten()
        keys = torch.from_numpy(sampling.mixed(tokens.prompt_keys().numpy(), tokens.position.numpy()))[counted]
        order = keys.argsort(stable=True)
        counted, keys = counted[order], keys[order]  # the place of a token is now that of its key
        kept, places = min(self.k, len(counted)), torch.arange(len(counted))
        found = []
        for hook in reading.points.values():
            values = self._read(reading, hook)[:, counted]
            at = largest(values, places, kept)
            found.append((values.gather(-1, at), at, values[:, : self.sample], histogram(values)))
        value, example, sample_value, counts = (torch.stack(each) for each in zip(*found, strict=True))
        short = {"neuron": "N", "head": "H"}.get(self.at, "D")
        units = range(value.shape[1]) if self.units is None else self.units
        part = self.result(
            reading,
            layer=reading.layer,
            unit=tuple(f"{short}{unit}" for unit in units),
            vocab=reading.model.texts_of(tokens.id),
            n_examples=self.k,
            n_random=self.sample,
            value=_filled(value, self.k, torch.nan),
            example=_filled(example, self.k, -1),
            sample_value=sample_value,
            sample_example=places[: self.sample],
            key=keys,
            position=tokens.position[counted],
            context=contexts(tokens, self.context)[counted],
            histogram=counts,
        )
        return MaxActivatingExamplesResult.merged([part])

    def _read(self, reading: Reading, hook: str) -> Float[Tensor, "unit token"]:
        """Every unit's activation at every token."""
        activation = reading[hook].float()
        if self.directions is not None:
            activation = activation @ directions_for(self, reading.model).T
        elif self.at == "head":
            activation = activation.norm(dim=-1)
        if self.units is not None:
            activation = activation[:, reading.model.units(self.units, hook, activation.shape[1])]
        return activation.T.contiguous().cpu()


def largest(values: Float[Tensor, "*unit n"], places: Int[Tensor, "*other n"], k: int) -> Int[Tensor, "*unit k"]:
    """Where the k largest values are, in order; of equal ones, that of the lowest place first. NaN comes last.

    A float32 that is not NaN has the order of its bits as a whole number, once those of negative ones are flipped. With
    the place in the lower half of 64 bits, no two numbers are equal.

    >>> largest(torch.tensor([1.0, 3.0, 3.0, torch.nan, -1.0]), torch.tensor([0, 2, 1, 3, 4]), 4)
    tensor([2, 1, 0, 4])
    """
    if values.isnan().any():
        values = values.masked_fill(values.isnan(), -torch.inf)
    bits = (values + 0.0).view(torch.int32)  # -0 becomes 0
    ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long()
    ordered <<= 32
    ordered -= places
    return ordered.topk(min(k, values.shape[-1]), dim=-1).indices


def histogram(values: Float[Tensor, "unit token"]) -> Float64[Tensor, "unit bin"]:
    """How many values of each unit are in each bin: exponent and first binary digit of a float32 say which.

    >>> histogram(torch.tensor([[0.0, 1.0, 1.4, -1.0]])).nonzero()[:, 1].tolist(), edges()[[15, 32, 48]].tolist()
    ([15, 32, 48], [-1.5, 0.0, 1.0])
    """
    top_bits = ((values + 0.0).view(torch.int32) >> 22) & 1023  # -0 becomes 0
    counts = torch.zeros(len(values), 1024, dtype=torch.int32)
    counts.scatter_add_(1, top_bits.long(), torch.ones((), dtype=torch.int32).expand(values.shape))
    half, bits = BINS // 2, torch.arange(1024)
    size = ((bits & 511) - 2 * (127 - OCTAVES)).clamp(0, half - 1)
    bins = torch.where(bits < 512, half + size, half - 1 - size)  # the first bit is the sign
    return counts.double() @ torch.nn.functional.one_hot(bins, BINS).double()


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


def _places(keys: Int[Tensor, " example"]) -> Int[Tensor, " place"]:
    """The place of each example in the order of keys, and behind them that of no example, the last."""
    place = torch.empty(len(keys) + 1, dtype=torch.int64)
    place[keys.argsort(stable=True)] = torch.arange(len(keys))
    place[-1] = len(keys)
    return place


def _without_examples(part: MaxActivatingExamplesResult) -> MaxActivatingExamplesResult:
    """What is merged as in any result: histograms, texts, labels, provenance."""
    empty = {name: getattr(part, name)[..., :0] for name in ("value", "example", "sample_value", "sample_example")}
    return replace(part, **empty, **{name: getattr(part, name)[:0] for name in _OF_EXAMPLES})


def _shown(text: str) -> str:
    return figures.spelled(text, 80)
