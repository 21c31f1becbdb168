"""A real worker or poller that kills itself with SIGKILL at a point: ``DIE_AT=create:after python -m ... worker``.

``DIE_NTH`` says at which time it comes there. Before it dies it writes the point to ``DIED_LOG``.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.openai_chaos.points import CALLS, LOOKS_FOR_RESULTS

_left = int(os.environ.get("DIE_NTH", "1"))
_mutex = threading.Lock()


def reached(point: str) -> None:
    global _left
    if point != os.environ.get("DIE_AT"):
        return
    with _mutex:
        _left -= 1
        if _left > 0:
            return
        with Path(os.environ["DIED_LOG"]).open("a") as log:
            log.write(point + "\n")
        os.kill(os.getpid(), signal.SIGKILL)
        signal.pause()


def around(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        reached(f"{name}:before")
        result = real(*args, **kwargs)
        reached(f"{name}:after")
        return result

    return call


def worker() -> None:
    from chunkmill.openai.http import Provider
    from chunkmill_workers.provider import follow
    from chunkmill_workers.provider.context import ProviderContext

    follow.LOOKS_FOR_RESULTS = LOOKS_FOR_RESULTS
    for name in CALLS:
        if name != "lines":
            setattr(Provider, name, around(name, getattr(Provider, name)))
    real_lines, real_transact = Provider.lines, ProviderContext.transact

    @contextlib.contextmanager
    def lines(*given: Any, **more: Any) -> Iterator[Iterator[bytes]]:
        reached("lines:before")
        with real_lines(*given, **more) as lines:
            yield _counted(lines)
        reached("lines:after")

    def transact(self: ProviderContext, work: Callable[[Any], Any], what: str, **more: Any) -> Any:
        def watched(conn: Any) -> Any:
            result = work(conn)
            reached(f"{what}:before commit")
            return result

        result = real_transact(self, watched, what, **more)
        reached(f"{what}:after commit")
        return result

    Provider.lines = lines  # type: ignore[method-assign]
    ProviderContext.transact = transact  # type: ignore[method-assign]
    from celery.__main__ import main

    sys.argv = ["celery", "-A", "chunkmill_workers", "worker", "-Q", "openai", "-c", "3", *sys.argv[2:]]
    main()


def _counted(lines: Iterator[bytes]) -> Iterator[bytes]:
    for number, line in enumerate(lines):
        if number == 1:
            reached("lines:middle")
        yield line


def poller() -> None:
    from chunkmill.broker import Broker
    from chunkmill.ledger.provider import provider_batches, provider_work

    Broker.ring_steps = around("ring_steps", Broker.ring_steps)  # type: ignore[method-assign]
    provider_batches.open_gathering = around("open_gathering", provider_batches.open_gathering)
    provider_work.settle = around("settle", provider_work.settle)
    from chunkmill.cli.__main__ import main

    sys.argv = ["chunkmill", "poller"]
    main()


if __name__ == "__main__":
    {"worker": worker, "poller": poller}[sys.argv[1]]()
