"""`map`: draw the vectors of a collection in two dimensions."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from pathlib import Path

import click
from rich.style import Style
from rich.text import Text

from chunkmill.cli.arguments import require_writable
from chunkmill.cli.canvas import scatter
from chunkmill.cli.late import Client
from chunkmill.cli.output import Screen, json_option
from chunkmill.cli.progress import Bar
from chunkmill.domain.figures import require_matplotlib
from chunkmill.domain.maps import MAX_SAMPLE, CollectionMap, Legend, MapMethod

KINDS = (".html", ".png", ".svg")
COLUMNS, ROWS = 100, 24
"""The size of the map on a terminal at most, in letters."""
PIPE_COLUMNS = 78
LABEL_COLUMNS = 30


def writable(_: click.Context, __: click.Parameter, paths: tuple[Path, ...]) -> tuple[Path, ...]:
    """Refuse a file that cannot be written before anything is read."""
    for path in paths:
        require_writable(path, KINDS)
        if path.suffix.lower() != ".html":
            require_matplotlib()
    return paths


@click.command()
@click.argument("collection")
@click.option("--by", metavar="FIELD", help="Field of the metadata that gives the colours; a.b is a field inside of a.")
@click.option(
    "--out",
    "files",
    multiple=True,
    metavar="FILE",
    type=click.Path(dir_okay=False, path_type=Path),
    callback=writable,
    help="Write the map into a .html, .png or .svg file; may be given several times.  [default: draw it here]",
)
@click.option(
    "--sample",
    type=click.IntRange(2, MAX_SAMPLE),
    default=5_000,
    show_default=True,
    help="Maximum number of distinct texts to draw. They are chosen at random, and the same ones each time.",
)
@click.option(
    "--method",
    type=click.Choice([method.value for method in MapMethod]),
    default=MapMethod.PCA.value,
    show_default=True,
    help="pca shows the two directions in which vectors differ most. umap keeps neighbours together; it needs the "
    "extra umap and takes longer.",
)
@click.option(
    "--texts", is_flag=True, help="Put the beginnings of the texts into the page. Whoever has the page can read them."
)
@json_option
@click.pass_obj
def map(  # noqa: A001 - it is the command's name
    screen: Screen, collection: str, by: str | None, files: tuple[Path, ...], sample: int, method: str, texts: bool
) -> None:
    """Draw the vectors of COLLECTION in two dimensions.

    Each dot is a text, and texts with similar vectors are near each other. A .html file is one page that loads nothing
    else: it can be moved and zoomed, and shows the id of the chunk under the mouse.
    """
    with Client.from_env() as client, Bar(screen, f"drawing {collection}", waits=True):
        drawn = client.map(collection, by=by, sample=sample, method=method, texts=texts)
    for path in files:
        drawn.save(path)
    if screen.json:
        screen.document(fields(drawn) | {"files": [str(path) for path in files]})
        return
    if not files:
        show(screen, drawn)
    for path in files:
        screen.say(f"The map is in {path}.")
    screen.say((drawn.caption(), "dim"))
    if by is not None and drawn.values and all(value is None for value in drawn.values):
        screen.hint(
            f"No chunk here has the field {by!r} in its metadata. To see the fields: "
            f"chunkmill chunks list {shlex.quote(collection)} --limit 3"
        )


def fields(drawn: CollectionMap) -> dict[str, object]:
    """The map as JSON."""
    document = {
        name: value for name, value in asdict(drawn).items() if name not in ("ids", "values", "points", "texts")
    }
    points = [
        {"chunk_id": chunk_id, "x": x, "y": y}
        | ({} if drawn.by is None else {"value": value})
        | ({} if drawn.texts is None else {"text": drawn.texts[i]})
        for i, (chunk_id, value, (x, y)) in enumerate(
            zip(drawn.ids, drawn.values, drawn.points.tolist(), strict=True)
        )
    ]  # fmt: skip
    return document | {"points": points}


def show(screen: Screen, drawn: CollectionMap) -> None:
    """Draw the map with braille dots, and its legend below."""
    legend = drawn.legend()
    columns = min(COLUMNS, screen.out.width) if screen.out.is_terminal else PIPE_COLUMNS
    screen.say((drawn.title(), "bold"))
    colours = [legend.colours[group] for group in legend.groups]
    for line in scatter([(x, y) for x, y in drawn.points.tolist()], colours, columns, ROWS):
        line.rstrip()
        screen.out.print(line, soft_wrap=True)
    if drawn.by is not None:
        for line in legend_lines(legend, columns):
            screen.out.print(line, soft_wrap=True)


def legend_lines(legend: Legend, columns: int) -> list[Text]:
    """The legend as lines of at most ``columns`` columns."""
    if legend.bounds is not None:
        low, high = legend.bounds
        line = Text(f"{low:g} ")
        for step in range(0, 256, 16):
            line.append("█", Style(color=legend.colours[step]))
        line.append(f" {high:g}")
        if legend.counts[1]:
            line.append(f"   {legend.counts[1]:,} without a value", "dim")
        return [line]
    lines = [Text()]
    for label, colour, number in zip(legend.labels, legend.colours, legend.counts, strict=True):
        entry = Text.assemble(("● ", Style(color=colour)))
        name = Text(label)
        name.truncate(LABEL_COLUMNS, overflow="ellipsis")
        entry.append(name).append(f" {number:,}", "dim")
        if lines[-1] and lines[-1].cell_len + 3 + entry.cell_len > columns:
            lines.append(Text())
        lines[-1].append("   " if lines[-1] else "").append(entry)
    return lines
