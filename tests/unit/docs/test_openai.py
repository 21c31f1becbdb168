"""docs/openai.md says what the code says: settings, prices, models, states. Commands and SQL have tests elsewhere."""

from __future__ import annotations

import re
from decimal import Decimal
from pathlib import Path

from chunkmill.domain import model_fields
from chunkmill.domain.prices import OPENAI_PRICES
from chunkmill.domain.providers import OPENAI_MODELS
from chunkmill.domain.states import ProviderBatchState
from chunkmill.settings import Settings
from chunkmill.settings.provider import ProviderSettings

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs/openai.md").read_text()


def test_every_setting_it_names_exists_and_every_paid_one_is_named() -> None:
    named = set(re.findall(r"`([A-Z]{2,}(?:_[A-Z]+)+)(?:=[^`]*)?`|export ([A-Z_]+)=", PAGE))
    known = {name.upper() for name in Settings.model_fields}
    assert {one or other for one, other in named} - known == set()
    paid = {name.upper() for name in ProviderSettings.model_fields if name != "embedding_provider"}
    assert {name for name in paid if name not in PAGE} == set()


def test_defaults_are_the_settings() -> None:
    for names, default in re.findall(r"^\| ((?:`OPENAI_[A-Z_]+`(?:, )?)+) \| ([^|]+) \|", PAGE, re.MULTILINE):
        shown = re.findall(r"none|[\d,]+(?: MB)?", default.replace(", ", ";"))
        for name, value in zip(re.findall(r"`(\w+)`", names), shown * 2, strict=False):
            number = value.replace(",", "").replace(" MB", "000000").replace("none", "0")
            assert float(ProviderSettings.model_fields[name.lower()].default) == float(number), name


def test_prices_are_those_that_are_charged() -> None:
    rows = re.findall(r"^\| `(text-[\w-]+)` \| (\d+)[^|]* \| ([\d.]+) \| ([\d.]+) \| ([\d-]+) \|", PAGE, re.MULTILINE)
    told = {
        name: (int(dimensions), Decimal(usd), Decimal(batch), since) for name, dimensions, usd, batch, since in rows
    }
    charged = {
        name: (OPENAI_MODELS[name].dimensions, prices[-1].plain, prices[-1].batch_api, str(prices[-1].since))
        for name, prices in OPENAI_PRICES.items()
    }
    assert told == charged


def test_the_examples_of_models_are_taken() -> None:
    examples = re.findall(r"OPENAI_MODELS='(.*?)'", PAGE)
    assert len(examples) == 3
    for example in examples:
        assert ProviderSettings(openai_models=example).provider_models.keys() > OPENAI_MODELS.keys()


def test_the_example_of_a_file_is_taken(tmp_path: Path) -> None:
    (example,) = re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)
    (tmp_path / "models.toml").write_text(example)
    models = ProviderSettings(openai_models=str(tmp_path / "models.toml")).provider_models
    assert models["Qwen/Qwen3-Embedding-0.6B"].dimensions == 1024
    assert [str(price.plain) for price in models["text-embedding-3-small"].prices] == ["0.02", "0.015"]


def test_every_field_of_a_model_is_in_its_table_and_no_other() -> None:
    table = PAGE[PAGE.index("| field | default | |") : PAGE.index("Nothing needs to be said about")]
    first_cells = " ".join(re.findall(r"^\| (`[^|]+) \|", table, re.MULTILINE))
    assert set(re.findall(r"`(\w+)`", first_cells)) == set(model_fields._CHECKS)


def test_every_state_is_in_the_diagram() -> None:
    diagram = PAGE[PAGE.index("## How a ProviderBatch goes") : PAGE.index("- **Gather.**")]
    assert re.findall(r"^  ([a-z]+)\b", diagram, re.MULTILINE) == [state.value for state in ProviderBatchState]


def test_no_link_is_broken() -> None:
    for page in (PAGE, (ROOT / "docs/performance.md").read_text(), (ROOT / "docs/runbook.md").read_text()):
        for target in re.findall(r"\]\((?!https?:)([^)]+)\)", page):
            path, _, section = target.partition("#")
            linked = (ROOT / "docs" / path).resolve()
            assert not path or linked.exists(), target
            if section:
                text = linked.read_text() if path else page
                heads = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
                assert section in {re.sub(r"[^\w -]", "", head).lower().replace(" ", "-") for head in heads}, target
