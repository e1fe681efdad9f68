"""PositionReach: how far back does a state depend on the input?

J = d h[query] / d e[source], where h is the state of a query token after a layer and e the embedding of a source token
(in decoders not after the query). e is the activation `hook_embed` (in encoders `embed.hook_out`). It is not always a
row of W_E: it may include a multiplier (Gemma, Granite) or a norm (Bloom). The derivative is per unit of e.

    derivative[layer, query, source] = |J|, the Frobenius norm                 0 or more, units of h over those of e
    reach[layer, query, source]      = derivative |e[source]|                  norms before layers scale J by 1 / |e|
    share                            = reach / sum over sources of reach       0 to 1
    total[layer, source]             = sum over queries of share               if uniform: sum of 1 / sources

Summaries of the shares of each query:

    width       = exp(entropy of share over sources)                           1 to the number of sources
    distance    = sum over sources of share |query - source|                   in tokens
    self        = the share of the token itself                                0 to 1
    first_token = the share of the first source, often a special token         0 to 1
    first_half  = the share of the first half of the sources                   0 to 1

|J|^2 is estimated as the mean of |v J|^2 over seeded random v with independent normal entries; `error` is its standard
error, from the spread over v. A query's sources are all tokens that it may depend on. Each summary is given together
with its value under uniform shares: with n sources the width is n and every share 1 / n. Sources outside a window of
local attention count too, so a window shows as a narrow reach. Early tokens reach more queries because of the mask
alone: source s of T tokens has T - s queries. `compare_with` compares with another model, such as an untrained one.

It takes one backward pass per layer, projection and batch of queries (about 512 tokens: each query has its own copy of
the prompt).

Source: claims about GPT-2 on blbadger.github.io, "Language Model Representations and Features"; estimating norms by
random projections: Hutchinson 1990, doi.org/10.1080/03610919008812866.
"""

from collections.abc import Iterator, Sequence
from typing import Annotated, NamedTuple, Unpack

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lens_probes import figures
from lens_probes.maths import inference
from lens_probes.maths.ascent import seeded
from lens_probes.model import ModelView
from lens_probes.probe import Study, TextExperiment
from lens_probes.reading import TOKENS_PER_BATCH, finite
from lens_probes.result import PairResult, Quantity, derived, measured, paired
from lens_probes.settings import Layers, Seed, at_least
from lens_probes.text.prompts import PairTable, Tokens, concatenate

SUMMARIES = {
    "width": Quantity("effective number of sources", low=1),
    "distance": Quantity("mean distance to the sources", "tokens", low=0),
    "self": Quantity("share of the token itself", low=0, high=1),
    "first_token": Quantity("share of the first token", low=0, high=1),
    "first_half": Quantity("share of the first half", low=0, high=1),
}
NULL = "the two models are exchangeable within each prompt; q is a false-discovery rate over layers"


class PositionReachResult(PairResult):
    """How every query's state depends on every source, one row per pair. Memory scales with prompt length squared."""

    headline = "share"
    layer: tuple[str, ...]
    derivative: Float[Tensor, "layer pair"] = measured("norm of d state[query] / d embedding[source]", low=0)
    error: Float[Tensor, "layer pair"] = measured("standard error of the derivative", low=0)
    embed_norm: Float[Tensor, " pair"] = measured("length of the source's embedding, as hook_embed holds it", low=0)

    @derived("derivative times the length of the source's embedding", low=0)
    def reach(self) -> Float[Tensor, "layer pair"]:
        """The derivative times the length of the source's embedding."""
        return self.derivative * self.embed_norm

    @derived("share of the query's reach", low=0, high=1)
    def share(self) -> Float[Tensor, "layer pair"]:
        """Each source's part of the reach of its query."""
        queries = torch.stack([self.pair.prompt, self.pair.query])
        of_query = queries.unique(dim=1, return_inverse=True)[1]
        total = torch.zeros(len(self.layer), int(of_query.max()) + 1).index_add(1, of_query, self.reach)
        return self.reach / total[:, of_query].clamp(min=1e-30)

    def by_layer(self) -> pd.DataFrame:
        """Each summary by layer: the mean over prompts, its interval, and its value under uniform shares.

        `ratio` is the mean over prompts of value / uniform value, since both grow with prompt length. A prompt's value
        is the mean over its queries with two sources or more, special tokens excluded. The 95 % intervals are Student's
        t over prompts.
        """
        frames = []
        for name, (values, uniform) in self._summaries().items():
            (low, high), (ratio_low, ratio_high) = map(inference.mean_interval, (values, values / uniform))
            columns = {"layer": self.layer, "summary": name, "mean": values.mean(1), "low": low, "high": high}
            columns |= {"uniform": uniform.mean(), "ratio": (values / uniform).mean(1)}
            columns |= {"ratio_low": ratio_low, "ratio_high": ratio_high, "prompts": values.shape[1]}
            frames.append(pd.DataFrame(columns))
        return pd.concat(frames, ignore_index=True)

    def by_source(self) -> pd.DataFrame:
        """One row per layer and source position: its importance for all queries, and that due to the mask alone.

        `total` sums the shares over queries, `uniform` is its value under uniform shares, `ratio` their ratio. `reach`
        is the mean reach over the same queries, divided by its mean over the prompt's sources (1 if all sources reach
        equally; a source's total is then proportional to T - s). All are means over prompts; the 95 % intervals of
        `ratio` and `reach` are Student's t over prompts. Special tokens are excluded, as queries and as sources.
        """
        found: dict[int, list[tuple[list[int], np.ndarray]]] = {}
        for tokens, share, reach, allowed in self._by_prompt():
            asks = ~tokens.special
            allowed = allowed & asks[:, None]
            uniform = (allowed / allowed.sum(1, keepdim=True).clamp(min=1)).sum(0)
            total = (share * asks[:, None]).sum(1)
            mean_reach = (reach * asks[:, None]).sum(1) / allowed.sum(0).clamp(min=1)
            mean_reach = mean_reach / mean_reach[:, asks].mean(1, keepdim=True)
            columns = torch.stack([total, uniform.expand_as(total), total / uniform, mean_reach])
            for source in asks.nonzero().flatten().tolist():
                found.setdefault(source, []).append((tokens.id.tolist(), columns[:, :, source].numpy()))
        if not found:
            raise ValueError("a source must be a token of text; got special tokens only: pass text")
        rows = []
        for source, of_prompts in sorted(found.items()):
            in_order = [
                each for _, each in sorted(of_prompts, key=lambda p: p[0])
            ]  # independent of the order of prompts
            total, uniform, ratio, reach = np.stack(in_order, axis=-1)
            (low, high), (reach_low, reach_high) = map(inference.mean_interval, (ratio, reach))
            columns = {"layer": self.layer, "source": source, "total": total.mean(1), "uniform": uniform.mean(1)}
            columns |= {"ratio": ratio.mean(1), "low": low, "high": high}
            columns |= {"reach": reach.mean(1), "reach_low": reach_low, "reach_high": reach_high}
            rows.append(pd.DataFrame({**columns, "prompts": len(of_prompts)}))
        return pd.concat(rows, ignore_index=True)

    def compare_with(self, other: "PositionReachResult") -> pd.DataFrame:
        """This model minus another (such as an untrained one) on the same prompts: every summary by layer.

        The interval is Student's t over prompts; p swaps the two models at random, prompt by prompt; q is over layers.
        """
        self.check_comparable(other)  # with the same settings: other numbers of projections have other noise
        theirs, frames = other._summaries(), []
        for name, (values, _) in self._summaries().items():
            labels, reference = pd.DataFrame({"layer": self.layer, "summary": name}), theirs[name][0]
            says, means = "difference between the models", {"mean": values.mean(1), "other": reference.mean(1)}
            frames.append(paired(labels, values - reference, says=says, null=NULL, **means, prompts=values.shape[1]))
        frame = pd.concat(frames, ignore_index=True)
        frame.attrs = frames[0].attrs
        return frame

    def _by_prompt(self) -> Iterator[tuple[Tokens, Tensor, Tensor, Tensor]]:
        """Each prompt's tokens, shares and reaches, `[layer query source]`, and a mask of the pairs that exist."""
        pairs = self.share.double(), self.reach.double(), torch.ones(len(self.pair), dtype=torch.bool)
        for number, tokens in self.token.by_prompt():
            share, reach, allowed = (self.unfold(each, number) for each in pairs)
            yield tokens, share, reach, allowed

    def _summaries(self) -> dict[str, tuple[Float[np.ndarray, "layer prompt"], Float[np.ndarray, " prompt"]]]:
        """Every summary of every prompt, sorted by token ids, and its value under uniform shares."""
        found, uniform, asked = [], [], []
        for tokens, share, _, allowed in self._by_prompt():
            asks = ~tokens.special & (allowed.sum(1) > 1)
            if asks.any():
                equal = (allowed / allowed.sum(1, keepdim=True))[None].double()
                found.append(summaries(share, allowed)[:, :, asks].mean(-1))
                uniform.append(summaries(equal, allowed)[:, 0, asks].mean(-1))
                asked.append(int(tokens.prompt[0]))
        if not found:
            raise ValueError(
                "a query must have two sources or more; got none that has: pass prompts of two tokens or more"
            )
        order = inference.prompt_order(self.token[torch.isin(self.token.prompt, torch.tensor(asked))])
        values, expected = (torch.stack(each, dim=-1)[..., order].numpy() for each in (found, uniform))
        return {name: (values[i], expected[i]) for i, name in enumerate(SUMMARIES)}

    def figure(self, **look: Unpack[figures.Look]) -> go.Figure:
        """The summaries by layer, each over its value under uniform shares; the first token's share is left out."""
        table, panels = self.by_layer(), {}
        for name, quantity in SUMMARIES.items():
            if name != "first_token":
                rows = table[table["summary"] == name]
                mean, low, high = (list(rows[each]) for each in ("ratio", "ratio_low", "ratio_high"))
                line = figures.Line("mean over prompts", mean, low, high, figures.CHOSEN)
                uniform = figures.Line("uniform shares", [1.0] * len(mean), colour=figures.GREY, dashed=True)
                panels[f"{quantity.says} / uniform"] = [line, uniform]
        title = self.title("Dependence of states on their sources, relative to uniform shares (dashed)")
        return figures.lines(panels, self.layer, title=title, x_title=figures.layer_title(self.layer), **look)

    def figure_prompt(self, layer: int | str, prompt: int = 0, **look: Unpack[figures.Look]) -> go.Figure:
        """The share of every source in every query of a prompt, at one layer."""
        at = self.index_of("layer", layer)
        return self.draw_patterns(
            [("", self.pattern(prompt)[at])],
            prompt,
            f"Share of each source in the state of each token at {self.layer[at]}, prompt {prompt}",
            quantity="share",
            x_title="source",
            **look,
        )


class PositionReach(TextExperiment[PositionReachResult]):
    """How much the state of each token after a layer depends on each token of its prompt.

    `projections` is the number of random directions. The relative error falls with its square root; noise makes shares
    look slightly less uniform. After an interrupt the result holds the prompts done so far.

    >>> import lens_probes as lp
    >>> result = lp.PositionReach(projections=4).run(lp.tiny.bridge(), "Time flies like an arrow.", progress=False)
    >>> result.layer, bool((result.pattern(0).sum(-1) - 1).abs().max() < 1e-5)
    (('0_post', '1_post', '2_post'), True)
    """

    projections: Annotated[int, at_least(2)] = 8  # a standard error needs two
    layers: Layers = None
    seed: Seed = 0

    def perform(self, study: Study) -> PositionReachResult:
        """Prompt by prompt."""
        states, prompts = study.view.states("resid_post", self.layers), [own for _, own in study.tokens.by_prompt()]
        hooks = list(states.values())
        parts = study.each(
            lambda own: self._of_prompt(study.view, own, hooks), prompts, doing="differentiating", unit="prompt"
        )
        done = study.tokens[study.tokens.prompt <= parts[-1].pair.prompt[0]]
        return PositionReachResult(
            layer=tuple(states),
            token=done,
            pair=concatenate([part.pair for part in parts], [0] * len(parts)),
            derivative=torch.cat([part.derivative for part in parts], dim=1),
            error=torch.cat([part.error for part in parts], dim=1),
            embed_norm=torch.cat([part.embed_norm for part in parts]),
            provenance=study.provenance([study.view.hook_token_embed, *hooks], done),
        )

    def _of_prompt(self, view: ModelView, tokens: Tokens, hooks: Sequence[str]) -> "OfPrompt":
        """All queries of a prompt, in batches."""
        n = len(tokens)
        allowed = torch.ones(n, n, dtype=torch.bool)
        query, source = (allowed if view.encoder else allowed.tril()).nonzero(as_tuple=True)
        random = seeded(tokens.id.numpy().tobytes(), self.seed)
        directions = torch.randn(self.projections, len(hooks), n, view.d_model, generator=random)
        squares = torch.zeros(self.projections, len(hooks), n, n)
        for some in torch.arange(n).split(max(1, TOKENS_PER_BATCH // n)):
            squares[:, :, some] = squared_gradients(view, tokens.id, some, hooks, directions[:, :, some])
        norm = finite("derivative", squares.mean(0).sqrt())
        spread = squares.std(0) / self.projections**0.5  # of the square; that of the root is this / (2 root)
        error = torch.where(norm > 0, spread / (2 * norm.clamp(min=1e-30)), 0)
        length = view.token_embeddings[tokens.id.to(view.device)].float().norm(dim=-1).cpu()
        pair = PairTable(tokens.prompt[query], query, source)
        return OfPrompt(pair, norm[:, query, source], error[:, query, source], length[source])


class OfPrompt(NamedTuple):
    """One prompt's part of a result."""

    pair: PairTable
    derivative: Float[Tensor, "layer pair"]
    error: Float[Tensor, "layer pair"]
    embed_norm: Float[Tensor, " pair"]


def squared_gradients(
    view: ModelView,
    ids: Tensor,
    queries: Tensor,
    hooks: Sequence[str],
    directions: Float[Tensor, "projection layer query d_model"],
) -> Float[Tensor, "projection layer query key"]:
    """|v J|^2 of these queries for every source. Each query has its own copy of the prompt."""
    embedded, states = view.differentiable(ids.expand(len(queries), -1), hooks)
    rows = torch.arange(len(queries))
    found = torch.zeros(*directions.shape[:3], len(ids))
    for i, (hook, state) in enumerate(zip(hooks, states, strict=True)):
        finite(hook, state.detach())
        own = state[rows, queries.to(state.device)].float()
        for j, along in enumerate(directions[:, i]):
            product = (own * along.to(own.device)).sum()
            (gradient,) = torch.autograd.grad(product, embedded, retain_graph=True)
            found[j, i] = gradient.float().square().sum(-1).cpu()
    return found


def summaries(
    share: Float[Tensor, "layer query key"], allowed: Bool[Tensor, "query key"]
) -> Float[Tensor, "summary layer query"]:
    """The summaries in the order of `SUMMARIES`; `allowed` marks the sources of each query.

    If the number of sources is odd, half of the middle one belongs to the first half.

    >>> shares = torch.tensor([[[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.5, 0.25, 0.25]]])
    >>> summaries(shares, torch.ones(3, 3, dtype=torch.bool).tril())[:, 0, 2]
    tensor([2.8284, 1.2500, 0.2500, 0.5000, 0.6250])
    """
    place = torch.arange(share.shape[-1])
    apart = (place[:, None] - place).abs().to(share.dtype)
    width = torch.special.entr(share).sum(-1).exp()
    half = (allowed.sum(-1, keepdim=True) / 2 - (allowed.cumsum(-1) - 1)).clamp(0, 1).to(share.dtype)
    own, first, early = share.diagonal(dim1=-2, dim2=-1), share[..., 0], (share * half).sum(-1)
    return torch.stack([width, (share * apart).sum(-1), own, first, early])
