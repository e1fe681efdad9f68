"""MassiveActivations: do a few coordinates of a state outgrow all others, and does attention go to such tokens?

    largest[layer, token]  = max over d of |h[d]|, h the state before the layer               units of h, 0 or more
    ratio[layer, token]    = largest / median over d of |h[d]|                                1 or more
    received[layer, token] = mean over heads and over the other queries that may attend to the token, of their weight
                             on it                                                            0 to 1

`dimension` is where the largest coordinate stands. The null of `ratio` is a state of the same width in a random
direction, seeded by the prompt and the position; that of `received` is uniform attention. A state is called massive
where `ratio` is at least `threshold` (the source: 1,000, and a value above 100, which depends on a model's units).
Special tokens count: a first token is often the massive one, and the sink of attention.

It takes one forward pass that keeps attention patterns.

Source: Sun et al. 2024, "Massive Activations in Large Language Models", arXiv 2402.17762; for sinks Xiao et al. 2023,
arXiv 2309.17453.
"""

from typing import Unpack

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lens_probes import figures
from lens_probes.maths import inference
from lens_probes.maths.ascent import seeded
from lens_probes.messages import amount, interval
from lens_probes.model import ModelView
from lens_probes.probe import Probe
from lens_probes.reading import Reading
from lens_probes.result import LayerTokenResult, comparison, measured
from lens_probes.settings import Layers, Rate, Seed

NULL = "massive tokens receive as much attention as the other tokens of their prompt"


class MassiveActivationsResult(LayerTokenResult):
    """The largest coordinate of every state, and the attention that its token receives."""

    threshold: float
    unit: tuple[str, ...]
    ratio: Float[Tensor, "layer token"] = measured(
        "largest coordinate over the median one, in size", low=1, logarithmic=True, null="random_ratio"
    )
    random_ratio: Float[Tensor, "layer token"] = measured("the same of a random direction", low=1, logarithmic=True)
    largest: Float[Tensor, "layer token"] = measured("size of the largest coordinate", low=0, logarithmic=True)
    dimension: Int[Tensor, "layer token"] = measured("dimension of the largest coordinate", low=0, into="unit")
    received: Float[Tensor, "layer token"] = measured(
        "mean attention weight that other queries give to the token", low=0, high=1, null="uniform"
    )
    uniform: Float[Tensor, "layer token"] = measured("the same under uniform attention", low=0, high=1)

    def massive(self) -> Bool[Tensor, "layer token"]:
        """Which states have a ratio of `threshold` or more."""
        return self.ratio >= self.threshold

    def table(self) -> pd.DataFrame:
        """One row per layer: `effect` is the attention that massive tokens receive minus that of the others.

        Both are beyond uniform attention and means over the tokens of a prompt. The 95 % interval is Student's t over
        the `prompts` that have both; p swaps the two of a prompt at random. `massive` is the number of massive tokens,
        `first` the share of them that stand first, `dimension` the most frequent dimension among them and
        `of_dimension` its share, `others` the median ratio of all other tokens.
        """
        massive, first = self.massive().numpy(), (self.token.position.numpy() == 0).astype(float)
        differences = self._differences()
        rows = [differences[at][None, ~np.isnan(differences[at])] for at in range(len(self.layer))]
        bounds = [inference.mean_interval(each) for each in rows]
        dimensions = [self.dimension[at][torch.from_numpy(own)] for at, own in enumerate(massive)]
        modes = [each.mode().values if len(each) else None for each in dimensions]
        return comparison(
            pd.DataFrame({"layer": list(self.layer)}),
            effect=[_mean(each) for each in rows],
            low=[float(low[0]) for low, _ in bounds],
            high=[float(high[0]) for _, high in bounds],
            p=np.array([inference.sign_flip_p(each)[0] if each.size else np.nan for each in rows]),
            says="attention received by massive tokens minus others, beyond uniform",
            null=NULL,
            massive=massive.sum(1),
            first=[_mean(first[own]) for own in massive],
            dimension=["" if mode is None else self.unit[int(mode)] for mode in modes],
            of_dimension=[
                np.nan if mode is None else float((each == mode).double().mean())
                for each, mode in zip(dimensions, modes, strict=True)
            ],
            others=[
                float(np.median(own[~at])) if (~at).any() else np.nan
                for own, at in zip(self.ratio.numpy(), massive, strict=True)
            ],
            prompts=[each.shape[1] for each in rows],
        )

    def findings(self) -> list[str]:
        """The layer with the most massive tokens, and what attention does there; and words of two classes compared."""
        table = self.table()
        row = table.iloc[int(table["massive"].to_numpy().argmax())].to_dict()
        if not row["massive"]:
            most, at_random = float(self.ratio.max()), float(self.random_ratio.max())
            return [
                f"No state is massive: the largest coordinate is at most {most:,.0f} times the median one (in random "
                f"directions {at_random:.1f}; the threshold is {self.threshold:,.0f}).",
                *super().findings(),
            ]
        return [
            f"Before layer {row['layer']}, {amount(row['massive'], 'token')} of {len(self.token):,} are massive "
            f"({row['of_dimension']:.0%} in dimension {row['dimension']}; {row['first']:.0%} stand first). They "
            f"receive {row['effect']:.2f} more attention than the others, beyond uniform attention "
            f"({interval(row['low'], row['high'])}; {amount(row['prompts'], 'prompt')} with both). The null: {NULL}.",
            *super().findings(),
        ]

    def figure(self, **look: Unpack[figures.Look]) -> go.Figure:
        """The largest ratio by layer beside a random direction, and the attention that massive tokens receive."""
        massive = self.massive()
        received = {
            name: [_mean(row[at].numpy()) for row, at in zip(self.received, where, strict=True)]
            for name, where in (("massive tokens", massive), ("all other tokens", ~massive))
        }
        panels = {
            self.quantity("ratio").title: [
                figures.Line("largest of all tokens", self.ratio.amax(1).tolist(), colour=figures.CHOSEN),
                figures.Line("median token", self.ratio.median(1).values.tolist(), colour=figures.GREY),
                figures.Line("largest of random directions", self.random_ratio.amax(1).tolist(), dashed=True),
            ],
            "attention received (0 to 1)": [
                figures.Line(name, line, colour=colour)
                for (name, line), colour in zip(received.items(), (figures.CHOSEN, figures.GREY), strict=True)
                if not np.isnan(line).all()  # where no token is massive
            ],
        }
        return figures.lines(
            panels,
            self.layer,
            title=self.title("Massive activations, and the attention that their tokens receive"),
            x_title="layer",
            logarithmic=[self.quantity("ratio").title],
            **look,
        )

    def conditions(self) -> str:
        """What counts as massive."""
        return f"massive: ratio {self.threshold:,.0f} or more"

    def _differences(self) -> Float[np.ndarray, "layer prompt"]:
        """What massive tokens of a prompt receive minus what its others do; NaN where it lacks either."""
        excess = (self.received - self.uniform).double().numpy()
        massive, known, prompt = self.massive().numpy(), ~np.isnan(excess), self.token.prompt.numpy()
        columns = []
        for own in (prompt == number for number in np.unique(prompt)):
            columns.append(
                [_mean(e[own & k & m]) - _mean(e[own & k & ~m]) for e, k, m in zip(excess, known, massive, strict=True)]
            )
        return np.array(columns).T


class MassiveActivations(Probe[MassiveActivationsResult]):
    """The largest coordinate of every state before a layer, and the attention that its token receives in that layer.

    >>> import lens_probes as lp
    >>> result = lp.MassiveActivations().run(lp.tiny.bridge(), "Time flies like an arrow.")
    >>> tuple(result.ratio.shape), bool((result.ratio >= 1).all())
    ((3, 18), True)
    """

    threshold: Rate = 1000.0
    seed: Seed = 0
    layers: Layers = None

    def hooks(self, model: ModelView) -> list[str]:
        """The state before every layer, and the attention patterns of the layer."""
        layers = model.layers(self.layers)
        return [hook for layer in layers for hook in (model.hook("resid_pre", layer), model.hook_pattern(layer))]

    def measure(self, reading: Reading) -> MassiveActivationsResult:
        """Prompt by prompt, for patterns are square."""
        model, layers = reading.model, reading.model.layers(self.layers)
        received, uniform = [], []
        for one in reading.by_prompt():
            patterns = [one.pattern(model.hook_pattern(layer)).float() for layer in layers]
            allowed = [model.seen(layer, one.tokens.id, own) for layer, own in zip(layers, patterns, strict=True)]
            received.append(
                torch.stack([received_of(own.mean(0), may) for own, may in zip(patterns, allowed, strict=True)])
            )
            uniform.append(torch.stack([received_of(may / may.sum(1, keepdim=True), may) for may in allowed]))
        states = reading.stack(model.hook("resid_pre", layer) for layer in layers)
        largest, dimension, ratio = peaks(states)
        return self.result(
            reading,
            layer=tuple(map(str, layers)),
            unit=tuple(f"D{unit}" for unit in range(model.d_model)),
            ratio=ratio.cpu(),
            random_ratio=peaks(self._random(reading))[2].expand(len(layers), -1),
            largest=largest.cpu(),
            dimension=dimension.cpu(),
            received=torch.cat(received, dim=1).cpu(),
            uniform=torch.cat(uniform, dim=1).cpu(),
        )

    def _random(self, reading: Reading) -> Float[Tensor, "token d_model"]:
        """A random direction per token."""
        width, drawn = reading.model.d_model, []
        for _, own in reading.tokens.by_prompt():
            drawn.append(torch.randn(len(own), width, generator=seeded(f"{own.id.tolist()}", self.seed)))
        return torch.cat(drawn)


def peaks(
    states: Float[Tensor, "... d_model"],
) -> tuple[Float[Tensor, "..."], Int[Tensor, "..."], Float[Tensor, "..."]]:
    """The size of the largest coordinate, where it stands, and its ratio to the median size.

    >>> [each.tolist() for each in peaks(torch.tensor([1.0, -8.0, 2.0]))]
    [8.0, 1, 4.0]
    """
    sizes = states.abs()
    largest, dimension = sizes.max(dim=-1)
    return largest, dimension, largest / sizes.median(dim=-1).values


def received_of(weight: Float[Tensor, "query key"], allowed: Bool[Tensor, "query key"]) -> Float[Tensor, " key"]:
    """The mean weight on each key over the other queries that may attend to it; NaN if there are none.

    >>> causal = torch.ones(3, 3, dtype=torch.bool).tril()
    >>> received_of(torch.tensor([[1.0, 0, 0], [0.5, 0.5, 0], [0.75, 0.25, 0]]), causal).tolist()
    [0.625, 0.25, nan]
    """
    others = allowed & ~torch.eye(len(allowed), dtype=torch.bool, device=allowed.device)
    return (weight * others).sum(0) / others.sum(0)


def _mean(values: Float[np.ndarray, "..."]) -> float:
    """The mean of the known values, NaN without any."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else np.nan
