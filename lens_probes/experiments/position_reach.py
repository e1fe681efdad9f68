"""PositionReach: how far back does a state depend on the input?

With h the state of a query token after a layer, and e the embedding of a source token (on decoders not after the
query), J = d h[query] / d e[source]. e is what `hook_embed` holds (on encoders `embed.hook_out`), which is not a row
of W_E everywhere: it may come after a multiplier (Gemma, Granite) or a norm (Bloom), and the derivative is per unit of
that:

    derivative[layer, query, source] = |J|, the Frobenius norm                   at least 0, units of h over those of e
    reach[layer, query, source]      = derivative |e[source]|                    norms before layers scale J by 1 / |e|
    share                            = reach / sum over sources of reach         0 to 1
    width[layer, query]              = exp(entropy of share over sources)        1 to the number of sources
    distance[layer, query]           = sum over sources of share |query - source|           in tokens
    own, first, early[layer, query]  = the share of the token itself, of the first source (often
                                       a special token), of the first half of the sources   0 to 1
    total[layer, source]             = sum over queries of share                            even: sum of 1 / sources

|J|^2 is estimated as the mean of |v J|^2 over seeded random v with independent normal entries; its standard error, from
the spread over v, is `error`. A query's sources are all that it may depend on: spread evenly over n of them the width
is n and every share 1 / n, which every summary has beside it; windows of local attention count as the model's own. That
early tokens matter for more queries follows from the mask alone: source s of T tokens has T - s queries. `compare_with`
puts an untrained model beside it.

Takes one backward pass a layer and projection for every batch of queries (about 512 tokens: each query has a copy of
its prompt).

Source: claims about GPT-2 on blbadger.github.io, "Language Model Representations and Features"; estimating norms by
random projections: Hutchinson 1990, doi.org/10.1080/03610919008812866.
"""

import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm.auto import tqdm

from lens_probes import figures
from lens_probes.maths import inference
from lens_probes.model import ModelView
from lens_probes.probe import Experiment
from lens_probes.reading import TOKENS_PER_BATCH, finite
from lens_probes.result import Result, measured, provenance
from lens_probes.settings import Layers
from lens_probes.text.prompts import PairTable, Prompts, Tokens, concatenate, tokenize

SUMMARIES = ("width", "distance", "own", "first", "early")
NULL = "a prompt's summary in the one model is as likely that in the other; a false-discovery rate over layers"


class PositionReachResult(Result):
    """The derivative of every query's state by every source's embedding, a row a pair. It grows with the squares."""

    layer: tuple[str, ...]
    token: Tokens
    pair: PairTable
    derivative: Float[Tensor, "layer pair"] = measured("|d h[query] / d e[source]|, e as hook_embed holds it", low=0)
    error: Float[Tensor, "layer pair"] = measured("standard error of the derivative", low=0)
    embed_norm: Float[Tensor, " pair"] = measured("length of the source's embedding, as hook_embed holds it", low=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.pair.check_positions(self.token)

    @property
    def reach(self) -> Float[Tensor, "layer pair"]:
        """The derivative times the length of the source's embedding."""
        return self.derivative * self.embed_norm

    @property
    def share(self) -> Float[Tensor, "layer pair"]:
        """Each source's part of the reach of its query."""
        of_query = self._query_of()
        total = torch.zeros(len(self.layer), int(of_query.max()) + 1).index_add(1, of_query, self.reach)
        return self.reach / total[:, of_query].clamp(min=1e-30)

    def square(self, prompt: int) -> Float[Tensor, "layer query key"]:
        """The shares of one prompt, 0 where a query cannot depend on a source."""
        self.token.rows(prompt)  # says it if there is no such prompt
        return next(share for number, _, share, _, _ in self._prompts() if number == prompt).float()

    def by_layer(self) -> pd.DataFrame:
        """Width, distance, own, first and early share by layer: the mean over prompts, its interval, its even value.

        `ratio` is the mean of each prompt's value over its even value: longer prompts have larger both. Means over the
        queries of a prompt that have two sources or more, special tokens left out. The 95 % intervals are
        Student's t over prompts.
        """
        frames = []
        values, even = self._summaries()
        for name, of_prompts, of_even in zip(SUMMARIES, values, even, strict=True):
            n = of_prompts.shape[1]
            low, high = inference.mean_interval(of_prompts)
            ratio = of_prompts / of_even
            least, most = inference.mean_interval(ratio)
            columns = {
                "mean": of_prompts.mean(1),
                "low": low,
                "high": high,
                "even": of_even.mean(),
                "ratio": ratio.mean(1),
                "ratio_low": least,
                "ratio_high": most,
                "prompts": n,
            }
            frames.append(pd.DataFrame({"layer": self.layer, "summary": name, **columns}))
        return pd.concat(frames, ignore_index=True)

    def by_source(self) -> pd.DataFrame:
        """A row a layer and source position: what it is to all queries together, beside what the mask alone gives.

        `total` sums the shares over queries, `even` is its value at even shares, `ratio` their quotient; `reach` is the
        mean reach over those queries, over the mean of that over the prompt's sources (1 if every source reaches as
        far: a source's total is then T - s, up to a factor). Means over prompts; the 95 % intervals of `ratio` and
        `reach` are Student's t over prompts. Special tokens are left out, as queries and as sources.
        """
        found: dict[int, list[tuple[list[int], np.ndarray]]] = {}
        for _, tokens, share, reach, may in self._prompts():
            asks = ~tokens.special
            may = may & asks[:, None]
            even = (may / may.sum(1, keepdim=True).clamp(min=1)).sum(0)
            total = (share * asks[:, None]).sum(1)
            mean_reach = (reach * asks[:, None]).sum(1) / may.sum(0).clamp(min=1)
            mean_reach = mean_reach / mean_reach[:, asks].mean(1, keepdim=True)
            columns = torch.stack([total, even.expand_as(total), total / even, mean_reach])
            for source in asks.nonzero().flatten().tolist():
                found.setdefault(source, []).append((tokens.id.tolist(), columns[:, :, source].numpy()))
        if not found:
            raise ValueError("there are special tokens only here, which are left out: pass text")
        rows = []
        for source, of_prompts in sorted(found.items()):
            total, even, ratio, reach = np.stack([each for _, each in sorted(of_prompts, key=lambda p: p[0])], axis=-1)
            low, high = inference.mean_interval(ratio)
            reach_low, reach_high = inference.mean_interval(reach)
            columns = {"total": total.mean(1), "even": even.mean(1), "ratio": ratio.mean(1), "low": low, "high": high}
            columns |= {"reach": reach.mean(1), "reach_low": reach_low, "reach_high": reach_high}
            place = {"layer": self.layer, "source": source}
            rows.append(pd.DataFrame({**place, **columns, "prompts": len(of_prompts)}))
        return pd.concat(rows, ignore_index=True)

    def compare_with(self, other: "PositionReachResult") -> pd.DataFrame:
        """This model and another (an untrained one) on the same prompts: the difference of every summary by layer.

        Its interval is Student's t over prompts; p swaps the two models at random, prompt by prompt; q is over layers.
        """
        if not isinstance(other, PositionReachResult):
            raise TypeError(f"a PositionReachResult is compared with another; {type(other).__name__} came")
        if self.layer != other.layer or self.token.prompt.tolist() != other.token.prompt.tolist():
            raise ValueError("two results are compared on the same prompts and layers, and these have other ones")
        if self.token.id.tolist() != other.token.id.tolist():
            raise ValueError("two results are compared on the same prompts, and these have other token ids")
        if self.provenance.probe != other.provenance.probe:  # noise of other projections looks like narrower reach
            raise ValueError(
                f"two models are compared by the same experiment, and {self.provenance.probe} and "
                f"{other.provenance.probe} came"
            )
        frames = []
        for name, own, others in zip(SUMMARIES, self._summaries()[0], other._summaries()[0], strict=True):
            low, high = inference.mean_interval(own - others)
            p = inference.sign_flip_p(own - others)
            columns = {"mean": own.mean(1), "other": others.mean(1), "difference": (own - others).mean(1)}
            tested = {"low": low, "high": high, "p": p, "q": inference.false_discovery(p), "prompts": own.shape[1]}
            frames.append(pd.DataFrame({"layer": self.layer, "summary": name, **columns, **tested}))
        frame = pd.concat(frames, ignore_index=True)
        frame.attrs["null"] = NULL
        return frame

    def _prompts(self) -> Iterator[tuple[int, Tokens, Tensor, Tensor, Tensor]]:
        """Each prompt with its shares and reaches [layer query source], and which of them there are."""
        every_share, every_reach = self.share.double(), self.reach.double()
        for number, tokens in self.token.by_prompt():
            own, n = self.pair.prompt == number, len(tokens)
            place = self.pair.query[own], self.pair.key[own]
            share, reach = torch.zeros(2, len(self.layer), n, n, dtype=torch.float64)
            share[:, *place], reach[:, *place] = every_share[:, own], every_reach[:, own]
            may = torch.zeros(n, n, dtype=torch.bool)
            may[place] = True
            yield number, tokens, share, reach, may

    def _summaries(self) -> tuple[Float[np.ndarray, "summary layer prompt"], Float[np.ndarray, "summary prompt"]]:
        """Every summary of every prompt, prompts in the order of their ids, and its value at even shares."""
        found, evens, asked = [], [], []
        for number, tokens, share, _, may in self._prompts():
            asks = ~tokens.special & (may.sum(1) > 1)
            if not asks.any():
                continue
            even = may / may.sum(1, keepdim=True)
            found.append(summaries(share, may)[:, :, asks].mean(-1))
            evens.append(summaries(even[None].double(), may)[:, 0, asks].mean(-1))
            asked.append(number)
        if not found:
            raise ValueError("no token here depends on two sources or more: pass prompts of two tokens or more")
        order = inference.prompt_order(self.token[torch.isin(self.token.prompt, torch.tensor(asked))])
        return torch.stack(found, dim=-1)[..., order].numpy(), torch.stack(evens, dim=-1)[..., order].numpy()

    def figure(self) -> go.Figure:
        """Width, distance, own and early share by layer, each over what even shares would give."""
        table = self.by_layer()
        titles = {
            "width": "effective width / even",
            "distance": "mean distance / even",
            "own": "share of the token itself / even",
            "early": "share of the first half / even",
        }
        panels = {}
        for name, title in titles.items():
            rows = table[table["summary"] == name]
            mean, low, high = (list(rows[each]) for each in ("ratio", "ratio_low", "ratio_high"))
            line = figures.Line("mean over prompts", mean, low, high, figures.CHOSEN)
            even = figures.Line("even over all sources", [1.0] * len(mean), colour=figures.GREY, dashed=True)
            panels[title] = [line, even]
        return figures.lines(
            panels, self.layer, title=f"How far back do states depend?\n{self.provenance.describe()}", x_title="state"
        )

    def figure_prompt(self, layer: int, prompt: int = 0) -> go.Figure:
        """The share of every source in every query of a prompt, at one layer."""
        texts = [figures.visible(self.token.text[row], 14) for row in self.token.rows(prompt)]
        label = f"{layer}_post"
        if label not in self.layer:
            raise ValueError(f"layer {layer} was asked for and this result has {', '.join(self.layer)}")
        return figures.squares(
            [(label, self.square(prompt)[self.layer.index(label)].tolist())],
            x=texts,
            y=texts,
            title=f"What does each state of prompt {prompt} depend on?\n{self.provenance.describe()}",
            x_title="source",
            y_title="query",
            colour_title="share of reach",
        )

    def _query_of(self) -> Tensor:
        longest = int(self.pair.query.max()) + 1
        return torch.unique(self.pair.prompt * longest + self.pair.query, return_inverse=True)[1]


class PositionReach(Experiment[PositionReachResult]):
    """How much the state of each token after a layer depends on each token of its prompt.

    `projections` is the number of random directions; the relative error falls with its root, and its noise makes shares
    a little less even than they are. Interrupted, it gives the prompts done so far.

    >>> import lens_probes as lp
    >>> result = lp.PositionReach(projections=4).run(lp.tiny.bridge(), "Time flies like an arrow.", progress=False)
    >>> result.layer, bool((result.square(0).sum(-1) - 1).abs().max() < 1e-5)
    (('0_post', '1_post', '2_post'), True)
    """

    projections: int = 8
    layers: Layers = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.projections < 2:
            raise ValueError(f"PositionReach(projections=...) is 2 or more, for an error; {self.projections} came")

    def run(self, model: Any, prompts: Prompts, *, progress: bool = True) -> PositionReachResult:
        """A prompt at a time."""
        view = ModelView(model)
        tokens = tokenize(prompts, view)
        layers = view.layers(self.layers)
        hooks = [view.hook("resid_post", layer) for layer in layers]
        parts: list[tuple[PairTable, Tensor, Tensor, Tensor]] = []
        every = list(tokens.by_prompt())
        try:
            for number, own in tqdm(every, desc="reaching", unit="prompt", disable=not progress or len(every) < 2):
                parts.append(self._of_prompt(view, own, hooks, number))
        except KeyboardInterrupt:
            if not parts:
                raise
            tqdm.write(f"interrupted after {len(parts)} of {len(every)} prompts")
        done = tokens[tokens.prompt <= every[len(parts) - 1][0]]
        pairs, derivatives, errors, lengths = zip(*parts, strict=True)
        return PositionReachResult(
            layer=tuple(view.label("resid_post", layer) for layer in layers),
            token=done,
            pair=concatenate(pairs, [0] * len(pairs)),
            derivative=torch.cat(derivatives, dim=1),
            error=torch.cat(errors, dim=1),
            embed_norm=torch.cat(lengths),
            provenance=provenance(self, view, view.W_E.dtype, [view.hook_token_embed, *hooks], done),
        )

    def _of_prompt(
        self, view: ModelView, tokens: Tokens, hooks: Sequence[str], number: int
    ) -> tuple[PairTable, Tensor, Tensor, Tensor]:
        """Pairs, derivatives with their errors, and the lengths of the sources' embeddings."""
        n = len(tokens)
        everything = torch.ones(n, n, dtype=torch.bool)
        query, source = (everything if view.encoder else everything.tril()).nonzero(as_tuple=True)
        random = torch.Generator().manual_seed(zlib.crc32(tokens.id.numpy().tobytes(), self.seed) % 2**32)
        directions = torch.randn(self.projections, len(hooks), n, view.d_model, generator=random)
        squares = torch.zeros(self.projections, len(hooks), n, n)
        for some in torch.arange(n).split(max(1, TOKENS_PER_BATCH // n)):
            squares[:, :, some] = squared_gradients(view, tokens.id, some, hooks, directions[:, :, some])
        norm = finite("derivative", squares.mean(0).sqrt())
        spread = squares.std(0) / self.projections**0.5  # of the square; the root's error is that over twice the root
        error = spread / (2 * norm.clamp(min=1e-30))
        length = view.token_embeddings[tokens.id.to(view.device)].float().norm(dim=-1).cpu()
        pair = PairTable(torch.full_like(query, number), query, source)
        return pair, norm[:, query, source], torch.where(norm > 0, error, 0)[:, query, source], length[source]


def squared_gradients(
    view: ModelView,
    ids: Tensor,
    queries: Tensor,
    hooks: Sequence[str],
    directions: Float[Tensor, "projection layer query d_model"],
) -> Float[Tensor, "projection layer query key"]:
    """|v J|^2 of these queries for every source, each query in a copy of its prompt of its own."""
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
    share: Float[Tensor, "layer query key"], may: Bool[Tensor, "query key"]
) -> Float[Tensor, "summary layer query"]:
    """Effective width, mean distance, and the shares of the token itself, of the first and of the first half.

    `may` tells which sources a query has; the middle one of an odd number counts half.

    >>> shares = torch.tensor([[[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.5, 0.25, 0.25]]])
    >>> summaries(shares, torch.ones(3, 3, dtype=torch.bool).tril())[:, 0, 2]
    tensor([2.8284, 1.2500, 0.2500, 0.5000, 0.6250])
    """
    place = torch.arange(share.shape[-1])
    apart = (place[:, None] - place).abs().to(share.dtype)
    width = torch.special.entr(share).sum(-1).exp()
    half = (may.sum(-1, keepdim=True) / 2 - (may.cumsum(-1) - 1)).clamp(0, 1).to(share.dtype)
    own, first, early = share.diagonal(dim1=-2, dim2=-1), share[..., 0], (share * half).sum(-1)
    return torch.stack([width, (share * apart).sum(-1), own, first, early])
