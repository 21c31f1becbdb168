"""A map shows the vectors of one collection, a bounded sample of them, and the same one again."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import sqlalchemy as sa
from click.testing import CliRunner

from chunkmill.cli.__main__ import cli
from chunkmill.client import Client
from chunkmill.domain.chunks import content_hash
from chunkmill.errors import InvalidInput, NotFound
from chunkmill.settings import Settings
from chunkmill.similarity import principal_components
from chunkmill.spaces import registry
from chunkmill.store import maps
from chunkmill.store.write import write_vectors

LANGUAGES = ("de", "en", "fr")


@pytest.fixture
def filled(client: Client, db: sa.Engine, monkeypatch: pytest.MonkeyPatch) -> Client:
    """Two collections of 24 chunks, which share a text. One text of each has no vector, and one has two chunks."""
    monkeypatch.setattr(maps, "STEP", 7)
    chance = np.random.default_rng(5)
    for name in ("docs", "other"):
        chunks = [
            (f"{name}-{i:02}", "a shared text" if i == 0 else f"text {i} of {name}",
             {"lang": LANGUAGES[i % 3], "a.b": i, "source": {"kind": f"kind {i % 2}"}})
            for i in range(23)
        ]  # fmt: skip
        client.enqueue([*chunks, (f"{name}-99", f"text 1 of {name}", {"lang": "xx"})], collection=name)
        texts = [text for _, text, _ in chunks[:-1]]
        with db.begin() as conn:
            space = registry.all_spaces(conn)[0]
            vectors = chance.standard_normal((len(texts), space.spec.dimensions)).astype(np.float32)
            hashes = [content_hash(text) for text in texts]
            n = len(texts)
            write_vectors(
                conn, space, space.spec.fingerprint, hashes, np.ones(n, np.int32), np.zeros(n, np.bool_), vectors
            )
    return client


def test_a_map_has_each_text_with_a_vector_once_and_those_of_its_collection_alone(filled: Client) -> None:
    drawn = filled.map("docs", by="lang")
    assert len(drawn) == 22
    assert drawn.contents == 23
    assert set(drawn.ids) == {f"docs-{i:02}" for i in range(22)}
    assert dict(zip(drawn.ids, drawn.values, strict=True)) == {f"docs-{i:02}": LANGUAGES[i % 3] for i in range(22)}
    vectors = filled.vectors("docs", drawn.ids)
    made = principal_components(np.stack([vectors[chunk_id] for chunk_id in drawn.ids]))
    np.testing.assert_allclose(drawn.points, made.points, atol=1e-6)
    assert drawn.explained == pytest.approx(tuple(made.explained))
    assert drawn.texts is None


def test_a_sample_is_bounded_and_the_same_again(filled: Client) -> None:
    few, again, all_of_them = filled.map("docs", sample=10), filled.map("docs", sample=10), filled.map("docs")
    assert len(few) == 10
    assert few.ids == again.ids == all_of_them.ids[:10]
    assert (few.points == again.points).all()
    assert "10 of 23 texts" in few.caption()


def test_the_field_may_be_inside_of_an_object_and_a_key_with_a_dot_comes_first(filled: Client) -> None:
    assert set(filled.map("docs", by="source.kind").values) == {"kind 0", "kind 1"}
    assert set(filled.map("docs", by="a.b").values) == set(range(22))
    assert set(filled.map("docs", by="source").values) == {'{"kind": "kind 0"}', '{"kind": "kind 1"}'}
    assert set(filled.map("docs", by="nothing").values) == {None}


def test_texts_come_if_they_are_asked_for_and_their_beginnings_only(
    filled: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(maps, "TEXT_LETTERS", 6)
    texts = filled.map("docs", texts=True).texts
    assert texts is not None
    assert set(texts) == {"text 1", "text 2", *(f"text {i}" for i in range(3, 10)), "a shar"}


def test_what_cannot_be_drawn_is_said(filled: Client) -> None:
    filled.enqueue([("a", "no vector yet")], collection="new")
    with pytest.raises(InvalidInput, match="'new' has no vector yet"):
        filled.map("new")
    with pytest.raises(NotFound):
        filled.map("nowhere")
    with pytest.raises(InvalidInput, match="sample is 100001; it must be at most 100000"):
        filled.map("docs", sample=100_001)
    with pytest.raises(InvalidInput, match="method is 'tsne'; it must be one of: pca, umap"):
        filled.map("docs", method="tsne")


def test_the_command_draws_here_writes_a_page_and_gives_json(
    filled: Client, settings: Settings, tmp_path: Path
) -> None:
    env = {"DATABASE_URL": settings.require_database_url(), "REDIS_URL": settings.require_redis_url()}

    def run(*arguments: str) -> str:
        done = CliRunner().invoke(cli, ["map", *arguments], env=env)
        assert done.exit_code == 0, done.output
        return done.output

    here = run("docs", "--by", "lang")
    assert "● de 8   ● en 7   ● fr 7" in here
    assert "22 of 23 texts" in here
    assert max(map(len, here.splitlines())) <= 80
    assert "No chunk here has the field" not in here
    assert "No chunk here has the field 'language'" in " ".join(run("docs", "--by", "language").split())
    page = tmp_path / "map.html"
    told = json.loads(run("docs", "--by", "lang", "--out", str(page), "--json"))
    assert told["files"] == [str(page)]
    assert len(told["points"]) == 22
    assert {"chunk_id", "x", "y", "value"} == set(told["points"][0])
    assert "docs-07" in page.read_text()
    assert "text 7 of docs" not in page.read_text()
    refused = CliRunner().invoke(cli, ["map", "docs", "--out", str(tmp_path / "map.gif")], env=env)
    assert refused.exit_code == 2
    assert "must end with .html or .png or .svg" in refused.output
