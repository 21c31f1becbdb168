"""The table of known models says what can be cited, and agrees with what the code says in other places."""

from __future__ import annotations

import tomllib
from dataclasses import replace
from importlib import resources

import pytest

from chunkmill.domain.providers import OPENAI_MODELS
from chunkmill.models import DEFAULT_SPEC
from chunkmill.models.known import NATIVE_ARCHITECTURES, find_known, known_models
from chunkmill.models.matryoshka import _SMALLEST
from chunkmill.models.names import PROMPTS


def test_what_our_own_forward_pass_knows_is_what_the_table_calls_native() -> None:
    from chunkmill_workers.engine.encoder import architectures

    assert frozenset(architectures.NATIVE_ARCHITECTURES) == NATIVE_ARCHITECTURES


def test_each_model_is_there_once_with_numbers_that_make_sense() -> None:
    models = known_models()

    assert len({model.name for model in models}) == len(models)
    for model in models:
        assert model.prompts is None or model.prompts in PROMPTS
        assert model.languages in ("English", "many")
        if model.runs == "paid":
            continue
        assert model.parameters is not None
        assert model.embedding_parameters is not None
        assert 0 < model.embedding_parameters <= model.parameters
        assert (model.computed == 0) == (model.runs == "static")
        assert (model.max_tokens is None) == (model.runs == "static")


def test_every_score_has_a_source_and_every_source_is_used() -> None:
    sources = tomllib.loads(resources.files("chunkmill.models").joinpath("known.toml").read_text())["sources"]

    assert {model.score_source for model in known_models() if model.score is not None} == set(sources.values())
    assert all((model.score is None) == (model.score_source is None) for model in known_models())


def test_the_bundled_model_is_known_by_all_its_names_and_as_its_space_is() -> None:
    model = find_known("all-MiniLM-L6-v2")

    assert model is not None
    assert model is find_known("sentence-transformers/all-MiniLM-L6-v2")
    assert model is find_known("sentence-transformers/all-MiniLM-L6-v2@main?prompts=e5")
    assert (model.dimensions, model.max_tokens) == (DEFAULT_SPEC.dimensions, DEFAULT_SPEC.max_tokens)


@pytest.mark.parametrize("name", ["no/such-model", "/some/folder", "all-MiniLM-L6", ""])
def test_another_name_is_not_known(name: str) -> None:
    assert find_known(name) is None


def test_all_models_of_the_provider_are_there_with_what_the_provider_gives() -> None:
    paid = {model.name: model for model in known_models() if model.runs == "paid"}

    assert paid.keys() == OPENAI_MODELS.keys()
    assert all(paid[name].dimensions == model.dimensions for name, model in OPENAI_MODELS.items())
    assert paid["text-embedding-3-small"].most_dimensions(512) == 512
    assert paid["text-embedding-ada-002"].most_dimensions(512) is None


def test_vectors_are_cut_only_to_what_a_model_was_trained_for() -> None:
    model = find_known("nomic-ai/nomic-embed-text-v1.5")
    assert model is not None

    assert model.most_dimensions(1024) == 768
    assert model.most_dimensions(512) == 512
    assert model.most_dimensions(63) is None
    assert replace(model, name="no/such-model").most_dimensions(512) is None


def test_models_that_are_known_to_be_cut_are_in_the_table_unless_they_cannot_run() -> None:
    names = {model.name for model in known_models()}

    # The one needs code of its own, the other is a variant that few people use.
    assert set(_SMALLEST) - names <= {"nomic-ai/nomic-embed-text-v2-moe", "mixedbread-ai/mxbai-embed-2d-large-v1"}
