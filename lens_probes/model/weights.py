"""The weights of a text model, in one shape for all model classes."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from einops import einsum, repeat
from jaxtyping import Float
from torch import Tensor

from lens_probes.model.passes import Passes, undisturbed

ENTRIES = 4096  # embeddings that pass a norm at once


class Norm(NamedTuple):
    """A norm as weight * (state - its mean, if centred) / scale + bias."""

    weight: Float[Tensor, " d_model"]
    bias: Float[Tensor, " d_model"]
    centred: bool


class Weights(Passes):
    """Sizes, embeddings, norms, and the weights with which heads and neurons read and write."""

    @property
    def n_heads(self) -> int:
        """Number of query heads of a block."""
        return int(self.model.cfg.n_heads)

    @property
    def n_kv_heads(self) -> int:
        """Number of key/value heads of a block; fewer than query heads in grouped-query attention."""
        return int(getattr(self.model.cfg, "n_key_value_heads", None) or self.n_heads)

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return int(self.model.cfg.d_model)

    @property
    def n_ctx(self) -> int | None:
        """The longest prompt, in tokens."""
        return getattr(self.model.cfg, "n_ctx", None)

    # Embeddings

    @property
    def embed_mean(self) -> Float[Tensor, " d_model"]:
        """The mean embedding, used to identify the model."""
        return self.W_E.mean(0, dtype=torch.float32).cpu()

    def embedding_at(self, position: int) -> Float[Tensor, "vocab d_model"]:
        """The embedding of each token id at this position: W_E + W_pos[position].

        On post-norm encoders the type embedding is added, and the embedding norm applied.
        """
        self.check_positions()
        W_pos = self.model.pos_embed.W_pos.detach()
        first = len(W_pos) - int(self.model.cfg.n_ctx)  # in OPT and RoBERTa the first two rows are padding
        return self.adapter.embedded(self.W_E + W_pos[first + position])

    def check_positions(self) -> None:
        """Raise unless the model has learned absolute positions."""
        if not self.has_positions:
            raise ValueError(
                f"reference 'embed_pos' needs learned absolute positions; got {self.name}, which has none: use 'embed'"
            )

    @property
    def has_positions(self) -> bool:
        """Whether the model has learned absolute positions."""
        return hasattr(self.model, "pos_embed") and hasattr(self.model.pos_embed, "W_pos")

    def embeddings(self) -> dict[str, str]:
        """The activations whose sum is a decoder's first state, each with its label."""
        # A Bridge lists hook_pos_embed for rotary models too, but never computes it.
        position = {self._hook("position_embed"): "position"} if self.has_positions else {}
        return {self.hook_token_embed: "embed", **position}

    @property
    def unembedding(self) -> Float[Tensor, "vocab d_model"]:
        """The unembedding direction of each token id: the columns of W_U, as rows."""
        return self.model.W_U.detach().T

    @property
    def unembedding_bias(self) -> Float[Tensor, " vocab"]:
        """The unembedding bias of each token id; zeros if the model has none."""
        return self.model.b_U.detach()

    # What neurons and heads write

    def W_out(self, layer: int) -> Float[Tensor, "unit d_model"]:
        """The output direction of each neuron of a layer, times the model's residual multiplier (Granite)."""
        weight = getattr(self.model.blocks[layer].mlp, "W_out", None)
        if weight is None:
            raise ValueError(
                f"layer {layer} of {self.name} must have one MLP whose neurons write rows of W_out; got "
                f"{type(self.model.blocks[layer].mlp).__name__}, as in a mixture of experts: use another model"
            )
        return self._as_added(layer, weight.detach())

    def W_O(self, layer: int) -> Float[Tensor, "head d_head d_model"]:
        """The output matrix of each head, times the model's residual multiplier (Granite)."""
        return self._as_added(layer, self._of_heads(layer, "W_O"))

    def _of_heads(self, layer: int, name: str) -> Float[Tensor, "any d d_other"]:
        """The weights of a layer's heads; raises where a layer has none, or has them in another form."""
        try:
            return getattr(self.model.blocks[layer].attn, name).detach()
        except (AttributeError, NotImplementedError) as error:
            block = self.model.blocks[layer]
            raise ValueError(
                f"the attention of layer {layer} of {self.name} must have one {name} per head; got "
                f"{type(getattr(block, 'attn', block)).__name__}, as in latent attention or a state-space layer: leave "
                f"the layer out, or use another model"
            ) from error

    def output_bias(self, layer: int) -> Float[Tensor, " d_model"] | float:
        """The bias that attention adds after W_O, with the residual multiplier; 0 if the model has none."""
        return self._bias(layer, getattr(self.model.blocks[layer].attn, "b_O", None))

    def neuron_bias(self, layer: int) -> Float[Tensor, " d_model"] | float:
        """The bias that the MLP adds after W_out, with the residual multiplier; 0 if the model has none."""
        return self._bias(layer, getattr(self.model.blocks[layer].mlp, "b_out", None))

    def _bias(self, layer: int, own: Tensor | None) -> Float[Tensor, " d_model"] | float:
        return 0.0 if own is None else self._as_added(layer, own.detach()).float()

    def attention_bias(self, layer: int) -> Float[Tensor, " d_model"]:
        """What attention adds for every token: b_O, and the value biases of all heads through W_O."""
        values = einsum(self.value_bias(layer), self.W_O(layer).float(), "head d_head, head d_head d_model -> d_model")
        return values + self.output_bias(layer)

    def _as_added(self, layer: int, written: Tensor) -> Tensor:
        """Granite multiplies the outputs of attention and MLP before it adds them to the stream."""
        multiplier = float(getattr(self.model.blocks[layer], "residual_contribution_scale", 1.0))
        return written if multiplier == 1 else multiplier * written.float()

    # What heads read. With grouped queries, HookedTransformer repeats keys and values per query head; a Bridge does
    # not.

    def W_K(self, layer: int) -> Float[Tensor, "kv_head d_model d_head"]:
        """The key matrix of each key/value head."""
        return self._per_kv_head(self._of_heads(layer, "W_K"))

    def W_V_shared(self, layer: int) -> Float[Tensor, "kv_head d_model d_head"]:
        """The value matrix of each key/value head."""
        return self._per_kv_head(self._of_heads(layer, "W_V"))

    def W_V(self, layer: int) -> Float[Tensor, "head d_model d_head"]:
        """The value matrix of each head; with grouped queries several heads share one."""
        return self._per_head(self._of_heads(layer, "W_V"))

    def value_bias(self, layer: int) -> Float[Tensor, "head d_head"]:
        """The constant part of each head's values: b_V, and the input norm's bias through W_V.

        Attention passes it on unchanged, since a pattern's rows sum to 1. Processed weights have it in b_O.
        """
        bias = self.input_norm(layer).bias @ self.W_V(layer).float()
        own = getattr(self.model.blocks[layer].attn, "b_V", None)
        return bias if own is None else bias + self._per_head(own.detach()).float()

    def check_keys_and_values(self, layers: Iterable[int]) -> None:
        """Raise unless each of these layers has one W_K and one W_V per key/value head."""
        for layer in layers:
            for name in ("W_K", "W_V"):
                self._of_heads(layer, name)

    def values(self, layer: int, states: Float[Tensor, "... d_model"]) -> Float[Tensor, "... kv_head d_head"]:
        """The values of a block's heads (`hook_value`), computed from states before the block."""
        weights, block = self.W_V_shared(layer), self.model.blocks[layer]
        with undisturbed(self.model):
            normed = block.ln1(states).to(weights.dtype)
        bias = getattr(block.attn, "b_V", None)
        made = einsum(normed, weights, "... d_model, kv_head d_model d_head -> ... kv_head d_head")
        return made if bias is None else made + self._per_kv_head(bias.detach())

    def token_values(self, layer: int, kv_head: int) -> Float[Tensor, "vocab d_head"]:
        """The values that a key/value head makes of each token's embedding, as heads mix them; products in float32."""
        block = self.model.blocks[layer]
        weight = self.W_V_shared(layer)[kv_head].float()
        bias = getattr(block.attn, "b_V", None)
        rows = []
        with undisturbed(self.model):
            for some in self.token_embeddings.split(ENTRIES):
                made = block.ln1(some[None])[0].float() @ weight
                rows.append(made if bias is None else made + self._per_kv_head(bias.detach())[kv_head].float())
        return self.adapter.clipped(torch.cat(rows))

    def per_head(self, shared: Float[Tensor, "token kv_head d_head"]) -> Float[Tensor, "token head d_head"]:
        """Keys or values, repeated for the query heads that share them."""
        group = self.n_heads // shared.shape[1]
        return repeat(shared, "token kv_head d_head -> token (kv_head group) d_head", group=group)

    def _per_head(self, shared: Float[Tensor, "any ..."]) -> Float[Tensor, "head ..."]:
        return repeat(shared, "kv_head ... -> (kv_head group) ...", group=self.n_heads // len(shared))

    def _per_kv_head(self, per_head: Float[Tensor, "any ..."]) -> Float[Tensor, "kv_head ..."]:
        return per_head[:: len(per_head) // self.n_kv_heads]

    # Norms

    def input_norm(self, layer: int) -> Norm:
        """The norm before a block's attention; the identity for post-norm encoders."""
        norm = self.adapter.input_norm(layer)
        if norm is None:
            one = torch.ones(self.d_model, device=self.device)
            return Norm(one, torch.zeros_like(one), False)
        return self._norm(norm)

    def check_input_norm(self) -> None:
        """Raise for a model without a norm before attention: `value_bias` would be wrong."""
        if not hasattr(self.model.blocks[0], "ln1"):
            raise ValueError(
                f"a model must have a norm before its attention; got {self.name}, which has none: use another model"
            )

    def attention_norm(self, layer: int) -> Norm | None:
        """The norm between a block's attention and the residual stream (Gemma); None if there is none."""
        norm = getattr(self.model.blocks[layer], "ln1_post", None)
        return None if norm is None else self._norm(norm)

    def final_norm(self) -> Norm:
        """The norm before the unembedding."""
        return self._norm(self.model.ln_final)

    def _norm(self, norm: torch.nn.Module) -> Norm:
        """Computed from outputs: model classes store a norm's weight in different ways (Gemma without the 1)."""
        signs = torch.ones(self.d_model, device=self.device, dtype=torch.float32)
        signs[1::2] = -1.0  # mean 0 and mean square 1: a norm leaves it as it is
        probes = torch.stack([torch.zeros_like(signs), 100 * signs, 100 * torch.ones_like(signs)])
        with undisturbed(self.model):
            bias, signed, constant = norm(probes.to(self.W_E.dtype)[None])[0].float()
        return Norm((signed - bias) * signs, bias, bool((constant - bias).norm() < 0.1 * (signed - bias).norm()))
