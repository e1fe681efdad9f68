"""Every probe and every experiment of the package keeps its contract.

They come from the registry: one that can be made without settings needs no line here. `SETTINGS` has the others, and
what else is worth checking. Of each class the first entry runs in `make test`, all others in `make test-all`.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch

import lens_probes as lp
from lens_probes.examples import tiny
from lens_probes.model import ModelView
from lens_probes.registry import siblings
from lens_probes.testing import PROMPTS, TOPICS, check_experiment, check_probe


class Case(NamedTuple):
    """What to check, on which model (of a probe: None for all of `check_probe`'s), and with which prompts."""

    asked: Any
    build: Callable[[], Any] | None = None
    prompts: Any = PROMPTS


def _images() -> torch.Tensor:
    return torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def _doubled(state: torch.Tensor, label: str) -> torch.Tensor:
    return 2 * state


SENTENCES = lp.demo.sentences()[:8]
DIRECTIONS = torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
STEM = lp.stems.orthogonal(tiny.bridge(), patch=4)
SETTINGS: dict[str, list[Case]] = {
    "AttentionPair": [
        Case(lp.AttentionPair(-1, (0, 1))),
        Case(lp.AttentionPair(3, {"first": 0, "second": 2}, layers=[1]), lambda: tiny.bridge("qwen3")),
    ],
    "AttentionPatterns": [
        Case(lp.AttentionPatterns(keep_patterns=True, layers=[0, 2])),
        Case(lp.AttentionPatterns()),
        Case(lp.AttentionPatterns(), lambda: tiny.bridge("marian")),
    ],
    "CrossAttention": [
        Case(lp.CrossAttention(), lambda: tiny.bridge("bart")),
        Case(lp.CrossAttention(keep_patterns=False, layers=[2, 0]), lambda: tiny.bridge("marian")),
    ],
    "UnitActivation": [
        Case(lp.UnitActivation()),
        Case(lp.UnitActivation(at="head", layers=[2, 0])),
        Case(lp.UnitActivation(at="resid_post", directions=torch.eye(32)[:3]), lambda: tiny.bridge("llama")),
    ],
    "AttentionWindow": [
        Case(lp.AttentionWindow(at="layer", radii=[1, 4], epsilon=0.1), lambda: tiny.bridge("llama"), SENTENCES),
        Case(lp.AttentionWindow(), prompts=SENTENCES),
        Case(lp.AttentionWindow(at="head", heads=["L0H1", "L2H3"], seed=3), lambda: tiny.bridge("gemma2"), SENTENCES),
    ],
    "DirectLogitAttribution": [
        Case(lp.DirectLogitAttribution()),
        Case(lp.DirectLogitAttribution(target=3, layers=[2])),
        Case(lp.DirectLogitAttribution(target=" the", against="final")),
        Case(lp.DirectLogitAttribution(positions=[0, -2])),
    ],
    "SourceAttribution": [
        Case(lp.SourceAttribution(layers=[0, 2])),
        Case(lp.SourceAttribution(target=" the", against=7)),
        Case(lp.SourceAttribution(target="own", positions=slice(1, -1))),
    ],
    "EmbeddingDensity": [Case(lp.EmbeddingDensity(k=3))],
    "FeatureVisualization": [
        Case(lp.FeatureVisualization(1, (3, 5), steps=5, restarts=2), tiny.vit, _images()),
        Case(
            lp.FeatureVisualization(1, (3, 5), steps=5, restarts=2, blur=1.5, jitter=2, position=0, at="resid_post"),
            tiny.vit,
            _images(),
        ),
        Case(lp.FeatureVisualization(1, (3, 5), stem=STEM, steps=5, restarts=2), prompts=_images()),
        Case(lp.FeatureVisualization(1, None, stem=STEM, masked=False, steps=5, position=2), prompts=_images()),
    ],
    "ImageReconstruction": [
        Case(lp.ImageReconstruction(1, stem=STEM, steps=5), prompts=_images()[:2].sigmoid()),
        Case(lp.ImageReconstruction(1, stem=STEM, masked=False, restarts=2, steps=5), prompts=_images()[:2].sigmoid()),
        Case(lp.ImageReconstruction(1, bounds=(-5.0, 5.0), loss="cosine", steps=5), tiny.vit, _images()[:2]),
    ],
    "HeadAblation": [Case(lp.HeadAblation(steps=2, draws=2))],
    "HeadTopicSimilarity": [
        Case(lp.HeadTopicSimilarity()),
        Case(lp.HeadTopicSimilarity(component="head_out", pool="last", layers=[1])),
        Case(lp.HeadTopicSimilarity(component="resid_post", keep_vectors=False)),
        Case(lp.HeadTopicSimilarity(component="attn_out", pool=2)),
    ],
    "HeadValueRank": [
        Case(lp.HeadValueRank(layers=[0, 2], neighbours=3)),
        Case(lp.HeadValueRank(null_seed=4), lambda: tiny.bridge("qwen3")),
    ],
    "InputReconstruction": [
        Case(lp.InputReconstruction(1, steps=5, restarts=2)),
        Case(lp.InputReconstruction(1, method="sequential"), prompts=PROMPTS[0]),
        Case(lp.InputReconstruction(1, steps=5, restarts=2), lambda: tiny.bridge("bert")),
    ],
    "LogitLens": [
        Case(lp.LogitLens(target="own", top_k=2, incl_mid=True)),
        Case(lp.LogitLens()),
        Case(lp.LogitLens(target="final", top_k=0, layers=[1])),
        Case(lp.LogitLens(target=[3, 50], layers=[0, -1])),
        Case(lp.LogitLens(target=7, top_k=1)),
        Case(lp.LogitLens(positions=-2)),
        Case(lp.LogitLens(), lambda: tiny.bridge("bart")),
    ],
    "LayerSkip": [Case(lp.LayerSkip()), Case(lp.LayerSkip(layers=[1]), lambda: tiny.bridge("bert"))],
    "LensComparison": [
        Case(lp.LensComparison({"doubled": _doubled}, layers=[0, 2])),
        Case(lp.LensComparison({"doubled": _doubled}), lambda: tiny.bridge("marian")),
    ],
    "MaxActivatingTokens": [
        Case(lp.MaxActivatingTokens(1, (3, 5), steps=3, restarts=2)),
        Case(lp.MaxActivatingTokens(1, (3, 5), steps=3, restarts=2, position=None), lambda: tiny.bridge("bert")),
        Case(
            lp.MaxActivatingTokens(1, None, steps=3, restarts=2, at="resid_post", directions=DIRECTIONS),
            prompts="The old man the boat.",
        ),
    ],
    "PositionReach": [Case(lp.PositionReach(projections=2))],
    "RankShift": [
        Case(lp.RankShift(at="resid_post", metric="euclidean", neighbours=3, overlap=5, null_seed=4)),
        Case(lp.RankShift()),
        Case(lp.RankShift(at="attn_out", metric="dot", reference="unembed", layers=[2, 0])),
        Case(lp.RankShift(at="mlp_out", reference="embed_pos")),
    ],
    "ResidualUpdate": [
        Case(lp.ResidualUpdate()),
        Case(lp.ResidualUpdate(component="attention")),
        Case(lp.ResidualUpdate(component="mlp", layers=[2, 0])),
    ],
    "ResidualMean": [Case(lp.ResidualMean(at="resid_post", layers=[1])), Case(lp.ResidualMean())],
    "TiedKeyValue": [
        Case(lp.TiedKeyValue(at=at, layers=[0, 2]), lambda: tiny.bridge("llama"), SENTENCES)
        for at in ("kv_head", "layer", "all")
    ],
    "TopicAblation": [
        Case(lp.TopicAblation(component=component, k=2, ablation=ablation, draws=3), prompts=TOPICS)
        for ablation in ("mean", "zero")
        for component in ("head", "neuron")
    ],
    "TopicActivity": [
        Case(lp.TopicActivity()),
        Case(lp.TopicActivity(component="neuron", layers=[1])),
        Case(lp.TopicActivity(component="mlp_out", pool="last")),
        Case(lp.TopicActivity(component="attn_out", keep_rows=False)),
        Case(lp.TopicActivity(component="embed", pool=1)),
    ],
    "TunedLens": [
        Case(lp.TunedLens(steps=2), lambda architecture=architecture: tiny.bridge(architecture))
        for architecture in ("gpt2", "gemma2", "bert")
    ],
}


def _cases(base: type, *, first: bool = False) -> Iterator[Any]:
    """The cases of all probes or of all experiments, or of each only the first."""
    for name, kind in sorted(siblings().items()):
        if issubclass(kind, base):
            for number, case in enumerate(SETTINGS.get(name) or [Case(kind())]):
                if not first or number == 0:
                    marks = [pytest.mark.matrix] if number else []
                    yield pytest.param(case, id=f"{name}-{number}", marks=marks)


@pytest.mark.parametrize("case", list(_cases(lp.Probe)))
def test_a_probe_keeps_its_contract(case: Case) -> None:
    check_probe(case.asked, models=[(case.build or tiny.bridge)()])


@pytest.mark.matrix
@pytest.mark.parametrize("case", [case for case in _cases(lp.Probe) if case.values[0].build is None])
def test_a_probe_keeps_its_contract_on_the_models_that_check_probe_chooses(case: Case) -> None:
    check_probe(case.asked)


@pytest.mark.matrix
@pytest.mark.parametrize("case", list(_cases(lp.Probe, first=True)))
def test_a_probe_keeps_its_contract_on_every_architecture_or_refuses_it(case: Case, raw: Any) -> None:
    model = raw.build()
    try:
        case.asked.hooks(ModelView(model))
    except ValueError as refusal:
        pytest.skip(str(refusal))
    check_probe(case.asked, models=[model])


@pytest.mark.parametrize("case", list(_cases(lp.Experiment)))
def test_an_experiment_keeps_its_contract(case: Case) -> None:
    check_experiment(case.asked, None if case.build is None else case.build(), case.prompts)


def test_every_setting_is_of_a_probe_or_an_experiment_of_that_name() -> None:
    for name, cases in SETTINGS.items():
        assert {type(case.asked) for case in cases} == {siblings()[name]}
