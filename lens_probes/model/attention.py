"""How attention uses queries, keys and values: rotary positions, scale, soft cap, clipping, masks."""

from functools import cached_property

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lens_probes.model.passes import Passes, undisturbed


class Attention(Passes):
    """From queries and keys to the softmax input."""

    def hook_query(self, layer: int) -> str:
        """The activation that holds the queries, after rotary positions and norms if there is such a hook."""
        return self._hook("rotated_query" if self._hooks_rotated else "query", layer)

    def hook_key(self, layer: int) -> str:
        """The same for keys; one per key/value head."""
        return self._hook("rotated_key" if self._hooks_rotated else "key", layer)

    @cached_property
    def _hooks_rotated(self) -> bool:
        """Whether the model calls the hook of rotated queries: for NeoX a Bridge lists it but never calls it.

        In latent attention it holds the part that is rotated, and the hook of queries has all of them.
        """
        name = self._hook("rotated_query")
        if name not in self.hook_names or self._is_latent(self._hook("query")):
            return False
        with undisturbed(self.model):
            _, cache = self.model.run_with_cache(torch.zeros(1, 1, dtype=torch.int64, device=self.device))
        return name in dict(cache.items())

    def rotated(
        self, x: Float[Tensor, "token any d_head"], position: Int[Tensor, " token"]
    ) -> Float[Tensor, "token any d_head"]:
        """Queries or keys after rotary positions: applied here if the hook comes before them (NeoX, GPT-J)."""
        if (
            self._hooks_rotated
            or self._is_latent(self.hook_query(0))
            or self.model.cfg.positional_embedding_type != "rotary"
        ):
            return x
        table = next((part.embed_positions for _, part in self.modules() if hasattr(part, "embed_positions")), None)
        if isinstance(table, Tensor):
            return _pairs_turned(x, table.to(x.device)[position.to(x.device)])
        rotary = next((part for _, part in self.modules() if hasattr(part, "inv_freq") and _runs(part)), None)
        with undisturbed(self.model):
            tables = None if rotary is None else rotary(x[None], position[None].to(x.device))
        if not isinstance(tables, tuple):  # Llama 4 has complex numbers
            raise ValueError(
                f"{self.name} must rotate queries and keys as GPT-NeoX or GPT-J does; got another kind of rotary "
                f"positions: use another model"
            )
        cos, sin = (part[0, :, None] for part in tables)
        turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
        first, second = turned.chunk(2, dim=-1)
        return torch.cat([turned * cos + torch.cat([-second, first], dim=-1) * sin, rest], dim=-1)

    def attention_scale(self, layer: int) -> float:
        """The factor of the product of query and key, usually 1 / sqrt(d_head)."""
        return self.adapter.attention_scale(layer)

    def scores(self, products: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
        """The softmax input: scaled products of queries and keys, with the model's soft cap if any (Gemma)."""
        cap = float(getattr(self.model.cfg, "attn_scores_soft_cap", None) or -1.0)
        return cap * torch.tanh(products / cap) if cap > 0 else products

    def mixed(self, values: Float[Tensor, "... d_head"]) -> Float[Tensor, "... d_head"]:
        """The values that heads sum with their weights: those of `hook_value`, clipped if the model clips (OLMo)."""
        return self.adapter.clipped(values)

    # Masks

    def seen(
        self, layer: int, ids: Int[Tensor, " token"], pattern: Float[Tensor, "head query key"]
    ) -> Bool[Tensor, "query key"]:
        """Which tokens of a prompt each query may attend to: in decoders itself and earlier ones, or a window of them.

        A weight of 0 does not prove that a token is masked: it may have underflowed. If all heads have a weight of 0,
        the scores decide.
        """
        n = len(ids)
        may = self.adapter.seen(n, pattern.device)
        if not ((pattern == 0).all(0) & may).any():
            return may
        if len(self._masks.get(layer, ())) < n:  # a mask depends on positions only: that of a longer prompt contains it
            self._masks[layer] = self._masked(layer, ids)
        return may & ~self._masks[layer][:n, :n].to(may.device)

    @cached_property
    def _masks(self) -> dict[int, Bool[Tensor, "query key"]]:
        return {}

    def _masked(self, layer: int, ids: Int[Tensor, " token"]) -> Bool[Tensor, "query key"]:
        """Where a layer's scores are masked."""
        name = self._hook("scores", layer)
        scores = self.activations(ids[None], torch.ones(1, len(ids), dtype=torch.bool), [name])[name][0]
        masked = ~unmasked(scores)
        if masked.triu(1).any():
            return masked
        # Where TransformerLens leaves attention to Hugging Face, these "scores" are the pattern (OPT, GPT-J, BERT).
        window = self.adapter.window(layer)
        return torch.zeros_like(masked) if window is None else torch.ones_like(masked).tril(-window)


def _runs(part: torch.nn.Module) -> bool:
    """Whether a module computes anything: a Bridge has some that only hold the buffers of others."""
    return type(part).forward is not torch.nn.Module.forward


def unmasked(scores: Float[Tensor, "*any head query key"]) -> Bool[Tensor, "*any query key"]:
    """Where a head's scores are not masked: masked ones are -inf or the smallest number (CodeGen divides it)."""
    return (scores > torch.finfo(scores.dtype).min / 32).any(-3)


def _pairs_turned(
    x: Float[Tensor, "token any d_head"], table: Float[Tensor, "token turned"]
) -> Float[Tensor, "token any d_head"]:
    """Rotate neighbouring dimensions as GPT-J and CodeGen do. `table` has all sines, then all cosines, one per pair."""
    sin, cos = table[:, None].to(x.dtype).chunk(2, dim=-1)
    turned, rest = x[..., : table.shape[-1]], x[..., table.shape[-1] :]
    even, odd = rearrange(turned, "token head (pair two) -> two token head pair", two=2)
    both = [even * cos - odd * sin, odd * cos + even * sin]
    return torch.cat([rearrange(both, "two token head pair -> token head (pair two)"), rest], -1)
