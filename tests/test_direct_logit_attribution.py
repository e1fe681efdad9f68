"""DirectLogitAttribution: the parts sum to the model's own logits on every decoder, raw and processed weights agree."""

import math
from html import unescape
from importlib.metadata import version

import pytest
import torch
from reference import attention

import lens_probes as lp
from lens_probes.examples import tiny
from lens_probes.logit_direction import frozen
from lens_probes.model import Norm
from lens_probes.text.targets import asked_about

TEXTS = ["Time flies like an arrow.", "The cat, which nobody had fed, slept on the mat all day."]
LIKE = ["Time flies like an arrow.", "The cat, which nobody had fed, slept like a dog."]  # of unequal length


def centred_logits(model, tokens):
    """The model's own logits before the soft cap minus their mean, `[token vocab]`, prompt by prompt."""
    read = []
    for _, prompt in tokens.by_prompt():
        with torch.no_grad():
            _, cache = model.run_with_cache(prompt.id[None], names_filter="unembed.hook_out")
        read.append(cache["unembed.hook_out"][0].float())
    logits = torch.cat(read)
    return logits - logits.mean(-1, keepdim=True)


@pytest.mark.parametrize("target", ["next", "own", "final", 17])
def test_the_parts_sum_to_the_models_own_logit_minus_the_mean_logit(target, decoder):
    model = decoder.build()
    result = lp.DirectLogitAttribution(target=target).run(model, TEXTS)
    own = centred_logits(model, result.token)
    asked = {
        "next": result.token.id.roll(-1),
        "own": result.token.id,
        "final": own.argmax(-1),
        17: torch.full((len(own),), 17),
    }[target]
    known = ~result.total.isnan()
    expected = own.gather(1, asked[:, None])[:, 0][known]
    assert int(known.sum()) == len(own) - (2 if target == "next" else 0)
    torch.testing.assert_close(result.contribution[:, known].sum(0), expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(result.total[known], expected, rtol=0, atol=1e-4)
    assert result.contribution[:, ~known].isnan().all()


def test_raw_and_processed_weights_of_both_classes_agree_part_by_part(decoder):
    raw = lp.DirectLogitAttribution().run(tiny.bridge(decoder.architecture), TEXTS)
    other = lp.DirectLogitAttribution().run(decoder.build(), TEXTS)
    assert raw.component == other.component
    torch.testing.assert_close(raw.contribution, other.contribution, rtol=0, atol=1e-4, equal_nan=True)


def test_a_head_that_is_switched_off_contributes_nothing_and_the_others_change_the_total_by_what_they_say():
    model = tiny.bridge("gpt2")
    before = lp.DirectLogitAttribution(target=9).run(model, TEXTS[0])
    with torch.no_grad():  # the last layer's head 2: nothing comes after it but the MLP and the final norm
        model.blocks[2].attn.o.original_component.weight[16:24] = 0.0
    after = lp.DirectLogitAttribution(target=9).run(model, TEXTS[0])
    assert before.of_component("L2H2").abs().min() > 1e-4
    assert after.of_component("L2H2").abs().max() == 0.0


def test_an_embedding_alone_writes_everything(idle):
    result = lp.DirectLogitAttribution(target="own").run(idle, TEXTS[0])
    torch.testing.assert_close(result.of_component("embed"), result.total, rtol=0, atol=1e-4)
    assert "position" not in result.component
    assert result.contribution[1:].abs().max() < 1e-6


def test_the_layers_that_were_not_asked_for_come_together():
    model = tiny.bridge("gemma2")
    whole, part = lp.DirectLogitAttribution().run(model, TEXTS), lp.DirectLogitAttribution(layers=[1]).run(model, TEXTS)
    others = [name for name in whole.component if name.startswith(("L0", "L2"))]
    together = sum(whole.of_component(name) for name in others)
    torch.testing.assert_close(part.of_component("other_layers"), together, rtol=0, atol=1e-4, equal_nan=True)
    torch.testing.assert_close(part.of_component("L1H3"), whole.of_component("L1H3"), rtol=0, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("target", ["next", *(pytest.param(each, marks=pytest.mark.matrix) for each in ("final", 17))])
def test_positions_are_columns_of_the_whole_result(target, decoder):
    model = decoder.build(padding_side="left") if target == "final" else decoder.build()
    whole = lp.DirectLogitAttribution(target=target).run(model, LIKE)
    of = [whole.token.rows(prompt) for prompt in (0, 1)]
    like = [whole.token.row(prompt, "like") for prompt in (0, 1)]
    for positions, rows in (
        (-1, [each[-1] for each in of]),
        ("like", like),
        ([0, "like"], sorted([*like, *(each[0] for each in of)])),
        (slice(1, -1), [row for each in of for row in each[1:-1]]),
    ):
        some = lp.DirectLogitAttribution(target=target, positions=positions).run(model, LIKE)
        assert some.token.position.tolist() == whole.token.position[rows].tolist()
        assert some.words().text == tuple(whole.words().text[row] for row in rows)
        for name in ("contribution", "total"):
            expected = getattr(whole, name)[..., rows]
            torch.testing.assert_close(getattr(some, name), expected, rtol=0, atol=1e-4, equal_nan=True)


def test_a_position_is_that_of_transformerlens():
    analysis = pytest.importorskip(
        "transformer_lens.tools.analysis", reason="this TransformerLens has no direct logit attribution"
    )
    model = tiny.bridge("gpt2", processed=True)
    ids = model.to_tokens(TEXTS[1])
    for pos in (-1, 3):
        own = lp.DirectLogitAttribution(target=17, against=30, positions=pos).run(model, ids)
        theirs = analysis.direct_logit_attribution(
            model, ids, answer_tokens=17, incorrect_tokens=30, unit="head", pos=pos
        )
        heads = dict(zip(theirs.labels, theirs.attribution.flatten().tolist(), strict=True))
        for component in (f"L{layer}H{head}" for layer in range(3) for head in range(4)):
            assert float(own.of_component(component)) == pytest.approx(heads[component], abs=1e-4)


def test_the_components_of_one_token_are_sorted_by_size_and_sum_to_its_total():
    result = lp.DirectLogitAttribution(target=17, against=30).run(tiny.bridge("gpt2"), TEXTS)
    table, row = result.components("mat", prompt=1), result.token.row(1, "mat")
    assert list(table) == ["component", "contribution", "share"]
    assert table["contribution"].abs().is_monotonic_decreasing and set(table["component"]) == set(result.component)
    by_name = table.set_index("component")["contribution"]
    assert by_name["L1H3"] == pytest.approx(float(result.of_component("L1H3")[row]))
    assert by_name.sum() == pytest.approx(float(result.total[row]), abs=1e-4)
    assert table["share"].sum() == pytest.approx(1, abs=1e-3)
    some = lp.DirectLogitAttribution(target=17, against=30, positions=["mat"]).run(tiny.bridge("gpt2"), TEXTS[1])
    assert some.components(token=-1)["contribution"].tolist() == pytest.approx(table["contribution"].tolist(), abs=1e-4)
    with pytest.raises(
        ValueError, match=r"the token must have a target; token \d+ is the last of prompt 0: ask an ear"
    ):
        lp.DirectLogitAttribution().run(tiny.bridge("gpt2"), TEXTS).components(-1)


def test_a_small_difference_at_one_token_is_not_taken_for_a_missing_part():
    model = tiny.bridge("gpt2", dtype=torch.bfloat16)
    whole = lp.DirectLogitAttribution(target=17, against=30).run(model, TEXTS)
    smallest = int(whole.total[whole.token.rows(1)].abs().argmin())
    alone = lp.DirectLogitAttribution(target=17, against=30, positions=smallest).run(model, TEXTS[1])
    assert float(alone.total) == pytest.approx(float(whole.total[whole.token.rows(1)[smallest]]), abs=1e-2)


def test_in_bfloat16_the_parts_sum_to_the_models_own_rounding():
    model = tiny.bridge("gpt2", dtype=torch.bfloat16)
    result = lp.DirectLogitAttribution(target=17).run(model, TEXTS)
    own = centred_logits(model, result.token)[:, 17]
    torch.testing.assert_close(result.contribution.sum(0), own, rtol=0, atol=2**-6 * float(own.abs().max()) + 0.02)


@pytest.mark.parametrize("centred", [True, False], ids=["LayerNorm", "RMSNorm"])
def test_a_frozen_norm_reads_a_direction_of_its_output_from_its_input(centred):
    random = torch.Generator().manual_seed(0)
    state, weight, bias, direction = (torch.randn(*size, generator=random) for size in ((4, 6), (6,), (6,), (4, 6)))
    inner = state - state.mean(-1, keepdim=True) if centred else state
    scale = inner.square().mean(-1).sqrt()
    after = weight * inner / scale[:, None] + bias
    found = frozen(Norm(weight, bias, centred), state, after)
    torch.testing.assert_close(found.scale, scale)
    assert frozen(Norm(weight, bias, centred), torch.zeros(1, 6), bias[None]).read(direction[:1]).abs().max() == 0
    read = (state * found.read(direction)).sum(-1)
    torch.testing.assert_close(read, ((after - bias) * direction).sum(-1), rtol=1e-4, atol=1e-5)


def test_the_table_means_over_tokens_and_its_shares_sum_to_one():
    result = lp.DirectLogitAttribution().run(tiny.bridge("gpt2"), lp.demo.sentences()[:6], prepend_bos=True)
    table = result.mean_contribution()
    counted = ~result.total.isnan() & ~result.token.special
    assert table["tokens"].unique().tolist() == [int(counted.sum())] and table["prompts"].unique().tolist() == [6]
    expected = result.contribution[:, counted].mean(1)
    assert table["mean"].tolist() == pytest.approx(expected.tolist(), abs=1e-5)
    assert table["share"].sum() == pytest.approx(1.0, abs=1e-4)
    assert ((table["low"] <= table["mean"]) & (table["mean"] <= table["high"])).mean() > 0.95
    few = lp.DirectLogitAttribution().run(tiny.bridge("gpt2"), TEXTS).mean_contribution()
    assert few["low"].isna().all()


def test_totals_are_summarised_by_the_word_that_follows():
    result = lp.DirectLogitAttribution().run(tiny.bridge("gpt2"), lp.demo.sentences()[:6])
    table = result.by_word_class().set_index("word_class")
    following = asked_about(result.token, "next")
    own = result.total[torch.tensor([name == "function" for name in following.word_class])]
    assert table.loc["function", "tokens"] == len(own)
    assert table["quantity"].unique().tolist() == ["total"]
    assert len(result.compare(permutations=19)) == 1


@pytest.mark.usefixtures("as_users_run_it")
def test_what_cannot_be_decomposed_is_refused():
    with pytest.raises(ValueError, match="must be 'next', 'own', 'final', a token's text such as ' Paris', or its id;"):
        lp.DirectLogitAttribution(target="")
    with pytest.raises(
        ValueError, match=r"\(against=\.\.\.\) must be the text of one token of tiny-gpt2; got 'xyzzy',"
    ):
        lp.DirectLogitAttribution(against="xyzzy").run(tiny.bridge("gpt2"), TEXTS)
    with pytest.raises(ValueError, match=r"\(target=\.\.\.\) must be ids of tiny-gpt2, 0 to 399; got 400"):
        lp.DirectLogitAttribution(target=400).run(tiny.bridge("gpt2"), TEXTS)
    with pytest.raises(
        ValueError, match=r"must be a decoder, .*; tiny-bert norms after every sum and has a head that is not linear"
    ):
        lp.DirectLogitAttribution().run(tiny.bridge("bert"), TEXTS)


def test_a_model_whose_parts_do_not_sum_is_refused():
    model = tiny.bridge("gpt2")
    model.original_model.transformer.h[1].register_forward_hook(
        lambda module, inputs, output: output * 3 if isinstance(output, torch.Tensor) else (output[0] * 3, *output[1:])
    )
    with pytest.raises(ValueError, match="of tiny-gpt2 must sum to its states; got sums that are off by"):
        lp.DirectLogitAttribution().run(model, TEXTS)


@pytest.mark.skipif(version("transformer-lens").startswith("3."), reason="TransformerLens 3 has hook_embed unscaled")
@pytest.mark.parametrize("processed", [False, True])
def test_granites_parts_are_those_of_hugging_faces_modules_and_sum_to_its_logits(processed):
    ids = torch.arange(5, 15)
    source, last = tiny.huggingface("granite"), []
    source.model.norm.register_forward_pre_hook(lambda module, given: last.append(given[0][0]))
    with torch.no_grad():
        logits = source(ids[None]).logits[0]
        weight = source.lm_head.weight
        towards = (weight[17] - weight.mean(0)) * source.model.norm.weight / source.config.logits_scaling
        direction = towards / (last[0].square().mean(-1, keepdim=True) + source.config.rms_norm_eps).sqrt()
        heads = (attention("granite", ids)[2].added * direction).sum(-1)
    result = lp.DirectLogitAttribution(target=17).run(tiny.bridge("granite", processed=processed), [ids])
    torch.testing.assert_close(result.contribution.sum(0), logits[:, 17] - logits.mean(-1), rtol=0, atol=1e-5)
    found = torch.stack([result.of_component(f"L2H{head}") for head in range(4)]).sum(0)
    torch.testing.assert_close(found, heads, rtol=0, atol=1e-5)


def cohere():
    """A tiny model that multiplies its logits by 1/4."""
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import CohereConfig, CohereForCausalLM

    config = CohereConfig(
        vocab_size=400,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        logit_scale=0.25,
    )
    torch.manual_seed(0)
    config.architectures = ["CohereForCausalLM"]
    source, tokenizer = CohereForCausalLM(config).eval(), tiny.tokenizer("llama")
    model = TransformerBridge.boot_transformers("tiny-cohere", hf_model=source, tokenizer=tokenizer, device="cpu")
    return model


def test_a_factor_of_all_logits_is_part_of_every_contribution():
    with torch.random.fork_rng():
        model = cohere()
    result = lp.DirectLogitAttribution(target=17).run(model, TEXTS)
    with torch.no_grad():
        own = torch.cat([model(prompt.id[None])[0] for _, prompt in result.token.by_prompt()])
    if lp.ModelView(model).logit_scale != 0.25:
        pytest.skip("this TransformerLens does not scale Cohere's logits itself")
    expected = own[:, 17] - own.mean(-1)
    torch.testing.assert_close(result.contribution.sum(0), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("layers", [None, [0], [1, 2]])
def test_a_block_that_scales_what_it_adds_is_refused_whichever_layers_are_asked(layers):
    model = tiny.bridge("llama")
    for block in model.blocks:
        block.mlp.hook_out.register_forward_hook(lambda module, inputs, output: output * 3)
        block.attn.hook_out.register_forward_hook(lambda module, inputs, output: output * 3)
    with pytest.raises(ValueError, match="of tiny-llama must sum to its states; got sums that are off by"):
        lp.DirectLogitAttribution(layers=layers).run(model, TEXTS)


def test_figures_show_heads_by_layer_and_say_what_stands_beside_them():
    result = lp.DirectLogitAttribution().run(tiny.bridge("gpt2"), TEXTS)
    grid, mlp, bias = result.figure_token(2, prompt=1).data
    row = result.token.row(1, 2)
    assert grid.z[1][3] == pytest.approx(float(result.of_component("L1H3")[row]))
    assert mlp.x[2] == pytest.approx(float(result.of_component("L2_mlp")[row]))
    assert (mlp.name, bias.name) == ("MLP", "attention bias")
    drawn = unescape(result.figure_token(2, prompt=1).layout.title.text)
    assert f"attribution to {result.token.text[row + 1]!r} (total {float(result.total[row]):.2f})" in drawn
    assert f"at {result.token.text[row]!r}, token 2 of prompt 1" in drawn
    fixed = lp.DirectLogitAttribution(target=9).run(tiny.bridge("gpt2"), TEXTS)
    assert f"attribution to {fixed.vocab[9]!r} (total " in unescape(fixed.figure_token(2, prompt=1).layout.title.text)
    title = result.figure().layout.title.text
    assert "embed" in title and "position" in title and "final_bias" in title
    last = int((result.token.prompt == 0).sum()) - 1
    with pytest.raises(
        ValueError, match=rf"must have a target; token {last} is the last of prompt 0: ask an earlier one"
    ):
        result.figure_token(last)
    with pytest.raises(ValueError, match=r"must be one of embed, position, L0H0, .*; got 'L9H9'"):
        result.of_component("L9H9")
    only_one = lp.DirectLogitAttribution().run(tiny.bridge("gpt2"), [[5]])
    with pytest.raises(ValueError, match="no token here has a target"):
        only_one.figure()
    assert math.isnan(float(only_one.total[0]))
