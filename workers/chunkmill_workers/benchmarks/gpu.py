"""The benchmarks for a GPU: long workloads in one process, with ours beside sentence-transformers.

``gpu`` measures text to NumPy, beside the device's own limit. ``gpu-pipeline`` measures text to committed rows, beside
the engine alone. With ``--quick`` both run on a CPU too, to see that they run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from chunkmill import Chunk, Client
from chunkmill.cli.start.children import Child
from chunkmill.errors import DeviceUnavailable
from chunkmill.models import DEFAULT_MODEL, resolve_model
from chunkmill.system.python import module_command
from chunkmill_workers.benchmarks import contest
from chunkmill_workers.benchmarks.contest import Ground
from chunkmill_workers.benchmarks.engine import Limit
from chunkmill_workers.benchmarks.names import OUR
from chunkmill_workers.benchmarks.peers import sentence_torch
from chunkmill_workers.benchmarks.report import Say, document
from chunkmill_workers.benchmarks.servers import Servers, temporary_stack
from chunkmill_workers.benchmarks.stats import OURS, PEER, Measurement, Target, add_ratios, cosines, in_turns
from chunkmill_workers.benchmarks.texts import corpus, of_length, unique_chunks
from chunkmill_workers.engine import Engine

BASE = "bge-base shapes"
"""BERT-base with random weights. Speed does not depend on the weights, and they need no download."""
PASS_TOKENS, BATCH_SIZES = (16_384, 32_768, 65_536, 131_072), (64, 128, 256, 512, 1_024)
GATE_TEXTS, SWEEP_TEXTS = 1_000, 1_500
TOKENS = 2_000_000
"""Tokens of a workload: a third of a second for an engine that embeds six million tokens a second."""
COLLECTION = "benchmark"
CHUNK_BATCH_SIZE = 2_048
JOBS = (("docstrings", 100_000, 4), ("docstrings", 100_000, 16), ("140 tokens", 50_000, 16))
"""The jobs of the pipeline: kind of texts, number of texts, and how many ChunkBatches the worker holds at a time."""


def run(*, rounds: int, quick: bool, say: Say, model: str = DEFAULT_MODEL) -> dict[str, Any]:
    """The result for text to NumPy: sweeps, the cosine gate, then rounds in turns, each with the device's GEMM rate."""
    measurements: list[Measurement] = []
    with tempfile.TemporaryDirectory(prefix="cm-bench-") as folder:
        for name, path, lengths in ((model, model, (None, 140)), (BASE, None, (256, 450))):
            with contest.ground(path or base_model(Path(folder) / "base", model, quick=quick), quick=quick) as on:
                device = _require_gpu(on)
                for length in lengths:
                    group = f"{name}, " + ("docstrings" if length is None else f"about {length} tokens")
                    texts = _texts(on, length, 4_000 if quick else TOKENS)
                    measurements += _race(group, texts, on, rounds, lambda now, group=group: say(f"{group}: {now}"))  # type: ignore[misc]
                    _forget()
    settings = {
        "device": device,
        "torch": torch.__version__,
        "torch_has_varlen_attn": torch_has_varlen(),
        "tokens": "those that the model sees: special tokens in, padding and what is cut off not",
        "flops": "2 x weights of the layers + 4 x layers x length x hidden per token, held against the GEMM rate in "
        "the same precision, measured in the same rounds",
        "reference": f"sentence-transformers in fp32 on the same device, {GATE_TEXTS} texts",
    }
    return document("gpu", measurements, settings=settings)


def run_pipeline(*, rounds: int, quick: bool, say: Say, model: str = DEFAULT_MODEL) -> dict[str, Any]:
    """The result for text to committed rows: a worker with a full queue, beside the engine alone on the same texts."""
    measurements: list[Measurement] = []
    with contest.ground(model, quick=quick) as on, temporary_stack() as servers:
        device = _require_gpu(on)
        servers = dataclasses.replace(
            servers, settings=servers.settings.model_copy(update={"chunk_batch_size": CHUNK_BATCH_SIZE})
        )
        bare = Engine.load(model, device=on.device)
        with _process(servers, on, "poller"), servers.client() as client:
            for kind, count, parallel in JOBS[-1:] if quick else JOBS:
                group = f"{kind}, {parallel} ChunkBatches at a time"
                chunks = _chunks(on, None if kind == "docstrings" else 140, 300 if quick else count)
                variables = {"EMBEDDING_PARALLEL_BATCHES": str(parallel), "EMBEDDING_PROFILE": "off"}
                with _process(servers, on, "worker", variables) as worker:
                    measurements += _drain(group, chunks, on, bare, client, worker, rounds, say)
    settings = {
        "model": model,
        "device": device,
        "torch": torch.__version__,
        "chunk_batch_size": CHUNK_BATCH_SIZE,
        "clock": "from the moment when a worker may begin, with the whole job in the queue, to the return of wait; the "
        "engine: text to NumPy. enqueue_seconds is what filling the queue took before",
        "fsync": "on",
    }
    return document("gpu-pipeline", measurements, settings=settings, versions=servers.versions)


def base_model(folder: Path, tokens_of: str, *, quick: bool) -> str:
    """A sentence-transformers folder with BERT-base's shapes, CLS pooling and the tokenizer of ``tokens_of``."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Normalize, Pooling, Transformer
    from transformers import BertConfig, BertModel

    plain, saved = folder / "plain", folder / "saved"
    source = resolve_model(tokens_of).transformer
    rows = max(30_522, len(_tokenizer(source)))
    torch.manual_seed(0)
    config = BertConfig(vocab_size=rows, num_hidden_layers=1 if quick else 12)
    BertModel(config).eval().save_pretrained(plain)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"):
        if (source / name).exists():
            shutil.copy(source / name, plain / name)
    transformer = Transformer(str(plain), max_seq_length=512)
    modules = [transformer, Pooling(config.hidden_size, pooling_mode="cls"), Normalize()]
    SentenceTransformer(modules=modules, device="cpu").save(str(saved), create_model_card=False)
    return str(saved)


def torch_has_varlen() -> bool:
    """Whether this torch has the kernel for packed texts."""
    from chunkmill_workers.engine.encoder.attention import torch_varlen

    return torch_varlen(grouped=False) is not None


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)


def _require_gpu(on: Ground) -> str:
    if on.device != "cpu":
        return torch.cuda.get_device_name(on.device)
    if on.quick:
        return "cpu"
    raise DeviceUnavailable(
        "torch sees no CUDA device here: `python -m chunkmill_workers.benchmarks engine pipeline` measures a CPU, "
        "and --quick rehearses this benchmark on one"
    )


def _texts(on: Ground, length: int | None, tokens: int) -> list[str]:
    """Distinct texts of about ``tokens`` tokens in all: docstrings, or runs of words of about ``length`` tokens."""
    whole = [chunk.text for chunk in corpus()[:300]]
    mean = float(on.token_counts(whole).mean())
    if length is None:
        count = max(60, round(tokens / mean))
        return [chunk.text for chunk in unique_chunks(corpus(), count)]
    per_word = float(on.token_counts(whole).sum()) / sum(len(text.split()) for text in whole)
    count = max(8, tokens // length)
    return [f"{at} {text}" for at, text in enumerate(of_length(length, count, tokens_per_word=per_word))]


def _chunks(on: Ground, length: int | None, count: int) -> list[Chunk]:
    texts = _texts(on, length, count * (length or 60))
    return [Chunk(str(number), text) for number, text in enumerate(texts[:count])]


def _race(group: str, texts: list[str], on: Ground, rounds: int, say: Say) -> list[Measurement]:
    half, quick = on.half or "fp32", on.quick
    ours, peer = f"{OUR} {half}", f"sentence-transformers {half}"
    lengths = on.token_counts(texts)
    tokens = int(lengths.sum())
    common = {"texts": len(texts), "tokens": tokens, "mean_tokens": round(tokens / len(texts), 1), "precision": half}
    few = texts[:30] if quick else texts[:GATE_TEXTS]

    say("reference")
    reference = _sentence_transformers(on, "fp32", 64).embed(few)
    _forget()
    measured = []
    engine, sweep = _best_pass_size(group, texts, on, half, say)
    rival, rival_sweep = _best_batch(texts[:30] if quick else texts[:SWEEP_TEXTS], on, half, say)
    for name, embed, swept, gate in (
        (ours, lambda given: engine.embed(given).vectors, sweep, OURS),
        (peer, rival.embed, rival_sweep, PEER),
    ):
        fidelity = cosines(embed(few), reference)
        likeness = {"cosine_min": float(fidelity.min()), "cosine_mean": float(fidelity.mean())}
        refused = gate.refusal(**likeness)
        measured.append(Measurement(group, name, "tokens/s", [], refused=refused, details=common | likeness | swept))
    ways: dict[str, Callable[[], object]] = {ours: lambda: engine.embed(texts), peer: lambda: rival.embed(texts)}
    for name in ways:
        say(f"warm-up: {name}")
        ways[name]()
    limit = Limit(on, [half])
    seconds = in_turns(
        {name: lambda way=way: _clock(way) for name, way in ways.items()},  # type: ignore[misc]
        rounds, say, before=lambda name: limit.measure() if name == ours else None,
    )  # fmt: skip
    for measurement in measured:
        measurement.rounds = [tokens / taken for taken in seconds[measurement.name]]
    timings = engine.embed(texts).timings
    measured[0].details |= {
        "token_batches": timings.token_batches,
        "seconds_in_passes": timings.forward,
        "seconds_tokenizing": timings.tokenize,
        "seconds": timings.total,
    }
    add_ratios(measured, peer, targets={ours: Target(5)} if "docstrings" in group else {})
    ceilings = limit.measurements(group, lengths)
    for ceiling in ceilings:
        promised = {ours: Target(0.6)} if group.startswith(BASE) else {}
        add_ratios([*measured, ceiling], ceiling.name, targets=promised)
    return [*measured, *ceilings]


def _best_pass_size(group: str, texts: list[str], on: Ground, half: str, say: Say) -> tuple[Engine, dict[str, Any]]:
    """Our engine with its fastest number of tokens in a pass, and the results of all."""
    best, tried = None, []
    for most in (512, 1_024) if on.quick else PASS_TOKENS:
        say(f"passes of up to {most} tokens")
        engine = Engine.load(on.model.name, device=on.device, dtype=half, batch_tokens=most)
        engine.embed(texts[: len(texts) // 4])
        held = _reset_peak(on)
        seconds = min(_clock(lambda engine=engine: engine.embed(texts)) for _ in range(1 if on.quick else 2))  # type: ignore[misc]
        tried.append({"batch_tokens": most, "seconds": seconds, "kept": engine.batch_tokens})
        if held is not None:
            tried[-1]["mib_of_passes"] = (torch.cuda.max_memory_allocated() - held) // 2**20
        if best is None or seconds < best[0]:
            best = seconds, engine
        del engine
        _forget()
    assert best is not None
    return best[1], {
        "setting": {"batch_tokens": best[1].batch_tokens},
        "tried": tried,
        "packed": best[1]._backend.packed,
    }


def _reset_peak(on: Ground) -> int | None:
    """Bytes of the device's memory that are in use before any pass; None on a CPU. It resets the peak."""
    if on.device == "cpu":
        return None
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def _best_batch(
    texts: list[str], on: Ground, half: str, say: Say
) -> tuple[sentence_torch.SentenceTorch, dict[str, Any]]:
    """sentence-transformers with its fastest batch size on these texts, and the results of all sizes."""
    tried = {}
    for size in (8, 32) if on.quick else BATCH_SIZES:
        say(f"batches of {size} texts")
        peer = _sentence_transformers(on, half, size)
        peer.embed(texts[: len(texts) // 4])
        tried[size] = _clock(lambda peer=peer: peer.embed(texts))  # type: ignore[misc]
        del peer
        _forget()
    best = min(tried, key=lambda size: tried[size])
    details = {
        "setting": {"batch_size": best},
        "tried": [{"batch_size": size, "seconds": s} for size, s in tried.items()],
    }
    return _sentence_transformers(on, half, best), details


def _sentence_transformers(on: Ground, word: str, batch_size: int) -> sentence_torch.SentenceTorch:
    return sentence_torch.load(
        on.model, options={"dtype": word}, setting={"batch_size": batch_size}, threads=on.threads, device=on.device
    )


def _forget() -> None:
    """Free the memory of objects that are no longer used, before the next one is measured."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _clock(way: Callable[[], object]) -> float:
    began = time.perf_counter()
    way()
    return time.perf_counter() - began


@contextlib.contextmanager
def _process(servers: Servers, on: Ground, kind: str, variables: dict[str, str] | None = None) -> Iterator[Child]:
    """A worker or a poller, as a user starts it. It is stopped by its own process id."""
    module = {
        "worker": ["chunkmill_workers", "worker", "-Q", "gpu"],
        "poller": ["chunkmill.cli", "poller"],
    }[kind]
    device = "cpu" if on.device == "cpu" else "cuda"
    env = os.environ | servers.env | {"EMBEDDING_DEVICE": device, "EMBEDDING_MODEL": on.folder.name} | (variables or {})
    child = Child(kind, module_command(*module), env=env, log=servers.folder / f"{kind}.log")
    try:
        yield child
    except Exception:
        print(*child.tail(), sep="\n", file=sys.stderr)
        raise
    finally:
        child.stop()


def _drain(
    group: str, chunks: Sequence[Chunk], on: Ground, bare: Engine, client: Client, worker: Child, rounds: int, say: Say
) -> list[Measurement]:
    """Measure one job. The worker is stopped while the queue is filled, so the producer's rate has no influence."""
    texts = [chunk.text for chunk in chunks]
    tokens = int(on.token_counts(texts).sum())
    enqueueing: list[float] = []

    def drain() -> float:
        os.kill(worker.pid, signal.SIGSTOP)
        try:
            began = time.perf_counter()
            job = client.enqueue(chunks, collection=COLLECTION)
            enqueueing.append(time.perf_counter() - began)
        finally:
            os.kill(worker.pid, signal.SIGCONT)
        began = time.perf_counter()
        job = client.wait(job.id, timeout=600, on_progress=lambda _: worker.require_alive())
        seconds = time.perf_counter() - began
        assert job.embedded == len(chunks), f"{job.embedded} of {len(chunks)} embedded: the rest was in the cache"
        return seconds

    say(f"{group}: the worker starts")
    client.embed(["a first short text"], timeout=300)
    ways = {"the whole system": drain, "the engine alone": lambda: _clock(lambda: bare.embed(texts))}
    for way in ways.values():
        way()
    stored = client.vectors(COLLECTION)
    some = chunks[:: max(1, len(chunks) // GATE_TEXTS)]
    likeness = cosines(
        np.stack([stored[chunk.id] for chunk in some]), bare.embed([chunk.text for chunk in some]).vectors
    )
    refused = OURS.refusal(float(likeness.min()), float(likeness.mean()))
    enqueueing.clear()
    seconds = in_turns(
        ways, rounds, lambda now: say(f"{group}: {now}"),
        before=lambda name: client.delete(COLLECTION, all_chunks=True) if name == "the whole system" else None,
    )  # fmt: skip
    client.delete(COLLECTION, all_chunks=True)
    details = {"texts": len(texts), "tokens": tokens, "mean_tokens": round(tokens / len(texts), 1)}
    measurements = [
        Measurement(
            group, name, "tokens/s", [tokens / second for second in taken],
            refused=refused, details=details | {"rows_per_second": len(texts) / float(np.median(taken))},
        )
        for name, taken in seconds.items()
    ]  # fmt: skip
    measurements[0].details |= {"enqueue_seconds": enqueueing, "cosine_min": float(likeness.min())}
    add_ratios(measurements, "the engine alone", targets={"the whole system": Target(0.9)})
    return measurements
