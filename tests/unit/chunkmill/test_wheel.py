"""What a user installs: the wheel's names cannot collide with theirs, and its types are seen by their type checker."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.support.waiting import PATIENCE

ROOT = Path(__file__).parents[3]

PAGE_FILES = (".html", ".css", ".js", ".svg")


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The names of the files in the wheel of this checkout."""
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    (wheel,) = folder.glob("*.whl")
    return zipfile.ZipFile(wheel).namelist()


def test_only_two_names_of_ours_stand_at_the_top_of_site_packages(names: list[str]) -> None:
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"chunkmill", "chunkmill_workers"}


def test_the_wheel_has_the_types_the_migrations_and_the_versions_it_was_tested_with(names: list[str]) -> None:
    assert {"chunkmill/constraints.txt", "chunkmill/requirements.lock", "chunkmill/system/locked.py"} <= set(names)
    assert "chunkmill/models/default_tokenizer.json" in names
    assert {"chunkmill/py.typed", "chunkmill_workers/py.typed", "chunkmill/db/alembic/env.py"} <= set(names)
    versions = {path.name for path in (ROOT / "alembic/versions").glob("0*.py")}
    assert {f"chunkmill/db/alembic/versions/{name}" for name in versions} <= set(names)


def test_the_wheel_has_the_page_of_the_gateway(names: list[str]) -> None:
    page = ROOT / "app/chunkmill/gateway/page"
    files = {path.relative_to(ROOT / "app").as_posix() for path in page.rglob("*") if path.suffix in PAGE_FILES}
    assert files
    assert files <= set(names)


NOT_READ = (
    "alembic", "anyio", "celery", "click", "httpx2", "kombu", "openai", "opentelemetry", "psycopg", "pydantic",
    "pydantic_core", "pydantic_settings", "redis", "rich", "sqlalchemy", "starlette",
)  # fmt: skip


def test_a_consumer_in_strict_mode_sees_every_type(tmp_path: Path) -> None:
    consumer = tmp_path / "consumer.py"
    consumer.write_text(
        "import chunkmill\n"
        "from collections.abc import AsyncIterator\n"
        "from chunkmill import AsyncClient, Chunk, Client, Job, SearchHit\n"
        "def use(client: Client) -> None:\n"
        "    job = client.enqueue([Chunk(id='1', text='a text')], collection='docs')\n"
        "    reveal_type(job)\n"
        "    hits = client.search('a query', collection='docs')\n"
        "    reveal_type(hits)\n"
        "    reveal_type(hits[0])\n"
        "    chunkmill.Nothing\n"
        "async def use_async(client: AsyncClient) -> None:\n"
        "    async def chunks() -> AsyncIterator[Chunk]:\n"
        "        yield Chunk(id='1', text='a text')\n"
        "    reveal_type(await client.enqueue(chunks(), collection='docs'))\n"
        "    reveal_type(await client.search('a query', collection='docs'))\n"
        "    reveal_type(await AsyncClient.from_env())\n"
        "    async def progress(job: Job) -> None: ...\n"
        "    await client.wait(1, on_progress=progress)\n"
        "    reveal_type(await client.search(['a query', 'another'], collection='docs'))\n"
        "    await client.audit(colection='docs')\n"
    )
    # What our packages import is not read, which would take 11 s and says nothing about our own types.
    config = tmp_path / "mypy.ini"
    config.write_text(f"[mypy]\n[mypy-{','.join(f'{package}.*' for package in NOT_READ)}]\nfollow_imports = skip\n")
    options = ["--strict", "--config-file", config, "--cache-dir", ROOT / ".mypy_cache" / "consumer"]
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *options, consumer],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert 'Revealed type is "chunkmill.domain.results.Job"' in done.stdout
    assert 'Revealed type is "chunkmill.domain.results.Hits"' in done.stdout
    assert 'Revealed type is "chunkmill.domain.results.SearchHit"' in done.stdout
    assert 'Module has no attribute "Nothing"' in done.stdout, "an unknown name is an error, and not Any"
    assert done.stdout.count('Revealed type is "chunkmill.domain.results.Job"') == 2
    assert done.stdout.count('Revealed type is "chunkmill.domain.results.Hits"') == 2
    assert "list[chunkmill.domain.results.Hits]" in done.stdout
    assert 'Revealed type is "chunkmill.client.aio.AsyncClient"' in done.stdout
    assert 'Unexpected keyword argument "colection" for "audit" of "AsyncVerbs"' in done.stdout
    assert "Found 2 errors in 1 file" in done.stdout, done.stdout
