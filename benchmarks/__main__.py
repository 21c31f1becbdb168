"""``python -m benchmarks [NAME...]``: measure, write JSON, draw."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import click

from benchmarks import machine, report

DEFAULT = ("enqueue", "write", "engine", "pipeline")
NAMES = (*DEFAULT, "enqueue-million", "plot")


def measure(name: str, *, rounds: int, quick: bool, say: report.Say) -> dict[str, Any]:
    """Run one benchmark. Imported here, so that one without torch runs without torch."""
    if name == "write":
        from benchmarks import write

        return write.run(rounds=rounds, quick=quick, say=say)
    if name == "engine":
        from benchmarks import engine

        return engine.run(rounds=rounds, quick=quick, say=say)
    if name == "pipeline":
        from benchmarks import pipeline

        return pipeline.run(rounds=rounds, quick=quick, say=say)
    from benchmarks import enqueue

    return (enqueue.run_million if name == "enqueue-million" else enqueue.run)(rounds=rounds, quick=quick, say=say)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("names", metavar="[NAME]...", nargs=-1, type=click.Choice(NAMES))
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(1), help="Interleaved rounds.")
@click.option("--quick", is_flag=True, help="Small sizes: it shows that everything runs, not how fast.")
@click.option("--million", is_flag=True, help="Add enqueue-million, a million chunks from a generator.")
@click.option(
    "--out",
    default=Path(__file__).parent / "results",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for JSON and plots.  [default: benchmarks/results]",
)
def main(names: tuple[str, ...], rounds: int, quick: bool, million: bool, out: Path) -> None:
    """Measure Chunkmill beside its peers on this machine.

    NAME is one of enqueue, write, engine, pipeline (all four unless named), enqueue-million, and plot, which
    only draws what --out holds. Each leaves a JSON file there; the plots are drawn at the end.
    """
    signal.signal(signal.SIGTERM, _leave)
    chosen = list(names or DEFAULT) + (["enqueue-million"] if million and "enqueue-million" not in names else [])
    with report.Doing() as doing:
        results = []
        for name in dict.fromkeys(chosen):
            if name != "plot":
                results.append(measure(name, rounds=rounds, quick=quick, say=doing.within(name)))
                doing.within(name)(f"written to {report.write(results[-1], out).name}")
    for result in results:
        report.show(result)
    from benchmarks.plots import draw

    for path in draw(out, machine.slug(machine.describe())):
        click.echo(f"drawn: {path.name}", err=True)


def _leave(number: int, frame: FrameType | None) -> None:
    """End through ``finally``, where processes are stopped and folders removed."""
    sys.exit(128 + number)


if __name__ == "__main__":
    main()
