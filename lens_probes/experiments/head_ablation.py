"""HeadAblation: how many heads does a trained model need?

Heads are mean-ablated one after another (set to their mean over the prompts on which they were ordered), in the order
of a statistic of `AttentionPatterns`, highest first, and in random orders:

    L[step, prompt] = mean -log p(next token) of a prompt with the first count[step] heads ablated           nats
    effect[step]    = mean over prompts of (L in the order of the statistic - mean L over random orders)     nats

If the effect is 0, the statistic does not predict which heads matter. Table 3 of the source also varies the number of
heads, but trains each variant from scratch: a model can learn to use fewer heads. Here trained heads are ablated.

Source: Vaswani et al. 2017, "Attention Is All You Need", arXiv 1706.03762, Table 3; Michel et al. 2019, "Are Sixteen
Heads Really Better than One?", arXiv 1905.10650.
"""

from typing import Unpack

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float, Int
from torch import Tensor

from lens_probes import figures
from lens_probes.maths import inference
from lens_probes.model.ablation import Ablation
from lens_probes.probe import Study, TextExperiment, run
from lens_probes.probes.attention_patterns import AttentionPatterns, Statistic
from lens_probes.probes.head_topic_similarity import HeadTopicSimilarity
from lens_probes.reading import prompt_loss
from lens_probes.result import Result, comparison, measured
from lens_probes.settings import Layers, Positive, Seed, Share
from lens_probes.text.prompts import PromptTable, as_prompts, first_part, prompt_table

NULL = "ablating heads in the order of the statistic is no different from a random order"


class HeadAblationResult(Result):
    """The loss of every prompt for increasing numbers of ablated heads, in order and in random orders."""

    statistic: Statistic
    prompt: PromptTable
    step: tuple[str, ...]
    loss: Float[Tensor, " prompt"] = measured("loss without ablation", unit="nats", low=0)
    count: Int[Tensor, " step"] = measured("number of heads ablated", low=0)
    ordered: Float[Tensor, "step prompt"] = measured("loss, ablated in the order of the statistic", unit="nats", low=0)
    random: Float[Tensor, "draw step prompt"] = measured("loss, ablated in random orders", unit="nats", low=0)
    order: Int[Tensor, " head"] = measured("heads in order, numbered with layers laid end to end", low=0)

    def table(self) -> pd.DataFrame:
        """One row per step: `effect` is the loss in order minus that in random orders, with interval, p and q.

        The 95 % interval is Student's t over prompts. `p` is two-sided, over random orders. `loss` is the loss in
        order, with its interval `loss_low` to `loss_high`; `random` the mean over random orders, `random_low` and
        `random_high` the smallest and largest. The null is in `attrs["null"]`.
        """
        by_text = np.argsort(np.asarray(self.prompt.text), kind="stable")  # so that the order of prompts changes no sum
        ordered, drawn = (losses.double().numpy()[..., by_text] for losses in (self.ordered, self.random))
        excess, orders = ordered - drawn.mean(0), self.random.double().mean(-1).numpy()
        low, high = inference.mean_interval(excess)
        loss_low, loss_high = inference.mean_interval(ordered)
        return comparison(
            pd.DataFrame({"heads": self.count.tolist()}),
            effect=excess.mean(1),
            low=low,
            high=high,
            p=inference.permutation_p(ordered.mean(1), orders),
            loss=ordered.mean(1),
            loss_low=loss_low,
            loss_high=loss_high,
            random=orders.mean(0),
            random_low=orders.min(0),
            random_high=orders.max(0),
            prompts=ordered.shape[1],
            draws=len(orders),
            loss_of_all=float(self.loss.mean()),
            says="loss minus that of random orders (nats)",
            null=NULL,
        )

    def figure(self, **look: Unpack[figures.Look]) -> go.Figure:
        """Loss against the number of heads ablated; the band of random orders is their range."""
        table, start = self.table(), float(self.loss.mean())
        own, own_low, own_high, random, lowest, highest = (
            [start, *table[name]] for name in ("loss", "loss_low", "loss_high", "random", "random_low", "random_high")
        )
        ordered = figures.Line(f"ordered by {self.statistic!r}, highest first", own, own_low, own_high, figures.CHOSEN)
        name = f"{len(self.random)} random orders (dashed; band: their range)"
        drawn = figures.Line(name, random, lowest, highest, figures.GREY, dashed=True)
        return figures.lines(
            {"loss (nats)": [ordered, drawn]},
            ["0", *self.step],
            title=self.title(f"Loss after ablating heads in the order of {self.statistic!r}"),
            x_title="heads ablated",
            **look,
        )


class HeadAblation(TextExperiment[HeadAblationResult]):
    """Mean-ablate heads in the order of a statistic, at `steps` numbers of heads: steps x (1 + draws) passes.

    Heads are ordered on one part of the prompts (`fraction`), and the loss is measured on the other. After an interrupt
    the result holds the random orders done so far.

    >>> import lens_probes as lp
    >>> result = lp.HeadAblation(steps=3, draws=2).run(lp.tiny.bridge(), lp.demo.sentences()[:6], progress=False)
    >>> result.count.tolist(), tuple(result.random.shape)
    ([4, 8, 12], (2, 3, 3))
    """

    statistic: Statistic = "first_token"
    steps: Positive = 6
    draws: Positive = 5
    layers: Layers = None
    fraction: Share = 0.5
    seed: Seed = 0

    def perform(self, study: Study) -> HeadAblationResult:
        """Order heads on one part of the prompts; ablate and measure on the other, order by order."""
        view, tokens = study.view, study.tokens
        view.check_predicts_next()
        first, layers = first_part(tokens, self.fraction), view.layers(self.layers)
        rest = tokens[~first]
        asked = [AttentionPatterns(layers=self.layers), HeadTopicSimilarity(layers=self.layers)]
        attention, heads = run(asked, view.model, as_prompts(tokens[first]), progress=False)
        order = self._order(attention.mean_of(self.statistic).flatten())
        count = torch.linspace(0, len(order), self.steps + 1).round().long()[1:]
        random = torch.Generator().manual_seed(self.seed)
        orders = [order, *(torch.randperm(len(order), generator=random) for _ in range(self.draws))]
        ablate, loss = Ablation(view, layers, "head", heads.vector.mean(2)), prompt_loss(view, rest)

        def losses(order: Int[Tensor, " head"]) -> Float[Tensor, "step prompt"]:
            return torch.stack([prompt_loss(view, rest, ablate(order[:n])) for n in count.tolist()])

        ordered, *drawn = study.each(losses, orders, doing="ablating", unit="order", least=2)
        return HeadAblationResult(
            statistic=self.statistic,
            prompt=prompt_table(rest),
            step=tuple(map(str, count.tolist())),
            loss=loss,
            count=count,
            ordered=ordered,
            random=torch.stack(drawn),
            order=order,
            provenance=study.provenance(ablate.hooks, rest),
        )

    def _order(self, values: Float[Tensor, " head"]) -> Int[Tensor, " head"]:
        """Heads by their statistic, highest first."""
        if values.isnan().any():
            raise ValueError(
                f"prompts must have a query with a value of {self.statistic!r}, to order heads; got none, since no "
                f"token occurs twice: use longer prompts, or another statistic"
            )
        if self.steps > len(values):
            raise ValueError(f"HeadAblation(steps=...) must be at most the {len(values)} heads; got {self.steps}")
        return values.argsort(descending=True, stable=True)
