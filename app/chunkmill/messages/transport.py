"""kombu's Redis transport for processes of our own that consume: workers and Flower.

It trusts nothing that stands in Redis. Each message passes ``door`` before kombu and Celery read it, tables of bindings
and of unacknowledged messages are not used, and no message or publisher can keep a process from its queue.
"""

from __future__ import annotations

import contextlib
import json
import logging
import threading
import time
from collections import Counter
from queue import Empty
from typing import Any

import redis
from kombu.transport import TRANSPORT_ALIASES, virtual
from kombu.transport import redis as redis_transport
from redis._parsers import _RESP2Parser
from redis.client import PubSub

from chunkmill.broker import QUEUES, delete_wrong_types, is_wrong_type, keys_of, refusals
from chunkmill.messages import door
from chunkmill.messages.door import REPLIES, Refusal
from chunkmill.system.forks import renew_in_child
from chunkmill.telemetry import metrics
from chunkmill.telemetry.counts import COUNTS

logger = logging.getLogger(__name__)

AT_ONCE = 20
"""How many published messages are read before it is the queue's turn again."""
REPLY_SECONDS = 60
"""How long a reply is kept in Redis. Whoever asked waits for some seconds."""
MOST_IN_A_ROW = 1000
"""After this many refused messages in a row their queue is deleted, because doorbells behind a million others would
come too late."""
SAY_SECONDS = 10.0
"""How often at most a line in the log says that messages were refused. Whoever sends them may send millions."""


class _RefusalCounter:
    """Counts refused messages, and says so. A line has no word of a message, because anything may stand in it."""

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._untold: Counter[tuple[str, str]] = Counter()
        self._said_at = -SAY_SECONDS

    def count(self, where: str, refusal: Refusal) -> None:
        COUNTS.add(metrics.REFUSED, 1, where, refusal)
        with self._mutex:
            self._untold[where, refusal] += 1
            now = time.monotonic()
            if now - self._said_at < SAY_SECONDS:
                return
            self._said_at, told, self._untold = now, self._untold, Counter()
        logger.warning(
            "refused messages in Redis that no process of ours writes: %s. Find out who else can write to this Redis. "
            "No work is lost, because the poller rings again.",
            ", ".join(f"{number} from {source} ({why})" for (source, why), number in sorted(told.items())),
        )


REFUSED = _RefusalCounter()
renew_in_child(REFUSED, "_mutex")


class _TooLarge(redis.exceptions.InvalidResponse):
    """Redis sends more at once than any message may have. Reading on would take that much memory."""


class _BoundedParser(_RESP2Parser):
    def on_connect(self, connection: Any) -> None:
        super().on_connect(connection)  # type: ignore[no-untyped-call]
        buffer: Any = self._buffer
        read = buffer.read

        def read_bounded(length: int, *arguments: Any, **options: Any) -> bytes:
            if length > door.LARGEST_REPLY:
                raise _TooLarge(f"an answer of Redis has {length} bytes")
            return bytes(read(length, *arguments, **options))

        buffer.read = read_bounded


class _PubSub(PubSub):
    """Hands out published messages that passed the door. None stands for another one, as for one that never came."""

    def parse_response(self, *arguments: Any, **options: Any) -> Any:
        response = super().parse_response(*arguments, **options)  # type: ignore[no-untyped-call]
        if not isinstance(response, list | tuple) or not response[0].endswith(b"message"):
            return response
        *start, channel, raw = response
        is_event = b"celeryev" in channel
        made = door.event(raw) if is_event else door.command(raw)
        if isinstance(made, Refusal):
            REFUSED.count("events" if is_event else "control", made)
            return None
        return [*start, channel, made]


class _Client(redis.Redis):
    """Hands out messages of a list that passed the door. None stands for another one, as for an empty list."""

    _in_a_row = 0
    """How many messages were refused since the last doorbell."""

    def parse_response(self, connection: Any, command_name: Any, **options: Any) -> Any:
        response = super().parse_response(connection, command_name, **options)  # type: ignore[no-untyped-call]
        if command_name != "BRPOP" or not response:
            return response
        key, raw = response
        queue, _, step = key.decode("utf-8", "replace").partition(redis_transport.Channel.sep)
        if queue in QUEUES:
            where, made = queue, door.doorbell(raw, queue, int(step or 0))
        else:
            where, made = "replies", door.reply(raw)
        if isinstance(made, Refusal):
            REFUSED.count(where, made)
            self._in_a_row += 1
            if queue in QUEUES and self._in_a_row >= MOST_IN_A_ROW:
                self._in_a_row = 0
                self.delete(*keys_of(queue))
                logger.warning("deleted queue %s in Redis: its last %s messages were refused", queue, MOST_IN_A_ROW)
            return None
        self._in_a_row = 0
        return key, made

    def pubsub(self, **options: Any) -> PubSub:
        return _PubSub(self.connection_pool, **options)


class _QoS(virtual.QoS):  # type: ignore[misc]
    """The doorbells that this process took and did not acknowledge yet, in its memory alone.

    kombu keeps a second record in Redis, from which it restores the messages of killed workers. The ledger knows which
    ChunkBatches are in work, and the poller rings again, so that record would only be one more thing to trust.
    """

    def restore_unacked(self) -> None:
        """Put them back. If Redis is away, the poller rings again."""
        self._flush()
        with contextlib.suppress(redis.RedisError, OSError):
            for message in self._delivered.values():
                self.channel._restore(message)
        self._delivered.clear()


class _Channel(redis_transport.Channel):  # type: ignore[misc]
    QoS = _QoS
    _in_listen: Any = None
    _is_behind = False
    """Whether published messages may lie in the buffer of the connection, which no longer says that it is readable."""

    def _get_client(self) -> type[redis.Redis]:
        return _Client

    def _connparams(self, *arguments: Any, **options: Any) -> dict[str, Any]:
        return {**super()._connparams(*arguments, **options), "protocol": 2, "parser_class": _BoundedParser}

    # --- doorbells -----------------------------------------------------------------------------------------

    def _brpop_read(self, **options: Any) -> Any:
        try:
            return super()._brpop_read(**options)
        except _TooLarge:
            REFUSED.count("unknown", Refusal.SIZE)  # it was not read, so nobody knows from which list it came
        except redis.ResponseError as error:
            if not is_wrong_type(error):
                raise
            with self.conn_or_acquire() as client:
                delete_wrong_types(client)
        raise Empty

    def _restore(self, message: Any, leftmost: bool = False) -> None:
        """Put a doorbell back: first in the queue, or last (``leftmost``). A reply is not put back."""
        if message.delivery_info["routing_key"] not in QUEUES:
            return
        key = self._q_for_pri(message.delivery_info["routing_key"], message.properties["priority"])
        with self.conn_or_acquire() as client:
            (client.lpush if leftmost else client.rpush)(key, json.dumps(message._raw))

    # --- remote control and events -------------------------------------------------------------------------

    def _receive(self) -> bool:
        """Deliver published messages, but some at a time: whoever publishes without a pause does not get all our time.

        A lost connection is made again in the next round. kombu would begin everything anew, and the server closes
        this connection whenever somebody publishes faster than we read.
        """
        subscriber, delivered = self.subclient, False
        try:
            for _ in range(AT_ONCE):
                with contextlib.suppress(Empty):
                    delivered = bool(self._receive_one(subscriber)) or delivered
                self._is_behind = subscriber.connection is not None and subscriber.connection.can_read(timeout=0)
                if not self._is_behind:
                    break
        except redis.exceptions.NoPermissionError:
            logger.error(  # noqa: TRY400
                "Redis does not let the user in REDIS_URL read the channels %s, so this process cannot work. Allow "
                "them as deploy/redis-acl.conf does; they have the database's number in their names.",
                b" and ".join(sorted(subscriber.patterns)).decode(),
            )
            raise
        except (_TooLarge, redis.ConnectionError, redis.TimeoutError) as error:
            if isinstance(error, _TooLarge):
                REFUSED.count("unknown", Refusal.SIZE)
            self._is_behind, self._in_listen = False, None
            if subscriber.connection is not None:
                subscriber.connection.disconnect()
        return delivered

    def receive_the_rest(self) -> None:
        if self._is_behind and self._in_listen:  # on a connection that was lost, kombu would wait for a message
            self._receive()

    def _put(self, queue: str, message: dict[str, Any], **options: Any) -> None:
        """A reply that cannot be sent is not sent. kombu would try for ever, and the queue would wait."""
        if not queue.endswith(REPLIES):
            super()._put(queue, message, **options)
            return
        with contextlib.suppress(*refusals()), self.conn_or_acquire() as client, client.pipeline() as pipe:
            pipe.lpush(queue, json.dumps(message)).expire(queue, REPLY_SECONDS).execute()

    # --- names instead of tables in Redis ------------------------------------------------------------------

    def _new_queue(self, queue: str, auto_delete: bool = False, **_: Any) -> None:
        super()._new_queue(queue, auto_delete=auto_delete)  # without an expiry, for which kombu runs scripts in Redis

    def _queue_bind(self, exchange: str, routing_key: str, pattern: str, queue: str) -> None:
        if self.typeof(exchange).type == "fanout":
            self._fanout_queues[queue] = (exchange, routing_key.replace("#", "*"))

    def _lookup(self, exchange: str, routing_key: str, default: str | None = None) -> list[str]:
        return [f"{routing_key}.{REPLIES}" if exchange == REPLIES else routing_key]

    def _size(self, queue: str) -> int:
        return 0  # kombu asks whenever it declares a queue, and makes nothing of the answer

    def _delete(self, queue: str, *_: Any, client: Any = None, **__: Any) -> None:
        self.auto_delete_queues.discard(queue)
        if queue not in self._fanout_queues:
            with self.conn_or_acquire(client) as connection:
                connection.delete(*(self._q_for_pri(queue, step) for step in self.priority_steps))


class _Poller(redis_transport.MultiChannelPoller):  # type: ignore[misc]
    def on_poll_start(self) -> None:
        super().on_poll_start()
        for channel in tuple(self._channels):
            channel.receive_the_rest()


class RedisTransport(redis_transport.Transport):  # type: ignore[misc]
    """kombu's transport with our door, which treats a Redis that refuses like one that is away for a while."""

    Channel = _Channel
    connection_errors = (*redis_transport.Transport.connection_errors, *refusals())

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.cycle = _Poller()


def use_our_transport() -> None:
    """Let the Celery apps of this process use :class:`RedisTransport`. Call it before the first connection.

    It is for processes of our own that consume: workers and Flower. It changes a table of kombu's that is shared with
    the Celery of a host program, so a producer does not call it. A producer needs it neither, because whoever rings
    handles :func:`publish_errors`.
    """
    for scheme in ("redis", "rediss"):
        TRANSPORT_ALIASES[scheme] = f"{__name__}:{RedisTransport.__name__}"
