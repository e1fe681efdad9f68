"""The worked example of attention: the values computed by hand for it, to four decimals, and both ways of tying."""

import pytest
import torch

from lens_probes.examples import toy


def rows(matrix):
    return [pytest.approx(row, abs=5e-5) for row in matrix]


def test_raw_products():
    raw = toy.project(toy.Q, toy.K).sum(-1)
    assert raw.tolist() == rows([[0.53, 0.37, 0.27], [2.11, 1.35, 0.97], [0.36, 0.23, 0.16]])
    it_cat = toy.project(toy.Q, toy.K)[1, 0]
    assert it_cat.tolist() == pytest.approx([0.81, 0.72, 0.56, 0.02])


def test_scaled_weights_and_outputs():
    weights = toy.weigh(toy.score(toy.project(toy.Q, toy.K)))
    assert weights.tolist() == rows([[0.3570, 0.3295, 0.3135], [0.4446, 0.3040, 0.2514], [0.3519, 0.3297, 0.3184]])
    outputs = toy.mix(weights, toy.V)
    assert outputs.tolist() == rows(
        [[0.3142, 0.5670, 0.3357, 0.6364], [0.3667, 0.5696, 0.3445, 0.6568], [0.3111, 0.5670, 0.3352, 0.6362]]
    )


def test_without_the_scale_and_without_itself():
    terms = toy.project(toy.Q, toy.K)[1:2]
    assert toy.weigh(terms.sum(-1)).tolist() == rows([[0.5594, 0.2616, 0.1789]])
    two = terms[:, [0, 2]]
    assert toy.weigh(toy.score(two)).tolist() == rows([[0.6388, 0.3612]])
    assert toy.weigh(two.sum(-1)).tolist() == rows([[0.7577, 0.2423]])


def test_values_as_keys_bring_the_mat_past_it():
    terms = toy.project(toy.Q, toy.V)[1:2]
    assert terms.sum(-1).tolist() == rows([[1.48, 0.71, 0.87]])
    assert toy.weigh(toy.score(terms)).tolist() == rows([[0.4136, 0.2815, 0.3049]])


def test_keys_as_values_lose_the_content():
    weights = toy.weigh(toy.score(toy.project(toy.Q, toy.K)))
    assert float(toy.mix(weights, toy.V)[1, 3]) == pytest.approx(0.6568, abs=5e-5)
    assert float(toy.mix(weights, toy.K)[1, 3]) == pytest.approx(0.17, abs=0.005)


def test_cat_and_mat_have_the_same_content_and_nearly_the_same_value():
    cat, mat = toy.V[0], toy.V[2]
    assert cat[3] == mat[3] and toy.K[0, 3] == toy.K[2, 3]
    assert float(torch.cosine_similarity(cat, mat, dim=0)) == pytest.approx(0.895, abs=5e-4)
    assert float(torch.cosine_similarity(toy.K[0], toy.K[2], dim=0)) == pytest.approx(0.765, abs=5e-4)
