"""KeyValueOverlap: do a head's keys and values read the same part of the residual stream?

What W_K and W_V of a key/value head read are two subspaces of the residual stream, of d_head directions each. The
weight of the input norm is folded in, and its centring. With c the cosines of the principal angles between them:

    overlap[layer, kv_head] = mean over the d_head principal angles of c^2            0: orthogonal, 1: the same

Two random subspaces have d_head / d_model on average; `null_low` and `null_high` hold 95 % of random pairs. Another
control is `other_head`: the keys of one head with the values of the other heads of the layer (NaN for a single head).
A probe of weights alone: any prompt will do, and none changes a number.

Source: the question, what one vector for key and value would lose, is from Henry Dashwood, "How to Think About
Self-Attention Intuitively"; principal angles: Bjorck and Golub 1973, doi.org/10.2307/2005662.
"""

import zlib

import numpy as np
import plotly.graph_objects as go
import torch
from jaxtyping import Float
from torch import Tensor

from lens_probes import figures
from lens_probes.model import ModelView
from lens_probes.probe import Probe
from lens_probes.reading import Reading
from lens_probes.result import Result, measured
from lens_probes.settings import Layers

DRAWS = 100  # pairs of random subspaces


class KeyValueOverlapResult(Result):
    """Overlaps of every key/value head. Its size does not depend on prompts."""

    layer: tuple[str, ...]
    kv_head: tuple[str, ...]
    cosine: Float[Tensor, "layer kv_head k"] = measured("cosine of each principal angle, largest first", low=0, high=1)
    other_head: Float[Tensor, "layer kv_head"] = measured(
        "mean overlap of its keys with the values of the other heads", low=0, high=1
    )
    expected: Float[Tensor, ""] = measured("mean overlap of random subspaces", low=0, high=1)
    null_low: Float[Tensor, ""] = measured("2.5 % of random pairs overlap less", low=0, high=1)
    null_high: Float[Tensor, ""] = measured("2.5 % of random pairs overlap more", low=0, high=1)

    @property
    def overlap(self) -> Float[Tensor, "layer kv_head"]:
        """The mean squared cosine of a head's keys and values."""
        return self.cosine.square().mean(-1)

    def figure(self) -> go.Figure:
        """Overlap by layer and head; the title says what random subspaces have."""
        return figures.heatmap(
            self.overlap.tolist(),
            x=self.kv_head,
            y=self.layer,
            title=f"Do keys and values read the same? Random subspaces: {self.expected:.3f} ({self.null_low:.3f} to "
            f"{self.null_high:.3f})\n{self.provenance.describe()}",
            x_title="key/value head",
            y_title="layer",
            colour_title="overlap (0 to 1)",
            low=0.0,
            text=[[f"{value:.2f}" for value in row] for row in self.overlap.tolist()],
        )


class KeyValueOverlap(Probe[KeyValueOverlapResult]):
    """How much keys and values read in common, head by head.

    >>> import lens_probes as lp
    >>> result = lp.KeyValueOverlap().run(lp.tiny.bridge("llama"), "Any text.")
    >>> tuple(result.overlap.shape), round(float(result.expected), 2)
    ((3, 2), 0.25)
    """

    layers: Layers = None

    def hooks(self, model: ModelView) -> list[str]:
        """None: it reads weights."""
        model.layers(self.layers)
        if not model.encoder:
            model.check_input_norm()
        return []

    def measure(self, reading: Reading) -> KeyValueOverlapResult:
        """Principal angles, a layer at a time."""
        model = reading.model
        layers = model.layers(self.layers)
        own, others = [], []
        for layer in layers:
            norm = model.input_norm(layer)
            keys, values = (
                folded(read, norm.weight, norm.centred) for read in (model.W_K(layer), model.W_V_shared(layer))
            )
            cosines = torch.stack([principal_cosines(key, values) for key in keys])  # key head, value head, k
            own.append(cosines.diagonal(dim1=0, dim2=1).T)
            overlap = cosines.square().mean(-1)
            n = len(keys)
            apart = overlap.fill_diagonal_(0).sum(1)
            others.append(apart / (n - 1) if n > 1 else torch.full((1,), torch.nan))
        d_head = model.W_K(layers[0]).shape[-1]
        low, high = random_overlap(model.d_model, d_head)
        return KeyValueOverlapResult(
            layer=tuple(map(str, layers)),
            kv_head=tuple(f"KV{head}" for head in range(model.n_kv_heads)),
            cosine=torch.stack(own).cpu(),
            other_head=torch.stack(others).cpu(),
            expected=torch.tensor(min(1.0, d_head / model.d_model)),
            null_low=torch.tensor(low, dtype=torch.float32),
            null_high=torch.tensor(high, dtype=torch.float32),
        )


def folded(
    weights: Float[Tensor, "kv_head d_model d_head"], norm_weight: Float[Tensor, " d_model"], centred: bool
) -> Float[Tensor, "kv_head d_model d_head"]:
    """What the weights read of the state itself: with the norm's weight, and without the mean that it takes away."""
    read = weights.float() * norm_weight[:, None]
    return read - read.mean(1, keepdim=True) if centred else read


def principal_cosines(
    one: Float[Tensor, "d_model d_head"], others: Float[Tensor, "kv_head d_model d_head"]
) -> Float[Tensor, "kv_head k"]:
    """The cosines of the principal angles between the columns' spans, largest first; NaN where a column holds NaN.

    >>> principal_cosines(torch.eye(3)[:, :2], torch.eye(3)[None, :, 1:])
    tensor([[1., 0.]])
    """
    products = _basis(one).T @ _basis(others)
    cosines = torch.linalg.svdvals(products.nan_to_num(0)).clamp(max=1)
    return cosines.masked_fill(products.isnan().flatten(1).any(1, keepdim=True), torch.nan)


def _basis(columns: Float[Tensor, "*any d_model d_head"]) -> Float[Tensor, "*any d_model k"]:
    """Orthonormal directions of the columns' span; zeros for the directions that dependent columns lack.

    Columns that are not all finite span nothing that is known: NaN.
    """
    unknown = ~columns.isfinite().flatten(-2).all(-1)[..., None, None]
    directions, strength, _ = torch.linalg.svd(columns.masked_fill(unknown, 0), full_matrices=False)
    own = directions * (strength > 1e-6 * strength[..., :1].clamp(min=1e-30))[..., None, :]
    return own.masked_fill(unknown, torch.nan)


def random_overlap(d_model: int, d_head: int) -> Float[np.ndarray, " bound"]:
    """The bounds between which 95 % of pairs of random subspaces overlap."""
    random = torch.Generator().manual_seed(zlib.crc32(f"{d_model} {d_head}".encode()))
    spaces = torch.randn(DRAWS + 1, d_model, d_head, generator=random)
    overlaps = principal_cosines(spaces[0], spaces[1:]).square().mean(-1).double().numpy()
    return np.quantile(overlaps, (0.025, 0.975))
