"""``python -m tests.chaos``: break everything that can break, in an order that a seed decides, and count."""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import NoReturn

from chunkmill.settings import Settings
from tests.chaos.faults import KINDS
from tests.chaos.report import Screen
from tests.chaos.run import Options, Run, usable_kinds


def main() -> int:
    """0 when every promise held."""
    options, json_file = _options(sys.argv[1:])
    signal.signal(signal.SIGTERM, _leave)
    for name in {field.upper() for field in Settings.model_fields} & os.environ.keys():
        del os.environ[name]  # this machine's own settings
    os.environ["HF_HUB_OFFLINE"] = "1"
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a worker is to crash here, again and again
    screen = Screen()
    run = Run(options, screen)
    failed = True
    try:
        report = run.go()
        failed = bool(report["problems"]) or report["survived"] != report["faults"]
    finally:
        screen.close()
        run.clean_up(failed=failed)
    screen.end(report)
    if json_file:
        json_file.write_text(json.dumps(report, indent=2) + "\n")
    return int(failed)


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)


def _options(argv: list[str]) -> tuple[Options, Path | None]:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__, allow_abbrev=False)
    parser.add_argument("--seed", type=int, default=1, help="decides the schedule and every choice in it")
    parser.add_argument("--faults", type=int, default=50)
    parser.add_argument("--chunks", type=int, default=5000, help="of the first job; more follow if it ends too soon")
    parser.add_argument("--engine", choices=("fake", "real"), default="fake", help="fake: slow, exact, counts texts")
    parser.add_argument("--supervised", action="store_true", help="workers by `chunkmill worker`; with --engine real")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--pollers", type=int, default=2)
    parser.add_argument("--kinds", type=lambda words: words.split(","), help=f"of: {', '.join(KINDS)}")
    parser.add_argument("--pause", type=float, default=0.05, help="seconds that the fake engine takes for four texts")
    parser.add_argument("--keep", action="store_true", help="keep the folder with all logs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report there")
    given = parser.parse_args(argv)
    try:
        kinds = usable_kinds(given.kinds, supervised=given.supervised)
    except ValueError as error:
        parser.error(str(error))
    if given.supervised and given.engine != "real":
        parser.error("--supervised starts the product's own worker, so it needs --engine real")
    options = Options(
        given.seed, given.faults, given.chunks, given.engine == "real", given.supervised, given.workers,
        given.pollers, kinds, given.pause, given.keep, tuple(argv),
    )  # fmt: skip
    return options, given.json


if __name__ == "__main__":
    sys.exit(main())
