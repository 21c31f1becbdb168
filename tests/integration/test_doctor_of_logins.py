"""`doctor` and `gateway` with the logins of others, a Redis user with the channels of another database, and the file of
roles run by an owner who is no superuser."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
import redis
from click.testing import CliRunner

from chunkmill.cli.__main__ import cli
from chunkmill.db.connect import migrate
from chunkmill.embedded import StackStatus
from chunkmill.settings import Settings
from tests.conftest import admin, url_of
from tests.support.roles import as_role, run_file

GROUPS = ("migrator", "producers", "workers", "pollers", "readers", "viewers", "gateways", "key_makers")


@pytest.fixture
def guarded(stack: StackStatus) -> Iterator[str]:
    """The URL of a database of an owner who may create roles, after the file, the migration and the file again.

    The server has the roles already, so the owner gets what Postgres gives to whoever creates a role.
    """
    admin(stack, "DROP DATABASE IF EXISTS logins_of_others WITH (FORCE)")
    run_file(url_of(stack, "postgres"))  # creates the roles, if no test has done that before
    admin(stack, "DROP ROLE IF EXISTS logins_owner")
    admin(stack, "CREATE ROLE logins_owner LOGIN CREATEROLE")
    for group in GROUPS:
        admin(stack, f"GRANT chunkmill_{group} TO logins_owner WITH ADMIN TRUE, INHERIT FALSE, SET FALSE")
    admin(stack, "CREATE DATABASE logins_of_others OWNER logins_owner")
    url = url_of(stack, "logins_of_others")
    with psycopg.connect(url.replace("+psycopg", "")) as conn:
        conn.execute("CREATE EXTENSION vector SCHEMA public")
    for _ in range(2):
        run_file(as_role(url, "logins_owner"))
        migrate(as_role(url, "chunkmill_migrator"))
    run_file(as_role(url, "logins_owner"))
    for group in ("producers", "key_makers", "gateways"):
        admin(stack, f"DROP ROLE IF EXISTS logins_{group}")
        admin(stack, f"CREATE ROLE logins_{group} LOGIN IN ROLE chunkmill_{group}")
    yield url
    admin(stack, "DROP DATABASE logins_of_others WITH (FORCE)")
    for group in GROUPS:
        admin(stack, f"REVOKE chunkmill_{group} FROM logins_owner CASCADE")
    for role in ("owner", "producers", "key_makers", "gateways"):
        admin(stack, f"DROP ROLE logins_{role}")


def asked(url: str, redis_url: str, *command: str) -> Any:
    return CliRunner().invoke(cli, [*command], env={"DATABASE_URL": url, "REDIS_URL": redis_url})


def checks_of(url: str, redis_url: str) -> dict[str, dict[str, str]]:
    told = json.loads(asked(url, redis_url, "doctor", "--json").stdout)
    return {check["name"]: check for check in told["checks"]}


def test_an_owner_who_is_no_superuser_gives_each_group_its_rights(guarded: str, settings: Settings) -> None:
    with psycopg.connect(as_role(guarded, "logins_producers").replace("+psycopg", "")) as conn:
        conn.execute("SELECT FROM chunkmill.contents")
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            conn.execute("UPDATE chunkmill.charges SET usd = 0")
    with psycopg.connect(guarded.replace("+psycopg", "")) as conn:
        owners = conn.execute("SELECT DISTINCT tableowner FROM pg_tables WHERE schemaname = 'chunkmill'").fetchall()
    assert owners == [("chunkmill_migrator",)]


def test_doctor_says_which_login_it_needs(guarded: str, settings: Settings) -> None:
    redis_url = settings.require_redis_url()
    assert checks_of(as_role(guarded, "logins_producers"), redis_url)["migration"]["state"] == "ok"
    refused = checks_of(as_role(guarded, "logins_key_makers"), redis_url)["Postgres"]
    assert "permission denied" in refused["advice"]
    assert "use the login of a producer, a worker or a poller" in refused["advice"]
    said = asked(as_role(guarded, "logins_key_makers"), redis_url, "status").output
    assert "use the login of a producer, a worker or a poller" in " ".join(said.split())
    nobody = checks_of(as_role(guarded, "nobody_of_that_name"), redis_url)["Postgres"]
    assert "chunkmill doctor" not in nobody["advice"]


def test_a_gateway_with_the_login_of_a_producer_or_of_a_key_maker_does_not_start(
    guarded: str, settings: Settings
) -> None:
    for role in ("producers", "key_makers"):
        refused = asked(as_role(guarded, f"logins_{role}"), settings.require_redis_url(), "gateway", "--port", "0")
        assert refused.exit_code == 1
        assert "Put it into the group chunkmill_gateways" in " ".join(refused.stderr.split())


def test_a_key_maker_that_may_not_read_the_collections_makes_a_key_for_one(guarded: str, settings: Settings) -> None:
    command = ("keys", "create", "page", "--collection", "docs")
    for role in ("key_makers", "owner"):
        made = asked(as_role(guarded, f"logins_{role}"), settings.require_redis_url(), *command)
        assert made.exit_code == 0, made.output
        assert ("There is no collection" in made.stderr) == (role == "owner")


def test_a_user_whose_channels_are_those_of_another_database_is_noticed(stack: StackStatus, settings: Settings) -> None:
    number, other = 7, 0  # 0 is the one of deploy/redis-acl.conf
    url = settings.require_redis_url().rpartition("=")[0] + f"={number}"
    server = redis.Redis.from_url(url)
    rights = ["~*", "+@all", "resetchannels"]
    try:
        for name, database in (("logins_right", number), ("logins_wrong", other)):
            channels = [f"&/{database}.celeryev/*", f"&/{database}.celery.pidbox"]
            server.execute_command("ACL", "SETUSER", name, "on", ">a-password", *rights, *channels)
        as_user = {
            name: url.replace("unix://", f"unix://{name}:a-password@") for name in ("logins_right", "logins_wrong")
        }
        database_url = settings.require_database_url()
        assert "Redis channels" not in checks_of(database_url, as_user["logins_right"])
        wrong = checks_of(database_url, as_user["logins_wrong"])["Redis channels"]
        assert wrong["state"] == "fail"
        assert "the database's number" in wrong["advice"]
        refused = checks_of(database_url, as_user["logins_right"].replace("a-password", "another"))["Redis"]
        assert refused["found"] == "refuses the login"
        assert "Check the user and the password in REDIS_URL" in refused["advice"]
    finally:
        server.execute_command("ACL", "DELUSER", "logins_right", "logins_wrong")
        server.close()
