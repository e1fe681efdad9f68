"""KeyValueOverlap: do W_K and W_V of a head read the same subspace?

W_K and W_V of a key/value head each read a subspace of the residual stream: the span of their d_head columns, with the
weight and the centring of the input norm folded in. With c the cosines of the principal angles between the two:

    overlap[layer, kv_head] = mean over the d_head principal angles of c^2            0 (orthogonal) to 1 (equal)

This is the projection kernel |U^T V|_F^2 of orthonormal bases U and V, divided by d_head: the `normalized` of
`transformer_lens.tools.analysis.projection_kernel`, which compares W_O with W_Q, W_K and W_V of other layers.

The mean overlap of two random subspaces is d_head / d_model, `null_mean`; 95 % of random pairs lie between `null_low`
and `null_high`. Another baseline is `other_head`: the overlap of a head's keys with the values of the layer's other
heads (NaN if there is a single head). The probe reads weights only: pass any prompt, it does not change the numbers.

Source: the question what is lost if one vector serves as key and value is from Henry Dashwood, "How to Think About
Self-Attention Intuitively"; principal angles: Bjorck and Golub 1973, doi.org/10.2307/2005662.
"""

from typing import Unpack

import numpy as np
import plotly.graph_objects as go
import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from lens_probes import figures
from lens_probes.maths.ascent import seeded
from lens_probes.messages import amount
from lens_probes.model import ModelView
from lens_probes.probe import Probe
from lens_probes.reading import Reading
from lens_probes.result import Result, derived, measured
from lens_probes.settings import Layers

DRAWS = 100  # pairs of random subspaces


class KeyValueOverlapResult(Result):
    """Overlap of W_K and W_V in every key/value head."""

    headline = "overlap"
    layer: tuple[str, ...]
    kv_head: tuple[str, ...]
    cosine: Float[Tensor, "layer kv_head k"] = measured("cosine of each principal angle, largest first", low=0, high=1)
    other_head: Float[Tensor, "layer kv_head"] = measured(
        "mean overlap of W_K with the W_V of the layer's other heads", low=0, high=1
    )
    null_mean: Float[Tensor, ""] = measured("mean overlap of random subspaces", low=0, high=1)
    null_low: Float[Tensor, ""] = measured("2.5 % quantile of the overlap of random subspaces", low=0, high=1)
    null_high: Float[Tensor, ""] = measured("97.5 % quantile of the overlap of random subspaces", low=0, high=1)

    @derived("overlap of W_K and W_V", low=0, high=1, null="null_mean")
    def overlap(self) -> Float[Tensor, "layer kv_head"]:
        """Mean squared cosine of the principal angles between the spans of W_K and W_V."""
        return self.cosine.square().mean(-1)

    def findings(self) -> list[str]:
        """The mean overlap beside that of random subspaces."""
        n = int(self.overlap.isfinite().sum())
        if not n:
            return []
        return [
            f"The overlap of W_K and W_V is {self.overlap.nanmean():.3f} on average over "
            f"{amount(n, 'key/value head')}; that of random subspaces is {self.null_mean:.3f} (95 % of them "
            f"{self.null_low:.3f} to {self.null_high:.3f})."
        ]

    def figure(self, **look: Unpack[figures.Look]) -> go.Figure:
        """The overlap by layer and head; the last column is that of random subspaces."""
        null = f"null: random subspaces, {self.null_mean:.3f}, 95\u00a0% {self.null_low:.3f} to {self.null_high:.3f}"
        return self.draw_grid(
            self.overlap,
            self.quantity("overlap"),
            self.title(f"Overlap of W_K and W_V ({null})"),
            across="kv_head",
            text="{:.2f}".format,
            null=("null", self.null_mean),
            **look,
        )


class KeyValueOverlap(Probe[KeyValueOverlapResult]):
    """Overlap of the subspaces that W_K and W_V read, per key/value head.

    >>> import lens_probes as lp
    >>> result = lp.KeyValueOverlap().run(lp.tiny.bridge("llama"), "Any text.")
    >>> tuple(result.overlap.shape), round(float(result.null_mean), 2)
    ((3, 2), 0.25)
    """

    layers: Layers = None

    def hooks(self, model: ModelView) -> list[str]:
        """None: the probe reads weights only."""
        model.layers(self.layers)
        if not model.encoder:
            model.check_input_norm()
        return []

    def measure(self, reading: Reading) -> KeyValueOverlapResult:
        """Principal angles, layer by layer."""
        model = reading.model
        layers = model.layers(self.layers)
        cosines = torch.stack([self._cosines(model, layer) for layer in layers])
        n, d_head = model.n_kv_heads, model.W_K(layers[0]).shape[-1]
        own_head = torch.eye(n, dtype=torch.bool, device=cosines.device)
        other_head = cosines.square().mean(-1).masked_fill(own_head, 0).sum(2) / (n - 1)  # 0 / 0 for a single head
        null_low, null_high = random_overlap(model.d_model, d_head).tolist()
        return self.result(
            reading,
            layer=tuple(map(str, layers)),
            cosine=rearrange(cosines.diagonal(dim1=1, dim2=2), "layer k kv_head -> layer kv_head k").cpu(),
            other_head=other_head.cpu(),
            null_mean=torch.tensor(min(1.0, d_head / model.d_model)),
            null_low=torch.tensor(null_low),
            null_high=torch.tensor(null_high),
        )

    def _cosines(self, model: ModelView, layer: int) -> Float[Tensor, "key_head value_head k"]:
        """Cosines of the principal angles between every head's keys and every head's values."""
        norm = model.input_norm(layer)
        keys, values = (folded(read, norm.weight, norm.centred) for read in (model.W_K(layer), model.W_V_shared(layer)))
        return torch.stack([principal_cosines(key, values) for key in keys])


def folded(
    weights: Float[Tensor, "kv_head d_model d_head"], norm_weight: Float[Tensor, " d_model"], centred: bool
) -> Float[Tensor, "kv_head d_model d_head"]:
    """Weights that act on the state before the norm: times the norm's weight, and centred if the norm centres."""
    read = weights.float() * norm_weight[:, None]
    return read - read.mean(1, keepdim=True) if centred else read


def principal_cosines(
    one: Float[Tensor, "d_model d_head"], others: Float[Tensor, "kv_head d_model d_head"]
) -> Float[Tensor, "kv_head k"]:
    """Cosines of the principal angles between the spans of columns, largest first; NaN if a column contains NaN.

    >>> principal_cosines(torch.eye(3)[:, :2], torch.eye(3)[None, :, 1:])
    tensor([[1., 0.]])
    """
    products = _basis(one).T @ _basis(others)
    cosines = torch.linalg.svdvals(products.nan_to_num(0)).clamp(max=1)
    return cosines.masked_fill(products.isnan().flatten(1).any(1, keepdim=True), torch.nan)


def _basis(columns: Float[Tensor, "*any d_model d_head"]) -> Float[Tensor, "*any d_model k"]:
    """An orthonormal basis of the columns' span; zeros in place of directions missing from dependent columns.

    NaN for columns that contain NaN or Inf.
    """
    unknown = ~columns.isfinite().flatten(-2).all(-1)[..., None, None]
    directions, strength, _ = torch.linalg.svd(columns.masked_fill(unknown, 0), full_matrices=False)
    own = directions * (strength > 1e-6 * strength[..., :1].clamp(min=1e-30))[..., None, :]
    return own.masked_fill(unknown, torch.nan)


def random_overlap(d_model: int, d_head: int) -> Float[np.ndarray, " bound"]:
    """The 2.5 % and 97.5 % quantiles of the overlap of random subspaces."""
    spaces = torch.randn(DRAWS + 1, d_model, d_head, generator=seeded(f"{d_model} {d_head}", 0))
    overlaps = principal_cosines(spaces[0], spaces[1:]).square().mean(-1).double().numpy()
    return np.quantile(overlaps, (0.025, 0.975))
