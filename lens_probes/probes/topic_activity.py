"""TopicActivity: which heads, blocks and neurons light up or go dark for a topic?

A scan. Every unit's activations x over a prompt's tokens (and, of a head or a block, over its dimensions) are described
by five numbers a prompt, and a topic by the same, its prompts weighing equally:

    mean = E[x]    std = sqrt(E[(x - mean)^2])    rms = sqrt(E[x^2])    positive = P(x > 0)    mean_abs = E[|x|]

Then, over prompts, each unit put on one scale (values less the mean over prompts, in their standard deviations SD):

    share[layer, unit]       = variance between topics / variance between prompts                  0 to 1
    selectivity[layer, unit] = (share - its mean by chance) / (1 - its mean by chance)             up to 1
    contrast[layer, unit]    = (mean of a topic - mean of the other topics' means) / SD            in SDs

By chance the share is (topics - 1) / (prompts - 1) on average, so topics that mean nothing to a unit give a selectivity
and a contrast of 0 on average; for p, topics are permuted among prompts. Whatever else topics differ in would count
too: name the prompts' templates, lengths or last tokens (`result.prompt.n_tokens`, `.last_text`) as `groups`, and
values are compared within groups only. What the words alone give is the same scan of the embeddings, `of="embed"`, each
dimension a unit; what the architecture alone gives, that of `lp.untrained(model)`.

Source: asked for by readers of "Searching for Modularity in Large Language Models" (lesswrong.com, 2022); the
statistics are those of Pochinkov and Schoots 2024, arXiv 2403.01267.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Literal, NamedTuple, get_args

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float, Float64
from torch import Tensor
from tqdm.auto import tqdm

from lens_probes import figures
from lens_probes.maths import inference
from lens_probes.maths.topics import TopicOrder, by_topic, one_hot, topic_numbers
from lens_probes.messages import brief
from lens_probes.model import ModelView
from lens_probes.probe import Probe
from lens_probes.reading import Reading
from lens_probes.result import Result, measured, summed
from lens_probes.settings import Layers
from lens_probes.text.prompts import PromptTable, check_pool, pooling, prompt_table

Of = Literal["head", "attn_out", "mlp_out", "neuron", "embed"]
Statistic = Literal["mean", "std", "rms", "positive", "mean_abs"]
STATISTICS = get_args(Statistic)
UNITS_AT_ONCE = 4096
COLUMNS = 21  # of a topic's grid: a layer has more neurons than can be drawn
LIT_OR_DARK = "Which {} light up (blue) or go dark (red)?"
NULL = "a unit's activity does not depend on the topic; topics permuted among prompts, or among cells within a group"

Effect = Callable[[Float[Tensor, "prompt unit"], Float[Tensor, "*draw topic prompt"]], Float[Tensor, "*draw unit"]]


class TopicActivityResult(Result):
    """Five numbers a prompt and unit, and sums by topic. Its rows grow with the number of prompts."""

    of: Of
    pool: str | int
    layer: tuple[str, ...]
    unit: tuple[str, ...]
    topic: tuple[str, ...]
    prompt: PromptTable
    count: Float64[Tensor, " topic"] = summed("how many prompts a topic has")
    mean_sum: Float64[Tensor, "layer topic unit"] = summed("sum over a topic's prompts of E[x]")
    square_sum: Float64[Tensor, "layer topic unit"] = summed("sum over a topic's prompts of E[x^2]")
    positive_sum: Float64[Tensor, "layer topic unit"] = summed("sum over its prompts of P(x > 0)")
    abs_sum: Float64[Tensor, "layer topic unit"] = summed("sum over a topic's prompts of E[|x|]")
    mean: Float[Tensor, "layer prompt unit"] | None = measured(
        "E[x] over a prompt, in the units of the activation", default=None
    )
    std: Float[Tensor, "layer prompt unit"] | None = measured(
        "standard deviation of x over a prompt", low=0, default=None
    )
    positive: Float[Tensor, "layer prompt unit"] | None = measured(
        "share of a prompt's x above 0", low=0, high=1, default=None
    )
    mean_abs: Float[Tensor, "layer prompt unit"] | None = measured("E[|x|]", low=0, default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.prompt.check_topics(self.topic)

    @property
    def rms(self) -> Float[Tensor, "layer prompt unit"]:
        """Root mean square of a prompt's activations."""
        return self.of_prompts("rms")

    def of_prompts(self, statistic: Statistic) -> Float[Tensor, "layer prompt unit"]:
        """One of the five numbers, a row a prompt."""
        if statistic not in STATISTICS:
            raise ValueError(f"statistic is one of {', '.join(STATISTICS)}; {brief(statistic)} came")
        if self.mean is None or self.std is None:
            raise ValueError("this run kept sums by topic only, without prompts: run TopicActivity(keep_rows=True)")
        return torch.hypot(self.mean, self.std) if statistic == "rms" else getattr(self, statistic)

    # By topic

    @property
    def topic_mean(self) -> Float[Tensor, "layer topic unit"]:
        """E[x] of a topic, its prompts weighing equally."""
        return self._per_prompt(self.mean_sum).float()

    @property
    def topic_std(self) -> Float[Tensor, "layer topic unit"]:
        """Standard deviation of x around the topic's mean."""
        variance = self._per_prompt(self.square_sum) - self._per_prompt(self.mean_sum).square()
        return variance.clamp(min=0).sqrt().float()

    @property
    def topic_rms(self) -> Float[Tensor, "layer topic unit"]:
        """Root mean square of x."""
        return self._per_prompt(self.square_sum).sqrt().float()

    @property
    def topic_positive(self) -> Float[Tensor, "layer topic unit"]:
        """Share of x above 0."""
        return self._per_prompt(self.positive_sum).float()

    @property
    def topic_mean_abs(self) -> Float[Tensor, "layer topic unit"]:
        """E[|x|] of a topic."""
        return self._per_prompt(self.abs_sum).float()

    def _per_prompt(self, total: Float64[Tensor, "layer topic unit"]) -> Float64[Tensor, "layer topic unit"]:
        return total / self.count[:, None]

    # Which units tell topics apart

    def selectivity(
        self,
        *,
        statistic: Statistic = "mean_abs",
        groups: Sequence[str] | None = None,
        permutations: int = inference.PERMUTATIONS,
        seed: int = 0,
        progress: bool = True,
    ) -> pd.DataFrame:
        """Per unit: how much of its variance between prompts lies between topics, interval, p, q and p_max.

        `groups`, one label per prompt (template, length, last token): values are taken from their group's mean, and
        whole cells of topic x group are permuted within groups. `p` is one-sided, (b+1)/(m+1); `q` the false-discovery
        rate over units; `p_max` the same as p against the largest of all units in each permutation, the family-wise
        error rate. The 95 % interval resamples prompts within cells; there is none if a topic has fewer than five
        prompts or a cell one. What a test of topics can say stands in `lens_probes.topics`; the null is in
        `attrs["null"]`.
        """
        return self._judged(selectivity, statistic, groups, permutations, seed, progress)

    def lit(
        self,
        topic: str,
        k: int = 10,
        *,
        statistic: Statistic = "mean_abs",
        groups: Sequence[str] | None = None,
        permutations: int = inference.PERMUTATIONS,
        seed: int = 0,
        progress: bool = True,
    ) -> pd.DataFrame:
        """The k units that are highest for a topic against the others: contrast, interval, two-sided p, q and p_max."""
        frame = self._contrasts(topic, statistic, groups, permutations, seed, progress)
        return frame.sort_values("effect", ascending=False, kind="stable").head(k).reset_index(drop=True)

    def dark(
        self,
        topic: str,
        k: int = 10,
        *,
        statistic: Statistic = "mean_abs",
        groups: Sequence[str] | None = None,
        permutations: int = inference.PERMUTATIONS,
        seed: int = 0,
        progress: bool = True,
    ) -> pd.DataFrame:
        """The k units that are lowest for it."""
        frame = self._contrasts(topic, statistic, groups, permutations, seed, progress)
        return frame.sort_values("effect", kind="stable").head(k).reset_index(drop=True)

    def contrast(self, *, statistic: Statistic = "mean_abs") -> Float[Tensor, "layer topic unit"]:
        """How much higher each unit is for each topic than for the others, in standard deviations over prompts."""
        values, order = self._standardised(statistic, None)
        members = order.members.float()
        found = torch.stack([contrast(values, members, topic) for topic in range(len(self.topic))])
        return found.unflatten(1, (len(self.layer), len(self.unit))).transpose(0, 1)

    def _contrasts(
        self,
        topic: str,
        statistic: Statistic,
        groups: Sequence[str] | None,
        permutations: int,
        seed: int,
        progress: bool,
    ) -> pd.DataFrame:
        by_topic(self.prompt, self.topic)  # refuses prompts without topics
        if topic not in self.topic:
            raise ValueError(f"topic {brief(topic)} was asked for and there are {', '.join(map(repr, self.topic))}")
        number = self.topic.index(topic)
        return self._judged(
            lambda values, weights: contrast(values, weights, number), statistic, groups, permutations, seed, progress
        )

    def _judged(
        self,
        effect: Effect,
        statistic: Statistic,
        groups: Sequence[str] | None,
        permutations: int,
        seed: int,
        progress: bool,
    ) -> pd.DataFrame:
        """An effect of every unit with its interval and p, some units at a time; p_max over all of them."""
        values, order = self._standardised(statistic, groups)
        members = order.members.float()
        labels = [some.float() for some in order.permutations(permutations, seed=seed)]
        resamples = [some.float() for some in order.resamples(seed=seed)]
        observed, low, high, p = np.empty((4, values.shape[1]))
        largest = np.zeros(permutations)
        starts = range(0, values.shape[1], UNITS_AT_ONCE)
        for start in tqdm(starts, desc="permuting", disable=not progress or len(starts) < 2):
            some = slice(start, start + UNITS_AT_ONCE)
            of_some = values[:, some].contiguous()
            observed[some] = effect(of_some, members).numpy()
            null = np.abs(_stacked(effect, of_some, labels))
            p[some] = inference.one_sided_p(np.abs(observed[some]), null)
            known = np.isfinite(observed[some])  # what has no value is no maximum
            largest = np.maximum(largest, null[:, known].max(axis=1, initial=0))
            low[some], high[some] = (
                order.bounds(_stacked(effect, of_some, resamples)) if resamples else (np.nan, np.nan)
            )
        frame = self.cells("layer", "unit").assign(
            effect=observed,
            low=low,
            high=high,
            p=p,
            q=inference.false_discovery(p),
            p_max=inference.one_sided_p(np.abs(observed), largest[:, None]),
            prompts=len(self.prompt),
            topics=len(self.topic),
            permutations=permutations,
        )
        frame.attrs["null"] = NULL
        return frame

    def _standardised(
        self, statistic: Statistic, groups: Sequence[str] | None
    ) -> tuple[Float[Tensor, "prompt unit"], TopicOrder]:
        """One number a prompt on one scale, prompts in their own order, units of all layers laid end to end."""
        order = by_topic(self.prompt, self.topic, groups)
        values = self.of_prompts(statistic)[:, order.order].transpose(0, 1).flatten(1)
        return standardised(values, torch.from_numpy(order.group_or_one)), order

    # Figures

    def figure(self) -> go.Figure:
        """A grid of layers and units for every topic, on one colour scale: how much higher than for other topics.

        Of neurons, more than can be drawn, each layer's stand from the highest to the lowest, in each panel anew and
        thinned: noise would make such a gradient too, and only how far its ends reach says something. From sums by
        topic alone the contrast is not known, and the ratio to the mean over topics is drawn; without topics, how
        active the units are.
        """
        if len(self.topic) < 2:
            return self._grids(self.topic_mean_abs, "How active are the {}?", "mean |x|", signed=False)
        if self.mean_abs is None:
            ratio = self.topic_mean_abs / self.topic_mean_abs.mean(1, keepdim=True)
            return self._grids(ratio.log2().nan_to_num(0, 0, 0), LIT_OR_DARK, "log2 of mean |x| over all topics' mean")
        return self._grids(self.contrast(), LIT_OR_DARK, "contrast (SDs over prompts)")

    def _grids(
        self, values: Float[Tensor, "layer topic unit"], question: str, colour_title: str, *, signed: bool = True
    ) -> go.Figure:
        topics = [figures.named(topic) or "all prompts" for topic in self.topic]
        if len(self.unit) == 1:
            return figures.heatmap(
                values[:, :, 0].T.tolist(),
                x=self.layer,
                y=topics,
                title=self._title(question.format("layers")),
                x_title=f"layer ({self.of})",
                y_title="topic",
                colour_title=colour_title,
                signed=signed,
            )
        units = {"head": "heads", "neuron": "neurons"}.get(self.of, "dimensions")
        x, x_title = self.unit, units
        if len(x) > COLUMNS:
            places = torch.linspace(0, len(x) - 1, COLUMNS).round().long()
            values = values.sort(dim=-1, descending=True).values[..., places]
            x = [f"{share:.0%}" for share in torch.linspace(0, 1, COLUMNS).tolist()]
            x_title = f"{units} of a layer, from the highest to the lowest"
        return figures.small_grids(
            [(topic, values[:, number].tolist()) for number, topic in enumerate(topics)],
            x=x,
            y=self.layer,
            title=self._title(question.format(units)),
            x_title=x_title,
            y_title="layer",
            colour_title=colour_title,
            signed=signed,
        )

    def _title(self, question: str) -> str:
        pooled = {"mean": "all tokens", "last": "last token"}.get(str(self.pool), f"token {self.pool}")
        return f"{question}\nmean |x| of {pooled}; {self.provenance.describe()}"


class TopicActivity(Probe[TopicActivityResult]):
    """How active each unit is on each prompt, for prompts that have topics.

    `of`: heads (their mixed values), what attention or the MLP adds (one unit a layer), single neurons, or the
    embeddings, each dimension a unit. `pool`: all tokens but special ones, the `last`, or a position.
    `keep_rows=False` keeps sums by topic only: memory that does not grow with prompts, and no tests.

    >>> import lens_probes as lp
    >>> topics = {"animals": ["The cat sat.", "A dog ran."], "food": ["The bread rose.", "A soup boiled."]}
    >>> result = lp.TopicActivity(of="neuron").run(lp.tiny.bridge(), topics)
    >>> tuple(result.mean_abs.shape), tuple(result.topic_rms.shape)
    ((3, 4, 128), (3, 2, 128))
    >>> list(result.lit("food", k=2, permutations=9)["p"] >= 0.1)
    [True, True]
    """

    of: Of = "head"
    pool: Literal["mean", "last"] | int = "mean"
    keep_rows: bool = True
    layers: Layers = None

    def __post_init__(self) -> None:
        if self.of not in get_args(Of):
            raise ValueError(f"TopicActivity(of=...) is one of {', '.join(get_args(Of))}; {brief(self.of)} came")
        if self.of == "embed" and self.layers is not None:
            raise ValueError(f"embeddings have no layers, and layers={self.layers} came: leave it out")
        check_pool(self, self.pool)

    def hooks(self, model: ModelView) -> list[str]:
        """What the units give, in every layer."""
        if self.of == "embed":
            return [model.hook_token_embed]
        layers = model.layers(self.layers)
        if self.of == "head":
            return [model.hook_z(layer) for layer in layers]
        if self.of == "neuron":
            return [model.hook_neurons(layer) for layer in layers]
        return [model.hook(self.of, layer) for layer in layers]

    def measure(self, reading: Reading) -> TopicActivityResult:
        """The five numbers of the batch's prompts and their sums by topic, a layer at a time."""
        prompts = prompt_table(reading.tokens)
        topics = tuple(dict.fromkeys(prompts.topic))
        members = one_hot(topic_numbers(prompts, topics), len(topics))
        weights = pooling(reading.tokens, self.pool)
        prompt_of = torch.unique(reading.tokens.prompt, return_inverse=True)[1]
        found = []
        for hook in self.hooks(reading.model):
            activation = reading[hook].float()
            if self.of in ("neuron", "embed"):
                activation = activation[..., None]  # one number a token
            elif activation.ndim == 2:
                activation = activation[:, None]  # one unit a layer
            found.append(activity(activation, weights.to(activation.device), prompt_of.to(activation.device)))
        mean, variance, positive, mean_abs = (torch.stack(each).cpu() for each in zip(*found, strict=True))
        square = variance.double() + mean.double().square()
        of_topic = [torch.einsum("tp,lpu->ltu", members, each.double()) for each in (mean, square, positive, mean_abs)]
        rows = (mean, variance.sqrt(), positive, mean_abs) if self.keep_rows else (None,) * 4
        short = {"head": "H", "neuron": "N", "embed": "d"}.get(self.of)
        return TopicActivityResult(
            of=self.of,
            pool=self.pool,
            layer=("embed",) if self.of == "embed" else tuple(map(str, reading.model.layers(self.layers))),
            unit=("block",) if short is None else tuple(f"{short}{i}" for i in range(mean.shape[-1])),
            topic=topics,
            prompt=prompts,
            count=members.sum(1),
            **dict(zip(("mean_sum", "square_sum", "positive_sum", "abs_sum"), of_topic, strict=True)),
            **dict(zip(("mean", "std", "positive", "mean_abs"), rows, strict=True)),
        )


class Activity(NamedTuple):
    """What one layer's units did on each prompt."""

    mean: Float[Tensor, "prompt unit"]
    variance: Float[Tensor, "prompt unit"]
    positive: Float[Tensor, "prompt unit"]
    mean_abs: Float[Tensor, "prompt unit"]


def activity(x: Float[Tensor, "token unit d"], weights: Float[Tensor, "prompt token"], prompt_of: Tensor) -> Activity:
    """Moments over the tokens of a prompt and the dimensions of a unit; the variance around the prompt's own mean."""
    mean = weights @ x.mean(-1)
    apart = x - mean[prompt_of][..., None]
    variance = weights @ apart.square().mean(-1)
    return Activity(mean, variance, weights @ (x > 0).float().mean(-1), weights @ x.abs().mean(-1))


def standardised(values: Float[Tensor, "prompt unit"], cell: Tensor) -> Float[Tensor, "prompt unit"]:
    """Each unit's values less the mean of their group, over their standard deviation; 0 for a unit that never changes.

    >>> standardised(torch.tensor([[1.0], [3.0], [11.0], [13.0]]), torch.tensor([0, 0, 1, 1])).T
    tensor([[-1.,  1., -1.,  1.]])
    """
    groups = torch.nn.functional.one_hot(cell).T.double()
    wide = values.double()
    apart = wide - ((groups @ wide) / groups.sum(1, keepdim=True))[cell]
    spread = apart.square().mean(0).sqrt()
    still = spread <= 1e-6 * wide.abs().amax(0)  # not of a unit with a NaN, which stays NaN
    return torch.where(still, 0.0, apart / spread).float()


def selectivity(
    values: Float[Tensor, "prompt unit"], weights: Float[Tensor, "*draw topic prompt"]
) -> Float[Tensor, "*draw unit"]:
    """The share of the variance between prompts that lies between topics, beyond chance; 0 where nothing varies.

    The adjusted share is Kelley's (1935) epsilon squared. A resample counts some prompts several times, and its chance
    is larger; with weights w, N in all and n of a topic, it is (sum over topics of sum w^2 / n - sum w^2 / N) /
    (N - sum w^2 / N).

    >>> selectivity(torch.tensor([[1.0], [1.0], [3.0], [3.0]]), torch.eye(2).repeat_interleave(2, dim=1))
    tensor([1.])
    """
    number, times = weights.sum(-1, keepdim=True), weights.sum(-2)
    grand, variance = _moments(values, times)
    apart = (weights @ values) / number.clamp(min=1) - grand[..., None, :]
    total = times.sum(-1, keepdim=True)
    between = (number * apart.square()).sum(-2) / total
    squares = weights.square().sum(-1)
    alone = times.square().sum(-1, keepdim=True) / total
    chance = ((squares / number[..., 0].clamp(min=1)).sum(-1, keepdim=True) - alone) / (total - alone)
    return torch.where(variance <= 1e-9, 0.0, (between / variance - chance) / (1 - chance))


def contrast(
    values: Float[Tensor, "prompt unit"], weights: Float[Tensor, "*draw topic prompt"], topic: int
) -> Float[Tensor, "*draw unit"]:
    """The mean of one topic less the mean of the other topics' means, in standard deviations over prompts.

    >>> contrast(torch.tensor([[1.0], [1.0], [3.0], [3.0]]), torch.eye(2).repeat_interleave(2, dim=1), 1)
    tensor([2.])
    """
    shares = weights / weights.sum(-1, keepdim=True)  # NaN for a topic that a resample left out
    others = (shares.sum(-2) - shares[..., topic, :]) / (shares.shape[-2] - 1)
    _, variance = _moments(values, weights.sum(-2))
    difference = (shares[..., topic, :] - others) @ values
    return torch.where(variance <= 1e-9, 0.0, difference / variance.sqrt())


def _moments(
    values: Float[Tensor, "prompt unit"], times: Float[Tensor, "*draw prompt"]
) -> tuple[Float[Tensor, "*draw unit"], Float[Tensor, "*draw unit"]]:
    """The mean and variance over prompts that count so many times."""
    total = times.sum(-1, keepdim=True)
    mean = times @ values / total
    return mean, (times @ values.square() / total - mean.square()).clamp(min=0)


def _stacked(
    effect: Effect, values: Float[Tensor, "prompt unit"], draws: Iterable[Float[Tensor, "_ topic prompt"]]
) -> Float[np.ndarray, "draw unit"]:
    return np.concatenate([effect(values, some).numpy() for some in draws])
