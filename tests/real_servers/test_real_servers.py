"""The paid routes against servers that others wrote: Infinity, LiteLLM's proxy and ogx, each with two models.

``make realservers`` installs them and runs these. Infinity computes the vectors, and each of the others stands in
front of it. ogx has the Batch API, too. The vectors must be those that sentence-transformers makes of the same files.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from chunkmill.domain.states import JobState
from chunkmill.models.locate import bundled_folder
from chunkmill.settings import Settings
from tests.support.corridor import Corridor, corridor
from tests.support.waiting import PATIENCE, until

ROOT = Path(os.environ.get("REAL_SERVERS") or Path(__file__).parents[2] / ".real-servers")
KEY = "sk-real-0123456789abcdef"
TEXTS = {f"c{i}": f"text {i}: " + "unbelievable embeddings, 漢字 and émojis 🙂; " * (i % 7) for i in range(60)}
DIMENSIONS = {"minilm": 384, "tiny": 32}
"""Two models in one server, whose vectors have different lengths."""

pytestmark = pytest.mark.real_servers


class RealServer:
    """A process of a server, until it answers with its list of models. ``url`` is its base URL."""

    key = KEY

    def __init__(
        self, name: str, arguments: list[str], port: int, folder: Path, *, prefix: str = "", **env: str
    ) -> None:
        command = ROOT / name / "bin" / arguments[0]
        if not command.exists():
            pytest.skip(f"{name} is not installed: make realservers")
        self.names = {model: f"{prefix}{model}" for model in DIMENSIONS}
        """What the server calls each model."""
        self.url = f"http://127.0.0.1:{port}/v1"
        self._log = folder / f"{name}.log"
        quiet = {"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1", "OMP_NUM_THREADS": "1", "HOME": str(folder)}
        with self._log.open("wb") as output:
            self._process = subprocess.Popen(
                [str(command), *arguments[1:]],
                cwd=folder, env=os.environ | quiet | env, stdout=output, stderr=subprocess.STDOUT,
            )  # fmt: skip
        until(self._answers, self._log.read_text)

    def _answers(self) -> bool:
        assert self._process.poll() is None, self._log.read_text()
        request = urllib.request.Request(f"{self.url}/models", headers={"Authorization": f"Bearer {KEY}"})  # noqa: S310
        try:
            with urllib.request.urlopen(request, timeout=5) as answer:  # noqa: S310
                return {model["id"] for model in json.load(answer)["data"]} >= {*self.names.values()}
        except OSError:
            return False

    def stop(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(PATIENCE)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The bundled model, and a small one with random weights and the same tokenizer."""
    import torch
    from transformers import AutoTokenizer, BertConfig, BertModel

    bundled = bundled_folder()
    assert bundled is not None
    tiny = tmp_path_factory.mktemp("tiny")
    tokenizer = AutoTokenizer.from_pretrained(bundled)
    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    BertModel(BertConfig(vocab_size=len(tokenizer), max_position_embeddings=512, **sizes)).save_pretrained(tiny)
    tokenizer.save_pretrained(tiny)
    return {"minilm": bundled, "tiny": tiny}


@pytest.fixture(scope="module")
def expected(folders: dict[str, Path]) -> dict[str, np.ndarray[Any, Any]]:
    """(texts, dimensions) float32 for each model, as sentence-transformers makes them."""
    from sentence_transformers import SentenceTransformer

    return {
        name: SentenceTransformer(str(folder), device="cpu").encode(list(TEXTS.values()), normalize_embeddings=True)
        for name, folder in folders.items()
    }


@pytest.fixture(scope="module")
def infinity(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealServer]:
    port = free_port()
    models = [
        word for name, folder in folders.items() for word in ("--model-id", str(folder), "--served-model-name", name)
    ]
    arguments = ["infinity_emb", "v2", *models, "--port", str(port), "--host", "127.0.0.1", "--url-prefix", "/v1"]
    single = {
        "ENGINE": "torch;torch",
        "DEVICE": "cpu;cpu",
        "BETTERTRANSFORMER": "false;false",
        "MODEL_WARMUP": "false;false",
    }
    started = RealServer(
        "infinity", arguments, port, tmp_path_factory.mktemp("infinity"),
        INFINITY_ANONYMOUS_USAGE_STATS="0", **{f"INFINITY_{name}": value for name, value in single.items()},
    )  # fmt: skip
    yield started
    started.stop()


@pytest.fixture(scope="module")
def litellm(infinity: RealServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealServer]:
    folder, port = tmp_path_factory.mktemp("litellm"), free_port()
    models = [
        {"model_name": name, "litellm_params": {"model": f"openai/{name}", "api_base": infinity.url, "api_key": "none"}}
        for name in DIMENSIONS
    ]
    config = {"model_list": models, "general_settings": {"master_key": KEY}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    arguments = ["litellm", "--config", "config.yaml", "--host", "127.0.0.1", "--port", str(port)]
    started = RealServer("litellm", arguments, port, folder, LITELLM_LOCAL_MODEL_COST_MAP="True")
    yield started
    started.stop()


@pytest.fixture(scope="module")
def ogx(infinity: RealServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealServer]:
    folder, port = tmp_path_factory.mktemp("ogx"), free_port()
    in_sql = {"backend": "sql"}
    config = {
        "version": 2,
        "distro_name": "chunkmill",
        "apis": ["batches", "files", "inference"],
        "providers": {
            "inference": [
                {
                    "provider_id": "infinity",
                    "provider_type": "remote::vllm",
                    "config": {"base_url": infinity.url, "api_token": "none"},
                }
            ],
            "files": [
                {
                    "provider_id": "files",
                    "provider_type": "inline::localfs",
                    "config": {"storage_dir": "files", "metadata_store": {"table_name": "files", **in_sql}},
                }
            ],
            "batches": [
                {
                    "provider_id": "reference",
                    "provider_type": "inline::reference",
                    "config": {"sqlstore": {"table_name": "batches", **in_sql}},
                }
            ],
        },
        "storage": {
            "backends": {
                "kv": {"type": "kv_sqlite", "db_path": "kv.db"},
                "sql": {"type": "sql_sqlite", "db_path": "sql.db"},
            },
            "stores": {
                "metadata": {"namespace": "registry", "backend": "kv"},
                "inference": {"table_name": "inference", **in_sql},
                "conversations": {"table_name": "conversations", **in_sql},
                "prompts": {"table_name": "prompts", **in_sql},
                "connectors": {"table_name": "connectors", **in_sql},
            },
        },
        "registered_resources": {
            "models": [
                {
                    "model_id": name,
                    "provider_id": "infinity",
                    "provider_model_id": name,
                    "model_type": "embedding",
                    "metadata": {"embedding_dimension": dimensions},
                }
                for name, dimensions in DIMENSIONS.items()
            ]
        },
        "server": {"port": port, "host": "127.0.0.1"},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    started = RealServer("ogx", ["ogx", "run", "--insecure", "config.yaml"], port, folder, prefix="infinity/")
    yield started
    started.stop()


@contextmanager
def paid(
    settings: Settings, server: RealServer, folders: dict[str, Path], encoding: str | None = None, **changes: Any
) -> Iterator[Corridor]:
    models = {
        server.names[name]: {
            "dimensions": DIMENSIONS[name],
            "max_tokens": 128,
            "tokenizer": str(folder / "tokenizer.json"),
            "usd": 0.01,
            "request_inputs": 16,
            "request_bytes": 10_000,
            "tokens_factor": 0,  # Infinity counts characters
            "encoding": encoding,
        }
        for name, folder in folders.items()
    }
    given = {
        "embedding_model": server.names["minilm"],
        "embedding_dimensions": None,
        "openai_models": json.dumps(models),
    }
    with corridor(settings, server, **given, **changes) as made:  # type: ignore[arg-type]
        yield made


@pytest.fixture(params=["infinity", "litellm", "ogx"])
def server(request: pytest.FixtureRequest) -> RealServer:
    started: RealServer = request.getfixturevalue(request.param)
    return started


def check(made: Corridor, expected: dict[str, np.ndarray[Any, Any]], route: str, capsys: Any) -> None:
    """Both models on one route: complete, the right vectors, charged once each, and what the server says of tokens."""
    for name, model in made.server.names.items():  # type: ignore[attr-defined]
        job = made.client.enqueue(TEXTS.items(), collection=f"{name} {route}", model=model, route=route)
        (done,) = made.finish(job)
        assert (done.state, done.dead) == (JobState.COMPLETED, 0), done
        vectors = made.client.vectors(f"{name} {route}")
        assert vectors.keys() == TEXTS.keys()
        got = np.stack([vectors[chunk_id] for chunk_id in TEXTS])
        cosines = (got * expected[name]).sum(axis=1)
        assert cosines.min() > 0.999, cosines
    charges = made.rows(
        "SELECT space_id, sum(contents)::int AS contents, sum(tokens)::int AS tokens FROM charges GROUP BY 1"
    )
    assert [row["contents"] for row in charges] == [len(TEXTS)] * 2
    with capsys.disabled():
        print(f"\n{made.server.url} {route}: {charges}")


@pytest.mark.parametrize("encoding", [None, "float"])
def test_plain_requests_with_two_models(
    encoding: str | None,
    server: RealServer,
    settings: Settings,
    folders: dict[str, Path],
    expected: dict[str, np.ndarray[Any, Any]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    with paid(settings, server, folders, encoding, openai_batches=False) as made:
        check(made, expected, "openai-sync", capsys)


def test_batches_with_two_models(
    ogx: RealServer,
    settings: Settings,
    folders: dict[str, Path],
    expected: dict[str, np.ndarray[Any, Any]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    with paid(settings, ogx, folders) as made:
        check(made, expected, "openai", capsys)
