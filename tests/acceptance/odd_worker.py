"""A real worker whose engine misbehaves on texts with MARK in them, as ODD says: `-m tests.acceptance.odd_worker`.

It takes Celery's own options. Only the forward pass that holds such a text is changed. Before it hangs, it says so.
ODD_DRAIN_SECONDS replaces the 8 s within which a worker that was told to leave must have ended.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

from chunkmill.errors import DeviceFailed
from chunkmill.messages import door
from chunkmill.messages.door import Refusal
from chunkmill_workers.engine.engine import Engine
from chunkmill_workers.engine.results import TokenBatchResult
from chunkmill_workers.engine.run import Runner
from chunkmill_workers.engine.tokenizer import TextTokenizer
from chunkmill_workers.process import drain

MARK = "the text that kills"
HANGS = "the odd worker hangs"
ODD_BELL = 424242
real_stream = Engine.stream
real_doorbell = door.doorbell


def stream(self: Engine, texts: Sequence[str], *args: Any, **kwargs: Any) -> Iterator[TokenBatchResult]:
    bad = {index for index, text in enumerate(texts) if MARK in text}
    odd = os.environ["ODD"]
    if bad and odd in ("hang", "break"):
        Runner.finish = _hang if odd == "hang" else _break  # type: ignore[method-assign, assignment]
    if bad and odd == "tokenizer":
        TextTokenizer.encode = _hang  # type: ignore[method-assign, assignment]
    for result in real_stream(self, texts, *args, **kwargs):
        if bad & set(result.indices.tolist()):
            os.kill(os.getpid(), signal.SIGSEGV)
            time.sleep(60)
        yield result


def _hang(*_: object, **__: object) -> None:
    os.write(2, f"{HANGS}\n".encode())
    time.sleep(3600)


def _break(*_: object, **__: object) -> None:
    raise DeviceFailed("the model no longer runs on cuda:0: CUDA error: an illegal memory access was encountered")


def _end_at_odd_bell(raw: bytes, queue: str, priority: int) -> bytes | Refusal:
    """As a fault of ours, or of Celery, that the door does not know."""
    made = real_doorbell(raw, queue, priority)
    if isinstance(made, bytes) and f"ChunkBatch {ODD_BELL}".encode() in made:
        os._exit(1)
    return made


def _go_deaf(sender: Any, **_: Any) -> None:
    sender.cancel_task_queue("gpu")


if __name__ == "__main__":
    Engine.stream = stream  # type: ignore[method-assign]
    from celery import signals
    from celery.__main__ import main

    if os.environ["ODD"] == "bell":
        door.doorbell = _end_at_odd_bell
    if os.environ["ODD"] == "deaf":
        signals.worker_ready.connect(_go_deaf)

    drain.LIMIT_S = float(os.environ.get("ODD_DRAIN_SECONDS", drain.LIMIT_S))
    sys.argv = ["celery", "-A", "chunkmill_workers", "worker", "-Q", "gpu", *sys.argv[1:]]
    main()
