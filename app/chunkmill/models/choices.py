"""What a model's config.json may not choose: code, kernels, quantisers, other files, and sizes without a limit.

transformers obeys many keys of config.json. Most state what the model is; some state which program computes it, and
that is the operator's choice. The names are those of transformers 4.56 to 5.23.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from chunkmill.models.files import broken, unsupported

# Which implementation computes attention or experts. One of another name may be code of the Hugging Face Hub.
_IMPLEMENTATION: Final = re.compile(r"_?(attn|experts)_implementation(_internal|_autoset)?")
_PLAIN: Final = frozenset({None, False, True, "eager", "sdpa"})
# A library that quantises, code that replaces layers, and weights in another file than the one that was checked.
_REFUSED: Final = frozenset(
    {
        "quantization_config",
        "compression_config",
        "fusion_config",
        "kernel_config",
        "use_kernels",
        "transformers_weights",
    }
)

_LAYERS: Final = re.compile(r"(.*_)?n?_?layers?")
_EXPERTS: Final = re.compile(r"(.*_)?(num|n)_(\w+_)?experts")
_COUNT: Final = re.compile(r"(.*_)?num_\w+")
_MOST_LAYERS: Final = 1_000
"""The deepest known model has 126."""
_MOST_EXPERTS: Final = 50_000
"""In all layers together; the most known are 23,000. Each may be several objects of Python."""
_MOST_OF_A_COUNT: Final = 100_000
"""Heads, labels, buckets and the like: for each label transformers makes an entry of a table."""


def check_choices(name: str, config: Mapping[str, Any], file: Path) -> None:
    """Raise UnknownModel if ``config``, the content of ``file``, chooses what it may not."""
    layers, experts = 0, 1
    for key, value in _entries(config):
        if key in _REFUSED and value not in (None, False):
            raise unsupported(name, f"{key} in {file}")
        if _IMPLEMENTATION.fullmatch(key) and not (isinstance(value, str | bool | None) and value in _PLAIN):
            raise unsupported(name, f"{key} in {file}, which chooses the program that computes the model")
        if not isinstance(value, int):
            continue
        most = _MOST_LAYERS if _LAYERS.fullmatch(key) else _MOST_OF_A_COUNT if _COUNT.fullmatch(key) else None
        if most is not None and value > most:
            raise broken(file, f"states {key} {_shown(value)}, and at most {most:,} are supported")
        if _LAYERS.fullmatch(key):
            layers = max(layers, value)
        if _EXPERTS.fullmatch(key):
            experts = max(experts, value)
    if layers * experts > _MOST_EXPERTS:
        raise broken(
            file, f"states {layers:,} layers of {experts:,} experts, and at most {_MOST_EXPERTS:,} are supported"
        )


def _shown(number: int) -> str:
    return f"{number:,}" if number < 10**18 else "of more than 18 digits"


def _entries(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The keys and values of an object and of all objects in it."""
    left: list[Any] = [config]
    while left:
        inner = left.pop()
        if isinstance(inner, Mapping):
            yield from inner.items()
            left += inner.values()
        elif isinstance(inner, list):
            left += inner
