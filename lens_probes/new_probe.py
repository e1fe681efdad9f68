"""`python -m lens_probes new-probe NAME`: a package with a probe of one's own, whose tests pass as they are.

It is a copy, under another name, of an example in `examples/plugins/`: TokenNorm has a quantity per token, HeadNorm one
per head. `package/` holds the files that both have.
"""

import importlib.util
import keyword
import re
from importlib.resources import files
from pathlib import Path
from typing import Literal

import lens_probes
from lens_probes.messages import brief
from lens_probes.registry import list_probes, siblings

Per = Literal["token", "head"]
EXAMPLES = ("TokenNorm", "HeadNorm")
IMPORTED = {"EntryPoint", "Float", "Float64", "Path", "Tensor"}  # names that the examples use, beside ours


def new_probe(name: str, per: Per = "token", where: Path = Path()) -> Path:
    """Write a folder with the package of a probe, and return its path. Nothing is written over."""
    check_name(name)
    spelled = {old: new for example in EXAMPLES for old, new in zip(spellings(example), spellings(name), strict=True)}

    def renamed(text: str) -> str:
        return re.sub("|".join(spelled), lambda found: spelled[found[0]], text)

    folder = where / f"lens-probes-{spellings(name)[2]}"
    plugins = files("lens_probes.examples") / "plugins"
    try:
        folder.mkdir()
        for part in ("package", per):
            for file in sorted((plugins / part).iterdir(), key=lambda file: file.name):
                if file.is_file():  # a folder would be a cache
                    text = renamed(file.read_text(encoding="utf-8"))
                    (folder / renamed(file.name)).write_text(text, encoding="utf-8")
    except FileExistsError as error:
        raise ValueError(f"{folder} must be a new folder; got one that exists: move it, or use another name") from error
    except OSError as error:
        raise OSError(
            f"{folder} cannot be written ({error.strerror}): go to a folder that you may write to, with room"
        ) from error
    return folder


def check_name(name: str) -> None:
    """Raise unless a class and a module can have this name."""
    _, module, _ = spellings(name)
    if not re.fullmatch(r"[A-Z][A-Za-z0-9]*[a-z][A-Za-z0-9]*", name) or keyword.iskeyword(name):
        raise ValueError(
            f"the name of a probe must be that of a class, in letters and digits, such as TokenNorm; got {brief(name)}"
        )
    if name.startswith("Test"):
        raise ValueError(f"the name of a probe must not begin with Test, as those of tests do; got {brief(name)}")
    known = {*vars(lens_probes), *siblings(), *list_probes(), *IMPORTED}
    taken = next((each for each in (name, f"{name}Result") if each in known), None)
    if taken:
        raise ValueError(f"the name of a probe must be new; got {name}, and {taken} exists: use another name")
    if keyword.iskeyword(module) or importlib.util.find_spec(module):
        raise ValueError(f"the module of a probe must be new; got {module} for {name}, which exists: use another name")


def spellings(name: str) -> tuple[str, str, str]:
    """A name as that of a class, a module and a package.

    >>> spellings("TokenNorm"), spellings("KLDivergence2")
    (('TokenNorm', 'token_norm', 'token-norm'), ('KLDivergence2', 'kl_divergence2', 'kl-divergence2'))
    """
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()
    return name, words, words.replace("_", "-")
