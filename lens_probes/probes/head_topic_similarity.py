"""HeadTopicSimilarity: are a head's outputs more similar for prompts of one topic than for prompts of different topics?

Every head (or block, or state) has one vector x per prompt: the mean over its tokens, or the vector of one token.

    topic_similarity[layer, head, topic, other_topic] = mean over pairs of prompts i != j of similarity(x_i, x_j)
    separation[layer, head] = mean over topics of the diagonal - mean over pairs of topics of the rest

    similarity:  cosine    x . y / (|x| |y|)                  -1 to 1, zero vectors excluded
                 scaled    x . y / (largest |z|^2 of all)     -1 to 1
                 distance  1 - |x - y| / (|x| + |y|)          0 to 1, 1 for two zero vectors

A head that does not respond to topics has a separation of 0, regardless of how similar its outputs are overall. (With
templates it is slightly below 0: its own topic has one prompt fewer of the same template to offer.) `test` permutes the
topics. Prompts of a topic also share words, length and form: write them in templates that every topic has, and pass
these as `groups`.

Source: the question is from "Searching for Modularity in Large Language Models" (lesswrong.com, 2022), whose readers
asked for single heads, for a similarity under which two near-zero vectors are similar, and for an orthogonal basis.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, Unpack, get_args

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from einops import einsum
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
from lens_probes.maths.topics import members
from lens_probes.messages import brief, interval
from lens_probes.model import ModelView
from lens_probes.probe import Probe
from lens_probes.reading import Reading
from lens_probes.result import Quantity, Shown, TopicResult, derived, measured, summed
from lens_probes.result.topics import PERMUTED
from lens_probes.settings import Layers
from lens_probes.text.prompts import Pool, pooled, pooling, prompt_table

Component = Literal["head", "head_out", "attn_out", "mlp_out", "resid_pre", "resid_mid", "resid_post"]
Basis = Literal["own", "pca"]

PROMPTS_PER_DIRECTION = 10  # with as many directions as prompts, all pairs are equally similar
NULL = f"a prompt's vector does not depend on its topic; {PERMUTED}"
SEPARATION = {  # the quantity by metric
    "cosine": Quantity("separation of topics", "cosine", low=-2, high=2),
    "scaled": Quantity("separation of topics", "scaled product", low=-2, high=2),
    "distance": Quantity("separation of topics", "distance", low=-1, high=1),
}


class HeadTopicSimilarityResult(TopicResult):
    """One vector per prompt and head, and sums by topic. Memory scales with the number of prompts."""

    headline = "mean_cosine"
    component: Component
    pool: Pool
    layer: tuple[str, ...]
    head: tuple[str, ...]
    unit_sum: Float64[Tensor, "layer head topic d_head"] = summed(
        "sum over a topic's prompts of the vectors, each divided by its length"
    )
    count: Float64[Tensor, "layer head topic"] = summed("number of these vectors that are not zero")
    vector: Float[Tensor, "layer head prompt d_head"] | None = measured("output of a head on a prompt", default=None)

    @derived("mean cosine between prompts of two topics", low=-1, high=1)
    def mean_cosine(self) -> Float[Tensor, "layer head topic other_topic"]:
        """`topic_similarity()`: over the pairs of prompts of two topics, without pairs of a prompt with itself."""
        return self.topic_similarity()

    @derived("largest share of one dimension in the squared norm", low=0, high=1)
    def brightness(self) -> Float[Tensor, "layer head"]:
        """The largest share of one dimension in the squared norm, summed over prompts; 1 / d_head if all are equal.

        The basis of `hook_z` is arbitrary (W_V and W_O can be rotated together): use `component="head_out"`.
        """
        return self._shares().amax(-1)

    @derived("dimension with the largest share in the squared norm", low=0, missing=-1)
    def brightest(self) -> Int[Tensor, "layer head"]:
        """The dimension with the largest share; -1 for a head whose vectors are zero or NaN."""
        shares = self._shares()
        return shares.argmax(-1).masked_fill(shares.isnan().any(-1), -1)

    def _shares(self) -> Float[Tensor, "layer head d_head"]:
        squares = self._vectors(center=False, basis="own").square().sum(2)
        return (squares / squares.sum(-1, keepdim=True)).float()

    @property
    def pca_rank(self) -> int:
        """Number of directions that `basis="pca"` keeps: one per ten prompts, at most d_head."""
        return max(1, min(len(self.prompt) // PROMPTS_PER_DIRECTION, self.unit_sum.shape[-1]))

    # Similarities

    def similarity(
        self,
        layer: int | str,
        head: int | str = 0,
        *,
        metric: Similarity = "cosine",
        center: bool = False,
        basis: Basis = "own",
    ) -> Float[Tensor, "prompt other_prompt"]:
        """The similarity of every pair of prompts, in head `head` of layer `layer`."""
        vectors = self._vectors(center=center, basis=basis)
        return pairwise(vectors[self._at(layer, head)], _checked(metric)).float()

    def topic_similarity(
        self, *, metric: Similarity = "cosine", center: bool = False, basis: Basis = "own"
    ) -> Float[Tensor, "layer head topic other_topic"]:
        """The mean similarity over the pairs of prompts of two topics, without pairs of a prompt with itself."""
        if self.vector is None and _checked(metric) == "cosine" and not center and basis == "own":
            return self._from_sums().float()
        means = self._means(metric, center, basis)(self.members())
        return means.unflatten(0, (len(self.layer), len(self.head))).float()

    def separation(
        self, *, metric: Similarity = "cosine", center: bool = False, basis: Basis = "own"
    ) -> Float[Tensor, "layer head"]:
        """Mean similarity within topics minus mean similarity between them."""
        self.by_topic()  # raises if there are no topics to compare
        return separation(self.topic_similarity(metric=metric, center=center, basis=basis))

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
        """Per head: separation with its 95 % interval, p, q over heads, and p against the largest head.

        `groups`, one label per prompt (such as its template): whole cells of topic x group are permuted within a group,
        so that a separation that only one template produces is not significant. Without groups, everything holds for
        these templates only. Prompts are resampled within cells; there is no interval if a topic has fewer than five
        prompts or a cell one. `p` is two-sided, (b+1)/(m+1); `q` the false-discovery rate over heads; `p_max` the p
        against the largest of all heads in each permutation, the family-wise error rate. `null_mean` is the mean
        separation over permutations. A head without a value (its outputs are zero) has NaN. See
        `lens_probes.maths.topics` for what a test of topics shows; the null is in `attrs["null"]`.
        """
        prompts = self.by_topic(groups)
        means = self._means(metric, center, basis, torch.from_numpy(prompts.order))
        # A prompt drawn twice makes no pair with itself. So resamples have fewer pairs within a template, and their
        # separation is too low; its spread is right.
        found, low, high, null = prompts.tested(
            lambda weights: separation(means(weights)),
            prompts.permutations(permutations, seed=seed),
            prompts.resamples(seed=seed),
            recentred=True,
        )
        return self.test_table(
            "layer",
            "head",
            effect=found,
            low=low,
            high=high,
            p=inference.permutation_p(found, null),
            p_max=inference.maximum_p(found, null),
            null_mean=null.mean(axis=0),
            permutations=permutations,
            says=SEPARATION[metric].title,
            null=NULL,
        )

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
        """The k heads with the largest separation on one part of the prompts, and their separation on the other.

        Prompts are split by groups (templates), or one by one without groups. `chosen` is the separation on the part on
        which heads were chosen (and mean and principal directions fitted), which is biased upwards; `held_out` is that
        on the other part.
        """
        prompts = self.by_topic(groups)
        first = torch.from_numpy(prompts.first_part(fraction, seed=seed))
        means = self._means(metric, center, basis, torch.from_numpy(prompts.order), fit=first)
        chosen, reported = (separation(means(prompts.members * part)).numpy() for part in (first, ~first))
        frame = self.cells("layer", "head").assign(chosen=chosen, held_out=reported)
        frame["rank_held_out"] = (-frame["held_out"]).rank(method="min").sub(1).astype("Int64")
        frame = frame.assign(prompts_chosen=int(first.sum()), prompts_held_out=int((~first).sum()))
        return frame.sort_values("chosen", ascending=False, kind="stable").head(k).reset_index(drop=True)

    # The page

    def shown(self) -> dict[str, Shown]:
        """Separation by head; in each head the similarity of topics and of prompts, and its output on each prompt."""
        axes = ("layer", "head", "topic", "other_topic")
        if self.vector is None:
            of_topics = Shown(self.quantity("mean_cosine"), axes, self.known("mean_cosine"))
            shown = {"mean_cosine": of_topics}
        else:
            pairs = pairwise(self._vectors(center=False, basis="own"), "cosine")
            of_prompts = Quantity("cosine between two prompts", low=-1, high=1)
            shown = super().shown()
            of_topics, vectors = shown["mean_cosine"], shown.pop("vector")
            shown["similarity"] = Shown(of_prompts, ("layer", "head", "prompt", "other_prompt"), pairs.numpy())
            shown["vector"] = vectors._replace(axes=("layer", "head", "prompt", "dimension"))
        if len(self.topic) < 2:
            return shown
        separated = separation(torch.from_numpy(of_topics.values).float()).double().numpy()
        return {"separation": Shown(SEPARATION["cosine"], ("layer", "head"), separated), **shown}

    def findings(self) -> list[str]:
        """How many heads separate topics, and which most."""
        if self.vector is None or len(self.topic) < 2:
            return []
        try:
            table = self.test(permutations=200)
        except ValueError as error:  # prompts given twice, say
            return [f"Topics were not compared: {error}."]
        if not np.isfinite(table["effect"]).any():
            return []
        best: dict[str, Any] = table.loc[table["effect"].idxmax()].to_dict()
        found = (table["q"] < 0.05) & (table["effect"] > 0)  # where it is negative, prompts of one topic are less alike
        return [
            f"{np.count_nonzero(found)} of {len(table)} heads tell {len(self.topic)} topics apart (q < 0.05, "
            f"{len(self.prompt)} prompts), L{best['layer']}{best['head']} most: prompts of one topic have a cosine "
            f"{best['effect']:.2f} higher ({interval(best['low'], best['high'])}). The null: {table.attrs['null']}."
        ]

    # Figures

    def figure(self, **look: Unpack[figures.Look]) -> go.Figure:
        """Separation by layer and head, coloured around 0; without topics, the mean cosine over all pairs of prompts.

        For stars, draw a test: `result.figure_test(result.test())`.
        """
        if len(self.topic) < 2:
            values = mean_pairwise_cosine(self.unit_sum.sum(2), self.count.sum(2).long())
            title, quantity = "Mean cosine between prompts, per head", Quantity("mean cosine", low=-1, high=1)
            return self.draw_grid(values, quantity, self.title(title), **look)
        title = self.title("Separation of topics per head: mean cosine within topics minus between them")
        return self.draw_grid(self.separation(), SEPARATION["cosine"], title, **look)

    def figure_topics(self, layer: int | str, head: int | str = 0, **look: Unpack[figures.Look]) -> go.Figure:
        """The mean cosine between the prompts of two topics, in one head."""
        means = self.topic_similarity()[self._at(layer, head)].tolist()
        names = [figures.named(topic) for topic in self.topic]
        return figures.heatmap(
            means,
            x=names,
            y=names,
            title=self.title(f"Mean cosine between prompts of two topics, {self._name(layer, head)}"),
            x_title="topic",
            y_title="topic",
            colour_title="mean cosine (-1 to 1)",
            signed=True,
            text=[[f"{value:z.2f}" for value in row] for row in means],
            **look,
        )

    def figure_prompts(
        self, layer: int | str, head: int | str = 0, *, metric: Similarity = "cosine", **look: Unpack[figures.Look]
    ) -> go.Figure:
        """The similarity of every pair of prompts in one head, ordered by topic, with borders between topics."""
        order, names = self.topic_blocks()
        return figures.blocks(
            self.similarity(layer, head, metric=metric)[order][:, order].tolist(),
            names,
            names,
            title=self.title(f"Similarity of every pair of prompts ({metric}), {self._name(layer, head)}"),
            x_title="prompt, by topic",
            y_title="prompt, by topic",
            colour_title=f"{metric} ({'0' if metric == 'distance' else '-1'} to 1)",
            signed=metric != "distance",
            **look,
        )

    def figure_values(self, layer: int | str, head: int | str = 0, **look: Unpack[figures.Look]) -> go.Figure:
        """The output of one head: one column per prompt, ordered by topic, one row per dimension."""
        order, names = self.topic_blocks()
        vectors = self._vectors(center=False, basis="own")[self._at(layer, head)]
        return figures.blocks(
            vectors[order].T.tolist(),
            names,
            None,
            title=self.title(
                f"{'Mean output' if self.pool == 'mean' else 'Output'} of {self._name(layer, head)} per prompt"
            ),
            x_title="prompt, by topic",
            y_title="dimension",
            colour_title=self.quantity("vector").title,
            signed=True,
            **look,
        )

    def conditions(self) -> str:
        """Component and pooling."""
        return f"{self.component}, {pooled(self.pool)}"

    def _at(self, layer: int | str, head: int | str) -> tuple[int, int]:
        return self.index_of("layer", layer), self.index_of("head", head)

    def _name(self, layer: int | str, head: int | str) -> str:
        i, j = self._at(layer, head)
        of_heads = self.component in ("head", "head_out")
        return f"L{self.layer[i]}{self.head[j]}" if of_heads else f"layer {self.layer[i]}"

    # How it is computed

    def _vectors(
        self,
        *,
        center: bool,
        basis: Basis,
        order: Int[Tensor, " prompt"] | None = None,
        fit: Bool[Tensor, " prompt"] | None = None,
    ) -> Float64[Tensor, "layer head prompt d_head"]:
        """The stored vectors, centred or whitened on the prompts that `fit` marks (default: all)."""
        if self.vector is None:
            raise ValueError(
                "this needs one vector per prompt; got sums by topic only, which give raw cosines and no test: run "
                "HeadTopicSimilarity(keep_vectors=True)"
            )
        if basis not in get_args(Basis):
            raise ValueError(f"basis must be one of {', '.join(get_args(Basis))}; got {brief(basis)}")
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
        """Mean similarities by topic, as a function of how often each prompt counts in each topic."""
        metric = _checked(metric)
        vectors = self._vectors(center=center, basis=basis, order=order, fit=fit).flatten(0, 1)
        if metric == "distance":
            pairs = pairwise(vectors, metric)
            return lambda weights: group_means_of_pairs(pairs, weights)
        features: Features = features_of(vectors, metric)
        return lambda weights: group_means(features, weights)

    def _from_sums(self) -> Float64[Tensor, "layer head topic other_topic"]:
        """The means of raw cosines, from sums by topic."""
        return over_pairs(self.unit_sum @ self.unit_sum.mT - torch.diag_embed(self.count), self.count, self.count)


class HeadTopicSimilarity(Probe[HeadTopicSimilarityResult]):
    """The output of each head on each prompt, for prompts that have topics.

    `component`: a head's mixed values (`head`), its output in the residual stream (`head_out`), or a block's output or
    state. `pool`: the mean over a prompt's tokens (special ones excluded), its `last` token, or a position.
    `keep_vectors=False` keeps sums by topic only: constant memory, raw cosines only, no tests.

    >>> import lens_probes as lp
    >>> topics = {"animals": ["The cat sat.", "A dog ran."], "food": ["The bread rose.", "A soup boiled."]}
    >>> result = lp.HeadTopicSimilarity().run(lp.tiny.bridge(), topics)
    >>> tuple(result.topic_similarity().shape), tuple(result.separation().shape)
    ((3, 4, 2, 2), (3, 4))
    """

    component: Component = "head"
    pool: Pool = "mean"
    keep_vectors: bool = True
    layers: Layers = None

    def hooks(self, model: ModelView) -> list[str]:
        """The component's activation in every layer; for `head_out`, also those that check that heads add up."""
        layers = model.layers(self.layers)
        if self.component == "head_out":
            return list(dict.fromkeys(name for layer in layers for name in model.hooks_written(layer)))
        return [self._hook(model, layer) for layer in layers]

    def measure(self, reading: Reading) -> HeadTopicSimilarityResult:
        """The vectors of the batch's prompts and their sums, layer by layer."""
        model, prompts = reading.model, prompt_table(reading.tokens)
        layers, weights = model.layers(self.layers), pooling(reading.tokens, self.pool)
        vectors = []
        for layer in layers:
            activation = reading[self._hook(model, layer)].float()
            x = einsum(weights.to(activation.device), activation, "prompt token, token ... -> prompt ...")
            if self.component == "head_out":
                model.check_written(layer, reading.__getitem__)
                x = einsum(x, model.W_O(layer).float(), "prompt head k, head k d -> prompt head d")
            vectors.append((x if x.ndim == 3 else x[:, None]).transpose(0, 1).cpu())
        vector = torch.stack(vectors)
        features = features_of(vector.double(), "cosine")
        of_topic, valid = members(prompts, prompts.topics), features.valid.double()
        heads = {} if self.component in ("head", "head_out") else {"head": ("block",)}
        return self.result(
            reading,
            layer=tuple(map(str, layers)),
            unit_sum=einsum(of_topic, features.vectors, "topic prompt, layer head prompt d -> layer head topic d"),
            count=einsum(of_topic, valid, "topic prompt, layer head prompt -> layer head topic"),
            vector=vector if self.keep_vectors else None,
            **heads,
        )

    def _hook(self, model: ModelView, layer: int) -> str:
        if self.component in ("head", "head_out"):
            return model.hook_z(layer)
        return model.hook(self.component, layer)


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
        raise ValueError(f"metric must be one of {', '.join(SIMILARITIES)}; got {brief(metric)}")
    return metric
