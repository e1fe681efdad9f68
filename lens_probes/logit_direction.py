"""The direction in the residual stream that a target's logit reads, with the final norm's scale at its true value.

    direction[token] = centred(w * (W_U[:, t] - other)) / s[token],  other = mean over v of W_U[:, v], or W_U[:, a]

s is the final norm's scale, w its weight; centring is LayerNorm's. The logit of target t, less the mean logit or that
of token a, is the product of the state with it, plus a constant.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from einops import einsum
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lens_probes.maths.vocabulary import most_probable
from lens_probes.model import ModelView, Norm
from lens_probes.reading import Reading
from lens_probes.text.places import Positions, rows_at
from lens_probes.text.targets import target_ids, target_of


@runtime_checkable
class Attributing(Protocol):
    """A probe that asks for a target, for what it is compared with (None: the mean logit), and at which tokens."""

    @property
    def target(self) -> str | int: ...  # noqa: D102
    @property
    def against(self) -> str | int | None: ...  # noqa: D102
    @property
    def positions(self) -> Positions: ...  # noqa: D102


class LogitDirection(NamedTuple):
    """What final states say about targets: logit = state . direction + constant; `unknown` where there is no target.

    `rows`: the row numbers, in the reading, of the tokens that are asked about. They are the `token` axis here.
    """

    rows: Int[Tensor, " token"]
    target: str | tuple[int, ...]
    against: str | tuple[int, ...] | None
    texts: dict[int, str]
    direction: Float[Tensor, "token d_model"]
    constant: Float[Tensor, " token"]
    unknown: Bool[Tensor, " token"]


def check_linear(model: ModelView, asked: Attributing) -> None:
    """Raise for a model whose logits are no sum of what its parts write, and for targets that it does not have."""
    model.check_has_head()
    if model.encoder:
        raise ValueError(
            f"the model must be a decoder, whose logits are a sum of parts; {model.name} norms after every sum and "
            f"has a head that is not linear: use a decoder"
        )
    model.check_input_norm()
    target_of(asked, "target", model)
    if asked.against is not None:
        target_of(asked, "against", model)


def logit_direction(reading: Reading, asked: Attributing) -> LogitDirection:
    """The direction that each token's target reads in its final state, the final norm's scale at its true value."""
    model, rows = reading.model, rows_at(reading.tokens, asked.positions)
    last = reading[model.hook("resid_post", -1)][rows].float()
    normed, norm, scale = model.normed(last), model.final_norm(), model.logit_scale
    weight, bias = model.unembedding, model.unembedding_bias.float()

    def ids_of(target: str | tuple[int, ...]) -> Int[Tensor, " token"]:
        if target == "final":
            return most_probable(normed, weight, bias)
        return target_ids(reading.tokens, target)[rows, 0].to(normed.device)

    target = target_of(asked, "target", model, reading.tokens)
    against = None if asked.against is None else target_of(asked, "against", model, reading.tokens)
    ids = ids_of(target)
    if against is None:
        other, other_weight, other_bias = ids, _mean(weight), bias.mean()
    else:
        other = ids_of(against)
        other_weight, other_bias = weight[other.clamp(min=0)].float(), bias[other.clamp(min=0)]
    towards = scale * (weight[ids.clamp(min=0)].float() - other_weight)
    fixed = [i for each in (target, against) if isinstance(each, tuple) for i in each]
    return LogitDirection(
        rows,
        target,
        against,
        model.texts_of(torch.tensor(fixed, dtype=torch.int64)),
        frozen(norm, last, normed.float()).read(towards),
        towards @ norm.bias + scale * (bias[ids.clamp(min=0)] - other_bias),
        (ids < 0) | (other < 0),
    )


def read_of_attention(reading: Reading, layer: int, asked: LogitDirection) -> Float[Tensor, "token d_model"]:
    """What the direction reads of the sum of a layer's heads: itself, or through the norm after attention (Gemma)."""
    model = reading.model
    if (norm := model.attention_norm(layer)) is None:
        return asked.direction
    z, W_O = reading[model.hook_z(layer)][asked.rows].float(), model.W_O(layer).float()
    before = einsum(z, W_O, "token head d_head, head d_head d_model -> token d_model") + model.output_bias(layer)
    after = reading[model.hook("attn_out", layer)][asked.rows].float()
    return frozen(norm, before, after).read(asked.direction)


def _mean(rows: Float[Tensor, "vocab d_model"]) -> Float[Tensor, " d_model"]:
    """The mean row, as a product: three times as fast as a sum over the first axis."""
    return rows.float().T @ torch.full((len(rows),), 1 / len(rows), device=rows.device)


@dataclass(frozen=True)
class Frozen:
    """A norm with each token's scale at its true value: a linear map of what was written, and a constant bias."""

    norm: Norm
    scale: Float[Tensor, " token"]

    def read(self, direction: Float[Tensor, "token d_model"]) -> Float[Tensor, "token d_model"]:
        """The direction of the norm's input that says what `direction` says of its output."""
        weighted = self.norm.weight * direction
        if self.norm.centred:
            weighted = weighted - weighted.mean(-1, keepdim=True)
        return weighted / self.scale[:, None]


def frozen(norm: Norm, before: Float[Tensor, "token d_model"], after: Float[Tensor, "token d_model"]) -> Frozen:
    """The norm at the scale it had when it made `after`: after - bias = weight * centred(before) / scale."""
    centred = before - before.mean(-1, keepdim=True) if norm.centred else before
    weighted = norm.weight * centred
    square, product = weighted.square().sum(-1), (weighted * (after - norm.bias)).sum(-1)
    return Frozen(norm, torch.where(product > 0, square / product, torch.inf))  # of a zero state any scale is true
