"""Watches for the cloud's notice that this machine will be taken. GCP, AWS and Azure give it in a metadata service."""

from __future__ import annotations

import contextlib
import json
import logging
import re
import threading
import time
from collections.abc import Callable
from typing import Any, ClassVar, Protocol
from urllib.parse import quote

from chunkmill.settings import Settings
from chunkmill_workers.host.metadata import LINK_LOCAL, Aborted, MetadataError, MetadataService, Reply

logger = logging.getLogger(__name__)

POLL_SECONDS = 1.0
"""How long to wait between two looks, as Azure demands. AWS would allow 5 s, but the drain should end by then."""
HANG_SECONDS = 20
"""How long GCP may hold a request. It answers a change at once; this limits the trust in a dead connection."""
ENABLE_SECONDS = 150.0
"""How long Azure's first answer may take: the first request switches scheduled events on, in up to two minutes."""
MOST_BACK_OFF_SECONDS = 5.0
PROBE_SECONDS = 1.0
PROBE_ROUNDS = 3
"""How often all clouds are tried, because some services answer only some seconds after the machine's start."""


class Provider(Protocol):
    """The metadata service of one cloud. Both methods raise :class:`MetadataError` and :class:`Aborted`."""

    name: str

    def identify(self) -> None:
        """Return if the service at this address belongs to this cloud, and raise if not."""

    def look(self) -> str | None:
        """The notice in words, or None while there is none."""


class PreemptionWatcher(threading.Thread):
    """Calls ``on_notice(reason)`` once, from its own thread, when the machine is about to be taken, and then ends.

    A service that fails is asked again for ever. A failure is never a notice.
    """

    def __init__(self, settings: Settings, on_notice: Callable[[str], None]) -> None:
        super().__init__(name="preemption-watcher", daemon=True)
        self._on_notice = on_notice
        self._service = service = MetadataService(settings.preemption_metadata_url or LINK_LOCAL)
        self._said: set[str] = set()
        self._must_ask_around = settings.preemption_notice == "auto"
        providers: list[Provider] = [
            Gcp(service),
            Aws(service, self._warn_once, drain_on_rebalance=settings.preemption_drain_on_rebalance),
            Azure(service),
        ]
        self._providers = [p for p in providers if settings.preemption_notice in ("auto", p.name)]

    @classmethod
    def from_settings(cls, settings: Settings, on_notice: Callable[[str], None]) -> PreemptionWatcher | None:
        """A watcher to be started, or None if notices are switched off. It sends no request yet."""
        return None if settings.preemption_notice == "off" else cls(settings, on_notice)

    def stop(self) -> None:
        """End the thread soon. Any thread may call it at any time, and no notice comes after it."""
        self._service.abort()

    def run(self) -> None:
        with contextlib.suppress(Aborted):
            provider = self._ask_around() if self._must_ask_around else self._providers[0]
            if provider is None:
                logger.info(
                    "no cloud's metadata service answers at %s, so nobody will announce that this machine is taken "
                    "away. If that may happen, set PREEMPTION_NOTICE to its cloud; on EC2, a container needs "
                    "a metadata hop limit of 2",
                    self._service.url,
                )
                return
            logger.info("watching %s for a preemption notice", provider.name)
            reason = f"{provider.name}: {self._await_notice(provider)}"
            self._service.pause(0)  # the worker may be leaving already
            logger.warning("preemption notice from %s", reason)
            self._on_notice(reason)

    def _ask_around(self) -> Provider | None:
        patience, self._service.patience = self._service.patience, PROBE_SECONDS
        try:
            for failures in range(PROBE_ROUNDS):
                self._service.pause(_back_off(failures))
                for provider in self._providers:
                    with contextlib.suppress(MetadataError):
                        provider.identify()
                        return provider
        finally:
            self._service.patience = patience
        return None

    def _await_notice(self, provider: Provider) -> str:
        failures = 0
        while True:
            try:
                notice = provider.look()
            except MetadataError as trouble:
                self._warn_once(f"{provider.name}: {trouble}. Asking again; until it answers, a notice is missed")
                failures += 1
                self._service.pause(_back_off(failures))
            else:
                if notice:
                    return notice
                failures = 0
                self._service.pause(POLL_SECONDS)

    def _warn_once(self, message: str) -> None:
        if message not in self._said:
            self._said.add(message)
            logger.warning("%s (said once)", message)


class Gcp:
    name = "gcp"
    path = "/computeMetadata/v1/instance/preempted"
    headers: ClassVar = {"Metadata-Flavor": "Google"}

    def __init__(self, service: MetadataService) -> None:
        self._service = service
        self._etag: str | None = None

    def identify(self) -> None:
        self._get(self.path)

    def look(self) -> str | None:
        """The first look and a look after trouble return at once, because the machine may be preempted already.

        The others wait until the value differs from the one that the etag names, so that no change is missed.
        """
        etag, self._etag = self._etag, None
        if etag is None:
            reply = self._get(self.path)
        else:
            query = f"wait_for_change=true&timeout_sec={HANG_SECONDS}&last_etag={quote(etag, safe='')}"
            reply = self._get(f"{self.path}?{query}", seconds=HANG_SECONDS + self._service.patience)
        _require_ok(reply)
        value = reply.body.strip()
        if value not in (b"TRUE", b"FALSE"):
            raise reply.unusable("answered neither TRUE nor FALSE")
        self._etag = reply.headers.get("ETag")
        return "instance/preempted is TRUE" if value == b"TRUE" else None

    def _get(self, path: str, *, seconds: float | None = None) -> Reply:
        reply = self._service.request("GET", path, self.headers, seconds=seconds)
        if reply.headers.get("Metadata-Flavor") != "Google":
            raise reply.unusable("was not answered by Google's metadata service")
        return reply


class Aws:
    """IMDSv2: every request carries a token, which a PUT request returns."""

    name = "aws"
    token_seconds = 21600
    actions = ("terminate", "stop", "hibernate")

    def __init__(self, service: MetadataService, warn_once: Callable[[str], None], *, drain_on_rebalance: bool) -> None:
        self._service = service
        self._warn_once = warn_once
        self._drain_on_rebalance = drain_on_rebalance
        self._hinted = False
        self._token: str | None = None
        self._renew_at = 0.0

    def identify(self) -> None:
        self._valid_token()

    def look(self) -> str | None:
        action = self._document("/latest/meta-data/spot/instance-action")
        if action is None:
            return self._look_at_hint()
        answer, what = action
        if what.get("action") not in self.actions:
            raise answer.unusable(f"named an action other than {', '.join(self.actions)}")
        return f"spot instance-action is {what['action']}, at {_when(what.get('time'))}"

    def _look_at_hint(self) -> str | None:
        """Look at the rebalance recommendation. Trouble with it must not slow down the look at the notice itself."""
        try:
            hint = self._document("/latest/meta-data/events/recommendations/rebalance")
            if hint is not None and not isinstance(hint[1].get("noticeTime"), str):
                raise hint[0].unusable("answered no noticeTime")
        except MetadataError as trouble:
            self._warn_once(f"{self.name}: {trouble}. The rebalance hint is missed; the notice itself is watched")
            return None
        if hint is None:
            return None
        told = f"rebalance recommendation of {_when(hint[1].get('noticeTime'))}"
        if self._drain_on_rebalance:
            return told
        if not self._hinted:
            self._hinted = True
            logger.warning(
                "aws: %s: the machine is at risk and may be taken soon; going on. "
                "PREEMPTION_DRAIN_ON_REBALANCE=true would drain the worker now",
                told,
            )
        return None

    def _document(self, path: str) -> tuple[Reply, dict[str, Any]] | None:
        """The JSON object at ``path``, or None because AWS has no such page while there is nothing to say."""
        reply = self._get(path)
        return None if reply.status == 404 else (reply, _json_object(reply))

    def _get(self, path: str) -> Reply:
        reply = self._service.request("GET", path, {"X-aws-ec2-metadata-token": self._valid_token()})
        if reply.status == 401:
            # The token ended early, for example because the machine was hibernated. A new one must work.
            self._token = None
            reply = self._service.request("GET", path, {"X-aws-ec2-metadata-token": self._valid_token()})
        return reply

    def _valid_token(self) -> str:
        if self._token is not None and time.monotonic() < self._renew_at:
            return self._token
        asked_at = time.monotonic()
        header = "X-aws-ec2-metadata-token-ttl-seconds"
        reply = self._service.request("PUT", "/latest/api/token", {header: str(self.token_seconds)})
        _require_ok(reply)
        token, lifetime = reply.body.decode("ascii", "replace"), reply.headers.get(header, "")
        if not re.fullmatch(r"[!-~]{1,1024}", token) or not re.fullmatch(r"[0-9]{1,6}", lifetime):
            raise reply.unusable("answered without a token and its lifetime")
        self._token, self._renew_at = token, asked_at + int(lifetime) / 2
        return token


class Azure:
    name = "azure"
    headers: ClassVar = {"Metadata": "true"}
    types = ("Preempt", "Terminate")

    def __init__(self, service: MetadataService) -> None:
        self._service = service
        self._machine = ""
        self._enabled = False

    def identify(self) -> None:
        path = "/metadata/instance/compute/name?api-version=2021-02-01&format=text"
        reply = self._service.request("GET", path, self.headers)
        _require_ok(reply)
        name = reply.body.decode("ascii", "replace").strip()
        if not re.fullmatch(r"[\w.-]{1,128}", name, re.ASCII):
            raise reply.unusable("answered no machine's name")
        self._machine = name

    def look(self) -> str | None:
        if not self._machine:
            self.identify()
        path = "/metadata/scheduledevents?api-version=2020-07-01"
        reply = self._service.request("GET", path, self.headers, seconds=None if self._enabled else ENABLE_SECONDS)
        events = _json_object(reply).get("Events")
        if not isinstance(events, list):
            raise reply.unusable("answered no list of events")
        self._enabled = True
        understood = True
        for event in events:
            match event:
                # The whole scale set sees an event, which names the machines that it takes.
                case {"EventType": str(kind), "Resources": [*names]}:
                    if kind in self.types and self._machine.lower() in {str(name).lower() for name in names}:
                        return f"scheduled event {kind}, not before {_when(event.get('NotBefore'))}"
                case _:
                    understood = False
        if not understood:
            raise reply.unusable("answered an event without EventType or Resources")
        return None


def _back_off(failures: int) -> float:
    return min(POLL_SECONDS * 2 ** min(failures - 1, 10), MOST_BACK_OFF_SECONDS) if failures else 0.0


def _require_ok(reply: Reply) -> None:
    if reply.status != 200:
        raise reply.unusable(f"answered {reply.status}")


def _json_object(reply: Reply) -> dict[str, Any]:
    _require_ok(reply)
    try:
        document = json.loads(reply.body)
    except (ValueError, RecursionError):
        document = None
    if not isinstance(document, dict):
        raise reply.unusable("did not answer a JSON object")
    return document


def _when(given: object) -> str:
    """A time as the cloud wrote it, if it may go into a log."""
    return given if isinstance(given, str) and re.fullmatch(r"[\w:,.+ -]{1,40}", given, re.ASCII) else "no time given"
