"""SourceAttribution: which source tokens contribute to a target's logit, through which head?

A head writes to a query token the sum of its sources' values, weighted by attention A. Each term contributes to the
target's logit what `DirectLogitAttribution` says of the sum:

    contribution[layer, head, query <- source] = A[query, source] (v[source] - b_V) W_O . direction[query]     logits
    uniform[layer, head, query <- source]      = the same with 1 / (number of sources) in place of A

The target is that of the query token. `direction` is what the target's logit reads, less the mean logit or that of
`against`, with norms at their true scale. The sum over sources is the head's contribution in `DirectLogitAttribution`.
b_V is the part of values that depends on no token. `uniform` is the null: what the head would contribute if it attended
to all its sources alike. Contributions are direct: what a head does through later parts does not count.

Raises where weights times values do not sum to what the heads put out, and for what `DirectLogitAttribution` refuses.

Source: Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits",
transformer-circuits.pub/2021/framework; Wang et al. 2022, "Interpretability in the Wild", arXiv 2211.00593.
"""

from typing import Unpack

import pandas as pd
import plotly.graph_objects as go
import torch
from einops import einsum
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lens_probes import figures
from lens_probes.logit_direction import LogitDirection, check_linear, logit_direction, read_of_attention
from lens_probes.messages import brief
from lens_probes.model import ModelView, tolerance
from lens_probes.probe import Probe
from lens_probes.reading import Reading
from lens_probes.result import PairResult, measured
from lens_probes.settings import Layers
from lens_probes.text.places import Positions
from lens_probes.text.prompts import PairTable, concatenate
from lens_probes.text.targets import OneTarget, Target, asked_about, target_name


class SourceAttributionResult(PairResult):
    """What every source token adds to the target's logit, through every head. Memory scales with pairs of tokens."""

    target: Target | tuple[int, ...]
    against: Target | tuple[int, ...] | None
    vocab: dict[int, str]  # the texts of fixed targets
    layer: tuple[str, ...]
    head: tuple[str, ...]
    contribution: Float[Tensor, "layer head pair"] = measured(
        "contribution of the source token to the target's logit", unit="logits", null="uniform"
    )
    uniform: Float[Tensor, "layer head pair"] = measured(
        "contribution of the source token under uniform attention", unit="logits"
    )

    def sources(self, layer: int | str, head: int | str, token: int | str, prompt: int = 0) -> pd.DataFrame:
        """What each source token adds at one query token through one head, the largest in size first."""
        row, at = self._row(prompt, token), (self.index_of("layer", layer), self.index_of("head", head))
        query = self.token.rows(prompt).index(row)
        own = ((self.pair.prompt == prompt) & (self.pair.query == query)).nonzero().flatten()
        position = self.pair.key[own]
        frame = pd.DataFrame(
            {
                "position": position.tolist(),
                "source": [self.token.text[self.token.rows(prompt)[i]] for i in position.tolist()],
                "contribution": self.contribution[at][own].tolist(),
                "uniform": self.uniform[at][own].tolist(),
            }
        )
        return frame.sort_values("contribution", ascending=False, key=abs, kind="stable").reset_index(drop=True)

    def figure(
        self,
        layer: int | str | None = None,
        head: int | str | None = None,
        prompt: int = 0,
        **look: Unpack[figures.Look],
    ) -> go.Figure:
        """What each source token adds at each query token, through one head of a prompt.

        Without a layer or a head, it is the one with the largest contribution in this prompt.
        """
        layers = range(len(self.layer)) if layer is None else [self.index_of("layer", layer)]
        heads = range(len(self.head)) if head is None else [self.index_of("head", head)]
        pattern = self.pattern(prompt)
        largest = pattern.nan_to_num(0).abs().amax((2, 3))
        i, j = max(((i, j) for i in layers for j in heads), key=lambda cell: float(largest[cell]))
        title = f"Contribution of each source token through L{self.layer[i]}{self.head[j]}, prompt {prompt}"
        queries, rows = self._queries(prompt).tolist(), self.token.rows(prompt)
        names = [f"{figures.visible(self.token.text[rows[query]], 14)} {query}" for query in queries]
        panels = [("", pattern[i, j][queries])]
        return self.draw_patterns(panels, prompt, title, quantity="contribution", rows=names, x_title="source", **look)

    def figure_token(
        self, layer: int | str, token: int | str, prompt: int = 0, **look: Unpack[figures.Look]
    ) -> go.Figure:
        """What each source token adds at one query token, through each head of a layer."""
        row, at = self._row(prompt, token), self.index_of("layer", layer)
        query = self.token.rows(prompt).index(row)
        known = self.target in ("next", "own")
        target = asked_about(self.token, self.target).text[row] if known else target_name(self.target, self.vocab)
        return self.draw_patterns(
            [("", self.pattern(prompt)[at, :, query])],
            prompt,
            f"Contribution of each source token to {figures.quoted(target) if known else target} at "
            f"{figures.quoted(self.token.text[row])}, token {query} of prompt {prompt}, in layer {self.layer[at]}",
            quantity="contribution",
            rows=self.head,
            x_title="source",
            y_title="head",
            **look,
        )

    def _row(self, prompt: int, token: int | str) -> int:
        """The row number of a query token, which must have been asked about and have a target."""
        row, rows, asked = self.token.row(prompt, token), self.token.rows(prompt), self._queries(prompt).tolist()
        if rows.index(row) not in asked:
            raise ValueError(
                f"the token must be one of the positions that this run asked about, {brief(asked)} in prompt {prompt}; "
                f"got {brief(token)}: run SourceAttribution with other positions"
            )
        if self.target == "next" and row == rows[-1]:
            raise ValueError(
                f"the token must have a target; got the last of prompt {prompt}, which nothing follows: pass another"
            )
        return row

    def _queries(self, prompt: int) -> Int[Tensor, " query"]:
        """The positions that were asked about in a prompt."""
        return self.pair.query[self.pair.prompt == prompt].unique()

    def conditions(self) -> str:
        """The target, and what it is compared with."""
        against = "the mean logit" if self.against is None else target_name(self.against, self.vocab)
        return f"target: {target_name(self.target, self.vocab)} against {against}"


class SourceAttribution(Probe[SourceAttributionResult]):
    """What every source token adds to the target's logit, through every head.

    `target`, `against`, `positions`: as in `DirectLogitAttribution`, such as `target=" Mary", against=" John",
    positions=-1`. Sources are all tokens up to each of these positions.

    >>> import lens_probes as lp
    >>> model, text = lp.tiny.bridge(), "Time flies like an arrow."
    >>> result = lp.SourceAttribution(layers=[1]).run(model, text)
    >>> whole = lp.DirectLogitAttribution().run(model, text).of_component("L1H2")
    >>> bool(torch.allclose(result.pattern()[0, 2, :-1].sum(-1), whole[:-1], atol=1e-4))
    True
    """

    reads_head = True
    target: OneTarget = "next"
    against: OneTarget | None = None
    positions: Positions = None
    layers: Layers = None

    def hooks(self, model: ModelView) -> list[str]:
        """Values, patterns, mixed values and what attention adds, in every layer; and the last state."""
        check_linear(model, self)
        names = [
            name
            for layer in model.layers(self.layers)
            for name in (*_of_heads(model, layer), model.hook("attn_out", layer))
        ]
        return [*names, model.hook("resid_post", -1)]

    def measure(self, reading: Reading) -> SourceAttributionResult:
        """One layer after the other, and in each one prompt after the other."""
        reading.check_head()
        layers, asked = reading.model.layers(self.layers), logit_direction(reading, self)
        query = reading.tokens[asked.rows]
        prompts = list(zip(reading.by_prompt(), (own.position for _, own in query.by_prompt()), strict=True))
        pairs = []
        for one, queries in prompts:
            number, source = _allowed(len(one.tokens))[queries].nonzero(as_tuple=True)
            pairs.append(PairTable(torch.full_like(source, int(one.tokens.prompt[0])), queries[number], source))
        pair = concatenate(pairs, [0] * len(pairs))
        unknown = asked.unknown.cpu().repeat_interleave(query.position + 1)  # a query has itself and all before it
        found = [self._layer(reading, prompts, layer, asked) for layer in layers]
        contribution, uniform = (torch.stack(each).masked_fill(unknown, torch.nan) for each in zip(*found, strict=True))
        return self.result(
            reading,
            target=asked.target,
            against=asked.against,
            vocab=asked.texts,
            layer=tuple(map(str, layers)),
            pair=pair,
            contribution=contribution,
            uniform=uniform,
        )

    def _layer(
        self,
        reading: Reading,
        prompts: list[tuple[Reading, Int[Tensor, "..."]]],
        layer: int,
        asked: LogitDirection,
    ) -> tuple[Float[Tensor, "head pair"], Float[Tensor, "head pair"]]:
        """The contributions through the heads of a layer, under the model's attention and under a uniform one.

        `prompts`: each with the positions of its queries.
        """
        model, lengths = reading.model, [len(one.tokens) for one, _ in prompts]
        values_hook, z_hook, pattern_hook = _of_heads(model, layer)
        W_O, bias = model.W_O(layer).float(), model.value_bias(layer)
        values = model.per_head(model.mixed(reading[values_hook].float()))
        z = reading[z_hook].float()
        towards = read_of_attention(reading, layer, asked)
        read = einsum(W_O, towards, "head d_head d_model, query d_model -> query head d_head")
        of_queries = read.split([len(queries) for _, queries in prompts])
        found = []
        for (one, queries), v, mixed, to in zip(
            prompts, values.split(lengths), z.split(lengths), of_queries, strict=True
        ):
            pattern = one.pattern(pattern_hook)
            close = max(tolerance(pattern.dtype), tolerance(reading.dtype(values_hook)))
            _check_mixed(model, layer, pattern, v, mixed, close)
            each = einsum(v - bias, to, "source head d_head, query head d_head -> head query source")
            seen = model.seen(layer, one.tokens.id, pattern)[queries]
            both = torch.stack([pattern[:, queries].float() * each, seen / seen.sum(-1, keepdim=True) * each])
            found.append(both[..., _allowed(len(v))[queries].to(v.device)].cpu())
        contribution, uniform = torch.cat(found, dim=-1)
        return contribution, uniform


def _check_mixed(
    model: ModelView,
    layer: int,
    pattern: Float[Tensor, "head query source"],
    values: Float[Tensor, "source head d_head"],
    mixed: Float[Tensor, "query head d_head"],
    close: float,
) -> None:
    """Raise unless weights times values are what the heads put out."""
    own = einsum(pattern.float(), values, "head query source, source head d_head -> query head d_head")
    size, off = float(values.abs().max()), float((own - mixed).abs().max())
    whole = float((pattern.float().sum(-1) - 1).abs().max())
    if not off <= close * size or not whole <= close:
        raise ValueError(
            f"weights must sum to 1, and weights times values to what the heads of layer {layer} of {model.name} put "
            f"out; got sums that are off by {max(off, whole):.2g}, as with an attention sink: use another model"
        )


def _allowed(n: int) -> Bool[Tensor, "query source"]:
    return torch.ones(n, n, dtype=torch.bool).tril()


def _of_heads(model: ModelView, layer: int) -> tuple[str, str, str]:
    return model.hook_value(layer), model.hook_z(layer), model.hook_pattern(layer)
