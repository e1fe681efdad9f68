"""FeatureVisualization: which images activate a unit of a vision transformer most?

A unit is a neuron (its value after the activation function) or a dimension of the residual stream. a(x) is its
activation for the pixels x, at one token (0 is the class token, then the patches row by row) or as the mean over all:

    value[image, unit]          = a(image)                              for each given image, in the unit's own units
    pixels[unit, restart, ...]  = argmax a(x) by gradient ascent from noise            x within the range of the images
    ascended[unit, restart]     = a(pixels)
    alike, by_unit()            = mean correlation of the pixels found by two restarts                       -1 to 1

The noise has the mean and standard deviation of the images, per channel. If a feature is one image, all restarts find
similar pixels. The baseline, `other`, is the correlation with pixels found for other units. With the mean over all
patches a pattern may be anywhere, so the pixels of one pattern need not correlate.

The gradient of an inactive neuron is 0: an ascent that starts there does not move, and the other restarts count. `blur`
and `jitter` suppress single-pixel patterns: a Gaussian blur, whose width falls to 0, after each step, and a random
shift by some pixels before it. The activation at the end is computed without the shift.

Source: blbadger.github.io, "Language Model Features" (features of vision transformers); Mordvintsev et al. 2015,
"Inceptionism"; Olah et al. 2017, "Feature Visualization", doi.org/10.23915/distill.00007.
"""

from collections import deque
from itertools import combinations
from typing import Annotated, Any, Literal, Unpack

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float
from torch import Tensor

from lens_probes import figures
from lens_probes.maths import inference
from lens_probes.maths.ascent import ascend, seeded
from lens_probes.messages import brief
from lens_probes.model import ImageView, ReadPoint
from lens_probes.probe import Experiment, each_of
from lens_probes.reading import finite
from lens_probes.result import Result, measured, provenance
from lens_probes.settings import Count, Positive, Rate, Seed, Units, from_on

IMAGES_PER_BATCH = 32
SHOWN = 4  # restarts of a unit in the figure


class FeatureVisualizationResult(Result):
    """The activation of every unit by every given image, and the pixels that the ascents found."""

    unit: tuple[str, ...]
    value: Float[Tensor, "image unit"] = measured("activation for the given image")
    ascended: Float[Tensor, "unit restart"] = measured("activation at the end of the ascent")
    pixels: Float[Tensor, "unit restart channel height width"] = measured("pixels at the end of the ascent")
    best: Float[Tensor, "unit channel height width"] = measured(
        "pixels of the given image that activates the unit most"
    )
    low: Float[Tensor, " channel"] = measured("smallest value in the given images")
    high: Float[Tensor, " channel"] = measured("largest value in the given images")

    def by_unit(self) -> pd.DataFrame:
        """One row per unit: the best image and its value, the ends of the ascents, and how similar they are.

        `percentile`: the share of the given images that activate the unit less than the end of an ascent, with its
        interval over restarts. `alike`: the mean correlation between the pixels of a unit's restarts. `other`: their
        mean correlation with restarts of other units.
        """
        correlation = np.corrcoef(self.pixels.flatten(0, 1).flatten(1).double().numpy())
        of_unit = np.arange(len(self.unit)).repeat(self.pixels.shape[1])
        rows = []
        for i, name in enumerate(self.unit):
            own, others = np.flatnonzero(of_unit == i), np.flatnonzero(of_unit != i)
            pairs = [correlation[a, b] for a, b in combinations(own, 2)]
            below = (self.value[:, i, None] < self.ascended[i]).double().mean(0).numpy()
            low, high = inference.mean_interval(below[None])
            rows.append(
                {
                    "unit": name,
                    "best_image": int(self.value[:, i].argmax()),
                    "best": float(self.value[:, i].max()),
                    "ascended": float(self.ascended[i].mean()),
                    "percentile": below.mean(),
                    "low": low[0],
                    "high": high[0],
                    "alike": np.mean(pairs) if pairs else np.nan,
                    "other": correlation[np.ix_(own, others)].mean() if len(others) else np.nan,
                    "restarts": len(own),
                }
            )
        return pd.DataFrame(rows)

    def figure(self, **look: Unpack[figures.Look]) -> go.Figure:
        """One row per unit: the image given that activates it most, and the ends of the highest four ascents."""
        rows = []
        for i, name in enumerate(self.unit):
            best = int(self.value[:, i].argmax())
            pictures = [(f"image {best}: {self.value[best, i]:.3g}", self._shown(self.best[i]))]
            for place in self.ascended[i].argsort(descending=True)[:SHOWN].tolist():
                pictures.append((f"ascent: {self.ascended[i, place]:.3g}", self._shown(self.pixels[i, place])))
            rows.append((f"unit {name}", pictures))
        return figures.images(
            rows, title=self.title("Images that activate each unit most: given, and by ascent"), **look
        )

    def conditions(self) -> str:
        """The activation that holds the units."""
        return self.provenance.read

    def _shown(self, image: Float[Tensor, "channel height width"]) -> np.ndarray:
        """Pixels from 0 to 1 in three channels; images with another number of channels are averaged over them."""
        unit = (image - self.low[:, None, None]) / (self.high - self.low).clamp(min=1e-12)[:, None, None]
        return (unit if len(unit) == 3 else unit.mean(0).expand(3, -1, -1)).movedim(0, -1).numpy()


class FeatureVisualization(Experiment[FeatureVisualizationResult]):
    """Search the given images, and ascend from noise, for some units of one layer of a vision transformer.

    `position`: the token at which units are read, or None for the mean over all. `blur` is the width (standard
    deviation) of the first blur and `jitter` the largest shift, both in pixels. `rate` is Adam's learning rate, in
    standard deviations of the images. After an interrupt the result holds the units done so far.

    >>> import lens_probes as lp
    >>> images = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))  # as the model's processor gives
    >>> result = lp.FeatureVisualization(1, units=[3, 5], steps=5).run(lp.tiny.vit(), images, progress=False)
    >>> tuple(result.pixels.shape)
    (2, 3, 3, 16, 16)
    """

    layer: int
    units: Units
    at: Literal["neuron", ReadPoint] = "neuron"
    position: int | None = None
    steps: Positive = 100
    restarts: Positive = 3
    rate: Rate = 0.1
    blur: Annotated[float, from_on(0)] = 0.0
    jitter: Count = 0
    seed: Seed = 0

    def run(  # pyright: ignore[reportIncompatibleMethodOverride]  (its prompts are images)
        self, model: Any, images: Float[Tensor, "image channel height width"], *, progress: bool = True
    ) -> FeatureVisualizationResult:
        """Search the images (as the model's processor makes them), then ascend for every unit."""
        view = ImageView(model)
        hook = view.hook_units(self.at, self.layer)
        images = self._checked(view, images)
        given = torch.cat([view.activation(some, hook) for some in images.split(IMAGES_PER_BATCH)])
        units, n = view.units(self.units, hook, given.shape[-1]), given.shape[1]
        if self.position is not None and not -n <= self.position < n:
            raise ValueError(
                f"FeatureVisualization(position=...) must be one of the {n} tokens of an image in {view.name}; got "
                f"{self.position}"
            )
        value = self._read(given, hook).cpu()
        ends = each_of(
            lambda u: self._ascend(view, hook, u, images),
            range(len(units)),
            doing="ascending",
            unit="unit",
            progress=progress,
        )
        ascended, pixels = (torch.stack(each).cpu() for each in zip(*ends, strict=True))
        value = value[:, : len(ends)]
        return FeatureVisualizationResult(
            unit=tuple(str(number) for number in units)[: len(ends)],
            value=value,
            ascended=ascended,
            pixels=pixels,
            best=images[value.argmax(0)],
            low=images.amin((0, 2, 3)),
            high=images.amax((0, 2, 3)),
            provenance=provenance(self, view, view.dtype, [hook]),
        )

    def _checked(self, view: ImageView, images: Tensor) -> Float[Tensor, "image channel height width"]:
        if not isinstance(images, Tensor) or images.ndim != 4 or images.shape[1:] != view.shape or not len(images):
            raise ValueError(
                f"images must be a tensor [image channel height width] with {' '.join(map(str, view.shape))} for "
                f"{view.name}; got {brief(images)}: pass what its processor makes"
            )
        if not images.isfinite().all():
            raise ValueError("images must be finite; got NaN or Inf: check their source")
        images = images.detach().clone().float().cpu()
        if not images.std((0, 2, 3)).sum() > 0:
            raise ValueError(
                "images must differ in their pixels, to have a range; got the same value in every pixel of a channel: "
                "pass several different images"
            )
        return images

    def _read(self, states: Float[Tensor, "image position width"], hook: str) -> Float[Tensor, "image unit"]:
        read = finite(hook, states[..., list(self.units)].float())
        return read.mean(1) if self.position is None else read[:, self.position]

    def _ascend(
        self, view: ImageView, hook: str, u: int, images: Float[Tensor, "image channel height width"]
    ) -> tuple[Float[Tensor, " restart"], Float[Tensor, "restart channel height width"]]:
        """One unit's ascents, in parallel. After each step pixels are clamped to the range of the images."""
        random = seeded(str(self.units[u]), self.seed)
        statistics = (images.amin, images.amax, images.mean, images.std)
        low, high, mean, spread = (statistic((0, 2, 3), keepdim=True) for statistic in statistics)
        noise = torch.randn(self.restarts, *view.shape, generator=random)
        low, high, start = (each.to(view.device) for each in (low, high, mean + noise * spread))

        def height(pixels: Tensor, step: int) -> Tensor:
            if step < self.steps:  # no shift at the end
                shift = torch.randint(-self.jitter, self.jitter + 1, (2,), generator=random).tolist()
                pixels = pixels.roll(shift, (2, 3))
            return self._read(view.activation(pixels, hook), hook)[:, u]

        def project(pixels: Tensor, step: int) -> Tensor:
            return blurred(pixels, self.blur * (1 - (step + 1) / self.steps)).clamp(low, high)

        rate = self.rate * float(spread.mean())
        (end,) = deque(ascend(start.clamp(low, high), height, self.steps, rate=rate, project=project), maxlen=1)
        return end.height, end.point


def blurred(
    images: Float[Tensor, "image channel height width"], width: float
) -> Float[Tensor, "image channel height width"]:
    """Gaussian blur with this standard deviation in pixels, with reflection at the edges.

    The Gaussian is truncated at three standard deviations, and at the size of the image.

    >>> bar = torch.tensor([0.0, 0.0, 4.0, 0.0, 0.0]).expand(1, 1, 5, 5)
    >>> blurred(bar, 1.0)[0, 0, 0].round(decimals=2)
    tensor([0.4300, 0.9900, 1.6000, 0.9900, 0.4300])
    """
    reach = min(round(3 * width), min(images.shape[-2:]) - 1)
    if not reach:
        return images
    weights = torch.exp(-0.5 * (torch.arange(-reach, reach + 1, device=images.device) / width) ** 2)
    weights = (weights / weights.sum()).to(images)
    for axis in (2, 3):
        along = images.movedim(axis, -1)
        flat = along.reshape(-1, 1, along.shape[-1])
        flat = torch.nn.functional.pad(flat, (reach, reach), mode="reflect")
        images = torch.nn.functional.conv1d(flat, weights[None, None]).reshape(along.shape).movedim(-1, axis)
    return images
