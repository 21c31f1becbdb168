"""A model's revision: a digest of the files that its vectors depend on. It is the same on every machine."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from chunkmill.models.files import MOST_FILE_BYTES, unreadable
from chunkmill.models.weights import read_header
from chunkmill.system.files import open_regular, read_at_most

# Files of a transformer's folder that the vectors depend on. They do not depend on README, onnx/, openvino/, training
# records, and config_sentence_transformers.json (it has versions, and prompts, which are fields of the space).
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


def revision(root: Path, *, transformers: Iterable[Path], others: Iterable[Path], weights: Iterable[Path]) -> str:
    """``sha256:`` and 32 hexadecimal digits of the sorted pairs of relative path and content.

    ``transformers`` are the folders of configuration and tokenizer, one or two. ``others`` are further files that the
    vectors depend on: configuration, and code if it is run. Of ``weights`` only samples are read, see `_add_weights`.
    Raises UnknownModel for a file that cannot be read.
    """
    texts = {transformer / item for transformer in transformers for item in _FILES} | {*others}
    sampled = {*weights}
    digest = hashlib.sha256()
    present = [path for path in texts | sampled if path.is_file()]
    for path in sorted(present, key=lambda item: item.relative_to(root).as_posix()):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0")
        try:
            if path in sampled:
                _add_weights(digest, path)
            else:
                content = read_at_most(path, MOST_FILE_BYTES)
                digest.update(len(content).to_bytes(8, "big") + content)
        except OSError as error:
            raise unreadable(path, error) from error
    return f"sha256:{digest.hexdigest()[:32]}"


def _add_weights(digest: hashlib._Hash, path: Path) -> None:
    """Add size, safetensors header, and 64 evenly spaced samples of 64 KiB to ``digest``.

    Every start of a worker or a producer reads them. Samples take milliseconds, while all of a 16 GB model would take
    half a minute. Training changes whole matrices, and every 1/64 of the file has a sample, so two trained models have
    different digests. The digest does not protect against someone who changes single weights on purpose.
    """
    header = read_header(path)[0] if path.suffix == ".safetensors" else b""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        digest.update(size.to_bytes(8, "big") + header)
        last = max(size - _SAMPLE_BYTES, 0)
        for sample in range(_SAMPLES):
            file.seek(last * sample // (_SAMPLES - 1))
            digest.update(file.read(_SAMPLE_BYTES))
