"""The lines of an input file, and how a line ends."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from chunkmill.domain.served import chunk_id, position_of, window_seconds
from chunkmill.gateway.batches.keeper import CANCELLED, EXPIRED, judge
from chunkmill.gateway.batches.lines import FileError, FileModel, LineReader, split_lines, texts_of
from chunkmill.gateway.routes.files import _part_of
from chunkmill.ledger.served.lines import NO_INPUTS, DeadInput, Inputs, Line


def test_the_lines_are_the_same_wherever_the_pieces_end() -> None:
    content = b"one\n\ntwo\r\nthree is longer\n\n \n"
    for size in range(1, len(content) + 1):
        pieces = [content[i : i + size] for i in range(0, len(content), size)]
        assert list(split_lines(pieces)) == [b"one", b"", b"two\r", b"three is longer"], size
    assert list(split_lines([b"no end"])) == [b"no end"]
    assert list(split_lines([])) == list(split_lines([b"\n \n"])) == []


def test_a_line_that_is_too_long_ends_the_reading_before_it_fills_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chunkmill.gateway.batches.lines.MAX_LINE_BYTES", 10)
    given = iter([b"fits\n", b"too", b"too long", b"x"])
    lines = split_lines(given)
    assert next(lines) == b"fits"
    with pytest.raises(FileError) as raised:
        next(lines)
    assert (raised.value.code, raised.value.line) == ("invalid_request", 2)
    assert list(given) == [b"x"]


def reader(**model: Any) -> LineReader:
    usual = FileModel(**{"dimensions": 8, "normalize": True, **model})
    return LineReader("/v1/embeddings", "cl100k", open_model=lambda _: usual, check_dimensions=lambda _: None)


def encoded(custom_id: str, **body: Any) -> bytes:
    given = {"custom_id": custom_id, "method": "POST", "url": "/v1/embeddings", "body": {"model": "m", **body}}
    return json.dumps(given).encode()


def test_a_line_says_how_its_answer_is_to_be_written() -> None:
    lines = reader()
    assert lines.read(0, encoded("a", input="x")) == Line(0, "a", 1, 8)
    asked = encoded("b", input=["x", "y"], dimensions=4, encoding_format="base64", truncate=False)
    assert lines.read(1, asked) == Line(1, "b", 2, 4, is_base64=True, refuses_long=True)
    refused = lines.read(2, encoded("c", input="a secret text", kind="query"))
    assert (refused.n_inputs, refused.status, refused.param) == (0, 400, "kind")
    assert "secret" not in (refused.message or "")
    assert (lines.n_inputs, lines.model) == (3, "m")


def test_a_model_without_unit_vectors_refuses_to_make_them() -> None:
    asked = encoded("a", input="x", normalize=True)
    assert reader().read(0, asked).status is None
    assert reader(normalize=False).read(0, asked).param == "normalize"


def test_no_error_of_a_file_quotes_what_is_in_it() -> None:
    for data in (b'{"custom_id": "secret', encoded("secret", input="x"), encoded("x", input="x", model="secret")):
        lines = reader()
        lines.read(0, encoded("secret", input="x"))
        with pytest.raises(FileError) as raised:
            lines.read(1, data)
        assert "secret" not in raised.value.message


def test_texts_are_those_of_the_lines_that_were_not_refused() -> None:
    lines = [encoded("a", input=["x", [15339]][:1]), encoded("b", input=""), encoded("c", input=[15339, 1917])]
    assert list(texts_of(lines, "cl100k", refused=frozenset({1}))) == [
        ("000000-000000", "x"),
        ("000002-000000", "hello world"),
    ]
    assert position_of(chunk_id(49_999, 2_047)) == (49_999, 2_047)


def known(*positions: int, truncated: tuple[int, ...] = ()) -> Inputs:
    return Inputs(list(positions), [3] * len(positions), list(truncated), np.ones((len(positions), 2), np.float32))


DEAD = DeadInput(1, "too_long", "it is too long")
ENDS: tuple[tuple[Inputs, DeadInput | None, tuple[str, str] | None, tuple[int | None, str | None]], ...] = (
    (known(0, 1), None, None, (200, None)),
    (known(0, 1), DEAD, EXPIRED, (200, None)),  # its text got a vector from another job
    (known(0), DEAD, None, (400, "too_long")),
    (known(0), DeadInput(1, "kills_workers", "it kills"), CANCELLED, (500, "kills_workers")),
    *(
        (known(0), DeadInput(1, code, "no vector after 5 attempts"), None, (500, code))
        for code in ("no_answer", "bad_vector", "other_model", "server_error", "http_503", "http_424")
    ),
    *(
        (known(0), DeadInput(1, code, "the provider refused the request"), None, (400, code))
        for code in ("invalid_request_error", "http_400", "http_422", "content_filter")
    ),
    (known(0), None, EXPIRED, (0, "batch_expired")),
    (NO_INPUTS, None, CANCELLED, (0, "batch_cancelled")),
    (known(1), None, None, (500, "server_error")),
)


@pytest.mark.parametrize(("inputs", "dead", "never", "wanted"), ENDS)
def test_a_line_is_answered_only_if_all_of_its_inputs_have_vectors(
    inputs: Inputs, dead: DeadInput | None, never: tuple[str, str] | None, wanted: tuple[int, str | None]
) -> None:
    judged = judge(Line(3, "a", 2), inputs, dead, never)
    assert (judged.status, judged.code) == wanted


def test_a_line_that_refuses_cuts_is_refused_for_the_first_of_them() -> None:
    line = Line(3, "a", 2, refuses_long=True)
    judged = judge(line, known(0, 1, truncated=(1,)), None, None)
    assert (judged.status, judged.code, judged.param) == (400, "context_length_exceeded", "input[1]")
    assert judge(line, known(0, 1), None, None).status == 200


def test_what_the_validation_refused_stays_as_it_is() -> None:
    refused = Line(3, "a", 0, status=400, code="invalid_input")
    assert judge(refused, NO_INPUTS, None, EXPIRED) == refused


def test_windows_are_from_an_hour_to_seven_days() -> None:
    seconds = {word: window_seconds(word) for word in ("1h", "24h", "1d", "168h", "7d")}
    assert seconds == {"1h": 3600, "24h": 86_400, "1d": 86_400, "168h": 604_800, "7d": 604_800}
    for wrong in ("0h", "169h", "8d", "24", "h", "24H", "1.5h", "-1h", " 1h", "1h ", "٣h", "9999h"):
        assert window_seconds(wrong) is None, wrong


def test_a_range_is_cut_out_of_pieces() -> None:
    whole = b"0123456789"
    for size in (1, 3, 4, 10):
        pieces = [whole[i : i + size] for i in range(0, 10, size)]
        for first in range(10):
            for end in range(first + 1, 11):
                assert b"".join(_part_of(iter(pieces), first, end - first)) == whole[first:end]
