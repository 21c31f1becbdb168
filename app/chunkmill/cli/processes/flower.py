"""`flower`: Celery's monitor, closed to strangers.

By default Flower listens on all interfaces, asks for no password, lets everybody control the workers, and never forgets
a host. We pass safer defaults as ``FLOWER_*`` variables, which Flower's configuration file and options override. Then
we let Flower's own code evaluate all three, and refuse a result that would be open to strangers.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import secrets
import socket
import sys
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

import click

from chunkmill.cli.late import Environment
from chunkmill.cli.output import Screen, json_option
from chunkmill.cli.processes.processes import PASS_THROUGH, require_extra
from chunkmill.errors import InvalidInput

DEFAULTS = {
    "FLOWER_ADDRESS": "127.0.0.1",
    "FLOWER_READ_ONLY": "True",
    "FLOWER_PURGE_OFFLINE_WORKERS": "600",
    # Flower runs its configuration file as Python, and by default that is flowerconfig.py of the current folder.
    "FLOWER_CONF": os.devnull,
    # Flower's own columns, and those of a doorbell's label: chunkmill.broker.Shown.
    "FLOWER_TASKS_COLUMNS": "name,args,kwargs,state,runtime,worker,received,uuid",
}
USER = "chunkmill"
SECRET_OPTIONS = ("basic_auth", "oauth2_secret", "cookie_secret", "broker_api")
NEEDS_LOGIN = "set FLOWER_BASIC_AUTH=user:password in the environment"
OPEN_API = "FLOWER_UNAUTHENTICATED_API"


@click.command(context_settings=PASS_THROUGH)
@click.option("--no-auth", is_flag=True, help="Ask for no password. This is refused if other machines can reach it.")
@click.argument("flower_args", nargs=-1, type=click.UNPROCESSED, metavar="[FLOWER ARGS]...")
@json_option
@click.pass_obj
def flower(screen: Screen, no_auth: bool, flower_args: tuple[str, ...]) -> None:
    """Run Flower, Celery's monitor, on 127.0.0.1:5555, read-only.

    FLOWER ARGS are Flower's own options, such as --port=5556. FLOWER_BASIC_AUTH=user:password sets the login. Without
    it, a password is made for this start and shown here. Flower shows doorbells and workers; `chunkmill status` and
    `chunkmill jobs` show the work itself.
    """
    require_extra("flower", "flower", "Flower")
    Environment.load(needs_database=False)
    opening, password = prepare(flower_args, no_auth=no_auth, environ=os.environ)
    if screen.json:
        login = {"user": USER, "password": password} if password else {}
        screen.document({"url": opening.url, "unix_socket": opening.unix_socket or None, **login})
    else:
        screen.say(f"Flower: {opening.unix_socket or opening.url}")
        if password:
            screen.say(f"User {USER}, password {password} (for this start; set FLOWER_BASIC_AUTH to choose your own)")
    _run(flower_args)


@dataclass(frozen=True, slots=True)
class FlowerAddress:
    """Where Flower listens, and who may open it."""

    address: str
    """Empty for all interfaces."""
    port: int
    unix_socket: str
    logins: tuple[str, ...]
    """Each is ``user:password``."""
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


def judge(opening: FlowerAddress, *, no_auth: bool, terminal: bool, environ: Mapping[str, str]) -> bool:
    """Whether a password has to be made. Raises :class:`InvalidInput` if Flower would be open to strangers."""
    for login in opening.logins:
        user, _, password = login.partition(":")
        if not user or not password or login != login.strip() or not login.isprintable():
            raise InvalidInput(
                "FLOWER_BASIC_AUTH must be user:password, or several of these separated by commas; one of them has no "
                "user, no password, or a blank or line break at an end."
            )
    if opening.unix_socket:
        where = f"the socket {opening.unix_socket}, which every user of this machine may open"
    elif not is_loopback(opening.address):
        where = f"{opening.address or 'all interfaces'}, which other machines may reach"
    else:
        where = ""
    if opening.asks_who:
        if no_auth:
            raise InvalidInput(
                "--no-auth and a password are both given: unset FLOWER_BASIC_AUTH, or leave --no-auth out."
            )
        return False
    if where:
        raise InvalidInput(f"Flower would listen on {where}, without a password: {NEEDS_LOGIN}.")
    if not no_auth:
        if not terminal:
            raise InvalidInput(f"there is no terminal to show a password on: {NEEDS_LOGIN}, or pass --no-auth.")
        return True
    if environ.get(OPEN_API):
        raise InvalidInput(
            f"{OPEN_API} would let every website that is open in a browser on this machine read Flower: unset it, or "
            f"{NEEDS_LOGIN}."
        )
    return False


def is_loopback(address: str) -> bool:
    """Whether only this machine can reach ``address``. To Flower an empty one means all interfaces."""
    if not address:
        return False
    try:
        addresses = {entry[4][0] for entry in socket.getaddrinfo(address, None)}
    except OSError as error:
        raise InvalidInput(
            f"Flower's address {address!r} cannot be resolved: {error}. Fix FLOWER_ADDRESS or --address."
        ) from None
    return all(ipaddress.ip_address(number).is_loopback for number in addresses)


def require_no_secret(arguments: tuple[str, ...]) -> None:
    """Raise :class:`InvalidInput` for a secret in the arguments, because every user of the machine can list them."""
    for argument in arguments:
        name = argument.lstrip("-").partition("=")[0].replace("-", "_")
        if argument.startswith("-") and name in SECRET_OPTIONS:
            raise InvalidInput(
                f"--{name} would show its secret to everybody who lists processes: set FLOWER_{name.upper()} in the "
                "environment instead."
            )


def read_opening(arguments: tuple[str, ...]) -> FlowerAddress:
    """Where Flower would listen, given its variables, the configuration file that they name, and ``arguments``."""
    from flower import command
    from tornado.options import Error

    # Flower silently ignores an option that it does not know.
    unknown = [argument for argument in arguments if not command.is_flower_option(argument)]
    if unknown:
        raise InvalidInput(
            f"Flower has no option {unknown[0]!r}; options are written --name=value, and --help lists them."
        )
    try:
        command.apply_env_options()
        command.apply_options("chunkmill flower", arguments)
    except (Error, ValueError, FileNotFoundError) as error:
        raise InvalidInput(f"Flower refuses its options: {error}. Fix the option or the FLOWER_* variable.") from None
    options: Any = command.options
    return FlowerAddress(
        address=options.address,
        port=options.port,
        unix_socket=options.unix_socket,
        logins=tuple(options.basic_auth or ()),
        oauth=bool(options.auth),
        scheme="https" if options.certfile and options.keyfile else "http",
        prefix=f"{options.url_prefix.strip('/')}/" if options.url_prefix else "",
    )


def prepare(
    arguments: tuple[str, ...], *, no_auth: bool, environ: MutableMapping[str, str]
) -> tuple[FlowerAddress, str]:
    """Set our defaults in ``environ``, and a password if one is needed. Returns where Flower will listen, and the
    password that was made, or an empty one.

    The password is not stored, because a file with it would have to be guarded. An operator can set FLOWER_BASIC_AUTH.
    """
    require_no_secret(arguments)
    if not environ.get("FLOWER_BASIC_AUTH"):
        environ.pop("FLOWER_BASIC_AUTH", None)  # Flower turns an empty one into a login that nobody can have
    for name, value in DEFAULTS.items():
        environ.setdefault(name, value)
    opening = read_opening(arguments)
    if not judge(opening, no_auth=no_auth, terminal=sys.stdout.isatty(), environ=environ):
        return opening, ""
    password = secrets.token_urlsafe(12)
    environ["FLOWER_BASIC_AUTH"] = f"{USER}:{password}"
    return opening, password


def _run(arguments: tuple[str, ...]) -> None:
    """Run Flower in this process until a signal ends it."""
    from celery.bin.celery import main
    from celery.utils import imports
    from flower.views.monitor import Metrics
    from tornado.web import authenticated

    # The metrics page names hosts and tasks, and is the only one of Flower's pages with content that asks for no login.
    Metrics.get = authenticated(Metrics.get)
    # Celery would look for chunkmill_workers in the current folder first.
    imports.cwd_in_path = contextlib.nullcontext
    sys.argv = ["celery", "-A", "chunkmill_workers", "flower", *arguments]
    raise SystemExit(main())
