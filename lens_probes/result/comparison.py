"""The table of a comparison: every probe and experiment gives the same columns."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from lens_probes.maths.inference import false_discovery

PerRow = Float[np.ndarray, " row"] | Sequence[float]


def comparison(
    labels: pd.DataFrame,
    *,
    effect: PerRow,
    low: PerRow,
    high: PerRow,
    p: Float[np.ndarray, " row"],
    says: str,
    null: str,
    **columns: Any,
) -> pd.DataFrame:
    """One row per comparison: labels, effect, 95 % interval (`low`, `high`), p, q, and further columns.

    `q` is the false-discovery rate over all rows. `attrs["effect"]` says what the effect is, `attrs["null"]` what it is
    compared with.

    >>> labels = pd.DataFrame({"head": ["H0", "H1"]})
    >>> of = {"effect": [0.5, 0.0], "low": [0.25, -0.25], "high": [0.75, 0.25], "p": np.array([0.01, 0.5])}
    >>> comparison(labels, **of, says="difference", null="no difference", prompts=20)
      head  effect   low  high     p     q  prompts
    0   H0     0.5  0.25  0.75  0.01  0.02       20
    1   H1     0.0 -0.25  0.25  0.50  0.50       20
    """
    frame = labels.assign(effect=effect, low=low, high=high, p=p, q=false_discovery(p), **columns)
    frame.attrs.update(effect=says, null=null)
    return frame
