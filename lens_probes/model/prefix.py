"""The next token after a prefix whose keys and values are computed once."""

import warnings
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lens_probes.model.adapters import Past
from lens_probes.model.passes import run_until, undisturbed
from lens_probes.model.view import ModelView

TOKENS_OF_WHOLE_PREFIXES = 512  # per pass, where a cache cannot be trusted


class Continuation:
    """An activation of the next token after a prefix, for many candidates at once; used by searches over tokens.

    The keys and values of the prefix are computed once, and a pass ends at the activation: no later layer, no
    unembedding. Both model classes allow it: a Bridge passes Hugging Face's cache on (3.9 and 4.x), HookedTransformer
    has its own. Encoders do not: there every state depends on later tokens.

    Each cache is checked: it must hold every token of the prefix, and the state of one token after it must equal that
    of the whole prompt. If the check fails (TransformerLens 4.3 by itself does not fill the cache of transformers
    5.24), every candidate is computed with its whole prefix, and a warning says so once per view.

    >>> from lens_probes.examples import tiny
    >>> view = ModelView(tiny.bridge("llama"))
    >>> third = Continuation(view, torch.tensor([5, 6]), view.hook("resid_post", 1))
    >>> third.states(torch.tensor([7, 8, 9, 10])).shape
    torch.Size([4, 32])
    """

    def __init__(self, view: ModelView, prefix: Int[Tensor, " position"], name: str) -> None:
        if view.encoder:
            raise ValueError(
                f"a model that continues a prefix must be a decoder; got {view.name}, where every state depends on "
                f"later tokens"
            )
        view.check_hooks([name])
        self._view, self._name, self._prefix = view, name, prefix.to(view.device)
        self._past: Past | None = None  # None: whole prefixes
        if len(prefix) and view.continues_prefixes:
            self._keep_checked_past()

    def states(self, ids: Int[Tensor, " candidate"]) -> Float[Tensor, "candidate d"]:
        """The activation of each of these tokens as the next one."""
        at_once = max(1, len(ids) if self._past else TOKENS_OF_WHOLE_PREFIXES // (len(self._prefix) + 1))
        return torch.cat([self._run(some) for some in ids.split(at_once)])

    def soft(self, embeddings: Float[Tensor, "candidate d_model"]) -> Float[Tensor, "candidate d"]:
        """The activation of tokens that have these embeddings; gradients flow to them."""

        def at_the_end(given: Tensor) -> Tensor:
            return torch.cat([given[:, :-1], embeddings[:, None].to(given)], dim=1)

        ids = torch.zeros(len(embeddings), dtype=torch.int64)
        return self._run(ids, edits={self._view.hook_token_embed: at_the_end}, gradients=True)

    def _run(self, ids: Int[Tensor, " candidate"], **how: Any) -> Float[Tensor, "candidate d"]:
        ids = ids.to(self._view.device)[:, None]
        if self._past:
            options = self._past.options(len(ids))
        else:
            ids = torch.cat([self._prefix.expand(len(ids), -1), ids], dim=1)
            options = {"attention_mask": torch.ones_like(ids)}
        found = run_until(self._view.model, ids, [self._name], **options, **how)
        return found[self._name][:, -1]

    def _keep_checked_past(self) -> None:
        """Keep the first kind of cache that passes the check; warn if none does."""
        view, n = self._view, len(self._prefix)
        other = (self._prefix[-1:] + 1) % view.d_vocab  # not the same token: its values would equal those of the prefix
        whole, failed = self.states(other).float(), ""
        if not whole.isfinite().all():
            return  # nothing to compare: the caller raises for such states
        for past_of in view.adapter.pasts():
            try:
                with undisturbed(view.model):
                    past = past_of(self._prefix[None])
            except (TypeError, IndexError):  # not taken under this name, or not by linear attention
                continue
            if past.lengths != {n}:
                failed = failed or f"it holds {min(past.lengths, default=0)}"
                continue
            self._past = past
            off = float((self.states(other).float() - whole).norm() / whole.norm().clamp(min=1e-30))
            if off <= torch.finfo(view.W_E.dtype).eps ** 0.5:
                return
            failed = failed or f"a state after it is off by {off:.2g} of its length"
        self._past, view.continues_prefixes = None, False
        releases = ", ".join(f"{package} {release}" for package, release in view.versions[1:])
        warnings.warn(
            f"the key/value cache of {view.name} must hold all {n} tokens of a prefix and give the states of the whole "
            f"prompt; with {releases} {failed or 'none is accepted'}: whole prompts are computed instead, which gives "
            f"the right numbers more slowly (other releases of transformers or TransformerLens may keep the cache)",
            stacklevel=3,
        )
