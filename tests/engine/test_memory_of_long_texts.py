"""How much memory one long text costs while it is tokenized, in a process of its own, under each policy."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from chunkmill.domain.spaces import OnLong
from tests.support.checkout import PYTHONPATH
from tests.support.waiting import PATIENCE

MIB = 1024 * 1024
KINDS = ("prose", "base64", "Chinese", "one letter")
# MiB. Before texts without spaces were read in windows, 4 MiB under `split` took 475 (base64) and 497 (Chinese) with
# MiniLM's tokenizer, and 543 to 805 with a BPE tokenizer; four times as much for 16 MiB. A Unigram tokenizer read
# single words whole and took 380 to 809.
MOST = {4 * MIB: 330, 16 * MIB: 600}

MEASURE = """
import base64, json, random, sys
from pathlib import Path
from tokenizers import Tokenizer, models, pre_tokenizers
from chunkmill.domain.spaces import OnLong
from chunkmill.models.locate import bundled_folder
from chunkmill_workers.engine.tokenizer import TextTokenizer
from chunkmill_workers.engine.windows import make_rows

def bpe():
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("a", "a"), ("aa", "aa"), ("aaaa", "aaaa"), ("Ģ", "ä"), ("e", "r"), ("Q", "W")]
    tokens = [*letters, *("".join(pair) for pair in merges)]
    tokenizer = Tokenizer(models.BPE(vocab={token: at for at, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return TextTokenizer(tokenizer, pad_id=None)

def unigram():
    letters = [chr(code) for code in [*range(33, 127), *range(0x4E00, 0x5E00), 0x2581]]
    vocab = [("<unk>", 0.0), ("aaaa", -3.0), ("er", -7.0), *((letter, -8.0) for letter in letters)]
    tokenizer = Tokenizer(models.Unigram(vocab, 0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    return TextTokenizer(tokenizer, pad_id=None)

def peak():
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) / 1024

kind, model, policy, size = sys.argv[1], sys.argv[2], OnLong(sys.argv[3]), int(sys.argv[4])
chance = random.Random(1)
text = {
    "prose": lambda: "Turn the valve by hand and wait until it is closed. " * (size // 52),
    "base64": lambda: base64.b64encode(chance.randbytes(size // 4 * 3)).decode(),
    "Chinese": lambda: "".join(chance.choices([chr(code) for code in range(0x4E00, 0x5E00)], k=size // 3)),
    "one letter": lambda: "a" * size,
}[kind]()
made = {"minilm": lambda: TextTokenizer.load(bundled_folder()), "bpe": bpe, "unigram": unigram}
tokenizer = made[model]()
tokenizer.encode(["a word " * 20_000])  # what is loaded once
before = peak()
limit = None if policy is OnLong.SPLIT else 256
rows = make_rows(tokenizer.encode([text], limit=limit), 256, tokenizer.frame(""), policy)
print(json.dumps([peak() - before, len(rows.ids), [failure.reason for failure in rows.failures]]))
"""


def measure(kind: str, model: str, policy: OnLong, size: int) -> tuple[float, int, list[str]]:
    done = subprocess.run(
        [sys.executable, "-P", "-c", MEASURE, kind, model, policy, str(size)],
        check=True,
        capture_output=True,
        text=True,
        timeout=4 * PATIENCE,
        env={**os.environ, "PYTHONPATH": PYTHONPATH},
    )
    cost, rows, failures = json.loads(done.stdout)
    return cost, rows, failures


# Both policies, with both models that most people have. The others are slow. Until its tokens are counted, a text is
# read under `reject` as it is under `truncate`.
USUAL = {
    ("base64", OnLong.SPLIT, "bpe", 4 * MIB),
    ("base64", OnLong.TRUNCATE, "minilm", 4 * MIB),
    ("one letter", OnLong.TRUNCATE, "bpe", 4 * MIB),
}


ALL = itertools.product(KINDS, OnLong, ("minilm", "bpe", "unigram"), (4 * MIB, 16 * MIB))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from /proc")
@pytest.mark.parametrize(
    ("kind", "policy", "model", "size"),
    [pytest.param(*case, marks=[] if case in USUAL else [pytest.mark.slow]) for case in ALL],
)
def test_a_long_text_costs_a_bounded_amount_of_memory(kind: str, policy: OnLong, model: str, size: int) -> None:
    cost, rows, failures = measure(kind, model, policy, size)

    one_unknown_word = model == "minilm" and kind == "one letter"
    if policy is OnLong.SPLIT:
        assert (rows == 1) is one_unknown_word
    elif policy is OnLong.TRUNCATE or one_unknown_word:
        assert (rows, failures) == (1, [])
    else:
        # If the first tokens depend on all that follows, all is read.
        known = r"\d+" if model == "unigram" and kind == "one letter" else "257"
        assert rows == 0
        [reason] = failures
        assert re.fullmatch(f"the text has at least {known} tokens and the model reads 256", reason)
    assert cost < MOST[size] if policy is OnLong.SPLIT else cost < 150
