"""`models export`: a model's graph and weights in the form that ONNX Runtime or OpenVINO reads."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import click

from chunkmill.cli.output import Screen, json_option
from chunkmill.cli.processes.processes import require_extra
from chunkmill.errors import ModelLoadError

_TAIL_LINES = 15


@click.command()
@click.argument("model")
@click.option("--backend", type=click.Choice(["onnx", "openvino"]), required=True, help="What shall run it.")
@click.option("--force", is_flag=True, help="Make it again where it is already there.")
@json_option
@click.pass_obj
def export(screen: Screen, model: str, backend: str, force: bool) -> None:
    """Export MODEL, so that workers can run it with another backend. Once for each machine and user.

    MODEL is a name, a folder or org/name@revision, on this machine already. The export is compared with the model
    before it is kept, and is found by the digest of the model's weights: other weights need another export.
    """
    require_extra("worker", "torch", "exporting a model")
    screen.hint(f"Exporting {model} for {backend}; this takes a minute.")
    answer = _export(model, backend, force=force)
    if "error" in answer:
        screen.error(answer["error"], answer["message"])
        raise SystemExit(1)
    if screen.json:
        screen.document(answer)
        return
    done = "is exported" if answer["new"] else "was already exported (--force makes it again)"
    screen.say(f"{model} {done}: {answer['path']}, {answer['bytes'] / 1e6:,.0f} MB.")
    screen.say(f"Lowest cosine of a token to the model's own in fp32: {answer['min_cosine']:.7f}.")


def _export(model: str, backend: str, *, force: bool) -> dict[str, Any]:
    """What the process says that does it: `app` itself never imports torch."""
    options = ["--backend", backend, *(["--force"] if force else [])]
    done = subprocess.run(
        [sys.executable, "-m", "chunkmill_workers.engine.backends.export", *options, "--", model],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    try:
        answer: dict[str, Any] = json.loads(done.stdout)
    except ValueError:
        # Killed, or a defect: then what it wrote beside is all there is to know.
        tail = "\n".join(done.stderr.splitlines()[-_TAIL_LINES:])
        click.echo(tail, err=True)
        raise ModelLoadError(
            f"the process that exports {model!r} ended with exit code {done.returncode} before it was done; the end "
            "of what it said is above. If it was killed (-9), the machine has too little memory for it"
        ) from None
    return answer
