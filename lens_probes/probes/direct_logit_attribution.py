"""DirectLogitAttribution: which heads and MLPs write the target?

The final state is the sum of what every part of the model wrote. With the final norm's scale s at its true value,
centring (LayerNorm only) and weight w are linear, and so is what the state says about the target t:

    direction[token]               = centred(w * (W_U[:, t] - mean over v of W_U[:, v])) / s[token]
    contribution[component, token] = written[component, token] . direction[token]               logits
    total[token]                   = logit[t] - mean over v of logit[v], before any soft cap    = sum of all components

Components: the embedding and, where learned, the position; every head (z @ W_O); every attention's bias, in which the
value biases are; every MLP; and the biases of final norm and unembedding. Subtracting the mean logit, moving value
biases, and applying w make raw and processed weights agree. Gemma norms what attention adds: that norm's scale is taken
at its true value too. Contributions are direct: what a head does through later parts counts as theirs.

What a model multiplies outputs of attention and MLP by before it adds them (Granite) is part of contributions.

BERT and RoBERTa are refused: they norm after every sum, and their head is not linear. So is a model whose parts do not
sum to its logits.

Source: direct logit attribution as in Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits",
transformer-circuits.pub/2021/framework.
"""

from dataclasses import dataclass
from typing import get_args

import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lens_probes import figures
from lens_probes.maths import inference
from lens_probes.maths.vocabulary import predictions
from lens_probes.messages import brief
from lens_probes.model import ModelView, Norm
from lens_probes.probe import Probe
from lens_probes.reading import Reading
from lens_probes.result import Result, measured
from lens_probes.settings import Layers
from lens_probes.text.prompts import Target, Tokens, asked_about, target_ids

TOLERANCE = 0.05  # of the totals' size: float32 errs by 1e-5, bfloat16 by 1e-2, a missed part by much more


class DirectLogitAttributionResult(Result):
    """What every part of the model adds to the target's logit. It grows with the number of tokens."""

    target: str | tuple[int, ...]
    layer: tuple[str, ...]
    head: tuple[str, ...]
    component: tuple[str, ...]
    token: Tokens
    contribution: Float[Tensor, "component token"] = measured(
        "what a part adds to the target's logit minus the mean logit; NaN without a target"
    )
    total: Float[Tensor, " token"] = measured("the target's logit minus the mean logit, before a soft cap")

    def __post_init__(self) -> None:
        super().__post_init__()
        parts = (*self.head, "_mlp", "_attn_bias")
        missing = {f"L{layer}{part}" for layer in self.layer for part in parts} - set(self.component)
        if missing or not self.layer or not self.head:
            raise ValueError(
                f"DirectLogitAttributionResult has a component for every head, MLP and attention bias of its layers; "
                f"{min(missing, default='every one')} is missing"
            )

    def of_component(self, component: str) -> Float[Tensor, " token"]:
        """The contributions of one component: `L3H1`, `L3_mlp`, `L3_attn_bias`, `embed`, ..."""
        if component not in self.component:
            raise ValueError(
                f"component {brief(component)} was asked for and there are {', '.join(self.component[:6])}, ..."
            )
        return self.contribution[self.component.index(component)]

    def mean_contribution(self) -> pd.DataFrame:
        """Per component: the mean over tokens, special ones left out, its 95 % interval (prompts resampled), its share.

        `share`: of the mean total; the shares of all components sum to 1. Then the numbers of tokens and prompts.
        """
        chosen = self._counted()
        if not chosen.any():
            raise ValueError("no token here has a target: pass longer prompts, or another target")
        tokens = self.token[chosen]
        mean, low, high = inference.token_means(self.contribution[:, chosen].double().numpy(), tokens)
        return pd.DataFrame(
            {
                "component": self.component,
                "mean": mean,
                "low": low,
                "high": high,
                "share": mean / float(self.total[chosen].double().mean()),
                "tokens": len(tokens),
                "prompts": len(tokens.prompt.unique()),
            }
        )

    def figure(self) -> go.Figure:
        """Heads by layer, and beside them MLPs and attention biases, mean over tokens (special ones left out)."""
        means = dict(zip(self.component, self.mean_contribution()["mean"], strict=True))
        chosen = self._counted()
        mean = f"mean over {int(chosen.sum())} tokens, {float(self.total[chosen].mean()):.2f} logits in all"
        return self._draw(means, f"Which parts write the target? {mean[0].upper()}{mean[1:]}")

    def figure_token(self, token: int | str, prompt: int = 0) -> go.Figure:
        """The same for one token."""
        row = self.token.row(prompt, token)
        if self.total[row].isnan():
            raise ValueError(f"token {token} of prompt {prompt} has no target: it is the last, ask an earlier one")
        values = dict(zip(self.component, self.contribution[:, row].tolist(), strict=True))
        text, total = self.token.text[row], float(self.total[row])
        question = (
            f"Which parts write the target at token {token} of prompt {prompt}, {text!r}? {total:.2f} logits in all"
        )
        return self._draw(values, question)

    def _draw(self, values: dict[str, float], question: str) -> go.Figure:
        rest = {name: value for name, value in values.items() if not name.startswith("L")}
        others = ", ".join(f"{name} {value:.2f}" for name, value in rest.items())
        return figures.grid_with_bars(
            [[values[f"L{layer}{head}"] for head in self.head] for layer in self.layer],
            {
                "MLP": [values[f"L{layer}_mlp"] for layer in self.layer],
                "attention bias": [values[f"L{layer}_attn_bias"] for layer in self.layer],
            },
            x=self.head,
            y=self.layer,
            title=f"{question}\nbeside these: {others}\n{self.provenance.describe()}",
            x_title="head",
            y_title="layer",
            colour_title="contribution (logits)",
        )

    def _counted(self) -> Bool[Tensor, " token"]:
        """The tokens that have a target and are not special."""
        return ~asked_about(self.token, self.target).special & ~self.total.isnan()


class DirectLogitAttribution(Probe[DirectLogitAttributionResult]):
    """What every part of the model adds to the target's logit.

    `target`: the token that really follows (`next`), the token itself (`own`), the model's own top-1 (`final`), or an
    id. With `layers`, the heads and MLPs of the others come together as `other_layers`.

    >>> import lens_probes as lp
    >>> result = lp.DirectLogitAttribution().run(lp.tiny.bridge(), "Time flies like an arrow.")
    >>> bool(torch.allclose(result.contribution[:, :-1].sum(0), result.total[:-1], atol=1e-4))
    True
    """

    target: Target | int = "next"
    layers: Layers = None

    def __post_init__(self) -> None:
        if not isinstance(self.target, int) and self.target not in get_args(Target):
            named = ", ".join(get_args(Target))
            raise ValueError(
                f"DirectLogitAttribution(target=...) is one of {named}, or a token id; {brief(self.target)} came"
            )

    def hooks(self, model: ModelView) -> list[str]:
        """What is written: embeddings, each head's mixed values, what attention and MLP add; and the last state."""
        model.check_head()
        if model.encoder:
            raise ValueError(
                f"{model.name} norms after every sum and has a head that is not linear, so that its logits are no sum "
                f"of parts: use a decoder"
            )
        if isinstance(self.target, int) and not 0 <= self.target < model.d_vocab:
            raise ValueError(
                f"target {self.target} was asked for and the ids of {model.name} end at {model.d_vocab - 1}"
            )
        model.check_input_norm()
        written = [
            name for layer in model.layers(self.layers) for name in (*_written(model, layer), *_ends(model, layer))
        ]
        return list(
            dict.fromkeys([*model.embeddings(), model.hook("resid_pre", 0), *written, model.hook("resid_post", -1)])
        )

    def measure(self, reading: Reading) -> DirectLogitAttributionResult:
        """Contributions of the batch, layer by layer."""
        model, tokens = reading.model, reading.tokens
        layers = model.layers(self.layers)
        last = reading[model.hook("resid_post", -1)].float()
        normed = model.normed(last)
        targets = self._targets(model, tokens, normed).to(model.device)
        norm = model.final_norm()
        weight, bias = model.unembedding.float(), model.unembedding_bias.float()
        scale = model.logit_scale
        towards = scale * (weight[targets.clamp(min=0)] - weight.mean(0))
        direction = frozen(norm, last, normed.float()).read(towards)
        parts = {name: (reading[hook].float() * direction).sum(-1) for hook, name in model.embeddings().items()}
        total = (last * direction).sum(-1)
        size = float(total.abs().max())
        embedded = reading[model.hook("resid_pre", 0)].float() - sum(
            reading[hook].float() for hook in model.embeddings()
        )
        _check(model, "embeddings", (embedded * direction).sum(-1), size)
        for layer in layers:
            found = self._layer(reading, layer, direction)
            before, after = (reading[hook].float() for hook in _ends(model, layer))
            added = ((after - before) * direction).sum(-1)
            _check(model, f"parts of layer {layer}", added - torch.stack(list(found.values())).sum(0), size)
            parts |= found
        known = torch.stack(list(parts.values())).sum(0)
        if len(layers) < model.n_layers:
            parts["other_layers"] = total - known
        else:
            _check(model, "parts", total - known, size)
        parts["final_bias"] = towards @ norm.bias + scale * (bias[targets.clamp(min=0)] - bias.mean())
        contribution = torch.stack(list(parts.values())).cpu()
        total = total + parts["final_bias"]
        unknown = (targets < 0).cpu()
        return DirectLogitAttributionResult(
            target=(self.target,) if isinstance(self.target, int) else self.target,
            layer=tuple(map(str, layers)),
            head=tuple(f"H{head}" for head in range(model.n_heads)),
            component=tuple(parts),
            token=tokens,
            contribution=contribution.masked_fill(unknown, torch.nan),
            total=total.cpu().masked_fill(unknown, torch.nan),
        )

    def _targets(
        self, model: ModelView, tokens: Tokens, normed: Float[Tensor, "token d_model"]
    ) -> Int[Tensor, " token"]:
        if self.target == "final":
            nothing = torch.empty(len(tokens), 0, dtype=torch.int64, device=normed.device)
            return predictions(normed[:, None], model.unembedding, model.unembedding_bias, nothing, 1).top_ids[:, 0, 0]
        return target_ids(tokens, (self.target,) if isinstance(self.target, int) else self.target)[:, 0]

    def _layer(
        self, reading: Reading, layer: int, direction: Float[Tensor, "token d_model"]
    ) -> dict[str, Float[Tensor, " token"]]:
        """What the heads, the attention bias and the MLP of one layer add along a direction."""
        model = reading.model
        z_hook, attn_hook, mlp_hook = _written(model, layer)
        W_O, bias = model.W_O(layer).float(), model.attention_bias(layer)
        z = reading[z_hook].float() - model.value_bias(layer)
        towards = direction
        if (norm := model.attention_norm(layer)) is not None:
            before = torch.einsum("thk,hkd->td", z, W_O) + bias
            towards = frozen(norm, before, reading[attn_hook].float()).read(direction)
        heads = (z * torch.einsum("hkd,td->thk", W_O, towards)).sum(-1)
        return {
            **{f"L{layer}H{head}": values for head, values in enumerate(heads.T)},
            f"L{layer}_attn_bias": towards @ bias,
            f"L{layer}_mlp": (reading[mlp_hook].float() * direction).sum(-1),
        }


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


def _check(model: ModelView, what: str, off: Float[Tensor, " token"], size: float) -> None:
    """Raise unless parts sum to what the model made of them."""
    if not float(off.abs().max()) <= TOLERANCE * size:
        raise ValueError(
            f"the {what} of {model.name} do not sum to its states (they are off by {float(off.abs().max()):.2g} "
            f"logits): it has parts that this probe does not know, use another model"
        )


def _ends(model: ModelView, layer: int) -> tuple[str, str]:
    return model.hook("resid_pre", layer), model.hook("resid_post", layer)


def _written(model: ModelView, layer: int) -> tuple[str, str, str]:
    return model.hook_z(layer), model.hook("attn_out", layer), model.hook("mlp_out", layer)
