"""`keys`."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from decimal import Decimal, InvalidOperation

import click

from chunkmill.cli.late import (
    Environment,
    create_db,
    require_at_least,
    require_migrated,
    require_name,
    sa,
    store_errors,
)
from chunkmill.cli.late import keys as stored
from chunkmill.cli.output import Group, Screen, json_option
from chunkmill.domain.keys import ApiKey, KeyLimits, MonthUsage, Scope
from chunkmill.errors import InvalidInput, NotFound

_DAYS = re.compile(r"([0-9]{1,5})d", re.ASCII)
USUAL_SCOPES = (Scope.EMBED, Scope.SEARCH)


@click.group(cls=Group)
@json_option
def keys() -> None:
    """Create, list and revoke the keys of the gateway."""


@keys.command()
@click.argument("name")
@click.option(
    "--scope",
    "scopes",
    multiple=True,
    type=click.Choice([scope.value for scope in Scope]),
    help="What the key allows; may be given several times. admin allows everything.  [default: embed, search]",
)
@click.option("--model", "models", multiple=True, help="A model that the key may use.  [default: all]")
@click.option("--collection", "collections", multiple=True, help="A collection that it may see.  [default: all]")
@click.option(
    "--tenant",
    help="Whose files and batches the key sees: those of all keys of one tenant.  [default: the key's name]",
)
@click.option("--requests-per-minute", type=click.IntRange(1, 2**31 - 1), help="Maximum number at each gateway.")
@click.option("--tokens-per-minute", type=click.IntRange(1, 2**62), help="Maximum number at each gateway.")
@click.option(
    "--parallel", type=click.IntRange(1, 2**31 - 1), help="Maximum number of requests at once at each gateway."
)
@click.option(
    "--tokens-per-month", type=click.IntRange(0, 2**62), help="Maximum in a month (UTC) at all gateways together."
)
@click.option(
    "--usd-per-month", metavar="AMOUNT", help="Maximum of US dollars that paid routes may cost in a month (UTC)."
)
@click.option("--expires", metavar="DAYS|TIME", help="When the key ends: 90d, or a time such as 2027-01-31T12:00Z.")
@json_option
@click.pass_obj
def create(
    screen: Screen,
    name: str,
    scopes: tuple[str, ...],
    models: tuple[str, ...],
    collections: tuple[str, ...],
    tenant: str | None,
    requests_per_minute: int | None,
    tokens_per_minute: int | None,
    parallel: int | None,
    tokens_per_month: int | None,
    usd_per_month: str | None,
    expires: str | None,
) -> None:
    """Create a key and print it. This is the only time that it can be seen."""
    require_name("name", name)
    if tenant is not None:
        require_name("--tenant", tenant)
    for one in collections:
        require_name("--collection", one)
    limits = KeyLimits(requests_per_minute, tokens_per_minute, parallel, tokens_per_month, _dollars(usd_per_month))
    expires_at = None if expires is None else _moment(expires, datetime.now(UTC))
    wanted = [Scope(scope) for scope in scopes] or list(USUAL_SCOPES)
    owner = name if tenant is None else tenant
    with _database() as conn:
        listed = stored.list_all(conn)
        key_id, key = stored.create(
            conn,
            name=name,
            tenant=owner,
            scopes=set(wanted),
            models=models or None,
            collections=collections or None,
            limits=limits,
            expires_at=expires_at,
        )
        unknown = stored.unknown_collections(conn, collections)
    if screen.json:
        screen.document({"id": key_id, "name": name, "key": key})
        return
    screen.text(key)
    screen.hint(f"This is key {key_id}, and it is not shown again. Callers send it as 'Authorization: Bearer KEY'.")
    now = datetime.now(UTC)
    beside = [str(one.id) for one, _ in listed if one.tenant == owner and one.state(now) == "live"]
    if tenant is None and beside:
        keys_beside = f"key{'s' if len(beside) > 1 else ''} {', '.join(beside)}"
        screen.hint(
            f"Its tenant is {owner!r}, like that of {keys_beside}, so they see each other's files and batches. "
            "--tenant names another one."
        )
    for one in unknown:
        screen.hint(
            f"There is no collection {one!r} yet. The key may use it as soon as there is one. If the name is wrong: "
            f"chunkmill keys revoke {key_id}"
        )
    if not collections:
        screen.hint(
            "It may use all collections, with their jobs. With --collection it may use only those that you name."
        )


@keys.command("list")
@json_option
@click.pass_obj
def list_(screen: Screen) -> None:
    """List the keys: what each allows, and what it used in this month (UTC).

    USD is what the key's requests cost, and the jobs, batches and re-embeddings that it began. `reserved` is the part
    of it that open ones are still expected to cost. As they continue, the real charges replace it.
    """
    with _database() as conn:
        listed = stored.list_all(conn)
    now = datetime.now(UTC)
    if screen.json:
        screen.document([_fields(key, used, now) for key, used in listed])
    elif not listed:
        screen.say("No key has been created. Create one: chunkmill keys create NAME")
    else:
        heads = ["id", "key begins", "name", "tenant", "state", "scopes", "models", "collections", "limits"]
        uses = ["last used", "requests", "tokens", "USD", "reserved"]
        screen.table([*heads, *uses], [_row(key, used, now) for key, used in listed])


@keys.command()
@click.argument("key_id", metavar="ID", type=click.IntRange(1))
@json_option
@click.pass_obj
def revoke(screen: Screen, key_id: int) -> None:
    """Revoke a key. Every gateway refuses it at once, or within ten seconds if a pooler keeps notifications back."""
    with _database() as conn:
        if not stored.revoke(conn, key_id):
            if any(one.id == key_id for one, _ in stored.list_all(conn)):
                raise NotFound(f"key {key_id} was revoked before. `chunkmill keys list` shows all keys.")
            raise NotFound(f"there is no key {key_id}. `chunkmill keys list` shows all keys.")
        is_last = not stored.any_live(conn)
    if screen.json:
        screen.document({"id": key_id, "is_last": is_last})
        return
    screen.say(f"Key {key_id} is revoked.")
    if is_last:
        screen.hint("No key is left, so running gateways refuse all requests. Create one: chunkmill keys create NAME")


def _fields(key: ApiKey, used: MonthUsage, now: datetime) -> dict[str, object]:
    return asdict(key) | {"state": key.state(now), "month": asdict(used)}


def _row(key: ApiKey, used: MonthUsage, now: datetime) -> tuple[object, ...]:
    return (
        key.id, f"cmk_{key.id}_{key.prefix}", key.name, key.tenant, key.state(now), ", ".join(key.scopes),
        _some(key.models), _some(key.collections), _limits(key.limits),
        None if key.last_used_at is None else f"{key.last_used_at:%Y-%m-%d %H:%M}",
        used.requests, used.tokens, f"{used.usd:.4f}", f"{used.reserved_usd:.4f}",
    )  # fmt: skip


def _some(names: tuple[str, ...] | None) -> str:
    return "all" if names is None else ", ".join(names)


def _limits(limits: KeyLimits) -> str:
    parts = [
        (limits.requests_per_minute, "requests/min"),
        (limits.tokens_per_minute, "tokens/min"),
        (limits.parallel_requests, "at once"),
        (limits.tokens_per_month, "tokens/month"),
        (limits.usd_per_month, "USD/month"),
    ]
    return ", ".join(f"{amount:,} {what}" for amount, what in parts if amount is not None) or "none"


def _dollars(given: str | None) -> Decimal | None:
    if given is None:
        return None
    try:
        amount = Decimal(given)
    except InvalidOperation:
        amount = Decimal("NaN")
    if not amount.is_finite() or amount < 0 or amount > 10**9:
        raise InvalidInput(f"--usd-per-month is {given[:40]!r}; it must be US dollars, such as 12.50.")
    return amount


def _moment(given: str, now: datetime) -> datetime:
    """When a key ends. Raises :class:`InvalidInput`."""
    if days := _DAYS.fullmatch(given):
        return now + timedelta(days=int(days[1]))
    try:
        moment = datetime.fromisoformat(given)
    except ValueError:
        raise InvalidInput(
            f"--expires is {given[:40]!r}; it must be days such as 90d, or a time with its zone."
        ) from None
    if moment.tzinfo is None:
        in_utc = moment.isoformat(timespec="minutes")
        raise InvalidInput(f"--expires is {given[:40]!r}, which has no zone. Write {in_utc}Z for UTC.")
    if moment <= now:
        raise InvalidInput(f"--expires is {given[:40]!r}, which is over.")
    return moment


@contextlib.contextmanager
def _database() -> Iterator[sa.Connection]:
    """One transaction."""
    db = create_db(Environment.load().settings.require_database_url(), role="cli", pool_size=1)
    try:
        require_migrated(db)
        with store_errors(db), db.begin() as conn:
            require_at_least(conn, "0019")
            yield conn
    finally:
        db.dispose()
