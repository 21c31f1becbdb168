"""Re-embeddings through a gateway: a collection moves to another space without a gap, and comes back."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

from chunkmill.domain.arguments import as_flag, as_number, as_seconds, as_text, as_usd, as_word, require_name
from chunkmill.domain.gates import Gates
from chunkmill.domain.printed import Rows
from chunkmill.domain.reembedding import (
    KEEP_DAYS,
    RAMP,
    STEP_HOURS,
    Plan,
    Quote,
    Reembedding,
    as_gates,
    as_ramp,
)
from chunkmill.domain.spaces import OnLong, Precision
from chunkmill.domain.states import Priority, Route
from chunkmill.errors import NotFound, WaitTimeout
from chunkmill.remote.asking import RemoteCalls, as_json
from chunkmill.remote.collections import path_of
from chunkmill.remote.reading import parse, parse_object, read, read_list
from chunkmill.remote.refusals import Failure
from chunkmill.remote.steps import Answer, Request, Steps

LONGEST_FLIP_S = 100.0
"""How many seconds one request waits for a flip. The gateway takes 110 at most, and then it is asked again."""
MOST_LISTED = 200


class Reembeddings(RemoteCalls):
    """The verbs that move collections from one space to another."""

    def reembed(
        self,
        collection: str,
        *,
        to: str,
        dry_run: bool = False,
        on_long: OnLong | str = OnLong.TRUNCATE,
        dimensions: int | None = None,
        precision: Precision | str | None = None,
        gates: Gates | None = None,
        ramp: Sequence[int] = RAMP,
        step_hours: float = STEP_HOURS,
        keep_days: float = KEEP_DAYS,
        priority: Priority | str = Priority.LOW,
        route: Route | str = Route.AUTO,
        max_usd: Decimal | int | str | None = None,
    ) -> Steps[Quote | Reembedding]:
        """Begin to move a collection to the model ``to``, or with ``dry_run`` say what that would take, as
        :meth:`Client.reembed` does, which describes the arguments.

        A call whose answer was lost is repeated, because the same call returns the re-embedding that is under way.
        Raises what that raises, :class:`AccessDenied` and :class:`GatewayUnavailable`.
        """
        require_name("collection", collection)
        dry_run = as_flag("dry_run", dry_run)
        plan = Plan(
            gates=as_gates(gates),
            ramp=as_ramp(ramp),
            step_hours=step_hours,
            keep_days=keep_days,
            priority=as_word(Priority, priority, "priority"),
            route=as_word(Route, route, "route"),
            on_long=as_word(OnLong, on_long, "on_long"),
        )
        body = {"to": as_text("to", to), "dry_run": dry_run, **plan.as_json()}
        if dimensions is not None:
            body["dimensions"] = as_number("dimensions", dimensions, least=1)
        if precision is not None:
            body["precision"] = as_word(Precision, precision, "precision")
        if max_usd is not None:
            body["max_usd"] = str(as_usd("max_usd", max_usd))
        kind: Any = Quote if dry_run else Reembedding
        return self._get(
            path_of(collection, "reembed"),
            lambda answer: read(kind, parse(answer)),
            method="POST",
            body=as_json(body),
        )

    def reembedding(self, which: int | str) -> Steps[Reembedding]:
        """A re-embedding by its id, or the latest one of a collection by its name. Raises :class:`NotFound`."""
        path = yield from self._path(which)
        return (yield from self._get(path, _reembedding))

    def reembeddings(self, collection: str | None = None, *, limit: int = 20) -> Steps[list[Reembedding]]:
        """The latest re-embeddings, newest first: of one collection, or of all. There are 200 at most.

        Raises :class:`NotFound`.
        """
        limit = as_number("limit", limit, least=0, most=MOST_LISTED)
        query = {"limit": str(max(1, limit))}
        if collection is not None:
            require_name("collection", collection)
            query["collection"] = collection

        def reader(body: bytes) -> list[Reembedding]:
            listed = read_list(Reembedding, parse_object(body).get("reembeddings"), "reembeddings")
            return Rows(listed[:limit], Reembedding)

        return self._get("/v1/reembeddings", reader, query=query)

    def flip(self, which: int | str, *, missing: int | None = None, timeout: float = 60.0) -> Steps[Reembedding]:
        """Make the new space the active one now, without the rest of the ramp, as :meth:`Client.flip` does.

        ``timeout`` says for how many seconds the flip may wait for vectors. A request whose answer was lost is not
        repeated: :meth:`reembedding` says whether it flipped. Raises what that raises.
        """
        return self._flip(which, "flip", missing, timeout)

    def rollback(self, which: int | str, *, missing: int | None = None, timeout: float = 60.0) -> Steps[Reembedding]:
        """Make the space active again that the collection left. It is :meth:`flip` backwards, with the same proof.

        Raises what :meth:`flip` raises.
        """
        return self._flip(which, "rollback", missing, timeout)

    def _flip(self, which: int | str, word: str, missing: int | None, timeout: float) -> Steps[Reembedding]:
        most = None if missing is None else as_number("missing", missing, least=0)
        until = self._deadline(as_seconds("timeout", timeout))
        path = yield from self._path(which, word)

        def attempt() -> Steps[Answer | Failure]:
            waits = max(0.0, min(LONGEST_FLIP_S, until - self._clock()))
            body = as_json({"missing": most, "timeout_s": waits})
            headers = {"content-type": "application/json"}
            made = yield from self._attempt(
                self._server, Request("POST", path, waits + self._timeout, {}, headers, body)
            )
            if isinstance(made, Failure) and isinstance(made.error, WaitTimeout) and self._clock() >= until:
                return dataclasses.replace(made, may_repeat=False)  # the caller's time is over
            return made

        answer = yield from self._repeated(attempt, until + self._timeout, is_repeatable=False)
        return (yield from self._read(self._server, answer.body, lambda: _reembedding(answer.body)))

    def judge_reembedding(self, which: int | str, *, timeout: float = 600.0) -> Steps[Reembedding]:
        """Check the gates now, and note what they said, as :meth:`Client.judge_reembedding` does.

        Raises what that raises.
        """
        seconds = as_seconds("timeout", timeout)
        path = yield from self._path(which, "judge")
        return (yield from self._get_lasting(path, _reembedding, {}, seconds))

    def pause_reembedding(self, which: int | str) -> Steps[Reembedding]:
        """Stop a re-embedding in its present state and share. Texts that workers already have are still embedded.

        What is enqueued meanwhile still reaches both spaces. Raises :class:`NotFound`, and :class:`InvalidInput` if it
        has ended.
        """
        return self._act(which, "pause", {}, is_repeatable=True)

    def resume_reembedding(
        self, which: int | str, *, gates: Gates | None = None, ramp: Sequence[int] | None = None
    ) -> Steps[Reembedding]:
        """Go on with one that was paused, has a problem, or stepped back; with other ``gates`` or another ``ramp``.

        Its gates are checked anew. Raises :class:`NotFound`, and :class:`InvalidInput` if it has ended.
        """
        body: dict[str, Any] = {}
        if gates is not None:
            body["gates"] = Plan(gates=as_gates(gates)).as_json()["gates"]
        if ramp is not None:
            body["ramp"] = as_ramp(ramp)
        return self._act(which, "resume", body, is_repeatable=True)

    def cancel_reembedding(self, which: int | str) -> Steps[Reembedding]:
        """Give up a re-embedding before its flip. Searches stay in the old space.

        Vectors of the new space that are written stay until they are pruned or evicted. A request whose answer was lost
        is not repeated: :meth:`reembedding` says what became of it. Raises :class:`NotFound`, and
        :class:`InvalidInput` after the flip, when :meth:`rollback` returns.
        """
        return self._act(which, "cancel", {}, is_repeatable=False)

    def finish_reembedding(self, which: int | str) -> Steps[Reembedding]:
        """Drop the space that the collection left, before ``keep_days`` are over. There is no way back after that.

        A request whose answer was lost is not repeated. Raises :class:`NotFound`, and :class:`InvalidInput` if the
        collection has left no space that is still kept.
        """
        return self._act(which, "finish", {}, is_repeatable=False)

    def _act(self, which: int | str, word: str, body: dict[str, Any], *, is_repeatable: bool) -> Steps[Reembedding]:
        path = yield from self._path(which, word)
        return (
            yield from self._get(path, _reembedding, method="POST", body=as_json(body), is_repeatable=is_repeatable)
        )

    def _path(self, which: int | str, word: str = "") -> Steps[str]:
        """The path of a re-embedding. Raises :class:`NotFound` if a collection has none."""
        if isinstance(which, str):
            require_name("which", which)
            latest = yield from self.reembeddings(which, limit=1)
            if not latest:
                raise NotFound(f"collection {which!r} was never re-embedded.")
            number = latest[0].id
        else:
            number = as_number("which", which)
        return f"/v1/reembeddings/{number}{word and '/' + word}"


def _reembedding(body: bytes) -> Reembedding:
    return read(Reembedding, parse(body))
