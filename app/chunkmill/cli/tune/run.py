"""The texts that `tune` measures with, and the process that measures, because this one never imports torch."""

from __future__ import annotations

import contextlib
import itertools
import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import IO, Any, ClassVar

from chunkmill.cli.jobs.sources import Fields, Reader
from chunkmill.cli.progress import Bar
from chunkmill.cli.start.corpus import stdlib_docstrings
from chunkmill.domain.chunks import Chunk
from chunkmill.errors import ChunkmillError, DeviceUnavailable, EngineError, InvalidInput, InvalidSetting, UnknownModel
from chunkmill.system.python import module_command

MOST_TEXTS = 20_000
SEED = 20_240
STOP_SECONDS = 20.0
TAIL_LINES = 15


def docstrings() -> list[str]:
    """Python's docstrings in an order that is random, so that the first are from many modules, and always the same."""
    texts = list(dict.fromkeys(chunk.text for chunk in stdlib_docstrings()))
    random.Random(SEED).shuffle(texts)  # noqa: S311 - nothing secret
    return texts


def own_texts(source: str) -> list[str]:
    """The first texts of a file, shuffled in the same way."""
    reader = Reader([source], Fields(), skip=False, stdin=sys.stdin.buffer)
    texts = (record.text for record in reader if isinstance(record, Chunk) and record.text.strip())
    distinct = list(dict.fromkeys(itertools.islice(texts, MOST_TEXTS)))
    if not distinct:
        raise InvalidInput(f"{source} contains no text to measure with. Name another file.")
    random.Random(SEED).shuffle(distinct)  # noqa: S311 - nothing secret
    return distinct


def measure(order: Mapping[str, Any], bar: Bar) -> dict[str, Any]:
    """The result of ``chunkmill_workers.tuning.tune``. Raises ChunkmillError."""
    # On a terminal the output of libraries would run into the progress bar.
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log, _process(log) as process:
        assert process.stdin is not None  # noqa: S101 - both are pipes
        assert process.stdout is not None  # noqa: S101
        with contextlib.suppress(BrokenPipeError), process.stdin as pipe:
            json.dump(order, pipe)
        for line in process.stdout:
            event = json.loads(line)
            if event["event"] == "progress":
                bar.stage(event["what"])
                bar.update(event["done"], event["total"], "measurements")
            elif event["event"] == "error":
                raise _known(event["code"], event["message"])
            else:
                return dict(event)
        log.seek(0)
        tail = "\n".join(log.read().splitlines()[-TAIL_LINES:])
        raise MeasuringEnded(
            f"the measuring process ended with exit code {process.wait()}. Its output ends with: {tail}"
        )


class MeasuringEnded(ChunkmillError):
    code: ClassVar[str] = "measuring_ended"


def _known(code: str, message: str) -> ChunkmillError:
    kinds = (InvalidInput, InvalidSetting, UnknownModel, DeviceUnavailable, EngineError)
    return next((kind(message) for kind in kinds if kind.code == code), ChunkmillError(message))


@contextmanager
def _process(log: IO[str]) -> Iterator[subprocess.Popen[str]]:
    """The process that measures. It has a session of its own, so that a Ctrl-C reaches only the present process."""
    process = subprocess.Popen(
        module_command("chunkmill_workers.tuning.tune"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
        encoding="utf-8",
        start_new_session=True,
    )
    try:
        yield process
    finally:
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
        process.terminate()
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
