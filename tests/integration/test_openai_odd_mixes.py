"""Mixes of what a provider may do wrong, with a worker that dies, as a seed chooses them: nothing is charged unseen.

``python -m tests.openai_chaos --odd --inside --seeds 100`` plays more of them, and without ``--inside`` with real
processes.
"""

from __future__ import annotations

import pytest

from chunkmill.settings import Settings
from tests.openai_chaos.inside import report_inside
from tests.openai_server import OpenAIServer


@pytest.mark.parametrize("seed", [5, 6])
def test_a_mix_of_misbehaviours_and_deaths_ends_complete_with_every_charge_booked(
    settings: Settings, server: OpenAIServer, seed: int
) -> None:
    report = report_inside(settings, server, seed, kills=6, contents=60)

    assert report.problems == []
    assert report.charged == 60
    assert report.billed >= 60
    # Both seeds have a budget that is too small for one month.
    assert report.months >= 1
