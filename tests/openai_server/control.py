"""``/_control``: what only a test may say and see. No key, and no client of OpenAI knows it."""

from __future__ import annotations

from typing import Any

from tests.openai_server.lifecycle import move
from tests.openai_server.routes import ROUTES
from tests.openai_server.store import Store


def answer(store: Store, method: str, name: str, body: dict[str, Any]) -> dict[str, Any]:
    """ValueError or LookupError: the test asked for something there is not."""
    name, _, rest = name.partition("/")
    match method, name:
        case "GET", "state":
            return store.as_json()
        case "GET", "bill" if rest:
            return {"sources": store.bill.sources(rest)}
        case "GET", "bill":
            return store.bill.as_json()
        case "POST", "config":
            with store.changed:
                store.config.update(body)
                store.changed.notify_all()
                return store.config.as_json()
        case "POST", "misbehave":
            endpoints = [route.name for route in ROUTES]
            return {"number": store.misbehaviours.ask(**body, endpoints=endpoints)}
        case "POST", "calm":
            store.misbehaviours.calm()
            return {}
        case "POST", "settle":
            store.settle()
            return {}
        case "POST", "forget":
            store.forget()
            return {}
        case "POST", "vanish":
            if body["file_id"] not in store.files:
                raise LookupError(f"no file {body['file_id']}")
            store.remove_file(body["file_id"])
            return {}
        case "POST", "cancel":
            batch = store.batches[body["batch_id"]]
            if not move(store, batch, ("validating", "in_progress", "finalizing"), "cancelling"):
                raise ValueError(f"{batch.id} is {batch.status} already")
            return {}
    raise LookupError(f"no {method} /_control/{name}")
