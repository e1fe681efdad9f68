"""InputReconstruction: how much of its input does a layer still hold?

Find an input whose states h at a layer equal those of the prompt, h*. What cannot be found again was lost, or is out of
this search's reach: a success shows what a layer holds, a failure only that this search did not find it.

`method="gradient"` descends on soft embeddings e [token d_model], from noise with mean and spread of the vocabulary:

    loss = mean over tokens of 1 - cos(h(e), h*)               "cosine", 0 to 2
           mean over tokens of |h(e) - h*| / |h*|              "l2" or "l1", at least 0
    found[token] = the vocabulary entry with the largest cosine to e[token]; learned positions are no part of e

`method="sequential"` (decoders) uses that a state depends only on what came before: with the tokens before known, it
checks candidates for the next one by a forward pass, in an order that the gradient gives, and takes the closest that
has |h - h*| <= tolerance |h*|. Special tokens, which the tokenizer adds, are given in both.

    accuracy = share of the tokens asked for that are found again; equal vocabulary rows count as one token  0 to 1
    yardstick[token] = |h(e* + noise) - h*|, the noise 1/20 of the embeddings' standard deviation     in units of h

Beside it: decoding alone (the nearest entry of e* + noise), tokens drawn by their frequency in the other prompts, and
the same for `lp.untrained(model)`, which `compare_with` puts beside it at equal loss.

Source: blbadger.github.io, "Language Model Representations and Features" (whose scripts give every token position 0 and
no context); sequential: Nikolaou et al. 2025, "Language Models are Injective and Hence Invertible", arXiv
2510.15511; what fails there: arXiv 2607.00852.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple, final, get_args

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from lens_probes import figures
from lens_probes.maths import inference
from lens_probes.maths.vocabulary import check_entries
from lens_probes.messages import brief
from lens_probes.model import Continuation, ModelView, ReadPoint
from lens_probes.probe import Experiment
from lens_probes.reading import finite
from lens_probes.result import Result, measured, provenance, schema
from lens_probes.text.prompts import Prompts, PromptTable, Table, Tokens, prompt_table, tokenize

Method = Literal["gradient", "sequential"]
Loss = Literal["cosine", "l1", "l2"]

NOISE = 1 / 20  # of the embeddings' standard deviation: the yardstick of the source
CHECKPOINTS = 20
BATCH = 32  # candidates checked between two gradients
SPREAD_OF = 512  # candidates that dimensions are weighed by
DIRECTIONS = 16  # random directions in which a gradient is taken, beside that of the error
NULL = "a prompt's accuracy in the one model is as likely that in the other"


@final
@dataclass(frozen=True, eq=False, repr=False)
class Texts(Table):
    """What was found, in words: a row a token, empty if nothing was."""

    text: tuple[str, ...]


class InputReconstructionResult(Result):
    """What was found for every token, and how near its state came. It grows with the tokens."""

    token: Tokens
    prompt: PromptTable
    step: tuple[str, ...]
    found_text: Texts
    found: Int[Tensor, " token"] = measured("token id found, -1 if none was", low=0, missing=-1)
    correct: Float[Tensor, " token"] = measured(
        "1 if that is the token (or has its vocabulary row); missing if special or not asked", low=0, high=1
    )
    decoded: Float[Tensor, " token"] = measured("1 if the token's embedding plus noise decodes to it", low=0, high=1)
    tried: Int[Tensor, " token"] = measured(
        "candidates checked, 32 at a time; -1 where no search was", low=0, missing=-1
    )
    distance: Float[Tensor, " token"] = measured("|h(found) - h*|; missing if none was found", low=0)
    soft_distance: Float[Tensor, " token"] = measured("|h(e) - h*| of the soft embeddings", low=0)
    yardstick: Float[Tensor, " token"] = measured("|h(e* + noise) - h*|", low=0)
    state_norm: Float[Tensor, " token"] = measured("|h*|", low=0)
    steps: Int[Tensor, " prompt"] = measured("gradient steps of the best restart, or gradients", low=0)
    path_loss: Float[Tensor, "step prompt"] = measured("loss on the way; missing where a search gave up", low=0)
    path_accuracy: Float[Tensor, "step prompt"] = measured("accuracy on the way", low=0, high=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.found_text) != len(self.token):
            raise ValueError(
                f"InputReconstructionResult has a text for every token; got {len(self.found_text)} texts for "
                f"{len(self.token)} tokens"
            )

    @property
    def chance(self) -> Float[Tensor, " token"]:
        """How often a token drawn at random from the other prompts is this one; missing with one prompt."""
        shares = torch.full((len(self.token),), torch.nan)
        for number, own in self.token.by_prompt():
            others = self.token.id[(self.token.prompt != number) & ~self.token.special]
            if len(others):
                shares[self.token.prompt == number] = (own.id[:, None] == others).float().mean(1)
        return shares.masked_fill(self.token.special, torch.nan)

    @property
    def accuracy(self) -> Float[Tensor, " prompt"]:
        """The share of each prompt's tokens that was found, of those asked for: a search ends where it gives up."""
        return torch.stack([self.correct[self.token.prompt == number].nanmean() for number in self.prompt.prompt])

    @property
    def exact(self) -> Float[Tensor, " prompt"]:
        """1 where the whole prompt was found."""
        right = (self.correct == 1) | self.token.special
        return torch.stack([right[self.token.prompt == number].all() for number in self.prompt.prompt]).float()

    def table(self) -> pd.DataFrame:
        """A row a token: what it is, what was found in its place, and how."""
        columns = {name: getattr(self, name).numpy() for name in ("correct", "tried", "distance", "yardstick")}
        token = self.token.to_frame()[["prompt", "position", "text", "word_class"]]
        return token.assign(found=list(self.found_text.text), **columns)

    def by_position(self) -> pd.DataFrame:
        """A row a position: accuracy with its interval over prompts, and what it stands beside."""
        return self._accuracy_by("position", self.token.position.tolist())

    def by_word_class(self) -> pd.DataFrame:
        """A row a word class: accuracy with its interval over prompts, what it stands beside, candidates checked."""
        return self._accuracy_by("word_class", list(self.token.word_class))

    def gave_up(self) -> pd.DataFrame:
        """The tokens at which a sequential search gave up, a row each: what follows them was never asked."""
        last = (self.found < 0) & (self.tried > 0)
        rows = last.nonzero().flatten().tolist()
        frame = self.token.to_frame().iloc[rows][["prompt", "position", "text", "word_class"]]
        return frame.assign(tried=self.tried[last].numpy()).reset_index(drop=True)

    def compare(self, first: str = "content", second: str = "function", *, of: str = "correct") -> pd.DataFrame:
        """The probability that a `first` token has the larger `correct` (or tried, distance, ...); p and n.

        See `inference.compare`: a half is no difference, and classes are permuted among word types.
        """
        known = [name for name, axes in schema(type(self)).axes.items() if axes == ("token",)]
        if of not in known:
            raise ValueError(f"compare(of={brief(of)}): what each token has is {', '.join(known)}")
        values = getattr(self, of).double().numpy()[None]
        return inference.compare(np.where(values < 0, np.nan, values), self.token, first, second).drop(columns="unit")

    def compare_with(self, other: "InputReconstructionResult") -> pd.DataFrame:
        """This model and another (an untrained one) on the same prompts: accuracy at the end, and at equal loss.

        At equal loss each prompt is looked at where its loss first fell to the larger of the two lowest losses. The
        95 % interval of the difference is Student's t over prompts. The null of p swaps the two models at random,
        prompt by prompt. q is the false-discovery rate over the two rows.
        """
        if not isinstance(other, InputReconstructionResult):
            raise TypeError(f"an InputReconstructionResult is compared with another; {type(other).__name__} came")
        if self.token.id.tolist() != other.token.id.tolist() or self.prompt.text != other.prompt.text:
            raise ValueError("two results are compared on the same prompts, and these have other ones")
        if self.provenance.probe != other.provenance.probe:
            raise ValueError(
                f"two models are compared by the same experiment, and {self.provenance.probe} and "
                f"{other.provenance.probe} came"
            )
        order = inference.prompt_order(self.token)
        floor = torch.maximum(self.path_loss.amin(0), other.path_loss.amin(0))
        rows = []
        for when, own, others in (
            ("at the end", self.accuracy, other.accuracy),
            ("at equal loss", self._accuracy_at(floor), other._accuracy_at(floor)),
        ):
            difference = (own - others).double().numpy()[None, order]
            low, high = inference.mean_interval(difference)
            rows.append(
                {
                    "when": when,
                    "accuracy": float(own.mean()),
                    "other": float(others.mean()),
                    "difference": float(difference.mean()),
                    "low": low[0],
                    "high": high[0],
                    "p": float(inference.sign_flip_p(difference)[0]),
                    "q": np.nan,
                    "prompts": len(own),
                }
            )
        frame = pd.DataFrame(rows)
        frame["q"] = inference.false_discovery(frame["p"].to_numpy())
        frame.attrs["null"] = NULL
        return frame

    def _accuracy_at(self, loss: Float[Tensor, " prompt"]) -> Float[Tensor, " prompt"]:
        """The accuracy where the loss first was as low."""
        first = (self.path_loss <= loss).int().argmax(0)
        return self.path_accuracy.gather(0, first[None])[0]

    def _accuracy_by(self, name: str, labels: Sequence[Any]) -> pd.DataFrame:
        order, tokens = inference.in_own_order(self.token)
        label = np.asarray(labels, dtype=object)[order]
        correct, decoded, chance, tried = (
            each.double().numpy()[order] for each in (self.correct, self.decoded, self.chance, self.tried)
        )
        asked = ~np.isnan(correct) & (label != "")
        prompt, rows = tokens.prompt.numpy(), []
        for each in sorted(set(label[asked])):
            own = asked & (label == each)
            of_prompts, decode, frequency = np.array(
                [
                    [column[own & (prompt == number)].mean() for number in np.unique(prompt[own])]
                    for column in (correct, decoded, chance)
                ]
            )
            low, high = inference.mean_interval(of_prompts[None])
            asked_for = tried[own & (tried > 0)]
            rows.append(
                {
                    name: each,
                    "accuracy": of_prompts.mean(),
                    "low": low[0],
                    "high": high[0],
                    "decode_only": decode.mean(),
                    "chance": frequency.mean(),
                    "median_tried": np.median(asked_for) if len(asked_for) else np.nan,
                    "tokens": int(own.sum()),
                    "prompts": len(of_prompts),
                }
            )
        return pd.DataFrame(rows)

    def figure(self) -> go.Figure:
        """Accuracy by position beside its baselines, and the distance of the states over the yardstick."""
        table = self.by_position()
        if not len(table):
            raise ValueError("no token of these prompts was searched for, and there is nothing to draw: pass text")
        mean, low, high = (list(table[each]) for each in ("accuracy", "low", "high"))
        own = figures.Line("found", mean, low, high, figures.CHOSEN)
        decode = figures.Line("decoding alone", list(table["decode_only"]), colour=figures.INK, dashed=True)
        chance = figures.Line("drawn by frequency", list(table["chance"]), colour=figures.GREY, dashed=True)
        lines = [own, decode] if self.chance.isnan().all() else [own, decode, chance]
        descent = self.tried.max() < 0
        ratio = ((self.soft_distance if descent else self.distance) / self.yardstick).double().numpy()
        at = self.token.position.numpy()
        medians = [pd.Series(ratio[at == position]).median() for position in table["position"]]
        apart = figures.Line(f"median, of the {'soft embeddings' if descent else 'tokens found'}", medians)
        one = figures.Line("the yardstick", [1.0] * len(table), colour=figures.GREY, dashed=True)
        return figures.lines(
            {"share of tokens found": lines, "state distance / yardstick": [apart, one]},
            [str(position) for position in table["position"]],
            title=f"What can be found again {self._how()}?\n{self.provenance.describe()}",
            x_title="position in the prompt",
        )

    def _how(self) -> str:
        way = "by descent" if self.tried.max() < 0 else "by search"
        return f"from {self.provenance.read}, {way}"

    def figure_prompt(self, prompt: int = 0) -> go.Figure:
        """The tokens of a prompt, and those that were found in their places."""
        rows = self.token.rows(prompt)
        correct = self.correct.masked_fill(self.token.special, 1)[rows].tolist()  # special tokens were given
        texts = [[texts[row] for row in rows] for texts in (self.token.text, self.found_text.text)]
        return figures.heatmap(
            [[1.0] * len(rows), correct],
            x=[str(i) for i in range(len(rows))],
            y=["prompt", "found"],
            title=f"Prompt {prompt} {self._how()}\n{self.provenance.describe()}",
            x_title="position in the prompt",
            y_title="",
            colour_title="the same token",
            low=0.0,
            high=1.0,
            text=[[figures.visible(each, 10) for each in line] for line in texts],
        )


class InputReconstruction(Experiment[InputReconstructionResult]):
    """Find each prompt again from its states at one read point of one layer.

    Gradient: `loss`, `steps`, `restarts` (run side by side, the lowest loss is taken) and `learning_rate`, in standard
    deviations of the embeddings (Adam, falling to a tenth). Sequential: at most `max_candidates` a token; `tolerance`
    None is the square root of the precision (3.5e-4 in float32, 0.09 in bfloat16). A prompt ends where it gives up.
    Interrupted, it gives the prompts done so far.

    >>> import lens_probes as lp
    >>> search = lp.InputReconstruction(layer=1, method="sequential")
    >>> search.run(lp.tiny.bridge(), "Time flies like an arrow.", progress=False).exact
    tensor([1.])
    """

    layer: int
    at: ReadPoint = "resid_post"
    method: Method = "gradient"
    loss: Loss = "l2"
    steps: int = 300
    restarts: int = 3
    learning_rate: float = 0.3
    max_candidates: int = 2000
    tolerance: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, asked, known in (("method", self.method, Method), ("loss", self.loss, Loss)):
            if asked not in get_args(known):
                raise ValueError(
                    f"InputReconstruction({name}=...) is {' or '.join(get_args(known))}; {brief(asked)} came"
                )
        for name in ("steps", "restarts", "max_candidates"):
            if getattr(self, name) < 1:
                raise ValueError(f"InputReconstruction({name}=...) is 1 or more; {getattr(self, name)} came")
        for name in ("learning_rate", "tolerance"):
            number = getattr(self, name)
            if number is not None and not number > 0:
                raise ValueError(f"InputReconstruction({name}=...) is above 0; {number} came")

    def run(self, model: Any, prompts: Prompts, *, progress: bool = True) -> InputReconstructionResult:
        """A prompt at a time."""
        view = ModelView(model)
        if self.method == "sequential" and view.encoder:
            raise ValueError(
                f"method='sequential' finds tokens one by one and every state of {view.name} depends on what follows "
                f"it: use method='gradient'"
            )
        tokens = tokenize(prompts, view)
        task = _Task(view, view.hook(self.at, self.layer))
        every = [own for _, own in tokens.by_prompt()]
        done: list[_Found] = []
        try:
            for own in tqdm(every, desc="reconstructing", unit="prompt", disable=not progress):
                if own.special.all():
                    raise ValueError(f"prompt {int(own.prompt[0])} has special tokens only: nothing is to be found")
                done.append(self._of_prompt(task, own))
        except KeyboardInterrupt:
            if not done:
                raise
            tqdm.write(f"interrupted after {len(done)} of {len(every)} prompts")
        kept = tokens[tokens.prompt <= int(every[len(done) - 1].prompt[0])]
        rows = {name: torch.cat([getattr(each, name) for each in done]) for name in _Found.ROWS}
        return InputReconstructionResult(
            token=kept,
            prompt=prompt_table(kept),
            step=tuple(str(step) for step in self._checkpoints()),
            found_text=Texts(tuple("" if i < 0 else view.token_texts([i])[0] for i in rows["found"].tolist())),
            **rows,
            steps=torch.tensor([each.steps for each in done]),
            path_loss=torch.stack([each.path_loss for each in done], dim=1),
            path_accuracy=torch.stack([each.path_accuracy for each in done], dim=1),
            provenance=provenance(self, view, view.W_E.dtype, [view.hook_token_embed, task.hook], kept),
        )

    def _checkpoints(self) -> list[int]:
        """After which steps the path is noted; a sequential search notes its end."""
        if self.method == "sequential":
            return [0]
        return sorted({round(self.steps * i / CHECKPOINTS) for i in range(CHECKPOINTS + 1)})

    def _of_prompt(self, task: "_Task", own: Tokens) -> "_Found":
        random = torch.Generator().manual_seed(zlib.crc32(own.id.numpy().tobytes(), self.seed) % 2**32)
        goal = task.states(own.id)
        true = task.vocabulary[own.id]
        noisy = true + torch.randn(true.shape, generator=random).to(true) * task.spread.mean() * NOISE
        yardstick = (task.soft(noisy[None], own.id).detach()[0] - goal).norm(dim=-1)
        search = self._descend if self.method == "gradient" else self._in_order
        found, soft, tried, steps, path_loss, path_accuracy = search(task, own, goal, random)
        until = int((found >= 0).sum())  # a sequential search that gives up finds nothing after it
        distance = torch.full(yardstick.shape, torch.nan)
        if until:
            distance[:until] = (task.states(found[:until]) - goal[:until]).norm(dim=-1).cpu()
        special = own.special
        unasked = special | (torch.arange(len(own)) > until)
        return _Found(
            found=found,
            correct=task.same(found, own.id).float().masked_fill(unasked, torch.nan),
            decoded=task.same(task.nearest(noisy), own.id).float().masked_fill(special, torch.nan),
            tried=tried,
            distance=distance,
            soft_distance=soft.cpu(),
            yardstick=yardstick.cpu(),
            state_norm=goal.norm(dim=-1).cpu(),
            steps=steps,
            path_loss=path_loss,
            path_accuracy=path_accuracy,
        )

    def _descend(self, task: "_Task", own: Tokens, goal: Float[Tensor, "token d"], random: torch.Generator) -> "_Path":
        """Gradient descent on soft embeddings, all restarts side by side."""
        given = own.special.to(goal.device)[:, None]
        true = task.vocabulary[own.id]
        noise = torch.randn(self.restarts, *true.shape, generator=random).to(true)
        soft = (task.mean + noise * task.spread).requires_grad_()
        optimiser = torch.optim.Adam([soft], lr=self.learning_rate * float(task.spread.mean()))
        schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.1, total_iters=self.steps)
        checkpoints, path = set(self._checkpoints()), []

        def look() -> tuple[Tensor, Tensor, Tensor]:
            now = torch.where(given, true, soft)
            states = task.soft(now, own.id)
            return now, states, of_states(self.loss, states[:, ~own.special], goal[~own.special])

        def note(now: Tensor, losses: Tensor) -> None:
            right = task.same(task.nearest(now.detach()), own.id.expand(self.restarts, -1))
            path.append((losses.detach().cpu(), right[:, ~own.special].float().mean(1)))

        for step in range(self.steps):
            now, states, losses = look()
            if step in checkpoints:
                note(now, losses)
            (soft.grad,) = torch.autograd.grad(losses.sum(), soft)
            optimiser.step()
            schedule.step()
        now, states, losses = look()
        note(now, losses)
        best = int(losses.nan_to_num(torch.inf).argmin())
        found = torch.where(own.special, own.id, task.nearest(now[best].detach()))
        apart = (states[best].detach() - goal).norm(dim=-1)
        loss, accuracy = (torch.stack([each[i][best] for each in path]) for i in range(2))
        return _Path(found, apart, torch.full_like(found, -1), self.steps, loss, accuracy)

    def _in_order(self, task: "_Task", own: Tokens, goal: Float[Tensor, "token d"], random: torch.Generator) -> "_Path":
        """Token by token, candidates in the order of the gradient."""
        found, tried, gradients = torch.full_like(own.id, -1), torch.full_like(own.id, -1), 0
        tolerance = self.tolerance or torch.finfo(task.view.W_E.dtype).eps ** 0.5
        directions = torch.randn(DIRECTIONS, goal.shape[-1], generator=random).to(goal)
        for t in range(len(own)):
            if own.special[t]:
                found[t] = own.id[t]
                continue
            following = Continuation(task.view, found[:t], task.hook)
            search = first_within(following, goal[t], task.vocabulary, directions, tolerance, self.max_candidates)
            found[t], tried[t] = search.found, search.tried
            gradients += search.gradients
            if search.found < 0:
                break
        apart = torch.full(own.id.shape, torch.nan)
        asked = (tried > 0) & ~own.special
        right = task.same(found, own.id)[asked].float().mean()[None]
        loss = torch.tensor([torch.nan])
        if (found >= 0).all():
            loss = of_states(self.loss, task.states(found)[~own.special], goal[~own.special])[None]
        return _Path(found, apart, tried, gradients, loss.cpu(), right)


class _Task:
    """A model with its vocabulary in float32, read at one activation."""

    def __init__(self, view: ModelView, hook: str) -> None:
        self.view, self.hook = view, hook
        self.vocabulary = view.token_embeddings.float()
        check_entries(self.vocabulary, f"the embedding of {view.name}")
        self.mean, self.spread = self.vocabulary.mean(0), self.vocabulary.std(0)

    @cached_property
    def _directions(self) -> Float[Tensor, "vocab d_model"]:
        return torch.nn.functional.normalize(self.vocabulary, dim=-1)

    def states(self, ids: Int[Tensor, " token"]) -> Float[Tensor, "token d"]:
        """The states of these tokens."""
        everything = torch.ones(1, len(ids), dtype=torch.bool)
        return finite(self.hook, self.view.activations(ids[None], everything, [self.hook])[self.hook][0].float())

    def soft(
        self, embeddings: Float[Tensor, "restart token d_model"], ids: Int[Tensor, " token"]
    ) -> Float[Tensor, "restart token d"]:
        """The states of tokens with these embeddings in the places of the ids; gradients flow to them."""
        ids = ids.expand(len(embeddings), -1)
        return self.view.from_embeddings(embeddings, ids, [self.hook])[0].float()

    def nearest(self, embeddings: Float[Tensor, "*any d_model"]) -> Int[Tensor, "*any"]:
        """The vocabulary entry with the largest cosine."""
        flat = embeddings.flatten(end_dim=-2)
        found = torch.cat([(some @ self._directions.T).argmax(-1) for some in flat.split(256)])
        return found.unflatten(0, embeddings.shape[:-1]).cpu()

    def same(self, found: Int[Tensor, "*any"], ids: Int[Tensor, "*any"]) -> Bool[Tensor, "*any"]:
        """Whether the two have the same vocabulary row, number by number."""
        equal = (self.vocabulary[found.clamp(min=0)] == self.vocabulary[ids]).all(-1).cpu()
        return equal & (found >= 0)


class _Path(NamedTuple):
    found: Tensor
    soft_distance: Tensor
    tried: Tensor
    steps: int
    path_loss: Tensor
    path_accuracy: Tensor


@dataclass(frozen=True)
class _Found:
    """What a prompt adds to the result."""

    ROWS = ("found", "correct", "decoded", "tried", "distance", "soft_distance", "yardstick", "state_norm")
    found: Tensor
    correct: Tensor
    decoded: Tensor
    tried: Tensor
    distance: Tensor
    soft_distance: Tensor
    yardstick: Tensor
    state_norm: Tensor
    steps: int
    path_loss: Tensor
    path_accuracy: Tensor


def of_states(
    loss: Loss, states: Float[Tensor, "*restart token d"], goal: Float[Tensor, "token d"]
) -> Float[Tensor, "*restart"]:
    """How far states are from the goal, as the docstring above has it.

    >>> here, there = torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 5.0]])
    >>> [round(float(of_states(loss, here, there)), 3) for loss in ("cosine", "l1", "l2")]
    [0.2, 0.8, 0.632]
    """
    if loss == "cosine":
        return (1 - torch.cosine_similarity(states, goal, dim=-1)).mean(-1)
    order = 1 if loss == "l1" else 2
    return ((states - goal).norm(order, dim=-1) / goal.norm(order, dim=-1)).mean(-1)


class Search(NamedTuple):
    """What a search for one token came to: its id (-1: it gave up), candidates checked, gradients computed."""

    found: int
    tried: int
    gradients: int


def first_within(
    following: Continuation,
    goal: Float[Tensor, " d"],
    vocabulary: Float[Tensor, "vocab d_model"],
    directions: Float[Tensor, "direction d"],
    tolerance: float,
    max_candidates: int,
) -> Search:
    """The token whose state is within the tolerance of the goal, candidates checked in batches.

    From the mean embedding, then in turns from the closest candidate so far and the closest of the latest batch, come
    two orders that take turns too. By the gradient of the squared error along embeddings of equal length: norms before
    layers make of an embedding its direction. And by the error that the state's derivative J predicts of a candidate e,
    seen in a few random directions v: sum over v of (v (h - h*) + v J (e - e0))^2, which is Gauss and Newton's. Both
    divide dimensions by their spread over the candidates seen: a few huge ones would outweigh all others.
    """
    untried = torch.ones(len(vocabulary), dtype=torch.bool, device=vocabulary.device)
    lengths = vocabulary.norm(dim=-1).clamp(min=1e-12)
    start = best = vocabulary.mean(0)
    weight, seen = torch.ones_like(goal), goal.new_empty(0, len(goal))
    closest, tried, gradients = torch.inf, 0, 0
    while tried < max_candidates and untried.any():
        at = start.expand(len(directions) + 1, -1).clone().requires_grad_()
        states = following.soft(at).float()
        error = (states[0] - goal).detach()
        along = torch.cat([directions * weight, (error * weight**2)[None]])
        (slopes,) = torch.autograd.grad((states * along).sum(), at)
        gradients += 1
        change = vocabulary @ slopes.T
        predicted = (change + (along @ error - slopes @ start))[:, :-1].square().sum(-1)
        batch = min(BATCH, max_candidates - tried, int(untried.sum()))
        orders = [
            order.masked_fill(~untried, torch.inf).topk(batch, largest=False).indices
            for order in (predicted, change[:, -1] / lengths)
        ]
        candidates = torch.tensor(list(dict.fromkeys(torch.stack(orders, dim=1).flatten().tolist()))[:batch])
        untried[candidates] = False
        checked = finite("candidate states", following.states(candidates).float())
        distances = (checked - goal).norm(dim=-1)
        nearest = int(distances.argmin())
        tried += batch
        if distances[nearest] <= tolerance * goal.norm():
            return Search(int(candidates[nearest]), tried, gradients)
        latest = vocabulary[candidates[nearest]]
        if distances[nearest] < closest:
            closest, best = float(distances[nearest]), latest
        start = best if gradients % 2 else latest  # the best alone is a trap where states lie dense
        seen = torch.cat([seen, checked])[-SPREAD_OF:]
        if len(seen) > 1:
            spread = seen.std(0)
            weight = 1 / (spread + 1e-3 * spread.mean()).clamp(min=1e-12)
    return Search(-1, tried, gradients)
