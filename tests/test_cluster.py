"""A corpus with Ray: the bits of a run in one process, whatever its workers go through."""

import functools
import inspect
import os
import signal
import time
import warnings
from pathlib import Path

import pytest
import torch

import lens_probes as lp
from lens_probes.examples import tiny
from lens_probes.result import schema

TEXTS = lp.demo.sentences()[:40]
PROBES = [lp.ResidualMean(), lp.RankShift(layers=[1])]
QUIET = {"progress": False, "shard_size": 2, "workers": 2}


def same(one, other):
    names = [name for name in schema(type(one)).axes if getattr(one, name) is not None]
    assert names and all(torch.equal(getattr(one, name), getattr(other, name)) for name in names)
    assert one.provenance == other.provenance
    return True


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"workers": 0}, ValueError, "workers must be a whole number, 1 or more; got 0"),
        ({"batch_tokens": 0}, ValueError, "batch_tokens must be a whole number, 1 or more; got 0"),
        ({"load": "gpt2"}, TypeError, "load must be a function that returns the model; got 'gpt2'"),
        ({"load": tiny.bridge}, ImportError, 'cluster.run_corpus needs Ray: pip install "lens-probes[ray]"'),
        ({"probes": []}, ValueError, "probes must be one or more"),
    ],
)
@pytest.mark.usefixtures("as_users_run_it")
def test_what_cannot_be_run_is_said_before_ray_starts(settings, error, message, tmp_path, monkeypatch):
    import builtins

    imported = builtins.__import__

    def without_ray(name, *others):
        if name == "ray":
            raise ImportError(name)
        return imported(name, *others)

    monkeypatch.setattr(builtins, "__import__", without_ray)
    given = {"probes": PROBES, "load": tiny.bridge, "workers": 2, **settings}
    with pytest.raises(error) as refused:
        lp.cluster.run_corpus(given.pop("probes"), given.pop("load"), TEXTS, tmp_path / "run", **given)
    assert message in str(refused.value)


def test_the_two_ways_to_run_a_corpus_have_the_same_options_and_defaults():
    here, there = (inspect.signature(run).parameters for run in (lp.run_corpus, lp.cluster.run_corpus))
    shared = [name for name in here if name != "model"]
    assert [str(here[name]) for name in shared] == [str(there[name]) for name in shared]


def test_a_model_in_the_place_of_the_function_that_loads_it_is_refused(gpt2, tmp_path):
    with pytest.raises(TypeError, match="load must be a function that returns the model; got <TransformerBridge>"):
        lp.cluster.run_corpus(PROBES, gpt2, TEXTS, tmp_path / "run")


# Below, Ray is started once, with two workers of one thread.


@pytest.fixture(scope="module")
def cluster():
    ray = pytest.importorskip("ray", reason="Ray is not installed (lens-probes[ray])")
    paths = [str(Path(lp.__file__).parent.parent), str(Path(__file__).parent)]  # what workers import
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(action="ignore"):
        patch.setenv("PYTHONPATH", os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")]))
        ray.init(
            address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=100 * 2**20
        )
        yield ray
        ray.shutdown()


def _told(log: Path, dies_at: int | None = None, fails_at: int | None = None):
    """A model, in a process that writes down which shards it measures."""
    from lens_probes.corpus.measuring import Work
    from lens_probes.examples import tiny

    measure = Work.measure

    def measure_and_tell(work, shard, *others):
        with log.open("a") as file:
            file.write(f"{shard.number} {os.getpid()}\n")
        deadline = time.monotonic() + 300
        while len({line.split()[1] for line in log.read_text().splitlines()}) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)  # a worker that starts later gets a shard too, however slow the machine
        times = [line.split()[0] for line in log.read_text().splitlines()].count(str(shard.number))
        if shard.number == dies_at and times < 3:
            os.kill(os.getpid(), signal.SIGKILL)
        if shard.number == fails_at:
            raise MemoryError("too little")
        return measure(work, shard, *others)

    Work.measure = measure_and_tell
    return tiny.bridge()


@pytest.mark.matrix
def test_two_workers_give_the_bits_of_one_process_and_what_is_done_is_not_done_again(cluster, tmp_path):
    expected = lp.run_corpus(PROBES, tiny.bridge(), TEXTS, tmp_path / "serial", progress=False, shard_size=2)
    load = functools.partial(_told, tmp_path / "log")
    run = lp.cluster.run_corpus(PROBES, load, TEXTS, tmp_path / "run", **QUIET)
    lines = [line.split() for line in (tmp_path / "log").read_text().splitlines()]
    assert sorted(int(shard) for shard, _ in lines) == list(range(20)) and len({process for _, process in lines}) == 2
    assert run.complete and all(map(same, run.results, expected.results))
    assert sorted(path.name for path in (tmp_path / "run").rglob("*")) == sorted(
        path.name for path in (tmp_path / "serial").rglob("*")
    )
    again = lp.cluster.run_corpus(PROBES, load, TEXTS, tmp_path / "run", **QUIET)
    assert len((tmp_path / "log").read_text().splitlines()) == 20 and again.complete
    with pytest.raises(ValueError, match="a run must go on with the same weights; got "):
        lp.cluster.run_corpus(PROBES, functools.partial(tiny.bridge, seed=1), TEXTS, tmp_path / "run", **QUIET)


@pytest.mark.matrix
def test_a_worker_that_dies_is_replaced_and_a_shard_that_fails_is_reported(cluster, tmp_path):
    expected = lp.run_corpus(PROBES, tiny.bridge(), TEXTS, tmp_path / "serial", progress=False, shard_size=2)
    load = functools.partial(_told, tmp_path / "log", 5, 9)
    run = lp.cluster.run_corpus(PROBES, load, TEXTS, tmp_path / "run", **QUIET)
    shards = [int(line.split()[0]) for line in (tmp_path / "log").read_text().splitlines()]
    assert shards.count(5) >= 3 and shards.count(9) >= 3  # Ray asks again where an answer was lost with its worker
    assert run.shards == 19 and run.failed_shards.values.tolist() == [[9, 2, "MemoryError: too little"]]
    run = lp.run_corpus(PROBES, tiny.bridge(), TEXTS, tmp_path / "run", progress=False, shard_size=2)
    assert run.complete and all(map(same, run.results, expected.results))
    assert not [path for path in (tmp_path / "run").rglob("*") if path.name.startswith(".")]


@pytest.mark.matrix
def test_a_model_that_cannot_be_loaded_and_a_folder_that_is_not_shared_are_said(cluster, tmp_path, monkeypatch):
    def fail():
        raise OSError("no such model")

    with pytest.raises(
        RuntimeError, match=r"load must return a model that the probes read; got OSError: no such model"
    ):
        lp.cluster.run_corpus(PROBES, fail, TEXTS, tmp_path / "run", **QUIET)
    monkeypatch.setattr(Path, "absolute", lambda path: Path("/nowhere/run") if path == tmp_path / "run" else path)
    with pytest.raises(
        OSError, match=r"must be on a disk that all workers share; .* has no /nowhere/run: name one that"
    ):
        lp.cluster.run_corpus(PROBES, tiny.bridge, TEXTS, tmp_path / "run", **QUIET)
    with pytest.raises(ValueError, match="address must be None where this process is connected to a cluster already"):
        lp.cluster.run_corpus(PROBES, tiny.bridge, TEXTS, tmp_path / "run", address="local", **QUIET)
