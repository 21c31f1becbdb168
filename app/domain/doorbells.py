"""How many doorbells to ring. Pure."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class DoorbellPlan:
    """``fresh``: ChunkBatches never rung to ring now. ``again``: the oldest rung ones, whose bell is lost."""

    fresh: int
    again: int


def plan_doorbells(*, room: int, queued: int, rung: int, stale: int) -> DoorbellPlan:
    """Fill the window of one priority, and replace the bells that are lost.

    ``room`` is what the window leaves after the bells of this priority and of those served before it;
    ``queued`` are this priority's bells in Redis, ``rung`` its available ChunkBatches that were rung and
    not claimed, ``stale`` those of them rung so long ago that no publisher is still at it. With every bell
    in place ``queued >= rung``; what is short of that was lost, by FLUSHALL, a crash of Redis, or a worker
    killed with the bell in its hand. Ringing one bell too many is harmless: the claim answers it.
    """
    lost = max(0, min(stale, rung - queued))
    room = max(0, room)
    again = min(lost, room)
    return DoorbellPlan(fresh=room - again, again=again)
