"""Which Redis or Valkey the embedded stack takes of those that a machine has."""

from __future__ import annotations

from pathlib import Path

import pytest

from chunkmill.embedded import redis

OLD, FIXED, VALKEY = "Redis server v=7.0.15 sha=0", "Redis server v=7.2.11 sha=0", "Valkey server v=8.1.4 sha=0"


@pytest.mark.parametrize(
    ("said", "taken"),
    [
        ([OLD, VALKEY], 1),
        ([OLD, FIXED, VALKEY], 1),
        ([VALKEY, FIXED], 0),
        ([OLD, OLD], 0),  # with no other, one that lacks the fixes is better than none
        (["Redis server v=6.0.16 sha=0", OLD], 1),
    ],
)
def test_one_with_the_security_fixes_is_preferred(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: list[str], taken: int
) -> None:
    programs = [tmp_path / f"server-{number}" for number in range(len(said))]
    for program, words in zip(programs, said, strict=True):
        program.write_text(f"#!/bin/sh\necho '{words}'\n")
        program.chmod(0o755)
    monkeypatch.setattr(redis, "_candidates", lambda: iter(programs))
    assert redis.find_program() == programs[taken]
