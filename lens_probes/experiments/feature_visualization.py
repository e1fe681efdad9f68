"""FeatureVisualization: which pictures excite a unit of a vision transformer?

A unit is a neuron (its value after the activation function) or a dimension of the residual stream, a(x) its activation
for the pixels x, at one token (0 is the class token, then the patches row by row) or in the mean over all:

    value[image, unit]          = a(image)                              for each image given, in the unit's own units
    pixels[unit, restart, ...]  = argmax a(x) by gradient ascent from noise            x within the range of the images
    ascended[unit, restart]     = a(pixels)
    alike, by_unit()            = mean correlation of the pixels found by two restarts                       -1 to 1

Noise has the mean and the spread of the images, a channel at a time. A feature that is one picture comes out alike from
every start, and more so than two units' pictures do: that is `other`, the control. With the mean over all patches a
pattern may stand anywhere, so that even one feature need not be alike pixel by pixel.

A neuron is flat where it is off: an ascent that starts there stays, and what the others find is the answer. `blur` and
`jitter` keep the ascent from patterns of single pixels: after each step a Gaussian blur whose width falls to
nothing, before each a shift by some pixels at random (what an ascent came to is read without it).

Source: blbadger.github.io, "Language Model Features" (features of vision transformers); Mordvintsev et al. 2015,
"Inceptionism"; Olah et al. 2017, "Feature Visualization", doi.org/10.23915/distill.00007.
"""

import zlib
from collections.abc import Sequence
from itertools import combinations
from typing import Any, Literal

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from lens_probes import figures
from lens_probes.maths import inference
from lens_probes.model import ImageView, ReadPoint
from lens_probes.probe import Experiment
from lens_probes.reading import finite
from lens_probes.result import Provenance, Result, measured

IMAGES_PER_BATCH = 32
SHOWN = 4  # restarts of a unit in the figure


class FeatureVisualizationResult(Result):
    """What every image given does to every unit, and the pictures that ascents came to."""

    unit: tuple[str, ...]
    value: Float[Tensor, "image unit"] = measured("activation for the image")
    ascended: Float[Tensor, "unit restart"] = measured("activation that the ascent came to")
    pixels: Float[Tensor, "unit restart channel height width"] = measured("what the ascent came to")
    best: Float[Tensor, "unit channel height width"] = measured("the image given that excites most")
    low: Float[Tensor, " channel"] = measured("the smallest value in the images")
    high: Float[Tensor, " channel"] = measured("the largest value in the images")

    def by_unit(self) -> pd.DataFrame:
        """A row a unit: the best image and its value, what the ascents came to, and whether they found one picture.

        `percentile`: the share of the images given that excite less than an ascent's end, with its interval over
        restarts. `alike` is the mean correlation of the pixels of a unit's restarts, `other` that with the restarts of
        other units.
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

    def figure(self) -> go.Figure:
        """A row a unit: the image given that excites it most, and the highest four ascents' ends, with activations."""
        rows = []
        for i, name in enumerate(self.unit):
            best = int(self.value[:, i].argmax())
            pictures = [(f"image {best}: {self.value[best, i]:.3g}", self._shown(self.best[i]))]
            for place in self.ascended[i].argsort(descending=True)[:SHOWN].tolist():
                pictures.append((f"ascent: {self.ascended[i, place]:.3g}", self._shown(self.pixels[i, place])))
            rows.append((f"unit {name}", pictures))
        return figures.images(
            rows, title=f"Which pictures excite units of {self.provenance.read}?\n{self.provenance.describe()}"
        )

    def _shown(self, image: Float[Tensor, "channel height width"]) -> np.ndarray:
        """From 0 to 1 in three channels; of other numbers of channels their mean."""
        unit = (image - self.low[:, None, None]) / (self.high - self.low).clamp(min=1e-12)[:, None, None]
        return (unit if len(unit) == 3 else unit.mean(0).expand(3, -1, -1)).movedim(0, -1).numpy()


class FeatureVisualization(Experiment[FeatureVisualizationResult]):
    """Search the images given, and ascend from noise, for some units of one layer of a vision transformer.

    `position`: the token at which units are read, or None for the mean over all. `blur` is the width (standard
    deviation) of the first blur and `jitter` the largest shift, both in pixels; `rate` is that of Adam, in standard
    deviations of the images. Interrupted, it gives the units done so far.

    >>> import lens_probes as lp
    >>> images = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))  # as the model's processor gives
    >>> result = lp.FeatureVisualization(1, units=[3, 5], steps=5).run(lp.tiny.vit(), images, progress=False)
    >>> tuple(result.pixels.shape)
    (2, 3, 3, 16, 16)
    """

    layer: int
    units: Sequence[int]
    at: Literal["neuron"] | ReadPoint = "neuron"
    position: int | None = None
    steps: int = 100
    restarts: int = 3
    rate: float = 0.1
    blur: float = 0.0
    jitter: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("restarts", 1), ("jitter", 0), ("blur", 0)):
            if not getattr(self, name) >= least:
                raise ValueError(f"FeatureVisualization({name}=...) is {least} or more; {getattr(self, name)} came")
        if not self.rate > 0:
            raise ValueError(f"FeatureVisualization(rate=...) is above 0; {self.rate} came")

    def run(  # pyright: ignore[reportIncompatibleMethodOverride]  (its prompts are images)
        self, model: Any, images: Float[Tensor, "image channel height width"], *, progress: bool = True
    ) -> FeatureVisualizationResult:
        """The images, as the model's processor makes them, are searched first; then every unit's ascents."""
        view = ImageView(model)
        hook = view.hook_units(self.at, self.layer)
        images = self._checked(view, images)
        given = torch.cat([view.activation(some, hook) for some in images.split(IMAGES_PER_BATCH)])
        units = view.units(self.units, hook, given.shape[-1])
        if self.position is not None and not -given.shape[1] <= self.position < given.shape[1]:
            raise ValueError(
                f"position {self.position} was asked for and images have {given.shape[1]} tokens in {view.name}"
            )
        value = self._read(given, hook).cpu()
        low, high = images.amin((0, 2, 3)), images.amax((0, 2, 3))
        ends: list[tuple[Tensor, Tensor]] = []
        try:
            for u in tqdm(range(len(units)), desc="ascending", unit="unit", disable=not progress):
                ends.append(self._ascend(view, hook, u, images, low, high))
        except KeyboardInterrupt:
            if not ends:
                raise
            tqdm.write(f"interrupted after {len(ends)} of {len(units)} units")
        ascended, pixels = (torch.stack(each).cpu() for each in zip(*ends, strict=True))
        value = value[:, : len(ends)]
        return FeatureVisualizationResult(
            unit=tuple(str(number) for number in units)[: len(ends)],
            value=value,
            ascended=ascended,
            pixels=pixels,
            best=images[value.argmax(0)],
            low=low,
            high=high,
            provenance=Provenance(
                probe=repr(self),
                model=view.name,
                model_class=view.class_name,
                processed=view.processed,
                dtype=str(view.dtype).removeprefix("torch."),
                hooks=(hook,),
                versions=view.versions,
            ),
        )

    def _checked(self, view: ImageView, images: Tensor) -> Float[Tensor, "image channel height width"]:
        came = tuple(getattr(images, "shape", ())) or type(images).__name__
        if not isinstance(images, Tensor) or images.ndim != 4 or images.shape[1:] != view.shape or not len(images):
            raise ValueError(
                f"images are a tensor [image channel height width] with {' '.join(map(str, view.shape))} for "
                f"{view.name}, as its processor makes them; {came} came"
            )
        if not images.isfinite().all():
            raise ValueError("images hold numbers that are not finite: look at what made them")
        images = images.detach().clone().float().cpu()
        if not images.std((0, 2, 3)).sum() > 0:
            raise ValueError("every channel of these images is constant: there is no range to ascend in")
        return images

    def _read(self, states: Float[Tensor, "image position width"], hook: str) -> Float[Tensor, "image unit"]:
        read = finite(hook, states[..., list(self.units)].float())
        return read.mean(1) if self.position is None else read[:, self.position]

    def _ascend(
        self, view: ImageView, hook: str, u: int, images: Tensor, low: Tensor, high: Tensor
    ) -> tuple[Float[Tensor, " restart"], Float[Tensor, "restart channel height width"]]:
        """One unit's ascents, side by side, each step kept within the range of the images."""
        random = torch.Generator().manual_seed(zlib.crc32(str(self.units[u]).encode(), self.seed) % 2**32)
        mean, spread = images.mean((0, 2, 3)), images.std((0, 2, 3))
        noise = torch.randn(self.restarts, *view.shape, generator=random)
        least, most = (bound[:, None, None].to(view.device) for bound in (low, high))
        start = (mean[:, None, None] + noise * spread[:, None, None]).to(view.device)
        pixels = start.clamp(least, most).requires_grad_()
        optimiser = torch.optim.Adam([pixels], lr=self.rate * float(spread.mean()), maximize=True)
        for step in range(self.steps):
            down, right = torch.randint(-self.jitter, self.jitter + 1, (2,), generator=random).tolist()
            read = self._read(view.activation(pixels.roll((down, right), (2, 3)), hook), hook)
            (pixels.grad,) = torch.autograd.grad(read[:, u].sum(), pixels)
            optimiser.step()
            with torch.no_grad():
                pixels.copy_(blurred(pixels, self.blur * (1 - (step + 1) / self.steps)).clamp(least, most))
        found = pixels.detach()
        return self._read(view.activation(found, hook), hook)[:, u], found


def blurred(
    images: Float[Tensor, "image channel height width"], width: float
) -> Float[Tensor, "image channel height width"]:
    """Images through a Gaussian of this standard deviation in pixels; what is beyond an edge is its mirror image.

    The Gaussian ends at three standard deviations, and within the image.

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
