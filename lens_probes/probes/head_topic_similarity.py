"""HeadTopicSimilarity: do prompts of one topic give a head more alike outputs than prompts of different topics?

Every head (or block, or state) gives each prompt one vector x, the mean over its tokens, or that of one token:

    topic_similarity[layer, head, topic, other_topic] = mean over pairs of prompts i != j of similarity(x_i, x_j)
    separation[layer, head] = mean over topics of its diagonal - mean over pairs of topics of the rest

    similarity:  cosine    x . y / (|x| |y|)                  -1 to 1, zero vectors left out
                 scaled    x . y / (largest |z|^2 of all)     -1 to 1
                 distance  1 - |x - y| / (|x| + |y|)          0 to 1, two zero vectors are alike

A separation of 0 is what topics that mean nothing to a head give, whatever the similarity of all prompts (a little less
where prompts share templates: a prompt has one template twin fewer in its own topic); `test` permutes the topics.
Prompts of a topic also share words, length and form: give them in templates that every topic has, and name these as
`groups`.

Source: the question is that of "Searching for Modularity in Large Language Models" (lesswrong.com, 2022), whose readers
asked for single heads, for a similarity under which two near-zero vectors are alike, and for an orthogonal basis.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Literal, get_args

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

from lens_probes import figures
from lens_probes.maths import inference
from lens_probes.maths.similarity import (
    SIMILARITIES,
    Features,
    Similarity,
    features_of,
    group_means,
    group_means_of_pairs,
    mean_pairwise_cosine,
    over_pairs,
    pairwise,
    separation,
)
from lens_probes.maths.topics import by_topic, one_hot, topic_numbers
from lens_probes.messages import brief
from lens_probes.model import ModelView
from lens_probes.probe import Probe
from lens_probes.reading import Reading
from lens_probes.result import Result, measured, summed
from lens_probes.settings import Layers
from lens_probes.text.prompts import PromptTable, check_pool, pooling, prompt_table

Of = Literal["head", "head_out", "attn_out", "mlp_out", "resid_pre", "resid_mid", "resid_post"]
Basis = Literal["own", "pca"]

PROMPTS_PER_DIRECTION = 10  # with as many directions as prompts every pair looks alike
NULL = "a prompt's vector does not depend on its topic; topics permuted among prompts, or among cells within a group"


class HeadTopicSimilarityResult(Result):
    """One vector a prompt and head, and sums by topic. Its vectors grow with the number of prompts."""

    of: Of
    pool: str | int
    layer: tuple[str, ...]
    head: tuple[str, ...]
    topic: tuple[str, ...]
    prompt: PromptTable
    unit_sum: Float64[Tensor, "layer head topic d_head"] = summed(
        "sum over a topic's prompts of the vectors, each divided by its length"
    )
    count: Float64[Tensor, "layer head topic"] = summed("how many of them are not zero")
    vector: Float[Tensor, "layer head prompt d_head"] | None = measured(
        "what a head gives a prompt, in the units of the activation", default=None
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.prompt.check_topics(self.topic)

    # Similarities

    def similarity(
        self, layer: int, head: int = 0, *, metric: Similarity = "cosine", center: bool = False, basis: Basis = "own"
    ) -> Float[Tensor, "prompt other_prompt"]:
        """The similarity of every pair of prompts, in head `head` of layer `layer`."""
        vectors = self._vectors(center=center, basis=basis)
        return pairwise(vectors[self._at(layer, head)], _checked(metric)).float()

    def topic_similarity(
        self, *, metric: Similarity = "cosine", center: bool = False, basis: Basis = "own"
    ) -> Float[Tensor, "layer head topic other_topic"]:
        """The mean similarity over the pairs of prompts of two topics, a prompt with itself left out."""
        if self.vector is None and _checked(metric) == "cosine" and not center and basis == "own":
            return self._from_sums().float()
        means = self._means(metric, center, basis)(one_hot(topic_numbers(self.prompt, self.topic), len(self.topic)))
        return means.unflatten(0, (len(self.layer), len(self.head))).float()

    def separation(
        self, *, metric: Similarity = "cosine", center: bool = False, basis: Basis = "own"
    ) -> Float[Tensor, "layer head"]:
        """Mean similarity within topics minus mean similarity between them."""
        by_topic(self.prompt, self.topic)  # refuses prompts without topics
        return separation(self.topic_similarity(metric=metric, center=center, basis=basis))

    @property
    def brightness(self) -> Float[Tensor, "layer head"]:
        """The largest share that one dimension has of all squared vectors; evenly spread it is 1 / d_head.

        The basis of `hook_z` is arbitrary (W_V and W_O may be turned against each other): read it with `of="head_out"`.
        """
        return self._shares().amax(-1)

    @property
    def brightest(self) -> Int[Tensor, "layer head"]:
        """Which dimension that is, -1 for a head that gives nothing or NaN."""
        shares = self._shares()
        return shares.argmax(-1).masked_fill(shares.isnan().any(-1), -1)

    @property
    def pca_rank(self) -> int:
        """How many directions `basis="pca"` keeps: one for ten prompts, no more than there are."""
        return max(1, min(len(self.prompt) // PROMPTS_PER_DIRECTION, self.unit_sum.shape[-1]))

    # Tests

    def test(
        self,
        *,
        permutations: int = inference.PERMUTATIONS,
        seed: int = 0,
        groups: Sequence[str] | None = None,
        metric: Similarity = "cosine",
        center: bool = False,
        basis: Basis = "own",
    ) -> pd.DataFrame:
        """Per head: separation, its 95 % interval (prompts resampled), p, q over heads, and p of the largest head.

        `groups`, one label per prompt (its template, say): whole cells of topic x group are permuted within a group, so
        that p allows for a topic that only one template brings out; without groups, everything holds for these
        templates. Prompts are resampled within cells. No interval if a topic has fewer than five prompts or a cell one.
        `p` is two-sided, (b+1)/(m+1); `q` the false-discovery rate over heads; `p_max` counts permutations in which any
        head is as far out, the family-wise error rate. A head without a value (it gives zeros) has none of them. What a
        test of topics can say stands in `lens_probes.topics`; the null is in `attrs["null"]`.
        """
        prompts = by_topic(self.prompt, self.topic, groups)
        means = self._means(metric, center, basis, torch.from_numpy(prompts.order))

        def of(draws: Iterable[Float64[Tensor, "draw topic prompt"]]) -> list[Float[np.ndarray, "draw head"]]:
            return [separation(means(some)).numpy() for some in draws]

        observed = separation(means(prompts.members)).numpy()
        null = np.concatenate(of(prompts.permutations(permutations, seed=seed)))
        drawn = of(prompts.resamples(seed=seed))
        low, high = np.full((2, len(observed)), np.nan)
        if drawn:
            # A prompt drawn twice makes no pair with itself, so that resamples have fewer pairs within a template and
            # lie too low; their spread is right.
            values = np.concatenate(drawn)
            low, high = prompts.bounds(values - values.mean(axis=0) + observed)
        frame = self.cells("layer", "head").assign(
            separation=observed,
            low=low,
            high=high,
            **inference.judged(observed, null),
            prompts=len(self.prompt),
            topics=len(self.topic),
            permutations=permutations,
        )
        frame.attrs["null"] = NULL
        return frame

    def held_out(
        self,
        *,
        fraction: float = 0.5,
        k: int = 10,
        groups: Sequence[str] | None = None,
        seed: int = 0,
        metric: Similarity = "cosine",
        center: bool = False,
        basis: Basis = "own",
    ) -> pd.DataFrame:
        """The k heads that separate most on one part of the prompts, and how they do on the others.

        Whole groups (templates) go to one side; without groups, prompts. `chosen`: the separation where heads (and the
        mean, and the principal directions) were chosen, which is too good; `held_out`: where they were not.
        """
        prompts = by_topic(self.prompt, self.topic, groups)
        first = torch.from_numpy(prompts.first_part(fraction, seed=seed))
        means = self._means(metric, center, basis, torch.from_numpy(prompts.order), fit=first)
        chosen, reported = (separation(means(prompts.members * part)).numpy() for part in (first, ~first))
        frame = self.cells("layer", "head").assign(chosen=chosen, held_out=reported)
        frame["rank_held_out"] = (-frame["held_out"]).rank(method="min").sub(1).astype("Int64")
        frame = frame.assign(prompts_chosen=int(first.sum()), prompts_held_out=int((~first).sum()))
        return frame.sort_values("chosen", ascending=False, kind="stable").head(k).reset_index(drop=True)

    # Figures

    def figure(self) -> go.Figure:
        """Separation by layer and head; a star where it is above 0 and q below 0.05 (200 permutations).

        Without topics, the mean cosine over all pairs of prompts.
        """
        if len(self.topic) < 2:
            values = mean_pairwise_cosine(self.unit_sum.sum(2), self.count.sum(2).long())
            return self._grid(values, None, "How alike are prompts to each head?", "mean cosine (-1 to 1)")
        if self.vector is None:
            return self._grid(self.separation(), None, "Which heads tell topics apart?", "separation (cosine, -2 to 2)")
        table = self.test(permutations=200)
        size = (len(self.layer), len(self.head))
        values = torch.tensor(table["separation"].tolist()).reshape(size)
        # Heads to which prompts of one topic are less alike than others tell no topics apart, however small their q.
        stars = np.asarray((table["q"] < 0.05) & (table["separation"] > 0)).reshape(size)
        title = f"Which heads tell topics apart? Star: above 0, q < 0.05 ({int(stars.sum())} of {stars.size})"
        return self._grid(values, stars, title, "separation (cosine, -2 to 2)")

    def figure_topics(self, layer: int, head: int = 0) -> go.Figure:
        """The mean cosine of the prompts of two topics, in one head."""
        means = self.topic_similarity()[self._at(layer, head)]
        return figures.heatmap(
            means.tolist(),
            x=[figures.named(topic) for topic in self.topic],
            y=[figures.named(topic) for topic in self.topic],
            title=self._title(f"Topic against topic in {self._name(layer, head)}"),
            x_title="topic",
            y_title="topic",
            colour_title="mean cosine (-1 to 1)",
            text=[[f"{value:.2f}" for value in row] for row in means.tolist()],
        )

    def figure_prompts(self, layer: int, head: int = 0, *, metric: Similarity = "cosine") -> go.Figure:
        """The similarity of every pair of prompts in one head, ordered by topic, with borders between topics."""
        order, names = self._by_topic()
        table = self.similarity(layer, head, metric=metric)[order][:, order]
        return figures.blocks(
            table.tolist(),
            names,
            names,
            title=self._title(f"Prompt against prompt in {self._name(layer, head)}"),
            x_title="prompt, by topic",
            y_title="prompt, by topic",
            colour_title=metric,
        )

    def figure_values(self, layer: int, head: int = 0) -> go.Figure:
        """What one head gives: a column a prompt, ordered by topic, a row a dimension."""
        order, names = self._by_topic()
        vectors = self._vectors(center=False, basis="own")[self._at(layer, head)]
        return figures.blocks(
            vectors[order].T.tolist(),
            names,
            None,
            title=self._title(f"What {self._name(layer, head)} gives each prompt"),
            x_title="prompt, by topic",
            y_title="dimension",
            colour_title="value (units of the activation)",
            signed=True,
        )

    def _by_topic(self) -> tuple[Int[np.ndarray, " prompt"], list[str]]:
        """The prompts with those of one topic side by side, and their topics."""
        order = np.argsort(topic_numbers(self.prompt, self.topic), kind="stable")
        return order, [self.prompt.topic[i] for i in order]

    def _grid(self, values: Tensor, stars: Bool[np.ndarray, "layer head"] | None, title: str, says: str) -> go.Figure:
        return figures.heatmap(
            values.tolist(),
            x=self.head,
            y=self.layer,
            title=self._title(title),
            x_title="head",
            y_title="layer",
            colour_title=says,
            text=None if stars is None else [["*" if star else "" for star in row] for row in stars.tolist()],
        )

    def _at(self, layer: int, head: int) -> tuple[int, int]:
        return self.index_of("layer", layer), self.index_of("head", head)

    def _name(self, layer: int, head: int) -> str:
        return f"L{layer}H{head}" if self.of in ("head", "head_out") else f"layer {layer}"

    def _title(self, question: str) -> str:
        pooled = {"mean": "mean over tokens", "last": "last token"}.get(str(self.pool), f"token {self.pool}")
        return f"{question}\n{self.of}, {pooled}; {self.provenance.describe()}"

    # How it is computed

    def _vectors(
        self,
        *,
        center: bool,
        basis: Basis,
        order: Int[Tensor, " prompt"] | None = None,
        fit: Bool[Tensor, " prompt"] | None = None,
    ) -> Float64[Tensor, "layer head prompt d_head"]:
        """The stored vectors, centred or whitened by those prompts that `fit` marks (all)."""
        if self.vector is None:
            raise ValueError(
                "this run kept sums by topic only, which give raw cosines: run HeadTopicSimilarity(keep_vectors=True)"
            )
        if basis not in get_args(Basis):
            raise ValueError(f"basis is one of {', '.join(get_args(Basis))}; {brief(basis)} came")
        vectors = self.vector.double() if order is None else self.vector.double()[:, :, order]
        fitted = vectors if fit is None else vectors[:, :, fit]
        if basis == "pca":
            return whitened(vectors, fitted, self.pca_rank)
        return vectors - fitted.mean(2, keepdim=True) if center else vectors

    def _means(
        self,
        metric: Similarity,
        center: bool,
        basis: Basis,
        order: Int[Tensor, " prompt"] | None = None,
        fit: Bool[Tensor, " prompt"] | None = None,
    ) -> Callable[[Float64[Tensor, "*draw topic prompt"]], Float64[Tensor, "*draw unit topic other_topic"]]:
        """Mean similarities by topic as a function of how often each prompt counts in each topic."""
        metric = _checked(metric)
        vectors = self._vectors(center=center, basis=basis, order=order, fit=fit).flatten(0, 1)
        if metric == "distance":
            pairs = pairwise(vectors, metric)
            return lambda weights: group_means_of_pairs(pairs, weights)
        features: Features = features_of(vectors, metric)
        return lambda weights: group_means(features, weights)

    def _from_sums(self) -> Float64[Tensor, "layer head topic other_topic"]:
        """The means of raw cosines, which sums by topic give too."""
        return over_pairs(self.unit_sum @ self.unit_sum.mT - torch.diag_embed(self.count), self.count, self.count)

    def _shares(self) -> Float[Tensor, "layer head d_head"]:
        squares = self._vectors(center=False, basis="own").square().sum(2)
        return (squares / squares.sum(-1, keepdim=True)).float()


class HeadTopicSimilarity(Probe[HeadTopicSimilarityResult]):
    """What each head gives each prompt, for prompts that have topics.

    `of`: a head's mixed values (`head`), the same written to the residual stream (`head_out`), or a block's output or
    state. `pool`: the mean over a prompt's tokens (special ones out), its `last` token, or a position.
    `keep_vectors=False` keeps sums by topic only: memory that does not grow with prompts, and raw cosines only.

    >>> import lens_probes as lp
    >>> topics = {"animals": ["The cat sat.", "A dog ran."], "food": ["The bread rose.", "A soup boiled."]}
    >>> result = lp.HeadTopicSimilarity().run(lp.tiny.bridge(), topics)
    >>> tuple(result.topic_similarity().shape), tuple(result.separation().shape)
    ((3, 4, 2, 2), (3, 4))
    """

    of: Of = "head"
    pool: Literal["mean", "last"] | int = "mean"
    keep_vectors: bool = True
    layers: Layers = None

    def __post_init__(self) -> None:
        if self.of not in get_args(Of):
            raise ValueError(f"HeadTopicSimilarity(of=...) is one of {', '.join(get_args(Of))}; {brief(self.of)} came")
        check_pool(self, self.pool)

    def hooks(self, model: ModelView) -> list[str]:
        """What the unit gives, in every layer."""
        layers = model.layers(self.layers)
        if self.of == "head_out":
            return list(dict.fromkeys(name for layer in layers for name in model.hooks_written(layer)))
        return [self._hook(model, layer) for layer in layers]

    def measure(self, reading: Reading) -> HeadTopicSimilarityResult:
        """The vectors of the batch's prompts and their sums, a layer at a time."""
        model, prompts = reading.model, prompt_table(reading.tokens)
        layers = model.layers(self.layers)
        weights = pooling(reading.tokens, self.pool)
        vectors = []
        for layer in layers:
            activation = reading[self._hook(model, layer)].float()
            pooled = torch.einsum("pt,t...->p...", weights.to(activation.device), activation)
            if self.of == "head_out":
                model.check_written(layer, reading.__getitem__)
                pooled = torch.einsum("phk,hkd->phd", pooled, model.W_O(layer).float())
            vectors.append((pooled if pooled.ndim == 3 else pooled[:, None]).transpose(0, 1).cpu())
        vector = torch.stack(vectors)
        features = features_of(vector.double(), "cosine")
        topics = tuple(dict.fromkeys(prompts.topic))
        members = one_hot(topic_numbers(prompts, topics), len(topics))
        heads = self.of in ("head", "head_out")
        return HeadTopicSimilarityResult(
            of=self.of,
            pool=self.pool,
            layer=tuple(str(layer) for layer in layers),
            head=tuple(f"H{head}" for head in range(vector.shape[1])) if heads else ("block",),
            topic=topics,
            prompt=prompts,
            unit_sum=torch.einsum("tp,lhpd->lhtd", members, features.vectors),
            count=torch.einsum("tp,lhp->lht", members, features.valid.double()),
            vector=vector if self.keep_vectors else None,
        )

    def _hook(self, model: ModelView, layer: int) -> str:
        return model.hook_z(layer) if self.of in ("head", "head_out") else model.hook(self.of, layer)


def whitened(
    vectors: Float64[Tensor, "layer head prompt d_head"], fitted: Float64[Tensor, "layer head some d_head"], rank: int
) -> Float64[Tensor, "layer head prompt k"]:
    """Vectors along the `rank` strongest principal directions of `fitted`, each direction with variance 1 there."""
    mean = fitted.mean(2, keepdim=True)
    unknown = ~mean.isfinite().all(-1, keepdim=True)
    _, strength, directions = torch.linalg.svd((fitted - mean).masked_fill(unknown, 0), full_matrices=False)
    rank = min(rank, strength.shape[-1])
    scale = strength[..., None, :rank] / fitted.shape[2] ** 0.5
    along = (vectors - mean) @ directions[..., :rank, :].mT
    return torch.where(scale > 1e-12, along / scale, 0.0).masked_fill(unknown, torch.nan)


def _checked(metric: Similarity) -> Similarity:
    if metric not in SIMILARITIES:
        raise ValueError(f"metric is one of {', '.join(SIMILARITIES)}; {brief(metric)} came")
    return metric
