"""Tiny seeded models of many architectures, built in memory, for examples and tests (also yours).

Each has 3 layers of 4 heads, d_model 32, 400 tokens and a context of 64, and is built in a tenth of a second
without a model hub. Together they cover what differs between architectures: learned and rotary positions, tied
and untied embeddings, grouped queries, parallel blocks, soft caps, norms before, after and inside attention,
and the special tokens of the tokenizer. The weights are random: the numbers say nothing about language, but
whatever must hold for every model can be tested on them.
"""

import atexit
import json
import tempfile
import warnings
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import torch

CONTEXT = 64  # tokens, special ones included
VOCABULARY = 400

_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT,
}
_GROUPED = {"intermediate_size": 64, "num_key_value_heads": 2}
_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2LMHeadModel", {}),
    "opt": ("OPTForCausalLM", {"ffn_dim": 64, "word_embed_proj_dim": 32}),
    "llama": ("LlamaForCausalLM", _GROUPED | {"tie_word_embeddings": False}),
    "neox": ("GPTNeoXForCausalLM", {"intermediate_size": 64, "tie_word_embeddings": False}),
    "gemma2": (
        "Gemma2ForCausalLM",
        _GROUPED
        | {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 2 * CONTEXT}
        # Random weights never reach the real caps, 50 and 30, so these are lower.
        | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0},
    ),
    # As in the real model, all heads together are wider than the residual stream: 4 x 16 > 32.
    "qwen3": ("Qwen3ForCausalLM", _GROUPED | {"head_dim": 16, "tie_word_embeddings": True}),
    "bert": ("BertForMaskedLM", {"intermediate_size": 64}),
    # RoBERTa counts its positions from pad_token_id + 1.
    "roberta": ("RobertaForMaskedLM", {"intermediate_size": 64, "max_position_embeddings": CONTEXT + 2}),
}
# Architectures with a peculiarity of their own, not used in every test.
_RARE: dict[str, tuple[str, dict[str, Any]]] = {
    # Multiplies embeddings, scores and the outputs of attention and MLP, and divides logits.
    "granite": (
        "GraniteForCausalLM",
        _GROUPED
        | {"embedding_multiplier": 6.0, "attention_multiplier": 0.3, "residual_multiplier": 0.22}
        | {"logits_scaling": 4.0},
    ),
    # Does not scale scores; layer 1 has local attention.
    "gpt_neo": (
        "GPTNeoForCausalLM",
        {"num_layers": 3, "num_heads": 4, "window_size": 8} | {"attention_types": [[["global", "local", "global"], 1]]},
    ),
    # Rotate neighbouring dimensions; CodeGen has queries, values and keys in one matrix.
    "gptj": ("GPTJForCausalLM", {"rotary_dim": 4, "tie_word_embeddings": False}),
    "codegen": ("CodeGenForCausalLM", {"rotary_dim": 4, "tie_word_embeddings": False}),
    # Clips queries, keys and values; more of them here than in the real model.
    "olmo": ("OlmoForCausalLM", _GROUPED | {"clip_qkv": 0.5}),
    "cohere": ("CohereForCausalLM", _GROUPED),
}
# Encoder-decoders: three layers in each stack.
_STACKS = {
    f"{stack}_{size}": n
    for stack in ("encoder", "decoder")
    for size, n in {"layers": 3, "attention_heads": 4, "ffn_dim": 64}.items()
}
_ENCODER_DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "t5": ("T5ForConditionalGeneration", {"num_layers": 3, "d_kv": 8, "d_ff": 64, "decoder_start_token_id": 0}),
    "bart": ("BartForConditionalGeneration", _STACKS | {"decoder_start_token_id": 2, "forced_eos_token_id": None}),
    "marian": ("MarianMTModel", _STACKS | {"decoder_start_token_id": 0, "forced_eos_token_id": None}),
}
ENCODERS: tuple[str, ...] = ("bert", "roberta")
DECODERS: tuple[str, ...] = tuple(name for name in _MODELS if name not in ENCODERS)
ARCHITECTURES: tuple[str, ...] = DECODERS + ENCODERS
RARE: tuple[str, ...] = tuple(_RARE)
ENCODER_DECODERS: tuple[str, ...] = tuple(_ENCODER_DECODERS)

# Entries of tokenizer_config.json; special tokens get their ids in this order.
_MARKS = {"bos_token": "<|bos|>", "eos_token": "<|eos|>", "pad_token": "<|pad|>"}
_TOKENIZERS = {
    "opt": {"pad_token": "<pad>", "bos_token": "</s>", "eos_token": "</s>"},
    # As in SmolLM2, pad is eos: a mask of `ids != pad` loses real tokens.
    "llama": _MARKS | {"pad_token": "<|eos|>"},
    "bert": {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"},
    "roberta": {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    | {"cls_token": "<s>", "sep_token": "</s>", "mask_token": "<mask>"}
    # TransformerLens reloads a tokenizer so that it adds bos; only the real class still adds eos then.
    | {"tokenizer_class": "RobertaTokenizer"},
    "t5": {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"},
    "bart": {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    | {"tokenizer_class": "RobertaTokenizer"},  # BART's own; the same reason
    "marian": {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"},
}
_TEMPLATES = {
    "opt": "</s> $A",
    "bert": "[CLS] $A [SEP]",
    "roberta": "<s> $A </s>",
    "t5": "$A </s>",
    "bart": "<s> $A </s>",
    "marian": "$A </s>",
}


@torch.random.fork_rng(devices=[])  # building draws random numbers: keep the caller's generator unchanged
def bridge(
    architecture: str = "gpt2",
    *,
    processed: bool = False,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    padding_side: Literal["left", "right"] = "right",
) -> Any:
    """Build a tiny `TransformerBridge`, in eval mode on the CPU.

    Its log-probabilities are those of `huggingface(architecture, seed=seed)`, to float32 rounding. On
    TransformerLens 3.x there is no bridge for RoBERTa.

    >>> model = bridge("llama")
    >>> model.cfg.model_name, model.cfg.n_layers, tuple(model.W_U.shape)
    ('tiny-llama', 3, (32, 400))

    Args:
        architecture: One of `ARCHITECTURES`, or of `RARE` or `ENCODER_DECODERS`, which `check_probe` does not use by
            default.
        processed: Process the weights as `enable_compatibility_mode()` does, where that applies.
        seed: Of the weights.
        dtype: Of the weights, which are drawn in float32 and then rounded.
        padding_side: Of the tokenizer.
    """
    from transformer_lens.factories.architecture_adapter_factory import SUPPORTED_ARCHITECTURES
    from transformer_lens.model_bridge import TransformerBridge

    source = huggingface(architecture, seed=seed, dtype=dtype)
    if type(source).__name__ not in SUPPORTED_ARCHITECTURES:
        raise ValueError(
            f"architecture must be one that this TransformerLens has a bridge for; got {architecture!r}: install"
            " transformer-lens>=4, or use another architecture"
        )
    source.set_attn_implementation("eager")  # as when booting by name: otherwise 3.x has no patterns of OPT and BERT
    model = TransformerBridge.boot_transformers(
        f"tiny-{architecture}",
        hf_model=source,
        tokenizer=tokenizer(architecture, padding_side),
        dtype=dtype,  # only recorded in cfg: a model that is passed keeps its dtype
        device="cpu",
    )
    if processed:
        # A step that an architecture does not allow would be skipped with a warning.
        model.enable_compatibility_mode(fold_ln=architecture not in ENCODERS, center_unembed=architecture != "gemma2")
    return model


@torch.random.fork_rng(devices=[])
def vit(*, seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """Build a tiny vision transformer as a `TransformerBridge`: images of 16 x 16 pixels, patches of 4 x 4.

    >>> model = vit()
    >>> model.run_with_hooks(torch.zeros(1, 3, 16, 16)).shape
    torch.Size([1, 5])
    """
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import ViTConfig, ViTForImageClassification

    name = "ViTForImageClassification"
    sizes = {key: _SIZES[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads")}
    settings: dict[str, Any] = sizes | {"intermediate_size": 64, "image_size": 16, "patch_size": 4, "num_labels": 5}
    config = ViTConfig(**settings, architectures=[name])
    source = ViTForImageClassification(config).eval()
    _randomise(source, seed, dtype)
    # Where Pillow is installed, TransformerLens asks the hub for this model's image processor, for minutes without a
    # network. No model of the hub may have this name, so it does not ask.
    model = TransformerBridge.boot_transformers("tiny--vit", hf_model=source, device="cpu", dtype=dtype)
    model.cfg.model_name = "tiny-vit"
    return model


@torch.random.fork_rng(devices=[])
def hooked(
    architecture: str = "gpt2",
    *,
    processed: bool = False,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    padding_side: Literal["left", "right"] = "right",
) -> Any:
    """Build the same model as a `HookedTransformer`, for decoders and on TransformerLens 3.x only.

    Arguments as for `bridge`; `processed` is what `HookedTransformer.from_pretrained` does by default.
    """
    if architecture in ENCODERS:
        raise ValueError(f"a HookedTransformer must be a decoder; got {architecture!r}: use bridge()")
    try:
        loading: Any = import_module("transformer_lens.loading_from_pretrained")
        lens: Any = import_module("transformer_lens")
    except ModuleNotFoundError as error:
        raise ImportError(
            "HookedTransformer needs TransformerLens 3; got version 4, which has none: use bridge(), or install"
            " transformer-lens<4"
        ) from error
    source = huggingface(architecture, seed=seed, dtype=dtype)

    # from_pretrained takes official names only, but the loaders beneath it also take a path. They guess the
    # architecture from a path that contains a family's name, so this path must not contain one.
    with tempfile.TemporaryDirectory(prefix="lens_probes-") as folder:
        source.config.n_ctx = CONTEXT  # read for GPT-2, and no longer written by transformers 5
        source.config.save_pretrained(folder)
        if architecture == "gemma2":
            cfg = lens.HookedTransformerConfig(**_gemma2_settings(source.config), dtype=dtype, device="cpu")
        else:
            cfg = loading.get_pretrained_model_config(folder, n_ctx=CONTEXT, dtype=dtype, device="cpu")
        state = loading.get_pretrained_state_dict(folder, cfg, source, dtype=dtype)
    cfg.model_name = f"tiny-{architecture}"

    with warnings.catch_warnings():
        # 3.x warns that this class is deprecated; the caller chose it by name.
        warnings.filterwarnings("ignore", "HookedTransformer is deprecated", DeprecationWarning)
        model = lens.HookedTransformer(cfg, tokenizer(architecture, padding_side), move_to_device=False)
    model.load_and_process_state_dict(
        state,
        fold_ln=processed,
        center_writing_weights=processed,
        center_unembed=processed and architecture != "gemma2",  # capped logits are not free to shift
        fold_value_biases=processed,
    )
    return model.eval()


@torch.random.fork_rng(devices=[])
def huggingface(architecture: str = "gpt2", *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """Build the same weights as a plain Hugging Face model, the independent reference, in eval mode."""
    import transformers

    special = tokenizer(architecture)
    class_name, config = (_MODELS | _RARE | _ENCODER_DECODERS)[architecture]
    model_class = getattr(transformers, class_name)
    model = model_class(
        model_class.config_class(
            **_SIZES | config,
            architectures=[class_name],
            bos_token_id=special.bos_token_id,
            eos_token_id=special.eos_token_id,
            pad_token_id=special.pad_token_id,
        )
    ).eval()

    _randomise(model, seed, dtype)
    return model


def _randomise(model: Any, seed: int, dtype: torch.dtype) -> None:
    """Draw the weights in float32, in the order of their names, then round them."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                # Ten times the usual spread, so that three layers move a state far from its embedding.
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
            else:
                # Initial norm weights are 1 (Gemma's 0, to which it adds 1) and initial biases 0: code that
                # ignores them would be right by accident.
                spread = 0.2 if name.endswith("weight") else 0.1
                parameter += spread * (2 * torch.rand(parameter.shape, generator=generator) - 1)
            # model.to(dtype) would round the rotary frequencies too, which from_pretrained does not do.
            parameter.data = parameter.to(dtype)


def tokenizer(architecture: str = "gpt2", padding_side: Literal["left", "right"] = "right") -> Any:
    """Load a byte-level BPE tokenizer with the architecture's special tokens; it gives offset mappings."""
    from transformers import AutoTokenizer

    if architecture not in _MODELS | _RARE | _ENCODER_DECODERS:
        known = ", ".join(ARCHITECTURES + RARE + ENCODER_DECODERS)
        raise ValueError(f"architecture must be one of {known}; got {architecture!r}")
    return AutoTokenizer.from_pretrained(_tokenizer_folder(architecture), padding_side=padding_side)


@cache
def _tokenizer_folder(architecture: str) -> str:
    """Train the tokenizer, once per process, and save it in a folder, from which TransformerLens reloads it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    entries = {"tokenizer_class": "PreTrainedTokenizerFast"} | _TOKENIZERS.get(architecture, _MARKS)
    special = [token for entry, token in entries.items() if entry.endswith("_token")]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(dict.fromkeys(special)),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # all bytes, so that any text has tokens
        show_progress=False,
    )
    bpe.train_from_iterator(_TEXT.splitlines(), trainer)
    if template := _TEMPLATES.get(architecture):
        ids = [(token, bpe.token_to_id(token)) for token in template.split() if token != "$A"]
        bpe.post_processor = processors.TemplateProcessing(single=template, special_tokens=ids)

    folder = tempfile.TemporaryDirectory(prefix="lens_probes-")
    atexit.register(folder.cleanup)
    bpe.save(str(Path(folder.name, "tokenizer.json")))
    inputs = {"model_input_names": ["input_ids", "attention_mask"]}
    Path(folder.name, "tokenizer_config.json").write_text(json.dumps(entries | inputs))
    return folder.name


def _gemma2_settings(config: Any) -> dict[str, Any]:
    """Translate a Gemma 2 config for HookedTransformer, whose loader knows the released sizes only."""
    kinds = {"sliding_attention": "local", "full_attention": "global"}
    return (
        {"original_architecture": "Gemma2ForCausalLM", "init_weights": False}
        | {"n_layers": config.num_hidden_layers, "d_vocab": config.vocab_size, "n_ctx": CONTEXT}
        | {"d_model": config.hidden_size, "d_mlp": config.intermediate_size, "d_head": config.head_dim}
        | {"n_heads": config.num_attention_heads, "n_key_value_heads": config.num_key_value_heads}
        | {"normalization_type": "RMS", "eps": config.rms_norm_eps}
        | {"use_normalization_before_and_after": True}
        | {"positional_embedding_type": "rotary", "rotary_dim": config.head_dim}
        | {"act_fn": config.hidden_activation, "gated_mlp": True}
        | {"use_local_attn": True, "window_size": config.sliding_window}
        | {"attn_types": [kinds[kind] for kind in config.layer_types]}
        | {"attn_scores_soft_cap": config.attn_logit_softcapping}
        | {"output_logits_soft_cap": config.final_logit_softcapping}
    )


# What the tokenizers are trained on.
_TEXT = """
The old lighthouse keeper climbed the stairs every evening before the fog came in. Her sister paints small
birds on the backs of letters and never signs them. Nobody expected the river to rise so quickly after a
single night of rain. Take two cups of flour, a pinch of salt and as much water as the dough will hold. When
the train finally left the station, half of the passengers were asleep. Prices fell by nearly 12 percent in
March, and then they rose again in April. If you can read this sentence without your glasses, you may sit at
the back. The committee has not decided whether the bridge should be repaired or replaced. A spider had
built its web between the handlebars of the bicycle. "Where did you put the keys?" she asked, although she
already knew the answer. Most of the light that we see from that star left it before we were born. He was
the kind of man who counted the spoons after every dinner. The children followed the sound of the drums
through the market and out of the town. Water boils at a lower temperature in the mountains than it does by
the sea. My grandfather kept his tools in the order in which he had bought them. They walked along the
beach, talking about music, until their feet were cold. The first version of the program was slow, but it
was never wrong. Under the floor of the church, workers found coins from the time of the Romans. Don't open
the window; the cat thinks that it can fly. Each of the four teams will present its results on Thursday
morning. There is a small café on the corner where the waiters sing. The doctor wrote something that nobody
in the pharmacy could read. Snow fell on the orchard all day, and the branches bent towards the ground. What
surprised the judges most was the silence of the witness. Bees find their way home by the position of the
sun. She had learned to play the violin from a book, and it sounded like it. The museum is closed on
Mondays, except in summer, when it is open every day. Three ships sailed from the harbour in 1821, and only
one of them came back. I would rather be early and bored than late and sorry. The soup was too hot to eat
and too good to leave. A good map shows less than the mapmaker knows. By the time we reached the village,
the shops had been shut for hours. The engine made a noise like a dog that wants to be let in. It is easier
to ask a question than to listen to the answer. Young trees need more water than old ones, but they forgive
more too. The letter was addressed to a house that had burned down years before. Some people collect stamps;
my neighbour collects rubber ducks. After the concert, the singer thanked everyone who had carried a chair.
The moon was so bright that the farmer could count his sheep by it. Nothing in the contract says that the
roof has to be blue.
"""
