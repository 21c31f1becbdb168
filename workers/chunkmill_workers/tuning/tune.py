"""Measures a model on this machine: ``chunkmill tune`` runs ``python -m chunkmill_workers.tuning.tune``.

stdin brings the order, which is one JSON document. Events go to stdout as one JSON object per line: ``progress`` at
each step, and ``result`` or ``error`` at the end. It writes no file.
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from types import FrameType
from typing import Any, Final, cast

from chunkmill.domain.spaces import Precision
from chunkmill.errors import ChunkmillError, EngineError, InvalidInput
from chunkmill.machine import Machine, versions
from chunkmill.models import resolve_model
from chunkmill.settings import Settings
from chunkmill.tuning.choose import Backend, Constraints, Dtype, Setup
from chunkmill_workers.host.cuda import require_cuda
from chunkmill_workers.host.gpu import claim_device
from chunkmill_workers.tuning.process import CandidateFailed, CandidateProcess, Task, Vectors, private_stdout
from chunkmill_workers.tuning.search import Grid, Search, take
from chunkmill_workers.tuning.tuned import machine_for, stated_threads

CPU_BUDGETS: Final = (256, 512, 1024, 2048, 4096)
CUDA_BUDGETS: Final = (4096, 8192, 16_384, 32_768, 65_536, 131_072)
CUDA_PARALLEL: Final = (4, 8, 16)
"""Numbers of parallel ChunkBatches that are tried too: one of 512 short texts does not fill a large TokenBatch."""

# How many TokenBatches of the largest size a pass fills.
PASS_FILLS: Final = 3
PASS_TOKENS: Final = {"cpu": 4_096, "cuda": 400_000}
"""The fewest tokens of a pass, so that a slow model is measured on more than one TokenBatch."""

# The texts of the cosine gate are about ten thousand tokens, so that fp32 on a slow CPU takes seconds.
GATE_TEXTS, GATE_LEAST, GATE_CHARACTERS = 128, 8, 40_000

_LONG: Final[Mapping[str, Dtype]] = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}

Emit = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, slots=True)
class Order:
    """What stdin asks for. An empty list stands for what suits the device."""

    model: str
    precision: Precision
    constraints: Constraints
    texts: Sequence[str]
    backends: Sequence[Backend] = ()
    dtypes: Sequence[Dtype] = ()
    batch_tokens: Sequence[int] = ()
    threads: Sequence[int] = ()
    seconds: float = 2.0
    """How long a pass over the texts takes at fp32's speed."""


def run(order: Order, emit: Emit) -> None:
    """Measure, and emit the progress and the result. Raises ChunkmillError."""
    settings = Settings.from_env()
    order = with_stated(order, settings)
    folder = resolve_model(
        order.model,
        pooling=settings.embedding_pooling,
        precision=order.precision,
        trust=settings.trust,
        download=True,
    )
    # Claim before torch is imported. The claim also keeps workers away from a GPU that is measured.
    claimed = claim_device(settings.embedding_device, share=settings.embedding_share_gpu)
    if claimed.device != "cpu":
        require_cuda()
    machine = machine_for(claimed.device)
    on = _kind_of(machine)
    gate = _gate(order.texts)
    emit({"event": "progress", "done": 0, "total": None, "what": "fp32, the reference"})
    task = Task(order.model, str(order.precision), claimed.device, gate, settings.chunk_batch_size)
    threads = order.threads or _threads(settings, machine)
    exact, own = _reference(task, gate, Setup("native", "float32", 0, threads[0], 1))
    grid = _grid(order, settings, machine, own, threads, exact.tokens / exact.seconds)
    per_character = sum(exact.n_tokens) / sum(map(len, gate))
    weights = [min(len(text) * per_character, folder.spec.max_tokens) for text in order.texts]
    wanted = max(PASS_TOKENS[on], max(grid.batch_tokens), order.seconds * exact.tokens / exact.seconds)
    task = replace(task, texts=take(order.texts, weights, wanted))
    done = 0

    def tell(setup: Setup) -> None:
        nonlocal done
        emit({"event": "progress", "done": done, "total": max(grid.steps, done), "what": _words(setup)})
        done += 1

    candidates = Search(grid, order.constraints, task, gate, exact, tell).run()
    result = {
        "candidates": [asdict(candidate) for candidate in candidates],
        "fingerprint": folder.spec.fingerprint,
        "model": folder.name,
        "machine": asdict(machine),
        "versions": versions(),
        "texts": {"pass": len(task.texts), "gate": len(gate)},
    }
    emit({"event": "result", **result})


def with_stated(order: Order, settings: Settings) -> Order:
    """Add what the environment states. It wins over a profile, so only the command can ask for something else."""
    backend, dtype = settings.embedding_backend, settings.embedding_dtype
    return replace(
        order,
        backends=order.backends or ([] if backend == "auto" else [backend]),
        dtypes=order.dtypes or ([] if dtype == "auto" else [_LONG.get(dtype) or cast("Dtype", dtype)]),
        batch_tokens=order.batch_tokens
        or ([settings.embedding_batch_tokens] if settings.embedding_batch_tokens else []),
    )


def _gate(texts: Sequence[str]) -> list[str]:
    """The texts of the cosine gate: the first ones, and the longest others, because rounding adds up over positions."""
    texts_of_gate: list[str] = []
    for text in [*texts[: GATE_TEXTS - GATE_LEAST], *sorted(texts[GATE_TEXTS - GATE_LEAST :], key=len)[-GATE_LEAST:]]:
        if len(texts_of_gate) >= GATE_LEAST and sum(map(len, texts_of_gate)) + len(text) > GATE_CHARACTERS:
            continue
        texts_of_gate.append(text)
    if not texts_of_gate:
        raise InvalidInput("there is no text to measure with")
    return texts_of_gate


def _reference(task: Task, gate: Sequence[str], setup: Setup) -> tuple[Vectors, Backend]:
    """fp32 vectors of the gate's texts, and the backend that ``auto`` means for this model.

    They are computed on the CPU if they do not fit the GPU. Raises EngineError if the model does not run at all.
    """
    exact = replace(task, precision=str(Precision.FLOAT))
    problem = ""
    for device in dict.fromkeys((task.device, "cpu")):
        try:
            with CandidateProcess(replace(exact, device=device), setup, backend="auto") as process:
                # Take the faster of two, because the length of all passes depends on it.
                vectors = min((process.vectors(gate) for _ in range(2)), key=lambda vectors: vectors.seconds)
                return vectors, process.description["backend"]
        except CandidateFailed as reason:
            problem = str(reason)
    raise EngineError(f"model {task.model!r} cannot be measured, because it does not run in fp32: {problem}")


def _grid(
    order: Order, settings: Settings, machine: Machine, own: Backend, threads: Sequence[int], exact_speed: float
) -> Grid:
    """The setups that are worth trying here."""
    on = _kind_of(machine)
    kinds = [
        (backend, dtype)
        for backend in order.backends or (own, "onnx", "openvino")
        for dtype in _formats(backend, machine, order.precision)
        if dtype in (order.dtypes or (dtype,))
    ]
    if not kinds:
        raise InvalidInput("none of the backends and dtypes asked for suits this device and model")
    standard = CPU_BUDGETS if on == "cpu" else CUDA_BUDGETS
    # A size that a slow model fills only once in a pass cannot be measured, and gains nothing either.
    filled = max(PASS_TOKENS[on], order.seconds * exact_speed) / PASS_FILLS
    batch_tokens = sorted(order.batch_tokens) or [tokens for tokens in standard if tokens <= max(filled, standard[0])]
    middle = min(batch_tokens, key=lambda tokens: abs(tokens - (1024 if on == "cpu" else 32_768)))
    parallel = [settings.embedding_parallel_batches]
    if on == "cuda" and "embedding_parallel_batches" not in settings.model_fields_set:
        parallel += [count for count in CUDA_PARALLEL if count not in parallel]
    return Grid(kinds, batch_tokens, middle, threads, parallel)


def _formats(backend: Backend, machine: Machine, precision: Precision) -> list[Dtype]:
    """The number formats in which a backend computes natively here. An emulated one is a hundred times slower.

    ``chunkmill_workers.engine.precision`` decides the same with torch.
    """
    exported = backend in ("onnx", "openvino")
    if machine.gpu is not None:
        if exported:
            return []
        import torch  # it is imported by now, because the machine has a GPU

        from chunkmill_workers.engine.precision import gpu_has_bf16

        native: list[Dtype] = ["float16", "bfloat16", "float32"]
        return native if gpu_has_bf16(torch.device("cuda", 0)) else ["float16", "float32"]
    if exported and precision is Precision.INT8:
        return []  # exports contain the weights as they are
    half: list[Dtype] = ["bfloat16"] if {"avx512_bf16", "amx_bf16"} & set(machine.features) else []
    return ["float32"] if backend == "onnx" else [*half, "float32"]


def _kind_of(machine: Machine) -> str:
    return "cpu" if machine.gpu is None else "cuda"


def _threads(settings: Settings, machine: Machine) -> list[int]:
    """All cores, half of them and a quarter of them; or the one number that the environment states.

    Beside a GPU only all cores are tried, because there they only tokenize.
    """
    if stated := settings.embedding_threads or stated_threads():
        return [stated]
    most = machine.cores
    return [most, *(most >> halved for halved in (1, 2) if most > 2 and machine.gpu is None)]


def _words(setup: Setup) -> str:
    threads = f", {setup.threads} threads" if setup.threads > 1 else ""
    return f"{setup.kind}, {setup.batch_tokens:,} tokens{threads}"


def _leave(number: int, frame: FrameType | None) -> None:
    """Exit through the ``finally`` blocks, which stop the processes."""
    sys.exit(128 + number)


def main() -> None:
    out = private_stdout()
    signal.signal(signal.SIGTERM, _leave)

    def emit(event: dict[str, Any]) -> None:
        out.write(json.dumps(event) + "\n")
        out.flush()

    try:
        asked = json.load(sys.stdin)
        asked |= {"constraints": Constraints(**asked["constraints"]), "precision": Precision(asked["precision"])}
        run(Order(**asked), emit)
    except ChunkmillError as error:
        emit({"event": "error", "code": error.code, "message": str(error)})
        sys.exit(1)


if __name__ == "__main__":
    main()
