"""Folders of documents and of models, made at random from a seed: nothing but named errors, and flat memory.

`make fuzz` makes a thousand of each.
"""

from __future__ import annotations

import io
import json
import os
import random
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from chunkmill.cli.jobs.sources import Fields, Reader
from chunkmill.domain.chunks import MAX_ID_BYTES, PreparedChunk, prepare
from chunkmill.errors import InvalidChunk, InvalidInput, ModelLoadError, UnknownModel
from chunkmill.models import ModelFolder, resolve_model
from chunkmill_workers.engine.tokenizer import TextTokenizer

SECRET = "SECRET-of-another-folder"
MOST_KIB = 400 * 1024
"""How much more memory than after the first folders may be taken, whatever comes: about the largest file."""
COUNTS = [pytest.param(200, id="200"), pytest.param(1_000, id="1000", marks=pytest.mark.slow)]

NAMES = (
    *("a.txt", "b.md", "c.rst", "d.TXT", ".hidden.md", "e.png", "sub", "x" * 250 + ".md", "%s {0}.rst"),
    *("new\nline.md", "\x1b[31m.txt", os.fsdecode(b"\xff\xfe.txt"), "\u202e\U0001f600.md"),
)
TEXTS = (
    *(b"", b"text", b"\xff\xfe\x00", b"\x00", b"a\r\nb\n", "\ufeff文字\u2028".encode(), b"\xed\xa0\x80"),
    *(b"w " * 50_000, b"[" * 200_000, bytes(range(256))),
)
RECORDS = (
    *(b'{"id": "a", "text": "one"}', b'{"id": 1, "text": "t", "metadata": {"k": [1, null]}}', b"id,text,x"),
    *(b'a,"b\nc",d', b"[" * 100_000, b'{"a":' * 100_000, b'{"id": 1e999, "text": NaN}', b"9" * 5_000, b'"', b"\x00"),
    *(b"\xff", b"null", b"", b",,,,", b'{"id": {}}', b'{"id": "\\ud800", "text": "\\u0000"}'),
    *(b'{"id": "' + b"i" * 2_000 + b'", "text": "t"}', b'{"id": "b", "text": "' + b"t" * 10**6 + b'"}'),
)
VALUES: tuple[Any, ...] = (
    *(None, True, -1, 0, 1, 10**9, 10**19, 10**400, 1.5, 1e300, float("inf"), "", "x", "\0", "../..", "/dev/zero"),
    *([], [[]], {}, {"a": None}, [None] * 3, {"": "evil/kernel"}, "evil/kernel", ["x"], "a" * 9_999, "DEEP"),
)


def special(rng: random.Random, path: Path, root: Path) -> None:
    """Something that is no regular file, or a link."""
    kind = rng.randrange(4)
    if kind == 0:
        os.mkfifo(path)
    elif kind == 1:
        path.mkdir()
    else:
        inside = [root / rng.choice(NAMES), ".", "gone", path.name]
        outside = ["/dev/zero", "/etc/passwd", "../secret.md", "../../..", root.parent / "secret.md"]
        path.symlink_to(rng.choice([*inside, *outside]))


def make_documents(rng: random.Random, root: Path) -> None:
    folders = [root]
    for _ in range(rng.randrange(12)):
        path = rng.choice(folders) / rng.choice(NAMES)
        if path.is_symlink() or path.exists():
            continue
        if rng.random() < 0.3:
            special(rng, path, root)
        elif rng.random() < 0.3:
            path.mkdir()
            folders.append(path)
        else:
            path.write_bytes(rng.choice(TEXTS))
    for name in ("records.jsonl", "records.csv", "records.parquet"):
        lines = [rng.choice(RECORDS) for _ in range(rng.randrange(8))]
        (root.parent / name).write_bytes(rng.choice([b"\n", b"\r\n", b""]).join(lines))


def grown(since: int | None) -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - (since or 0)


@pytest.mark.parametrize("count", COUNTS)
def test_whatever_folder_of_documents_it_is(tmp_path: Path, count: int) -> None:
    rng = random.Random(1)
    warm = None
    read = refused = 0
    for number in range(count):
        home = tmp_path / str(number)
        root = home / "docs"
        root.mkdir(parents=True)
        (home / "secret.md").write_text(SECRET)
        make_documents(rng, root)
        for source in (root, *(home / name for name in ("records.jsonl", "records.csv", "records.parquet"))):
            for skip in (True, False):
                try:
                    items = list(Reader([str(source)], Fields(), skip=skip, stdin=io.BytesIO()))
                except InvalidInput:
                    refused += 1
                    continue
                for position, item in enumerate(items):
                    try:
                        chunk = prepare(item, position)
                    except InvalidChunk as error:
                        refused += 1
                        assert len(error.chunk_id.encode()) <= 4 * MAX_ID_BYTES
                        continue
                    assert isinstance(chunk, PreparedChunk)
                    assert SECRET.encode() not in chunk.text
                    read += 1
        shutil.rmtree(home)
        if number == 20:
            warm = grown(None)
    assert grown(warm) < MOST_KIB
    assert read > count
    assert refused > count


def mutated(rng: random.Random, content: Any) -> Any:
    """The JSON with one value anywhere in it replaced, removed or added."""
    if isinstance(content, dict) and content and rng.random() < 0.8:
        key = rng.choice(sorted(content))
        if rng.random() < 0.2:
            return {name: value for name, value in content.items() if name != key}
        return content | {key: mutated(rng, content[key])}
    if isinstance(content, list) and content and rng.random() < 0.7:
        at = rng.randrange(len(content))
        return [*content[:at], mutated(rng, content[at]), *content[at + 1 :]]
    return rng.choice(VALUES)


def mutate(rng: random.Random, folder: Path, file: Path) -> None:
    how = rng.randrange(6)
    content = file.read_bytes()
    if how <= 2 and file.suffix == ".json":
        text = json.dumps(mutated(rng, json.loads(content)))
        file.write_text(text.replace('"DEEP"', "[" * 50_000 + "]" * 50_000))
    elif how <= 2:  # safetensors: another header of another length
        length = int.from_bytes(content[:8], "little")
        header = json.dumps(mutated(rng, json.loads(content[8 : 8 + length]))).encode()
        file.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])
    elif how == 3:
        file.write_bytes(content[: rng.randrange(len(content))])
    elif how == 4:
        at = rng.randrange(len(content))
        file.write_bytes(content[:at] + rng.randbytes(8) + content[at + 8 :])
    else:
        file.unlink()
        special(rng, file, folder)


@pytest.mark.parametrize("count", COUNTS)
def test_whatever_folder_of_a_model_it_is(tmp_path: Path, toy_path: Callable[[str], Path], count: int) -> None:
    rng = random.Random(2)
    warm = None
    usable = refused = 0
    for number in range(count):
        folder = tmp_path / str(number)
        shutil.copytree(toy_path("bert-mean"), folder)
        files = sorted(file for file in folder.rglob("*") if file.suffix in (".json", ".safetensors"))
        for file in rng.sample(files, rng.randrange(1, 3)):
            mutate(rng, folder, file)
        try:
            model: ModelFolder = resolve_model(str(folder))
            TextTokenizer.load(model.transformer, lowercase=model.lowercase).encode(["a text", "a" * 1_000])
        except (UnknownModel, ModelLoadError):
            refused += 1
        else:
            usable += 1
        shutil.rmtree(folder)
        if number == 20:
            warm = grown(None)
    assert grown(warm) < MOST_KIB
    assert usable > count // 20
    assert refused > count // 2
