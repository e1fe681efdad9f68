"""Any direction of the residual stream, read into tokens: which tokens does the model predict from it?

    p[unit] = softmax of unembed(vector[unit])      through final norm (or an encoder's head), unembedding and cap

Because of the final norm, only the direction matters, not the length. Read both ends: the sign of a singular vector is
arbitrary, and a neuron whose activation is mostly negative promotes the entries at the bottom.

Source: Geva et al. 2021, "Transformer Feed-Forward Layers Are Key-Value Memories", arXiv 2012.14913; Millidge and Black
2022, "The Singular Value Decompositions of Transformer Weight Matrices are Highly Interpretable",
alignmentforum.org/posts/mkbGjzxD8d8XqKHzA.
"""

from collections.abc import Sequence
from typing import Any, Unpack

import numpy as np
import plotly.graph_objects as go
import torch
from jaxtyping import Float, Int
from torch import Tensor

from lens_probes import figures
from lens_probes.messages import brief
from lens_probes.model import ModelView, undisturbed
from lens_probes.result import Result, measured, provenance
from lens_probes.text.prompts import whole_number

AT_ONCE = 128  # number of vectors whose logits are in memory at a time
ROWS = 30  # of the table figure
COLUMNS = 10


class VectorReading(Result):
    """The most and the least probable entries of each vector."""

    unit: tuple[str, ...]
    vocab: dict[int, str]
    top_ids: Int[Tensor, "unit k"] = measured("the most probable entries, best first", low=0, into="vocab")
    top_log_prob: Float[Tensor, "unit k"] = measured("their log-probabilities", unit="nats", high=0)
    bottom_ids: Int[Tensor, "unit other_k"] = measured("the least probable entries, last first", low=0, into="vocab")
    bottom_log_prob: Float[Tensor, "unit other_k"] = measured("their log-probabilities", unit="nats", high=0)
    entropy: Float[Tensor, " unit"] = measured("entropy of the prediction", unit="nats", low=0)

    def figure(self, first: int = 0, **look: Unpack[figures.Look]) -> go.Figure:
        """A table of thirty vectors, from number `first` on: their most, and then least, probable entries."""
        whole_number("first", first)
        rows = range(len(self.unit))[first : first + ROWS] if first >= 0 else ()
        if not rows:
            raise ValueError(f"first must be the number of a vector, 0 to {len(self.unit) - 1}; got {first}")
        columns = {"vector": [figures.visible(self.unit[i]) for i in rows]}
        columns["entropy"] = [f"{self.entropy[i]:.2f}" for i in rows]
        ends = {"top": (self.top_ids, self.top_log_prob), "bottom": (self.bottom_ids, self.bottom_log_prob)}
        for end, (ids, log_prob) in ends.items():
            for k in range(min(ids.shape[1], COLUMNS)):
                columns[f"{end} {k}"] = [
                    f"{figures.visible(self.vocab[int(ids[i, k])], 10)} {log_prob[i, k].exp():.1g}" for i in rows
                ]
        least = "and least " if self.bottom_ids.shape[1] else ""
        several = f", {rows[0]} to {rows[-1]} of {len(self.unit)}" if len(rows) < len(self.unit) else ""
        return figures.table(columns, title=self.title(f"Most {least}probable tokens per vector{several}"), **look)


def read_vector(
    model: Any,
    vectors: Float[Tensor, "*unit d_model"] | Sequence[Any] | np.ndarray,
    top_k: int = 10,
    bottom_k: int = 0,
    *,
    names: Sequence[str] | None = None,
) -> VectorReading:
    """Read one vector, or a matrix with one per row, into the tokens that the model would predict from it.

    `top_k`, `bottom_k`: numbers of most and least probable entries to keep. `names` label the vectors.
    Raises ValueError for a model that cannot be read through its head (see LogitLens), for vectors of another width,
    and for vectors that are zero or not finite.

    >>> import lens_probes as lp
    >>> model = lp.tiny.bridge("llama")
    >>> reading = read_vector(model, lp.neuron_vectors(model, layer=2), top_k=3, bottom_k=2)
    >>> tuple(reading.top_ids.shape), tuple(reading.bottom_ids.shape)
    ((64, 3), (64, 2))
    """
    view = ModelView(model)
    view.check_head()
    rows = torch.atleast_2d(torch.as_tensor(vectors).detach()).to(view.device).float()
    if rows.ndim != 2 or rows.shape[1] != view.d_model or not len(rows):
        raise ValueError(
            f"vectors must be [unit d_model] with d_model {view.d_model} for {view.name}; got {tuple(rows.shape)}"
        )
    length = rows.norm(dim=1)
    pointless = ~length.isfinite() | (length == 0)
    if pointless.any():
        raise ValueError(
            f"every vector must be finite and not zero; got vector {int(pointless.nonzero()[0])}, which is not: leave "
            f"it out"
        )
    for name, k in (("top_k", top_k), ("bottom_k", bottom_k)):
        whole_number(name, k)
    if not 0 <= top_k <= view.d_vocab or not 0 <= bottom_k <= view.d_vocab or not top_k + bottom_k:
        raise ValueError(
            f"top_k and bottom_k must be 0 to {view.d_vocab}, the size of the vocabulary, and not both 0; got {top_k} "
            f"and {bottom_k}"
        )
    labels = tuple(map(str, range(len(rows)) if names is None else names))
    if isinstance(names, str) or len(labels) != len(rows):
        raise ValueError(f"names must be a list of {len(rows)} names, one per vector; got {brief(names)}")
    # Scaled to a length for which the epsilon of the norm is negligible.
    rows = rows / length[:, None] * view.d_model**0.5
    parts = []
    with undisturbed(view.model):
        for some in rows.split(AT_ONCE):
            log_prob = view.unembed(some).log_softmax(-1)
            top, bottom = log_prob.topk(top_k), log_prob.topk(bottom_k, largest=False)
            entropy = -(log_prob.exp() * log_prob).sum(-1)
            parts.append((top.indices, top.values, bottom.indices, bottom.values, entropy))
    ids, values, bottom_ids, bottom_values, entropies = (torch.cat(each).cpu() for each in zip(*parts, strict=True))
    return VectorReading(
        unit=labels,
        vocab=view.texts_of(ids, bottom_ids),
        top_ids=ids,
        top_log_prob=values,
        bottom_ids=bottom_ids,
        bottom_log_prob=bottom_values,
        entropy=entropies,
        provenance=provenance(f"read_vector(top_k={top_k}, bottom_k={bottom_k})", view, view.W_E.dtype),
    )


def neuron_vectors(model: Any, layer: int) -> Float[Tensor, "unit d_model"]:
    """The vector that each neuron of a layer's MLP adds to the residual stream: the rows of W_out.

    Includes the model's residual multiplier, if it has one (Granite). In models with a norm between MLP and residual
    stream (Gemma 2), it is the vector before that norm. Raises for a model whose neurons do not add up to the output of
    its MLP, such as a mixture of experts.
    """
    view = ModelView(model)
    (layer,) = view.layers([layer])
    vectors = view.W_out(layer)
    view.check_neurons(layer)
    return vectors.float().cpu()


def ov_vectors(model: Any, layer: int, head: int, k: int = 5) -> Float[Tensor, "k d_model"]:
    """The k directions that a head writes most strongly: right singular vectors of W_V W_O, of unit length.

    Strongest first. The sign of a direction is arbitrary; here its largest entry is positive. In models with a norm
    between attention and residual stream (Gemma 2), they are the directions before that norm.

    >>> import lens_probes as lp
    >>> tuple(ov_vectors(lp.tiny.bridge("llama"), layer=1, head=3, k=2).shape)
    (2, 32)
    """
    view = ModelView(model)
    (layer,) = view.layers([layer])
    W_V, W_O = view.W_V(layer).float(), view.W_O(layer).float()
    if not 0 <= head < len(W_O):
        raise ValueError(f"head {head} is out of range: layer {layer} of {view.name} has heads 0 to {len(W_O) - 1}")
    if not 1 <= k <= W_O.shape[1]:
        raise ValueError(f"k must be a number of directions, 1 to {W_O.shape[1]} for this head; got {k}")
    if not (W_V[head].isfinite().all() and W_O[head].isfinite().all()):
        raise ValueError(
            f"the values and outputs of head {head} in layer {layer} of {view.name} must be finite; got NaN or Inf: "
            f"check the model's weights"
        )
    # W_V W_O = (Q R) (Q' R')^T: the singular value decomposition of a small matrix instead of [d_model d_model].
    _, read = torch.linalg.qr(W_V[head])
    basis, write = torch.linalg.qr(W_O[head].T)
    directions = torch.linalg.svd(read @ write.T).Vh @ basis.T
    largest = directions.gather(1, directions.abs().argmax(1, keepdim=True))
    return (directions * largest.sign())[:k].cpu()
