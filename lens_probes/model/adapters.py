"""The differences between the model classes of TransformerLens: one adapter per class, chosen once per view.

Classes are recognised by their attributes and never imported: no release of TransformerLens has all of them.
"""

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import gelu

from lens_probes.model.hooks import DECODER_STACK_HOOKS, ENCODER_HOOKS, ENCODER_STACK_HOOKS, HOOKS


class Past(NamedTuple):
    """Keys and values of a prefix: the numbers of tokens in its layers, and the options of a pass over n candidates."""

    lengths: set[int]
    options: Callable[[int], dict[str, Any]]


class Adapter:
    """A decoder as a TransformerBridge (TransformerLens 3 and 4). Other adapters override what differs."""

    hooks: ClassVar[Mapping[str, str]] = HOOKS
    encoder: ClassVar[bool] = False
    """Whether attention is bidirectional, norms follow the residual sum, and the tokenizer adds special tokens."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.wrapped: Any = getattr(model, "original_model", None)  # the Hugging Face model inside

    def check(self) -> None:
        """Raise for a class whose hooks do not hold the states that their names say."""

    @property
    def processed(self) -> bool:
        """Whether norms were folded and weights centred."""
        return bool(self.model._weights_processed)

    def modules(self) -> Iterator[tuple[str, torch.nn.Module]]:
        """Every module by name, including those of the Hugging Face model, which a Bridge does not list."""
        yield from self.model.named_modules()
        yield from self.wrapped.named_modules(prefix="original_model")

    def options(self, names: Sequence[str]) -> dict[str, Any]:
        """Options of a pass that reads these activations. By default, a Bridge keeps every layer's pattern."""
        return {} if any("pattern" in name or "attn_scores" in name for name in names) else {"output_attentions": False}

    def embedded(self, rows: Float[Tensor, "vocab d_model"]) -> Float[Tensor, "vocab d_model"]:
        """The first state of tokens, given the sum of their token and position embeddings."""
        return rows

    def input_norm(self, layer: int) -> torch.nn.Module | None:
        """The norm before a block's attention, if there is one."""
        return self.model.blocks[layer].ln1

    def attention_scale(self, layer: int) -> float:
        """The factor of the product of query and key, usually 1 / sqrt(d_head)."""
        attention = self.model.blocks[layer].attn
        own = attention.original_component
        if (scaling := getattr(own, "scaling", None)) is not None:
            return float(scaling)
        # GPT-Neo does not scale and has no attribute that says so; only its attention has an attention_type.
        return 1.0 if hasattr(own, "attention_type") else attention.W_K.shape[-1] ** -0.5

    def clipped(self, values: Float[Tensor, "... d_head"]) -> Float[Tensor, "... d_head"]:
        """The values that heads sum with their weights: OLMo clips them after the hook."""
        clip = getattr(getattr(self.wrapped, "config", None), "clip_qkv", None)
        return values if clip is None else values.clamp(-clip, clip)

    def seen(self, n: int, device: torch.device) -> Bool[Tensor, "query key"]:
        """Which of n tokens each query may attend to, ignoring windows."""
        return torch.ones(n, n, dtype=torch.bool, device=device).tril()

    def window(self, layer: int) -> int | None:
        """The attention window of a layer in tokens, the query included, from Hugging Face's configuration."""
        attention, config = self.model.blocks[layer].attn.original_component, self.wrapped.config
        if hasattr(attention, "attention_type"):  # GPT-Neo
            return int(config.window_size) if attention.attention_type == "local" else None
        kinds = getattr(config, "layer_types", None)
        return None if kinds and kinds[layer] == "full_attention" else getattr(config, "sliding_window", None)

    @property
    def has_head(self) -> bool:
        """Whether the model turns its last states into logits."""
        return hasattr(self.model, "unembed") and hasattr(self.model, "ln_final")

    def normed(self, states: Float[Tensor, "row d_model"]) -> Float[Tensor, "row d_model"]:
        """What the unembedding reads of last states."""
        return self.model.ln_final(states[None])[0]

    @contextmanager
    def unmasked(self, embeddings: Float[Tensor, "prompt position d_model"]) -> Iterator[dict[str, Any]]:
        """Options with which a pass over these embeddings lets every token attend to every other.

        Hooks cannot unmask: a score of a masked key is -inf, and a Bridge's edits of scores come after the fact on some
        models. A mask with one row per query replaces the causal one. It hides positions, which are given too.
        """
        prompts, n = embeddings.shape[:2]
        positions = torch.arange(n, device=embeddings.device).expand(prompts, n)
        yield {"attention_mask": embeddings.new_zeros(prompts, 1, n, n), "position_ids": positions}

    def capped(self, logits: Float[Tensor, "... vocab"]) -> Float[Tensor, "... vocab"]:
        """The logits after the model's soft cap (Gemma) or factor (Cohere, Granite)."""
        if hasattr(getattr(self.model, "adapter", None), "apply_output_logits_transform"):  # TransformerLens 4
            return self.model.adapter.apply_output_logits_transform(logits)
        cap = float(getattr(self.model.cfg, "output_logits_soft_cap", None) or -1.0)
        return cap * torch.tanh(logits / cap) if cap > 0 else logits

    def pasts(self) -> Iterator[Callable[[Int[Tensor, "1 position"]], Past]]:
        """Ways to compute a prefix and keep its keys and values, most likely first; one that fails raises TypeError.

        transformers 5.24 passes its cache to every layer's attention as `cache`, but TransformerLens 4.3 reads
        `past_key_values` or `layer_past`. Passed as `layer_past` too, it arrives if layers forward unknown arguments.
        """
        if "cache" in inspect.signature(self.wrapped.forward).parameters:
            yield partial(self._past, ("cache", "layer_past"))
            yield partial(self._past, ("cache",))
        else:
            yield partial(self._past, ("past_key_values",))

    def _past(self, names: tuple[str, ...], ids: Int[Tensor, "1 position"]) -> Past:
        """Compute a prefix with a Hugging Face cache, passed under these names."""
        from transformers import DynamicCache

        class Joining(DynamicCache):
            """A cache that passes extend. Once `full`, it joins prefix and candidates and stores neither."""

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

        past = Joining()

        def options(batch: int, new: int = 1) -> dict[str, Any]:
            mask = ids.new_ones(batch, new + past.get_seq_length())
            return {**dict.fromkeys(names, past), "use_cache": True, "attention_mask": mask}

        self.model.run_with_hooks(ids, return_type=None, **options(1, ids.shape[1]))
        past.full = True
        # Linear-attention layers have no length, and their state cannot be joined with candidates.
        return Past({getattr(layer, "get_seq_length", int)() for layer in past.layers}, options)


class Encoder(Adapter):
    """BERT or RoBERTa as a TransformerBridge: post-norm, with a head for masked tokens."""

    hooks = ENCODER_HOOKS
    encoder = True

    def embedded(self, rows: Float[Tensor, "vocab d_model"]) -> Float[Tensor, "vocab d_model"]:
        """Adds the embedding of the first token type and applies the embedding norm."""
        token_type = self.model.token_type_embed.original_component.weight.detach()
        return self.model.embed_ln.original_component(rows + token_type[0]).detach()

    def input_norm(self, layer: int) -> torch.nn.Module | None:
        """None: `ln1` follows attention."""

    def seen(self, n: int, device: torch.device) -> Bool[Tensor, "query key"]:
        """All of them: attention is bidirectional."""
        return torch.ones(n, n, dtype=torch.bool, device=device)

    @contextmanager
    def unmasked(self, embeddings: Float[Tensor, "prompt position d_model"]) -> Iterator[dict[str, Any]]:
        """No more than that every token counts: attention is bidirectional."""
        yield {"attention_mask": torch.ones(embeddings.shape[:2], dtype=torch.int64, device=embeddings.device)}

    def normed(self, states: Float[Tensor, "row d_model"]) -> Float[Tensor, "row d_model"]:
        """A dense layer, an activation and the norm: BERT's activation is set by its configuration, RoBERTa's GELU."""
        parts = self.wrapped.modules()
        activation = next((part.transform_act_fn for part in parts if hasattr(part, "transform_act_fn")), gelu)
        return super().normed(activation(self.model.mlm_head(states[None])[0]))


class Stack(Adapter):
    """One of the two stacks of an encoder-decoder."""

    def options(self, names: Sequence[str]) -> dict[str, Any]:
        """The same, and patterns where they are read: LED computes none unless it is asked to."""
        return super().options(names) or {"output_attentions": True}


class EncoderStack(Stack):
    """The encoder of an encoder-decoder, as a stack of its own."""

    hooks = ENCODER_STACK_HOOKS
    encoder = True

    @property
    def has_head(self) -> bool:
        """It has none: only the decoder predicts."""
        return False

    def seen(self, n: int, device: torch.device) -> Bool[Tensor, "query key"]:
        """All of them: attention is bidirectional."""
        return torch.ones(n, n, dtype=torch.bool, device=device)


class DecoderStack(Stack):
    """The decoder of an encoder-decoder: T5 norms its last state and may scale it, BART and Marian do neither."""

    hooks = DECODER_STACK_HOOKS

    @property
    def has_head(self) -> bool:
        """Whether there is an unembedding: T5's encoder alone has none."""
        return hasattr(self.model, "unembed")

    def normed(self, states: Float[Tensor, "row d_model"]) -> Float[Tensor, "row d_model"]:
        """After the decoder's final norm, if there is one, times d_model ** -0.5 where T5 scales its outputs."""
        norm, config = getattr(self.model, "decoder_ln_final", None), self.wrapped.config
        states = states if norm is None else norm(states[None])[0]
        return states * config.d_model**-0.5 if getattr(config, "scale_decoder_outputs", False) else states


class Images(Adapter):
    """A vision transformer as a TransformerBridge: its input is pixels, and it has no vocabulary."""


class Hooked(Adapter):
    """HookedTransformer (TransformerLens 3): no wrapped model; its own cache and attention."""

    def check(self) -> None:
        """HookedEncoder uses the same hook names for other states (hook_resid_mid before LN1, for one)."""
        if type(self.model).__name__ != "HookedTransformer":
            raise TypeError(
                f"a model must be a HookedTransformer or a TransformerBridge; got a {type(self.model).__name__}, whose "
                f"hooks of the same names hold other states: load {self.model.cfg.model_name} as a TransformerBridge "
                f"(lens_probes.load_model) instead"
            )

    @property
    def processed(self) -> bool:
        """The name of the norm says so."""
        return str(self.model.cfg.normalization_type).endswith("Pre")

    def modules(self) -> Iterator[tuple[str, torch.nn.Module]]:
        """Every module by name."""
        yield from self.model.named_modules()

    def options(self, names: Sequence[str]) -> dict[str, Any]:
        """None are needed."""
        return {}

    @contextmanager
    def unmasked(self, embeddings: Float[Tensor, "prompt position d_model"]) -> Iterator[dict[str, Any]]:
        """HookedTransformer asks its configuration, in every pass, whether to mask; windows are masks too."""
        config = self.model.cfg
        before, config.attention_dir = config.attention_dir, "bidirectional"
        try:
            yield {"attention_mask": torch.ones(embeddings.shape[:2], dtype=torch.int64, device=embeddings.device)}
        finally:
            config.attention_dir = before

    def attention_scale(self, layer: int) -> float:
        """The inverse of HookedTransformer's divisor."""
        return 1 / float(self.model.blocks[layer].attn.attn_scale)

    def pasts(self) -> Iterator[Callable[[Int[Tensor, "1 position"]], Past]]:
        """TransformerLens's own cache."""
        yield self._own_past

    def _own_past(self, ids: Int[Tensor, "1 position"]) -> Past:
        from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

        past, dtype = TransformerLensKeyValueCache.init_cache(self.model.cfg, ids.device), self.model.W_E.dtype
        for entry in past.entries:  # made with cfg.dtype, which need not be that of the weights
            entry.past_keys, entry.past_values = entry.past_keys.to(dtype), entry.past_values.to(dtype)
        self.model.run_with_hooks(ids, return_type=None, past_kv_cache=past, attention_mask=torch.ones_like(ids))
        past.freeze()

        def options(batch: int) -> dict[str, Any]:
            def wide(one: Tensor) -> Tensor:
                return one.expand(batch, *one.shape[1:])

            several = copy.copy(past)
            several.previous_attention_mask = wide(past.previous_attention_mask)
            several.entries = [
                replace(entry, past_keys=wide(entry.past_keys), past_values=wide(entry.past_values))
                for entry in past.entries
            ]
            return {"past_kv_cache": several, "attention_mask": ids.new_ones(batch, 1)}

        return Past({entry.past_keys.shape[1] for entry in past.entries}, options)


def adapter_of(model: Any) -> Adapter:
    """The adapter of a model's class."""
    if not hasattr(model, "original_model"):
        return Hooked(model)
    if getattr(model.original_model, "main_input_name", None) == "pixel_values":
        return Images(model)
    if hasattr(model, "decoder_blocks"):
        return DecoderStack(model)
    # cfg.attention_dir says "causal" for BERT on TransformerLens 3.9
    return Encoder(model) if hasattr(model, "mlm_head") else Adapter(model)
