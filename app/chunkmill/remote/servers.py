"""The servers that a client may ask, and which of them it asks now."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

from chunkmill.remote.address import Address, Key

FIRST_ABSENCE_S = 1.0
LONGEST_ABSENCE_S = 60.0


@dataclass(eq=False, slots=True)
class Server:
    """One gateway. After a failure it is left alone for a while, if there is another server that can be asked."""

    address: Address
    key: Key
    _failures: int = 0
    _again_at: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @property
    def name(self) -> str:
        return self.address.url

    def is_up(self, now: float) -> bool:
        """Whether it answered the last time, or was left alone for long enough."""
        return now >= self._again_at

    def answered(self) -> None:
        with self._lock:
            self._failures, self._again_at = 0, 0.0

    def failed(self, now: float, retry_after: float | None) -> None:
        """Leave it alone for as long as it asked, and for a second at least, which doubles up to a minute."""
        with self._lock:
            absence = min(LONGEST_ABSENCE_S, FIRST_ABSENCE_S * 2**self._failures)
            self._failures = min(self._failures + 1, 10)
            self._again_at = now + max(absence, min(retry_after or 0.0, LONGEST_ABSENCE_S))

    def wanted_again(self) -> None:
        """The other server failed too, so that this one may be asked at once."""
        with self._lock:
            self._again_at = 0.0
