"""Everything the server holds. Memory for the objects, a folder for the bytes of files."""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.openai_server.bill import Bill
from tests.openai_server.config import Config
from tests.openai_server.errors import Cut, no_such_file
from tests.openai_server.misbehaviours import Misbehaviours
from tests.openai_server.validation import Plan
from tests.support.waiting import PATIENCE

EXPIRES_AFTER_SECONDS = 30 * 86_400


@dataclass
class StoredFile:
    id: str
    filename: str
    purpose: str
    path: Path
    bytes: int
    created: float
    expires_after: int = EXPIRES_AFTER_SECONDS

    def as_json(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": "file",
            "bytes": self.bytes,
            "created_at": int(self.created),
            "expires_at": int(self.created) + self.expires_after,
            "filename": self.filename,
            "purpose": self.purpose,
            "status": "processed",
            "status_details": None,
        }


@dataclass
class Batch:
    """``shown`` is the object as a client gets it, complete and in OpenAI's words."""

    shown: dict[str, Any]
    created: float
    input: Path
    """A link of its own: deleting the input file does not stop a batch under way."""
    input_filename: str
    output_expires_after: int
    plan: Plan | None = None
    reserved: bool = False
    """The plan's lines and tokens count as enqueued."""
    gets: int = 0
    """Retrievals since its status changed."""
    steps: int = 0
    """Status changes so far."""

    @property
    def id(self) -> str:
        batch_id: str = self.shown["id"]
        return batch_id

    @property
    def status(self) -> str:
        status: str = self.shown["status"]
        return status

    @property
    def subject(self) -> dict[str, Any]:
        """What a misbehaviour's ``where`` may name."""
        return {
            "endpoint": "batches.create",
            "batch": self.id,
            "id": self.shown["input_file_id"],
            "filename": self.input_filename,
            "metadata": self.shown["metadata"],
        }


class Store:
    def __init__(self, config: Config, key: str, folder: Path) -> None:
        self.config = config
        self.key = key
        self.folder = folder
        self.changed = threading.Condition()
        """Guards all below; told of every change of a batch or a setting."""
        self.files: dict[str, StoredFile] = {}
        self.batches: dict[str, Batch] = {}
        self.files_created = 0
        self.batches_created = 0
        self.created_lately: deque[float] = deque()
        self.enqueued_tokens: Counter[str] = Counter()
        self.enqueued_requests: Counter[str] = Counter()
        self.peak_enqueued_tokens = 0
        self.peak_enqueued_requests = 0
        self.refused_enqueued = 0
        self.requests: dict[str, Counter[str]] = {}
        self.sync_lately: dict[str, deque[tuple[float, int]]] = {}
        self.misbehaviours = Misbehaviours()
        self.bill = Bill()
        self.owners: dict[str, str] = {}
        """Files and batches to the key that made them."""
        self._numbers = 0
        self._batches_counted = 0
        self._under_way = 0
        self._scene = 0

    def new_id(self, prefix: str) -> str:
        with self.changed:
            self._numbers += 1
            return f"{prefix}{self._numbers:024x}"

    def new_batch_id(self) -> str:
        if not self.config.counts_batches:
            return self.new_id("batch_")
        with self.changed:
            self._batches_counted += 1
            return f"batch_{self._batches_counted}"

    def forget(self) -> None:
        """Start anew, as a server that keeps nothing over a restart. The bill stays."""
        with self.changed:
            for batch in self.batches.values():
                batch.reserved = False
            self.enqueued_tokens.clear()
            self.enqueued_requests.clear()
            self.files.clear()
            self.batches.clear()
            self.owners.clear()
            self._batches_counted = 0
            self.changed.notify_all()

    def owner(self, object_id: str) -> str | None:
        """The key with which a file or batch was made; that of a result file is its batch's. None: nobody's."""
        with self.changed:
            file = self.files.get(object_id)
            if file is not None and file.purpose == "batch_output":
                object_id = file.filename.rpartition("_")[0]
            return self.owners.get(object_id)

    # Files

    def add_file(self, path: Path, filename: str, purpose: str, expires_after: int) -> StoredFile:
        """The bytes at ``path`` are the store's from now on."""
        file_id = self.new_id("file-")
        kept = path.rename(self.folder / file_id)
        file = StoredFile(file_id, filename, purpose, kept, kept.stat().st_size, time.time(), expires_after)
        with self.changed:
            self.files[file_id] = file
            self.files_created += 1
        return file

    def file(self, file_id: str) -> StoredFile:
        with self.changed:
            if file_id not in self.files:
                raise no_such_file(file_id)
            return self.files[file_id]

    def remove_file(self, file_id: str) -> None:
        with self.changed:
            file = self.file(file_id)
            del self.files[file_id]
        file.path.unlink()

    # What is enqueued

    def reserve(self, plan: Plan) -> str | None:
        """Counts a batch's lines and tokens as enqueued, or says which limit forbids it."""
        model, tokens = plan.model, plan.total_tokens
        with self.changed:
            limit = self.config.enqueued_tokens
            if limit is not None and self.enqueued_tokens[model] + tokens > limit:
                self.refused_enqueued += 1
                return enqueued_message(f"token limit reached for {model}", limit, "tokens")
            limit = self.config.enqueued_requests
            if limit is not None and self.enqueued_requests[model] + plan.lines > limit:
                self.refused_enqueued += 1
                return enqueued_message(f"request limit reached for {model}", limit, "requests")
            self.enqueued_tokens[model] += tokens
            self.enqueued_requests[model] += plan.lines
            self.peak_enqueued_tokens = max(self.peak_enqueued_tokens, self.enqueued_tokens.total())
            self.peak_enqueued_requests = max(self.peak_enqueued_requests, self.enqueued_requests.total())
        return None

    def release(self, plan: Plan) -> None:
        with self.changed:
            self.enqueued_tokens[plan.model] -= plan.total_tokens
            self.enqueued_requests[plan.model] -= plan.lines

    # Requests under way

    @contextmanager
    def under_way(self) -> Iterator[None]:
        with self.changed:
            self._under_way += 1
        try:
            yield
        finally:
            with self.changed:
                self._under_way -= 1
                self.changed.notify_all()

    def rest(self, seconds: float) -> None:
        """Let a request wait. Cut if the server is settled meanwhile, because its client has gone with its test."""
        with self.changed:
            scene = self._scene
            if self.changed.wait_for(lambda: self._scene != scene, timeout=seconds):
                raise Cut

    def settle(self) -> None:
        """Cut what still waits, and return when no request is under way: it would be counted for the next test."""
        with self.changed:
            self._scene += 1
            self.changed.notify_all()
            if not self.changed.wait_for(lambda: not self._under_way, timeout=PATIENCE / 2):
                raise ValueError("requests of an earlier test do not end")

    # Its books

    def count(self, endpoint: str, status: str) -> None:
        with self.changed:
            self.requests.setdefault(endpoint, Counter())[status] += 1

    def as_json(self) -> dict[str, Any]:
        with self.changed:
            return {
                "requests": {endpoint: dict(statuses) for endpoint, statuses in self.requests.items()},
                "batches": [_books(batch) for batch in self.batches.values()],
                "batches_created": self.batches_created,
                "files": [file.as_json() for file in self.files.values()],
                "files_created": self.files_created,
                "enqueued_tokens": dict(self.enqueued_tokens),
                "peak_enqueued_tokens": self.peak_enqueued_tokens,
                "peak_enqueued_requests": self.peak_enqueued_requests,
                "refused_enqueued": self.refused_enqueued,
                "misbehaviours": self.misbehaviours.as_json(),
            }


def enqueued_message(what: str, limit: int, unit: str) -> str:
    return (
        f"Enqueued {what} in organization org-test. Limit: {limit:,} enqueued {unit}. "
        "Please try again once some in_progress batches have been completed."
    )


def _books(batch: Batch) -> dict[str, Any]:
    plan = batch.plan
    return {
        **batch.shown,
        "input_filename": batch.input_filename,
        "requests": plan.lines if plan else None,
        "tokens": plan.total_tokens if plan else None,
    }
