"""A model's folder is read once, and again as soon as anything in it has changed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from chunkmill.domain.spaces import OnLong, SpaceSpec
from chunkmill.domain.trust import Trust
from chunkmill.errors import UnknownModel
from chunkmill.models import folder as reading
from chunkmill.models import kept, resolve_spec
from tests.unit.chunkmill.models.test_models import sentence_folder, weights, write


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders that were read, one after the other."""
    seen: list[Path] = []

    def counted(name: str, path: Path, options: reading.ModelOptions) -> reading.ModelFolder:
        seen.append(path)
        return reading.read_folder(name, path, options)

    monkeypatch.setattr(kept, "read_folder", counted)
    monkeypatch.setattr(kept, "SETTLED_SECONDS", -3600.0)  # each folder counts as old
    kept._kept.clear()
    return seen


def spec(folder: Path, **options: object) -> SpaceSpec:
    return resolve_spec(str(folder), **options)  # type: ignore[arg-type]


def test_a_folder_that_has_not_changed_is_read_once_for_each_way_to_use_it(tmp_path: Path, reads: list[Path]) -> None:
    first, second = sentence_folder(tmp_path / "a"), sentence_folder(tmp_path / "b")
    assert len({spec(first).fingerprint for _ in range(3)}) == 1
    assert spec(second).fingerprint == spec(first).fingerprint
    assert reads == [first, second]
    assert spec(first, on_long=OnLong.SPLIT) != spec(first)
    assert reads == [first, second, first]
    assert spec(first, trust=Trust(matryoshka=frozenset({str(first)})), dimensions=4).dimensions == 4
    assert spec(first, trust=Trust(matryoshka=frozenset({str(first)})), dimensions=2).dimensions == 2
    assert len(reads) == 4


def replaced_with_the_old_times(folder: Path) -> None:
    """As rsync and cp -p do: size and time are those of the old file."""
    file = folder / "model.safetensors"
    old = file.stat()
    file.write_bytes(weights(fill=7))
    os.utime(file, ns=(old.st_atime_ns, old.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (old.st_size, old.st_mtime_ns)


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: (folder / "model.safetensors").write_bytes(weights(fill=1)),
        replaced_with_the_old_times,
        lambda folder: write(folder, {"sentence_bert_config.json": {"max_seq_length": 64}}),
        lambda folder: write(folder, {"vocab.txt": b"a new file"}),
        lambda folder: write(folder, {"1_Pooling/config.json": {"pooling_mode": "cls"}}),
        lambda folder: (folder / "sentence_bert_config.json").unlink(),
    ],
    ids=["weights", "same times", "limit", "new file", "folder below", "deleted"],
)
def test_a_change_of_any_file_is_noticed(change: Callable[[Path], object], tmp_path: Path, reads: list[Path]) -> None:
    folder = sentence_folder(tmp_path / "m")
    before = spec(folder)
    assert spec(folder) == before
    change(folder)
    assert spec(folder).fingerprint != before.fingerprint
    assert len(reads) == 2


def test_a_file_behind_a_link_is_looked_at_too(tmp_path: Path, reads: list[Path]) -> None:
    """In the cache of Hugging Face all files are links."""
    folder = sentence_folder(tmp_path / "m")
    blob = tmp_path / "blob"
    (folder / "model.safetensors").rename(blob)
    (folder / "model.safetensors").symlink_to(blob)
    before = spec(folder)
    blob.write_bytes(weights(fill=1))
    assert spec(folder) != before


def test_a_folder_that_was_changed_a_moment_ago_is_read_each_time(
    tmp_path: Path, reads: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next change may have the same time."""
    monkeypatch.setattr(kept, "SETTLED_SECONDS", 3600.0)
    folder = sentence_folder(tmp_path / "m")
    for _ in range(3):
        spec(folder)
    assert len(reads) == 3


def test_a_folder_that_changes_while_it_is_read_is_not_kept(
    tmp_path: Path, reads: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = sentence_folder(tmp_path / "m")
    read = kept.read_folder

    def slow(name: str, path: Path, options: reading.ModelOptions) -> reading.ModelFolder:
        made = read(name, path, options)
        (path / "model.safetensors").write_bytes(weights(fill=len(reads)))
        return made

    monkeypatch.setattr(kept, "read_folder", slow)
    first = spec(folder)
    monkeypatch.setattr(kept, "read_folder", read)
    assert spec(folder) != first


def test_what_was_wrong_with_a_folder_is_not_kept(tmp_path: Path, reads: list[Path]) -> None:
    folder = sentence_folder(tmp_path / "m")
    aside = tmp_path / "aside"
    shutil.move(folder / "config.json", aside)
    with pytest.raises(UnknownModel):
        spec(folder)
    shutil.move(aside, folder / "config.json")
    assert spec(folder).dimensions == 8


def test_folders_with_very_many_files_or_a_loop_of_links_are_read_each_time_or_bounded(
    tmp_path: Path, reads: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    looped, large = sentence_folder(tmp_path / "looped"), sentence_folder(tmp_path / "large")
    (looped / "again").symlink_to(looped)
    monkeypatch.setattr(kept, "MOST_ENTRIES", 200)
    for number in range(201):
        (large / f"{number}.json").write_text("{}")
    for folder in (looped, large, looped, large):
        spec(folder)
    assert reads == [looped, large, large]


def test_a_bounded_number_of_folders_is_kept(
    tmp_path: Path, reads: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept, "MOST_KEPT", 2)
    folders = [sentence_folder(tmp_path / name) for name in "abc"]
    for folder in (*folders, folders[2], folders[0]):
        spec(folder)
    assert reads == [*folders, folders[0]]
    assert len(kept._kept) == 2
