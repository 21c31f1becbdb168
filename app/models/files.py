"""Reading the small files of a model folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from app.errors import UnknownModel


def read_json(path: Path) -> Any:
    """The file's JSON; UnknownModel where it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UnknownModel(f"{path} cannot be read ({error.strerror}): copy the model folder again") from error
    except ValueError as error:
        raise UnknownModel(f"{path} is not JSON ({error}): copy the model folder again") from error


def unsupported(name: str, what: str) -> UnknownModel:
    """``raise unsupported(name, "module Router")``: what the model uses, and that it has no place here."""
    return UnknownModel(f"model {name!r} uses {what}. Chunkmill does not support that; choose another model")
