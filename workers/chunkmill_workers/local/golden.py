"""The golden texts, which every worker embeds at its start and compares with the space's reference.

They are ours and not a user's, so they may stand in the code and in messages. Pure.
"""

from __future__ import annotations

from typing import Final

VERSION: Final = 1
"""Increase it if TEXTS change. References are stored by version, so workers of the old version are not disturbed."""

TEXTS: Final[tuple[str, ...]] = (
    "",
    " \t\n ",
    "?",
    "A worker leases a ChunkBatch and embeds its texts.",
    "How do I rotate a TLS certificate before it expires?",
    # Past the 512 tokens of the usual encoders, so that the limit and its policy are seen, and short enough
    # that a large model on a CPU does not spend its start on it.
    " ".join(f"Line {n} names {n * 7} things." for n in range(1, 121)),
    "The mill grinds slowly, but it grinds everything: grain comes in by the sack and leaves as flour of one fineness.",
    "🚀🎉 Release day! 👩\u200d👩\u200d👧\u200d👦 👍🏽 🇫🇷 ❤️",  # joined, coloured and paired code points
    "向量数据库把文字变成数字，然后按距离查找。",  # noqa: RUF001 - Chinese punctuation is meant
    "تحوّل المطحنة النصوص إلى متجهات ثم تبحث عنها.",
    "ベクトル検索, 한국어 문장, हिन्दी, ภาษาไทย",
    "Straße, naïve café, İstanbul, Ωmega, e\u0301, \ufb01ne, Łódź",  # what normalisers treat differently
    'def mill(texts: list[str]) -> np.ndarray:\n    return np.stack([embed(t) for t in texts if t != ""])\n',
    "a" * 300,
    "[CLS] [SEP] [MASK] <s> </s> <pad> <|endoftext|>",
    "id,price,when\n0042,1299.95,2024-02-29T23:59:60Z\nhttps://example.org/a?b=c&d=%20#e\n1e-9 0xFF 3.14159265358979",
)
