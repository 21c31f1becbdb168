"""``python -m tests.openai_chaos``: kill workers and pollers of the paid routes at every step, and read the bill."""

from __future__ import annotations

import argparse
import json
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
from tests.openai_chaos.points import POLLER_POINTS, WORKER_POINTS
from tests.openai_chaos.run import Report, run

EXPECTED = {*WORKER_POINTS, *POLLER_POINTS}


def main() -> int:
    """0 when every seed ended complete and paid once, and every point was somebody's end."""
    parser = argparse.ArgumentParser(prog="python -m tests.openai_chaos", description=__doc__, allow_abbrev=False)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--first", type=int, default=1, help="the first seed")
    parser.add_argument("--kills", type=int, default=12, help="deaths of workers that each seed plans")
    parser.add_argument("--contents", type=int, default=900)
    parser.add_argument("--odd", action="store_true", help="the provider misbehaves too, as each seed chooses")
    parser.add_argument("--together", type=int, default=2, help="seeds at a time")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report there")
    options = parser.parse_args()
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
            report = run(
                Settings.from_env(database_url=url, redis_url=redis_url),
                seed,
                kills=options.kills,
                contents=options.contents,
                odd=options.odd,
            )
            console.print(
                f"seed {seed}: {report.kills.total()} kills, {report.provider_batches} ProviderBatches, "
                f"{report.seconds:.0f} s, {report.peak_mb} MB{''.join(f', {name}' for name in report.odd)}; booked "
                f"{report.booked or 'all by answers'}: {'; '.join(report.problems) or 'complete, and no charge unseen'}"
            )
            return report

        with ThreadPoolExecutor(options.together) as pool:
            reports = list(pool.map(one, range(options.seeds)))
    finally:
        stack.down()
        shutil.rmtree(home, ignore_errors=True)
    return _end(reports, options.json)


def _database(url: str, name: str, *, template: str) -> str:
    admin = sa.create_engine(url, isolation_level="AUTOCOMMIT")
    with admin.connect() as conn:
        conn.execute(sa.text(f"CREATE DATABASE {name} TEMPLATE {template}"))
    admin.dispose()
    return sa.make_url(url).set(database=name).render_as_string(hide_password=False)


def _end(reports: list[Report], json_file: Path | None) -> int:
    kills: Counter[str] = sum((report.kills for report in reports), Counter())
    problems = [f"seed {report.seed}: {problem}" for report in reports for problem in report.problems]
    never = sorted(EXPECTED - kills.keys())
    summary = {
        "seeds": len(reports),
        "kills": kills.total(),
        "contents": sum(report.contents for report in reports),
        "provider_batches": sum(report.provider_batches for report in reports),
        "seconds_per_seed": statistics.median(report.seconds for report in reports),
        "peak_mb": max(report.peak_mb for report in reports),
        "odd": dict(Counter(name for report in reports for name in report.odd).most_common()),
        "points": dict(sorted(kills.items())),
        "points_nobody_came_to": never,
        "problems": problems,
    }
    if json_file:
        json_file.write_text(json.dumps({**summary, "runs": [report.as_json() for report in reports]}, indent=2) + "\n")
    if sys.stdout.isatty():
        table = Table(title="Where processes died", show_lines=False)
        table.add_column("point")
        table.add_column("deaths", justify="right")
        for point in sorted(EXPECTED):
            table.add_row(point, str(kills[point]))
        Console().print(table)
        print(f"{kills.total()} kills in {len(reports)} seeds; {len(problems)} promises broken")
        for problem in problems:
            print(f"  {problem}")
    else:
        print(json.dumps(summary, indent=2))
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
