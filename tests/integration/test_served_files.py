"""Files of a gateway's Batch API: uploaded in pieces, listed once they are whole, deleted with their texts."""

from __future__ import annotations

import itertools
import json
import socket
import threading
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import httpx2
import openai
import pytest
import sqlalchemy as sa

from chunkmill import Client
from chunkmill.domain.served import FILE_SECONDS
from chunkmill.gateway.batches import uploads
from chunkmill.gateway.batches.keeper import BatchKeeper
from chunkmill.ledger.served import batches, files, lines
from chunkmill.settings import Settings
from tests.integration.hands import Hands
from tests.support.gateways import RunningGateway, running_gateway
from tests.support.served import (
    BulkWorker,
    TwoTenants,
    bulk_worker,
    clean_up,
    ended,
    jsonl,
    line,
    openai_client,
    rows,
    start,
    texts,
    upload,
)
from tests.support.waiting import PATIENCE, until

AUTHORIZATION = {"authorization": "Bearer cmk_first"}


@pytest.fixture
def gateway(settings: Settings) -> Iterator[RunningGateway]:
    with running_gateway(settings, keys=TwoTenants()) as running:
        yield running


@pytest.fixture
def worker(db: sa.Engine) -> Iterator[BulkWorker]:
    with bulk_worker(db) as running:
        yield running


@pytest.fixture
def api(gateway: RunningGateway) -> Iterator[openai.OpenAI]:
    with openai_client(gateway, "cmk_first") as client:
        yield client


def test_files_are_listed_in_pages_and_in_both_orders(api: openai.OpenAI) -> None:
    made = [upload(api, line("a", f"text {n}")) for n in range(5)]
    assert [file.id for file in api.files.list(limit=2)] == made[::-1]
    assert [file.id for file in api.files.list(limit=2, order="asc")] == made
    page = api.files.list(limit=2, after=made[3])
    assert ([file.id for file in page.data], page.has_more) == ([made[2], made[1]], True)
    assert [file.id for file in api.files.list(purpose="batch_output")] == []
    assert len(api.files.list(purpose="batch").data) == 5
    for wrong in ({"limit": 0}, {"limit": 10_001}, {"order": "up"}, {"after": "file-none"}):
        with pytest.raises(openai.BadRequestError):
            api.files.list(**wrong)  # type: ignore[arg-type]


def test_names_that_postgres_cannot_hold_are_names_of_nothing(gateway: RunningGateway) -> None:
    """schemathesis asked for them."""
    for kind in ("files", "batches"):
        listed = gateway.http.get(f"/v1/{kind}?after=a%00b", headers=AUTHORIZATION)
        assert (listed.status_code, listed.json()["error"]["param"]) == (400, "after"), listed.text
        for method, path in (("GET", ""), ("DELETE", "") if kind == "files" else ("POST", "/cancel")):
            answer = gateway.http.request(method, f"/v1/{kind}/a%00b{path}", headers=AUTHORIZATION)
            assert answer.status_code == 404, answer.text


def test_a_file_of_several_pieces_comes_back_whole_and_in_ranges(
    api: openai.OpenAI, gateway: RunningGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (uploads, files):
        monkeypatch.setattr(module, "PIECE_BYTES", 1000)
    monkeypatch.setattr("chunkmill.gateway.routes.files.PIECE_BYTES", 1000)
    content = b"".join(jsonl(line(str(n), f"text {n} " * 20)) for n in range(50))
    file = api.files.create(file=("many.jsonl", content), purpose="batch")
    assert (file.bytes, file.expires_at) == (len(content), file.created_at + FILE_SECONDS)
    assert api.files.content(file.id).content == content
    whole = len(content)
    for asked, first, end in (
        ("bytes=0-0", 0, 1),
        ("bytes=990-2010", 990, 2011),
        (f"bytes={whole - 5}-", whole - 5, whole),
        ("bytes=-7", whole - 7, whole),
        (f"bytes=5-{whole + 100}", 5, whole),
    ):
        answer = gateway.http.get(f"/v1/files/{file.id}/content", headers={**AUTHORIZATION, "range": asked})
        assert (answer.status_code, answer.content) == (206, content[first:end]), asked
        assert answer.headers["content-range"] == f"bytes {first}-{end - 1}/{whole}"
    for asked in ("lines=1-2", "bytes=5-4", "bytes=-", "bytes=0-1,4-5"):
        answer = gateway.http.get(f"/v1/files/{file.id}/content", headers={**AUTHORIZATION, "range": asked})
        assert (answer.status_code, answer.content) == (200, content)
    answer = gateway.http.get(f"/v1/files/{file.id}/content", headers={**AUTHORIZATION, "range": f"bytes={whole}-"})
    assert (answer.status_code, answer.headers["content-range"]) == (416, f"bytes */{whole}")


def test_a_result_file_has_the_bytes_that_it_says_and_ranges_of_it_are_parts_of_it(
    api: openai.OpenAI, gateway: RunningGateway, worker: BulkWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("chunkmill.ledger.served.lines.SLICE_INPUTS", 3)
    given = [line(str(n), [f"text {n}", "both"], encoding_format=("float", "base64")[n % 2]) for n in range(7)]
    batch = ended(api, start(api, *given, line("bad", "")).id)
    for file_id in (batch.output_file_id, batch.error_file_id):
        file = api.files.retrieve(file_id)
        content = api.files.content(file_id).content
        assert (len(content), file.purpose) == (file.bytes, "batch_output")
        middle = f"bytes={file.bytes // 2}-{file.bytes - 2}"
        answer = gateway.http.get(f"/v1/files/{file_id}/content", headers={**AUTHORIZATION, "range": middle})
        assert (answer.status_code, answer.content) == (206, content[file.bytes // 2 : -1])


WRONG_UPLOADS: tuple[tuple[dict[str, Any], int, str, str | None], ...] = (
    ({"data": {"purpose": "batch"}, "files": {"other": ("a.jsonl", b"x")}}, 400, "missing_required_parameter", "file"),
    ({"files": {"file": ("a.jsonl", b"x")}}, 400, "missing_required_parameter", "purpose"),
    ({"data": {"purpose": "fine-tune"}, "files": {"file": ("a.jsonl", b"x")}}, 400, "invalid_value", "purpose"),
    ({"data": {"purpose": "batch"}, "files": {"file": ("a.txt", b"x")}}, 400, "invalid_file_format", "file"),
    (
        {"data": {"purpose": "batch", "expires_after[anchor]": "now"}, "files": {"file": ("a.jsonl", b"x")}},
        400, "invalid_value", "expires_after.anchor",
    ),
    (
        {
            "data": {"purpose": "batch", "expires_after[anchor]": "created_at", "expires_after[seconds]": "60"},
            "files": {"file": ("a.jsonl", b"x")},
        },
        400, "invalid_value", "expires_after.seconds",
    ),
    ({"json": {"purpose": "batch"}}, 415, "unsupported_media_type", None),
    (
        {"content": b"--b\r\nno form", "headers": {"content-type": "multipart/form-data; boundary=b"}},
        400, "invalid_multipart", "body",
    ),
    (
        {
            "content": b'--b\r\ncontent-disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\nhalf',
            "headers": {"content-type": "multipart/form-data; boundary=b"},
        },
        400, "invalid_multipart", "body",
    ),
    ({"data": {"purpose": "x" * 5000}, "files": {"file": ("a.jsonl", b"x")}}, 400, "invalid_input", "body"),
    (
        {"data": {"purpose": "batch"}, "files": [("file", ("a.jsonl", b"x")), ("file", ("b.jsonl", b"x"))]},
        400, "invalid_input", "file",
    ),
    ({"data": {"purpose": "batch"}, "files": {"file": ("a.jsonl", b"x" * 3000)}}, 413, "file_too_large", "file"),
)  # fmt: skip


def test_a_wrong_upload_is_refused_with_its_field_and_leaves_nothing(
    gateway: RunningGateway, db: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploads, "MAX_FILE_BYTES", 2000)
    told = []
    for request, *_ in WRONG_UPLOADS:
        headers = AUTHORIZATION | request.get("headers", {})
        answer = gateway.http.post("/v1/files", **{**request, "headers": headers})
        error = answer.json()["error"]
        told.append((answer.status_code, error["code"], error["param"]))
    assert told == [tuple(wrong_upload[1:]) for wrong_upload in WRONG_UPLOADS]
    assert rows(db, "SELECT FROM served_files") == []


FIELD = b'--b\r\ncontent-disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
FILE = b'--b\r\ncontent-disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\nx\r\n'


@pytest.mark.parametrize(
    ("begins", "goes_on"), [(FILE, FIELD), (FIELD + FILE + b"--b--\r\n", b"more")], ids=["fields", "behind its end"]
)
def test_a_form_without_an_end_is_refused_and_leaves_nothing(
    gateway: RunningGateway, db: sa.Engine, begins: bytes, goes_on: bytes
) -> None:
    """Its length is not announced, and what it consists of beside its file takes no memory."""
    sent = itertools.chain([begins], itertools.repeat(goes_on * 100, 2 * uploads.MAX_FORM_BYTES // len(goes_on * 100)))
    headers = AUTHORIZATION | {"content-type": "multipart/form-data; boundary=b"}
    answer = gateway.http.post("/v1/files", content=sent, headers=headers)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "body")
    assert "beside those of its file" in answer.json()["error"]["message"]
    assert rows(db, "SELECT FROM served_files") == []


def test_an_announced_length_beyond_the_limit_is_refused_before_the_body(gateway: RunningGateway) -> None:
    address = httpx2.URL(gateway.url)
    with socket.create_connection((address.host, address.port), timeout=PATIENCE) as connection:
        connection.sendall(
            b"POST /v1/files HTTP/1.1\r\nhost: x\r\nauthorization: Bearer cmk_first\r\n"
            b"content-type: multipart/form-data; boundary=b\r\ncontent-length: 999999999\r\n\r\n"
        )
        assert b" 413 " in connection.recv(1000)


def test_an_upload_that_ends_halfway_is_never_listed_and_its_pieces_are_deleted(
    api: openai.OpenAI, gateway: RunningGateway, db: sa.Engine, client: Client, settings: Settings
) -> None:
    address = httpx2.URL(gateway.url)
    head = (
        b"POST /v1/files HTTP/1.1\r\nhost: x\r\nauthorization: Bearer cmk_first\r\n"
        b"content-type: multipart/form-data; boundary=b\r\ncontent-length: 9000000\r\n\r\n"
        b'--b\r\ncontent-disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
        b'--b\r\ncontent-disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\n'
    )
    with socket.create_connection((address.host, address.port), timeout=PATIENCE) as connection:
        connection.sendall(head + b"x" * (files.PIECE_BYTES + 10))
        until(lambda: rows(db, "SELECT FROM served_file_pieces"))
        assert list(api.files.list()) == []
    until(lambda: rows(db, "SELECT FROM served_files") == [])
    # And one whose gateway was killed: nobody has deleted it.
    with db.begin() as conn:
        file_id = files.begin(conn, "north")
        files.add_piece(conn, file_id, 0, b"x")
    clean_up(client, db, settings)
    assert len(rows(db, "SELECT FROM served_file_pieces")) == 1
    rows(db, "UPDATE served_files SET touched_at = now() - interval '61 minutes'")
    assert list(api.files.list()) == []
    clean_up(client, db, settings)
    assert rows(db, "SELECT FROM served_files") == rows(db, "SELECT FROM served_file_pieces") == []


def test_a_batch_whose_file_is_deleted_before_its_validation_fails(
    api: openai.OpenAI, gateway: RunningGateway, client: Client, db: sa.Engine, settings: Settings
) -> None:
    assert gateway.gateway.batches is not None
    gateway.gateway.batches.stop()
    made = start(api, line("a", "x"))
    api.files.delete(made.input_file_id)
    gateway.gateway.batches.take_step()
    batch = api.batches.retrieve(made.id)
    assert (batch.status, batch.errors.data[0].param) == ("failed", "file_id")  # type: ignore[union-attr, index]
    assert made.input_file_id in batch.errors.data[0].message  # type: ignore[union-attr, index, operator]


def test_the_texts_of_a_batch_go_with_its_output_file_and_not_before(
    api: openai.OpenAI, worker: BulkWorker, client: Client, db: sa.Engine, settings: Settings
) -> None:
    kept = client.enqueue([("c1", "shared")], collection="docs")
    until(lambda: client.job(kept.id).state == "completed")
    first = ended(api, start(api, line("a", "shared"), line("b", "of the first"), line("bad", "")).id)
    second = ended(api, start(api, line("a", "of the second"), line("b", "of the first")).id)
    api.files.delete(first.input_file_id)
    clean_up(client, db, settings)
    assert texts(db) == {"shared", "of the first", "of the second"}
    assert len(api.files.content(first.output_file_id).text.splitlines()) == 2
    api.files.delete(first.output_file_id)
    clean_up(client, db, settings)
    assert texts(db) == {"shared", "of the first", "of the second"}  # the second batch has one of them too
    assert len(api.files.content(first.error_file_id).text.splitlines()) == 1
    api.files.delete(first.error_file_id)
    assert rows(db, "SELECT served_batch_id FROM served_batch_lines GROUP BY 1") == rows(
        db, "SELECT id FROM served_batches WHERE name = :name", name=second.id
    )
    api.files.delete(second.output_file_id)
    clean_up(client, db, settings)
    assert texts(db) == {"shared"}
    assert len(rows(db, "SELECT FROM vectors_1")) == 1
    assert api.batches.retrieve(first.id).request_counts.completed == 2  # type: ignore[union-attr]
    with pytest.raises(openai.NotFoundError):
        api.files.content(first.output_file_id)


def test_files_expire_with_their_texts_when_they_said_so(
    api: openai.OpenAI, worker: BulkWorker, client: Client, db: sa.Engine, settings: Settings
) -> None:
    file = upload(api, line("a", "x"), expires_after={"anchor": "created_at", "seconds": 3600})
    shown = api.files.retrieve(file)
    assert shown.expires_at == shown.created_at + 3600
    made = api.batches.create(
        input_file_id=file,
        endpoint="/v1/embeddings",
        completion_window="24h",
        output_expires_after={"anchor": "created_at", "seconds": 7200},
    )
    batch = ended(api, made.id)
    output = api.files.retrieve(batch.output_file_id)
    assert output.expires_at == output.created_at + 7200
    rows(db, "UPDATE served_files SET expires_at = now() - interval '1 s' WHERE kind = 'output'")
    assert {file.id for file in api.files.list()} == {file, batch.error_file_id}
    clean_up(client, db, settings)
    assert texts(db) == set()
    rows(db, "UPDATE served_files SET expires_at = now() - interval '1 s'")
    clean_up(client, db, settings)
    assert rows(db, "SELECT FROM served_files") == rows(db, "SELECT FROM served_file_pieces") == []
    assert rows(db, "SELECT FROM served_batch_lines") == []


def test_prune_deletes_old_files_and_batches_with_their_texts_and_leaves_what_is_needed(
    api: openai.OpenAI, worker: BulkWorker, client: Client, db: sa.Engine
) -> None:
    old = ended(api, start(api, line("a", "old")).id)
    new = ended(api, start(api, line("a", "new")).id)
    worker.may.clear()
    running = start(api, line("a", "running"))
    until(lambda: api.batches.retrieve(running.id).status == "in_progress")
    rows(db, "UPDATE served_files SET created_at = created_at - interval '40 days' WHERE kind = 'input'")
    rows(db, "UPDATE served_batches SET completed_at = now() - interval '40 days' WHERE name = :name", name=old.id)
    rows(db, "UPDATE jobs SET finished_at = now() - interval '40 days' WHERE finished_at IS NOT NULL")
    counted = client.prune(timedelta(days=30), dry_run=True)
    pruned = client.prune(timedelta(days=30))
    for amounts in (counted, pruned):
        assert {name: amounts.amounts[name].rows for name in ("served_files", "served_batches")} == {
            "served_files": 4,  # two inputs, and both results of the old batch
            "served_batches": 1,
        }
        assert amounts.amounts["served_files"].bytes > 0
    assert texts(db) == {"new", "running"}
    assert [batch.id for batch in api.batches.list()] == [running.id, new.id]
    files = {name for (name,) in rows(db, "SELECT name FROM served_files")}
    assert files == {running.input_file_id, new.output_file_id, new.error_file_id}
    assert api.files.content(new.output_file_id).content
    worker.may.set()
    assert ended(api, running.id).status == "completed"


def test_two_gateways_share_the_steps_of_batches(
    gateway: RunningGateway, settings: Settings, worker: BulkWorker, client: Client, db: sa.Engine
) -> None:
    with (
        running_gateway(settings, keys=TwoTenants()) as other,
        openai_client(gateway, "cmk_first") as one,
        openai_client(other, "cmk_first") as two,
    ):
        made = [start((one, two)[n % 2], line("a", f"text {n}")).id for n in range(6)]
        for n, batch_id in enumerate(made):
            batch = ended((two, one)[n % 2], batch_id)
            assert (batch.status, batch.request_counts.completed) == ("completed", 1)
            assert json.loads(one.files.content(batch.output_file_id).text)["custom_id"] == "a"
    assert len(client.jobs()) == 6
    assert len(rows(db, "SELECT FROM served_files WHERE kind = 'output'")) == 6


def test_a_gateway_that_lost_a_batch_to_another_changes_nothing(
    gateway: RunningGateway,
    api: openai.OpenAI,
    db: sa.Engine,
    client: Client,
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    running = gateway.gateway.batches
    assert running is not None
    running.stop()
    keeper = BatchKeeper(gateway.gateway.db, settings, gateway.gateway.models, running._loop)
    entered, may = threading.Event(), threading.Event()
    read = files.read_pieces

    def slow(*args: Any, **more: Any) -> Iterator[bytes]:
        entered.set()
        may.wait(PATIENCE)
        yield from read(*args, **more)

    monkeypatch.setattr(files, "read_pieces", slow)
    made = start(api, line("a", "x"))
    step = threading.Thread(target=keeper.take_step)
    step.start()
    entered.wait(PATIENCE)
    # Its lease ends, and another gateway has the batch.
    rows(db, "UPDATE served_batches SET lease_until = now() - interval '1 s'")
    with db.begin() as conn:
        taken = batches.claim_due(conn)
    assert taken is not None
    may.set()
    step.join(PATIENCE)
    assert api.batches.retrieve(made.id).status == "validating"
    assert rows(db, "SELECT FROM served_batch_lines") == client.jobs() == []
    with db.begin() as conn:
        batches.release(conn, taken)
    assert keeper.take_step()
    Hands(db).work()
    while keeper.take_step():
        pass
    assert api.batches.retrieve(made.id).status == "completed"
    assert [job.chunks for job in client.jobs()] == [1]
    keeper._broker.close()


def test_the_lines_behind_the_32_767th_are_read_as_those_before_it(db: sa.Engine, client: Client) -> None:
    rows(
        db,
        """
        WITH batch AS (
            INSERT INTO served_batches (name, tenant, asked, state, input_file, expires_at)
            VALUES ('batch_large', 'north', '{}', 'finalizing', 'file-large', now())
            RETURNING id
        )
        INSERT INTO served_batch_lines (served_batch_id, line, custom_id, n_inputs, is_base64, refuses_long)
        SELECT id, line, 'line ' || line, 1, false, false
        FROM batch CROSS JOIN generate_series(30000, 36000) AS line
        """,
    )
    ((batch_id,),) = rows(db, "SELECT id FROM served_batches")
    after, seen = 29_999, []
    with db.begin() as conn:
        while of_slice := lines.read(conn, batch_id, after=after):
            seen += [one.line for one in of_slice]
            after = seen[-1]
    assert seen == list(range(30_000, 36_001))
