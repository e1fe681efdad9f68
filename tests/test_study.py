"""How an experiment goes through its work: in order, and what an interrupt leaves."""

from typing import Any

import pytest
import torch

from lens_probes.examples import tiny
from lens_probes.probe import Study, TextExperiment, each_of
from lens_probes.result import Result


class Spy(TextExperiment[Result]):
    """Notes in which mode it is performed, and on what."""

    seen: Any = None

    def perform(self, study: Study) -> Result:
        self.seen.append((torch.is_grad_enabled(), torch.is_inference_mode_enabled(), len(study.tokens)))
        return Result(provenance=study.provenance(["blocks.0.hook_resid_pre"]))


def interrupted_at(limit: int) -> Any:
    def do(n: int) -> int:
        if n == limit:
            raise KeyboardInterrupt
        return 10 * n

    return do


def test_what_is_done_is_kept_when_it_is_enough() -> None:
    assert each_of(interrupted_at(9), [1, 2, 3], doing="trying", unit="item", progress=False) == [10, 20, 30]
    assert each_of(interrupted_at(3), [1, 2, 3], doing="trying", unit="item", progress=False, least=2) == [10, 20]
    with pytest.raises(KeyboardInterrupt):
        each_of(interrupted_at(3), [1, 2, 3], doing="trying", unit="item", progress=False, least=3)
    with pytest.raises(KeyboardInterrupt):
        each_of(interrupted_at(1), [1, 2, 3], doing="trying", unit="item", progress=False)


def test_an_experiment_differentiates_whatever_mode_the_caller_is_in_and_takes_what_text_takes() -> None:
    seen: list[Any] = []
    with torch.inference_mode():
        result = Spy(seen).run(tiny.bridge("gpt2"), "one two", prepend_bos=True)
    Spy(seen).run(tiny.bridge("gpt2"), "one two", prepend_bos=False)
    assert [mode[:2] for mode in seen] == [(True, False)] * 2
    assert seen[0][2] == seen[1][2] + 1
    assert result.provenance.n_prompts == 1 and result.provenance.hooks == ("blocks.0.hook_resid_pre",)
