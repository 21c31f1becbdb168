"""What ``chunkmill.remote`` needs: httpx2, NumPy, and what these two bring."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import importlib.abc, sys

ALLOWED = {"httpx2", "httpcore2", "numpy"}
OURS = set(sys.stdlib_module_names) | {"chunkmill"}

class Refuses(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top in BLOCKED:
            raise ModuleNotFoundError(f"{name} is not installed", name=name)

BLOCKED = {"alembic", "celery", "click", "kombu", "openai", "orjson", "pgvector", "platformdirs", "psycopg", "pydantic",
           "pydantic_settings", "redis", "rich", "sqlalchemy", "starlette", "tiktoken", "uvicorn"}
sys.meta_path.insert(0, Refuses())

import asyncio
from chunkmill.remote import AsyncRemoteClient, RemoteClient, RemoteEmbedder
import chunkmill

client = RemoteClient("http://127.0.0.1:1", "cmk_of_nobody", timeout=0.01)
for call in (lambda: client.embed(["a"], timeout=0.01), client.jobs, lambda: list(client.iter_vectors("c"))):
    try:
        call()
    except chunkmill.GatewayUnavailable as error:
        print(type(error).__name__)
print(chunkmill.SearchHit(0.5, "1", "text", {}, False))
print(chunkmill.Hits([chunkmill.SearchHit(0.5, "1", "text", {}, False)]))
loaded = {name.partition(".")[0] for name in sys.modules}
print("loaded:", *sorted(loaded & BLOCKED))
"""


def test_a_fresh_interpreter_needs_neither_a_database_nor_a_broker_nor_settings() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[:3] == ["GatewayUnavailable"] * 3
    assert "text" in done.stdout
    assert lines[-1] == "loaded:"
