"""How many doorbells to ring. Pure."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class DoorbellPlan:
    """``fresh``: ChunkBatches never rung to ring now. ``again``: the oldest rung ones, whose bell is lost."""

    fresh: int
    again: int


def plan_doorbells(*, window: int, queued: int, rung: int, stale: int) -> DoorbellPlan:
    """Keep at most ``window`` doorbells in Redis and replace those that are lost.

    ``queued`` is what Redis holds (waiting and delivered but not acknowledged), ``rung`` the available
    ChunkBatches that were rung and not claimed yet, ``stale`` those of them rung so long ago that the
    publisher's own delay cannot explain their absence. With every bell in place ``queued >= rung``; what
    is short of that was lost, by FLUSHALL, a crash of Redis, or a worker killed between BRPOP and its
    unacked entry. Ringing one bell too many is harmless: the claim answers it.
    """
    lost = max(0, min(stale, rung - queued))
    room = max(0, window - queued)
    again = min(lost, room)
    return DoorbellPlan(fresh=room - again, again=again)
