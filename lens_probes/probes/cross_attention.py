"""CrossAttention: which source tokens does each head of an encoder-decoder attend to while it predicts a target token?

A query is a decoder position, named by the token that it predicts: the one that follows it in the target. Every query
that predicts a given token counts, unless that token is special (start, end). Keys are all tokens of the source. With
a the query's row of the cross-attention pattern, over its n keys:

    special    = sum of a over special keys, such as the end of the source    0 to 1, the attention sink
    same_token = sum of a over keys with the id of the predicted token        0 to 1, over the queries that have one
    entropy    = -sum a log a / log n                                         0 (one token) to 1 (uniform)
    max        = max of a over keys that are not special                      0 to 1
    distance   = sum a |y - x| / sum a, over keys that are not special        0 (same place) to 1

y = (j + 1/2) / J is the place of the predicted token, number j of the J that count in its target, and
x = (k + 1/2) / K that of the key, number k of the K in its source that are not special; j and k count from 0.
`distance` is NaN for a head that once gives all such keys a weight of 0.

`mean[statistic, layer, head]` is the mean over queries, and `uniform[statistic]` its value under uniform attention to
all keys. `alignment()` gives the source token with the largest weight for each target token. The patterns are stored,
4 bytes per layer, head, target token and source token, at most 1 GB; with `keep_patterns=False` the result's size does
not depend on the number of tokens. A pattern shows where a head looks, not that the model uses what it finds there
(Jain & Wallace 2019, "Attention is not Explanation", arXiv 1902.10186).

It reads T5, BART, Marian and their relatives as a TransformerBridge (those of T5 with TransformerLens 4).
`Prompt(source, target=...)` gives the target, and a run costs one forward pass. Without a target the model writes it
itself, one more pass per token (see `greedy_targets`). In each pass, pattern times values must be the heads' output, or
an error is raised.

Source: Bahdanau et al. 2014, "Neural Machine Translation by Jointly Learning to Align and Translate", arXiv 1409.0473
(alignments as pictures); Vaswani et al. 2017, arXiv 1706.03762. Trained heads may look at the end of the source instead
(Ferrando & Costa-jussa 2021, arXiv 2109.05853), or align a token where it is the decoder's input, one row further down
(Chen et al. 2020, arXiv 2004.14837).
"""

from collections.abc import Mapping
from typing import Literal, NamedTuple, Unpack

import pandas as pd
import plotly.graph_objects as go
import torch
from einops import einsum
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

from lens_probes import figures
from lens_probes.messages import brief
from lens_probes.model import DecoderView, ModelView
from lens_probes.probe import Probe
from lens_probes.reading import Reading
from lens_probes.result import NO_PAIRS, PatternResult, Quantity, added, spread, summed
from lens_probes.settings import Layers
from lens_probes.text.prompts import PairTable, Tokens, concatenate

Statistic = Literal["special", "same_token", "entropy", "max", "distance"]
STATISTICS: Mapping[str, Quantity] = {
    "special": Quantity("attention to special source tokens", low=0, high=1),
    "same_token": Quantity("attention to copies of the predicted token", low=0, high=1),
    "entropy": Quantity("entropy of attention / entropy of uniform attention", low=0, high=1),
    "max": Quantity("largest attention to one source token", low=0, high=1),
    "distance": Quantity("mean distance from target to source place", low=0, high=1),
}


class CrossAttentionResult(PatternResult):
    """Sums over queries; patterns with the tokens of both sides if they were kept.

    `token` has the decoder's tokens, `source` the encoder's; in `pair`, a query is a position in `token` and a key one
    in `source`.
    """

    quantities = STATISTICS
    keeping = "CrossAttention()"
    not_keeping = "CrossAttention(keep_patterns=False)"
    statistic: tuple[Statistic, ...]
    source: Tokens
    queries: Float64[Tensor, " statistic"] = summed("number of queries that count")
    total: Float64[Tensor, "statistic layer head"] = summed("sum of the statistic over these queries")
    uniform_total: Float64[Tensor, " statistic"] = summed("the same sum under uniform attention")

    def sharpest(self) -> tuple[int, int]:
        """Layer and head whose largest weight on one source token is largest in the mean; special tokens left out."""
        largest = self.mean_of("max")
        if largest.isnan().all():
            raise ValueError(
                "a target must have a token that is not special; got none that has: pass targets with text"
            )
        layer, head = divmod(int(largest.nan_to_num(-1).argmax()), len(self.head))
        return int(self.layer[layer]), head

    def keys(self) -> Tokens:
        """The tokens of the sources."""
        return self.source

    def alignment(self, prompt: int = 0, layer: int | str | None = None, head: int | str | None = None) -> pd.DataFrame:
        """The source token with the largest weight for each target token, special ones left out; by the sharpest head.

        One row per target token: its `position` and text, those of the source token, the `weight`, and `uniform`, the
        weight under uniform attention.
        """
        _, pattern = self._of_head(prompt, layer, head)
        queries, predicted = self._predicted(prompt)
        source = self.source[torch.tensor(self.source.rows(prompt))]
        if source.special.all():
            raise ValueError(
                f"a source must have a token that is not special; got none in prompt {prompt}: pass sources with text"
            )
        weights = pattern[queries].masked_fill(source.special, -1)
        best = weights.argmax(-1)
        counted = (~predicted.special).nonzero().flatten()
        return pd.DataFrame(
            {
                "position": predicted.position[counted].numpy(),
                "target": [predicted.text[i] for i in counted.tolist()],
                "source_position": best[counted].numpy(),
                "source": [source.text[i] for i in best[counted].tolist()],
                "weight": weights.gather(1, best[:, None])[counted, 0].numpy(),
                "uniform": 1 / len(source),
            }
        )

    def _of_head(
        self, prompt: int, layer: int | str | None, head: int | str | None
    ) -> tuple[str, Float[Tensor, "query key"]]:
        """The name of a head and its pattern; of what is not given, the sharpest."""
        pattern = self.pattern(prompt)
        if layer is None and head is None:
            layer, head = self.sharpest()
        elif layer is None or head is None:
            raise ValueError(
                f"a head is named by layer and head; got layer={brief(layer)} and head={brief(head)}: give both, or "
                f"none for the sharpest"
            )
        row, column = self.index_of("layer", layer), self.index_of("head", head)
        return f"L{self.layer[row]}{self.head[column]}", pattern[row, column]

    def _predicted(self, prompt: int) -> tuple[Int[Tensor, " query"], Tokens]:
        """The queries of a prompt that predict a given token, and these tokens."""
        rows = torch.tensor(self.token.rows(prompt))
        return torch.arange(len(rows) - 1), self.token[rows[1:]]

    def findings(self) -> list[str]:
        """The sharpest head, and how much it attends to one source token."""
        if self.mean_of("max").isnan().all():
            return []
        return [f"The head whose largest attention to one source token is highest is {self.highest('max')}"]

    # Figures

    def figure(self, statistic: Statistic = "max", **look: Unpack[figures.Look]) -> go.Figure:
        """One statistic by layer and head; the last column is the null, uniform attention."""
        return self.draw_statistic(statistic, "cross-attention: ", **look)

    def figure_alignment(
        self,
        prompt: int = 0,
        layer: int | str | None = None,
        head: int | str | None = None,
        **look: Unpack[figures.Look],
    ) -> go.Figure:
        """Source tokens across and target tokens down, for one head: the sharpest unless layer and head are given."""
        name, pattern = self._of_head(prompt, layer, head)
        note = ", the sharpest head" if layer is None else ""
        return self._draw(pattern, prompt, f"Cross-attention of {name}{note}, prompt {prompt}", **look)

    def figure_mean(self, prompt: int = 0, layer: int | str | None = None, **look: Unpack[figures.Look]) -> go.Figure:
        """The same for the mean over the heads of a layer, or (None) of all; colours end at its largest value."""
        pattern, of = self.pattern(prompt), "all heads"
        if layer is not None:
            at = self.index_of("layer", layer)
            pattern, of = pattern[[at]], f"the heads of layer {self.layer[at]}"
        question = f"Cross-attention, mean over {of}, prompt {prompt}"
        mean = pattern.mean((0, 1))
        return self._draw(mean, prompt, question, float(mean.max()), **look)

    def _draw(
        self,
        pattern: Float[Tensor, "query key"],
        prompt: int,
        question: str,
        highest: float | None = None,
        **look: Unpack[figures.Look],
    ) -> go.Figure:
        queries, predicted = self._predicted(prompt)
        places = zip(predicted.text, predicted.position.tolist(), strict=True)
        return self.draw_patterns(
            [("", pattern[queries])],
            prompt,
            question,
            quantity="attention",
            rows=[f"{figures.visible(text, 14)} {position}" for text, position in places],
            x_title="source token",
            y_title="predicted target token",
            highest=highest,
            **look,
        )


class CrossAttention(Probe[CrossAttentionResult]):
    """Where each head of the decoder looks in the source, with statistics and alignments.

    >>> import lens_probes as lp
    >>> pairs = [lp.Prompt("Time flies like an arrow.", target="Fruit flies like a banana.")]
    >>> result = lp.CrossAttention().run(lp.tiny.bridge("bart"), pairs)
    >>> tuple(result.mean.shape), result.pattern(0).shape == (3, 4, len(result.token), len(result.source))
    ((5, 3, 4), True)
    """

    reads_stacks = True
    keep_patterns: bool = True
    layers: Layers = None

    def hooks(self, model: ModelView) -> dict[str, str]:
        """The cross-attention pattern of every layer."""
        if not isinstance(model, DecoderView):
            raise ValueError(
                f"cross-attention needs an encoder-decoder, such as T5, BART or Marian, as a TransformerBridge; got "
                f"{model.name}: use AttentionPatterns"
            )
        return {str(layer): model.hook_cross_pattern(layer) for layer in model.layers(self.layers)}

    def measure(self, reading: Reading) -> CrossAttentionResult:
        """Prompt by prompt, then the sums over the batch."""
        tokens, sources = reading.tokens, reading.model.sources
        assert sources is not None  # of a DecoderView
        sums, patterns, pairs = [], [], []
        for one, (number, source) in zip(reading.by_prompt(), sources.by_prompt(), strict=True):
            rows = [one.pattern(hook, len(source)) for hook in one.points.values()]
            pattern = torch.stack(rows).double().cpu()
            own = sums_of(pattern, one.tokens, source)
            sums.append(own._asdict() | spread(own.queries, own.total))
            if self.keep_patterns:
                query, key = torch.ones(pattern.shape[2:]).nonzero(as_tuple=True)
                pairs.append(PairTable(torch.full_like(query, number), query, key))
                patterns.append(pattern.flatten(2).float())
        none = torch.zeros(0, dtype=torch.int64)
        return self.result(
            reading,
            statistic=tuple(STATISTICS),
            **added(sums),
            token=tokens if self.keep_patterns else tokens[none],
            source=sources if self.keep_patterns else sources[none],
            pair=concatenate(pairs, [0] * len(pairs)) if pairs else NO_PAIRS,
            attention=torch.cat(patterns, dim=2) if patterns else None,
        )


class Sums(NamedTuple):
    """One prompt's contribution to the sums of a result."""

    queries: Float64[Tensor, " statistic"]
    total: Float64[Tensor, "statistic layer head"]
    uniform_total: Float64[Tensor, " statistic"]


def sums_of(pattern: Float64[Tensor, "layer head query key"], target: Tokens, source: Tokens) -> Sums:
    """Every statistic summed over the queries of a prompt that count."""
    predicted = target.id.roll(-1)
    asks = ~target.special.roll(-1)
    asks[-1] = False  # the last one predicts what is not given
    values, counts = statistics_of(pattern, predicted, asks, source.id, source.special)
    even = torch.full_like(pattern[:1, :1], 1 / len(source))
    uniform, _ = statistics_of(even, predicted, asks, source.id, source.special)
    return Sums(
        queries=counts.double().sum(-1),
        total=values.masked_fill(~counts[:, None, None], 0).sum(-1),
        uniform_total=uniform[:, 0, 0].masked_fill(~counts, 0).sum(-1),
    )


def statistics_of(
    pattern: Float64[Tensor, "layer head query key"],
    predicted: Int[Tensor, " query"],
    asks: Bool[Tensor, " query"],
    ids: Int[Tensor, " key"],
    special: Bool[Tensor, " key"],
) -> tuple[Float64[Tensor, "statistic layer head query"], Bool[Tensor, "statistic query"]]:
    """Every statistic of every query, and the queries that count for it, of those that ask."""
    ordinary = (~special).double()
    copies = (predicted[:, None] == ids).double()
    y, x = _places(asks), _places(~special)
    apart = (y[:, None] - x).abs() * ordinary
    on = einsum(pattern, ordinary, "layer head query key, key -> layer head query")
    values = torch.stack(
        [
            1 - on,
            einsum(pattern, copies, "layer head query key, query key -> layer head query"),
            torch.special.entr(pattern).sum(-1) / torch.tensor(max(len(ids), 2)).log(),
            (pattern * ordinary).amax(-1),
            einsum(pattern, apart, "layer head query key, query key -> layer head query") / on,
        ]
    )
    counts = torch.stack([asks, asks & copies.any(1), asks & (len(ids) > 1), asks, asks & bool(ordinary.any())])
    return values, counts


def _places(counted: Bool[Tensor, " token"]) -> Float64[Tensor, " token"]:
    """Where each token that counts stands among those: 0 to 1, with the same room for each.

    >>> _places(torch.tensor([False, True, True])).tolist()
    [-0.25, 0.25, 0.75]
    """
    return (counted.double().cumsum(0) - 0.5) / counted.sum()
