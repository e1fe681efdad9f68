"""What comes with the probe: the entry point and the notebook."""

import json
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

from token_norm import TokenNorm

HERE = Path(__file__).parent


def test_the_entry_point_loads_the_probe():
    project = tomllib.loads((HERE / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    ((name, value),) = project["entry-points"]["lens_probes.probes"].items()
    assert EntryPoint(name, value, "lens_probes.probes").load() is TokenNorm


def test_the_notebook_runs():
    names = {}
    for cell in json.loads((HERE / "token_norm.ipynb").read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
    assert names["result"].provenance.n_prompts == 12
