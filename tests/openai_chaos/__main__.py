"""``python -m tests.openai_chaos``: kill workers and pollers of the paid routes at every step, and read the bill."""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import statistics
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import redis
import sqlalchemy as sa
from rich.console import Console
from rich.table import Table

from chunkmill.db.connect import migrate
from chunkmill.embedded import Stack, temporary_folder
from chunkmill.settings import Settings
from tests.openai_chaos.inside import report_inside
from tests.openai_chaos.points import POLLER_POINTS, WORKER_POINTS
from tests.openai_chaos.run import Report, run
from tests.openai_server import OpenAIServer

EXPECTED = {*WORKER_POINTS, *POLLER_POINTS}


def main() -> int:
    """0 when every seed ended complete, with each charge on both books or booked as lost or maybe charged."""
    parser = argparse.ArgumentParser(prog="python -m tests.openai_chaos", description=__doc__, allow_abbrev=False)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--first", type=int, default=1, help="the first seed")
    parser.add_argument("--kills", type=int, help="deaths that each seed plans (12; 6 with --inside)")
    parser.add_argument("--contents", type=int, help="contents of each seed (900; 60 with --inside)")
    parser.add_argument("--odd", action="store_true", help="the provider misbehaves too, as each seed chooses")
    parser.add_argument("--inside", action="store_true", help="with --odd: all in this process, in seconds for a seed")
    parser.add_argument("--together", type=int, default=2, help="seeds at a time (with --inside one)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report there")
    options = parser.parse_args()
    if options.inside:
        if not options.odd:
            parser.error("--inside is a form of --odd: give both.")
        logging.disable()  # what a worker in this process warns of would stand between the lines of the seeds
    kills = options.kills if options.kills is not None else 6 if options.inside else 12
    contents = options.contents or (60 if options.inside else 900)
    for name in {field.upper() for field in Settings.model_fields} & os.environ.keys():
        del os.environ[name]
    home = temporary_folder("cm-")
    stack = Stack(home, fsync=False)
    console = Console(stderr=True)
    reports: list[Report] = []
    try:
        status = stack.up()
        migrate(_database(status.database_url, "empty", template="template1"))

        def one(number: int) -> Report:
            seed = options.first + number
            url = _database(status.database_url, f"seed_{seed}", template="empty")
            redis_url = status.redis_url.replace("db=0", f"db={number % 16}")
            with redis.Redis.from_url(redis_url) as store:
                store.flushdb()
            settings = Settings.from_env(database_url=url, redis_url=redis_url)
            if options.inside:
                with OpenAIServer(seed=seed) as server:
                    report = report_inside(settings, server, seed, kills=kills, contents=contents)
            else:
                report = run(settings, seed, kills=kills, contents=contents, odd=options.odd)
            console.print(
                f"seed {seed}: {report.kills.total()} kills, {report.provider_batches} ProviderBatches, "
                f"{report.seconds:.0f} s, {report.peak_mb} MB{''.join(f', {name}' for name in report.odd)}; "
                f"{report.billed} contents billed, {report.charged} charged, {report.unconfirmed or 'none'} without an "
                f"answer; {report.months} new months for the budget: "
                f"{'; '.join(report.problems) or 'complete, and no charge unseen'}",
                soft_wrap=True,
            )
            return report

        with ThreadPoolExecutor(1 if options.inside else options.together) as pool:
            reports = list(pool.map(one, range(options.seeds)))
    finally:
        stack.down()
        shutil.rmtree(home, ignore_errors=True)
    return _end(reports, set() if options.inside else EXPECTED, options.json)


def _database(url: str, name: str, *, template: str) -> str:
    admin = sa.create_engine(url, isolation_level="AUTOCOMMIT")
    with admin.connect() as conn:
        conn.execute(sa.text(f"CREATE DATABASE {name} TEMPLATE {template}"))
    admin.dispose()
    return sa.make_url(url).set(database=name).render_as_string(hide_password=False)


def _end(reports: list[Report], points: set[str], json_file: Path | None) -> int:
    kills: Counter[str] = sum((report.kills for report in reports), Counter())
    problems = [f"seed {report.seed}: {problem}" for report in reports for problem in report.problems]
    summary = {
        "seeds": len(reports),
        "complete": sum(not report.problems for report in reports),
        "kills": kills.total(),
        "contents": sum(report.contents for report in reports),
        "billed": sum(report.billed for report in reports),
        "charged": sum(report.charged for report in reports),
        "unconfirmed": dict(sum((Counter(report.unconfirmed) for report in reports), Counter())),
        "provider_batches": sum(report.provider_batches for report in reports),
        "seconds_per_seed": statistics.median(report.seconds for report in reports),
        "peak_mb": max(report.peak_mb for report in reports),
        "odd": dict(Counter(name for report in reports for name in report.odd).most_common()),
        "points": dict(sorted(kills.items())),
        "points_nobody_came_to": sorted(points - kills.keys()),
        "problems": problems,
        "runs": [report.as_json() for report in reports],
    }
    if json_file:
        json_file.write_text(json.dumps(summary, indent=2) + "\n")
    if sys.stdout.isatty():
        _print_tables(reports, kills, points, problems)
    else:
        print(json.dumps(summary, indent=2))
    return int(bool(problems))


def _print_tables(reports: list[Report], kills: Counter[str], points: set[str], problems: list[str]) -> None:
    seeds = Table(title="Contents on both books")
    for heading in ("seed", "complete", "seconds", "kills", "billed", "charged", "lost", "maybe charged", "MB"):
        seeds.add_column(heading, justify="left" if heading == "complete" else "right")
    for report in reports:
        unconfirmed = [report.unconfirmed.get(kind, 0) for kind in ("lost", "maybe_charged")]
        numbers = (report.kills.total(), report.billed, report.charged, *unconfirmed, report.peak_mb)
        is_complete = "no" if report.problems else "yes"
        seeds.add_row(str(report.seed), is_complete, f"{report.seconds:.0f}", *map(str, numbers))
    deaths = Table(title="Where processes died")
    deaths.add_column("point")
    deaths.add_column("deaths", justify="right")
    for point in sorted(points | kills.keys()):
        deaths.add_row(point, str(kills[point]))
    console = Console()
    console.print(seeds)
    console.print(deaths)
    print(f"{kills.total()} kills in {len(reports)} seeds; {len(problems)} promises broken")
    for problem in problems:
        print(f"  {problem}")


if __name__ == "__main__":
    sys.exit(main())
