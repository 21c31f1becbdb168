"""A model whose files are damaged, which its fingerprint does not show."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path

from chunkmill.models.digest import _SAMPLE_BYTES, _SAMPLES
from chunkmill.models.locate import bundled_folder

MATRIX = "encoder.layer.3.intermediate.dense.weight"


def damaged_model(folder: Path) -> Path:
    """Return a copy of the bundled model in which a part of one weight matrix is zero, as a bad disk may leave it.

    The part lies between two of the samples that a revision is made of, so the fingerprint is that of the good model.
    """
    bundled = bundled_folder()
    assert bundled is not None
    shutil.copytree(bundled, folder)
    with (folder / "model.safetensors").open("r+b") as file:
        size = file.seek(0, 2)
        file.seek(0)
        data = 8 + int.from_bytes(file.read(8), "little")
        begin, end = (data + offset for offset in json.loads(file.read(data - 8))[MATRIX]["data_offsets"])
        samples = [(size - _SAMPLE_BYTES) * i // (_SAMPLES - 1) for i in range(_SAMPLES)]
        gaps = [(max(begin, a + _SAMPLE_BYTES), min(end, b)) for a, b in itertools.pairwise(samples)]
        begin, end = max(gaps, key=lambda gap: gap[1] - gap[0])
        file.seek(begin)
        file.write(bytes(end - begin))
    return folder
