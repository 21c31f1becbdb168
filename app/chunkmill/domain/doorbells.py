"""How many doorbells to ring, and for which jobs. Pure."""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import dataclass, replace

SMALLEST_WINDOW = 8
"""The smallest number of bells to keep in Redis: as many as for workers whose pace is not known yet."""
HURRY = 1 / 8
"""The pause before the next round, in poll intervals, if this round came too late or does not know the pace yet."""


@dataclass(frozen=True, slots=True)
class DoorbellPlan:
    """How many bells a round rings, at most."""

    fresh: int
    """For ChunkBatches that are due and were never rung."""
    again: int
    """For the ChunkBatches that were rung longest ago, because their bells are lost."""


def plan_doorbells(*, room: int, queued: int, rung: int, stale: int) -> DoorbellPlan:
    """The plan that fills the window of one priority and replaces its lost bells.

    ``room`` is the size of the window, less the bells of this priority and of those that are served before it.
    ``queued`` are the bells of this priority in Redis. ``rung`` are its available ChunkBatches that were rung and not
    claimed, and ``stale`` are those of them that were rung so long ago that no publisher can still be sending the bell.

    If no bell is lost, then ``queued >= rung``. The difference was lost by FLUSHALL, by a crash of Redis, or with a
    worker that was killed after it had received the bell. One bell too many does no harm: the claim finds nothing.

    Half of the room is kept for fresh ChunkBatches, because the bells of a job whose model no worker has are lost
    again and again.
    """
    lost = max(0, min(stale, rung - queued))
    room = max(0, room)
    return DoorbellPlan(fresh=room - min(lost, (room + 1) // 2), again=min(lost, room))


def share_out(waiting: Mapping[int, int], room: int) -> dict[int, int]:
    """How many of ``room`` new bells each job gets, so that in the end equally many wait for every job.

    ``waiting`` are the bells of each job that were rung and not answered. A job that came first and filled the window
    waits until the others have as many. Of jobs with equally many, the first in ``waiting`` is served first.
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
    """How many bells of a priority to keep in Redis: as many as the workers take until the poller's next round.

    More bells would not help, and they would cost fairness, because Redis serves them before those of a job that comes
    later.
    """

    size: int
    held: int = 0
    """Bells in Redis at the end of the last round. 0 if it had no more to ring: then the next round cannot tell how
    fast the workers are."""
    hurry: bool = False
    """The next round comes after ``HURRY`` of a poll interval, and not after a whole one."""

    @classmethod
    def smallest(cls, most: int) -> DoorbellWindow:
        """The window to begin with. ``most`` is the largest size that is allowed."""
        return cls(min(SMALLEST_WINDOW, most))

    def adapted(self, left: int, *, part: float, most: int) -> DoorbellWindow:
        """The window for a round that finds ``left`` bells, ``part`` (0 to 1) of a poll interval after the last round.

        If fewer than half of the bells would remain after one poll interval, the window doubles, up to ``most``, and
        the poller comes back soon. The early rounds also help when ``most`` is too small for the workers. If workers
        are slow or absent, the window shrinks by a sixteenth, down to `smallest`.
        """
        # Since the last round the workers took held - left bells in `part` of an interval, so in a whole interval they
        # take (held - left) / part. In a short part one bell more or less would weigh too much (1 / part), so up to one
        # bell is taken off first: 1 - part, which is nothing after a whole interval.
        taken = (self.held - left - (1 - part)) / part
        remaining = self.held - taken
        if self.held and remaining < self.held / 2:
            return replace(self, size=min(2 * self.size, most), hurry=True)
        # Keep the size if this was an early round, because only a whole interval shows that workers are slow, or if the
        # size fits: between half and three quarters of the bells remain.
        if part < 1 or (self.held and remaining <= self.held * 3 / 4):
            return replace(self, hurry=False)
        return replace(self, size=max(self.smallest(most).size, self.size - max(1, self.size // 16)), hurry=False)

    def filled(self, bells: int) -> DoorbellWindow:
        """The window after the round has rung, while Redis holds ``bells``.

        If the window is full for the first time, as when a job has just begun, the next round comes soon to see how
        fast the workers are.
        """
        is_full = bells >= self.size
        return replace(self, held=bells if is_full else 0, hurry=self.hurry or (is_full and not self.held))
