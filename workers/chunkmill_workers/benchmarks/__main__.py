"""The command ``python -m chunkmill_workers.benchmarks [NAME...]``, which measures, writes JSON and draws plots.

``chunkmill bench`` runs its benchmarks ``engine`` and ``pipeline``.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import click

from chunkmill.cli.jobs.sources import Fields, Reader
from chunkmill.domain.chunks import Chunk
from chunkmill.errors import ChunkmillError
from chunkmill.models import DEFAULT_MODEL
from chunkmill_workers.benchmarks import machine, report, summary
from chunkmill_workers.benchmarks.peers.process import PeerError

DEFAULT = ("enqueue", "write", "search", "engine", "pipeline")
NAMES = (
    *DEFAULT, "gateway", "enqueue-million", "search-million", "million", "reembed", "reembed-million", "provider",
    "gpu", "gpu-pipeline", "plot",
)  # fmt: skip
ROUNDS, QUICK_ROUNDS = 5, 2


@dataclass(frozen=True, slots=True)
class Task:
    """The arguments of all benchmarks of a run."""

    rounds: int
    quick: bool
    model: str
    only: Sequence[str]
    texts: Sequence[str]


def measure(name: str, task: Task, say: report.Say) -> dict[str, Any]:
    """Run one benchmark and return its result. It is imported here, so that some run without torch."""
    rounds, quick = task.rounds, task.quick
    if name == "write":
        from chunkmill_workers.benchmarks import write

        return write.run(rounds=rounds, quick=quick, say=say)
    if name == "engine":
        from chunkmill_workers.benchmarks import engine

        return engine.run(rounds=rounds, quick=quick, say=say, model=task.model, only=task.only, texts=task.texts)
    if name == "pipeline":
        from chunkmill_workers.benchmarks import pipeline

        return pipeline.run(rounds=rounds, quick=quick, say=say, model=task.model, texts=task.texts)
    if name.startswith("gpu"):
        from chunkmill_workers.benchmarks import gpu

        return (gpu.run if name == "gpu" else gpu.run_pipeline)(rounds=rounds, quick=quick, say=say, model=task.model)
    if name == "million":
        from chunkmill_workers.benchmarks import million

        return million.run(rounds=rounds, quick=quick, say=say)
    if name.startswith("search"):
        from chunkmill_workers.benchmarks import search

        return search.run(rounds=rounds, quick=quick, say=say, million=name == "search-million")
    if name.startswith("reembed"):
        from chunkmill_workers.benchmarks import reembed

        return reembed.run(quick=quick, say=say, million=name == "reembed-million")
    if name == "gateway":
        from chunkmill_workers.benchmarks import gateway

        return gateway.run(rounds=rounds, quick=quick, say=say, model=task.model)
    if name == "provider":
        from chunkmill_workers.benchmarks import provider

        return provider.run(quick=quick, say=say)
    from chunkmill_workers.benchmarks import enqueue

    return (enqueue.run_million if name == "enqueue-million" else enqueue.run)(rounds=rounds, quick=quick, say=say)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("names", metavar="[NAME]...", nargs=-1, type=click.Choice(NAMES))
@click.option(
    "--rounds", type=click.IntRange(1), help=f"Interleaved rounds.  [default: {ROUNDS}, with --quick {QUICK_ROUNDS}]"
)
@click.option("--quick", is_flag=True, help="Use small sizes, to see that everything runs, not how fast.")
@click.option("--million", is_flag=True, help="Run enqueue-million too: a million chunks from a generator.")
@click.option("--model", default=DEFAULT_MODEL, show_default=True, help="Model of the benchmarks engine and pipeline.")
@click.option(
    "--only", multiple=True, metavar="WORD", help="Measure only peers whose name contains WORD; may be repeated."
)
@click.option("--texts", "source", metavar="FILE", help="JSONL, CSV or Parquet file with your own texts.")
@click.option("--list", "listing", is_flag=True, help="Print the names of this machine's peers and exit.")
@click.option("--install-peers", is_flag=True, help="First create the environments that some peers need (3 GB).")
@click.option("--json", "as_json", is_flag=True, help="Print JSON; this is the default if the output is a pipe.")
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for JSON and plots.  [default: benchmarks/results and docs/images of a checkout, else ./bench; with "
    "--quick a folder in the system's temporary folder]",
)
def main(
    names: tuple[str, ...], rounds: int | None, quick: bool, million: bool, model: str, only: tuple[str, ...],
    source: str | None, listing: bool, install_peers: bool, as_json: bool, out: Path | None,
) -> None:  # fmt: skip
    """Measure Chunkmill beside its peers on this machine.

    NAME is one of enqueue, write, search, engine and pipeline, which run by default; gateway (which needs wrk);
    enqueue-million; search-million (with a collection of a million rows, an hour and a half); million (through the
    whole system); reembed and reembed-million (a collection moves to another space and back); provider (the steps of
    the Batch API, in a checkout); gpu and gpu-pipeline, for a machine with a GPU; and plot, which only draws the
    results in --out. Each benchmark writes a JSON file there. The plots are drawn at the end.
    """
    signal.signal(signal.SIGTERM, _leave)
    try:
        if listing:
            return _list(model)
        results, images = _folders(out, quick=quick)
        task = Task(rounds or (QUICK_ROUNDS if quick else ROUNDS), quick, model, only, _texts(source))
        os.environ["EMBEDDING_MODEL"] = model  # the pipeline's worker and client have it from here
        chosen = list(names or DEFAULT) + (["enqueue-million"] if million and "enqueue-million" not in names else [])
        _run([name for name in dict.fromkeys(chosen) if name != "plot"], task, results, images, install_peers, as_json)
    except ChunkmillError as error:
        raise click.ClickException(str(error)) from None
    except PeerError as error:
        click.echo("\n".join(error.log), err=True)
        raise click.ClickException(f"the benchmark needs this contender, and it failed: {error}") from None


def _run(names: Sequence[str], task: Task, results: Path, images: Path, install_peers: bool, as_json: bool) -> None:
    measured, files = [], []
    with report.Activity() as doing:
        if install_peers:
            from chunkmill_workers.benchmarks.peers import environments

            environments.install(doing.within("peers"))
        for name in names:
            measured.append(measure(name, task, doing.within(name)))
            files.append(report.write(measured[-1], results))
    from chunkmill_workers.benchmarks.plots import draw

    files += draw(results, images, machine.slug(machine.describe()))
    summary.show(measured, [str(path) for path in files], as_json=as_json or not sys.stdout.isatty())
    for path in files:
        click.echo(f"written: {path}", err=True)


def _folders(out: Path | None, *, quick: bool) -> tuple[Path, Path]:
    """The folders for JSON and for plots. A quick run, whose figures mean nothing, writes outside a checkout."""
    if out is None and quick:
        out = Path(tempfile.gettempdir()) / "chunkmill-bench-quick"
    if out is None and (machine.ROOT / ".git").exists():
        return machine.ROOT / "benchmarks" / "results", machine.ROOT / "docs" / "images"
    out = out or Path("bench")
    return out, out


def _texts(source: str | None) -> list[str]:
    """The distinct texts of the file."""
    if source is None:
        return []
    reader = Reader([source], Fields(), skip=False, stdin=sys.stdin.buffer)
    return list(dict.fromkeys(chunk.text for chunk in reader if isinstance(chunk, Chunk)))


def _list(model: str) -> None:
    from chunkmill_workers.benchmarks import contest

    with contest.ground(model, quick=True) as on:
        for peer in on.peers():
            click.echo(peer.name)


def _leave(number: int, frame: FrameType | None) -> None:
    """Exit through the ``finally`` blocks, which stop processes and delete folders."""
    sys.exit(128 + number)


if __name__ == "__main__":
    main()
