"""A batch from ``validating`` to its end, each in a thread of its own, told from top to bottom."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from tests.openai_server.errors import cannot_find_file
from tests.openai_server.execution import Execution, Outcome
from tests.openai_server.kinds import BODIES, LINES
from tests.openai_server.store import Batch, Store
from tests.openai_server.validation import FileError, Plan, read_plan

TERMINAL = ("completed", "failed", "expired", "cancelled")
STAMPS = {"in_progress": "in_progress_at", "finalizing": "finalizing_at", "cancelling": "cancelling_at"} | {
    status: f"{status}_at" for status in TERMINAL
}


def move(store: Store, batch: Batch, old: tuple[str, ...], new: str, changes: dict[str, Any] | None = None) -> bool:
    """The one way a status changes: only from one of ``old``. Hold no more than ``store.changed``."""
    with store.changed:
        if batch.status not in old:
            return False
        batch.shown = {**batch.shown, "status": new, STAMPS[new]: int(time.time()), **(changes or {})}
        batch.gets = 0
        batch.steps += 1
        if new in TERMINAL and batch.reserved and batch.plan is not None:
            # Whoever sees the end finds its room free.
            store.release(batch.plan)
            batch.reserved = False
        store.changed.notify_all()
    return True


class Life:
    def __init__(self, store: Store, batch: Batch) -> None:
        self.store = store
        self.batch = batch

    def run(self) -> None:
        try:
            self.story()
        finally:
            self.batch.input.unlink()

    def story(self) -> None:
        store, batch = self.store, self.batch
        self.wait("validating")
        errors = self.errors() if batch.status == "validating" else []
        if errors:
            listed = {"object": "list", "data": [error.as_json() for error in errors]}
            if move(store, batch, ("validating",), "failed", {"errors": listed}):
                return
        plan = batch.plan
        if plan is None:
            self.cancelled({})
            return
        started = {"model": plan.model, "request_counts": counts(plan.lines)}
        if not move(store, batch, ("validating",), "in_progress", started):
            self.cancelled({})
            return
        self.progress(plan)

    def errors(self) -> list[FileError]:
        """Why the batch fails; or the plan is in place and counted as enqueued."""
        store, batch = self.store, self.batch
        if (wish := store.misbehaviours.strike("fail_validation", batch.subject)) is not None:
            message = wish["message"] or f"The input failed validation: {wish['code']}."
            return [FileError(wish["code"], message, wish["line"], wish["param"])]
        input_id = batch.shown["input_file_id"]
        lost = store.misbehaviours.strike("cannot_find_file", batch.subject) is not None
        if lost or input_id not in store.files:
            return [FileError("invalid_request", cannot_find_file(input_id), param="file_id")]
        if batch.reserved:
            return []
        read = read_plan(batch.input, batch.shown["endpoint"], store.config)
        if isinstance(read, list):
            return read
        if (refusal := store.reserve(read)) is not None:
            return [FileError("token_limit_exceeded", refusal)]
        batch.plan, batch.reserved = read, True
        return []

    def progress(self, plan: Plan) -> None:
        store, batch = self.store, self.batch
        fraction = store.config.partial_fraction
        expire = store.misbehaviours.strike("expire", batch.subject)
        other = store.misbehaviours.strike("cancelled_by_other", batch.subject)
        if other is not None:
            move(store, batch, ("in_progress",), "cancelling")
        if (wish := store.misbehaviours.strike("stuck", batch.subject)) is not None:
            self.execute(plan, 1.0)
            if wish["status"] == "finalizing":
                move(store, batch, ("in_progress",), "finalizing")
            with store.changed:
                store.changed.wait_for(lambda: batch.id not in store.batches)
            return
        self.wait("in_progress")
        overdue = time.time() >= batch.created + store.config.window_seconds
        if batch.status == "cancelling":
            wanted = None if other is None else other["fraction"]
            outcome = self.execute(plan, fraction if wanted is None else wanted)
        elif expire is not None or overdue:
            wanted = None if expire is None else expire["fraction"]
            rest_expires = expire is None or expire["error_lines"]
            outcome = self.execute(plan, fraction if wanted is None else wanted, rest_expires=rest_expires)
            published = self.publish(plan, outcome)
            if not move(store, batch, ("in_progress",), "expired", published):
                self.cancelled(published)
            return
        else:
            outcome = self.execute(plan, 1.0)
        if (wish := store.misbehaviours.strike("failed_after_running", batch.subject)) is not None:
            ran = {"request_counts": counts(plan.lines, outcome.completed, outcome.failed)}
            said = {"code": "server_error", "message": "Something failed.", "line": None, "param": None}
            errors = {"object": "list", "data": [said]}
            more = {"usage": usage(outcome.reported)} if wish["usage"] else {}
            move(store, batch, ("in_progress", "cancelling"), "failed", {**ran, **more, "errors": errors})
            return
        move(store, batch, ("in_progress",), "finalizing")
        self.wait("finalizing")
        published = self.publish(plan, outcome)
        if not move(store, batch, ("finalizing",), "completed", published):
            self.cancelled(published)

    def execute(self, plan: Plan, fraction: float, rest_expires: bool = False) -> Outcome:
        """What is executed here is charged here, whatever becomes of the result."""
        store, batch = self.store, self.batch
        strikes = store.misbehaviours.for_lines({**LINES, **BODIES}, batch.subject)
        all_fail = store.misbehaviours.strike("all_failed", batch.subject)
        name = batch.id.removeprefix("batch_").lstrip("0")
        execution = Execution(name, batch.input, plan, store.config, strikes, all_fail, fraction, rest_expires)
        outcome = execution.run(self.spool("output"), self.spool("errors"))
        requests = outcome.completed + outcome.failed
        store.bill.charge(batch.id, "batch", plan.model, requests, outcome.tokens, outcome.texts)
        return outcome

    def publish(self, plan: Plan, outcome: Outcome) -> dict[str, Any]:
        """The result files that are not empty, and the batch's counts and usage."""
        store, batch = self.store, self.batch
        shown: dict[str, Any] = {
            "request_counts": counts(plan.lines, outcome.completed, outcome.failed),
            "usage": usage(outcome.reported),
        }
        for name, path in (("output", outcome.output), ("error", outcome.errors)):
            empty = path.stat().st_size == 0
            wished = name == "error" and empty and store.misbehaviours.strike("empty_error_file", batch.subject)
            if empty and wished in (False, None):
                path.unlink()
                continue
            file = store.add_file(path, f"{batch.id}_{name}.jsonl", "batch_output", batch.output_expires_after)
            shown[f"{name}_file_id"] = file.id
        return shown

    def cancelled(self, published: dict[str, Any]) -> None:
        self.wait("cancelling")
        move(self.store, self.batch, ("cancelling",), "cancelled", published)

    def wait(self, status: str) -> None:
        """Until this status has had its time, or its retrievals; or the batch is in another one."""
        store, batch = self.store, self.batch
        since = time.time()
        with store.changed:
            while batch.status == status:
                config = store.config
                now = time.time()
                ends = []
                if status == "in_progress":
                    ends.append(batch.created + config.window_seconds - now)
                if config.driver == "time":
                    ends.append(since + getattr(config, f"{status}_seconds") - now)
                elif batch.gets >= config.gets_per_step:
                    return
                left = min(ends, default=None)
                if left is not None and left <= 0:
                    return
                store.changed.wait(left)

    def spool(self, name: str) -> Path:
        return self.batch.input.with_suffix(f".{name}")


def counts(total: int = 0, completed: int = 0, failed: int = 0) -> dict[str, int]:
    return {"total": total, "completed": completed, "failed": failed}


def usage(tokens: int = 0) -> dict[str, Any]:
    return {
        "input_tokens": tokens,
        "input_tokens_details": {"cached_tokens": 0},
        "output_tokens": 0,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": tokens,
    }
