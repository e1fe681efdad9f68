"""TunedLens: what would the model predict at this layer, if the layer spoke the last one's language?

For every layer one affine map of the state, fitted on text so that what it predicts is what the model itself predicts:

    translated[layer, token] = h[layer, token] @ A[layer] + b[layer]
    loss[layer, step]        = mean over the step's tokens of KL(p_final || softmax of unembed(translated))    nats

A starts as the identity and b as 0, which is the logit lens; the last layer needs no map. Fitted by Adam with a step of
learning_rate / sqrt(1 + step / 100). Special tokens are left out: their states are outliers. The result is a
translator, `LogitLens(translator=tuned)`; judge it on text that it has not seen.

Source: Belrose et al. 2023, "Eliciting Latent Predictions from Transformers with the Tuned Lens", arXiv 2303.08112.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, final

import plotly.graph_objects as go
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import kl_div
from tqdm.auto import tqdm

from lens_probes import figures
from lens_probes.model import ModelView
from lens_probes.probe import Experiment
from lens_probes.prompts import Prompts, Tokens, concatenate, tokenize
from lens_probes.result import Result, unit
from lens_probes.run import Reading, pad, provenance

RECENT = 20  # steps whose mean is drawn as the loss at the end


@final
@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class TunedLensResult(Result):
    """Affine maps, one a layer, and what the fit needs to go on. Calling it translates a state."""

    layer: tuple[str, ...]
    last: str  # the label that is left alone
    maps: Float[Tensor, "layer input d_model"] = field(metadata=unit("A, and below it b, of each layer"))
    loss: Float[Tensor, "layer step"] = field(
        metadata=unit("mean KL(final || layer) over a step's tokens, nats", low=0)
    )
    gradient_mean: Float[Tensor, "layer input d_model"] = field(metadata=unit("Adam's running mean of the gradient"))
    gradient_square: Float[Tensor, "layer input d_model"] = field(metadata=unit("and that of its square", low=0))
    embed_mean: Float[Tensor, " d_model"] = field(metadata=unit("mean embedding, by which the model is told"))

    def __call__(self, state: Float[Tensor, "token d_model"], label: str) -> Float[Tensor, "token d_model"]:
        """The state as the last layer would have it; the last layer's as it is."""
        if label == self.last:
            return state
        if label not in self.layer:
            raise ValueError(f"state {label} was asked for and this lens was fitted for {', '.join(self.layer)}")
        maps = self.maps[self.layer.index(label)].to(state.device)
        return state.float() @ maps[:-1] + maps[-1]

    def check(self, model: ModelView, labels: Sequence[str]) -> None:
        """Raise unless this lens was fitted on this model, for all of these states."""
        model.refuse_other("translator holds maps", self.provenance, self.embed_mean)
        missing = [label for label in labels if label not in (*self.layer, self.last)]
        if missing:
            raise ValueError(
                f"state {missing[0]} was asked for and this lens was fitted for {', '.join(self.layer)}: ask for those "
                f"layers, or fit more of them"
            )

    def figure(self) -> go.Figure:
        """KL(final || layer) by layer, of the first step and of the last ones."""
        steps, recent = self.loss.shape[1], self.loss[:, -RECENT:]
        if not steps:
            raise ValueError("this fit was interrupted before its first step, and there is nothing to draw: resume it")
        start = figures.Line("first step (plain logit lens)", self.loss[:, 0].tolist(), colour=figures.GREY)
        name = f"mean of the last {recent.shape[1]} steps"
        end = figures.Line(name, recent.mean(1).tolist(), colour=figures.CHOSEN)
        return figures.lines(
            {"KL(final || layer) (nats)": [start, end]},
            self.layer,
            title=f"How far is each layer from the final prediction? {steps} steps\n{self.provenance.describe()}",
            x_title="state",
        )


@final
@dataclass(frozen=True)
class TunedLens(Experiment[TunedLensResult]):
    """Fit a tuned lens. `layers` are those of `LogitLens`; a step is one batch of prompts of about `tokens_per_step`.

    Interrupted, it gives what is done so far; `run(..., resume=result)` goes on from there, and what comes out equals
    one uninterrupted fit.

    >>> import lens_probes as lp
    >>> model, texts = lp.tiny.bridge(), lp.demo.sentences()[:8]
    >>> tuned = lp.TunedLens(steps=20).run(model, texts, progress=False)
    >>> bool((tuned.loss[:, -1] < tuned.loss[:, 0]).all())
    True
    >>> lp.LogitLens(translator=tuned).run(model, "Time flies like an arrow.").translated
    True
    """

    steps: int = 250
    layers: Sequence[int] | None = None
    learning_rate: float = 1e-3
    tokens_per_step: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.tokens_per_step < 1 or not self.learning_rate > 0:
            raise ValueError(
                f"TunedLens(steps=..., tokens_per_step=..., learning_rate=...) are above 0; {self.steps}, "
                f"{self.tokens_per_step} and {self.learning_rate} came"
            )

    def run(
        self, model: Any, prompts: Prompts, *, progress: bool = True, resume: TunedLensResult | None = None
    ) -> TunedLensResult:
        """Fit on these prompts; with `resume` go on until `steps` are done in all."""
        view = ModelView(model)
        view.check_head()
        last = view.label("resid_post", view.n_layers - 1)
        points = {label: hook for label, hook in view.stream(self.layers).items() if label != last}
        if not points:
            raise ValueError(f"only the last layer, {last}, was asked for, and it needs no map: ask for earlier ones")
        tokens = tokenize(prompts, view)
        if bool(tokens.special.all()):
            raise ValueError("there is nothing to fit on: all tokens are special; pass text")
        maps, optimiser, losses = self._start(view, tuple(points), resume)
        hooks = [*points.values(), view.hook("resid_post", -1)]
        done = len(losses)
        batches = islice(_batches(tokens, self.tokens_per_step, self.seed), done, self.steps)
        bar = tqdm(batches, desc="fitting", unit="step", disable=not progress, initial=done, total=self.steps)
        try:
            for step, batch in enumerate(bar, start=done):
                ids, mask = pad(batch, view)
                reading = Reading(view, batch, view.activations(ids, mask, hooks), mask)
                optimiser.param_groups[0]["lr"] = self.learning_rate / (1 + step / 100) ** 0.5
                loss, maps.grad = _gradients(reading, hooks, maps.detach())
                optimiser.step()
                losses.append(loss)
        except KeyboardInterrupt:
            tqdm.write(f"interrupted after {len(losses)} of {self.steps} steps: go on with run(..., resume=result)")
        state = optimiser.state[maps]
        empty = torch.zeros_like(maps)
        return TunedLensResult(
            layer=tuple(points),
            last=last,
            maps=maps.detach().cpu(),
            loss=torch.stack(losses, dim=1).cpu() if losses else torch.empty(len(points), 0),
            gradient_mean=state.get("exp_avg", empty).detach().cpu(),
            gradient_square=state.get("exp_avg_sq", empty).detach().cpu(),
            embed_mean=view.embed_mean,
            provenance=provenance(self, view, tokens, hooks, view.W_E.dtype),
        )

    def _start(
        self, view: ModelView, layer: tuple[str, ...], resume: TunedLensResult | None
    ) -> tuple[Tensor, torch.optim.Adam, list[Tensor]]:
        """The maps, their optimiser and the losses so far: those of `resume`, or the identity."""
        identity = torch.cat([torch.eye(view.d_model), torch.zeros(1, view.d_model)])
        maps = (identity.expand(len(layer), -1, -1) if resume is None else resume.maps).to(view.device).clone()
        maps.requires_grad_()
        optimiser = torch.optim.Adam([maps], lr=self.learning_rate)
        if resume is None:
            return maps, optimiser, []
        resume.check(view, ())
        if resume.layer != layer:
            raise ValueError(f"resume was fitted for {', '.join(resume.layer)} and {', '.join(layer)} is asked for")
        optimiser.state[maps] = {
            "step": torch.tensor(float(resume.loss.shape[1])),
            "exp_avg": resume.gradient_mean.to(view.device).clone(),
            "exp_avg_sq": resume.gradient_square.to(view.device).clone(),
        }
        return maps, optimiser, list(resume.loss.unbind(1))


def _gradients(
    reading: Reading, hooks: Sequence[str], maps: Float[Tensor, "layer input d_model"]
) -> tuple[Float[Tensor, " layer"], Float[Tensor, "layer input d_model"]]:
    """The loss of every layer on a batch and its gradient, a layer at a time: the vocabulary meets one layer only."""
    model, own = reading.model, ~reading.tokens.special
    with torch.no_grad():
        final_log_prob = model.unembed(reading[hooks[-1]][own]).log_softmax(-1)
    losses, gradients = [], []
    for hook, start in zip(hooks[:-1], maps, strict=True):
        state, of = reading[hook][own].float(), start.clone().requires_grad_()
        with torch.enable_grad():
            predicted = model.unembed(state @ of[:-1] + of[-1]).log_softmax(-1)
            loss = kl_div(predicted, final_log_prob, reduction="batchmean", log_target=True)
            gradients.append(torch.autograd.grad(loss, of)[0])
        losses.append(loss.detach().clamp(min=0))
    return torch.stack(losses), torch.stack(gradients)


def _batches(tokens: Tokens, tokens_per_step: int, seed: int) -> Iterator[Tokens]:
    """Prompts in a new seeded order each time they have all been used, without end."""
    prompts = [part for _, part in tokens.by_prompt() if not part.special.all()]
    random = torch.Generator().manual_seed(seed)
    batch: list[Tokens] = []
    while True:
        for number in torch.randperm(len(prompts), generator=random).tolist():
            batch.append(prompts[number])
            if sum(map(len, batch)) >= tokens_per_step:
                yield _joined(batch)
                batch = []


def _joined(parts: Sequence[Tokens]) -> Tokens:
    """These prompts as one table, numbered in order."""
    renumbered = [replace(part, prompt=torch.zeros_like(part.prompt)) for part in parts]
    return concatenate(renumbered, range(len(parts)))
