"""Fixtures: tiny models of every architecture, raw and processed, in every class that this TransformerLens has."""

from collections.abc import Iterator
from functools import cache
from importlib.metadata import version
from typing import Any, NamedTuple

import jaxtyping
import pytest

from lens_probes import tiny
from lens_probes.model import ModelView

HAS_HOOKED = version("transformer-lens").startswith("3.")


class Cell(NamedTuple):
    """One model of the matrix: made with `tiny.bridge` or `tiny.hooked`, of which architecture, raw or processed."""

    maker: str
    architecture: str
    processed: bool

    @property
    def encoder(self) -> bool:
        return self.architecture in tiny.ENCODERS

    def build(self, **options: Any) -> Any:
        """A model of this cell, one for all tests: who changes a model makes one with `tiny`."""
        return _built(self, **options)


@cache
def _built(cell: Cell, **options: Any) -> Any:
    return getattr(tiny, cell.maker)(cell.architecture, processed=cell.processed, **options)


def _matrix() -> Iterator[Any]:
    """Every cell, and with a reason those that the installed TransformerLens cannot fill."""
    for processed in (False, True):
        weights = "processed" if processed else "raw"
        for architecture in tiny.ARCHITECTURES:
            absent = HAS_HOOKED and architecture == "roberta"
            skip = pytest.mark.skip(reason="TransformerLens 3 has no bridge for RoBERTa")
            cell = Cell("bridge", architecture, processed)
            yield pytest.param(cell, id=f"bridge-{architecture}-{weights}", marks=[skip] if absent else [])
        for architecture in tiny.DECODERS if HAS_HOOKED else ():
            yield pytest.param(Cell("hooked", architecture, processed), id=f"hooked-{architecture}-{weights}")
    if not HAS_HOOKED:
        skip = pytest.mark.skip(reason="TransformerLens 4 has no HookedTransformer")
        yield pytest.param(None, id="hooked", marks=skip)


MATRIX = tuple(_matrix())


@pytest.fixture(params=MATRIX)
def cell(request: pytest.FixtureRequest) -> Cell:
    """Every cell of the matrix in turn."""
    return request.param


@pytest.fixture
def model(cell: Cell) -> Any:
    """The model of every cell in turn; leave it as it is."""
    return cell.build()


@pytest.fixture
def view(model: Any) -> ModelView:
    """What lens_probes reads of the model of every cell in turn."""
    return ModelView(model)


@pytest.fixture
def gpt2() -> Any:
    """One model that needs no matrix; leave it as it is."""
    return Cell("bridge", "gpt2", False).build()


@pytest.fixture(params=["bridge", "hooked"])
def own_gpt2(request: pytest.FixtureRequest) -> Any:
    """A model of each class, made for this test alone, that may be changed."""
    if request.param == "hooked" and not HAS_HOOKED:
        pytest.skip("TransformerLens 4 has no HookedTransformer")
    return getattr(tiny, request.param)("gpt2")


@pytest.fixture
def as_users_run_it() -> Iterator[None]:
    """Without the checks of types that only tests have: a user's mistake must reach our own message."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
