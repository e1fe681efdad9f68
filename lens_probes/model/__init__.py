"""How lens_probes reads models. Only this folder depends on TransformerLens.

hooks.py      names of activations, as tables        adapters.py   what differs between model classes
base.py       names and layers of any model          passes.py     activations, logits, other embeddings
weights.py    in one shape for all classes           attention.py  queries, keys, values, masks
head.py       from states to logits                  sums.py       checks that parts add up to the whole
tokenizer.py  text to token ids and back             view.py       ModelView, ImageView and StemView, built from these
prefix.py     the next token after a prefix          ablation.py   heads and neurons set to fixed values
stacks.py     encoder-decoders, stack by stack       masking.py    attention to some of the tokens only
untrained.py  a random-weights baseline             jacobian.py   TransformerLens's Jacobian lens as a translator
"""

from lens_probes.model.ablation import Ablation
from lens_probes.model.base import View
from lens_probes.model.head import HEADLESS
from lens_probes.model.hooks import READ_POINTS, Part, ReadPoint
from lens_probes.model.jacobian import JacobianTranslator, jacobian_lens
from lens_probes.model.passes import differentiating, undisturbed
from lens_probes.model.prefix import Continuation
from lens_probes.model.stacks import DecoderView, EncoderView, StackView, greedy_targets, text_view, view_of
from lens_probes.model.sums import tolerance
from lens_probes.model.tokenizer import Spans
from lens_probes.model.untrained import untrained
from lens_probes.model.view import ImageView, ModelView, StemView
from lens_probes.model.weights import Norm

__all__ = [
    "HEADLESS",
    "READ_POINTS",
    "Ablation",
    "Continuation",
    "DecoderView",
    "EncoderView",
    "ImageView",
    "JacobianTranslator",
    "ModelView",
    "Norm",
    "Part",
    "ReadPoint",
    "Spans",
    "StackView",
    "StemView",
    "View",
    "differentiating",
    "greedy_targets",
    "jacobian_lens",
    "text_view",
    "tolerance",
    "undisturbed",
    "untrained",
    "view_of",
]
