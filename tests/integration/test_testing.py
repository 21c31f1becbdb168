"""``chunkmill.testing``: what the tests of other programs run on."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import sqlalchemy as sa

from chunkmill.embedded import StackStatus
from chunkmill.errors import InvalidInput, JobFailed, WaitTimeout
from chunkmill.testing import MODEL, OTHER_MODEL, RunningStack, Servers, embed, running
from chunkmill.testing.embedding import MAX_TOKENS
from tests.conftest import admin
from tests.support.waiting import PATIENCE


@pytest.fixture(scope="module")
def servers(stack: StackStatus) -> Iterator[Servers]:
    with Servers(stack.database_url, stack.redis_url) as made:
        yield made


@pytest.fixture
def made(servers: Servers) -> Iterator[RunningStack]:
    with servers.database() as settings, running(settings) as both:
        yield both


def test_what_is_enqueued_is_embedded_and_found(made: RunningStack) -> None:
    client = made.client
    texts = {"fox": "A quick fox jumps over a lazy dog.", "sea": "The sea is deep and blue."}
    job = client.wait(client.enqueue(texts.items(), collection="docs").id, timeout=PATIENCE)
    assert (job.embedded, job.truncated, job.model) == (2, 0, MODEL)
    hits = client.search("which fox jumps?", collection="docs")
    assert [hit.chunk_id for hit in hits] == ["fox", "sea"]
    np.testing.assert_allclose(client.embed(["which fox jumps?"]), embed(["which fox jumps?"]), atol=1e-6)
    assert client.audit("docs").missing == 0
    again = client.wait(client.enqueue(texts.items(), collection="docs").id, timeout=PATIENCE)
    assert (again.cached, again.embedded) == (2, 0)


def test_long_texts_are_cut_refused_or_split_as_a_real_worker_does(made: RunningStack) -> None:
    client, long = made.client, " ".join(f"w{n}" for n in range(MAX_TOKENS + 1))
    cut = client.wait(client.enqueue([("a", long), ("b", "short")], collection="cut").id, timeout=PATIENCE)
    assert (cut.embedded, cut.truncated) == (2, 1)
    refused = client.enqueue([("a", f"{long} new"), ("b", "short")], collection="refused", on_long="reject")
    refused = client.wait(refused.id, timeout=PATIENCE)
    assert [(dead.chunk_id, dead.reason) for dead in refused.dead_chunks] == [
        ("a", f"the text has {MAX_TOKENS + 2} tokens; the model reads {MAX_TOKENS}"),
    ]  # fmt: skip
    split = client.enqueue([("a", long)], collection="split", on_long="split")
    assert client.wait(split.id, timeout=PATIENCE).truncated == 0


def test_a_test_may_refuse_a_text_and_keep_jobs_open(made: RunningStack) -> None:
    client, worker = made.client, made.worker
    worker.refuse("a bad text", reason="no such luck")
    job = client.enqueue([("bad", "a bad text"), ("good", "a good text")], collection="docs")
    with pytest.raises(JobFailed, match="no such luck"):
        client.wait(job.id, timeout=PATIENCE)
    assert client.job(job.id).embedded == 1
    with worker.paused():
        held = client.enqueue([("later", "a later text")], collection="other")
        with pytest.raises(WaitTimeout) as caught:
            client.wait(held.id, timeout=0)
        assert "No worker" not in str(caught.value)
    assert client.wait(held.id, timeout=PATIENCE).embedded == 1


def test_each_test_has_a_database_of_its_own_and_none_is_left(stack: StackStatus) -> None:
    with Servers(stack.database_url, stack.redis_url) as servers:
        with servers.database() as one, running(one) as first, servers.database() as two, running(two) as second:
            first.client.wait(first.client.enqueue([("a", "text a")], collection="docs").id, timeout=PATIENCE)
            other = second.client.enqueue([("b", "text b")], collection="other", model=OTHER_MODEL)
            assert second.client.wait(other.id, timeout=PATIENCE).model == OTHER_MODEL
            assert [running_parts.client.collections()[0].name for running_parts in (first, second)] == [
                "docs",
                "other",
            ]
        names = [one.database_url, two.database_url]
        assert len(set(names)) == 2
        template = servers._template
    with pytest.raises(Exception, match="does not exist"):
        admin(stack, f"DROP DATABASE {template}_0")
    with pytest.raises(Exception, match="does not exist"):
        admin(stack, f"DROP DATABASE {template}")
    with pytest.raises(InvalidInput, match="both"):
        Servers(stack.database_url)


def test_what_ends_the_worker_is_raised_at_the_end_of_the_test(
    servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    def break_down(*_: object, **__: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("chunkmill.testing.worker.embed", break_down)
    with (
        servers.database() as settings,
        pytest.raises(ZeroDivisionError, match="a bug"),
        running(settings) as broken,
    ):
        broken.client.enqueue([("a", "text a")], collection="docs")
        broken.worker._thread.join(PATIENCE)


PAGES = Path(__file__).parents[2] / "docs"


def test_the_examples_of_the_page_about_transactions_run(
    made: RunningStack, capsys: pytest.CaptureFixture[str]
) -> None:
    url = made.settings.require_database_url().partition("?schema")[0]
    engine = sa.create_engine(url)
    with engine.begin() as conn:
        conn.execute(sa.text("CREATE TABLE public.articles (id text PRIMARY KEY, title text)"))
    names = {"engine": engine, "client": made.client, "url": url.replace("+psycopg", "")}
    examples = re.findall(r"^```python\n(.*?)^```$", (PAGES / "transactions.md").read_text(), re.DOTALL | re.MULTILINE)
    for example in examples:
        exec(compile(example, "transactions.md", "exec"), names)  # noqa: S102 - the page is ours
    engine.dispose()
    said = capsys.readouterr().out.splitlines()
    assert [line for line in said if "completed" in line] == [
        "completed", "completed", f"job {names['job'].id} is completed with 0 dead chunks",  # type: ignore[attr-defined]
    ]  # fmt: skip
    assert made.client.count("docs") == 2


CONSUMER = {
    "search_of_mine.py": """
        from chunkmill import Client

        def fill():
            with Client.from_env() as client:
                job = client.enqueue([("fox", "A fox jumps."), ("sea", "The sea is blue.")], collection="docs")
                return client.wait(job.id, timeout=60)
    """,
    "conftest.py": """
        pytest_plugins = ["chunkmill.testing.plugin"]
    """,
    "test_mine.py": """
        import sys
        import chunkmill
        import search_of_mine

        def test_first(chunkmill_client):
            assert search_of_mine.fill().embedded == 2
            assert chunkmill_client.search("which fox?", collection="docs")[0].chunk_id == "fox"

        def test_second(chunkmill_client, chunkmill_worker):
            assert not list(chunkmill_client.collections())
            assert "installed" in chunkmill.__file__
            assert not {"torch", "tokenizers", "chunkmill_workers"} & sys.modules.keys()
    """,
}


@pytest.mark.slow
def test_a_project_that_installs_the_wheel_uses_the_fixtures(tmp_path: Path) -> None:
    """Its tests start servers of their own, and none of them is left."""
    root, project, installed = Path(__file__).parents[2], tmp_path / "project", tmp_path / "installed"
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path]
    subprocess.run(build, cwd=root, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", installed, wheel]
    subprocess.run(pip, check=True, capture_output=True)
    project.mkdir()
    for name, text in CONSUMER.items():
        (project / name).write_text(textwrap.dedent(text))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "error"],
        cwd=project, capture_output=True, text=True, timeout=PATIENCE * 4,
        env={**os.environ, "PYTHONPATH": str(installed), "TMPDIR": str(tmp_path), "DATABASE_URL": "postgresql://of/me"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 passed" in done.stdout
