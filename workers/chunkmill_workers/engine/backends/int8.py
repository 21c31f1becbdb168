"""The precision int8: our own forward pass with matrix products in int8, calibrated while the model is loaded."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from chunkmill.domain.spaces import OnLong, SpaceSpec
from chunkmill.errors import InvalidSetting
from chunkmill_workers.engine.backends import TokenVectors
from chunkmill_workers.engine.backends.native import NativeBackend
from chunkmill_workers.engine.encoder import calibration
from chunkmill_workers.engine.encoder.architectures import NATIVE_ARCHITECTURES, Build, build_encoder
from chunkmill_workers.engine.encoder.int8 import Observer, Quantizer
from chunkmill_workers.engine.encoder.layout import lay_out
from chunkmill_workers.engine.pooling import Head
from chunkmill_workers.engine.precision import cpu_has_int8
from chunkmill_workers.engine.tokenizer import TextTokenizer
from chunkmill_workers.engine.windows import Ids, make_rows

logger = logging.getLogger(__name__)

# all-MiniLM-L6-v2 has 0.9987; toy models of every family with random weights have at least 0.997.
LEAST_COSINE: Final = 0.99
"""A model is served in int8 only if its mean cosine to fp32 on the calibration texts is at least this."""

_INSTEAD: Final = "set EMBEDDING_PRECISION=float (or enqueue with precision='float'), which is another space"
_PASS_TOKENS: Final = 1024
_CHECK_EVERY: Final = 4
"""Every fourth calibration text is embedded in int8 to check the model before the engine serves."""


def require_int8(device: torch.device, backend: str, dtype: torch.dtype) -> None:
    """Raise InvalidSetting if int8 vectors would be wrong, or slower than in half precision."""
    if device.type != "cpu":
        raise InvalidSetting(
            f"precision int8 runs on a CPU and this engine is on {device}, where half precision is fast: {_INSTEAD}, "
            "or set EMBEDDING_DEVICE=cpu"
        )
    if backend not in ("auto", "native"):
        raise InvalidSetting(
            f"only the native backend has precision int8, and EMBEDDING_BACKEND is {backend}: leave it at auto, "
            f"or {_INSTEAD}"
        )
    if dtype not in (torch.bfloat16, torch.float32):
        raise InvalidSetting(
            "with precision int8 the rest of the model runs in bf16 or fp32, and EMBEDDING_DTYPE asks for "
            f"{str(dtype).removeprefix('torch.')}: leave it at auto"
        )
    if not cpu_has_int8():
        # Without these instructions, 8-bit products are summed in 16 bits. The sums overflow, and the vectors are
        # wrong.
        raise InvalidSetting(
            "precision int8 needs a CPU with AVX512-VNNI, AVX-VNNI or AMX-INT8, and this one has none of them: "
            f"{_INSTEAD}, or give the work to a worker on such a CPU"
        )


class Int8Backend(NativeBackend):
    """See :class:`~chunkmill_workers.engine.backends.Backend`. ``dtype`` is that of attention; products are in int8."""

    def __call__(self, rows: Sequence[Ids], *, only: NDArray[np.int64] | None = None) -> TokenVectors:
        """The token vectors of ``rows``. With attention in fp32, only rows of the same length share a pass.

        Beside longer rows a value may be a bit larger and be rounded up instead of down. This difference grows from
        layer to layer until it is as large as the rounding of the whole model: 5 of 230 texts then had another vector
        than alone, the worst with a cosine of 0.9989. With attention in bf16 the vectors of all 510 texts were the
        same.
        """
        lengths = np.array([len(row) for row in rows])
        if self.dtype == torch.bfloat16 or (lengths == lengths[0]).all():
            return super().__call__(rows, only=only)
        parts: list[tuple[NDArray[np.intp], torch.Tensor]] = []
        for length in np.unique(lengths):
            at = np.flatnonzero(lengths == length)
            part = super().__call__([rows[int(row)] for row in at], only=None if only is None else only[at])
            parts.append((at, part.vectors))
        longest, hidden = parts[-1][1].shape[1:]
        vectors = torch.zeros(len(rows), longest, hidden)
        for at, values in parts:
            vectors[torch.from_numpy(at), : values.shape[1]] = values.float()
        return TokenVectors(
            vectors, torch.from_numpy(lengths) if only is None else torch.ones(len(rows), dtype=torch.int64)
        )

    def careful_twin(self) -> Self:
        """A backend with the same products and with attention that holds scores of any size.

        It is for texts whose vector is not finite. A vector in fp32 would not belong to an int8 space.
        """
        twin = type(self)(self._encoder, device=self.device, pad_id=self._pad_id)
        twin.careful = True
        return twin


def load_int8(
    model: Any,
    build: Build,
    *,
    spec: SpaceSpec,
    tokenizer: TextTokenizer,
    config: Mapping[str, Any],
    head: Head,
    pad_id: int,
) -> Int8Backend:
    """The model in int8, with ranges of its activations that are measured in fp32 on the calibration texts.

    Raises InvalidSetting if the model cannot be served in int8, and TokenizerMismatch before ids of a wrong tokenizer
    reach the model.
    """
    started = time.perf_counter()
    rows = calibration_rows(tokenizer, spec)
    observer = Observer(slots=_PASS_TOKENS)
    exact = build_encoder(model, replace(build, dtype=torch.float32, products=observer))
    if exact is None:
        raise InvalidSetting(
            f"precision int8 does not know the architecture {model.config.model_type}, or not with this configuration: "
            f"it knows {', '.join(NATIVE_ARCHITECTURES)}. For this model {_INSTEAD}"
        )
    tokenizer.check(config, len(exact.words))
    expected = torch.zeros(len(rows), spec.dimensions)
    with torch.inference_mode():
        for at in _passes(rows):
            layout = lay_out([rows[row] for row in at], packed=False, pad_id=pad_id, device=build.device)
            observer.inside = None if layout.full else layout.inside.flatten()
            vectors = exact(layout, varlen=None, careful=True).view(len(layout), layout.longest, -1)
            expected[at] = head(TokenVectors(vectors, layout.lengths), skips=np.zeros(len(at), np.int32))
        quantizer = Quantizer(observer.ranges, slots=build.slots, half=build.dtype)
        encoder = build_encoder(model, replace(build, products=quantizer))
    assert encoder is not None  # noqa: S101 - it was built a moment ago
    backend = Int8Backend(encoder, device=build.device, pad_id=pad_id)
    cosine = _cosine(backend, rows[::_CHECK_EVERY], expected[::_CHECK_EVERY], head)
    seconds = time.perf_counter() - started
    logger.info("%s in int8: calibrated in %.1f s, mean cosine to fp32 %.4f", spec.model, seconds, cosine)
    if not cosine >= LEAST_COSINE:
        raise InvalidSetting(
            f"in int8 the vectors of model {spec.model!r} differ too much from fp32: their mean cosine on the "
            f"calibration texts is {cosine:.4f}, and at least {LEAST_COSINE} is required. For this model {_INSTEAD}"
        )
    return backend


def _cosine(backend: Int8Backend, rows: Sequence[Ids], expected: torch.Tensor, head: Head) -> float:
    """Mean cosine of the vectors of ``rows`` to ``expected``, (n, dimensions) fp32. NaN if a vector is not finite."""
    total = 0.0
    with torch.inference_mode():
        for at in _passes(rows):
            vectors = head(backend([rows[row] for row in at]), skips=np.zeros(len(at), np.int32))
            total += float(functional.cosine_similarity(vectors, expected[at]).sum())
    return total / len(rows)


def calibration_rows(tokenizer: TextTokenizer, spec: SpaceSpec) -> list[Ids]:
    """The calibration texts as the model reads them: with its prompts, and cut to its limit."""
    rows: list[Ids] = []
    for texts, prompt in (
        (calibration.DOCUMENTS, spec.document_prompt),
        (calibration.QUERIES, spec.query_prompt),
    ):
        frame = tokenizer.frame(prompt)
        rows += make_rows(tokenizer.encode(texts, prompt), spec.max_tokens, frame, OnLong.TRUNCATE).ids
    return rows


def _passes(rows: Sequence[Ids]) -> Iterator[list[int]]:
    """The positions of the rows of each pass. Rows of similar lengths are together."""
    order = sorted(range(len(rows)), key=lambda row: -len(rows[row]))
    first = 0
    while first < len(order):
        count = max(_PASS_TOKENS // len(rows[order[first]]), 1)
        yield order[first : first + count]
        first += count
