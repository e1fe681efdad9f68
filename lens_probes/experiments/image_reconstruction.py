"""ImageReconstruction: how much of an image can be reconstructed from a layer?

Search for pixels x whose states h at a layer equal those of an image, h*, by gradient descent from grey noise. The
model is a vision transformer, or a model of text that reads the patches through a `stem` (`lens_probes/stems.py`):

    loss                   = mean over tokens of |h(x) - h*| / |h*|              "l2" or "l1", at least 0
                             mean over tokens of 1 - cos(h(x), h*)               "cosine", 0 to 2
    distance[patch]        = |h(x) - h*|                                          in units of h
    noise_distance[patch]  = |h(x* + noise) - h*|, noise of 1/16 of the range     in units of h
    reached[image]         = 1 if the distances are smaller in sum than those of the image plus noise
    pixel_error[patch]     = root mean square of x - x* over the patch            in units of the pixels' range, 0 to 1
    read_error[patch]      = the same of P (x - x*), P the projection onto what the stem reads
    unread_error[patch]    = the same of the rest; pixel_error^2 = read_error^2 + unread_error^2
    cosine[patch]          = cos(stem(x), stem(x*)), which ignores the contrast of a patch                   -1 to 1

No search finds what the stem does not read, since no state depends on it; Adam moves it by chance. The baselines are
the errors of the start, `start_error`, `read_start_error` and `start_cosine` (grey noise, the same for every layer).
Pixels never leave `bounds`.

States that are near need not come from pixels that are near: blocks begin with a norm, which removes the length of a
patch, and MLPs may write states much longer than the patch. Then the yardstick is wide, and the pixels say so.

A success shows what a layer holds. A failure shows only that this search did not find it.

Source: blbadger.github.io, "Language Model Representations and Features" (images through the stem of a vision
transformer and GPT-2's blocks; its yardstick is noise of 1/15 to 1/18); Mahendran & Vedaldi 2015, "Understanding Deep
Image Representations by Inverting Them", arXiv 1412.0035.
"""

from typing import Annotated, Any, NamedTuple, Unpack

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float
from torch import Tensor

from lens_probes import figures
from lens_probes.experiments.input_reconstruction import Loss, mean_loss
from lens_probes.maths import inference
from lens_probes.maths.ascent import ascend, seeded
from lens_probes.messages import brief
from lens_probes.model import ImageView, ReadPoint, StemView
from lens_probes.probe import Experiment, each_of
from lens_probes.reading import finite
from lens_probes.result import Result, derived, measured, paired, provenance
from lens_probes.settings import Allowed, Positive, Rate, Seed
from lens_probes.stems import PatchStem, Stem, checked, grid_of, patch_labels, per_patch, rows_of, view_with

Bounds = Annotated[
    tuple[float, float],
    Allowed("the smallest and the largest pixel, such as (0.0, 1.0)", lambda value: value[0] < value[1]),
]

NOISE = 1 / 16  # of the range of the pixels; 1/15 to 1/18 in the source
START = 1 / 20  # standard deviation of the noise at the start around grey, of the range, as in the source
CHECKPOINTS = 20
# What is compared, and its value at the start
STARTS = {
    "pixel_error": "start_error",
    "read_error": "read_start_error",
    "cosine": "start_cosine",
    "relative_distance": None,
}
PANELS = {
    "pixel_error": "pixel error / range",
    "read_error": "error in what is read / range",
    "cosine": "cosine of patches (-1 to 1)",
    "relative_distance": "distance / noise distance",
}


class ImageReconstructionResult(Result):
    """The pixels found for every image, and how far they and their states are, patch by patch."""

    headline = "pixel_error"
    patch: tuple[str, ...]
    step: tuple[str, ...]
    bounds: tuple[float, float]
    attention: str
    pixels: Float[Tensor, "image channel height width"] = measured("pixels found")
    given: Float[Tensor, "image channel height width"] = measured("pixels of the image")
    readable: Float[Tensor, "image channel height width"] | None = measured(
        "pixels of the image in what the stem reads, and of the start in the rest", default=None
    )
    pixel_error: Float[Tensor, "image patch"] = measured("root mean square error / range of the pixels", low=0)
    start_error: Float[Tensor, "image patch"] = measured("error of the start / range of the pixels", low=0)
    read_error: Float[Tensor, "image patch"] | None = measured(
        "error in what the stem reads / range of the pixels", low=0, default=None
    )
    read_start_error: Float[Tensor, "image patch"] | None = measured(
        "error of the start in what the stem reads / range of the pixels", low=0, default=None
    )
    cosine: Float[Tensor, "image patch"] = measured("cosine of the stem's patch with that of the image", low=-1, high=1)
    start_cosine: Float[Tensor, "image patch"] = measured(
        "cosine of the start's patch with that of the image", low=-1, high=1
    )
    distance: Float[Tensor, "image patch"] = measured("distance of the state of the pixels found", low=0)
    noise_distance: Float[Tensor, "image patch"] = measured("distance of the state of the image plus noise", low=0)
    state_norm: Float[Tensor, "image patch"] = measured("length of the image's state", low=0)
    path_loss: Float[Tensor, "step image"] = measured("loss during the search", low=0)

    @derived("error in what the stem does not read / range of the pixels", low=0)
    def unread_error(self) -> Float[Tensor, "image patch"]:
        """What no search can find; NaN where it is not known what the stem reads."""
        if self.read_error is None:
            return torch.full_like(self.pixel_error, torch.nan)
        return (self.pixel_error.square() - self.read_error.square()).clamp(min=0).sqrt()

    @derived("state distance / noise distance", low=0)
    def relative_distance(self) -> Float[Tensor, "image patch"]:
        """Distance of the state of the pixels found, divided by `noise_distance`."""
        return self.distance / self.noise_distance

    @derived("whether the states are closer than those of the image plus noise", low=0, high=1)
    def reached(self) -> Float[Tensor, " image"]:
        """1 if the distances sum to less than the noise distances, else 0."""
        return (self.distance.sum(1) < self.noise_distance.sum(1)).float()

    def by_image(self) -> pd.DataFrame:
        """One row per image: errors over all its patches, those of the start, the loss, and the distance of the states.

        Errors are root mean squares over patches, `cosine` is the mean. `relative_distance` is the sum of the distances
        over that of the noise distances; below 1 the search has reached the yardstick.
        """
        columns: dict[str, Any] = {"image": range(len(self.pixel_error))}
        for name in ("pixel_error", "start_error", "read_error", "read_start_error", "unread_error"):
            values = getattr(self, name)
            columns[name] = np.nan if values is None else values.double().square().mean(1).sqrt().numpy()
        columns["cosine"] = self.cosine.mean(1).numpy()
        columns["relative_distance"] = (self.distance.sum(1) / self.noise_distance.sum(1)).numpy()
        columns |= {"reached": self.reached.numpy(), "first_loss": self.path_loss[0].numpy()}
        return pd.DataFrame({**columns, "last_loss": self.path_loss[-1].numpy()})

    def by_row(self) -> pd.DataFrame:
        """One row per quantity and row of patches: the mean over images, its interval, and the value at the start.

        An image's value is the mean over the patches of the row. `of_start` is the mean over images of error / error at
        the start (NaN for what is no error). The 95 % intervals are Student's t over images.
        """
        frames = []
        for name in self._known():
            values, starts = self._of_rows(name), STARTS[name]
            at_start = np.full_like(values, np.nan) if starts is None else self._of_rows(starts)
            ratio = values / at_start if name.endswith("_error") else np.full_like(values, np.nan)
            (low, high), (of_low, of_high) = map(inference.mean_interval, (values, ratio))
            columns = {"mean": values.mean(1), "low": low, "high": high, "start": at_start.mean(1)}
            columns |= {"of_start": ratio.mean(1), "of_start_low": of_low, "of_start_high": of_high}
            labels = {"quantity": name, "row": range(len(values))}
            frames.append(pd.DataFrame({**labels, **columns, "images": values.shape[1]}))
        return pd.concat(frames, ignore_index=True)

    def compare_rows(self, first: int = 1) -> pd.DataFrame:
        """The first rows of patches minus all others, one row per quantity.

        Errors are divided by those of the start, so that a row with much to find does not count as a bad one. The
        interval is Student's t over images; p swaps first and other rows at random, image by image.
        """
        n_rows = rows_of(self.patch)[-1] + 1
        if not 1 <= first < n_rows:
            raise ValueError(f"first must be a number of rows, 1 to {n_rows - 1}; got {brief(first)}")
        labels, own, others = [], [], []
        for name in self._known():
            starts = STARTS[name] if name.endswith("_error") else None
            values = self._of_rows(name) / (1 if starts is None else self._of_rows(starts))
            labels.append({"quantity": name if starts is None else f"{name} / {starts}"})
            own.append(values[:first].mean(0))
            others.append(values[first:].mean(0))
        one, other = np.array(own), np.array(others)
        null = "first and other rows are exchangeable within each image"
        means = {"first": one.mean(1), "others": other.mean(1), "images": one.shape[1]}
        return paired(pd.DataFrame(labels), one - other, says="first rows minus the others", null=null, **means)

    def compare_with(self, other: "ImageReconstructionResult") -> pd.DataFrame:
        """This result minus another of the same images (other model, layer or mask), one row per quantity.

        An image's value is the mean over its patches. The interval is Student's t over images; p swaps the two at
        random, image by image.
        """
        if type(other) is not type(self) or not torch.equal(self.given, other.given):
            raise ValueError(
                f"compare_with takes the result of another search for the same images; got {brief(other)}: run both on "
                f"the same images"
            )
        names = [name for name in self._known() if name in other._known()]
        own, others = (np.stack([each.known(name).mean(1) for name in names]) for each in (self, other))
        null = "the two searches are exchangeable within each image"
        means = {"mean": own.mean(1), "other": others.mean(1), "images": own.shape[1]}
        return paired(pd.DataFrame({"quantity": names}), own - others, says="difference", null=null, **means)

    def _known(self) -> list[str]:
        return [name for name in STARTS if getattr(self, name) is not None]

    def _of_rows(self, name: str) -> Float[np.ndarray, "row image"]:
        """The mean over the patches of each row."""
        values = self.known(name)
        return values.reshape(len(values), rows_of(self.patch)[-1] + 1, -1).mean(2).T

    def figure(self, **look: Unpack[figures.Look]) -> go.Figure:
        """One row per image: the image, what can be found of it, and what was found."""
        table, rows = self.by_image(), []
        for i in range(len(self.given)):
            cosine, part = table["cosine"][i], table["relative_distance"][i]
            pictures = [("given", self._shown(self.given[i]))]
            if self.readable is not None:
                pictures.append(("what the stem reads", self._shown(self.readable[i])))
            pictures.append((f"cosine {cosine:.2f}, states {part:.2g}", self._shown(self.pixels[i])))
            rows.append((f"image {i}", pictures))
        title = "Images reconstructed\ncosine: of the patches; states: their distance / noise distance"
        return figures.images(rows, title=self.title(title), **look)

    def figure_rows(self, **look: Unpack[figures.Look]) -> go.Figure:
        """Errors by row of patches beside those of the start, and the distance of the states beside the yardstick."""
        table, panels = self.by_row(), {}
        for name in self._known():
            rows = table[table["quantity"] == name]
            mean, low, high, start = (list(rows[each]) for each in ("mean", "low", "high", "start"))
            grey = [1.0] * len(mean) if STARTS[name] is None else start
            baseline = "the yardstick" if STARTS[name] is None else "start"
            panels[PANELS[name]] = [
                figures.Line("mean over images", mean, low, high, figures.CHOSEN),
                figures.Line(baseline, grey, colour=figures.GREY, dashed=True),
            ]
        names = [str(row) for row in range(rows_of(self.patch)[-1] + 1)]
        title = self.title("Errors of reconstructed images, by row of patches")
        return figures.lines(panels, names, title=title, x_title="row of patches, from the top", **look)

    def conditions(self) -> str:
        """The activation, and which patches it may depend on."""
        return f"{self.provenance.read}, attention to {self.attention}"

    def _shown(self, image: Float[Tensor, "channel height width"]) -> np.ndarray:
        """Pixels from 0 to 1 in three channels; images with another number of channels are averaged over them."""
        low, high = self.bounds
        unit = (image - low) / (high - low)
        return (unit if len(unit) == 3 else unit.mean(0).expand(3, -1, -1)).movedim(0, -1).numpy()


class ImageReconstruction(Experiment[ImageReconstructionResult]):
    """Reconstruct each image from its states at one read point of one layer.

    `stem`: for a model of text, a function from images to patches; None for a vision transformer. `masked=False` is the
    model of text without its causal mask. `bounds`: the smallest and the largest pixel that are allowed, (0, 1) for
    plain images; a processor may give others. `restarts` run in parallel, and the lowest loss counts. `rate`: Adam's
    learning rate, of the range of the pixels; it falls to a tenth. After an interrupt the result holds the images done
    so far. Cost per image: steps + 1 forward and backward passes over its restarts, which end at the layer.

    >>> import lens_probes as lp
    >>> model, images = lp.tiny.bridge(), torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    >>> search = lp.ImageReconstruction(0, at="resid_pre", stem=lp.stems.orthogonal(model, patch=2), steps=300)
    >>> bool(search.run(model, images, progress=False).pixel_error.max() < 0.02)
    True
    """

    layer: int
    at: ReadPoint = "resid_post"
    stem: Stem = None
    masked: bool = True
    loss: Loss = "l2"
    steps: Positive = 200
    restarts: Positive = 1
    rate: Rate = 0.02
    bounds: Bounds = (0.0, 1.0)
    seed: Seed = 0

    def run(  # pyright: ignore[reportIncompatibleMethodOverride]  (its prompts are images)
        self, model: Any, images: Float[Tensor, "image channel height width"], *, progress: bool = True
    ) -> ImageReconstructionResult:
        """One image at a time."""
        view = view_with(model, self.stem, masked=self.masked)
        hook, images = view.hook(self.at, self.layer), checked(view, images)
        low, high = self.bounds
        if images.min() < low or images.max() > high:
            raise ValueError(
                f"images must lie within bounds, {low:g} to {high:g}; got {float(images.min()):g} to "
                f"{float(images.max()):g}: pass bounds=, or scale the images"
            )
        stem = PatchStem(*view.projection) if isinstance(view, ImageView) else self.stem
        n = view.activation(images[:1], hook).shape[1]
        rows, columns = grid_of(n - view.before(n), *images.shape[-2:])
        parts = each_of(
            lambda image: self._of_image(view, hook, stem, image, rows, view.before(n)),
            list(images[:, None]),
            doing="reconstructing",
            unit="image",
            progress=progress,
        )
        found: dict[str, Any] = {
            name: None if getattr(parts[0], name) is None else torch.stack([getattr(part, name) for part in parts])
            for name in Reconstructed._fields
        }
        return ImageReconstructionResult(
            patch=patch_labels(rows, columns),
            step=tuple(map(str, self._checkpoints())),
            bounds=self.bounds,
            attention=view.attention,
            given=images[: len(parts)],
            **found | {"path_loss": found["path_loss"].T},
            provenance=provenance(self, view, view.dtype, [hook]),
        )

    def _checkpoints(self) -> list[int]:
        """The steps at which the loss is recorded."""
        return sorted({round(self.steps * i / CHECKPOINTS) for i in range(CHECKPOINTS + 1)})

    def _of_image(
        self,
        view: ImageView | StemView,
        hook: str,
        stem: Any,
        image: Float[Tensor, "1 channel height width"],
        rows: int,
        before: int,
    ) -> "Reconstructed":
        (low, high), random = self.bounds, seeded(image.numpy().tobytes(), self.seed)
        size = high - low
        noise = torch.randn(self.restarts, *image.shape[1:], generator=random)
        start = ((low + high) / 2 + noise * START * size).clamp(low, high).to(view.device)
        noisy = image + torch.randn(image.shape, generator=random) * NOISE * size

        def states(pixels: Tensor) -> Tensor:
            return finite(hook, view.activation(pixels, hook).float())

        goal = states(image).detach()[0]
        path = ascend(
            start,
            lambda pixels, _: -mean_loss(self.loss, states(pixels), goal),
            self.steps,
            rate=self.rate * size,
            final=0.1,
            project=lambda pixels, _: pixels.clamp(low, high),
        )
        noted, losses, found = self._checkpoints(), [], start
        for step, reached in enumerate(path):
            found = reached.point
            if step in noted:
                losses.append(-reached.height.cpu())
        best = int(losses[-1].nan_to_num(torch.inf).argmin())
        end, begin = found[best].cpu(), start[best].cpu()

        def distance(pixels: Tensor) -> Tensor:
            return (states(pixels).detach()[0] - goal)[before:].norm(dim=-1).cpu()

        def cosine(pixels: Tensor) -> Tensor:
            return torch.cosine_similarity(stem(pixels[None]), stem(image), dim=-1)[0].detach().float().cpu()

        known = isinstance(stem, PatchStem)
        error, first = end - image[0], begin - image[0]
        read, read_first = stem.read(torch.stack([error, first])) if known else (None, None)
        return Reconstructed(
            pixels=end,
            readable=begin - read_first if read_first is not None else None,
            pixel_error=per_patch(error, rows) / size,
            start_error=per_patch(first, rows) / size,
            read_error=None if read is None else per_patch(read, rows) / size,
            read_start_error=None if read_first is None else per_patch(read_first, rows) / size,
            cosine=cosine(end).clamp(-1, 1),
            start_cosine=cosine(begin).clamp(-1, 1),
            distance=distance(end[None]),
            noise_distance=distance(noisy),
            state_norm=goal[before:].norm(dim=-1).cpu(),
            path_loss=torch.stack(losses)[:, best],
        )


class Reconstructed(NamedTuple):
    """One image's part of a result."""

    pixels: Float[Tensor, "channel height width"]
    readable: Float[Tensor, "channel height width"] | None
    pixel_error: Float[Tensor, " patch"]
    start_error: Float[Tensor, " patch"]
    read_error: Float[Tensor, " patch"] | None
    read_start_error: Float[Tensor, " patch"] | None
    cosine: Float[Tensor, " patch"]
    start_cosine: Float[Tensor, " patch"]
    distance: Float[Tensor, " patch"]
    noise_distance: Float[Tensor, " patch"]
    state_norm: Float[Tensor, " patch"]
    path_loss: Float[Tensor, " step"]
