"""From token vectors to text vectors: pooling, Dense modules and normalisation, in the model's order.

All of it runs in fp32, whatever the number format of the model: with pooling in bf16 the cosine to fp32 is only 0.996
(measured on sentence-transformers). The formulas are those of sentence-transformers 6.2 (``Pooling``, ``Dense``,
``LayerNorm``, ``Normalize``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from chunkmill.domain.spaces import AnyPooling, Pooling
from chunkmill.errors import ModelLoadError
from chunkmill.models import DenseLayer, LayerNormLayer, ModelFolder
from chunkmill_workers.engine.backends import TokenVectors
from chunkmill_workers.engine.encoder.layout import to_device

_ACTIVATIONS = {
    "GELU": functional.gelu,
    "Identity": lambda values: values,
    "ReLU": functional.relu,
    "SiLU": functional.silu,
    "Sigmoid": torch.sigmoid,
    "Tanh": torch.tanh,
}


def pool(hidden: TokenVectors, pooling: AnyPooling, skips: torch.Tensor | None = None) -> torch.Tensor:
    """Text vectors, (n, hidden) fp32, from token vectors, (n, longest, hidden) or (tokens, hidden) of packed texts.

    Several poolings give (n, poolings × hidden), one behind the other. ``skips`` is (n,) int: how many leading tokens
    of each row are left out, for a model that does not pool its prompt.
    """
    vectors, lengths, owners = hidden.vectors.float(), hidden.lengths, hidden.owners
    pooled = [
        _pool_padded(vectors, lengths, mode, skips)
        if owners is None
        else _pool_packed(vectors, lengths, owners, mode, skips)
        for mode in pooling.modes
    ]
    return pooled[0] if len(pooled) == 1 else torch.cat(pooled, dim=-1)


def _pool_padded(
    vectors: torch.Tensor, lengths: torch.Tensor, mode: Pooling, skips: torch.Tensor | None
) -> torch.Tensor:
    at = torch.arange(vectors.shape[1], device=vectors.device)
    inside = at < lengths[:, None]  # (n, longest)
    if skips is not None:
        inside = inside & (at >= skips[:, None])
    match mode:
        case Pooling.CLS:
            first = inside.int().argmax(dim=1)  # the first 1; 0 if there is none
            return vectors[torch.arange(len(vectors), device=vectors.device), first]
        case Pooling.LAST_TOKEN:
            return vectors[torch.arange(len(vectors), device=vectors.device), lengths - 1]
        case Pooling.MAX:
            return vectors.masked_fill(~inside[..., None], float("-inf")).amax(dim=1)
        case Pooling.MEAN | Pooling.MEAN_SQRT_LEN:
            total = vectors.masked_fill(~inside[..., None], 0.0).sum(dim=1)
            count = inside.sum(dim=1, keepdim=True).float().clamp(min=1e-9)
            return total / (count if mode is Pooling.MEAN else count.sqrt())
        case Pooling.WEIGHTED_MEAN:
            # A prompt that is left out keeps its places: the text's own first token does not count once.
            weights = ((at + 1) * inside).float()[..., None]
            total = (vectors.masked_fill(~inside[..., None], 0.0) * weights).sum(dim=1)
            return total / weights.sum(dim=1).clamp(min=1e-9)
        case Pooling.PROVIDER:
            raise ValueError("a provider's model has no pooling here")


def _pool_packed(
    vectors: torch.Tensor, lengths: torch.Tensor, owners: torch.Tensor, mode: Pooling, skips: torch.Tensor | None
) -> torch.Tensor:
    """As `pool`, for packed texts: each text alone, in the order of its tokens, so no vector depends on neighbours.

    A padded grid of (n, longest) would take many times the memory if one text is long and many are short.
    """
    starts = lengths.cumsum(0) - lengths
    if skips is None:
        skips = torch.zeros_like(lengths)
    match mode:
        case Pooling.CLS:
            return vectors[starts + torch.where(skips < lengths, skips, 0)]
        case Pooling.LAST_TOKEN:
            return vectors[starts + lengths - 1]
    at = torch.arange(len(vectors), device=vectors.device) - starts[owners]
    outside = at < skips[owners]
    nothing = float("-inf") if mode is Pooling.MAX else 0.0
    vectors = vectors.masked_fill(outside[:, None], nothing)
    if mode is Pooling.WEIGHTED_MEAN:
        vectors = vectors * (at + 1)[:, None]
    # unsafe: the lengths are not checked, because a check would wait for the GPU.
    reduce = "max" if mode is Pooling.MAX else "sum"
    pooled = torch.segment_reduce(vectors, reduce, lengths=lengths, axis=0, unsafe=True)
    if mode is Pooling.MAX:
        return pooled
    if mode is Pooling.WEIGHTED_MEAN:
        # The sum of the places of the tokens that are pooled, (skips, lengths], without another pass over them.
        left_out = torch.minimum(skips, lengths)
        weights = (lengths * (lengths + 1) - left_out * (left_out + 1)) // 2
        return pooled / weights[:, None].float().clamp(min=1e-9)
    count = (lengths - skips)[:, None].float().clamp(min=1e-9)
    return pooled / (count if mode is Pooling.MEAN else count.sqrt())


@dataclass(frozen=True, slots=True)
class _Dense:
    """A Dense module: ``activation(vectors @ weight.T + bias)`` with (out, in) weights, in fp32.

    With ``add``, its input is added, or with a ``residual`` of (out, in) that product of its input.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    activation: str
    add: bool
    residual: torch.Tensor | None

    def __call__(self, vectors: torch.Tensor) -> torch.Tensor:
        values: torch.Tensor = _ACTIVATIONS[self.activation](functional.linear(vectors, self.weight, self.bias))
        if not self.add:
            return values
        return values + (vectors if self.residual is None else functional.linear(vectors, self.residual))


@dataclass(frozen=True, slots=True)
class _LayerNorm:
    """A LayerNorm module, in fp32."""

    weight: torch.Tensor
    bias: torch.Tensor

    def __call__(self, vectors: torch.Tensor) -> torch.Tensor:
        return functional.layer_norm(vectors, self.weight.shape, self.weight, self.bias)


class Head:
    """The modules that follow the transformer in one model folder."""

    def __init__(self, folder: ModelFolder, device: torch.device) -> None:
        self._mode: AnyPooling = Pooling.MEAN if folder.static else folder.spec.pooling
        self._include_prompt = folder.include_prompt
        self._normalize = folder.spec.normalize
        inner = folder.modules[:-1] if self._normalize else folder.modules
        self._inner = [_normalize if isinstance(item, str) else _load(item, device) for item in inner]

    def only(self, lengths: Sequence[int], skips: NDArray[np.int32]) -> NDArray[np.int64] | None:
        """(n,) int64: the position of the one token of every row that is pooled; None if all tokens are."""
        if self._mode is Pooling.LAST_TOKEN:
            return np.array(lengths, np.int64) - 1
        if self._mode is not Pooling.CLS:
            return None
        first = np.zeros(len(lengths), np.int64) if self._include_prompt else skips.astype(np.int64)
        return np.where(first < lengths, first, 0)

    def __call__(self, hidden: TokenVectors, *, skips: NDArray[np.int32]) -> torch.Tensor:
        """Vectors after all modules but a last Normalize, (n, dimensions) fp32. Windows of a text are averaged so.

        ``hidden`` holds every token of a row, or only the one that `only` names. ``skips`` is (n,) int32, as in `pool`.
        """
        picked = self._mode in (Pooling.CLS, Pooling.LAST_TOKEN)
        leave_out = not (picked or self._include_prompt) and bool(skips.any())
        vectors = pool(hidden, self._mode, to_device(skips, hidden.vectors.device) if leave_out else None)
        with torch.inference_mode():
            for module in self._inner:
                vectors = module(vectors)
            return vectors

    def finish(self, vectors: torch.Tensor) -> torch.Tensor:
        """Vectors after the last Normalize, if the model ends with one, (n, dimensions) fp32."""
        return _normalize(vectors) if self._normalize else vectors


def _normalize(vectors: torch.Tensor) -> torch.Tensor:
    return functional.normalize(vectors, p=2, dim=-1)


def _load(layer: DenseLayer | LayerNormLayer, device: torch.device) -> _Dense | _LayerNorm:
    from safetensors.torch import load_file

    file = layer.weights
    try:
        pickled = file.suffix == ".bin"  # models.folder refuses a pickle that the operator does not trust
        tensors = torch.load(file, map_location="cpu", weights_only=True) if pickled else load_file(str(file))
        prefix = "linear" if isinstance(layer, DenseLayer) else "norm"
        weight = tensors[f"{prefix}.weight"].float().to(device)
        has_bias = isinstance(layer, LayerNormLayer) or layer.bias
        bias = tensors[f"{prefix}.bias"].float().to(device) if has_bias else None
        projects = isinstance(layer, DenseLayer) and layer.residual and layer.in_features != layer.out_features
        residual = tensors["residual.weight"].float().to(device) if projects else None
    except Exception as error:
        raise ModelLoadError(f"{file} cannot be read ({type(error).__name__}: {error})") from error
    stated = (layer.out_features, layer.in_features) if isinstance(layer, DenseLayer) else (layer.in_features,)
    for matrix in [weight] if residual is None else [weight, residual]:
        if tuple(matrix.shape) != stated:
            raise ModelLoadError(
                f"{file} holds a {tuple(matrix.shape)} matrix and its config.json states {stated}: copy the folder "
                "again"
            )
    if bias is not None and tuple(bias.shape) != stated[:1]:
        raise ModelLoadError(
            f"{file} holds a bias of {tuple(bias.shape)} and its config.json states {stated[:1]}: copy the folder again"
        )
    if isinstance(layer, LayerNormLayer):
        assert bias is not None  # noqa: S101 - it is read above
        return _LayerNorm(weight, bias)
    return _Dense(weight, bias, layer.activation, layer.residual, residual)
