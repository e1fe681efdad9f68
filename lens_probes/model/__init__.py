"""The only file that knows TransformerLens: hook names, weights, unembedding, and the differences of its model classes.

HookedTransformer (3.x) and TransformerBridge (3.x, 4.x) are told apart by an attribute, never by importing a class
that one of the releases does not have; TransformerLens itself is not imported here at all.
"""

import copy
import difflib
import importlib.metadata
import inspect
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import cache, cached_property, partial
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import gelu

from lens_probes.examples.demo import HEADLESS
from lens_probes.messages import brief

if TYPE_CHECKING:
    from lens_probes.result import Provenance

ReadPoint = Literal["resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out"]
"""Where in a block a state of width d_model is read: the residual stream at three places, or what a part writes."""

READ_POINTS: tuple[ReadPoint, ...] = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")

Spans = list[tuple[int, int] | None]

TOKENS_OF_WHOLE_PREFIXES = 512  # of a pass, where a cache cannot be trusted: as many as a batch of prompts holds

HEAD_TOLERANCE = 0.1  # of the spread of log-probabilities: float32 errs by 1e-5, bfloat16 by 1e-2, a missed part by 1
EXACT = 1e-3  # of what is compared, in float32 and float64
HALF = 0.03  # in half precision


class Norm(NamedTuple):
    """A norm as weight * (state - its mean, if centred) / scale + bias."""

    weight: Float[Tensor, " d_model"]
    bias: Float[Tensor, " d_model"]
    centred: bool


class View:
    """What models of text and of images both have: a name, layers, activations by name, modules."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.is_bridge = hasattr(model, "original_model")

    @property
    def name(self) -> str:
        """The name the model was loaded under; of a folder its last part."""
        name = str(getattr(self.model.cfg, "model_name", "unnamed"))
        return Path(name).name if Path(name).is_absolute() else name

    @property
    def class_name(self) -> str:
        """HookedTransformer or TransformerBridge."""
        return type(self.model).__name__

    @property
    def processed(self) -> bool:
        """Whether norms were folded and weights centred, as HookedTransformer.from_pretrained does by default."""
        if self.is_bridge:
            return bool(self.model._weights_processed)
        return str(self.model.cfg.normalization_type).endswith("Pre")

    @property
    def n_layers(self) -> int:
        """Number of blocks."""
        return int(self.model.cfg.n_layers)

    @property
    def versions(self) -> tuple[tuple[str, str], ...]:
        """Versions of the packages a number depends on."""
        return _versions()

    def units(self, asked: Sequence[int], hook: str, width: int) -> list[int]:
        """The numbers of the units asked for, each once, of an activation of so many."""
        if not isinstance(asked, Sequence) or any(type(number) is not int for number in asked):
            raise TypeError(f"units={brief(asked)}: list their numbers, as units=[3] or units=range(8)")
        for number in asked:
            if not 0 <= number < width:
                raise ValueError(f"unit {number} was asked for and {hook} of {self.name} has units 0 to {width - 1}")
        if not len(asked) or len(set(asked)) < len(asked):
            raise ValueError(f"units={brief(asked)} names no unit, or one twice: list each unit once")
        return list(asked)

    def layers(self, layers: Iterable[int] | slice | None) -> tuple[int, ...]:
        """The layers asked for, in order; `None` is all, negative ones count from the end.

        A slice is one of all layers; the layers of a set, which has no order, come in ascending order.
        """
        if isinstance(layers, Integral) and not isinstance(layers, bool):
            raise TypeError(f"layers={layers} is one number: write layers=[{layers}], or None for all layers")
        every = range(self.n_layers)
        asked: Any = every if layers is None else every[layers] if isinstance(layers, slice) else layers
        asked = asked.tolist() if hasattr(asked, "tolist") else asked  # of arrays and tensors
        if not isinstance(asked, Sequence | Set) or isinstance(asked, str):  # an iterator is empty when asked again
            raise TypeError(f"layers must be a list of layer numbers, as layers=[0, 3]; got layers={brief(layers)}")
        for layer in asked:
            if not isinstance(layer, Integral) or isinstance(layer, bool):
                raise TypeError(f"layers are whole numbers, counted from 0; {brief(layer)} came")
            if not -self.n_layers <= int(layer) < self.n_layers:
                raise ValueError(f"layer {layer} was asked for and {self.name} has layers 0 to {self.n_layers - 1}")
        numbers = [int(layer) % self.n_layers for layer in asked]
        numbers = sorted(numbers) if isinstance(asked, Set) else numbers
        if not numbers or len(set(numbers)) < len(numbers):
            raise ValueError(f"layers={brief(layers)} names no layer, or one twice: list each layer once")
        return tuple(numbers)

    def hook(self, at: ReadPoint, layer: int) -> str:
        """The name of the activation at a read point of a block."""
        if at not in READ_POINTS:
            raise ValueError(f"read point {brief(at)} is not one of {', '.join(READ_POINTS)}")
        (layer,) = self.layers([layer])
        name = f"blocks.{layer}.hook_{at}"
        if name not in self.model.hook_dict:
            present = [point for point in READ_POINTS if f"blocks.{layer}.hook_{point}" in self.model.hook_dict]
            raise ValueError(
                f"read point {at!r} does not exist in {self.name} (blocks whose attention and MLP run in parallel have "
                f"no state between them): use one of {', '.join(present)}"
            )
        return name

    def hook_units(self, at: Literal["neuron"] | ReadPoint, layer: int) -> str:
        """The activation that holds a layer's neurons, or the units of a read point."""
        if at != "neuron" and at not in READ_POINTS:
            raise ValueError(f"at={brief(at)} is not one of neuron, {', '.join(READ_POINTS)}")
        (layer,) = self.layers([layer])
        return self.hook_neurons(layer) if at == "neuron" else self.hook(at, layer)

    def hook_neurons(self, layer: int) -> str:
        """The activation that holds each neuron's value after the activation function (and its gate)."""
        return f"blocks.{layer}.mlp.hook_post"

    def states(self, at: ReadPoint, layers: Iterable[int] | slice | None) -> dict[str, str]:
        """A read point through these layers: label and activation of every state, such as `3_post`."""
        return {self.label(at, layer): self.hook(at, layer) for layer in self.layers(layers)}

    def label(self, at: ReadPoint, layer: int) -> str:
        """How a layer axis names this state: `0_pre`, `3_mid`, `3_post`, `3_attn_out`."""
        return f"{layer}_{at.removeprefix('resid_')}"

    def check_hooks(self, names: Iterable[str]) -> None:
        """Raise for a name that the model does not have: it would pass silently beside a good one."""
        for name in names:
            if name not in self.model.hook_dict:
                close = difflib.get_close_matches(name, self.model.hook_dict, n=3)
                hint = f"did you mean {', '.join(close)}?" if close else "list(model.hook_dict) names those that do"
                raise ValueError(f"activation {name!r} does not exist in {self.name} ({self.class_name}): {hint}")

    def modules(self) -> Iterator[tuple[str, torch.nn.Module]]:
        """Every module by name; on a Bridge also those of the Hugging Face model that it wraps."""
        yield from self.model.named_modules()
        if self.is_bridge:
            yield from self.model.original_model.named_modules(prefix="original_model")


class ModelView(View):
    """What lens_probes reads of a model: its activations by name, its weights, its tokenizer. It writes nothing.

    Wraps a `HookedTransformer` or a `TransformerBridge`, raw or processed, decoder or post-norm encoder.

    >>> from lens_probes.examples import tiny
    >>> view = ModelView(tiny.bridge("gpt2"))
    >>> view.hook("resid_mid", 1), view.label("resid_mid", 1), tuple(view.W_E.shape) == (view.d_vocab, view.d_model)
    ('blocks.1.hook_resid_mid', '1_mid', True)
    """

    def __init__(self, model: Any) -> None:
        if isinstance(model, ModelView):
            model = model.model
        _check_wrapped(model)
        if not hasattr(model, "run_with_cache") or not hasattr(model, "cfg"):
            raise TypeError(
                f"a model is a HookedTransformer or a TransformerBridge of TransformerLens; {type(model).__name__} "
                f"came: load one with lens_probes.load_model(name)"
            )
        super().__init__(model)
        self.continues_prefixes = True  # until a key/value cache breaks its promise
        names = model.hook_dict
        if not hasattr(model, "blocks") or "blocks.0.hook_resid_pre" not in names or not hasattr(model, "W_E"):
            raise TypeError(
                f"lens_probes reads models with one stack of blocks over text tokens; {self.name} "
                f"({type(model).__name__}) is another kind: use a decoder, or BERT or RoBERTa as a TransformerBridge "
                f"(FeatureVisualization reads models of images)"
            )
        if not self.is_bridge and type(model).__name__ != "HookedTransformer":
            # HookedEncoder uses the same hook names for other states (hook_resid_mid before LN1, for one).
            raise TypeError(
                f"{type(model).__name__} gives other states under the same hook names: load {self.name} as a "
                f"TransformerBridge (lens_probes.load_model) instead"
            )

    # What the model is

    @property
    def encoder(self) -> bool:
        """Whether attention goes both ways and norms stand after the residual sum: BERT and RoBERTa."""
        return hasattr(self.model, "mlm_head")  # cfg.attention_dir says "causal" for BERT on 3.9

    @property
    def n_heads(self) -> int:
        """Number of query heads of a block."""
        return int(self.model.cfg.n_heads)

    @property
    def n_kv_heads(self) -> int:
        """Number of key/value heads of a block: fewer than heads where queries are grouped."""
        return int(getattr(self.model.cfg, "n_key_value_heads", None) or self.n_heads)

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return int(self.model.cfg.d_model)

    @property
    def d_vocab(self) -> int:
        """Number of rows of the embedding."""
        return int(self.W_E.shape[0])

    @property
    def n_ctx(self) -> int | None:
        """The longest prompt, in tokens."""
        return getattr(self.model.cfg, "n_ctx", None)

    @property
    def device(self) -> torch.device:
        """Where the embeddings are, and the token ids must be."""
        return self.W_E.device

    # Weights

    @property
    def W_E(self) -> Float[Tensor, "vocab d_model"]:
        """The embedding, one row a token id (on Gemma without the factor sqrt(d_model) on a Bridge)."""
        return self.model.W_E.detach()

    @cached_property
    def token_embeddings(self) -> Float[Tensor, "vocab d_model"]:
        """What `hook_token_embed` holds for each token id: W_E, on a Bridge of Gemma times sqrt(d_model)."""
        rows = self.embedded(torch.arange(self.d_vocab))
        return self.W_E if torch.equal(rows, self.W_E) else rows

    def embedded(self, ids: Int[Tensor, " token"]) -> Float[Tensor, "token d_model"]:
        """What `hook_token_embed` holds for these token ids, by a pass that ends there."""
        column, seen = ids.to(self.device)[:, None], {}
        hooks = [(self.hook_token_embed, _remembering(seen, self.hook_token_embed, [self.hook_token_embed]))]
        with undisturbed(self.model), suppress(_Reached):
            self.model.run_with_hooks(column, return_type=None, fwd_hooks=hooks, attention_mask=torch.ones_like(column))
        return seen[self.hook_token_embed][:, 0]

    @property
    def unembedding(self) -> Float[Tensor, "vocab d_model"]:
        """The direction that the unembedding reads for each token id: the columns of W_U as rows."""
        return self.model.W_U.detach().T

    def W_out(self, layer: int) -> Float[Tensor, "unit d_model"]:
        """What each neuron of a layer writes, with the model's residual multiplier (Granite)."""
        weight = getattr(self.model.blocks[layer].mlp, "W_out", None)
        if weight is None:
            raise ValueError(
                f"layer {layer} of {self.name} must have one MLP whose neurons write rows of W_out; got "
                f"{type(self.model.blocks[layer].mlp).__name__}, as in a mixture of experts: use another model"
            )
        return self._as_added(layer, weight.detach())

    def W_O(self, layer: int) -> Float[Tensor, "head d_head d_model"]:
        """What each head writes for its mixed values, with the model's residual multiplier (Granite)."""
        return self._as_added(layer, self.model.blocks[layer].attn.W_O.detach())

    def output_bias(self, layer: int) -> Float[Tensor, " d_model"] | float:
        """What attention adds for no head: b_O, with the residual multiplier; 0 where the model has none."""
        own = getattr(self.model.blocks[layer].attn, "b_O", None)
        return 0.0 if own is None else self._as_added(layer, own.detach()).float()

    def _as_added(self, layer: int, written: Tensor) -> Tensor:
        """Granite multiplies what attention and MLP put out before it adds it to the stream."""
        multiplier = float(getattr(self.model.blocks[layer], "residual_contribution_scale", 1.0))
        return written if multiplier == 1 else multiplier * written.float()

    def W_V(self, layer: int) -> Float[Tensor, "head d_model d_head"]:
        """What each head reads as values; with grouped queries several heads share one."""
        return self._per_head(self.model.blocks[layer].attn.W_V.detach())

    def value_bias(self, layer: int) -> Float[Tensor, "head d_head"]:
        """The part of each head's values that depends on no token: its bias, and the input norm's bias as it reads it.

        Attention passes it on whole, since a pattern's rows sum to 1; processed weights have it in b_O.
        """
        block = self.model.blocks[layer]
        bias = self._norm(block.ln1)[1] @ self.W_V(layer).float()
        own = getattr(block.attn, "b_V", None)
        return bias if own is None else bias + self._per_head(own.detach()).float()

    def attention_bias(self, layer: int) -> Float[Tensor, " d_model"]:
        """What attention adds whatever the tokens: b_O, and all heads' value biases through W_O."""
        return torch.einsum("hk,hkd->d", self.value_bias(layer), self.W_O(layer).float()) + self.output_bias(layer)

    def W_K(self, layer: int) -> Float[Tensor, "kv_head d_model d_head"]:
        """What each key/value head reads as keys."""
        return self._per_kv_head(self.model.blocks[layer].attn.W_K.detach())

    def W_V_shared(self, layer: int) -> Float[Tensor, "kv_head d_model d_head"]:
        """What each key/value head reads as values."""
        return self._per_kv_head(self.model.blocks[layer].attn.W_V.detach())

    def _per_kv_head(self, per_head: Float[Tensor, "any ..."]) -> Float[Tensor, "kv_head ..."]:
        return per_head[:: len(per_head) // self.n_kv_heads]  # HookedTransformer repeats them for every query head

    def mixed(self, values: Float[Tensor, "... d_head"]) -> Float[Tensor, "... d_head"]:
        """What the heads take weighted sums of: what `hook_value` holds, clipped where the model clips (OLMo)."""
        config = getattr(self.model.original_model, "config", None) if self.is_bridge else None
        clip = getattr(config, "clip_qkv", None)
        return values if clip is None else values.clamp(-clip, clip)

    def values(self, layer: int, states: Float[Tensor, "... d_model"]) -> Float[Tensor, "... kv_head d_head"]:
        """The values that a block's heads make of states before the block: what `hook_v` holds."""
        block = self.model.blocks[layer]
        with undisturbed(self.model):
            normed = block.ln1(states)
        weights = self.W_V_shared(layer)
        bias = getattr(block.attn, "b_V", None)
        made = torch.einsum("...d,hdk->...hk", normed.to(weights.dtype), weights)
        return made if bias is None else made + self._per_kv_head(bias.detach())

    def attention_scale(self, layer: int) -> float:
        """What the product of a query and a key is multiplied by, usually 1 / sqrt(d_head)."""
        attention = self.model.blocks[layer].attn
        if not self.is_bridge:
            return 1 / float(attention.attn_scale)
        own = attention.original_component
        if (scaling := getattr(own, "scaling", None)) is not None:
            return float(scaling)
        # GPT-Neo does not scale, and says so nowhere; its attention alone is local or global.
        return 1.0 if hasattr(own, "attention_type") else self.W_K(layer).shape[-1] ** -0.5

    def scores(self, products: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
        """Scaled products of queries and keys as the softmax gets them: with a soft cap, if there is one (Gemma)."""
        cap = float(getattr(self.model.cfg, "attn_scores_soft_cap", None) or -1.0)
        return cap * torch.tanh(products / cap) if cap > 0 else products

    def input_norm(self, layer: int) -> "Norm":
        """The norm before a block's attention; on post-norm encoders, which have none, one that does nothing."""
        if self.encoder:
            one = torch.ones(self.d_model, device=self.device)
            return Norm(one, torch.zeros_like(one), False)
        return self._norm(self.model.blocks[layer].ln1)

    def check_input_norm(self) -> None:
        """Raise for a model that norms what attention adds only, so that `value_bias` does not know what it reads."""
        if not hasattr(self.model.blocks[0], "ln1"):
            raise ValueError(
                f"{self.name} has no norm before its attention, which this probe does not know how to read"
            )

    def final_norm(self) -> "Norm":
        """What the final norm does to a state, beyond dividing it by its scale."""
        return self._norm(self.model.ln_final)

    def attention_norm(self, layer: int) -> "Norm | None":
        """The norm between a block's attention and the residual stream (Gemma), if there is one."""
        norm = getattr(self.model.blocks[layer], "ln1_post", None)
        return None if norm is None else self._norm(norm)

    def _norm(self, norm: torch.nn.Module) -> "Norm":
        """Read off by what it returns: model classes keep a norm's weight in different places, Gemma without its 1."""
        signs = torch.ones(self.d_model, device=self.device, dtype=torch.float32)
        signs[1::2] = -1.0  # mean 0 and mean square 1: a norm leaves it as it is
        probes = torch.stack([torch.zeros_like(signs), 100 * signs, 100 * torch.ones_like(signs)])
        with undisturbed(self.model):
            bias, signed, constant = norm(probes.to(self.W_E.dtype)[None])[0].float()
        return Norm((signed - bias) * signs, bias, bool((constant - bias).norm() < 0.1 * (signed - bias).norm()))

    def _per_head(self, shared: Float[Tensor, "kv_head ..."]) -> Float[Tensor, "head ..."]:
        """One a query head: a Bridge has one a key/value head, HookedTransformer has them repeated."""
        return shared.repeat_interleave(self.n_heads // len(shared), 0)

    def embedding_at(self, position: int) -> Float[Tensor, "vocab d_model"]:
        """What the model itself makes of each token id at this position: W_E + W_pos[position].

        On post-norm encoders also the type embedding, and all of it through the embedding norm.
        """
        rows = self.W_E + self._W_pos[position]
        if self.encoder:
            token_type = self.model.token_type_embed.original_component.weight.detach()
            rows = self.model.embed_ln.original_component(rows + token_type[0]).detach()
        return rows

    @property
    def _has_positions(self) -> bool:
        return hasattr(self.model, "pos_embed") and hasattr(self.model.pos_embed, "W_pos")

    @property
    def _W_pos(self) -> Float[Tensor, "position d_model"]:
        if not self._has_positions:
            raise ValueError(
                f"reference 'embed_pos' needs learned absolute positions and {self.name} has none: use 'embed'"
            )
        W_pos = self.model.pos_embed.W_pos.detach()
        return W_pos[W_pos.shape[0] - int(self.model.cfg.n_ctx) :]  # OPT and RoBERTa keep two rows of padding first

    @property
    def unembedding_bias(self) -> Float[Tensor, " vocab"]:
        """What the unembedding adds to the logit of each token id; zeros where the model has no such bias."""
        return self.model.b_U.detach()

    def unembed(self, states: Float[Tensor, "row d_model"]) -> Float[Tensor, "row vocab"]:
        """Logits as the model itself would read them from these states, the product with the vocabulary in float32.

        On BERT and RoBERTa through the language-model head (dense layer, activation, norm). From the last layer's
        states this is what the model returns, to its own rounding.
        """
        product = self.normed(states).float() @ self.unembedding.T.float()
        return self.capped(product + self.unembedding_bias.float())

    def normed(self, states: Float[Tensor, "row d_model"]) -> Float[Tensor, "row d_model"]:
        """What the unembedding reads of these states, in the model's precision: the final norm, or an encoder's head.

        Gradients flow to `states` where the caller has them switched on.
        """
        self._refuse_headless()
        states = states.to(self.W_E.dtype)
        differentiable = torch.is_grad_enabled()
        with undisturbed(self.model), torch.set_grad_enabled(differentiable):
            if self.encoder:
                states = self._mlm_activation(self.model.mlm_head(states[None])[0])
            return self.model.ln_final(states[None])[0]

    def capped(self, logits: Float[Tensor, "... vocab"]) -> Float[Tensor, "... vocab"]:
        """What the model does to each logit after unembedding: a soft cap (Gemma) or a factor (Cohere, Granite)."""
        cap = float(getattr(self.model.cfg, "output_logits_soft_cap", None) or -1.0)
        if self.is_bridge and hasattr(self.model.adapter, "apply_output_logits_transform"):
            return self.model.adapter.apply_output_logits_transform(logits)
        return cap * torch.tanh(logits / cap) if cap > 0 else logits

    @property
    def logit_scale(self) -> float:
        """What every logit is multiplied by before any soft cap (Cohere, Granite); 1 in most models."""
        small = torch.full((1,), 1e-3, dtype=torch.float64, device=self.device)  # where a soft cap does nothing
        return round(float(self.capped(small)) / 1e-3, 6)

    def check_head(self) -> None:
        """Raise unless the logits that we read from the last state of a few tokens are the model's own."""
        self._refuse_headless()
        if not self._head_error <= HEAD_TOLERANCE:  # not a number is no agreement either
            raise ValueError(
                f"the logits of {self.name} are not its final norm, unembedding and soft cap alone (they differ by "
                f"{self._head_error:.2g} of their spread): it cannot be read through its head, use another model"
            )

    def _refuse_headless(self) -> None:
        if self.name in HEADLESS:
            raise ValueError(f"{self.name} was trained without a language-model head: its logits mean nothing")
        if not hasattr(self.model, "unembed") or not hasattr(self.model, "ln_final"):
            raise ValueError(f"{self.name} has no language-model head: load it with one, or ask another probe")

    @cached_property
    def _head_error(self) -> float:
        """The largest difference between our log-probabilities and the model's own, over their spread."""
        last = self.hook("resid_post", -1)
        ids = torch.arange(8, device=self.device)[None] % self.d_vocab
        with undisturbed(self.model):
            logits, cache = self.model.run_with_cache(ids, names_filter=[last])
            own = logits[0].float().log_softmax(-1)
            read = self.unembed(cache[last][0]).log_softmax(-1)
        return float((own - read).abs().max() / own.std(-1).mean())

    @property
    def _mlm_activation(self) -> Any:
        """The function after the head's dense layer: BERT's configuration chooses it, RoBERTa's is always GELU."""
        parts = self.model.original_model.modules()
        return next((part.transform_act_fn for part in parts if hasattr(part, "transform_act_fn")), gelu)

    # Names of activations

    def hook(self, at: ReadPoint, layer: int) -> str:
        """The name of the activation at a read point of a block.

        On post-norm encoders `resid_mid` is the sum of attention output and residual before its norm, and `attn_out`
        what attention adds to that sum.
        """
        name = super().hook(at, layer)
        if self.encoder and at in ("resid_mid", "attn_out"):
            (layer,) = self.layers([layer])
            # hook_attn_out, as attn.hook_out, is after the norm
            return f"blocks.{layer}.ln1.hook_in" if at == "resid_mid" else f"blocks.{layer}.attn.o.hook_out"
        return name

    def stream(self, layers: Iterable[int] | slice | None, *, incl_mid: bool = False) -> dict[str, str]:
        """The residual stream through these layers: label and activation of every state, in the order they come about.

        Layer 0 brings the embeddings, `0_pre`, with it.
        """
        points: dict[str, str] = {}
        for layer in sorted(self.layers(layers)):
            first: list[ReadPoint] = ["resid_pre"] if layer == 0 else []
            middle: list[ReadPoint] = ["resid_mid"] if incl_mid else []
            for at in (*first, *middle, "resid_post"):
                points[self.label(at, layer)] = self.hook(at, layer)
        return points

    def embeddings(self) -> dict[str, str]:
        """The activations that a decoder's first state is the sum of, and what they are."""
        # A Bridge lists hook_pos_embed for rotary models too, and never computes it.
        return {"hook_embed": "embed"} | ({"hook_pos_embed": "position"} if self._has_positions else {})

    def hook_z(self, layer: int) -> str:
        """The activation that holds each head's mixed values, before W_O."""
        return f"blocks.{layer}.attn.hook_z"

    def hook_query(self, layer: int) -> str:
        """The activation that holds the queries, after rotary positions and norms where TransformerLens has them so."""
        return f"blocks.{layer}.attn.hook_{'rot_q' if self._hooks_rotated else 'q'}"

    def hook_key(self, layer: int) -> str:
        """The same of the keys, one a key/value head."""
        return f"blocks.{layer}.attn.hook_{'rot_k' if self._hooks_rotated else 'k'}"

    def hook_plain_key(self, layer: int) -> str:
        """The activation that holds the keys before rotary positions and norms, one a key/value head."""
        return f"blocks.{layer}.attn.hook_k"

    def hook_value(self, layer: int) -> str:
        """The activation that holds the values, one a key/value head."""
        return f"blocks.{layer}.attn.hook_v"

    def hook_pattern(self, layer: int) -> str:
        """The activation that holds the attention pattern."""
        return f"blocks.{layer}.attn.hook_pattern"

    def hooks_written(self, layer: int) -> list[str]:
        """The activations that `check_written` compares: heads, and the stream before and after attention."""
        before = self.hook("resid_pre", layer)
        if self._parallel:
            return [self.hook_z(layer), before, self.hook("resid_post", layer), self.hook("mlp_out", layer)]
        return [self.hook_z(layer), before, self.hook("resid_mid", layer)]

    def check_written(self, layer: int, activation: Callable[[str], Float[Tensor, "token ..."]]) -> None:
        """Raise unless what the heads write, and the bias, add up to what attention adds to the stream."""
        z, *stream = (activation(name) for name in self.hooks_written(layer))
        written = torch.einsum("thk,hkd->td", z.float(), self.W_O(layer).float()) + self.output_bias(layer)
        self._check_added(written, stream, layer, "heads", "attention", "ln1_post")

    def check_neurons(self, layer: int) -> None:
        """Raise unless what the neurons write of a few tokens, and the bias, add up to what the MLP adds."""
        before, after = f"blocks.{layer}.hook_resid_mid", self.hook("resid_post", layer)
        others = [self.hook("attn_out", layer)] if self._parallel else []
        if self._parallel:
            before = self.hook("resid_pre", layer)
        elif self.encoder:  # hook_resid_mid is the sum after the MLP, hook_attn_out the state before it
            before, after = f"blocks.{layer}.hook_attn_out", before
        names = [self.hook_neurons(layer), before, after, *others]
        ids, found = torch.arange(8, device=self.device)[None] % self.d_vocab, {}
        hooks = [(name, _remembering(found, name, names)) for name in names]
        with undisturbed(self.model), suppress(_Reached):  # nothing later is needed
            self.model.run_with_hooks(ids, return_type=None, fwd_hooks=hooks, attention_mask=torch.ones_like(ids))
        value, *stream = (found[name].reshape(8, -1) for name in names)  # OPT's MLP has prompts laid end to end
        bias = getattr(self.model.blocks[layer].mlp, "b_out", None)
        written = value.float() @ self.W_out(layer).float()
        written = written if bias is None else written + self._as_added(layer, bias.detach()).float()
        self._check_added(written, stream, layer, "neurons", "the MLP", "ln2_post")

    @property
    def _parallel(self) -> bool:
        """Whether attention and MLP read the same state and are added to it at once."""
        return "blocks.0.hook_resid_mid" not in self.model.hook_dict

    def _check_added(
        self,
        written: Float[Tensor, "token d_model"],
        stream: Sequence[Float[Tensor, "token d_model"]],
        layer: int,
        parts: str,
        block: str,
        norm_after: str,
    ) -> None:
        """Raise unless this is the stream after less the stream before, and less what else was added at once."""
        before, after, *others = stream
        if (norm := getattr(self.model.blocks[layer], norm_after, None)) is not None:
            with undisturbed(self.model):
                written = norm(written.to(self.W_E.dtype)[None])[0].float()
        added = after.float() - before.float() - sum(other.float() for other in others)
        size, off = added.norm(dim=-1), (written - added).norm(dim=-1)
        # The difference has the rounding of what it is taken of.
        rounding = torch.finfo(after.dtype).eps * torch.stack(list(stream)).float().norm(dim=-1).amax(0)
        wrong = ~(off <= tolerance(after.dtype) * size + 2 * rounding)
        if wrong.any():
            raise ValueError(
                f"what the {parts} of layer {layer} of {self.name} write must add up to what {block} adds to the "
                f"residual stream; got sums that are off by {float((off / size)[wrong].max()):.2g} of it: use another "
                f"model"
            )

    @cached_property
    def _hooks_rotated(self) -> bool:
        """Whether rotated queries are to be had: a Bridge lists them for NeoX too, and never computes them."""
        name = "blocks.0.attn.hook_rot_q"
        if name not in self.model.hook_dict:
            return False
        with undisturbed(self.model):
            _, cache = self.model.run_with_cache(torch.zeros(1, 1, dtype=torch.int64, device=self.device))
        return name in cache.keys()  # noqa: SIM118  (an ActivationCache has no __contains__)

    def rotated(
        self, x: Float[Tensor, "token any d_head"], position: Int[Tensor, " token"]
    ) -> Float[Tensor, "token any d_head"]:
        """Queries or keys of these activations with their positions, where they do not have them yet (NeoX, GPT-J)."""
        if self._hooks_rotated or self.model.cfg.positional_embedding_type != "rotary":
            return x
        table = next((part.embed_positions for _, part in self.modules() if hasattr(part, "embed_positions")), None)
        if isinstance(table, Tensor):
            return _pairs_turned(x, table.to(x.device)[position.to(x.device)])
        rotary = next((part for _, part in self.modules() if hasattr(part, "inv_freq")), None)
        if rotary is None:
            raise ValueError(f"{self.name} turns queries and keys by positions in a way that we do not know")
        with undisturbed(self.model):
            cos, sin = (part[0, :, None] for part in rotary(x[None], position[None].to(x.device)))
        turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
        first, second = turned.chunk(2, dim=-1)
        return torch.cat([turned * cos + torch.cat([-second, first], dim=-1) * sin, rest], dim=-1)

    def per_head(self, shared: Float[Tensor, "token kv_head d_head"]) -> Float[Tensor, "token head d_head"]:
        """Keys or values of key/value heads as the heads see them."""
        return self._per_head(shared.transpose(0, 1)).transpose(0, 1)

    @property
    def hook_token_embed(self) -> str:
        """The activation that holds what each token's id alone gives: rows of W_E."""
        return "embed.hook_out" if self.encoder else "hook_embed"  # an encoder's hook_embed is after its norm

    def refuse_other(self, what: str, provenance: "Provenance", embed_mean: Float[Tensor, " d_model"]) -> None:
        """Raise unless data with this provenance and mean embedding came from this very model."""
        own = self.embed_mean
        same = embed_mean.shape == own.shape and (embed_mean - own).norm() <= 1e-3 * own.norm()
        if not same or provenance.processed != self.processed or provenance.model != self.name:
            raise ValueError(
                f"{what} of {provenance.model} ({'processed' if provenance.processed else 'raw'} weights) and "
                f"{self.name} ({'processed' if self.processed else 'raw'}) is asked: make it with the model itself"
            )

    @property
    def embed_mean(self) -> Float[Tensor, " d_model"]:
        """The mean embedding: data of another model are told by it."""
        return self.W_E.mean(0, dtype=torch.float32).cpu()

    # The forward pass

    def activations(
        self, ids: Int[Tensor, "prompt position"], mask: Bool[Tensor, "prompt position"], names: Sequence[str]
    ) -> dict[str, Tensor]:
        """The named activations of one padded batch, nothing else kept; the model is as before afterwards."""
        if not names:
            return {}
        options: dict[str, Any] = {"return_type": None, "attention_mask": mask.to(self.device, torch.int64)}
        if self.is_bridge and not any("pattern" in name or "attn_scores" in name for name in names):
            options["output_attentions"] = False  # or every layer's pattern is kept to the end of the pass
        with undisturbed(self.model):
            _, cache = self.model.run_with_cache(ids.to(self.device), names_filter=list(names), **options)
        missing = (
            [name for name in names if cache.get(name, None) is None]
            if isinstance(cache, dict)
            else [
                name
                for name in names
                if name not in cache.keys()  # noqa: SIM118  (an ActivationCache has no __contains__)
            ]
        )
        if missing:
            raise ValueError(
                f"activation {missing[0]!r} exists in {self.name} but was not computed: it may have to be switched on, "
                f"as model.set_use_attn_result(True) does for hook_result, and attn_implementation='eager' for patterns"
            )
        return {name: cache[name] for name in names}

    def seen(
        self, layer: int, ids: Int[Tensor, " token"], pattern: Float[Tensor, "head query key"]
    ) -> Bool[Tensor, "query key"]:
        """Which tokens of a prompt each query may look at: on decoders those before it, or a window of them.

        A weight of 0 says neither: it may be too small for the precision. Where all heads have one, the scores of the
        prompt say what is masked.
        """
        n = len(ids)
        everything = torch.ones(n, n, dtype=torch.bool, device=pattern.device)
        may = everything if self.encoder else everything.tril()
        if not ((pattern == 0).all(0) & may).any():
            return may
        if (
            len(self._masks.get(layer, ())) < n
        ):  # a mask depends on places, not on tokens: longer prompts have shorter's
            self._masks[layer] = self._masked(layer, ids)
        return may & ~self._masks[layer][:n, :n].to(may.device)

    @cached_property
    def _masks(self) -> dict[int, Bool[Tensor, "query key"]]:
        return {}

    def _masked(self, layer: int, ids: Int[Tensor, " token"]) -> Bool[Tensor, "query key"]:
        """Where a layer's scores are masked: -inf or the least number there is (CodeGen divides it by its scale)."""
        name = f"blocks.{layer}.attn.hook_attn_scores"
        scores = self.activations(ids[None], torch.ones(1, len(ids), dtype=torch.bool), [name])[name][0]
        masked = (scores <= torch.finfo(scores.dtype).min / 32).all(0)
        if self.encoder or masked.triu(1).any():
            return masked
        # Where TransformerLens leaves attention to Hugging Face, these "scores" are the pattern (OPT, GPT-J, GPT-Neo).
        window = self._window(layer)
        return torch.zeros_like(masked) if window is None else torch.ones_like(masked).tril(-window)

    def _window(self, layer: int) -> int | None:
        """How many tokens a layer looks back at, itself counted, according to Hugging Face's configuration."""
        attention, config = self.model.blocks[layer].attn.original_component, self.model.original_model.config
        if hasattr(attention, "attention_type"):  # GPT-Neo
            return int(config.window_size) if attention.attention_type == "local" else None
        kinds = getattr(config, "layer_types", None)
        return None if kinds and kinds[layer] == "full_attention" else getattr(config, "sliding_window", None)

    def logits(
        self,
        ids: Int[Tensor, "prompt position"],
        mask: Bool[Tensor, "prompt position"],
        edits: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
    ) -> Float[Tensor, "prompt position vocab"]:
        """The model's own logits of a padded batch, with some activations replaced on the way by what `edits` give."""
        edits = edits or {}
        self.check_hooks(edits)
        hooks = [(name, _replacing(edit)) for name, edit in edits.items()]
        with undisturbed(self.model):
            return self.model.run_with_hooks(
                ids.to(self.device),
                return_type="logits",
                fwd_hooks=hooks,
                attention_mask=mask.to(self.device, torch.int64),
            )

    def differentiable(
        self, ids: Int[Tensor, "prompt position"], names: Sequence[str]
    ) -> tuple[Float[Tensor, "prompt position d_model"], list[Tensor]]:
        """Token embeddings and activations that depend on them, for `torch.autograd.grad`; no parameter gets a grad."""
        start = self.token_embeddings[ids.to(self.device)].clone().requires_grad_()
        return start, self.from_embeddings(start, ids, names)

    def from_embeddings(
        self,
        embeddings: Float[Tensor, "prompt position d_model"],
        ids: Int[Tensor, "prompt position"],
        names: Sequence[str],
    ) -> list[Tensor]:
        """Activations of tokens that have these embeddings; the model adds positions. Gradients flow to them.

        `ids` are the tokens in whose places they stand: RoBERTa gives positions to those that are no padding.
        """
        seen: dict[str, Tensor] = {}
        hooks = [
            (self.hook_token_embed, _replacing(lambda given: embeddings.to(given))),
            *((name, _remembering(seen, name, set(names))) for name in names),
        ]
        ids = ids.to(self.device)
        with undisturbed(self.model), torch.enable_grad(), suppress(_Reached):
            self.model.run_with_hooks(ids, return_type=None, fwd_hooks=hooks, attention_mask=torch.ones_like(ids))
        return [seen[name] for name in names]

    def check_predicts_next(self) -> None:
        """Raise for a model without a loss of the next token."""
        if self.encoder:
            raise ValueError(f"{self.name} predicts masked tokens, and the next token's loss is asked: use a decoder")
        self._refuse_headless()

    # Text

    @property
    def tokenizer(self) -> Any:
        """The model's Hugging Face tokenizer, or None."""
        return getattr(self.model, "tokenizer", None)

    @property
    def padding_side(self) -> Literal["left", "right"]:
        """The side on which the tokenizer pads."""
        return "left" if getattr(self.tokenizer, "padding_side", "right") == "left" else "right"

    @property
    def pad_id(self) -> int:
        """An id to fill a batch with; what is masked does not matter, but it must be in the vocabulary."""
        pad = getattr(self.tokenizer, "pad_token_id", None)
        return pad if isinstance(pad, int) and pad < self.d_vocab else 0

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids that stand for no text: beginning of sequence, separators, padding."""
        return frozenset(self.tokenizer.all_special_ids) if self.tokenizer is not None else frozenset()

    def encode(self, text: str, prepend_bos: bool | None) -> tuple[list[int], Spans]:
        """Ids of a text and the span of characters that each came from (None for special tokens).

        A decoder's text gets one beginning-of-sequence token if `prepend_bos` (None: what the model's class does); an
        encoder's gets the special tokens its tokenizer adds.
        """
        if self.tokenizer is None:
            raise ValueError(f"{self.name} was loaded without a tokenizer: pass token ids instead of text")
        ids, spans = self._ids_and_spans(text, special=self.encoder)
        if self.encoder:
            return ids, spans
        bos = self.tokenizer.bos_token_id
        if prepend_bos is None:
            prepend_bos = bool(getattr(self.model.cfg, "default_prepend_bos", True)) and bos is not None
        if not prepend_bos:
            return ids, spans
        if bos is None:
            raise ValueError(f"prepend_bos=True was asked for and the tokenizer of {self.name} has no such token")
        return [bos, *ids], [None, *spans]

    def locate(self, ids: Sequence[int]) -> tuple[str, Spans]:
        """The text of ids and the span of each, where encoding that text gives the ids back; no spans otherwise."""
        nowhere: Spans = [None] * len(ids)
        plain = [i for i in ids if i not in self.special_ids]
        if self.tokenizer is None or not plain:
            return "", nowhere
        text = self.tokenizer.decode(plain, clean_up_tokenization_spaces=False)
        again, spans = self._ids_and_spans(text, special=False)
        if again != plain:
            return "", nowhere
        remaining = iter(spans)
        return text, [None if i in self.special_ids else next(remaining) for i in ids]

    def _ids_and_spans(self, text: str, special: bool) -> tuple[list[int], Spans]:
        encoded = self.tokenizer(text, add_special_tokens=special, return_offsets_mapping=True, verbose=False)
        ids = list(encoded["input_ids"])
        return ids, [
            None if i in self.special_ids else (start, end)
            for i, (start, end) in zip(ids, encoded["offset_mapping"], strict=True)
        ]

    @cached_property
    def vocabulary_texts(self) -> tuple[str, ...]:
        """What every id stands for."""
        return tuple(self.token_texts(range(self.d_vocab)))

    def token_texts(self, ids: Iterable[int]) -> list[str]:
        """What each id stands for, its leading space kept; pieces of a character by their name in the vocabulary."""
        ids = list(ids)
        if self.tokenizer is None:
            return [str(i) for i in ids]
        pieces = self.tokenizer.convert_ids_to_tokens(ids)
        texts = self.tokenizer.batch_decode([[i] for i in ids], clean_up_tokenization_spaces=False)
        return [_token_text(i, piece, text) for i, piece, text in zip(ids, pieces, texts, strict=True)]


class ImageView(View):
    """What lens_probes reads of a model of images: a vision transformer as a TransformerBridge. It writes nothing.

    >>> from lens_probes.examples import tiny
    >>> view = ImageView(tiny.vit())
    >>> view.activation(torch.zeros(2, *view.shape), view.hook("resid_post", 1)).shape
    torch.Size([2, 17, 32])
    """

    def __init__(self, model: Any) -> None:
        _check_wrapped(model)
        wrapped = getattr(model, "original_model", None)
        if getattr(wrapped, "main_input_name", None) != "pixel_values" or not hasattr(model, "blocks"):
            raise TypeError(
                f"a model of images is a TransformerBridge of a vision transformer; {type(model).__name__} of "
                f"{type(wrapped).__name__} came: lens_probes.examples.tiny.vit() makes one"
            )
        super().__init__(model)

    @property
    def device(self) -> torch.device:
        """Where the pixels must be."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the weights."""
        return next(self.model.parameters()).dtype

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        config = self.model.original_model.config
        size = config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        return config.num_channels, height, width

    def activation(
        self, pixels: Float[Tensor, "image channel height width"], name: str
    ) -> Float[Tensor, "image position width_of_activation"]:
        """An activation at the class token and every patch; gradients flow to pixels that require them."""
        self.check_hooks([name])
        seen: dict[str, Tensor] = {}
        hooks = [(name, _remembering(seen, name, [name]))]
        wanted = pixels.requires_grad
        with undisturbed(self.model), torch.set_grad_enabled(wanted), suppress(_Reached):
            self.model.run_with_hooks(pixels.to(self.device, self.dtype), fwd_hooks=hooks)
        return seen[name]


def _check_wrapped(model: Any) -> None:
    """Raise for a model of Hugging Face's own."""
    if hasattr(model, "base_model_prefix") and not hasattr(model, "run_with_cache"):
        raise TypeError(
            f"a Hugging Face model must be wrapped before it is read; got a {type(model).__name__}: pass "
            f"TransformerBridge.boot_transformers(name, hf_model=model, tokenizer=tokenizer)"
        )


def _device_type(model: Any) -> str:
    return next(model.parameters()).device.type


@contextmanager
def differentiating(model: Any) -> Iterator[None]:
    """Gradients, no inference mode, no autocast inside, in whatever mode the caller is."""
    model = model.model if isinstance(model, View) else model
    device = _device_type(model) if isinstance(model, torch.nn.Module) else "cpu"  # others are refused further on
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device_type=device, enabled=False):
        yield


def view_of(model: Any) -> View:
    """What is to be read of a model, of text or of images."""
    wrapped = getattr(model, "original_model", None)
    return ImageView(model) if getattr(wrapped, "main_input_name", None) == "pixel_values" else ModelView(model)


class Continuation:
    """An activation of one more token after a prefix, for many candidates at once: what a search over tokens asks for.

    The keys and values of the prefix are computed once, and a pass ends where the activation stands: no later layer, no
    unembedding. Both classes allow it: a Bridge hands Hugging Face's cache on (3.9 and 4.x), HookedTransformer has its
    own. Encoders do not: there every state depends on what follows.

    What a cache promises is checked once per prefix: it holds every token, and one token after it has the state of the
    whole prompt. Where it does not (TransformerLens 4.3 alone does not fill the cache of transformers 5.24), every
    candidate is computed with its whole prefix, and a warning says so once per view.

    >>> from lens_probes.examples import tiny
    >>> view = ModelView(tiny.bridge("llama"))
    >>> third = Continuation(view, torch.tensor([5, 6]), view.hook("resid_post", 1))
    >>> third.states(torch.tensor([7, 8, 9, 10])).shape
    torch.Size([4, 32])
    """

    def __init__(self, view: ModelView, prefix: Int[Tensor, " position"], name: str) -> None:
        if view.encoder:
            raise ValueError(f"a state of {view.name} depends on what follows it: only decoders continue a prefix")
        view.check_hooks([name])
        self._view, self._name, self._prefix = view, name, prefix.to(view.device)
        self._past: _Past | None = None  # None: whole prefixes
        if len(prefix) and view.continues_prefixes:
            self._keep_checked_past()

    def states(self, ids: Int[Tensor, " candidate"]) -> Float[Tensor, "candidate d"]:
        """The activation of each of these tokens, were it the next."""
        at_once = max(1, len(ids) if self._past else TOKENS_OF_WHOLE_PREFIXES // (len(self._prefix) + 1))
        with undisturbed(self._view.model):
            return torch.cat([self._run(some, []) for some in ids.split(at_once)])

    def soft(self, embeddings: Float[Tensor, "candidate d_model"]) -> Float[Tensor, "candidate d"]:
        """The activation of tokens that have these embeddings; gradients flow to them."""

        def at_the_end(given: Tensor) -> Tensor:
            return torch.cat([given[:, :-1], embeddings[:, None].to(given)], dim=1)

        hook = (self._view.hook_token_embed, _replacing(at_the_end))
        with undisturbed(self._view.model), torch.enable_grad():
            return self._run(torch.zeros(len(embeddings), dtype=torch.int64), [hook])

    def _run(self, ids: Int[Tensor, " candidate"], hooks: Sequence[Any]) -> Float[Tensor, "candidate d"]:
        seen: dict[str, Tensor] = {}
        hooks = [*hooks, (self._name, _remembering(seen, self._name, [self._name]))]
        ids = ids.to(self._view.device)[:, None]
        if self._past:
            options = self._past.options(len(ids))
        else:
            ids = torch.cat([self._prefix.expand(len(ids), -1), ids], dim=1)
            options = {"attention_mask": torch.ones_like(ids)}  # or a candidate that is the padding token is padding
        with suppress(_Reached):
            self._view.model.run_with_hooks(ids, return_type=None, fwd_hooks=hooks, **options)
        return seen[self._name][:, -1]

    def _keep_checked_past(self) -> None:
        """Keep the first of the model's caches that does what it promises; say it if none does."""
        view, n = self._view, len(self._prefix)
        other = (self._prefix[-1:] + 1) % view.d_vocab  # the same token again would be mixed from equal values
        whole, failed = self.states(other).float(), ""
        if not whole.isfinite().all():
            return  # there is nothing to compare, and who asks refuses it
        for past_of in _pasts_of_bridge(view) if view.is_bridge else [_past_of_hooked]:
            try:
                past = past_of(view, self._prefix[None])
            except TypeError:  # the model does not take the cache under this name
                continue
            if past.lengths != {n}:
                failed = failed or f"it holds {min(past.lengths, default=0)}"
                continue
            self._past = past
            off = float((self.states(other).float() - whole).norm() / whole.norm().clamp(min=1e-30))
            if off <= torch.finfo(view.W_E.dtype).eps ** 0.5:
                return
            failed = failed or f"a state after it is off by {off:.2g} of its length"
        self._past, view.continues_prefixes = None, False
        releases = ", ".join(f"{package} {release}" for package, release in view.versions[1:])
        warnings.warn(
            f"the key/value cache of {view.name} must hold all {n} tokens of a prefix and give the states of the whole "
            f"prompt; with {releases} {failed or 'none is accepted'}: whole prompts are computed instead, which gives "
            f"the right numbers more slowly (other releases of transformers or TransformerLens may keep the cache)",
            stacklevel=3,
        )


class _Past(NamedTuple):
    """A computed prefix: how many tokens its layers hold, and the arguments of a pass of candidates after it."""

    lengths: set[int]
    options: Callable[[int], dict[str, Any]]


class _Reached(Exception):
    """Ends a forward pass where no more of it is needed."""


def _pasts_of_bridge(view: ModelView) -> Iterator[Callable[[ModelView, Int[Tensor, "1 position"]], _Past]]:
    """The ways to hand a cache to the wrapped model, the likeliest first.

    transformers 5.24 calls it `cache`, and so hands it to every layer's attention, where TransformerLens 4.3 reads
    `past_key_values` or `layer_past`: it gets there as the latter where layers pass on what they do not know.
    """
    if "cache" in inspect.signature(view.model.original_model.forward).parameters:
        yield partial(_past_of_bridge, ("cache", "layer_past"))
        yield partial(_past_of_bridge, ("cache",))
    else:
        yield partial(_past_of_bridge, ("past_key_values",))


def _past_of_bridge(names: tuple[str, ...], view: ModelView, ids: Int[Tensor, "1 position"]) -> _Past:
    """Compute a prefix, its cache handed on under these names."""
    from transformers import DynamicCache

    class Past(DynamicCache):
        """Hugging Face's cache, which a pass adds to; once `full` it joins prefix and candidates and keeps neither."""

        full = False

        def update(
            self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
        ) -> tuple[Tensor, Tensor]:
            if not self.full:
                return super().update(key_states, value_states, layer_idx, *args, **kwargs)
            layer: Any = self.layers[layer_idx]
            n = len(key_states)
            return (
                torch.cat([layer.keys.expand(n, -1, -1, -1), key_states], dim=-2),
                torch.cat([layer.values.expand(n, -1, -1, -1), value_states], dim=-2),
            )

    past = Past()

    def options(batch: int, new: int = 1) -> dict[str, Any]:
        mask = torch.ones(batch, new + past.get_seq_length(), dtype=torch.int64, device=view.device)
        return {**dict.fromkeys(names, past), "use_cache": True, "attention_mask": mask}

    with undisturbed(view.model):
        view.model.run_with_hooks(ids, return_type=None, **options(1, ids.shape[1]))
    past.full = True
    # Layers of linear attention have no length: a state of theirs cannot be joined with candidates either.
    return _Past({getattr(layer, "get_seq_length", int)() for layer in past.layers}, options)


def _past_of_hooked(view: ModelView, ids: Int[Tensor, "1 position"]) -> _Past:
    """As `_past_of_bridge`, with TransformerLens's own cache."""
    from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

    past = TransformerLensKeyValueCache.init_cache(view.model.cfg, view.device)
    for entry in past.entries:  # made with cfg.dtype, which need not be that of the weights
        entry.past_keys = entry.past_keys.to(view.W_E.dtype)
        entry.past_values = entry.past_values.to(view.W_E.dtype)
    with undisturbed(view.model):
        view.model.run_with_hooks(ids, return_type=None, past_kv_cache=past, attention_mask=torch.ones_like(ids))
    past.freeze()

    def options(batch: int) -> dict[str, Any]:
        wide = copy.copy(past)
        wide.previous_attention_mask = past.previous_attention_mask.expand(batch, -1)
        wide.entries = [
            replace(
                entry,
                past_keys=entry.past_keys.expand(batch, -1, -1, -1),
                past_values=entry.past_values.expand(batch, -1, -1, -1),
            )
            for entry in past.entries
        ]
        mask = torch.ones(batch, 1, dtype=torch.int64, device=view.device)
        return {"past_kv_cache": wide, "attention_mask": mask}

    return _Past({entry.past_keys.shape[1] for entry in past.entries}, options)


def _pairs_turned(
    x: Float[Tensor, "token any d_head"], table: Float[Tensor, "token turned"]
) -> Float[Tensor, "token any d_head"]:
    """Turn neighbouring dimensions as GPT-J and CodeGen do: `table` has each pair's sine, then each pair's cosine."""
    sin, cos = table[:, None].to(x.dtype).chunk(2, dim=-1)
    turned, rest = x[..., : table.shape[-1]], x[..., table.shape[-1] :]
    even, odd = turned[..., ::2], turned[..., 1::2]
    return torch.cat([torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).flatten(-2), rest], -1)


def _replacing(edit: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    """A hook as TransformerLens calls it."""
    return lambda activation, hook: edit(activation)


def _remembering(seen: dict[str, Tensor], name: str, asked: Collection[str]) -> Callable[..., Tensor]:
    """A hook that keeps the activation, and ends the pass once all those asked for are there."""

    def remember(activation: Tensor, hook: Any) -> Tensor:
        seen[name] = activation
        if len(seen) == len(asked):
            raise _Reached
        return activation

    return remember


def tolerance(dtype: torch.dtype) -> float:
    """How far two ways of computing the same may differ, as a share of it."""
    return EXACT if dtype in (torch.float32, torch.float64) else HALF


@cache
def _versions() -> tuple[tuple[str, str], ...]:
    packages = ("lens-probes", "transformer-lens", "transformers", "torch")
    return tuple((package, importlib.metadata.version(package)) for package in packages)


def _token_text(i: int, piece: str | None, text: str) -> str:
    if piece is None:  # a row of the embedding that the tokenizer never uses
        return f"<{i}>"
    if not text or "\ufffd" in text:
        return piece
    return f" {text}" if piece.startswith("▁") and not text.startswith(" ") else text


def untrained(model: Any, *, seed: int = 0) -> Any:
    """A Bridge of the same shape and tokenizer with the random weights that training starts from.

    What it shows too was not learned. The model itself is left as it is.

    >>> from lens_probes.examples import tiny
    >>> model = tiny.bridge("llama")
    >>> other = untrained(model)
    >>> other.W_E.shape == model.W_E.shape, bool((other.W_E == model.W_E).any())
    (True, False)
    """
    view = ModelView(model)
    if not view.is_bridge:
        raise TypeError(
            f"HookedTransformer starts from other random weights than {view.name} was trained from: load it as a "
            f"TransformerBridge for an untrained twin"
        )
    from transformer_lens.model_bridge import TransformerBridge

    wrapped = model.original_model
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        fresh = type(wrapped)(copy.deepcopy(wrapped.config)).eval()
        fresh.set_attn_implementation("eager")
        for parameter in fresh.parameters():  # not fresh.to(dtype), which would round the rotary frequencies
            parameter.data = parameter.data.to(view.W_E.dtype)
        bridge = TransformerBridge.boot_transformers(
            f"untrained-{view.name}",
            hf_model=fresh,
            tokenizer=view.tokenizer,
            device=view.device,
            dtype=view.W_E.dtype,
        )
        if view.processed:
            bridge.enable_compatibility_mode()
    return bridge


@contextmanager
def undisturbed(model: Any) -> Iterator[None]:
    """Evaluation mode, no gradients, no autocast inside; everything as before afterwards, also after an error."""
    training = {module: module.training for _, module in View(model).modules()}
    try:
        for module in training:
            module.training = False
        with torch.no_grad(), torch.autocast(device_type=_device_type(model), enabled=False):
            yield
    finally:
        for module, mode in training.items():
            module.training = mode
