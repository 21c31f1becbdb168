"""Reads the small files of a model folder, and makes the errors for files that cannot be used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from chunkmill.errors import UnknownModel
from chunkmill.system.files import read_at_most

MOST_JSON_BYTES: Final = 16 * 1024 * 1024
"""The most bytes of a configuration. The largest known list of shards has two million, and a lone file of JSON takes
up to 25 times its size in memory."""
MOST_FILE_BYTES: Final = 64 * 1024 * 1024
"""The most bytes of any other file that is read whole. The largest known vocabularies have 35 million."""


def read_json(path: Path) -> Any:
    """The file's JSON. Raises UnknownModel if it cannot be read."""
    try:
        return parse_json(read_at_most(path, MOST_JSON_BYTES))
    except OSError as error:
        raise unreadable(path, error) from error
    except ValueError as error:
        raise UnknownModel(f"{path} is not JSON ({error}): copy the model folder again") from error


def parse_json(content: bytes) -> Any:
    """The JSON of ``content``. Raises ValueError, also for JSON that is nested too deeply to be read."""
    try:
        return json.loads(content.decode())
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_object(path: Path) -> dict[str, Any]:
    """The file's JSON object. Raises UnknownModel if it cannot be read, or is something else."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise broken(path, "does not hold a JSON object")
    return content


def broken(path: Path, what: str) -> UnknownModel:
    """The error for a file that has the wrong content: ``raise broken(path, "does not hold a JSON object")``."""
    return UnknownModel(f"{path} {what}: copy the model folder again")


def unreadable(path: Path, error: OSError) -> UnknownModel:
    """The error for a file that cannot be read."""
    return UnknownModel(f"{path} cannot be read ({error.strerror}): copy the model folder again")


def unsupported(name: str, what: str) -> UnknownModel:
    """The error for a model that Chunkmill does not support: ``raise unsupported(name, "module Router")``."""
    return UnknownModel(f"model {name!r} uses {what}. Chunkmill does not support that; choose another model")
