"""How many doorbells to ring, and for which jobs. Pure."""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import dataclass, replace

SMALLEST_WINDOW = 8
"""Bells that Redis holds for workers nobody has seen at work yet, and that a producer fills up to."""
HURRY = 1 / 8
"""Of a poll interval: the pause before the next round where this one came too late, or knows no pace yet."""


@dataclass(frozen=True, slots=True)
class DoorbellPlan:
    """``fresh``: so many ChunkBatches never rung, if they are due. ``again``: so many of the oldest rung ones, whose
    bell is lost, if that leaves room for them."""

    fresh: int
    again: int


def plan_doorbells(*, room: int, queued: int, rung: int, stale: int) -> DoorbellPlan:
    """Fill the window of one priority, and replace the bells that are lost.

    ``room`` is what the window leaves after the bells of this priority and of those served before it;
    ``queued`` are this priority's bells in Redis, ``rung`` its available ChunkBatches that were rung and
    not claimed, ``stale`` those of them rung so long ago that no publisher is still at it. With every bell
    in place ``queued >= rung``; what is short of that was lost, by FLUSHALL, a crash of Redis, or a worker
    killed with the bell in its hand. Ringing one bell too many is harmless: the claim answers it.

    Half of the room is for fresh ones: the bells of a job whose model no worker has are lost for ever.
    """
    lost = max(0, min(stale, rung - queued))
    room = max(0, room)
    return DoorbellPlan(fresh=room - min(lost, (room + 1) // 2), again=min(lost, room))


def share_out(waiting: Mapping[int, int], room: int) -> dict[int, int]:
    """How many of ``room`` new bells each job gets, so that as many wait for one as for another.

    ``waiting`` are the bells of each job that were rung and not answered: who came first and filled the window
    waits until the others have caught up. Of equals the first named is served first.
    """
    shares: dict[int, int] = {}
    line = [(bells, order, job) for order, (job, bells) in enumerate(waiting.items())]
    heapq.heapify(line)
    for _ in range(room if line else 0):
        bells, order, job = line[0]
        shares[job] = shares.get(job, 0) + 1
        heapq.heapreplace(line, (bells + 1, order, job))
    return shares


@dataclass(frozen=True, slots=True)
class DoorbellWindow:
    """How many bells of a priority to keep in Redis: what the workers take until the poller's next round.

    More is no use, and costs fairness: what is in Redis is served in its order, before whatever comes next.
    """

    size: int
    held: int = 0
    """Bells in Redis when the last round ended; 0 where it had no more to ring, so that its end says no pace."""
    hurry: bool = False
    """The next round comes soon."""

    @classmethod
    def smallest(cls, most: int) -> DoorbellWindow:
        return cls(min(SMALLEST_WINDOW, most))

    def adapted(self, left: int, *, part: float, most: int) -> DoorbellWindow:
        """The window of a round that finds ``left`` bells, ``part`` of a poll interval after the last one.

        At this pace less than half of them would last an interval: twice as many, up to ``most``, and rounds
        that follow soon, which is also what helps where ``most`` is too few. Slow workers, or none to be seen:
        one in sixteen less.
        """
        # One bell answered in a short while says little about a long one.
        lasting = self.held - (self.held - left - (1 - part)) / part
        if self.held and lasting < self.held / 2:
            return replace(self, size=min(2 * self.size, most), hurry=True)
        if part < 1 or (self.held and lasting <= self.held * 3 / 4):
            return replace(self, hurry=False)
        return replace(self, size=max(self.smallest(most).size, self.size - max(1, self.size // 16)), hurry=False)

    def filled(self, bells: int) -> DoorbellWindow:
        """The window when the round has rung and Redis holds ``bells``. A job that has just begun is looked at soon."""
        is_full = bells >= self.size
        return replace(self, held=bells if is_full else 0, hurry=self.hurry or (is_full and not self.held))
