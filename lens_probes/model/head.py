"""From states to logits: the final norm or an encoder's head, the unembedding, and caps."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from lens_probes.model.passes import FEW, undisturbed
from lens_probes.model.weights import Weights

HEADLESS: frozenset[str] = frozenset({"all-minilm-l6-v2"})
"""Models whose file holds no language-model head: a Bridge gives them an untrained one, whose logits mean nothing."""

TOLERANCE = 0.1  # of the spread of log-probabilities: float32 errs by 1e-5, bfloat16 by 1e-2, a missed part by 1

ENTRIES = 2**15  # that are compared: a product with all of 256,000 costs half a forward pass of one sentence


class Head(Weights):
    """The language-model head."""

    _head_checked = False

    def unembed(self, states: Float[Tensor, "row d_model"], entries: slice = slice(None)) -> Float[Tensor, "row entry"]:
        """Logits as the model itself would read them from these states, the product with the vocabulary in float32.

        On BERT and RoBERTa through the language-model head (dense layer, activation, norm). From the last layer's
        states this is what the model returns, to its own rounding.
        """
        product = self.normed(states).float() @ self.unembedding[entries].T.float()
        return self.capped(product + self.unembedding_bias[entries].float())

    def normed(self, states: Float[Tensor, "row d_model"]) -> Float[Tensor, "row d_model"]:
        """What the unembedding reads of these states, in the model's precision: the final norm, or an encoder's head.

        Gradients flow to `states` where the caller has them switched on.
        """
        self.check_has_head()
        states = states.to(self.W_E.dtype)
        differentiable = torch.is_grad_enabled()
        with undisturbed(self.model), torch.set_grad_enabled(differentiable):
            return self.adapter.normed(states)

    def capped(self, logits: Float[Tensor, "... vocab"]) -> Float[Tensor, "... vocab"]:
        """What the model does to each logit after unembedding: a soft cap (Gemma) or a factor (Cohere, Granite)."""
        return self.adapter.capped(logits)

    @property
    def logit_scale(self) -> float:
        """What every logit is multiplied by before any soft cap (Cohere, Granite); 1 in most models."""
        small = torch.full((1,), 1e-3, dtype=torch.float64, device=self.device)  # where a soft cap does nothing
        return round(float(self.capped(small)) / 1e-3, 6)

    def check_head(self) -> None:
        """Raise unless the logits that we read from the last states of a few tokens are the model's own."""
        if not self._head_checked:
            last = self.hook("resid_post", -1)
            ids = torch.arange(FEW, device=self.device)[None] % self.d_vocab
            found, logits = self.activations_and_logits(ids, torch.ones_like(ids, dtype=torch.bool), [last])
            self.check_read(found[last][0], logits)

    def check_read(self, last: Float[Tensor, "few d_model"], logits: Float[Tensor, "few vocab"]) -> None:
        """Raise unless the logits that we read from these last states are these, which the model itself gave.

        Of a large vocabulary some entries are compared, evenly spaced.
        """
        self.check_has_head()
        entries = slice(None, None, -(-self.d_vocab // ENTRIES))
        with undisturbed(self.model):
            read = self.unembed(last, entries).log_softmax(-1)
            own = logits[:, entries].float().log_softmax(-1)
            error = float((own - read).abs().max() / own.std(-1).mean())
        if math.isnan(error):
            raise ValueError(f"the logits of {self.name} must be finite; got NaN or Inf: check the model's weights")
        if error > TOLERANCE:
            raise ValueError(
                f"the logits of {self.name} must be its final norm, unembedding and soft cap alone; got a difference "
                f"of {error:.2g} of their spread: it cannot be read through its head, use another model"
            )
        self._head_checked = True

    def check_predicts_next(self) -> None:
        """Raise for a model without a loss of the next token."""
        if self.adapter.encoder:
            raise ValueError(
                f"a model must predict the next token; got {self.name}, which predicts masked ones: use a decoder"
            )
        self.check_has_head()

    def check_has_head(self) -> None:
        """Raise for a model without a trained language-model head."""
        if self.name in HEADLESS:
            raise ValueError(
                f"a model must have a trained language-model head; got {self.name}, whose logits mean nothing: use "
                f"another model"
            )
        if not self.adapter.has_head:
            raise ValueError(
                f"a model must have a language-model head; got {self.name}, which has none: load it with one, or use "
                f"another probe"
            )
