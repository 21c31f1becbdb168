"""How vectors are written into answers."""

from __future__ import annotations

import asyncio
import base64

import numpy as np
import orjson
import pytest
from starlette.responses import Response, StreamingResponse

from chunkmill.gateway import rendering
from chunkmill.gateway.rendering import (
    Rows,
    Write,
    base64_items,
    base64_rows,
    float_items,
    float_rows,
    written,
)


def vectors(n_rows: int, dimensions: int = 3) -> Rows:
    return np.random.default_rng(n_rows).standard_normal((n_rows, dimensions)).astype("<f4")


def parts_of(response: Response) -> list[bytes]:
    if not isinstance(response, StreamingResponse):
        return [bytes(response.body)]

    async def read() -> list[bytes]:
        return [bytes(part) async for part in response.body_iterator]  # type: ignore[arg-type]

    return asyncio.run(read())


@pytest.fixture
def small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven rows of three numbers."""
    monkeypatch.setattr(rendering, "SLICE_NUMBERS", 21)
    monkeypatch.setattr(rendering, "SLICE_ROWS", 7)


@pytest.mark.usefixtures("small_slices")
@pytest.mark.parametrize(("n_rows", "n_parts"), [(1, 1), (7, 1), (8, 2), (14, 2), (15, 3)])
@pytest.mark.parametrize("write", [float_rows, base64_rows, float_items, base64_items])
def test_an_answer_in_slices_is_the_answer_as_a_whole(write: Write, n_rows: int, n_parts: int) -> None:
    rows = vectors(n_rows)
    is_base64 = write in (base64_rows, base64_items)
    response = written(rows, write, base64=is_base64, head=b'{"a":[', tail=b'],"b":1}', headers={"x-own": "1"})
    parts = parts_of(response)
    answer = orjson.loads(b"".join(parts))
    assert len(parts) == n_parts
    assert (answer["b"], response.headers["x-own"]) == (1, "1")
    assert response.headers["content-type"] == "application/json"
    items = answer["a"]
    if write in (float_items, base64_items):
        assert [item["index"] for item in items] == list(range(n_rows))
        items = [item["embedding"] for item in items]
    read = [np.frombuffer(base64.b64decode(item), "<f4") if is_base64 else np.array(item, np.float32) for item in items]
    assert np.array_equal(read, rows)


@pytest.mark.usefixtures("small_slices")
def test_the_loop_does_other_things_between_two_slices() -> None:
    response = written(vectors(70), float_rows, base64=False, head=b"[", tail=b"]", headers={})
    assert isinstance(response, StreamingResponse)
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    async def read() -> None:
        task = asyncio.create_task(other())
        async for _ in response.body_iterator:
            pass
        task.cancel()

    asyncio.run(read())
    assert turns >= 9


@pytest.mark.parametrize("dimensions", [384, 1536, 70_000])
def test_a_slice_is_bounded_by_what_it_has_to_write(dimensions: int) -> None:
    rows = np.zeros((2048, dimensions if dimensions < 2000 else 1), "<f4")
    if dimensions > 2000:
        rows = np.zeros((3, dimensions), "<f4")
    floats = parts_of(written(rows, float_rows, base64=False, head=b"", tail=b"", headers={}))
    assert max(part.count(b",") for part in floats) <= max(rendering.SLICE_NUMBERS, dimensions)
    coded = parts_of(written(rows, base64_rows, base64=True, head=b"", tail=b"", headers={}))
    assert max(map(len, coded)) <= rendering.SLICE_BYTES * 1.5


def test_floats_read_back_as_the_same_float32() -> None:
    rows = np.array([[0.1, 1 / 3, -1e-30, 3.4e38, 0.0]], "<f4")
    read = np.array(orjson.loads(b"[" + float_rows(0, rows) + b"]"), np.float32)
    assert np.array_equal(read, rows)
