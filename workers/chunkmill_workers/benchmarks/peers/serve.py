"""A peer's process: commands come in as JSON lines on stdin, answers go out as JSON lines on stdout.

It measures itself, so that what travels between the processes is in no figure.
"""

from __future__ import annotations

import importlib
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from chunkmill_workers.benchmarks import machine
from chunkmill_workers.benchmarks.peers.model import Model, Unavailable

SHORT_TEXT = "How do I rotate a TLS certificate without downtime?"


class Adapter(Protocol):
    """What ``load(model, *, options, setting, threads, device)`` of an adapter's module returns."""

    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """``(n, d)`` float32, in the order of the texts."""


class Server:
    """One loaded peer and the texts that it was given."""

    def __init__(self, order: dict[str, Any]) -> None:
        self._order = order
        self._model = Model(**order["model"])
        self._texts: dict[str, list[str]] = {}
        self._adapter: Adapter = importlib.import_module(order["adapter"]).load(
            self._model,
            options=order["options"],
            setting=order["setting"],
            threads=order["threads"],
            device=order["device"],
        )
        self._adapter.embed([SHORT_TEXT])

    def answer(self, command: dict[str, Any]) -> dict[str, Any]:
        do: Callable[..., dict[str, Any]] = getattr(self, f"do_{command.pop('do')}")
        return do(**command)

    def do_texts(self, name: str, path: str) -> dict[str, Any]:
        self._texts[name] = json.loads(Path(path).read_text(encoding="utf-8"))
        return {}

    def do_embed(self, name: str, save: str | None = None) -> dict[str, Any]:
        texts = self._texts[name]
        began = time.perf_counter()
        vectors = self._adapter.embed(texts)
        seconds = time.perf_counter() - began
        if vectors.shape != (len(texts), self._model.dimensions):
            return {"error": f"{len(texts)} texts gave an array of {vectors.shape}"}
        if save:
            np.save(save, vectors)
        return {"seconds": seconds}

    def do_short(self, calls: int) -> dict[str, Any]:
        """Median milliseconds of one short text, each call from its own start to its own end."""
        taken = []
        for _ in range(calls):
            began = time.perf_counter()
            self._adapter.embed([SHORT_TEXT])
            taken.append(1000 * (time.perf_counter() - began))
        return {"ms": statistics.median(taken)}

    def do_rows(self, name: str, database_url: str, table: str) -> dict[str, Any]:
        """The script that one would write by hand: embed, then COPY into a table with pgvector's adapter."""
        import psycopg
        from pgvector.psycopg import register_vector

        texts = self._texts[name]
        with psycopg.connect(database_url, client_encoding="utf8") as connection:
            register_vector(connection)
            began = time.perf_counter()
            vectors = self._adapter.embed(texts)
            target = f"COPY {table} (id, content, embedding) FROM STDIN WITH (FORMAT BINARY)"
            with connection.cursor() as cursor, cursor.copy(target) as copy:
                copy.set_types(["int8", "text", "vector"])
                for number, (text, vector) in enumerate(zip(texts, vectors, strict=True)):
                    copy.write_row((number, text, vector))
            connection.commit()
            return {"seconds": time.perf_counter() - began}

    def do_memory(self) -> dict[str, Any]:
        """Peak resident memory of this process so far; None where the system does not tell."""
        return {"peak_kib": machine.memory_kib("self", "VmHWM")}

    def do_versions(self) -> dict[str, Any]:
        return {name: metadata.version(name) for name in self._order["packages"]}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is not an answer

    def tell(answer: dict[str, Any]) -> None:
        print(json.dumps(answer), file=answers, flush=True)

    order = json.loads(sys.stdin.readline())
    try:
        server = Server(order)
    except (ModuleNotFoundError, Unavailable) as error:
        tell({"unavailable": str(error)})
        return
    except Exception as error:
        tell({"error": f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"})
        raise
    tell({})
    for line in sys.stdin:
        command = json.loads(line)
        try:
            answer = server.answer(command)
        except Exception as error:
            # Its message may quote a text, and this goes into the results; stderr has the whole of it.
            tell({"error": f"{type(error).__name__} from its {order['adapter'].rpartition('.')[2]}"})
            raise
        tell(answer)


if __name__ == "__main__":
    main()
