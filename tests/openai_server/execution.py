"""Executing a batch's lines: the two result files, written line by line in shuffled order, and what is charged."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from tests.openai_server.answers import Faults, embedding_body
from tests.openai_server.config import Config
from tests.openai_server.errors import ApiError
from tests.openai_server.misbehaviours import LineStrikes
from tests.openai_server.requests import read_request, reported_tokens
from tests.openai_server.validation import Plan
from tests.openai_server.vectors import text_hash

EXPIRED = {
    "code": "batch_expired",
    "message": "This request could not be executed before the completion window expired.",
}


@dataclass
class Outcome:
    output: Path
    errors: Path
    """Both may be empty, which is no file to a client."""
    completed: int = 0
    failed: int = 0
    tokens: int = 0
    reported: int = 0
    """What the batch says of its tokens, which may be something else than is charged."""
    texts: list[str] = field(default_factory=list)
    """Hash of each input that was executed."""


@dataclass
class Execution:
    """One batch's. ``fraction`` of its lines are executed; the others end as expired in the error file, or nowhere."""

    name: str
    input: Path
    plan: Plan
    config: Config
    strikes: LineStrikes
    all_fail: dict[str, Any] | None = None
    """How every request of it fails, if they do."""
    fraction: float = 1.0
    rest_expires: bool = False
    _numbers: Iterator[int] = field(default_factory=lambda: iter(range(1 << 62)))

    def run(self, output: Path, errors: Path) -> Outcome:
        outcome = Outcome(output, errors)
        order = list(range(self.plan.lines))
        random.Random(f"{self.config.seed} {self.name}").shuffle(order)
        executed = math.ceil(self.fraction * len(order))
        with self.input.open("rb") as lines, output.open("wb") as results, errors.open("wb") as failures:
            for position, number in enumerate(order):
                lines.seek(self.plan.offsets[number])
                line = json.loads(lines.readline())
                if position < executed:
                    self.execute(line, number, position, outcome, results, failures)
                elif self.rest_expires:
                    write(failures, self.result(line["custom_id"], None, EXPIRED))
        return outcome

    def execute(
        self,
        line: dict[str, Any],
        number: int,
        position: int,
        outcome: Outcome,
        results: IO[bytes],
        failures: IO[bytes],
    ) -> None:
        custom_id: str = line["custom_id"]
        refused = self.plan.refused.get(number)
        if refused is not None:
            outcome.failed += 1
            write(failures, self.result(custom_id, response(refused.status, refused.body())))
            return
        request = read_request(line["body"], self.config)
        faults = self.strikes.on(position, request.texts)
        failure = self.all_fail or faults.get("line_failures")
        if failure is not None:
            outcome.failed += 1
            kind = "invalid_request_error" if failure["status"] < 429 else "server_error"
            error = ApiError(failure["status"], failure["message"], type=kind, code=failure["code"])
            write(failures, self.result(custom_id, response(error.status, error.body())))
            return
        tokens = self.plan.tokens[number]
        outcome.completed += 1
        outcome.tokens += tokens
        outcome.texts += [text_hash(text) for text in request.texts]
        reported = reported_tokens(request, self.config, tokens)
        outcome.reported += reported
        body = embedding_body(request, reported, faults)
        self.write_result(results, self.result(custom_id, response(200, body)), faults)

    def write_result(self, results: IO[bytes], result: dict[str, Any], faults: Faults) -> None:
        if "unknown_line" in faults:
            write(results, {**result, "custom_id": f"unknown-{result['id'][-6:]}"})
        if "garbage_line" in faults:
            whole = json.dumps(result)
            results.write(whole[: len(whole) // 2].encode() + b"\n")
            if not faults["garbage_line"]["extra"]:
                return
        if (wish := faults.get("long_line")) is not None:
            results.write(b"x" * wish["bytes"] + b"\n")
            if not wish["extra"]:
                return
        if "missing_line" in faults:
            return
        if "null_custom_id" in faults:
            result = {**result, "custom_id": None}
        write(results, result)
        if "duplicate_line" in faults:
            write(results, result)

    def result(
        self, custom_id: str, response: dict[str, Any] | None, error: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        line_id = f"batch_req_{self.name}{next(self._numbers):06x}"
        return {"id": line_id, "custom_id": custom_id, "response": response, "error": error}


def response(status: int, body: dict[str, Any] | str) -> dict[str, Any]:
    return {"status_code": status, "request_id": "req_test", "body": body}


def write(file: IO[bytes], line: dict[str, Any]) -> None:
    file.write(json.dumps(line).encode() + b"\n")
