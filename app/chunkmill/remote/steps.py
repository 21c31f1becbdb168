"""What a verb asks of the one who runs it: steps, which know neither threads nor an event loop.

Each verb is written once, as a generator of steps. ``threads.ThreadRunner`` runs them for ``RemoteClient`` and
``tasks.TaskRunner`` for ``AsyncRemoteClient``. What a step results in is sent back into the generator, and what goes
wrong is thrown into it.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, TypeVar

if TYPE_CHECKING:
    from chunkmill.remote.lines import Lines
    from chunkmill.remote.servers import Server

Result = TypeVar("Result")
Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class Request:
    """``seconds`` bounds the whole request, from the connection to the last byte of the answer.

    An answer of more than ``longest`` bytes is not read. If ``body`` is ``Lines``, or if the answer is read in pieces,
    ``seconds`` bounds the wait for each piece instead, because nobody knows how many come.
    """

    method: str
    path: str
    seconds: float
    query: Mapping[str, str] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes | Lines | None = None
    longest: int = 16 * 1024 * 1024
    silence: float | None = None
    """How many seconds may pass in which nothing comes, if that is less."""


@dataclass(frozen=True, slots=True)
class Answer:
    """``headers`` have their names in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def is_ok(self) -> bool:
        return 200 <= self.status < 300


class Unanswered(Exception):
    """There was no complete answer. ``why`` is a clause that names no key and no text.

    ``was_sent`` is false if the request surely never reached the server. ``timed_out`` says that its time was over.
    ``for_good`` says that the same request would end in the same way.
    """

    def __init__(self, why: str, *, was_sent: bool = True, timed_out: bool = False, for_good: bool = False) -> None:
        super().__init__(why)
        self.why = why
        self.was_sent = was_sent
        self.timed_out = timed_out
        self.for_good = for_good


@dataclass(frozen=True, slots=True)
class SendStep:
    """Results in an :class:`Answer`. Raises :class:`Unanswered`."""

    server: Server
    request: Request


@dataclass(frozen=True, slots=True)
class OpenStep:
    """Results in an :class:`OpenAnswer`, whose body is read with :class:`ReadStep`. An answer that is an error is read
    at once and results in an :class:`Answer`. Raises :class:`Unanswered`."""

    server: Server
    request: Request


@dataclass(frozen=True, slots=True)
class OpenAnswer:
    """An answer whose body is still to be read. ``stream`` belongs to the runner, which closes it in the end."""

    status: int
    headers: Mapping[str, str]
    stream: Any


@dataclass(frozen=True, slots=True)
class ReadStep:
    """Results in the next bytes of the body, or None at its end. Raises :class:`Unanswered`."""

    opened: OpenAnswer
    seconds: float


@dataclass(frozen=True, slots=True)
class PauseStep:
    """Go on after so many seconds."""

    seconds: float


@dataclass(frozen=True, slots=True)
class TellStep:
    """Call a function of the caller's, which may be a coroutine function, and go on."""

    function: Callable[[Any], object]
    argument: object


@dataclass(frozen=True, slots=True)
class WorkStep:
    """Results in what the function returns. ``is_long`` says that it would hold an event loop for milliseconds."""

    function: Callable[[], Any]
    is_long: bool


@dataclass(frozen=True, slots=True)
class DrainStep:
    """Read the rest of an iterable that is being sent. Raises what the iterable raises."""

    lines: Lines


@dataclass(frozen=True, slots=True)
class GiveStep:
    """Hand an item to the caller, who is iterating, and go on when the next one is wanted."""

    item: Any


@dataclass(frozen=True, slots=True)
class ParallelStep:
    """Results in the results of all, in their order. At most ``at_once`` run side by side.

    After the first error no other begins, those that run are stopped, and the error is raised.
    """

    makers: Iterable[Callable[[], Steps[Any]]]
    at_once: int


Step = SendStep | OpenStep | ReadStep | PauseStep | TellStep | WorkStep | DrainStep | GiveStep | ParallelStep
Steps = Generator[Step, Any, Result]


@dataclass(frozen=True, slots=True)
class Items(Generic[Item]):
    """Steps that give items of this type, and have no result."""

    steps: Steps[None]


def given_by(steps: Steps[None]) -> Steps[list[Any]]:
    """All items that these steps give, for a verb that hands out none before it has all of them."""
    items: list[Any] = []
    value: Any = None
    error: BaseException | None = None
    try:
        while True:
            try:
                step = steps.send(value) if error is None else steps.throw(error)
            except StopIteration:
                return items
            value = error = None
            if isinstance(step, GiveStep):
                items.append(step.item)
                continue
            try:
                value = yield step
            except GeneratorExit:
                raise
            except BaseException as raised:  # noqa: BLE001 - it is raised again in there
                error = raised
    finally:
        steps.close()
