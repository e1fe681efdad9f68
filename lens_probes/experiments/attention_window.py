"""AttentionWindow: how far back must a head look?

In some heads, each query may attend to the last r tokens only, itself included, with and without the first token of its
prompt (often an attention sink). The null gives the same queries as many random tokens of those that they can see:

    keys[query]            = {key : query - key < r}, with or without the first token
    loss[radius, prompt]   = mean -log p(next token) of the prompt                                   nats
    increase[radius]       = mean over prompts of (loss - loss without a window)                     nats
    needed                 = the smallest r from which on the increase is at most epsilon

Scores of all other keys are masked, before the softmax. Positions stay as they are, and so does a window of the model's
own. With a window in all layers, a token still depends on earlier ones through the layers between: on r - 1 more per
layer. Short prompts need short windows: give prompts that are as long as the context you ask about.

Every run proves that the model obeys the masks: heads must put out the softmax of the masked scores, times the values.

Source: Beltagy et al. 2020, "Longformer", arXiv 2004.05150, for windows; Xiao et al. 2023, "Efficient Streaming
Language Models with Attention Sinks", arXiv 2309.17453, for the first token.
"""

import re
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Annotated, Any, Literal, Unpack

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from lens_probes import figures
from lens_probes.maths import inference
from lens_probes.maths.ascent import seeded
from lens_probes.messages import amount, brief
from lens_probes.model import ModelView
from lens_probes.model.masking import Masking
from lens_probes.probe import Study, TextExperiment
from lens_probes.reading import Edits, batch_loss, batches, pad, prompt_loss
from lens_probes.result import Result, derived, measured, paired
from lens_probes.settings import Allowed, Layers, Rate, Seed, described
from lens_probes.text.prompts import PromptTable, Tokens, prompt_table

Heads = Mapping[int, Sequence[int] | None]
"""The heads of some layers; None for all of a layer."""
Pairs = Bool[Tensor, "prompt query key"]
Radii = Annotated[
    Sequence[int] | None,
    Allowed(
        "a list of whole numbers, 1 or more, in ascending order, or None",
        lambda value: value is None or (len(value) > 0 and value[0] >= 1 and list(value) == sorted(set(value))),
    ),
]
FIRST = ("masked", "kept")  # the first token of a prompt, where it is before the window
NULL = "the last tokens are worth no more than as many random ones"


class AttentionWindowResult(Result):
    """The loss of every prompt with a window at every place, and with as many random tokens."""

    headline = "increase"
    first_token: tuple[str, ...]
    place: tuple[str, ...]
    radius: tuple[str, ...]
    epsilon: float
    prompt: PromptTable
    loss: Float[Tensor, " prompt"] = measured("loss without a window", unit="nats", low=0)
    windowed: Float[Tensor, "first_token place radius prompt"] = measured(
        "loss with the last tokens only", unit="nats", low=0, null="random"
    )
    random: Float[Tensor, "first_token place radius prompt"] = measured(
        "loss with as many random tokens", unit="nats", low=0
    )

    @derived("increase of the loss by a window", unit="nats", null="random_increase")
    def increase(self) -> Float[Tensor, "first_token place radius"]:
        """The increase of the loss with the last tokens only, as the mean over prompts."""
        return (self.windowed - self.loss).mean(-1)

    @derived("increase of the loss with as many random tokens", unit="nats")
    def random_increase(self) -> Float[Tensor, "first_token place radius"]:
        """The increase of the loss with as many random tokens, as the mean over prompts."""
        return (self.random - self.loss).mean(-1)

    def table(self) -> pd.DataFrame:
        """One row per window: `effect` is its loss minus that with as many random tokens, with interval, p and q.

        `increase` is its loss minus that without a window, from `increase_low` to `increase_high`; `random` the same of
        random tokens. The 95 % intervals are Student's t over prompts, p is two-sided, from swapping the two losses of
        a prompt at random. The null is in `attrs["null"]`.
        """
        windowed, random = (values.reshape(-1, len(self.prompt)) for values in self._increases())
        low, high = inference.mean_interval(windowed)
        return paired(
            self.cells("first_token", "place", "radius"),
            windowed - random,
            says="loss minus that with random tokens (nats)",
            null=NULL,
            increase=windowed.mean(1),
            increase_low=low,
            increase_high=high,
            random=random.mean(1),
            prompts=windowed.shape[1],
        )

    def needed(self, epsilon: int | float | None = None) -> pd.DataFrame:
        """One row per place: the smallest `radius` from which on the loss increases by at most `epsilon` nats.

        `low` and `high` are the same of the bounds of the 95 % intervals of the increase: at `high` and beyond, even
        the upper bound is at most `epsilon`. `random` is the same of as many random tokens, the null. NA where no
        radius of this run is enough, and without intervals (fewer than five prompts).
        """
        epsilon = self.epsilon if epsilon is None else epsilon
        if not isinstance(epsilon, int | float) or not 0 < epsilon < np.inf:
            raise ValueError(f"epsilon must be a number above 0, in nats; got {brief(epsilon)}")
        windowed, random = (values.reshape(-1, len(self.prompt)) for values in self._increases())
        low, high = inference.mean_interval(windowed)
        columns = {"radius": windowed.mean(1), "low": low, "high": high, "random": random.mean(1)}
        radii, frame = [int(radius) for radius in self.radius], self.cells("first_token", "place")
        for name, increase in columns.items():
            rows = increase.reshape(len(frame), len(radii)) <= epsilon
            frame[name] = pd.array([_from_on(enough, radii) for enough in rows], "Int64")
        return frame.assign(epsilon=epsilon, loss=float(self.loss.mean()), prompts=len(self.prompt))

    def _increases(self) -> list[Float[np.ndarray, "first_token place radius prompt"]]:
        """Windowed and random losses minus those without a window, prompts sorted by their texts."""
        by_text = np.argsort(np.asarray(self.prompt.text), kind="stable")  # so that the order of prompts changes no sum
        return [(loss - self.loss).double().numpy()[..., by_text] for loss in (self.windowed, self.random)]

    def figure(self, place: str | None = None, **look: Unpack[figures.Look]) -> go.Figure:
        """The increase of the loss by radius at one place (the last), without and with the first token.

        Bands are 95 % intervals; dashed, as many random tokens; grey, epsilon.
        """
        at = len(self.place) - 1 if place is None else self.index_of("place", place)
        panels, table = {}, self.table()
        table = table[table["place"] == self.place[at]]
        for first in self.first_token:
            rows = table[table["first_token"] == first]
            own, low, high, random = (
                list(rows[name]) for name in ("increase", "increase_low", "increase_high", "random")
            )
            panels[f"increase of the loss (nats), first token {first}"] = [
                figures.Line("last tokens", own, low, high, figures.CHOSEN),
                figures.Line("as many random tokens", random, colour=figures.CHOSEN, dashed=True),
                figures.Line(f"epsilon, {self.epsilon:g}", [self.epsilon] * len(own), colour=figures.GREY, dashed=True),
            ]
        return figures.lines(
            panels,
            self.radius,
            title=self.title(f"Increase of the loss with an attention window in {self.place[at]}"),
            x_title="tokens in the window",
            **look,
        )

    def figure_places(self, **look: Unpack[figures.Look]) -> go.Figure:
        """The increase of the loss by place and radius, without and with the first token."""
        return figures.small_grids(
            [(f"first token {first}", self.increase[i].tolist()) for i, first in enumerate(self.first_token)],
            x=self.radius,
            y=self.place,
            title=self.title("Increase of the loss with an attention window"),
            x_title="tokens in the window",
            y_title="place of the window",
            colour_title=self.quantity("increase").title,
            signed=True,
            **look,
        )


class AttentionWindow(TextExperiment[AttentionWindowResult]):
    """Let heads look at the last r tokens only, for growing r: 1 + 4 x radii x places passes over the prompts.

    A pass takes about 1.2 times as long as a bare one.

    `at`: all heads together, or each `layer` or each `head` in turn and then all together. `layers` or `heads` (such as
    ["L3H1"]): which of them have a window; by default all. `radii`: by default 1, 2, 4, ... and the longest prompt.
    `epsilon`: what `needed()` allows the loss to increase, in nats per token. After an interrupt the result holds the
    radii done so far.

    >>> import lens_probes as lp
    >>> texts = lp.demo.sentences()[:6]
    >>> result = lp.AttentionWindow(at="layer", layers=[0, 2]).run(lp.tiny.bridge("llama"), texts, progress=False)
    >>> result.needed().query("place == 'L0'")[["first_token", "radius", "low", "high", "random"]]
      first_token  radius  low  high  random
    0      masked      16    4    32      16
    3        kept       8    1    32      16
    """

    at: Literal["all", "layer", "head"] = "all"
    radii: Radii = None
    layers: Layers = None
    heads: Annotated[Sequence[str] | None, described('a list of heads such as ["L3H1"], or None')] = None
    epsilon: Rate = 0.05
    seed: Seed = 0

    def perform(self, study: Study) -> AttentionWindowResult:
        """Radius by radius."""
        view, tokens = study.view, study.tokens
        view.check_predicts_next()
        places, radii = self._places(view), self._radii(tokens)
        masking = Masking(view, sorted({layer for heads in places.values() for layer in heads}))
        loss, parts = prompt_loss(view, tokens), batches(tokens)

        def losses(radius: int) -> Float[Tensor, "way prompt"]:
            ways = product((False, True), FIRST, places.values())
            return torch.stack(
                [
                    torch.cat([batch_loss(view, part, self._edits(masking, part, radius, *way)) for part in parts])
                    for way in ways
                ]
            )

        done = study.each(losses, radii, doing="masking", unit="radius")
        windowed, random = rearrange(
            done, "radius (random first place) prompt -> random first place radius prompt", random=2, first=len(FIRST)
        )
        return AttentionWindowResult(
            first_token=FIRST,
            place=tuple(places),
            radius=tuple(map(str, radii[: len(done)])),
            epsilon=float(self.epsilon),
            prompt=prompt_table(tokens),
            loss=loss,
            windowed=windowed,
            random=random,
            provenance=study.provenance(masking.hooks),
        )

    def _edits(
        self, masking: Masking, part: Tokens, radius: int, random: bool, first_token: str, heads: Heads
    ) -> Edits:
        """The edits of one batch: a window in these heads, or as many random tokens."""
        _, mask = pad(part, masking.view)
        always = (mask.cumsum(1) == 1) & mask & (first_token == "kept")
        edits: Edits = {}
        for layer, some in heads.items():

            def keep(may: Pairs, layer: int = layer) -> Pairs:
                order = self._order(part, mask, layer).to(may.device) if random else None
                return kept(may, radius, always.to(may.device), order)

            edits = {**edits, **masking.edit(layer, some, keep)}
        return edits

    def _order(
        self, part: Tokens, mask: Bool[Tensor, "prompt position"], layer: int
    ) -> Float[Tensor, "prompt query key"]:
        """Random numbers by which keys are chosen, the same for every radius."""
        order = torch.zeros(*mask.shape, mask.shape[1])
        for row, (valid, (_, own)) in enumerate(zip(mask, part.by_prompt(), strict=True)):
            drawn = torch.rand(len(own), len(own), generator=seeded(f"{layer} {own.id.tolist()}", self.seed))
            order[row, valid.nonzero(), valid.nonzero().T] = drawn
        return order

    def _radii(self, tokens: Tokens) -> list[int]:
        """The radii of this run."""
        if self.radii is not None:
            return list(self.radii)
        longest = max(len(own) for _, own in tokens.by_prompt())
        return [*(2**i for i in range((longest - 1).bit_length())), longest]

    def _places(self, view: ModelView) -> dict[str, Heads]:
        """The heads of every place by its label: each layer or head in turn, if asked, and all of them."""
        if self.heads is not None and self.layers is not None:
            raise ValueError("AttentionWindow takes layers=... or heads=...; got both: heads name their layers")
        if self.heads is None:
            every: Heads = dict.fromkeys(view.layers(self.layers))
            label = "all layers" if self.layers is None else amount(len(every), "layer")
        else:
            every = heads_of(self.heads, view)
            label = amount(len(self.heads), "head")
        parts: dict[str, Heads] = {}
        if self.at == "layer":
            parts = {f"L{layer}": {layer: some} for layer, some in every.items()}
        if self.at == "head":
            numbers = range(view.n_heads)
            parts = {f"L{layer}H{head}": {layer: [head]} for layer in every for head in every[layer] or numbers}
        return parts if len(parts) == 1 else {**parts, label: every}


def heads_of(names: Sequence[str], view: ModelView) -> Heads:
    """The heads that names such as L3H1 mean, by layer."""
    found: dict[int, list[int]] = {}
    for name in names:
        numbers = re.fullmatch(r"L(\d+)H(\d+)", name)
        layer, head = map(int, numbers.groups()) if numbers else (-1, -1)
        if not (0 <= layer < view.n_layers and 0 <= head < view.n_heads):
            raise ValueError(
                f"heads must be names from L0H0 to L{view.n_layers - 1}H{view.n_heads - 1}, such as L1H0; got "
                f"{brief(name)}"
            )
        found.setdefault(layer, []).append(head)
    if not names or len(set(names)) < len(names):
        raise ValueError(f"heads must name one head or more, each once; got {brief(names)}: list each head once")
    return found


def kept(
    may: Pairs, radius: int, always: Bool[Tensor, "prompt key"], order: Float[Tensor, "prompt query key"] | None = None
) -> Pairs:
    """The keys that each query keeps: the last ones and those kept `always`; or, given an order, as many in that order.

    Of random keys, those kept always come first. A query keeps none that it may not attend to.

    >>> causal, first = torch.ones(1, 4, 4, dtype=torch.bool).tril(), torch.tensor([[True, False, False, False]])
    >>> kept(causal, 2, first)[0].int()
    tensor([[1, 0, 0, 0],
            [1, 1, 0, 0],
            [1, 1, 1, 0],
            [1, 0, 1, 1]], dtype=torch.int32)
    """
    place = torch.arange(may.shape[-1], device=may.device)
    keep = may & ((place[:, None] - place < radius) | always[:, None])
    if order is None:
        return keep
    drawn = (order + always[:, None]).masked_fill(~may, -1).argsort(dim=-1, descending=True).argsort(dim=-1)
    return may & (drawn < keep.sum(-1, keepdim=True))


def _from_on(enough: Bool[np.ndarray, " radius"], radii: Sequence[int]) -> Any:
    """The smallest radius from which on all are enough; NA if the last one is not.

    >>> _from_on(np.array([True, False, True, True]), [1, 2, 4, 8]), _from_on(np.array([True, False]), [1, 2])
    (4, <NA>)
    """
    start = int(np.flatnonzero(~enough).max(initial=-1)) + 1
    return radii[start] if start < len(radii) else pd.NA
