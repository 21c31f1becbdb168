"""``python -m tests.openai_server --port 0`` prints ``{"url", "port", "key", "pid"}`` as its first line and serves."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import threading
from pathlib import Path

from tests.openai_server.config import DEFAULT_KEY, Config
from tests.openai_server.server import Server
from tests.openai_server.store import Store


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.openai_server")
    parser.add_argument("--port", type=int, default=0, help="0: a free one")
    parser.add_argument("--key", default=DEFAULT_KEY, help="the API key it accepts")
    parser.add_argument("--settings", type=json.loads, default={}, help="settings of config.py, as JSON")
    parser.add_argument("--no-batches", action="store_true", help="a server without the Batch API")
    parser.add_argument("--fast-tokens", action="store_true", help="count len(utf8) // 4 + 1 tokens")
    parser.add_argument("--until-stdin-closes", action="store_true", help="end with the process that started it")
    arguments = parser.parse_args()
    ends = {signal.SIGINT, signal.SIGTERM}
    if not arguments.until_stdin_closes:
        signal.pthread_sigmask(signal.SIG_BLOCK, ends)  # for the threads to come too: only sigwait takes them
    config = Config(batches=not arguments.no_batches, fast_tokens=arguments.fast_tokens)
    config.update(arguments.settings)
    with tempfile.TemporaryDirectory(prefix="openai-server-", ignore_cleanup_errors=True) as folder:
        server = Server(arguments.port, Store(config, arguments.key, Path(folder)))
        port = server.server_address[1]
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        started = {"url": f"http://127.0.0.1:{port}/v1", "port": port, "key": arguments.key, "pid": os.getpid()}
        print(json.dumps(started), flush=True)
        if arguments.until_stdin_closes:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the test's, which then closes our stdin
            sys.stdin.read()
        else:
            signal.sigwait(ends)
        server.shutdown()
        server.server_close()


if __name__ == "__main__":
    main()
