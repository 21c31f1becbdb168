"""What a model's name may say beside which model it is: ``org/name@revision?prompts=e5&task=retrieval``.

Everything here changes the vectors, so it is part of the space, and part of the name wherever the model is named: by a
producer, in ``EMBEDDING_MODEL``, and by the worker that loads the model for a space.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Final
from urllib.parse import parse_qsl

from chunkmill.errors import UnknownModel

PROMPTS: Final[Mapping[str, tuple[str, str]]] = {
    "bge": ("Represent this sentence for searching relevant passages: ", ""),
    "e5": ("query: ", "passage: "),
    "gemma": ("task: search result | query: ", "title: none | text: "),
    "nomic": ("search_query: ", "search_document: "),
}
"""The prompts (of queries, of documents) that the cards of these families of models ask for. ``bge`` is also that of
mxbai-embed-large and of arctic-embed 1 and 1.5."""

_ADAPTER: Final = re.compile(r"[\w-][\w.-]{0,99}")


@dataclass(frozen=True, slots=True)
class NameOptions:
    """What stands behind the question mark of a name; None for what does not."""

    prompts: str | None = None
    """One of PROMPTS."""
    query_prompt: str | None = None
    """What stands before a query."""
    document_prompt: str | None = None
    query_prompt_name: str | None = None
    """One of the prompts of the folder's config_sentence_transformers.json, by its name there."""
    document_prompt_name: str | None = None
    pooling: str | None = None
    """The pooling of a plain transformers folder, such as ``cls`` or, joined, ``cls%2Bmean``."""
    task: str | None = None
    """The folder of an adapter (LoRA) in the model's folder."""
    query_task: str | None = None
    """The adapter for queries, if it is another one."""
    query_model: str | None = None
    """The name of the model for queries, whose vectors are in the same space."""


_KEYS: Final = tuple(field.name for field in fields(NameOptions))
NOTHING: Final = NameOptions()


def split_name(name: str) -> tuple[str, NameOptions]:
    """The name of the model alone, and what is given with it. Raises UnknownModel for what cannot be read.

    Values are encoded as in a URL: a space is ``+`` or ``%20``. The folder of a model may have a question mark in its
    name; then nothing can be given with it.
    """
    base, mark, rest = name.partition("?")
    if not mark or _is_folder(name):
        return name, NOTHING
    try:
        # Nothing at all counts as a field that has no =.
        pairs = parse_qsl(rest or "-", keep_blank_values=True, strict_parsing=True, max_num_fields=len(_KEYS))
    except ValueError:
        raise UnknownModel(
            f"model {name!r}: what stands behind the ? is not of the form key=value&key=value, with at most "
            f"{len(_KEYS)} keys: {', '.join(_KEYS)}"
        ) from None
    keys = [key for key, _ in pairs]
    if wrong := [key for at, key in enumerate(keys) if key not in _KEYS or key in keys[:at]]:
        raise UnknownModel(
            f"model {name!r}: {wrong[0]!r} behind the ? is unknown or is there twice; the keys are {', '.join(_KEYS)}"
        )
    given = NameOptions(**dict(pairs))
    _check(name, given)
    return base, given


def without_given(name: str) -> str:
    """The name of the model alone, for looking it up. A name that cannot be read stays as it is."""
    return name if "?" not in name or _is_folder(name) else name.partition("?")[0]


def _is_folder(name: str) -> bool:
    try:
        return Path(name).expanduser().is_dir()
    except (OSError, RuntimeError):  # a prompt may be longer than a file's name can be; nobody may have a home
        return False


def prompt_of(name: str, side: str, given: NameOptions, own: Mapping[str, str]) -> str | None:
    """The prompt that ``given`` names for ``side``, which is ``query`` or ``document``; None if it names none.

    ``own`` are the prompts of the folder, by their names. Raises UnknownModel for a name that it does not have.
    """
    text, word = (
        (given.query_prompt, given.query_prompt_name)
        if side == "query"
        else (given.document_prompt, given.document_prompt_name)
    )
    if word is not None:
        if not isinstance(prompt := own.get(word), str):
            known = ", ".join(sorted(own)) or "none"
            raise UnknownModel(f"model {name!r}: its folder has no prompt called {word!r}; it has {known}")
        return prompt
    if text is not None:
        return text
    return None if given.prompts is None else PROMPTS[given.prompts][side != "query"]


def _check(name: str, given: NameOptions) -> None:
    if given.prompts is not None and given.prompts not in PROMPTS:
        raise UnknownModel(
            f"model {name!r}: prompts={given.prompts} does not exist; it is one of {', '.join(PROMPTS)}. Give other "
            "prompts with query_prompt= and document_prompt="
        )
    for side in ("query", "document"):
        ways = [key for key in (f"{side}_prompt", f"{side}_prompt_name") if getattr(given, key) is not None]
        if len(ways) > 1:
            raise UnknownModel(f"model {name!r}: {' and '.join(ways)} both state the prompt of a {side}: leave one out")
    for key in ("task", "query_task"):
        if (task := getattr(given, key)) is not None and not _ADAPTER.fullmatch(task):
            raise UnknownModel(f"model {name!r}: {key}={task} is not the name of a folder")
    if given.query_model is not None and given.query_task is not None:
        raise UnknownModel(
            f"model {name!r}: query_task is an adapter of this model and query_model is another model: leave one out"
        )
    if given.query_model is not None and given.query_prompt_name is not None:
        raise UnknownModel(
            f"model {name!r}: query_prompt_name is a prompt of this model's folder, and queries go to the query_model: "
            "state it in the name of that model, with ? as %3F and = as %3D"
        )
    if given.query_model is not None and split_name(given.query_model)[1].query_model is not None:
        raise UnknownModel(f"model {name!r}: the query_model cannot have a query_model of its own")
