"""What source tokens contribute to a logit: sums, an independent reference, what is refused."""

from importlib.metadata import version

import pytest
import torch
from reference import skip_where_transformerlens_breaks

import lens_probes as lp
from lens_probes.examples import tiny

HAS_HOOKED = version("transformer-lens").startswith("3.")

TEXTS = ["The cat sat on the mat.", "Snow fell on the orchard all day."]


FAST = ("gpt2", "gemma2", "qwen3")
ARCHITECTURES = [name if name in FAST else pytest.param(name, marks=pytest.mark.matrix) for name in tiny.DECODERS]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_sources_sum_to_what_the_head_contributes(architecture: str) -> None:
    model = tiny.bridge(architecture)
    result = lp.SourceAttribution(target=" the").run(model, TEXTS)
    heads = lp.DirectLogitAttribution(target=" the").run(model, TEXTS)
    for prompt in (0, 1):
        rows = heads.token.rows(prompt)
        sums = result.pattern(prompt).sum(-1)  # [layer head query]
        for layer in range(3):
            for head in range(4):
                expected = heads.of_component(f"L{layer}H{head}")[rows]
                torch.testing.assert_close(sums[layer, head], expected, atol=1e-4, rtol=1e-4)


def test_the_logit_difference_of_two_tokens_is_the_difference_of_their_contributions() -> None:
    model = tiny.bridge("llama")
    both = lp.SourceAttribution(target=" the", against=7).run(model, TEXTS)
    one, other = (lp.SourceAttribution(target=target).run(model, TEXTS) for target in (" the", 7))
    torch.testing.assert_close(both.contribution, one.contribution - other.contribution, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(both.uniform, one.uniform - other.uniform, atol=1e-4, rtol=1e-4)


def test_a_contribution_is_weight_times_value_through_the_head_and_the_frozen_norm() -> None:
    """By hand from the cache of GPT-2, whose final norm is a LayerNorm with a weight."""
    model = tiny.bridge("gpt2")
    ids = model.to_tokens(TEXTS[0])
    result = lp.SourceAttribution(target=20, against=30, layers=[2]).run(model, ids)
    query, source, head = ids.shape[1] - 1, 1, 3
    _, cache = model.run_with_cache(ids)
    value = cache["blocks.2.attn.hook_v"][0, source, head] - lp.ModelView(model).value_bias(2)[head]
    written = cache["blocks.2.attn.hook_pattern"][0, head, query, source] * value @ model.W_O[2, head]
    state, norm = cache["blocks.2.hook_resid_post"][0, query], model.ln_final.original_component
    scale = (state.var(unbiased=False) + norm.eps).sqrt()
    normed = norm.weight * (written - written.mean()) / scale
    expected = normed @ (model.W_U[:, 20] - model.W_U[:, 30])
    assert float(result.pattern()[0, head, query, source]) == pytest.approx(float(expected.detach()), rel=1e-3)


def test_uniform_contributions_are_those_of_equal_weights() -> None:
    model = tiny.bridge("gpt2")
    with torch.no_grad():  # no queries: every head attends to all its sources alike
        for block in model.original_model.transformer.h:
            block.attn.c_attn.weight[:, :32] = 0
            block.attn.c_attn.bias[:32] = 0
    result = lp.SourceAttribution().run(model, TEXTS)
    torch.testing.assert_close(result.contribution, result.uniform, equal_nan=True)
    trained = lp.SourceAttribution().run(tiny.bridge("gpt2"), TEXTS)
    assert float((trained.contribution - trained.uniform).nan_to_num().abs().max()) > 0.1


def test_the_table_lists_sources_by_the_size_of_what_they_add() -> None:
    result = lp.SourceAttribution().run(tiny.bridge("gpt2"), TEXTS)
    table = result.sources("1", "H2", 3)
    assert len(table) == 4 and table["contribution"].abs().is_monotonic_decreasing
    by_position = table.set_index("position")["contribution"].sort_index()
    assert by_position.tolist() == pytest.approx(result.pattern()[1, 2, 3, :4].tolist())
    assert result.sources(1, 2, 3).equals(table)


@pytest.mark.parametrize("maker", ["bridge", "hooked"])
@pytest.mark.parametrize("target", ["next", " the"])
def test_positions_are_rows_of_the_whole_pattern(maker: str, target: str) -> None:
    if maker == "hooked" and not HAS_HOOKED:
        pytest.skip("TransformerLens 4 has no HookedTransformer")
    texts = ["The cat sat on the mat.", "Snow fell on roofs all day, and the mat lay below."]
    for architecture, side in (("gpt2", "right"), ("gemma2", "left")):
        model = getattr(tiny, maker)(architecture, padding_side=side)
        whole = lp.SourceAttribution(target=target).run(model, texts)
        of = [whole.token.rows(prompt) for prompt in (0, 1)]
        for positions, queries in (
            (-2, [len(each) - 2 for each in of]),
            (["on", "mat"], None),
            (slice(1, 3), [slice(1, 3)] * 2),
        ):
            some = lp.SourceAttribution(target=target, positions=positions).run(model, texts)
            assert torch.equal(some.token.id, whole.token.id)  # all tokens are sources
            for prompt in (0, 1):
                at = queries and queries[prompt]
                if at is None:
                    at = [of[prompt].index(whole.token.row(prompt, word)) for word in ("on", "mat")]
                for quantity in ("contribution", "uniform"):
                    own, other = (each.pattern(prompt, quantity) for each in (some, whole))
                    torch.testing.assert_close(own[:, :, at], other[:, :, at], atol=1e-4, rtol=1e-4, equal_nan=True)
                    asked = torch.zeros(len(of[prompt]), dtype=torch.bool)
                    asked[at] = True
                    assert (own[:, :, ~asked] == 0).all()


def test_what_was_not_asked_about_is_refused_and_not_drawn() -> None:
    result = lp.SourceAttribution(target=" the", positions=["cat", -1]).run(tiny.bridge("gpt2"), TEXTS[0])
    cat, last = result.token.row(0, "cat"), len(result.token) - 1
    assert result.sources(1, 2, "cat")["position"].max() == cat
    grid = result.figure(1, 2).data[0]
    assert len(grid.z) == 2 and grid.y[0].endswith(f" {cat}") and grid.y[1].endswith(f" {last}")
    assert list(grid.z[1]) == pytest.approx(result.pattern()[1, 2, last].tolist())
    message = rf"one of the positions that this run asked about, \[{cat}, {last}\] in prompt 0; got 1: run SourceAttr"
    for ask in (lambda: result.sources(0, 0, 1), lambda: result.figure_token(0, 1)):
        with pytest.raises(ValueError, match=message):
            ask()


def test_half_precision_with_clipped_values_is_no_attention_sink() -> None:
    skip_where_transformerlens_breaks("olmo", torch.bfloat16)
    model = tiny.bridge("olmo", dtype=torch.bfloat16)
    result = lp.SourceAttribution(target=20).run(model, TEXTS)
    assert torch.isfinite(result.contribution).all()


def test_the_last_token_has_no_next_one_to_attribute() -> None:
    result = lp.SourceAttribution().run(tiny.bridge("gpt2"), TEXTS)
    for ask in (lambda: result.sources(0, 0, -1), lambda: result.figure_token(0, -1)):
        with pytest.raises(ValueError, match="must have a target; got the last of prompt 0, which nothing follows"):
            ask()


def test_figures_show_the_head_that_is_asked_or_the_one_with_the_largest_contribution() -> None:
    result = lp.SourceAttribution().run(tiny.bridge("gpt2"), TEXTS)
    largest = result.pattern().nan_to_num().abs().amax((2, 3))
    layer, head = divmod(int(largest.argmax()), 4)
    assert f"through L{layer}H{head}, prompt 0" in result.figure().layout.title.text
    assert "through L0H1, prompt 0" in result.figure(0, "H1").layout.title.text
    grid = result.figure_token(1, "cat").data[0]
    assert len(grid.z) == 4 and grid.zmin == -grid.zmax


def test_an_encoder_is_refused_and_so_are_weights_that_do_not_make_the_output() -> None:
    with pytest.raises(ValueError, match="must be a decoder, whose logits are a sum of parts; tiny-bert norms"):
        lp.SourceAttribution().run(tiny.bridge("bert"), TEXTS)
    model = tiny.bridge("llama")
    name = "blocks.1.attn.hook_v"
    model.hook_dict[name].add_hook(lambda value, hook: None)
    ids = model.to_tokens(TEXTS[0])
    _, cache = model.run_with_cache(ids)
    edited = {key: value * (2 if key == name else 1) for key, value in cache.items()}
    with pytest.raises(
        ValueError, match=r"weights times values to what the heads of layer 1 of tiny-llama put out; got"
    ):
        lp.SourceAttribution().from_cache(model, ids, edited)
