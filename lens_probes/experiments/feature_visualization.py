"""FeatureVisualization: which images activate a unit of a vision transformer, or of a model of text, most?

A model of text reads images through a `stem` (`lens_probes/stems.py`), one token per patch.

A unit is a neuron (its value after the activation function) or a dimension of the residual stream. a(x) is its
activation for the pixels x, at one token (0 is the class token, then the patches row by row; with a stem 0 is the first
patch) or as the mean over all:

    value[image, unit]          = a(image)                              for each given image, in the unit's own units
    pixels[unit, restart, ...]  = argmax a(x) by gradient ascent from noise            x within the range of the images
    ascended[unit, restart]     = a(pixels)
    alike, by_unit()            = mean correlation of the pixels found by two restarts                       -1 to 1
    slope[unit, restart, patch] = mean over steps of |d a(x) / d pixels of the patch|                     at least 0
    moved[unit, restart, patch] = root mean square of pixels at the end - at the start                    at least 0

The noise has the mean and standard deviation of the images, per channel. If a feature is one image, all restarts find
similar pixels. The baseline, `other`, is the correlation with pixels found for other units. With the mean over all
patches a pattern may be anywhere, so the pixels of one pattern need not correlate.

The gradient of an inactive neuron is 0: an ascent that starts there does not move, and the other restarts count. `blur`
and `jitter` suppress single-pixel patterns: a Gaussian blur, whose width falls to 0, after each step, and a random
shift by some pixels before it. The activation at the end is computed without the shift.

Where does an ascent change the image? Adam gives every pixel steps of about one size, so `moved` says which patches a
unit depends on at all, and `slope` how much. In plain gradient ascent the first change is proportional to the slope. A
mask gives earlier patches more without any learning, since more states depend on them. `causal` is that null: if every
state depends equally on its own and all earlier patches, the mean over T patches depends on patch i (from 0) in
proportion to T - i. The other null is `uniform`.

Source: blbadger.github.io, "Language Model Features" (features of vision transformers); Mordvintsev et al. 2015,
"Inceptionism"; Olah et al. 2017, "Feature Visualization", doi.org/10.23915/distill.00007. Stems before GPT-2's blocks
and the toy with the counts T - i: blbadger.github.io, "Language Model Representations and Features".
"""

from itertools import combinations
from typing import Annotated, Any, Literal, NamedTuple, Unpack

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
from lens_probes.model import ImageView, ReadPoint, StemView
from lens_probes.probe import Experiment, each_of
from lens_probes.reading import finite
from lens_probes.result import Quantity, Result, measured, paired, provenance
from lens_probes.settings import Count, Positive, Rate, Seed, Units, from_on
from lens_probes.stems import Stem, checked, grid_of, patch_labels, per_patch, view_with

IMAGES_PER_BATCH = 32
SHOWN = 4  # restarts of a unit in the figure
SUMMARIES = {
    "centre": Quantity("mean place of the shares, 0 the first patch and 1 the last", low=0, high=1),
    "width": Quantity("effective number of patches / number of patches", low=0, high=1),
}


class FeatureVisualizationResult(Result):
    """The activation of every unit by every given image, and the pixels that the ascents found."""

    unit: tuple[str, ...]
    patch: tuple[str, ...]
    attention: str
    value: Float[Tensor, "image unit"] = measured("activation for the given image")
    ascended: Float[Tensor, "unit restart"] = measured("activation at the end of the ascent")
    pixels: Float[Tensor, "unit restart channel height width"] = measured("pixels at the end of the ascent")
    best: Float[Tensor, "unit channel height width"] = measured(
        "pixels of the given image that activates the unit most"
    )
    low: Float[Tensor, " channel"] = measured("smallest value in the given images")
    high: Float[Tensor, " channel"] = measured("largest value in the given images")
    slope: Float[Tensor, "unit restart patch"] = measured(
        "length of the gradient in the patch, mean over steps",
        low=0,
    )
    moved: Float[Tensor, "unit restart patch"] = measured("root mean square change of the patch's pixels", low=0)
    causal: Float[Tensor, " patch"] = measured("number of states read that may depend on the patch, if masked", low=0)

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

    def by_patch(self) -> pd.DataFrame:
        """One row per quantity (`slope`, `moved`) and patch: its mean share, with its interval over units.

        `causal` and `uniform` are the shares under the two nulls, `over_causal` is share / causal. A unit whose ascents
        do not move (a gradient of 0) is left out; `units` counts the others.
        """
        null, frames = (self.causal / self.causal.sum()).double().numpy(), []
        uniform = np.full(len(self.patch), 1 / len(self.patch))
        for name in ("slope", "moved"):
            shares = np.nanmean(self._shares(name), axis=1).T  # [patch unit]
            (low, high) = inference.mean_interval(shares)
            with np.errstate(divide="ignore", invalid="ignore"):
                columns = {"share": shares.mean(1), "low": low, "high": high, "causal": null, "uniform": uniform}
                columns["over_causal"] = columns["share"] / null
            labels = {"quantity": name, "patch": self.patch, "place": range(len(self.patch))}
            frames.append(pd.DataFrame({**labels, **columns, "units": shares.shape[1]}))
        return pd.concat(frames, ignore_index=True)

    def spread(self) -> pd.DataFrame:
        """One row per quantity (`slope`, `moved`) and summary: mean over units, interval, and value under the nulls.

        `centre`: the mean place of a unit's shares, 0 for the first patch and 1 for the last. `width`: the exponential
        of their entropy over the number of patches. A unit's value is the mean over its restarts.
        """
        rows = []
        nulls = [summarised(each.double().numpy()[None]) for each in (self.causal, torch.ones(len(self.patch)))]
        for name in ("slope", "moved"):
            for summary, values in self._summaries(name).items():
                low, high = inference.mean_interval(values[None])
                row = {"quantity": name, "summary": summary, "mean": values.mean(), "low": low[0], "high": high[0]}
                causal, uniform = (float(null[summary][0]) for null in nulls)
                rows.append({**row, "causal": causal, "uniform": uniform, "units": len(values)})
        return pd.DataFrame(rows)

    def compare_with(self, other: "FeatureVisualizationResult") -> pd.DataFrame:
        """This model minus another (without its mask, or untrained): the summaries of `spread` of the same units.

        The interval is Student's t over units; p swaps the two models at random, unit by unit; q is over the rows.
        """
        if type(other) is not type(self) or (self.unit, self.patch) != (other.unit, other.patch):
            raise ValueError(
                f"compare_with takes the result of another model for the same units and patches; got {brief(other)}: "
                f"run both with the same units and images"
            )
        labels, pairs = [], []
        for name in ("slope", "moved"):
            theirs = other._summaries(name, every=True)
            for summary, values in self._summaries(name, every=True).items():
                labels.append({"quantity": name, "summary": summary})
                pairs.append((values, theirs[summary]))
        own, others = np.array(pairs).swapaxes(0, 1)  # [row unit] each
        known = np.isfinite(own + others).all(0)
        own, others = own[:, known], others[:, known]
        null = "the two models are exchangeable within each unit"
        means = {"mean": own.mean(1), "other": others.mean(1), "units": own.shape[1]}
        return paired(pd.DataFrame(labels), own - others, says="difference between the models", null=null, **means)

    def _shares(self, name: str) -> Float[np.ndarray, "unit restart patch"]:
        """Each patch's part of the slope or the change; NaN for an ascent that does not move. Units that do only."""
        values = self.known(name)
        with np.errstate(invalid="ignore"):
            shares = values / values.sum(-1, keepdims=True)
        return shares[np.isfinite(shares).any((1, 2))]

    def _summaries(self, name: str, *, every: bool = False) -> dict[str, Float[np.ndarray, " unit"]]:
        """The mean over restarts of each summary; `every`: of all units, NaN for those that do not move."""
        values = self.known(name)
        moves = values.sum(-1) > 0
        found = summarised(np.where(moves[..., None], values, 1).reshape(-1, values.shape[-1]))
        means = {
            summary: np.where(moves, each.reshape(moves.shape), 0).sum(1) / np.where(moves.any(1), moves.sum(1), np.nan)
            for summary, each in found.items()
        }
        return means if every else {summary: each[moves.any(1)] for summary, each in means.items()}

    def figure_patches(self, **look: Unpack[figures.Look]) -> go.Figure:
        """The share of every patch in gradient and pixel change, in the order of the patches, beside both nulls."""
        table, panels = self.by_patch(), {}
        for name, says in (("slope", "share of the gradient"), ("moved", "share of the pixel change")):
            rows = table[table["quantity"] == name]
            share, low, high, causal, uniform = (
                list(rows[each]) for each in ("share", "low", "high", "causal", "uniform")
            )
            panels[says] = [
                figures.Line("mean over units", share, low, high, figures.CHOSEN),
                figures.Line("causal count", causal, colour=figures.OTHER_COLOURS[1], dashed=True),
                figures.Line("uniform", uniform, colour=figures.GREY, dashed=True),
            ]
        title = self.title("Where an ascent changes the image, patch by patch")
        places = [str(place) for place in range(len(self.patch))]
        return figures.lines(panels, places, title=title, x_title="patch, row by row", **look)

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
        """The activation that holds the units, and which patches it may depend on."""
        return f"{self.provenance.read}, attention to {self.attention}"

    def _shown(self, image: Float[Tensor, "channel height width"]) -> np.ndarray:
        """Pixels from 0 to 1 in three channels; images with another number of channels are averaged over them."""
        unit = (image - self.low[:, None, None]) / (self.high - self.low).clamp(min=1e-12)[:, None, None]
        return (unit if len(unit) == 3 else unit.mean(0).expand(3, -1, -1)).movedim(0, -1).numpy()


class FeatureVisualization(Experiment[FeatureVisualizationResult]):
    """Search the given images, and ascend from noise, for some units of one layer.

    `stem`: for a model of text, a function from images to patches; None for a vision transformer. `masked=False` is the
    model of text without its causal mask. `units=None` is the mean over all units of the layer. `position`: the token
    at which units are read, or None for the mean over all. `blur` is the width (standard
    deviation) of the first blur and `jitter` the largest shift, both in pixels. `rate` is Adam's learning rate, in
    standard deviations of the images. After an interrupt the result holds the units done so far. Cost per unit:
    steps + 1 forward and backward passes over its restarts, which end at the layer.

    >>> import lens_probes as lp
    >>> images = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))  # as the model's processor gives
    >>> result = lp.FeatureVisualization(1, units=[3, 5], steps=5).run(lp.tiny.vit(), images, progress=False)
    >>> tuple(result.pixels.shape)
    (2, 3, 3, 16, 16)
    """

    layer: int
    units: Units | None
    at: Literal["neuron", ReadPoint] = "neuron"
    stem: Stem = None
    masked: bool = True
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
        view = view_with(model, self.stem, masked=self.masked)
        hook = view.hook_units(self.at, self.layer)
        images = self._checked(view, images)
        given = torch.cat([view.activation(some, hook).detach() for some in images.split(IMAGES_PER_BATCH)])
        names, n = self._names(view, hook, given.shape[-1]), given.shape[1]
        if self.position is not None and not -n <= self.position < n:
            raise ValueError(
                f"FeatureVisualization(position=...) must be one of the {n} tokens of an image in {view.name}; got "
                f"{self.position}"
            )
        before = view.before(n)
        rows, columns = grid_of(n - before, *images.shape[-2:])
        value = self._read(given, hook).cpu()
        ends = each_of(
            lambda u: self._ascend(view, hook, u, images, rows),
            range(len(names)),
            doing="ascending",
            unit="unit",
            progress=progress,
        )
        found = {name: torch.stack([getattr(end, name) for end in ends]).cpu() for name in Ascent._fields}
        value = value[:, : len(ends)]
        return FeatureVisualizationResult(
            unit=names[: len(ends)],
            patch=patch_labels(rows, columns),
            attention=view.attention,
            value=value,
            **found,
            best=images[value.argmax(0)],
            low=images.amin((0, 2, 3)),
            high=images.amax((0, 2, 3)),
            causal=causal_count(n, self.position)[before:],
            provenance=provenance(self, view, view.dtype, [hook]),
        )

    def _checked(self, view: ImageView | StemView, images: Tensor) -> Float[Tensor, "image channel height width"]:
        images = checked(view, images)
        if not images.std((0, 2, 3)).sum() > 0:
            raise ValueError(
                "images must differ in their pixels, to have a range; got the same value in every pixel of a channel: "
                "pass several different images"
            )
        return images

    def _names(self, view: ImageView | StemView, hook: str, width: int) -> tuple[str, ...]:
        """The labels of the units."""
        return ("all",) if self.units is None else tuple(map(str, view.units(self.units, hook, width)))

    def _read(self, states: Float[Tensor, "image position width"], hook: str) -> Float[Tensor, "image unit"]:
        states = finite(hook, states.float())
        read = states.mean(-1, keepdim=True) if self.units is None else states[..., list(self.units)]
        return read.mean(1) if self.position is None else read[:, self.position]

    def _ascend(
        self,
        view: ImageView | StemView,
        hook: str,
        u: int,
        images: Float[Tensor, "image channel height width"],
        rows: int,
    ) -> "Ascent":
        """One unit's ascents, in parallel. After each step pixels are clamped to the range of the images."""
        random = seeded("all" if self.units is None else str(self.units[u]), self.seed)
        statistics = (images.amin, images.amax, images.mean, images.std)
        low, high, mean, spread = (statistic((0, 2, 3), keepdim=True) for statistic in statistics)
        noise = torch.randn(self.restarts, *images.shape[1:], generator=random)
        low, high, start = (each.to(view.device) for each in (low, high, mean + noise * spread))
        start = start.clamp(low, high)

        def height(pixels: Tensor, step: int) -> Tensor:
            if step < self.steps:  # no shift at the end
                shift = torch.randint(-self.jitter, self.jitter + 1, (2,), generator=random).tolist()
                pixels = pixels.roll(shift, (2, 3))
            return self._read(view.activation(pixels, hook), hook)[:, u]

        def project(pixels: Tensor, step: int) -> Tensor:
            return blurred(pixels, self.blur * (1 - (step + 1) / self.steps)).clamp(low, high)

        path, slopes = ascend(start, height, self.steps, rate=self.rate * float(spread.mean()), project=project), []
        end = None
        for end in path:
            slopes.append(per_patch(end.slope, rows))
        assert end is not None
        side = (images[0].numel() / len(slopes[0][0])) ** 0.5  # a length is a root mean square times this
        return Ascent(end.height, end.point, torch.stack(slopes).mean(0) * side, per_patch(end.point - start, rows))


class Ascent(NamedTuple):
    """Where the ascents of one unit ended, and where they changed the image."""

    ascended: Float[Tensor, " restart"]
    pixels: Float[Tensor, "restart channel height width"]
    slope: Float[Tensor, "restart patch"]
    moved: Float[Tensor, "restart patch"]


def causal_count(n: int, position: int | None = None) -> Float[Tensor, " position"]:
    """How many of the states that are read may depend on each of n tokens under a causal mask: T - i for all of them.

    These are the gradients of the source's toy, in which every token adds 1 to each state from its own on.

    >>> causal_count(3), causal_count(3, position=1)
    (tensor([3., 2., 1.]), tensor([1., 1., 0.]))
    """
    may = torch.ones(n, n).tril()  # [query source]
    return may.sum(0) if position is None else may[position]


def summarised(values: Float[np.ndarray, "row patch"]) -> dict[str, Float[np.ndarray, " row"]]:
    """The summaries of `SUMMARIES` of non-negative values over patches; only their shares count.

    >>> found = summarised(causal_count(4).numpy()[None])
    >>> found["centre"].round(3), summarised(np.ones((1, 4)))["width"]
    (array([0.333]), array([1.]))
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        shares = values / values.sum(1, keepdims=True)
        entropy = -np.where(shares > 0, shares * np.log(shares), 0).sum(1)
    n = values.shape[1]
    place = np.linspace(0, 1, n) if n > 1 else np.array([0.5])
    return {"centre": shares @ place, "width": np.exp(entropy) / n}


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
