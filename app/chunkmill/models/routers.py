"""Reads Router modules, which send queries and documents through different modules.

The rules are those of ``Router`` in sentence-transformers 6.2, for texts: ``encode_query`` has the task ``query`` and
``encode_document`` the task ``document``. ``Asym`` is its earlier name.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal

from chunkmill.models.files import broken, read_object, unsupported
from chunkmill.models.modules import Entry, inside, kind_of

Side = Literal["document", "query"]
_ROUTERS: Final = frozenset({"Asym", "Router"})
_FILES: Final = ("router_config.json", "config.json")
_LONGEST_KEY: Final = 1_000
"""The most characters of a key that are read. ``('document', 'text')`` has 20."""


def modules_of(name: str, listed: Sequence[Entry], side: Side) -> list[Entry]:
    """``listed`` with those modules in place of each Router that it sends the texts of ``side`` through.

    Raises UnknownModel.
    """
    modules: list[Entry] = []
    for kind, folder in listed:
        modules += _routed(name, folder, side) if kind in _ROUTERS else [(kind, folder)]
    return modules


def router_files(listed: Sequence[Entry]) -> list[Path]:
    """The files that state the routes."""
    return [_file(folder) for kind, folder in listed if kind in _ROUTERS]


def _file(folder: Path) -> Path:
    files = [folder / file for file in _FILES]
    return next((file for file in files if file.is_file()), files[0])


def _routed(name: str, folder: Path, side: Side) -> list[Entry]:
    file = _file(folder)
    config = read_object(file)
    types, structure, parameters = (config.get(key) for key in ("types", "structure", "parameters"))
    if not isinstance(types, dict) or not isinstance(structure, dict) or not structure:
        raise broken(file, "does not map routes to modules")
    route = _route(name, file, structure, parameters if isinstance(parameters, dict) else {}, side)
    modules = []
    for identity in structure[route] if isinstance(structure[route], list) else []:
        if identity not in types:
            raise broken(file, "names a module of which it does not state the type")
        kind = kind_of(name, types[identity])
        if kind in _ROUTERS:
            raise unsupported(name, "a Router inside a Router")
        modules.append((kind, inside(name, folder, identity)))
    return modules


def _route(name: str, file: Path, structure: Mapping[str, Any], parameters: Mapping[str, Any], side: Side) -> str:
    """The route of a text of ``side``, as ``Router._resolve_route`` finds it."""
    mappings = {}
    for key, route in (parameters.get("route_mappings") or {}).items():
        try:
            mappings[ast.literal_eval(key[:_LONGEST_KEY])] = route
        except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
            continue  # so does sentence-transformers
    for key in ((side, "text"), (side, None), (None, "text"), (None, None)):
        if key in mappings:
            if mappings[key] not in structure:
                raise broken(file, f"maps {key} to a route that does not exist")
            return str(mappings[key])
    for word in (side, "text"):
        if word in structure:
            return word
    # sentence-transformers' encode_query and encode_document raise here; its default_route is for encode alone.
    raise unsupported(name, f"a Router without a route for {side} (it has {', '.join(map(str, structure))[:200]})")
