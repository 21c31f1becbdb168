"""Mixes of what a provider may do wrong, with a worker that dies, as a seed chooses them: nothing is charged unseen.

``python -m tests.openai_chaos --odd`` does the same with real processes.
"""

from __future__ import annotations

import os

import pytest

from chunkmill.settings import Settings
from chunkmill_workers.provider import follow
from tests.openai_chaos.inside import run_inside
from tests.openai_server import OpenAIServer
from tests.support.corridor_scene import scene

FIRST, LAST = map(int, os.environ.get("ODD_SEEDS", "5-6").split("-"))
"""More seeds: ``ODD_SEEDS=1-100``."""


@pytest.mark.parametrize("seed", range(FIRST, LAST + 1))
def test_a_mix_of_misbehaviours_and_deaths_ends_complete_with_every_charge_booked(
    settings: Settings,
    server: OpenAIServer,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    seed: int,
) -> None:
    monkeypatch.setattr(follow, "LOOKS_FOR_RESULTS", 8)
    with scene(settings, server, request, openai_batch_max_inputs=20) as stage:
        print(seed, run_inside(stage, seed))
