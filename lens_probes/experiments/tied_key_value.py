"""TiedKeyValue: how much does the loss increase if keys and values are one vector?

In a trained model, hooks replace k and v of every token at one place (a key/value head, a layer, or all layers), before
rotary positions, the key norm and any clipping. With s = rms(k) / rms(v) of the head:

    keys are values             k := s v            and unscaled, k := v
    values are keys             v := k / s          and unscaled, v := k
    shared                      (k / rms(k), v / rms(v)) := their projection on d_head directions

    increase[way, place] = mean over prompts of L(tied) - L        L: mean -log p(next token) of a prompt, nats

The shared vector is the best of its width: the first d_head principal components of keys and values side by side.
Scales and components are fitted on one part of the prompts, the loss is measured on the other. Nothing is trained: a
model trained with one vector could do better. If the model adds a value bias to v, it is tied as part of v. Processed
weights have it in b_O instead, where it is not tied, and so their results differ slightly.

Source: the question is from Henry Dashwood, "How to Think About Self-Attention Intuitively".
"""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, Unpack

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from einops import einsum, rearrange, reduce
from jaxtyping import Float
from torch import Tensor

from lens_probes import figures
from lens_probes.maths import inference
from lens_probes.model import ModelView
from lens_probes.probe import Study, TextExperiment
from lens_probes.reading import batches, finite, pad, prompt_loss
from lens_probes.result import Result, derived, measured
from lens_probes.settings import Layers, Share
from lens_probes.text.prompts import PromptTable, Tokens, first_part, prompt_table

WAYS = ("keys are values", "keys are values, unscaled", "values are keys", "values are keys, unscaled", "shared")
Edits = dict[str, Callable[[Tensor], Tensor]]
Place = list[tuple[int, list[int]]]
"""What is tied together: layers, and the key/value heads of each."""


class TiedKeyValueResult(Result):
    """The loss of every prompt, untied, and tied in every way at every place."""

    headline = "increase"
    way: tuple[str, ...]
    place: tuple[str, ...]
    prompt: PromptTable
    loss: Float[Tensor, " prompt"] = measured("mean -log p(next token)", unit="nats", low=0)
    tied: Float[Tensor, "way place prompt"] = measured("loss with keys and values tied", unit="nats", low=0)
    kept: Float[Tensor, " place"] = measured(
        "share of the variance that the shared vector keeps, on the prompts of the fit", low=0, high=1
    )

    @derived("increase of the loss", unit="nats")
    def increase(self) -> Float[Tensor, "way place"]:
        """The increase of the loss by tying, as the mean over prompts, in nats."""
        return (self.tied - self.loss).mean(-1)

    def table(self) -> pd.DataFrame:
        """One row per way and place: loss untied and tied, and the increase with its interval over prompts."""
        order = np.argsort(np.asarray(self.prompt.text), kind="stable")
        increase = (self.tied - self.loss).flatten(0, 1).double().numpy()[:, order]
        low, high = inference.mean_interval(increase)
        return self.cells("way", "place").assign(
            loss=float(self.loss.mean()),
            tied=self.tied.mean(-1).flatten().numpy(),
            increase=increase.mean(1),
            low=low,
            high=high,
            prompts=increase.shape[1],
        )

    def figure(self, **look: Unpack[figures.Look]) -> go.Figure:
        """The increase of the loss by place and way of tying."""
        increase = self.increase.T.tolist()
        return figures.heatmap(
            increase,
            x=self.way,
            y=self.place,
            title=self.title(
                f"Increase of the loss with keys and values tied (untied: {float(self.loss.mean()):.2f} nats)"
            ),
            x_title="what is tied",
            y_title="place",
            colour_title=self.quantity("increase").title,
            signed=True,
            text=[[f"{value:z.2f}" for value in row] for row in increase],
            **look,
        )


class TiedKeyValue(TextExperiment[TiedKeyValueResult]):
    """Tie keys and values at every place in turn: 5 passes per place over the prompts that are not used for the fit.

    `at`: each `layer`, each `kv_head` or `all` layers together. `fraction`: share of the prompts for the fit. After an
    interrupt the result holds the places done so far.

    >>> import lens_probes as lp
    >>> result = lp.TiedKeyValue(layers=[1]).run(lp.tiny.bridge("llama"), lp.demo.sentences()[:8], progress=False)
    >>> tuple(result.increase.shape), result.place
    ((5, 1), ('L1',))
    """

    at: Literal["kv_head", "layer", "all"] = "layer"
    layers: Layers = None
    fraction: Share = 0.5

    def perform(self, study: Study) -> TiedKeyValueResult:
        """Fit on one part of the prompts; tie and measure on the other."""
        view = study.view
        view.check_predicts_next()
        view.check_input_norm()
        layers, first = view.layers(self.layers), first_part(study.tokens, self.fraction)
        view.check_keys_and_values(layers)
        fits = {layer: fit(view, study.tokens[first], layer) for layer in layers}
        rest = study.tokens[~first]
        loss = prompt_loss(view, rest)

        def tied(place: Place, way: str) -> Float[Tensor, " prompt"]:
            edits: Edits = {}
            for layer, heads in place:
                edits |= edits_of(view, fits[layer], layer, heads, way)
            return prompt_loss(view, rest, edits)

        def tie(place: Place) -> Float[Tensor, "way prompt"]:
            return torch.stack([tied(place, way) for way in WAYS])

        places = self._places(layers, list(range(view.n_kv_heads)))
        done = study.each(tie, places.values(), doing="tying", unit="place")
        kept = [
            torch.stack([fits[at].kept[heads].mean() for at, heads in place]).mean()
            for place in list(places.values())[: len(done)]
        ]
        return TiedKeyValueResult(
            way=WAYS,
            place=tuple(places)[: len(done)],
            prompt=prompt_table(rest),
            loss=loss,
            tied=torch.stack(done, dim=1),
            kept=torch.stack(kept),
            provenance=study.provenance([hook(layer) for layer in layers for hook in _hooks(view)], rest),
        )

    def _places(self, layers: Sequence[int], heads: list[int]) -> dict[str, Place]:
        """The places of this run by their labels."""
        return {
            "all": {"all": [(layer, heads) for layer in layers]},
            "layer": {f"L{layer}": [(layer, heads)] for layer in layers},
            "kv_head": {f"L{layer}KV{head}": [(layer, [head])] for layer in layers for head in heads},
        }[self.at]


class Fit(NamedTuple):
    """Root mean squares of one layer's key/value heads, and principal directions of keys and values side by side."""

    key_rms: Float[Tensor, " kv_head"]
    value_rms: Float[Tensor, " kv_head"]
    mean: Float[Tensor, "kv_head both"]
    directions: Float[Tensor, "kv_head d_head both"]
    kept: Float[Tensor, " kv_head"]


def _hooks(view: ModelView) -> tuple[Callable[[int], str], Callable[[int], str]]:
    return view.hook_plain_key, view.hook_value


def fit(view: ModelView, tokens: Tokens, layer: int) -> Fit:
    """Scales and principal components of a layer's keys and values on these tokens."""
    names = [hook(layer) for hook in _hooks(view)]
    parts: list[list[Tensor]] = []
    for batch in batches(tokens):
        ids, mask = pad(batch, view)
        found = view.activations(ids, mask, names)
        parts.append([finite(name, found[name][mask.to(view.device)].float()) for name in names])
    keys, values = (rearrange(torch.cat(each), "token head d -> head token d") for each in zip(*parts, strict=True))
    key_rms, value_rms = (
        reduce(each.square(), "head token d -> head", "mean").sqrt().clamp(min=1e-12) for each in (keys, values)
    )
    both = torch.cat([keys / key_rms[:, None, None], values / value_rms[:, None, None]], dim=-1)
    mean = both.mean(1)
    _, strength, directions = torch.linalg.svd(both - mean[:, None], full_matrices=False)
    d_head = keys.shape[-1]
    kept = strength[:, :d_head].square().sum(-1) / strength.square().sum(-1)
    return Fit(key_rms, value_rms, mean, directions[:, :d_head], kept)


def shared(
    fit: Fit, keys: Float[Tensor, "... kv_head d_head"], values: Float[Tensor, "... kv_head d_head"]
) -> tuple[Float[Tensor, "... kv_head d_head"], Float[Tensor, "... kv_head d_head"]]:
    """Keys and values, reconstructed from d_head shared numbers per head."""
    both = torch.cat([keys.float() / fit.key_rms[:, None], values.float() / fit.value_rms[:, None]], dim=-1)
    along = einsum(both - fit.mean, fit.directions, "... head both, head k both -> ... head k")
    back = einsum(along, fit.directions, "... head k, head k both -> ... head both") + fit.mean
    of_keys, of_values = back.chunk(2, dim=-1)
    return of_keys * fit.key_rms[:, None], of_values * fit.value_rms[:, None]


def edits_of(view: ModelView, fit: Fit, layer: int, heads: Sequence[int], way: str) -> Edits:
    """The edits of a layer's keys and values, in these heads, for one way of tying.

    Keys come before values in the forward pass, so the values that keys need are computed from the block's input.
    """
    seen: dict[str, Tensor] = {}
    scale = (fit.key_rms / fit.value_rms)[:, None] if "unscaled" not in way else torch.ones_like(fit.key_rms)[:, None]
    key_name, value_name = (hook(layer) for hook in _hooks(view))

    def remember(state: Tensor) -> Tensor:
        seen["values"] = view.values(layer, state)
        return state

    def keys(own: Tensor) -> Tensor:
        seen["keys"] = own
        if way.startswith("keys"):
            return in_heads(own, scale * seen["values"].float())
        return in_heads(own, shared(fit, own, seen["values"])[0]) if way == "shared" else own

    def values(own: Tensor) -> Tensor:
        if way.startswith("values"):
            return in_heads(own, seen["keys"].float() / scale)
        return in_heads(own, shared(fit, seen["keys"], own)[1]) if way == "shared" else own

    def in_heads(own: Tensor, tied: Tensor) -> Tensor:
        changed = own.clone()
        changed[..., heads, :] = tied[..., heads, :].to(own)
        return changed

    return {view.hook("resid_pre", layer): remember, key_name: keys, value_name: values}
