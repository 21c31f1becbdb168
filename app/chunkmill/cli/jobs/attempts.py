"""The report of attempts: what each kill cost, and each failure."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from chunkmill.cli.output import Screen, count
from chunkmill.domain.results import Attempt

UNREMARKABLE = ("completed", "running")


def attempt_totals(attempts: Sequence[Attempt]) -> dict[str, int]:
    return {
        "attempts": len(attempts),
        "deaths": sum(each.outcome == "died" for each in attempts),
        "recomputed": sum(each.recomputed for each in attempts),
        "most_at_risk": max((each.at_risk for each in attempts), default=0),
    }


def show_attempts(screen: Screen, attempts: Sequence[Attempt]) -> None:
    """Those that did not simply complete, and a line of totals over all."""
    screen.say("")
    listed = [each for each in attempts if each.outcome not in UNREMARKABLE]
    if listed:
        screen.table(
            ["ChunkBatch", "attempt", "worker", "first write", "ended", "embedded", "recomputed", "at risk", "outcome"],
            [
                (each.chunk_batch_id, each.attempt, each.worker, moment(each.first_write_at), moment(each.ended_at),
                 each.contents, each.recomputed, each.at_risk,
                 f"{each.outcome}: {each.evidence}" if each.evidence else each.outcome)
                for each in listed
            ],
        )  # fmt: skip
    totals = attempt_totals(attempts)
    screen.say(
        f"{count(totals['attempts'], 'attempt')}, {count(totals['deaths'], 'death')}, "
        f"{count(totals['recomputed'], 'text')} recomputed, {totals['most_at_risk']:,} at most at risk at a time."
    )


def moment(when: datetime | None) -> str | None:
    return f"{when.astimezone():%m-%d %H:%M:%S}" if when else None
