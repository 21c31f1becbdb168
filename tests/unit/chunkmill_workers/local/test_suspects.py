"""Who may be in a worker beside a suspect: nobody."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from chunkmill_workers.local.suspects import Room
from tests.support.waiting import PATIENCE, until


class Suspect(threading.Thread):
    """Enters the room, and is alone in it until it is told to go."""

    def __init__(self, room: Room) -> None:
        super().__init__(daemon=True)
        self._room = room
        self.decided, self.go = threading.Event(), threading.Event()
        self.alone: bool | None = None

    def run(self) -> None:
        with self._room.entered(), self._room.alone() as self.alone:
            self.decided.set()
            self.go.wait(PATIENCE)


@pytest.fixture
def suspects() -> Iterator[tuple[Room, Suspect, Suspect]]:
    room = Room()
    made = Suspect(room), Suspect(room)
    yield room, *made
    for suspect in made:
        suspect.go.set()
        if suspect.ident is not None:
            suspect.join(PATIENCE)
            assert not suspect.is_alive()


def test_a_suspect_that_is_second_leaves_and_lets_nobody_in(suspects: tuple[Room, Suspect, Suspect]) -> None:
    """Both had entered before either was known for a suspect; the first waits until the second has left."""
    room, first, second = suspects
    with room.entered():
        first.start()
        until(lambda: room.has_suspect)
        with room.alone() as mine:
            assert not mine
        assert room.has_suspect
        assert not first.decided.is_set()
    assert first.decided.wait(PATIENCE)
    assert first.alone
    second.start()
    assert room.inside == 1
    assert not second.decided.is_set()
    first.go.set()
    assert second.decided.wait(PATIENCE)
    assert second.alone
    assert room.inside == 1


def test_a_suspect_that_fails_lets_the_others_in() -> None:
    room = Room()
    with pytest.raises(ZeroDivisionError), room.entered(), room.alone() as mine:
        assert mine
        raise ZeroDivisionError
    assert (room.inside, room.has_suspect) == (0, False)
    with room.entered():
        assert room.inside == 1
