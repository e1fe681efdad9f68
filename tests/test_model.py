"""What is read of a model is what its names say, on every architecture, and reading leaves no trace."""

import re
from importlib.metadata import version
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

import lens_probes as lp
from lens_probes.examples import tiny
from lens_probes.model import READ_POINTS, Continuation, ImageView, ModelView, ReadPoint, undisturbed
from lens_probes.model.base import _versions
from lens_probes.reading import cached, pad
from lens_probes.testing import check_from_cache
from lens_probes.text.prompts import tokenize

TEXTS = ["Time flies like an arrow.", "Fruit flies like a banana, and the cat likes none of it.", "The old man"]
EXACT = 1e-5  # of float32 states of length 5 or so: what two ways to add the same numbers differ by
LEARNED_POSITIONS = ("gpt2", "opt", "bert", "roberta")


def batch_of(view: ModelView) -> tuple[Tensor, Tensor]:
    return pad(tokenize(TEXTS, view), view)


def states(view: ModelView, *names: str) -> list[Tensor]:
    """The valid rows of these activations of the three texts."""
    ids, mask = batch_of(view)
    found = view.activations(ids, mask, names)
    return [found[name][mask] for name in names]


def reference(architecture: str, ids: Tensor, mask: Tensor) -> Any:
    """Hugging Face's own states and logits of the same weights."""
    with torch.no_grad():
        return tiny.huggingface(architecture)(ids, attention_mask=mask.long(), output_hidden_states=True)


def assert_close(one: Tensor, other: Tensor, tolerance: float = EXACT) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=tolerance)


# Names of activations


@pytest.mark.parametrize("at", READ_POINTS)
def test_every_read_point_of_every_layer_is_there_or_refused_with_those_that_are(at: ReadPoint, cell: Any) -> None:
    view = ModelView(cell.build())
    if (cell.architecture, at) == ("neox", "resid_mid"):
        with pytest.raises(
            ValueError,
            match=r"'resid_mid' does not exist in tiny-neox \(.*parallel.*\): "
            r"use one of resid_pre, resid_post, attn_out, mlp_out$",
        ):
            view.hook(at, 1)
        return
    names = [view.hook(at, layer) for layer in range(3)]
    view.check_hooks(names)
    ids, mask = batch_of(view)
    found = view.activations(ids, mask, names)
    assert list(found) == names
    assert {tuple(state.shape) for state in found.values()} == {(*ids.shape, 32)}
    assert len({float(state[mask].norm()) for state in found.values()}) == 3  # three states, not one


def test_a_layers_state_after_is_the_next_layers_state_before(view: ModelView) -> None:
    for layer, following in pairwise(range(3)):
        after, before = states(view, view.hook("resid_post", layer), view.hook("resid_pre", following))
        assert torch.equal(after, before)


def test_the_states_between_layers_are_those_of_hugging_face(raw: Any) -> None:
    view = ModelView(raw.build())
    ids, mask = batch_of(view)
    hidden = reference(raw.architecture, ids, mask).hidden_states
    found = states(view, *(view.hook("resid_pre", layer) for layer in range(3)))
    for layer, state in enumerate(found):
        assert_close(state, hidden[layer][mask], 1e-4)
    if raw.architecture in tiny.ENCODERS:  # a decoder's last one has gone through its final norm
        assert_close(states(view, view.hook("resid_post", 2))[0], hidden[3][mask], 1e-4)


def test_a_decoders_state_is_the_sum_of_what_its_parts_write(decoder: Any) -> None:
    view = ModelView(decoder.build())
    for layer in range(3):
        points: tuple[ReadPoint, ...] = ("resid_pre", "attn_out", "mlp_out", "resid_post")
        before, attention, mlp, after = states(view, *(view.hook(at, layer) for at in points))
        assert attention.norm() > 1
        assert mlp.norm() > 1
        assert_close(before + attention + mlp, after)
        if decoder.architecture != "neox":
            assert_close(before + attention, states(view, view.hook("resid_mid", layer))[0])


def test_an_encoders_resid_mid_is_the_sum_before_its_norm_and_attn_out_what_attention_adds(encoder: Any) -> None:
    view = ModelView(encoder.build())
    for layer in range(3):
        before, attention, mid = states(view, *(view.hook(at, layer) for at in ("resid_pre", "attn_out", "resid_mid")))
        assert_close(before + attention, mid)
        normed, mlp, after = states(
            view, f"blocks.{layer}.ln1.hook_out", view.hook("mlp_out", layer), view.hook("resid_post", layer)
        )
        norms = view.model.blocks[layer].ln1.original_component, view.model.blocks[layer].ln2.original_component
        with torch.no_grad():
            assert_close(norms[0](mid), normed)
            assert_close(norms[1](normed + mlp), after)


def test_a_state_is_labelled_by_its_layer_and_the_place_in_it(gpt2: Any) -> None:
    view = ModelView(gpt2)
    assert [view.label(at, 2) for at in READ_POINTS] == ["2_pre", "2_mid", "2_post", "2_attn_out", "2_mlp_out"]


def test_an_unknown_read_point_is_refused_with_those_there_are(gpt2: Any, as_users_run_it: None) -> None:
    at: Any = "resid_final"
    with pytest.raises(ValueError, match=r"read point must be one of resid_pre, .*; got 'resid_final'"):
        ModelView(gpt2).hook(at, 0)


@pytest.mark.parametrize("architecture", ["gpt2", "bert"])
def test_a_hook_of_a_layer_that_does_not_exist_is_refused_as_such(architecture: str) -> None:
    view = ModelView(tiny.bridge(architecture))
    for at in READ_POINTS:
        with pytest.raises(ValueError, match=f"layer 3 is out of range: tiny-{architecture} has layers 0 to 2"):
            view.hook(at, 3)


def test_layers_are_all_or_those_asked_for_and_negative_ones_count_from_the_end(gpt2: Any) -> None:
    view = ModelView(gpt2)
    assert view.layers(None) == (0, 1, 2)
    assert view.layers([2, 0]) == (2, 0)
    assert view.layers(range(-2, 0)) == (1, 2)
    for layers, message in (
        ([3], "layer 3 is out of range: tiny-gpt2 has layers 0 to 2"),
        ([0, -4], "layer -4 is out of range"),
        ([], r"must name one layer or more, each once; got \[\]: list each layer once"),
        ([2, -1], r"must name one layer or more, each once; got \[2, -1\]"),
    ):
        with pytest.raises(ValueError, match=message):
            view.layers(layers)


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (slice(1, None), (1, 2)),
        (slice(None, None, -1), (2, 1, 0)),
        (np.array([2, 0]), (2, 0)),
        (torch.tensor([2, 0]), (2, 0)),
        (pd.Series([2, 0]), (2, 0)),
        ({-1, 0}, (0, 2)),
        ((np.int64(1),), (1,)),
    ],
    ids=repr,
)
def test_layers_may_come_as_a_slice_an_array_or_a_set(layers: Any, expected: tuple[int, ...], gpt2: Any) -> None:
    assert ModelView(gpt2).layers(layers) == expected
    assert lp.ResidualUpdate(layers=layers).run(gpt2, "one two").layer == tuple(map(str, expected))


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (lambda: "all", "layers must be a list of layer numbers, as layers=[0, 3]; got layers='all'"),
        (lambda: 1.5, "layers must be a list of layer numbers, as layers=[0, 3]; got layers=1.5"),
        (lambda: {0: 1}, "layers must be a list of layer numbers, as layers=[0, 3]; got layers={0: 1}"),
        (lambda: iter([0, 1]), "layers must be a list of layer numbers, as layers=[0, 3]; got layers=<list_iterator"),
        (tiny.bridge, "layers must be a list of layer numbers, as layers=[0, 3]; got layers=<TransformerBridge>"),
        (lambda: [tiny.bridge()], "layers must be whole numbers, counted from 0; got <TransformerBridge>"),
        (lambda: np.int64(1), "layers must be a list; got one number: write layers=[1], or None for all layers"),
        (lambda: [True], "layers must be whole numbers, counted from 0; got True"),
        (lambda: np.array([True, False, True]), "layers must be whole numbers, counted from 0; got True"),
        (
            lambda: slice(5, 9),
            "layers must name one layer or more, each once; got slice(5, 9, None): list each layer once",
        ),
    ],
)
def test_layers_in_any_other_form_are_refused_in_one_sentence(layers: Any, message: str, gpt2: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        lp.ResidualUpdate(layers=layers()).run(gpt2, "one two")


def test_an_unknown_hook_is_refused_with_names_that_are_close(view: ModelView) -> None:
    with pytest.raises(ValueError, match=r"'blocks\.1\.hook_resid_pots' does not exist in tiny-\w+ \(\w+\): did you"):
        view.check_hooks(["blocks.0.hook_resid_pre", "blocks.1.hook_resid_pots"])
    with pytest.raises(ValueError, match=r"did you mean .*blocks\.1\.hook_resid_post.*\?$"):
        view.check_hooks(["blocks.1.hook_resid_pots"])
    with pytest.raises(ValueError, match=r"'§' does not exist .*: see list\(model.hook_dict\)$"):
        view.check_hooks(["§"])


# The forward pass


def test_only_the_named_activations_come_back_under_the_names_asked_for(view: ModelView) -> None:
    ids, mask = batch_of(view)
    names = ["blocks.1.hook_resid_post", "blocks.0.attn.hook_z"]
    assert list(view.activations(ids, mask, names)) == names


def test_activations_are_those_of_a_whole_cached_pass_and_logits_the_models_own(view: ModelView) -> None:
    ids, mask = batch_of(view)
    names = [view.hook("resid_pre", 0), view.hook_z(1), view.hook_pattern(2), view.hook("resid_post", -1)]
    logits, cache = view.model.run_with_cache(ids, attention_mask=mask.long())
    found, few = view.activations_and_logits(ids, mask, names)
    for name in names:
        assert torch.equal(view.activations(ids, mask, [name])[name], cache[name])
        assert torch.equal(found[name], cache[name])
    torch.testing.assert_close(few, logits[mask][: len(few)].float())
    assert 0 < len(few) <= 8


def test_without_names_the_model_does_not_run(own_gpt2: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(own_gpt2), "forward", None)
    view = ModelView(own_gpt2)
    assert view.activations(*batch_of(view), []) == {}


@pytest.mark.filterwarnings("ignore:run_with_cache. skipped 1 gated-off hook")
def test_an_activation_that_is_switched_off_is_refused_with_how_to_switch_it_on(own_gpt2: Any) -> None:
    view = ModelView(own_gpt2)
    names = ["blocks.0.hook_resid_pre", "blocks.1.attn.hook_result"]
    with pytest.raises(
        ValueError,
        match=r"hook_result' must be computed by tiny-gpt2; got none: switch it on, with model\.set_use",
    ):
        view.activations(*batch_of(view), names)
    own_gpt2.set_use_attn_result(True)
    assert view.activations(*batch_of(view), names)[names[1]].shape[2:] == (4, 32)
    assert str(view._not_computed("blocks.0.hook_resid_post")).endswith("use another read point, or another model")


# Weights


def test_raw_weights_are_those_of_hugging_face(raw: Any) -> None:
    view, hf = ModelView(raw.build()), tiny.huggingface(raw.architecture)
    embedding = hf.get_input_embeddings().weight
    if (raw.architecture, raw.maker) == ("gemma2", "hooked"):
        embedding = embedding * 32**0.5  # that class folds Gemma's factor sqrt(d_model) into W_E
    assert_close(view.W_E, embedding.detach())
    assert_close(view.unembedding, hf.get_output_embeddings().weight.detach())
    assert (view.d_vocab, view.d_model, view.n_layers, view.n_ctx) == (400, 32, 3, 64)
    assert not view.W_E.requires_grad
    assert not view.unembedding.requires_grad


@pytest.mark.parametrize("side", ["left", "right"])
def test_embedding_at_a_position_is_the_first_state_of_that_token_there(side: Any, cell: Any) -> None:
    view = ModelView(cell.build(padding_side=side))
    if cell.architecture not in LEARNED_POSITIONS:
        with pytest.raises(
            ValueError, match=f"needs learned absolute positions; got tiny-{cell.architecture}, which has none"
        ):
            view.embedding_at(0)
        return
    tokens = tokenize(TEXTS, view)
    (first,) = states(view, view.hook("resid_pre", 0))
    for position in (0, 1, 7, int(tokens.position.max())):
        rows = tokens.position == position
        assert_close(view.embedding_at(position)[tokens.id[rows]], first[rows])
    full = torch.arange(5, 69).expand(1, -1)
    (last,) = view.activations(full, torch.ones(1, 64, dtype=torch.bool), [view.hook("resid_pre", 0)]).values()
    assert_close(view.embedding_at(63)[68], last[0, 63])


# The unembedding


def test_the_last_state_unembeds_to_the_models_own_log_probabilities(cell: Any) -> None:
    view = ModelView(cell.build())
    ids, mask = batch_of(view)
    lens = view.unembed(*states(view, view.hook("resid_post", 2))).log_softmax(-1)
    with torch.no_grad():
        own = view.model(ids, attention_mask=mask.long())
    assert_close(lens, own[mask].log_softmax(-1))
    assert_close(lens, reference(cell.architecture, ids, mask).logits[mask].log_softmax(-1), 1e-4)


def test_in_bfloat16_it_does_so_to_the_models_own_rounding(cell: Any) -> None:
    view = ModelView(cell.build(dtype=torch.bfloat16))
    ids, mask = batch_of(view)
    with torch.no_grad():
        own = view.model(ids, attention_mask=mask.long())[mask].float()
    (last,) = states(view, view.hook("resid_post", 2))
    assert last.dtype == torch.bfloat16
    logits = view.unembed(last).float()
    # bfloat16 keeps 8 bits: neighbours are 2**-7 of their size apart, and a matrix product may round the other way.
    assert_close(logits.log_softmax(-1), own.log_softmax(-1), 2**-7 * float(own.abs().max()))


def test_the_soft_cap_is_part_of_the_unembedding() -> None:
    view = ModelView(tiny.bridge("gemma2"))
    huge = 100 * torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    assert view.unembed(huge).abs().max() < 5  # the tiny model's cap


def test_a_bert_with_another_activation_in_its_head_is_unembedded_with_that() -> None:
    from transformer_lens.model_bridge import TransformerBridge

    source = tiny.huggingface("bert")
    source.cls.predictions.transform.transform_act_fn = torch.nn.ReLU()
    model = TransformerBridge.boot_transformers(
        "tiny-bert-relu", hf_model=source, tokenizer=tiny.tokenizer("bert"), device="cpu"
    )
    view = ModelView(model)
    ids, mask = batch_of(view)
    with torch.no_grad():
        own = model(ids, attention_mask=mask.long())[mask]
    assert_close(view.unembed(*states(view, view.hook("resid_post", 2))).log_softmax(-1), own.log_softmax(-1))


def test_a_model_without_a_trained_head_is_not_unembedded() -> None:
    model = tiny.bridge("bert")
    model.cfg.model_name = "/home/someone/all-minilm-l6-v2"
    with pytest.raises(ValueError, match="must have a trained language-model head; got all-minilm-l6-v2"):
        ModelView(model).unembed(torch.zeros(1, 32))


# What the model is


def test_a_view_knows_the_class_and_whether_weights_were_processed(cell: Any) -> None:
    view = ModelView(cell.build())
    assert view.processed == cell.processed
    assert view.class_name == {"bridge": "TransformerBridge", "hooked": "HookedTransformer"}[cell.maker]
    assert view.encoder == (cell.architecture in tiny.ENCODERS)
    assert view.name == f"tiny-{cell.architecture}"
    assert ModelView(view).model is view.model


def test_a_model_from_a_folder_has_the_name_of_the_folder(own_gpt2: Any) -> None:
    own_gpt2.cfg.model_name = "/home/someone/models/my-gpt2"
    assert ModelView(own_gpt2).name == "my-gpt2"
    own_gpt2.cfg.model_name = "owner/my-gpt2"
    assert ModelView(own_gpt2).name == "owner/my-gpt2"


def test_versions_are_those_of_the_installed_packages(gpt2: Any) -> None:
    import transformers

    versions = dict(ModelView(gpt2).versions)
    assert versions["torch"] == torch.__version__.split("+")[0] or versions["torch"] == torch.__version__
    assert versions["transformers"] == transformers.__version__
    assert list(versions) == ["lens-probes", "transformer-lens", "transformers", "torch"]


@pytest.mark.parametrize(
    ("installed", "told"),
    [
        ("0.2.0", "0.2.0"),
        ("0.2.1.dev7+g0a1b2c3", "0.2.1.dev0"),
        ("0.2.1.dev8+g4d5e6f7.d20261126", "0.2.1.dev0"),
        ("0.0+unknown", "0.0+unknown"),
    ],
)
def test_a_run_goes_on_after_a_commit_and_not_after_a_release(
    installed: str, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda package: installed)
    versions = dict(_versions.__wrapped__())
    assert versions.pop("lens-probes") == told
    assert set(versions.values()) == {installed}  # those of others to the letter


@pytest.mark.parametrize("make", [lambda: torch.nn.Linear(2, 2), lambda: "gpt2"])
def test_what_is_no_model_of_transformer_lens_is_refused(make: Any) -> None:
    with pytest.raises(TypeError, match=r"HookedTransformer or a TransformerBridge of TransformerLens; got \w+: load"):
        ModelView(make())


def test_a_model_of_hugging_face_is_told_how_to_become_a_bridge() -> None:
    message = r"got a GPT2LMHeadModel: pass TransformerBridge\.boot_transformers\(name, hf_model=model, tokenizer="
    for view in (ModelView, ImageView):
        with pytest.raises(TypeError, match=message):
            view(tiny.huggingface())
    with pytest.raises(TypeError, match=message):
        lp.RankShift().run(tiny.huggingface(), "Time flies.")


def test_a_model_with_two_stacks_is_refused() -> None:
    import transformers
    from transformer_lens.model_bridge import TransformerBridge

    config = transformers.T5Config(vocab_size=400, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4)
    config.architectures, config.decoder_start_token_id = ["T5ForConditionalGeneration"], 0
    source = transformers.T5ForConditionalGeneration(config).eval()
    model = TransformerBridge.boot_transformers(
        "tiny-t5", hf_model=source, tokenizer=tiny.tokenizer("gpt2"), device="cpu"
    )
    with pytest.raises(TypeError, match=r"one stack of blocks .*; got tiny-t5 \(TransformerBridge\): use"):
        ModelView(model)


@pytest.mark.filterwarnings("ignore:HookedEncoder is deprecated")
def test_hooked_encoder_is_refused_because_its_names_mean_other_states() -> None:
    lens: Any = pytest.importorskip("transformer_lens")
    try:
        HookedEncoder = lens.HookedEncoder
    except ImportError:
        pytest.skip("TransformerLens 4 has no HookedEncoder")
    config = lens.HookedTransformerConfig(
        n_layers=1, d_model=32, n_ctx=16, d_head=8, d_vocab=400, act_fn="gelu", model_name="small", device="cpu"
    )
    with pytest.raises(
        TypeError, match="got a HookedEncoder, whose hooks of the same names hold other states: load small as a"
    ):
        ModelView(HookedEncoder(config))


# One more token, and soft ones


def embedded(view: ModelView, ids: torch.Tensor) -> torch.Tensor:
    """What the embedding's hook holds for these tokens."""
    name = view.hook_token_embed
    return view.activations(ids[None], torch.ones(1, len(ids), dtype=torch.bool), [name])[name][0]


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_continuation_gives_the_states_of_whole_prompts(side: Any, decoder: Any) -> None:
    view = ModelView(decoder.build(padding_side=side))
    candidates = torch.tensor([view.pad_id, 9, 200, 0])  # the padding token is a candidate like any other
    for n in (0, 1, 6):
        prefix = torch.arange(n) + 3
        whole = torch.cat([prefix.expand(4, -1), candidates[:, None]], dim=1)
        for name in (view.hook("resid_post", 1), view.hook("attn_out", 2), view.hook_neurons(0)):
            expected = view.activations(whole, torch.ones_like(whole, dtype=torch.bool), [name])[name][:, -1]
            following = Continuation(view, prefix, name)
            for _ in range(2):  # what one batch adds is not there for the next
                torch.testing.assert_close(following.states(candidates), expected, rtol=1e-5, atol=2e-5)
            torch.testing.assert_close(following.states(candidates[:1]), expected[:1], rtol=1e-5, atol=2e-5)
            soft = following.soft(embedded(view, candidates).clone().requires_grad_())
            torch.testing.assert_close(soft.detach(), expected, rtol=1e-5, atol=2e-5)


def test_a_continuation_has_the_derivative_of_the_whole_prompt(decoder: Any) -> None:
    view = ModelView(decoder.build())
    ids, name = torch.tensor([3, 4, 5, 6]), view.hook("resid_post", 2)
    along = torch.randn(view.d_model, generator=torch.Generator().manual_seed(0))
    start, (states,) = view.differentiable(ids[None], [name])
    (expected,) = torch.autograd.grad((states[0, -1] * along).sum(), start)
    own = embedded(view, ids)[-1:].clone().requires_grad_()
    (found,) = torch.autograd.grad((Continuation(view, ids[:-1], name).soft(own)[0] * along).sum(), own)
    torch.testing.assert_close(found[0], expected[0, -1], rtol=1e-4, atol=1e-5)


def test_a_continuation_stops_where_its_activation_stands_and_leaves_no_trace(own_gpt2: Any) -> None:
    view = ModelView(own_gpt2)
    ran = []
    own_gpt2.add_hook("blocks.1.hook_resid_post", lambda activation, hook: ran.append(1))
    own_gpt2.add_hook("blocks.2.hook_resid_pre", lambda activation, hook: ran.append(2))
    following = Continuation(view, torch.tensor([3, 4]), "blocks.1.hook_resid_post")
    assert sorted(ran) == [1, 1, 1, 2]  # the prefix runs once to its end, and one more token with it and after it
    before = modes(own_gpt2)
    following.states(torch.tensor([5, 6]))
    following.soft(torch.zeros(1, view.d_model))
    assert ran[4:] == [1, 1]
    assert modes(own_gpt2) == before and torch.is_grad_enabled()
    assert all(parameter.grad is None for parameter in own_gpt2.parameters())


def of_another_prefix(past_of: Any) -> Any:
    """A prefix cache of the right length that holds the tokens in another order."""
    return lambda ids: past_of(ids.flip(1))


def that_stays_empty(past_of: Any) -> Any:
    """A prefix cache as a plain install made it in November 2026: nobody fills it."""
    return lambda ids: past_of(ids)._replace(lengths={0})


@pytest.mark.parametrize(
    ("fault", "found"),
    [(that_stays_empty, "it holds 0"), (of_another_prefix, r"a state after it is off by [\d.]+ of its length")],
)
def test_where_a_cache_breaks_its_promise_whole_prefixes_give_the_states_and_it_is_said_once(
    fault: Any, found: str, own_gpt2: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    view, ids = ModelView(own_gpt2), torch.tensor([3, 4, 5, 6])
    ways = list(view.adapter.pasts())
    monkeypatch.setattr(view.adapter, "pasts", lambda: map(fault, ways))
    name, candidates = view.hook("resid_post", 2), torch.arange(300)  # more than one pass of whole prefixes
    with pytest.warns(UserWarning, match="key/value cache") as caught:
        following, _ = (Continuation(view, ids[:n], name) for n in (3, 2))
    (warning,) = caught
    releases = rf"transformer-lens {version('transformer-lens')}, transformers {version('transformers')}, torch \S+ "
    assert re.fullmatch(
        "the key/value cache of tiny-gpt2 must hold all 3 tokens of a prefix and give the states of the whole prompt; "
        rf"with {releases}{found}: whole prompts are computed instead, which gives the right numbers more slowly "
        r"\(other releases of transformers or TransformerLens may keep the cache\)",
        str(warning.message),
    )
    whole = torch.cat([ids[:3].expand(300, -1), candidates[:, None]], dim=1)
    expected = view.activations(whole, torch.ones_like(whole, dtype=torch.bool), [name])[name][:, -1]
    torch.testing.assert_close(following.states(candidates), expected, rtol=1e-5, atol=2e-5)
    start, (states,) = view.differentiable(ids[None], [name])
    (slope,) = torch.autograd.grad(states[0, -1, :5].sum(), start)
    own = embedded(view, ids)[-1:].clone().requires_grad_()
    soft = following.soft(own)
    torch.testing.assert_close(soft[0], states[0, -1], rtol=1e-5, atol=2e-5)
    (found_slope,) = torch.autograd.grad(soft[0, :5].sum(), own)
    torch.testing.assert_close(found_slope[0], slope[0, -1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "error",
    [TypeError("forward() got an unexpected keyword argument"), IndexError("list index out of range")],
)
def test_a_cache_that_the_model_does_not_take_is_said(
    error: Exception, gpt2: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise error

    view = ModelView(gpt2)
    monkeypatch.setattr(view.adapter, "pasts", lambda: [refuse])
    with pytest.warns(UserWarning, match="torch .* none is accepted: whole prompts are computed instead"):
        Continuation(view, torch.tensor([3]), view.hook("resid_post", 1))


@pytest.mark.parametrize("windowed", ["MistralForCausalLM", "Gemma2ForCausalLM"])
def test_a_continuation_past_the_attention_window_gives_the_states_of_whole_prompts(
    windowed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, sizes = tiny._MODELS["gemma2"]
    if windowed == "MistralForCausalLM":
        sizes = {name: sizes[name] for name in ("intermediate_size", "num_key_value_heads", "head_dim")}
    monkeypatch.setitem(tiny._MODELS, "gemma2", (windowed, sizes | {"sliding_window": 4}))
    view = ModelView(tiny.bridge("gemma2"))
    ids, name = torch.arange(3, 14), view.hook("resid_post", 2)
    following = Continuation(view, ids[:-1], name)
    (expected,) = view.activations(ids[None], torch.ones(1, 11, dtype=torch.bool), [name]).values()
    (far,) = view.activations(ids.flip(0)[None], torch.ones(1, 11, dtype=torch.bool), [name]).values()
    assert not torch.allclose(far[0, 0], expected[0, -1])
    torch.testing.assert_close(following.states(ids[-1:])[0], expected[0, -1], rtol=1e-5, atol=2e-5)


def test_an_encoder_has_no_continuation() -> None:
    view = ModelView(tiny.bridge("bert"))
    with pytest.raises(ValueError, match="must be a decoder; got tiny-bert, where every state depends on later"):
        Continuation(view, torch.tensor([3]), view.hook("resid_post", 1))


def test_soft_tokens_with_the_embeddings_of_real_ones_give_their_states(view: ModelView) -> None:
    ids, name = torch.tensor([9, view.pad_id, 8]), view.hook("resid_post", 2)
    expected = view.activations(ids[None], torch.ones(1, 3, dtype=torch.bool), [name])[name]
    rows = view.token_embeddings[ids]
    torch.testing.assert_close(rows, embedded(view, ids), rtol=1e-5, atol=1e-5)
    (states,) = view.from_embeddings(rows[None], ids[None], [name])
    torch.testing.assert_close(states, expected, rtol=1e-5, atol=2e-5)


# Leaving no trace


def modes(model: Any) -> dict[str, bool]:
    return {name: module.training for name, module in ModelView(model).modules()}


@pytest.mark.parametrize("error", [False, True])
def test_modes_and_gradients_are_as_before_also_after_an_error(error: bool, own_gpt2: Any) -> None:
    own_gpt2.train()
    own_gpt2.blocks[1].eval()
    before = modes(own_gpt2)
    assert set(before.values()) == {True, False}
    try:
        with undisturbed(own_gpt2):
            assert set(modes(own_gpt2).values()) == {False}
            assert not torch.is_grad_enabled()
            if error:
                raise RuntimeError
    except RuntimeError:
        assert error
    assert modes(own_gpt2) == before
    assert torch.is_grad_enabled()
    with torch.no_grad():
        with undisturbed(own_gpt2):
            pass
        assert not torch.is_grad_enabled()


def test_autocast_is_off_inside_and_on_again_afterwards(gpt2: Any) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with undisturbed(gpt2):
            assert not torch.is_autocast_enabled("cpu")
        assert torch.is_autocast_enabled("cpu")


def test_dropout_of_a_model_in_training_does_not_touch_the_numbers(raw: Any) -> None:
    still, training = ModelView(raw.build()), ModelView(getattr(tiny, raw.maker)(raw.architecture))
    training.model.train()
    name = still.hook("resid_post", 2)
    if raw.maker == "bridge" and raw.architecture in LEARNED_POSITIONS:  # the others have no dropout
        ids, mask = batch_of(training)
        with torch.no_grad():
            one, other = (training.model(ids, attention_mask=mask.long()) for _ in range(2))
        assert not torch.equal(one, other)
    assert torch.equal(states(still, name)[0], states(training, name)[0])
    state = torch.ones(1, 32)
    assert torch.equal(still.unembed(state), training.unembed(state))
    assert set(modes(training.model).values()) == {True}


# Latent attention


def test_heads_of_latent_attention_are_those_of_huggingface(latent: Any) -> None:
    ids, kept = torch.arange(3, 12)[None], {}
    source = tiny.huggingface("llama")
    attention = source.model.layers[1].self_attn
    attention.kv_b_proj.register_forward_hook(lambda part, given, made: kept.update(made=made))
    attention.o_proj.register_forward_pre_hook(lambda part, given: kept.update(mixed=given[0]))
    with torch.no_grad():
        source(ids)
    view = ModelView(latent)
    names = [view.hook_value(1), view.hook_z(1)]
    value, mixed = view.activations(ids, torch.ones_like(ids, dtype=torch.bool), names).values()
    torch.testing.assert_close(value, kept["made"].view(1, 9, 4, 8 + 8)[..., 8:], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mixed, kept["mixed"].view(1, 9, 4, 8), rtol=1e-5, atol=1e-5)


def test_an_edit_of_a_head_of_latent_attention_is_an_edit_of_this_head(latent: Any) -> None:
    ids, source = torch.arange(3, 12)[None], tiny.huggingface("llama")
    view, mask = ModelView(latent), torch.ones_like(ids, dtype=torch.bool)

    def without_head(mixed: Tensor) -> Tensor:
        return mixed * torch.tensor([1.0, 0.0, 1.0, 1.0])[:, None]

    with torch.no_grad():
        source.model.layers[1].self_attn.o_proj.weight[:, 8:16] = 0
        expected = source(ids).logits
    edits = {view.hook_z(1): without_head}
    torch.testing.assert_close(view.logits(ids, mask, edits), expected, rtol=1e-4, atol=1e-4)
    (mixed,) = view.edited(ids, mask, [view.hook_z(1)], edits).values()
    assert (mixed[0, :, 1] == 0).all() and (mixed[0, :, [0, 2, 3]] != 0).any()
    doubled = {view.hook_value(1): lambda value: value * torch.tensor([1.0, 2.0, 1.0, 1.0])[:, None]}
    (whole,) = view.edited(ids, mask, [view.hook_z(1)], {}).values()
    (changed,) = view.edited(ids, mask, [view.hook_z(1)], doubled).values()
    torch.testing.assert_close(changed[0, :, 1], 2 * whole[0, :, 1], rtol=1e-4, atol=1e-5)


def test_a_cache_of_latent_attention_is_read_as_a_run_is(latent: Any) -> None:
    check_from_cache(lp.TopicActivity(), latent)
    check_from_cache(lp.HeadTopicSimilarity(), latent)
    result = lp.TopicActivity().run(latent, "Time flies like an arrow.")
    assert result.unit == ("H0", "H1", "H2", "H3")
    view, text = ModelView(latent), "Time flies like an arrow."
    tokens = tokenize([text], view)
    names = [view.hook_value(0), view.hook_z(0)]
    _, cache = latent.run_with_cache(tokens.id[None])
    reading = cached(view, names, [text], cache, asked="x", attention_mask=None, prepend_bos=None, word_class=None)
    assert [reading[name].shape for name in names] == [(len(tokens), 4, 8)] * 2


def test_weights_of_latent_attention_are_its_pattern(latent: Any) -> None:
    text, view = "Time flies like an arrow.", ModelView(latent)
    ids = tokenize([text], view).id[None]
    (pattern,) = view.activations(ids, torch.ones_like(ids, dtype=torch.bool), [view.hook_pattern(2)]).values()
    result = lp.AttentionPair(-1, (0, 1), layers=[2]).run(latent, text)
    assert (result.terms.shape[-1], result.value.shape[-1]) == (12, 8)
    torch.testing.assert_close(result.weight[0, :, 0], pattern[0, :, -1, :2], rtol=1e-4, atol=1e-5)


def test_what_latent_attention_cannot_give_is_refused(latent: Any) -> None:
    match = "attention of layer 0 of tiny-llama must have one W_. per head; got MLAAttentionBridge, as in latent"
    sentences = lp.demo.sentences()[:6]
    for asked in (lp.TiedKeyValue(), lp.HeadValueRank(), lp.KeyValueOverlap()):
        with pytest.raises(ValueError, match=match):
            asked.run(latent, sentences, progress=False)
