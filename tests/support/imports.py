"""What commands import. A test of it names libraries, because it must not measure a time."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence

_SCRIPT = """
import sys
from chunkmill.cli.__main__ import cli
failing, commands = (part.split("\\n") for part in sys.argv[1:])
for words in commands:
    try:
        cli(words.split(), prog_name="chunkmill")
    except SystemExit as end:
        assert bool(end.code) == (words in failing), (words, end.code)
    unused = {"numpy", "kombu", "sqlalchemy.orm", "celery", "alembic", "httpx", "httpx2", "pygments", "torch"}
    unused |= {"redis", "opentelemetry"} if words != "status" else set()  # which asks Redis
    assert not unused & sys.modules.keys(), (words, unused & sys.modules.keys())
"""


def assert_light(commands: Sequence[str], *, environment: Mapping[str, str], failing: Sequence[str] = ()) -> None:
    """Run commands in one process of their own, one after the other, and look at what each of them has imported.

    ``status`` must come last, because it may import more than the others. The ``failing`` ones must fail.
    """
    arguments = ["\n".join(failing), "\n".join(commands)]
    done = subprocess.run([sys.executable, "-c", _SCRIPT, *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
