"""An input file, read line by line: what its batch would execute, or what is wrong with it."""

from __future__ import annotations

import json
from array import array
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from tests.openai_server.config import Config
from tests.openai_server.errors import ApiError
from tests.openai_server.requests import count_tokens, read_request
from tests.openai_server.tokens import counter

LINE_KEYS = {"custom_id", "method", "url", "body"}
MOST_ERRORS = 20


@dataclass
class FileError(Exception):
    """One entry of a failed batch's ``errors.data``."""

    code: str
    message: str
    line: int | None = None
    param: str | None = None

    def as_json(self) -> dict[str, Any]:
        return {"code": self.code, "line": self.line, "message": self.message, "param": self.param}


@dataclass
class Plan:
    """What a valid file asks for. A line is known by its number from 0."""

    model: str = ""
    offsets: array[int] = field(default_factory=lambda: array("q"))
    """Where each line begins in the file, so that they can be executed in any order."""
    tokens: array[int] = field(default_factory=lambda: array("q"))
    inputs: int = 0
    refused: dict[int, ApiError] = field(default_factory=dict)
    """Lines whose request is bad by itself: they cost nothing and end as a 400 in the error file."""

    @property
    def lines(self) -> int:
        return len(self.offsets)

    @property
    def total_tokens(self) -> int:
        return sum(self.tokens)


def read_plan(path: Path, endpoint: str, config: Config) -> Plan | list[FileError]:
    return _Reader(endpoint, config).read(path)


class _Reader:
    def __init__(self, endpoint: str, config: Config) -> None:
        self.endpoint = endpoint
        self.config = config
        self.count = counter(config.fast_tokens)
        self.plan = Plan()
        self.custom_ids: set[str] = set()

    def read(self, path: Path) -> Plan | list[FileError]:
        errors: list[FileError] = []
        offset = 0
        with path.open("rb") as lines:
            for number, line in enumerate(lines):
                try:
                    self.line(number, offset, line)
                except FileError as error:
                    errors.append(error)
                    if len(errors) == MOST_ERRORS or error.code == "too_many_tasks":
                        break
                offset += len(line)
        if offset == 0 and not errors:
            errors = [FileError("empty_file", "The input file is empty.")]
        return errors or self.plan

    def line(self, number: int, offset: int, line: bytes) -> None:
        config, plan, at = self.config, self.plan, number + 1
        if number >= config.max_lines:
            raise FileError("too_many_tasks", f"The batch has too many tasks. The limit is {config.max_lines}.")
        read = parse_line(line, at)
        if unknown := sorted(set(read) - LINE_KEYS):
            raise FileError("invalid_request", f"Unknown key '{unknown[0]}'.", at, unknown[0])
        if missing := sorted(LINE_KEYS - set(read)):
            raise FileError("invalid_request", f"Missing required parameter: '{missing[0]}'.", at, missing[0])
        self.custom_id(read["custom_id"], at)
        if read["method"] != "POST":
            raise FileError("invalid_request", "The method must be 'POST'.", at, "method")
        if read["url"] != self.endpoint:
            message = f"The URL provided for this request does not match the batch endpoint '{self.endpoint}'."
            raise FileError("url_mismatch", message, at, "url")
        body = read["body"]
        if not isinstance(body, dict) or not isinstance(body.get("model"), str):
            raise FileError("invalid_request", "The body must be an object with a 'model'.", at, "body")
        plan.model = plan.model or body["model"]
        if body["model"] != plan.model:
            message = f"The model '{body['model']}' differs from the file's first, '{plan.model}'."
            raise FileError("model_mismatch", message, at, "body.model")
        self.request(body, number, offset)

    def custom_id(self, custom_id: Any, at: int) -> None:
        if not isinstance(custom_id, str) or not custom_id.isascii() or not 1 <= len(custom_id) <= 64:
            raise FileError("invalid_request", "custom_id must be 1 to 64 ASCII characters.", at, "custom_id")
        if custom_id in self.custom_ids:
            message = f"The custom_id '{custom_id}' for this request is a duplicate of another request."
            raise FileError("duplicate_custom_id", message, at, "custom_id")
        self.custom_ids.add(custom_id)

    def request(self, body: dict[str, Any], number: int, offset: int) -> None:
        plan, config = self.plan, self.config
        tokens = 0
        try:
            request = read_request(body, config)
            tokens = count_tokens(request, config, self.count)
            plan.inputs += len(request.texts)
        except ApiError as error:
            if error.code == "model_not_found":
                raise FileError(error.code, error.message, number + 1, "body.model") from None
            if config.request_errors == "batch":
                raise FileError("invalid_request", error.message, number + 1, error.param) from None
            plan.refused[number] = error
        if plan.inputs > config.max_inputs_per_batch:
            raise FileError(
                "too_many_tasks",
                f"The batch has too many embedding inputs. The limit is {config.max_inputs_per_batch}.",
            )
        plan.offsets.append(offset)
        plan.tokens.append(tokens)


def parse_line(line: bytes, at: int) -> dict[str, Any]:
    """FileError: not one JSON object. A byte order mark is no JSON either."""
    try:
        read = json.loads(line.decode(), parse_constant=_refuse)
    except ValueError:
        read = None
    if not isinstance(read, dict):
        raise FileError("invalid_json_line", "This line is not parseable as valid JSON.", at)
    return read


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")
