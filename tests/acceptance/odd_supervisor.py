"""`chunkmill worker` with the workers of tests.acceptance.odd_worker."""

from __future__ import annotations

import sys

from chunkmill_workers.supervisor import supervisor

if __name__ == "__main__":
    supervisor.WORKER = (sys.executable, "-m", "tests.acceptance.odd_worker", "-Q", "gpu")  # type: ignore[assignment]
    raise SystemExit(supervisor.main(sys.argv[1:]))
