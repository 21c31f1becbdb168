"""Exports a model folder for another backend and checks the export against transformers: ``chunkmill models export``.

It runs in a process of its own, as ``python -m chunkmill_workers.engine.backends.export MODEL --backend onnx``. It
prints one JSON document and needs no network.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import sys
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import torch
from torch.nn import functional

from chunkmill.errors import ChunkmillError, ModelLoadError
from chunkmill.models import ModelFolder, resolve_model
from chunkmill.settings import Settings
from chunkmill_workers.engine.backends import Backend, TokenVectors
from chunkmill_workers.engine.backends.exported import (
    GRAPHS,
    INPUTS,
    MAKE,
    OUTPUT,
    RUN,
    TARGETS,
    Export,
    Statement,
    Target,
    export_folder,
    exports_folder,
    find,
    require,
    why_not_exported,
)
from chunkmill_workers.engine.backends.generic import TransformersBackend
from chunkmill_workers.engine.backends.loading import load_model
from chunkmill_workers.engine.backends.onnx import OnnxBackend
from chunkmill_workers.engine.backends.openvino import OpenVinoBackend, library
from chunkmill_workers.engine.results import TextFailure
from chunkmill_workers.engine.tokenizer import TextTokenizer
from chunkmill_workers.engine.windows import Ids

# The exporter's default. Since opset 20 GELU is one operator, which ONNX Runtime fuses with the bias before it.
OPSET: Final = 20
MIN_COSINE: Final = 0.9999
"""An export is kept only if the cosine of each token's vector to that of transformers is at least this."""

# Texts of very different lengths: in the short ones a sliding window sees nothing but padding far behind their end.
_CHECK_TEXTS: Final = (
    ".",
    "Straßenfest, naïve café, Ωmega",
    "漢字かな交じり文と한국어 텍스트 😀",
    "a" * 300,
    "the quick brown fox jumps over the lazy dog " * 8,
    "A text for the model's last position, or for the 512th. " * 80,
)
_CHECK_TOKENS: Final = 512


def export(folder: ModelFolder, target: Target, *, force: bool = False) -> tuple[Export, bool]:
    """The export of ``folder`` for ``target``, and whether it was made now. Raises ModelLoadError.

    ``force`` makes it again if it exists. It is made and checked in a folder of another name, so it appears complete or
    not at all.
    """
    if (reason := why_not_exported(folder)) is not None:
        raise ModelLoadError(f"backend {target}: model {folder.name!r} cannot be exported, because {reason}")
    require(target, to_export=True)
    at = export_folder(folder, target)
    if at.exists() and not force:
        return find(folder, target), False
    root = exports_folder()
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="making-", dir=root) as scratch:
            new = Path(scratch, "new")
            new.mkdir()
            statement = _make(folder, target, new)
            Export(new, statement).write()
            if at.exists():
                at.rename(Path(scratch, "old"))
            new.rename(at)
    except OSError as error:
        raise ModelLoadError(
            f"the export cannot be written to {root} ({error.strerror}): free some space there, or set XDG_CACHE_HOME "
            "to another folder, for the worker too"
        ) from error
    return Export(at, statement), True


def _make(folder: ModelFolder, target: Target, new: Path) -> Statement:
    """Write graph and weights to ``new``, and compare their vectors with those of transformers."""
    model = load_model(folder, dtype=torch.float32)
    kind = model.config.model_type
    tokenizer = TextTokenizer.load(folder.transformer, lowercase=folder.lowercase)
    pad_id = tokenizer.pad_id or 0
    reference = TransformersBackend(model, dtype=torch.float32, device=torch.device("cpu"), pad_id=pad_id)
    batches = _check_batches(tokenizer, min(folder.spec.max_tokens, _CHECK_TOKENS))
    expected = [reference(batch) for batch in batches]
    graph = new / GRAPHS[target]
    try:
        with warnings.catch_warnings():
            # Both converters copy torch's own pytrees, and torch warns about the way in which it does that.
            warnings.filterwarnings("ignore", ".*LeafSpec.* is deprecated", FutureWarning)
            _write(_trace(model), target, graph)
    except Exception as error:
        raise ModelLoadError(
            f"backend {target}: model {folder.name!r} ({kind}) cannot be exported ({_cause(error)}): "
            "use the backend native or transformers for it"
        ) from error
    rows = reference.embedding_rows
    lowest = _min_cosine(expected, batches, _open(target, graph, rows, pad_id))
    if not lowest >= MIN_COSINE:  # NaN, too
        raise ModelLoadError(
            f"backend {target}: the export of model {folder.name!r} ({kind}) gives other vectors than the model: the "
            f"lowest cosine of a token to transformers is {lowest:.6f}, and at least {MIN_COSINE} is required. Nothing "
            "was kept; use the backend native or transformers for it"
        )
    packages = ("torch", "transformers", *MAKE[target], *RUN[target])
    return Statement(
        backend=target,
        model=folder.name,
        revision=folder.spec.revision,
        embedding_rows=rows,
        opset=OPSET if target == "onnx" else None,
        min_cosine=lowest,
        versions={package: importlib.metadata.version(package) for package in packages},
    )


def _trace(model: Any) -> torch.export.ExportedProgram:
    """The graph of ``model`` for any number of rows of any length."""
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(_finite_masks())
    example = (torch.ones(2, 8, dtype=torch.int64), torch.ones(2, 8, dtype=torch.int64))
    any_size = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    with torch.no_grad():
        return torch.export.export(_TokenVectors(model), example, dynamic_shapes=(any_size, any_size), strict=False)


class _TokenVectors(torch.nn.Module):
    """A model that returns nothing but its token vectors."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        # Without the option, a causal model returns a cache of keys and values that nobody reads.
        self._options = {"use_cache": False} if hasattr(model.config, "use_cache") else {}
        self.eval()

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        output = self.model(input_ids=input_ids, attention_mask=attention_mask, **self._options)
        hidden: torch.Tensor = output.last_hidden_state
        return hidden


def _finite_masks() -> str:
    """Register SDPA with masks of 0 and -1e30 in transformers, and return its name there.

    The masks of transformers are of True and False. Far behind the end of a short text, a sliding window sees nothing
    but padding. If a token may look at no other, OpenVINO's softmax gives NaN, which the next layer spreads to all
    tokens. With -1e30 it gives a mean of padding, which nobody reads. -1e30 is the same number in bf16, and hides a
    token as surely as -inf.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    def mask(*args: Any, **options: Any) -> torch.Tensor | None:
        seen = sdpa_mask(*args, **options | {"allow_is_causal_skip": False})
        return None if seen is None else torch.where(seen, 0.0, -1e30)

    AttentionInterface.register("sdpa_finite", sdpa_attention_forward)
    AttentionMaskInterface.register("sdpa_finite", mask)
    return "sdpa_finite"


def _write(program: torch.export.ExportedProgram, target: Target, graph: Path) -> None:
    if target == "openvino":
        openvino = library()
        converted = openvino.convert_model(program)
        converted.output(0).get_tensor().set_names({OUTPUT})
        openvino.save_model(converted, graph, compress_to_fp16=False)  # the default is True
        return
    torch.onnx.export(
        program,
        (),
        graph,
        input_names=INPUTS,
        output_names=(OUTPUT,),
        opset_version=OPSET,
        external_data=True,  # a single file is limited to 2 GB
        verbose=False,
    )


def _open(target: Target, graph: Path, rows: int, pad_id: int) -> Backend:
    if target == "onnx":
        return OnnxBackend(graph, embedding_rows=rows, threads=None, pad_id=pad_id)
    return OpenVinoBackend(graph, embedding_rows=rows, dtype=torch.float32, threads=None, pad_id=pad_id)


def _check_batches(tokenizer: TextTokenizer, limit: int) -> list[list[Ids]]:
    """Rows of at most ``limit`` tokens for the check: each text alone, and all of them together."""
    rows = [row[:limit] for row in tokenizer.encode(_CHECK_TEXTS) if not isinstance(row, TextFailure)]
    return [*([row] for row in rows), rows]


def _min_cosine(expected: Sequence[TokenVectors], batches: Sequence[Sequence[Ids]], backend: Backend) -> float:
    """The lowest cosine of all tokens; NaN if a vector is not finite."""
    lowest = []
    for hidden, batch in zip(expected, batches, strict=True):
        inside = torch.arange(hidden.vectors.shape[1]) < hidden.lengths[:, None]
        given = backend(batch).vectors[inside].double()
        lowest.append(functional.cosine_similarity(given, hidden.vectors[inside].double()).min())
    return float(torch.stack(lowest).min())


def _cause(error: BaseException) -> str:
    """One line of the error's first cause. An exporter's own message is pages long and does not say what went wrong."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:300]}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 0, or 1 with ``error`` and ``message`` in the document."""
    parser = argparse.ArgumentParser(prog="python -m chunkmill_workers.engine.backends.export")
    parser.add_argument("model")
    parser.add_argument("--backend", choices=TARGETS, required=True)
    parser.add_argument("--force", action="store_true")
    given = parser.parse_args(arguments)
    try:
        settings = Settings.from_env()
        folder = resolve_model(given.model, pooling=settings.embedding_pooling, trust=settings.trust)
        with contextlib.redirect_stdout(sys.stderr):  # stdout is for the document alone
            made, is_new = export(folder, given.backend, force=given.force)
    except ChunkmillError as error:
        print(json.dumps({"error": error.code, "message": str(error)}))
        return 1
    document = asdict(made.statement) | {"path": str(made.folder), "bytes": made.size, "new": is_new}
    print(json.dumps(document))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
