"""The list of probes: those of this package, found by their files, and those of installed plugins."""

import importlib
import importlib.metadata
import pkgutil
from collections.abc import Sequence
from typing import Any

from lens_probes.probe import Experiment, Probe
from lens_probes.result import Result

ENTRY_POINTS = "lens_probes.probes"


def list_probes() -> dict[str, type[Probe[Any]]]:
    """All probes by name: those in `lens_probes/probes/` and those of the entry point group `lens_probes.probes`.

    >>> sorted(list_probes())[:2]
    ['AttentionPair', 'AttentionPatterns']
    """
    return _probes(importlib.metadata.entry_points(group=ENTRY_POINTS))


def _probes(entry_points: Sequence[importlib.metadata.EntryPoint]) -> dict[str, type[Probe[Any]]]:
    found = {name: kind for name, kind in siblings().items() if issubclass(kind, Probe)}
    for entry in entry_points:
        kind = entry.load()
        if not (isinstance(kind, type) and issubclass(kind, Probe)):
            raise TypeError(
                f"an entry point of {ENTRY_POINTS} must be a Probe class; got {entry.value} for {entry.name!r}: change "
                f"it to one"
            )
        other = found.setdefault(kind.__name__, kind)
        if other is not kind:
            raise ValueError(
                f"probes must have different names; got {kind.__name__} of {other.__module__} and of "
                f"{kind.__module__}: rename one of them"
            )
    return found


def siblings() -> dict[str, type[Any]]:
    """The classes that the files in `probes/` and `experiments/` define: probes, experiments and their results."""
    found: dict[str, type[Any]] = {}
    for folder in ("probes", "experiments"):
        package = importlib.import_module(f"lens_probes.{folder}")
        for file in pkgutil.iter_modules(package.__path__):
            module = importlib.import_module(f"lens_probes.{folder}.{file.name}")
            for name, kind in vars(module).items():
                own = isinstance(kind, type) and kind.__module__ == module.__name__ and not name.startswith("_")
                if not own or not issubclass(kind, Probe | Experiment | Result):
                    continue
                if found.setdefault(name, kind) is not kind:
                    raise ValueError(
                        f"classes must have different names; got {name} of {found[name].__module__} and of "
                        f"{module.__name__}: rename one of them"
                    )
    return found
