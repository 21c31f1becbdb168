"""The official SDK as a client, in the few words the server's own tests need."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import openai
from openai.types import Batch

from tests.openai_server.config import DEFAULT_MODEL
from tests.openai_server.helper import OpenAIServer
from tests.support.waiting import until

DIMENSIONS = 8
ENDED = ("completed", "failed", "expired", "cancelled")


def line(custom_id: str, text: Any, **body: Any) -> dict[str, Any]:
    wanted = {"model": DEFAULT_MODEL, "input": text, "dimensions": DIMENSIONS, **body}
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/embeddings", "body": wanted}


def jsonl(lines: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


@dataclass
class Asking:
    server: OpenAIServer
    client: openai.OpenAI
    texts: list[str]
    """Ten that no other test uses: the bill is theirs alone."""

    def lines(self) -> list[dict[str, Any]]:
        """A line per text, with custom_ids t0, t1 ..."""
        return [line(f"t{number}", text) for number, text in enumerate(self.texts)]

    def upload(self, content: bytes, filename: str = "emb.jsonl") -> str:
        return self.client.files.create(file=(filename, content), purpose="batch").id

    def create(self, content: bytes, **more: Any) -> Batch:
        file_id = self.upload(content)
        return self.client.batches.create(
            input_file_id=file_id, endpoint="/v1/embeddings", completion_window="24h", **more
        )

    def end(self, batch_id: str) -> Batch:
        return self.until(batch_id, *ENDED)

    def until(self, batch_id: str, *statuses: str) -> Batch:
        """Ask until the batch has one of these statuses."""
        batch = None

        def reached() -> bool:
            nonlocal batch
            batch = self.client.batches.retrieve(batch_id)
            return batch.status in statuses

        until(reached, lambda: batch, pause=0.005)
        assert batch is not None
        return batch

    def run(self, content: bytes | None = None) -> Batch:
        return self.end(self.create(jsonl(self.lines()) if content is None else content).id)

    def raw(self, file_id: str | None) -> list[bytes]:
        return self.client.files.content(file_id).content.splitlines() if file_id else []

    def results(self, file_id: str | None) -> dict[str, dict[str, Any]]:
        return {read["custom_id"]: read for read in map(json.loads, self.raw(file_id))}

    def charged(self) -> list[int]:
        """How often each of the texts was charged."""
        return [len(self.server.charged_by(text)) for text in self.texts]


def embed(asking: Asking, text: str | list[str]) -> dict[str, Any]:
    """The plain endpoint's answer as it came."""
    answer = asking.client.embeddings.with_raw_response.create(
        model=DEFAULT_MODEL, input=text, dimensions=DIMENSIONS, encoding_format="float"
    )
    read: dict[str, Any] = json.loads(answer.http_response.content)
    return read
