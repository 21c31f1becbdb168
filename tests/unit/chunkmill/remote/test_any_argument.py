"""Whatever argument a remote client is given: a result, or an error of ours."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from chunkmill.errors import ChunkmillError
from chunkmill.remote import RemoteClient
from tests.integration.test_any_argument import KNOWN, ODD

NOBODY = "http://127.0.0.1:1"
METHODS = [
    name
    for name, _ in inspect.getmembers(RemoteClient, inspect.isfunction)
    if not name.startswith("_") and name != "close"
]


def wrong_with(call: Any, given: dict[str, Any]) -> str:
    """What is wrong with the way in which a call ends; empty if nothing is."""
    try:
        answer = call(**given)
        if isinstance(answer, Iterator):
            list(answer)
    except ChunkmillError as error:
        str(error).encode()
    except Exception as error:  # noqa: BLE001 - the point of the test
        return f"{type(error).__name__}: {str(error)[:100]}"
    return ""


@pytest.mark.parametrize("method", METHODS)
def test_any_argument_of_a_verb(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No gateway listens, so a call that its arguments allow raises GatewayUnavailable when its time is over."""
    monkeypatch.chdir(tmp_path)
    wrong = []
    with RemoteClient(NOBODY, "a-key", timeout=0.001) as client:
        call = getattr(client, method)
        for name in inspect.signature(call).parameters:
            for shown, make in ODD.items():
                given = {**KNOWN.get(method, {}), name: make()}
                if "timeout" in inspect.signature(call).parameters and name != "timeout":
                    given["timeout"] = 0.001
                elif name == "timeout" and shown not in ("None", "'a'", "-1", "nan", "True", "[]", "{'a': 1}"):
                    continue  # a number that means to wait
                if said := wrong_with(call, given):
                    wrong.append(f"{method}({name}={shown}): {said}")
    assert not wrong, "\n".join(wrong)


def test_any_argument_of_the_client_itself() -> None:
    wrong = []
    for name in inspect.signature(RemoteClient).parameters:
        for shown, make in ODD.items():
            given = {"base_url": NOBODY, "key": "a-key", name: make()}
            if said := wrong_with(RemoteClient, given):
                wrong.append(f"RemoteClient({name}={shown}): {said}")
    assert not wrong, "\n".join(wrong)
