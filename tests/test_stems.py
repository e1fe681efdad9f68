"""Stems: by hand, against Hugging Face's own modules, and a model that reads patches, with and without its mask."""

import pytest
import torch

from lens_probes import stems
from lens_probes.examples import tiny
from lens_probes.model import ModelView, StemView
from lens_probes.stems import PatchStem, grid_of, per_patch


@pytest.fixture
def images():
    return torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def test_patches_are_projected_row_by_row(images):
    random = torch.Generator().manual_seed(1)
    weight, bias = torch.randn(5, 3, 4, 8, generator=random), torch.randn(5, generator=random)
    made = PatchStem(weight, bias)(images)
    assert made.shape == (3, 8, 5)
    for patch in range(8):
        row, column = patch // 2 * 4, patch % 2 * 8
        pixels = images[:, :, row : row + 4, column : column + 8].flatten(1)
        torch.testing.assert_close(made[:, patch], pixels @ weight.flatten(1).T + bias)


def test_the_stem_of_a_vision_transformer_is_its_patch_projection(images):
    model = tiny.vit()
    (own,) = (part for part in model.original_model.modules() if type(part).__name__ == "ViTPatchEmbeddings")
    with torch.no_grad():
        torch.testing.assert_close(stems.of_images(model)(images), own(images))


@pytest.mark.parametrize("patch", [2, 4])  # 12 and 48 values to 32
def test_a_random_stem_is_orthogonal_and_has_the_scale_of_the_vocabulary(patch):
    model = tiny.bridge()
    stem = stems.orthogonal(model, patch)
    rows = stem.weight.flatten(1).double()
    square = rows @ rows.T if rows.shape[0] < rows.shape[1] else rows.T @ rows
    torch.testing.assert_close(square / square[0, 0], torch.eye(len(square)).double(), rtol=0, atol=1e-6)
    made = stem(torch.rand(200, 3, 4 * patch, 4 * patch, generator=torch.Generator().manual_seed(2)))
    vocabulary = ModelView(model).token_embeddings
    assert float(made.std()) == pytest.approx(float(vocabulary.std(0).mean()), rel=0.05)
    assert float(made.mean((0, 1)).abs().max()) < 0.1 * float(made.std())
    torch.testing.assert_close(stem(torch.full((1, 3, patch, patch), 0.5)), torch.zeros(1, 1, 32), rtol=0, atol=1e-5)


def test_a_random_stem_is_seeded():
    model = tiny.bridge()
    one, again, other = (stems.orthogonal(model, 4, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(one.weight, again.weight) and not torch.equal(one.weight, other.weight)
    assert repr(one) == repr(again) != repr(other) and "3 x 4 x 4 to 32" in repr(one)


def test_what_a_stem_reads_is_all_that_its_patches_depend_on(images):
    stem = stems.orthogonal(tiny.bridge(), 4)
    read = stem.read(images)
    torch.testing.assert_close(stem(read) - stem.bias, stem(images) - stem.bias)
    torch.testing.assert_close(stem.read(read), read)
    squares = [each.square().sum() for each in (read, images - read, images)]
    torch.testing.assert_close(squares[0] + squares[1], squares[2])
    assert squares[1] > 0.01 * squares[2]
    whole = stems.orthogonal(tiny.bridge(), 2)
    torch.testing.assert_close(whole.read(images), images)


def test_the_root_mean_square_of_a_patch_is_over_channels_and_pixels():
    images = torch.zeros(2, 2, 2, 4, 4)
    images[0, 1, 0, :2, 2:] = 2.0
    found = per_patch(images, rows=2)
    expected = torch.zeros(2, 2, 4)
    expected[0, 1, 1] = 2**0.5
    torch.testing.assert_close(found, expected)


def test_states_of_patches_are_those_of_a_pass_with_these_embeddings(raw, images):
    stem = stems.orthogonal(tiny.bridge(), 4)
    view, reference = StemView(raw.build(), stem), tiny.huggingface(raw.architecture)
    found = view.activation(images, view.hook("resid_post", 1))
    seen = []
    blocks = next(
        part for part in reference.modules() if isinstance(part, torch.nn.ModuleList) and len(part) == view.n_layers
    )
    blocks[1].register_forward_hook(lambda part, given, made: seen.append(made[0] if isinstance(made, tuple) else made))
    with torch.no_grad():
        reference(inputs_embeds=stem(images))
    if view.encoder:  # the stream after a block is normed
        assert seen[0].shape == found.shape
    torch.testing.assert_close(found, seen[0], rtol=1e-3, atol=1e-4)


def dependence(view: StemView, images: torch.Tensor, at: int) -> torch.Tensor:
    """The largest gradient of the state of a patch by the pixels of every patch."""
    pixels = images.clone().requires_grad_()
    with torch.enable_grad():
        states = view.activation(pixels, view.hook("resid_post", view.n_layers - 1))
        weights = torch.randn(states.shape[-1], generator=torch.Generator().manual_seed(0))
        (slope,) = torch.autograd.grad((states[:, at] @ weights.to(states)).sum(), pixels)
    return per_patch(slope, 4).amax(0)


def test_later_patches_have_no_gradient_under_the_mask_and_some_without_it(decoder, images):
    model, stem = decoder.build(), stems.orthogonal(tiny.bridge(), 4)
    masked, free = dependence(StemView(model, stem), images, 5), None
    assert (masked[6:] == 0).all() and (masked[:6] > 0).all()
    free = dependence(StemView(model, stem, masked=False), images, 5)
    assert (free > 0).all()


def test_without_the_mask_states_are_those_of_hugging_face_without_it(decoder, images):
    stem = stems.orthogonal(tiny.bridge(), 4)
    view, reference = StemView(decoder.build(), stem, masked=False), tiny.huggingface(decoder.architecture)
    if decoder.processed or decoder.architecture == "opt":  # OPT takes no mask of this shape without positions
        pytest.skip("the reference has raw weights, and its first state is not centred")
    reference.set_attn_implementation("eager")
    seen, n = [], 16
    blocks = next(
        part for part in reference.modules() if isinstance(part, torch.nn.ModuleList) and len(part) == view.n_layers
    )
    blocks[2].register_forward_hook(lambda part, given, made: seen.append(made[0] if isinstance(made, tuple) else made))
    with torch.no_grad():
        reference(inputs_embeds=stem(images), attention_mask=torch.zeros(len(images), 1, n, n))
    torch.testing.assert_close(view.activation(images, view.hook("resid_post", 2)), seen[0], rtol=1e-3, atol=1e-4)


def test_the_model_has_its_mask_again_afterwards(decoder, images):
    model, ids = decoder.build(), torch.arange(3, 19).reshape(2, 8)
    before, direction = model(ids), model.cfg.attention_dir
    stem = stems.orthogonal(tiny.bridge(), 4)
    view = StemView(model, stem, masked=False)
    view.activation(images, view.hook("resid_post", 1))

    def fails(activation, hook):
        raise RuntimeError("deliberate")

    with pytest.raises(RuntimeError, match="deliberate"), view.adapter.unmasked(stem(images)):
        model.run_with_hooks(ids, fwd_hooks=[("blocks.0.hook_resid_pre", fails)])
    assert torch.equal(model(ids), before) and model.cfg.attention_dir == direction


def test_an_encoder_has_no_mask_to_lose(images):
    model, stem = tiny.bridge("bert"), stems.orthogonal(tiny.bridge("bert"), 4)
    one, other = (StemView(model, stem, masked=masked) for masked in (True, False))
    hook = one.hook("resid_post", 2)
    torch.testing.assert_close(one.activation(images, hook), other.activation(images, hook))
    assert one.attention == other.attention == "all patches"


def test_a_model_that_masks_in_a_way_of_its_own_is_refused():
    model = tiny.bridge("gpt_neo")
    with pytest.raises(ValueError, match="must let tokens attend to later ones; got tiny-gpt_neo"):
        StemView(model, stems.orthogonal(model, 4), masked=False)


@pytest.mark.usefixtures("as_users_run_it")
def test_bad_input_is_refused(images):
    model = tiny.bridge()
    view = StemView(model, lambda images: images)
    with pytest.raises(ValueError, match=r"must return a tensor \[image patch 32\]; got <Tensor of shape"):
        view.activation(images, view.hook("resid_post", 0))
    view = StemView(model, stems.orthogonal(model, 1))
    with pytest.raises(ValueError, match="must have at most 64 patches; got 256"):
        view.activation(images, view.hook("resid_post", 0))
    with pytest.raises(ValueError, match=r"\[image 3 height width\] with patches of 4 x 4; got"):
        stems.orthogonal(model, 4)(images[:, :, :, :15])
    for patch, says in ((0, "0"), ("4", "'4'"), (2.5, "2.5")):
        with pytest.raises(ValueError, match=f"patch and channels must be whole numbers, 1 or more; got {says} and 3"):
            stems.orthogonal(model, patch)
    for wrong in (images.numpy(), images[0], images.movedim(1, -1)):
        with pytest.raises(ValueError, match=r"patches of 4 x 4; got .*: crop them, or put channels before height and"):
            stems.orthogonal(model, 4)(wrong)
    with pytest.raises(ValueError, match=r"must be squares that tile the image; got 7 patches"):
        grid_of(7, 16, 16)
    with pytest.raises(ValueError, match="masked=False needs a model of text and a stem"):
        stems.view_with(tiny.vit(), None, masked=False)
    with pytest.raises(TypeError, match="TransformerBridge of a vision transformer"):
        stems.of_images(model)
