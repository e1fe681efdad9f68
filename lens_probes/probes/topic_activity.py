"""TopicActivity: which heads, blocks and neurons are more or less active for one topic than for others?

The activations x of a unit over a prompt's tokens (and over the dimensions of a head or block) are summarised by five
statistics, per prompt, and per topic with equal weights of its prompts:

    mean = E[x]    std = sqrt(E[(x - mean)^2])    rms = sqrt(E[x^2])    positive = P(x > 0)    mean_abs = E[|x|]

Then each unit's values are standardised over prompts (minus their mean, divided by their standard deviation SD):

    share[layer, unit]       = variance between topics / variance between prompts                  0 to 1
    selectivity[layer, unit] = (share - its chance level) / (1 - its chance level)                 up to 1
    contrast[layer, unit]    = (mean of a topic - mean of the other topics' means) / SD            in SDs

The chance level of share is (topics - 1) / (prompts - 1). A unit that does not respond to topics has an expected
selectivity and contrast of 0. For p, topics are permuted among prompts. Topics may also differ in other ways: pass the
prompts' templates, lengths or last tokens (`result.prompt.n_tokens`, `.last_text`) as `groups` to compare values within
groups only. A baseline of the words alone is the same analysis of the embeddings (`component="embed"`, each dimension a
unit); a baseline of the architecture alone is that of `lp.untrained(model)`.

Source: readers of "Searching for Modularity in Large Language Models" (lesswrong.com, 2022) asked the question; the
statistics are from Pochinkov and Schoots 2024, arXiv 2403.01267.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple, Unpack, get_args

import pandas as pd
import plotly.graph_objects as go
import torch
from einops import einsum
from jaxtyping import Float, Float64, Int
from torch import Tensor

from lens_probes import figures
from lens_probes.maths import inference
from lens_probes.maths.topic_effects import contrast, selectivity, standardised
from lens_probes.maths.topics import TopicOrder, members
from lens_probes.messages import brief
from lens_probes.model import ModelView
from lens_probes.probe import Probe
from lens_probes.reading import Reading
from lens_probes.result import Quantity, TopicResult, derived, measured, summed
from lens_probes.result.topics import PERMUTED, Permuting, UnitEffect
from lens_probes.settings import Layers
from lens_probes.text.prompts import Pool, pooled, pooling, prompt_table

Component = Literal["head", "attn_out", "mlp_out", "neuron", "embed"]
Statistic = Literal["mean", "std", "rms", "positive", "mean_abs"]
STATISTICS = get_args(Statistic)
UNITS = {"head": ("H", "heads"), "neuron": ("N", "neurons"), "embed": ("d", "dimensions")}  # others: one per layer
NULL = f"a unit's activity does not depend on the topic; {PERMUTED}"


class TopicActivityResult(TopicResult):
    """Five statistics per prompt and unit, and sums by topic. Memory scales with the number of prompts."""

    headline = "mean"
    component: Component
    pool: Pool
    layer: tuple[str, ...]
    unit: tuple[str, ...]
    mean_sum: Float64[Tensor, "layer topic unit"] = summed("sum over a topic's prompts of E[x]")
    square_sum: Float64[Tensor, "layer topic unit"] = summed("sum over a topic's prompts of E[x^2]")
    positive_sum: Float64[Tensor, "layer topic unit"] = summed("sum over a topic's prompts of P(x > 0)")
    abs_sum: Float64[Tensor, "layer topic unit"] = summed("sum over a topic's prompts of E[|x|]")
    count: Float64[Tensor, " topic"] = summed("number of a topic's prompts")
    mean: Float[Tensor, "layer prompt unit"] | None = measured("mean activation", default=None)
    std: Float[Tensor, "layer prompt unit"] | None = measured(
        "standard deviation of the activation", low=0, default=None
    )
    positive: Float[Tensor, "layer prompt unit"] | None = measured(
        "share of activations above 0", low=0, high=1, default=None
    )
    mean_abs: Float[Tensor, "layer prompt unit"] | None = measured("mean absolute activation", low=0, default=None)

    @derived("root mean square of the activation", low=0)
    def rms(self) -> Float[Tensor, "layer prompt unit"] | None:
        """Root mean square of a prompt's activations; None without statistics per prompt."""
        return None if self.mean is None else self.of_prompts("rms")

    @derived("mean activation of a topic")
    def topic_mean(self) -> Float[Tensor, "layer topic unit"]:
        """E[x] of a topic, with equal weights of its prompts."""
        return self._per_prompt(self.mean_sum).float()

    @derived("standard deviation of the activation around the topic's mean", low=0)
    def topic_std(self) -> Float[Tensor, "layer topic unit"]:
        """Standard deviation of x around the topic's mean."""
        variance = self._per_prompt(self.square_sum) - self._per_prompt(self.mean_sum).square()
        return variance.clamp(min=0).sqrt().float()

    @derived("root mean square of a topic's activation", low=0)
    def topic_rms(self) -> Float[Tensor, "layer topic unit"]:
        """Root mean square of x over a topic."""
        return self._per_prompt(self.square_sum).sqrt().float()

    @derived("share of a topic's activations above 0", low=0, high=1)
    def topic_positive(self) -> Float[Tensor, "layer topic unit"]:
        """P(x > 0) of a topic."""
        return self._per_prompt(self.positive_sum).float()

    @derived("mean absolute activation of a topic", low=0)
    def topic_mean_abs(self) -> Float[Tensor, "layer topic unit"]:
        """E[|x|] of a topic."""
        return self._per_prompt(self.abs_sum).float()

    def _per_prompt(self, total: Float64[Tensor, "layer topic unit"]) -> Float64[Tensor, "layer topic unit"]:
        return total / self.count[:, None]

    def of_prompts(self, statistic: Statistic) -> Float[Tensor, "layer prompt unit"]:
        """One of the five statistics, per prompt."""
        if statistic not in STATISTICS:
            raise ValueError(f"statistic must be one of {', '.join(STATISTICS)}; got {brief(statistic)}")
        if self.mean is None or self.std is None:
            raise ValueError(
                "this needs statistics per prompt; got sums by topic only: run TopicActivity(keep_rows=True)"
            )
        return torch.hypot(self.mean, self.std) if statistic == "rms" else getattr(self, statistic)

    # Which units distinguish topics

    def contrast(self, *, statistic: Statistic = "mean_abs") -> Float[Tensor, "layer topic unit"]:
        """How much more active each unit is for a topic than for the others, in standard deviations over prompts."""
        order = self.by_topic()
        values, weights = self._standardised(statistic, order), order.members.float()
        found = torch.stack([contrast(values, weights, topic) for topic in range(len(self.topic))])
        return found.unflatten(1, (len(self.layer), len(self.unit))).transpose(0, 1)

    def selectivity(self, *, statistic: Statistic = "mean_abs", **how: Unpack[Permuting]) -> pd.DataFrame:
        """Per unit: the share of its variance between prompts that lies between topics, with interval, p, q and p_max.

        `groups`, one label per prompt (template, length, last token): values are compared with their group's mean, and
        whole cells of topic x group are permuted within groups. `permutations` (999), `seed` and `progress` are the
        other options. `p` is (b+1)/(m+1) of the absolute effect; `q` the false-discovery rate over units; `p_max` the p
        against the largest of all units in each permutation, the family-wise error rate. `null_mean` is the effect's
        mean over permutations. The 95 % interval resamples prompts within cells; there is none if a topic has fewer
        than five prompts or a cell one. See `lens_probes.maths.topics` for what a test of topics shows; the null is in
        `attrs["null"]`.
        """
        return self._tested(selectivity, f"selectivity of {statistic} for topics (at most 1)", statistic, **how)

    def most_active(
        self, topic: str, k: int = 10, *, statistic: Statistic = "mean_abs", **how: Unpack[Permuting]
    ) -> pd.DataFrame:
        """The k units with the largest contrast for a topic; `groups` to `progress` and columns: see `selectivity`."""
        table = self._contrasts(topic, statistic, **how)
        return table.sort_values("effect", ascending=False, kind="stable").head(k).reset_index(drop=True)

    def least_active(
        self, topic: str, k: int = 10, *, statistic: Statistic = "mean_abs", **how: Unpack[Permuting]
    ) -> pd.DataFrame:
        """The k units with the smallest contrast for a topic; `groups` to `progress` and columns: see `selectivity`."""
        table = self._contrasts(topic, statistic, **how)
        return table.sort_values("effect", kind="stable").head(k).reset_index(drop=True)

    def _contrasts(self, topic: str, statistic: Statistic, **how: Unpack[Permuting]) -> pd.DataFrame:
        number = self.topic_number(topic)
        says = f"contrast of {statistic} for {topic!r} (SDs over prompts)"

        def effect(values: Tensor, weights: Tensor) -> Tensor:
            return contrast(values, weights, number)

        return self._tested(effect, says, statistic, **how)

    def _tested(
        self,
        effect: UnitEffect,
        says: str,
        statistic: Statistic,
        *,
        groups: Sequence[str] | None = None,
        permutations: int = inference.PERMUTATIONS,
        seed: int = 0,
        progress: bool = True,
    ) -> pd.DataFrame:
        """The test of an effect on the standardised statistic."""
        order = self.by_topic(groups)
        return self.test_units(
            self._standardised(statistic, order),
            effect,
            order,
            permutations=permutations,
            seed=seed,
            progress=progress,
            says=says,
            null=NULL,
        )

    def _standardised(self, statistic: Statistic, order: TopicOrder) -> Float[Tensor, "prompt unit"]:
        """One standardised value per prompt and unit; prompts in this order, units of all layers laid end to end."""
        values = self.of_prompts(statistic)[:, order.order].transpose(0, 1).flatten(1)
        return standardised(values, torch.from_numpy(order.group_or_one))

    # Figures

    def figure(self, **look: Unpack[figures.Look]) -> go.Figure:
        """A grid of layers and units per topic, on one colour scale: the contrast with the other topics.

        A layer has more neurons than can be drawn: they are sorted from the highest to the lowest, anew in each panel,
        and thinned. Noise gives such a gradient too; only how far its ends reach is informative. A result with sums by
        topic only gives the ratio to the mean over topics instead; one without topics, how active the units are.
        """
        _, units = UNITS.get(self.component, ("", "layers" if len(self.unit) == 1 else "dimensions"))
        if len(self.topic) < 2:
            title = f"Mean absolute activation of {units}"
            return self.draw_topics(self.topic_mean_abs, Quantity("mean |x|", low=0), title, across=units, **look)
        title = f"{units.capitalize()} more active (blue) or less active (red) per topic"
        if self.mean_abs is None:
            ratio = (self.topic_mean_abs / self.topic_mean_abs.mean(1, keepdim=True)).log2().nan_to_num(0, 0, 0)
            quantity = Quantity("log2 of mean |x| over the mean of all topics")
            return self.draw_topics(ratio, quantity, title, across=units, **look)
        contrast = Quantity("contrast of mean |x|", "SDs over prompts")
        return self.draw_topics(self.contrast(), contrast, title, across=units, **look)

    def conditions(self) -> str:
        """Component and pooling."""
        return f"{self.component}, {pooled(self.pool)}"


class TopicActivity(Probe[TopicActivityResult]):
    """How active each unit is on each prompt, for prompts that have topics.

    `component`: heads (their mixed values), the output of attention or MLP (one unit per layer), single neurons, or the
    embeddings, each dimension a unit. `pool`: all tokens that are not special, the `last`, or a position.
    `keep_rows=False` keeps sums by topic only: memory does not depend on the number of prompts, and there are no tests.

    >>> import lens_probes as lp
    >>> topics = {"animals": ["The cat sat.", "A dog ran."], "food": ["The bread rose.", "A soup boiled."]}
    >>> result = lp.TopicActivity(component="neuron").run(lp.tiny.bridge(), topics)
    >>> tuple(result.mean_abs.shape), tuple(result.topic_rms.shape)
    ((3, 4, 128), (3, 2, 128))
    >>> list(result.most_active("food", k=2, permutations=9)["p"] >= 0.1)
    [True, True]
    """

    component: Component = "head"
    pool: Pool = "mean"
    keep_rows: bool = True
    layers: Layers = None

    def __post_init__(self) -> None:
        if self.component == "embed" and self.layers is not None:
            raise ValueError(
                f"TopicActivity(layers=...) must be None for component='embed', which has no layers; got "
                f"{brief(self.layers)}"
            )

    def hooks(self, model: ModelView) -> dict[str, str]:
        """The component's activation in every layer."""
        if self.component == "embed":
            return {"embed": model.hook_token_embed}
        return {str(layer): model.hook_units(self.component, layer) for layer in model.layers(self.layers)}

    def measure(self, reading: Reading) -> TopicActivityResult:
        """The statistics of the batch's prompts and their sums by topic, layer by layer."""
        prompts, weights = prompt_table(reading.tokens), pooling(reading.tokens, self.pool)
        prompt_of = torch.unique(reading.tokens.prompt, return_inverse=True)[1]
        found: list[Activity] = []
        for hook in reading.points.values():
            activation = reading[hook].float()
            if self.component in ("neuron", "embed"):
                activation = activation[..., None]  # one number per token and unit
            elif activation.ndim == 2:
                activation = activation[:, None]  # one unit per layer
            found.append(activity(activation, weights.to(activation.device), prompt_of.to(activation.device)))
        reading.check_widths(each.mean.shape[1] for each in found)
        mean, variance, positive, mean_abs = (torch.stack(each).cpu() for each in zip(*found, strict=True))
        of_topic = members(prompts, prompts.topics)
        square = variance.double() + mean.double().square()
        mean_sum, square_sum, positive_sum, abs_sum = (
            einsum(of_topic, each.double(), "topic prompt, layer prompt unit -> layer topic unit")
            for each in (mean, square, positive, mean_abs)
        )
        rows = {"mean": mean, "std": variance.sqrt(), "positive": positive, "mean_abs": mean_abs}
        short, _ = UNITS.get(self.component, ("", ""))
        return self.result(
            reading,
            unit=tuple(f"{short}{i}" for i in range(mean.shape[-1])) if short else ("block",),
            mean_sum=mean_sum,
            square_sum=square_sum,
            positive_sum=positive_sum,
            abs_sum=abs_sum,
            count=of_topic.sum(1),
            **(rows if self.keep_rows else {}),
        )


class Activity(NamedTuple):
    """Statistics of one layer's units per prompt."""

    mean: Float[Tensor, "prompt unit"]
    variance: Float[Tensor, "prompt unit"]
    positive: Float[Tensor, "prompt unit"]
    mean_abs: Float[Tensor, "prompt unit"]


def activity(
    x: Float[Tensor, "token unit d"], weights: Float[Tensor, "prompt token"], prompt_of: Int[Tensor, " token"]
) -> Activity:
    """Moments over the tokens of a prompt and the dimensions of a unit; the variance around the prompt's own mean."""
    mean = weights @ x.mean(-1)
    apart = x - mean[prompt_of][..., None]
    variance = weights @ apart.square().mean(-1)
    return Activity(mean, variance, weights @ (x > 0).float().mean(-1), weights @ x.abs().mean(-1))
