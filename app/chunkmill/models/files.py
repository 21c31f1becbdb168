"""Reading the small files of a model folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from chunkmill.errors import UnknownModel


def read_json(path: Path) -> Any:
    """The file's JSON; UnknownModel where it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise unreadable(path, error) from error
    except ValueError as error:
        raise UnknownModel(f"{path} is not JSON ({error}): copy the model folder again") from error


def read_object(path: Path) -> dict[str, Any]:
    """The file's JSON object; UnknownModel where it cannot be read, or is something else."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise broken(path, "holds no JSON object")
    return content


def broken(path: Path, what: str) -> UnknownModel:
    """``raise broken(path, "holds no JSON object")``: a file that is there and is not what it should be."""
    return UnknownModel(f"{path} {what}: copy the model folder again")


def unreadable(path: Path, error: OSError) -> UnknownModel:
    return UnknownModel(f"{path} cannot be read ({error.strerror}): copy the model folder again")


def unsupported(name: str, what: str) -> UnknownModel:
    """``raise unsupported(name, "module Router")``: what the model uses, and that it has no place here."""
    return UnknownModel(f"model {name!r} uses {what}. Chunkmill does not support that; choose another model")
