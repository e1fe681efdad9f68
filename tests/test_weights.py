"""Any vector read into tokens: against the model's own head and plain linear algebra."""

import pytest
import torch

import lens_probes as lp
from lens_probes.examples import tiny
from lens_probes.model import ModelView


def test_a_state_is_read_as_the_lens_reads_it():
    model = tiny.bridge("gpt2")
    lens = lp.LogitLens(target="own", top_k=4).run(model, "Time flies like an arrow.")
    _, cache = model.run_with_cache(lens.token.id[None])
    reading = lp.read_vector(model, cache["blocks.2.hook_resid_post"][0], top_k=4)
    assert torch.equal(reading.top_ids, lens.top_ids[-1])
    torch.testing.assert_close(reading.top_log_prob, lens.top_log_prob[-1], rtol=0, atol=1e-3)
    torch.testing.assert_close(reading.entropy, lens.entropy[-1], rtol=0, atol=1e-3)


def test_the_two_ends_are_the_largest_and_smallest_logits(cell):
    model = cell.build()
    vectors = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    reading = lp.read_vector(model, vectors, top_k=3, bottom_k=2)
    log_prob = ModelView(model).unembed(vectors * 32**0.5 / vectors.norm(dim=1, keepdim=True)).log_softmax(-1)
    order = log_prob.argsort(-1, descending=True)
    assert torch.equal(reading.top_ids, order[:, :3])
    assert torch.equal(reading.bottom_ids, order.flip(-1)[:, :2])
    torch.testing.assert_close(reading.top_log_prob, log_prob.gather(1, order[:, :3]).detach(), rtol=0, atol=1e-4)


def test_length_does_not_matter_and_direction_does():
    model = tiny.bridge("llama")
    vector = torch.randn(32, generator=torch.Generator().manual_seed(1))
    short, long, back = (lp.read_vector(model, scale * vector, top_k=5) for scale in (1e-6, 1e4, -1.0))
    assert torch.equal(short.top_ids, long.top_ids) and not torch.equal(short.top_ids, back.top_ids)
    torch.testing.assert_close(short.top_log_prob, long.top_log_prob, rtol=0, atol=1e-4)


def test_an_unembedding_column_is_read_as_its_own_token():
    model = tiny.bridge("llama")
    with torch.no_grad():
        model.ln_final.original_component.weight.fill_(1.0)
    directions = torch.nn.functional.normalize(ModelView(model).unembedding, dim=1)
    closest = (directions @ ModelView(model).unembedding.T).argmax(-1)
    assert torch.equal(lp.read_vector(model, directions, top_k=1).top_ids[:, 0], closest)


def test_a_neurons_vector_is_what_it_adds_when_it_is_active(decoder):
    model, layer = decoder.build(), 1
    vectors = lp.neuron_vectors(model, layer)
    ids = torch.arange(5, 12)[None]
    with torch.no_grad():
        _, cache = model.run_with_cache(ids)
    post = cache[f"blocks.{layer}.mlp.hook_post"].reshape(7, -1).float()
    written = post @ vectors.to(post.device)
    out = cache[f"blocks.{layer}.hook_mlp_out"][0].float()
    if decoder.architecture == "gemma2":  # which norms what the MLP adds: the same direction up to that norm's weight
        return_to = ModelView(model)._norm(model.blocks[layer].ln2_post).weight
        out = out / return_to
        out, written = (torch.nn.functional.normalize(x, dim=-1) for x in (out, written))
    offset = (out - written)[0]  # the MLP's bias, the same at every token
    torch.testing.assert_close(out - written, offset.expand_as(out), rtol=0, atol=1e-4)


def test_a_neurons_vector_has_the_factor_with_which_the_model_adds_it():
    source = tiny.huggingface("granite")
    expected = 0.22 * source.model.layers[1].mlp.down_proj.weight.detach().T
    torch.testing.assert_close(lp.neuron_vectors(tiny.bridge("granite"), 1), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("architecture", ["neox", "opt", "bert", "gptj"])
def test_neurons_that_do_not_add_up_to_what_the_mlp_adds_are_refused(architecture):
    model = tiny.bridge(architecture)
    for block in model.blocks:  # a factor that stands nowhere
        block.mlp.out.original_component.register_forward_hook(lambda module, given, output: 3 * output)
    with pytest.raises(
        ValueError, match=rf"outputs of the neurons of layer 1 of tiny-{architecture} must add up to what the MLP"
    ):
        lp.neuron_vectors(model, 1)


def test_experts_have_no_one_vector_a_neuron(monkeypatch):
    settings = tiny._RARE["granite"][1] | {"num_local_experts": 2, "num_experts_per_tok": 1}
    monkeypatch.setitem(tiny._RARE, "granite", ("GraniteMoeForCausalLM", settings))
    with pytest.raises(ValueError, match=r"layer 1 of tiny-granite must have one MLP.*mixture of experts: use another"):
        lp.neuron_vectors(tiny.bridge("granite"), 1)


@pytest.mark.parametrize(
    "probe",
    [
        lp.MaxActivatingExamples(k=1),
        lp.MaxActivatingTokens(1, [3], steps=1),
        lp.TopicActivity(component="neuron"),
        lp.TopicAblation(k=1, draws=1),
    ],
)
def test_experts_have_no_neurons_although_the_output_of_their_mlp_has_the_name(latent, probe):
    with pytest.raises(
        ValueError, match=r"the neurons of layer 1 of tiny-llama must have an activation; got blocks\.1"
    ):
        probe.run(latent, lp.demo.topics())


def test_the_dense_layers_of_a_mixture_of_experts_have_neurons(latent):
    text = "Time flies like an arrow."
    found = lp.TopicActivity(component="neuron", layers=[0]).run(latent, text)
    taken = []
    down = latent.original_model.model.layers[0].mlp.down_proj
    with down.register_forward_pre_hook(lambda module, given: taken.append(given[0])):
        latent.original_model(latent.to_tokens(text))
    torch.testing.assert_close(found.mean[0, 0], taken[0][0, 1:].mean(0))


def test_a_heads_directions_are_the_singular_vectors_of_its_whole_matrix(decoder):
    model, view = decoder.build(), ModelView(decoder.build())
    found = lp.ov_vectors(model, layer=2, head=3, k=4)
    W_OV = view.W_V(2)[3] @ view.W_O(2)[3]
    expected = torch.linalg.svd(W_OV).Vh[:4]
    torch.testing.assert_close((found @ expected.T).abs(), torch.eye(4), rtol=0, atol=1e-3)
    assert (found.gather(1, found.abs().argmax(1, keepdim=True)) > 0).all()


def test_with_grouped_queries_neighbouring_heads_read_the_same_values():
    values = tiny.huggingface("llama").model.layers[2].self_attn.v_proj.weight.detach().unflatten(0, (2, 8))
    found = ModelView(tiny.bridge("llama")).W_V(2)
    for head in range(4):
        torch.testing.assert_close(found[head], values[head // 2].T)


@pytest.mark.usefixtures("as_users_run_it")
def test_what_is_no_vector_of_the_model_is_refused():
    model = tiny.bridge("gpt2")
    with pytest.raises(
        ValueError, match=r"vectors must be \[unit d_model\] with d_model 32 for tiny-gpt2; got \(3, 31\)"
    ):
        lp.read_vector(model, torch.ones(3, 31))
    for bad in (torch.zeros(2, 32), torch.full((1, 32), torch.nan)):
        with pytest.raises(ValueError, match="must be finite and not zero; got vector 0, which is not"):
            lp.read_vector(model, bad)
    with pytest.raises(ValueError, match=r"must be 0 to 400, .* and not both 0; got 0 and 0"):
        lp.read_vector(model, torch.ones(32), top_k=0)
    with pytest.raises(ValueError, match="head 4 is out of range: layer 1 of tiny-gpt2 has heads 0 to 3"):
        lp.ov_vectors(model, 1, 4)
    with pytest.raises(ValueError, match="k must be a number of directions, 1 to 8 for this head; got 9"):
        lp.ov_vectors(model, 1, 0, k=9)
    with pytest.raises(TypeError, match=r"top_k must be a whole number; got 2\.5"):
        lp.read_vector(model, torch.ones(32), top_k=2.5)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="layer 3 is out of range"):
        lp.neuron_vectors(model, 3)
    with pytest.raises(ValueError, match=r"names must be a list of 2 names, one per vector; got \['one'\]"):
        lp.read_vector(model, torch.ones(2, 32), names=["one"])


def test_vectors_may_come_as_lists_and_arrays():
    model, vector = tiny.bridge("gpt2"), torch.linspace(-1, 2, 32)
    asked = [lp.read_vector(model, kind, top_k=3).top_ids for kind in (vector, vector.tolist(), vector.numpy()[None])]
    assert torch.equal(asked[0], asked[1]) and torch.equal(asked[0], asked[2])


def test_a_reading_has_a_table_a_frame_and_a_file(tmp_path):
    model = tiny.bridge("gpt2")
    reading = lp.read_vector(model, lp.neuron_vectors(model, 0), top_k=3, bottom_k=2)
    assert len(reading.to_frame()) == 128 * 3 and len(reading.to_frame("bottom_ids")) == 128 * 2
    drawn = reading.figure(first=100)
    assert len(drawn.to_dict()["data"][0]["cells"]["values"][0]) == 28
    assert "100 to 127 of 128" in drawn.layout.title.text
    with pytest.raises(ValueError, match="first must be the number of a vector, 0 to 127; got 128"):
        reading.figure(first=128)
    reading.save(tmp_path / "r.safetensors")
    assert torch.equal(lp.VectorReading.load(tmp_path / "r.safetensors").top_ids, reading.top_ids)
    named = lp.read_vector(model, lp.ov_vectors(model, 0, 1, k=2), names=["L0H1 first", "<b>L0H1</b>"])
    assert named.unit == ("L0H1 first", "<b>L0H1</b>") and "<b>L0H1" not in str(named.figure().to_json())


def test_attention_in_another_form_is_refused_by_its_layer(monkeypatch):
    view = ModelView(tiny.bridge())

    def compressed(attention):
        raise NotImplementedError("compressed projections")

    monkeypatch.setattr(type(view.model.blocks[1].attn), "W_K", property(compressed))
    with pytest.raises(ValueError, match="the attention of layer 0 of tiny-gpt2 must have one W_K per head; got "):
        lp.KeyValueOverlap().run(view.model, "one two")


def test_a_pass_names_the_activation_that_a_model_lacks():
    view, ids = ModelView(tiny.bridge()), torch.tensor([[5, 6]])
    with pytest.raises(ValueError, match=r"'blocks\.0\.attn\.hook_zz' does not exist in tiny-gpt2 .*: did you mean"):
        view.run_until(ids, ["blocks.0.attn.hook_zz"])
    with pytest.raises(ValueError, match=r"'blocks\.0\.attn\.hook_zz' does not exist in tiny-gpt2 .*: did you mean"):
        view.activations(ids, torch.ones_like(ids, dtype=torch.bool), ["blocks.0.attn.hook_zz"])
    with pytest.raises(ValueError, match=r"'blocks\.0\.hook_resid_poste' does not exist"):
        view.edited(ids, torch.ones_like(ids, dtype=torch.bool), [], {"blocks.0.hook_resid_poste": torch.abs})
