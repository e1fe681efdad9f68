"""Model families x probes, right or refused: `python benchmarks/compatibility.py` writes it to docs/compatibility.json.

Every architecture that the installed TransformerLens names is built of Hugging Face's own class with a tiny
configuration and random weights, booted, and asked everything. `make compatibility` does so for three releases. With
names of architectures or of probes as arguments it asks these only, and keeps what the file says of others.
"""

import contextlib
import json
import math
import os
import platform
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

import lens_probes as lp
from lens_probes.examples import tiny
from lens_probes.model import ImageView, StackView, view_of
from lens_probes.result import Result, schema
from lens_probes.testing import PROMPTS, TOPICS, assert_same, check_values

FILE = Path(__file__).parent.parent / "docs" / "compatibility.json"
PACKAGE = Path(lp.__file__).parent
SENTENCES = lp.demo.sentences()[:6]
LONGEST = 240  # characters of a reason
LARGEST = 2_000_000  # parameters
NEAR_TIES = 0.05  # share of whole numbers that rounding may decide, among the few of three prompts

# What every probe and experiment is asked: the least that shows whether it is right.
ASKED: dict[str, Callable[[Any], Any]] = {
    "AttentionPair": lambda model: lp.AttentionPair(-1, (0, 1)),
    "AttentionWindow": lambda model: lp.AttentionWindow(radii=[2]),
    "FeatureVisualization": lambda model: lp.FeatureVisualization(1, (3, 5), stem=_stem(model), steps=2, restarts=1),
    "HeadAblation": lambda model: lp.HeadAblation(steps=2, draws=1),
    "ImageReconstruction": lambda model: lp.ImageReconstruction(
        1, stem=_stem(model), steps=2, bounds=(-9.0, 9.0) if _is_of_images(model) else (0.0, 1.0)
    ),
    "InputReconstruction": lambda model: lp.InputReconstruction(1, steps=2),
    "LensComparison": lambda model: lp.LensComparison({"doubled": _doubled}),
    "LogitLens": lambda model: lp.LogitLens(target="own" if _is_encoder(model) else "next"),
    "MaxActivatingExamples": lambda model: lp.MaxActivatingExamples(k=3, sample=10),
    "MaxActivatingTokens": lambda model: lp.MaxActivatingTokens(1, (3, 5), steps=2, restarts=1),
    "PositionReach": lambda model: lp.PositionReach(layers=[0, -1], projections=2),
    "RankShift": lambda model: lp.RankShift(at="resid_post", neighbours=3),
    "StateDimension": lambda model: lp.StateDimension(draws=2),
    "Summary": lambda model: lp.Summary(lp.ResidualUpdate()),
    "TopicAblation": lambda model: lp.TopicAblation(k=2, draws=1),
    "TunedLens": lambda model: lp.TunedLens(steps=2),
}
OF_PATCHES = ("ViT", "DeiT")
OF_IMAGES = ("FeatureVisualization", "ImageReconstruction")
OF_SENTENCES = ("AttentionWindow", "HeadAblation", "TiedKeyValue")


def names() -> list[str]:
    """Every public probe and experiment."""
    bases = {"Probe", "Experiment", "TextExperiment"}
    found = {name: getattr(lp, name) for name in lp.__all__ if name not in bases}
    kinds = [name for name, kind in found.items() if isinstance(kind, type) and issubclass(kind, lp.Probe)]
    return kinds + [name for name, kind in found.items() if isinstance(kind, type) and issubclass(kind, lp.Experiment)]


# Models

SIZES = {
    # width and depth
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "embed_dim", "word_embed_proj_dim"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 3),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "n_head_kv"), 2),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "d_ff", "expert_ffn_hidden_size"), 64),
    "head_dim": 8,
    "vocab_size": tiny.VOCABULARY,
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length"), tiny.CONTEXT),
    "sliding_window": 2 * tiny.CONTEXT,
    "rotary_dim": 4,
    # encoder-decoders
    **tiny._STACKS,
    "num_decoder_layers": 3,
    "d_kv": 8,
    # mixtures of experts
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"), 32),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "moe_num_shared_experts"), 1),
    # latent attention
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim"), 4),
    "qk_head_dim": 8,
    "v_head_dim": 8,
    # state spaces
    **dict.fromkeys(("state_size", "mamba_d_state", "ssm_state_size"), 8),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads"), 4),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim"), 16),
    **dict.fromkeys(("mamba_n_groups", "n_groups"), 1),
    "time_step_rank": 4,
    "lru_width": 32,
}
# What an architecture needs besides, None for a size that it cannot be given.
ATTENTION_IN_THE_MIDDLE = ["linear_attention", "full_attention", "linear_attention"]
LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
LINEAR_LAYERS = LINEAR | {"layer_types": ATTENTION_IN_THE_MIDDLE}
IMAGES = {"image_size": 16, "patch_size": 4}
OWN: dict[str, dict[str, Any]] = {
    "BambaForCausalLM": {"attn_layer_indices": [1]},
    "DeepseekV2ForCausalLM": {"num_experts_per_tok": 2},
    "DeepseekV3ForCausalLM": {"head_dim": 4},
    "DeiTForImageClassification": IMAGES,
    "DeiTModel": IMAGES,
    "FalconForCausalLM": {"head_dim": None},
    "FalconH1ForCausalLM": {"mamba_d_ssm": 64},
    "GlmMoeDsaForCausalLM": {"head_dim": 4, "index_head_dim": 8, "index_n_heads": 4, "index_topk": 16},
    "GraniteMoeHybridForCausalLM": {"layer_types": ["mamba", "attention", "mamba"], "position_embedding_type": "rope"},
    "HunYuanDenseV1ForCausalLM": {"head_dim": 8},
    "JambaForCausalLM": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "Lfm2MoeForCausalLM": {"layer_types": ["conv", "full_attention", "conv"]},
    "Mamba2ForCausalLM": {"head_dim": 16},
    "NemotronForCausalLM": {"head_dim": 8, "num_key_value_heads": 2},
    "Qwen3NextForCausalLM": LINEAR_LAYERS,
    "Qwen3_5ForCausalLM": LINEAR_LAYERS,
    "Qwen3_5MoeForCausalLM": LINEAR_LAYERS,
    "ViTModel": IMAGES,
    "YoutuForCausalLM": {"head_dim": 4},
    "Zamba2ForCausalLM": {"layer_types": ["mamba", "hybrid", "mamba"]},
}
TOKENIZERS = {"T5": "t5", "MT5": "t5", "LongT5": "t5", "Switch": "t5", "Bert": "bert", "Roberta": "roberta"}
TOKENIZERS |= dict.fromkeys(("Bart", "MBart", "LED", "Pegasus", "Blenderbot", "M2M100"), "bart") | {"Marian": "marian"}


def architectures() -> list[str]:
    """The names of all that the installed TransformerLens has a Bridge for."""
    from transformer_lens.factories.architecture_adapter_factory import SUPPORTED_ARCHITECTURES

    return sorted(SUPPORTED_ARCHITECTURES)


def families() -> list[str]:
    """The same, and on TransformerLens 3 those that it has a HookedTransformer of."""
    hooked = [f"{class_of(name)} (HookedTransformer)" for name in tiny.DECODERS]
    return architectures() + (hooked if version("transformer-lens").startswith("3.") else [])


def class_of(name: str) -> str:
    """The Hugging Face class of one of our tiny architectures."""
    return (tiny._MODELS | tiny._RARE | tiny._ENCODER_DECODERS)[name][0]


def build(family: str) -> Any:
    """A tiny model of a family; raises where there is none, or TransformerLens cannot run it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what a library says of a configuration
        model = _built(family)
        if not family.startswith(OF_PATCHES):
            runs(model)
        return model


def _built(family: str) -> Any:
    own = {class_of(name): name for name in (*tiny.ARCHITECTURES, *tiny.RARE, *tiny.ENCODER_DECODERS)}
    if family.endswith(" (HookedTransformer)"):
        return tiny.hooked(own[family.split()[0]])
    if family == "ViTForImageClassification":
        return tiny.vit()
    if family in own:
        return tiny.bridge(own[family])
    return booted(family)


@torch.random.fork_rng(devices=[])
def booted(family: str) -> Any:
    """A Bridge of any class of transformers."""
    import transformers
    from transformer_lens.model_bridge import TransformerBridge

    kind = getattr(transformers, family, None)
    if kind is None:
        raise LookupError("transformers has no such class: its code comes with the weights")
    first = next((name for name in sorted(TOKENIZERS, key=len, reverse=True) if family.startswith(name)), "")
    tokenizer = tiny.tokenizer(TOKENIZERS.get(first, "gpt2"))
    default = kind.config_class()
    if kind.main_input_name == "input_values":
        raise LookupError("it reads sound")
    if {"vision_config", "audio_config", "text_config", "encoder", "decoder"} & set(kind.config_class.sub_configs):
        raise LookupError("it is made of several models, as one of images and text is: none is made here")
    sizes = {name: n for name, n in SIZES.items() if _given_by(default, name)} | OWN.get(family, {})
    sizes = {name: size for name, size in sizes.items() if size is not None}
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    special["decoder_start_token_id"] = special["pad_token_id"]
    config = kind.config_class(**sizes | special, architectures=[family])
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in kind(config).parameters())
    if size > LARGEST:
        raise LookupError(f"its tiny configuration is not tiny, {size:,} parameters: add its sizes to SIZES or OWN")
    source = kind(config).eval()
    tiny._randomise(source, 0, torch.float32)
    with contextlib.suppress(ValueError, AttributeError):  # some have one way only
        source.set_attn_implementation("eager")
    return TransformerBridge.boot_transformers(
        f"tiny-{family.lower()}", hf_model=source, tokenizer=tokenizer, dtype=torch.float32, device="cpu"
    )


def runs(model: Any) -> None:
    """Raise if TransformerLens cannot run the model that it booted."""
    ids = torch.tensor([[3, 4, 5, 6]])
    try:
        with torch.no_grad():
            model(ids, **({"decoder_input": ids} if hasattr(model, "decoder_blocks") else {}))
    except Exception as error:
        raise LookupError(f"booted, but not run with this configuration: {type(error).__name__}: {error}") from error


def _given_by(config: Any, name: str) -> bool:
    try:
        return getattr(config, name, None) is not None
    except Exception:  # Gemma 4: layers differ in it
        return False


def _is_of_images(model: Any) -> bool:
    return isinstance(view_of(model), ImageView)


def _is_encoder(model: Any) -> bool:
    return bool(getattr(view_of(model), "encoder", False))


def _doubled(state: torch.Tensor, label: str) -> torch.Tensor:
    return 2 * state


def _stem(model: Any) -> Any:
    return None if _is_of_images(model) else lp.stems.orthogonal(model, patch=4)


# Cells


def outcome(name: str, model: Any) -> str:
    """One cell: right, refused, wrong or error, and why.

    A refusal is a ValueError or TypeError that this package raises itself.
    """
    try:
        check(name, model)
    except AssertionError as wrong:
        return _because("wrong", wrong)
    except (ValueError, TypeError) as error:
        raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
        return _because("refused" if PACKAGE in raised_in.parents else "error", error)
    except Exception as error:
        return _because("error", error)
    return "right"


def _because(state: str, error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    text = re.sub(r"tiny-[\w.-]*\w", "this model", text)
    text = text if state != "error" else f"{type(error).__name__}: {text}"
    return f"{state}: {text if len(text) <= LONGEST else text[: LONGEST - 3] + '...'}"


def check(name: str, model: Any) -> None:
    """Raise an AssertionError if what it measures is not right, and whatever it raises itself."""
    asked = ASKED.get(name, lambda model: getattr(lp, name)())(model)
    if not isinstance(asked, lp.Probe):
        sound(asked.run(model, _given(name, model), progress=False))
        return
    given = _given(name, model)
    batch = asked.run(model, given, batch_size=len(given), progress=False)
    alone = Result.merge([asked.run(model, [each], progress=False) for each in given])
    assert_same(batch, alone, "single prompts", integers=NEAR_TIES)
    sound(batch)
    if isinstance(batch, lp.LogitLensResult) and not isinstance(view_of(model), StackView):
        agrees_with_logits(batch, model)


def sound(result: Result) -> None:
    """Finite, within declared bounds, and not without any value."""
    check_values(result)
    headline = schema(type(result)).headline
    assert not math.isnan(np.nanmean(result.known(headline))), f"{headline!r} must have values; all are missing"


def agrees_with_logits(lens: Any, model: Any) -> None:
    """The last layer of a logit lens has the log-probabilities and ranks of the model's own logits."""
    for number, tokens in lens.token.by_prompt():
        rows = torch.tensor(lens.token.rows(number))
        with torch.no_grad():
            own = model(tokens.id[None])[0].float().log_softmax(-1)
        target = lens.target_id[rows]
        known = target >= 0
        of_target = own[known].gather(-1, target[known, None])
        apart = (lens.log_prob[-1, rows][known] - of_target[:, 0]).abs().max()
        assert apart < 1e-3, f"the last layer must have the model's own log-probabilities; they differ by {apart:.2g}"
        rank = (own[known] > of_target).sum(-1)
        differ = (lens.rank[-1, rows][known] != rank).double().mean()
        assert differ <= 0.1, f"the last layer must have the model's own ranks; {differ:.0%} differ"


def _given(name: str, model: Any) -> Any:
    """Prompts, topics or images."""
    if name in OF_IMAGES:
        return torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    if name == "TopicAblation":
        return TOPICS
    if name in OF_SENTENCES:
        return SENTENCES
    if isinstance(view_of(model), StackView):
        return [lp.Prompt(prompt, target=prompt[4:]) for prompt in PROMPTS]
    return list(PROMPTS)


# The file


def versions() -> dict[str, str]:
    """The releases of this environment."""
    packages = {name: version(name) for name in ("transformer-lens", "transformers", "torch")}
    return {**packages, "torch": packages["torch"].split("+")[0], "python": platform.python_version()}


def asked_of(family: str, model: Any, some: Iterable[str] | None = None, *, progress: bool = True) -> dict[str, str]:
    """The cells of one family: all, or those of some probes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cells = {name: outcome(name, model) for name in (names() if some is None else some)}
    if progress:
        counts = {state: sum(cell.startswith(state) for cell in cells.values()) for state in STATES}
        print(f"{family}: {', '.join(f'{n} {state}' for state, n in counts.items() if n)}", flush=True)
    return cells


STATES = ("right", "refused", "wrong", "error")


def measured(
    families: Iterable[str], some: Iterable[str] | None = None
) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """Cells by family, and why some families have none; of all probes, or of some."""
    found: dict[str, dict[str, str]] = {}
    absent: dict[str, str] = {}
    for family in families:
        try:
            model = build(family)
        except Exception as error:
            absent[family] = _because("error", error).removeprefix("error: ").removeprefix("LookupError: ")
            continue
        found[family] = asked_of(family, model, some)
    return found, absent


def read() -> list[dict[str, Any]]:
    """The stored runs, oldest release first."""
    return unpacked(json.loads(FILE.read_text(encoding="utf-8"))) if FILE.is_file() else []


def packed(releases: list[dict[str, Any]]) -> dict[str, Any]:
    """What the file holds: each reason once, and its number in the cells.

    >>> packed([{"families": {"A": {"x": "refused: no", "y": "right"}}}])
    {'reasons': ['no'], 'releases': [{'families': {'A': {'x': 'refused 0', 'y': 'right'}}}]}
    """
    numbers: dict[str, int] = {}

    def short(cell: str) -> str:
        state, colon, reason = cell.partition(": ")
        return f"{state} {numbers.setdefault(reason, len(numbers))}" if colon else state

    shown = [each | {"families": _each_cell(each["families"], short)} for each in releases]
    return {"reasons": list(numbers), "releases": shown}


def unpacked(stored: dict[str, Any]) -> list[dict[str, Any]]:
    """The runs, with their reasons in the cells."""

    def long(cell: str) -> str:
        state, space, number = cell.partition(" ")
        return f"{state}: {stored['reasons'][int(number)]}" if space else state

    return [each | {"families": _each_cell(each["families"], long)} for each in stored["releases"]]


def _each_cell(families: dict[str, dict[str, str]], do: Callable[[str], str]) -> dict[str, dict[str, str]]:
    return {family: {name: do(cell) for name, cell in cells.items()} for family, cells in families.items()}


def nearest(releases: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The stored run that this environment is held against: of the same releases, else of the last of the same line."""
    own = versions()
    line = [each for each in releases if each["versions"]["transformer-lens"][:2] == own["transformer-lens"][:2]]
    same = [each for each in line if all(each["versions"][name] == own[name] for name in list(own)[:2])]
    return (same or line or [None])[-1]


def worse(before: dict[str, str], now: dict[str, str]) -> Iterator[str]:
    """The cells that were right and are not, and those that became wrong."""
    for name, cell in now.items():
        was = before.get(name, "")
        if (was == "right" and cell != "right") or (was.startswith("refused") and cell.startswith(("wrong", "error"))):
            yield f"{name} was {was}, is {cell}"


def main(given: list[str]) -> None:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here may depend on the hub
    torch.set_num_threads(1)
    some = [name for name in given if name in names()]
    if unknown := set(given).difference(some, families()):
        sys.exit(f"names must be those of probes, experiments or architectures; got {', '.join(sorted(unknown))}")
    found, absent = measured([name for name in given if name not in some] or families(), some or None)
    releases, own, same = read(), versions(), ("transformer-lens", "transformers")
    before = [each for each in releases if all(each["versions"][name] == own[name] for name in same)]
    if given and before:
        found = {name: before[0]["families"].get(name, {}) | cells for name, cells in found.items()}
        found = {name: cells for name, cells in before[0]["families"].items() if name not in absent} | found
        absent = {name: why for name, why in before[0]["absent"].items() if name not in found} | absent
    entry = {"versions": own, "families": dict(sorted(found.items())), "absent": dict(sorted(absent.items()))}
    order = [*(each for each in releases if each not in before), entry]
    order.sort(key=lambda each: [_number(each["versions"][name]) for name in same])
    FILE.write_text(json.dumps(packed(order), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _number(release: str) -> list[int]:
    return [int(part) for part in release.split(".") if part.isdigit()]


if __name__ == "__main__":
    main(sys.argv[1:])
