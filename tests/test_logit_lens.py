"""LogitLens against the models' own predictions, Hugging Face's states, TransformerLens 4's lens, and by hand."""

import math
import re
import warnings
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributions import Categorical, kl_divergence

import lens_probes as lp
from lens_probes.examples import tiny
from lens_probes.maths.vocabulary import predictions
from lens_probes.model import ModelView
from lens_probes.probes.logit_lens import share_by_chance
from lens_probes.reading import pad
from lens_probes.testing import assert_same
from lens_probes.text.targets import following, target_ids

TEXTS = ["Time flies like an arrow.", "The cat, which nobody had fed, slept on the mat all day.", "Hello"]


def own_log_probs(model, tokens):
    """The model's own log-probabilities at every token, prompt by prompt."""
    with torch.no_grad():
        return torch.cat([model(prompt.id[None])[0].float().log_softmax(-1) for _, prompt in tokens.by_prompt()])


def read_directly(model, result, name):
    """Full float64 log-probabilities of the states at one hook, prompt by prompt."""
    view = ModelView(model)
    read = []
    for _, prompt in result.token.by_prompt():
        states = view.activations(prompt.id[None], torch.ones(1, len(prompt), dtype=torch.bool), [name])[name][0]
        logits = view.normed(states).double() @ view.unembedding.double().T + view.unembedding_bias.double()
        read.append(view.capped(logits).log_softmax(-1))
    return torch.cat(read)


# Right


def test_the_last_row_is_the_models_own_prediction_on_every_model(cell):
    model = cell.build()
    result = lp.LogitLens(target="own", top_k=3).run(model, TEXTS)
    own = own_log_probs(model, result.token)
    best = own.topk(3)
    torch.testing.assert_close(result.log_prob[-1], own.gather(1, result.token.id[:, None])[:, 0], rtol=0, atol=1e-4)
    torch.testing.assert_close(result.top_log_prob[-1], best.values, rtol=0, atol=1e-4)
    torch.testing.assert_close(result.entropy[-1], Categorical(logits=own).entropy(), rtol=0, atol=1e-4)
    assert (result.top_ids[-1] != best.indices).float().mean() < 0.02
    assert torch.equal(result.final_id, best.indices[:, 0])
    assert result.kl[-1].max() < 1e-5 and result.kl[0].min() > 1e-3


def test_every_layer_equals_torch_distributions_on_full_logits(cell):
    model = cell.build()
    result = lp.LogitLens(target="own", layers=[1]).run(model, TEXTS)
    layer = read_directly(model, result, ModelView(model).hook("resid_post", 1))
    final = read_directly(model, result, ModelView(model).hook("resid_post", 2))
    own = layer.gather(1, result.token.id[:, None])
    assert result.layer == ("1_post",)
    torch.testing.assert_close(result.log_prob[0].double(), own[:, 0], rtol=0, atol=1e-4)
    torch.testing.assert_close(result.entropy[0].double(), Categorical(logits=layer).entropy(), rtol=0, atol=1e-4)
    divergence = kl_divergence(Categorical(logits=final), Categorical(logits=layer))
    torch.testing.assert_close(result.kl[0].double(), divergence, rtol=0, atol=1e-4)
    assert (result.rank[0] != (layer > own).sum(1)).float().mean() < 0.02


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "qwen3"])
def test_the_middle_layers_are_those_of_hugging_face(architecture):
    source = tiny.huggingface(architecture)
    result = lp.LogitLens(target="own").run(tiny.bridge(architecture), TEXTS[1])
    body = source.transformer if architecture == "gpt2" else source.model
    norm = body.ln_f if architecture == "gpt2" else body.norm
    with torch.no_grad():
        states = source(result.token.id[None], output_hidden_states=True).hidden_states[:-1]
        read = torch.stack([source.lm_head(norm(state))[0].log_softmax(-1) for state in states])
    log_prob = read.gather(2, result.token.id[None, :, None].expand(len(read), -1, 1))[..., 0]
    torch.testing.assert_close(result.log_prob[:-1], log_prob, rtol=0, atol=1e-4)


@pytest.mark.parametrize("architecture", ["gpt2", "opt", "llama", "neox", "gemma2", "qwen3"])
def test_it_agrees_with_the_lens_of_transformerlens_4(architecture):
    if version("transformer-lens").startswith("3."):
        pytest.skip("TransformerLens 3.9 has no logit_lens")
    analysis: Any = import_module("transformer_lens.tools.analysis")
    model = tiny.bridge(architecture)
    result = lp.LogitLens(top_k=0).run(model, TEXTS[1])
    ids = result.token.id[None]
    theirs = analysis.logit_lens(model, ids[:, :-1], positions=None, targets=ids[:, 1:], return_type="log_probs")
    assert len(theirs.labels) == len(result.layer) == 4
    torch.testing.assert_close(result.log_prob[:, :-1], theirs.readout.values[:, 0, :, 0].float(), rtol=0, atol=1e-4)
    assert torch.equal(result.rank[:, :-1], theirs.rank_trajectory()[:, 0])
    torch.testing.assert_close(result.entropy[:, :-1], theirs.readout.entropy[:, 0].float(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "gemma2", "bert"])
def test_in_bfloat16_ranks_are_those_of_a_float32_product_of_the_same_states(architecture):
    model = tiny.bridge(architecture, dtype=torch.bfloat16)
    view, text = ModelView(model), " ".join(TEXTS)
    result = lp.LogitLens(target="own", layers=[1]).run(model, text)
    assert result.provenance.dtype == "bfloat16" and result.log_prob.dtype == torch.float32
    exact = read_directly(model, result, view.hook("resid_post", 1))
    own = exact.gather(1, result.token.id[:, None])
    assert (result.rank[0] != (exact > own).sum(1)).float().mean() < 0.02
    ids, mask = pad(result.token, view)
    state = view.activations(ids, mask, [view.hook("resid_post", 1)])[view.hook("resid_post", 1)][0]
    with torch.no_grad():
        rounded = view.capped(model.unembed(view.normed(state)[None])[0])
    assert rounded.dtype == torch.bfloat16
    changed = (rounded > rounded.gather(1, result.token.id[:, None])).sum(1) != result.rank[0]
    assert changed.any(), "the bfloat16 product would have changed none: the test shows nothing"


def test_two_layers_and_three_tokens_by_hand():
    model = tiny.bridge("llama")
    with torch.no_grad():  # three entries that unembed the first three coordinates, all others far below
        model.ln_final.original_component.weight.fill_(1.0)
        head = model.unembed.original_component.weight
        head.zero_()
        head[:3, :3] = torch.eye(3)
        head[3:, 3] = -100.0
    state = torch.zeros(3, 32)
    state[0, :3], state[1, :3], state[2, :3] = (torch.tensor(p).log() for p in PROBABILITIES[0])
    other = torch.zeros(3, 32)
    other[0, :3], other[1, :3], other[2, :3] = (torch.tensor(p).log() for p in PROBABILITIES[1])
    states = torch.stack([state, other], dim=1)
    states[..., 3] = 1.0
    # The final norm would rescale them, so that the formula is asked with what the unembedding reads.
    view = ModelView(model)
    read = predictions(
        states, view.unembedding, view.unembedding_bias, torch.tensor([[0], [2], [-1]]), 3, cap=view.capped
    )
    half, quarter = math.log(2), math.log(4)
    torch.testing.assert_close(
        read.log_prob[:2, :, 0], torch.tensor([[-half, -quarter], [-quarter, -quarter]]), rtol=0, atol=1e-5
    )
    assert read.rank[..., 0].tolist() == [[0, 1], [1, 1], [-1, -1]] and read.log_prob[2].isnan().all()
    assert read.entropy[:, 0].tolist() == pytest.approx([1.5 * half, 1.5 * half, math.log(3)], abs=1e-5)
    # KL((1/4, 1/4, 1/2) || (1/2, 1/4, 1/4)) = -1/4 log 2 + 1/2 log 2; the second token's layers agree
    assert read.kl[:, 0].tolist() == pytest.approx([half / 4, 0.0, math.log(3) - 1.5 * half], abs=1e-5)
    assert read.kl[:, 1].tolist() == [0.0, 0.0, 0.0]
    assert read.top_ids[0, :, 0].tolist() == [0, 2]


PROBABILITIES = (
    ([0.5, 0.25, 0.25], [0.5, 0.25, 0.25], [1 / 3, 1 / 3, 1 / 3]),
    ([0.25, 0.25, 0.5], [0.5, 0.25, 0.25], [0.5, 0.25, 0.25]),
)


# Targets


def test_the_next_token_is_asked_within_a_prompt_and_the_last_has_none():
    tokens = lp.LogitLens().run(tiny.bridge("gpt2"), [[5, 6, 7], [8, 9]]).token
    assert target_ids(tokens, "next")[:, 0].tolist() == [6, 7, -1, 9, -1]
    assert target_ids(tokens, "own")[:, 0].tolist() == [5, 6, 7, 8, 9]
    assert target_ids(tokens, (3, 4)).tolist() == [[3, 4]] * 5
    result = lp.LogitLens().run(tiny.bridge("gpt2"), [[5, 6, 7], [8, 9]])
    assert result.log_prob.isnan().any(0).tolist() == [False, False, True, False, True]
    assert result.rank[0, 2] == -1 and result.entropy.isfinite().all()
    assert result.target_id.tolist() == [6, 7, -1, 9, -1]


def test_the_models_own_choice_has_rank_0_in_the_last_layer():
    result = lp.LogitLens(target="final").run(tiny.bridge("gemma2"), TEXTS)
    assert (result.rank[-1] == 0).all()
    torch.testing.assert_close(result.log_prob[-1], result.top_log_prob[-1, :, 0], rtol=0, atol=1e-5)
    assert torch.equal(result.target_id, result.final_id)


def test_of_several_ids_each_is_told_and_any_of_them():
    model = tiny.bridge("gpt2")
    several = lp.LogitLens(target=[40, 9]).run(model, TEXTS)
    one, other = (lp.LogitLens(target=i).run(model, TEXTS) for i in (40, 9))
    torch.testing.assert_close(several.target_log_prob[..., 0], one.log_prob)
    torch.testing.assert_close(several.target_log_prob[..., 1], other.log_prob)
    torch.testing.assert_close(several.log_prob.exp(), one.log_prob.exp() + other.log_prob.exp())
    assert torch.equal(several.rank, torch.minimum(one.rank, other.rank))
    assert torch.equal(several.target_rank, torch.stack([one.rank, other.rank], -1))
    assert several.target_id.unique().tolist() == [-1] and one.target_id.unique().tolist() == [40]
    assert set(several.to_frame("target_rank")["target"]) == {40, 9}


@pytest.mark.parametrize("architecture", ["gpt2", "bert"])
def test_a_target_may_be_the_text_of_a_token(architecture):
    model = tiny.bridge(architecture)
    id_of_the = model.tokenizer(" the", add_special_tokens=False)["input_ids"]
    assert len(id_of_the) == 1
    by_text, by_id = (lp.LogitLens(target=target).run(model, TEXTS) for target in (" the", id_of_the[0]))
    assert by_text.target == by_id.target == tuple(id_of_the) and by_text.vocab[id_of_the[0]] == " the"
    assert torch.equal(by_text.log_prob, by_id.log_prob)
    mixed = lp.LogitLens(target=[" the", 40]).run(model, TEXTS)
    assert mixed.target == (*id_of_the, 40) and mixed.provenance.probe.startswith("LogitLens(target=(' the', 40)")
    with pytest.raises(
        ValueError, match=r"must be the text of one token of tiny-\w+; got ' Nairobi', which is read as "
    ):
        lp.LogitLens(target=" Nairobi").run(model, TEXTS)
    special = model.tokenizer.all_special_tokens[0]  # left out of what a text is read as, as an unknown character is
    with pytest.raises(ValueError, match=r"got ' the.*', which is read as ' the':"):
        lp.LogitLens(target=f" the{special}").run(model, TEXTS)
    with pytest.raises(ValueError, match="must name each token once; got"):
        lp.LogitLens(target=[" the", *id_of_the]).run(model, TEXTS)


def test_only_the_entries_that_are_shown_have_texts():
    model = tiny.bridge("gpt2")
    result = lp.LogitLens(top_k=2, target=7).run(model, TEXTS)
    shown = {7, *result.final_id.tolist(), *result.top_ids.flatten().tolist()}  # 7 is the target everywhere
    assert set(result.vocab) == shown and list(result.vocab) == sorted(shown)
    one, other = (lp.LogitLens(top_k=2, target=7).run(model, text) for text in TEXTS[:2])
    assert lp.LogitLensResult.merge([one, other]).vocab == dict(sorted({**one.vocab, **other.vocab}.items()))


@pytest.mark.parametrize("target", ["next", "own", "final", 40])
def test_positions_are_rows_of_the_whole_result(target):
    model = tiny.bridge("llama")
    whole = lp.LogitLens(target=target).run(model, TEXTS)
    for positions, rows in (
        ([-1], [whole.token.rows(i)[-1] for i in range(len(TEXTS))]),
        ([2, 0, -1, 2], sorted({whole.token.rows(i)[j] for i in range(len(TEXTS)) for j in (0, 2, -1)})),
        (slice(1, None), [row for i in range(len(TEXTS)) for row in whole.token.rows(i)[1:]]),
    ):
        some = lp.LogitLens(target=target, positions=positions).run(model, TEXTS, batch_size=1)
        assert some.token.position.tolist() == whole.token.position[rows].tolist()
        for name in ("log_prob", "rank", "entropy", "top_ids", "target_id", "final_id"):
            torch.testing.assert_close(
                getattr(some, name),
                getattr(whole, name)[..., rows, :] if name == "top_ids" else getattr(whole, name)[..., rows],
                equal_nan=True,
                rtol=1e-4,
                atol=1e-4,
            )
        assert some.target_token.word_class == tuple(whole.target_token.word_class[i] for i in rows)
        assert some.figure().data and some.figure_trajectories(token=-1).data


@pytest.mark.usefixtures("as_users_run_it")
def test_positions_are_whole_numbers_or_a_slice_of_them_in_any_direction():
    model = tiny.bridge("gpt2")
    forward, back = (lp.LogitLens(positions=slice(None, None, step)).run(model, TEXTS) for step in (2, -1))
    assert forward.token.position[:2].tolist() == [0, 2]
    assert torch.equal(back.log_prob.nan_to_num(), lp.LogitLens().run(model, TEXTS).log_prob.nan_to_num())
    for positions in (slice(None, None, 0), slice("a"), [1.5], [], True):
        with pytest.raises(
            ValueError, match=r"LogitLens\(positions=\.\.\.\) must be a position such as -1, a word, a list of these, a"
        ):
            lp.LogitLens(positions=positions)
    for place in (3, "flies"):
        one, several = (lp.LogitLens(positions=each).run(model, TEXTS[0]) for each in (place, [place]))
        assert torch.equal(one.log_prob, several.log_prob) and len(one.token) == 1
    some = lp.LogitLens(positions=[1, 3]).run(model, TEXTS)
    assert "prompt 0, tokens 1, 3" in some.figure().layout.title.text
    assert "token 3)" in some.figure_paths(token=3).layout.title.text


def test_a_text_without_its_space_is_warned_of_once_where_the_prompt_goes_on_with_a_space():
    model = tiny.bridge("gpt2")
    message = (
        r"^LogitLens\(target=\.\.\.\) is 'the', the token without a space, and the prompts go on with a space: write "
        r"' the' if you mean the next word$"
    )
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("default")
        for batch_size in (1, 2):
            lp.LogitLens(target=["the", " the"]).run(model, TEXTS, batch_size=batch_size)
    assert len(given) == 1 and re.search(message, str(given[0].message))
    with pytest.warns(
        UserWarning, match=r"DirectLogitAttribution\(against=\.\.\.\) is 'the', the token without a space"
    ):
        lp.DirectLogitAttribution(target=" the", against="the").run(model, TEXTS[1])
    # Warnings are errors here. Each target is a new one: what was said once is not said again.
    for target, prompt in ((" the", "He saw"), ("in", "He saw "), ("it", "He saw ("), ("on", "He saw -")):
        assert lp.LogitLens(target=target).run(model, prompt).log_prob.isfinite().all()


@pytest.mark.usefixtures("as_users_run_it")
def test_a_text_that_is_one_token_with_its_space_only_is_refused_with_what_to_write():
    message = (
        r"\(target=\.\.\.\) must be the text of one token of tiny-gpt2; got 'and', which is read as .*: write ' and', "
    )
    with pytest.raises(ValueError, match=f"{message}with its leading space$"):
        lp.LogitLens(target="and").run(tiny.bridge("gpt2"), TEXTS)


def test_a_position_that_a_prompt_does_not_have_is_refused():
    model = tiny.bridge("gpt2")
    with pytest.raises(ValueError, match=r"a position must be within every prompt; got 99, and '"):
        lp.LogitLens(positions=[99]).run(model, TEXTS)
    some = lp.LogitLens(positions=[1, 3]).run(model, TEXTS)
    with pytest.raises(ValueError, match="token 2 is out of range: prompt 0 has tokens 1 to 3"):
        some.figure_trajectories(token=2)


def test_the_head_is_checked_with_the_logits_of_the_same_pass(monkeypatch):
    model, passes = tiny.bridge("gpt2"), []
    forward = model.original_model.forward
    monkeypatch.setattr(model.original_model, "forward", lambda *a, **k: (passes.append(1), forward(*a, **k))[1])
    lp.LogitLens().run(model, TEXTS)
    assert len(passes) == 1
    model.unembed.original_component.weight.data[3] += 1.0  # tied with the embedding: still its own logits
    lp.LogitLens().run(model, TEXTS)


def test_what_follows_gives_the_class_and_nothing_is_counted_at_special_tokens():
    result = lp.LogitLens().run(tiny.bridge("gpt2"), ["The cat sat."], prepend_bos=True)
    tokens, asked = result.token, following(result.token)
    assert tokens.special.tolist()[0] and asked.word_class[0] == "" and asked.special[0]
    assert asked.word_class[1:-1] == tokens.word_class[2:] and asked.word_class[-1] == ""
    assert asked.word[1:-1].tolist() == tokens.word[2:].tolist() and int(asked.word[-1]) == -1
    assert asked.id[:-1].tolist() == tokens.id[1:].tolist()
    table = result.by_word_class()
    counted = table[(table["quantity"] == "log_prob") & (table["layer"] == "2_post")]
    assert counted.set_index("word_class")["tokens"].to_dict() == {
        name: asked.word_class.count(name) for name in set(asked.word_class) - {""}
    }


def test_an_encoders_separator_is_no_target():
    result = lp.LogitLens().run(tiny.bridge("bert"), "The cat sat.")
    assert following(result.token).special.tolist() == [True, *[False] * (len(result.token) - 3), True, True]


# Methods


def toy(top, final):
    """A result whose top entries are given, `[layer token]`."""
    result = lp.LogitLens(top_k=1, layers=[0, 1]).run(tiny.bridge("gpt2"), [[5, 6, 7, 8]])
    object.__setattr__(result, "top_ids", torch.tensor(top)[..., None])
    object.__setattr__(result, "final_id", torch.tensor(final))
    return result


def test_decided_is_the_first_layer_from_which_the_choice_stays():
    result = toy([[1, 2, 9, 4], [1, 3, 3, 4], [1, 2, 3, 5]], [1, 2, 3, 4])
    assert result.decided_at().tolist() == [0, 2, 1, -1]


def test_tokens_of_interest_are_those_ever_on_top():
    result = toy([[1, 2, 9, 4], [1, 3, 3, 4], [1, 2, 3, 5]], [1, 2, 3, 4])
    assert result.tokens_of_interest() == (1, 2, 9, 4, 3, 5)
    assert result.tokens_of_interest(token=3) == (4, 5)


def test_content_words_that_are_never_guessed_compare_as_less_probable():
    result = lp.LogitLens().run(tiny.bridge("gpt2"), lp.demo.sentences()[:8])
    classes = following(result.token).word_class
    content = torch.tensor([name == "content" for name in classes])
    object.__setattr__(result, "log_prob", torch.where(content, -9.0, -1.0).expand(4, -1).clone())
    table = result.compare("content", "function", permutations=99)
    assert (table["effect"] == 0.0).all() and (table["q"] <= 0.02).all()
    assert result.compare("function", "content", permutations=99)["effect"].tolist() == pytest.approx([1.0] * 4)


# Translators


def test_a_translator_is_given_every_state_with_its_label_and_the_final_prediction_stays_the_models_own():
    model, seen = tiny.bridge("gpt2"), []

    def nothing(state, label):
        seen.append((label, tuple(state.shape), state.dtype))
        return torch.zeros_like(state)

    result = lp.LogitLens(translator=nothing, top_k=1).run(model, TEXTS[0])
    plain = lp.LogitLens(top_k=1).run(model, TEXTS[0])
    shape = (len(result.token), 32)
    assert seen == [(label, shape, torch.float32) for label in ("0_pre", "0_post", "1_post", "2_post")]
    assert torch.equal(result.final_id, plain.final_id) and result.translated
    torch.testing.assert_close(result.entropy[0], result.entropy[-1])
    assert (result.kl[-1] > 0.01).all()


class Fitted:
    """A translator that was fitted on nothing, and says so."""

    def __call__(self, state, label):
        raise AssertionError("it was not asked whether it fits")

    def check_model(self, model, labels):
        raise ValueError(f"not fitted on {model.name} for {', '.join(labels)}")


def test_a_translator_that_can_check_the_model_is_asked_before_the_forward_pass():
    with pytest.raises(ValueError, match="not fitted on tiny-gpt2 for 1_post"):
        lp.LogitLens(translator=Fitted(), layers=[1]).run(tiny.bridge("gpt2"), TEXTS)


def test_no_probe_imports_an_experiment():
    files = list((Path(lp.__file__).parent / "probes").glob("*.py"))
    assert files and not [file.name for file in files if "lens_probes.experiments" in file.read_text()]


def test_the_identity_changes_nothing_but_the_record():
    model = tiny.bridge("llama")
    translated = lp.LogitLens(translator=lambda state, label: state).run(model, TEXTS)
    object.__setattr__(translated, "translated", False)
    assert_same(translated, lp.LogitLens().run(model, TEXTS), "no translator")


# Refusals


@pytest.mark.usefixtures("as_users_run_it")
def test_what_cannot_be_asked_is_said_before_the_forward_pass(monkeypatch):
    model = tiny.bridge("gpt2")
    for target in ("", [" Paris", " Paris"], 1.5, [1.7, 3], [" a", 1.5], None, True, [], [4, 4], -1):
        message = (
            "must be 'next', 'own', 'final', a token's text such as ' Paris', or its id; or several texts and ids, "
            "each once"
        )
        with pytest.raises(ValueError, match=re.escape(f"LogitLens(target=...) {message}; got {target!r}")):
            lp.LogitLens(target=target)
    for top_k in (-1, 2.5):
        with pytest.raises(
            ValueError, match=rf"LogitLens\(top_k=\.\.\.\) must be a whole number, 0 or more; got {top_k}"
        ):
            lp.LogitLens(top_k=top_k)
    for translator in (3, lp.TunedLens(), lp.TunedLens):
        with pytest.raises(TypeError, match=r"such as the result of TunedLens\(\).run\(model, texts\), or None; got "):
            lp.LogitLens(translator=translator)
    with pytest.raises(TypeError, match=r"probes must be a list of probes; got .*for an experiment such as TunedLens"):
        lp.run([lp.TunedLens()], model, TEXTS)
    with pytest.raises(ValueError, match="no token here has a target that belongs to a word"):
        lp.LogitLens().run(model, [[5]]).by_word_class()
    with pytest.raises(ValueError, match=r"first must be the number of a token of prompt 0, 0 to .*; got -3"):
        lp.LogitLens().run(model, TEXTS).figure(first=-3)
    with pytest.raises(ValueError, match=r"\(target=\.\.\.\) must be ids of tiny-gpt2, 0 to 399; got 400"):
        lp.LogitLens(target=400).run(model, TEXTS)
    with pytest.raises(ValueError, match=r"\(top_k=\.\.\.\) must be at most the 400 entries of tiny-gpt2; got 401"):
        lp.LogitLens(top_k=401).run(model, TEXTS)
    with pytest.raises(ValueError, match="'resid_mid' does not exist in tiny-neox"):
        lp.LogitLens(incl_mid=True).run(tiny.bridge("neox"), TEXTS)
    monkeypatch.setattr(ModelView, "capped", lambda self, logits: 3 * logits)
    with pytest.raises(ValueError, match="the logits of tiny-gpt2 must be its final norm, unembedding and soft cap"):
        lp.LogitLens().run(model, TEXTS)


def test_a_model_without_a_head_is_refused():
    model = tiny.bridge("bert")
    model.cfg.model_name = "all-minilm-l6-v2"
    with pytest.raises(ValueError, match="must have a trained language-model head; got all-minilm-l6-v2"):
        lp.LogitLens().run(model, TEXTS)


def test_a_model_that_scales_its_logits_otherwise_is_refused():
    model = tiny.bridge("gpt2")
    model.original_model.lm_head.register_forward_hook(lambda module, inputs, output: output / 3)
    with pytest.raises(
        ValueError, match=r"of tiny-gpt2 must be its final norm, unembedding and soft cap alone; got a difference of \d"
    ):
        lp.LogitLens().run(model, TEXTS)


@pytest.mark.parametrize(
    ("translator", "came"),
    [
        (lambda state, label: state[:, :5], r"must return one state per token, \(\d+, 32\) at 0_pre; got \(\d+, 5\)"),
        (lambda state, label: None, "must return one state per token, .*; got NoneType"),
        (lambda state, label: state * math.inf, "must return finite states; got NaN or Inf in .* at 0_pre"),
    ],
    ids=["shape", "nothing", "infinite"],
)
def test_a_translator_that_returns_something_else_is_refused(translator, came):
    with pytest.raises(ValueError, match=came):
        lp.LogitLens(translator=translator).run(tiny.bridge("gpt2"), TEXTS)


def test_what_overflows_in_the_models_precision_is_refused():
    model = tiny.bridge("llama", dtype=torch.float16)
    with pytest.raises(ValueError, match=r"got NaN or Inf in torch\.float16 at 0_pre: scale it down"):
        lp.LogitLens(translator=lambda state, label: state * 1e6).run(model, TEXTS)


def test_a_head_that_gives_no_numbers_is_refused():
    model = tiny.bridge("llama")
    with torch.no_grad():
        model.unembed.original_component.weight[7] = torch.nan
    with pytest.raises(ValueError, match="the logits of tiny-llama must be finite; got NaN or Inf: check the model"):
        lp.LogitLens().run(model, TEXTS)


def test_layers_come_in_the_order_of_the_model_however_they_are_asked():
    model = tiny.bridge("gpt2")
    turned, plain = (lp.LogitLens(layers=layers).run(model, TEXTS) for layers in ([2, 0, 1], None))
    assert_same(turned, plain, "all layers in order")


def test_prompts_that_differ_in_their_first_token_only_may_come_in_any_order():
    model = tiny.bridge("llama")
    texts = [f"{name} old keeper climbed the stairs before the fog and the rain came in" for name in "ABCDEF"]
    one, other = (lp.LogitLens().run(model, some, prepend_bos=False) for some in (texts, texts[::-1]))
    for table, again in ((one.compare(), other.compare()), (one.by_word_class(), other.by_word_class())):
        numbers = table.select_dtypes("number").columns
        assert (table[numbers] - again[numbers]).abs().max().max() < 1e-4


@pytest.mark.parametrize("target", [np.int64(5), torch.tensor(5), np.array([5, 6]), torch.tensor([[5, 6]]), (5, 6)])
@pytest.mark.usefixtures("as_users_run_it")
def test_ids_may_come_as_arrays_and_tensors(target):
    probe = lp.LogitLens(target=target)
    assert repr(probe).startswith(("LogitLens(target=(5,)", "LogitLens(target=(5, 6)"))
    assert probe.run(tiny.bridge("gpt2"), TEXTS).target in ((5,), (5, 6))


def test_a_frame_has_the_texts_of_ids():
    result = lp.LogitLens(top_k=2).run(tiny.bridge("gpt2"), TEXTS)
    frame = result.to_frame("top_ids")
    assert frame["top_text"].tolist() == [result.vocab[i] for i in frame["top_ids"]]


# Figures


def test_the_figure_is_one_prompt_with_its_top_entries():
    result = lp.LogitLens(top_k=2).run(tiny.bridge("gpt2"), TEXTS)
    figure = result.figure(prompt=1)
    (grid,) = figure.data
    n = int((result.token.prompt == 1).sum())
    assert len(grid.z) == len(grid.text) == n and grid.x == result.layer
    first = result.token.rows(1)[0]
    assert grid.text[0][-1] == lp.figures.visible(result.vocab[int(result.top_ids[-1, first, 0])], 7)
    assert grid.z[0][-1] == pytest.approx(float(result.log_prob[-1, first]))
    assert f"{float(result.top_log_prob[-1, first, 1].exp()):.3f}" in grid.hovertext[0][-1]
    with pytest.raises(ValueError, match="quantity must be one of log_prob, rank, entropy, kl; got 'p'"):
        result.figure(quantity="p")


def test_a_long_prompt_is_windowed_and_many_layers_are_thinned():
    model = tiny.bridge("gpt2")
    result = lp.LogitLens(top_k=1).run(model, [list(range(5, 64))])
    grid = result.figure(first=50).data[0]
    assert len(grid.z) == 9
    with pytest.raises(ValueError, match="first must be the number of a token of prompt 0, 0 to 58; got 59"):
        result.figure(first=59)
    wide = lp.figures.heatmap(
        [list(range(100))],
        x=[str(i) for i in range(100)],
        y=["a"],
        title="t",
        x_title="x",
        y_title="y",
        colour_title="c",
    )
    columns = wide.to_dict()["data"][0]["x"]
    assert len(columns) <= lp.figures.COLUMNS and columns[-1] == "99"
    assert "t; one column in 3" in wide.layout.title.text


def test_trajectories_follow_what_comes_up_and_fixed_targets_everywhere():
    model = tiny.bridge("gpt2")
    result = lp.LogitLens(top_k=3).run(model, TEXTS[0])
    ids = result.tokens_of_interest(2)
    everywhere = lp.LogitLens(target=ids, top_k=3).run(model, TEXTS[0])
    traces = [trace for trace in everywhere.figure_trajectories(2).data if trace.x[0] is not None]
    assert len(traces) == len(ids)
    assert all(math.isfinite(value) for trace in traces for value in trace.y)
    bold = max(traces, key=lambda trace: trace.line.width)
    assert bold.y[-1] == pytest.approx(float(result.top_log_prob[-1, 2, 0].exp()))


def test_ranks_by_word_class_start_at_1_on_their_logarithmic_axis():
    result = lp.LogitLens(target="final", top_k=1).run(tiny.bridge("gpt2"), TEXTS)
    figure = result.figure_classes()
    assert [axis.title.text for axis in (figure.layout.yaxis, figure.layout.yaxis2, figure.layout.yaxis3)] == [
        "log-probability of the target (nats, at most 0)",
        "1 + rank of the target (1 to 400)",
        "KL(final || layer) (nats, 0 or more)",
    ]
    assert [figure.layout[f"yaxis{n}"].autorange for n in ("", 2, 3)] == [True, "reversed", "reversed"]
    assert figure.layout.yaxis2.type == "log" and figure.layout.yaxis3.type is None
    table = result.by_word_class()
    for line in (trace for trace in figure.data if trace.yaxis == "y2" and trace.name):
        rows = table[(table["quantity"] == "rank") & (table["word_class"] == line.name.split(" ")[0])]
        assert list(line.y) == [1 + median for median in rows["median"]] and line.y[-1] == 1


def test_titles_say_what_was_asked_and_whether_a_translator_stood_between():
    model = tiny.bridge("gpt2")
    fixed = lp.LogitLens(target=[40, 9], translator=lambda state, label: state).run(model, TEXTS)
    named = " or ".join(map(repr, ModelView(model).token_texts([40, 9])))
    assert fixed.conditions() == f"target: {named}; through a translator"
    assert lp.LogitLens(target=[40, 9], top_k=0).run(model, TEXTS).conditions() == f"target: {named}"
    assert "target: model's own choice; tiny-gpt2" in (
        lp.LogitLens(target="final").run(model, TEXTS).figure_prompt(quantity="kl").layout.title.text
    )


def test_one_prompt_can_be_drawn_of_every_result_over_layers_and_tokens():
    model = tiny.bridge("gpt2")
    ranks, lens = lp.RankShift().run(model, TEXTS), lp.LogitLens(top_k=0).run(model, TEXTS)
    grid = ranks.figure_prompt(1, quantity="score").data[0]
    rows = ranks.token.rows(1)
    assert grid.colorscale[0][1] != grid.colorscale[-1][1] and grid.zmin == -grid.zmax  # cosines: around 0
    assert [list(row) for row in grid.z] == [pytest.approx(ranks.score[:, i].tolist()) for i in rows]
    assert lens.figure_prompt(1, quantity="entropy").data[0].zmax == pytest.approx(math.log(400))
    assert list(lens.figure_prompt(1).data[0].z[-1]) == [None] * 4  # the last token has no target
    with pytest.raises(ValueError, match="quantity must be one of log_prob, rank, entropy, kl; got 'top_ids'"):
        lens.figure_prompt(quantity="top_ids")


def test_without_top_entries_figures_say_what_to_run():
    result = lp.LogitLens(top_k=0).run(tiny.bridge("gpt2"), TEXTS)
    assert result.figure().data[0].z is not None and result.top_ids is None
    for ask in (result.decided_at, result.tokens_of_interest, lambda: result.figure_trajectories(0)):
        with pytest.raises(ValueError, match=r"run LogitLens\(top_k=5\)"):
            ask()


HOSTILE = "<script>alert(1)</script></b><img src=x onerror=alert(2)>"


def test_nothing_in_a_tokens_text_can_act_as_html():
    result = lp.LogitLens().run(tiny.bridge("gpt2"), TEXTS)
    object.__setattr__(result.token, "text", tuple(HOSTILE for _ in result.token.text))
    object.__setattr__(result, "vocab", dict.fromkeys(result.vocab, HOSTILE))
    for figure in (result.figure(), result.figure_trajectories(1), result.figure_classes()):
        drawn = figure.to_json()
        assert "<script" not in drawn and "<img" not in drawn and "</b><" not in drawn


def test_the_finding_counts_predictions_that_have_not_settled():
    half = toy([[9, 9, 9, 9], [9, 2, 9, 9], [1, 2, 9, 9]], [1, 2, 3, 4])
    assert half.token.special.sum() == 0
    assert half.findings()[0].startswith(
        f"The median prediction settles at {half.layer[2]}. At {half.layer[2]}, 50% of"
    )
    never = toy([[9, 9, 9, 9], [9, 2, 9, 9], [9, 2, 9, 9]], [1, 2, 3, 4])
    assert never.findings()[0].startswith(f"The median prediction has not settled by {never.layer[2]}. At")
    first = lp.LogitLens(layers=[0]).run(tiny.bridge("gpt2"), TEXTS)
    assert int((first.decided_at() < 0).sum()) > len(first.token) / 2
    assert first.findings()[0].startswith("The median prediction has not settled by 0_post. At 0_post, ")


def test_the_finding_has_an_interval_over_prompts_and_a_null_of_other_tokens():
    many, few = (lp.LogitLens().run(tiny.bridge(), lp.demo.sentences()[:n], progress=False) for n in (12, 4))
    ordinary = ~many.token.special
    top, own = many.top_ids[-2, ordinary, 0], many.final_id[ordinary]
    found = re.search(
        r"At 1_post, (\d+)% of predictions .* \(95 % interval (\d+)% to (\d+)%; (\d+) tokens of 12 .*: (\d+)%\.",
        many.findings()[0],
    )
    share, low, high, n, null = map(int, found.groups())
    same = (top == own).double()
    assert n == len(same) and share == round(100 * float(same.mean()))
    others = ~torch.eye(n, dtype=torch.bool)
    table = many.agreement()
    assert table["agreement"].tolist() == pytest.approx(
        [float((each == own).double().mean()) for each in many.top_ids[:, ordinary, 0]]
    )
    last = table.iloc[-1]
    assert (last["layer"], last["agreement"], last["low"], last["high"], last["prompts"]) == ("2_post", 1, 1, 1, 12)
    assert table["null"].between(0, 0.5).all() and few.agreement()["low"].isna().all()
    assert share_by_chance(top[:2], own[:2]) == ((top[0] == own[1]) + 0.0 + (top[1] == own[0])) / 2
    assert null == round(100 * float((top[:, None] == own)[others].double().mean()))
    shares = [float(same[many.token.prompt[ordinary] == prompt].mean()) for prompt in range(12)]
    reach = 220 * np.std(shares, ddof=1) / 12**0.5  # Student's t, 11 degrees of freedom; prompts are about equally long
    assert low <= share <= high and (high - low) / 2 == pytest.approx(reach, rel=0.35)
    assert "no interval: it needs five prompts" in few.findings()[0]
