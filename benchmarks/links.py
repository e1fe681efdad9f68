"""Links to the repository. All follow from one setting: `repository` in pyproject.toml, empty until it is known.

`python benchmarks/links.py` writes the badges of the README, and in each notebook the badge that opens it on Colab, or
takes them away while there is no address. It also writes the cell with which a notebook runs without a clone. A build
reads the same setting: an index then shows links to the repository, and the README with absolute links.
"""

import json
import re
import tomllib
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

ROOT = Path(__file__).parent.parent
BRANCH = "main"
SET_UP = """\
# Installs the package where it is missing, as on Colab.
import importlib.util

if importlib.util.find_spec("lens_probes") is None:
    %pip install --quiet "lens-probes[demo]"
"""


class Links(MetadataHookInterface):
    """What an index shows of the project."""

    def update(self, metadata: dict[str, Any]) -> None:
        repository, readme = address(), (ROOT / "README.md").read_text(encoding="utf-8")
        metadata["urls"] = urls(repository)
        metadata["readme"] = {"content-type": "text/markdown", "text": absolute(readme, repository)}


def address() -> str:
    """The setting."""
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    return pyproject["tool"]["lens-probes"]["repository"].rstrip("/")


def urls(repository: str) -> dict[str, str]:
    """What stands beside the project's name on an index."""
    if not repository:
        return {}
    changelog = f"{repository}/blob/{BRANCH}/CHANGELOG.md"
    return {"Repository": repository, "Issues": f"{repository}/issues", "Changelog": changelog}


def absolute(text: str, repository: str) -> str:
    """A page with links to files of the repository in place of relative ones, which only the repository can follow."""
    if not repository:
        return text

    def link(found: re.Match[str]) -> str:
        kind = "raw" if found["image"] else "blob"
        return f"{found['image']}[{found['text']}]({repository}/{kind}/{BRANCH}/{found['path']})"

    return re.sub(r"(?P<image>!?)\[(?P<text>[^]]*)\]\((?!https?:|#)(?P<path>[^)]+)\)", link, text)


def badges(repository: str) -> str:
    """Those of the README: whether tests pass, and the tour on Colab."""
    if not repository:
        return ""
    tests = f"{repository}/actions/workflows/tests.yml"
    return f"[![tests]({tests}/badge.svg)]({tests}) {on_colab(repository, 'tour')}"


def on_colab(repository: str, notebook: str) -> str:
    """The badge that opens a notebook on Colab, which reads GitHub only."""
    owner_and_name = repository.removeprefix("https://github.com/")
    if not repository or owner_and_name == repository:
        return ""
    site = "https://colab.research.google.com"
    page = f"{site}/github/{owner_and_name}/blob/{BRANCH}/notebooks/{notebook}.ipynb"
    return f"[![Open in Colab]({site}/assets/colab-badge.svg)]({page})"


def under_title(page: str, line: str) -> str:
    """A page with this line of badges under its title, in place of one that is there."""
    title, rest = re.fullmatch(r"(# [^\n]*\n\n)(?:\[!\[[^\n]*\n\n)?(.*)", page, re.DOTALL).groups()  # pyright: ignore[reportOptionalMemberAccess]
    return f"{title}{line}\n\n{rest}" if line else f"{title}{rest}"


def notebook_with_links(text: str, name: str, repository: str) -> str:
    """A notebook's file with its badge and its set-up cell. Outputs stay as they are."""
    notebook = json.loads(text)
    title, *cells = notebook["cells"]
    title["source"] = under_title("".join(title["source"]), on_colab(repository, name)).splitlines(keepends=True)
    set_up = {
        "cell_type": "code",
        "execution_count": None,
        "id": "set-up",
        "metadata": {},
        "outputs": [],
        "source": SET_UP.strip().splitlines(keepends=True),
    }
    notebook["cells"] = [title, set_up, *(cell for cell in cells if cell["id"] != set_up["id"])]
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"


def main() -> None:
    repository = address()
    pages = {ROOT / "README.md": under_title((ROOT / "README.md").read_text(encoding="utf-8"), badges(repository))}
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        pages[path] = notebook_with_links(path.read_text(encoding="utf-8"), path.stem, repository)
    for path, text in pages.items():
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
