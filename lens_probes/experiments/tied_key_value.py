"""TiedKeyValue: what does a model lose if keys and values are one vector?

In a trained model, for each place (a key/value head, a layer, or all layers at once), through hooks before rotary
positions, the key norm and any clipping, k and v of every token are replaced, with s = rms(k) / rms(v) of the head:

    keys are values             k := s v            and unscaled, k := v
    values are keys             v := k / s          and unscaled, v := k
    shared                      (k / rms(k), v / rms(v)) := their projection on d_head directions

    increase[way, place] = mean over prompts of L(tied) - L        L: mean -log p(next token) of a prompt, nats

The shared vector is the best of its width: the first d_head principal components of keys and values side by side.
Scales and components are fitted on one part of the prompts, the loss is that of the other part. Nothing is trained: a
model that had been trained with one vector could do better. A value bias counts as part of v where the model adds it to
v; processed weights have it in b_O instead, where no tie reaches it, and so differ a little.

Source: the question is from Henry Dashwood, "How to Think About Self-Attention Intuitively".
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from lens_probes import figures
from lens_probes.maths import inference
from lens_probes.messages import brief
from lens_probes.model import ModelView
from lens_probes.probe import Experiment
from lens_probes.reading import batches, finite, pad, prompt_loss
from lens_probes.result import Result, measured, provenance
from lens_probes.settings import Layers
from lens_probes.text.prompts import Prompts, PromptTable, Tokens, first_part, prompt_table, tokenize

WAYS = ("keys are values", "keys are values, unscaled", "values are keys", "values are keys, unscaled", "shared")


class TiedKeyValueResult(Result):
    """The loss of every prompt as it is and for every way of tying at every place."""

    way: tuple[str, ...]
    place: tuple[str, ...]
    prompt: PromptTable
    loss: Float[Tensor, " prompt"] = measured("mean -log p(next token) of a prompt, nats", low=0)
    tied: Float[Tensor, "way place prompt"] = measured("the same with keys and values tied, nats", low=0)
    kept: Float[Tensor, " place"] = measured(
        "share of the variance that a shared vector keeps where it was fitted", low=0, high=1
    )

    @property
    def increase(self) -> Float[Tensor, "way place"]:
        """The mean increase of the loss, nats."""
        return (self.tied - self.loss).mean(-1)

    def table(self) -> pd.DataFrame:
        """Way by place: loss before and after, the increase and its interval, Student's t over prompts."""
        order = np.argsort(np.asarray(self.prompt.text), kind="stable")
        grown = (self.tied - self.loss).flatten(0, 1).double().numpy()[:, order]
        low, high = inference.mean_interval(grown)
        return self.cells("way", "place").assign(
            loss=float(self.loss.mean()),
            tied=self.tied.mean(-1).flatten().numpy(),
            increase=grown.mean(1),
            low=low,
            high=high,
            prompts=grown.shape[1],
        )

    def figure(self) -> go.Figure:
        """The increase of the loss by place and way of tying."""
        return figures.heatmap(
            self.increase.T.tolist(),
            x=self.way,
            y=self.place,
            title=f"What does one vector for key and value cost? Loss {float(self.loss.mean()):.2f} nats as it is\n"
            f"{self.provenance.describe()}",
            x_title="tied",
            y_title="place",
            colour_title="increase of the loss (nats)",
            signed=True,
            text=[[f"{value:.2f}" for value in row] for row in self.increase.T.tolist()],
        )


class TiedKeyValue(Experiment[TiedKeyValueResult]):
    """Tie keys to values at every place in turn: 5 passes a place over the prompts that nothing was fitted on.

    `at`: each `layer`, each `kv_head` or `all` layers together. Interrupted, it gives the places done so far.

    >>> import lens_probes as lp
    >>> result = lp.TiedKeyValue(layers=[1]).run(lp.tiny.bridge("llama"), lp.demo.sentences()[:8], progress=False)
    >>> tuple(result.increase.shape), result.place
    ((5, 1), ('L1',))
    """

    at: Literal["kv_head", "layer", "all"] = "layer"
    layers: Layers = None
    fraction: float = 0.5

    def __post_init__(self) -> None:
        if self.at not in ("kv_head", "layer", "all"):
            raise ValueError(f"TiedKeyValue(at=...) is kv_head, layer or all; {brief(self.at)} came")

    def run(self, model: Any, prompts: Prompts, *, progress: bool = True) -> TiedKeyValueResult:
        """Fit on one part of the prompts, tie and measure on the other."""
        view = ModelView(model)
        view.check_predicts_next()
        view.check_input_norm()
        tokens = tokenize(prompts, view)
        first = first_part(tokens, self.fraction)
        layers = view.layers(self.layers)
        fits = {layer: _fit(view, tokens[first], layer) for layer in layers}
        rest = tokens[~first]
        heads = list(range(view.n_kv_heads))
        places = {
            "all": {"all": [(layer, heads) for layer in layers]},
            "layer": {f"L{layer}": [(layer, heads)] for layer in layers},
            "kv_head": {f"L{layer}KV{head}": [(layer, [head])] for layer in layers for head in heads},
        }[self.at]
        loss = prompt_loss(view, rest)
        done: list[Float[Tensor, "way prompt"]] = []
        try:
            for tied in tqdm(places.values(), desc="tying", unit="place", disable=not progress):
                edits = [_merged([_edits(view, fits[at], at, some, way) for at, some in tied]) for way in WAYS]
                done.append(torch.stack([prompt_loss(view, rest, edit) for edit in edits]))
        except KeyboardInterrupt:
            if not done:
                raise
            tqdm.write(f"interrupted after {len(done)} of {len(places)} places")
        return TiedKeyValueResult(
            way=WAYS,
            place=tuple(places)[: len(done)],
            prompt=prompt_table(rest),
            loss=loss,
            tied=torch.stack(done, dim=1),
            kept=torch.stack(
                [torch.stack([fits[at].kept[some].mean() for at, some in tied]).mean() for tied in places.values()]
            )[: len(done)],
            provenance=provenance(
                self, view, view.W_E.dtype, [hook(at) for at in layers for hook in _hooks(view)], rest
            ),
        )


class _Fit(NamedTuple):
    """Of one layer's key/value heads: root mean squares, and the directions of keys and values side by side."""

    key_rms: Float[Tensor, " kv_head"]
    value_rms: Float[Tensor, " kv_head"]
    mean: Float[Tensor, "kv_head both"]
    directions: Float[Tensor, "kv_head d_head both"]
    kept: Float[Tensor, " kv_head"]


def _hooks(view: ModelView) -> tuple[Callable[[int], str], Callable[[int], str]]:
    return view.hook_plain_key, view.hook_value


def _fit(view: ModelView, tokens: Tokens, layer: int) -> _Fit:
    names = [hook(layer) for hook in _hooks(view)]
    parts: list[list[Tensor]] = []
    for batch in batches(tokens):
        ids, mask = pad(batch, view)
        found = view.activations(ids, mask, names)
        parts.append([finite(name, found[name][mask.to(view.device)].float()) for name in names])
    keys, values = (torch.cat(each).transpose(0, 1) for each in zip(*parts, strict=True))  # kv_head token d_head
    key_rms, value_rms = (each.square().mean((1, 2)).sqrt().clamp(min=1e-12) for each in (keys, values))
    both = torch.cat([keys / key_rms[:, None, None], values / value_rms[:, None, None]], dim=-1)
    mean = both.mean(1)
    _, strength, directions = torch.linalg.svd(both - mean[:, None], full_matrices=False)
    d_head = keys.shape[-1]
    kept = strength[:, :d_head].square().sum(-1) / strength.square().sum(-1)
    return _Fit(key_rms, value_rms, mean, directions[:, :d_head], kept)


def _edits(
    view: ModelView, fit: _Fit, layer: int, heads: Sequence[int], way: str
) -> dict[str, Callable[[Tensor], Tensor]]:
    """What to do to a block's input (remember it), keys and values. Values are made early, where keys need them."""
    seen: dict[str, Tensor] = {}
    scale = (fit.key_rms / fit.value_rms)[:, None] if "unscaled" not in way else torch.ones_like(fit.key_rms)[:, None]
    key_name, value_name = (hook(layer) for hook in _hooks(view))

    def remember(state: Tensor) -> Tensor:
        seen["values"] = view.values(layer, state)
        return state

    def keys(own: Tensor) -> Tensor:
        seen["keys"] = own
        if way.startswith("keys"):
            return _some(own, scale * seen["values"].float(), heads)
        return _some(own, shared(fit, own, seen["values"])[0], heads) if way == "shared" else own

    def values(own: Tensor) -> Tensor:
        if way.startswith("values"):
            return _some(own, seen["keys"].float() / scale, heads)
        return _some(own, shared(fit, seen["keys"], own)[1], heads) if way == "shared" else own

    return {view.hook("resid_pre", layer): remember, key_name: keys, value_name: values}


def shared(
    fit: _Fit, keys: Float[Tensor, "... kv_head d_head"], values: Float[Tensor, "... kv_head d_head"]
) -> tuple[Float[Tensor, "... kv_head d_head"], Float[Tensor, "... kv_head d_head"]]:
    """Keys and values as d_head shared numbers a head give them back."""
    both = torch.cat([keys.float() / fit.key_rms[:, None], values.float() / fit.value_rms[:, None]], dim=-1)
    along = torch.einsum("...hb,hkb->...hk", both - fit.mean, fit.directions)
    back = torch.einsum("...hk,hkb->...hb", along, fit.directions) + fit.mean
    first, second = back.chunk(2, dim=-1)
    return first * fit.key_rms[:, None], second * fit.value_rms[:, None]


def _some(own: Tensor, other: Tensor, heads: Sequence[int]) -> Tensor:
    changed = own.clone()
    changed[..., heads, :] = other[..., heads, :].to(own)
    return changed


def _merged(edits: Sequence[dict[str, Callable[[Tensor], Tensor]]]) -> dict[str, Callable[[Tensor], Tensor]]:
    return {name: edit for some in edits for name, edit in some.items()}
