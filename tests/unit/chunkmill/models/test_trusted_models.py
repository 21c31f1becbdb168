"""Pickles and code that come with a model: only for models that the operator trusts by their exact name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from chunkmill.domain.trust import Trust
from chunkmill.errors import UnknownModel
from chunkmill.models import resolve_model
from tests.unit.chunkmill.models.test_models import BERT, sentence_folder, write


def pickled_folder(path: Path, **files: Any) -> str:
    folder = sentence_folder(path, **{"pytorch_model.bin": b"pickle" * 20, "training_args.bin": b"x"} | files)
    (folder / "model.safetensors").unlink()
    return str(folder)


def test_a_pickle_is_read_only_for_a_model_that_is_trusted_by_name(tmp_path: Path) -> None:
    name = pickled_folder(tmp_path / "model")

    for others in ({f"{name}/"}, {"model"}, {tmp_path.name}, set[str]()):
        with pytest.raises(UnknownModel, match=r"pytorch_model\.bin is a pickle.*EMBEDDING_TRUST_PICKLE"):
            resolve_model(name, trust=Trust(pickle=others, remote_code={name}, matryoshka={name}))

    model = resolve_model(name, trust=Trust(pickle={name}))
    assert model.pickle
    before = model.spec.revision
    (Path(name) / "pytorch_model.bin").write_bytes(b"another" * 20)
    assert resolve_model(name, trust=Trust(pickle={name})).spec.revision != before
    # A file that is no model is no pickle of one either.
    (Path(name) / "pytorch_model.bin").unlink()
    with pytest.raises(UnknownModel, match=r"no model\.safetensors"):
        resolve_model(name, trust=Trust(pickle={name}))


def test_trust_changes_nothing_where_there_are_safetensors(tmp_path: Path) -> None:
    name = str(sentence_folder(tmp_path, **{"pytorch_model.bin": b"pickle"}))

    trusting = resolve_model(name, trust=Trust(pickle={name}))

    assert not trusting.pickle
    assert trusting == resolve_model(name)


def test_sharded_pickles_are_in_the_revision_with_their_index(tmp_path: Path) -> None:
    index = {"weight_map": {"a": "pytorch_model-1-of-2.bin", "b": "pytorch_model-2-of-2.bin"}}
    shards = {"pytorch_model-1-of-2.bin": b"1", "pytorch_model-2-of-2.bin": b"2"}
    name = pickled_folder(tmp_path, **{"pytorch_model.bin.index.json": index}, **shards)
    (tmp_path / "pytorch_model.bin").unlink()
    trust = Trust(pickle={name})

    revisions = {resolve_model(name, trust=trust).spec.revision}
    write(tmp_path, {"pytorch_model-2-of-2.bin": b"3"})
    revisions.add(resolve_model(name, trust=trust).spec.revision)
    write(tmp_path, {"pytorch_model.bin.index.json": index | {"metadata": {}}})
    revisions.add(resolve_model(name, trust=trust).spec.revision)
    assert len(revisions) == 3
    with pytest.raises(UnknownModel, match=r"pytorch_model-1-of-2\.bin is a pickle"):
        resolve_model(name)


OWN_CODE = {"model_type": "own", "auto_map": {"AutoConfig": "conf.Own", "AutoModel": "net.Own"}}


def code_folder(path: Path, **config: Any) -> str:
    files = {"conf.py": b"raise SystemExit('run')", "net.py": b"from .parts import x", "parts.py": b"x = 1"}
    return str(sentence_folder(path, **{"config.json": BERT | OWN_CODE | config} | files))


def test_code_is_run_only_for_a_model_that_is_trusted_by_name(tmp_path: Path) -> None:
    name = code_folder(tmp_path / "model")

    for others in ({f"{name}/"}, {"own"}, set[str]()):
        with pytest.raises(UnknownModel, match=r"architecture own .*auto_map.*EMBEDDING_TRUST_REMOTE_CODE"):
            resolve_model(name, trust=Trust(pickle={name}, remote_code=others))

    model = resolve_model(name, trust=Trust(remote_code={name}))
    assert model.remote_code
    assert not model.pickle
    for file in ("conf.py", "net.py", "parts.py"):
        before = resolve_model(name, trust=Trust(remote_code={name})).spec.revision
        (Path(name) / file).write_bytes(b"x = 2")
        assert resolve_model(name, trust=Trust(remote_code={name})).spec.revision != before, file


def test_code_that_is_not_in_the_folder_is_not_covered_by_its_revision(tmp_path: Path) -> None:
    elsewhere = code_folder(tmp_path / "a", auto_map={"AutoModel": "org/other--net.Own"})
    with pytest.raises(UnknownModel, match=r"org/other--net\.Own is in another repository.*copy that \.py"):
        resolve_model(elsewhere, trust=Trust(remote_code={elsewhere}))
    missing = code_folder(tmp_path / "b", auto_map={"AutoModel": "gone.Own", "AutoTokenizer": ["tok.Own", None]})
    with pytest.raises(UnknownModel, match=r"gone\.py, which auto_map names, is missing"):
        resolve_model(missing, trust=Trust(remote_code={missing}))
    odd = code_folder(tmp_path / "c", auto_map="net.Own")
    with pytest.raises(UnknownModel, match=r"config\.json has an auto_map that does not map classes to code"):
        resolve_model(odd, trust=Trust(remote_code={odd}))


def test_a_native_architecture_needs_no_code_even_when_it_is_trusted(tmp_path: Path) -> None:
    name = code_folder(tmp_path, model_type="nomic_bert")

    model = resolve_model(name, trust=Trust(remote_code={name}))

    assert not model.remote_code
    assert model == resolve_model(name)


def test_classes_of_the_folders_own_stay_unsupported(tmp_path: Path) -> None:
    name = str(sentence_folder(tmp_path, **{"modules.json": [{"type": "own_code.Transformer", "path": ""}]}))

    with pytest.raises(UnknownModel, match=r"own_code\.Transformer.*code"):
        resolve_model(name, trust=Trust(remote_code={name}))


def test_a_pickle_in_the_hugging_face_cache_counts_for_those_who_trust_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    pickled_folder(tmp_path / "hub" / "models--org--name" / "snapshots" / "0123abc")

    with pytest.raises(UnknownModel, match="not in the Hugging Face cache"):
        resolve_model("org/name@0123abc")
    assert resolve_model("org/name@0123abc", trust=Trust(pickle={"org/name@0123abc"})).pickle


def test_a_pickled_dense_module_needs_the_same_trust(tmp_path: Path) -> None:
    dense = ("Dense", {"in_features": 8, "out_features": 8})
    folder = sentence_folder(tmp_path, dense, **{"2_Dense/pytorch_model.bin": b"pickle"})
    (folder / "2_Dense/model.safetensors").unlink()
    name = str(folder)

    with pytest.raises(UnknownModel, match=r"2_Dense/pytorch_model\.bin is a pickle"):
        resolve_model(name)
    model = resolve_model(name, trust=Trust(pickle={name}))
    assert [layer.weights.name for layer in model.modules if not isinstance(layer, str)] == ["pytorch_model.bin"]
    assert not model.pickle  # that of the transformer
    before = model.spec.revision
    (folder / "2_Dense/pytorch_model.bin").write_bytes(b"another")
    assert resolve_model(name, trust=Trust(pickle={name})).spec.revision != before
