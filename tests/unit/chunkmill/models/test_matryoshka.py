"""Vectors are cut only where the model was trained for it, and a cut is what sentence-transformers makes of it."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chunkmill.domain.spaces import Precision, SpaceSpec
from chunkmill.domain.trust import Trust
from chunkmill.errors import InvalidInput, InvalidSetting, UnknownModel
from chunkmill.models import DEFAULT_MODEL, DEFAULT_SPEC, cut_space, resolve_model, resolve_spec
from chunkmill.settings import Settings
from chunkmill_workers.engine.matryoshka import shorten
from tests.unit.chunkmill.models.test_models import BERT, sentence_folder


def folder(path: Path, config: dict[str, Any] | None = None, used: dict[str, Any] | None = None) -> str:
    """A folder whose model gives 8 dimensions."""
    files = {"config.json": BERT | (config or {}), "config_sentence_transformers.json": used or {}}
    return str(sentence_folder(path, ("Normalize", {}), **files))


def spec(name: str, dimensions: int) -> SpaceSpec:
    return SpaceSpec("local", name, "sha256:00", dimensions, 512, DEFAULT_SPEC.pooling, normalize=True)


def test_a_model_that_states_nothing_is_not_cut(tmp_path: Path) -> None:
    name = folder(tmp_path)

    with pytest.raises(InvalidInput, match=r"gives 8 dimensions.*asks for 4.*EMBEDDING_MATRYOSHKA") as caught:
        resolve_spec(name, dimensions=4)
    assert not isinstance(caught.value, UnknownModel)  # it is known, and must not be looked for elsewhere
    assert resolve_spec(name, dimensions=8) == resolve_spec(name)
    assert resolve_spec(name).dimensions == 8


def test_a_stated_list_of_sizes_is_the_list(tmp_path: Path) -> None:
    name = folder(tmp_path, {"matryoshka_dimensions": [8, 4, 2]})

    assert resolve_spec(name, dimensions=4).dimensions == 4
    with pytest.raises(InvalidInput, match=r"asks for 3: it was trained to be cut to 2, 4, 8"):
        resolve_spec(name, dimensions=3)


def test_is_matryoshka_is_any_size(tmp_path: Path) -> None:
    name = folder(tmp_path, {"is_matryoshka": True})

    assert resolve_spec(name, dimensions=3).dimensions == 3
    for wrong in (0, -1, 9):
        with pytest.raises(InvalidInput, match="from 1 to 8"):
            resolve_spec(name, dimensions=wrong)


def test_a_folder_that_is_used_cut_is_used_cut_here(tmp_path: Path) -> None:
    name = folder(tmp_path, used={"truncate_dim": 4})

    assert resolve_spec(name).dimensions == 4
    assert resolve_spec(name, dimensions=8).dimensions == 8
    assert resolve_model(name).spec.dimensions == 8  # the engine makes all of them
    with pytest.raises(InvalidInput, match="cut to 4, 8"):
        resolve_spec(name, dimensions=2)


@pytest.mark.parametrize(
    ("config", "used", "message"),
    [
        ({"matryoshka_dimensions": "4"}, {}, "not a list of sizes"),
        ({"matryoshka_dimensions": [4, None]}, {}, "not a list of sizes"),
        ({}, {"truncate_dim": "4"}, "truncate_dim of an unknown form"),
    ],
)
def test_nonsense_is_refused(tmp_path: Path, config: dict[str, Any], used: dict[str, Any], message: str) -> None:
    with pytest.raises(UnknownModel, match=message):
        resolve_spec(folder(tmp_path, config, used))


def test_the_operator_vouches_by_exact_name(tmp_path: Path) -> None:
    name = folder(tmp_path)

    assert resolve_spec(name, dimensions=3, trust=Trust(matryoshka={name})).dimensions == 3
    for other in (f"{name}/", name.upper(), "org/model"):
        with pytest.raises(InvalidInput, match="EMBEDDING_MATRYOSHKA"):
            resolve_spec(name, dimensions=3, trust=Trust(matryoshka={other}))


def test_a_known_name_counts_on_the_hub_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = "nomic-ai/nomic-embed-text-v1.5"
    assert cut_space(spec(f"{known}@1a2b3c", 768), 64).dimensions == 64
    with pytest.raises(InvalidInput, match="64 to 768"):
        cut_space(spec(f"{known}@1a2b3c", 768), 63)

    # A folder of that name may hold anything.
    monkeypatch.chdir(tmp_path)
    here = Path(known)
    folder(here, {"hidden_size": 96})
    with pytest.raises(InvalidInput, match=r"96 dimensions.*nothing says"):
        resolve_spec(known, dimensions=64)


def test_the_default_space_follows_without_the_workers_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)

    assert resolve_spec(DEFAULT_MODEL, dimensions=384, precision=Precision.INT8).precision is Precision.INT8
    with pytest.raises(InvalidInput, match="384 dimensions"):
        resolve_spec(DEFAULT_MODEL, dimensions=128)
    long_name = f"sentence-transformers/{DEFAULT_MODEL}"
    assert resolve_spec(DEFAULT_MODEL, dimensions=128, trust=Trust(matryoshka={long_name})).dimensions == 128


def test_a_cut_and_a_precision_are_spaces_of_their_own(tmp_path: Path) -> None:
    name = folder(tmp_path, {"is_matryoshka": True})
    every = [resolve_spec(name, dimensions=d, precision=p).fingerprint for d in (4, 8) for p in Precision]

    assert len(set(every)) == 4


def test_a_cut_is_brought_back_to_length_one() -> None:
    full = np.array([[3, 4, 12], [0, 0, 1]], np.float32)

    cut = shorten(full, 2, normalize=True)

    assert cut.dtype == np.float32
    assert cut.flags.c_contiguous
    np.testing.assert_allclose(cut, [[0.6, 0.8], [0, 0]], atol=1e-7)
    np.testing.assert_array_equal(shorten(full, 2, normalize=False), full[:, :2])
    assert shorten(full, 3, normalize=True) is full
    assert shorten(full[:0], 2, normalize=True).shape == (0, 2)


@pytest.mark.parametrize("given", ["true", "*", "org/model@1,ALL", "org/*"])
def test_trust_is_given_by_name(given: str) -> None:
    for setting in ("embedding_trust_pickle", "embedding_trust_remote_code", "embedding_matryoshka"):
        with pytest.raises(InvalidSetting, match=f"{setting.upper()}.*is not the name of a model"):
            Settings.from_env(**{setting: given})


def test_names_are_listed_with_commas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMBEDDING_TRUST_PICKLE", "org/model@v1, /models/own ,")
    monkeypatch.setenv("EMBEDDING_MATRYOSHKA", "")

    trust = Settings.from_env().trust

    assert trust == Trust(pickle={"org/model@v1", "/models/own"})
