"""TunedLens: what does the model predict at each layer, after translating the state to the last layer's basis?

For every layer, an affine map of the state is fitted on text so that its prediction matches the model's own:

    translated[layer, token] = h[layer, token] @ A[layer] + b[layer]
    loss[layer, step]        = mean over the step's tokens of KL(p_final || softmax of unembed(translated))    nats

A starts as the identity and b as 0, which is the logit lens; the last layer needs no map. The optimiser is Adam with
the rate learning_rate / sqrt(1 + step / 100). Special tokens are excluded: their states are outliers. The result is a
translator, `LogitLens(translator=tuned)`; evaluate it on text that was not used for the fit.

Source: Belrose et al. 2023, "Eliciting Latent Predictions from Transformers with the Tuned Lens", arXiv 2303.08112.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any, NamedTuple, Unpack

import plotly.graph_objects as go
import torch
from einops import repeat
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import kl_div
from tqdm.auto import tqdm

from lens_probes import figures
from lens_probes.maths.ascent import seeded
from lens_probes.maths.vocabulary import check_entries
from lens_probes.messages import amount, brief
from lens_probes.model import ModelView, undisturbed
from lens_probes.probe import Options, Study, TextExperiment
from lens_probes.reading import Reading, pad
from lens_probes.result import Result, measured
from lens_probes.settings import Layers, Positive, Rate, Seed
from lens_probes.text.prompts import Prompts, Tokens, concatenate

RECENT = 20  # last steps, whose mean loss the figure shows


class TunedLensResult(Result):
    """Affine maps, one per layer, and the state of the optimiser, to resume. Calling the result translates a state."""

    headline = "loss"
    layer: tuple[str, ...]
    last: str  # the last layer's label, which has no map
    learning_rate: float
    tokens_per_step: int
    seed: int
    shuffled: bool = False
    text_hash: str  # of the prompts: a fit can resume only with the same ones
    maps: Float[Tensor, "layer input d_model"] = measured("affine map: the rows of A, then b")
    loss: Float[Tensor, "layer step"] = measured("mean KL(final || layer)", unit="nats", low=0)
    gradient_mean: Float[Tensor, "layer input d_model"] = measured("Adam's running mean of the gradient")
    gradient_square: Float[Tensor, "layer input d_model"] = measured(
        "Adam's running mean of the squared gradient", low=0
    )
    embed_mean: Float[Tensor, " d_model"] = measured("mean embedding, which identifies the model")

    def __call__(self, state: Float[Tensor, "token d_model"], label: str) -> Float[Tensor, "token d_model"]:
        """The state, translated to the last layer's basis; unchanged for the last layer."""
        self._check_labels([label])
        if label == self.last:
            return state
        maps = self.maps[self.layer.index(label)].to(state.device)
        return state.float() @ maps[:-1] + maps[-1]

    def check_model(self, model: ModelView, labels: Sequence[str]) -> None:
        """Raise unless this lens was fitted on this model, for all of these states."""
        model.refuse_other("translator", self.provenance, self.embed_mean)
        self._check_labels(labels)

    def _check_labels(self, labels: Sequence[str]) -> None:
        missing = [label for label in labels if label not in (*self.layer, self.last)]
        if missing:
            raise ValueError(
                f"states must be of the layers that this lens was fitted for, {', '.join(self.layer)}; got "
                f"{missing[0]}: use those layers, or fit more layers"
            )

    def figure(self, **look: Unpack[figures.Look]) -> go.Figure:
        """KL(final || layer) by layer, of the first step and of the last ones."""
        steps, recent = self.loss.shape[1], self.loss[:, -RECENT:]
        if not steps:
            raise ValueError("this fit was interrupted before its first step, and there is nothing to draw: resume it")
        start = figures.Line("first step (plain logit lens)", self.loss[:, 0].tolist(), colour=figures.GREY)
        name = f"mean of the last {amount(recent.shape[1], 'step')}"
        end = figures.Line(name, recent.mean(1).tolist(), colour=figures.CHOSEN)
        return figures.lines(
            {self.quantity("loss").title: [start, end]},
            self.layer,
            title=self.title(f"KL(final || layer) of the tuned lens, before and after {amount(steps, 'step')}"),
            x_title=figures.layer_title(self.layer),
            **look,
        )


class TunedLens(TextExperiment[TunedLensResult]):
    """Fit a tuned lens. `layers` are those of `LogitLens`; a step is one batch, of about `tokens_per_step` tokens.

    `shuffled`: the null. Maps are fitted to the model's predictions at other tokens of the same step, drawn at random:
    they can learn how frequent entries are, but nothing about a state.

    After an interrupt the result holds the fit so far. `run(..., resume=result)` continues it; the outcome equals one
    uninterrupted fit.

    >>> import lens_probes as lp
    >>> model, texts = lp.tiny.bridge(), lp.demo.sentences()[:8]
    >>> tuned = lp.TunedLens(steps=20).run(model, texts, progress=False)
    >>> bool((tuned.loss[:, -1] < tuned.loss[:, 0]).all())
    True
    >>> lp.LogitLens(translator=tuned).run(model, "Time flies like an arrow.").translated
    True
    """

    steps: Positive = 250
    layers: Layers = None
    learning_rate: Rate = 1e-3
    tokens_per_step: Positive = 256
    seed: Seed = 0
    shuffled: bool = False

    def run(
        self, model: Any, prompts: Prompts, *, resume: TunedLensResult | None = None, **options: Unpack[Options]
    ) -> TunedLensResult:
        """Fit on these prompts; `prepend_bos`, `word_class` and `progress` are as in `lens_probes.run`.

        `resume`: an earlier result of the same fit, to be continued.
        """
        return self.perform(Study.of(self, model, prompts, **options), resume)

    def perform(self, study: Study, resume: TunedLensResult | None = None) -> TunedLensResult:
        """All layers together, step by step."""
        view, tokens = study.view, study.tokens
        view.check_head()
        check_entries(view.W_E, f"the embedding of {view.name}")  # its mean identifies the model
        last = view.label("resid_post", view.n_layers - 1)
        points = {label: hook for label, hook in view.stream(self.layers).items() if label != last}
        if not points:
            raise ValueError(
                f"layers must include one before the last, which needs no map; got {last} only: add others"
            )
        if bool(tokens.special.all()):
            raise ValueError("prompts must have tokens that are not special; got special tokens only: pass text")
        hooks = [*points.values(), view.hook("resid_post", -1)]
        fit = self._start(view, tuple(points), tokens, resume)
        batches = islice(_batches(tokens, self.tokens_per_step, self.seed), fit.step, None)

        def go_on(step: int) -> None:
            nonlocal fit  # replaced as a whole, so that an interrupt never leaves half a step
            batch = next(batches)
            ids, mask = pad(batch, view)
            reading = Reading(view, batch, view.activations(ids, mask, hooks), mask)
            pairs = seeded(f"step {step}", self.seed) if self.shuffled else None
            loss, gradient = _gradients(reading, hooks, fit.maps, pairs)
            fit = _adam(fit, loss, gradient, self.learning_rate / (1 + step / 100) ** 0.5)

        with undisturbed(view.model):
            study.each(go_on, range(fit.step, self.steps), doing="fitting", unit="step", least=0)
        if fit.step < self.steps:
            tqdm.write("to continue, run(..., resume=result)")
        return TunedLensResult(
            layer=tuple(points),
            last=last,
            learning_rate=self.learning_rate,
            tokens_per_step=self.tokens_per_step,
            seed=self.seed,
            shuffled=self.shuffled,
            text_hash=_text_hash(tokens),
            maps=fit.maps.cpu(),
            loss=fit.loss.cpu(),
            gradient_mean=fit.gradient_mean.cpu(),
            gradient_square=fit.gradient_square.cpu(),
            embed_mean=view.embed_mean,
            provenance=study.provenance(hooks),
        )

    def _start(self, view: ModelView, layer: tuple[str, ...], tokens: Tokens, resume: TunedLensResult | None) -> "_Fit":
        """The initial fit: the identity, or the state of `resume`. Raises unless `resume` is of the same fit."""
        if resume is None:
            identity = torch.cat([torch.eye(view.d_model, dtype=torch.float32), torch.zeros(1, view.d_model).float()])
            maps = repeat(identity.to(view.device), "input d_model -> layer input d_model", layer=len(layer))
            nothing = torch.zeros_like(maps)
            return _Fit(maps, nothing, nothing, maps.new_zeros(len(layer), 0))
        if not isinstance(resume, TunedLensResult):
            raise TypeError(
                f"resume must be the result of an earlier run, or of TunedLensResult.load(path); got {brief(resume)}"
            )
        resume.check_model(view, ())
        names = ("layers", "learning_rate", "tokens_per_step", "seed", "shuffled", "text")
        own = (layer, self.learning_rate, self.tokens_per_step, self.seed, self.shuffled, _text_hash(tokens))
        fitted = (resume.learning_rate, resume.tokens_per_step, resume.seed, resume.shuffled)
        theirs = (resume.layer, *fitted, resume.text_hash)
        other = [name for name, one, another in zip(names, own, theirs, strict=True) if one != another]
        if other:
            raise ValueError(
                f"resume must come from the same fit; got one with other {', '.join(other)}: use the same, or leave "
                f"resume out"
            )
        if resume.loss.shape[1] > self.steps:
            raise ValueError(
                f"resume must have at most the {self.steps} steps of TunedLens(steps=...); got {resume.loss.shape[1]}: "
                f"use more steps"
            )
        state = (resume.maps, resume.gradient_mean, resume.gradient_square, resume.loss)
        return _Fit(*(tensor.to(view.device) for tensor in state))


class _Fit(NamedTuple):
    """The state of a fit. Each step replaces it as a whole, so that an interrupt never leaves half a step."""

    maps: Float[Tensor, "layer input d_model"]
    gradient_mean: Float[Tensor, "layer input d_model"]
    gradient_square: Float[Tensor, "layer input d_model"]
    loss: Float[Tensor, "layer step"]

    @property
    def step(self) -> int:
        return self.loss.shape[1]


def _adam(
    fit: _Fit, loss: Float[Tensor, " layer"], gradient: Float[Tensor, "layer input d_model"], rate: float
) -> _Fit:
    """One step of Adam (Kingma and Ba 2015, arXiv 1412.6980) with its usual constants."""
    mean = torch.lerp(gradient, fit.gradient_mean, 0.9)
    square = torch.lerp(gradient.square(), fit.gradient_square, 0.999)
    step = fit.step + 1
    change = (mean / (1 - 0.9**step)) / ((square / (1 - 0.999**step)).sqrt() + 1e-8)
    return _Fit(fit.maps - rate * change, mean, square, torch.cat([fit.loss, loss[:, None]], dim=1))


def _gradients(
    reading: Reading,
    hooks: Sequence[str],
    maps: Float[Tensor, "layer input d_model"],
    pairs: torch.Generator | None = None,
) -> tuple[Float[Tensor, " layer"], Float[Tensor, "layer input d_model"]]:
    """The loss of every layer on a batch and its gradient. Layer by layer, so that memory holds the logits of one.

    Given `pairs`, states and final predictions are paired at random.
    """
    model, own = reading.model, ~reading.tokens.special
    with torch.no_grad():
        last = reading[hooks[-1]][own]
        last = last if pairs is None else last[torch.randperm(len(last), generator=pairs)]
        final_log_prob = model.unembed(last).log_softmax(-1)
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
    """Endless batches of prompts, in a new seeded order each time all prompts have been used."""
    prompts = [part for _, part in tokens.by_prompt() if not part.special.all()]
    random = torch.Generator().manual_seed(seed)
    batch: list[Tokens] = []
    while True:
        for number in torch.randperm(len(prompts), generator=random).tolist():
            batch.append(prompts[number])
            if sum(map(len, batch)) >= tokens_per_step:
                yield _joined(batch)
                batch = []


def _text_hash(tokens: Tokens) -> str:
    numbers = torch.stack([tokens.prompt, tokens.id])
    return hashlib.blake2b(numbers.contiguous().numpy().tobytes(), digest_size=8).hexdigest()


def _joined(parts: Sequence[Tokens]) -> Tokens:
    """These prompts as one table, numbered in order."""
    renumbered = [replace(part, prompt=torch.zeros_like(part.prompt)) for part in parts]
    return concatenate(renumbered, range(len(parts)))
