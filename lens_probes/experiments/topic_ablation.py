"""TopicAblation: are the units that light up for a topic needed for it, and for it only?

The causal test of what `TopicActivity` shows. On one part of the prompts the k units with the largest contrast are
chosen for every topic (heads or neurons, over all layers). On the other part they are silenced through hooks, every
topic's units in turn, and the loss L (mean -log p(next token) of a prompt, nats) is measured on every topic:

    damage[topic, other_topic]  = mean over prompts of other_topic of L(topic's units silenced) - L
    excess[topic, other_topic]  = damage - mean over draws of the damage of random units
    specificity[topic]          = damage on the topic itself - mean damage on the other topics

A draw silences as many random units of the same kind in each of the same layers, for every topic `draws` times:
losing any units hurts, and some topics are more easily hurt than others.

Source: Pochinkov and Schoots 2024, "Dissecting Language Models: Machine Unlearning via Selective Pruning", arXiv
2403.01267, remove the units that are more active on one kind of text; here with random draws, intervals and all topics.
"""

import zlib
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from lens_probes import figures
from lens_probes.maths import inference
from lens_probes.maths.topics import by_topic
from lens_probes.messages import brief
from lens_probes.model import ModelView
from lens_probes.model.ablation import Ablation
from lens_probes.probe import Experiment, run
from lens_probes.probes.head_topic_similarity import HeadTopicSimilarity
from lens_probes.probes.topic_activity import STATISTICS, Statistic, TopicActivity
from lens_probes.reading import prompt_loss
from lens_probes.result import Result, measured, provenance
from lens_probes.settings import Layers
from lens_probes.text.prompts import Prompt, Prompts, PromptTable, as_prompts, prompt_table, tokenize

DRAWS_FOR_STARS = 19  # to be beyond all of fewer is no news: p would be above 0.05
NULL = "the topic's units hurt no more than as many random units of the same layers"
SPECIFICITY_NULL = "the topic's units hurt it, against the others, no more than random units of the same layers do"


class TopicAblationResult(Result):
    """The loss of every held-out prompt, as it is, without each topic's units, and without random ones."""

    of: str
    silenced_by: str
    topic: tuple[str, ...]
    prompt: PromptTable
    layer: tuple[str, ...]
    loss: Float[Tensor, " prompt"] = measured("mean -log p(next token) of a held-out prompt, nats", low=0)
    silenced: Float[Tensor, "topic prompt"] = measured("the same with a topic's units silenced", low=0)
    random: Float[Tensor, "topic draw prompt"] = measured("the same with random units silenced", low=0)
    chosen_layer: Int[Tensor, "topic k"] = measured("the layer of each unit silenced", low=0, into="layer")
    chosen_unit: Int[Tensor, "topic k"] = measured("its number in the layer", low=0)
    chosen_contrast: Float[Tensor, "topic k"] = measured("its contrast where it was chosen, in SDs")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.prompt.check_topics(self.topic)

    def damage(self) -> pd.DataFrame:
        """Topic by other topic: damage, what random units do, the excess with its interval, p and q.

        The 95 % interval is Student's t over the prompts of `other_topic`. `p` is one-sided, (b+1)/(draws+1): how often
        a draw hurts as much; `q` is the false-discovery rate over all rows. The null is in `attrs["null"]`.
        """
        rows, order = [], by_topic(self.prompt, self.topic)
        for number, other in enumerate(self.topic):
            own = order.order[order.topic == number]
            damage, drawn = self._damage(own), self._random_damage(own)
            excess = damage - drawn.mean(1)
            low, high = inference.mean_interval(excess)
            p = inference.one_sided_p(damage.mean(1), drawn.mean(2).T)
            columns = {
                "damage": damage.mean(1),
                "random": drawn.mean((1, 2)),
                "random_low": drawn.mean(2).min(1),
                "random_high": drawn.mean(2).max(1),
                "excess": excess.mean(1),
                "low": low,
                "high": high,
                "p": p,
                "q": np.nan,
            }
            rows.append(pd.DataFrame({"topic": self.topic, "other_topic": other, **columns, "prompts": len(own)}))
        frame = pd.concat(rows, ignore_index=True).assign(draws=self.random.shape[1])
        frame["q"] = inference.false_discovery(frame["p"].to_numpy())
        frame.attrs["null"] = NULL
        return frame

    def specificity(self) -> pd.DataFrame:
        """Topic by topic: how much more its own prompts are hurt than those of others, its interval, p and q.

        Against the same difference in every draw of random units: an easily hurt topic is no specific one.
        """
        order, number = by_topic(self.prompt, self.topic)[:2]
        damage, drawn = self._damage(order), self._random_damage(order)
        rows = []
        for topic in range(len(self.topic)):
            coefficient = _own_less_others(number, topic, len(self.topic))
            each = drawn[topic] @ coefficient(np.ones(len(number)))

            def difference(times: Any, of: Any = damage[topic], less: Any = coefficient) -> Any:
                return (of @ less(times))[None]

            observed = float(difference(np.ones(len(number)))[0])
            (low,), (high,) = inference.interval(difference, len(number))
            p = float(inference.one_sided_p(np.array([observed]), each[:, None])[0])
            rows.append((self.topic[topic], observed, low, high, each.mean(), each.min(), each.max(), p))
        columns = ["topic", "specificity", "low", "high", "random", "random_low", "random_high", "p"]
        frame = pd.DataFrame(rows, columns=columns).assign(prompts=len(number), draws=self.random.shape[1])
        frame.insert(8, "q", inference.false_discovery(frame["p"].to_numpy()))
        frame.attrs["null"] = SPECIFICITY_NULL
        return frame

    def chosen(self) -> pd.DataFrame:
        """The units silenced for each topic, one row a unit."""
        n, k = self.chosen_layer.shape
        return pd.DataFrame(
            {
                "topic": [topic for topic in self.topic for _ in range(k)],
                "layer": [self.layer[i] for i in self.chosen_layer.flatten().tolist()],
                "unit": [f"{'H' if self.of == 'head' else 'N'}{i}" for i in self.chosen_unit.flatten().tolist()],
                "contrast": self.chosen_contrast.flatten().tolist(),
                "place": list(range(k)) * n,
            }
        )

    def figure(self) -> go.Figure:
        """The excess on every topic of silencing each topic's units; a star where none of the draws hurt as much."""
        frame = self.damage()
        size = (len(self.topic), len(self.topic))
        excess = frame["excess"].to_numpy().reshape(size).T  # other topics are the outer loop
        beyond = (frame["damage"] > frame["random_high"]).to_numpy().reshape(size).T
        names = [figures.named(topic) for topic in self.topic]
        draws = self.random.shape[1]
        digits = 2 if np.abs(excess).max() >= 0.1 else 3
        beyond = beyond & (draws >= DRAWS_FOR_STARS)
        texts = [
            [f"{value:.{digits}f}{'*' * star}" for value, star in zip(row, marked, strict=True)]
            for row, marked in zip(excess.tolist(), beyond.tolist(), strict=True)
        ]
        k = self.chosen_layer.shape[1]
        stars = f" * more than any of {draws} random draws" if draws >= DRAWS_FOR_STARS else f" ({draws} random draws)"
        return figures.heatmap(
            excess.tolist(),
            x=names,
            y=names,
            title=f"What do {k} {self.of}s of a topic do for each topic?{stars}\n"
            f"{self.of}s set to {'their mean' if self.silenced_by == 'mean' else 'zero'}; {self.provenance.describe()}",
            x_title="loss measured on",
            y_title="silenced: units of",
            colour_title="excess loss over random units (nats)",
            signed=True,
            text=texts,
        )

    def _damage(self, prompts: Int[np.ndarray, " some"]) -> Float[np.ndarray, "topic prompt"]:
        return (self.silenced - self.loss).double().numpy()[:, prompts]

    def _random_damage(self, prompts: Int[np.ndarray, " some"]) -> Float[np.ndarray, "topic draw prompt"]:
        return (self.random - self.loss).double().numpy()[:, :, prompts]


def _own_less_others(
    number: Int[np.ndarray, " prompt"], topic: int, n_topics: int
) -> Callable[[Float[np.ndarray, " prompt"]], Float[np.ndarray, " prompt"]]:
    """Coefficients of the mean over a topic's prompts less the mean of the other topics' means."""

    def coefficient(times: Float[np.ndarray, " prompt"]) -> Float[np.ndarray, " prompt"]:
        size = np.bincount(number, times, n_topics)
        share = times / np.where(size > 0, size, np.nan)[number]
        return np.where(number == topic, share, -share / (n_topics - 1))

    return coefficient


class TopicAblation(Experiment[TopicAblationResult]):
    """Silence what lights up for each topic, and see what it costs each topic.

    `of`: heads or neurons. `silenced_by`: their mean over the prompts they were chosen on, or zero. `fraction` of the
    prompts is for choosing. It takes 1 + topics x (1 + draws) passes over the other prompts. Interrupted, it gives the
    draws done so far.

    >>> import lens_probes as lp
    >>> topics = {"animals": ["The cat sat.", "A dog ran.", "A bird sang.", "The horse fell."],
    ...           "food": ["The bread rose.", "A soup boiled.", "She ate cake.", "The salt was gone."]}
    >>> result = lp.TopicAblation(k=2, draws=20).run(lp.tiny.bridge(), topics, progress=False)
    >>> result.damage().shape, list(result.specificity()["topic"])
    ((4, 13), ['animals', 'food'])
    """

    of: Literal["head", "neuron"] = "neuron"
    k: int = 50
    silenced_by: Literal["mean", "zero"] = "mean"
    draws: int = 20
    statistic: Statistic = "mean_abs"
    fraction: float = 0.5
    layers: Layers = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.of not in ("head", "neuron") or self.silenced_by not in ("mean", "zero"):
            raise ValueError(
                f"TopicAblation(of=...) is head or neuron and silenced_by is mean or zero; {brief(self.of)} and "
                f"{brief(self.silenced_by)} came"
            )
        if self.statistic not in STATISTICS:
            raise ValueError(f"statistic is one of {', '.join(STATISTICS)}; {brief(self.statistic)} came")
        if self.k < 1 or self.draws < 1:
            raise ValueError(f"TopicAblation(k=..., draws=...) are 1 or more; {self.k} and {self.draws} came")

    def run(
        self, model: Any, prompts: Prompts, *, groups: Sequence[str] | None = None, progress: bool = True
    ) -> TopicAblationResult:
        """Choose on one part of the prompts, whole `groups` (templates) if given, and measure on the other."""
        view = ModelView(model)
        view.check_predicts_next()
        tokens = tokenize(prompts, view)
        table = prompt_table(tokens)
        topics = tuple(dict.fromkeys(table.topic))
        order = by_topic(table, topics, groups)
        first = torch.zeros(len(table), dtype=torch.bool)
        first[torch.from_numpy(order.order)] = torch.from_numpy(order.first_part(self.fraction, seed=self.seed))
        is_first = first[torch.searchsorted(table.prompt, tokens.prompt)]
        chosen, units = self._chosen(view, as_prompts(tokens[is_first]), topics)
        rest = tokens[~is_first]
        layers = view.layers(self.layers)
        to = units if self.silenced_by == "mean" else torch.zeros_like(units)
        silence = Ablation(view, layers, self.of, to)
        loss = prompt_loss(view, rest)
        passes: list[Float[Tensor, " prompt"]] = []
        plan = [(draw, topic) for draw in range(self.draws + 1) for topic in range(len(topics))]
        try:
            for draw, topic in tqdm(plan, desc="silencing", unit="pass", disable=not progress):
                places = chosen.indices[topic]
                if draw:
                    about = zlib.crc32(topics[topic].encode())
                    places = _random_like(places, units.shape[1], np.random.default_rng([self.seed, about, draw]))
                passes.append(prompt_loss(view, rest, silence(places)))
        except KeyboardInterrupt:
            if len(passes) < 2 * len(topics):
                raise
            tqdm.write(f"interrupted after {len(passes) // len(topics) - 1} of {self.draws} draws")
        whole = len(passes) // len(topics) * len(topics)
        losses = torch.stack(passes[:whole]).unflatten(0, (-1, len(topics)))
        return TopicAblationResult(
            of=self.of,
            silenced_by=self.silenced_by,
            topic=topics,
            prompt=prompt_table(rest),
            layer=tuple(map(str, layers)),
            loss=loss,
            silenced=losses[0],
            random=losses[1:].transpose(0, 1),
            chosen_layer=chosen.indices // units.shape[1],
            chosen_unit=chosen.indices % units.shape[1],
            chosen_contrast=chosen.values,
            provenance=provenance(self, view, view.W_E.dtype, silence.hooks, rest),
        )

    def _chosen(
        self, view: ModelView, prompts: list[Prompt], topics: Sequence[str]
    ) -> "tuple[_Units, Float[Tensor, 'layer unit d']]":
        """The units with the largest contrast for each topic, and every unit's mean activation, on these prompts."""
        activity = TopicActivity(of=self.of, layers=self.layers)
        if self.of == "head":
            scan, heads = run([activity, HeadTopicSimilarity(layers=self.layers)], view.model, prompts, progress=False)
            mean = heads.vector.mean(2)
        else:
            scan = activity.run(view.model, prompts, progress=False)
            mean = scan.of_prompts("mean").mean(1)[..., None]
        if self.k > mean.shape[0] * mean.shape[1]:
            raise ValueError(
                f"k={self.k} units a topic were asked for and there are {mean.shape[0] * mean.shape[1]} {self.of}s in "
                f"these layers"
            )
        contrast = scan.contrast(statistic=self.statistic)[:, [scan.topic.index(topic) for topic in topics]]
        values, indices = contrast.transpose(0, 1).flatten(1).topk(self.k, dim=1)
        return _Units(values, indices), mean


class _Units(NamedTuple):
    """The units chosen for each topic: their contrasts, and their places when layers are laid end to end."""

    values: Float[Tensor, "topic k"]
    indices: Int[Tensor, "topic k"]


def _random_like(places: Int[Tensor, " k"], n_units: int, random: np.random.Generator) -> Int[Tensor, " k"]:
    """As many random units in each of the same layers."""
    layers, counts = (places // n_units).unique(return_counts=True)
    drawn = [
        layer * n_units + random.choice(n_units, count, replace=False)
        for layer, count in zip(layers.tolist(), counts.tolist(), strict=True)
    ]
    return torch.from_numpy(np.concatenate(drawn))
