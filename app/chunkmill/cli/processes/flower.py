"""Flower, Celery's monitor, closed to strangers.

Flower's own defaults are all interfaces, no password, control of the workers by anyone, and every host kept for ever.
Ours are given to it as ``FLOWER_*`` variables, which its configuration file and its options win over; what it makes of
all three is then read back, by its own code, and refused where it would be open.
"""

from __future__ import annotations

import ipaddress
import os
import secrets
import socket
import sys
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

import click

from chunkmill.cli.output import Screen, json_option
from chunkmill.cli.processes.processes import PASS_THROUGH, require_extra
from chunkmill.embedded.environment import Environment
from chunkmill.errors import InvalidInput

DEFAULTS = {
    "FLOWER_ADDRESS": "127.0.0.1",
    "FLOWER_READ_ONLY": "True",
    "FLOWER_PURGE_OFFLINE_WORKERS": "600",
    # Flower's own, and what a doorbell says of itself: chunkmill.broker.Shown.
    "FLOWER_TASKS_COLUMNS": "name,args,kwargs,state,runtime,worker,received,uuid",
}
USER = "chunkmill"
SECRET_OPTIONS = ("basic_auth", "oauth2_secret", "cookie_secret", "broker_api")
NEEDS_LOGIN = "set FLOWER_BASIC_AUTH=user:password in the environment"
OPEN_API = "FLOWER_UNAUTHENTICATED_API"


@click.command(context_settings=PASS_THROUGH)
@click.option("--no-auth", is_flag=True, help="Ask for no password. Only where no other machine can reach it.")
@click.argument("flower_args", nargs=-1, type=click.UNPROCESSED, metavar="[FLOWER ARGS]...")
@json_option
@click.pass_obj
def flower(screen: Screen, no_auth: bool, flower_args: tuple[str, ...]) -> None:
    """Run Flower, Celery's monitor, on 127.0.0.1:5555, read-only. Takes Flower's options, as --port=5556.

    FLOWER_BASIC_AUTH=user:password says who may open it; without it a password is made for this start and shown here.
    It shows doorbells and workers; `chunkmill status` and `jobs` show the work itself.
    """
    require_extra("flower", "flower", "Flower")
    Environment.load(start_embedded=False)
    opening, password = prepare(flower_args, no_auth=no_auth, environ=os.environ)
    if screen.json:
        login = {"user": USER, "password": password} if password else {}
        screen.document({"url": opening.url, "unix_socket": opening.unix_socket or None, **login})
    else:
        screen.say(f"Flower: {opening.unix_socket or opening.url}")
        if password:
            screen.say(f"User {USER}, password {password} (of this start; FLOWER_BASIC_AUTH sets your own)")
    _run(flower_args)


@dataclass(frozen=True, slots=True)
class Opening:
    """Where Flower listens, and whom it lets in."""

    address: str
    """Empty: all interfaces."""
    port: int
    unix_socket: str
    logins: tuple[str, ...]
    """``user:password`` each."""
    oauth: bool
    scheme: str = "http"
    prefix: str = ""

    @property
    def asks_who(self) -> bool:
        return bool(self.logins) or self.oauth

    @property
    def url(self) -> str:
        host = f"[{self.address}]" if ":" in self.address else self.address
        return f"{self.scheme}://{host}:{self.port}/{self.prefix}"


def judge(opening: Opening, *, no_auth: bool, terminal: bool, environ: Mapping[str, str]) -> bool:
    """Whether a password has to be made for this terminal. Raises :class:`InvalidInput` where it must not start."""
    for login in opening.logins:
        user, _, password = login.partition(":")
        if not user or not password:
            raise InvalidInput(
                "FLOWER_BASIC_AUTH must be user:password, several of them with commas between; one of them has no "
                "user or no password."
            )
    if opening.unix_socket:
        where = f"the socket {opening.unix_socket}, which every user of this machine may open"
    elif not is_loopback(opening.address):
        where = f"{opening.address or 'all interfaces'}, which other machines may reach"
    else:
        where = ""
    if opening.asks_who:
        if no_auth:
            raise InvalidInput("--no-auth is given, and so is a password: unset FLOWER_BASIC_AUTH, or drop --no-auth.")
        return False
    if where:
        raise InvalidInput(f"Flower would listen on {where}, and ask nobody for a password: {NEEDS_LOGIN}.")
    if not no_auth:
        if not terminal:
            raise InvalidInput(f"there is no terminal to show a password on: {NEEDS_LOGIN}, or say --no-auth.")
        return True
    if environ.get(OPEN_API):
        raise InvalidInput(
            f"{OPEN_API} would let every web site that is open in a browser here read Flower: unset it, or "
            f"{NEEDS_LOGIN}."
        )
    return False


def is_loopback(address: str) -> bool:
    """Whether only this machine can reach ``address``, a name or a number. Empty is Flower's word for everywhere."""
    if not address:
        return False
    try:
        found = {entry[4][0] for entry in socket.getaddrinfo(address, None)}
    except OSError as error:
        raise InvalidInput(f"Flower's address {address!r} cannot be resolved: {error}") from None
    return all(ipaddress.ip_address(each).is_loopback for each in found)


def require_no_secret(arguments: tuple[str, ...]) -> None:
    """Raise :class:`InvalidInput` for a secret in the arguments: every user of the machine can list them."""
    for argument in arguments:
        name = argument.lstrip("-").partition("=")[0].replace("-", "_")
        if argument.startswith("-") and name in SECRET_OPTIONS:
            raise InvalidInput(
                f"--{name} would show its secret in the list of processes: set FLOWER_{name.upper()} in the "
                "environment instead."
            )


def read_opening(arguments: tuple[str, ...]) -> Opening:
    """What Flower makes of its variables, its configuration file and ``arguments``."""
    from flower import command
    from tornado.options import Error

    # Left to its log, which says nothing of it, an option that Flower does not know would be one that it ignores.
    unknown = [each for each in arguments if not command.is_flower_option(each)]
    if unknown:
        raise InvalidInput(f"Flower has no option {unknown[0]!r}; options are --name=value, and --help lists them.")
    try:
        command.apply_env_options()
        command.apply_options("chunkmill flower", arguments)
    except (Error, ValueError, FileNotFoundError) as error:
        raise InvalidInput(f"Flower's options: {error}") from None
    options: Any = command.options
    return Opening(
        address=options.address,
        port=options.port,
        unix_socket=options.unix_socket,
        logins=tuple(options.basic_auth or ()),
        oauth=bool(options.auth),
        scheme="https" if options.certfile and options.keyfile else "http",
        prefix=f"{options.url_prefix.strip('/')}/" if options.url_prefix else "",
    )


def prepare(arguments: tuple[str, ...], *, no_auth: bool, environ: MutableMapping[str, str]) -> tuple[Opening, str]:
    """Give Flower our defaults, and a password where it has none: returns it, or an empty one where none was made.

    It is not kept: a file of it would have to be guarded, and its owner can set FLOWER_BASIC_AUTH.
    """
    require_no_secret(arguments)
    if not environ.get("FLOWER_BASIC_AUTH"):
        environ.pop("FLOWER_BASIC_AUTH", None)  # of an empty one Flower makes a login that nobody can have
    for name, value in DEFAULTS.items():
        environ.setdefault(name, value)
    opening = read_opening(arguments)
    if not judge(opening, no_auth=no_auth, terminal=sys.stdout.isatty(), environ=environ):
        return opening, ""
    password = secrets.token_urlsafe(12)
    environ["FLOWER_BASIC_AUTH"] = f"{USER}:{password}"
    return opening, password


def _run(arguments: tuple[str, ...]) -> None:
    """Be Flower, until a signal."""
    from celery.bin.celery import main
    from flower.views.monitor import Metrics
    from tornado.web import authenticated

    # It names hosts and tasks, and is the one page of Flower's that asks nobody. /healthcheck says "OK" and no more.
    Metrics.get = authenticated(Metrics.get)
    sys.argv = ["celery", "-A", "chunkmill_workers", "flower", *arguments]
    raise SystemExit(main())
