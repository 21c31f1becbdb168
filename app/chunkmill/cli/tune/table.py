"""The table that `tune` measured."""

from __future__ import annotations

from collections.abc import Sequence

from rich.text import Text

from chunkmill.cli.output import Screen, shown
from chunkmill.tuning.choose import Candidate, Constraints, choose, pareto, ranked

WINNER, FRONT = "★", "◆"
LIMITS = {
    "memory": ("--max-memory", "max_memory_mib"),
    "latency": ("--max-latency", "max_latency_ms"),
    "throughput": ("--min-throughput", "min_throughput"),
    "cosine": ("--min-cosine", "min_cosine"),
}


def show(screen: Screen, candidates: Sequence[Candidate], constraints: Constraints) -> None:
    """Fastest first; then what is under the cosine gate; then, with its reason, what does not run."""
    winner = choose(candidates, constraints)
    front = {each.setup for each in pareto(candidates)}
    fast = sorted(ranked(candidates, constraints), key=lambda each: -_speed(each))
    gated = [each for each in candidates if each.measured is not None and each not in fast]
    broken = [each for each in candidates if each.measured is None]
    some_threads = len({each.setup.threads for each in candidates}) > 1
    some_parallel = len({each.setup.parallel_batches for each in candidates}) > 1
    heads = ["", "", "tokens", *["threads"] * some_threads, *["ChunkBatches"] * some_parallel]
    heads += ["tokens/s", "1 text ms", "MiB", "cosine min", "mean", "breaks"]
    rows = []
    for each in (*fast, *gated, *broken):
        mark = WINNER if each is winner else FRONT if each.setup in front else ""
        style = "bold green" if each is winner else "" if each in fast else "dim"
        setup = each.setup
        counts = [setup.batch_tokens, *[setup.threads] * some_threads, *[setup.parallel_batches] * some_parallel]
        numbers = [_number(f"{count:,}", style) for count in counts] + _numbers(each, style)
        rows.append([Text(mark, style=style), Text(setup.kind, style=style), *numbers, _note(each, constraints)])
    screen.table(heads, rows)
    screen.say("")
    for reason, setups in _reasons(broken).items():
        screen.say((f"{', '.join(setups)}: ", "dim"), shown(reason))
    if winner is None:
        screen.say(("None meets all constraints: ", "bold red"), _stated(constraints), ". Nothing was written.")
    else:
        screen.say((f"{WINNER} the fastest that meets ", "bold green"), _stated(constraints))
    screen.say((f"{FRONT} no other beats it in speed, time for one text and memory together", "dim"))


def _numbers(candidate: Candidate, style: str) -> list[Text]:
    found = candidate.measured
    if found is None:
        return [_number("", style)] * 5
    shown_ = (
        "" if found.tokens_per_second is None else f"{found.tokens_per_second:,.0f}",
        "" if found.latency_ms is None else f"{found.latency_ms:.1f}",
        "" if found.peak_mib is None else f"{found.peak_mib:,.0f}",
        f"{found.cosine_min:.6f}",
        f"{found.cosine_mean:.6f}",
    )
    return [_number(each, style) for each in shown_]


def _note(candidate: Candidate, constraints: Constraints) -> Text:
    broken = constraints.failures(candidate)
    return Text("does not run" if broken == ("problem",) else ", ".join(broken), style="red")


def _reasons(broken: Sequence[Candidate]) -> dict[str, list[str]]:
    """Each reason once, with the setups that it keeps out."""
    found: dict[str, list[str]] = {}
    for each in broken:
        found.setdefault(each.problem or "", []).append(f"{each.setup.kind} {each.setup.batch_tokens:,}")
    return found


def _stated(constraints: Constraints) -> str:
    found = [
        f"{option} {getattr(constraints, field):,.{0 if field != 'min_cosine' else 4}f}{unit}"
        for (option, field), unit in zip(LIMITS.values(), (" MiB", " ms", " tokens/s", ""), strict=True)
        if getattr(constraints, field) is not None
    ]
    return ", ".join(found) + (" (mean)" if constraints.of_mean else "")


def _number(text: str, style: str) -> Text:
    return Text(text, style=style, justify="right")


def _speed(candidate: Candidate) -> float:
    return (candidate.measured and candidate.measured.tokens_per_second) or 0.0
