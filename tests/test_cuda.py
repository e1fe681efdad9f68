"""On a GPU every probe and experiment gives the numbers of the CPU: `python -m pytest -m "" tests/test_cuda.py`.

Tiny models in float32, where the two differ by rounding only. Experiments that climb or search may come to another end,
so theirs are checked, not compared.
"""

from typing import Any

import pytest
import torch
from test_contract import SETTINGS, Case

import lens_probes as lp
from lens_probes.examples import tiny
from lens_probes.registry import siblings
from lens_probes.result import Result
from lens_probes.testing import assert_same, check_values

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no CUDA device: run this file where there is one"
)

CASES = {
    name: (SETTINGS.get(name) or [Case(kind())])[0]
    for name, kind in sorted(siblings().items())
    if issubclass(kind, (lp.Probe, lp.Experiment))
}


def _run(name: str, device: str) -> Result:
    case = CASES[name]
    model = (case.build or tiny.bridge)().to(device)
    result = case.asked.run(model, case.prompts, progress=False)
    assert {str(each.device) for each in vars(result).values() if isinstance(each, torch.Tensor)} <= {"cpu"}
    return result


@pytest.mark.parametrize("name", CASES)
def test_a_gpu_gives_the_numbers_of_the_cpu(name: str) -> None:
    result = _run(name, "cuda")
    if isinstance(CASES[name].asked, lp.Probe):
        assert_same(result, _run(name, "cpu"), "another device")
    else:
        check_values(result)


def test_a_corpus_on_a_gpu_has_the_counts_of_the_cpu(tmp_path: Any) -> None:
    probe, texts = lp.Summary(lp.RankShift()), lp.demo.sentences()[:20]
    run = lp.run_corpus([probe], tiny.bridge().to("cuda"), texts, tmp_path / "run", progress=False)
    expected = probe.run(tiny.bridge(), texts, progress=False)
    assert torch.equal(run.results[0].count, expected.count)
