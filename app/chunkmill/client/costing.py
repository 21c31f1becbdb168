"""What texts cost that workers embed while a call waits for them: said before they are sent, and counted meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from decimal import Decimal

import sqlalchemy as sa

from chunkmill.client.estimate import EstimateRequest, provider_rule
from chunkmill.domain.budget import dollars
from chunkmill.domain.costs import Spent, known_sum, sum_of
from chunkmill.domain.embedded import EmbeddedTexts, counted, estimated_tokens
from chunkmill.domain.providers import OPENAI
from chunkmill.domain.spaces import SpaceSpec
from chunkmill.domain.states import Route
from chunkmill.errors import BudgetExceeded, InvalidSetting
from chunkmill.ledger.judging import Count, uncounted
from chunkmill.ledger.money import budget, charges
from chunkmill.openai.catalogue import model_for
from chunkmill.settings import Settings
from chunkmill.spaces import registry
from chunkmill.store import read


class PricedSpace:
    """A space, which need not be registered yet, and what it costs to embed texts in it by plain requests."""

    def __init__(
        self, transaction: Callable[[], AbstractContextManager[sa.Connection]], settings: Settings, spec: SpaceSpec
    ) -> None:
        """Raises :class:`InvalidSetting` if a provider serves the space and none is known."""
        self.spec = spec
        self.is_paid = spec.provider == OPENAI
        if self.is_paid:
            settings.require_provider()
            request = EstimateRequest(spec, Route.OPENAI_SYNC, None, spec.long_text.policy)
            self._rule = provider_rule(settings, request)
            with transaction() as conn:
                self._price = charges.price_today(conn, model_for(settings, spec))

    def tokens_of(self, texts: Iterable[str]) -> int:
        """How many tokens a provider is sent, by the rules of an enqueue; for a local model it is an estimate."""
        if not self.is_paid:
            return sum(map(estimated_tokens, texts))
        return self._rule([(b"", text) for text in texts])[0]

    def usd_of(self, tokens: int) -> Decimal | None:
        """US dollars; 0 for a local model, and None if a provider's model has no price."""
        if not self.is_paid:
            return Decimal(0)
        return None if self._price is None else self._price.of(tokens, Route.OPENAI_SYNC)


def without_vector(conn: sa.Connection, spec: SpaceSpec, hashes: Sequence[bytes]) -> Sequence[bytes]:
    """Those of the contents that have no vector in a space, which are all if there is no such space. Nothing is
    written, so that a quote leaves nothing behind.
    """
    space = registry.find_and_hold(conn, spec.fingerprint)
    return hashes if space is None else read.without_vector(conn, space, hashes)


def require_affordable(
    conn: sa.Connection,
    settings: Settings,
    specs: Sequence[SpaceSpec],
    usd: Decimal | None,
    *,
    limit: Decimal | None,
    what: str,
    advice: str,
) -> None:
    """Raise :class:`BudgetExceeded` if what a call has embedded in these spaces would cost more than ``limit``, or than
    the month has left, and :class:`InvalidSetting` if a limit cannot be kept because a model has no price.
    """
    paid = [spec for spec in specs if spec.provider == OPENAI]
    if not paid:
        return
    for spec in paid:
        budget.require_budget(conn, settings, spec)
    require_within(usd, limit, what=what, advice=advice)
    left = budget.headroom(conn, settings)
    if usd is not None and left is not None and usd > left:
        raise _too_dear(what, usd, left, "what OPENAI_MONTHLY_BUDGET_USD has left this month", advice)


def require_within(usd: Decimal | None, limit: Decimal | None, *, what: str, advice: str) -> None:
    """Raise :class:`BudgetExceeded` if something paid would cost more than its caller's ``limit``, and
    :class:`InvalidSetting` if nobody knows, because a model has no price."""
    if limit is None:
        return
    if usd is None:
        raise InvalidSetting("max_usd is given and a model has no price: give it usd in OPENAI_MODELS.")
    if usd > limit:
        raise _too_dear(what, usd, limit, "the most that it may cost (max_usd)", advice)


def _too_dear(what: str, usd: Decimal, most: Decimal, name: str, advice: str) -> BudgetExceeded:
    return BudgetExceeded(f"{what} would cost about {dollars(usd)} USD, and {name} is {dollars(most)} USD. {advice}")


class Spending:
    """Counts what a call spends, for whoever pays for it.

    Texts that are with workers count as :class:`PricedSpace` expects. If the call fails, nobody knows how many of them
    were embedded, and so they stay counted.
    """

    def __init__(self, tell: Callable[[Spent], object] | None) -> None:
        """``tell`` gets the sum before and after each request."""
        self._tell = tell
        self._spent = Spent(0, 0, Decimal(0), Decimal(0))

    def embed(self, priced: PricedSpace, texts: Sequence[str], ask: Callable[[], EmbeddedTexts]) -> EmbeddedTexts:
        """What ``ask`` returns, which has these texts embedded."""
        if self._tell is None or not texts:
            return ask()
        before, expected = self._spent, priced.tokens_of(texts)
        self._note(before, len(texts), expected, priced.usd_of(expected))
        embedded = ask()
        _, tokens = counted(embedded, texts, lambda text: priced.tokens_of([text]))
        made = len(texts) if embedded.made is None else int(embedded.made.sum())
        self._note(before, made, tokens, priced.usd_of(tokens))
        return embedded

    def _note(self, before: Spent, texts: int, tokens: int, usd: Decimal | None) -> None:
        self._spent = Spent(
            before.texts + texts,
            before.tokens + tokens,
            sum_of((before.usd, usd)),
            known_sum((before.known_usd, usd)),
        )
        if self._tell is not None:
            self._tell(self._spent)


def counting(
    transaction: Callable[[], AbstractContextManager[sa.Connection]],
    settings: Settings,
    tell: Callable[[Spent], object] | None,
) -> Count:
    """Counts what is embedded in any space, for whoever pays for it, as :class:`Spending` does."""
    if tell is None:
        return uncounted
    spending, priced = Spending(tell), dict[str, PricedSpace]()

    def count(spec: SpaceSpec, texts: Sequence[str], ask: Callable[[], EmbeddedTexts]) -> EmbeddedTexts:
        if spec.fingerprint not in priced:
            priced[spec.fingerprint] = PricedSpace(transaction, settings, spec)
        return spending.embed(priced[spec.fingerprint], texts, ask)

    return count
