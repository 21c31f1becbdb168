"""`models list` and `models choose`."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from itertools import groupby
from typing import Any

import click
from rich.text import Text

from chunkmill.cli.arguments import BYTES, Quantity
from chunkmill.cli.late import Settings, yardsticks
from chunkmill.cli.output import Screen, count, json_option
from chunkmill.domain.providers import OPENAI_MODELS
from chunkmill.errors import InvalidInput
from chunkmill.models.known import KnownModel, known_models
from chunkmill.models.names import PROMPTS
from chunkmill.tuning.presets import PREFERENCES, Option, Preference, Requirements, Yardstick, options

HEADS = ["model", "dims", "tokens", "params", "languages", "MTEB", "tokens/s", "licence", "runs", "cut to", "prompts"]
_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}


@click.command("list")
@json_option
@click.pass_obj
def list_models(screen: Screen) -> None:
    """List the models that people use: sizes, limits, prompts and licences, and how fast they are here.

    Only the table that comes with Chunkmill is read. A model that is not in it works too if `chunkmill models
    check` says so. On a terminal, models stand below the beginning of their names. `tokens/s` is what `chunkmill tune`
    measured on this machine. MTEB is an average over tasks that are not yours; where no score could be cited, none is
    shown.
    """
    measured = {yardstick.model.name: yardstick for yardstick in yardsticks(Settings.from_env())}
    models = known_models()
    if screen.json:
        screen.document([_fields(model, measured.get(model.name)) for model in models])
        return
    if screen.out.is_terminal:
        rows = _by_maker(models, measured)
    else:  # a program that reads a pipe wants the whole name in each line
        rows = [_row(model.name, model, measured) for model in models]
    screen.table(HEADS, rows, optional=["prompts", "cut to", "runs", "licence", "tokens/s", "MTEB", "languages"])
    for source in sorted({model.score_source for model in models if model.score_source is not None}):
        screen.say(("MTEB: ", "dim"), source, ".")
    for model in models:
        if model.note is not None:
            screen.say((f"{model.name}: ", "dim"), model.note, ".")
    if not measured:
        screen.hint("Nothing was measured on this machine yet: `chunkmill tune --model NAME` does that.")


def _by_maker(models: Iterable[KnownModel], measured: Mapping[str, Yardstick]) -> list[tuple[object, ...]]:
    """A row for each model, below one with its maker. The whole names would leave no room for most columns."""
    rows: list[tuple[object, ...]] = []
    for maker, makes in groupby(sorted(models, key=_maker), key=_maker):
        if maker:
            rows.append((f"{maker}/", *[Text("", justify="right")] * (len(HEADS) - 1)))
        rows += [_row(model.name.replace(f"{maker}/", "  "), model, measured) for model in makes]
    return rows


def _maker(model: KnownModel) -> str:
    """The name's part before the slash; of a provider's model nothing."""
    return model.name.rpartition("/")[0]


def _row(name: str, model: KnownModel, measured: Mapping[str, Yardstick]) -> tuple[object, ...]:
    """The cells of a model under ``HEADS``."""
    return (
        Text(name),
        model.dimensions,
        model.max_tokens,
        _millions(model.parameters),
        model.languages,
        _score(model),
        round(measured[model.name].tokens_per_second) if model.name in measured else None,
        model.licence,
        model.runs,
        _sizes(model),
        model.prompts or model.prompts_note,
    )


@click.command()
@click.option("--memory", type=Quantity("amount of memory", BYTES, "mib", "2GB"), metavar="SIZE",
              help="Maximum memory of the engine, such as 2GB.")  # fmt: skip
@click.option("--latency", type=Quantity("time", _SECONDS, "ms", "20ms"), metavar="TIME",
              help="Maximum time for one short text, such as 20ms.")  # fmt: skip
@click.option("--throughput", type=click.FloatRange(0), metavar="N", help="Minimum number of tokens per second.")
@click.option("--dimensions", type=click.IntRange(1), metavar="N", help="Maximum number of dimensions of a vector.")
@click.option(
    "--tokens", type=click.IntRange(1), metavar="N", help="Minimum number of tokens of a text that the model reads."
)
@click.option("--multilingual", is_flag=True, help="Only models for many languages.")
@click.option("--commercial", is_flag=True, help="Only models whose licence allows commercial use.")
@click.option("--paid", is_flag=True, help="Show models of paid providers too.")
@click.option("--prefer", type=click.Choice(PREFERENCES), default="quality", show_default=True,
              help="What to sort by.")  # fmt: skip
@click.option(
    "--limit",
    type=click.IntRange(1),
    default=5,
    show_default=True,
    metavar="N",
    help="Maximum number of models to show.",
)
@json_option
@click.pass_obj
def choose(
    screen: Screen, memory: float | None, latency: float | None, throughput: float | None, dimensions: int | None,
    tokens: int | None, multilingual: bool, commercial: bool, paid: bool, prefer: Preference, limit: int,
) -> None:  # fmt: skip
    """Choose a model by what this machine and your collection allow.

    Speed and memory are those that `chunkmill tune` measured on this machine. For a model that was not measured they
    are estimated from the nearest one that was. If no model meets all wishes, the exit code is 1.
    """
    wanted = Requirements(memory, latency, throughput, dimensions, tokens, multilingual, commercial, paid)
    measured = yardsticks(Settings.from_env())
    if wanted.needs_measurements and not measured:
        raise InvalidInput(
            "--latency and --throughput need a measurement of this machine, and there is none. Run `chunkmill tune "
            "--model all-MiniLM-L6-v2` (two minutes); the other models are then estimated from it."
        )
    judged = options(known_models(), measured, wanted, prefer)
    fitting = [option for option in judged if not option.failures]
    if screen.json:
        screen.document({"wanted": asdict(wanted), "options": [_option_fields(option) for option in judged]})
    else:
        _show(screen, fitting[:limit], len(fitting), judged, prefer)
    if not fitting:
        raise SystemExit(1)


def _show(screen: Screen, shown: list[Option], fitting: int, judged: list[Option], prefer: Preference) -> None:
    if not shown:
        lacks = Counter(failure for option in judged for failure in option.failures)
        named = ", ".join(f"{what} {many}" for what, many in lacks.most_common())
        screen.say(f"None of {count(len(judged), 'model')} meets all wishes. They fail at: {named}.")
        return
    screen.table(
        ["model", "dims", "tokens", "memory MiB", "ms", "tokens/s", "numbers", "licence", "MTEB"],
        [
            (option.model.name, option.dimensions, option.model.max_tokens, _whole(option.memory_mib),
             option.latency_ms, _whole(option.tokens_per_second), option.basis, option.model.licence,
             _score(option.model))
            for option in shown
        ],
    )  # fmt: skip
    screen.say(f"{fitting} of {count(len(judged), 'model')} meet all wishes.")
    if prefer == "quality" and any(option.model.score is None for option in shown):
        screen.hint(
            "Models without a score come after those with one, the larger first, because no score of theirs could be "
            "cited: they may be better."
        )
    if any(option.basis == "weights" for option in shown):
        screen.hint("Memory is that of the weights in fp32 alone: `chunkmill tune` measures the rest.")
    best = shown[0]
    if best.model.runs != "paid":
        screen.say("")
        for line in settings_of(best):
            screen.say(line)
    screen.hint(
        "MTEB's tasks are not yours: `chunkmill compare COLLECTION MODEL` judges two models by your own chunks and "
        "queries, before you embed everything."
    )


def settings_of(option: Option) -> list[str]:
    """The settings and the command with which a worker serves the model."""
    model = option.model
    prompts = f"?prompts={model.prompts}" if model.prompts is not None else ""
    lines = [f"EMBEDDING_MODEL={model.name}@<commit>{prompts}"]
    if option.dimensions != model.dimensions:
        lines.append(f"EMBEDDING_DIMENSIONS={option.dimensions}")
    if model.note is not None:
        lines.append(f"# {model.note}")
    if option.basis != "measured":
        lines.append(f"# then: chunkmill tune --model {shlex.quote(f'{model.name}@<commit>')}")
    return lines


def _fields(model: KnownModel, measured: Yardstick | None) -> dict[str, Any]:
    query, document = PROMPTS[model.prompts] if model.prompts is not None else (None, None)
    own = {"runs": model.runs, "cut_to": _sizes(model), "query_prompt": query, "document_prompt": document}
    here = None if measured is None else {"tokens_per_second": measured.tokens_per_second} | {
        "latency_ms": measured.latency_ms, "peak_mib": measured.peak_mib
    }  # fmt: skip
    usd = OPENAI_MODELS[model.name].prices[-1].plain if model.runs == "paid" else None
    return asdict(model) | own | {"measured_here": here, "usd_per_million_tokens": usd}


def _option_fields(option: Option) -> dict[str, Any]:
    numbers = {key: value for key, value in asdict(option).items() if key != "model"}
    return {"model": option.model.name, "score": option.model.score, "licence": option.model.licence} | numbers


def _sizes(model: KnownModel) -> str | None:
    sizes = model.sizes
    if not sizes:
        return None
    return f"{sizes[0]}–{sizes[-1]}" if isinstance(sizes, range) else ", ".join(map(str, sizes))  # noqa: RUF001


def _millions(number: int | None) -> str | None:
    return None if number is None else f"{number / 1e6:,.0f} M"


def _whole(number: float | None) -> int | None:
    return None if number is None else round(number)


def _score(model: KnownModel) -> str | None:
    return None if model.score is None else f"{model.score:.1f}"
