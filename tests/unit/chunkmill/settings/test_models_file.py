"""OPENAI_MODELS as JSON in the variable, and as a file of JSON or TOML."""

from __future__ import annotations

from datetime import date
from decimal import Decimal
from pathlib import Path

import pytest

from chunkmill.domain.model_fields import WrongModels
from chunkmill.settings.models_file import described_models

JSON = '{"a": {"dimensions": 8, "usd": 0.02}, "org/b": {"dimensions": 16, "can_cut": true}}'
TOML = """
[a]
dimensions = 8
prices = [{from = 1970-01-01, usd = 0.02}]  # a day without quotes, as TOML has it

["org/b"]
dimensions = 16
can_cut = true
"""


@pytest.mark.parametrize("name", ["models.json", "models.toml", "models.TOML"])
def test_a_file_says_what_the_variable_says(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / name).write_text(JSON if name.endswith("json") else TOML, encoding="utf-8-sig")
    models = described_models(JSON)
    assert described_models(str(tmp_path / name)) == described_models(f" ~/{name}\n") == models
    assert [(model.name, model.dimensions, model.can_cut) for model in models.values()] == [
        ("a", 8, False),
        ("org/b", 16, True),
    ]
    assert [(price.since, price.plain) for price in models["a"].prices] == [(date(1970, 1, 1), Decimal("0.02"))]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"a": }', "Expecting value in line 1, column 7; it must be a JSON object such as"),
        ('{"a": {"dimensions": 8}, "a": {"dimensions": 8}}', "'a' is named twice in one object"),
        ('{"a": {"dimensions": 8, "usd": 1, "usd": 2}}', "'usd' is named twice"),
        ('{"a": {"dimensions": 8, "usd": NaN}}', "NaN is not a number"),
        ('{"a":' * 100_000, "nested too deeply"),
        ("[]", "As a path it cannot be read: No such file or directory"),
        ("/nowhere/at/all.json", "As a path it cannot be read"),
        ("/", "As a path it cannot be read: it is not a file"),
        ("x" * 5_000, "As a path it cannot be read: File name too long"),
        ("a\0b", "As a path it cannot be read"),
        ("~nobody-of-this-name/x", "As a path it cannot be read"),
        ("/dev/zero", "As a path it cannot be read: it is not a file"),
    ],
)
def test_what_cannot_be_read_is_said_in_a_sentence(text: str, said: str) -> None:
    with pytest.raises(WrongModels) as wrong:
        described_models(text)
    assert said in str(wrong.value)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        (
            "m.json",
            b'{"a": {"dimensions": "8"}}',
            r"model 'a': dimensions is .*quotes \(in the file .*/m\.json\)",
        ),
        ("m.json", b"", r"Expecting value in line 1, column 1 of the file"),
        ("m.json", b"[1]", r"there is no object of the file .*m\.json"),
        ("m.json", b"\xff\xfe", r"m\.json is not text in UTF-8"),
        ("m.toml", b"[a\ndimensions = 8", r"line 1.*m\.toml; it must have a table for each model"),
        ("m.toml", b"[a]\ndimensions = 8\n[a]\n", r"m\.toml"),
        ("m.toml", b"dimensions = 8", r"model 'dimensions' must be an object"),
    ],
)
def test_a_wrong_file_is_named(name: str, content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(WrongModels, match=said):
        described_models(str(tmp_path / name))
