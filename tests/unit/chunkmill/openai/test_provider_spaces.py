"""Which space a model's name means, with a provider beside the local models."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from chunkmill.domain.providers import read_models
from chunkmill.domain.spaces import LongText, OnLong, Precision, SpaceSpec
from chunkmill.errors import InvalidInput, UnknownModel
from chunkmill.models import DEFAULT_SPEC, resolve_spec
from chunkmill.models.locate import bundled_folder
from chunkmill.openai import catalogue
from chunkmill.openai.catalogue import model_for, read_twins, resolve_space, why_unfit
from chunkmill.settings import Settings
from chunkmill.spaces.requested import requested_spec

TWIN = {
    "minilm-remote": {
        "dimensions": 384,
        "max_tokens": 256,
        "usd": 0.01,
        "same_as": "all-MiniLM-L6-v2",
        "tokenizer": "cl100k",
    }
}


def settings(provider: str = "auto", models: dict[str, dict[str, object]] | None = None) -> Settings:
    return Settings.from_env(embedding_provider=provider, openai_models=read_models(models or {}))


def resolved(given: Settings, name: str, **asked: object) -> SpaceSpec:
    words = {"on_long": OnLong.TRUNCATE, "dimensions": None, "precision": Precision.FLOAT} | asked
    return resolve_space(given, name, **words)  # type: ignore[arg-type]


def test_a_providers_model_has_a_space_of_its_own() -> None:
    spec = resolved(settings(), "text-embedding-3-small", dimensions=256, on_long=OnLong.SPLIT)
    assert (spec.provider, spec.dimensions, spec.max_tokens, spec.long_text) == ("openai", 256, 8192, LongText.SPLIT)
    assert model_for(settings(), spec) == settings().provider_models["text-embedding-3-small"]


def test_a_model_that_is_the_same_as_a_local_one_must_say_its_tokenizer() -> None:
    with pytest.raises(ValueError, match=r"model 'm': tokenizer is missing; with same_as"):
        read_models({"m": {"dimensions": 384, "same_as": "all-MiniLM-L6-v2"}})


def test_a_model_that_is_the_same_as_a_local_one_shares_its_space() -> None:
    given = settings(models=TWIN)
    spec = resolved(given, "minilm-remote")
    assert spec.fingerprint == DEFAULT_SPEC.fingerprint == resolved(given, "all-MiniLM-L6-v2").fingerprint
    assert model_for(given, spec) == given.provider_models["minilm-remote"]
    assert model_for(settings(), spec) is None


def test_the_space_is_known_under_any_name_of_its_files() -> None:
    folder = bundled_folder()
    assert folder is not None
    given = settings(models={"remote": TWIN["minilm-remote"] | {"same_as": str(folder)}})
    assert model_for(given, DEFAULT_SPEC) == given.provider_models["remote"]
    assert model_for(given, replace(DEFAULT_SPEC, revision="sha256:other")) is None
    gone = settings(models={"remote": TWIN["minilm-remote"] | {"same_as": "/nowhere/at/all"}})
    assert model_for(gone, DEFAULT_SPEC) is None


def test_models_that_were_read_are_not_read_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A model is looked up inside transactions, where no file may be read. A missing one is looked for again."""
    folder = bundled_folder()
    assert folder is not None
    here = TWIN["minilm-remote"] | {"same_as": str(folder)}
    later = TWIN["minilm-remote"] | {"same_as": str(tmp_path / "later")}
    given = settings(models={"here": here, "later": later})
    read_twins(given)
    (tmp_path / "later").symlink_to(folder)
    read: list[str] = []

    def note(name: str, **asked: object) -> SpaceSpec:
        read.append(name)
        return resolve_spec(name, **asked)  # type: ignore[arg-type]

    monkeypatch.setattr(catalogue, "resolve_spec", note)
    assert model_for(given, replace(DEFAULT_SPEC, long_text=LongText.SPLIT)) == given.provider_models["here"]
    assert model_for(given, replace(DEFAULT_SPEC, revision="sha256:other")) is None
    assert read == []
    read_twins(given)
    assert read == [str(tmp_path / "later")]


def test_a_provider_serves_no_int8_space_and_none_it_cannot_cut_to() -> None:
    given = settings(models=TWIN)
    twin = given.provider_models["minilm-remote"]
    assert "int8" in str(why_unfit(twin, replace(DEFAULT_SPEC, precision=Precision.INT8)))
    assert "cannot be cut" in str(why_unfit(twin, replace(DEFAULT_SPEC, dimensions=128)))
    assert "prompt" in str(why_unfit(twin, replace(DEFAULT_SPEC, document_prompt="passage: ")))
    assert why_unfit(replace(twin, can_cut=True), replace(DEFAULT_SPEC, dimensions=128)) is None
    assert model_for(given, replace(DEFAULT_SPEC, precision=Precision.INT8)) is None
    assert model_for(given, replace(DEFAULT_SPEC, long_text=LongText.SPLIT)) == twin
    assert model_for(given, replace(DEFAULT_SPEC, long_text=LongText.SPLIT_APART)) is None


@pytest.mark.parametrize(
    ("provider", "models", "name", "asked", "kind", "said"),
    [
        ("auto", {}, "text-embedding-3-small", {"precision": Precision.INT8}, InvalidInput, "Pass precision='float'"),
        ("openai", {}, "all-MiniLM-L6-v2", {}, UnknownModel, "EMBEDDING_PROVIDER is openai.*OPENAI_MODELS"),
        ("local", {}, "text-embedding-3-small", {}, UnknownModel, "text-embedding-3-small"),
        (
            "auto",
            {"m": {"dimensions": 99, "same_as": "all-MiniLM-L6-v2", "tokenizer": "cl100k"}},
            "m",
            {},
            InvalidInput,
            "gives 99 dimensions",
        ),
        ("auto", {}, "text-embedding-3-small", {"dimensions": 2000}, InvalidInput, "gives 1 to 1536"),
        ("auto", {}, "text-embedding-ada-002", {"dimensions": 256}, InvalidInput, "cannot be cut to 256"),
    ],
)
def test_what_is_refused(
    provider: str,
    models: dict[str, dict[str, object]],
    name: str,
    asked: dict[str, object],
    kind: type[Exception],
    said: str,
) -> None:
    with pytest.raises(kind, match=said):
        resolved(settings(provider, models), name, **asked)


def test_a_space_that_others_registered_is_found_by_the_local_models_name_only() -> None:
    """Where the files are on the workers alone; and never when the provider takes all names as its own."""
    theirs = replace(DEFAULT_SPEC, model="org/theirs@1")
    models = {"remote": {"dimensions": 384, "same_as": "org/theirs@1", "tokenizer": "cl100k"}}

    def asked(given: Settings, name: str) -> SpaceSpec:
        return requested_spec(
            given, name, on_long=OnLong.TRUNCATE, dimensions=None, precision=None, registered=lambda: [theirs]
        )

    assert asked(settings(), "org/theirs@1") == asked(settings(models=models), "remote") == theirs
    with pytest.raises(UnknownModel, match="EMBEDDING_PROVIDER is openai"):
        asked(settings("openai"), "org/theirs@1")


def test_of_a_name_in_two_revisions_none_is_chosen() -> None:
    """Vectors of two revisions cannot be compared, and nothing says which one is meant."""
    old, new = (replace(DEFAULT_SPEC, model="org/theirs@main", revision=f"sha256:{n}") for n in (1, 2))
    other = replace(DEFAULT_SPEC, model="org/other@main", revision="sha256:3")

    def asked(*registered: SpaceSpec, dimensions: int | None = None) -> SpaceSpec:
        return requested_spec(
            settings(), "org/theirs@main", on_long=OnLong.TRUNCATE, dimensions=dimensions, precision=None,
            registered=lambda: registered,
        )  # fmt: skip

    assert asked(other, new) == new
    for given in (None, DEFAULT_SPEC.dimensions):
        with pytest.raises(UnknownModel, match="org/theirs@main"):
            asked(old, new, other, dimensions=given)


@pytest.mark.parametrize(
    ("name", "provider", "says"),
    [
        (
            "text-embedding-4",
            "auto",
            r"path\. The provider serves text-embedding-3-small, text-embedding-3-large, text-",
        ),
        (
            "text-embedding-3-smal",
            "auto",
            "Did you mean text-embedding-3-small or text-embedding-3-large[?] The provider",
        ),
        ("bge-small", "auto", "Did you mean BAAI/bge-small-en-v1.5"),
        ("bge-small", "local", r"v1.5[^.?]*\? `chunkmill models list` lists models"),
        ("minilm-remot", "auto", "Did you mean minilm-remote"),
        ("x", "local", "check the path. `chunkmill models list`"),
    ],
)
def test_an_unknown_name_is_answered_with_the_names_that_are_known(name: str, provider: str, says: str) -> None:
    given = settings(provider, TWIN)
    with pytest.raises(UnknownModel, match=says):
        resolved(given, name)


@pytest.mark.parametrize("name", ["org/model", "./folder", "."])
def test_a_path_and_a_name_of_the_hub_are_answered_without_other_names(name: str) -> None:
    with pytest.raises(UnknownModel) as caught:
        resolved(settings(), name)
    assert "text-embedding-3-small" not in str(caught.value)


def test_an_empty_name_is_no_folder() -> None:
    for name in ("", " "):
        with pytest.raises(InvalidInput, match="model is empty"):
            requested_spec(settings(), name, on_long=OnLong.TRUNCATE, dimensions=None, precision=None, registered=list)
