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
from typing import Annotated, Protocol, Unpack, runtime_checkable

import pandas as pd
import plotly.graph_objects as go
import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from lens_probes import figures
from lens_probes.maths import inference
from lens_probes.maths.vocabulary import Predictions, most_probable, predictions
from lens_probes.messages import amount, interval
from lens_probes.model import ModelView
from lens_probes.probe import Probe
from lens_probes.reading import Reading
from lens_probes.result import LayerTokenResult, Quantity, measured
from lens_probes.settings import Allowed, Count, Layers
from lens_probes.text.places import Positions, rows_at
from lens_probes.text.prompts import Tokens
from lens_probes.text.targets import (
    Target,
    Targets,
    asked_about,
    check_targets,
    plain,
    target_ids,
    target_name,
    target_of,
)

Translator = Annotated[
    Callable[[Float[Tensor, "token d_model"], str], Float[Tensor, "token d_model"]],
    Allowed(
        "a function (state [token d_model], layer label) -> state, such as the result of TunedLens().run(model, texts)",
        lambda value: not isinstance(value, type),
        restricts=False,
    ),
]

STATES_AT_ONCE = 2**23  # numbers in the states held in float32 at a time: 32 MiB, and a few copies of it
FARTHEST = 16.0  # nats: colours end there, or the first layers would leave none for the others
FINAL = "final"  # the hook from which the model itself predicts, beside those of the layers


@runtime_checkable
class FittedTranslator(Protocol):
    """A translator that was fitted on one model, such as a tuned lens, and can refuse another."""

    def check_model(self, model: ModelView, labels: Sequence[str]) -> None:
        """Raise unless it was fitted on this model, for the states with these labels."""


class LogitLensResult(LayerTokenResult):
    """What every state predicts. Memory scales with the number of tokens.

    Word classes are those of the target: with `target="next"` of the word that follows. Predictions made at special
    tokens, or of them, are left out of summaries.
    """

    target: Target | tuple[int, ...]
    translated: bool
    n_vocab: int
    target_token: Tokens
    vocab: dict[int, str]  # the texts of the entries that are named here
    log_prob: Float[Tensor, "layer token"] = measured("log-probability of the target", unit="nats", high=0)
    rank: Int[Tensor, "layer token"] = measured(
        "rank of the target", low=0, missing=-1, low_on_top=True, logarithmic=True
    )
    entropy: Float[Tensor, "layer token"] = measured("entropy of the prediction", unit="nats", low=0, low_on_top=True)
    kl: Float[Tensor, "layer token"] = measured("KL(final || layer)", unit="nats", low=0, low_on_top=True)
    target_id: Int[Tensor, " token"] = measured("the target; -1 for none or several", low=0, missing=-1, into="vocab")
    final_id: Int[Tensor, " token"] = measured(
        "the entry that the model itself finds most probable", low=0, missing=-1, into="vocab"
    )
    top_ids: Int[Tensor, "layer token k"] | None = measured(
        "the most probable entries, best first", low=0, missing=-1, into="vocab", default=None
    )
    top_log_prob: Float[Tensor, "layer token k"] | None = measured(
        "their log-probabilities", unit="nats", high=0, default=None
    )
    target_log_prob: Float[Tensor, "layer token target"] | None = measured(
        "log-probability of each fixed target", unit="nats", high=0, default=None
    )
    target_rank: Int[Tensor, "layer token target"] | None = measured("rank of each fixed target", low=0, default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_targets(self.token, self.target_token)
        fixed = () if isinstance(self.target, str) else self.target
        if self.n_vocab < 1 or not set(self.vocab) <= set(range(self.n_vocab)) or not set(fixed) <= set(self.vocab):
            raise ValueError(
                f"the texts and targets of a LogitLensResult must be of its vocabulary of {self.n_vocab}; got texts of "
                f"{len(self.vocab)} ids and target {self.target!r}"
            )

    def words(self) -> Tokens:
        """The tokens with the words that predictions are about: those that follow, where these are the targets.

        Raises where no target belongs to a word.
        """
        if not any(self.target_token.word_class):
            raise ValueError("no token here has a target that belongs to a word: pass longer texts, or another target")
        return self.target_token

    def decided_at(self) -> Int[Tensor, " token"]:
        """Index in `layer` of the first state from which the model's own top-1 stays on top; -1 if none.

        `result.layer[index]` is its label.
        """
        on_top = self._top()[0][..., 0] == self.final_id
        stays = on_top.int().flip(0).cumprod(0).sum(0)
        return torch.where(stays > 0, len(self.layer) - stays, -1)

    def agreement(self) -> pd.DataFrame:
        """By layer, the share of tokens whose most probable entry is the model's own choice, with its 95 % interval.

        `null`: the share if each state is paired with the model's choice at another token. Special tokens are excluded.
        """
        chosen = ~self.token.special
        top, own, tokens = self._top()[0][:, chosen, 0], self.final_id[chosen], self.token[chosen]
        same = (top == own).double().numpy()
        share, low, high = inference.token_means(same, tokens)
        null = [share_by_chance(each, own) for each in top]
        n = {"tokens": len(tokens), "prompts": len(tokens.prompt.unique())}
        layer = self.labels("layer")
        columns = {"agreement": share, "low": low, "high": high, "null": null, **n}
        return inference.with_layers(pd.DataFrame({"unit": range(len(layer)), **columns}), layer)

    def findings(self) -> list[str]:
        """From which layer on the model's own choice stays on top, and how near the last states are to it."""
        others = super().findings()
        if self.top_ids is None or self.token.special.all():
            return others
        chosen = ~self.token.special
        decided = self.decided_at()[chosen]
        settled = int(torch.where(decided < 0, len(self.layer), decided).median())
        verb = "settles at" if settled < len(self.layer) else "has not settled by"
        says = f"The median prediction {verb} {self.layer[: settled + 1][-1]}."
        table = self.agreement()
        unlike = table.query("agreement < 1").to_dict("records")  # the last state is the model's own
        if unlike and len(decided) > 1:
            near = unlike[-1]
            says += (
                f" At {near['layer']}, {near['agreement']:.0%} of predictions are the model's own choice "
                f"({interval(near['low'], near['high'], '.0%')}; {amount(near['tokens'], 'token')} of "
                f"{amount(near['prompts'], 'prompt')}). The null, the choices at other tokens: {near['null']:.0%}."
            )
        return [says, *others]

    def tokens_of_interest(self, token: int | str | None = None, prompt: int = 0) -> tuple[int, ...]:
        """The ids that are on top at any layer, of one token or (None) of all; in the order in which they come up.

        `LogitLens(target=result.tokens_of_interest(3))` follows them through every layer.
        """
        rows = slice(None) if token is None else [self.token.row(prompt, token)]
        return tuple(dict.fromkeys(self._top()[0][:, rows, 0].flatten().tolist()))

    def figure(
        self, prompt: int = 0, quantity: str = "log_prob", first: int = 0, **look: Unpack[figures.Look]
    ) -> go.Figure:
        """One prompt, layers across and tokens down; each cell its most probable entry, darker nearer to a decision.

        `quantity` is what the colour shows: log_prob, rank, entropy or kl; log-probabilities below -16 look alike, and
        so do divergences above 16. Sixty tokens are drawn, from number `first` on.
        """
        return self.draw_prompt(
            "Logit lens: most probable token per layer" if self.top_ids is not None else "Logit lens",
            prompt,
            quantity=quantity,
            first=first,
            farthest=FARTHEST,
            text=self._cell if self.top_ids is not None else None,
            hover=self._hover,
            **look,
        )

    def figure_classes(self, **look: Unpack[figures.Look]) -> go.Figure:
        """Median log-probability, rank and KL by word class over layers, with 95 % intervals."""
        question = "Logit lens: medians of log-probability, rank and KL by word class"
        return self.draw_classes(self.class_panels("log_prob", "rank", "kl"), question, **look)

    def figure_trajectories(self, token: int | str, prompt: int = 0, **look: Unpack[figures.Look]) -> go.Figure:
        """The entries that are on top at any layer at one token, the model's own choice bold, and their probabilities.

        A line breaks where its entry is not among the `top_k` that were kept; fixed targets are known at every layer.
        """
        row, fixed = self.token.row(prompt, token), () if isinstance(self.target, str) else self.target
        ids, log_prob = (values[:, row] for values in self._top())
        followed = {
            i: torch.where(ids == i, log_prob, -torch.inf).amax(-1).exp()
            for i in self.tokens_of_interest(token, prompt)
        }
        if self.target_log_prob is not None:
            followed |= {i: self.target_log_prob[:, row, n].exp() for n, i in enumerate(fixed)}
        chosen = int(self.final_id[row])
        others = sorted((i for i in followed if i != chosen), key=lambda i: (i not in fixed, -float(followed[i].max())))
        colours = dict(zip(others, figures.OTHER_COLOURS, strict=False)) | {chosen: figures.CHOSEN}
        paths = []
        for i, probability in followed.items():
            name = figures.spelled(self.vocab.get(i, "")) if i in colours else "others"
            group = f"{name} (the model's own choice)" if i == chosen else name
            kept = probability.masked_fill((probability == 0) & (i not in fixed), torch.nan).tolist()
            paths.append(figures.TokenPath(self.vocab.get(i, ""), group, kept, colours.get(i, figures.GREY)))
        position, text = int(self.token.position[row]), figures.quoted(self.token.text[row])
        return figures.paths(
            paths,
            bold=list(followed).index(chosen) if chosen in followed else 0,
            x=self.layer,
            title=self.title(f"Probability of the top entries at {text}, token {position} of prompt {prompt}"),
            x_title=figures.layer_title(self.layer),
            y_title="probability (0 to 1)",
            **look,
        )

    def quantity(self, name: str) -> Quantity:
        """What a tensor's numbers are; ranks and entropies end where the vocabulary of this run does."""
        highest = {"rank": self.n_vocab - 1, "target_rank": self.n_vocab - 1, "entropy": math.log(self.n_vocab)}
        asked = super().quantity(name)
        return asked._replace(high=highest.get(name, asked.high))

    def conditions(self) -> str:
        """The target, and whether states went through a translator."""
        return f"target: {target_name(self.target, self.vocab)}{'; through a translator' if self.translated else ''}"

    def _top(self) -> tuple[Int[Tensor, "layer token k"], Float[Tensor, "layer token k"]]:
        if self.top_ids is None or self.top_log_prob is None:
            raise ValueError("this needs the most probable entries, and they were not kept: run LogitLens(top_k=5)")
        return self.top_ids, self.top_log_prob

    def _cell(self, layer: int, row: int) -> str:
        return figures.visible(self.vocab.get(int(self._top()[0][layer, row, 0]), ""), 7)

    def _hover(self, layer: int, row: int) -> str:
        """The target and the most probable entries of one state, with probabilities."""
        lines = [f"{self.layer[layer]}, token {figures.visible(self.token.text[row])}"]
        log_prob = float(self.log_prob[layer, row])
        if not math.isnan(log_prob):
            name = figures.visible(self.vocab.get(int(self.target_id[row]), ""))
            lines.append(f"target {name}: p {math.exp(log_prob):.3g}, rank {self.rank[layer, row]:,}")
        lines.append(f"entropy {self.entropy[layer, row]:.2f}, KL {self.kl[layer, row]:.2f} nats")
        if self.top_ids is not None and self.top_log_prob is not None:
            best = zip(self.top_ids[layer, row].tolist(), self.top_log_prob[layer, row].exp().tolist(), strict=True)
            lines += [f"{p:.3f} {figures.visible(self.vocab.get(i, ''))}" for i, p in best]
        return "<br>".join(lines)


def share_by_chance(top: Int[Tensor, " token"], own: Int[Tensor, " token"]) -> float:
    """The share of pairs of two different tokens where the top entry at one is the model's own choice at the other.

    >>> round(share_by_chance(torch.tensor([5, 5, 7]), torch.tensor([5, 7, 7])), 2)  # two of six pairs
    0.33
    """
    if (n := len(top)) < 2:
        return math.nan
    size = 1 + int(torch.cat([top, own]).max())
    pairs = int((top.bincount(minlength=size) * own.bincount(minlength=size)).sum()) - int((top == own).sum())
    return pairs / (n * (n - 1))


class LogitLens(Probe[LogitLensResult]):
    """What every state predicts, through the model's own head.

    `target`: the token that really follows (`next`), the token itself (`own`), the model's own top-1 (`final`), or one
    or several tokens, by text (`" Paris"`, with its leading space) or id, asked at every token. Of several, `log_prob`
    is the log-probability of any of them and `rank` the best one's; `target_log_prob`, `target_rank` have each.
    `top_k`: how many of the most probable entries are kept. `incl_mid`: also the states between attention and MLP.
    `translator`: any `(state [token d_model], layer label) -> state`, such as the result of `TunedLens`. Layer 0 brings
    the embeddings, `0_pre`, with it. `positions`: the tokens to read, such as `-1`, `"bank"` or `slice(1, None)`.

    >>> import lens_probes as lp
    >>> model = lp.tiny.bridge()
    >>> result = lp.LogitLens().run(model, "Time flies like an arrow.")
    >>> result.layer, bool(result.kl[-1].max() < 1e-5)
    (('0_pre', '0_post', '1_post', '2_post'), True)
    >>> own = model(result.token.id[None]).log_softmax(-1)[0, :-1]  # the last row is the model's own prediction
    >>> bool(torch.allclose(result.log_prob[-1, :-1], own.gather(-1, result.token.id[1:, None])[:, 0], atol=1e-4))
    True
    """

    reads_head = True
    reads_stacks = True
    target: Targets = "next"
    top_k: Count = 5
    incl_mid: bool = False
    translator: Translator | None = None
    positions: Positions = None
    layers: Layers = None

    def __post_init__(self) -> None:
        if not isinstance(self.target, str | int):  # the repr of an array's ids is the call that makes it
            object.__setattr__(self, "target", plain(self.target))

    def hooks(self, model: ModelView) -> dict[str, str]:
        """The states of every layer, and the last one, which says what the model predicts."""
        model.check_has_head()
        points = model.stream(self.layers, incl_mid=self.incl_mid)
        if isinstance(self.translator, FittedTranslator):
            self.translator.check_model(model, list(points))
        target_of(self, "target", model)
        if self.top_k > model.d_vocab:
            raise ValueError(
                f"LogitLens(top_k=...) must be at most the {model.d_vocab} entries of {model.name}; got {self.top_k}"
            )
        return {**points, FINAL: model.hook("resid_post", -1)}

    def measure(self, reading: Reading) -> LogitLensResult:
        """Predictions of the batch, as many tokens at a time as there is room for."""
        reading.check_head()
        model, tokens, target = reading.model, reading.tokens, target_of(self, "target", reading.model, reading.tokens)
        fixed = () if isinstance(target, str) else target
        at_once = max(1, STATES_AT_ONCE // (len(reading.points) * model.d_model))
        kept = rows_at(tokens, self.positions)
        parts = [self._read(reading, rows, target) for rows in kept.split(at_once)]
        log_prob, rank, entropy, kl, top_ids, top_log_prob = (
            rearrange(torch.cat(each), "token layer ... -> layer token ...") for each in zip(*parts, strict=True)
        )
        if target == "final":
            target_id = top_ids[-1, :, 0]
        else:
            ids = target_ids(tokens, target)[kept]
            target_id = ids[:, 0] if ids.shape[1] == 1 else torch.full((len(kept),), -1)
        return self.result(
            reading,
            target=target,
            translated=self.translator is not None,
            n_vocab=model.d_vocab,
            layer=reading.layer[:-1],
            token=tokens[kept],
            target_token=asked_about(tokens, target)[kept],
            target_id=target_id,
            vocab=model.texts_of(
                target_id, top_ids[-1, :, 0], top_ids[:-1, :, : self.top_k], torch.tensor(fixed, dtype=torch.int64)
            ),
            log_prob=log_prob[:-1].logsumexp(-1),
            rank=rank[:-1].amin(-1),
            entropy=entropy[:-1],
            kl=kl[:-1],
            final_id=top_ids[-1, :, 0],
            top_ids=top_ids[:-1, :, : self.top_k] if self.top_k else None,
            top_log_prob=top_log_prob[:-1, :, : self.top_k] if self.top_k else None,
            target_log_prob=log_prob[:-1] if fixed else None,
            target_rank=rank[:-1] if fixed else None,
        )

    def _read(self, reading: Reading, rows: Int[Tensor, " row"], target: str | tuple[int, ...]) -> Predictions:
        """What these tokens' states predict; the last of their layers is the model's own last state, as it is."""
        model = reading.model
        states = [self._translated(reading[hook][rows], label) for label, hook in reading.points.items()]
        stacked = torch.stack([each.to(model.W_E.dtype) for each in states], dim=1)
        normed = model.normed(stacked.flatten(0, 1)).unflatten(0, stacked.shape[:2])
        head = {"vocabulary": model.unembedding, "bias": model.unembedding_bias, "cap": model.capped}
        if target == "final":
            targets = most_probable(normed[:, -1], **head)[:, None]
        else:
            targets = target_ids(reading.tokens, target)[rows].to(normed.device)
        found = predictions(normed, targets=targets, k=max(self.top_k, 1), **head)
        return Predictions(*(values.cpu() for values in found))

    def _translated(self, states: Float[Tensor, "token d_model"], label: str) -> Float[Tensor, "token d_model"]:
        if self.translator is None or label == FINAL:
            return states
        translated = self.translator(states.float(), label)
        if not isinstance(translated, Tensor) or translated.shape != states.shape:
            got = tuple(translated.shape) if isinstance(translated, Tensor) else type(translated).__name__
            raise ValueError(
                f"the translator must return one state per token, {tuple(states.shape)} at {label}; got {got}"
            )
        if not torch.isfinite(translated.to(states.dtype)).all():
            raise ValueError(
                f"the translator must return finite states; got NaN or Inf in {states.dtype} at {label}: scale it down"
            )
        return translated
