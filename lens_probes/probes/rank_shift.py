"""RankShift: does a token's state stay close to the token's own embedding, or move closer to other embeddings?

For every layer and token, with h the state at the read point and w[v] the reference vector of vocabulary entry v:

    score[layer, token] = closeness of h[layer, token] and w[id[token]]          (cosine, product or distance)
    rank[layer, token]  = #{v != id[token] : v is strictly closer to h than id[token]}       0 to vocab - 1

    null_rank[layer, token] = the rank, in the same state, of another token of the same prompt and word class

Rank 0 means that no entry is closer than the token's own. Ranks of random states are uniform, (vocab - 1) / 2 on
average. A rank alone can mislead: if all scores are near 0, a small step changes it greatly. So there are also scores,
`anisotropy` and a null. Attention may move the control token into this position, so the null understates the effect.

Source: the question is from "Paying Attention, Part 2" (github.com/danavery/attention-encodings). Its published numbers
use untransposed weights and one position for all tokens; our tests show the difference.
"""

import hashlib
from collections.abc import Iterator
from typing import Annotated, Literal, Unpack

import numpy as np
import plotly.graph_objects as go
import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor
from torch.nn.functional import normalize

from lens_probes import figures
from lens_probes.maths.similarity import mean_pairwise_cosine
from lens_probes.maths.vocabulary import Metric, check_entries, kept, nearest, ranks
from lens_probes.model import ModelView, ReadPoint
from lens_probes.probe import Probe
from lens_probes.probes.residual_mean import ResidualMeanResult
from lens_probes.reading import Reading
from lens_probes.result import LayerTokenResult, Quantity, derived, measured, summed
from lens_probes.settings import Count, Layers, Seed, described
from lens_probes.text.prompts import Tokens

Reference = Literal["embed", "embed_pos", "unembed"]

STATES_AT_ONCE = 2**22  # float32 numbers of states in memory at a time: 16 MiB, and a few copies
SCORES = {
    "cosine": {"unit": "cosine", "low": -1.0, "high": 1.0},
    "dot": {"unit": "product"},
    "euclidean": {"unit": "distance", "low": 0.0, "low_on_top": True},
}


class RankShiftResult(LayerTokenResult):
    """Ranks and scores of every token's own vocabulary entry, by layer. Memory scales with the number of tokens."""

    at: ReadPoint
    reference: Reference
    metric: Metric
    n_vocab: int
    centered: bool
    vocab: dict[int, str]  # the texts of the closest entries
    rank: Int[Tensor, "layer token"] = measured(
        "rank of the token's own entry", low=0, missing=-1, null="null_rank", low_on_top=True
    )
    score: Float[Tensor, "layer token"] = measured("score of the token's own entry")
    norm: Float[Tensor, "layer token"] = measured("length of the state before centring", low=0)
    null_rank: Int[Tensor, "layer token"] = measured("rank of another token of the prompt and class", low=0, missing=-1)
    unit_sum: Float64[Tensor, "layer d_model"] = summed("sum of the compared states, each divided by its length")
    neighbour_ids: Int[Tensor, "layer token k"] | None = measured(
        "the nearest entries, nearest first", low=0, missing=-1, into="vocab", default=None
    )
    neighbour_score: Float[Tensor, "layer token k"] | None = measured("score of the nearest entries", default=None)
    overlap: Float[Tensor, "layer token"] | None = measured(
        "share of the nearest entries that were nearest in the previous layer", low=0, high=1, default=None
    )

    @derived("mean cosine over all pairs of compared states", low=-1, high=1)
    def anisotropy(self) -> Float[Tensor, " layer"]:
        """Mean cosine over all pairs of compared states, special tokens excluded; 0 if directions are uniform."""
        n = (~self.token.special).sum().expand(len(self.layer))
        return mean_pairwise_cosine(self.unit_sum, n).float()

    @derived("change of the rank since the first layer")
    def shift(self) -> Float64[Tensor, "layer token"]:
        """The rank minus the rank in the first layer of this result; positive is away from the token."""
        rank = torch.from_numpy(self.known("rank"))
        return rank - rank[:1]

    def figure(self, **look: Unpack[figures.Look]) -> go.Figure:
        """Median rank and score by word class over layers, with 95 % intervals; dashed, the null and random states.

        Classes of fewer than ten words are left out, unless there are no others.
        """
        panels = self.class_panels("rank", "score")
        middle = [(self.n_vocab - 1) / 2] * len(self.layer)
        panels[self.quantity("rank").title].append(
            figures.Line("random states", middle, colour=figures.GREY, dashed=True)
        )
        return self.draw_classes(panels, "Rank and score of each token's own entry: medians by word class", **look)

    def figure_neighbours(self, token: int | str, prompt: int = 0, **look: Unpack[figures.Look]) -> go.Figure:
        """The entries closest to one token's state, layer by layer; the token's own is shaded."""
        if self.neighbour_ids is None or self.neighbour_score is None:
            raise ValueError(
                f"figure_neighbours needs the nearest entries; got none from {self.provenance.probe or 'this run'}: "
                f"run RankShift(neighbours=10)"
            )
        row = self.token.row(prompt, token)
        own, ids, scores = self.token.id[row], self.neighbour_ids[:, row], self.neighbour_score[:, row]
        columns = {
            "layer": list(self.layer),
            "own rank": [f"{rank:,.0f}" for rank in self.known("rank")[:, row].tolist()],
        }
        shade = [["white"] * len(self.layer)] * 2
        for k in range(ids.shape[1]):
            columns[f"rank {k}"] = [
                f"{figures.visible(self.vocab[i], 11)} {score:z.2f}" if i >= 0 else ""
                for i, score in zip(ids[:, k].tolist(), scores[:, k].tolist(), strict=True)
            ]
            shade.append(["#FFE9B0" if i == own else "white" for i in ids[:, k]])
        place = f"{figures.quoted(self.token.text[row])}, token {self.token.position[row]} of prompt {prompt}"
        return figures.table(columns, title=self.title(f"Entries nearest to {place}"), shade=shade, **look)

    def quantity(self, name: str) -> Quantity:
        """Description, unit and range of a tensor; for ranks and scores, those of this run's vocabulary and metric."""
        if name in ("rank", "null_rank"):
            return super().quantity(name)._replace(high=self.n_vocab - 1)
        if name in ("score", "neighbour_score"):
            return super().quantity(name)._replace(**SCORES[self.metric])
        return super().quantity(name)

    def conditions(self) -> str:
        """Read point, reference and metric."""
        return f"{self.at} against {self.reference}, {self.metric}{', centred' if self.centered else ''}"


class RankShift(Probe[RankShiftResult]):
    """The rank of each token's own entry in its state, by layer.

    `at`: read point of the state. `reference`: rows of W_E, the same plus the token's own position, or columns of W_U.
    `metric`: the measure of closeness. `center`: a `ResidualMean` result; its mean states (and the mean reference
    vector) are subtracted first. `neighbours`: number of nearest entries to store. `overlap`: overlap of the k nearest
    entries with the previous layer's. `null_seed`: seed of the null's draw.

    >>> import lens_probes as lp
    >>> result = lp.RankShift(at="resid_pre").run(lp.tiny.bridge("llama"), "Time flies like an arrow.")
    >>> result.rank[0].tolist() == [0] * len(result.token)  # without positions, the first state is the embedding
    True
    """

    at: ReadPoint = "resid_mid"
    reference: Reference = "embed"
    metric: Metric = "cosine"
    center: Annotated[ResidualMeanResult, described("the result of ResidualMean().run(model, texts)")] | None = None
    neighbours: Count = 0
    overlap: Count = 0
    null_seed: Seed = 0
    layers: Layers = None

    def hooks(self, model: ModelView) -> dict[str, str]:
        """The read point of every layer."""
        if self.center is not None:
            check_entries(self._vocabulary(model), f"the reference vectors of {model.name}")
            self.center.of(model, self.at, model.layers(self.layers))
        if self.reference == "embed_pos":
            model.embedding_at(0)  # raises for a model without learned positions before the forward pass
        if max(self.neighbours, self.overlap) > model.d_vocab:
            raise ValueError(
                f"RankShift(neighbours=..., overlap=...) must be at most {model.d_vocab}, the size of the vocabulary; "
                f"got {max(self.neighbours, self.overlap)}"
            )
        return model.states(self.at, self.layers)

    def measure(self, reading: Reading) -> RankShiftResult:
        """Ranks of the token's own and the null entry, a few layers at a time."""
        model, tokens, hooks = reading.model, reading.tokens, list(reading.points.values())
        layers = model.layers(self.layers)
        means = self.center.of(model, self.at, layers) if self.center else None
        targets = torch.stack([tokens.id, null_ids(tokens, self.null_seed)], dim=1).to(model.device)
        n_nearest = max(self.neighbours, self.overlap)
        size = (len(layers), len(tokens))
        rank, score = torch.empty(*size, 2, dtype=torch.int64), torch.empty(*size, 2)
        ids, closeness = torch.empty(*size, n_nearest, dtype=torch.int64), torch.empty(*size, n_nearest)
        norm, unit_sum = torch.empty(size), torch.empty(len(layers), model.d_model, dtype=torch.float64)
        step = max(1, STATES_AT_ONCE // (len(tokens) * model.d_model))
        for first in range(0, len(layers), step):
            here = slice(first, first + step)
            states = torch.stack([reading[hook].float() for hook in hooks[here]])
            norm[here] = states.norm(dim=-1).cpu()
            if means is not None:
                states -= means[here, None].to(states.device)
            directions = normalize(states[:, ~tokens.special], dim=-1)
            unit_sum[here] = directions.sum(1, dtype=torch.float64).cpu()
            for at, vocabulary in self._references(model, tokens):
                origin = vocabulary.mean(0, dtype=torch.float32) if means is not None else None
                rows = states[:, at].flatten(0, 1)
                own = targets[at].repeat(len(states), 1)
                found = ranks(rows, vocabulary, own, metric=self.metric, origin=origin)
                for kept_here, values in zip((rank, score), found, strict=True):
                    kept_here[here, at] = values.unflatten(0, (len(states), -1)).cpu()
                if n_nearest:
                    found = nearest(rows, vocabulary, n_nearest, metric=self.metric, origin=origin)
                    for kept_here, values in zip((ids, closeness), found, strict=True):
                        kept_here[here, at] = values.unflatten(0, (len(states), -1)).cpu()
        return self.result(
            reading,
            n_vocab=model.d_vocab,
            centered=self.center is not None,
            vocab=model.texts_of(ids[..., : self.neighbours]),
            rank=rank[..., 0],
            score=score[..., 0],
            norm=norm,
            null_rank=rank[..., 1],
            unit_sum=unit_sum,
            neighbour_ids=ids[..., : self.neighbours] if self.neighbours else None,
            neighbour_score=closeness[..., : self.neighbours] if self.neighbours else None,
            overlap=layer_overlap(ids[..., : self.overlap]) if self.overlap else None,
        )

    def _references(
        self, model: ModelView, tokens: Tokens
    ) -> Iterator[tuple[Int[Tensor, " row"], Float[Tensor, "vocab d_model"]]]:
        """The tokens that share reference vectors, and those vectors: one group, or one per position."""
        if self.reference == "embed_pos":
            for position in tokens.position.unique().tolist():
                yield (tokens.position == position).nonzero().flatten(), model.embedding_at(position)
        else:
            yield torch.arange(len(tokens)), self._vocabulary(model)

    def _vocabulary(self, model: ModelView) -> Float[Tensor, "vocab d_model"]:
        """The reference vectors, without positions."""
        return model.unembedding if self.reference == "unembed" else model.W_E


def null_ids(tokens: Tokens, seed: int) -> Int[Tensor, " token"]:
    """For each token, the id of another token of its prompt and word class; -1 if there is none.

    Its own id and that of the next token, which the state predicts, are excluded. Drawn uniformly; the random seed is
    `seed`, the prompt's ids and the position, so that batches change nothing.
    """
    drawn = []
    for _, prompt in tokens.by_prompt():
        ids, special = prompt.id.numpy(), prompt.special.numpy()
        word_class = np.asarray(prompt.word_class)
        key = hashlib.blake2b(f"{seed}:{ids.tolist()}".encode(), digest_size=16).digest()
        for position in range(len(ids)):
            alike = (word_class == word_class[position]) & (special == special[position]) & (ids != ids[position])
            if position + 1 < len(ids):
                alike &= ids != ids[position + 1]
            candidates = ids[alike]
            digest = hashlib.blake2b(str(position).encode(), key=key, digest_size=8).digest()
            drawn.append(int(candidates[int.from_bytes(digest) % len(candidates)]) if len(candidates) else -1)
    return torch.tensor(drawn, dtype=torch.int64)


def layer_overlap(ids: Int[Tensor, "layer token k"]) -> Float[Tensor, "layer token"]:
    """The share of each state's nearest entries that were nearest in the previous layer; NaN in the first layer."""
    overlap = torch.full(ids.shape[:2], torch.nan)
    for layer in range(1, len(ids)):
        overlap[layer] = kept(ids[layer], ids[layer - 1])
    return overlap
