"""A collection drawn in two dimensions: what ``Client.map`` returns, its colours, and its files."""

from __future__ import annotations

import html
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from importlib.resources import files
from pathlib import Path

from chunkmill.domain.arguments import as_path
from chunkmill.domain.shown import shown
from chunkmill.errors import InvalidInput
from chunkmill.system.numbers import NDArray, np

MAX_SAMPLE = 100_000
"""The most texts of a map. A browser still draws them smoothly, and 1,024 dimensions take 400 MB of memory."""

Value = str | int | float | bool | None

# The scheme "muted" of Paul Tol, https://personal.sron.nl/~pault/, which people with any kind of colour vision can tell
# apart, in its own order.
COLOURS = ("#cc6677", "#332288", "#ddcc77", "#117733", "#88ccee", "#882255", "#44aa99", "#999933", "#aa4499")
OTHERS, NOTHING = "#888888", "#d5d5d5"
# Matplotlib's viridis at five places.
SCALE = ("#440154", "#3b528b", "#21918c", "#5ec962", "#fde725")
FRAME_HEIGHT = 560
"""The height of the map in a notebook, in pixels."""


class MapMethod(StrEnum):
    """How vectors become points."""

    PCA = "pca"
    """The two directions in which the vectors differ most. Distances are true along them, and the rest is not seen."""
    UMAP = "umap"
    """Near neighbours stay near (McInnes, Healy and Melville, 2018). Distances between groups mean little."""


@dataclass(frozen=True, slots=True)
class Legend:
    """What the colours of a map say. ``groups[i]`` is the number of the label of point ``i``.

    If the values are numbers, ``bounds`` has the smallest and the largest, and ``groups[i]`` is from 0 to 255 along the
    scale, or 256 for a chunk without a value; then there is no label and ``colours`` has all 257.
    """

    groups: NDArray[np.int16]
    labels: tuple[str, ...]
    colours: tuple[str, ...]
    counts: tuple[int, ...]
    bounds: tuple[float, float] | None = None


@dataclass(frozen=True, slots=True)
class CollectionMap:
    """A sample of a collection's vectors as points in two dimensions.

    In a notebook it is shown as a page that can be moved and zoomed, with the ids under the mouse.
    """

    collection: str
    model: str
    space: str
    """The fingerprint of the space whose vectors they are."""
    method: MapMethod
    by: str | None
    """The field of the metadata that gives the colours."""
    contents: int
    """How many distinct texts the collection has, with or without a vector."""
    explained: tuple[float, float] | None
    """Which shares of the variance the two axes have, from 0 to 1; None for UMAP, whose axes mean nothing."""
    ids: tuple[str, ...] = field(repr=False)
    """The id of a chunk with this text, by point. If several chunks have it, the smallest."""
    values: tuple[Value, ...] = field(repr=False)
    """The values of the field ``by``, by point; a list or an object is its JSON. None if there is none."""
    points: NDArray[np.float64] = field(repr=False, compare=False)
    """``(n, 2)``."""
    texts: tuple[str, ...] | None = field(default=None, repr=False)
    """The beginnings of the texts; None if they were not asked for."""

    def __len__(self) -> int:
        return len(self.ids)

    def __str__(self) -> str:
        return f"{self.title()}\n{self.caption()}"

    def _repr_html_(self) -> str:
        source = html.escape(self.html(), quote=True)
        return (
            f'<iframe srcdoc="{source}" sandbox="allow-scripts" style="width:100%;height:{FRAME_HEIGHT}px;border:0">'
            "</iframe>"
        )

    def title(self) -> str:
        """One line: which collection it is."""
        return shown(f"Collection {self.collection}" + (f", coloured by {self.by} in its metadata" if self.by else ""))

    def caption(self) -> str:
        """One line: how many texts it shows, and what the axes are."""
        some = f"{len(self):,}" if len(self) == self.contents else f"{len(self):,} of {self.contents:,}"
        parts = [f"{some} {'text' if self.contents == 1 else 'texts'}", self.model]
        if self.explained is None:
            parts.append("UMAP: near points have near vectors; the axes mean nothing")
        else:
            parts.append(f"PCA: the two axes have {100 * sum(self.explained):.0f} % of the variance")
        return shown(" · ".join(parts))

    def legend(self) -> Legend:
        """Which colour each point has. The most frequent values get one each, and the others share one."""
        return legend_of(self.values, has_field=self.by is not None)

    def html(self) -> str:
        """One page that needs nothing else: it loads no file, no font and no script."""
        legend = self.legend()
        data = {
            "title": self.title(),
            "caption": self.caption(),
            "by": self.by,
            "x": _whole(self.points[:, 0]),
            "y": _whole(self.points[:, 1]),
            # Both axes have one scale, because PCA keeps distances.
            "ratio": _ratio(self.points),
            "ids": self.ids,
            "values": self.values if self.by is not None else None,
            "groups": legend.groups.tolist(),
            "labels": legend.labels,
            "counts": legend.counts,
            "colours": legend.colours,
            "bounds": legend.bounds,
            "texts": self.texts,
        }
        # In a script, only "</" and "<!--" would end the data.
        packed = json.dumps(data, ensure_ascii=True, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
        page = files("chunkmill.domain").joinpath("map.html").read_text(encoding="utf-8")
        head, _, rest = page.partition("{{data}}")  # a title may hold this mark too
        return head.replace("{{title}}", html.escape(self.title())) + packed + rest

    def picture(self, kind: str = "png") -> bytes:
        """The map as PNG or SVG, by matplotlib. Raises :class:`InvalidInput` if it is not installed."""
        from chunkmill.domain.figures import map_figure, written

        return written(map_figure(self), kind)

    def save(self, path: str | Path) -> Path:
        """Write the map into a file, whose name ends with .html, .png or .svg. A file that is there is replaced."""
        path = as_path("path", path)
        kind = path.suffix.lower().removeprefix(".")
        if kind not in ("html", "png", "svg"):
            raise InvalidInput(f"path is {shown(str(path))!r}; its name must end with .html, .png or .svg.")
        made = self.html().encode() if kind == "html" else self.picture(kind)
        try:
            path.write_bytes(made)
        except OSError as error:
            raise InvalidInput(f"{shown(str(path))!r} cannot be written: {error.strerror or error}.") from error
        return path


def legend_of(values: Sequence[Value], *, has_field: bool = True) -> Legend:
    """The colours of values. None stands for a missing value."""
    if not has_field:
        return Legend(np.zeros(len(values), np.int16), ("",), (COLOURS[1],), (len(values),))
    known = [value for value in values if value is not None]
    numbers = [value for value in known if isinstance(value, int | float) and not isinstance(value, bool)]
    if known and len(numbers) == len(known) and len(set(numbers)) > len(COLOURS):
        low, high = float(min(numbers)), float(max(numbers))
        # In halves, so that no difference overflows.
        share = [
            256 if value is None else round(255 * ((float(value) / 2 - low / 2) / (high / 2 - low / 2)))
            for value in values
        ]
        counts = (len(known), len(values) - len(known))
        return Legend(np.array(share, np.int16), (), (*map(_scaled, range(256)), NOTHING), counts, (low, high))
    names = ["" if value is None else _named(value) for value in values]
    # Of two that are equally frequent the first in the alphabet comes first, so that a map looks the same again.
    frequent = sorted(Counter(_named(value) for value in known).items(), key=lambda item: (-item[1], item[0]))
    room = len(COLOURS)
    labels = [name for name, _ in frequent[:room]]
    colours = list(COLOURS[: len(labels)])
    number = {name: i for i, name in enumerate(labels)}
    if len(frequent) > room:
        labels.append(f"{len(frequent) - room:,} other values")
        colours.append(OTHERS)
    others = len(labels) - 1
    if len(known) < len(values):
        labels.append("no value")
        colours.append(NOTHING)
    nothing = len(labels) - 1
    groups = np.array(
        [nothing if value is None else number.get(name, others) for value, name in zip(values, names, strict=True)],
        np.int16,
    )
    counted = np.bincount(groups, minlength=len(labels)) if len(groups) else np.zeros(len(labels), int)
    return Legend(groups, tuple(map(shown, labels)), tuple(colours), tuple(counted.tolist()))


def value_of(kind: str | None, text: str | None) -> Value:
    """The value of a field from the kind of its JSON and its text. A number that was cut off is a text."""
    if kind is None or kind == "null" or text is None:
        return None
    if kind == "boolean":
        return text == "true"
    if kind == "number":
        try:
            number = int(text) if text.lstrip("-").isdigit() else float(text)
        except ValueError:
            return text
        return text if isinstance(number, int) and abs(number) > MOST else number
    return text


MOST = 2**53
"""A larger whole number is not exact in a browser, so it is a text."""


def _named(value: Value) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return f"{value:g}" if isinstance(value, float) else str(value) or "an empty text"


def _scaled(step: int) -> str:
    """The colour at ``step`` of 255 along the scale, as #rrggbb."""
    at = step / 255 * (len(SCALE) - 1)
    first = min(int(at), len(SCALE) - 2)
    pairs = zip(bytes.fromhex(SCALE[first][1:]), bytes.fromhex(SCALE[first + 1][1:]), strict=True)
    return "#" + "".join(f"{round(a + (b - a) * (at - first)):02x}" for a, b in pairs)


def _whole(along: NDArray[np.float64]) -> list[int]:
    """The places along one axis as whole numbers from 0 to 65535, which is finer than any screen."""
    if not len(along):
        return []
    low, high = along.min(), along.max()
    share = (along / 2 - low / 2) / (high / 2 - low / 2) if high > low else np.full(len(along), 0.5)
    return [int(number) for number in np.rint(65535 * share)]


def _ratio(points: NDArray[np.float64]) -> float:
    """The width of the map divided by its height, within bounds that fit on a screen."""
    if not len(points):
        return 1.0
    width, height = np.ptp(points / 2, axis=0)
    return float(np.clip(width / height, 0.2, 5.0)) if height > 0 else 5.0
