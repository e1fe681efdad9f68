"""Activation analysis for TransformerLens: a measurement with a baseline, in two lines, and a picture.

    import lens_probes as lp
    result = lp.RankShift().run(model, ["Time flies like an arrow.", "Fruit flies like a banana."])
    result.figure()

`model` is a HookedTransformer (TransformerLens 3.x) or a TransformerBridge (3.x and 4.x). Every probe and experiment of
the package stands here under its name; `list_probes()` lists the probes, those of installed plugins too;
`load_model()` gives a small real model that needs no model hub.
"""

import importlib.metadata as _metadata
from typing import TYPE_CHECKING, Any

from lens_probes import figures
from lens_probes.examples import demo, tiny, toy
from lens_probes.examples.demo import load_model
from lens_probes.maths import inference
from lens_probes.model import ModelView, untrained
from lens_probes.probe import Experiment, Probe
from lens_probes.reading import Reading
from lens_probes.registry import list_probes, siblings
from lens_probes.result import Provenance, Result
from lens_probes.text import words
from lens_probes.text.prompts import Prompt, PromptTable, Table, Tokens
from lens_probes.weights import VectorReading, neuron_vectors, ov_vectors, read_vector

__version__ = _metadata.version("lens-probes")

globals().update(siblings())

# Last, because importing the file called `run` binds this name to the module.
from lens_probes.probe import run  # noqa: E402

__all__ = [
    "Experiment",
    "ModelView",
    "Probe",
    "Prompt",
    "PromptTable",
    "Provenance",
    "Reading",
    "Result",
    "Table",
    "Tokens",
    "VectorReading",
    "demo",
    "figures",
    "inference",
    "list_probes",
    "load_model",
    "neuron_vectors",
    "ov_vectors",
    "read_vector",
    "run",
    "tiny",
    "toy",
    "untrained",
    "words",
    *siblings(),
]  # pyright: ignore[reportUnsupportedDunderAll]


def __dir__() -> list[str]:
    return __all__


if TYPE_CHECKING:

    def __getattr__(name: str) -> Any: ...  # the names that siblings() adds
