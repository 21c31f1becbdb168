"""`models export`."""

from __future__ import annotations

import json
import subprocess
from typing import Any

import click

from chunkmill.cli.output import Screen, json_option
from chunkmill.cli.processes.processes import require_extra
from chunkmill.domain.shown import shown
from chunkmill.errors import ModelLoadError
from chunkmill.system.python import module_command

_TAIL_LINES = 15


@click.command()
@click.argument("model")
@click.option(
    "--backend", type=click.Choice(["onnx", "openvino"]), required=True, help="Library that will run the model."
)
@click.option("--force", is_flag=True, help="Export the model again if it was already exported.")
@json_option
@click.pass_obj
def export(screen: Screen, model: str, backend: str, force: bool) -> None:
    """Export MODEL for ONNX Runtime or OpenVINO, so that workers on this machine can use them.

    MODEL is the bundled model's name, a folder or org/name@revision, and must be on this machine already. An export
    is needed once for each machine and user. It is kept only if its vectors agree with the model's own, and it
    belongs to the digest of the model's weights: changed weights need a new export.
    """
    require_extra("worker", "torch", "exporting a model")
    screen.hint(f"Exporting {model} for {backend}; this takes about a minute.")
    answer = _export(model, backend, force=force)
    if "error" in answer:
        screen.error(answer["error"], answer["message"])
        raise SystemExit(1)
    if screen.json:
        screen.document(answer)
        return
    done = "is exported" if answer["new"] else "was already exported (--force exports it again)"
    screen.say(f"{model} {done}: {answer['path']}, {answer['bytes'] / 1e6:,.0f} MB.")
    screen.say(f"Lowest cosine of a token to the model's own in fp32: {answer['min_cosine']:.7f}.")


def _export(model: str, backend: str, *, force: bool) -> dict[str, Any]:
    """The answer of the process that exports the model, because `chunkmill` itself never imports torch."""
    options = ["--backend", backend, *(["--force"] if force else [])]
    done = subprocess.run(
        module_command("chunkmill_workers.engine.backends.export", *options, "--", model),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    try:
        answer: dict[str, Any] = json.loads(done.stdout)
    except ValueError:
        # The process was killed or has a defect, so what it wrote to stderr is all that is known.
        tail = "\n".join(done.stderr.splitlines()[-_TAIL_LINES:])
        click.echo(shown(tail, lines=True), err=True)
        raise ModelLoadError(
            f"the process that exports {model!r} ended early with exit code {done.returncode}; the end of its "
            "output is above. Exit code -9 means that it was killed: the machine has too little memory for it."
        ) from None
    return answer
