"""A processor with AVX2 and nothing beyond it: rehearsed here with the two variables that hide the rest."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from chunkmill import machine
from chunkmill_workers.engine import precision
from tests.support.waiting import PATIENCE

MASKS = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}

LOOKS = """
import json
import torch
from chunkmill.domain.spaces import Precision
from chunkmill.errors import InvalidSetting
from chunkmill.machine import processor_features
from chunkmill_workers.benchmarks import flops
from chunkmill_workers.engine import Engine
from chunkmill_workers.engine.encoder.linear import packable

engine = Engine.load("all-MiniLM-L6-v2", device="cpu")
vectors = engine.embed(["a text", "another text"]).vectors
try:
    Engine.load("all-MiniLM-L6-v2", device="cpu", precision=Precision.INT8)
    refused = None
except InvalidSetting as error:
    refused = str(error)
print(json.dumps({
    "torch": torch.backends.cpu.get_cpu_capability(),
    "features": sorted(feature for feature in processor_features() if feature.startswith(("avx512", "avx_", "amx"))),
    "packs bf16": packable(torch.bfloat16),
    "rates": [word for word in ("fp32", "bf16", "int8") if flops.has(word, "cpu")],
    "dtype": engine.dtype,
    "length": float((vectors[0] ** 2).sum()),
    "refused": refused,
}))
"""


@pytest.mark.skipif(
    "avx2" not in machine.processor_features(), reason="this processor has no AVX2, or it is hidden already"
)
def test_on_avx2_alone_the_model_runs_in_fp32_and_int8_is_refused() -> None:
    done = subprocess.run(
        [sys.executable, "-c", LOOKS], env=os.environ | MASKS, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    refused = seen.pop("refused")
    assert "EMBEDDING_PRECISION=float" in refused
    assert seen == {
        "torch": "AVX2",
        "features": [],
        "packs bf16": False,
        "rates": ["fp32"],
        "dtype": "float32",
        "length": pytest.approx(1.0, abs=1e-5),
    }


@pytest.mark.parametrize(
    ("flags", "bf16", "int8"),
    [
        ("avx2", False, False),
        ("avx2 avx_vnni", False, True),
        ("avx2 avx512f avx512bw avx512vl avx512dq", False, False),
        ("avx2 avx512f avx512_vnni", False, True),
        ("avx2 avx512f avx512_vnni avx512_bf16", True, True),
        ("avx2 amx_tile amx_bf16", True, False),
        ("avx2 amx_tile amx_int8", False, True),
    ],
)
def test_a_number_format_is_native_where_its_products_are(
    flags: str, bf16: bool, int8: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """AVX512 alone multiplies neither: torch emulates bf16, and products of 8 bits overflow."""
    monkeypatch.setattr(machine, "_cpuinfo", lambda: {"flags": flags})
    for variable in MASKS:
        monkeypatch.delenv(variable, raising=False)
    assert (precision.cpu_has_bf16(), precision.cpu_has_int8()) == (bf16, int8)
