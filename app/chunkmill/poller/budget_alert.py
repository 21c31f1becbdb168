"""Gives the budget's warnings, in the log and to a webhook."""

from __future__ import annotations

import http.client
import json
import logging
import urllib.error
import urllib.request
from urllib.parse import urlsplit

import sqlalchemy as sa

from chunkmill.domain.budget import Budget
from chunkmill.ledger.money import budget as budgets
from chunkmill.settings import Settings

logger = logging.getLogger(__name__)

WEBHOOK_SECONDS = 5.0


def watch_budget(db: sa.Engine, settings: Settings) -> int | None:
    """Give the warning that is due, once for all pollers, and return its percentage. Call it about once a minute.

    If two thresholds are reached at once, the warning is about the higher one. A warning that the webhook did not
    accept is not marked as given, so the next call tries again. A webhook never raises an error here.
    """
    if settings.openai_monthly_budget_usd is None:
        return None
    with db.connect() as conn, conn.begin() as transaction:
        budget = budgets.read(conn, settings)
        due = budgets.due_notices(conn, budget, warn_percent=settings.openai_budget_warn_percent)
        if not due:
            return None
        url = settings.budget_webhook_url
        if url and (problem := _post(url, budget, due[-1])):
            transaction.rollback()
            logger.warning(
                "the budget's webhook at %s failed (%s), and the warning will be sent again: %s",
                urlsplit(url).hostname, problem, _warning(budget),
            )  # fmt: skip
            return None
    logger.warning("%s", _warning(budget))
    return due[-1]


def _warning(budget: Budget) -> str:
    what = "is used up, and new paid work waits" if budget.is_used_up else f"is {budget.percent} % used"
    return f"the budget for paid routes {what}: {budget.sentence()}"


def _post(url: str, budget: Budget, percent: int) -> str | None:
    """Why the webhook failed, without its address, whose path may be a secret; None if it accepted the warning."""
    body = {
        "event": "budget",
        "percent": percent,
        "spent_usd": f"{budget.spent:f}",
        "committed_usd": f"{budget.committed:f}",
        "lost_usd": f"{budget.lost:f}",
        "maybe_charged_usd": f"{budget.maybe_charged:f}",
        "limit_usd": f"{budget.limit:f}",
        "month": f"{budget.month:%Y-%m}",
    }
    headers = {"Content-Type": "application/json"}
    # The settings accept only https, and http on loopback.
    request = urllib.request.Request(url, json.dumps(body).encode(), headers, method="POST")  # noqa: S310
    # A proxy of the environment would read what goes by http, and the address may be a secret.
    handlers = [urllib.request.ProxyHandler({})] if url.startswith("http:") else []
    try:
        with urllib.request.build_opener(*handlers).open(request, timeout=WEBHOOK_SECONDS):
            return None
    except urllib.error.HTTPError as error:
        error.close()
        return f"HTTP {error.code}"
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        return type(reason).__name__
