"""Names of activations, as tables: the name in lens_probes, and the TransformerLens hook that holds it."""

from collections.abc import Mapping
from typing import Literal, get_args

ReadPoint = Literal["resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out"]
"""Where in a block a state of width d_model is read: the residual stream at three places, or a part's output."""

READ_POINTS: tuple[ReadPoint, ...] = get_args(ReadPoint)

HOOKS: Mapping[str, str] = {
    "token_embed": "hook_embed",  # rows of W_E
    "position_embed": "hook_pos_embed",
    "resid_pre": "blocks.{layer}.hook_resid_pre",
    "resid_mid": "blocks.{layer}.hook_resid_mid",
    "resid_post": "blocks.{layer}.hook_resid_post",
    "attn_out": "blocks.{layer}.hook_attn_out",
    "mlp_out": "blocks.{layer}.hook_mlp_out",
    "query": "blocks.{layer}.attn.hook_q",  # before rotary positions and norms
    "key": "blocks.{layer}.attn.hook_k",  # the same; one per key/value head
    "rotated_query": "blocks.{layer}.attn.hook_rot_q",
    "rotated_key": "blocks.{layer}.attn.hook_rot_k",
    "value": "blocks.{layer}.attn.hook_v",  # one per key/value head
    "scores": "blocks.{layer}.attn.hook_attn_scores",  # the pattern, if Hugging Face computes attention
    "pattern": "blocks.{layer}.attn.hook_pattern",
    "z": "blocks.{layer}.attn.hook_z",  # each head's mixed values, before W_O
    "before_mlp": "blocks.{layer}.hook_resid_mid",
    "neuron": "blocks.{layer}.mlp.hook_post",  # after the activation function (and its gate)
    "whole_mlp": "blocks.{layer}.mlp.hook_out",  # of a mixture of experts, the same hook as that of its "neurons"
    "after_mlp": "blocks.{layer}.hook_resid_post",
}
"""For decoders and image models. In post-norm encoders, hooks of the same names hold other states."""

ENCODER_HOOKS: Mapping[str, str] = {
    **HOOKS,
    "token_embed": "embed.hook_out",  # hook_embed is after positions, types and the embedding norm
    "resid_mid": "blocks.{layer}.ln1.hook_in",  # the sum after attention, before its norm
    "attn_out": "blocks.{layer}.attn.o.hook_out",  # hook_attn_out and attn.hook_out are after the norm
    "before_mlp": "blocks.{layer}.hook_attn_out",
    "after_mlp": "blocks.{layer}.hook_resid_mid",  # the sum after the MLP, before its norm
}

ENCODER_STACK_HOOKS: Mapping[str, str] = {
    name: hook.replace("blocks.", "encoder_blocks.") for name, hook in HOOKS.items()
}
"""For the encoder of an encoder-decoder."""

DECODER_STACK_HOOKS: Mapping[str, str] = {
    name: hook.replace("blocks.", "decoder_blocks.").replace(".attn.", ".self_attn.") for name, hook in HOOKS.items()
}
"""For its decoder. Attention to the encoder's states has the same names, with `cross_attn` for `self_attn`."""

SWITCHES: Mapping[str, str] = {
    ".hook_result": "switch it on, with model.set_use_attn_result(True)",
    "_input": "switch it on, with model.set_use_split_qkv_input(True)",
    ".hook_mlp_in": "switch it on, with model.set_use_hook_mlp_in(True)",
    ".hook_attn_in": "switch it on, with model.set_use_attn_in(True)",
    ".hook_pattern": "load the model with attn_implementation='eager'",
    ".hook_attn_scores": "load the model with attn_implementation='eager'",
}
"""How activations are had that are not computed by default, by the ends of their names."""

LATENT = "hook_kv_latent"
"""What only latent attention has (DeepSeek). There, queries, keys and values have heads before positions."""

HEADS_FIRST = (".hook_q", ".hook_k", ".hook_v")

Part = Literal["layer", "attention", "mlp"]
"""What adds to the residual stream: a whole layer, or one of its two parts."""

ADDED: Mapping[tuple[Part, bool], tuple[str, ...]] = {
    ("layer", False): ("resid_pre", "resid_post"),
    ("layer", True): ("resid_pre", "resid_post"),
    ("attention", False): ("resid_pre", "resid_mid"),
    ("attention", True): ("resid_pre", "resid_post", "mlp_out"),
    ("mlp", False): ("before_mlp", "after_mlp"),
    ("mlp", True): ("resid_pre", "resid_post", "attn_out"),
}
"""The stream before and after a part, and what else is added between; True if attention and MLP run in parallel."""
