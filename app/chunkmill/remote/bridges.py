"""Bridges through a gateway: queries of another model answered in the space of a collection."""

from __future__ import annotations

from decimal import Decimal

from chunkmill.domain.arguments import as_flag, as_seconds, as_text, as_usd, require_name
from chunkmill.domain.bridges import Bridge, BridgeQuote
from chunkmill.domain.printed import Rows
from chunkmill.domain.spaces import Precision
from chunkmill.remote.asking import RemoteCalls
from chunkmill.remote.collections import path_of
from chunkmill.remote.indexes import judged_model
from chunkmill.remote.reading import parse, parse_object, read, read_list
from chunkmill.remote.steps import Steps


class Bridges(RemoteCalls):
    """The verbs about bridges."""

    def bridge(
        self,
        collection: str,
        model: str,
        *,
        dimensions: int | None = None,
        precision: Precision | str | None = None,
        sample: int = 5_000,
        queries: int = 500,
        compare_old: bool = False,
        max_usd: Decimal | int | str | None = None,
        timeout: float = 3_600.0,
    ) -> Steps[Bridge]:
        """Learn to answer queries of ``model`` in the space that the collection has now, and store what was learnt, as
        :meth:`Client.bridge` does, which describes the arguments.

        What workers embed for it counts for the limits of the key. A request that was begun is not repeated:
        :meth:`bridges` says whether there is a bridge. Raises what that raises.
        """
        body = judged_model(collection, model, sample, queries, dimensions, precision)
        body["compare_old"] = as_flag("compare_old", compare_old)
        if max_usd is not None:
            body["max_usd"] = str(as_usd("max_usd", max_usd))
        return self._get_lasting(
            path_of(collection, "bridges"),
            lambda answer: read(Bridge, parse(answer)),
            body,
            as_seconds("timeout", timeout),
        )

    def quote_bridge(
        self,
        collection: str,
        model: str,
        *,
        dimensions: int | None = None,
        precision: Precision | str | None = None,
        sample: int = 5_000,
        queries: int = 500,
        compare_old: bool = False,
    ) -> Steps[BridgeQuote]:
        """What :meth:`bridge` with these arguments would have embedded, and what that would cost. Nothing is sent.

        Raises what :meth:`bridge` raises before it sends anything.
        """
        body = judged_model(collection, model, sample, queries, dimensions, precision)
        body |= {"compare_old": as_flag("compare_old", compare_old), "dry_run": True}
        return self._get_lasting(path_of(collection, "bridges"), lambda answer: read(BridgeQuote, parse(answer)), body)

    def bridges(self, collection: str | None = None) -> Steps[list[Bridge]]:
        """The bridges of a collection, or of all, by collection and name. Raises :class:`NotFound`."""
        query = {}
        if collection is not None:
            require_name("collection", collection)
            query["collection"] = collection

        def reader(body: bytes) -> list[Bridge]:
            return Rows(read_list(Bridge, parse_object(body).get("bridges"), "bridges"), Bridge)

        return self._get("/v1/bridges", reader, query=query)

    def drop_bridge(self, collection: str, name: str) -> Steps[bool]:
        """Delete the bridge of a collection for the model ``name``. Returns whether there was one.

        Searches through it raise :class:`NotFound` from then on. A request whose answer was lost is not repeated.
        Raises :class:`NotFound`.
        """
        require_name("collection", collection)
        return self._get(
            path_of(collection, "bridges"),
            lambda answer: read(bool, parse_object(answer).get("dropped"), "dropped"),
            query={"name": as_text("name", name)},
            method="DELETE",
            is_repeatable=False,
        )
