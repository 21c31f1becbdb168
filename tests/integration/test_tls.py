"""What our clients make of a server's certificate: Redis under ``rediss://``, Postgres under ``verify-full``."""

from __future__ import annotations

import os
import ssl
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import redis
import sqlalchemy as sa
from kombu.exceptions import OperationalError

from chunkmill.broker import Broker, Doorbell, make_celery
from chunkmill.db.connect import create_db, require_migrated
from chunkmill.errors import StoreUnavailable
from chunkmill.settings import Settings
from tests.support.tls import Authority, make_authority, tls_proxy
from tests.support.waiting import PATIENCE


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return make_authority(tmp_path_factory.mktemp("certificates"))


@pytest.fixture
def trusted(authority: Authority, monkeypatch: pytest.MonkeyPatch) -> Authority:
    """The machine trusts the throw-away CA, as it would one in its store."""
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.ca))
    return authority


def redis_socket(settings: Settings) -> Path:
    return Path(redis.Redis.from_url(settings.require_redis_url()).connection_pool.connection_kwargs["path"])


def redis_over_tls(settings: Settings, port: int, host: str = "localhost", more: str = "") -> Settings:
    return settings.model_copy(update={"redis_url": f"rediss://{host}:{port}/0{more}"})


def look(settings: Settings) -> None:
    """redis-py: the doorbells, as the poller counts them."""
    broker = Broker.connect(settings)
    try:
        broker.queued_doorbells()
    finally:
        broker.close()


def ring(settings: Settings) -> None:
    """kombu: a doorbell, as a producer rings it."""
    broker = Broker.connect(settings)
    try:
        broker.ring([Doorbell(1, 5)])
    finally:
        broker.close()


def connect(settings: Settings) -> None:
    """kombu: what a worker and Flower do at their start."""
    app = make_celery(settings)
    with app.connection_for_read() as connection:
        connection.ensure_connection(max_retries=1, interval_start=0, timeout=PATIENCE)
    app.close()


both = pytest.mark.parametrize("use", [look, ring, connect])
Use = Callable[[Settings], None]


@both
def test_redis_of_a_trusted_authority_is_used(settings: Settings, trusted: Authority, use: Use) -> None:
    with tls_proxy(trusted.good, redis_socket(settings)) as port:
        use(redis_over_tls(settings, port))


@both
@pytest.mark.parametrize("wrong", ["self_signed", "elsewhere", "address"])
def test_another_redis_is_refused(settings: Settings, trusted: Authority, use: Use, wrong: str) -> None:
    """Signed by itself, for another host, or asked for by an address that the certificate does not name."""
    certificate = trusted.good if wrong == "address" else getattr(trusted, wrong)
    host = "127.0.0.1" if wrong == "address" else "localhost"
    with (
        tls_proxy(certificate, redis_socket(settings)) as port,
        pytest.raises((redis.ConnectionError, OperationalError, ssl.SSLError), match="certificate verify failed"),
    ):
        use(redis_over_tls(settings, port, host))


@both
def test_a_private_authority_may_be_named_in_the_url(settings: Settings, authority: Authority, use: Use) -> None:
    with tls_proxy(authority.good, redis_socket(settings)) as port:
        use(redis_over_tls(settings, port, more=f"?ssl_ca_certs={authority.ca}"))
    # Another port, for kombu keeps its connections by host and port.
    with (
        tls_proxy(authority.good, redis_socket(settings)) as port,
        pytest.raises((redis.ConnectionError, OperationalError, ssl.SSLError), match="certificate verify failed"),
    ):
        use(redis_over_tls(settings, port))


def test_flower_verifies_too(settings: Settings, trusted: Authority) -> None:
    """In a process of its own: it finds the broker by the same app."""
    script = (
        "from chunkmill_workers.celery import app\n"
        "with app.connection_for_read() as c:\n"
        f"    c.ensure_connection(max_retries=1, interval_start=0, timeout={PATIENCE}); print('connected')"
    )
    for certificate, fine in ((trusted.good, True), (trusted.self_signed, False)):
        with tls_proxy(certificate, redis_socket(settings)) as port:
            env = os.environ | {
                "DATABASE_URL": settings.require_database_url(),
                "REDIS_URL": f"rediss://localhost:{port}/0",
            }
            done = subprocess.run(
                [sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=PATIENCE
            )
        assert ("connected" in done.stdout) == fine, done.stderr


# Postgres


def postgres_socket(settings: Settings) -> Path:
    url = sa.make_url(settings.require_database_url())
    return Path(str(url.query["host"])) / f".s.PGSQL.{url.query['port']}"


def over_tls(settings: Settings, port: int, query: dict[str, str], host: str = "localhost") -> str:
    url = sa.make_url(settings.require_database_url())
    made = url.set(host=host, port=port, query=query | {"channel_binding": "disable"})
    return made.render_as_string(hide_password=False)


def try_postgres(url: str) -> None:
    db = create_db(url, role="test", pool_size=1)
    try:
        require_migrated(db)
    finally:
        db.dispose()


def test_postgres_of_the_right_authority_is_used(settings: Settings, trusted: Authority) -> None:
    with tls_proxy(trusted.good, postgres_socket(settings), postgres=True) as port:
        try_postgres(over_tls(settings, port, {"sslmode": "verify-full", "sslrootcert": str(trusted.ca)}))
        try_postgres(over_tls(settings, port, {"sslmode": "verify-full", "sslrootcert": "system"}))


@pytest.mark.parametrize("wrong", ["self_signed", "elsewhere", "address"])
@pytest.mark.parametrize("root", ["named", "system"])
def test_another_postgres_is_refused(settings: Settings, trusted: Authority, wrong: str, root: str) -> None:
    certificate = trusted.good if wrong == "address" else getattr(trusted, wrong)
    query = {"sslmode": "verify-full", "sslrootcert": str(trusted.ca) if root == "named" else "system"}
    with (
        tls_proxy(certificate, postgres_socket(settings), postgres=True) as port,
        pytest.raises(StoreUnavailable, match=r"certificate verify failed|does not match host name"),
    ):
        try_postgres(over_tls(settings, port, query, "127.0.0.1" if wrong == "address" else "localhost"))
