"""HeadAblation: all heads ablated, a head that matters, the order of the statistic, and its refusals."""

import numpy as np
import pytest
import torch
from scipy import stats

import lens_probes as lp
from lens_probes.examples import tiny
from lens_probes.model import ModelView
from lens_probes.text.prompts import as_prompts, first_part, tokenize

TEXTS = lp.demo.sentences()[:10]


def test_heads_go_in_the_order_of_the_statistic_on_the_other_prompts(decoder):
    model = decoder.build()
    result = lp.HeadAblation(statistic="previous_token", steps=4, draws=2).run(model, TEXTS, progress=False)
    tokens = tokenize(TEXTS, ModelView(model))
    chosen_on = as_prompts(tokens[first_part(tokens, 0.5)])
    values = lp.AttentionPatterns().run(model, chosen_on).mean_of("previous_token").flatten()
    assert values[result.order].tolist() == sorted(values.tolist(), reverse=True)
    assert result.count.tolist() == [3, 6, 9, 12]


def test_a_weight_too_small_for_the_precision_is_no_window():
    model = tiny.bridge("cohere")
    with torch.no_grad():
        for block in model.blocks:
            block.attn.q.weight.mul_(12)
            block.attn.k.weight.mul_(12)
    result = lp.HeadAblation(steps=2, draws=1).run(model, TEXTS[:4], progress=False)
    assert result.ordered.isfinite().all()


def test_with_all_heads_ablated_every_order_is_the_same():
    result = lp.HeadAblation(steps=3, draws=3).run(tiny.bridge("gpt2"), TEXTS, progress=False)
    torch.testing.assert_close(result.random[:, -1], result.ordered[-1].expand(3, -1), rtol=0, atol=1e-5)
    table = result.table()
    assert table["p"].iloc[-1] == 1.0
    np.testing.assert_array_equal(table["q"], stats.false_discovery_control(table["p"]))
    assert table["loss"].tolist() == pytest.approx(result.ordered.mean(1).tolist(), abs=1e-5)
    assert not torch.allclose(result.random[0, 0], result.random[1, 0])
    excess = (result.ordered - result.random.mean(0)).double()
    assert table["effect"].tolist() == pytest.approx(excess.mean(1).tolist(), abs=1e-5)
    assert table["effect"].tolist() == pytest.approx((table["loss"] - table["random"]).tolist())
    np.testing.assert_allclose(table[["low", "high"]].T, lp.inference.mean_interval(excess.numpy()), atol=1e-5)


def test_an_interrupt_leaves_the_orders_done(monkeypatch):
    from lens_probes.experiments import head_ablation

    original, calls = head_ablation.prompt_loss, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 9:  # 1 as it is, 2 in order, 4 in two random orders, and one more
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(head_ablation, "prompt_loss", interrupted)
    result = lp.HeadAblation(steps=2, draws=5).run(tiny.bridge("gpt2"), TEXTS, progress=False)
    assert result.random.shape[0] == 2


def test_the_figure_starts_with_all_heads():
    result = lp.HeadAblation(steps=3, draws=2).run(tiny.bridge("llama"), TEXTS, progress=False)
    lines = [trace for trace in result.figure().data if trace.name]
    assert [line.y[0] for line in lines] == [pytest.approx(float(result.loss.mean()))] * 2
    assert list(lines[0].x) == ["0", "4", "8", "12"]


@pytest.mark.usefixtures("as_users_run_it")
def test_what_cannot_be_asked_is_said():
    with pytest.raises(ValueError, match=r"must be 'first_token', .* or 'distance'; got 'sink'"):
        lp.HeadAblation(statistic="sink")
    for name in ("steps", "draws"):
        with pytest.raises(ValueError, match=rf"{name}=...\) must be a whole number, 1 or more; got 0"):
            lp.HeadAblation(**{name: 0})
    with pytest.raises(ValueError, match="must have a query with a value of 'induction', to order heads; got none"):
        lp.HeadAblation(statistic="induction").run(tiny.bridge("gpt2"), [[5, 6, 7], [8, 9, 10]])
    with pytest.raises(ValueError, match=r"steps=...\) must be at most the 12 heads; got 13"):
        lp.HeadAblation(steps=13).run(tiny.bridge("gpt2"), TEXTS)
    with pytest.raises(ValueError, match=r"fraction=...\) must be a number between 0 and 1; got 1.5"):
        lp.HeadAblation(fraction=1.5).run(tiny.bridge("gpt2"), TEXTS)
    with pytest.raises(ValueError, match="predicts masked ones"):
        lp.HeadAblation().run(tiny.bridge("bert"), TEXTS)
