"""Shows the attempts of a job: which ones failed or died, and how much work each death cost."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from chunkmill.cli.output import Screen, count
from chunkmill.domain.results import Attempt

UNREMARKABLE = ("completed", "running")


def attempt_totals(attempts: Sequence[Attempt]) -> dict[str, int]:
    return {
        "attempts": len(attempts),
        "deaths": sum(attempt.outcome == "died" for attempt in attempts),
        "recomputed": sum(attempt.recomputed for attempt in attempts),
        "most_at_risk": max((attempt.at_risk for attempt in attempts), default=0),
    }


def show_attempts(screen: Screen, attempts: Sequence[Attempt]) -> None:
    """List the attempts that did not complete, and print one line of totals for all attempts."""
    screen.say("")
    listed = [attempt for attempt in attempts if attempt.outcome not in UNREMARKABLE]
    if listed:
        screen.table(
            ["ChunkBatch", "attempt", "worker", "first write", "ended", "embedded", "recomputed", "at risk", "outcome"],
            [
                (a.chunk_batch_id, a.attempt, a.worker, moment(a.first_write_at), moment(a.ended_at),
                 a.contents, a.recomputed, a.at_risk,
                 f"{a.outcome}: {a.evidence}" if a.evidence else a.outcome)
                for a in listed
            ],
        )  # fmt: skip
    totals = attempt_totals(attempts)
    left_out = " (the table shows those that ended early)" if 0 < len(listed) < len(attempts) else ""
    screen.say(
        f"{count(totals['attempts'], 'attempt')}{left_out}, {count(totals['deaths'], 'death')}, "
        f"{count(totals['recomputed'], 'text')} recomputed, at most {totals['most_at_risk']:,} at risk at a time."
    )


def moment(when: datetime | None) -> str | None:
    return f"{when.astimezone():%m-%d %H:%M:%S}" if when else None
