"""LogitLens: what would the model predict if it stopped at this layer?

Every state h is read as the model reads its last one, through final norm and unembedding (on BERT and RoBERTa the
language-model head), after an optional translator:

    logit[layer, token, v] = unembed(translator(h[layer, token]))[v],     p[layer, token] = softmax of it over v
    log_prob[layer, token] = log p[target]                                nats, at most 0
    rank[layer, token]     = #{v : logit[v] > logit[target]}              0 to vocab - 1
    entropy[layer, token]  = - sum_v p log p                              nats, 0 to log vocab
    kl[layer, token]       = KL(p_final || p) = sum_v p_final log(p_final / p)      nats, 0 or more; 0 in the last layer

p_final is what the model itself predicts there. The product with the vocabulary is in float32 whatever the model's
precision, in one pass that never holds all layers, tokens and entries. A token's prediction is of what follows it, in a
decoder; an encoder's is of the token itself, so ask it `target="own"`.

A model that is not read by final norm, unembedding and cap alone is refused, and one without a trained head.

Source: nostalgebraist 2020, "interpreting GPT: the logit lens", lesswrong.com/posts/AcKRB8wDpdaN6v6ru. Statistics and
translators as in Belrose et al. 2023, "Eliciting Latent Predictions from Transformers with the Tuned Lens",
arXiv 2303.08112.
"""

import math
from collections.abc import Callable, Sequence
from typing import get_args

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float, Int
from torch import Tensor

from lens_probes import figures
from lens_probes.experiments.tuned_lens import TunedLensResult
from lens_probes.maths import inference
from lens_probes.maths.vocabulary import Predictions, predictions
from lens_probes.messages import brief
from lens_probes.model import ModelView
from lens_probes.probe import Probe
from lens_probes.reading import Reading
from lens_probes.result import Result, measured
from lens_probes.settings import Layers
from lens_probes.text.prompts import Target, Tokens, asked_about, target_ids, whole_number

Translator = Callable[[Float[Tensor, "token d_model"], str], Float[Tensor, "token d_model"]]

STATES_AT_ONCE = 2**23  # numbers in the states held in float32 at a time: 32 MiB, and a few copies of it
FARTHEST = 16.0  # nats: colours end there, or the first layers would leave none for the others
SHOWN = {  # what a picture shows, and whether more of it is nearer to a decision
    "log_prob": ("log-probability of the target (nats)", True),
    "rank": ("rank of the target (0 is on top)", False),
    "entropy": ("entropy (nats)", False),
    "kl": ("KL(final || layer) (nats)", False),
}


class LogitLensResult(Result):
    """What every state predicts. It grows with the number of tokens."""

    target: str | tuple[int, ...]
    translated: bool
    n_vocab: int
    layer: tuple[str, ...]
    token: Tokens
    vocab: tuple[str, ...]  # the text of each id, unless top_k=0
    log_prob: Float[Tensor, "layer token"] = measured(
        "log-probability of the target, or of any of several; nats, NaN without a target", high=0
    )
    rank: Int[Tensor, "layer token"] = measured(
        "entries more probable than the target, or the best of several; -1 without", low=0, missing=-1
    )
    entropy: Float[Tensor, "layer token"] = measured("entropy of the prediction, nats", low=0)
    kl: Float[Tensor, "layer token"] = measured("KL(final || layer), nats", low=0)
    final_id: Int[Tensor, " token"] = measured("what the model itself predicts: its top-1", low=0)
    top_ids: Int[Tensor, "layer token k"] | None = measured(
        "the most probable entries, best first", low=0, into="vocab", default=None
    )
    top_log_prob: Float[Tensor, "layer token k"] | None = measured(
        "their log-probabilities, nats", high=0, default=None
    )
    target_log_prob: Float[Tensor, "layer token target"] | None = measured(
        "log-probability of each of the fixed ids, nats", high=0, default=None
    )
    target_rank: Int[Tensor, "layer token target"] | None = measured(
        "rank of each of the fixed ids", low=0, default=None
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        outside = [i for i in self.target if not 0 <= i < self.n_vocab] if isinstance(self.target, tuple) else []
        if outside or self.n_vocab < 1 or len(self.vocab) not in (0, self.n_vocab):
            raise ValueError(
                f"LogitLensResult has texts and targets of a vocabulary of {self.n_vocab}; got {len(self.vocab)} texts "
                f"and target {self.target!r}"
            )

    def decided_at(self) -> Int[Tensor, " token"]:
        """The number (in `layer`) of the first state from which the model's own top-1 stays on top; -1 if none."""
        on_top = self._top()[0][..., 0] == self.final_id
        stays = on_top.int().flip(0).cumprod(0).sum(0)
        return torch.where(stays > 0, len(self.layer) - stays, -1)

    def tokens_of_interest(self, token: int | str | None = None, prompt: int = 0) -> tuple[int, ...]:
        """The ids that are on top at any layer, of one token or (None) of all; in the order in which they come up.

        `LogitLens(target=result.tokens_of_interest(3))` follows them through every layer.
        """
        rows = slice(None) if token is None else [self.token.row(prompt, token)]
        return tuple(dict.fromkeys(self._top()[0][:, rows, 0].flatten().tolist()))

    def by_word_class(self, *, special: bool = False, weigh: inference.Weigh = "types") -> pd.DataFrame:
        """Log-probability, rank, entropy and KL by word class and layer: n, median, quartiles, interval of the median.

        With `target="next"` the class is that of the word that follows, and otherwise the token's own. Word types weigh
        equally unless `weigh="tokens"`. Predictions made at special tokens, or of them, are excluded unless `special`.
        """
        asked = asked_about(self.token, self.target)
        if not any(asked.word_class):
            raise ValueError("no token here has a target that belongs to a word: pass longer texts, or another target")
        return inference.by_word_class(self._quantities(), self.layer, asked, special=special, weigh=weigh)

    def compare(
        self,
        first: str = "content",
        second: str = "function",
        *,
        of: str = "log_prob",
        strata: inference.Strata | None = None,
        weigh: inference.Weigh = "types",
        permutations: int = inference.PERMUTATIONS,
        seed: int = 0,
    ) -> pd.DataFrame:
        """Per layer: the probability that a target of class `first` has the larger log_prob (or rank, ...), p, q and n.

        See `inference.compare`. `strata` is one label or number per token of this result, about its target: for
        frequency matching `lens_probes.text.words.merge_order(model.tokenizer)[result.target_id()]`.
        """
        return inference.compare_by_layer(
            self._quantities(),
            of,
            self.layer,
            asked_about(self.token, self.target),
            first,
            second,
            strata=strata,
            weigh=weigh,
            permutations=permutations,
            seed=seed,
        )

    def target_id(self) -> Int[Tensor, " token"]:
        """The id that each token was asked for, -1 where there is none or there are several."""
        if self.target == "final":
            return self.final_id
        ids = target_ids(self.token, self.target)
        return ids[:, 0] if ids.shape[1] == 1 else torch.full_like(self.final_id, -1)

    def _top(self) -> tuple[Int[Tensor, "layer token k"], Float[Tensor, "layer token k"]]:
        if self.top_ids is None or self.top_log_prob is None:
            raise ValueError("the most probable entries are asked for and were not kept: run LogitLens(top_k=5)")
        return self.top_ids, self.top_log_prob

    def _quantities(self) -> dict[str, inference.Values]:
        """What is summarised, as float64 with NaN for missing."""
        return {
            "log_prob": self.log_prob.double().numpy(),
            "rank": self.rank.double().masked_fill(self.rank < 0, torch.nan).numpy(),
            "entropy": self.entropy.double().numpy(),
            "kl": self.kl.double().numpy(),
        }

    def figure(self, prompt: int = 0, *, of: str = "log_prob", first: int = 0) -> go.Figure:
        """One prompt, layers across and tokens down; each cell its most probable entry, darker nearer to a decision.

        `of` is what the colour shows: log_prob, rank, entropy or kl; log-probabilities below -16 look alike, and so do
        divergences above 16. Sixty tokens are drawn, from number `first` on.
        """
        whole_number("first", first)
        if first < 0:
            raise ValueError(f"figure(first=...) is the number of a token, from 0 on; {first} came")
        if of not in tuple(SHOWN):
            raise ValueError(f"figure(of=...) is one of {', '.join(SHOWN)}; {brief(of)} came")
        rows = self.token.rows(prompt)[first : first + figures.ROWS]
        if not rows:
            raise ValueError(f"token {first} was asked for and prompt {prompt} ends before it: start at an earlier one")
        says, more_is_nearer = SHOWN[of]
        bounds = {"log_prob": (-FARTHEST, 0.0), "entropy": (0.0, math.log(self.n_vocab)), "kl": (0.0, FARTHEST)}
        low, high = bounds.get(of, (None, None))
        values = getattr(self, of)[:, rows].T.double()
        values = values.masked_fill(values < 0, torch.nan) if of == "rank" else values
        last = first + len(rows) - 1
        return figures.heatmap(
            values.tolist(),
            x=self.layer,
            y=[f"{figures.visible(self.token.text[i], 14)} {self.token.position[i]}" for i in rows],
            title=self._title(
                f"What would the model predict if it stopped here? Prompt {prompt}, tokens {first} to {last}"
            ),
            x_title="state",
            y_title="token",
            colour_title=says,
            low=low,
            high=high,
            dark_is_high=more_is_nearer,
            logarithmic=of == "rank",
            text=self._cells(rows),
            hover=[[self._hover(layer, i) for layer in range(len(self.layer))] for i in rows],
        )

    def figure_trajectories(self, token: int | str, prompt: int = 0) -> go.Figure:
        """The entries that are on top at any layer at one token, the model's own choice bold, and their probabilities.

        A line breaks where its entry is not among the `top_k` that were kept; fixed targets are known at every layer.
        """
        row = self.token.row(prompt, token)
        ids, log_prob = (values[:, row] for values in self._top())
        followed = {
            i: torch.where(ids == i, log_prob, -torch.inf).amax(-1) for i in self.tokens_of_interest(token, prompt)
        }
        if self.target_log_prob is not None:
            followed |= {int(i): self.target_log_prob[:, row, n] for n, i in enumerate(self.target)}
        chosen = int(self.final_id[row])
        others = sorted((i for i in followed if i != chosen), key=lambda i: -float(followed[i].max()))
        others.sort(key=lambda i: isinstance(self.target, str) or i not in self.target)  # those asked for first
        colours = dict(zip(others, figures.OTHER_COLOURS, strict=False)) | {chosen: figures.CHOSEN}
        return figures.paths(
            [
                figures.TokenPath(
                    self.vocab[i],
                    figures.spelled(self.vocab[i]) + (" (the model's own choice)" if i == chosen else "")
                    if i in colours
                    else "others",
                    _probabilities(values),
                    colours.get(i, figures.GREY),
                )
                for i, values in followed.items()
            ],
            bold=list(followed).index(chosen) if chosen in followed else 0,
            x=self.layer,
            title=self._title(f"Which entries come up at token {token} of prompt {prompt}, {self.token.text[row]!r}?"),
            x_title="state",
            y_title="probability (0 to 1)",
        )

    def figure_classes(self) -> go.Figure:
        """Median log-probability, rank and KL by word class over layers, with 95 % intervals."""
        table = self.by_word_class()
        ranks = table["quantity"] == "rank"
        bounds = ["median", "low", "high"]
        table.loc[ranks, bounds] += 1  # a logarithmic axis has no 0
        shown = figures.shown_classes(table)
        titles = {"log_prob": SHOWN["log_prob"][0], "rank": "1 + rank of the target", "kl": SHOWN["kl"][0]}
        return figures.lines(
            {title: figures.class_lines(table, of, shown) for of, title in titles.items()},
            self.layer,
            title=self._title(f"When is the {self._target_name()} known?"),
            x_title="state",
            upside_down=[titles["rank"], titles["kl"]],
            logarithmic=[titles["rank"]],
        )

    def _cells(self, rows: list[int]) -> list[list[str]]:
        if self.top_ids is None:
            return [[""] * len(self.layer) for _ in rows]
        return [[figures.visible(self.vocab[i], 7) for i in self.top_ids[:, row, 0].tolist()] for row in rows]

    def _hover(self, layer: int, row: int) -> str:
        """The target and the most probable entries of one state, with probabilities."""
        lines = [f"{self.layer[layer]}, token {figures.visible(self.token.text[row])}"]
        log_prob = float(self.log_prob[layer, row])
        if not math.isnan(log_prob):
            lines.append(f"target: p {math.exp(log_prob):.3g}, rank {self.rank[layer, row]:,}")
        lines.append(f"entropy {self.entropy[layer, row]:.2f}, KL {self.kl[layer, row]:.2f} nats")
        if self.top_ids is not None and self.top_log_prob is not None:
            best = zip(self.top_ids[layer, row].tolist(), self.top_log_prob[layer, row].exp().tolist(), strict=True)
            lines += [f"{p:.3f} {figures.visible(self.vocab[i])}" for i, p in best]
        return "<br>".join(lines)

    def _target_name(self) -> str:
        names = {"next": "next token", "own": "token itself", "final": "model's own choice"}
        return names[self.target] if isinstance(self.target, str) else "asked token"

    def _title(self, question: str) -> str:
        through = "through a translator, " if self.translated else ""
        return f"{question}\ntarget: {self._target_name()}; {through}{self.provenance.describe()}"


class LogitLens(Probe[LogitLensResult]):
    """What every state predicts, through the model's own head.

    `target`: the token that really follows (`next`), the token itself (`own`), the model's own top-1 (`final`), or one
    or several ids asked at every token; of several, `log_prob` is that of any of them and `rank` the best one's, and
    `target_log_prob`, `target_rank` have each. `top_k`: how many of the most probable entries are kept. `incl_mid`:
    also the states between attention and MLP. `translator`: any `(state [token d_model], layer label) -> state`, such
    as the result of `TunedLens`. Layer 0 brings the embeddings, `0_pre`, with it.

    >>> import lens_probes as lp
    >>> model = lp.tiny.bridge()
    >>> result = lp.LogitLens().run(model, "Time flies like an arrow.")
    >>> result.layer, bool(result.kl[-1].max() < 1e-5)
    (('0_pre', '0_post', '1_post', '2_post'), True)
    >>> own = model(result.token.id[None]).log_softmax(-1)[0, :-1]  # the last row is the model's own prediction
    >>> bool(torch.allclose(result.log_prob[-1, :-1], own.gather(-1, result.token.id[1:, None])[:, 0], atol=1e-4))
    True
    """

    target: Target | int | Sequence[int] | np.ndarray | Tensor = "next"
    top_k: int = 5
    incl_mid: bool = False
    translator: Translator | None = None
    layers: Layers = None

    def __post_init__(self) -> None:
        fixed = self._fixed()
        if not isinstance(self.target, str) and (not fixed or len(set(fixed)) < len(fixed) or min(fixed) < 0):
            raise ValueError(f"LogitLens(target=...) lists ids, each once and from 0 on; {brief(self.target)} came")
        if not isinstance(self.target, str | int):
            object.__setattr__(self, "target", fixed)  # so that the repr of an array's ids is the call that makes it
        if not isinstance(self.top_k, int) or self.top_k < 0:
            raise ValueError(f"LogitLens(top_k=...) is a number of entries, at least 0; {self.top_k} came")
        if self.translator is not None and (not callable(self.translator) or isinstance(self.translator, type)):
            raise TypeError(
                f"LogitLens(translator=...) is a function (state [token d_model], layer label) -> state, such as what "
                f"TunedLens().run(model, texts) or TunedLensResult.load(path) gives; {brief(self.translator)} came"
            )

    def hooks(self, model: ModelView) -> list[str]:
        """The states of every layer, and the last one, which says what the model predicts."""
        model.check_head()
        if isinstance(self.translator, TunedLensResult):
            self.translator.check(model, list(self._points(model)))
        outside = [i for i in self._fixed() if not 0 <= i < model.d_vocab]
        if outside:
            raise ValueError(
                f"target {outside[0]} was asked for and the ids of {model.name} end at {model.d_vocab - 1}"
            )
        if self.top_k > model.d_vocab:
            raise ValueError(f"top_k={self.top_k} was asked for and the vocabulary of {model.name} has {model.d_vocab}")
        return list(dict.fromkeys([*self._points(model).values(), model.hook("resid_post", -1)]))

    def measure(self, reading: Reading) -> LogitLensResult:
        """Predictions of the batch, as many tokens at a time as there is room for."""
        model, tokens, fixed = reading.model, reading.tokens, self._fixed()
        points = self._points(model)
        at_once = max(1, STATES_AT_ONCE // ((len(points) + 1) * model.d_model))
        parts = [self._read(reading, rows) for rows in torch.arange(len(tokens)).split(at_once)]
        log_prob, rank, entropy, kl, ids, best = (torch.cat(each).transpose(0, 1) for each in zip(*parts, strict=True))
        return LogitLensResult(
            target=fixed or str(self.target),
            translated=self.translator is not None,
            n_vocab=model.d_vocab,
            layer=tuple(points),
            token=tokens,
            vocab=model.vocabulary_texts if self.top_k else (),
            log_prob=log_prob[:-1].logsumexp(-1),
            rank=rank[:-1].amin(-1),
            entropy=entropy[:-1],
            kl=kl[:-1],
            final_id=ids[-1, :, 0],
            top_ids=ids[:-1, :, : self.top_k] if self.top_k else None,
            top_log_prob=best[:-1, :, : self.top_k] if self.top_k else None,
            target_log_prob=log_prob[:-1] if fixed else None,
            target_rank=rank[:-1] if fixed else None,
        )

    def _points(self, model: ModelView) -> dict[str, str]:
        return model.stream(self.layers, incl_mid=self.incl_mid)

    def _read(self, reading: Reading, rows: Int[Tensor, " row"]) -> Predictions:
        """What these tokens' states predict; the last layer is the model's own last state, as it is."""
        model = reading.model
        states = [self._translated(reading[hook][rows], label) for label, hook in self._points(model).items()]
        states.append(reading[model.hook("resid_post", -1)][rows])
        size = (len(rows), len(states))
        normed = model.normed(torch.stack([state.to(model.W_E.dtype) for state in states], dim=1).flatten(0, 1))
        normed = normed.unflatten(0, size)

        def read(states: Tensor, targets: Tensor) -> Predictions:
            k = max(self.top_k, 1)
            weight, bias = model.unembedding, model.unembedding_bias
            return predictions(states, weight, bias, targets.to(states.device), k, cap=model.capped)

        if self.target == "final":
            nothing = torch.empty(len(rows), 0, dtype=torch.int64)
            targets = read(normed[:, -1:], nothing).top_ids[:, 0, :1]
        else:
            targets = target_ids(reading.tokens, self._fixed() or str(self.target))[rows]
        return Predictions(*(values.cpu() for values in read(normed, targets)))

    def _translated(self, states: Float[Tensor, "token d_model"], label: str) -> Float[Tensor, "token d_model"]:
        if self.translator is None:
            return states
        translated = self.translator(states.float(), label)
        if not isinstance(translated, Tensor) or translated.shape != states.shape:
            came = tuple(translated.shape) if isinstance(translated, Tensor) else type(translated).__name__
            raise ValueError(f"the translator gave {came} for the states {tuple(states.shape)} at {label}: one a token")
        if not torch.isfinite(translated.to(states.dtype)).all():
            raise ValueError(
                f"the translator gave numbers at {label} that are not finite in {states.dtype}: smaller ones"
            )
        return translated

    def _fixed(self) -> tuple[int, ...]:
        """The ids that are asked at every token, none where the target is named."""
        if isinstance(self.target, str) and self.target in get_args(Target):
            return ()
        try:
            ids = torch.as_tensor(self.target).flatten()
        except (TypeError, ValueError, RuntimeError):
            ids = torch.empty(1)
        if len(ids) and (ids.is_floating_point() or ids.dtype == torch.bool):
            named = ", ".join(get_args(Target))
            raise ValueError(
                f"LogitLens(target=...) is one of {named}, or token ids; {brief(self.target)} came: for a text, pass "
                f"the ids that the model's tokenizer gives it"
            )
        return tuple(ids.tolist())


def _probabilities(log_prob: Float[Tensor, " layer"]) -> list[float]:
    """NaN where the entry was not kept."""
    return [p if p > 0 else math.nan for p in log_prob.exp().tolist()]
