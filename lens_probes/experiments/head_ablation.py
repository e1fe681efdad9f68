"""HeadAblation: how many heads does a trained model need?

Heads are silenced one after another (set to their mean over the prompts that they were ordered on), in the order of a
statistic of `AttentionPatterns`, highest first, and in random orders:

    L[step, prompt] = mean -log p(next token) of a prompt with the first count[step] heads silenced          nats

If the order does not matter, neither does the statistic. Table 3 of the source varies the number of heads too, but
trains every variant anew: a model can learn to do with fewer, and what is silenced here was learned to be there.

Source: Vaswani et al. 2017, "Attention Is All You Need", arXiv 1706.03762, Table 3; Michel et al. 2019, "Are Sixteen
Heads Really Better than One?", arXiv 1905.10650.
"""

from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from lens_probes import figures
from lens_probes.maths import inference
from lens_probes.messages import brief
from lens_probes.model import ModelView
from lens_probes.model.ablation import Ablation
from lens_probes.probe import Experiment, run
from lens_probes.probes.attention_patterns import STATISTICS, AttentionPatterns, Statistic
from lens_probes.probes.head_topic_similarity import HeadTopicSimilarity
from lens_probes.reading import prompt_loss
from lens_probes.result import Result, measured, provenance
from lens_probes.settings import Layers
from lens_probes.text.prompts import Prompts, PromptTable, as_prompts, first_part, prompt_table, tokenize

NULL = "the order of the statistic is as good as a random order"


class HeadAblationResult(Result):
    """The loss of every prompt with more and more heads silenced, in order and in random orders."""

    statistic: str
    prompt: PromptTable
    step: tuple[str, ...]
    loss: Float[Tensor, " prompt"] = measured("mean -log p(next token) of a prompt, nats", low=0)
    count: Int[Tensor, " step"] = measured("heads silenced", low=0)
    ordered: Float[Tensor, "step prompt"] = measured("loss, silenced in the order of the statistic", low=0)
    random: Float[Tensor, "draw step prompt"] = measured("loss, silenced in random orders", low=0)
    order: Int[Tensor, " head"] = measured("the heads in order, layers laid end to end", low=0)

    def table(self) -> pd.DataFrame:
        """One row per step: the loss in order with its interval, that of random orders, p (two-sided) and q."""
        place = np.argsort(np.asarray(self.prompt.text), kind="stable")
        ordered = self.ordered.double().numpy()[:, place]
        drawn = self.random.double().mean(-1).numpy()  # draw step
        low, high = inference.mean_interval(ordered)
        frame = pd.DataFrame(
            {
                "heads": self.count.tolist(),
                "loss": ordered.mean(1),
                "low": low,
                "high": high,
                "random": drawn.mean(0),
                "random_low": drawn.min(0),
                "random_high": drawn.max(0),
                "p": inference.permutation_p(ordered.mean(1), drawn),
                "q": np.nan,
            }
        ).assign(prompts=ordered.shape[1], draws=len(drawn), loss_of_all=float(self.loss.mean()))
        frame["q"] = inference.false_discovery(frame["p"].to_numpy())
        frame.attrs["null"] = NULL
        return frame

    def figure(self) -> go.Figure:
        """Loss against the number of heads silenced; the band of random orders is their range."""
        table, start = self.table(), [float(self.loss.mean())]
        own, low, high = ([*start, *table[name]] for name in ("loss", "low", "high"))
        random, lowest, highest = ([*start, *table[name]] for name in ("random", "random_low", "random_high"))
        ordered = figures.Line(f"in the order of {self.statistic!r}, highest first", own, low, high, figures.CHOSEN)
        name = f"{len(self.random)} random orders (band: their range)"
        drawn = figures.Line(name, random, lowest, highest, figures.GREY, dashed=True)
        return figures.lines(
            {"loss (nats)": [ordered, drawn]},
            ["0", *self.step],
            title=f"How many heads does it need?\n{self.provenance.describe()}",
            x_title="heads silenced",
        )


class HeadAblation(Experiment[HeadAblationResult]):
    """Silence heads in the order of a statistic, at `steps` numbers of heads: steps x (1 + draws) passes.

    Ordered on one part of the prompts and measured on the other. Interrupted, it gives the random orders done so far.

    >>> import lens_probes as lp
    >>> result = lp.HeadAblation(steps=3, draws=2).run(lp.tiny.bridge(), lp.demo.sentences()[:6], progress=False)
    >>> result.count.tolist(), tuple(result.random.shape)
    ([4, 8, 12], (2, 3, 3))
    """

    statistic: Statistic = "first_token"
    steps: int = 6
    draws: int = 5
    layers: Layers = None
    fraction: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        if self.statistic not in STATISTICS:
            raise ValueError(
                f"HeadAblation(statistic=...) is one of {', '.join(STATISTICS)}; {brief(self.statistic)} came"
            )
        if self.steps < 1 or self.draws < 1:
            raise ValueError(f"HeadAblation(steps=..., draws=...) are 1 or more; {self.steps} and {self.draws} came")

    def run(self, model: Any, prompts: Prompts, *, progress: bool = True) -> HeadAblationResult:
        """Order on one part of the prompts, silence and measure on the other."""
        view = ModelView(model)
        view.check_predicts_next()
        tokens = tokenize(prompts, view)
        first = first_part(tokens, self.fraction)
        layers = view.layers(self.layers)
        asked = [AttentionPatterns(layers=self.layers), HeadTopicSimilarity(layers=self.layers)]
        attention, heads = run(asked, model, as_prompts(tokens[first]), progress=False)
        by_statistic = attention.mean_of(self.statistic).flatten()
        if by_statistic.isnan().any():
            raise ValueError(
                f"no query has a value of {self.statistic!r} in the prompts that heads are ordered on: it needs tokens "
                f"that come twice, use longer prompts"
            )
        if self.steps > len(by_statistic):
            raise ValueError(f"steps={self.steps} were asked for and there are {len(by_statistic)} heads to silence")
        order = by_statistic.argsort(descending=True, stable=True)
        silence = Ablation(view, layers, "head", heads.vector.mean(2))
        rest = tokens[~first]
        count = torch.linspace(0, len(order), self.steps + 1).round().long()[1:]
        random = torch.Generator().manual_seed(self.seed)
        orders = [order, *(torch.randperm(len(order), generator=random) for _ in range(self.draws))]
        loss = prompt_loss(view, rest)
        passes: list[Float[Tensor, " prompt"]] = []
        plan = [each[: int(n)] for each in orders for n in count]
        try:
            for places in tqdm(plan, desc="silencing", unit="pass", disable=not progress):
                passes.append(prompt_loss(view, rest, silence(places)))
        except KeyboardInterrupt:
            if len(passes) < 2 * self.steps:
                raise
            tqdm.write(f"interrupted after {len(passes) // self.steps - 1} of {self.draws} random orders")
        whole = len(passes) // self.steps * self.steps
        losses = torch.stack(passes[:whole]).unflatten(0, (-1, self.steps))
        return HeadAblationResult(
            statistic=self.statistic,
            prompt=prompt_table(rest),
            step=tuple(str(int(n)) for n in count),
            loss=loss,
            count=count,
            ordered=losses[0],
            random=losses[1:],
            order=order,
            provenance=provenance(self, view, view.W_E.dtype, silence.hooks, rest),
        )
