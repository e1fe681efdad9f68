"""Results: typed tensors with their labels, and what follows from their declarations."""

from lens_probes.result.base import Result, Shown, load
from lens_probes.result.comparison import comparison, paired
from lens_probes.result.files import FORMAT
from lens_probes.result.pairs import NO_PAIRS, PairResult, PatternResult, added, spread
from lens_probes.result.provenance import Provenance, provenance
from lens_probes.result.schema import ROW_AXES, Quantity, derived, measured, schema, summed
from lens_probes.result.tokens import LayerTokenResult, TokenResult
from lens_probes.result.topics import TopicResult

__all__ = [
    "FORMAT",
    "NO_PAIRS",
    "ROW_AXES",
    "LayerTokenResult",
    "PairResult",
    "PatternResult",
    "Provenance",
    "Quantity",
    "Result",
    "Shown",
    "TokenResult",
    "TopicResult",
    "added",
    "comparison",
    "derived",
    "load",
    "measured",
    "paired",
    "provenance",
    "schema",
    "spread",
    "summed",
]
