"""A random-weights baseline."""

import copy
from typing import Any

import torch

from lens_probes.model.view import ModelView


def untrained(model: Any, *, seed: int = 0) -> Any:
    """A random-weights baseline: a Bridge of the same shape and tokenizer, with freshly initialised weights.

    The model itself is not changed.

    >>> from lens_probes.examples import tiny
    >>> model = tiny.bridge("llama")
    >>> other = untrained(model)
    >>> other.W_E.shape == model.W_E.shape, bool((other.W_E == model.W_E).any())
    (True, False)
    """
    view = ModelView(model)
    wrapped = view.adapter.wrapped
    if wrapped is None:
        raise TypeError(
            f"model must be a TransformerBridge; got a HookedTransformer, which is initialised in another way than "
            f"{view.name} was: load it as a TransformerBridge"
        )
    from transformer_lens.model_bridge import TransformerBridge

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        fresh = type(wrapped)(copy.deepcopy(wrapped.config)).eval()
        fresh.set_attn_implementation("eager")
        for parameter in fresh.parameters():  # fresh.to(dtype) would round the rotary frequencies too
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
