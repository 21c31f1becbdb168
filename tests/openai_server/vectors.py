"""The vectors the server answers with: the same for the same model, dimensions and text, in every process."""

from __future__ import annotations

import base64
import hashlib

import numpy as np
import numpy.typing as npt

from tests.openai_server.config import DEFAULT_MODEL

Vector = npt.NDArray[np.float32]


def text_hash(text: str) -> str:
    """What the bill knows a text by: the SHA-256 of its UTF-8 bytes, in hex."""
    return hashlib.sha256(text.encode()).hexdigest()


def vector_for(text: str, dimensions: int, model: str = DEFAULT_MODEL) -> Vector:
    """``(dimensions,) float32`` of length one."""
    seed = hashlib.sha256(f"{model}\n{dimensions}\n{text}".encode()).digest()
    values = np.random.default_rng(int.from_bytes(seed)).standard_normal(dimensions, dtype=np.float32)
    return values / np.linalg.norm(values)


def encoded(vector: Vector, encoding_format: str) -> list[float] | str:
    """As it stands in an answer: numbers, or base64 of little-endian float32."""
    if encoding_format == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    numbers: list[float] = vector.tolist()
    return numbers
