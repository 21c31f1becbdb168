"""Token vectors to text vectors: pooling, Dense modules, normalisation, in the model's order.

All of it in fp32 whatever the model ran in: pooling in bf16 costs a cosine of 0.996 against fp32 (measured
on sentence-transformers' own). The formulas are those of sentence-transformers 6.2 (``Pooling``, ``Dense``,
``Normalize``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from chunkmill.domain.spaces import Pooling
from chunkmill.errors import ModelLoadError
from chunkmill.models import DenseLayer, ModelFolder
from chunkmill_workers.engine.backends import Hidden
from chunkmill_workers.engine.encoder.layout import to_device

_ACTIVATIONS = {
    "GELU": functional.gelu,
    "Identity": lambda values: values,
    "ReLU": functional.relu,
    "SiLU": functional.silu,
    "Sigmoid": torch.sigmoid,
    "Tanh": torch.tanh,
}


def pool(hidden: Hidden, mode: Pooling, skips: torch.Tensor | None = None) -> torch.Tensor:
    """(n, hidden) fp32 from (n, longest, hidden), or from (tokens, hidden) of packed texts.

    ``skips`` is (n,) int: the leading tokens of each row that are left out, the special token and the prompt, for
    a model whose prompts are not pooled.
    """
    vectors, lengths = hidden.vectors.float(), hidden.lengths
    if hidden.owners is not None:
        return _pool_packed(vectors, lengths, hidden.owners, mode, skips)
    at = torch.arange(vectors.shape[1], device=vectors.device)
    inside = at < lengths[:, None]  # (n, longest)
    if skips is not None:
        inside = inside & (at >= skips[:, None])
    match mode:
        case Pooling.CLS:
            first = inside.int().argmax(dim=1)  # the first 1; 0 where there is none
            return vectors[torch.arange(len(vectors), device=vectors.device), first]
        case Pooling.LAST_TOKEN:
            return vectors[torch.arange(len(vectors), device=vectors.device), lengths - 1]
        case Pooling.MAX:
            return vectors.masked_fill(~inside[..., None], float("-inf")).amax(dim=1)
        case Pooling.MEAN | Pooling.MEAN_SQRT_LEN:
            total = vectors.masked_fill(~inside[..., None], 0.0).sum(dim=1)
            count = inside.sum(dim=1, keepdim=True).float().clamp(min=1e-9)
            return total / (count if mode is Pooling.MEAN else count.sqrt())
        case Pooling.PROVIDER:
            raise ValueError("a provider's model has no pooling here")


def _pool_packed(
    vectors: torch.Tensor, lengths: torch.Tensor, owners: torch.Tensor, mode: Pooling, skips: torch.Tensor | None
) -> torch.Tensor:
    """Text by text and in the order of its tokens, so that nothing depends on the neighbours.

    A grid of (n, longest) would hold a pass of one long and many short texts many times over.
    """
    starts = lengths.cumsum(0) - lengths
    if skips is None:
        skips = torch.zeros_like(lengths)
    match mode:
        case Pooling.CLS:
            return vectors[starts + torch.where(skips < lengths, skips, 0)]
        case Pooling.LAST_TOKEN:
            return vectors[starts + lengths - 1]
    outside = torch.arange(len(vectors), device=vectors.device) - starts[owners] < skips[owners]
    nothing = float("-inf") if mode is Pooling.MAX else 0.0
    vectors = vectors.masked_fill(outside[:, None], nothing)
    # unsafe: without a look at the lengths, for which a GPU would have to be waited for.
    reduce = "max" if mode is Pooling.MAX else "sum"
    pooled = torch.segment_reduce(vectors, reduce, lengths=lengths, axis=0, unsafe=True)
    if mode is Pooling.MAX:
        return pooled
    count = (lengths - skips)[:, None].float().clamp(min=1e-9)
    return pooled / (count if mode is Pooling.MEAN else count.sqrt())


@dataclass(frozen=True, slots=True)
class _Dense:
    weight: torch.Tensor
    bias: torch.Tensor | None
    activation: str

    def __call__(self, vectors: torch.Tensor) -> torch.Tensor:
        values: torch.Tensor = _ACTIVATIONS[self.activation](functional.linear(vectors, self.weight, self.bias))
        return values


class Head:
    """What follows the transformer in one model folder."""

    def __init__(self, folder: ModelFolder, device: torch.device) -> None:
        self._mode = folder.spec.pooling
        self._include_prompt = folder.include_prompt
        self._normalize = folder.spec.normalize
        inner = folder.modules[:-1] if self._normalize else folder.modules
        self._inner = [_load(item, device) if isinstance(item, DenseLayer) else _normalize for item in inner]

    def only(self, lengths: Sequence[int], skips: NDArray[np.int32]) -> NDArray[np.int64] | None:
        """(n,) int64: the one position of every row that is pooled; None where all of them are."""
        if self._mode is Pooling.LAST_TOKEN:
            return np.array(lengths, np.int64) - 1
        if self._mode is not Pooling.CLS:
            return None
        first = np.zeros(len(lengths), np.int64) if self._include_prompt else skips.astype(np.int64)
        return np.where(first < lengths, first, 0)

    def __call__(self, hidden: Hidden, *, skips: NDArray[np.int32]) -> torch.Tensor:
        """(n, dimensions) fp32: all modules but a last Normalize. Windows of one text are averaged here.

        ``hidden`` holds every token, or the one that ``only`` names.
        """
        picked = self._mode in (Pooling.CLS, Pooling.LAST_TOKEN)
        leave_out = not (picked or self._include_prompt) and bool(skips.any())
        vectors = pool(hidden, self._mode, to_device(skips, hidden.vectors.device) if leave_out else None)
        with torch.inference_mode():
            for module in self._inner:
                vectors = module(vectors)
            return vectors

    def finish(self, vectors: torch.Tensor) -> torch.Tensor:
        """(n, dimensions) fp32: the last Normalize, if the model ends with one."""
        return _normalize(vectors) if self._normalize else vectors


def _normalize(vectors: torch.Tensor) -> torch.Tensor:
    return functional.normalize(vectors, p=2, dim=-1)


def _load(layer: DenseLayer, device: torch.device) -> _Dense:
    from safetensors.torch import load_file

    file = layer.weights
    try:
        pickled = file.suffix == ".bin"  # the folder's reader has refused one that the operator does not trust
        tensors = torch.load(file, map_location="cpu", weights_only=True) if pickled else load_file(str(file))
        weight = tensors["linear.weight"].float().to(device)
        bias = tensors["linear.bias"].float().to(device) if layer.bias else None
    except Exception as error:
        raise ModelLoadError(f"{file} cannot be read ({type(error).__name__}: {error})") from error
    if weight.shape != (layer.out_features, layer.in_features):
        raise ModelLoadError(
            f"{file} holds a {tuple(weight.shape)} matrix and its config.json states "
            f"{(layer.out_features, layer.in_features)}: copy the folder again"
        )
    return _Dense(weight, bias, layer.activation)
