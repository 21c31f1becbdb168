"""What ``chunkmill.remote`` needs: httpx2, NumPy, and what these two bring."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys

import chunkmill
from chunkmill.remote import AsyncRemoteClient, RemoteClient

SCRIPT = """
import importlib.abc, sys

ALLOWED = {"httpx2", "httpcore2", "numpy"}
OURS = set(sys.stdlib_module_names) | {"chunkmill"}

class Refuses(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top in BLOCKED:
            raise ModuleNotFoundError(f"{name} is not installed", name=name)

BLOCKED = {"alembic", "celery", "click", "kombu", "openai", "opentelemetry", "orjson", "pgvector", "platformdirs",
           "psycopg", "pydantic", "pydantic_settings", "redis", "rich", "sqlalchemy", "starlette",
           "tiktoken", "uvicorn"}
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


def test_both_clients_have_the_same_methods_with_the_same_arguments_and_name_public_errors() -> None:
    methods = {name: getattr(RemoteClient, name) for name in vars(RemoteClient) if not name.startswith("_")}
    assert methods.keys() == {name for name in vars(AsyncRemoteClient) if not name.startswith("_")}
    for name, method in methods.items():
        assert inspect.getdoc(method), name
        named = set(re.findall(r":class:`(\w+)`", inspect.getdoc(method) or ""))
        assert named <= {*chunkmill.__all__, "RemoteClient"}, name
        twin = getattr(AsyncRemoteClient, name)
        assert [*inspect.signature(twin).parameters] == [*inspect.signature(method).parameters], name


def test_a_method_takes_the_arguments_of_the_method_of_client() -> None:
    """Which are fewer: a gateway embeds in its own precision, and tells of no progress."""
    left_out = {
        "enqueue": {"within"},
        "embed": {"precision"},
        "drop_collection": {"on_progress"},
        "compare": {"on_progress", "on_spent"},
        "bridge": {"on_progress"},
        "tune_search": {"on_spent"},
        "judge_reembedding": {"on_spent"},
        "embed_texts": {"precision", "caller", "blank"},
    }
    for name in vars(RemoteClient):
        if name.startswith("_") or name in ("from_env", "close"):
            continue
        theirs = inspect.signature(getattr(chunkmill.Client, name)).parameters
        ours = inspect.signature(getattr(RemoteClient, name)).parameters
        wanted = [argument for argument in theirs if argument not in left_out.get(name, ())]
        assert [*ours] == wanted, name
        for argument in wanted[1:]:
            assert ours[argument].default == theirs[argument].default, (name, argument)


NOT_REMOTE = {
    "batcher": "an object that gathers chunks in this process",
    "cache, evict, prune, drop_space": "they are about the whole database, whose operator has the command line",
    "query_cache, clear_query_cache, load_query_cache, save_query_cache": "of this process and of its files",
    "abandon, adjustments, correct_charge": "a person looks at a bill and writes down who decided",
    "end_of": "a future that Postgres notifies; wait and the job's events are its counterpart",
    "export": "writes a file; chunks and iter_vectors stream the same",
    "golden": "an object whose methods read files",
    "failing": "Job.hindrance says it",
    "map": "draws",
}
"""What needs more than an answer to a request."""


def public(kind: type) -> set[str]:
    return {name for name, _ in inspect.getmembers(kind, callable) if not name.startswith("_")}


def test_every_verb_of_client_is_remote_or_has_a_reason_why_not() -> None:
    missing = public(chunkmill.Client) - public(RemoteClient)
    reasons = [name for names in NOT_REMOTE for name in names.split(", ")]
    assert sorted(missing) == sorted(reasons)
    assert public(RemoteClient) <= public(chunkmill.Client)
