"""What keeps collections in order through a gateway: metadata, names, the dead list, lanes and costs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from datetime import date, datetime
from functools import partial
from typing import Any
from urllib.parse import quote

from chunkmill.domain.arguments import as_flag, as_items, as_number, as_text, as_word, require_name
from chunkmill.domain.chosen import as_changes, as_chosen
from chunkmill.domain.collections import DroppedCollection
from chunkmill.domain.costs import Costs, CostsBy
from chunkmill.domain.lanes import Lane
from chunkmill.domain.planning import DeadChunk
from chunkmill.domain.printed import Rows
from chunkmill.domain.results import DeadDetails, DeadEntry, DroppedDead, RetriedDead
from chunkmill.domain.states import Route
from chunkmill.errors import InvalidInput
from chunkmill.remote.asking import RemoteCalls, as_json
from chunkmill.remote.collections import MOST_DEAD, MOST_IDS, flag, path_of, slices
from chunkmill.remote.reading import parse, parse_object, read, read_list
from chunkmill.remote.steps import Steps


class Upkeep(RemoteCalls):
    """The verbs that keep collections in order."""

    def update_metadata(
        self,
        collection: str,
        metadata: Mapping[str, Any] | None = None,
        *,
        ids: Iterable[str] | None = None,
        filter: Mapping[str, Any] | None = None,  # noqa: A002
        all_chunks: bool = False,
        remove: Iterable[str] = (),
        replace: bool = False,
    ) -> Steps[int]:
        """Change the metadata of chunks, as :meth:`Client.update_metadata` does, which describes the arguments.

        Returns how many chunks were chosen. If the call fails, what it has changed stays changed. A request whose
        answer was lost is not repeated, because its number would be lost with it. Raises what that raises.
        """
        require_name("collection", collection)
        named, _ = as_chosen(ids, filter, all_chunks=all_chunks, verb="change")
        replaces = as_flag("replace", replace)
        as_text_of_json, removed = as_changes(metadata, remove, replaces=replaces)
        changes: dict[str, Any] = {"remove": removed, "replace": replaces}
        if metadata is not None:
            changes["metadata"] = json.loads(as_text_of_json)
        meant: list[dict[str, Any]]
        if named is not None:
            meant = [{"ids": some} for some in slices(named, MOST_IDS)] or [{"ids": []}]
        else:
            meant = [{"all": True}] if filter is None else [{"filter": dict(filter)}]
        changed = 0
        for which in meant:
            changed += yield from self._get(
                path_of(collection, "chunks"),
                lambda answer: read(int, parse_object(answer).get("changed"), "changed"),
                method="PATCH",
                body=as_json({**changes, **which}),
                is_repeatable=False,
            )
        return changed

    def drop_collection(self, name: str, *, wait: bool = True) -> Steps[DroppedCollection]:
        """Drop a collection with all of its chunks, as :meth:`Client.drop_collection` does.

        A drop that takes longer than the timeout of the client raises :class:`WaitTimeout`, and goes on; ``wait=False``
        leaves it to a poller. A request whose answer was lost is not repeated, because somebody may have put something
        else under the name. Raises what that raises.
        """
        require_name("name", name)
        return self._get(
            path_of(name),
            lambda answer: read(DroppedCollection, parse(answer)),
            method="DELETE",
            query={"wait": flag(as_flag("wait", wait))},
            is_repeatable=False,
        )

    def rename_collection(self, name: str, to: str) -> Steps[None]:
        """Give a collection another name, as :meth:`Client.rename_collection` does.

        A request whose answer was lost is not repeated. Raises what that raises.
        """
        require_name("name", name)
        require_name("to", to)
        return self._get(path_of(name), _nothing, method="PATCH", body=as_json({"name": to}), is_repeatable=False)

    def set_alias(self, alias: str, collection: str) -> Steps[None]:
        """Let ``alias`` be one more name of ``collection``, as :meth:`Client.set_alias` does.

        Raises what that raises.
        """
        require_name("alias", alias)
        require_name("collection", collection)
        return self._get(_path_of_alias(alias), _nothing, method="PUT", body=as_json({"collection": collection}))

    def remove_alias(self, alias: str) -> Steps[None]:
        """Take an alias away. Its collection stays. A request whose answer was lost is not repeated.

        Raises :class:`NotFound`.
        """
        require_name("alias", alias)
        return self._get(_path_of_alias(alias), _nothing, method="DELETE", is_repeatable=False)

    def dead_codes(
        self, job_id: int | None = None, collection: str | None = None, code: str | None = None
    ) -> Steps[dict[str, int]]:
        """``code → entries`` of the dead list, the most frequent first. The arguments are those of :meth:`dead`."""
        query = {"limit": "1"}
        if job_id is not None:
            query["job_id"] = str(as_number("job_id", job_id))
        if collection is not None:
            require_name("collection", collection)
            query["collection"] = collection
        if code is not None:
            query["code"] = as_text("code", code)
        kind: Any = Mapping[str, int]

        def reader(body: bytes) -> dict[str, int]:
            return dict(read(kind, parse_object(body).get("codes"), "codes"))

        return self._get("/v1/dead", reader, query=query)

    def dead_chunk(self, dead_id: int, *, with_text: bool = False) -> Steps[DeadDetails]:
        """All that is known of one entry of the dead list, with its text if ``with_text``. Raises :class:`NotFound`."""
        return self._get(
            f"/v1/dead/{as_number('dead_id', dead_id)}",
            lambda body: read(DeadDetails, parse(body)),
            query={"with_text": flag(as_flag("with_text", with_text))},
        )

    def dead_chunks(self, job_id: int, limit: int = 1000) -> Steps[list[DeadChunk]]:
        """The chunks of a job that got no vector, with the reasons: the newest ``limit``, of which there are 1,000 at
        most. Raises :class:`NotFound`."""
        limit = as_number("limit", limit, least=0, most=MOST_DEAD)

        def reader(body: bytes) -> list[DeadChunk]:
            entries = read_list(DeadEntry, parse_object(body).get("dead"), "dead")[:limit]
            return Rows([DeadChunk(entry.chunk_id, entry.code, entry.reason) for entry in entries], DeadChunk)

        path = f"/v1/jobs/{as_number('job_id', job_id)}/dead"
        return self._get(path, reader, query={"limit": str(max(1, limit))})

    def retry_dead(
        self, ids: Iterable[int] | None = None, *, job_id: int | None = None, code: str | None = None
    ) -> Steps[RetriedDead]:
        """Embed the texts of dead chunks after all, as :meth:`Client.retry_dead` does, which describes the arguments.

        There may be 10,000 ids. A request whose answer was lost is not repeated. Raises what that raises.
        """
        return self._act_on_dead("retry", RetriedDead, ids, job_id, code)

    def drop_dead(
        self, ids: Iterable[int] | None = None, *, job_id: int | None = None, code: str | None = None
    ) -> Steps[DroppedDead]:
        """Take chunks off the dead list and out of their collections, as :meth:`Client.drop_dead` does.

        There may be 10,000 ids. A request whose answer was lost is not repeated. Raises what that raises.
        """
        return self._act_on_dead("drop", DroppedDead, ids, job_id, code)

    def _act_on_dead(
        self, word: str, kind: Any, ids: Iterable[int] | None, job_id: int | None, code: str | None
    ) -> Steps[Any]:
        if (ids is None) == (job_id is None and code is None):
            raise InvalidInput("give either ids, or job_id or code or both, to say which dead chunks are meant.")
        body: dict[str, Any] = {}
        if ids is not None:
            body["ids"] = [as_number("an id in ids", dead_id) for dead_id in as_items("ids", ids)]
            if len(body["ids"]) > MOST_IDS:
                raise InvalidInput(f"ids has {len(body['ids']):,} numbers; a gateway takes {MOST_IDS:,} at most.")
        if job_id is not None:
            body["job_id"] = as_number("job_id", job_id)
        if code is not None:
            body["code"] = as_text("code", code)
        reader = partial(read, kind)
        return self._get(
            f"/v1/dead/{word}",
            lambda answer: reader(parse(answer)),
            method="POST",
            body=as_json(body),
            is_repeatable=False,
        )

    def lanes(self) -> Steps[list[Lane]]:
        """The paid lanes: running, idle (no worker serves them), paused, stopped or held, and why."""
        return self._get(
            "/v1/lanes", lambda body: Rows(read_list(Lane, parse_object(body).get("lanes"), "lanes"), Lane)
        )

    def resume_lane(self, route: Route | str) -> Steps[bool]:
        """Let a stopped or paused lane take work again, and forget limits that the provider's refusals have taught.

        Returns False if there was nothing to do.
        """
        path = f"/v1/lanes/{as_word(Route, route, 'route').value}/resume"
        return self._get(path, lambda body: read(bool, parse_object(body).get("resumed"), "resumed"), method="POST")

    def usage(self, by: CostsBy | str = CostsBy.MONTH, *, since: date | None = None) -> Steps[Costs]:
        """What was embedded and what it cost, by day, month, model, route or job, since a day in UTC, as
        :meth:`Client.usage` says it."""
        query = {"by": as_word(CostsBy, by, "by").value}
        if since is not None:
            if isinstance(since, datetime) or not isinstance(since, date):
                raise InvalidInput(f"since is of type {type(since).__name__}; it must be a date.")
            query["since"] = since.isoformat()
        return self._get("/v1/costs", lambda body: read(Costs, parse(body)), query=query)


def _path_of_alias(alias: str) -> str:
    return f"/v1/aliases/{quote(alias, safe='')}"


def _nothing(_: bytes) -> None:
    """The answer only repeats what was asked for."""
