"""`status --plot`: how the work went over time, drawn on the terminal or as PNG or SVG."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from rich.text import Text

from chunkmill.cli.canvas import area, round_up
from chunkmill.cli.late import Settings, create_db, history, require_migrated, store_errors
from chunkmill.cli.output import Screen, duration
from chunkmill.domain.states import Route

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from chunkmill.monitor.history import History

COLOURS = {Route.LOCAL: "#0072b2", Route.OPENAI: "#d55e00", Route.OPENAI_SYNC: "#009e73"}
PADDING_COLOUR = "#cc79a7"
LEFT, ROWS = 9, 5
"""The columns of the numbers beside a drawing, and its rows."""
PIPE_COLUMNS, COLUMNS = 78, 130
HALF_DAY, DAY = 12 * 3600.0, 24 * 3600.0


@dataclass(frozen=True, slots=True)
class Panel:
    """One drawing: what it shows, the values, the end of its axis, and how a number of it is written."""

    title: str
    summary: str
    values: Sequence[float | None]
    most: float
    end: str
    colour: str


def plot(screen: Screen, settings: Settings, *, seconds: float | None, picture: Path | None) -> None:
    """Read the last ``seconds`` and draw them; without them, the last day from its first work on."""
    db = create_db(settings.require_database_url(), role="cli")
    try:
        require_migrated(db)
        with store_errors(db), db.begin() as conn:
            told = history.read(conn, history.seconds_of_work(conn, DAY) if seconds is None else seconds)
    finally:
        db.dispose()
    if picture is not None:
        from chunkmill.domain.figures import written

        made = written(figure(told), picture.suffix.lower().removeprefix("."))
        picture.write_bytes(made)
    if screen.json:
        screen.document(fields(told) | {"picture": None if picture is None else str(picture)})
        return
    columns = min(COLUMNS, screen.out.width) if screen.out.is_terminal else PIPE_COLUMNS
    for line in draw(told, columns):
        line.rstrip()
        screen.out.print(line, soft_wrap=True)
    if picture is not None:
        screen.say(f"The picture is in {picture}.")


def fields(told: History) -> dict[str, object]:
    """The history as JSON."""
    return {
        "begin": told.begin.isoformat(),
        "part_s": told.part_seconds,
        "moments": [moment.isoformat() for moment in told.moments],
        "lanes": {
            lane.value: {
                "tokens": list(told.tokens.get(lane, ())) or None,
                "oldest_waiting_s": list(told.waits.get(lane, ())) or None,
            }
            for lane in Route
            if lane in told.tokens or lane in told.waits
        },
        "padding": list(told.padding),
    }


def panels(told: History) -> list[Panel]:
    """What is drawn, from top to bottom."""
    made = []
    for lane in told.tokens:
        rates = told.tokens_per_s(lane)
        most = round_up(max(rates))
        summary = f"{max(rates):,.0f} at most, {sum(told.tokens[lane]):,.0f} tokens in all"
        made.append(Panel(f"tokens/s, {lane}", summary, rates, most, f"{most:,g}", COLOURS[lane]))
    known = [share for share in told.padding if share is not None]
    if known:
        summary = f"{100 * max(known):.1f} % at most of the computed tokens were not text"
        most = round_up(max(known))
        made.append(Panel("padding", summary, told.padding, most, f"{100 * most:g} %", PADDING_COLOUR))
    for lane, waits in told.waits.items():
        most = round_up(max(waits))
        summary = f"{duration(max(waits))} at most until a worker took a ChunkBatch"
        made.append(Panel(f"waiting, {lane}", summary, waits, most, duration(most), COLOURS[lane]))
    return made


def draw(told: History, columns: int) -> list[Text]:
    """The drawing on a terminal, as lines of at most that many columns."""
    drawn = panels(told)
    whole = told.part_seconds * len(told.padding)
    head = Text.assemble((f"The last {span(whole)}", "bold"))
    if not drawn:
        return [head, Text("Nothing was embedded and nothing waited. --last 7d looks further back.")]
    lines = [head]
    for panel in drawn:
        title = Text.assemble((panel.title, "bold"), (f"   {panel.summary}", "dim"))
        title.truncate(columns, overflow="ellipsis")
        lines += [Text(), title]
        for row, line in enumerate(area(panel.values, panel.most, panel.colour, columns - LEFT - 1, ROWS)):
            number = panel.end if row == 0 else "0" if row == ROWS - 1 else ""
            lines.append(Text.assemble((f"{number:>{LEFT - 1}} │", "dim"), line))
    return [*lines, _clock(told, columns)]


def _clock(told: History, columns: int) -> Text:
    """The moments below the drawings, as many as have room."""
    width = columns - LEFT - 1
    whole = told.part_seconds * len(told.padding)
    words = f"{'':{LEFT + 1}}"
    step = 16 if whole > HALF_DAY else 10
    for at in range(0, width - step + 6, step):
        moment = told.begin.astimezone() + timedelta(seconds=whole * at / width)
        words = f"{words:<{LEFT + 1 + at}}{when(moment, whole)}"
    return Text(words[:columns].rstrip(), style="dim")


def when(moment: datetime, whole_seconds: float) -> str:
    """A moment of this machine's time, with its day if the time is longer than half a day."""
    return f"{moment:%m-%d %H:%M}" if whole_seconds > HALF_DAY else f"{moment:%H:%M}"


def span(seconds: float) -> str:
    """`90 minutes`, `24 hours`, `7 days`."""
    for length, name in ((86_400, "day"), (3_600, "hour"), (60, "minute")):
        number = seconds / length
        if number >= 2 or (number == 1 and name != "day"):
            return f"{number:g} {name}{'' if number == 1 else 's'}"
    return f"{seconds:g} seconds"


def figure(told: History) -> Figure:
    """The drawing for PNG and SVG."""
    from matplotlib.dates import AutoDateLocator, ConciseDateFormatter

    from chunkmill.domain.figures import GRID, INK, PALE
    from chunkmill.domain.figures import figure as empty

    drawn = panels(told)
    made, axes = empty(9, 1.2 + 1.7 * max(1, len(drawn)), max(1, len(drawn)))
    moments = [moment.astimezone() for moment in told.moments]
    edges = [*moments, moments[-1] + timedelta(seconds=told.part_seconds)]
    zone = edges[0].tzinfo
    whole = told.part_seconds * len(told.padding)
    made.suptitle(f"Chunkmill, the last {span(whole)}", x=0.01, ha="left", fontsize=13, color=INK)
    for axis, panel in zip(axes, drawn, strict=False):
        values = [float("nan") if value is None else value for value in panel.values]
        axis.stairs(values, edges, fill=True, color=panel.colour, alpha=0.35)  # type: ignore[arg-type]
        axis.stairs(values, edges, color=panel.colour)  # type: ignore[arg-type]
        axis.set_ylim(0, panel.most)
        axis.set_title(panel.title, loc="left", fontsize=11, color=INK)
        axis.set_title(panel.summary, loc="right", fontsize=8, color=PALE)
        axis.grid(axis="y", color=GRID)
        axis.set_axisbelow(True)
        if panel.title == "padding":
            axis.yaxis.set_major_formatter(lambda share, _: f"{100 * share:g} %")
        elif panel.title.startswith("waiting"):
            axis.yaxis.set_major_formatter(lambda seconds, _: duration(round(seconds)))
        else:
            axis.yaxis.set_major_formatter(lambda rate, _: f"{rate:,g}")
    last = axes[-1]
    last.set_xlim(edges[0], edges[-1])  # type: ignore[arg-type]
    locator = AutoDateLocator(tz=zone)  # type: ignore[no-untyped-call]
    last.xaxis.set_major_locator(locator)
    last.xaxis.set_major_formatter(ConciseDateFormatter(locator, tz=zone))  # type: ignore[no-untyped-call]
    if not drawn:
        last.set_yticks([])
        last.set_title("Nothing was embedded and nothing waited.", loc="left", fontsize=10, color=PALE)
    return made
