"""What one worker knows of the provider: which models answered it, how large a request may be, and how it fails."""

from __future__ import annotations

import threading
import time
from collections import Counter, defaultdict

from chunkmill.domain.states import Route
from chunkmill.openai.plan.requests import RequestSize

Form = tuple[str, int | None]
"""A model's name, and the dimensions that are asked for."""

FAILURES = 3
"""After this many requests in a row without an answer, the lane pauses."""
HOPELESS = 25
"""After this many requests in a row without an answer, although probes got answers, the lane stops."""


class Health:
    """Safe to use from the task threads of a worker, which share it. It is forgotten when the worker ends."""

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._proved: dict[Form, float] = {}
        self._failures: Counter[Route] = Counter()
        self._pauses: Counter[Route] = Counter()
        self._sizes: defaultdict[str, RequestSize] = defaultdict(RequestSize)
        self.probing = threading.Lock()
        """Held while a probe is sent, so that the threads of a worker do not all send one."""

    def proves(self, form: Form, *, since: float = 0.0) -> bool:
        """Whether the model answered in this form, after the moment ``since`` of ``time.monotonic``."""
        with self._mutex:
            return self._proved.get(form, -1.0) >= since

    def prove(self, form: Form) -> None:
        with self._mutex:
            self._proved[form] = time.monotonic()

    def forget(self) -> None:
        """The lane was stopped or paused for its failures: each model must be proved again."""
        with self._mutex:
            self._proved.clear()

    def answered(self, route: Route) -> None:
        """A request for real work was answered."""
        with self._mutex:
            self._failures[route] = self._pauses[route] = 0

    def failed(self, route: Route) -> int:
        """A request for real work got no answer. Returns how many such requests there were in a row."""
        with self._mutex:
            self._failures[route] += 1
            return self._failures[route]

    def probe_failed(self, route: Route) -> None:
        """A probe got no answer either, so the lane is failing."""
        with self._mutex:
            self._failures[route] = max(self._failures[route], FAILURES)

    def pause(self, route: Route) -> int | None:
        """If the lane is failing, count a pause and return how many there were in a row. Otherwise return None."""
        with self._mutex:
            if self._failures[route] < FAILURES:
                return None
            self._pauses[route] += 1
            return self._pauses[route]

    def is_hopeless(self, route: Route) -> bool:
        with self._mutex:
            return self._failures[route] >= HOPELESS

    def most_inputs(self, model: str, limit: int) -> int:
        """How many inputs a request to ``model`` may have, which is ``limit`` at most."""
        with self._mutex:
            learnt = self._sizes[model].most
            return limit if learnt is None else min(limit, learnt)

    def too_large(self, model: str, inputs: int) -> None:
        with self._mutex:
            self._sizes[model].refused(inputs)

    def fits(self, model: str, inputs: int) -> None:
        with self._mutex:
            self._sizes[model].accepted(inputs)
