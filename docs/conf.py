"""Settings of Sphinx. `make docs` builds the site; docs/make.py makes its pages first."""

import inspect
import tomllib
from typing import Any

import cards

import lens_probes as lp


def repository(pyproject: dict[str, Any]) -> str:
    """The address from which links to the source and to Colab follow; "" until it is known.

    It is `repository` in [tool.lens-probes] of pyproject.toml, or Repository in [project.urls].
    """
    own = pyproject.get("tool", {}).get("lens-probes", {}).get("repository", "")
    return (own or pyproject["project"].get("urls", {}).get("Repository", "")).rstrip("/").removesuffix(".git")


REPOSITORY = repository(tomllib.loads((cards.ROOT / "pyproject.toml").read_text(encoding="utf-8")))

project = "lens_probes"
author = copyright = "The lens_probes developers"
smartquotes = False
release = version = lp.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
nitpicky = True
# Types in signatures are written for readers, as help() shows them: only names of `lens_probes` itself are links.
nitpick_ignore_regex = [(r"py:.*", r"(?!lens_probes\.\w+$).*")]

html_theme = "furo"
html_title = f"lens_probes {release}"
html_static_path = [str(cards.DOCS / "_static")]
html_css_files = ["site.css"]
html_copy_source = False
html_theme_options = {"footer_icons": []}


def as_rst(app: Any, what: str, name: str, kind: Any, options: Any, lines: list[str]) -> None:
    """Docstrings are plain text. The page of a probe has the question of its card as its first line."""
    text = "\n".join(lines)
    if isinstance(kind, type) and kind in cards.asked().values():
        text = f"{cards.card(kind)[1]}\n\n{cards.own_text(kind)}"
    lines[:] = cards.rst(text).splitlines()


def without_fields(
    app: Any, what: str, name: str, kind: Any, options: Any, signature: str | None, returns: str | None
) -> tuple[str | None, str | None] | None:
    """Settings as help() shows them. Classes that are not made by hand show no arguments."""
    if hasattr(kind, "__signature__"):  # a function whose types help() shows by name
        shown = inspect.signature(kind)
        own = [each for each in shown.parameters.values() if each.name != "self"]
        return str(shown.replace(parameters=own, return_annotation=shown.empty)), returns
    if not isinstance(kind, type) or issubclass(kind, lp.Prompt):
        return None
    if kind in cards.asked().values():
        return str(cards.called(kind)), None
    return "", None


def skipped(app: Any, what: str, name: str, kind: Any, skip: bool, options: Any) -> bool | None:
    """Fields of named tuples say nothing but their numbers."""
    return True if (getattr(kind, "__doc__", None) or "").startswith("Alias for field number") else None


def setup(app: Any) -> None:
    """What Sphinx calls first."""
    app.connect("autodoc-skip-member", skipped)
    app.connect("autodoc-process-docstring", as_rst)
    app.connect("autodoc-process-signature", without_fields)
