"""A test's handle on the server: starts it as a process of its own, steers it, reads its books, stops it."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.openai_server.config import DEFAULT_KEY
from tests.openai_server.vectors import text_hash
from tests.support.waiting import PATIENCE

ROOT = Path(__file__).parents[2]


class OpenAIServer:
    """``settings`` are those of ``config.Config``, e.g. ``OpenAIServer(fast_tokens=True, batches=False)``."""

    url: str
    """Ends in ``/v1``: the client's ``base_url``."""

    def __init__(self, *, key: str = DEFAULT_KEY, port: int = 0, **settings: Any) -> None:
        self.key = key
        self.port = port
        self.settings = settings
        self._process: subprocess.Popen[str] | None = None

    # Its life

    def __enter__(self) -> OpenAIServer:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Returns when it listens. It ends by itself when the process that started it is gone."""
        # fmt: off
        command = [
            sys.executable, "-m", "tests.openai_server", "--port", str(self.port), "--key", self.key,
            "--settings", json.dumps(self.settings), "--until-stdin-closes",
        ]
        # fmt: on
        self._process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self.stop()
            raise RuntimeError("the test server did not start; its error is on stderr above")
        started = json.loads(line)
        self.url, self.port = started["url"], started["port"]

    def stop(self) -> None:
        process = self._process
        if process is None:
            return
        self._process = None
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.close()
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    # Steering

    def control(self, **settings: Any) -> dict[str, Any]:
        """Changes settings from now on, for batches under way too. Returns all of them."""
        return self._call("POST", "config", settings)

    def misbehave(
        self,
        kind: str,
        *,
        times: int | None = 1,
        after: int = 0,
        where: dict[str, Any] | None = None,
        **options: Any,
    ) -> int:
        """Asks for a misbehaviour of ``kinds.KINDS``; returns its number.

        It strikes ``times`` times (None: for good) once ``after`` chances have passed. ``where`` narrows the chances by
        what is known there: ``endpoint`` ("batches.create"; patterns such as ``batches.*`` too; that of how a batch
        goes and of its lines is "batches.create"); for a batch ``batch`` (its id), ``id`` and ``filename`` of its
        input file and ``metadata`` (those pairs must be there); for an address with an id ``id``, and for a file
        ``filename`` and ``purpose``.
        """
        wish = {"kind": kind, "times": times, "after": after, "where": where or {}, "options": options}
        number: int = self._call("POST", "misbehave", wish)["number"]
        return number

    def fired(self, number_or_kind: int | str) -> int:
        """How often a misbehaviour, or all of a kind, struck."""
        return sum(
            len(misbehaviour["fired"])
            for misbehaviour in self.state()["misbehaviours"]
            if number_or_kind in (misbehaviour["number"], misbehaviour["kind"])
        )

    def calm(self) -> None:
        """No more misbehaviour; what has struck stays on record."""
        self._call("POST", "calm", {})

    def settle(self) -> None:
        """End the requests of clients that no longer wait. After this, none of them is counted or charged."""
        self._call("POST", "settle", {})

    def vanish(self, file_id: str) -> None:
        """The file is gone, and no client asked for it."""
        self._call("POST", "vanish", {"file_id": file_id})

    def forget(self) -> None:
        """The server starts anew, as one that keeps nothing over a restart."""
        self._call("POST", "forget", {})

    def cancel(self, batch_id: str) -> None:
        """Somebody else cancels the batch."""
        self._call("POST", "cancel", {"batch_id": batch_id})

    # Books

    def bill(self) -> dict[str, int]:
        """Text hash (``text_hash``) to how many times that text was charged."""
        texts: dict[str, int] = self._call("GET", "bill")["texts"]
        return texts

    def charges(self) -> list[dict[str, Any]]:
        """Who charged what: ``{"source", "kind": "batch"|"sync", "model", "requests", "inputs", "tokens"}`` each."""
        charges: list[dict[str, Any]] = self._call("GET", "bill")["charges"]
        return charges

    def charged_by(self, text: str) -> list[str]:
        """The batches and sync requests that charged this text, in their order."""
        sources: list[str] = self._call("GET", f"bill/{text_hash(text)}")["sources"]
        return sources

    def state(self) -> dict[str, Any]:
        """What the server holds and has seen::

        requests        {endpoint: {status: how many}}, "cut" for an answer that never went out
        batches         the batch objects, oldest first, with "input_filename", "tokens" and "requests" added
        batches_created how many, with those made twice
        files           the file objects alive now, oldest first
        files_created   how many, with the server's own output files
        enqueued_tokens {model: now}
        peak_enqueued_tokens, peak_enqueued_requests   the most at one time, over all models
        refused_enqueued  batches refused for what was enqueued already
        misbehaviours   [{number, kind, times, after, where, options, fired: [what it struck]}]
        """
        return self._call("GET", "state")

    def _call(self, method: str, name: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        url = f"http://127.0.0.1:{self.port}/_control/{name}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(url, data=data, method=method)
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE) as answer:  # noqa: S310
                read: dict[str, Any] = json.load(answer)
                return read
        except urllib.error.HTTPError as error:
            with error:
                raise ValueError(error.read().decode()) from None
