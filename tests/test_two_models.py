"""The difference of two models: by hand, aligned by token, calibrated, and a planted twin that is found."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

import lens_probes as lp
from lens_probes.maths import inference
from lens_probes.text.prompts import tokenize

TEXTS = {
    "animals": ["the cat sat on the mat", "a dog ran in the park", "the bird sang at dawn", "a horse fell on ice",
                "the fish swam in the lake"],
    "food": ["the bread rose in the heat", "a soup boiled on the stove", "the cake was cut in two", "some tea was cold",
             "the rice is in a bowl"],
}  # fmt: skip


def lens(model: Any, prompts: Any = TEXTS) -> lp.LogitLensResult:
    return lp.LogitLens().run(model, prompts, progress=False)


@pytest.fixture(scope="module")
def pair() -> tuple[lp.LogitLensResult, lp.LogitLensResult]:
    return lens(lp.tiny.bridge(seed=0)), lens(lp.tiny.bridge(seed=1))


def test_a_model_and_itself_do_not_differ_and_the_sign_is_second_minus_first(pair: Any) -> None:
    one, other = pair
    same = lp.difference(one, one, "log_prob")
    assert np.nanmax(np.abs(same.values)) == 0
    table = same.test()
    assert (table["effect"] == 0).all()
    assert table[["low", "high", "p"]].isna().all(axis=None)  # nothing varies: there is no interval

    there, back = (lp.difference(*results, "log_prob").values for results in ((one, other), (other, one)))
    np.testing.assert_array_equal(there, -back)
    np.testing.assert_array_equal(there, (other.log_prob.double() - one.log_prob.double()).numpy())


def of_texts(texts: list[str]) -> lp.Tokens:
    return tokenize(texts, lp.ModelView(lp.tiny.bridge()), prepend_bos=False)


def test_the_mean_of_types_and_of_tokens_by_hand() -> None:
    """Values 1, 2 and 3, 5. Tokens: 11/4. Types: "the" (1 + 3 + 5) / 3 = 3, "in" 2, mean 5/2."""
    tokens = of_texts(["the in", "the the"])
    assert inference.forms(tokens) == ("the", "in", "the", "the")
    values = np.array([[1.0, 2.0, 3.0, 5.0]])
    assert inference.means(values, tokens, weigh="tokens")["mean"][0] == pytest.approx(11 / 4)
    table = inference.means(values, tokens)
    assert table["mean"][0] == pytest.approx(5 / 2)
    assert np.isnan([table["low"][0], table["p"][0]]).all()  # fewer than five prompts
    assert table[["tokens", "types", "prompts"]].to_numpy().tolist() == [[4, 2, 2]]


def test_where_each_token_is_its_own_prompt_and_type_it_is_students_t_but_for_the_cells() -> None:
    """Vp = Vt = n/(n-1) S and Vc = S, the sum of squares: V is (n+1)/n times that of Student's t."""
    tokens = of_texts([" the", " a", " in", " on", " was", " had", " that", " and", " she", " we"])
    assert len(set(inference.forms(tokens))) == len(tokens) == 10
    values = np.random.default_rng(0).normal(0.5, 1.0, size=(3, 10))
    table, wider = inference.means(values, tokens), np.sqrt(11 / 10)
    low, high = inference.mean_interval(values)
    np.testing.assert_allclose(table["high"] - table["low"], wider * (high - low))
    t = stats.ttest_1samp(values, 0.0, axis=1).statistic
    np.testing.assert_allclose(table["p"], 2 * stats.t.sf(np.abs(t) / wider, 9))


def test_a_twin_that_was_trained_on_one_topic_is_found_on_that_topics_words(pair: Any) -> None:
    plain, _ = pair
    twin = lp.tiny.bridge(seed=0)
    weights = [each for each in twin.parameters() if each.is_floating_point()]
    for each in weights:
        each.requires_grad_(True)
    steps = torch.optim.Adam(weights, lr=1e-3)
    tokens = [torch.tensor([prompt.id.tolist()]) for _, prompt in plain.token.by_prompt() if prompt.topic[0] == "food"]
    for _ in range(6):
        for ids in tokens:
            steps.zero_grad()
            logits = twin(ids)
            torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:]).backward()
            steps.step()
    found = lp.difference(plain, lens(twin), "log_prob")
    last = found.test("topic").query(f"layer == '{plain.layer[-1]}'").set_index("topic")
    assert last.loc["food", "low"] > 0
    assert last.loc["food", "q"] < 0.05
    assert last.loc["food", "effect"] > 2 * abs(last.loc["animals", "effect"])
    of_food = {word for text in TEXTS["food"] for word in text.split()}
    assert set(found.word_types()["type"][:5]) <= of_food | {"food"}


def test_results_of_heads_and_of_prompts_have_a_difference_and_a_grid() -> None:
    results = [lp.ResidualUpdate().run(lp.tiny.bridge(seed=seed), TEXTS, progress=False) for seed in (0, 1)]
    found = lp.difference(*results, "agreement")
    own = (results[1].agreement.double() - results[0].agreement.double()).mean(1)
    np.testing.assert_allclose(found.test()["effect"], own)
    assert list(found.test("topic")["topic"].unique()) == ["animals", "food"]
    assert len(found.figure().data) > 0

    ranks = [lp.HeadValueRank().run(lp.tiny.bridge(seed=seed), TEXTS, progress=False) for seed in (0, 1)]
    heads = lp.difference(*ranks, "other_margin")
    assert heads.axes == ("layer", "head")
    assert len(heads.test()) == len(ranks[0].layer) * len(ranks[0].head)
    assert heads.figure().data[0].type == "heatmap"


def test_figures_name_the_quantity_and_draw_an_interval(pair: Any) -> None:
    found = lp.difference(*pair, "log_prob")
    figure = found.figure("topic")
    assert {"animals", "food", "no difference"} <= {trace.name for trace in figure.data}
    assert "tiny-gpt2 minus tiny-gpt2" in figure.layout.title.text
    lines = [trace for trace in figure.data if trace.name in ("animals", "food") and trace.line.color]
    assert len({trace.line.color for trace in lines}) == 2
    assert found.figure_prompt(1).data[0].type == "heatmap"


def test_what_cannot_be_compared_is_refused_in_a_sentence(pair: Any) -> None:
    one, other = pair
    with pytest.raises(TypeError, match="of one class must be compared; got LogitLensResult and RankShiftResult"):
        lp.difference(one, lp.RankShift().run(lp.tiny.bridge(), TEXTS, progress=False))
    with pytest.raises(ValueError, match="got other token ids"):
        lp.difference(one, lens(lp.tiny.bridge(), ["another text"]))
    with pytest.raises(ValueError, match="of a LogitLensResult; got 'top_ids'"):
        lp.difference(one, other, "top_ids")
    steps = [lp.ResidualUpdate().run(lp.tiny.bridge(seed=seed), TEXTS, progress=False) for seed in (0, 1)]
    with pytest.raises(ValueError, match="by must be 'topic', or for tokens 'word_class'; got 'word_class'"):
        lp.difference(*steps, "agreement").test("word_class")
    fewer = dataclasses.replace(one.provenance, probe="LogitLens(top_k=0)")
    with pytest.raises(ValueError, match="with the same settings"):
        lp.difference(one, dataclasses.replace(other, provenance=fewer))
    with pytest.raises(ValueError, match="or prompt: none of a KeyValueOverlapResult"):
        lp.difference(*[lp.KeyValueOverlap().run(lp.tiny.bridge(seed=seed), TEXTS) for seed in (0, 1)])


def test_missing_values_are_left_out_and_a_row_without_any_is_no_row(pair: Any) -> None:
    one, other = pair
    last = lp.difference(one, other, "log_prob")
    table = last.test(weigh="tokens")
    known = ~np.isnan(last.values).all(axis=0) & ~one.token.special.numpy()
    assert (table["tokens"] == known.sum()).all()
    np.testing.assert_allclose(table["effect"], np.nanmean(last.values[:, known], axis=1))


@pytest.mark.trials
def test_intervals_hold_zero_with_effects_of_prompts_of_types_and_of_both() -> None:
    """At most 6.5 % of 2,000 intervals of a true 0 may miss it, whatever varies; binomial error is 0.5 %."""
    random = np.random.default_rng(0)
    words = [f"w{n}" for n in range(40)]
    texts = [" ".join(random.choice(words, size=12)) for _ in range(30)]
    tokens = tokenize(texts, lp.ModelView(lp.tiny.bridge()), prepend_bos=False)
    prompt = tokens.prompt.numpy()
    _, form = np.unique(np.asarray(inference.forms(tokens)), return_inverse=True)
    draws = 2000
    for of_prompts, of_types in ((1.0, 0.0), (0.0, 1.0), (1.0, 1.0)):
        values = random.normal(size=(draws, len(tokens)))
        values += of_prompts * random.normal(size=(draws, 30))[:, prompt]
        values += of_types * random.normal(size=(draws, form.max() + 1))[:, form]
        missed = (inference.means(values, tokens)["p"] < 0.05).mean()
        assert missed < 0.065, (of_prompts, of_types, missed)
