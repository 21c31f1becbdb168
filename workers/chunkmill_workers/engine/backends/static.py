"""Static models: the vector of a text is the mean of the vectors of its tokens, which are read from a table.

There is no forward pass to speak of, so they run on the CPU whatever the device, and in fp32: nearly all of the time
goes to the tokenizer. torch's ``embedding_bag`` reads the table once and keeps no token vectors; NumPy's
``table[ids]`` and ``add.reduceat`` write and read each of them again (docs/decisions/0085 has the measurement).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from chunkmill.errors import ModelLoadError
from chunkmill.models import ModelFolder
from chunkmill.models.static import NAMES, WEIGHTS
from chunkmill_workers.engine.backends import TokenVectors
from chunkmill_workers.engine.windows import Ids

STATIC_BATCH_TOKENS = 65_536
"""The most tokens of a pass unless EMBEDDING_BATCH_TOKENS says otherwise."""


class StaticBackend:
    """See :class:`chunkmill_workers.engine.backends.Backend`. The mean of a row is given as the vector of one token."""

    name = "static"
    packed = True
    concurrent = True

    def __init__(self, table: torch.Tensor) -> None:
        self._table = table
        self.device = torch.device("cpu")
        self.dtype = torch.float32
        self.embedding_rows = len(table)

    @classmethod
    def load(cls, folder: ModelFolder) -> StaticBackend:
        """The table of a model whose folder is ``static``. Raises ModelLoadError."""
        from safetensors.torch import load_file

        file = folder.transformer / WEIGHTS
        try:
            tensors = load_file(str(file))
            table = _table(tensors)
        except Exception as error:
            raise ModelLoadError(f"{file} cannot be read ({type(error).__name__}: {error})") from error
        return cls(table)

    def __call__(self, rows: Sequence[Ids], *, only: NDArray[np.int64] | None = None) -> TokenVectors:
        ends = np.cumsum([len(row) for row in rows], dtype=np.int32)
        starts = np.concatenate((np.zeros(1, np.int32), ends[:-1]))
        ids = torch.from_numpy(np.concatenate(rows))
        with torch.inference_mode():
            means = functional.embedding_bag(ids, self._table, torch.from_numpy(starts), mode="mean")
        return TokenVectors(means[:, None], torch.ones(len(rows), dtype=torch.int64))


def _table(tensors: Mapping[str, Any]) -> torch.Tensor:
    """(tokens, dimensions) fp32. model2vec's ``mapping`` and ``weights`` are folded in, as sentence-transformers does.

    It rounds each product to the format of the table; for a table in half precision this keeps fp32.
    """
    table: torch.Tensor = next(tensors[name] for name in NAMES if name in tensors).float()
    if NAMES[0] not in tensors:
        if "mapping" in tensors:
            table = table[tensors["mapping"].long()]
        if "weights" in tensors:
            table = table * tensors["weights"].float()[:, None]
    return table.contiguous()
