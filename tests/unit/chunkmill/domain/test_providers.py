"""What OPENAI_MODELS may say of a model, and what is said about each thing that it may not."""

from __future__ import annotations

from datetime import date
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chunkmill.domain.model_fields import WrongModels
from chunkmill.domain.prices import Price
from chunkmill.domain.providers import OPENAI_MODELS, ProviderModel, read_models

WHOLE = {
    "dimensions": 1024,
    "max_tokens": 8191,
    "can_cut": True,
    "tokenizer": "/models/a/tokenizer.json",
    "same_as": "/models/a",
    "usd": 0.00935,
    "batch_usd": 0.004,
    "encoding": "float",
    "request_inputs": 32,
    "request_bytes": 2_000_000,
    "tokens_factor": 0,
}


def problems_of(models: dict[str, Any]) -> str:
    with pytest.raises(WrongModels) as wrong:
        read_models(models)
    assert wrong.value.names == set(models)
    return str(wrong.value)


def test_every_field_is_read() -> None:
    models = read_models({"a": WHOLE, "b": {"dimensions": 8}})
    price = Price(date(1970, 1, 1), Decimal("0.00935"), Decimal("0.004"))
    assert models["a"] == ProviderModel(
        "a", 1024, 8191, can_cut=True, tokenizer="/models/a/tokenizer.json", prices=(price,), same_as="/models/a",
        encoding="float", request_inputs=32, request_bytes=2_000_000, tokens_factor=Decimal(0),
    )  # fmt: skip
    assert models["b"] == ProviderModel("b", 8)


def test_of_a_model_that_openai_has_only_what_differs_need_be_said() -> None:
    known = OPENAI_MODELS["text-embedding-3-small"]
    (model,) = read_models({known.name: {"max_tokens": 8191, "same_as": None}}).values()
    assert (model.max_tokens, model.dimensions, model.can_cut, model.prices) == (8191, 1536, True, known.prices)


def test_prices_are_in_force_from_their_days_on_whatever_their_order() -> None:
    later, first = {"from": "2026-06-01", "usd": 0.02}, {"from": date(2025, 1, 31), "usd": 3, "batch_usd": 1}
    (model,) = read_models({"a": {"dimensions": 8, "prices": [later, first]}}).values()
    assert model.prices == (
        Price(date(2025, 1, 31), Decimal(3), Decimal(1)),
        Price(date(2026, 6, 1), Decimal("0.02"), Decimal("0.01")),
    )


def test_all_faults_are_told_at_once_each_with_its_model_its_field_and_what_to_do() -> None:
    said = problems_of(
        {
            "a": {"dimension": 8, "can_cut": "false"},
            "b": {"dimensions": 8, "usd": 1, "max_tokens": 512.0, "same_as": "x"},
            "c": 384,
            "d": {"dimensions": 8, "prices": [{"from": "2026-13-01", "usd": 1}, {"usd": 1}]},
        }
    )
    assert said == (
        "7 faults: model 'a': 'dimension' is not a field; did you mean dimensions?; "
        "model 'a': can_cut is \"false\"; it must be true or false, without quotes; "
        "model 'a': dimensions is missing; say how many numbers a vector has; "
        "model 'b': max_tokens is 512.0; it must be a whole number from 16 to 10,000,000; "
        "model 'b': tokenizer is missing; with same_as it is the path of the local model's tokenizer.json, because "
        "texts must be counted and truncated as local workers do it; "
        "model 'c' must be an object with at least dimensions; "
        "model 'd': prices has 2 wrong: entry 1 says that from is \"2026-13-01\"; it must be a day as a text such as "
        "2026-01-31, and entry 2 does not say from"
    )


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("dimensions", True, "dimensions is true; it must be a whole number"),
        ("dimensions", 16_001, "from 1 to 16,000"),
        ("dimensions", "8", "a whole number from 1 to 16,000, without quotes"),
        ("max_tokens", 15, "from 16 to"),
        ("can_cut", 1, "can_cut is 1; it must be true or false"),
        ("tokenizer", "a\nb", "tokenizer is"),
        ("same_as", ["x"], "same_as is a list; it must be a text"),
        ("usd", -1, "usd is -1; it must be a number from 0"),
        ("usd", float("nan"), "usd is NaN"),
        ("usd", 10**400, "it must be a number from 0"),
        ("usd", "0.02", "without quotes"),
        ("encoding", "hex", 'encoding is "hex"; it must be one of the texts "base64", "float"'),
        ("request_inputs", 2_049, "from 1 to 2,048"),
        ("request_bytes", 9_999, "from 10,000"),
        ("tokens_factor", {}, "tokens_factor is an object"),
        ("prices", [], "prices is a list; it must be a list such as"),
        ("prices", [3], "entry 1 is 3; it must be an object"),
        ("prices", [{"from": "2026-01-01", "usd": 1, "batch": 2}], "'batch' is not a field; did you mean batch_usd?"),
        ("prices", [{"from": "2026-01-01", "usd": 1}] * 2, "entry 2 begins on 2026-01-01, as an entry before it"),
        ("prices", [{"from": 2026, "usd": 1}], "from is 2026; it must be a day as a text"),
        ("max_token", 512, "'max_token' is not a field; did you mean max_tokens?"),
        ("Usd", 1, "did you mean usd?"),
        ("qqq", 1, "the fields are dimensions, max_tokens,"),
    ],
)
def test_a_wrong_field_is_named_with_what_it_must_be(field: str, value: object, said: str) -> None:
    good = {"dimensions": 8, "tokenizer": "cl100k"}
    told = problems_of({"good": good, "odd": {**good, field: value}})
    assert "model 'odd': " in told
    assert said in told
    assert "'good'" not in told


def test_a_price_of_batches_alone_is_no_price() -> None:
    """It was ignored, and the work counted as free."""
    assert "batch_usd is given without usd" in problems_of({"a": {"dimensions": 8, "batch_usd": 1}})
    both = {"dimensions": 8, "usd": 1, "prices": [{"from": "2026-01-01", "usd": 1}]}
    assert "prices stands beside usd" in problems_of({"a": both})


_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["from", "usd", "x"]), inner),
    max_leaves=5,
)


_fields = st.dictionaries(st.sampled_from([*WHOLE, "prices", "y"]), _values)


@given(st.dictionaries(st.text(max_size=4), _fields | _values))
def test_whatever_it_holds_it_is_read_or_refused_in_words(models: dict[str, Any]) -> None:
    try:
        read = read_models(models)
    except WrongModels as wrong:
        assert str(wrong)
    else:
        assert read.keys() == models.keys()
