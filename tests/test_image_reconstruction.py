"""ImageReconstruction: a layer that can be inverted by hand, Hugging Face's own states, rows, refusals."""

from typing import Any

import numpy as np
import pytest
import torch
from conftest import HAS_HOOKED

import lens_probes as lp
from lens_probes import stems
from lens_probes.examples import tiny
from lens_probes.experiments import image_reconstruction
from lens_probes.result import Provenance


@pytest.fixture
def images():
    return torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def random_stem() -> stems.PatchStem:
    return stems.orthogonal(tiny.bridge(), 4)


def search(layer: int = 1, stem: Any = "random", **settings: Any):
    stem = random_stem() if stem == "random" else stem
    return lp.ImageReconstruction(layer, **{"stem": stem, "steps": 10} | settings)


def by_huggingface(images, model="gpt2", layer=1):
    """The states of patches by the plain model."""
    with torch.no_grad():
        embeddings = random_stem()(images)
        return tiny.huggingface(model)(inputs_embeds=embeddings, output_hidden_states=True).hidden_states[layer + 1]


def test_a_layer_that_only_holds_the_patches_gives_an_isometry_back(images):
    stem = stems.orthogonal(tiny.bridge(), 2)  # 12 values to 32
    result = search(0, stem, at="resid_pre", steps=150).run(tiny.bridge(), images[:1], progress=False)
    assert result.pixel_error.max() < 0.01 and result.unread_error.max() < 1e-3
    assert result.cosine.min() > 0.999 and result.reached.tolist() == [1]
    assert result.relative_distance.max() < 0.2


def test_what_a_stem_does_not_read_is_not_found(images):
    result = search(0, at="resid_pre", steps=150).run(tiny.bridge(), images[:1], progress=False)  # 48 values to 32
    assert result.read_error.max() < 0.01
    lost = (result.pixels - result.given) - random_stem().read(result.pixels - result.given)
    torch.testing.assert_close(result.unread_error, stems.per_patch(lost, 4), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(
        result.pixel_error.square(), result.read_error.square() + result.unread_error.square(), rtol=1e-3, atol=1e-6
    )
    assert result.unread_error.mean() > 0.05
    stem = random_stem()  # what can be found has the stem's patches of the image
    torch.testing.assert_close(stem(result.readable), stem(result.given), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("maker", ["bridge", pytest.param("hooked", marks=pytest.mark.matrix)])
def test_distances_are_those_of_hugging_faces_states(images, maker):
    if maker == "hooked" and not HAS_HOOKED:
        pytest.skip("TransformerLens 4 has no HookedTransformer")
    result = search().run(getattr(tiny, maker)(), images, progress=False)
    goal = by_huggingface(result.given)
    torch.testing.assert_close(result.state_norm, goal.norm(dim=-1), rtol=1e-4, atol=1e-5)
    apart = (by_huggingface(result.pixels) - goal).norm(dim=-1)
    torch.testing.assert_close(result.distance, apart, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(result.path_loss[-1], (apart / goal.norm(dim=-1)).mean(1), rtol=1e-3, atol=1e-4)
    stem = random_stem()
    cosine = torch.cosine_similarity(stem(result.pixels), stem(result.given), dim=-1)
    torch.testing.assert_close(result.cosine, cosine)


def test_the_yardstick_is_the_image_plus_a_little_noise(images):
    result = search().run(tiny.bridge(), images, progress=False)
    drawn = [
        (by_huggingface(images + torch.randn(images.shape, generator=torch.Generator().manual_seed(seed)) / 16)
         - by_huggingface(images)).norm(dim=-1)
        for seed in range(5)
    ]  # fmt: skip
    ratio = result.noise_distance.mean() / torch.stack(drawn).mean()
    assert 0.8 < float(ratio) < 1.25
    assert result.reached.tolist() == (result.distance.sum(1) < result.noise_distance.sum(1)).float().tolist()


def test_of_a_vision_transformer_patches_are_counted_and_not_its_class_token(images):
    model = tiny.vit()
    result = search(1, None, steps=60).run(model, images, progress=False)
    with torch.no_grad():
        goal, found = (
            model.original_model(each, output_hidden_states=True).hidden_states[2] for each in (images, result.pixels)
        )
    torch.testing.assert_close(result.distance, (found - goal)[:, 1:].norm(dim=-1), rtol=1e-3, atol=1e-4)
    assert result.patch[:5] == ("0,0", "0,1", "0,2", "0,3", "1,0") and len(result.patch) == 16
    assert (result.path_loss[-1] < 0.8 * result.path_loss[0]).all() and result.attention == "all patches"
    assert result.read_error is not None and (result.cosine.mean(1) > result.start_cosine.mean(1)).all()


def test_pixels_stay_within_bounds_and_an_image_does_not_depend_on_others(images):
    result = search(steps=20, rate=0.3).run(tiny.bridge(), images, progress=False)
    assert result.pixels.min() >= 0 and result.pixels.max() <= 1
    alone = search(steps=20, rate=0.3).run(tiny.bridge(), images[1:2], progress=False)
    torch.testing.assert_close(alone.pixels[0], result.pixels[1], rtol=0, atol=1e-4)
    wide = search(bounds=(-1.0, 3.0), steps=20).run(tiny.bridge(), images * 4 - 1, progress=False)
    assert wide.pixels.min() < -0.1 or wide.pixels.max() > 1.1
    error = (wide.pixels - wide.given).square().mean((1, 2, 3)).sqrt().double() / 4
    assert wide.by_image()["pixel_error"].to_numpy() == pytest.approx(error.numpy())


def test_a_step_is_as_large_as_the_range_of_the_pixels_says(images):
    near, far = (
        search(bounds=(-1.0, 3.0), steps=1, rate=rate).run(tiny.bridge(), images[:1], progress=False).pixels
        for rate in (0.01, 0.02)
    )
    assert float((far - near).abs().max()) == pytest.approx(0.01 * 4, rel=0.01)


def test_of_several_restarts_the_lowest_loss_counts(images):
    several, one = (search(restarts=n).run(tiny.bridge(), images, progress=False) for n in (4, 1))
    assert (several.path_loss[-1] <= one.path_loss[-1] + 1e-6).all()
    assert (several.path_loss[-1] < one.path_loss[-1] - 1e-4).any()


def test_the_loss_falls_and_a_model_without_its_mask_gives_others(images):
    masked, free = (
        search(masked=masked, steps=20).run(tiny.bridge("llama"), images[:2], progress=False)
        for masked in (True, False)
    )
    assert (masked.path_loss[-1] < masked.path_loss[0]).all()
    assert masked.attention == "its own and earlier patches" and free.attention == "all patches"
    assert not torch.allclose(masked.state_norm[:, 0], free.state_norm[:, 0])
    torch.testing.assert_close(masked.start_error, free.start_error)
    table = masked.compare_with(free)
    assert table["effect"][0] == pytest.approx(float(masked.pixel_error.mean() - free.pixel_error.mean()), abs=1e-6)


def by_hand(error: torch.Tensor, **more: Any) -> lp.ImageReconstructionResult:
    """A result of 2 x 2 patches with these errors and starts of 0.5."""
    n = len(error)
    known = {name: torch.ones(n, 4) for name in ("distance", "noise_distance", "state_norm")}
    zeros = torch.zeros(n, 1, 2, 2)
    return lp.ImageReconstructionResult(
        **known
        | {"start_error": torch.full((n, 4), 0.5), "cosine": torch.ones(n, 4), "start_cosine": torch.zeros(n, 4)}
        | {"pixels": zeros, "given": zeros, "path_loss": torch.ones(1, n), "pixel_error": error}
        | {"patch": stems.patch_labels(2, 2), "step": ("0",), "bounds": (0.0, 1.0), "attention": "all patches"}
        | {"provenance": Provenance(hooks=("blocks.0.hook_resid_post",))}
        | more
    )


def test_rows_of_patches_by_hand():
    error = torch.tensor([[0.1, 0.3, 0.5, 0.5], [0.2, 0.2, 0.3, 0.5]]).repeat(3, 1)
    result = by_hand(error)
    rows = result.by_row().set_index(["quantity", "row"]).loc["pixel_error"]
    assert rows["mean"].tolist() == pytest.approx([0.2, 0.45]) and rows["start"].tolist() == [0.5, 0.5]
    assert rows["of_start"].tolist() == pytest.approx([0.4, 0.9])
    half = 2.570582 * np.std([0.5, 0.4] * 3, ddof=1) / 6**0.5  # Student's t, 5 degrees of freedom
    assert rows["high"][1] == pytest.approx(0.45 + half, rel=1e-5) and np.isfinite(rows["low"][1])
    compared = result.compare_rows().set_index("quantity").loc["pixel_error / start_error"]
    assert compared["effect"] == pytest.approx(-0.5) and compared["first"] == pytest.approx(0.4)
    assert compared["images"] == 6 and compared["p"] < 0.1
    assert "read_error" not in set(result.by_row()["quantity"]) and result.unread_error.isnan().all()
    assert result.by_image()["pixel_error"][0] == pytest.approx((0.6 / 4) ** 0.5)


def test_rows_and_columns_of_images_that_are_no_squares():
    images = torch.full((1, 3, 8, 16), 0.5)
    images[..., 4:, 12:] = 1.0  # the patch in row 1 and column 3
    result = search(0, at="resid_pre", steps=1).run(tiny.bridge(), images, progress=False)
    assert result.patch == ("0,0", "0,1", "0,2", "0,3", "1,0", "1,1", "1,2", "1,3")
    assert int(result.start_error[0].argmax()) == 7 and result.start_error[0, 7] > 5 * result.start_error[0, :7].max()
    assert len(result.by_row().query("quantity == 'pixel_error'")) == 2


def test_with_few_images_there_is_no_interval():
    table = by_hand(torch.rand(3, 4)).by_row()
    assert table["low"].isna().all() and table["mean"].notna().all()


def test_a_stem_may_be_any_function_and_then_nothing_is_said_of_what_it_reads(images):
    def stem(images):
        return torch.nn.functional.unfold(images, 8, stride=8).mT[..., :32].tanh() * 0.2

    result = search(0, stem).run(tiny.bridge(), images, progress=False)
    assert result.read_error is None and result.readable is None and len(result.patch) == 4
    assert len(result.figure().data) == 3 * 2 and len(result.figure_rows().data) == 9 - 3


def test_figures_show_the_image_what_can_be_found_and_what_was(images):
    result = search().run(tiny.bridge(), images, progress=False)
    figure = result.figure(width=600, template="plotly_dark")
    assert len(figure.data) == 3 * 3 and "attention to its own and earlier patches" in figure.layout.title.text
    titles = [axis.title.text for axis in result.figure_rows().select_yaxes()]
    assert len(titles) == 4 and titles[0] == "pixel error / range"


@pytest.mark.matrix
def test_every_decoder_is_searched(decoder, images):
    result = search(steps=20).run(decoder.build(), images[:1], progress=False)
    assert (result.path_loss[-1] < result.path_loss[0]).all()


def test_bfloat16_gives_nearly_the_same_yardstick(images):
    whole, half = (
        search().run(tiny.bridge("llama", dtype=dtype), images, progress=False)
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert half.provenance.dtype == "bfloat16" and half.pixels.dtype == torch.float32
    torch.testing.assert_close(whole.noise_distance.mean(), half.noise_distance.mean(), rtol=0.1, atol=0.1)


def test_an_interrupt_keeps_the_images_done(images, monkeypatch):
    own, done = image_reconstruction.ImageReconstruction._of_image, []

    def interrupted(self, *rest):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(1)
        return own(self, *rest)

    monkeypatch.setattr(image_reconstruction.ImageReconstruction, "_of_image", interrupted)
    result = search().run(tiny.bridge(), images, progress=False)
    assert len(result.pixels) == len(result.given) == len(result.distance) == 2
    done[:] = [1, 1]
    with pytest.raises(KeyboardInterrupt):
        search().run(tiny.bridge(), images, progress=False)


@pytest.mark.usefixtures("as_users_run_it")
def test_it_refuses(images):
    model = tiny.bridge()
    for bounds in ((1.0, 0.0), (0.0, 1.0, 2.0), [0.0, 1.0], (float("nan"), 1.0)):
        with pytest.raises(ValueError, match=r"\(bounds=...\) must be the smallest and the largest pixel, such as"):
            search(bounds=bounds)
    for settings, says in (
        ({"steps": 0}, r"\(steps=...\) must be a whole number, 1 or more; got 0"),
        ({"rate": 0.0}, r"\(rate=...\) must be a number above 0; got 0"),
        ({"layer": 3}, "layers 0 to 2"),
        ({"loss": "l3"}, "must be 'cosine', 'l1' or 'l2'; got 'l3'"),
    ):
        with pytest.raises(ValueError, match=says):
            search(**settings).run(model, images, progress=False)
    with pytest.raises(ValueError, match=r"images must lie within bounds, 0 to 1; got 0\.\d+ to [12]"):
        search().run(model, images * 2, progress=False)
    with pytest.raises(ValueError, match=r"images must lie within bounds, 0 to 1; got -0\.\d+ to 0"):
        search().run(model, images - 0.5, progress=False)
    for wrong in (images[0], images[:0], "a picture", images.numpy()):
        with pytest.raises(ValueError, match=r"must be a tensor \[image channel height width\] for tiny-gpt2; got"):
            search().run(model, wrong, progress=False)
    with pytest.raises(ValueError, match="images must be finite; got NaN or Inf"):
        search().run(model, images * torch.nan, progress=False)
    with pytest.raises(ValueError, match="masked=False needs a model of text and a stem"):
        search(1, None, masked=False).run(tiny.vit(), images, progress=False)
    with pytest.raises(TypeError, match=r"of a vision transformer; got .*or give a model of text a stem, as stem="):
        search(1, None).run(model, images, progress=False)
    with pytest.raises(ValueError, match="stem must be None for tiny-vit, a vision transformer, which has a stem of"):
        search().run(tiny.vit(), images, progress=False)
    with pytest.raises(ValueError, match="another search for the same images"):
        by_hand(torch.rand(3, 4)).compare_with(by_hand(torch.rand(2, 4)))
    with pytest.raises(ValueError, match="first must be a number of rows, 1 to 1; got 2"):
        by_hand(torch.rand(3, 4)).compare_rows(2)
    with torch.no_grad():
        model.blocks[1].mlp.out.original_component.bias[:] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        search().run(model, images, progress=False)
