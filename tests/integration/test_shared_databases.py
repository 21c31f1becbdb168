"""A database that other programs use too, and one of an earlier release: whose tables are whose."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator

import pytest
import sqlalchemy as sa
from alembic import command
from click.testing import CliRunner, Result

from chunkmill.cli.__main__ import cli
from chunkmill.db import requirements
from chunkmill.db.connect import alembic_config, create_db, known_revisions, migrate, migration_level, require_migrated
from chunkmill.embedded import StackStatus
from chunkmill.errors import StoreUnavailable
from chunkmill.settings import Settings
from chunkmill_workers.local.context import WorkerContext
from chunkmill_workers.local.engines import Engines
from chunkmill_workers.process.lease import LeaseKeeper
from tests.conftest import admin, client_for, url_of
from tests.integration.conftest import Runner
from tests.support.installations import in_schema, install_as_before

HEAD = known_revisions()[-1]
THEIRS = ("jobs", "chunks", "contents", "collections", "spaces", "usage", "deletions", "worker_reports", "job_traces")
"""Names that another program may well have taken."""


@pytest.fixture
def database(stack: StackStatus) -> Iterator[str]:
    """The URL of an empty database."""
    admin(stack, "DROP DATABASE IF EXISTS shared_one")
    admin(stack, "CREATE DATABASE shared_one")
    yield url_of(stack, "shared_one")
    admin(stack, "DROP DATABASE shared_one WITH (FORCE)")


def sql(url: str, *statements: str) -> list[object]:
    """Run the statements as another program would, with the server's own search path; return the last one's column."""
    db = sa.create_engine(url, poolclass=sa.NullPool)
    with db.begin() as conn:
        results = [conn.execute(sa.text(statement)) for statement in statements]
        return list(results[-1].scalars()) if results[-1].returns_rows else []


def command_line(url: str, settings: Settings, *arguments: str, **env: str) -> Result:
    return CliRunner().invoke(
        cli, arguments, env={"DATABASE_URL": url, "REDIS_URL": settings.require_redis_url(), **env}
    )


def whole_job(url: str, settings: Settings, engines: Engines) -> None:
    """Enqueue, embed, audit, index, search and delete, in two collections."""
    own = settings.model_copy(update={"database_url": url})
    db = create_db(own.require_database_url(), role="worker")
    require_migrated(db)
    with client_for(own) as client:
        runner = Runner(WorkerContext(own, db, engines, LeaseKeeper(db, 30), name="worker"), client)
        for collection in ("docs", "others"):
            job = client.enqueue([(f"c{i}", f"text {i} of {collection}") for i in range(4)], collection=collection)
            assert runner.finish(job).state == "completed"
            assert client.audit(collection).complete
        client.index("docs")
        vector = client.vectors("docs", ["c1"])["c1"]
        assert client.search(vector, collection="docs", k=1)[0].chunk_id == "c1"
        assert client.delete("docs", ["c1"]) == 1
    db.dispose()


@pytest.mark.parametrize(
    ("name", "least", "words"),
    [
        ("OLDEST_POSTGRES", (99,), "Chunkmill needs 15 or later"),
        ("OLDEST_PGVECTOR", (9, 9), "Chunkmill needs 0.8 or later"),
    ],
)
def test_a_server_that_will_not_do_is_refused_before_anything_is_made(
    database: str, monkeypatch: pytest.MonkeyPatch, name: str, least: tuple[int, ...], words: str
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(requirements, name, least)
        with pytest.raises(StoreUnavailable, match=words):
            migrate(database)
    assert sql(database, "SELECT nspname FROM pg_namespace WHERE nspname = 'chunkmill'") == []
    migrate(database)


@pytest.mark.parametrize("theirs", [HEAD, "0003", "3f2a9c1d7b60"])
def test_another_program_with_alembic_and_the_same_table_names_is_not_disturbed(
    database: str, settings: Settings, engines: Engines, theirs: str
) -> None:
    sql(
        database,
        "CREATE TABLE alembic_version (version_num varchar(32) PRIMARY KEY)",
        f"INSERT INTO alembic_version VALUES ('{theirs}')",
        *(f"CREATE TABLE {table} (id integer PRIMARY KEY, theirs text NOT NULL)" for table in THEIRS),
    )
    own = settings.model_copy(update={"database_url": database})
    said = command_line(database, settings, "migrate")
    assert f"Migrated from an empty database to {HEAD}." in said.output, said.output
    whole_job(database, own, engines)
    command.check(alembic_config(database))  # nor are their tables taken for ours
    assert sql(database, "SELECT version_num FROM alembic_version") == [theirs]
    for table in THEIRS:
        assert sql(database, f"SELECT count(*) FROM public.{table}") == [0]
    assert "No check failed" in command_line(database, settings, "doctor").output
    in_public = "SELECT count(*) FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relkind = 'r'"
    assert sql(database, in_public) == [len(THEIRS) + 1]
    command.downgrade(alembic_config(database), "base")
    assert sql(database, in_public) == [len(THEIRS) + 1]


def test_a_schema_of_another_name_does_not_use_what_stands_in_public(
    database: str, settings: Settings, engines: Engines
) -> None:
    """Beside an installation of an earlier release, whose tables the search path shows."""
    install_as_before(database)
    migrate(database)
    there = in_schema(database, "elsewhere")
    db = create_db(there, role="test")
    with pytest.raises(StoreUnavailable, match="database is empty"):
        require_migrated(db)
    db.dispose()
    said = command_line(database, settings, "migrate", DATABASE_SCHEMA="elsewhere")
    assert f"Migrated from an empty database to {HEAD}." in said.output, said.output
    whole_job(database, settings.model_copy(update={"database_schema": "elsewhere"}), engines)
    assert sql(database, "SELECT count(*) FROM public.jobs") == [0]
    assert sql(database, "SELECT count(*) FROM elsewhere.jobs") == [2]


@pytest.mark.parametrize("name", ["Chunkmill", "pg_mine", "a b", 'x"; DROP TABLE jobs'])
def test_a_schema_that_cannot_be_named_in_sql_is_refused(settings: Settings, database: str, name: str) -> None:
    said = command_line(database, settings, "migrate", DATABASE_SCHEMA=name)
    assert (said.exit_code, "DATABASE_SCHEMA: it must be the name of a schema" in said.output) == (1, True)


def test_an_installation_of_an_earlier_release_stays_where_it_is(
    database: str, settings: Settings, engines: Engines
) -> None:
    """Even if a schema called chunkmill is there. The last release reads its migration as before."""
    install_as_before(database, "0007")
    sql(database, "CREATE SCHEMA chunkmill")
    db = create_db(database, role="test")
    with db.begin() as conn:
        assert migration_level(conn) == ("0007", HEAD)
    db.dispose()
    assert f"Migrated from 0007 to {HEAD}." in command_line(database, settings, "migrate").output
    assert sql(database, "SELECT version_num FROM alembic_version") == [HEAD]
    whole_job(database, settings, engines)
    count = "SELECT count(*) FROM pg_class WHERE relnamespace = 'chunkmill'::regnamespace"
    assert sql(database, count) == [0]
    command.downgrade(alembic_config(database), "0007")
    assert sql(database, "SELECT version_num FROM alembic_version") == ["0007"]


def test_a_version_table_that_another_program_makes_later_is_left_alone(database: str, settings: Settings) -> None:
    install_as_before(database, "0007")
    migrate(database, "0007")
    sql(
        database,
        "DROP TABLE alembic_version",
        "CREATE TABLE alembic_version (version_num varchar(32) PRIMARY KEY)",
        "INSERT INTO alembic_version VALUES ('0007')",
    )
    migrate(database)
    assert sql(database, "SELECT version_num FROM alembic_version") == ["0007"]
    assert sql(database, "SELECT version_num FROM chunkmill_alembic_version") == [HEAD]


def test_pgvector_may_be_in_a_schema_that_no_search_path_names(
    database: str, settings: Settings, engines: Engines
) -> None:
    sql(database, "CREATE SCHEMA extensions", "CREATE EXTENSION vector SCHEMA extensions")
    migrate(database)
    whole_job(database, settings, engines)


def test_pgvector_is_created_where_other_programs_find_it(database: str) -> None:
    migrate(database)
    assert sql(database, "SELECT CAST('[1,2]' AS vector)::text") == ["[1,2]"]


@pytest.fixture
def owner(database: str) -> Iterator[str]:
    """The database's URL for a role that owns it and may not create pgvector."""
    sql(database, "CREATE ROLE small_owner LOGIN", "ALTER DATABASE shared_one OWNER TO small_owner")
    yield sa.make_url(database).set(username="small_owner").render_as_string(hide_password=False)
    sql(database, "ALTER DATABASE shared_one OWNER TO postgres", "DROP OWNED BY small_owner", "DROP ROLE small_owner")


def test_a_role_that_may_not_create_pgvector_is_told_who_may(owner: str, database: str) -> None:
    trusted = sql(database, "SELECT trusted FROM pg_available_extension_versions WHERE name = 'vector' LIMIT 1")
    if trusted == [True]:
        migrate(owner)  # every owner may create it
        return
    with pytest.raises(StoreUnavailable, match=r"'small_owner' may not create it.*superuser.*CREATE EXTENSION vector;"):
        migrate(owner)
    sql(database, "CREATE EXTENSION vector")
    migrate(owner)


def test_a_role_that_may_not_look_into_the_schema_is_told_so(owner: str, database: str) -> None:
    """Its search path leaves the schema out, which looks like an empty database."""
    migrate(database)
    db = create_db(owner, role="test")
    with pytest.raises(StoreUnavailable, match=r"'small_owner' may not use the schema 'chunkmill'.*GRANT USAGE"):
        require_migrated(db)
    db.dispose()


def test_an_older_image_starts_on_a_newer_schema_that_allows_it(database: str, settings: Settings) -> None:
    """``chunkmill migrate`` is the first service of every start. A revision that this code does not know is newer."""
    migrate(database)
    sql(database, "UPDATE chunkmill.chunkmill_alembic_version SET version_num = '9000'")
    said = command_line(database, settings, "migrate")
    assert (said.exit_code, "is at migration 9000, which is newer" in said.output) == (0, True), said.output
    migrate(database)
    sql(database, "UPDATE chunkmill.schema_compatibility SET oldest_code = '8999'")
    said = command_line(database, settings, "migrate")
    assert (said.exit_code, "8999 or later beside it" in " ".join(said.output.split())) == (75, True), said.output
    assert sql(database, "SELECT version_num FROM chunkmill.chunkmill_alembic_version") == ["9000"]


def test_a_lock_that_does_not_come_is_not_a_server_that_is_away(database: str) -> None:
    migrate(database, "0007")
    db = create_db(database, role="test")
    with db.begin() as conn:
        conn.execute(sa.text("LOCK TABLE jobs IN ACCESS SHARE MODE"))
        conn.execute(sa.text("LOCK TABLE jobs IN ACCESS EXCLUSIVE MODE"))
        with pytest.raises(
            StoreUnavailable, match=r"lock timeout.*held a table.*Run chunkmill migrate again"
        ) as caught:
            migrate(database)
    assert "cannot connect" not in str(caught.value)
    migrate(database)
    db.dispose()


def test_the_migrations_can_be_installed_with_psql(database: str, settings: Settings, engines: Engines) -> None:
    """A database administrator needs no Python: the SQL makes the schema that `migrate` makes."""
    written = subprocess.run(
        [sys.executable, "-m", "chunkmill.cli", "migrate", "--sql"], capture_output=True, text=True, check=True
    ).stdout
    run_as_psql_does(database, written)
    assert f"already at migration {HEAD}" in command_line(database, settings, "migrate").output
    command.check(alembic_config(database))
    whole_job(database, settings, engines)
    ranged = command_line(database, settings, "migrate", "--sql", "--revision", "0007:0008").output
    command.downgrade(alembic_config(database), "0007")
    run_as_psql_does(database, ranged)
    assert sql(database, "SELECT version_num FROM chunkmill.chunkmill_alembic_version") == ["0008"]


def run_as_psql_does(url: str, script: str) -> None:
    """Each statement by itself, in autocommit: CREATE INDEX CONCURRENTLY needs that."""
    db = sa.create_engine(url, poolclass=sa.NullPool, isolation_level="AUTOCOMMIT")
    with db.connect() as conn:
        statement = ""
        for part in script.split(";\n"):
            statement += f"{part};\n"
            if statement.strip(" ;\n") and not len(re.findall(r"\$\w*\$", statement)) % 2:  # else within a quotation
                conn.exec_driver_sql(statement.replace("%", "%%"))
                statement = ""
