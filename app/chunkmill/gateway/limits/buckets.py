"""Token buckets: so much a minute, of which a whole minute's worth may be used at once. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field

MINUTE = 60.0


@dataclass(slots=True)
class Bucket:
    """``per_minute`` units flow in a minute, and no more than that are kept. Times are in seconds of one clock."""

    per_minute: int
    _level: float = field(init=False)
    _at: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        self._level = float(self.per_minute)

    def take(self, amount: float, now: float) -> float:
        """Take ``amount`` and return 0.0; or take nothing and return in how many seconds it is worth trying again.

        More than a whole bucket is given to whoever finds it full. The bucket then owes it, so that the rate holds.
        """
        self._fill(now)
        lacking = min(amount, self.per_minute) - self._level
        if lacking > 1e-9:
            return lacking * MINUTE / self.per_minute
        self._level -= amount
        return 0.0

    def correct(self, amount: float, now: float) -> None:
        """Take ``amount`` more, whatever there is, or put it back if it is negative."""
        self._fill(now)
        self._level = min(self._level - amount, float(self.per_minute))

    def remaining(self, now: float) -> int:
        self._fill(now)
        return max(0, int(self._level + 1e-9))

    def reset(self, now: float) -> float:
        """In how many seconds the bucket is full again."""
        self._fill(now)
        return (self.per_minute - self._level) * MINUTE / self.per_minute

    def _fill(self, now: float) -> None:
        if now > self._at:
            self._level = min(float(self.per_minute), self._level + (now - self._at) * self.per_minute / MINUTE)
            self._at = now
