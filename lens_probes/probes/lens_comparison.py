"""LensComparison: which translator brings a layer's prediction nearest to the model's own?

Every state is read as `LogitLens` reads it, as it is and through each of several translators:

    kl[translator, layer, token]     = KL(p_final || p), p read from translator(h[layer, token])     nats, 0 or more
    agrees[translator, layer, token] = 1 if p and p_final have the same most probable entry, otherwise 0
    decided[translator, token]       = index of the first of these layers from which on they agree; -1 if none

Judge translators on text that none of them was fitted on. A tuned lens has a null of its own: one that was fitted to
the predictions of other tokens, `TunedLens(shuffled=True)`, which learns no more than how frequent entries are.

It takes one forward pass, and a product with the vocabulary per translator.

Source: Belrose et al. 2023, "Eliciting Latent Predictions from Transformers with the Tuned Lens", arXiv 2303.08112.
"""

from collections.abc import Mapping
from typing import Annotated, Unpack

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float, Int
from torch import Tensor

from lens_probes import figures
from lens_probes.maths import inference
from lens_probes.messages import amount, interval
from lens_probes.model import ModelView
from lens_probes.probe import Probe
from lens_probes.probes.logit_lens import LogitLens, LogitLensResult, Translator
from lens_probes.reading import Reading
from lens_probes.result import Result, comparison, derived, measured
from lens_probes.settings import Layers, described
from lens_probes.text.prompts import Tokens

PLAIN = "logit lens"
NULL = "a translator changes the mean by nothing"


class LensComparisonResult(Result):
    """How near each lens is to the model's own prediction. Memory scales with the number of tokens."""

    headline = "kl"
    translator: tuple[str, ...]
    layer: tuple[str, ...]
    token: Tokens
    kl: Float[Tensor, "translator layer token"] = measured("KL(final || layer)", unit="nats", low=0)
    agrees: Float[Tensor, "translator layer token"] = measured(
        "share of predictions with the model's own top-1", low=0, high=1
    )

    @derived("index of the first layer from which on the top-1 is the model's own", low=0, missing=-1)
    def decided(self) -> Int[Tensor, "translator token"]:
        """Index in `layer` of the first state from which on the top-1 is the model's own; -1 if none."""
        stays = self.agrees.int().flip(1).cumprod(1).sum(1)
        return torch.where(stays > 0, len(self.layer) - stays, -1)

    def table(self) -> pd.DataFrame:
        """One row per lens and layer: `effect` is its mean KL minus that of the plain logit lens, with interval, p, q.

        `kl` and `agrees` are its own means, with intervals; `decided` is the share of tokens decided at this layer or
        before. Word types weigh equally, special tokens are left out, and the variance is that of prompts and types.
        """
        tokens = self._counted()
        own, agreed = (self._means(name) for name in ("kl", "agrees"))
        change = inference.means(self._rows(self.known("kl") - self.known("kl")[:1]), tokens)
        decided = self.decided[:, ~self.token.special]
        by_layer = [((decided >= 0) & (decided <= at)).double().mean(1) for at in range(len(self.layer))]
        return comparison(
            self.cells("translator", "layer"),
            effect=change["mean"].to_numpy(),
            low=change["low"].to_numpy(),
            high=change["high"].to_numpy(),
            p=change["p"].to_numpy(),
            says="mean KL minus that of the plain logit lens (nats)",
            null=NULL,
            **{f"kl{end}": own[bound].to_numpy() for end, bound in BOUNDS.items()},
            **{f"agrees{end}": agreed[bound].to_numpy() for end, bound in BOUNDS.items()},
            decided=torch.stack(by_layer, dim=1).flatten().numpy(),
            **{name: own[name].to_numpy() for name in ("tokens", "types", "prompts")},
        )

    def findings(self) -> list[str]:
        """The lens that is nearest to the model's own prediction, over all layers."""
        if len(self.translator) < 2 or self.token.special.all():
            return []
        over_layers = self._rows(self.known("kl") - self.known("kl")[:1]).reshape(*self.kl.shape[:2], -1).mean(1)
        table = inference.means(over_layers[1:], self._counted()).assign(name=self.translator[1:])
        return [
            f"Through {row['name']} the mean KL to the model's own prediction is {abs(row['mean']):.3g} nats "
            f"{'lower' if row['mean'] < 0 else 'higher'} than with the plain logit lens (difference {row['mean']:.3g}, "
            f"{interval(row['low'], row['high'], '.3g')}; mean over {amount(len(self.layer), 'state')}; "
            f"{amount(row['tokens'], 'token')} of {amount(row['prompts'], 'prompt')}). The null: {NULL}."
            for row in table.to_dict("records")
        ]

    def figure(self, **look: Unpack[figures.Look]) -> go.Figure:
        """KL to the model's own prediction, and the share of equal top-1, by layer and lens, with 95 % intervals."""
        table = self.table()

        def line(lens: str, name: str) -> figures.Line:
            rows = table[table["translator"] == lens]
            own, low, high = (list(rows[f"{name}{end}"]) for end in BOUNDS)
            colour = figures.GREY if lens == PLAIN else figures.class_colour(lens, self.translator[1:])
            return figures.Line(lens, own, low, high, colour)

        panels = {
            self.quantity(name).title: [line(lens, name) for lens in self.translator] for name in ("kl", "agrees")
        }
        return figures.lines(
            panels,
            self.layer,
            title=self.title("How near each lens is to the model's own prediction (means)"),
            x_title=figures.layer_title(self.layer),
            logarithmic=[self.quantity("kl").title],
            **look,
        )

    def _counted(self) -> Tokens:
        return self.token[~self.token.special]

    def _rows(self, values: Float[np.ndarray, "translator layer token"]) -> Float[np.ndarray, "row counted"]:
        """One row per lens and layer, special tokens left out."""
        return values[..., ~self.token.special.numpy()].reshape(-1, len(self._counted()))

    def _means(self, name: str) -> pd.DataFrame:
        return inference.means(self._rows(self.known(name)), self._counted())


BOUNDS = {"": "mean", "_low": "low", "_high": "high"}


class LensComparison(Probe[LensComparisonResult]):
    """The plain logit lens and translators side by side.

    `translators`: by name, such as `{"tuned lens": tuned, "Jacobian lens": lp.jacobian_lens(path)}`; each is what
    `LogitLens(translator=...)` takes. They are asked at the states of `layers`, which all of them must know.

    >>> import lens_probes as lp
    >>> model, texts = lp.tiny.bridge(), lp.demo.sentences()[:12]
    >>> tuned = lp.TunedLens(steps=20).run(model, texts[:6], progress=False)
    >>> result = lp.LensComparison({"tuned lens": tuned}).run(model, texts[6:], progress=False)
    >>> result.translator, result.layer
    (('logit lens', 'tuned lens'), ('0_pre', '0_post', '1_post', '2_post'))
    """

    reads_head = True
    reads_stacks = True
    translators: Annotated[Mapping[str, Translator], described("translators by name, such as {'tuned lens': tuned}")]
    layers: Layers = None

    def __post_init__(self) -> None:
        if not self.translators or PLAIN in self.translators:
            raise ValueError(
                f"LensComparison(translators=...) must name one translator or more, none of them {PLAIN!r}; got "
                f"{', '.join(self.translators) or 'none'}"
            )

    def hooks(self, model: ModelView) -> Mapping[str, str]:
        """The states of every layer, and the last one, as every lens reads them."""
        *_, points = (lens.hooks(model) for lens in self._lenses().values())
        return points

    def measure(self, reading: Reading) -> LensComparisonResult:
        """Each lens on the batch."""
        found: list[LogitLensResult] = [lens.measure(reading) for lens in self._lenses().values()]
        agrees = [result.top_ids[..., 0] == result.final_id for result in found if result.top_ids is not None]
        return self.result(
            reading,
            translator=tuple(self._lenses()),
            layer=found[0].layer,
            kl=torch.stack([result.kl for result in found]),
            agrees=torch.stack(agrees).float(),
        )

    def _lenses(self) -> dict[str, LogitLens]:
        """A lens per translator, the plain one first."""
        return {
            name: LogitLens(target="own", top_k=1, translator=translator, layers=self.layers)
            for name, translator in {PLAIN: None, **self.translators}.items()
        }
