"""Who may be in a worker beside a suspect: nobody."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from chunkmill_workers.local.suspects import Workroom
from tests.support.waiting import PATIENCE, until


class Suspect(threading.Thread):
    """Enters the workroom, and is alone in it until it is told to go."""

    def __init__(self, workroom: Workroom) -> None:
        super().__init__(daemon=True)
        self._workroom = workroom
        self.decided, self.go = threading.Event(), threading.Event()
        self.alone: bool | None = None

    def run(self) -> None:
        with self._workroom.entered(), self._workroom.alone() as self.alone:
            self.decided.set()
            self.go.wait(PATIENCE)


@pytest.fixture
def suspects() -> Iterator[tuple[Workroom, Suspect, Suspect]]:
    workroom = Workroom()
    made = Suspect(workroom), Suspect(workroom)
    yield workroom, *made
    for suspect in made:
        suspect.go.set()
        if suspect.ident is not None:
            suspect.join(PATIENCE)
            assert not suspect.is_alive()


def test_a_suspect_that_is_second_leaves_and_lets_nobody_in(suspects: tuple[Workroom, Suspect, Suspect]) -> None:
    """Both had entered before either was known for a suspect; the first waits until the second has left."""
    workroom, first, second = suspects
    with workroom.entered():
        first.start()
        until(lambda: workroom.has_suspect)
        with workroom.alone() as mine:
            assert not mine
        assert workroom.has_suspect
        assert not first.decided.is_set()
    assert first.decided.wait(PATIENCE)
    assert first.alone
    second.start()
    assert workroom.inside == 1
    assert not second.decided.is_set()
    first.go.set()
    assert second.decided.wait(PATIENCE)
    assert second.alone
    assert workroom.inside == 1


def test_a_suspect_that_fails_lets_the_others_in() -> None:
    workroom = Workroom()
    with pytest.raises(ZeroDivisionError), workroom.entered(), workroom.alone() as mine:
        assert mine
        raise ZeroDivisionError
    assert (workroom.inside, workroom.has_suspect) == (0, False)
    with workroom.entered():
        assert workroom.inside == 1
