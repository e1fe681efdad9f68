"""TopicAblation: does ablating the units that are most active for a topic raise the loss on that topic only?

This is the causal test of `TopicActivity`. On one part of the prompts, the k units with the largest contrast are chosen
for every topic (heads or neurons, over all layers). On the other part, each topic's units are ablated in turn, and the
loss L (mean -log p(next token) of a prompt, nats) is measured on every topic:

    damage[topic, other_topic]  = mean over prompts of other_topic of L(topic's units ablated) - L
    excess[topic, other_topic]  = damage - mean over draws of the damage of random units
    specificity[topic]          = damage on the topic itself - mean over the other topics of the damage on them

The baseline: each draw ablates, for every topic, as many random units of the same kind in each of the same layers.
Ablating any units raises the loss, and more for some topics than for others.

Source: Pochinkov and Schoots 2024, "Dissecting Language Models: Machine Unlearning via Selective Pruning", arXiv
2403.01267, remove the units that are more active on one kind of text. We add random draws, intervals and all topics.
"""

import zlib
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, Unpack

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from einops import einsum, rearrange
from jaxtyping import Float, Float64, Int
from torch import Tensor

from lens_probes import figures
from lens_probes.maths import inference
from lens_probes.maths.topics import by_topic, own_less_others
from lens_probes.messages import amount
from lens_probes.model import ModelView
from lens_probes.model.ablation import Ablation
from lens_probes.probe import Options, Study, TextExperiment, run
from lens_probes.probes.head_topic_similarity import HeadTopicSimilarity
from lens_probes.probes.topic_activity import Statistic, TopicActivity
from lens_probes.reading import prompt_loss
from lens_probes.result import TopicResult, comparison, measured
from lens_probes.settings import Layers, Positive, Seed, Share
from lens_probes.text.prompts import Prompt, Prompts, as_prompts, prompt_table

DRAWS_FOR_STARS = 19  # with fewer, p is above 0.05 even if no draw does as much damage
NULL = "ablating the topic's units does no more damage than ablating as many random units of the same layers"
SPECIFICITY_NULL = "the damage of the topic's units is no more specific than that of random units of the same layers"


class TopicAblationResult(TopicResult):
    """The loss of every held-out prompt: without ablation, with each topic's units ablated, and with random units."""

    component: Literal["head", "neuron"]
    ablation: Literal["mean", "zero"]
    layer: tuple[str, ...]
    loss: Float[Tensor, " prompt"] = measured("loss of a held-out prompt", unit="nats", low=0)
    ablated: Float[Tensor, "topic prompt"] = measured("loss with a topic's units ablated", unit="nats", low=0)
    random: Float[Tensor, "topic draw prompt"] = measured("loss with random units ablated", unit="nats", low=0)
    chosen_layer: Int[Tensor, "topic k"] = measured("layer of each ablated unit", low=0, into="layer")
    chosen_unit: Int[Tensor, "topic k"] = measured("number of each ablated unit in its layer", low=0)
    chosen_contrast: Float[Tensor, "topic k"] = measured("contrast of each ablated unit", unit="SDs over prompts")

    def damage(self) -> pd.DataFrame:
        """Topic by other topic: `effect` is the excess over random units, with its interval, p and q.

        `damage` is the increase of the loss, `random` its mean over draws of random units, `random_low` and
        `random_high` the smallest and largest draw. The 95 % interval is Student's t over the prompts of `other_topic`.
        `p` is one-sided, (b+1)/(draws+1): how often a draw does as much damage. `q` is the false-discovery rate over
        all rows. The null is in `attrs["null"]`.
        """
        rows, order = [], self.by_topic()
        for number, other in enumerate(self.topic):
            own = torch.from_numpy(order.order[order.topic == number])
            damage, drawn = (self._rise(loss)[..., own].numpy() for loss in (self.ablated, self.random))
            excess = damage - drawn.mean(1)
            low, high = inference.mean_interval(excess)
            row = {
                "topic": self.topic,
                "other_topic": [other] * len(self.topic),
                "effect": excess.mean(1),
                "low": low,
                "high": high,
                "p": inference.one_sided_p(damage.mean(1), drawn.mean(2).T),
                "damage": damage.mean(1),
                "random": drawn.mean((1, 2)),
                "random_low": drawn.mean(2).min(1),
                "random_high": drawn.mean(2).max(1),
                "prompts": np.full(len(self.topic), len(own)),
            }
            rows.append(row)
        columns = {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}
        names = pd.DataFrame({name: columns.pop(name) for name in ("topic", "other_topic")})
        return comparison(names, **columns, draws=self.random.shape[1], says="excess loss (nats)", null=NULL)

    def specificity(self) -> pd.DataFrame:
        """Per topic: how much more damage its units do on its own prompts than on others, with interval, p and q.

        `p` compares it with the same difference in every draw of random units, so that a topic with a sensitive loss
        does not appear specific; `random` is the mean of these. The 95 % interval resamples prompts within topics;
        there is none if a topic has fewer than five. The null is in `attrs["null"]`.
        """
        order = self.by_topic()
        damage, drawn = (self._rise(loss)[..., order.order] for loss in (self.ablated, self.random))

        def difference(weights: Float64[Tensor, "*draw topic prompt"]) -> Float64[Tensor, "*draw topic"]:
            return einsum(own_less_others(weights), damage, "... topic prompt, topic prompt -> ... topic")

        coefficients = own_less_others(order.members)
        null = einsum(coefficients, drawn, "topic prompt, topic draw prompt -> draw topic").numpy()
        found = difference(order.members).numpy()
        low, high = order.interval(difference, order.resamples(seed=0))
        return comparison(
            pd.DataFrame({"topic": self.topic}),
            effect=found,
            low=low,
            high=high,
            p=inference.one_sided_p(found, null),
            random=null.mean(0),
            random_low=null.min(0),
            random_high=null.max(0),
            prompts=len(self.prompt),
            draws=len(null),
            says="specificity (nats)",
            null=SPECIFICITY_NULL,
        )

    def chosen(self) -> pd.DataFrame:
        """The units ablated for each topic, one row per unit."""
        n, k = self.chosen_layer.shape
        return pd.DataFrame(
            {
                "topic": [topic for topic in self.topic for _ in range(k)],
                "layer": [self.layer[i] for i in self.chosen_layer.flatten().tolist()],
                "unit": [f"{'H' if self.component == 'head' else 'N'}{i}" for i in self.chosen_unit.flatten().tolist()],
                "contrast": self.chosen_contrast.flatten().tolist(),
                "place": list(range(k)) * n,
            }
        )

    def figure(self, **look: Unpack[figures.Look]) -> go.Figure:
        """The excess loss on every topic with each topic's units ablated; a star where no draw did as much damage."""
        table, draws = self.damage(), self.random.shape[1]
        table["star"] = (table["damage"] > table["random_high"]) & (draws >= DRAWS_FOR_STARS)
        excess, stars = (
            table.pivot(index="topic", columns="other_topic", values=name).loc[list(self.topic), list(self.topic)]
            for name in ("effect", "star")
        )
        digits = 2 if np.abs(excess.to_numpy()).max() >= 0.1 else 3
        k, names = self.chosen_layer.shape[1], [figures.named(topic) for topic in self.topic]
        return figures.heatmap(
            excess.to_numpy().tolist(),
            x=names,
            y=names,
            title=self.title(f"Excess loss after ablating the top {k} {self.component}s of each topic"),
            x_title="topic on which the loss is measured",
            y_title=f"topic whose {self.component}s are ablated",
            colour_title="excess loss over random units (nats)",
            signed=True,
            text=[
                [f"{value:z.{digits}f}{'*' * star}" for value, star in zip(row, marked, strict=True)]
                for row, marked in zip(excess.to_numpy().tolist(), stars.to_numpy().tolist(), strict=True)
            ],
            **look,
        )

    def conditions(self) -> str:
        """How units were ablated, and how many random draws they are compared with."""
        draws = self.random.shape[1]
        star = " (*: more damage than any of them)" if draws >= DRAWS_FOR_STARS else ""
        return f"set to {'their mean' if self.ablation == 'mean' else 'zero'}; {amount(draws, 'random draw')}{star}"

    def _rise(self, loss: Float[Tensor, "*any prompt"]) -> Float64[Tensor, "*any prompt"]:
        return (loss - self.loss).double()


class TopicAblation(TextExperiment[TopicAblationResult]):
    """Ablate the units that are most active for each topic, and measure the loss on each topic.

    `component`: heads or neurons. `ablation`: units are set to their mean over the prompts on which they were chosen,
    or to zero. `fraction`: share of the prompts for choosing. It takes 1 + topics x (1 + draws) passes over the other
    prompts. After an interrupt the result holds the draws done so far.

    >>> import lens_probes as lp
    >>> topics = {"animals": ["The cat sat.", "A dog ran.", "A bird sang.", "The horse fell."],
    ...           "food": ["The bread rose.", "A soup boiled.", "She ate cake.", "The salt was gone."]}
    >>> result = lp.TopicAblation(k=2, draws=20).run(lp.tiny.bridge(), topics, progress=False)
    >>> result.damage().shape, list(result.specificity()["topic"])
    ((4, 13), ['animals', 'food'])
    """

    component: Literal["head", "neuron"] = "neuron"
    k: Positive = 50
    ablation: Literal["mean", "zero"] = "mean"
    draws: Positive = 20
    statistic: Statistic = "mean_abs"
    fraction: Share = 0.5
    layers: Layers = None
    seed: Seed = 0

    def run(
        self, model: Any, prompts: Prompts, *, groups: Sequence[str] | None = None, **options: Unpack[Options]
    ) -> TopicAblationResult:
        """Choose on one part of the prompts, measure on the other. Options are as in `lens_probes.run`.

        `groups`: one label per prompt (its template); a group is in one part as a whole.
        """
        return self.perform(Study.of(self, model, prompts, **options), groups)

    def perform(self, study: Study, groups: Sequence[str] | None = None) -> TopicAblationResult:
        """Choose units; ablate each topic's units, then random ones, draw by draw."""
        view, tokens, table = study.view, study.tokens, prompt_table(study.tokens)
        view.check_predicts_next()
        topics, order = table.topics, by_topic(table, table.topics, groups)
        first = torch.zeros(len(table), dtype=torch.bool)
        first[torch.from_numpy(order.order)] = torch.from_numpy(order.first_part(self.fraction, seed=self.seed))
        is_first = first[torch.searchsorted(table.prompt, tokens.prompt)]
        chosen, means = self._chosen(view, as_prompts(tokens[is_first]), topics)
        rest, layers, n_units = tokens[~is_first], view.layers(self.layers), means.shape[1]
        ablate = Ablation(view, layers, self.component, means if self.ablation == "mean" else torch.zeros_like(means))
        loss = prompt_loss(view, rest)

        def losses(draw: int) -> Float[Tensor, "topic prompt"]:
            """The loss with each topic's units ablated (draw 0), or random ones."""
            found = []
            for topic, own in zip(topics, chosen.indices, strict=True):
                random = np.random.default_rng([self.seed, zlib.crc32(topic.encode()), draw])
                found.append(prompt_loss(view, rest, ablate(random_like(own, n_units, random) if draw else own)))
            return torch.stack(found)

        own, *drawn = study.each(losses, range(self.draws + 1), doing="ablating", unit="draw", least=2)
        return TopicAblationResult(
            component=self.component,
            ablation=self.ablation,
            topic=topics,
            prompt=prompt_table(rest),
            layer=tuple(map(str, layers)),
            loss=loss,
            ablated=own,
            random=rearrange(drawn, "draw topic prompt -> topic draw prompt"),
            chosen_layer=chosen.indices // n_units,
            chosen_unit=chosen.indices % n_units,
            chosen_contrast=chosen.contrasts,
            provenance=study.provenance(ablate.hooks, rest),
        )

    def _chosen(
        self, view: ModelView, prompts: list[Prompt], topics: Sequence[str]
    ) -> "tuple[Chosen, Float[Tensor, 'layer unit d']]":
        """The units with the largest contrast for each topic, and every unit's mean activation, on these prompts."""
        activity = TopicActivity(component=self.component, layers=self.layers)
        if self.component == "head":
            scan, heads = run([activity, HeadTopicSimilarity(layers=self.layers)], view.model, prompts, progress=False)
            means = heads.vector.mean(2)
        else:
            scan = activity.run(view.model, prompts, progress=False)
            means = scan.of_prompts("mean").mean(1)[..., None]
        n = means.shape[0] * means.shape[1]
        if self.k > n:
            raise ValueError(
                f"TopicAblation(k=...) must be at most the {n} {self.component}s of these layers; got {self.k}"
            )
        contrast = scan.contrast(statistic=self.statistic)[:, [scan.topic_number(topic) for topic in topics]]
        by_place = rearrange(contrast, "layer topic unit -> topic (layer unit)")
        return Chosen(*by_place.topk(self.k, dim=1)), means


class Chosen(NamedTuple):
    """The units chosen for each topic: contrasts, and indices with layers laid end to end."""

    contrasts: Float[Tensor, "topic k"]
    indices: Int[Tensor, "topic k"]


def random_like(places: Int[Tensor, " k"], n_units: int, random: np.random.Generator) -> Int[Tensor, " k"]:
    """Random units: in each layer, as many as `places` has there."""
    layers, counts = (places // n_units).unique(return_counts=True)
    drawn = [
        layer * n_units + random.choice(n_units, count, replace=False)
        for layer, count in zip(layers.tolist(), counts.tolist(), strict=True)
    ]
    return torch.from_numpy(np.concatenate(drawn))
