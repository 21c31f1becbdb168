"""An answer that takes long: what comes before it, and how it ends."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from chunkmill.errors import InvalidInput
from chunkmill.gateway import lasting
from chunkmill.gateway.errors import Refusal


async def parts_of(work: Any) -> list[bytes]:
    return [part async for part in lasting._parts(work)]


async def after(event: asyncio.Event, error: Exception | None = None) -> dict[str, int]:
    await event.wait()
    if error is not None:
        raise error
    return {"n": 7}


def test_blank_lines_come_before_an_answer_that_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lasting, "HEARTBEAT_SECONDS", 0.001)

    async def main(error: Exception | None) -> bytes:
        event = asyncio.Event()
        parts = lasting._parts(after(event, error))
        got = [await anext(parts), await anext(parts)]
        event.set()
        got += [part async for part in parts]
        assert got[:2] == [b"\n", b"\n"]
        return b"".join(got)

    assert json.loads(asyncio.run(main(None))) == {"n": 7}
    for error, status, code in (
        (InvalidInput("wrong"), 400, "invalid_input"),
        (Refusal(403, "model_not_allowed", "no"), 403, "model_not_allowed"),
    ):
        said = json.loads(asyncio.run(main(error)))["error"]
        assert (said["status"], said["code"]) == (status, code)
    with pytest.raises(ZeroDivisionError):  # the connection breaks off, and the log has it
        asyncio.run(main(ZeroDivisionError()))


def test_an_answer_in_time_has_no_blank_lines_and_its_error_a_status() -> None:
    async def main(error: Exception | None) -> list[bytes]:
        event = asyncio.Event()
        event.set()
        return await parts_of(after(event, error))

    assert asyncio.run(main(None)) == [b'{"n":7}']
    with pytest.raises(InvalidInput):
        asyncio.run(main(InvalidInput("wrong")))


def test_work_ends_with_its_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lasting, "HEARTBEAT_SECONDS", 0.001)
    ended = []

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(True)

    async def main() -> None:
        parts = lasting._parts(work())
        assert await anext(parts) == b"\n"
        await parts.aclose()
        assert ended == [True]

    asyncio.run(main())
