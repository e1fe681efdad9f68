"""InputReconstruction: how much of its input can be reconstructed from a layer?

Search for an input whose states h at a layer equal those of the prompt, h*. If a token is found, the layer still
contains it. If not, it was lost, or the search failed.

`method="gradient"` optimises soft embeddings e [token d_model], starting from noise with the vocabulary's mean and
standard deviation:

    loss = mean over tokens of 1 - cos(h(e), h*)               "cosine", 0 to 2
           mean over tokens of |h(e) - h*| / |h*|              "l2" or "l1", at least 0
    found[token] = the vocabulary entry with the largest cosine to e[token]; e does not include learned positions

`method="sequential"` (decoders) finds one token after the other, since a state depends on earlier tokens only. It
checks candidates for the next token by forward passes, in an order given by gradients (`maths/token_search.py`), and
takes the closest of the first batch that has one with |h - h*| <= tolerance |h*|. Both methods know the special tokens,
which the tokenizer adds.

    accuracy = share of the searched tokens that are found; equal vocabulary rows count as one token         0 to 1
    noise_distance[token] = |h(e* + noise) - h*|, noise of 1/20 of the embeddings' SD           in units of h

Baselines: decoding alone (the nearest entry to e* + noise), tokens drawn by their frequency in the other prompts, and
`lp.untrained(model)`, which `compare_with` compares at equal loss.

Source: blbadger.github.io, "Language Model Representations and Features" (whose scripts give every token position 0 and
no context); sequential: Nikolaou et al. 2025, "Language Models are Injective and Hence Invertible", arXiv
2510.15511; limits of that: arXiv 2607.00852.
"""

from dataclasses import dataclass
from typing import Any, Literal, Unpack

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float, Int
from torch import Tensor

from lens_probes import figures
from lens_probes.maths import inference
from lens_probes.maths.ascent import ascend, seeded
from lens_probes.maths.token_search import one_by_one
from lens_probes.model import ReadPoint
from lens_probes.probe import Study, TextExperiment
from lens_probes.result import TokenResult, derived, measured, paired
from lens_probes.settings import Positive, Rate, Seed
from lens_probes.soft_tokens import SoftTokens
from lens_probes.text.prompts import PromptTable, Table, Tokens, prompt_table

Loss = Literal["cosine", "l1", "l2"]

NOISE = 1 / 20  # of the embeddings' standard deviation, as in the source
CHECKPOINTS = 20
DIRECTIONS = 16  # random directions in which the sequential search predicts errors


@dataclass(frozen=True, eq=False, repr=False)
class Texts(Table):
    """The texts of the tokens found, one row per token; empty if none was found."""

    text: tuple[str, ...]


class InputReconstructionResult(TokenResult):
    """The token found for every token, and the distance of its state. Memory scales with the number of tokens."""

    prompt: PromptTable
    step: tuple[str, ...]
    found_text: Texts
    correct: Float[Tensor, " token"] = measured(
        "whether the token found is that of the prompt, or has the same embedding", low=0, high=1
    )
    found: Int[Tensor, " token"] = measured("id of the token found", low=0, missing=-1, into="vocab")
    decoded: Float[Tensor, " token"] = measured("whether the embedding plus noise decodes to its token", low=0, high=1)
    candidates: Int[Tensor, " token"] = measured("number of candidate tokens that were checked", low=0, missing=-1)
    distance: Float[Tensor, " token"] = measured("distance of the state of the token found", low=0)
    soft_distance: Float[Tensor, " token"] = measured("distance of the state of the soft embedding", low=0)
    noise_distance: Float[Tensor, " token"] = measured("distance of the state of the embedding plus noise", low=0)
    state_norm: Float[Tensor, " token"] = measured("length of the prompt's state", low=0)
    steps: Int[Tensor, " prompt"] = measured("number of gradients computed", low=0)
    path_loss: Float[Tensor, "step prompt"] = measured("loss during the search", low=0)
    path_accuracy: Float[Tensor, "step prompt"] = measured("share of tokens found during the search", low=0, high=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.found_text) != len(self.token):
            raise ValueError(
                f"InputReconstructionResult must have a text for every token; got {len(self.found_text)} texts for "
                f"{len(self.token)} tokens"
            )

    @derived("state distance / noise distance", low=0)
    def relative_distance(self) -> Float[Tensor, " token"]:
        """Distance of the state of the soft embedding (gradient) or of the token found, divided by `noise_distance`."""
        return (self.soft_distance if self._descended else self.distance) / self.noise_distance

    @derived("share of the other prompts' tokens that are this token", low=0, high=1)
    def chance(self) -> Float[Tensor, " token"]:
        """The probability that a token drawn from the other prompts is this one; NaN with a single prompt."""
        shares = torch.full((len(self.token),), torch.nan)
        for number, own in self.token.by_prompt():
            others = self.token.id[(self.token.prompt != number) & ~self.token.special]
            if len(others):
                shares[self.token.prompt == number] = (own.id[:, None] == others).float().mean(1)
        return shares.masked_fill(self.token.special, torch.nan)

    @derived("share of tokens found", low=0, high=1)
    def accuracy(self) -> Float[Tensor, " prompt"]:
        """The share of each prompt's searched tokens that was found. A sequential search ends where it gives up."""
        return torch.stack([self.correct[self.token.prompt == number].nanmean() for number in self.prompt.prompt])

    @derived("whether the whole prompt was found", low=0, high=1)
    def exact(self) -> Float[Tensor, " prompt"]:
        """1 if the whole prompt was found, else 0."""
        right = (self.correct == 1) | self.token.special
        return torch.stack([right[self.token.prompt == number].all() for number in self.prompt.prompt]).float()

    def table(self) -> pd.DataFrame:
        """One row per token: the token, the token found, and how far the search went."""
        columns = {
            name: getattr(self, name).numpy() for name in ("correct", "candidates", "distance", "noise_distance")
        }
        token = self.token.to_frame()[["prompt", "position", "text", "word_class"]]
        return token.assign(found=list(self.found_text.text), **columns)

    def by_position(self) -> pd.DataFrame:
        """One row per position: accuracy with its interval over prompts, and its baselines.

        Prompts have equal weights; the interval is clipped to 0 to 1. `decode_only` and `chance` are the baselines.
        `median_candidates` and `median_distance` are medians over tokens, of `candidates` and `relative_distance`.
        """
        return self._accuracy_by("position")

    def accuracy_by_word_class(self) -> pd.DataFrame:
        """The table of `by_position` with one row per word class; `by_word_class` describes every quantity."""
        return self._accuracy_by("word_class")

    def _accuracy_by(self, label: str) -> pd.DataFrame:
        order, tokens = inference.in_own_order(self.token)
        means = ["correct", "decoded", "chance"]
        values = {name: self.known(name)[order] for name in (*means, "candidates", "relative_distance")}
        frame: Any = tokens.to_frame().assign(**values)
        rows = []
        for each, own in frame[frame["correct"].notna() & (frame[label] != "")].groupby(label):
            of_prompts = own.groupby("prompt")[means].mean()
            low, high = inference.mean_interval(of_prompts["correct"].to_numpy()[None]).clip(0, 1)  # a share
            rows.append(
                {
                    label: each,
                    "accuracy": of_prompts["correct"].mean(),
                    "low": low[0],
                    "high": high[0],
                    "decode_only": of_prompts["decoded"].mean(),
                    "chance": of_prompts["chance"].mean(),
                    "median_candidates": own["candidates"].median(),
                    "median_distance": own["relative_distance"].median(),
                    "tokens": len(own),
                    "prompts": len(of_prompts),
                }
            )
        return pd.DataFrame(rows)

    def gave_up(self) -> pd.DataFrame:
        """The tokens at which a sequential search gave up, one row each. Later tokens were not searched."""
        last = (self.found < 0) & (self.candidates > 0)
        frame = self.token[last].to_frame()[["prompt", "position", "text", "word_class"]]
        return frame.assign(candidates=self.candidates[last].numpy())

    def compare_with(self, other: "InputReconstructionResult") -> pd.DataFrame:
        """Accuracy in this model and in another (an untrained one) on the same prompts, at the end and at equal loss.

        "At equal loss": each prompt is evaluated at the step where its loss first reached the larger of the two models'
        lowest losses. The interval is Student's t over prompts; p swaps the two models at random, prompt by prompt; q
        is over both rows.
        """
        self.check_comparable(other)
        order = inference.prompt_order(self.token)
        floor = torch.maximum(self.path_loss.amin(0), other.path_loss.amin(0))
        own, others = (
            torch.stack([each.accuracy, each._accuracy_at(floor)])[:, order].double().numpy() for each in (self, other)
        )
        return paired(
            pd.DataFrame({"when": ["at the end", "at equal loss"]}),
            own - others,
            says="difference of the accuracies",
            null="the accuracy of a prompt is as likely in one model as in the other",
            accuracy=own.mean(1),
            other=others.mean(1),
            prompts=own.shape[1],
        )

    def _accuracy_at(self, loss: Float[Tensor, " prompt"]) -> Float[Tensor, " prompt"]:
        """The accuracy at the step where the loss was first this low."""
        first = (self.path_loss <= loss).int().argmax(0)
        return self.path_accuracy.gather(0, first[None])[0]

    def figure(self, **look: Unpack[figures.Look]) -> go.Figure:
        """Accuracy by position beside its baselines, and the distance of the states over the yardstick."""
        table = self.by_position()
        if not len(table):
            raise ValueError("no token of these prompts was searched for, and there is nothing to draw: pass text")
        mean, low, high, decode, chance, distance = (
            list(table[name]) for name in ("accuracy", "low", "high", "decode_only", "chance", "median_distance")
        )
        shares = [
            figures.Line("found", mean, low, high, figures.CHOSEN),
            figures.Line("decoding alone", decode, colour="#E69F00", dashed=True),
            figures.Line("drawn by frequency", chance, colour=figures.GREY, dashed=True),
        ]
        one = figures.Line("the yardstick", [1.0] * len(table), colour=figures.GREY, dashed=True)
        median = figures.Line(f"median, of the {'soft embeddings' if self._descended else 'tokens found'}", distance)
        return figures.lines(
            {
                self.quantity("accuracy").title: shares[: 2 if np.isnan(chance).all() else 3],
                self.quantity("relative_distance").title: [median, one],
            },
            [str(position) for position in table["position"]],
            title=self.title("Tokens found, and distance of their states, per position"),
            x_title="position in the prompt",
            **look,
        )

    def figure_prompt(self, prompt: int = 0, **look: Unpack[figures.Look]) -> go.Figure:
        """The tokens of a prompt, and those that were found in their places."""
        rows = self.token.rows(prompt)
        correct = self.correct.masked_fill(self.token.special, 1)[rows].tolist()  # special tokens were given
        texts = [[texts[row] for row in rows] for texts in (self.token.text, self.found_text.text)]
        return figures.heatmap(
            [[1.0] * len(rows), correct],
            x=[str(i) for i in range(len(rows))],
            y=["prompt", "found"],
            title=self.title(f"Tokens of prompt {prompt}, and the tokens found in their places"),
            x_title="position in the prompt",
            y_title="",
            colour_title="found (0 or 1)",
            low=0.0,
            high=1.0,
            text=[[figures.visible(each, 10) for each in line] for line in texts],
            **look,
        )

    def conditions(self) -> str:
        """The activation and the method."""
        return f"{self.provenance.read}, {'gradient descent' if self._descended else 'sequential search'}"

    @property
    def _descended(self) -> bool:
        return bool(self.candidates.max() < 0)


class InputReconstruction(TextExperiment[InputReconstructionResult]):
    """Reconstruct each prompt from its states at one read point of one layer.

    Gradient: `loss`, `steps`, `restarts` (in parallel; the lowest loss counts) and `learning_rate`, in standard
    deviations of the embeddings (Adam; it falls to a tenth). Sequential: at most `max_candidates` per token;
    `tolerance` None is the square root of the precision (3.5e-4 in float32, 0.09 in bfloat16). The search of a prompt
    ends at the first token that it does not find. After an interrupt the result holds the prompts done so far.

    >>> import lens_probes as lp
    >>> search = lp.InputReconstruction(layer=1, method="sequential")
    >>> search.run(lp.tiny.bridge(), "Time flies like an arrow.", progress=False).exact
    tensor([1.])
    """

    layer: int
    at: ReadPoint = "resid_post"
    method: Literal["gradient", "sequential"] = "gradient"
    loss: Loss = "l2"
    steps: Positive = 300
    restarts: Positive = 3
    learning_rate: Rate = 0.3
    max_candidates: Positive = 2000
    tolerance: Rate | None = None
    seed: Seed = 0

    def perform(self, study: Study) -> InputReconstructionResult:
        """One prompt at a time."""
        view = study.view
        if self.method == "sequential" and view.encoder:
            raise ValueError(
                f"method='sequential' needs states that depend on earlier tokens only; got {view.name}, where every "
                f"state depends on later ones too: use method='gradient'"
            )
        study.tokens.check_text()
        layer = SoftTokens(view, view.hook(self.at, self.layer))
        return study.by_prompt(lambda own: self._of_prompt(study, layer, own), doing="reconstructing")

    def _of_prompt(self, study: Study, layer: SoftTokens, own: Tokens) -> InputReconstructionResult:
        random = seeded(own.id.numpy().tobytes(), self.seed)
        goal, true = layer.states(own.id), layer.vocabulary[own.id]
        noisy = true + torch.randn(true.shape, generator=random).to(true) * layer.spread.mean() * NOISE
        noise_distance = (layer.soft(noisy[None], own.id).detach()[0] - goal).norm(dim=-1)
        method = self._descend if self.method == "gradient" else self._search
        reached = method(layer, own, goal, random)
        found = reached["found"]
        until = int((found >= 0).sum())  # a search that gives up finds no later tokens
        distance = torch.full(noise_distance.shape, torch.nan)
        if until:
            distance[:until] = (layer.states(found[:until]) - goal[:until]).norm(dim=-1).cpu()
        unasked = own.special | (torch.arange(len(own)) > until)
        decoded = layer.same(layer.nearest(noisy), own.id).float()
        return InputReconstructionResult(
            token=own,
            prompt=prompt_table(own),
            step=tuple(str(step) for step in self._checkpoints()),
            found_text=Texts(tuple(study.view.token_texts([i])[0] if i >= 0 else "" for i in found.tolist())),
            correct=layer.same(found, own.id).float().masked_fill(unasked, torch.nan),
            decoded=decoded.masked_fill(own.special, torch.nan),
            distance=distance,
            noise_distance=noise_distance.cpu(),
            state_norm=goal.norm(dim=-1).cpu(),
            **reached,
            provenance=study.provenance([study.view.hook_token_embed, layer.hook], own),
        )

    def _checkpoints(self) -> list[int]:
        """The steps at which loss and accuracy are recorded; for a sequential search, its end only."""
        if self.method == "sequential":
            return [0]
        return sorted({round(self.steps * i / CHECKPOINTS) for i in range(CHECKPOINTS + 1)})

    def _descend(
        self, layer: SoftTokens, own: Tokens, goal: Float[Tensor, "token d"], random: torch.Generator
    ) -> dict[str, Tensor]:
        """Gradient descent on soft embeddings, all restarts in parallel. Special tokens keep their embeddings."""
        given, true, asked = own.special.to(goal.device)[:, None], layer.vocabulary[own.id], ~own.special
        noise = torch.randn(self.restarts, *true.shape, generator=random).to(true)

        def project(soft: Tensor, _: int) -> Tensor:
            return torch.where(given, true, soft)

        def height(soft: Tensor, _: int) -> Tensor:
            return -mean_loss(self.loss, layer.soft(soft, own.id)[:, asked], goal[asked])

        path = ascend(
            project(layer.mean + noise * layer.spread, 0),
            height,
            self.steps,
            rate=self.learning_rate * float(layer.spread.mean()),
            final=0.1,
            project=project,
        )
        noted, soft = [], true[None]
        for step, (soft, reached, _) in enumerate(path):
            if step in self._checkpoints():
                right = layer.same(layer.nearest(soft), own.id.expand(self.restarts, -1))[:, asked]
                noted.append(torch.stack([-reached.cpu(), right.float().mean(1)]))
        losses, accuracies = torch.stack(noted, dim=1)  # [step restart] each
        best = int(losses[-1].nan_to_num(torch.inf).argmin())
        states = layer.soft(soft, own.id)[best].detach()
        return {
            "found": torch.where(own.special, own.id, layer.nearest(soft[best])),
            "candidates": torch.full_like(own.id, -1),
            "soft_distance": (states - goal).norm(dim=-1).cpu(),
            "steps": torch.tensor([self.steps]),
            "path_loss": losses[:, [best]],
            "path_accuracy": accuracies[:, [best]],
        }

    def _search(
        self, layer: SoftTokens, own: Tokens, goal: Float[Tensor, "token d"], random: torch.Generator
    ) -> dict[str, Tensor]:
        """Search token by token, until one is not found."""
        directions = torch.randn(DIRECTIONS, goal.shape[-1], generator=random).to(goal)
        tolerance = self.tolerance or torch.finfo(layer.view.W_E.dtype).eps ** 0.5
        given = torch.where(own.special, own.id, -1)
        found, tried, gradients = one_by_one(
            layer.after, given, goal, layer.vocabulary, directions, tolerance, self.max_candidates
        )
        loss = torch.tensor(torch.nan)
        if (found >= 0).all():
            loss = mean_loss(self.loss, layer.states(found)[~own.special], goal[~own.special]).cpu()
        return {
            "found": found,
            "candidates": tried,
            "soft_distance": torch.full(own.id.shape, torch.nan),
            "steps": torch.tensor([gradients]),
            "path_loss": loss[None, None],
            "path_accuracy": layer.same(found, own.id)[tried > 0].float().mean()[None, None],
        }


def mean_loss(
    loss: Loss, states: Float[Tensor, "*restart token d"], goal: Float[Tensor, "token d"]
) -> Float[Tensor, "*restart"]:
    """The mean over tokens of the distance between states and goal.

    >>> here, there = torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 5.0]])
    >>> [round(float(mean_loss(loss, here, there)), 3) for loss in ("cosine", "l1", "l2")]
    [0.2, 0.8, 0.632]
    """
    if loss == "cosine":
        return (1 - torch.cosine_similarity(states, goal, dim=-1)).mean(-1)
    order = 1 if loss == "l1" else 2
    return ((states - goal).norm(order, dim=-1) / goal.norm(order, dim=-1)).mean(-1)
