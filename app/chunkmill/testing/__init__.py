"""Chunkmill for the tests of your own program: real servers, a database for each test, and a worker without a model.

In ``conftest.py``::

    pytest_plugins = ["chunkmill.testing.plugin"]

and in a test::

    def test_my_search_finds_the_passage(chunkmill_client):
        job = chunkmill_client.enqueue([("a", "A fox jumps over a dog.")], collection="docs")
        chunkmill_client.wait(job.id, timeout=30)
        assert chunkmill_client.search("which fox jumps?", collection="docs")[0].chunk_id == "a"

Without pytest: ``with Servers() as servers, servers.database() as settings, running(settings) as running: ...``.
"""

from __future__ import annotations

from chunkmill.testing.embedding import DIMENSIONS, MODEL, MODELS, OTHER_MODEL, embed
from chunkmill.testing.running import RunningStack, running
from chunkmill.testing.servers import Servers
from chunkmill.testing.worker import Worker

__all__ = ["DIMENSIONS", "MODEL", "MODELS", "OTHER_MODEL", "RunningStack", "Servers", "Worker", "embed", "running"]
