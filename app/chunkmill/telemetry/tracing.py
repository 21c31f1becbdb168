"""One OpenTelemetry trace for each job, from ``enqueue`` to the ChunkBatch that completes it.

The standard ``OTEL_*`` variables and the extra ``tracing`` turn it on. If the variables name no exporter and the
program around Chunkmill has none, nothing is imported and every function here does nothing. A doorbell carries only an
id, so the context travels with the job in Postgres, as a W3C ``traceparent``. Attributes are ids and counts, never
texts.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
import os
import re
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from types import MappingProxyType
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from chunkmill.errors import InvalidSetting, install_command

if TYPE_CHECKING:
    from opentelemetry.trace import Tracer

logger = logging.getLogger(__name__)

ADDRESSES = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
HEADERS = ("OTEL_EXPORTER_OTLP_HEADERS", "OTEL_EXPORTER_OTLP_TRACES_HEADERS")
_HEADER = re.compile(r"[!#-'*+\-.0-9A-Z^-z|~]+[ \t]*=[ !#-+\--:<-\[\]-~]*")
"""What OpenTelemetry accepts. It logs everything else, and a header is usually a secret."""
LAST_WORDS_S = 1.0
"""How many seconds a process that ends waits for its last spans. A worker's drain has 5 s, and a collector may be away.
"""


def configure(service: str) -> None:
    """Start to export spans if the environment names an exporter. ``OTEL_SERVICE_NAME`` overrides ``service``.

    Raises :class:`InvalidSetting` if that exporter cannot be used. A program that has a tracer provider keeps it.
    """
    exporter = _exporter_name()
    if exporter is None:
        return
    if importlib.util.find_spec("opentelemetry") is None or importlib.util.find_spec("opentelemetry.sdk") is None:
        raise InvalidSetting(
            "the environment asks for traces (OTEL_EXPORTER_OTLP_ENDPOINT or OTEL_TRACES_EXPORTER), but OpenTelemetry "
            f"is not installed. Run: {install_command('tracing')}, or set OTEL_TRACES_EXPORTER=none."
        )
    from opentelemetry import trace
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    if isinstance(trace.get_tracer_provider(), TracerProvider):
        return
    _check_headers()
    named = {} if os.environ.get("OTEL_SERVICE_NAME") else {"service.name": service}
    provider = TracerProvider(resource=Resource.create(named))
    provider.add_span_processor(BatchSpanProcessor(_exporter(exporter)))
    trace.set_tracer_provider(provider)


def flush() -> None:
    """Send the spans that wait. For a process that is about to end without Python's own exit handlers."""
    if "opentelemetry.sdk.trace" not in sys.modules:
        return
    from opentelemetry import trace

    # In a thread, because the library has no time limit here.
    provider: Any = trace.get_tracer_provider()
    sending = threading.Thread(target=getattr(provider, "force_flush", lambda: None), daemon=True)
    sending.start()
    sending.join(LAST_WORDS_S)


def _exporter_name() -> str | None:
    """The exporter that the environment names; None if it names none."""
    if os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return None
    asked = os.environ.get("OTEL_TRACES_EXPORTER", "").strip()
    if asked == "none" or not (asked or any(os.environ.get(name) for name in ADDRESSES)):
        return None
    return asked or "otlp"


def _check_headers() -> None:
    for name in HEADERS:
        given = [header.strip() for header in os.environ.get(name, "").split(",")]
        if not all(_HEADER.fullmatch(header) and unquote(header).isprintable() for header in given if header):
            raise InvalidSetting(
                f"{name}: it must be name=value, or several of these separated by commas, with each comma, semicolon, "
                "quotation mark and character outside ASCII in a value percent-encoded."
            )


def _exporter(name: str) -> Any:
    if name == "otlp":
        name = "otlp_proto_http"  # what the extra installs
    exporters = importlib.metadata.entry_points(group="opentelemetry_traces_exporter", name=name)
    if not exporters:
        raise InvalidSetting(
            f"OTEL_TRACES_EXPORTER is {name!r}, which is not installed. `otlp` and `console` come with the extra "
            "`tracing`; `none` turns traces off."
        )
    return next(iter(exporters)).load()()


def is_on() -> bool:
    return _tracer() is not None


def _tracer() -> Tracer | None:
    """Our tracer; None if neither this process nor the program around it has loaded OpenTelemetry's SDK."""
    if "opentelemetry.sdk.trace" not in sys.modules:
        return None
    from opentelemetry import trace

    return trace.get_tracer("chunkmill", _version())


@cache
def _version() -> str:
    """Ours. To read it takes a millisecond, and a span begins for each transaction that is traced."""
    return importlib.metadata.version("chunkmill")


Attributes = Mapping[str, int | str]
"""Ids and counts by name."""
NONE: Attributes = MappingProxyType({})


class Span:
    """A span that has begun, or nothing if tracing is off."""

    def __init__(self, begun: Any = None) -> None:
        self._span = begun

    def set(self, attributes: Attributes) -> None:
        """Set attributes: ``{"job": 7}`` becomes ``chunkmill.job``."""
        if self._span is not None:
            self._span.set_attributes({f"chunkmill.{name}": value for name, value in attributes.items()})

    def fail(self, code: str) -> None:
        if self._span is not None:
            from opentelemetry.trace import StatusCode

            self._span.set_status(StatusCode.ERROR, code)


def fail(code: str) -> None:
    """Mark this thread's current span as failed."""
    if _tracer() is not None:
        from opentelemetry.trace import get_current_span

        Span(get_current_span()).fail(code)


def traceparent() -> str | None:
    """This thread's current span in the form that :func:`root` takes in another process; None if nothing is traced."""
    if _tracer() is None:
        return None
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    carrier: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(carrier)
    return carrier.get("traceparent")


class OpenSpan(Span):
    """A span that another thread may end. It is nobody's current span."""

    def __init__(self, begun: Any, traceparent: str | None) -> None:
        super().__init__(begun)
        self.traceparent = traceparent
        """For :func:`root`; None if this trace is not kept."""

    def end(self) -> None:
        self._span.end()


def begin(name: str, attributes: Attributes = NONE, *, kind: str, parent: str | None) -> OpenSpan | None:
    """A span below ``parent``, which must be ended. None without a parent, and if nothing is traced."""
    if parent is None or (tracer := _tracer()) is None:
        return None
    from opentelemetry import trace
    from opentelemetry.context import Context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    propagator = TraceContextTextMapPropagator()
    context = propagator.extract({"traceparent": parent}, Context())
    if not trace.get_current_span(context).get_span_context().is_valid:
        return None
    begun = tracer.start_span(name, context=context, kind=trace.SpanKind[kind])
    carrier: dict[str, str] = {}
    if begun.is_recording():
        propagator.inject(carrier, trace.set_span_in_context(begun, Context()))
    span = OpenSpan(begun, carrier.get("traceparent"))
    span.set(attributes)
    return span


@contextmanager
def root(
    name: str,
    attributes: Attributes = NONE,
    *,
    kind: str = "INTERNAL",
    parents: Sequence[str] = (),
    began_ns: int | None = None,
    expected: tuple[type[Exception], ...] = (),
) -> Iterator[Span]:
    """A span whose parent is the one in ``parents``, or that is linked to each of several. Without ``parents`` it is
    under the current span, if there is one.

    An exception other than those ``expected`` marks the span as failed. Only its class is recorded.
    """
    tracer = _tracer()
    if tracer is None:
        yield Span()
        return
    from opentelemetry import trace
    from opentelemetry.context import Context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    contexts = [TraceContextTextMapPropagator().extract({"traceparent": parent}, Context()) for parent in parents]
    links = [trace.Link(trace.get_current_span(context).get_span_context()) for context in contexts]
    with tracer.start_as_current_span(
        name,
        context=contexts[0] if len(contexts) == 1 else Context() if contexts else None,
        kind=trace.SpanKind[kind],
        links=links if len(links) > 1 else None,
        start_time=began_ns,
        record_exception=False,  # the message is in the log; here it would be one more place to keep texts out of
        set_status_on_exception=False,
    ) as begun:
        span = Span(begun)
        span.set(attributes)
        try:
            yield span
        except Exception as error:
            if not isinstance(error, expected):
                span.fail(type(error).__name__)
            raise


@contextmanager
def span(name: str, attributes: Attributes = NONE, *, began_ns: int | None = None) -> Iterator[Span]:
    """A span below this thread's current span; nothing if there is none."""
    if _tracer() is None:
        yield Span()
        return
    from opentelemetry import trace

    if not trace.get_current_span().get_span_context().is_valid:
        yield Span()
        return
    with root(name, attributes, began_ns=began_ns) as part:
        yield part
