"""TokenNorm: a case computed by hand, the cache of the model, the contract, and the page."""

import torch
from token_norm import TokenNorm, relative

import lens_probes as lp
from lens_probes.testing import check_probe

TEXTS = ["Time flies like an arrow.", "Fruit flies like a banana."]


def test_lengths_are_those_computed_by_hand():
    states = torch.tensor([[[3.0, 4.0], [0.0, 6.0]], [[0.0, 20.0], [6.0, 8.0]]])
    first = torch.tensor([[0.0, 10.0], [0.0, 2.0]])
    assert relative(states, first).tolist() == [[0.5, 3.0], [2.0, 5.0]]


def test_it_agrees_with_the_cache_of_the_model():
    model = lp.tiny.bridge()
    result = TokenNorm().run(model, TEXTS[0])
    _, cache = model.run_with_cache(TEXTS[0])
    by_hand = cache["blocks.1.hook_resid_post"][0].norm(dim=-1) / cache["blocks.0.hook_resid_pre"][0].norm(dim=-1)
    torch.testing.assert_close(result.ratio[result.layer.index("1_post")], by_hand.detach())


def test_it_keeps_the_contract():
    check_probe(TokenNorm())


def test_the_page_has_its_panels_and_begins_with_its_finding():
    result = TokenNorm().run(lp.tiny.bridge(), TEXTS)
    (data,) = lp.packed(result)["results"]
    assert [each["name"] for each in data["quantities"]] == ["ratio", "median"]
    assert data["findings"][0].startswith("In 2_post the median state is ")
    assert not data["left_out"]
