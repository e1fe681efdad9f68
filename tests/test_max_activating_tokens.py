"""MaxActivatingTokens: brute force, ascents that climb, the path past all layers, contexts, resuming, refusals."""

from dataclasses import replace
from typing import Any

import pandas as pd
import pytest
import torch
from transformers import DynamicCache

import lens_probes as lp
from lens_probes import soft_tokens
from lens_probes.examples import tiny
from lens_probes.model import ModelView
from lens_probes.soft_tokens import Varied
from lens_probes.testing import PROMPTS, assert_same

TEXT = "The old man the boat."


def features(layer: Any = 1, units=(3, 5), **settings):
    return lp.MaxActivatingTokens(layer, units, **{"steps": 3, "restarts": 2} | settings)


@pytest.mark.parametrize("position", [0, 2, -1, None])
def test_the_complete_search_is_brute_force(raw, position):
    model = raw.build()
    view = ModelView(model)
    result = features(position=position).run(model, TEXT, progress=False)
    ids, name = result.token.id, view.hook_neurons(1)
    place = ~result.token.special if position is None else torch.zeros(len(ids), dtype=torch.bool)
    if position is not None:
        place[position] = True
    for candidate in (0, 17, 399):
        prompt = torch.where(place, candidate, ids)[None]
        neurons = view.activations(prompt, torch.ones_like(prompt, dtype=torch.bool), [name])[name][0]
        expected = neurons[place][:, [3, 5]].mean(0)
        torch.testing.assert_close(result.value[0, :, candidate], expected, rtol=1e-4, atol=2e-5)
    if position is not None:
        own = ids[position]
        torch.testing.assert_close(
            result.value[0, :, own],
            view.activations(ids[None], torch.ones(1, len(ids), dtype=torch.bool), [name])[name][0][position, [3, 5]],
            rtol=1e-4,
            atol=2e-5,
        )


def test_the_model_classes_agree():
    for processed in (False, True):
        try:
            hooked = tiny.hooked("llama", processed=processed)
        except ImportError:
            return  # TransformerLens 4 has one class
        one, other = (
            features().run(model, TEXT, progress=False) for model in (hooked, tiny.bridge("llama", processed=processed))
        )
        torch.testing.assert_close(one.value, other.value, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(one.pull, other.pull, rtol=1e-3, atol=1e-4)


def test_units_dimensions_and_directions_are_read_alike():
    model = tiny.bridge("gpt2")
    dimensions = features(at="resid_post", units=[4, 9]).run(model, TEXT, progress=False)
    directions = features(at="resid_post", units=None, directions=torch.eye(32)[[4, 9]]).run(
        model, TEXT, progress=False
    )
    torch.testing.assert_close(dimensions.value, directions.value, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(dimensions.path, directions.path)
    torch.testing.assert_close(dimensions.path, ModelView(model).token_embeddings[:, [4, 9]].T)
    every = features(at="resid_post", units=None).run(model, TEXT, progress=False)
    whole = features(at="resid_post", units=range(32)).run(model, TEXT, progress=False)
    torch.testing.assert_close(every.value[:, 0], whole.value.sum(1), rtol=1e-4, atol=1e-4)


def test_where_blocks_do_nothing_a_dimension_is_the_embedding_and_the_ascent_finds_it(idle):
    result = features(2, at="resid_post", units=[4], steps=100).run(idle, TEXT, progress=False)
    torch.testing.assert_close(result.value[0], result.path, rtol=1e-5, atol=1e-5)
    row = result.embedding_path().iloc[0]
    assert row["rho"] == pytest.approx(1) and row["common"] == 1 and row["chance"] == 10 / 400
    own = torch.zeros(len(result.token))
    own[-1] = 1
    torch.testing.assert_close(result.pull[:, 0], own)  # d e[4] / d e is one, and no other token has a part in it
    length = ModelView(idle).token_embeddings.norm(dim=-1).median()
    assert float(result.ascended) == pytest.approx(float(length), rel=0.05)  # the whole length along one dimension
    row = result.agreement().iloc[0]
    assert row["percentile"] > 0.95 and row["best_minus_found"] >= 0


def test_the_ascent_climbs_and_later_tokens_do_not_pull():
    model = tiny.bridge("llama")
    short, long = (features(steps=steps).run(model, list(PROMPTS), progress=False) for steps in (1, 60))
    assert (long.ascended > short.ascended).all()
    middle = features(position=4).run(model, TEXT, progress=False)
    assert (middle.pull[5:] == 0).all() and (middle.pull[:5] > 0).all()
    assert (middle.nearest[4] >= 0).all() and (middle.nearest[:4] == -1).all()
    both = features(position=4).run(tiny.bridge("bert"), TEXT, progress=False)
    assert (both.pull > 0).all()


def test_agreement_and_top_by_hand():
    result = features(k=1).run(tiny.bridge("gpt2"), [[5, 6], [7, 8]], progress=False)
    value = torch.arange(400.0).expand(2, 2, 400).clone()
    value[1, 0] = 399 - value[1, 0]  # unit 3 has the opposite order in the second prompt
    nearest = torch.tensor([[[-1], [-1]], [[399], [99]], [[-1], [-1]], [[399], [399]]])
    by_hand = replace(result, value=value, nearest=nearest)
    table = by_hand.agreement().set_index("unit")
    assert table.loc["3", ["same", "percentile", "prompts"]].tolist() == [0.5, pytest.approx(399 / 400 / 2), 2]
    assert table.loc["5", "percentile"] == pytest.approx((99 + 399) / 800)
    assert table.loc["5", "best_minus_found"] == pytest.approx((300 + 0) / 2)
    top = by_hand.top(5, k=2)
    assert top["id"].tolist() == [399, 398] and top["value"].tolist() == [399, 398] and top["prompts"].eq(2).all()
    with pytest.raises(ValueError, match="unit must be one of 3, 5, by label or number; got 4"):
        by_hand.top(4)


def test_an_interrupted_search_goes_on_where_it_stopped(monkeypatch):
    model, experiment = tiny.bridge("gpt2"), features()
    whole = experiment.run(model, list(PROMPTS[:2]), progress=False)
    monkeypatch.setattr(soft_tokens, "TOKENS_PER_BATCH", 100)
    original, calls = Varied.states, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(Varied, "states", interrupted)
    part = experiment.run(model, list(PROMPTS[:2]), progress=False)
    assert part.value[:, 0].isnan().sum(1).tolist() == [0, 300]
    assert part.agreement()["prompts"].tolist() == [1, 1] and not part.ascended.isnan().any()
    assert_same(whole, experiment.run(model, list(PROMPTS[:2]), progress=False, resume=part), "without an interrupt")
    assert len(calls) == 6 + 3  # nothing was searched twice
    with pytest.raises(ValueError, match="on the same model and prompts; got one of MaxActivatingTokens"):
        experiment.run(model, TEXT, progress=False, resume=part)
    with pytest.raises(ValueError, match="on the same model and prompts; got one of MaxActivatingTokens"):
        features(seed=1).run(model, list(PROMPTS[:2]), progress=False, resume=part)
    with pytest.raises(ValueError, match="make it with the same model"):
        experiment.run(tiny.bridge("gpt2", seed=1), list(PROMPTS[:2]), progress=False, resume=part)
    split = experiment.run(model, [[50, 60], [70]], progress=False)
    with pytest.raises(ValueError, match="on the same model and prompts; got one of MaxActivatingTokens"):
        experiment.run(model, [[50], [60, 70]], progress=False, resume=split)


def test_figures_show_what_is_stored():
    result = features().run(tiny.bridge("gpt2"), list(PROMPTS), progress=False)
    drawn = result.figure().data[0]
    assert list(drawn.z[0]) == pytest.approx(result.top(3)["value"].tolist())
    figure = result.figure_positions(1)
    assert [sum(row) for row in figure.data[0].z] == pytest.approx([1, 1])
    # With their numbers: tokens that come twice would share a column.
    assert len(set(figure.data[0].x)) == len(figure.data[0].z[0]) == int((result.token.prompt == 1).sum())


def test_what_stands_beside_a_unit_and_in_which_order_prompts_come_changes_nothing():
    model, texts = tiny.bridge("gpt2"), [*PROMPTS, "A dog ran home.", "Salt the water.", "Bees find their way."]
    both = features().run(model, texts, progress=False)
    alone = features(units=[5]).run(model, texts[::-1], progress=False)
    torch.testing.assert_close(both.ascended[:, 1], alone.ascended[:, 0].flip(0))
    pd.testing.assert_frame_equal(both.top(5), alone.top(5))
    pd.testing.assert_frame_equal(both.agreement()[1:].reset_index(drop=True), alone.agreement())


def test_the_highest_of_the_ascents_is_taken(monkeypatch):
    original, states = ModelView.from_embeddings, []

    def noted(*arguments):
        states.append(original(*arguments)[0])
        return states[-1:]

    monkeypatch.setattr(ModelView, "from_embeddings", noted)
    result = features(units=[3], restarts=6).run(tiny.bridge("gpt2"), TEXT, progress=False)
    ends = states[-1][:, -1, 3].detach()
    assert ends.shape == (6,) and result.ascended.item() == pytest.approx(float(ends.max())) and ends.argmax() != 0


@pytest.mark.matrix
def test_the_sum_of_all_neurons_is_added_in_float32():
    rough = tiny.bridge("gpt2", dtype=torch.bfloat16)
    quick = {"position": None, "steps": 1, "restarts": 1}
    every = features(units=None, **quick).run(rough, TEXT, progress=False).value[0, 0]
    whole = features(units=range(128), **quick).run(rough, TEXT, progress=False).value[0].sum(0)
    torch.testing.assert_close(every, whole, rtol=1e-4, atol=1e-3)


def test_bfloat16_has_the_values_of_float32_to_its_rounding():
    exact = features().run(tiny.bridge("llama"), TEXT, progress=False)
    rough = features().run(tiny.bridge("llama", dtype=torch.bfloat16), TEXT, progress=False)
    assert rough.value.dtype == torch.float32 and rough.provenance.dtype == "bfloat16"
    scale = exact.value.abs().max()
    assert (rough.value - exact.value).abs().max() < 0.05 * scale


def test_a_key_value_cache_that_stays_empty_changes_no_value(monkeypatch):
    expected = features(position=-2).run(tiny.bridge("llama"), PROMPTS[:2], progress=False)
    monkeypatch.setattr(DynamicCache, "update", lambda cache, keys, values, *_, **__: (keys, values))
    with pytest.warns(UserWarning, match="tiny-llama must hold all .*; with .* it holds 0: whole prompts") as caught:
        result = features(position=-2).run(tiny.bridge("llama"), PROMPTS[:2], progress=False)
    assert len(caught) == 1  # for both prompts
    torch.testing.assert_close(result.value, expected.value, rtol=1e-5, atol=2e-5)


@pytest.mark.usefixtures("as_users_run_it")
def test_what_cannot_be_asked_is_said():
    for units in ([], [3, 3]):
        with pytest.raises(ValueError, match=r"must name one unit or more, each once"):
            features(units=units).run(tiny.bridge("gpt2"), TEXT)
    for units in (3, [2.5], torch.tensor([3])):
        with pytest.raises(
            TypeError, match=r"\(units=...\) must be a list of whole numbers, such as \[3\] or range\(8\), or"
        ):
            features(units=units)
    with pytest.raises(ValueError, match=r"\(k=...\) must be at most 400, the size of the vocabulary; got 500"):
        features(k=500).run(tiny.bridge("gpt2"), TEXT)
    with pytest.raises(
        TypeError, match=r"\(directions=...\) must be a tensor \[unit d_model\] of floats or None; got <ndarray of"
    ):
        lp.MaxActivatingTokens(1, at="resid_post", directions=torch.eye(32).numpy())  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"\(directions=...\) must be finite; got NaN or Inf"):
        features(units=None, at="resid_post", directions=torch.eye(32) / 0).run(tiny.bridge("gpt2"), TEXT)
    with pytest.raises(ValueError, match=r"\(steps=...\) must be a whole number, 1 or more; got 0"):
        lp.MaxActivatingTokens(1, steps=0)
    with pytest.raises(ValueError, match=r"must have units=None and a read point; got at='neuron'"):
        lp.MaxActivatingTokens(1, directions=torch.eye(32))
    with pytest.raises(ValueError, match=r"unit 128 is out of range: blocks.1.mlp.hook_post of tiny-gpt2 has units 0"):
        features(units=[128]).run(tiny.bridge("gpt2"), TEXT)
    with pytest.raises(ValueError, match=r"\[unit d_model\] with d_model 32; got one of shape \(1, 7\)"):
        features(units=None, at="resid_post", directions=torch.zeros(1, 7)).run(tiny.bridge("gpt2"), TEXT)
    with pytest.raises(ValueError, match="must be a token of every prompt; got 9, and prompt 0 has 1 token:"):
        features(position=9).run(tiny.bridge("gpt2"), [[5]])
    with pytest.raises(TypeError, match="resume= must be a MaxActivatingTokensResult; got 'part': pass what the int"):
        features().run(tiny.bridge("gpt2"), TEXT, resume="part")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="got special tokens only in prompt 0: pass text"):
        features(position=None).run(tiny.bridge("llama"), [[1]])
    with pytest.raises(TypeError, match=r"\(layer=...\) must be a whole number; got '5'"):
        features("5")
    with pytest.raises(ValueError, match="layer 7 is out of range: tiny-gpt2 has layers 0 to 2"):
        features(7).run(tiny.bridge("gpt2"), TEXT)
    with pytest.raises(
        ValueError, match=r"needs units of the residual stream, which contains the embedding; got those of blocks.1"
    ):
        features().run(tiny.bridge("gpt2"), TEXT, progress=False).embedding_path()
    with pytest.raises(
        ValueError, match=r"needs units of the residual stream, which contains the embedding; got those of blocks.1"
    ):
        features(at="attn_out").run(tiny.bridge("gpt2"), TEXT, progress=False).embedding_path()
    with pytest.raises(ValueError, match="must be 1 to 400, the size of the vocabulary; got 401"):
        features(at="resid_mid").run(tiny.bridge("gpt2"), TEXT, progress=False).embedding_path(401)
