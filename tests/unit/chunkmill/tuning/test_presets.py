"""A model is chosen by what was measured here; nothing that was not measured is promised to be better."""

from __future__ import annotations

import pytest

from chunkmill.models.known import KnownModel
from chunkmill.tuning.presets import Option, Requirements, Yardstick, options


def model(name: str, millions: int, dimensions: int = 768, **fields: object) -> KnownModel:
    entry = {
        "architecture": "bert",
        "languages": "English",
        "max_tokens": 512,
        "parameters": (millions + 20) * 1_000_000,
        "embedding_parameters": 20_000_000,
        "licence": "MIT",
    }
    return KnownModel(name, dimensions=dimensions, **entry | fields)  # type: ignore[arg-type]


SMALL = model("a/small", 10, 384, score=56.0, score_source="s")
BASE = model("a/base", 80, score=63.0, score_source="s")
LARGE = model("a/large", 300, 1024)
TABLE = model("a/table", 0, 256, architecture="static", max_tokens=None)
PAID = KnownModel("text-embedding-3-small", "openai", 1536, "many", 8192, score=62.3, score_source="s")
MODELS = (TABLE, SMALL, BASE, LARGE, PAID)
MEASURED = Yardstick(SMALL, tokens_per_second=8_000.0, latency_ms=5.0, peak_mib=500.0, bytes_per_number=2)


def by_name(shown: list[Option]) -> dict[str, Option]:
    return {option.model.name: option for option in shown}


def fitting(
    wanted: Requirements, *, prefer: str = "quality", measured: tuple[Yardstick, ...] = (MEASURED,)
) -> list[str]:
    shown = options(MODELS, measured, wanted, prefer)  # type: ignore[arg-type]
    return [option.model.name for option in shown if not option.failures]


def test_a_measured_model_has_its_own_numbers_and_others_are_estimated_from_it() -> None:
    named = by_name(options(MODELS, (MEASURED,), Requirements()))

    assert (named["a/small"].latency_ms, named["a/small"].basis) == (5.0, "measured")
    assert (named["a/base"].latency_ms, named["a/base"].basis) == (40.0, "estimated")
    assert named["a/base"].tokens_per_second == 1_000.0
    assert named["a/base"].memory_mib == pytest.approx(500 + 70e6 * 2 / 2**20)


def test_a_smaller_model_is_not_promised_to_be_better_than_the_measured_one() -> None:
    table = by_name(options(MODELS, (MEASURED,), Requirements()))["a/table"]

    assert (table.latency_ms, table.tokens_per_second, table.memory_mib) == (5.0, 8_000.0, 500.0)


def test_the_nearest_measured_model_is_the_one_that_others_are_estimated_from() -> None:
    base = Yardstick(BASE, tokens_per_second=2_000.0, latency_ms=16.0, peak_mib=700.0, bytes_per_number=4)

    large = by_name(options(MODELS, (MEASURED, base), Requirements()))["a/large"]

    assert large.latency_ms == 60.0
    assert large.memory_mib == pytest.approx(700 + 220e6 * 4 / 2**20)


@pytest.mark.parametrize(
    ("wanted", "left"),
    [
        (Requirements(latency_ms=5.0), {"a/table", "a/small"}),
        (Requirements(throughput=1_000.0), {"a/table", "a/small", "a/base"}),
        (Requirements(memory_mib=500.0), {"a/table", "a/small"}),
        (Requirements(dimensions=384), {"a/table", "a/small"}),
        (Requirements(tokens=512), {"a/table", "a/small", "a/base", "a/large"}),
        (Requirements(tokens=513), {"a/table"}),
        (Requirements(multilingual=True), set()),
        (Requirements(multilingual=True, paid=True), {"text-embedding-3-small"}),
    ],
)
def test_each_wish_leaves_those_that_meet_it(wanted: Requirements, left: set[str]) -> None:
    assert set(fitting(wanted)) == left


def test_what_is_not_known_meets_no_wish() -> None:
    named = by_name(options(MODELS, (), Requirements(latency_ms=1e9, throughput=1.0, paid=True)))

    assert {option.failures for option in named.values()} == {("latency", "throughput")}


def test_a_licence_that_is_not_known_or_forbids_it_is_not_for_commercial_use() -> None:
    unknown, forbids = model("b/unknown", 10, licence=None), model("b/forbids", 10, licence="CC-BY-NC-4.0")

    named = by_name(options([SMALL, unknown, forbids], (), Requirements(commercial=True)))

    assert {name for name, option in named.items() if not option.failures} == {"a/small"}


def test_vectors_are_cut_if_the_model_was_trained_for_it() -> None:
    nomic = model("nomic-ai/nomic-embed-text-v1.5", 100)

    (cut,) = options([nomic], (), Requirements(dimensions=384))

    assert (cut.dimensions, cut.failures) == (384, ())


def test_without_a_measurement_memory_is_that_of_the_weights() -> None:
    small = by_name(options(MODELS, (), Requirements()))["a/small"]

    assert (small.memory_mib, small.basis) == (pytest.approx(30e6 * 4 / 2**20), "weights")
    assert small.latency_ms is None


def test_models_are_sorted_by_what_is_preferred() -> None:
    assert fitting(Requirements(paid=True)) == ["a/base", "text-embedding-3-small", "a/small", "a/large", "a/table"]
    assert fitting(Requirements(), prefer="speed") == ["a/table", "a/small", "a/base", "a/large"]
    assert fitting(Requirements(), prefer="memory") == ["a/table", "a/small", "a/base", "a/large"]


def test_those_that_fail_come_last_with_what_they_fail() -> None:
    shown = options(MODELS, (MEASURED,), Requirements(latency_ms=20.0, dimensions=300))

    assert shown[0].model.name == "a/table"
    assert by_name(shown)["a/base"].failures == ("latency", "dimensions")
