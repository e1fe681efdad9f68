"""TopicActivity: its numbers by hand and far from zero, planted units found, what groups take away, pictures."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats

import lens_probes as lp
from lens_probes.examples import tiny
from lens_probes.maths.topic_effects import contrast, selectivity, standardised
from lens_probes.model import ModelView
from lens_probes.probes.topic_activity import activity
from lens_probes.testing import TOPICS, assert_same


def of_values(values, topics, last_text=None):
    """A result whose mean activity is given, `[layer prompt unit]`; one label of the last token a prompt."""
    n_layers, n, n_units = values.shape
    names = tuple(dict.fromkeys(topics))
    members = torch.tensor([[topic == name for topic in topics] for name in names]).double()
    text = tuple(f"prompt {i}" for i in range(n))
    sums = torch.einsum("tp,lpu->ltu", members, values.double())
    return lp.TopicActivityResult(
        component="head",
        pool="mean",
        layer=tuple(map(str, range(n_layers))),
        unit=tuple(f"H{i}" for i in range(n_units)),
        topic=names,
        prompt=lp.PromptTable(
            torch.arange(n), text, tuple(topics), torch.ones(n, dtype=torch.int64), last_text or ("",) * n
        ),
        count=members.sum(1),
        mean_sum=sums,
        square_sum=sums,
        positive_sum=sums,
        abs_sum=sums,
        mean=values,
        std=torch.zeros_like(values),
        positive=torch.zeros_like(values),
        mean_abs=values.abs(),
    )


def planted(seed, height, prompts=20, units=6):
    """Noise of deviation 1 a unit; unit 2 of layer 1 is `height` higher in topic b."""
    random = torch.Generator().manual_seed(seed)
    topics = [name for name in "abc" for _ in range(prompts)]
    values = torch.randn(2, len(topics), units, generator=random)
    values[1, [topic == "b" for topic in topics], 2] += height
    return of_values(values, topics)


@pytest.fixture
def few_resamples(monkeypatch):
    monkeypatch.setattr(lp.inference, "RESAMPLES", 5)


# What is measured


def test_five_numbers_of_two_prompts_by_hand():
    x = torch.tensor([[[1.0, -1.0]], [[3.0, 1.0]], [[-2.0, 2.0]]])  # three tokens, one unit of two dimensions
    weights = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]])
    found = activity(x, weights, torch.tensor([0, 0, 1]))
    assert found.mean.tolist() == [[1.0], [0.0]]
    assert found.variance.tolist() == [[2.0], [4.0]]
    assert found.positive.tolist() == [[0.75], [0.5]]
    assert found.mean_abs.tolist() == [[1.5], [2.0]]


def test_prompts_and_topics_agree_with_numpy_on_every_class(decoder):
    model = decoder.build()
    result = lp.TopicActivity().run(model, TOPICS)
    tokens = lp.RankShift(at="resid_post").run(model, TOPICS).token
    z = {}
    for number, text in enumerate(text for texts in TOPICS.values() for text in texts):
        ids = tokens.id[tokens.prompt == number]
        _, cache = model.run_with_cache(ids[None])
        z[number] = cache["blocks.2.attn.hook_z"][0, ~tokens.special[tokens.prompt == number], 3].detach().numpy()
        assert text.split()[0] in result.prompt.text[number]
    for number, values in z.items():
        expected = (values.mean(), values.std(), np.sqrt((values**2).mean()), (values > 0).mean(), abs(values).mean())
        found = [result.of_prompts(name)[2, number, 3] for name in ("mean", "std", "rms", "positive", "mean_abs")]
        assert [float(each) for each in found] == pytest.approx(expected, abs=1e-5)
    food = [z[number] for number in range(4, 8)]
    second = np.mean([(values**2).mean() for values in food])
    first = np.mean([values.mean() for values in food])
    assert float(result.topic_rms[2, 1, 3]) == pytest.approx(np.sqrt(second), abs=1e-5)
    assert float(result.topic_std[2, 1, 3]) == pytest.approx(np.sqrt(second - first**2), abs=1e-5)
    assert float(result.topic_mean[2, 1, 3]) == pytest.approx(first, abs=1e-5)


@pytest.mark.parametrize("keep_rows", [True, False])
def test_a_deviation_of_one_around_a_thousand_is_one(keep_rows):
    around = 1000 + torch.randn(4, 4000, 1, generator=torch.Generator().manual_seed(0))
    probe = lp.TopicActivity(component="neuron", layers=[0], keep_rows=keep_rows)
    merged = lp.TopicActivityResult.merge([probe.measure(reading_of(values)) for values in around])
    assert float(merged.topic_std) == pytest.approx(float(around.double().std(unbiased=False)), abs=1e-3)
    assert float(merged.topic_mean) == pytest.approx(1000, abs=0.1)
    if keep_rows:
        expected = around.double().std(dim=1, unbiased=False)[None]
        torch.testing.assert_close(merged.std.double(), expected, rtol=0, atol=1e-3)


def reading_of(values):
    """One prompt whose neurons in layer 0 have these values, `[token unit]`."""
    n = len(values)
    tokens = lp.Tokens(
        prompt=torch.zeros(n, dtype=torch.int64),
        position=torch.arange(n),
        id=torch.arange(n),
        text=("x",) * n,
        word=torch.zeros(n, dtype=torch.int64),
        word_class=("",) * n,
        special=torch.zeros(n, dtype=torch.bool),
        topic=("t",) * n,
        document=torch.zeros(n, dtype=torch.int64),
    )
    view = ModelView(tiny.bridge("gpt2"))
    hook = view.hook_neurons(0)
    return lp.Reading(view, tokens, {hook: values[None]}, torch.ones(1, n, dtype=torch.bool), {"0": hook})


def test_embeddings_are_those_of_the_words_alone(raw):
    model = raw.build()
    result = lp.TopicActivity(component="embed").run(model, TOPICS)
    tokens = lp.RankShift(at="resid_post").run(model, TOPICS).token
    counted = (tokens.prompt == 0) & ~tokens.special
    rows = lp.ModelView(model).W_E[tokens.id[counted]]
    ratio = result.mean[0, 0] / rows.mean(0)  # Gemma's states are W_E times the square root of d_model
    torch.testing.assert_close(ratio, torch.full_like(ratio, float(ratio.median())), rtol=1e-3, atol=0)
    assert result.layer == ("embed",) and result.unit[:2] == ("d0", "d1")


# Which units


def test_effects_by_hand():
    values = torch.tensor([[0.0, 5.0], [2.0, 5.0], [4.0, 5.0], [6.0, 5.0]])
    own = torch.tensor([[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0]])
    # Means 1 and 5 around 3: variance between topics 4, in all (9 + 1 + 1 + 9) / 4 = 5; chance is 1 / 3.
    assert selectivity(values, own).tolist() == [pytest.approx((0.8 - 1 / 3) / (1 - 1 / 3)), 0.0]
    assert contrast(values, own, 1).tolist() == [pytest.approx(4 / 5**0.5), 0.0]
    assert standardised(values, torch.zeros(4, dtype=torch.int64))[:, 1].tolist() == [0.0] * 4


@pytest.mark.trials
@pytest.mark.usefixtures("few_resamples")
def test_a_unit_that_is_more_active_by_one_and_a_half_deviations_is_found():
    found = 0
    for seed in range(100):
        first = planted(seed, 1.5).most_active("b", 1, statistic="mean", permutations=99, seed=seed).iloc[0]
        found += (first["layer"], first["unit"]) == ("1", "H2") and first["p_max"] < 0.05
    assert found >= 95
    least = planted(0, -2.0).least_active("b", 1, statistic="mean", permutations=99).iloc[0]
    assert (least["layer"], least["unit"]) == ("1", "H2") and least["effect"] < -1


@pytest.mark.trials
@pytest.mark.usefixtures("few_resamples")
def test_without_it_the_largest_unit_is_found_as_often_as_chance_allows():
    contrasted = shared = 0
    for seed in range(1000, 1200):
        result = planted(seed, 0.0)
        contrasted += bool(
            (result.most_active("b", 12, statistic="mean", permutations=99, seed=seed)["p_max"] < 0.05).any()
        )
        shared += bool((result.selectivity(statistic="mean", permutations=99, seed=seed)["p_max"] < 0.05).any())
    assert contrasted <= 18 and shared <= 18


def test_chance_gives_no_selectivity_in_a_resample_either():
    noise = torch.randn(30, 4000, generator=torch.Generator().manual_seed(0))
    own = torch.eye(3).repeat_interleave(10, dim=1)
    assert float(selectivity(noise, own).mean()) == pytest.approx(0, abs=0.003)
    times = torch.from_numpy(np.random.default_rng(0).multinomial(30, np.full(30, 1 / 30), size=20)).float()
    drawn = selectivity(noise, own * times[:, None])
    assert float(drawn.mean()) == pytest.approx(0, abs=0.01)


@pytest.mark.trials
def test_intervals_hold_the_truth_about_as_often_as_they_say():
    # Topics 1 SD apart in their means: the share of the variance between them is 0.4 of all, in a large sample.
    held = [0, 0]
    for seed in range(40):
        for which, height in enumerate((0.0, 1.0)):
            random = torch.Generator().manual_seed(seed)
            topics = [name for name in "abc" for _ in range(20)]
            values = torch.randn(1, 60, 8, generator=random)
            values += height * torch.tensor([ord(name) - ord("b") for name in topics])[None, :, None]
            table = of_values(values, topics).selectivity(statistic="mean", permutations=1)
            held[which] += int(((table["low"] <= (0, 0.4)[which]) & (table["high"] >= (0, 0.4)[which])).sum())
    assert held[0] > 0.85 * 320 and held[1] > 0.85 * 320


def test_intervals_hold_the_effect_and_the_order_of_prompts_changes_nothing():
    model = tiny.bridge("llama")
    six = {topic: [*texts, *(f"Then {text}" for text in texts[:2])] for topic, texts in TOPICS.items()}
    assert lp.TopicActivity().run(model, TOPICS).selectivity(permutations=9)["low"].isna().all()  # four prompts a topic
    table = lp.TopicActivity().run(model, six).selectivity(permutations=49)
    assert (table["low"] < table["high"]).all()
    turned = {topic: texts[::-1] for topic, texts in reversed(six.items())}
    again = lp.TopicActivity().run(model, turned).selectivity(permutations=49)
    for column in ("effect", "low", "high", "p", "p_max"):
        assert table[column].tolist() == pytest.approx(again[column].tolist(), abs=1e-3), column
    assert "permuted" in table.attrs["null"]


def test_q_is_the_false_discovery_rate_over_units_and_a_unit_without_a_value_has_none():
    result = planted(0, 2.5)
    broken = replace(result, mean=result.mean.clone())
    broken.mean[0, 3, 4] = float("nan")  # one prompt is enough
    rest = [unit for unit in range(12) if unit != 4]
    for ask in (
        lambda each: each.selectivity(statistic="mean", permutations=99),
        lambda each: each.most_active("b", 12, statistic="mean", permutations=99).sort_values(["layer", "unit"]),
    ):
        whole, table = (ask(each).reset_index(drop=True) for each in (result, broken))
        assert whole["q"].tolist() == stats.false_discovery_control(whole["p"]).tolist()
        assert table.loc[4, ["effect", "low", "high", "p", "q", "p_max"]].isna().all()
        assert table["q"][rest].tolist() == stats.false_discovery_control(table["p"][rest]).tolist()
        for column in ("effect", "p"):
            assert table[column][rest].tolist() == whole[column][rest].tolist()
        assert (table["p_max"][rest] <= whole["p_max"][rest]).all() and table["p_max"][8] < 0.05


def test_what_the_last_token_explains_is_no_topic_within_last_tokens():
    topics = ["ab"[i % 2] for i in range(40)]
    last = tuple("?" if (i % 2) ^ (i % 5 == 0) else "." for i in range(40))
    noise = torch.randn(40, generator=torch.Generator().manual_seed(0))
    values = noise + 6 * torch.tensor([text == "?" for text in last])
    result = of_values(values[None, :, None], topics, last)
    assert result.selectivity(statistic="mean", permutations=199)["p"][0] < 0.05
    within = result.selectivity(statistic="mean", permutations=199, groups=result.prompt.last_text)
    assert within["p"][0] > 0.05 and within["effect"][0] < 0.2
    twice = [*result.prompt.text[:39], result.prompt.text[37]]
    repeated = replace(result, prompt=replace(result.prompt, text=tuple(twice)))
    with pytest.raises(ValueError, match="each prompt must be given once; got 'prompt 37' several times"):
        repeated.selectivity()


def test_many_units_are_judged_in_parts_like_few(monkeypatch):
    result = planted(0, 2.0)
    whole = result.selectivity(statistic="mean", permutations=49)
    monkeypatch.setattr("lens_probes.result.topics.UNITS_AT_ONCE", 5)
    parts = result.selectivity(statistic="mean", permutations=49, progress=False)
    for column in ("effect", "low", "high", "p", "p_max"):
        assert parts[column].tolist() == pytest.approx(whole[column].tolist(), abs=1e-6)


def test_an_untrained_model_has_the_same_shape_and_is_seeded():
    model = tiny.bridge("gpt2", processed=True)
    first, again, other = (lp.untrained(model, seed=seed) for seed in (0, 0, 1))
    results = [lp.TopicActivity(component="neuron").run(each, TOPICS) for each in (first, again, other, model)]
    assert_same(results[0], results[1], "the same seed")
    assert results[0].mean.shape == results[3].mean.shape
    assert not torch.allclose(results[0].mean, results[2].mean, atol=1e-3)
    assert results[0].provenance.model == "untrained-tiny-gpt2" and results[0].provenance.processed
    state = torch.random.get_rng_state()
    half = lp.untrained(tiny.bridge("llama", dtype=torch.bfloat16))
    assert torch.equal(torch.random.get_rng_state(), state)
    frequencies = [part.inv_freq.dtype for part in half.original_model.modules() if hasattr(part, "inv_freq")]
    assert half.W_E.dtype == torch.bfloat16 and set(frequencies) == {torch.float32}


# Refusals and figures


@pytest.mark.usefixtures("as_users_run_it")
def test_what_cannot_be_asked_is_said():
    with pytest.raises(ValueError, match=r"component=...\) must be 'head', .*'neuron' or 'embed'; got 'mlp'"):
        lp.TopicActivity(component="mlp")
    with pytest.raises(
        ValueError, match=r"TopicActivity\(pool=...\) must be 'mean' or 'last' or a whole number; got 'max'"
    ):
        lp.TopicActivity(pool="max")
    with pytest.raises(ValueError, match=r"must be None for component='embed', which has no layers; got \[1\]"):
        lp.TopicActivity(component="embed", layers=[1])
    result = planted(0, 1.0)
    with pytest.raises(ValueError, match="topic must be one of 'a', 'b', 'c'; got 'd'"):
        result.most_active("d")
    with pytest.raises(ValueError, match="statistic must be one of mean, std, rms, positive, mean_abs; got 'max'"):
        result.selectivity(statistic="max")
    sums = lp.TopicActivity(keep_rows=False).run(tiny.bridge("gpt2"), TOPICS)
    assert sums.rms is None and "rms" not in sums.shown()
    for ask in (sums.selectivity, lambda: sums.most_active("food"), sums.contrast, lambda: sums.of_prompts("rms")):
        with pytest.raises(ValueError, match=r"run TopicActivity\(keep_rows=True\)"):
            ask()
    with pytest.raises(TypeError, match="unexpected keyword argument 'permutation'"):
        sums.most_active("food", permutation=9)  # pyright: ignore[reportCallIssue]
    with pytest.raises(ValueError, match="prompts must have two topics or more to compare; got 1: pass them as"):
        lp.TopicActivity().run(tiny.bridge("gpt2"), ["One text.", "Another one."]).selectivity()


@pytest.mark.usefixtures("as_users_run_it")
def test_layers_of_different_widths_are_refused(monkeypatch):
    read = lp.Reading.__getitem__
    monkeypatch.setattr(
        lp.Reading, "__getitem__", lambda reading, name: read(reading, name)[:, : 64 if ".1." in name else None]
    )
    with pytest.raises(ValueError, match="must have as many units as each other; got 64 and 128 in tiny-gpt2: ask"):
        lp.TopicActivity(component="neuron").run(tiny.bridge("gpt2"), TOPICS)
    lp.TopicActivity(component="neuron", layers=[0, 2]).run(tiny.bridge("gpt2"), TOPICS)


def test_every_topic_has_its_grid_on_one_scale():
    result = planted(0, 3.0)
    figure = result.figure()
    assert len(figure.data) == 3 and [grid.showscale for grid in figure.data] == [True, False, False]
    expected = result.contrast()
    for number, grid in enumerate(figure.data):
        assert [list(row) for row in grid.z] == expected[:, number].tolist()
    assert {(-grid.zmin, grid.zmax) for grid in figure.data} == {(largest := float(expected.abs().max()), largest)}
    assert [note.text for note in figure.layout.annotations][:3] == ["a", "b", "c"]


def test_the_table_of_a_test_draws_itself_and_of_many_units_those_with_the_smallest_q():
    result = planted(0, 3.0)
    table = result.selectivity(statistic="mean", permutations=499)
    (grid,) = result.figure_test(table).data
    assert [value for row in grid.z for value in row] == table["effect"].tolist()
    assert [list(row) for row in grid.text] == [[""] * 6, ["", "", "*", "", "", ""]]
    (part,) = result.figure_test(result.most_active("b", 1, statistic="mean", permutations=499)).data
    assert list(part.x) == ["H2"] and part.z[0][0] is None and part.text[1][0] == "*"
    wide = planted(0, 3.0, units=60)
    table = wide.most_active("b", 120, statistic="mean", permutations=99)
    figure = wide.figure_test(table)
    assert "H2" in figure.data[0].x and len(figure.data[0].x) <= 40
    assert "contrast of mean for 'b'" in figure.layout.title.text.lower()
    with pytest.raises(ValueError, match="got no column 'layer': pass what a test returned"):
        wide.figure_test(table.drop(columns="layer"))
    with pytest.raises(ValueError, match="got several rows per cell: pass what a test returned"):
        wide.figure_test(table.iloc[[0, 0]])


def test_a_table_without_a_name_is_of_what_the_run_has():
    rows, sums = (lp.TopicActivity(keep_rows=keep).run(tiny.bridge("gpt2"), TOPICS) for keep in (True, False))
    assert {"prompt", "mean", "std", "rms", "positive", "mean_abs"} <= set(rows.to_frame())
    assert {"topic", "topic_mean", "topic_rms"} <= set(sums.to_frame())


def test_more_neurons_than_can_be_drawn_stand_from_the_highest_to_the_lowest():
    result = lp.TopicActivity(component="neuron").run(tiny.bridge("llama"), TOPICS)
    grid = result.figure().data[0]
    values = result.contrast()[1, 0]
    assert len(grid.z[1]) == 21 and list(grid.z[1]) == sorted(grid.z[1], reverse=True)
    assert grid.z[1][0] == float(values.max()) and grid.z[1][-1] == float(values.min())
    blocks = lp.TopicActivity(component="mlp_out").run(
        tiny.bridge("llama"), {"<b>": ["a b", "c d"], "x y": ["e f", "g h"]}
    )
    figure = blocks.figure()
    assert list(figure.data[0].y) == ["&lt;b&gt;", "x y"]


def test_the_mean_of_the_null_and_the_family_wise_p_are_those_of_the_permuted_effects(few_resamples):
    result = planted(0, 1.0)
    table = result.selectivity(permutations=50, progress=False)
    order = result.by_topic()
    values = standardised(
        result.mean_abs[:, order.order].transpose(0, 1).flatten(1), torch.from_numpy(order.group_or_one)
    )
    drawn = torch.cat([selectivity(values, some.float()) for some in order.permutations(50, seed=0)]).double().numpy()
    np.testing.assert_allclose(table["null_mean"], drawn.mean(0), atol=1e-6)  # with its sign: epsilon may be negative
    assert (table["null_mean"] < 0).any()
    as_large = np.abs(drawn).max(1)[:, None] >= np.abs(table["effect"].to_numpy()) - 1e-6
    np.testing.assert_allclose(table["p_max"], (as_large.sum(0) + 1) / 51)
    assert (table["p_max"] > table["p"]).any()
