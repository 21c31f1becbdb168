"""Prints the table of what `tune` measured."""

from __future__ import annotations

from collections.abc import Sequence

from rich.text import Text

from chunkmill.cli.output import Screen
from chunkmill.tuning.choose import Candidate, Constraints, choose, pareto, ranked

WINNER, FRONT = "★", "◆"
LIMITS = {
    "memory": ("--max-memory", "max_memory_mib"),
    "latency": ("--max-latency", "max_latency_ms"),
    "throughput": ("--min-throughput", "min_throughput"),
    "cosine": ("--min-cosine", "min_cosine"),
}


def show(screen: Screen, candidates: Sequence[Candidate], constraints: Constraints) -> None:
    """Print the candidates: the fastest first, then those below the cosine gate, then those that do not run."""
    winner = choose(candidates, constraints)
    front = {candidate.setup for candidate in pareto(candidates)}
    fast = sorted(ranked(candidates, constraints), key=lambda candidate: -_speed(candidate))
    gated = [candidate for candidate in candidates if candidate.measured is not None and candidate not in fast]
    broken = [candidate for candidate in candidates if candidate.measured is None]
    some_threads = len({candidate.setup.threads for candidate in candidates}) > 1
    some_parallel = len({candidate.setup.parallel_batches for candidate in candidates}) > 1
    heads = ["", "", "tokens", *["threads"] * some_threads, *["ChunkBatches"] * some_parallel]
    heads += ["tokens/s", "1 text ms", "MiB", "cosine min", "mean", "breaks"]
    rows = []
    for candidate in (*fast, *gated, *broken):
        mark = WINNER if candidate is winner else FRONT if candidate.setup in front else ""
        style = "bold green" if candidate is winner else "" if candidate in fast else "dim"
        setup = candidate.setup
        counts = [setup.batch_tokens, *[setup.threads] * some_threads, *[setup.parallel_batches] * some_parallel]
        numbers = [_number(f"{count:,}", style) for count in counts] + _numbers(candidate, style)
        rows.append([Text(mark, style=style), Text(setup.kind, style=style), *numbers, _note(candidate, constraints)])
    screen.table(heads, rows)
    screen.say("")
    for reason, setups in _reasons(broken).items():
        screen.say((f"{', '.join(setups)}: ", "dim"), reason)
    if winner is None:
        screen.say(("No candidate meets all constraints: ", "bold red"), _stated(constraints), ". Nothing was written.")
    else:
        screen.say((f"{WINNER} the fastest candidate that meets ", "bold green"), _stated(constraints))
    screen.say((f"{FRONT} no other candidate beats it in speed, time for one text and memory together", "dim"))


def _numbers(candidate: Candidate, style: str) -> list[Text]:
    measured = candidate.measured
    if measured is None:
        return [_number("", style)] * 5
    shown_ = (
        "" if measured.tokens_per_second is None else f"{measured.tokens_per_second:,.0f}",
        "" if measured.latency_ms is None else f"{measured.latency_ms:.1f}",
        "" if measured.peak_mib is None else f"{measured.peak_mib:,.0f}",
        f"{measured.cosine_min:.6f}",
        f"{measured.cosine_mean:.6f}",
    )
    return [_number(number, style) for number in shown_]


def _note(candidate: Candidate, constraints: Constraints) -> Text:
    broken = constraints.failures(candidate)
    return Text("does not run" if broken == ("problem",) else ", ".join(broken), style="red")


def _reasons(broken: Sequence[Candidate]) -> dict[str, list[str]]:
    """Each problem once, with the setups that have it."""
    reasons: dict[str, list[str]] = {}
    for candidate in broken:
        setup = candidate.setup
        reasons.setdefault(candidate.problem or "", []).append(f"{setup.kind} {setup.batch_tokens:,}")
    return reasons


def _stated(constraints: Constraints) -> str:
    stated = [
        f"{option} {getattr(constraints, field):,.{0 if field != 'min_cosine' else 4}f}{unit}"
        for (option, field), unit in zip(LIMITS.values(), (" MiB", " ms", " tokens/s", ""), strict=True)
        if getattr(constraints, field) is not None
    ]
    return ", ".join(stated) + (" (mean)" if constraints.of_mean else "")


def _number(text: str, style: str) -> Text:
    return Text(text, style=style, justify="right")


def _speed(candidate: Candidate) -> float:
    return (candidate.measured and candidate.measured.tokens_per_second) or 0.0
