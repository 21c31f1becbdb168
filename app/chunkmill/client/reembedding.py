"""Re-embeddings: a collection moves to another space without a gap, and comes back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, overload

from chunkmill.client.base import ClientPart
from chunkmill.domain.gates import Gates
from chunkmill.domain.reembedding import KEEP_DAYS, RAMP, STEP_HOURS, Quote, Reembedding
from chunkmill.domain.spaces import OnLong, Precision
from chunkmill.domain.states import Priority, Route


class Reembeddings(ClientPart):
    """The part of the client that moves collections from one space to another."""

    @overload
    def reembed(
        self,
        collection: str,
        *,
        to: str,
        dry_run: Literal[True],
        on_long: OnLong | str = OnLong.TRUNCATE,
        dimensions: int | None = None,
        precision: Precision | str | None = None,
        gates: Gates | None = None,
        ramp: Sequence[int] = RAMP,
        step_hours: float = STEP_HOURS,
        keep_days: float = KEEP_DAYS,
        priority: Priority | str = Priority.LOW,
        route: Route | str = Route.AUTO,
    ) -> Quote: ...

    @overload
    def reembed(
        self,
        collection: str,
        *,
        to: str,
        dry_run: Literal[False] = False,
        on_long: OnLong | str = OnLong.TRUNCATE,
        dimensions: int | None = None,
        precision: Precision | str | None = None,
        gates: Gates | None = None,
        ramp: Sequence[int] = RAMP,
        step_hours: float = STEP_HOURS,
        keep_days: float = KEEP_DAYS,
        priority: Priority | str = Priority.LOW,
        route: Route | str = Route.AUTO,
    ) -> Reembedding: ...

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
    ) -> Quote | Reembedding:
        """Begin to move a collection to the model ``to``, or with ``dry_run`` say what that would take.

        Nobody notices the move: the stored texts are embedded into the new space as work of ``priority``, what is
        enqueued meanwhile is embedded into both, and searches go on in the old space. The new one must pass the
        ``gates``, answers the growing shares of ``ramp``, each for ``step_hours``, and becomes the active one at a
        single moment. The old one is kept up to date for ``keep_days``, so that :meth:`rollback` can return to it. A
        poller does all this; a call with the same arguments returns the re-embedding that is under way.

        ``on_long``, ``dimensions``, ``precision`` and ``route`` are as in :meth:`enqueue`. A ramp whose last share is
        not 100 stays there until somebody calls :meth:`flip` or :meth:`cancel_reembedding`, and an empty one flips as
        soon as the gates are passed.

        Raises :class:`NotFound`, :class:`InvalidInput` if another re-embedding of the collection is under way or it is
        in the space already, :class:`UnknownModel`, :class:`UnknownRoute`, and :class:`BudgetExceeded`.
        """
        raise NotImplementedError

    def reembedding(self, which: int | str) -> Reembedding:
        """A re-embedding by its id, or the latest one of a collection by its name. Raises :class:`NotFound`."""
        raise NotImplementedError

    def reembeddings(self, collection: str | None = None, *, limit: int = 20) -> list[Reembedding]:
        """The latest re-embeddings, newest first: of one collection, or of all."""
        raise NotImplementedError

    def flip(self, which: int | str, *, timeout: float = 60.0) -> Reembedding:
        """Make the new space the active one now, without the rest of the ramp.

        No chunk that can be searched is missing afterwards: that is proved in the moment of the flip, for which writers
        wait some milliseconds. If chunks got their vector in the old space a moment ago, this waits for their vector in
        the new one, up to ``timeout`` seconds. The gates of quality are not asked.

        Raises :class:`NotFound`, :class:`InvalidInput` if it is not ramping or judging, and :class:`WaitTimeout`, which
        says how many chunks have no vector in the new space. Nothing is changed then.
        """
        raise NotImplementedError

    def rollback(self, which: int | str, *, timeout: float = 60.0) -> Reembedding:
        """Make the space active again that the collection left. It is :meth:`flip` backwards, with the same proof.

        The new space is kept up to date for ``keep_days``; after that it is dropped. Raises what :meth:`flip` raises.
        """
        raise NotImplementedError

    def pause_reembedding(self, which: int | str) -> Reembedding:
        """Let a re-embedding stay in its state and its share. What was handed to workers is embedded.

        What is enqueued meanwhile still reaches both spaces. Raises :class:`NotFound`, and :class:`InvalidInput` if it
        has ended.
        """
        raise NotImplementedError

    def resume_reembedding(
        self, which: int | str, *, gates: Gates | None = None, ramp: Sequence[int] | None = None
    ) -> Reembedding:
        """Go on with one that was paused, has a problem, or stepped back; with other ``gates`` or another ``ramp``.

        Its gates are checked anew. Raises :class:`NotFound`, and :class:`InvalidInput` if it has ended.
        """
        raise NotImplementedError

    def cancel_reembedding(self, which: int | str) -> Reembedding:
        """Give up a re-embedding before its flip. Searches stay in the old space.

        Vectors of the new space that are written stay, as those that no collection refers to, until they are pruned or
        evicted. Raises :class:`NotFound`, and :class:`InvalidInput` after the flip, when :meth:`rollback` returns.
        """
        raise NotImplementedError

    def finish_reembedding(self, which: int | str) -> Reembedding:
        """Drop the space that the collection left, before ``keep_days`` are over. There is no way back after that.

        Raises :class:`NotFound`, and :class:`InvalidInput` if the collection has left no space that is still kept.
        """
        raise NotImplementedError
