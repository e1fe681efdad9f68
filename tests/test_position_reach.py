"""PositionReach: the whole Jacobian, what the mask forbids, summaries by hand, and both ways of encoders."""

import sys
from dataclasses import replace

import pytest
import torch

import lens_probes as lp
from lens_probes.examples import tiny
from lens_probes.experiments.position_reach import SUMMARIES, summaries
from lens_probes.model import ModelView
from lens_probes.testing import PROMPTS, assert_same

TEXT = "The old man the boat."


def test_it_is_the_norm_of_the_jacobian_within_its_error(decoder):
    model = decoder.build()
    view = ModelView(model)
    result = lp.PositionReach(projections=64, layers=[0, 2]).run(model, TEXT, progress=False)
    ids = result.token.id
    n, query = len(ids), len(ids) - 1

    def state(embedded):
        seen = {}

        def keep(activation, hook):
            seen["state"] = activation

        hooks = [(view.hook_token_embed, lambda x, hook: embedded[None]), (view.hook("resid_post", 2), keep)]
        model.run_with_hooks(ids[None], return_type=None, fwd_hooks=hooks)
        return seen["state"][0, query]

    start = view.activations(ids[None], torch.ones(1, n, dtype=torch.bool), [view.hook_token_embed])
    embedded = start[view.hook_token_embed][0]
    jacobian = torch.func.jacrev(state)(embedded)  # d_model source d_model
    expected = jacobian.square().sum((0, 2)).sqrt()
    own = result.pair.query == query
    found, error = result.derivative[1, own], result.error[1, own]
    assert ((found - expected).abs() < 4.5 * error).all()
    assert (error / found).max() < 0.2
    torch.testing.assert_close(result.embed_norm[own], embedded.norm(dim=-1), rtol=0, atol=1e-4)


def test_the_derivative_is_by_what_hook_embed_holds_and_reach_does_not_depend_on_that():
    ids = torch.arange(5, 9)
    source = tiny.huggingface("granite")

    def state(rows):  # Hugging Face multiplies them by embedding_multiplier
        return source.model(inputs_embeds=rows[None], output_hidden_states=True).hidden_states[2][0, -1]

    rows = source.model.embed_tokens.weight.detach()[ids]
    by_rows = torch.autograd.functional.jacobian(state, rows).square().sum((0, 2)).sqrt()
    model = tiny.bridge("granite")
    with torch.no_grad():
        _, cache = model.run_with_cache(ids[None])
    multiplier = cache["hook_embed"][0].norm(dim=-1) / rows.norm(dim=-1)  # 6 on TransformerLens 4, 1 on 3
    result = lp.PositionReach(projections=64, layers=[1]).run(model, [ids], progress=False)
    own = result.pair.query == 3
    found, error = result.derivative[0, own], result.error[0, own]
    assert ((found - by_rows / multiplier).abs() < 4.5 * error).all()
    torch.testing.assert_close(result.embed_norm[own], cache["hook_embed"][0].norm(dim=-1), rtol=0, atol=1e-4)
    assert ((result.reach[0, own] - by_rows * rows.norm(dim=-1)).abs() < 4.5 * error * result.embed_norm[own]).all()
    card = sys.modules[lp.PositionReach.__module__].__doc__ or ""
    assert "e is the activation `hook_embed`" in card and "derivative is per unit of e" in card


def test_a_decoder_depends_on_nothing_later_and_an_encoder_on_everything():
    causal = lp.PositionReach(projections=2).run(tiny.bridge("llama"), TEXT, progress=False)
    n = len(causal.token)
    assert len(causal.pair) == n * (n + 1) // 2 and (causal.derivative > 0).all()
    both = lp.PositionReach(projections=2).run(tiny.bridge("bert"), TEXT, progress=False)
    assert len(both.pair) == len(both.token) ** 2 and (both.derivative > 0).all()
    own = both.pattern(0).diagonal(dim1=1, dim2=2)[:, ~both.token.special].mean(1)  # [CLS] and [SEP] ask nothing
    table = both.by_layer()
    assert table[table["summary"] == "self"]["mean"].tolist() == pytest.approx(own.tolist(), abs=1e-6)


def test_blocks_that_do_nothing_leave_every_token_with_itself(idle):
    result = lp.PositionReach(projections=4).run(idle, TEXT, progress=False)
    n = len(result.token)
    torch.testing.assert_close(result.pattern(0)[2], torch.eye(n), rtol=0, atol=1e-6)
    table = result.by_layer().set_index(["summary", "layer"])
    assert table.loc[("width", "2_post"), "mean"] == pytest.approx(1) and table.loc[("self", "2_post"), "mean"] == 1


def test_summaries_by_hand():
    even = torch.tensor([[[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.25, 0.25, 0.5]]])
    causal = torch.ones(3, 3, dtype=torch.bool).tril()
    width, *rest = summaries(even, causal)[:, 0, 2].tolist()
    assert width == pytest.approx(2**1.5) and rest == [0.75, 0.5, 0.25, 0.375]  # distance, own, first, early
    result = lp.PositionReach(projections=2, layers=[1]).run(tiny.bridge("gpt2"), PROMPTS, progress=False)
    table = result.by_layer().set_index("summary")
    lengths = [len(own) for _, own in result.token.by_prompt()]
    expected = sum(sum(range(2, n + 1)) / (n - 1) for n in lengths) / 3  # even over q + 1 sources; the first is special
    assert table.loc["width", "uniform"] == pytest.approx(expected)
    assert set(table.index) == set(SUMMARIES) and table["low"].isna().all()  # three prompts have no interval


def test_even_reach_is_the_null_everywhere():
    result = lp.PositionReach(projections=2, layers=[1]).run(tiny.bridge("gpt2"), list(PROMPTS), progress=False)
    even = replace(result, derivative=5 / result.embed_norm.expand_as(result.derivative))
    sources = even.by_source()
    assert sources["ratio"].tolist() == pytest.approx([1.0] * len(sources))
    assert sources["reach"].tolist() == pytest.approx([1.0] * len(sources))
    table = even.by_layer()
    assert table["ratio"].tolist() == pytest.approx([1.0] * len(SUMMARIES))
    assert table[table["summary"] == "first_half"]["mean"].item() == pytest.approx(0.5)
    n = max(len(own) for _, own in even.token.by_prompt())  # the last token of the longest prompt is only its own
    last = sources.iloc[-1]
    assert last["source"] == n - 1 and last["total"] == pytest.approx(1 / n) and last["prompts"] == 1


def test_a_source_by_hand():
    result = lp.PositionReach(projections=2, layers=[1]).run(tiny.bridge("gpt2"), [[7, 8, 9]], progress=False)
    pairs = list(zip(result.pair.query.tolist(), result.pair.key.tolist(), strict=True))
    assert pairs == [(0, 0), (1, 0), (1, 1), (2, 0), (2, 1), (2, 2)]
    reaches = torch.tensor([[2.0, 1.0, 3.0, 1.0, 1.0, 2.0]])
    known = replace(result, derivative=reaches, embed_norm=torch.ones(6))
    table = known.by_source().set_index("source")
    assert table["total"].tolist() == pytest.approx([1 + 1 / 4 + 1 / 4, 3 / 4 + 1 / 4, 1 / 2])
    assert table["uniform"].tolist() == pytest.approx([1 + 1 / 2 + 1 / 3, 1 / 2 + 1 / 3, 1 / 3])
    means = [4 / 3, 2.0, 2.0]
    assert table["reach"].tolist() == pytest.approx([each / (sum(means) / 3) for each in means])


def test_two_models_are_compared_prompt_by_prompt():
    model, texts = tiny.bridge("llama"), [*PROMPTS, "A dog ran home again.", "Salt the water.", "Bees find their way."]
    reach = lp.PositionReach(projections=2, layers=[0, 2])
    one, other = (reach.run(each, texts, progress=False) for each in (model, lp.untrained(model)))
    table, turned = one.compare_with(other), other.compare_with(one)
    assert table["effect"].tolist() == pytest.approx([-each for each in turned["effect"]])
    assert table["p"].tolist() == turned["p"].tolist()
    first = table.iloc[0]
    means = [each.by_layer().iloc[0]["mean"] for each in (one, other)]
    assert [first["mean"], first["other"]] == pytest.approx(means) and first["low"] < first["effect"] < first["high"]
    itself = one.compare_with(one)
    assert (itself["effect"] == 0).all() and (itself["p"] == 1).all()
    with pytest.raises(ValueError, match="two models must be compared with the same settings"):
        one.compare_with(lp.PositionReach(projections=2, layers=[0]).run(model, texts, progress=False))
    with pytest.raises(ValueError, match=r"must be compared with the same settings; got .*: run one of them again"):
        one.compare_with(lp.PositionReach(projections=3, layers=[0, 2]).run(model, texts, progress=False))
    with pytest.raises(TypeError, match="of one class must be compared; got PositionReachResult and str"):
        one.compare_with("x")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="must be compared on the same prompts; got other token ids"):
        one.compare_with(reach.run(model, [*texts[:-1], "Bees find their den."], progress=False))


def test_a_prompt_has_the_same_numbers_in_any_company():
    probe, model = lp.PositionReach(projections=3, layers=[2]), tiny.bridge("qwen3")
    alone = probe.run(model, PROMPTS[1], progress=False)
    second = probe.run(model, list(PROMPTS), progress=False)
    own = second.pair.prompt == 1
    torch.testing.assert_close(second.derivative[:, own], alone.derivative, rtol=1e-4, atol=1e-5)
    assert_same(alone, lp.PositionReach(projections=3, layers=[2]).run(model, PROMPTS[1], progress=False), "again")


def test_an_interrupt_leaves_the_prompts_done(monkeypatch):
    original, calls = lp.PositionReach._of_prompt, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(lp.PositionReach, "_of_prompt", interrupted)
    result = lp.PositionReach(projections=2).run(tiny.bridge("gpt2"), list(PROMPTS), progress=False)
    assert result.provenance.n_prompts == 2 and int(result.pair.prompt.max()) == 1


def test_figures_show_what_is_stored():
    result = lp.PositionReach(projections=2).run(tiny.bridge("gpt2"), list(PROMPTS), progress=False)
    drawn = result.figure_prompt(1, prompt=2).data[0]
    assert [list(row) for row in drawn.z] == result.pattern(2)[1].tolist()
    table = result.by_layer()
    line = next(trace for trace in result.figure().data if trace.name == "mean over prompts")
    assert list(line.y) == table[table["summary"] == "width"]["ratio"].tolist()


@pytest.mark.usefixtures("as_users_run_it")
def test_what_cannot_be_asked_is_said():
    with pytest.raises(ValueError, match=r"PositionReach\(projections=...\) must be a whole number, 2 or more; got 1"):
        lp.PositionReach(projections=1)
    result = lp.PositionReach(layers=[1]).run(tiny.bridge("gpt2"), [[5]])
    with pytest.raises(ValueError, match="pass prompts of two tokens or more"):
        result.by_layer()
    with pytest.raises(ValueError, match="got special tokens only: pass text"):
        lp.PositionReach(layers=[1]).run(tiny.bridge("llama"), [[1, 1]]).by_source()
    with pytest.raises(ValueError, match="layer must be one of 1_post, by label or number; got 0"):
        result.figure_prompt(0)
