"""Stems: from images to the embeddings of patches, so that a model of text can read images.

    stem(images)[image, patch] = W vec(patch) + b                   patches row by row, [image patch d_model]

Any function of this shape is a stem; one that is no `PatchStem` may mix patches or be non-linear. Two are made here:

- `of_images(model)` is the patch projection of a vision transformer, without its class token and position embeddings.
- `orthogonal(model)` is random. W is a multiple of a matrix with orthonormal columns where a patch has at most d_model
  values, so that no pixel is lost; of one with orthonormal rows otherwise. Then a patch has directions that no state
  holds, and `PatchStem.read` removes them. Uniform noise from 0 to 1 gets the mean 0 and the variance of the model's
  embeddings.

Nothing is added to the patches but what the model of text adds to its tokens. Learned positions are added (GPT-2, OPT);
rotary ones act in attention, so patches are never without order. The source adds neither class token nor positions:
there the causal mask is the only sign of order.

Source: blbadger.github.io, "Language Model Representations and Features" (the stem of a vision transformer before the
blocks of GPT-2).
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any

import torch
from einops import reduce
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import conv2d, fold, unfold

from lens_probes.maths.ascent import seeded
from lens_probes.messages import brief
from lens_probes.model import ImageView, ModelView, StemView, view_of
from lens_probes.settings import described
from lens_probes.text.prompts import is_whole

Stem = Annotated[Callable[[Tensor], Tensor] | None, described("a function from images to patches, or None")]
"""[image channel height width] -> [image patch d_model]; None for a model of images."""

UNIFORM = 12**-0.5  # the standard deviation of uniform noise from 0 to 1


@dataclass(frozen=True, eq=False, repr=False)
class PatchStem:
    """One affine projection of every patch.

    >>> stem = PatchStem(torch.ones(2, 1, 2, 2), torch.zeros(2))
    >>> stem(torch.arange(16.0).reshape(1, 1, 4, 4))[0, :, 0]
    tensor([10., 18., 42., 50.])
    """

    weight: Float[Tensor, "d_model channel height width"]
    bias: Float[Tensor, " d_model"]

    def __call__(self, images: Float[Tensor, "image channel height width"]) -> Float[Tensor, "image patch d_model"]:
        """The embeddings of all patches, row by row."""
        self._check(images)
        weight, bias = self.weight.to(images.device), self.bias.to(images.device)
        return conv2d(images.float(), weight, bias, stride=weight.shape[-2:]).flatten(2).mT

    def read(self, images: Float[Tensor, "image channel height width"]) -> Float[Tensor, "image channel height width"]:
        """The images without what the stem does not read: projected onto the row space of W, patch by patch."""
        self._check(images)
        size = tuple(self.weight.shape[-2:])
        patches = unfold(images.double(), size, stride=size)
        return fold(self._projector @ patches, tuple(images.shape[-2:]), size, stride=size).to(images)

    @cached_property
    def _projector(self) -> Float[Tensor, "pixel pixel"]:
        rows = self.weight.flatten(1).double().cpu()
        return torch.linalg.pinv(rows) @ rows

    def _check(self, images: Tensor) -> None:
        _, channels, height, width = self.weight.shape
        shape = images.shape if isinstance(images, Tensor) and images.ndim == 4 else (0, 0, 1, 1)
        if shape[1] != channels or shape[2] % height or shape[3] % width:
            raise ValueError(
                f"images for this stem must be [image {channels} height width] with patches of {height} x {width}; got "
                f"{brief(images)}: crop them, or put channels before height and width"
            )

    def __repr__(self) -> str:
        numbers = torch.cat([self.weight.flatten(), self.bias.flatten()]).float().cpu().numpy().tobytes()
        d_model, channels, height, width = self.weight.shape
        content = hashlib.blake2b(numbers, digest_size=4).hexdigest()
        return f"<stem {channels} x {height} x {width} to {d_model}, content {content}>"


def orthogonal(model: Any, patch: int = 16, *, channels: int = 3, seed: int = 0) -> PatchStem:
    """A random stem for pixels from 0 to 1, orthogonal, scaled to the embeddings of this model of text.

    >>> from lens_probes.examples import tiny
    >>> stem = orthogonal(tiny.bridge(), patch=2)
    >>> images = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    >>> stem(images).shape, bool(torch.allclose(stem.read(images), images, atol=1e-6))
    (torch.Size([1, 4, 32]), True)
    """
    if not all(is_whole(size) and size >= 1 for size in (patch, channels)):
        raise ValueError(
            f"patch and channels must be whole numbers, 1 or more; got {brief(patch)} and {brief(channels)}"
        )
    view = ModelView(model)
    pixels = channels * patch * patch
    values = torch.randn(max(view.d_model, pixels), min(view.d_model, pixels), generator=seeded("stem", seed))
    base = torch.linalg.qr(values.double())[0]
    rows = base if view.d_model >= pixels else base.T
    # An orthonormal basis of d dimensions keeps a variance; one of fewer pixels spreads it over all of d_model.
    rows = rows * max(1.0, view.d_model / pixels) ** 0.5 * float(view.token_embeddings.float().std(0).mean()) / UNIFORM
    return PatchStem(rows.float().reshape(view.d_model, channels, patch, patch), -rows.sum(1).float() / 2)


def of_images(model: Any) -> PatchStem:
    """The patch projection of a vision transformer; a model of text needs the same d_model.

    >>> from lens_probes.examples import tiny
    >>> of_images(tiny.vit())(torch.zeros(1, 3, 16, 16)).shape
    torch.Size([1, 16, 32])
    """
    return PatchStem(*ImageView(model).projection)


# What experiments on images share


def view_with(model: Any, stem: Callable[[Tensor], Tensor] | None, *, masked: bool = True) -> ImageView | StemView:
    """The view of a model of images, or with a stem that of a model of text."""
    if stem is not None:
        if hasattr(model, "run_with_cache") and isinstance(view_of(model), ImageView):
            raise ValueError(
                f"stem must be None for {ImageView(model).name}, a vision transformer, which has a stem of its own; "
                f"got {brief(stem)}: leave it out"
            )
        return StemView(model, stem, masked=masked)
    if not masked:
        raise ValueError(
            "masked=False needs a model of text and a stem; got stem=None: a vision transformer has no causal mask"
        )
    return ImageView(model)


def checked(view: ImageView | StemView, images: Any) -> Float[Tensor, "image channel height width"]:
    """The images as float32 on the CPU, or an error that says what images must be."""
    shape = view.shape if isinstance(view, ImageView) else None
    if (
        not isinstance(images, Tensor)
        or images.ndim != 4
        or not images.numel()
        or (shape is not None and images.shape[1:] != shape)
    ):
        with_ = "" if shape is None else f" with {' '.join(map(str, shape))}"
        raise ValueError(
            f"images must be a tensor [image channel height width]{with_} for {view.name}; got {brief(images)}: pass "
            f"what its {'stem' if shape is None else 'processor'} {'takes' if shape is None else 'makes'}"
        )
    if not images.isfinite().all():
        raise ValueError("images must be finite; got NaN or Inf: check their source")
    return images.detach().clone().float().cpu()


def grid_of(n_patches: int, height: int, width: int) -> tuple[int, int]:
    """Rows and columns of patches, which are squares.

    >>> grid_of(6, 32, 48)
    (2, 3)
    """
    side = round((height * width / n_patches) ** 0.5)
    if not side or height % side or width % side or (height // side) * (width // side) != n_patches:
        raise ValueError(
            f"patches must be squares that tile the image; got {n_patches} patches of an image of {height} x {width} "
            f"pixels: crop the images, or use another stem"
        )
    return height // side, width // side


def patch_labels(rows: int, columns: int) -> tuple[str, ...]:
    """Row and column of every patch, row by row.

    >>> patch_labels(1, 2)
    ('0,0', '0,1')
    """
    return tuple(f"{row},{column}" for row in range(rows) for column in range(columns))


def rows_of(labels: tuple[str, ...]) -> list[int]:
    """The row of every patch by its label.

    >>> rows_of(("0,0", "0,1", "1,0", "1,1"))
    [0, 0, 1, 1]
    """
    return [int(label.split(",")[0]) for label in labels]


def per_patch(images: Float[Tensor, "*any channel height width"], rows: int) -> Float[Tensor, "*any patch"]:
    """The root mean square of every patch.

    >>> per_patch(torch.tensor([[[3.0, 3.0, 0.0, 0.0], [3.0, 3.0, 0.0, 4.0]]]), rows=1)
    tensor([3., 2.])
    """
    side = images.shape[-2] // rows
    tiles = "... channel (row height) (column width) -> ... (row column)"
    return reduce(images.double().square(), tiles, "mean", height=side, width=side).sqrt().to(images)
