"""ResidualUpdate: how far and in which direction does each layer move a state, and is it the same for all tokens?

    step[layer, token]      = what the layer, its attention or its MLP adds to the state h before it
    length[layer, token]    = |step|                                                   at least 0
    cosine[layer, token]    = step . h / (|step| |h|)                                  -1 (erases) to 1 (amplifies)
    agreement[layer, prompt] = mean over pairs i != j of the prompt's tokens of cos(step_i, step_j)         -1 to 1

The baseline of `agreement` is `agreement_between`: the same mean over pairs of tokens of different prompts. Both
contain what all tokens of all prompts have in common; only their difference is specific to a prompt. Both exclude
special tokens.

A step is a difference of two states of the residual stream, so that it includes what a model does to outputs before it
adds them (norms of Gemma, factors of Granite). Where attention and MLP run in parallel (NeoX), the output of the other
one is subtracted. In BERT and RoBERTa a layer's step includes its norms, those of its parts do not.

Source: the open questions of "Paying Attention, Part 2" (github.com/danavery/attention-encodings); by part: Csordás,
Manning & Potts 2025, arXiv 2505.13898.
"""

from typing import Unpack

import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float, Float64
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from lens_probes import figures
from lens_probes.maths import inference
from lens_probes.maths.similarity import mean_pairwise_cosine
from lens_probes.model import ModelView, Part
from lens_probes.probe import Probe
from lens_probes.reading import Reading
from lens_probes.result import LayerTokenResult, Quantity, derived, measured, summed
from lens_probes.settings import Layers
from lens_probes.text.prompts import PromptTable, prompt_table


class ResidualUpdateResult(LayerTokenResult):
    """Steps by layer and token, and their agreement by prompt. Memory scales with the number of tokens."""

    component: Part = "layer"
    prompt: PromptTable
    length: Float[Tensor, "layer token"] = measured("length of the layer's step", low=0, logarithmic=True)
    norm: Float[Tensor, "layer token"] = measured("length of the state before the step", low=0, logarithmic=True)
    cosine: Float[Tensor, "layer token"] = measured("cosine of the step with the state before it", low=-1, high=1)
    agreement: Float[Tensor, "layer prompt"] = measured(
        "mean cosine between the steps of a prompt's tokens", low=-1, high=1
    )
    unit_sum: Float64[Tensor, "layer d_model"] = summed("sum of all steps, each divided by its length")
    square_sum: Float64[Tensor, " layer"] = summed("sum over prompts of |sum of the prompt's unit steps|^2")
    count: Float64[Tensor, ""] = summed("number of tokens that are not special")
    square_count: Float64[Tensor, ""] = summed("sum over prompts of that number squared")

    @derived("length of the step / length of the state", low=0, logarithmic=True)
    def relative_length(self) -> Float[Tensor, "layer token"]:
        """Length of the step divided by the length of the state before it, at least 0."""
        return self.length / self.norm

    @derived("mean cosine between steps of different prompts", low=-1, high=1)
    def agreement_between(self) -> Float[Tensor, " layer"]:
        """Mean cosine over pairs of steps of different prompts, -1 to 1; NaN for a single prompt."""
        pairs = self.count**2 - self.square_count
        between = (self.unit_sum.square().sum(-1) - self.square_sum) / pairs.clamp(min=1)
        return torch.where(pairs > 0, between, torch.nan).float()

    def agreement_table(self) -> pd.DataFrame:
        """Per layer: the mean over prompts of `agreement` with its 95 % interval, its baseline, and the difference."""
        mean, low, high, n = inference.prompt_means(self.agreement.double().numpy(), self.token)
        between = self.agreement_between.double().numpy()
        return pd.DataFrame(
            {
                "layer": self.layer,
                "agreement": mean,
                "low": low,
                "high": high,
                "between_prompts": between,
                "difference": mean - between,
                "prompts": n,
            }
        )

    def quantity(self, name: str) -> Quantity:
        """What a tensor's numbers are; the step is that of attention or MLP where these were asked."""
        asked = super().quantity(name)
        return asked._replace(says=asked.says.replace("the layer", self._part()))

    def _part(self) -> str:
        return {"layer": "the layer", "attention": "attention", "mlp": "the MLP"}[self.component]

    def figure(self, **look: Unpack[figures.Look]) -> go.Figure:
        """Relative length and cosine by word class, and the agreement of a prompt's steps beside its control."""
        table = self.agreement_table()
        own, low, high = (list(table[name]) for name in ("agreement", "low", "high"))
        agreement = [
            figures.Line("tokens of one prompt", own, low, high),
            figures.Line("tokens of different prompts", list(table["between_prompts"]), dashed=True),
        ]
        panels = self.class_panels("relative_length", "cosine") | {"mean cosine between steps (-1 to 1)": agreement}
        steps = {"layer": "each layer's step", "attention": "what attention adds", "mlp": "what each MLP adds"}
        title = f"Length and direction of {steps[self.component]}: medians by word class"
        return self.draw_classes(panels, title, **look)


class ResidualUpdate(Probe[ResidualUpdateResult]):
    """Length and direction of each layer's step.

    `component`: the step of the whole layer, or what its attention or its MLP adds.

    >>> import lens_probes as lp
    >>> result = lp.ResidualUpdate().run(lp.tiny.bridge(), ["Time flies like an arrow.", "Fruit flies too."])
    >>> tuple(result.agreement.shape), result.layer
    ((3, 2), ('0', '1', '2'))
    """

    component: Part = "layer"
    layers: Layers = None

    def hooks(self, model: ModelView) -> list[str]:
        """The residual stream before and after every layer, or every attention or MLP."""
        layers = model.layers(self.layers)
        return list(dict.fromkeys(name for layer in layers for name in model.hooks_added(self.component, layer)))

    def measure(self, reading: Reading) -> ResidualUpdateResult:
        """Steps of the batch, layer by layer."""
        model, tokens = reading.model, reading.tokens
        layers, prompts, own = model.layers(self.layers), prompt_table(tokens), ~tokens.special
        count = torch.stack([own[tokens.prompt == prompt].sum() for prompt in prompts.prompt])
        length, norm, cosine, sums = [], [], [], []
        for layer in layers:
            before, after, *others = (reading[name].float().cpu() for name in model.hooks_added(self.component, layer))
            step = after - before - sum(others)
            length.append(step.norm(dim=-1))
            norm.append(before.norm(dim=-1))
            cosine.append(cosine_similarity(step, before, dim=-1))
            sums.append(prompt_sums(normalize(step, dim=-1).double()[own], tokens.prompt[own], len(prompts)))
        prompt_sum = torch.stack(sums)
        return self.result(
            reading,
            layer=tuple(map(str, layers)),
            length=torch.stack(length),
            norm=torch.stack(norm),
            cosine=torch.stack(cosine).clamp(-1, 1),
            agreement=mean_pairwise_cosine(prompt_sum, count.expand(len(layers), -1)).float(),
            unit_sum=prompt_sum.sum(1),
            square_sum=prompt_sum.square().sum((1, 2)),
            count=count.sum().double(),
            square_count=count.square().sum().double(),
        )


def prompt_sums(
    vectors: Float64[Tensor, "token d_model"], prompt: Tensor, n_prompts: int
) -> Float64[Tensor, "prompt d_model"]:
    """The sum of the vectors of each prompt."""
    return vectors.new_zeros(n_prompts, vectors.shape[1]).index_add_(0, prompt, vectors)
