"""Each address is read once, the same by all libraries, and no message about one quotes a part of it."""

from __future__ import annotations

import ssl
from urllib.parse import quote

import pytest
import redis
import sqlalchemy as sa
from hypothesis import given
from hypothesis import strategies as st
from kombu import Connection
from pydantic import ValidationError
from sqlalchemy.dialects.postgresql.psycopg import PGDialect_psycopg

from chunkmill.broker import Broker, kombu_url, make_celery
from chunkmill.db.connect import unreachable_message
from chunkmill.errors import InvalidSetting
from chunkmill.settings import Settings
from chunkmill.settings.addresses import ENCODE, ONE_REDIS

SECRETS = ["zebra1/quagga2", "zebra1#quagga2", "zebra1?quagga2", "1234/quagga2", "1234?a=quagga2", "1234#quagga2"]
WORDS = ("zebra", "quagga", "1234")

any_password = st.text(st.characters(codec="utf-8", exclude_categories=("Cs",)), min_size=1, max_size=12)


def postgres(url: str) -> str:
    return Settings.from_env(database_url=url).require_database_url()


def valkey(url: str) -> str:
    return Settings.from_env(redis_url=url).require_redis_url()


@pytest.mark.parametrize("secret", SECRETS)
@pytest.mark.parametrize("field", ["database_url", "redis_url"])
def test_a_password_that_ends_the_host_too_early_is_refused_without_being_shown(field: str, secret: str) -> None:
    scheme = "postgresql" if field == "database_url" else "redis"
    with pytest.raises(InvalidSetting) as caught:
        Settings.from_env(**{field: f"{scheme}://user:{secret}@host:99/0"})
    assert field.upper() in str(caught.value)
    assert ENCODE in str(caught.value)
    assert not [word for word in WORDS if word in str(caught.value)]


@pytest.mark.parametrize("field", ["database_url", "redis_url"])
def test_pydantics_own_error_shows_no_address_either(field: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Settings(**{field: "nonsense://user:quagga2@host"})
    assert "quagga" not in str(caught.value)


@given(any_password)
def test_every_encoded_password_reaches_every_library_as_it_is(password: str) -> None:
    login = f"user:{quote(password, safe='')}@"
    assert sa.make_url(postgres(f"postgresql://{login}host/db")).password == password
    for url in (f"redis://{login}host:1/0", f"unix://{login}/run/redis.sock?db=0"):
        ours = valkey(url)
        assert redis.connection.parse_url(ours)["password"] == password
        with Connection(kombu_url(ours)) as connection:
            pool = connection.transport.Channel.__new__(connection.transport.Channel)
            pool.connection = connection.transport
            connection.transport.client = connection
            assert pool._connparams()["password"] == password


@pytest.mark.parametrize("password", ["p@ss", "p;ss", "p:ss", "p+ss", "p&ss=x"])
def test_what_is_not_ambiguous_need_not_be_encoded(password: str) -> None:
    assert sa.make_url(postgres(f"postgresql://user:{password}@host/db")).password == password
    assert redis.connection.parse_url(valkey(f"redis://:{password}@host:1/0"))["password"] == password


@given(st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=30))
def test_whatever_an_address_is_it_is_taken_or_refused_in_words(text: str) -> None:
    for field, scheme in (("database_url", "postgresql"), ("redis_url", "redis"), ("redis_url", "unix")):
        try:
            settings = Settings.from_env(**{field: f"{scheme}://{text}"})
        except InvalidSetting:
            continue
        again = getattr(settings, field)
        assert getattr(Settings.from_env(**{field: again}), field) == again
        if field == "database_url":
            PGDialect_psycopg().create_connect_args(sa.make_url(again))
        else:
            Broker.connect(settings).close()


@pytest.mark.parametrize(
    ("hosts", "host", "port"),
    [
        ("h1:5432,h2:5433", "h1,h2", "5432,5433"),
        ("h1,h2:5433", "h1,h2", "5432,5433"),
        ("[::1]:5432,[::2]", "::1,::2", "5432,5432"),
        ("%2Frun%2FPostgres", "/run/Postgres", "5432"),
    ],
)
def test_several_hosts_of_postgres_reach_libpq(hosts: str, host: str, port: str) -> None:
    url = postgres(f"postgresql://u:p@{hosts}/db?target_session_attrs=read-write")
    _, connect = PGDialect_psycopg().create_connect_args(sa.make_url(url))
    assert (connect["host"], str(connect["port"])) == (host, port)
    assert (connect["user"], connect["password"], connect["dbname"]) == ("u", "p", "db")
    assert connect["target_session_attrs"] == "read-write"
    assert f"Postgres at {host}" in unreachable_message(url, OSError("away"))


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("postgresql://host/db?sslmod=require", "'sslmod' is not an option"),
        ("postgresql://host:54x/db", "postgresql://user:password@host:5432"),
        ("postgresql://h1:5432,/db", "postgresql://user:password@host:5432"),
        ("postgresql://ho st/db", "without blanks"),
        ("mysql://host/db", "postgresql://user:password@host:5432"),
        ("host=h dbname=d", "postgresql://user:password@host:5432"),
    ],
)
def test_another_address_of_postgres_is_refused_in_words(url: str, said: str) -> None:
    with pytest.raises(InvalidSetting, match=said):
        postgres(url)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("redis://h:1,h:2/0", ONE_REDIS),
        ("sentinel://h:26379/0", ONE_REDIS),
        ("redis+sentinel://h:26379/0", ONE_REDIS),
        ("redis://host/first", "database must be a number"),
        ("redis://host/0?socket_timeout=3", "'socket_timeout' is not an option"),
        ("redis://host/0?retry_on_timeout=true", "'retry_on_timeout' is not an option"),
        ("redis://host/0?ssl_cert_reqs=none", "'ssl_cert_reqs' is not an option"),
        ("rediss://host/0?ssl_cert_reqs=maybe", "required, optional or none"),
        ("unix://run/redis.sock", "redis://host:6379/0"),
        ("redis:///0", "redis://host:6379/0"),
    ],
)
def test_another_address_of_redis_is_refused_in_words(url: str, said: str) -> None:
    with pytest.raises(InvalidSetting, match=said):
        valkey(url)


@pytest.mark.parametrize(
    ("url", "ours"),
    [
        ("redis://host", "redis://host/0"),
        ("redis://host:1?db=3", "redis://host:1/3"),
        ("valkeys://host:1/2", "rediss://host:1/2"),
        ("redis://host/1?username=u&password=p%2Fw", "redis://u:p%2Fw@host/1"),
        ("unix:///run/redis.sock", "unix:///run/redis.sock?db=0"),
        (" redis://host/1\n", "redis://host/1"),
    ],
)
def test_an_address_of_redis_has_one_form(url: str, ours: str) -> None:
    assert valkey(url) == ours


@pytest.mark.parametrize(
    ("url", "kombus"),
    [
        ("unix:///tmp/a.sock?db=3", "redis+socket:///tmp/a.sock?virtual_host=3"),
        ("unix://user:secret@/tmp/a.sock", "redis+socket://user:secret@/tmp/a.sock?virtual_host=0"),
        ("unix:///tmp/a.sock?db=1&password=se%2Fcret", "redis+socket://:se%2Fcret@/tmp/a.sock?virtual_host=1"),
        ("rediss://u:p@h:6380/2?ssl_ca_certs=/ca.crt", "rediss://u:p@h:6380/2"),
    ],
)
def test_kombu_gets_the_address_in_its_own_form(url: str, kombus: str) -> None:
    assert kombu_url(valkey(url)) == kombus


@pytest.mark.parametrize(
    ("options", "verified", "host_checked"),
    [
        ("", ssl.CERT_REQUIRED, True),
        ("?ssl_cert_reqs=none", ssl.CERT_NONE, False),
        ("?ssl_cert_reqs=CERT_OPTIONAL&ssl_check_hostname=false", ssl.CERT_OPTIONAL, False),
        ("?ssl_ca_certs=/etc/ca.crt", ssl.CERT_REQUIRED, True),
    ],
)
def test_both_clients_of_redis_get_the_same_tls(options: str, verified: ssl.VerifyMode, host_checked: bool) -> None:
    settings = Settings.from_env(redis_url=f"rediss://host:1/0{options}")
    broker = Broker.connect(settings)
    kombus = make_celery(settings).conf.broker_use_ssl
    ours = {name: broker.client.connection_pool.connection_kwargs[name] for name in kombus}
    broker.close()
    assert ours == kombus
    assert (kombus["ssl_cert_reqs"], kombus["ssl_check_hostname"]) == (verified, host_checked)


@pytest.mark.parametrize("key", ["sk-quagga2\nx", "sk quagga2", "sk\u2013quagga2", "sk-quagga2\u00a0x", " \n"])
def test_a_key_that_cannot_be_sent_in_a_header_is_refused_without_being_shown(key: str) -> None:
    with pytest.raises(InvalidSetting, match="OPENAI_API_KEY") as caught:
        Settings.from_env(openai_api_key=key)
    assert "quagga" not in str(caught.value)


@pytest.mark.parametrize("around", ["\n", "\r\n", " ", "\u00a0"])
def test_blanks_around_a_key_are_not_part_of_it(around: str) -> None:
    key = Settings.from_env(openai_api_key=f"{around}sk-quagga2{around}").openai_api_key
    assert key is not None
    assert key.get_secret_value() == "sk-quagga2"


@pytest.mark.parametrize("field", ["openai_base_url", "budget_webhook_url", "preemption_metadata_url"])
@pytest.mark.parametrize("path", ["qua gga", "qu\u00e4gga", "qua\ngga"])
def test_a_url_that_no_request_can_have_is_refused_without_being_shown(field: str, path: str) -> None:
    scheme = "http" if field == "preemption_metadata_url" else "https"
    with pytest.raises(InvalidSetting, match=field.upper()) as caught:
        Settings.from_env(**{field: f"{scheme}://host/{path}"})
    assert "gga" not in str(caught.value)
