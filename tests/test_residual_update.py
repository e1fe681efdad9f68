"""ResidualUpdate against its definition, its control, and the model."""

import pytest
import torch

import lens_probes as lp
from lens_probes.examples import tiny
from lens_probes.model import ModelView
from lens_probes.probes.residual_update import prompt_sums
from lens_probes.text.prompts import tokenize

PARTS = {  # what adds to the stream, by Hugging Face's names
    "gpt2": ("attn", "mlp"),
    "neox": ("attention", "mlp"),
    "gemma2": ("post_attention_layernorm", "post_feedforward_layernorm"),
    "bert": ("attention.output.dense", "output.dense"),
}
TEXTS = ["Time flies like an arrow.", "Fruit flies like a banana, and nobody told the cat.", "A dog."]


def steps(model, ids, layer):
    _, cache = model.run_with_cache(ids[None])
    before, after = (cache[f"blocks.{layer}.hook_resid_{at}"][0].detach().double() for at in ("pre", "post"))
    return before, after - before


def test_prompt_sums_adds_the_vectors_of_each_prompt():
    vectors = torch.tensor([[1.0, 0.0], [2.0, 1.0], [5.0, 5.0]], dtype=torch.float64)
    assert prompt_sums(vectors, torch.tensor([0, 0, 2]), 3).tolist() == [[3.0, 1.0], [0.0, 0.0], [5.0, 5.0]]


@pytest.mark.parametrize("architecture", ["gpt2", "neox", "gemma2", "bert"])
def test_length_norm_and_cosine_are_those_of_the_difference_of_two_states(architecture):
    model = tiny.bridge(architecture)
    result = lp.ResidualUpdate(layers=[1]).run(model, TEXTS[0])
    before, step = steps(model, result.token.id, 1)
    cosine = (before * step).sum(-1) / (before.norm(dim=-1) * step.norm(dim=-1))
    torch.testing.assert_close(result.length[0].double(), step.norm(dim=-1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(result.norm[0].double(), before.norm(dim=-1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(result.cosine[0].double(), cosine, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(result.relative_length, result.length / result.norm)


@pytest.mark.parametrize("architecture", ["gpt2", "neox", "gemma2", "bert"])
def test_attention_and_mlp_add_what_hugging_faces_modules_return(architecture):
    ids, added = tokenize(TEXTS[0], ModelView(tiny.bridge(architecture))).id, {}
    reference = tiny.huggingface(architecture)
    attention, mlp = PARTS[architecture]
    for name, part in reference.named_modules():
        if name.endswith((f"1.{attention}", f"1.{mlp}")):
            part.register_forward_hook(
                lambda module, given, output, name=name: added.update(
                    {name.rsplit(".1.")[1]: (output[0] if isinstance(output, tuple) else output)[0]}
                )
            )
    with torch.no_grad():
        reference(ids[None])
    for component, name in (("attention", attention), ("mlp", mlp)):
        result = lp.ResidualUpdate(component=component, layers=[1]).run(tiny.bridge(architecture), ids[None])
        torch.testing.assert_close(result.length[0], added[name].norm(dim=-1), rtol=1e-4, atol=1e-4)
        assert (
            result.quantity("length").says
            == f"length of {'attention' if component == 'attention' else 'the MLP'}'s step"
        )


def test_attention_and_mlp_together_are_the_layer():
    model = tiny.bridge("neox")  # in parallel
    layer, attention, mlp = lp.run(
        [lp.ResidualUpdate(component=component) for component in ("layer", "attention", "mlp")], model, TEXTS
    )
    whole = (layer.cosine * layer.length).double()
    parts = (attention.cosine * attention.length + mlp.cosine * mlp.length).double()  # along the same state
    torch.testing.assert_close(whole, parts, rtol=1e-3, atol=1e-4)


def test_agreement_is_the_mean_over_pairs_within_a_prompt_and_its_control_over_pairs_of_different_prompts():
    model = tiny.bridge("gpt2")
    result = lp.ResidualUpdate(layers=[2]).run(model, TEXTS)
    units, owners = [], []
    for number, prompt in result.token.by_prompt():
        _, step = steps(model, prompt.id, 2)
        step = step[~prompt.special]
        units.append(step / step.norm(dim=-1, keepdim=True))
        owners += [number] * len(step)
    cosines, owner = torch.cat(units) @ torch.cat(units).T, torch.tensor(owners)
    apart = ~torch.eye(len(owner), dtype=torch.bool)
    for number in range(3):
        pairs = (owner[:, None] == number) & (owner == number) & apart
        assert float(result.agreement[0, number]) == pytest.approx(float(cosines[pairs].mean()), abs=1e-4)
    between = cosines[owner[:, None] != owner].mean()
    assert float(result.agreement_between[0]) == pytest.approx(float(between), abs=1e-4)


def test_a_prompt_of_one_ordinary_token_has_no_agreement_and_a_single_prompt_no_control():
    result = lp.ResidualUpdate().run(tiny.bridge("gpt2"), [[0, 7]])
    assert result.token.special.tolist() == [True, False]
    assert result.agreement.isnan().all()
    assert result.agreement_between.isnan().all()


def test_tokens_pushed_the_same_way_agree_entirely():
    model = tiny.bridge("gpt2")
    with torch.no_grad():
        for block in model.blocks:
            block.attn.o.original_component.weight.zero_()
            block.mlp.out.original_component.weight.zero_()
            block.mlp.out.original_component.bias.fill_(1.0)
    result = lp.ResidualUpdate().run(model, TEXTS)
    torch.testing.assert_close(result.agreement, torch.ones_like(result.agreement), atol=1e-4, rtol=0)
    torch.testing.assert_close(result.agreement_between, torch.ones(3), atol=1e-4, rtol=0)


def test_the_agreement_table_sets_the_mean_of_prompts_beside_its_control():
    result = lp.ResidualUpdate().run(tiny.bridge("gpt2"), lp.demo.sentences()[:7])
    table = result.agreement_table()
    assert table["agreement"].tolist() == pytest.approx(result.agreement.mean(1).tolist(), abs=1e-5)
    assert (table["low"] <= table["agreement"]).all() and (table["agreement"] <= table["high"]).all()
    assert (table["difference"] - (table["agreement"] - table["between_prompts"])).abs().max() < 1e-9
    assert set(table["prompts"]) == {7}


def test_the_figure_has_a_panel_for_each_question():
    figure = lp.ResidualUpdate().run(tiny.bridge("gpt2"), lp.demo.sentences()[:6]).figure()
    titles = [figure.layout[f"yaxis{i}"].title.text for i in ("", "2", "3")]
    assert [title.split(" ")[0] for title in titles] == ["length", "cosine", "mean"]
    assert figure.layout.yaxis.type == "log"
    assert "tokens of different prompts" in [trace.name for trace in figure.data]
