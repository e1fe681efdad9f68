"""A corpus on several processes or machines, with Ray (install `lens-probes[ray]`).

    driver: texts -> shards -> one task per shard -> worker with a model -> files in a folder that all of them share

A worker gets the texts of a shard, and gives back its numbers of prompts and tokens. Results go through the folder
only. The driver counts shards and folds their groups, so that the manifest has one writer.
"""

import functools
import os
import socket
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from lens_probes.corpus.folder import CannotWrite, joining, writing
from lens_probes.corpus.measuring import Measured, Work, check_options
from lens_probes.corpus.running import ATTEMPTS, SHARD_SIZE, Recording, Run, open_run
from lens_probes.corpus.texts import Shard, Texts, documents
from lens_probes.messages import brief
from lens_probes.probe import Probe, check_probes
from lens_probes.reading import TOKENS_PER_BATCH
from lens_probes.text.words import WordClasses

OBJECTS = 100 * 2**20  # bytes of Ray's store on this machine: only texts go through it


def run_corpus(
    probes: Sequence[Probe[Any]],
    load: Callable[[], Any],
    texts: Texts,
    folder: str | os.PathLike[str],
    *,
    workers: int = 2,
    gpus_per_worker: int | float = 0,
    cpus_per_worker: int | float = 1,
    address: str | None = None,
    shard_size: int = SHARD_SIZE,
    max_tokens: int | None = None,
    batch_tokens: int = TOKENS_PER_BATCH,
    prepend_bos: bool | None = None,
    word_class: WordClasses | None = None,
    progress: bool = True,
) -> Run:
    """Run probes over a corpus with several workers, each with a model of its own.

    `load`: a function without arguments that returns the model, called once per worker; where a worker has a GPU, it
    must put the model on "cuda". `folder`: on a disk that the driver and all workers share, with file locks.
    `gpus_per_worker` may be a fraction; a worker has as many threads as `cpus_per_worker`.

    `address`: that of a Ray cluster, as `ray.init` takes it. None: the cluster that this process is connected to, that
    of RAY_ADDRESS, or a new one on this machine, which ends with the run.

    All else, and what is kept when anything is killed, as `lens_probes.run_corpus`. A worker that dies is replaced, and
    its shard is measured again, three times at most.
    """
    check_probes(probes)
    check_options(max_tokens, batch_tokens)
    if not isinstance(workers, int) or isinstance(workers, bool) or workers < 1:
        raise ValueError(f"workers must be a whole number, 1 or more; got {brief(workers)}")
    if not callable(load) or hasattr(load, "run_with_cache"):
        raise TypeError(
            f"load must be a function that returns the model; got {brief(load)}: pass one, such as lambda: "
            f"lens_probes.load_model(name)"
        )
    make = functools.partial(
        _work,
        probes,
        load,
        prepend_bos=prepend_bos,
        word_class=word_class,
        max_tokens=max_tokens,
        batch_tokens=batch_tokens,
    )
    documents(texts)  # raises for what is no corpus, before a folder is made
    with (
        writing(folder) as own,
        Recording(own, texts, shard_size, progress).until_interrupted() as recording,
        _ray(address, workers, cpus_per_worker, gpus_per_worker) as ray,
    ):
        # Ray replaces a worker that dies, and gives the replacement the shard that was lost.
        resources = {"num_cpus": cpus_per_worker, "num_gpus": gpus_per_worker}
        actor: Any = ray.remote(max_restarts=-1, max_task_retries=ATTEMPTS - 1, **resources)(Worker)
        actors = [actor.remote(make, own.path.absolute()) for _ in range(workers)]
        try:
            _measure(ray, actors, recording)
        finally:
            for each in actors:
                ray.kill(each)
    return open_run(folder)


def _work(probes: Sequence[Probe[Any]], load: Callable[[], Any], **options: Any) -> Work:
    return Work(probes, load(), **options)


class Problem(NamedTuple):
    """Why a worker has no result; `of_folder` if no worker can save one."""

    reason: str
    of_folder: bool = False


class Worker:
    """One process with one model. While it lives it holds the folder's lock, also after the driver was killed."""

    def __init__(self, make: Callable[[], Work], folder: Path) -> None:
        self._make, self._folder = make, folder
        self._held = ExitStack()

    @functools.cached_property
    def _own(self) -> Any:
        return self._held.enter_context(joining(self._folder))

    @functools.cached_property
    def _work(self) -> Work:  # made by the first task: a replacement has no other
        return self._make()

    def fingerprint(self) -> dict[str, Any] | Problem:
        """That of this worker's model, probes and options."""
        try:
            _ = self._own
            return self._work.fingerprint()
        except Exception as error:
            return _problem(error)

    def measure(self, shard: Shard) -> Measured | Problem:
        """Measure and save a shard; its numbers without its results."""
        try:
            own, measured = self._own, self._work.measure(shard)
            own.save(shard.number, measured.results)
            return measured._replace(results=[])
        except Exception as error:
            return _problem(error)


def _problem(error: Exception) -> Problem:
    if isinstance(error, CannotWrite):
        return Problem(str(error), of_folder=True)
    return Problem(f"{type(error).__name__}: {error}")


def _measure(ray: Any, actors: Sequence[Any], recording: Recording) -> None:
    """Give every missing shard to a worker that is free, until all are done or have failed."""
    starting = {actor.fingerprint.remote(): actor for actor in actors}
    working: dict[Any, tuple[Shard, int, Any]] = {}
    again: deque[tuple[Shard, int]] = deque()
    missing: Iterator[Shard] = iter(())
    first: dict[str, Any] = {}
    while starting or working:
        (reference,), _ = ray.wait([*starting, *working], num_returns=1)
        died, outcome = _outcome(ray, reference)
        if isinstance(outcome, Problem) and outcome.of_folder:
            raise CannotWrite(outcome.reason)
        if reference in starting:
            actor = starting.pop(reference)
            if isinstance(outcome, Problem):
                raise RuntimeError(f"load must return a model that the probes read; got {outcome.reason}")
            if not first:
                first = outcome
                recording.begin(first)
                missing = recording.missing()
            _check_same(first, outcome)
        else:
            shard, attempt, actor = working.pop(reference)
            if isinstance(outcome, Measured):
                recording.done(shard, outcome)
            elif died or attempt == ATTEMPTS:
                recording.failed(shard, outcome.reason)
            else:
                again.append((shard, attempt + 1))
                ray.kill(actor, no_restart=False)  # an error on a GPU can leave a process that fails at everything
        shard, attempt = again.popleft() if again else (next(missing, None), 1)
        if shard is not None:
            working[actor.measure.remote(shard)] = shard, attempt, actor


def _outcome(ray: Any, reference: Any) -> tuple[bool, Any]:
    """Whether the worker died too often at it, and what came of a task."""
    try:
        return False, ray.get(reference)
    except ray.exceptions.RayError as error:
        *_, last = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
        return True, Problem(f"the worker died, {ATTEMPTS} times ({type(error).__name__}: {last:.150})")


def _check_same(first: dict[str, Any], other: dict[str, Any]) -> None:
    for name, value in first.items():
        if other.get(name) != value:
            raise RuntimeError(
                f"all workers must have the same {name}; got {value!s:.100} and {other.get(name)!s:.100}: load the "
                f"same model, with the same versions, on all machines"
            )


@contextmanager
def _ray(address: str | None, workers: int, cpus: int | float, gpus: int | float) -> Iterator[Any]:
    """Ray, connected to a cluster; disconnected at the end if it was connected here."""
    try:
        import ray
    except ImportError as error:
        raise ImportError('cluster.run_corpus needs Ray: pip install "lens-probes[ray]"') from error
    if ray.is_initialized():
        if address is not None:
            raise ValueError(
                f"address must be None where this process is connected to a cluster already; got {address!r}: call "
                f"ray.shutdown() first, or leave it out"
            )
        yield ray
        return
    if address is None and "RAY_ADDRESS" not in os.environ:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(
            address="local",
            num_cpus=max(1, -int(-workers * cpus // 1)),
            include_dashboard=False,
            log_to_driver=False,
            object_store_memory=OBJECTS,
        )
        available = ray.cluster_resources().get("GPU", 0)
        if gpus * workers > available:
            ray.shutdown()
            raise ValueError(
                f"workers must find their GPUs on this machine; got {workers} workers of {gpus:g}, and "
                f"{socket.gethostname()} has {available:g}: ask for fewer, or give the address of a cluster"
            )
    else:
        ray.init(address=address, log_to_driver=False)
    try:
        yield ray
    finally:
        ray.shutdown()
