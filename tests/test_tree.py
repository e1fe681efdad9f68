"""The tree: imports go one way, nobody imports back, and only one folder knows TransformerLens, one file Plotly."""

import ast
import re
from pathlib import Path

import pytest

import lens_probes as lp

PACKAGE = Path(lp.__file__).parent
FILES = {
    ".".join(("lens_probes", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
# Each knows those before it, and none after it. `examples` make models for whoever asks, and know none of the others.
LAYERS = ("messages", "stopping", "settings", "text", "maths", "model", "figures", "result", "reading")
LAYERS += (
    "directions",
    "logit_direction",
    "probe",
    "summary",
    "probes",
    "soft_tokens",
    "stems",
    "experiments",
    "weights",
    "two_models",
    "registry",
    "new_probe",
    "corpus",
    "cluster",
    "pages",
    "serving",
)


def imported(module: str) -> set[str]:
    """The modules of the package that a file imports at its top, also those for type checkers only."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(FILES[module].read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names] + [node.module]
        at_the_top = getattr(node, "col_offset", 0) <= 4  # those in functions make no circle
        found |= {name for name in names if name in FILES and at_the_top} - {module, "lens_probes"}
    return {name for name in found if not module.startswith(f"{name}.")}  # its own folder's front page


def test_no_two_files_import_each_other_by_any_way_round() -> None:
    graph = {module: imported(module) for module in FILES if module not in ("lens_probes", "lens_probes.__main__")}
    fronts = {module for module, path in FILES.items() if path.name == "__init__.py"}

    def reaches(start: str, goal: str, seen: set[str]) -> bool:
        return any(
            next_ == goal or (next_ not in seen and not seen.add(next_) and reaches(next_, goal, seen))
            for next_ in graph.get(start, ())
        )

    circles = [module for module in graph if module not in fronts and reaches(module, module, set())]
    assert circles == []


def layer_of(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


@pytest.mark.parametrize("module", [each for each in FILES if layer_of(each) in LAYERS])
def test_a_file_imports_from_lower_layers_only(module: str) -> None:
    own = LAYERS.index(layer_of(module))
    above = {other for other in imported(module) if layer_of(other) not in LAYERS[: own + 1]}
    assert above == set()


@pytest.mark.parametrize(
    ("library", "allowed"),
    [
        ("transformer_lens", r"lens_probes\.(model|examples)(\.|$)"),
        (r"plotly\.(express|subplots)", r"lens_probes\.figures$"),
    ],
)
def test_what_only_one_place_knows_is_imported_nowhere_else(library: str, allowed: str) -> None:
    found = [
        module
        for module, path in FILES.items()
        if re.search(rf"^\s*(import|from) {library}", path.read_text(encoding="utf-8"), re.MULTILINE)
    ]
    assert found and [module for module in found if not re.match(allowed, module)] == []


def test_figures_are_built_in_one_file() -> None:
    builds = [module for module, path in FILES.items() if re.search(r"\bgo\.(?!Figure\b)\w+\(", path.read_text())]
    assert builds == ["lens_probes.figures"]


def test_every_folder_says_what_stands_in_it() -> None:
    for module, path in FILES.items():
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), module
