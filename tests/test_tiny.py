"""The tiny models are what they say: real architectures with all their parts, equal to Hugging Face."""

import subprocess
import sys
import warnings
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from reference import skip_where_transformerlens_breaks

from lens_probes.examples import tiny

TEXTS = ["The cat sat on the mat.", "Café <script>alert('🙂')</script>\n\ttwo  spaces", "naïve 東京 ½"]
HAS_HOOKED = find_spec("transformer_lens.loading_from_pretrained") is not None

pytestmark = pytest.mark.filterwarnings("error")
only_3x = pytest.mark.skipif(not HAS_HOOKED, reason="TransformerLens 4 has no HookedTransformer")
only_4x = pytest.mark.skipif(HAS_HOOKED, reason="TransformerLens 3 has HookedTransformer")


@pytest.fixture(scope="module", autouse=True)
def imported():
    """Import outside the tests, whose warnings are errors: what the libraries say on import is not ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import transformer_lens.model_bridge  # noqa: F401


@pytest.fixture(params=tiny.ARCHITECTURES)
def architecture(request):
    if HAS_HOOKED and request.param == "roberta":
        pytest.skip("TransformerLens 3 has no bridge for RoBERTa")
    return request.param


def full_context(architecture, seed=0):
    """Two rows of random ids that fill the context, without padding, which RoBERTa would give no position."""
    words = tiny.tokenizer(architecture)
    ids = torch.randint(len(words), (2, tiny.CONTEXT), generator=torch.Generator().manual_seed(seed))
    return ids.masked_fill(ids == words.pad_token_id, len(words) - 1)


def log_probs(model, ids):
    with torch.no_grad():
        output = model(ids)
    return getattr(output, "logits", output).float().log_softmax(-1)


def same(model, reference, ids):
    return torch.allclose(log_probs(model, ids), log_probs(reference, ids), rtol=0, atol=1e-4)


@pytest.mark.parametrize("processed", [False, True])
def test_a_bridge_gives_the_log_probabilities_of_hugging_face(architecture, processed):
    model = tiny.bridge(architecture, processed=processed)
    assert same(model, tiny.huggingface(architecture), full_context(architecture))
    assert not model.training


@pytest.mark.parametrize("architecture", tiny.RARE)
def test_a_bridge_of_a_rare_architecture_does_so_too(architecture):
    if HAS_HOOKED and architecture == "cohere":
        pytest.skip("TransformerLens 3 turns Cohere's queries and keys otherwise than Hugging Face")
    skip_where_transformerlens_breaks(architecture)
    model = tiny.bridge(architecture)
    assert same(model, tiny.huggingface(architecture), full_context(architecture))


@only_3x
@pytest.mark.parametrize("processed", [False, True])
@pytest.mark.parametrize("architecture", tiny.DECODERS)
def test_a_hooked_transformer_gives_the_log_probabilities_of_hugging_face(architecture, processed):
    model = tiny.hooked(architecture, processed=processed)
    assert same(model, tiny.huggingface(architecture), full_context(architecture))
    assert not model.training
    assert model.cfg.model_name == f"tiny-{architecture}"
    assert model.cfg.normalization_type.endswith("Pre") == processed


@pytest.mark.parametrize("processed", [False, True])
def test_a_bridge_in_bfloat16_runs_and_stays_near(architecture, processed):
    model = tiny.bridge(architecture, processed=processed, dtype=torch.bfloat16)
    ids = full_context(architecture)
    assert model(ids).dtype == torch.bfloat16
    torch.testing.assert_close(log_probs(model, ids), log_probs(tiny.huggingface(architecture), ids), rtol=0, atol=0.5)


@only_3x
@pytest.mark.parametrize("processed", [False, True])
@pytest.mark.parametrize("architecture", tiny.DECODERS)
def test_a_hooked_transformer_in_bfloat16_runs_and_stays_near(architecture, processed):
    model = tiny.hooked(architecture, processed=processed, dtype=torch.bfloat16)
    ids = full_context(architecture)
    assert model(ids).dtype == torch.bfloat16
    torch.testing.assert_close(log_probs(model, ids), log_probs(tiny.huggingface(architecture), ids), rtol=0, atol=0.5)


def test_processing_changes_the_weights_and_not_the_model(architecture):
    raw, processed = (tiny.bridge(architecture, processed=flag).W_E for flag in (False, True))
    # Only LayerNorm allows to centre what is written to the residual stream.
    layer_norm = architecture in ("gpt2", "opt", "neox", "bert", "roberta")
    assert torch.equal(raw, processed) == (not layer_norm)


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(architecture):
    ids = full_context(architecture)
    assert torch.equal(
        log_probs(tiny.bridge(architecture, seed=3), ids), log_probs(tiny.bridge(architecture, seed=3), ids)
    )
    first, other = (tiny.huggingface(architecture, seed=seed).state_dict() for seed in (3, 4))
    assert all(not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_no_norm_weight_or_bias_is_left_at_its_initial_value(architecture):
    for name, parameter in tiny.huggingface(architecture).named_parameters():
        assert parameter.std() > 0.03, name


def test_every_layer_moves_the_state(architecture):
    model = tiny.bridge(architecture)
    _, cache = model.run_with_cache(full_context(architecture))
    states = [cache["blocks.0.hook_resid_pre"]] + [cache[f"blocks.{i}.hook_resid_post"] for i in range(3)]
    for before, after in pairwise(states):
        assert torch.cosine_similarity(before, after, dim=-1).mean() < 0.95


@pytest.mark.parametrize("cap", ["attn_logit_softcapping", "final_logit_softcapping"])
def test_gemmas_soft_caps_are_small_enough_to_matter(cap):
    capped, open_ = tiny.huggingface("gemma2"), tiny.huggingface("gemma2")
    setattr(open_.config, cap, None)
    for layer in open_.model.layers:
        setattr(layer.self_attn, cap, None)
    ids = full_context("gemma2")
    assert (log_probs(capped, ids) - log_probs(open_, ids)).abs().max() > 0.05


def test_embeddings_are_tied_in_some_models_and_not_in_others():
    tied = {name: tiny.huggingface(name).config.tie_word_embeddings for name in tiny.DECODERS}
    assert tied == {
        "gpt2": True,
        "opt": True,
        "llama": False,
        "neox": False,
        "gemma2": True,
        "qwen3": True,
    }


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_text_makes_a_round_trip_and_offsets_cover_it(architecture):
    words = tiny.tokenizer(architecture)
    assert len(words) == tiny.VOCABULARY == tiny.huggingface(architecture).config.vocab_size
    for text in TEXTS:
        encoded = words(text, return_offsets_mapping=True)
        assert words.decode(encoded["input_ids"], skip_special_tokens=True) == text
        covered = {i for start, end in encoded["offset_mapping"] for i in range(start, end)}
        # RoBERTa's offsets leave out the space before a word.
        assert {i for i, character in enumerate(text) if not character.isspace()} <= covered


def test_the_tokenizer_adds_what_the_real_one_adds(architecture):
    plain = tiny.tokenizer("gpt2").convert_ids_to_tokens(tiny.tokenizer("gpt2")("cat").input_ids)
    around = {"opt": ("</s>", None), "bert": ("[CLS]", "[SEP]"), "roberta": ("<s>", "</s>")}
    first, last = around.get(architecture, (None, None))
    words = tiny.tokenizer(architecture)
    assert words.convert_ids_to_tokens(words("cat").input_ids) == [
        token for token in (first, *plain, last) if token is not None
    ]
    # TransformerLens makes every tokenizer add bos, where there is one; the rest has to survive that.
    booted = tiny.bridge(architecture).tokenizer
    assert booted.convert_ids_to_tokens(booted("cat").input_ids) == [
        token for token in (first or "<|bos|>", *plain, last) if token is not None
    ]


def test_llama_pads_with_eos_and_the_others_do_not():
    shared = {name for name in tiny.DECODERS if tiny.tokenizer(name).pad_token == tiny.tokenizer(name).eos_token}
    assert shared == {"llama"}


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_the_padding_side_reaches_the_model(architecture, padding_side):
    model = tiny.bridge(architecture, padding_side=padding_side)
    ids = model.to_tokens(["cat", "a longer line of text"])
    pad = model.tokenizer.pad_token_id
    assert (ids[0, 0] == pad, ids[0, -1] == pad) == (padding_side == "left", padding_side == "right")


def test_models_are_built_anew_each_time():
    first, second = tiny.bridge(), tiny.bridge()
    with torch.no_grad():
        first.W_E.zero_()
    first.tokenizer.padding_side = "left"
    assert second.W_E.abs().sum() > 0
    assert tiny.bridge().W_E.abs().sum() > 0
    assert tiny.bridge().tokenizer.padding_side == "right"


def test_building_leaves_the_callers_random_numbers_alone():
    state = torch.get_rng_state()
    tiny.bridge(processed=True)
    if HAS_HOOKED:
        tiny.hooked(processed=True)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.matrix
def test_another_process_builds_the_same_model_and_leaves_no_warning_and_no_folder():
    program = (
        "import tempfile, torch; from lens_probes import tiny\n"
        "ids = torch.tensor([tiny.tokenizer()('The café is closed.').input_ids])\n"
        "print(ids.tolist(), round(tiny.huggingface()(ids).logits.double().sum().item(), 3))\n"
        "print(tiny._tokenizer_folder('gpt2'))"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error::ResourceWarning", "-c", program], capture_output=True, text=True
    )
    numbers, folder = done.stdout.splitlines()
    ids = torch.tensor([tiny.tokenizer()("The café is closed.").input_ids])
    total = tiny.huggingface()(ids).logits.double().sum().item()
    assert numbers == f"{ids.tolist()} {total:.3f}"
    assert "ResourceWarning" not in done.stderr
    assert not Path(folder).exists()


@pytest.mark.parametrize("build", [tiny.bridge, tiny.huggingface, tiny.tokenizer])
def test_an_unknown_architecture_is_refused_with_the_list_of_known_ones(build):
    with pytest.raises(ValueError, match=r"must be one of gpt2, opt, llama.*; got 'mamba'"):
        build("mamba")


def test_an_encoder_is_refused_as_a_hooked_transformer():
    with pytest.raises(ValueError, match=r"must be a decoder; got 'bert': use bridge\(\)"):
        tiny.hooked("bert")


@only_4x
def test_a_hooked_transformer_is_refused_where_there_is_none():
    with pytest.raises(ImportError, match=r"needs TransformerLens 3; got version 4.*: use bridge\(\), or install"):
        tiny.hooked("gpt2")


@only_3x
def test_a_bridge_of_roberta_is_refused_where_there_is_none():
    with pytest.raises(ValueError, match="has a bridge for; got 'roberta': install"):
        tiny.bridge("roberta")
