"""FeatureVisualization: a linear unit whose best picture is known, Hugging Face's own numbers, blur, refusals."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import HAS_HOOKED

import lens_probes as lp
from lens_probes import stems
from lens_probes.examples import tiny
from lens_probes.experiments import feature_visualization
from lens_probes.experiments.feature_visualization import blurred


@pytest.fixture
def images():
    return torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def features(layer: Any = 1, units: Any = (3, 5), **settings: Any):
    return lp.FeatureVisualization(layer, units, **{"steps": 5, "restarts": 2} | settings)


def test_values_are_those_of_the_hugging_face_model(images):
    model, seen = tiny.vit(), []
    with torch.no_grad():
        hidden = model.original_model(images, output_hidden_states=True).hidden_states[2]
    result = features(at="resid_post").run(model, images, progress=False)
    torch.testing.assert_close(result.value, hidden[:, :, [3, 5]].mean(1), rtol=1e-4, atol=1e-5)
    for part in model.original_model.modules():
        if type(part).__name__ in ("GELUActivation", "GELU"):
            part.register_forward_hook(lambda part, given, made: seen.append(made))
    with torch.no_grad():
        model.original_model(images)
    result = features(position=2).run(model, images, progress=False)
    torch.testing.assert_close(result.value, seen[1][:, 2, [3, 5]], rtol=1e-4, atol=1e-5)


def test_of_a_linear_unit_the_best_picture_is_found(images):
    # What enters block 0 at a patch is linear in its pixels: each stands at the bound that its weight points to.
    model, patch, unit = tiny.vit(), 6, 3
    images = images.clamp(-1.5, 1.5)
    images[0, :, 0, 0], images[1, :, 0, 0] = -1.5, 1.5
    weight = next(part for part in model.original_model.modules() if isinstance(part, torch.nn.Conv2d)).weight[unit]
    row, column = (patch - 1) // 4 * 4, (patch - 1) % 4 * 4
    result = features(0, [unit], at="resid_pre", position=patch, steps=200).run(model, images, progress=False)
    found = result.pixels[0, :, :, row : row + 4, column : column + 4]
    torch.testing.assert_close(found, 1.5 * weight.detach().sign().expand_as(found))
    zero = torch.cat([torch.zeros(1, 3, 16, 16), images])  # all the same is refused
    bias = features(0, [unit], at="resid_pre", position=patch, steps=1).run(model, zero, progress=False).value[0, 0]
    torch.testing.assert_close(result.ascended[0], (bias + 1.5 * weight.detach().abs().sum()).expand(2))
    table = result.by_unit().iloc[0]
    assert table["percentile"] == 1 and table["best"] < table["ascended"]


def test_an_ascent_climbs_above_the_images_and_stays_in_their_range(images):
    result = features(steps=60).run(tiny.vit(), images, progress=False)
    assert (result.ascended > result.value.amax(0)[:, None]).all()
    assert (result.pixels.amax((0, 1, 3, 4)) <= result.high).all()
    assert (result.pixels.amin((0, 1, 3, 4)) >= result.low).all()
    for i, place in enumerate(result.value.argmax(0).tolist()):
        torch.testing.assert_close(result.best[i], images[place])


def test_alike_is_the_correlation_of_restarts_beside_that_of_units(images):
    result = features(restarts=3).run(tiny.vit(), images, progress=False)
    table = result.by_unit()
    flat = result.pixels.flatten(2).double().numpy()
    own = [np.corrcoef(flat[0, a], flat[0, b])[0, 1] for a, b in ((0, 1), (0, 2), (1, 2))]
    other = [np.corrcoef(flat[0, a], flat[1, b])[0, 1] for a in range(3) for b in range(3)]
    assert table["alike"][0] == pytest.approx(np.mean(own))
    assert table["other"][0] == pytest.approx(np.mean(other))
    alone = features(units=[3], restarts=1).run(tiny.vit(), images, progress=False).by_unit()
    assert alone[["alike", "other"]].isna().all(axis=None)


def test_blur_makes_smoother_pictures_and_jitter_others(images):
    def roughness(result):
        return float(result.pixels.diff(dim=-1).abs().mean())

    plain, smooth, moved = (
        features(steps=20, **settings).run(tiny.vit(), images, progress=False)
        for settings in ({}, {"blur": 2.0}, {"jitter": 3})
    )
    assert roughness(smooth) < 0.7 * roughness(plain)
    assert not torch.equal(moved.pixels, plain.pixels)


def test_the_end_of_an_ascent_is_read_without_a_shift(images):
    model, settings = tiny.vit(), {"units": [3], "at": "resid_post", "position": 2, "jitter": 3}
    result = features(**settings).run(model, images, progress=False)
    again = features(**settings, steps=1).run(model, result.pixels[0], progress=False)
    torch.testing.assert_close(again.value[:, 0], result.ascended[0], rtol=1e-4, atol=1e-5)


def test_a_blur_keeps_what_is_even_and_spreads_a_point():
    even = torch.full((2, 3, 9, 7), 0.3)
    torch.testing.assert_close(blurred(even, 1.5), even)
    assert blurred(even, 0.0) is even
    point = torch.zeros(1, 1, 21, 21)
    point[..., 10, 10] = 1.0
    spread = blurred(point, 2.0)[0, 0]
    place = torch.arange(21) - 10.0
    assert float(spread.sum()) == pytest.approx(1, abs=1e-5)
    assert float((spread.sum(0) * place**2).sum()) == pytest.approx(4, rel=0.05)
    torch.testing.assert_close(spread, spread.T)


def test_bfloat16_gives_nearly_the_same(images):
    whole, half = (
        features().run(tiny.vit(dtype=dtype), images, progress=False) for dtype in (torch.float32, torch.bfloat16)
    )
    assert half.provenance.dtype == "bfloat16"
    torch.testing.assert_close(whole.value, half.value, rtol=0.1, atol=0.1)


def test_an_interrupt_keeps_the_units_done(images, monkeypatch):
    ascend = feature_visualization.FeatureVisualization._ascend

    def interrupted(self, view, hook, u, *rest):
        if u == 1:
            raise KeyboardInterrupt
        return ascend(self, view, hook, u, *rest)

    monkeypatch.setattr(feature_visualization.FeatureVisualization, "_ascend", interrupted)
    result = features().run(tiny.vit(), images, progress=False)
    assert result.unit == ("3",) and result.value.shape == (8, 1)


def test_an_interrupt_before_the_first_unit_is_passed_on(images, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(feature_visualization.FeatureVisualization, "_ascend", interrupted)
    with pytest.raises(KeyboardInterrupt):
        features().run(tiny.vit(), images, progress=False)


def test_the_figure_has_a_row_a_unit(images):
    figure = features(units=[3, 5, 9], restarts=6).run(tiny.vit(), images, progress=False).figure()
    assert len(figure.data) == 3 * (1 + 4)  # the best image and the highest four
    assert [axis.title.text for axis in figure.select_yaxes() if axis.title.text] == ["unit 3", "unit 5", "unit 9"]


@pytest.mark.usefixtures("as_users_run_it")
def test_it_refuses(images):
    model = tiny.vit()
    for settings, says in (
        ({"units": []}, "must name one unit or more, each once"),
        ({"units": [3, 3]}, "must name one unit or more, each once"),
        ({"steps": 0}, r"\(steps=...\) must be a whole number, 1 or more; got 0"),
        ({"blur": -1.0}, r"\(blur=...\) must be a number, 0 or more; got -1"),
        ({"blur": float("nan")}, r"\(blur=...\) must be a number, 0 or more; got nan"),
        ({"rate": 0.0}, r"\(rate=...\) must be a number above 0; got 0"),
        ({"units": [64]}, "unit 64 is out of range: .* units 0 to 63"),
        ({"position": 17}, "must be one of the 17 tokens of an image in tiny-vit; got 17"),
        ({"layer": 3}, "layers 0 to 2"),
        ({"at": "resid"}, "must be 'neuron', 'resid_pre', 'resid_mid', .*; got 'resid'"),
    ):
        with pytest.raises(ValueError, match=says):
            features(**settings).run(model, images, progress=False)
    for wrong in (images[0], images[:, :, :8], images[:0], "a picture", images.numpy()):
        with pytest.raises(ValueError, match=r"images must be a tensor \[image channel height width\] with 3 16 16"):
            features().run(model, wrong, progress=False)
    for units in (3, [2.5]):
        with pytest.raises(TypeError, match=r"\(units=...\) must be a list of whole numbers, such as \[3\]"):
            features(units=units)
    with pytest.raises(ValueError, match="got the same value in every pixel of a channel"):
        features().run(model, torch.ones(4, 3, 16, 16), progress=False)
    with pytest.raises(ValueError, match="images must be finite; got NaN or Inf"):
        features().run(model, images / 0, progress=False)
    with pytest.raises(TypeError, match="TransformerBridge of a vision transformer; got TransformerBridge of GPT2"):
        features().run(tiny.bridge(), images, progress=False)
    with pytest.raises(TypeError, match="FeatureVisualization models of images"):
        lp.RankShift().run(model, "Time flies.", progress=False)


# Models of text, through a stem


def through_a_stem(layer: Any = 1, units: Any = (3, 5), **settings: Any):
    return features(layer, units, **{"stem": stems.orthogonal(tiny.bridge(), 4), "at": "resid_post"} | settings)


@pytest.mark.parametrize("maker", ["bridge", pytest.param("hooked", marks=pytest.mark.matrix)])
def test_values_of_patches_are_those_of_hugging_face(images, maker):
    if maker == "hooked" and not HAS_HOOKED:
        pytest.skip("TransformerLens 4 has no HookedTransformer")
    with torch.no_grad():
        embeddings = stems.orthogonal(tiny.bridge(), 4)(images)
        hidden = tiny.huggingface()(inputs_embeds=embeddings, output_hidden_states=True).hidden_states[2]
    model = getattr(tiny, maker)()
    result = through_a_stem().run(model, images, progress=False)
    torch.testing.assert_close(result.value, hidden[:, :, [3, 5]].mean(1), rtol=1e-4, atol=1e-4)
    result = through_a_stem(units=None, position=7).run(model, images, progress=False)
    torch.testing.assert_close(result.value, hidden[:, 7].mean(-1, keepdim=True), rtol=1e-4, atol=1e-4)
    assert result.unit == ("all",)


def test_later_patches_never_change_and_earlier_ones_do(decoder, images):
    """V3 of the source: it follows from the mask."""
    model = decoder.build()
    result = through_a_stem(units=None, position=6).run(model, images, progress=False)
    for values in (result.slope, result.moved):
        assert (values[..., 7:] == 0).all() and (values[..., :7] > 0).all()
    start = result.pixels[0, 0, :, 12:]
    assert result.attention == "its own and earlier patches" and start.isfinite().all()
    free = through_a_stem(units=None, position=6, masked=False).run(model, images, progress=False)
    assert (free.slope > 0).all() and free.attention == "all patches"


def test_the_slope_is_the_gradient_of_the_activation(images):
    model = tiny.bridge()
    result = through_a_stem(units=[4], steps=1, rate=1e-9).run(model, images, progress=False)
    pixels = result.pixels[0].clone().requires_grad_()  # where it started, and both slopes are
    reference = tiny.huggingface()
    with torch.enable_grad():
        embeddings = stems.orthogonal(tiny.bridge(), 4)(pixels)
        hidden = reference(inputs_embeds=embeddings, output_hidden_states=True).hidden_states[2]
        (slope,) = torch.autograd.grad(hidden[:, :, 4].mean(1).sum(), pixels)
    patch = slope[:, :, 4:8, 8:12].flatten(1).norm(dim=1)  # row 1, column 2
    torch.testing.assert_close(result.slope[0, :, 6], patch, rtol=1e-3, atol=1e-6)


def test_of_a_layer_without_blocks_every_patch_has_the_same_slope(images):
    # What enters block 0 is linear in the pixels of a patch, with the same weights at all of them.
    result = through_a_stem(0, range(8), at="resid_pre", restarts=1).run(tiny.bridge(), images, progress=False)
    table = result.by_patch().set_index("quantity").loc["slope"]
    assert table["share"].to_numpy() == pytest.approx(1 / 16) and table["uniform"].to_numpy() == pytest.approx(1 / 16)
    assert table["causal"].to_numpy() == pytest.approx(np.arange(16, 0, -1) / (16 * 17 / 2))
    assert table["over_causal"].to_numpy() == pytest.approx(1 / 16 / table["causal"].to_numpy())
    spread = result.spread().set_index(["quantity", "summary"]).loc["slope"]
    assert spread["mean"].to_numpy() == pytest.approx([0.5, 1.0])
    assert spread["causal"].iloc[0] == pytest.approx(1 / 3) and spread["uniform"].to_numpy() == pytest.approx(
        [0.5, 1.0]
    )
    low = spread["low"].to_numpy()
    assert low == pytest.approx([0.5, 1.0], abs=1e-4) and (spread["units"] == 8).all()


def test_summaries_of_shares_by_hand():
    found = feature_visualization.summarised(np.array([[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 2.0]]))
    assert found["centre"] == pytest.approx([1 / 6, 1.0]) and found["width"] == pytest.approx([0.5, 0.25])
    assert feature_visualization.causal_count(4).tolist() == [4, 3, 2, 1]


def test_a_comparison_pairs_units(images):
    model = tiny.bridge()
    masked, free = (
        through_a_stem(units=range(6), masked=masked).run(model, images, progress=False) for masked in (True, False)
    )
    table = masked.compare_with(free).set_index(["quantity", "summary"])
    centre = masked.spread().set_index(["quantity", "summary"])["mean"]
    other = free.spread().set_index(["quantity", "summary"])["mean"]
    assert table["effect"].to_numpy() == pytest.approx((centre - other).to_numpy(), abs=1e-6)
    assert table.loc[("slope", "centre"), "effect"] < 0  # the mask moves the gradient to the front
    assert (table["units"] == 6).all() and masked.compare_with(masked)["effect"].abs().max() == 0
    with pytest.raises(ValueError, match="the same units and patches"):
        masked.compare_with(through_a_stem(units=[1]).run(model, images, progress=False))


def test_an_ascent_that_does_not_move_is_left_out_of_shares(images):
    result = through_a_stem(units=range(6)).run(tiny.bridge(), images, progress=False)
    still = result.slope.clone()
    still[2], still[4, 0] = 0.0, 0.0
    other = replace(result, slope=still)
    assert set(other.by_patch().set_index("quantity")["units"]["slope"]) == {5}
    table = other.spread().set_index(["quantity", "summary"])
    assert table.loc[("slope", "centre"), "units"] == 5 and np.isfinite(table["mean"]).all()
    kept = [0, 1, 3, 5]
    means = result._summaries("slope")["centre"][kept].sum()
    alone = feature_visualization.summarised(still[4, 1:].double().numpy())["centre"][0]
    assert table.loc[("slope", "centre"), "mean"] == pytest.approx((means + alone) / 5)
    assert result.compare_with(other)["units"].tolist() == [5, 5, 5, 5]


def test_patches_have_a_figure_and_a_vision_transformer_has_patches_too(images):
    result = features(units=range(5)).run(tiny.vit(), images, progress=False)
    assert len(result.patch) == 16 and result.attention == "all patches"
    figure = result.figure_patches(template="plotly_dark")
    assert {trace.name for trace in figure.data if trace.name} == {"mean over units", "causal count", "uniform"}


def test_blur_and_jitter_work_through_a_stem(images):
    result = through_a_stem(blur=1.0, jitter=2).run(tiny.bridge(), images, progress=False)
    assert result.pixels.isfinite().all() and (result.slope > 0).all()


@pytest.mark.usefixtures("as_users_run_it")
def test_it_refuses_images_and_stems_that_do_not_fit(images):
    model = tiny.bridge()
    with pytest.raises(ValueError, match="with patches of 4 x 4; got"):
        through_a_stem().run(model, images[:, :, :, :14], progress=False)
    with pytest.raises(ValueError, match=r"stem for tiny-gpt2 must return a tensor \[image patch 32\]"):
        through_a_stem(stem=lambda images: images).run(model, images, progress=False)
    with pytest.raises(TypeError, match=r"\(stem=...\) must be a function from images to patches, or None; got 3"):
        features(stem=3)
    with pytest.raises(ValueError, match="must be one of the 16 tokens of an image in tiny-gpt2; got 16"):
        through_a_stem(position=16).run(model, images, progress=False)
    with pytest.raises(ValueError, match="masked=False needs a model of text and a stem"):
        features(masked=False).run(tiny.vit(), images, progress=False)
