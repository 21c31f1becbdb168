"""One trace for each job, with OpenTelemetry: from ``enqueue`` to the ChunkBatch that completes it.

Set up by the standard ``OTEL_*`` variables alone, and by the extra ``tracing``. Where these name no exporter and the
program around has none, nothing is imported and every function here does nothing. A doorbell carries an id, so the
context travels with the job in Postgres, as a W3C ``traceparent``. Attributes are ids and counts, never texts.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
import os
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from chunkmill.errors import InvalidSetting

if TYPE_CHECKING:
    from opentelemetry.trace import Tracer

logger = logging.getLogger(__name__)

ADDRESSES = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
LAST_WORDS_S = 1.0
"""What a process that ends gives its last spans. A worker's drain has 5 s, and a collector may be away."""


def configure(service: str) -> None:
    """At the roots: start to export if the environment says where to. ``OTEL_SERVICE_NAME`` goes before ``service``.

    Raises :class:`InvalidSetting` where it says so and cannot be followed. A program that has a tracer keeps its own.
    """
    exporter = _exporter_name()
    if exporter is None:
        return
    if importlib.util.find_spec("opentelemetry") is None or importlib.util.find_spec("opentelemetry.sdk") is None:
        raise InvalidSetting(
            "the environment asks for traces (OTEL_EXPORTER_OTLP_ENDPOINT or OTEL_TRACES_EXPORTER), and OpenTelemetry "
            "is not installed. Run: pip install 'chunkmill[tracing]', or set OTEL_TRACES_EXPORTER=none."
        )
    from opentelemetry import trace
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    if isinstance(trace.get_tracer_provider(), TracerProvider):
        return
    named = {} if os.environ.get("OTEL_SERVICE_NAME") else {"service.name": service}
    provider = TracerProvider(resource=Resource.create(named))
    provider.add_span_processor(BatchSpanProcessor(_exporter(exporter)))
    trace.set_tracer_provider(provider)


def flush() -> None:
    """Send what waits, for a process that is about to end without Python's own way out."""
    if "opentelemetry.sdk.trace" not in sys.modules:
        return
    from opentelemetry import trace

    # In a thread, because the library keeps to no time limit here.
    provider: Any = trace.get_tracer_provider()
    sending = threading.Thread(target=getattr(provider, "force_flush", lambda: None), daemon=True)
    sending.start()
    sending.join(LAST_WORDS_S)


def _exporter_name() -> str | None:
    """What the environment asks for; None: nothing."""
    if os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return None
    asked = os.environ.get("OTEL_TRACES_EXPORTER", "").strip()
    if asked == "none" or not (asked or any(os.environ.get(name) for name in ADDRESSES)):
        return None
    return asked or "otlp"


def _exporter(name: str) -> Any:
    if name == "otlp":
        name = "otlp_proto_http"  # what the extra installs
    found = importlib.metadata.entry_points(group="opentelemetry_traces_exporter", name=name)
    if not found:
        raise InvalidSetting(
            f"OTEL_TRACES_EXPORTER is {name!r}, which is not installed. `otlp` and `console` come with the extra "
            "`tracing`; `none` turns traces off."
        )
    return next(iter(found)).load()()


def is_on() -> bool:
    return _tracer() is not None


def _tracer() -> Tracer | None:
    """Through OpenTelemetry's API, where this process or the program around it has loaded its SDK."""
    if "opentelemetry.sdk.trace" not in sys.modules:
        return None
    from opentelemetry import trace

    return trace.get_tracer("chunkmill", importlib.metadata.version("chunkmill"))


Facts = Mapping[str, int | str]
"""Ids and counts."""
NONE: Facts = MappingProxyType({})


class Span:
    """A span under way, or none."""

    def __init__(self, under_way: Any = None) -> None:
        self._span = under_way

    def set(self, facts: Facts) -> None:
        """``{"job": 7}`` is the attribute ``chunkmill.job``."""
        if self._span is not None:
            self._span.set_attributes({f"chunkmill.{name}": value for name, value in facts.items()})

    def fail(self, code: str) -> None:
        if self._span is not None:
            from opentelemetry.trace import StatusCode

            self._span.set_status(StatusCode.ERROR, code)


def fail(code: str) -> None:
    """The span under way in this thread failed."""
    if _tracer() is not None:
        from opentelemetry.trace import get_current_span

        Span(get_current_span()).fail(code)


def traceparent() -> str | None:
    """The span under way in this thread, as :func:`root` takes it in another process; None where nothing is traced."""
    if _tracer() is None:
        return None
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    carrier: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(carrier)
    return carrier.get("traceparent")


@contextmanager
def root(
    name: str,
    facts: Facts = NONE,
    *,
    kind: str = "INTERNAL",
    parents: Sequence[str] = (),
    began_ns: int | None = None,
    expected: tuple[type[Exception], ...] = (),
) -> Iterator[Span]:
    """A span under the one of ``parents``, or linked to each of several; with none, under the caller's own, if any.

    What it raises makes it an error, by its class alone, unless it is of those ``expected``.
    """
    tracer = _tracer()
    if tracer is None:
        yield Span()
        return
    from opentelemetry import trace
    from opentelemetry.context import Context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    contexts = [TraceContextTextMapPropagator().extract({"traceparent": each}, Context()) for each in parents]
    links = [trace.Link(trace.get_current_span(each).get_span_context()) for each in contexts]
    with tracer.start_as_current_span(
        name,
        context=contexts[0] if len(contexts) == 1 else Context() if contexts else None,
        kind=trace.SpanKind[kind],
        links=links if len(links) > 1 else None,
        start_time=began_ns,
        record_exception=False,  # its message is the log's; here it would be one more place to keep texts out of
        set_status_on_exception=False,
    ) as under_way:
        span = Span(under_way)
        span.set(facts)
        try:
            yield span
        except Exception as error:
            if not isinstance(error, expected):
                span.fail(type(error).__name__)
            raise


@contextmanager
def span(name: str, facts: Facts = NONE, *, began_ns: int | None = None) -> Iterator[Span]:
    """A part of what is being traced in this thread; nothing where nothing is."""
    if _tracer() is None:
        yield Span()
        return
    from opentelemetry import trace

    if not trace.get_current_span().get_span_context().is_valid:
        yield Span()
        return
    with root(name, facts, began_ns=began_ns) as under_way:
        yield under_way
