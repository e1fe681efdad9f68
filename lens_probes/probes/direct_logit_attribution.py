"""DirectLogitAttribution: which heads and MLPs write the target?

The final state is the sum of what every part of the model wrote. With the final norm's scale s at its true value,
centring (LayerNorm only) and weight w are linear, and so is what the state says about the target t:

    direction[token]               = centred(w * (W_U[:, t] - mean over v of W_U[:, v])) / s[token]
    contribution[component, token] = written[component, token] . direction[token]               logits
    total[token]                   = logit[t] - mean over v of logit[v], before any soft cap    = sum of all components

With `against`, another token a takes the place of the mean: contributions to the logit difference between t and a.

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

import math
from typing import Unpack

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from einops import einsum
from jaxtyping import Bool, Float
from torch import Tensor

from lens_probes import figures
from lens_probes.logit_direction import LogitDirection, check_linear, logit_direction, read_of_attention
from lens_probes.maths import inference
from lens_probes.messages import amount, brief
from lens_probes.model import ModelView
from lens_probes.probe import Probe
from lens_probes.reading import Reading
from lens_probes.result import Quantity, TokenResult, measured
from lens_probes.settings import Layers
from lens_probes.text.places import Positions
from lens_probes.text.prompts import Tokens
from lens_probes.text.targets import OneTarget, Target, asked_about, check_targets, target_name

TOLERANCE = 0.05  # of the largest total or part: float32 errs by 1e-5, bfloat16 by 1e-2, a missed part by much more


class DirectLogitAttributionResult(TokenResult):
    """What every part of the model adds to the target's logit. Memory scales with the number of tokens."""

    target: Target | tuple[int, ...]
    against: Target | tuple[int, ...] | None
    target_token: Tokens
    vocab: dict[int, str]  # the texts of fixed targets
    layer: tuple[str, ...]
    head: tuple[str, ...]
    component: tuple[str, ...]
    contribution: Float[Tensor, "component token"] = measured(
        "contribution to the target's logit minus the mean logit", unit="logits"
    )
    total: Float[Tensor, " token"] = measured("target's logit minus the mean logit, before a soft cap", unit="logits")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_targets(self.token, self.target_token)
        parts = (*self.head, "_mlp", "_attn_bias")
        missing = {f"L{layer}{part}" for layer in self.layer for part in parts} - set(self.component)
        if missing or not self.layer or not self.head:
            raise ValueError(
                f"a DirectLogitAttributionResult must have a component for every head, MLP and attention bias of its "
                f"layers; {min(missing, default='every one')} is missing"
            )

    def words(self) -> Tokens:
        """The tokens with the words of their targets: those that follow, where these are the targets."""
        return self.target_token

    def of_component(self, component: str) -> Float[Tensor, " token"]:
        """The contributions of one component: `L3H1`, `L3_mlp`, `L3_attn_bias`, `embed`, ..."""
        if component not in self.component:
            raise ValueError(f"component must be one of {', '.join(self.component[:6])}, ...; got {brief(component)}")
        return self.contribution[self.component.index(component)]

    def components(self, token: int | str, prompt: int = 0) -> pd.DataFrame:
        """What each component adds at one token, the largest in size first, and its share of the total.

        `token`: a position (-1 is the last), or a word that the prompt has once. The contributions sum to the total.
        """
        row = self._row(prompt, token)
        values = self.contribution[:, row].double()
        frame = pd.DataFrame(
            {
                "component": self.component,
                "contribution": values.numpy(),
                "share": (values / float(self.total[row])).numpy(),
            }
        )
        return frame.sort_values("contribution", ascending=False, key=abs, kind="stable").reset_index(drop=True)

    def mean_contribution(self) -> pd.DataFrame:
        """Per component: the mean over tokens that are not special, its 95 % interval (prompts resampled), its share.

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

    def findings(self) -> list[str]:
        """The components that contribute most on average; and words of two classes compared."""
        if not self._counted().any():
            return super().findings()
        means = self.mean_contribution()
        first = means.iloc[np.argsort(-np.abs(means["mean"].to_numpy()))[:3]].to_dict("records")
        known = all(np.isfinite(row["low"]) for row in first)
        said = [
            f"{row['component']} {row['mean']:.2f}" + f" ({row['low']:.2f} to {row['high']:.2f})" * known
            for row in first
        ]
        return [
            f"The largest mean contributions, in logits{' with 95 % intervals' if known else ''}: {', '.join(said)}; "
            f"{amount(first[0]['tokens'], 'token')} of {amount(first[0]['prompts'], 'prompt')}. The null, "
            f"{'no difference' if self.against is not None else 'an average entry of the vocabulary'}: 0.",
            *super().findings(),
        ]

    def figure(self, **look: Unpack[figures.Look]) -> go.Figure:
        """Heads by layer, and beside them MLPs and attention biases, mean over tokens that are not special."""
        means, chosen = self.mean_contribution(), self._counted()
        total, n = float(self.total[chosen].mean()), amount(int(chosen.sum()), "token")
        return self._draw(
            means["mean"].tolist(),
            total,
            f"{'the ' * isinstance(self.target, str)}{target_name(self.target, self.vocab)}, mean over {n}",
            "",
            **look,
        )

    def figure_token(self, token: int | str, prompt: int = 0, **look: Unpack[figures.Look]) -> go.Figure:
        """Contributions at one token: heads by layer, and beside them MLPs and attention biases."""
        row = self._row(prompt, token)
        position, total = int(self.token.position[row]), float(self.total[row])
        known = self.target in ("next", "own")
        target = figures.quoted(self.words().text[row]) if known else target_name(self.target, self.vocab)
        place = f"at {figures.quoted(self.token.text[row])}, token {position} of prompt {prompt}; "
        return self._draw(self.contribution[:, row].tolist(), total, target, place, **look)

    def _row(self, prompt: int, token: int | str) -> int:
        """The row number of a token, which must have a target."""
        row = self.token.row(prompt, token)
        if math.isnan(float(self.total[row])):
            raise ValueError(
                f"the token must have a target; token {int(self.token.position[row])} is the last of prompt {prompt}: "
                f"ask an earlier one"
            )
        return row

    def _draw(
        self, values: list[float], total: float, target: str, place: str, **look: Unpack[figures.Look]
    ) -> go.Figure:
        by_name = dict(zip(self.component, values, strict=True))
        if self.against is not None:
            target = f"{target} minus {target_name(self.against, self.vocab)}"
        others = ", ".join(f"{name} {value:z.2f}" for name, value in by_name.items() if not name.startswith("L"))
        return figures.grid_with_bars(
            [[by_name[f"L{layer}{head}"] for head in self.head] for layer in self.layer],
            {
                "MLP": [by_name[f"L{layer}_mlp"] for layer in self.layer],
                "attention bias": [by_name[f"L{layer}_attn_bias"] for layer in self.layer],
            },
            x=self.head,
            y=self.layer,
            title=self.title(f"Direct logit attribution to {target} (total {total:.2f})\n{place}not drawn: {others}"),
            x_title="head",
            y_title="layer",
            colour_title="contribution (logits)",
            **look,
        )

    def quantity(self, name: str) -> Quantity:
        """What a tensor's numbers are; logits are compared with that of `against`, or with their mean."""
        asked = super().quantity(name)
        if self.against is None:
            return asked
        return asked._replace(
            says=asked.says.replace("the mean logit", f"that of {target_name(self.against, self.vocab)}")
        )

    def conditions(self) -> str:
        """The target, and what it is compared with."""
        against = "" if self.against is None else f" against {target_name(self.against, self.vocab)}"
        return f"target: {target_name(self.target, self.vocab)}{against}"

    def _counted(self) -> Bool[Tensor, " token"]:
        """The tokens that have a target and are not special."""
        return ~self.words().special & ~self.total.isnan()


class DirectLogitAttribution(Probe[DirectLogitAttributionResult]):
    """What every part of the model adds to the target's logit.

    `target`: the token that really follows (`next`), the token itself (`own`), the model's own top-1 (`final`), or one
    token, by text (`" Mary"`, with its leading space) or id. `against`: the same, for a logit difference; None compares
    with the mean logit. `positions`: the tokens to ask about, such as `-1`, `"bank"` or `slice(1, None)`.
    With `layers`, all other layers together are one component, `other_layers`.

    >>> import lens_probes as lp
    >>> result = lp.DirectLogitAttribution().run(lp.tiny.bridge(), "Time flies like an arrow.")
    >>> bool(torch.allclose(result.contribution[:, :-1].sum(0), result.total[:-1], atol=1e-4))
    True
    """

    reads_head = True
    target: OneTarget = "next"
    against: OneTarget | None = None
    positions: Positions = None
    layers: Layers = None

    def hooks(self, model: ModelView) -> list[str]:
        """What is written: embeddings, each head's mixed values, what attention and MLP add; and the last state."""
        check_linear(model, self)
        first, last = [*model.embeddings(), model.hook("resid_pre", 0)], model.hook("resid_post", -1)
        written = [
            each for layer in model.layers(self.layers) for each in (*_written(model, layer), *_ends(model, layer))
        ]
        return list(dict.fromkeys([*first, *written, last]))

    def measure(self, reading: Reading) -> DirectLogitAttributionResult:
        """Contributions of the batch, layer by layer; every sum of parts is checked on the way."""
        reading.check_head()
        model, layers = reading.model, reading.model.layers(self.layers)
        asked = logit_direction(reading, self)

        def read(hook: str) -> Float[Tensor, "token d_model"]:
            return reading[hook][asked.rows].float()

        def along(written: Float[Tensor, "token d_model"]) -> Float[Tensor, " token"]:
            return (written * asked.direction).sum(-1)

        embeddings = {part: read(hook) for hook, part in model.embeddings().items()}
        parts = {part: along(written) for part, written in embeddings.items()}
        total = along(read(model.hook("resid_post", -1)))
        size = max(float(each.abs().max()) for each in (total, *parts.values()))
        _check(model, "embeddings", along(read(model.hook("resid_pre", 0)) - sum(embeddings.values())), size)
        for layer in layers:
            found = self._layer(reading, layer, asked)
            before, after = (read(hook) for hook in _ends(model, layer))
            size = max(size, *(float(each.abs().max()) for each in found.values()))
            _check(model, f"parts of layer {layer}", along(after - before) - _sum(found), size)
            parts |= found
        if len(layers) < model.n_layers:
            parts["other_layers"] = total - _sum(parts)
        else:
            _check(model, "parts", total - _sum(parts), size)
        parts["final_bias"] = asked.constant
        unknown = asked.unknown.cpu()
        return self.result(
            reading,
            token=reading.tokens[asked.rows],
            target=asked.target,
            against=asked.against,
            target_token=asked_about(reading.tokens, asked.target)[asked.rows],
            vocab=asked.texts,
            layer=tuple(map(str, layers)),
            component=tuple(parts),
            contribution=torch.stack(list(parts.values())).cpu().masked_fill(unknown, torch.nan),
            total=(total + parts["final_bias"]).cpu().masked_fill(unknown, torch.nan),
        )

    def _layer(self, reading: Reading, layer: int, asked: LogitDirection) -> dict[str, Float[Tensor, " token"]]:
        """What the heads, the attention bias and the MLP of one layer add along a direction."""
        model = reading.model
        z_hook, _, mlp_hook = _written(model, layer)
        W_O, bias = model.W_O(layer).float(), model.attention_bias(layer)
        z = reading[z_hook][asked.rows].float() - model.value_bias(layer)
        towards = read_of_attention(reading, layer, asked)
        read = einsum(W_O, towards, "head d_head d_model, token d_model -> token head d_head")
        heads = (z * read).sum(-1)
        return {
            **{f"L{layer}H{head}": values for head, values in enumerate(heads.T)},
            f"L{layer}_attn_bias": towards @ bias,
            f"L{layer}_mlp": (reading[mlp_hook][asked.rows].float() * asked.direction).sum(-1),
        }


def _sum(parts: dict[str, Float[Tensor, " token"]]) -> Float[Tensor, " token"]:
    return torch.stack(list(parts.values())).sum(0)


def _check(model: ModelView, what: str, off: Float[Tensor, " token"], size: float) -> None:
    """Raise unless parts sum to what the model made of them."""
    if not float(off.abs().max()) <= TOLERANCE * size:
        raise ValueError(
            f"the {what} of {model.name} must sum to its states; got sums that are off by {float(off.abs().max()):.2g} "
            f"logits: it has parts that this probe does not know, use another model"
        )


def _ends(model: ModelView, layer: int) -> tuple[str, str]:
    return model.hook("resid_pre", layer), model.hook("resid_post", layer)


def _written(model: ModelView, layer: int) -> tuple[str, str, str]:
    return model.hook_z(layer), model.hook("attn_out", layer), model.hook("mlp_out", layer)
