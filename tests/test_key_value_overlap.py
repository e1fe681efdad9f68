"""KeyValueOverlap: angles by hand, by scipy and by TransformerLens, random subspaces, and what folding does."""

import numpy as np
import pytest
import torch
from scipy.linalg import subspace_angles

import lens_probes as lp
from lens_probes.examples import tiny
from lens_probes.model import ModelView
from lens_probes.probes.key_value_overlap import folded, principal_cosines, random_overlap


def test_angles_by_hand_and_by_scipy():
    # The xy plane against one that shares x and leans 60 degrees from y towards z.
    leaning = torch.tensor([[1.0, 0.0], [0.0, 0.5], [0.0, 0.75**0.5]])
    found = principal_cosines(torch.eye(3)[:, :2], leaning[None])
    assert found[0].tolist() == pytest.approx([1.0, 0.5], abs=1e-6)
    random = torch.Generator().manual_seed(0)
    one, other = torch.randn(2, 12, 4, generator=random)
    expected = np.sort(np.cos(subspace_angles(one.numpy(), other.numpy())))[::-1]
    assert principal_cosines(one, other[None])[0].tolist() == pytest.approx(expected.tolist(), abs=1e-5)


def test_dependent_columns_bring_no_direction():
    one, other = torch.zeros(2, 16, 4)
    one[0], other[1] = 1.0, 1.0  # one direction each, at right angles
    assert principal_cosines(one, other[None]).max() == 0
    assert principal_cosines(one, one[None])[0].tolist() == pytest.approx([1, 0, 0, 0], abs=1e-6)


def test_random_subspaces_overlap_by_their_share_of_the_directions():
    low, high = random_overlap(64, 16)
    assert low < 16 / 64 < high and high - low < 0.08


def test_equal_keys_and_values_overlap_wholly_and_the_models_read_through_their_norms():
    model = tiny.bridge("llama")
    view = ModelView(model)
    result = lp.KeyValueOverlap().run(model, "Any.")
    norm = model.blocks[1].ln1.original_component.weight.detach()[:, None]
    keys, values = norm * view.W_K(1)[1], norm * view.W_V_shared(1)[1]
    expected = np.cos(subspace_angles(keys.numpy(), values.numpy()))
    assert sorted(result.cosine[1, 1].tolist()) == pytest.approx(sorted(expected.tolist()), abs=1e-4)
    assert view.W_K(0).shape == view.W_V_shared(0).shape == (2, 32, 8)
    torch.testing.assert_close(principal_cosines(keys, keys[None]), torch.ones(1, 8))


def test_it_is_the_normalized_projection_kernel_of_transformerlens():
    tools = pytest.importorskip(
        "transformer_lens.tools.analysis.projection_kernel", reason="this TransformerLens has no projection kernel"
    )
    model = tiny.bridge("gpt2")
    view, result = ModelView(model), lp.KeyValueOverlap().run(model, "Any.")
    for layer in range(3):
        norm = view.input_norm(layer)
        keys, values = (folded(read, norm.weight, norm.centred) for read in (view.W_K(layer), view.W_V_shared(layer)))
        for head in range(view.n_kv_heads):
            kernel = tools.projection_kernel(*(tools.orthonormal_subspace(each[head]) for each in (keys, values)))
            assert float(result.overlap[layer, head]) == pytest.approx(float(kernel.normalized), abs=1e-5)
            torch.testing.assert_close(result.cosine[layer, head], kernel.cosines, rtol=0, atol=1e-4)
    d_head = result.cosine.shape[-1]
    random = tools.random_projection_kernel_moments(view.d_model, d_head)
    assert float(result.null_mean) == pytest.approx(random.mean / d_head)
    spread = random.variance**0.5 / d_head
    assert random.mean / d_head - 4 * spread < float(result.null_low) < random.mean / d_head - spread
    assert random.mean / d_head + spread < float(result.null_high) < random.mean / d_head + 4 * spread


def test_a_centring_norm_hides_the_mean_of_what_weights_read():
    weights = torch.randn(2, 8, 3, generator=torch.Generator().manual_seed(0))
    read = folded(weights, torch.ones(8), centred=True)
    torch.testing.assert_close(folded(weights + 5, torch.ones(8), centred=True), read, rtol=0, atol=1e-5)
    assert not torch.allclose(folded(weights + 5, torch.ones(8), centred=False), weights)


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "opt", "neox", "qwen3"])
def test_raw_and_processed_weights_overlap_alike(architecture):
    raw, processed = (
        lp.KeyValueOverlap().run(tiny.bridge(architecture, processed=each), "Any.") for each in (False, True)
    )
    torch.testing.assert_close(raw.overlap, processed.overlap, rtol=0, atol=1e-4)


def test_the_figure_names_what_chance_gives():
    result = lp.KeyValueOverlap(layers=[2]).run(tiny.bridge("qwen3"), "Any.")
    figure = result.figure()
    drawn = torch.cat([result.overlap, result.null_mean.expand(1, 1)], dim=1).tolist()
    assert [list(row) for row in figure.data[0].z] == drawn
    assert [list(row) for row in figure.data[0].text] == [[f"{x:.2f}" for x in row] for row in drawn]
    assert f"(null: random subspaces, {float(result.null_mean):.3f}, 95 %" in figure.layout.title.text
