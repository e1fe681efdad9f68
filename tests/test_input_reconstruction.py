"""InputReconstruction: known inverses, exact searches on every decoder, what is given up, numbers by hand, refusals."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats
from transformers import DynamicCache

import lens_probes as lp
from lens_probes import soft_tokens
from lens_probes.examples import tiny
from lens_probes.experiments import input_reconstruction
from lens_probes.maths.token_search import Following, first_within
from lens_probes.model import ModelView
from lens_probes.soft_tokens import SoftTokens
from lens_probes.testing import PROMPTS, assert_same

TEXT = "The old man the boat."
QUICK = {"steps": 5, "restarts": 2}


def sequential(layer, **settings):
    return lp.InputReconstruction(layer, method="sequential", **settings)


def test_every_decoder_gives_its_input_back_token_by_token(decoder):
    model = decoder.build()
    result = sequential(-1).run(model, "The old man", progress=False)
    assert result.exact.tolist() == [1.0]
    assert (result.distance < 1e-4 * result.state_norm).all()
    asked = ~result.token.special
    assert (result.candidates[asked] > 0).all() and (result.candidates[~asked] == -1).all()


@pytest.mark.matrix
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
@pytest.mark.parametrize("layer", [0, 2])
def test_twenty_prompts_are_found_in_two_random_models(architecture, layer):
    ids = torch.randint(4, 400, (20, 4), generator=torch.Generator().manual_seed(layer))
    result = sequential(layer).run(tiny.bridge(architecture), ids, progress=False)
    assert result.exact.tolist() == [1.0] * 20 and torch.equal(result.found, ids.flatten())


def test_it_finds_the_input_at_every_read_point():
    for at in ("resid_pre", "resid_mid", "attn_out"):
        assert sequential(1, at=at).run(tiny.bridge("gpt2"), PROMPTS[0], progress=False).exact.tolist() == [1.0], at


@pytest.mark.matrix
def test_half_precision_finds_the_input_too():
    result = sequential(2).run(tiny.bridge("llama", dtype=torch.bfloat16), TEXT, progress=False)
    assert result.exact.tolist() == [1.0] and result.provenance.dtype == "bfloat16"


def test_a_linear_map_is_inverted_in_the_first_batch():
    random = torch.Generator().manual_seed(0)
    vocabulary = torch.randn(2000, 12, generator=random)
    A = torch.randn(12, 12, generator=random)

    following = Following(lambda ids: vocabulary[ids] @ A, lambda embeddings: embeddings @ A)
    directions = torch.randn(16, 12, generator=random)
    for wanted in (0, 777, 1999):
        search = first_within(following, vocabulary[wanted] @ A, vocabulary, directions, 1e-4, 2000)
        assert search == (wanted, 32, 1)


def test_blocks_that_do_nothing_give_everything_back(idle):
    found = sequential(2).run(idle, TEXT, progress=False)
    assert found.exact.tolist() == [1.0] and found.candidates.max() == 32
    soft = lp.InputReconstruction(2, steps=200).run(idle, TEXT, progress=False)
    assert soft.exact.tolist() == [1.0] and (soft.soft_distance < soft.noise_distance)[~soft.token.special].all()


def test_equal_vocabulary_rows_count_as_one_token():
    model = tiny.bridge("llama")
    with torch.no_grad():
        model.W_E[[20, 30]] = model.W_E[[10, 10]]
    result = sequential(1).run(model, [[5, 30, 6]], progress=False)
    assert result.exact.tolist() == [1.0] and result.found.tolist()[1] in (10, 20, 30)
    view = ModelView(model)
    layer = SoftTokens(view, view.hook("resid_post", 1))
    assert layer.same(torch.tensor([10, 11]), torch.tensor([30, 30])).tolist() == [True, False]


def test_what_is_not_found_is_said_and_ends_the_prompt():
    result = sequential(2, max_candidates=2).run(tiny.bridge("gpt2"), [[5, 6, 7], [250, 251, 252]], progress=False)
    for own in (result.token.prompt == 0, result.token.prompt == 1):
        given_up = int((result.found[own] >= 0).sum())
        assert (
            given_up < 3
            and result.candidates[own][given_up] == 2
            and (result.candidates[own][given_up + 1 :] == -1).all()
        )
        assert result.found[own][given_up:].eq(-1).all() and result.distance[own][given_up:].isnan().all()
        assert result.correct[own][given_up] == 0 and result.correct[own][given_up + 1 :].isnan().all()
    assert result.exact.tolist() == [0.0, 0.0]
    table = result.gave_up()
    assert table["prompt"].tolist() == [0, 1] and table["candidates"].tolist() == [2, 2]
    assert table["position"].tolist() == [int((result.found[result.token.prompt == i] >= 0).sum()) for i in range(2)]
    assert len(sequential(2).run(tiny.bridge("gpt2"), TEXT, progress=False).gave_up()) == 0
    assert result.path_loss.isnan().all()


def test_a_first_token_that_is_not_found_leaves_the_other_prompts():
    prompts = [[33, 50], [60, 61, 62], [301, 7]]
    result = sequential(2, max_candidates=1).run(tiny.bridge("qwen3"), prompts, progress=False)
    assert result.found.eq(-1).all() and (result.accuracy == 0).all()
    assert result.gave_up()["position"].tolist() == [0, 0, 0]


def test_the_restart_with_the_lowest_loss_is_taken(monkeypatch):
    original, losses = input_reconstruction.mean_loss, []

    def noted(*arguments):
        losses.append(original(*arguments))
        return losses[-1]

    monkeypatch.setattr(input_reconstruction, "mean_loss", noted)
    result = lp.InputReconstruction(1, steps=5, restarts=6).run(tiny.bridge("gpt2"), TEXT, progress=False)
    assert losses[-1].shape == (6,) and result.path_loss[-1] == losses[-1].min() < losses[-1].max()


def test_special_tokens_are_given_and_a_token_not_found_is_none():
    model = tiny.bridge("llama")
    result = lp.InputReconstruction(1, **QUICK).run(model, TEXT, progress=False)
    assert result.token.special[0] and result.soft_distance[0] < 1e-4 * result.state_norm[0] < result.soft_distance[1]
    view = ModelView(model)
    layer = SoftTokens(view, view.hook("resid_post", 1))
    assert layer.same(torch.tensor([-1, 0]), torch.tensor([0, 0])).tolist() == [False, True]


def test_what_was_never_asked_counts_for_no_candidates():
    texts = ["Time flies like an arrow", "The old man the boat"]
    result = sequential(2, max_candidates=5).run(tiny.bridge("gpt2"), texts, progress=False)
    asked = result.candidates > 0
    assert asked.sum() == 2 and (result.candidates[~asked] == -1).all()
    assert result.accuracy_by_word_class()["median_candidates"].dropna().eq(5).all()
    assert result.accuracy_by_word_class()["tokens"].sum() == 2 and result.by_position()["tokens"].tolist() == [2]
    assert result.table()["found"].tolist() == list(result.found_text.text)
    table = result.compare(quantity="candidates")
    assert table[["content_tokens", "function_tokens"]].sum(axis=1).item() == 2


def test_the_columns_of_a_table_weigh_prompts_alike():
    texts = [*PROMPTS, "A dog ran home.", "Salt the water."]
    result = lp.InputReconstruction(1, **QUICK).run(tiny.bridge("gpt2"), texts, progress=False)
    same = replace(result, decoded=result.correct)
    for table in (same.accuracy_by_word_class(), same.by_position()):
        assert table["accuracy"].tolist() == pytest.approx(table["decode_only"].tolist())


def test_padding_inside_a_prompt_keeps_its_place_on_roberta():
    try:
        model = tiny.bridge("roberta")
    except ValueError:
        pytest.skip("TransformerLens 3 has no bridge for RoBERTa")
    result = lp.InputReconstruction(0, at="resid_pre", **QUICK).run(model, [[50, 1, 60, 70]], progress=False)
    plain = lp.InputReconstruction(0, at="resid_pre", **QUICK).run(model, [[50, 9, 60, 70]], progress=False)
    assert (result.noise_distance < 2 * plain.noise_distance.max()).all()


def test_results_of_prompts_apart_are_merged():
    texts = [TEXT, "It ran."]
    one, other = (sequential(1).run(tiny.bridge("gpt2"), text, progress=False) for text in texts)
    both = sequential(1).run(tiny.bridge("gpt2"), texts, progress=False)
    assert_same(both, lp.InputReconstructionResult.merge([one, other]), "a merge")


def test_values_that_are_not_finite_are_refused():
    model = tiny.bridge("gpt2", dtype=torch.float16)
    with torch.no_grad():
        model.blocks[2].mlp.out.original_component.weight.mul_(3e4)
    for method in ("gradient", "sequential"):
        with pytest.raises(ValueError, match="hook_resid_post' must be finite; got NaN or Inf"):
            lp.InputReconstruction(2, method=method, steps=2).run(model, TEXT, progress=False)


def test_a_wider_tolerance_is_content_with_another_token():
    result = sequential(2, tolerance=10.0).run(tiny.bridge("gpt2"), TEXT, progress=False)
    asked = ~result.token.special
    assert (result.found >= 0).all() and result.accuracy < 1 and (result.candidates[asked] == 32).all()
    assert (result.distance[asked] <= 10 * result.state_norm[asked]).all() and result.distance.max() > 0.1


@pytest.mark.parametrize(
    "loss", [pytest.param("cosine", marks=pytest.mark.matrix), pytest.param("l1", marks=pytest.mark.matrix), "l2"]
)
def test_the_gradient_lowers_the_loss_and_finds_more(loss):
    result = lp.InputReconstruction(0, loss=loss, steps=120).run(tiny.bridge("gpt2"), list(PROMPTS), progress=False)
    assert (result.path_loss[-1] < 0.2 * result.path_loss[0]).all()
    assert result.step[0] == "0" and result.step[-1] == "120" and torch.equal(result.path_accuracy[-1], result.accuracy)
    assert result.accuracy.mean() > 0.3 > result.path_accuracy[0].mean() + 0.2  # a guess finds 1 in 400


def test_the_loss_noted_is_that_of_the_states():
    model = tiny.bridge("gpt2")
    result = lp.InputReconstruction(1, **QUICK).run(model, TEXT, progress=False)
    asked = ~result.token.special
    relative = (result.soft_distance / result.state_norm)[asked]
    assert result.path_loss[-1, 0] == pytest.approx(float(relative.mean()), rel=1e-5)
    view = ModelView(model)
    name = view.hook("resid_post", 1)
    everything = torch.ones(1, len(asked), dtype=torch.bool)
    found, true = (view.activations(ids[None], everything, [name])[name][0] for ids in (result.found, result.token.id))
    torch.testing.assert_close(result.distance, (found - true).norm(dim=-1), rtol=1e-4, atol=1e-5)


def test_special_tokens_are_given_and_not_counted():
    result = lp.InputReconstruction(1, **QUICK).run(tiny.bridge("bert"), TEXT, progress=False)
    special = result.token.special
    assert special.sum() == 2 and torch.equal(result.found[special], result.token.id[special])
    assert result.correct[special].isnan().all() and not result.correct[~special].isnan().any()


@pytest.mark.matrix
def test_a_prompt_has_the_same_numbers_in_any_company():
    model = tiny.bridge("qwen3")
    for search in (lp.InputReconstruction(1, **QUICK), sequential(1)):
        texts = ["Fruit flies like it.", PROMPTS[0], "No."]
        alone, company = (search.run(model, some, progress=False) for some in (texts[0], texts))
        own = company.token.prompt == 0
        assert torch.equal(company.found[own], alone.found) and torch.equal(company.candidates[own], alone.candidates)
        torch.testing.assert_close(company.path_loss[:, 0], alone.path_loss[:, 0], rtol=1e-3, atol=1e-5)


@pytest.fixture
def by_hand():
    """Two prompts, `a b c` and `a d`: found are a, c and a."""
    result = sequential(1).run(tiny.bridge("gpt2"), [[10, 11, 12], [10, 13]], progress=False)
    token = replace(result.token, word_class=("content", "function", "content", "content", "function"))
    correct = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0])
    candidates = torch.tensor([64, 2000, 128, 64, 2000])
    return replace(result, token=token, correct=correct, candidates=candidates)


def test_tables_by_hand(by_hand):
    assert by_hand.accuracy.tolist() == pytest.approx([2 / 3, 1 / 2]) and by_hand.exact.tolist() == [0, 0]
    assert by_hand.chance.tolist() == pytest.approx([1 / 2, 0, 0, 1 / 3, 0])
    classes = by_hand.accuracy_by_word_class().set_index("word_class")
    assert classes["accuracy"].to_dict() == {"content": 1.0, "function": 0.0}
    assert classes.loc["content", ["tokens", "prompts", "median_candidates"]].tolist() == [3, 2, 64]
    assert classes.loc["content", "chance"] == pytest.approx((1 / 4 + 1 / 3) / 2)  # prompts weigh alike
    positions = by_hand.by_position().set_index("position")
    assert positions["accuracy"].to_dict() == {0: 1.0, 1: 0.0, 2: 1.0} and positions["prompts"].tolist() == [2, 2, 1]
    row = by_hand.compare(quantity="candidates").iloc[0]
    assert row["effect"] == 0.0 and (row["content_tokens"], row["function_tokens"]) == (3, 2)


def test_the_distance_over_the_yardstick_and_the_classes_of_all_quantities(by_hand):
    torch.testing.assert_close(by_hand.relative_distance, by_hand.distance / by_hand.noise_distance)
    assert by_hand.by_position()["median_distance"][2] == pytest.approx(float(by_hand.relative_distance[2]))
    described = by_hand.by_word_class()
    assert {"correct", "candidates", "distance", "relative_distance"} <= set(described["quantity"])
    assert not {"found", "soft_distance"} & set(described["quantity"])  # ids, and what a search has not
    descended = lp.InputReconstruction(1, **QUICK).run(tiny.bridge("gpt2"), TEXT, progress=False)
    torch.testing.assert_close(descended.relative_distance, descended.soft_distance / descended.noise_distance)


def test_the_interval_of_a_share_ends_at_0_and_1():
    texts = [*PROMPTS, "A dog ran home.", "Salt the water."]
    table = lp.InputReconstruction(1, **QUICK).run(tiny.bridge("gpt2"), texts, progress=False).by_position()
    known = table[table["low"].notna()]
    assert len(known) and (known["low"] >= 0).all() and (known["high"] <= 1).all()


def test_two_models_are_compared_at_equal_loss():
    result = lp.InputReconstruction(1, steps=2, restarts=1).run(tiny.bridge("gpt2"), list(PROMPTS), progress=False)
    one = replace(
        result,
        correct=torch.where(result.token.special, torch.nan, 1.0),
        path_loss=torch.tensor([[3.0, 3.0, 3.0], [2.0, 2.0, 1.0], [1.0, 1.0, 0.5]]),
        path_accuracy=torch.tensor([[0.0, 0.0, 0.0], [0.5, 0.5, 0.25], [1.0, 1.0, 1.0]]),
    )
    other = replace(
        one,
        correct=torch.where(result.token.special, torch.nan, 0.0),
        path_loss=torch.tensor([[3.0, 3.0, 3.0], [2.5, 2.5, 2.5], [2.0, 2.0, 0.75]]),
        path_accuracy=torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.5, 0.0, 0.5]]),
    )
    table = one.compare_with(other).set_index("when")
    assert table.loc["at the end", ["accuracy", "other", "effect"]].tolist() == [1.0, 0.0, 1.0]
    equal = table.loc["at equal loss"]
    assert (equal["accuracy"], equal["other"]) == pytest.approx(((0.5 + 0.5 + 1.0) / 3, 1 / 3))
    assert equal["prompts"] == 3 and table["low"].isna().all()  # three prompts have no interval
    np.testing.assert_array_equal(table["q"], stats.false_discovery_control(table["p"]))
    with pytest.raises(ValueError, match="compared on the same prompts; got other token ids"):
        one.compare_with(lp.InputReconstruction(1, **QUICK).run(tiny.bridge("gpt2"), TEXT, progress=False))
    cosine = replace(one, provenance=replace(one.provenance, probe="InputReconstruction(loss='cosine')"))
    with pytest.raises(ValueError, match=r"compared with the same settings; got InputReconstruction.*loss='cosine'"):
        one.compare_with(cosine)
    with pytest.raises(TypeError, match="of one class must be compared; got InputReconstructionResult and str"):
        one.compare_with("x")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"quantity must be one of correct, decoded, .*; got 'accuracy'"):
        one.compare(quantity="accuracy")


def test_an_interrupt_leaves_the_prompts_done(monkeypatch):
    original, calls = lp.InputReconstruction._of_prompt, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(lp.InputReconstruction, "_of_prompt", interrupted)
    result = lp.InputReconstruction(0, **QUICK).run(tiny.bridge("gpt2"), list(PROMPTS), progress=False)
    assert result.provenance.n_prompts == 2 and len(result.prompt) == 2 and result.path_loss.shape[1] == 2


def test_figures_show_what_is_stored():
    result = lp.InputReconstruction(0, **QUICK).run(tiny.bridge("gpt2"), list(PROMPTS), progress=False)
    line = next(trace for trace in result.figure().data if trace.name == "found")
    assert list(line.y) == result.by_position()["accuracy"].tolist()
    drawn = result.figure_prompt(2).data[0]
    rows = result.token.rows(2)
    assert list(drawn.z[1])[1:] == result.correct[rows].tolist()[1:]
    assert [result.found_text.text[row] for row in rows] == [
        ModelView(tiny.bridge("gpt2")).token_texts([i])[0] for i in result.found[rows].tolist()
    ]
    single = lp.InputReconstruction(0, **QUICK).run(tiny.bridge("gpt2"), TEXT, progress=False)
    assert "drawn by frequency" not in {trace.name for trace in single.figure().data}


@pytest.mark.usefixtures("as_users_run_it")
def test_what_cannot_be_asked_is_said():
    ask = lp.InputReconstruction
    with pytest.raises(ValueError, match=r"\(method=...\) must be 'gradient' or 'sequential'; got 'best'"):
        ask(1, method="best")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"\(loss=...\) must be 'cosine', 'l1' or 'l2'; got 'mse'"):
        ask(1, loss="mse")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"\(restarts=...\) must be a whole number, 1 or more; got 0"):
        ask(1, restarts=0)
    with pytest.raises(ValueError, match=r"\(tolerance=...\) must be a number above 0 or None; got -1"):
        ask(1, tolerance=-1)
    with pytest.raises(ValueError, match="every state depends on later ones too: use method='gradient'"):
        sequential(1).run(tiny.bridge("bert"), TEXT)
    with pytest.raises(ValueError, match="layer 3 is out of range: tiny-gpt2 has layers 0 to 2"):
        ask(3).run(tiny.bridge("gpt2"), TEXT)
    with pytest.raises(ValueError, match="got special tokens only in prompt 0: pass text"):
        ask(1).run(tiny.bridge("llama"), [[1]], progress=False)


def test_candidates_are_checked_in_batches_after_a_prefix_computed_once(monkeypatch):
    calls = []

    class Counting(soft_tokens.Continuation):
        def __init__(self, view, prefix, name):
            calls.append(len(prefix))
            super().__init__(view, prefix, name)

    monkeypatch.setattr(soft_tokens, "Continuation", Counting)
    result = sequential(1).run(tiny.bridge("gpt2"), TEXT, progress=False)
    assert calls == list(range(int(result.token.special.sum()), len(result.token)))


def test_a_key_value_cache_that_stays_empty_costs_time_and_no_token(monkeypatch):
    monkeypatch.setattr(DynamicCache, "update", lambda cache, keys, values, *_, **__: (keys, values))
    with pytest.warns(UserWarning, match="tiny-llama must hold all .*; with .* it holds 0: whole prompts") as caught:
        result = sequential(1).run(tiny.bridge("llama"), TEXT, progress=False)
    assert result.exact.tolist() == [1.0] and len(caught) == 1
