"""HeadNorm: a case computed by hand, the cache of the model, the contract, and the page."""

import torch
from head_norm import HeadNorm, lengths

import lens_probes as lp
from lens_probes.testing import check_probe

TEXTS = ["Time flies like an arrow.", "Fruit flies like a banana."]


def test_lengths_are_those_computed_by_hand():
    z = torch.tensor([[[3.0, 0.0], [1.0, 1.0]]])  # one token, two heads
    weights = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[3.0, 0.0], [0.0, 4.0]]])
    assert lengths(z, weights).tolist() == [[3.0, 5.0]]


def test_it_agrees_with_the_cache_of_the_model():
    model = lp.tiny.bridge()
    result = HeadNorm().run(model, TEXTS[0])
    _, cache = model.run_with_cache(TEXTS[0])
    of_head = cache["blocks.1.attn.hook_z"][0, :, 2] @ model.blocks[1].attn.W_O[2]
    by_hand = of_head.norm(dim=-1) / cache["blocks.1.hook_resid_pre"][0].norm(dim=-1)
    own = ~lp.RankShift().run(model, TEXTS[0]).token.special
    torch.testing.assert_close(result.share[1, 2], by_hand.detach()[own].mean())


def test_it_keeps_the_contract():
    check_probe(HeadNorm())


def test_the_page_has_its_panels_and_begins_with_its_finding():
    result = HeadNorm().run(lp.tiny.bridge(), TEXTS)
    (data,) = lp.packed(result)["results"]
    assert [each["name"] for each in data["quantities"]] == ["share", "even"]
    assert " writes most: " in data["findings"][0]
    assert not data["left_out"]
