"""LayerSkip: what would be missing without a layer, in the layers after it and in the prediction?

    u[l]                             = h_post[l] - h_pre[l]                                what layer l adds
    without s                        : h_post[s] is set to h_pre[s]
    change[place, s, l, prompt]      = mean over tokens of |u[l] without s - u[l]| / |u[l]|         0 or more, l > s
    divergence[place, s, prompt]     = mean over tokens of KL(p || p without s)                     nats, 0 or more

Places: with `same tokens` the layer is skipped at all tokens of a prompt, and what changes is measured at all of them.
With `later tokens` it is skipped at the first half of the prompt and measured at the second half, where only attention
can bring the change: what earlier tokens computed there for later ones. Special tokens are skipped like others, and
left out of all means.

The null, `random`, is a change of the same size: h_post[s] + |u[s]| r, r a seeded random direction per token. A layer
that is skipped at no more cost than that does nothing in particular. A change of a layer near s may be large and still
die out: `table()` has the next layer and all others beyond it side by side.

It takes 1 + 4 passes per layer, and two products with the vocabulary per pass.

Source: Csordás, Manning & Potts 2025, "Do Language Models Use Their Depth Efficiently?", arXiv 2505.13898, who take the
largest change over tokens and draw the place where later tokens begin.
"""

from collections.abc import Mapping, Sequence
from typing import Unpack

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import kl_div, normalize

from lens_probes import figures
from lens_probes.maths import inference
from lens_probes.maths.ascent import seeded
from lens_probes.messages import amount, interval
from lens_probes.model import ModelView, undisturbed
from lens_probes.probe import Study, TextExperiment
from lens_probes.reading import batches, finite, pad
from lens_probes.result import Result, measured, paired
from lens_probes.settings import Layers, Seed
from lens_probes.text.prompts import PromptTable, Tokens, prompt_table

PLACES = ("same tokens", "later tokens")
NULL = "skipping a layer changes predictions no more than a random step of the same length"
DIVERGENCES, CHANGES = ("divergence", "random_divergence"), ("change", "random_change")
Of = Bool[Tensor, " token"]
ROWS = 1024  # predictions compared at once: their logits fill 200 MB for 50,000 entries


class LayerSkipResult(Result):
    """What skipping each layer changes, by prompt. Memory scales with the square of the number of layers."""

    headline = "divergence"
    place: tuple[str, ...]
    skipped: tuple[str, ...]
    layer: tuple[str, ...]
    prompt: PromptTable
    change: Float[Tensor, "place skipped layer prompt"] = measured(
        "change of what a layer adds, over its length", low=0, null="random_change"
    )
    random_change: Float[Tensor, "place skipped layer prompt"] = measured(
        "the same after a random step of the same length", low=0
    )
    divergence: Float[Tensor, "place skipped prompt"] = measured(
        "KL(model || model without the layer)", unit="nats", low=0, null="random_divergence"
    )
    random_divergence: Float[Tensor, "place skipped prompt"] = measured(
        "KL(model || model with a random step of the same length)", unit="nats", low=0
    )

    def table(self) -> pd.DataFrame:
        """One row per place and skipped layer: `effect` is the divergence minus that of a random step, with interval.

        `divergence` has an interval of its own, `divergence_low` to `divergence_high`. `next` is the mean change of the
        next layer, `beyond` that of all layers after it, `random`, `random_next` and `random_beyond` the same of random
        steps. 95 % intervals are Student's t over prompts; p swaps the two of a prompt at random; q is over all rows.
        """
        own, random = (self._by_text(name).reshape(-1, len(self.prompt)) for name in DIVERGENCES)
        low, high = inference.mean_interval(own)
        (near, far), (random_near, random_far) = (self._near_and_far(name) for name in CHANGES)
        return paired(
            self.cells("place", "skipped"),
            own - random,
            says="divergence minus that of a random step of the same length (nats)",
            null=NULL,
            divergence=own.mean(1),
            divergence_low=low,
            divergence_high=high,
            random=random.mean(1),
            next=near,
            random_next=random_near,
            beyond=far,
            random_beyond=random_far,
            prompts=own.shape[1],
        )

    def halves(self) -> pd.DataFrame:
        """One row per place: the mean divergence of the first half of the skipped layers minus that of the second.

        `random_first_half` and `random_second_half` are those of random steps. Of an odd number of layers, the middle
        one is left out.
        """
        half = len(self.skipped) // 2
        if not half:
            raise ValueError("two halves need two skipped layers or more; got one: pass more layers")
        first, second, random_first, random_second = (
            self._by_text(name)[:, part].mean(1)
            for name in DIVERGENCES
            for part in (slice(None, half), slice(len(self.skipped) - half, None))
        )
        return paired(
            self.cells("place"),
            first - second,
            says="divergence of the first half of the layers minus the second (nats)",
            null="the two halves are exchangeable within each prompt",
            first_half=first.mean(1),
            second_half=second.mean(1),
            random_first_half=random_first.mean(1),
            random_second_half=random_second.mean(1),
            prompts=first.shape[1],
        )

    def findings(self) -> list[str]:
        """What the two halves of the layers do for the same and for later tokens."""
        if len(self.skipped) < 2:
            return []
        return [
            f"Skipping one of the first half of the layers changes the prediction of {of['place']} by "
            f"{of['first_half']:.3g} nats (a random step of the same length by {of['random_first_half']:.3g}), one of "
            f"the second half by {of['second_half']:.3g} ({of['random_second_half']:.3g}): a difference of "
            f"{of['effect']:.3g} ({interval(of['low'], of['high'], '.3g')}; {amount(of['prompts'], 'prompt')})."
            for of in self.halves().to_dict("records")
        ]

    def figure(self, **look: Unpack[figures.Look]) -> go.Figure:
        """The divergence by skipped layer, with 95 % intervals, for the same and for later tokens; dashed, the null."""
        table, panels = self.table(), {}
        for place in self.place:
            rows = table[table["place"] == place]
            own, low, high, random = (
                list(rows[name]) for name in ("divergence", "divergence_low", "divergence_high", "random")
            )
            panels[f"KL of {place} (nats)"] = [
                figures.Line("without the layer", own, low, high, figures.CHOSEN),
                figures.Line("with a random step of the same length", random, colour=figures.GREY, dashed=True),
            ]
        return figures.lines(
            panels,
            self.skipped,
            title=self.title(f"{self.quantity('divergence').heading}: predictions without one layer"),
            x_title="skipped layer",
            logarithmic=list(panels),
            **look,
        )

    def figure_layers(self, **look: Unpack[figures.Look]) -> go.Figure:
        """How much each later layer changes: skipped layers down, the layers after them across, mean over prompts."""
        panels = [
            (f"{place}{kind}", values.mean(-1).tolist())
            for name, kind in zip(CHANGES, ("", ", random"), strict=True)
            for place, values in zip(self.place, self.known(name), strict=True)
        ]
        return figures.small_grids(
            panels,
            x=self.layer,
            y=self.skipped,
            title=self.title(self.quantity("change").heading),
            x_title="layer",
            y_title="skipped layer",
            colour_title="relative change (log)",
            logarithmic=True,
            **look,
        )

    def _by_text(self, name: str) -> Float[np.ndarray, "... prompt"]:
        """A quantity, prompts sorted by their texts, so that the order of prompts changes no sum."""
        return self.known(name)[..., np.argsort(np.asarray(self.prompt.text), kind="stable")]

    def _near_and_far(self, name: str) -> tuple[Float[np.ndarray, " row"], Float[np.ndarray, " row"]]:
        """The mean change of the layer after each skipped one, and of those beyond; NaN where there are none."""
        values, every = self._by_text(name).mean(-1), list(self.layer)
        after = np.array([every.index(label) + 1 for label in self.skipped])
        place = np.arange(len(every)) - after[:, None]
        near, far = (
            np.array([_mean(row[at]) for grid in values for row, at in zip(grid, which, strict=True)])
            for which in (place == 0, place > 0)
        )
        return near, far


class LayerSkip(TextExperiment[LayerSkipResult]):
    """Skip each layer in turn: 1 + 4 passes per layer.

    A pass, with its predictions compared, takes about 1.5 times as long as a bare one (SmolLM2, one thread).
    After an interrupt the result holds the layers done so far.

    >>> import lens_probes as lp
    >>> result = lp.LayerSkip(layers=[0, 1]).run(lp.tiny.bridge(), lp.demo.sentences()[:4], progress=False)
    >>> tuple(result.change.shape), result.change[0, 1, :, 0].isnan().tolist()
    ((2, 2, 3, 4), [True, True, False])
    """

    layers: Layers = None
    seed: Seed = 0

    def perform(self, study: Study) -> LayerSkipResult:
        """Layer by layer; every batch is read once without a skip, and its states are kept."""
        view = study.view
        view.check_head()
        every = range(view.n_layers)
        hooks = [view.hook(at, layer) for layer in every for at in ("resid_pre", "resid_post")]

        def skipped(layer: int) -> Float[Tensor, "place two reader prompt"]:
            """Changes of every layer and, last, the divergence; without the layer and with a random step."""
            return torch.cat([part.skipped(layer, self.seed) for part in parts], dim=-1)

        with undisturbed(view.model):  # its modules are walked once, not in every pass
            parts = [_Part(view, tokens, hooks) for tokens in batches(study.tokens)]
            done = study.each(skipped, view.layers(self.layers), doing="skipping", unit="layer")
        found = torch.stack(done, dim=1)
        change, divergence = found[..., :-1, :], found[..., -1, :]
        return LayerSkipResult(
            place=PLACES,
            skipped=tuple(map(str, view.layers(self.layers)[: found.shape[1]])),
            layer=tuple(map(str, every)),
            prompt=prompt_table(study.tokens),
            change=change[:, :, 0],
            random_change=change[:, :, 1],
            divergence=divergence[:, :, 0],
            random_divergence=divergence[:, :, 1],
            provenance=study.provenance(hooks),
        )


class _Part:
    """A batch as the model reads it, and how it reads it when something is changed on the way."""

    def __init__(self, view: ModelView, tokens: Tokens, hooks: Sequence[str]) -> None:
        self.view, self.tokens, self.hooks = view, tokens, hooks
        self.ids, self.mask = pad(tokens, view)
        self.states = view.activations(self.ids, self.mask, hooks)
        self.earlier, self.later = halves_of_prompts(tokens)

    def skipped(self, layer: int, seed: int) -> Float[Tensor, "place two reader prompt"]:
        """What changes without a layer, and with a random step, at both places."""
        before, after = (self.states[self.view.hook(at, layer)] for at in ("resid_pre", "resid_post"))
        size = (after.float() - before.float()).norm(dim=-1, keepdim=True)
        random = (after.float() + size * self._directions(layer, seed).to(size)).to(after)
        everywhere, counted = torch.ones(len(self.tokens), dtype=torch.bool), ~self.tokens.special
        return torch.stack(
            [
                torch.stack([self._changed(layer, state, where, measured) for state in (before, random)])
                for where, measured in ((everywhere, counted), (self.earlier, self.later))
            ]
        )

    def _changed(
        self, layer: int, state: Float[Tensor, "prompt position d_model"], where: Of, measured: Of
    ) -> Float[Tensor, "reader prompt"]:
        """How far each layer's step and, last, the prediction is from what it was, mean over the tokens `measured`."""
        view, place = self.view, self._padded(where)
        post = view.hook("resid_post", layer)
        replaced = torch.where(place[..., None], state, self.states[post])
        hooks, edits = self.hooks[2 * layer + 1 :], {post: lambda given: replaced.to(given)}
        found = view.edited(self.ids, self.mask, hooks, edits)
        if layer + 1 < view.n_layers:
            _check_obeyed(view, layer, found[view.hook("resid_pre", layer + 1)], replaced, self.mask)
        rows = self._padded(measured)
        changes = torch.full((view.n_layers + 1, len(self.tokens)), torch.nan)
        for later in range(layer + 1, view.n_layers):
            was, now = (self._step(states, later)[rows] for states in (self.states, found))
            changes[later, measured] = ((now - was).norm(dim=-1) / was.norm(dim=-1)).cpu()
        last = view.hook("resid_post", -1)
        pairs = zip(*(states[last][rows].split(ROWS) for states in (self.states, found)), strict=True)
        changes[-1, measured] = torch.cat([_divergence(view, was, now) for was, now in pairs]).cpu()
        prompt = self.tokens.prompt
        return torch.stack([changes[:, measured & (prompt == number)].mean(1) for number in prompt.unique()], dim=1)

    def _step(self, states: Mapping[str, Tensor], layer: int) -> Float[Tensor, "prompt position d_model"]:
        before, after = (finite(name, states[name]).float() for name in self.hooks[2 * layer : 2 * layer + 2])
        return after - before

    def _directions(self, layer: int, seed: int) -> Float[Tensor, "prompt position d_model"]:
        """A random direction per token, seeded by the prompt and the layer."""
        directions = torch.zeros(*self.mask.shape, self.view.d_model)
        for row, (_, own) in enumerate(self.tokens.by_prompt()):
            drawn = torch.randn(len(own), self.view.d_model, generator=seeded(f"{layer} {own.id.tolist()}", seed))
            directions[row, self.mask[row]] = normalize(drawn, dim=-1)
        return directions

    def _padded(self, rows: Of) -> Bool[Tensor, "prompt position"]:
        """Some tokens of the batch as the model has them."""
        return torch.zeros_like(self.mask).masked_scatter(self.mask, rows).to(self.view.device)


def halves_of_prompts(tokens: Tokens) -> tuple[Of, Of]:
    """The tokens before the second half of each prompt, special ones too, and the second half without special ones."""
    earlier, later = (torch.zeros(len(tokens), dtype=torch.bool) for _ in range(2))
    for number, own in tokens.by_prompt():
        ordinary, rows = (~own.special).nonzero().flatten(), (tokens.prompt == number).nonzero().flatten()
        second = ordinary[len(ordinary) // 2 :]
        if not len(second) or not second[0]:
            raise ValueError(
                f"a prompt must have two tokens or more, the last of them not special; got {amount(len(own), 'token')} "
                f"in prompt {number}: use longer prompts"
            )
        earlier[rows[: second[0]]] = True
        later[rows[second]] = True
    return earlier, later


def _divergence(
    view: ModelView, was: Float[Tensor, "row d_model"], now: Float[Tensor, "row d_model"]
) -> Float[Tensor, " row"]:
    """KL of the predictions from these last states, nats."""
    first, second = (view.unembed(states).log_softmax(-1) for states in (was, now))
    return kl_div(second, first, reduction="none", log_target=True).sum(-1).clamp(min=0)


def _check_obeyed(
    view: ModelView,
    layer: int,
    found: Float[Tensor, "prompt position d_model"],
    asked: Float[Tensor, "prompt position d_model"],
    mask: Bool[Tensor, "prompt position"],
) -> None:
    """Raise unless the next layer reads what the last one was replaced by."""
    if not torch.equal(found[mask], asked[mask].to(found)):
        raise ValueError(
            f"layer {layer + 1} of {view.name} must read what layer {layer} was replaced by; got other states: its "
            f"layers cannot be skipped, use another model"
        )


def _mean(values: Float[np.ndarray, " some"]) -> float:
    return float(values.mean()) if values.size else np.nan
