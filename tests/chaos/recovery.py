"""When a fault is over: work is written and claimed again, and nobody waits for those that were struck."""

from __future__ import annotations

from typing import NamedTuple

from tests.chaos.watcher import Look, Watcher
from tests.chaos.work import Feeder
from tests.chaos.world import Hit
from tests.support.waiting import PATIENCE

RECOVERY_SECONDS = PATIENCE
"""Only keeps a broken build from hanging."""


class Recovery(NamedTuple):
    """Seconds, None for what did not come."""

    progress: float | None
    """From the fault's end to the next committed vectors."""
    whole: float | None
    """The same, until workers also claim new work and nothing is held by those struck."""
    takeover: float | None
    """From the strike until others have, or have done, what the struck held; None where they held nothing."""


def follow(watcher: Watcher, feeder: Feeder, hit: Hit) -> Recovery:
    """Wait for a fault's recovery; what does not come becomes a problem of the hit."""
    before: Look | None = None
    progress = claimed = takeover = None
    for look in watcher.since(hit.struck, hit.healed - hit.struck + RECOVERY_SECONDS):
        if takeover is None and look.asked > hit.held_at and not hit.held & look.held:
            takeover = look.at - hit.struck
        if look.asked <= hit.healed:
            continue
        before = before or look
        if look.open == 0:
            feeder.ask()  # all was done before the fault was over, and only new work shows that work goes on
        if progress is None and look.vectors > before.vectors:
            progress = look.at - hit.healed
        if claimed is None and look.attempts > before.attempts:
            claimed = look.at - hit.healed
        if progress is not None and claimed is not None and takeover is not None:
            whole = max(progress, claimed, hit.struck + takeover - hit.healed)
            return Recovery(progress, whole, takeover if hit.held else None)
    came = {"progress": progress, "new claim": claimed, "takeover of its leases": takeover}
    missing = [what for what, seconds in came.items() if seconds is None]
    hit.problems.append(f"no {', no '.join(missing)} within {RECOVERY_SECONDS:g} s")
    return Recovery(progress, None, takeover)
