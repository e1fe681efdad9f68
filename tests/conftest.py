"""Fixtures: tiny models of every architecture, raw and processed, in every class that this TransformerLens has."""

import platform
from collections.abc import Iterator, Sequence
from functools import cache
from importlib.metadata import version
from itertools import product
from typing import Any, NamedTuple

import jaxtyping
import pytest
import torch
from reference import skip_where_transformerlens_breaks

from lens_probes.examples import tiny
from lens_probes.model import ModelView

HAS_HOOKED = version("transformer-lens").startswith("3.")

# `make test` runs on a Bridge with raw weights of one architecture per family, and on these with processed weights: one
# per kind of norm that is folded. All other cells are marked `matrix`.
PROCESSED = ("gpt2", "llama")
RELATIVES = ("opt", "qwen3", "roberta")  # of gpt2, llama and bert, which stand for their families
FAST = "not matrix and not trials"  # as in pyproject.toml
CELLS = ("cell", "decoder", "encoder", "raw", "rare")  # fixtures below
PACKAGES = ("transformer-lens", "transformers", "torch", "numpy", "pandas", "plotly", "scipy", "jaxtyping", "beartype")
RELEASES = ", ".join(f"{package} {version(package)}" for package in PACKAGES)


@pytest.hookimpl(tryfirst=True)  # before the marks are read
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what is asked of further models."""
    for item in items:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        if any(_is_further(name, value) for name, value in parameters.items()):
            item.add_marker(pytest.mark.matrix)


def _is_further(name: str, value: Any) -> bool:
    """Whether a parameter of a test is a model beyond those of `make test`."""
    if isinstance(value, Cell):
        further = value.maker != "bridge" or value.architecture in RELATIVES
        return further or (value.processed and value.architecture not in PROCESSED)
    if name == "architecture" and value in RELATIVES:
        return True
    # Where TransformerLens has no HookedTransformer, None stands for its cells.
    return value == "hooked" if isinstance(value, str) else value is None and name in CELLS


def pytest_report_header() -> str:
    """The releases, so that what a new one breaks is seen at a glance."""
    return f"with {RELEASES}"


def pytest_terminal_summary(terminalreporter: Any, exitstatus: int, config: pytest.Config) -> None:
    """The same below what failed, and how to run what was left out."""
    if exitstatus:
        terminalreporter.write_line(f"failed with {RELEASES}, Python {platform.python_version()}")
    if config.option.markexpr == FAST:
        terminalreporter.write_line(
            "Left out: tests of further models and settings (matrix) and simulations of chance (trials). "
            'They run with `pytest -m ""`; `make test-all` runs everything.'
        )


class Cell(NamedTuple):
    """One model of the matrix: made with `tiny.bridge` or `tiny.hooked`, of which architecture, raw or processed."""

    maker: str
    architecture: str
    processed: bool

    def build(self, **options: Any) -> Any:
        """A model of this cell, one for all tests: who changes a model makes one with `tiny`."""
        return _built(self, **options)


@cache
def _built(cell: Cell, **options: Any) -> Any:
    model = getattr(tiny, cell.maker)(cell.architecture, processed=cell.processed, **options)
    _shared.append((cell, model, _state_of(model)))
    return model


_shared: list[tuple[Cell, Any, dict[str, Any]]] = []


def _state_of(model: Any) -> dict[str, Any]:
    state = {name: (tensor.detach().clone(), tensor.grad) for name, tensor in model.named_parameters()}
    return state | {"training": model.training, "cfg": repr(model.cfg)}


@pytest.fixture(scope="session", autouse=True)
def shared_models_stay_as_they_are() -> Iterator[None]:
    """An error at the end if a test changed a model that others use."""
    yield
    for cell, model, before in _shared:
        after = _state_of(model)
        changed = [name for name in before | after if not _same(before.get(name), after.get(name))]
        assert not changed, f"a test changed {', '.join(changed[:3])} of the shared model {cell}: let it make its own"


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, tuple) and isinstance(other, tuple):
        return one[1] is other[1] is None and torch.equal(one[0], other[0])
    return one == other


def _cells(architectures: Sequence[str], weights: Sequence[str] = ("raw", "processed")) -> Iterator[Any]:
    """The cells of these architectures, and with a reason those that the installed TransformerLens cannot fill."""
    for maker, architecture, weight in product(("bridge", "hooked"), architectures, weights):
        skip, name = [], f"{maker}-{architecture}-{weight}"
        if maker == "hooked" and (architecture in tiny.ENCODERS or not HAS_HOOKED):
            continue
        if maker == "bridge" and architecture == "roberta" and HAS_HOOKED:
            skip = [pytest.mark.skip(reason="TransformerLens 3 has no bridge for RoBERTa")]
        yield pytest.param(Cell(maker, architecture, weight == "processed"), id=name, marks=skip)
    if not HAS_HOOKED and set(architectures) & set(tiny.DECODERS):
        yield pytest.param(
            None, id="hooked", marks=pytest.mark.skip(reason="TransformerLens 4 has no HookedTransformer")
        )


@pytest.fixture(params=_cells(tiny.ARCHITECTURES))
def cell(request: pytest.FixtureRequest) -> Cell:
    """Every cell of the matrix in turn."""
    return request.param


@pytest.fixture(params=_cells(tiny.DECODERS))
def decoder(request: pytest.FixtureRequest) -> Cell:
    """Those of them that are decoders."""
    return request.param


@pytest.fixture(params=_cells(tiny.ENCODERS))
def encoder(request: pytest.FixtureRequest) -> Cell:
    """Those of them that are encoders."""
    return request.param


@pytest.fixture(params=_cells(tiny.ARCHITECTURES, weights=["raw"]))
def raw(request: pytest.FixtureRequest) -> Cell:
    """Those of them with raw weights, where processing has no bearing."""
    return request.param


@pytest.fixture(params=_cells(tiny.RARE))
def rare(request: pytest.FixtureRequest) -> Cell:
    """The cells of architectures that are not in the matrix, where TransformerLens has them right."""
    cell: Cell = request.param
    if cell.maker == "hooked" and cell.architecture not in ("gpt_neo", "gptj"):
        pytest.skip(f"TransformerLens 3 has no HookedTransformer of {cell.architecture}")
    if HAS_HOOKED and cell.architecture == "cohere":
        pytest.skip("TransformerLens 3 turns Cohere's queries and keys otherwise than Hugging Face")
    skip_where_transformerlens_breaks(cell.architecture)
    return cell


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


@pytest.fixture
def idle() -> Any:
    """A model, made for this test alone, whose blocks write nothing: every state is the embedding."""
    model = tiny.bridge("llama")
    with torch.no_grad():
        for block in model.blocks:
            block.attn.o.original_component.weight.zero_()
            block.mlp.out.original_component.weight.zero_()
    return model


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


LATENT = {
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "head_dim"), 4),
    **dict.fromkeys(("qk_nope_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "first_k_dense_replace"), 1),
    **{"num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2},
    **{"intermediate_size": 64, "moe_intermediate_size": 32},
}


@pytest.fixture
def latent(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A DeepSeek in place of a Llama: TransformerLens splits the outputs of its heads in the wrong places."""
    monkeypatch.setitem(tiny._MODELS, "llama", ("DeepseekV3ForCausalLM", LATENT))
    return tiny.bridge("llama")
