"""The table of a comparison: columns, q over rows, and pairs by hand."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from lens_probes.maths import inference
from lens_probes.result import comparison, paired


def test_a_comparison_has_its_columns_in_order_and_says_what_it_compares() -> None:
    p = np.array([0.01, np.nan, 0.5])
    frame = comparison(
        pd.DataFrame({"layer": list("abc")}),
        effect=[1.0, 2.0, 3.0],
        low=[0.0] * 3,
        high=[4.0] * 3,
        p=p,
        says="difference",
        null="none",
        prompts=9,
    )
    assert list(frame) == ["layer", "effect", "low", "high", "p", "q", "prompts"]
    np.testing.assert_array_equal(frame["q"], inference.false_discovery(p))
    assert frame.attrs == {"effect": "difference", "null": "none"} and frame["prompts"].tolist() == [9, 9, 9]


def test_two_conditions_of_the_same_prompts_are_compared_by_hand() -> None:
    own = np.array([[1.0, 2.0, 3.0, 4.0, 5.0, 6.0], [1.0, 1.0, 1.0, 1.0, 1.0, 1.0]])
    other = np.array([[0.0, 0.0, 3.0, 2.0, 3.0, 4.0], [2.0, 0.0, 2.0, 0.0, 2.0, 0.0]])
    labels = pd.DataFrame({"unit": [0, 1]})
    table = paired(labels, own - other, says="difference", null="the same in both", prompts=6)
    assert table["effect"].tolist() == [1.5, 0.0]
    expected = stats.ttest_rel(own[0], other[0]).confidence_interval()
    assert (table["low"][0], table["high"][0]) == pytest.approx((expected.low, expected.high))
    np.testing.assert_array_equal(table["p"], inference.sign_flip_p(own - other))
    np.testing.assert_array_equal(table["q"], inference.false_discovery(table["p"].to_numpy()))
    assert table["prompts"].tolist() == [6, 6] and table.attrs["null"] == "the same in both"
    few = paired(labels, (own - other)[:, :4], says="difference", null="none")
    assert np.isnan(few["low"].to_numpy()).all()  # too few prompts for an interval
