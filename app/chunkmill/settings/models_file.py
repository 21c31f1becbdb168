"""Reads ``OPENAI_MODELS``: JSON in the variable itself, or the path of a file with JSON or TOML."""

from __future__ import annotations

import json
import stat
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from chunkmill.domain.model_fields import WrongModels
from chunkmill.domain.providers import ProviderModel, read_models

_FORM = 'it must be a JSON object such as {"model": {"dimensions": 1024}}, or the path of a .json or .toml file'


def described_models(text: str) -> dict[str, ProviderModel]:
    """The models that the variable describes, by name. Raises :class:`WrongModels` with everything that is wrong."""
    if text.lstrip().startswith("{"):
        return read_models(_from_json(text, ""))
    try:
        path = Path(text.strip()).expanduser()
        content = _read(path)
    except UnicodeDecodeError:
        raise WrongModels(f"the file {path} is not text in UTF-8") from None
    except (OSError, ValueError, RuntimeError) as error:
        why = getattr(error, "strerror", None) or type(error).__name__
        raise WrongModels(f"{_FORM}. As a path it cannot be read: {why}") from None
    place = f" of the file {path}"
    given = _from_toml(content, place) if path.suffix.lower() == ".toml" else _from_json(content, place)
    try:
        return read_models(given)
    except WrongModels as wrong:
        raise WrongModels(f"{wrong} (in the file {path})", wrong.names) from None


def _read(path: Path) -> str:
    """The text of a file. A pipe is refused, because reading one may never end."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(0, "it is not a file")
    return path.read_text(encoding="utf-8-sig")


def _from_json(text: str, place: str) -> Mapping[str, Any]:
    try:
        parsed = json.loads(text, object_pairs_hook=_once, parse_constant=_no_number)
    except json.JSONDecodeError as error:
        raise WrongModels(f"{error.msg} in line {error.lineno}, column {error.colno}{place}; {_FORM}") from None
    except RecursionError:
        raise WrongModels(f"it is nested too deeply{place}; {_FORM}") from None
    if not isinstance(parsed, dict):
        raise WrongModels(f"there is no object{place}; {_FORM}")
    return parsed


def _from_toml(text: str, place: str) -> Mapping[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise WrongModels(
            f'{error}{place}; it must have a table for each model, such as ["org/model"] with dimensions = 1024'
        ) from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose names are different. JSON's own rule, that the last one counts, would hide a mistake."""
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise WrongModels(f"{twice[:40]!r} is named twice in one object; keep one of the two")
    return made


def _no_number(word: str) -> NoReturn:
    raise WrongModels(f"{word} is not a number; write a finite one")
