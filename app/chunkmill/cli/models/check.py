"""`models check`."""

from __future__ import annotations

import importlib.util
import json
import subprocess
from pathlib import Path
from typing import Any, NoReturn

import click

from chunkmill.cli.late import Settings
from chunkmill.cli.output import Screen, duration, json_option
from chunkmill.errors import ModelLoadError, UnknownModel, install_command
from chunkmill.models import ModelFolder, resolve_model
from chunkmill.models.files import read_json
from chunkmill.models.known import NATIVE_ARCHITECTURES, KnownModel, find_known, known_models
from chunkmill.models.weights import weight_files
from chunkmill.system.python import module_command


@click.command()
@click.argument("model")
@click.option("--files-only", is_flag=True, help="Read its files, and do not load it.")
@json_option
@click.pass_obj
def check(screen: Screen, model: str, files_only: bool) -> None:
    """Say what MODEL is, what it needs, and whether it will work here.

    MODEL is a folder, the bundled model's name or org/name@revision, and must be on this machine already. First its
    files are read, as a producer does it; no code in them is run. Then a process of its own loads it with this
    machine's settings, and embeds a few texts. If it will not work, the exit code is 1. Nothing is written.
    """
    settings = Settings.from_env()
    try:
        folder = resolve_model(
            model, pooling=settings.embedding_pooling, precision=settings.embedding_precision, trust=settings.trust
        )
    except UnknownModel as error:
        _refused(screen, None, error.code, str(error), _advice(model, None))
    what, advice = _describe(folder), _advice(model, folder)
    if not screen.json:
        screen.fields(_shown(what))
    loaded = None if files_only else _load(screen, model)
    if loaded is not None and "error" in loaded:
        _refused(screen, what, loaded["error"], loaded["message"], advice)
    if screen.json:
        screen.document(what | {"works": None if loaded is None else True, "loaded": loaded, "advice": advice})
        return
    if loaded is not None:
        screen.say("")
        screen.say(
            ("It works", "green"),
            f" on {loaded['device']} ({loaded['backend']}, {loaded['dtype']}): loaded in "
            f"{duration(loaded['load_seconds'])}, {loaded['latency_ms']:.1f} ms for a short text, about "
            f"{loaded['tokens_per_second']:,.0f} tokens/s, {loaded['memory_mib']:,.0f} MiB.",
        )
    for line in advice:
        screen.say(("advice  ", "yellow"), line)


def _refused(screen: Screen, what: dict[str, Any] | None, code: str, message: str, advice: list[str]) -> NoReturn:
    if screen.json:
        screen.document((what or {}) | {"works": False, "error": code, "message": message, "advice": advice})
    else:
        screen.say("")
        screen.say(("It will not work here: ", "red"), message)
        for line in advice:
            screen.say(("advice  ", "yellow"), line)
    raise SystemExit(1)


def _describe(folder: ModelFolder) -> dict[str, Any]:
    """What the files say, for JSON."""
    spec = folder.spec
    weights = sum(file.stat().st_size for file in weight_files(folder.name, folder.transformer, pickle=folder.pickle))
    architecture = "static" if folder.static else read_json(folder.transformer / "config.json").get("model_type")
    runs = "static" if folder.static else "native" if architecture in NATIVE_ARCHITECTURES else "transformers"
    known = find_known(folder.name)
    return {
        "model": folder.name,
        "folder": str(folder.path),
        "architecture": architecture,
        "runs": runs,
        "dimensions": spec.dimensions,
        "cut_to": _sizes(folder),
        "max_tokens": spec.max_tokens,
        "pooling": str(spec.pooling),
        "modules": [module if isinstance(module, str) else type(module).__name__ for module in folder.modules],
        "document_prompt": spec.document_prompt,
        "query_prompt": spec.query_prompt,
        "weights_mib": round(weights / 2**20, 1),
        "licence": known.licence if known is not None else None,
        "fingerprint": folder.space().fingerprint,
    }


def _shown(what: dict[str, Any]) -> dict[str, object]:
    """The same for a person."""
    by = {
        "native": "by Chunkmill's own forward pass",
        "static": "as a table of tokens",
        "transformers": "by that of transformers",
    }
    cut = f", may be cut to {what['cut_to']}" if what["cut_to"] else ""
    prompts = [f"{side} {what[f'{side}_prompt']!r}" for side in ("query", "document") if what[f"{side}_prompt"]]
    return {
        "model": what["model"],
        "folder": what["folder"],
        "architecture": f"{what['architecture']}, computed {by[what['runs']]}",
        "vectors": f"{what['dimensions']:,} dimensions{cut}, pooling {what['pooling']}",
        "modules": " → ".join(what["modules"]) or None,
        "reads": f"{what['max_tokens']:,} tokens",
        "prompts": ", ".join(prompts) or None,
        "weights": f"{what['weights_mib']:,.1f} MiB",
        "licence": what["licence"],
        "space": what["fingerprint"][:12],
    }


def _sizes(folder: ModelFolder) -> str | None:
    sizes = folder.sizes
    if not sizes:
        return None
    return f"{sizes[0]} to {sizes[-1]}" if isinstance(sizes, range) else ", ".join(map(str, sizes))


def _advice(model: str, folder: ModelFolder | None) -> list[str]:
    """What the table of known models says that the files do not."""
    known, is_guess = _known(model)
    if known is None:
        return []
    lines = []
    of = f"If this is {known.name}: " if is_guess else ""
    if known.note is not None:
        lines.append(f"{of}{known.note}.")
    has_prompts = folder is not None and (folder.spec.query_prompt or folder.spec.document_prompt)
    if known.prompts is not None and not has_prompts:
        lines.append(
            f"{of}its card asks for prompts that the folder does not state. Name it as {model}?prompts={known.prompts}."
        )
    if known.licence is not None and not known.is_commercial:
        lines.append(f"{of}its licence, {known.licence}, does not allow commercial use.")
    return lines


def _known(model: str) -> tuple[KnownModel | None, bool]:
    """The model of the table, and whether only the name of the folder says so."""
    if (known := find_known(model)) is not None:
        return known, False
    last = Path(model.partition("?")[0]).name.lower()
    return next((one for one in known_models() if one.name.rpartition("/")[2].lower() == last), None), True


def _load(screen: Screen, model: str) -> dict[str, Any] | None:
    """The answer of the process that loads the model, because `chunkmill` itself never imports torch."""
    if importlib.util.find_spec("torch") is None:
        screen.hint(f"Only its files were read: loading it needs packages. Run: {install_command('worker')}")
        return None
    done = subprocess.run(
        module_command("chunkmill_workers.tuning.check", "--", model),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    try:
        answer: dict[str, Any] = json.loads(done.stdout)
    except ValueError:
        cause = (
            "it was killed: the machine has too little memory for the model" if done.returncode == -9 else "a defect"
        )
        last = done.stderr.strip().splitlines()[-1:] or ["it wrote nothing"]
        return {
            "error": ModelLoadError.code,
            "message": f"the process that loads it ended with exit code {done.returncode} ({cause}): {last[0][:300]}",
        }
    return answer
