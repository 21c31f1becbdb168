"""The int8 profile: our own forward pass with products in int8, calibrated while it is loaded."""

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
from chunkmill_workers.engine.backends import Hidden
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

# all-MiniLM-L6-v2 has 0.9987; toy models of every family, with random weights, 0.997 and more.
LEAST_COSINE: Final = 0.99
"""Mean cosine to fp32 on the calibration texts under which a model is not served in int8."""

_INSTEAD: Final = "set EMBEDDING_PRECISION=float (or enqueue with precision='float'), which is another space"
_PASS_TOKENS: Final = 1024
_CHECKED: Final = 4
"""Of so many calibration texts one is embedded in int8 before the engine serves."""


def require_int8(device: torch.device, backend: str, dtype: torch.dtype) -> None:
    """Raise InvalidSetting where int8 vectors cannot be made as their space says, or only slowly."""
    if device.type != "cpu":
        raise InvalidSetting(
            f"precision int8 runs on a CPU and this engine is on {device}, where half precision is fast: {_INSTEAD}, "
            "or set EMBEDDING_DEVICE=cpu"
        )
    if backend not in ("auto", "native"):
        raise InvalidSetting(
            f"precision int8 is a part of the native backend, and EMBEDDING_BACKEND is {backend}: leave it at auto, "
            f"or {_INSTEAD}"
        )
    if dtype not in (torch.bfloat16, torch.float32):
        raise InvalidSetting(
            "with precision int8 the rest of the model runs in bf16 or fp32, and EMBEDDING_DTYPE asks for "
            f"{str(dtype).removeprefix('torch.')}: leave it at auto"
        )
    if not cpu_has_int8():
        # Without the instructions, products of 8 bits are added up in 16: they overflow, and the vectors are wrong.
        raise InvalidSetting(
            "precision int8 needs a CPU with AVX512-VNNI, AVX-VNNI or AMX-INT8, and this one has none of them: "
            f"{_INSTEAD}, or give the work to a worker on such a CPU"
        )


class Int8Backend(NativeBackend):
    """See :class:`~chunkmill_workers.engine.backends.Backend`. ``dtype`` is attention's; products are always int8."""

    def __call__(self, rows: Sequence[Ids], *, only: NDArray[np.int64] | None = None) -> Hidden:
        """In fp32, rows of one length at a time.

        A value that is a bit larger beside longer rows may be rounded up where it was rounded down, and that difference
        grows from layer to layer to the size of all rounding: 5 of 230 texts then had another vector than alone,
        the worst at a cosine of 0.9989. With attention in bf16 all of 510 were the same.
        """
        lengths = np.array([len(row) for row in rows])
        if self.dtype == torch.bfloat16 or (lengths == lengths[0]).all():
            return super().__call__(rows, only=only)
        found: list[tuple[NDArray[np.intp], torch.Tensor]] = []
        for length in np.unique(lengths):
            at = np.flatnonzero(lengths == length)
            part = super().__call__([rows[int(row)] for row in at], only=None if only is None else only[at])
            found.append((at, part.vectors))
        longest, hidden = found[-1][1].shape[1:]
        vectors = torch.zeros(len(rows), longest, hidden)
        for at, values in found:
            vectors[torch.from_numpy(at), : values.shape[1]] = values.float()
        return Hidden(vectors, torch.from_numpy(lengths) if only is None else torch.ones(len(rows), dtype=torch.int64))

    def careful_twin(self) -> Self:
        """The same products, with attention that holds scores of any size.

        For texts whose vector is not finite: one in fp32 would be no vector of an int8 space.
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
    """Find the ranges of the model's activations in fp32, and make it again in int8.

    Raises InvalidSetting, and TokenizerMismatch before a wrong tokenizer's ids reach the model.
    """
    started = time.perf_counter()
    rows = calibration_rows(tokenizer, spec)
    observer = Observer(slots=_PASS_TOKENS)
    exact = build_encoder(model, replace(build, dtype=torch.float32, products=observer))
    if exact is None:
        raise InvalidSetting(
            f"precision int8 does not know the architecture {model.config.model_type} (or something its configuration "
            f"asks for): it has {', '.join(NATIVE_ARCHITECTURES)}. For this model {_INSTEAD}"
        )
    tokenizer.check(config, len(exact.words))
    expected = torch.zeros(len(rows), spec.dimensions)
    with torch.inference_mode():
        for at in _passes(rows):
            layout = lay_out([rows[row] for row in at], packed=False, pad_id=pad_id, device=build.device)
            observer.inside = None if layout.full else layout.inside.flatten()
            vectors = exact(layout, varlen=None, careful=True).view(len(layout), layout.longest, -1)
            expected[at] = head(Hidden(vectors, layout.lengths), skips=np.zeros(len(at), np.int32))
        quantizer = Quantizer(observer.ranges, slots=build.slots, half=build.dtype)
        encoder = build_encoder(model, replace(build, products=quantizer))
    assert encoder is not None  # noqa: S101 - it was built a moment ago
    backend = Int8Backend(encoder, device=build.device, pad_id=pad_id)
    cosine = _cosine(backend, rows[::_CHECKED], expected[::_CHECKED], head)
    seconds = time.perf_counter() - started
    logger.info("%s in int8: calibrated in %.1f s, mean cosine to fp32 %.4f", spec.model, seconds, cosine)
    if not cosine >= LEAST_COSINE:
        raise InvalidSetting(
            f"in int8 model {spec.model!r} loses too much: a mean cosine of {cosine:.4f} to its fp32 vectors of the "
            f"calibration texts, and at least {LEAST_COSINE} is wanted. For this model {_INSTEAD}"
        )
    return backend


def _cosine(backend: Int8Backend, rows: Sequence[Ids], expected: torch.Tensor, head: Head) -> float:
    """Mean of ``rows``, to (n, dimensions) fp32 vectors. NaN where a vector is not finite."""
    total = 0.0
    with torch.inference_mode():
        for at in _passes(rows):
            found = head(backend([rows[row] for row in at]), skips=np.zeros(len(at), np.int32))
            total += float(functional.cosine_similarity(found, expected[at]).sum())
    return total / len(rows)


def calibration_rows(tokenizer: TextTokenizer, spec: SpaceSpec) -> list[Ids]:
    """As the model reads them: with its prompts, cut to its limit."""
    rows: list[Ids] = []
    for texts, prompt in (
        (calibration.DOCUMENTS, spec.document_prompt),
        (calibration.QUERIES, spec.query_prompt),
    ):
        frame = tokenizer.frame(prompt)
        rows += make_rows(tokenizer.encode(texts, prompt), spec.max_tokens, frame, OnLong.TRUNCATE).ids
    return rows


def _passes(rows: Sequence[Ids]) -> Iterator[list[int]]:
    """Rows of like lengths together."""
    order = sorted(range(len(rows)), key=lambda row: -len(rows[row]))
    first = 0
    while first < len(order):
        count = max(_PASS_TOKENS // len(rows[order[first]]), 1)
        yield order[first : first + count]
        first += count
