"""TopicAblation: a planted topic neuron is found and needed, losses are the model's own, and tables by hand."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats

import lens_probes as lp
from lens_probes.examples import tiny
from lens_probes.experiments.topic_ablation import random_like
from lens_probes.model import ModelView
from lens_probes.model.ablation import Ablation
from lens_probes.reading import prompt_loss
from lens_probes.testing import TOPICS
from lens_probes.text.prompts import tokenize

TEXTS = [text for texts in TOPICS.values() for text in texts]


def of_losses(loss, ablated, random, topics):
    """A result of given losses, `[prompt]`, `[topic prompt]` and `[topic draw prompt]`."""
    n = len(topics)
    names = tuple(dict.fromkeys(topics))
    zeros = torch.zeros(len(names), 1, dtype=torch.int64)
    return lp.TopicAblationResult(
        component="neuron",
        ablation="zero",
        topic=names,
        prompt=lp.PromptTable(
            torch.arange(n), tuple(f"p{i}" for i in range(n)), tuple(topics), torch.full((n,), 5), (".",) * n
        ),
        layer=("0",),
        loss=torch.tensor(loss),
        ablated=torch.tensor(ablated),
        random=torch.tensor(random),
        chosen_layer=zeros,
        chosen_unit=zeros,
        chosen_contrast=zeros.float(),
    )


def test_the_loss_is_the_models_own_whatever_the_batch(decoder):
    model = decoder.build()
    view = ModelView(model)
    tokens = tokenize(TEXTS, view)
    found = prompt_loss(view, tokens)
    for number, own in tokens.by_prompt():
        with torch.no_grad():
            log_prob = model(own.id[None], return_type="logits")[0].float().log_softmax(-1)
        expected = -torch.stack([log_prob[i, own.id[i + 1]] for i in range(len(own) - 1)])
        assert float(found[number]) == pytest.approx(float(expected[~own.special[1:]].mean()), abs=1e-4)


def test_special_tokens_inside_a_prompt_are_not_asked_for():
    view = ModelView(tiny.bridge("gpt2"))
    special = next(iter(view.special_ids))
    ids = [special, 20, 21, special, 22]
    log_prob = view.logits(torch.tensor([ids]), torch.ones(1, 5, dtype=torch.bool))[0].log_softmax(-1)
    expected = -(log_prob[0, 20] + log_prob[1, 21] + log_prob[3, 22]) / 3
    assert float(prompt_loss(view, tokenize([ids], view))[0]) == pytest.approx(float(expected), abs=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_refused_and_the_prompt_named(value):
    model = tiny.bridge("gpt2")
    view = ModelView(model)
    tokens = tokenize([[5, 6, 7], [8, 9, 10, 11]], view)
    assert prompt_loss(view, tokens).isfinite().all()
    name = "blocks.1.hook_resid_post"

    def broken(states):  # both prompts in one batch, padded; only one state of the second breaks
        states = states.clone()
        states[1, -2] = value
        return states

    with pytest.raises(ValueError, match=r"the loss of prompt 1 must be finite; got nan: check the model's weights"):
        prompt_loss(view, tokens, {name: broken})


def test_ablating_is_taking_out_what_the_units_write(decoder):
    model = decoder.build()
    view = ModelView(model)
    ids, mask = torch.arange(5, 15)[None], torch.ones(1, 10, dtype=torch.bool)
    ablate = Ablation(view, [0, 2], "head", torch.zeros(2, 4, view.W_O(0).shape[1]))
    edits = ablate(torch.tensor([4 + 1, 4 + 3]))  # heads 1 and 3 of the second of these layers, layer 2
    assert list(edits) == [view.hook_z(2)]
    with torch.no_grad():
        before = model.run_with_cache(ids)[1]
        hooks = [(view.hook_z(2), lambda x, hook: edits[view.hook_z(2)](x))]
        ablated = model.run_with_hooks(ids, fwd_hooks=hooks, return_type="logits")
    torch.testing.assert_close(view.logits(ids, mask, edits), ablated)
    z = before[view.hook_z(2)].clone()
    changed = edits[view.hook_z(2)](z)
    assert (changed[:, :, [1, 3]] == 0).all() and (changed[:, :, [0, 2]] == z[:, :, [0, 2]]).all()
    assert (ablated - view.logits(ids, mask)).abs().max() > 0.01
    head_means = torch.arange(2 * 4 * z.shape[-1]).float().view(2, 4, -1)
    to_mean = Ablation(view, [0, 2], "head", head_means)(torch.tensor([4 + 1]))[view.hook_z(2)](z)
    assert (to_mean[:, :, 1] == head_means[1, 1]).all() and (to_mean[:, :, 0] == z[:, :, 0]).all()
    mean = torch.arange(24.0).view(2, 12, 1)
    set_to = Ablation(view, [0, 1], "neuron", mean)(torch.tensor([3, 14]))
    assert set_to[view.hook_neurons(1)](torch.zeros(1, 2, 12))[0, 0].tolist() == [0, 0, 14] + [0] * 9


def test_random_units_are_as_many_of_the_same_layers():
    places = torch.tensor([1, 3, 17, 25, 26, 27])  # layers 0 (two), 1 (one) and 2 (three) of ten units each
    drawn = random_like(places, 10, np.random.default_rng(0))
    assert (drawn // 10).tolist() == [0, 0, 1, 2, 2, 2] and len(drawn.unique()) == 6


def test_tables_by_hand():
    # Topic a's units hurt a by 2 and b by 1; random ones by 1 everywhere in one draw, not at all in the other.
    result = of_losses(
        [1.0, 1.0, 2.0, 2.0],
        [[3.0, 3.0, 3.0, 3.0], [1.0, 1.0, 2.0, 2.0]],
        [[[2.0, 2.0, 3.0, 3.0], [1.0, 1.0, 2.0, 2.0]]] * 2,
        ["a", "a", "b", "b"],
    )
    table = result.damage().set_index(["topic", "other_topic"])
    assert table.loc[("a", "a"), ["damage", "random", "effect"]].tolist() == [2.0, 0.5, 1.5]
    assert table.loc[("a", "b"), ["damage", "random", "effect"]].tolist() == [1.0, 0.5, 0.5]
    assert table["p"].tolist() == pytest.approx([1 / 3, 1.0, 2 / 3, 1.0])  # b + 1 over 3
    assert table["q"].tolist() == pytest.approx([1.0] * 4)  # 1/3 of four: 4/3; the second of four, 2/3: 4/3
    broken = replace(result, ablated=torch.tensor([[3.0, float("nan"), 3.0, 3.0], [1.0, 1.0, 2.0, 2.0]]))
    missing = broken.damage().set_index(["topic", "other_topic"])
    assert missing.loc[("a", "a"), ["damage", "p", "q"]].isna().all()
    assert missing["p"].tolist()[1:] == table["p"].tolist()[1:]
    assert missing["q"].tolist()[1:] == pytest.approx(stats.false_discovery_control(missing["p"][1:]))
    assert broken.specificity()["p"].isna().tolist() == broken.specificity()["q"].isna().tolist() == [True, False]
    assert table["low"].isna().all()  # two prompts a topic have no interval
    specific = result.specificity().set_index("topic")
    assert specific["effect"].tolist() == [1.0, 0.0] and specific["p"].tolist() == pytest.approx([1 / 3, 1.0])
    assert "random units" in result.damage().attrs["null"]
    (grid,) = result.figure().data
    assert [list(row) for row in grid.z] == [[1.5, 0.5], [-0.5, -0.5]]
    assert [list(row) for row in grid.text] == [["1.50", "0.50"], ["-0.50", "-0.50"]]  # two draws make no star
    many = replace(result, random=result.random.repeat(1, 10, 1))
    assert [list(row) for row in many.figure().data[0].text] == [["1.50*", "0.50"], ["-0.50", "-0.50"]]


def test_the_interval_of_specificity_resamples_prompts_within_topics():
    # Only topic a's prompts vary, and b's damage is 0.5 throughout: the interval is that of a's mean, less 0.5.
    rise = np.random.default_rng(0).normal(1, 1, 8).astype(np.float32)
    none = np.zeros(16, dtype=np.float32)
    ablated = np.stack([np.concatenate([rise, np.full(8, 0.5, dtype=np.float32)]), none])
    result = of_losses(none, ablated, np.zeros((2, 3, 16), dtype=np.float32), ["a"] * 8 + ["b"] * 8)
    row = result.specificity().iloc[0]
    order = np.argsort([f"p{i}" for i in range(8)])
    drawn = lp.inference.resamples_within(np.repeat([0, 1], 8))[:, :8] @ rise[order] / 8 - 0.5
    assert row["effect"] == pytest.approx(rise.mean() - 0.5, abs=1e-6)
    low, high = lp.inference.bounds(drawn[:, None], 8, degrees=14)[:, 0]
    assert [row["low"], row["high"]] == pytest.approx([low, high], abs=1e-5)
    few = of_losses(none[4:], ablated[:, 4:], np.zeros((2, 3, 12), dtype=np.float32), ["a"] * 4 + ["b"] * 8)
    assert few.specificity()["low"].isna().all()  # four prompts of a topic


def test_a_neuron_that_carries_a_topic_is_chosen_and_needed():
    model = tiny.bridge("gpt2")
    topics = {"low": [[0, 5, 9, 6, 9, 7, 9]] * 10, "high": [[0, 300, 8, 301, 8, 302, 8]] * 10}
    topics = {name: [[*ids, 20 + i] for i, ids in enumerate(some)] for name, some in topics.items()}
    view = ModelView(model)
    with torch.no_grad():
        # Neuron 7 of layer 1 is bright where "high" tokens were read, and writes token 8, which follows them.
        direction = torch.nn.functional.normalize(view.W_E[[300, 301, 302]].mean(0), dim=0)
        mlp = model.blocks[1].mlp.original_component if hasattr(model.blocks[1].mlp, "original_component") else None
        assert mlp is not None
        mlp.c_fc.weight[:, 7] = 20 * direction
        mlp.c_proj.weight[7] = 3 * torch.nn.functional.normalize(view.W_E[8], dim=0)
    prompts = [lp.Prompt(ids=tuple(ids), topic=name) for name, some in topics.items() for ids in some]
    result = lp.TopicAblation(k=1, draws=20, ablation="zero").run(model, prompts, progress=False)
    chosen = result.chosen().set_index("topic")
    assert chosen.loc["high", ["layer", "unit"]].tolist() == ["1", "N7"]
    specific = result.specificity().set_index("topic").loc["high"]
    assert specific["effect"] > specific["random_high"] and specific["p"] == pytest.approx(1 / 21)
    assert specific["low"] > 0


def test_the_order_of_topics_and_prompts_changes_nothing():
    model = tiny.bridge("llama")
    ten = {
        topic: [*texts, *(f"Then {text}" for text in texts), f"So {topic}.", f"The {topic}."]
        for topic, texts in TOPICS.items()
    }
    whole = lp.TopicAblation(k=2, draws=3).run(model, ten, progress=False)
    turned = {topic: texts[::-1] for topic, texts in reversed(ten.items())}
    again = lp.TopicAblation(k=2, draws=3).run(model, turned, progress=False)
    assert set(whole.prompt.text) == set(again.prompt.text)
    tables = [each.specificity().set_index("topic").sort_index() for each in (whole, again)]
    for column in ("effect", "low", "high", "random", "p"):
        assert tables[0][column].tolist() == pytest.approx(tables[1][column].tolist(), abs=1e-5), column


def test_choice_and_measurement_share_no_prompt_and_no_group():
    prompts = [lp.Prompt(text=text, topic=topic) for topic, texts in TOPICS.items() for text in texts]
    groups = [str(i % 2) for i in range(len(prompts))]
    result = lp.TopicAblation(k=1, draws=1).run(tiny.bridge("gpt2"), prompts, groups=groups, progress=False)
    left = {text for text, group in zip(TEXTS, groups, strict=True) if group == "0"}
    assert set(result.prompt.text) in (left, set(TEXTS) - left)


def test_an_interrupt_leaves_the_draws_done_so_far(monkeypatch):
    calls = 0

    def interrupted(*arguments):
        nonlocal calls
        calls += 1
        if calls == 12:  # 1 as it is, 3 topics x (chosen, draw 1, draw 2), and one more
            raise KeyboardInterrupt
        return prompt_loss(*arguments)

    monkeypatch.setattr("lens_probes.experiments.topic_ablation.prompt_loss", interrupted)
    result = lp.TopicAblation(k=1, draws=20).run(tiny.bridge("gpt2"), TOPICS, progress=False)
    assert result.random.shape[1] == 2


@pytest.mark.usefixtures("as_users_run_it")
def test_what_cannot_be_asked_is_said():
    with pytest.raises(ValueError, match=r"component=...\) must be 'head' or 'neuron'; got 'block'"):
        lp.TopicAblation(component="block")
    with pytest.raises(ValueError, match=r"ablation=...\) must be 'mean' or 'zero'; got 'none'"):
        lp.TopicAblation(ablation="none")
    for name in ("k", "draws"):
        with pytest.raises(ValueError, match=rf"{name}=...\) must be a whole number, 1 or more; got 0"):
            lp.TopicAblation(**{name: 0})
    with pytest.raises(ValueError, match=r"fraction=...\) must be a number between 0 and 1; got 1.5"):
        lp.TopicAblation(fraction=1.5)
    with pytest.raises(ValueError, match=r"statistic=...\) must be 'mean', 'std'.*; got 'max'"):
        lp.TopicAblation(statistic="max")
    with pytest.raises(ValueError, match=r"k=...\) must be at most the 12 heads of these layers; got 13"):
        lp.TopicAblation(component="head", k=13).run(tiny.bridge("gpt2"), TOPICS)
    with pytest.raises(ValueError, match="must predict the next token; got tiny-bert, which predicts masked ones"):
        lp.TopicAblation().run(tiny.bridge("bert"), TOPICS)
    view = ModelView(tiny.bridge("gpt2"))
    one_token = tokenize([[5]], view)
    with pytest.raises(ValueError, match="prompt 0 has no token to predict"):
        prompt_loss(view, one_token)
