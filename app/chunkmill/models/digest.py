"""A model's revision: one digest of the files that reach its vectors, equal on every machine."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from chunkmill.models.files import unreadable
from chunkmill.models.weights import read_header

# Files of a transformer's folder that reach the vectors. README, onnx/, openvino/, training records and
# config_sentence_transformers.json (versions and prompts; the prompts are fields of the space) do not.
_FILES: Final = (
    "added_tokens.json",
    "config.json",
    "merges.txt",
    "model.safetensors.index.json",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "spiece.model",
    "spm.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)
_SAMPLES: Final = 64
_SAMPLE_BYTES: Final = 64 * 1024


def revision(root: Path, *, transformer: Path, others: Iterable[Path], weights: Iterable[Path]) -> str:
    """``sha256:`` and 32 hexadecimal digits over sorted (relative path, content) pairs.

    ``transformer`` is the folder of config and tokenizer; ``others`` are further files that reach the vectors:
    configuration, and code where it is run; ``weights`` are sampled, see `_add_weights`.
    """
    texts = {transformer / item for item in _FILES} | {*others}
    sampled = {*weights}
    digest = hashlib.sha256()
    present = [path for path in texts | sampled if path.is_file()]
    for path in sorted(present, key=lambda item: item.relative_to(root).as_posix()):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0")
        try:
            if path in sampled:
                _add_weights(digest, path)
            else:
                content = path.read_bytes()
                digest.update(len(content).to_bytes(8, "big") + content)
        except OSError as error:
            raise unreadable(path, error) from error
    return f"sha256:{digest.hexdigest()[:32]}"


def _add_weights(digest: hashlib._Hash, path: Path) -> None:
    """Size, safetensors header, and 64 evenly spaced samples of 64 KiB.

    Samples, because a 16 GB model would take half a minute to read and takes milliseconds this way, on
    every start of every worker and producer. Training moves every matrix it touches, and a sample falls
    into every 1/64 of the file, so two trained models do not pass for one; this is no defence against
    someone who alters single weights on purpose.
    """
    size = path.stat().st_size
    header = read_header(path)[0] if path.suffix == ".safetensors" else b""
    digest.update(size.to_bytes(8, "big") + header)
    last = max(size - _SAMPLE_BYTES, 0)
    with path.open("rb") as file:
        for sample in range(_SAMPLES):
            file.seek(last * sample // (_SAMPLES - 1))
            digest.update(file.read(_SAMPLE_BYTES))
