"""`tune`: measures this machine for a model, and writes the profile that workers then load."""

from __future__ import annotations

from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

import click

from chunkmill.cli.arguments import BYTES as _BYTES
from chunkmill.cli.arguments import Quantity
from chunkmill.cli.late import Profile, Settings, memory_limit, profile_path, write_profile, write_whole
from chunkmill.cli.output import Screen, json_option
from chunkmill.cli.processes.processes import require_extra
from chunkmill.cli.progress import Bar
from chunkmill.cli.tune.picture import draw
from chunkmill.cli.tune.run import docstrings, measure, own_texts
from chunkmill.cli.tune.table import show
from chunkmill.domain.spaces import Precision
from chunkmill.machine import Machine
from chunkmill.tuning.choose import SHORT, Candidate, Constraints, choose, pareto

MIN_COSINE = {Precision.FLOAT: 0.9999, Precision.INT8: 0.995}

_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
_DTYPES = {short: long for long, short in SHORT.items()}


@click.command()
@click.option("--model", metavar="NAME", help="Model to tune for.  [default: EMBEDDING_MODEL]")
@click.option("--precision", type=click.Choice([str(precision) for precision in Precision]),
              help="Precision of the vectors.  [default: EMBEDDING_PRECISION]")  # fmt: skip
@click.option(
    "--texts", metavar="FILE", help="JSONL, CSV or Parquet file with texts like yours.  [default: Python's docstrings]"
)
@click.option("--max-memory", type=Quantity("amount of memory", _BYTES, "mib", "2GB"), metavar="SIZE",
              help="Maximum memory of the engine's process on a CPU, or of torch on a GPU, such as 2GB.")  # fmt: skip
@click.option("--max-latency", type=Quantity("time", _SECONDS, "ms", "20ms"), metavar="TIME",
              help="Maximum time for one short text, such as 20ms.")  # fmt: skip
@click.option("--min-throughput", type=click.FloatRange(0), metavar="N", help="Minimum number of tokens per second.")
@click.option("--min-cosine", type=click.FloatRange(0, 1), metavar="N",
              help="Minimum cosine to fp32.  [default: 0.9999 for every text; int8: 0.995 on average]")  # fmt: skip
@click.option("--backend", "backends", multiple=True, type=click.Choice(["native", "transformers", "onnx", "openvino"]),
              help="Try only this backend. Can be repeated.  [default: all that run here]")  # fmt: skip
@click.option(
    "--dtype",
    "dtypes",
    multiple=True,
    type=click.Choice(list(_DTYPES)),
    help="Try only this number format. Can be repeated.",
)
@click.option("--budget", "batch_tokens", multiple=True, type=click.IntRange(1), metavar="N",
              help="Try only this number of tokens in a pass. Can be repeated.")  # fmt: skip
@click.option(
    "--threads",
    multiple=True,
    type=click.IntRange(1),
    metavar="N",
    help="Try only this number of threads. Can be repeated.",
)
@click.option("--seconds", type=click.FloatRange(0.1), default=2.0, show_default=True, metavar="N",
              help="Seconds that a pass over the texts takes at fp32's speed. Longer is less noisy.")  # fmt: skip
@click.option("--dry-run", is_flag=True, help="Write no profile.")
@json_option
@click.pass_obj
def tune(
    screen: Screen, model: str | None, precision: str | None, texts: str | None, max_memory: float | None,
    max_latency: float | None, min_throughput: float | None, min_cosine: float | None, backends: tuple[str, ...],
    dtypes: tuple[str, ...], batch_tokens: tuple[int, ...], threads: tuple[int, ...], seconds: float, dry_run: bool,
) -> None:  # fmt: skip
    """Find the fastest settings of this machine for a model, and write them into a profile.

    Workers on this machine load the profile when they next start. What the environment sets explicitly overrides it.
    Every candidate is measured in a process of its own. If no candidate meets all constraints, nothing is written and
    the exit code is 1.
    """
    require_extra("worker", "torch", "tuning")
    settings = Settings.from_env()
    chosen = Precision(precision or settings.embedding_precision)
    constraints = Constraints(
        MIN_COSINE[chosen] if min_cosine is None else min_cosine,
        chosen is Precision.INT8,
        max_memory,
        max_latency,
        min_throughput,
    )
    order = {
        "model": model or settings.embedding_model,
        "precision": str(chosen),
        "constraints": asdict(constraints),
        "backends": backends,
        "dtypes": [_DTYPES[short] for short in dtypes],
        "batch_tokens": batch_tokens,
        "threads": threads,
        "seconds": seconds,
    }
    with Bar(screen, "reading texts") as bar:
        order["texts"] = own_texts(texts) if texts is not None else docstrings()
        result = measure(order, bar)
    from pydantic import TypeAdapter

    candidates = TypeAdapter(list[Candidate]).validate_python(result["candidates"])
    machine = TypeAdapter(Machine).validate_python(result["machine"])
    winner = choose(candidates, constraints)
    path = profile_path(settings, result["fingerprint"], machine)
    picture = path.with_suffix(".svg")
    if winner is not None and winner.measured is not None and not dry_run:
        made_at = datetime.now(UTC).isoformat(timespec="seconds")
        profile = Profile(
            result["model"], result["fingerprint"], winner.setup, winner.measured, constraints, machine,
            result["versions"], made_at,
        )  # fmt: skip
        write_whole(picture, draw(candidates, constraints, winner, model=result["model"], machine=machine, on=made_at))
        write_profile(profile, path)
    written = winner is not None and not dry_run
    if screen.json:
        screen.document(
            {
                "model": result["model"],
                "fingerprint": result["fingerprint"],
                "constraints": constraints,
                "winner": winner.setup if winner else None,
                "candidates": _rows(candidates, constraints),
                "texts": result["texts"],
                "machine": machine,
                "versions": result["versions"],
                "profile": path if written else None,
                "picture": picture if written else None,
            }
        )
    else:
        show(screen, candidates, constraints)
        if written:
            screen.say(("profile  ", "dim"), str(path))
            screen.say(("picture  ", "dim"), str(picture))
            screen.say("Workers on this machine use it after their next start.")
    if winner is None:
        raise SystemExit(1)
    if limit := memory_limit(settings, result["fingerprint"], winner.setup):
        screen.hint(
            f"Workers use at most {limit[1]:,} tokens in a pass, because one ran out of memory above that. To let them "
            f"try again, delete {limit[0]}"
        )


def _rows(candidates: list[Candidate], constraints: Constraints) -> list[dict[str, Any]]:
    front = {best.setup for best in pareto(candidates)}
    return [asdict(one) | {"failed": constraints.failures(one), "pareto": one.setup in front} for one in candidates]
