"""The part of a model that a search over inputs uses: its vocabulary, and its states for any embeddings."""

from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from lens_probes.maths.token_search import Following
from lens_probes.maths.vocabulary import check_entries
from lens_probes.model import Continuation, ModelView
from lens_probes.reading import TOKENS_PER_BATCH, finite


class SoftTokens:
    """A model up to one activation, with its vocabulary in float32.

    >>> from lens_probes.examples import tiny
    >>> view = ModelView(tiny.bridge())
    >>> layer, ids = SoftTokens(view, view.hook("resid_post", 1)), torch.tensor([5, 6, 7])
    >>> soft = layer.soft(layer.vocabulary[ids][None], ids)[0]
    >>> torch.allclose(soft, layer.states(ids), atol=1e-5), layer.nearest(layer.vocabulary[ids]).tolist()
    (True, [5, 6, 7])
    """

    def __init__(self, view: ModelView, hook: str) -> None:
        self.view, self.hook = view, hook
        self.vocabulary = view.token_embeddings.float()
        check_entries(self.vocabulary, f"the embedding of {view.name}")
        self.mean, self.spread = self.vocabulary.mean(0), self.vocabulary.std(0)

    @cached_property
    def directions(self) -> Float[Tensor, "vocab d_model"]:
        """The vocabulary, normalised to length 1."""
        return normalize(self.vocabulary, dim=-1)

    def states(self, ids: Int[Tensor, " token"]) -> Float[Tensor, "token d"]:
        """The states of these tokens."""
        everything = torch.ones(1, len(ids), dtype=torch.bool)
        return finite(self.hook, self.view.activations(ids[None], everything, [self.hook])[self.hook][0].float())

    def soft(
        self, embeddings: Float[Tensor, "restart token d_model"], ids: Int[Tensor, " token"]
    ) -> Float[Tensor, "restart token d"]:
        """The states of tokens with these embeddings in place of the ids'. Gradients flow to the embeddings."""
        return self.view.from_embeddings(embeddings, ids.expand(len(embeddings), -1), [self.hook])[0].float()

    def after(self, prefix: Int[Tensor, " token"]) -> Following:
        """The states of one more token after a prefix; decoders only."""
        following = Continuation(self.view, prefix, self.hook)
        return Following(
            lambda ids: finite(self.hook, following.states(ids).float()),
            lambda embeddings: following.soft(embeddings).float(),
        )

    def nearest(self, embeddings: Float[Tensor, "*any d_model"]) -> Int[Tensor, "*any"]:
        """The vocabulary entry with the largest cosine."""
        flat = embeddings.flatten(end_dim=-2)
        found = torch.cat([(some @ self.directions.T).argmax(-1) for some in flat.split(256)])
        return found.unflatten(0, embeddings.shape[:-1]).cpu()

    def same(self, found: Int[Tensor, "*any"], ids: Int[Tensor, "*any"]) -> Bool[Tensor, "*any"]:
        """Whether each pair of ids has the same vocabulary row; -1 is no id."""
        equal = (self.vocabulary[found.clamp(min=0)] == self.vocabulary[ids]).all(-1).cpu()
        return equal & (found >= 0)


class Varied:
    """A prompt in which some tokens are varied, and the mean activation over these tokens."""

    def __init__(self, layer: SoftTokens, ids: Int[Tensor, " token"], varied: Bool[Tensor, " token"]) -> None:
        self.layer, self.ids, self.varied = layer, ids, varied
        self._continues = int(varied.sum()) == 1 and not layer.view.encoder  # later tokens have no effect on it
        self.batch = TOKENS_PER_BATCH if self._continues else max(1, TOKENS_PER_BATCH // len(ids))

    @cached_property
    def _following(self) -> Continuation:
        return Continuation(self.layer.view, self.ids[: int(self.varied.nonzero())], self.layer.hook)

    def soft(self, embeddings: Float[Tensor, "restart token d_model"]) -> Float[Tensor, "restart d"]:
        """The activation with these embeddings for all tokens of the prompt. Gradients flow to the embeddings."""
        return self._mean(self.layer.soft(embeddings, self.ids))

    def states(self, candidates: Int[Tensor, " candidate"]) -> Float[Tensor, "candidate d"]:
        """The activation with each of these tokens at all varied positions."""
        if self._continues:
            return self._following.states(candidates).float()
        filled, hook = torch.where(self.varied, candidates[:, None], self.ids), self.layer.hook
        return self._mean(self.layer.view.activations(filled, torch.ones_like(filled, dtype=torch.bool), [hook])[hook])

    def _mean(self, states: Float[Tensor, "batch token d"]) -> Float[Tensor, "batch d"]:
        return states[:, self.varied.to(states.device)].float().mean(1)
