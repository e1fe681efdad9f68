"""Attention of tiny models from Hugging Face's modules alone: what lens_probes says is held against it."""

from importlib import import_module
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from jaxtyping import Float, Int
from torch import Tensor

from lens_probes.examples import tiny


class Attention(NamedTuple):
    """One layer on one prompt."""

    dot: Float[Tensor, "head query key"]
    pattern: Float[Tensor, "head query key"]
    value: Float[Tensor, "key head d_head"]
    output: Float[Tensor, "head d_head d_model"]
    bias: Float[Tensor, " d_model"]
    added: Float[Tensor, "query d_model"]


def attention(architecture: str, ids: Int[Tensor, " position"]) -> list[Attention]:
    """Every layer of `tiny.huggingface(architecture)` on these ids, made before a Bridge changes such a model."""
    model = tiny.huggingface(architecture)
    model.set_attn_implementation("eager")
    blocks = model.model.layers if hasattr(model, "model") else model.transformer.h
    seen: list[dict[str, Any]] = [{} for _ in blocks]
    for block, kept in zip(blocks, seen, strict=True):
        _keep(block, kept, "block")
        for name, part in block.named_children():
            _keep(part, kept, name)
    with torch.no_grad():
        patterns = model(ids[None], output_attentions=True).attentions
        return [
            _layer(architecture, model, block, kept, pattern[0])
            for block, kept, pattern in zip(blocks, seen, patterns, strict=True)
        ]


def _keep(part: torch.nn.Module, kept: dict[str, Any], name: str) -> None:
    def keep(module: torch.nn.Module, given: Any, named: Any, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) else output
        kept[name] = SimpleNamespace(input=given[0] if given else named["hidden_states"], output=first)

    part.register_forward_hook(keep, with_kwargs=True)


def _layer(
    architecture: str, model: Any, block: Any, kept: dict[str, Any], pattern: Float[Tensor, "head query key"]
) -> Attention:
    config = model.config
    own = block.self_attn if hasattr(block, "self_attn") else getattr(block.attn, "attention", block.attn)
    norm = (kept.get("input_layernorm") or kept["ln_1"]).output
    n_heads, d_head = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    if architecture == "codegen":  # four parts, each with queries, values and keys of its heads
        parts = own.qkv_proj(norm)[0].unflatten(-1, (4, 3, -1))
        q, v, k = (parts[:, :, i].flatten(1) for i in range(3))
    elif architecture == "gpt2":  # queries, keys and values in one matrix, [in out]
        q, k, v = own.c_attn(norm)[0].chunk(3, -1)
    else:
        q, k, v = own.q_proj(norm)[0], own.k_proj(norm)[0], own.v_proj(norm)[0]
    if getattr(config, "clip_qkv", None) is not None:
        q, k, v = (each.clamp(-config.clip_qkv, config.clip_qkv) for each in (q, k, v))
    q, k, v = (each.unflatten(-1, (-1, d_head)) for each in (q, k, v))  # position head d_head
    module: Any = import_module(type(own).__module__)
    if architecture in ("gptj", "codegen"):
        # Of the attention, or since transformers 5.24 of a module for all layers.
        table = next(part.embed_positions for part in model.modules() if hasattr(part, "embed_positions"))
        sin, cos = table[: len(q)].chunk(2, -1)
        n = config.rotary_dim
        q, k = (
            torch.cat([module.apply_rotary_pos_emb(each[None, ..., :n], sin[None], cos[None])[0], each[..., n:]], -1)
            for each in (q, k)
        )
    elif architecture not in ("gpt_neo", "gpt2"):
        cos, sin = model.model.rotary_emb(norm, torch.arange(len(q))[None])
        q, k = module.apply_rotary_pos_emb(q.transpose(0, 1)[None], k.transpose(0, 1)[None], cos, sin)
        q, k = q[0].transpose(0, 1), k[0].transpose(0, 1)
    k, v = (each.repeat_interleave(n_heads // each.shape[1], 1) for each in (k, v))
    scale = {"gpt_neo": 1.0, "gptj": d_head**-0.5, "codegen": d_head**-0.5, "gpt2": d_head**-0.5}.get(
        architecture
    ) or own.scaling
    project = next(getattr(own, name) for name in ("o_proj", "out_proj", "c_proj") if hasattr(own, name))
    written = project.weight if architecture == "gpt2" else project.weight.T  # [in out]
    multiplier = getattr(config, "residual_multiplier", 1.0)
    before = kept["block"].input[0]
    after = kept.get("post_attention_layernorm", kept.get("ln_2"))
    added = after.input[0] - before if after else kept["block"].output[0] - kept["mlp"].output[0] - before
    return Attention(
        dot=torch.einsum("qhd,khd->hqk", q, k) * scale,
        pattern=pattern,
        value=v,
        output=multiplier * written.unflatten(0, (n_heads, d_head)),
        bias=torch.zeros(config.hidden_size) if project.bias is None else multiplier * project.bias,
        added=added,
    )


def skip_where_transformerlens_breaks(architecture: str, dtype: torch.dtype = torch.float32) -> None:
    """With transformers 5.24 TransformerLens 4.3 runs neither CodeGen nor OLMo in half precision.

    CodeGen: it asks for a table of positions that is elsewhere now. OLMo: the rotation's cosines are float32 now, and
    TransformerLens does not round rotated queries back to the precision of the values.
    """
    if architecture == "codegen" or (architecture == "olmo" and dtype != torch.float32):
        try:
            tiny.bridge(architecture, dtype=dtype)(torch.zeros(1, 2, dtype=torch.int64))
        except (AttributeError, RuntimeError) as error:
            pytest.skip(f"TransformerLens cannot run {architecture} with these transformers: {error}")
