"""What commands need of the databases and of the settings, imported when a command first uses it.

SQLAlchemy, Celery, psycopg and the rest take a second to import. ``chunkmill enqueue --help`` needs none of them, and
neither does a command that asks no server. Commands import these names from here instead of from their homes.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import redis
    import sqlalchemy as sa

    from chunkmill.broker import Broker
    from chunkmill.client import Client
    from chunkmill.client.base import ClientPart, store_errors
    from chunkmill.client.outbox import Deliverer
    from chunkmill.db.connect import (
        connected_processes,
        create_db,
        migrate,
        require_at_least,
        require_migrated,
        write_migrations,
    )
    from chunkmill.db.requirements import encoding_problem, numbers, pgvector_problem, version_problem
    from chunkmill.domain.arguments import require_name
    from chunkmill.domain.comparing import Change, Comparison, ComparisonQuote, Contender, as_json
    from chunkmill.domain.gates import Gates
    from chunkmill.embedded import Stack, StackStatus, temporary_folder
    from chunkmill.embedded.environment import Environment
    from chunkmill.embedded.paths import user_name
    from chunkmill.ledger.access import keys
    from chunkmill.ledger.provider.answering import forget_model
    from chunkmill.monitor import history
    from chunkmill.monitor.gauges import Gauges
    from chunkmill.monitor.servers import (
        Database,
        RedisServer,
        Status,
        read_database,
        read_redis,
        read_spaces,
        read_status,
        refused_message,
        shares_sessions,
    )
    from chunkmill.monitor.snapshot import Fault, unconfirmed_line
    from chunkmill.openai.catalogue import provider_model
    from chunkmill.openai.plan.tokens import from_tokenizer_file
    from chunkmill.poller.indexer import Indexer
    from chunkmill.poller.poller import Poller
    from chunkmill.poller.reembedding import Reembedder
    from chunkmill.settings import Settings
    from chunkmill.settings.addresses import redis_tls
    from chunkmill.spaces import canaries, registry
    from chunkmill.spaces.registry import Space
    from chunkmill.telemetry.exposition import MetricsServer, Process
    from chunkmill.tuning.profiles import (
        Profile,
        ProfileLookup,
        find_profile,
        memory_limit,
        profile_path,
        write_profile,
        write_whole,
    )
    from chunkmill.tuning.yardsticks import yardsticks
else:

    class _Late:
        """Stands for a name of another module. It may be called, asked for attributes and used by ``isinstance``."""

        __slots__ = ("_module", "_name")

        def __init__(self, module: str, name: str) -> None:
            self._module, self._name = module, name

        def _real(self) -> Any:
            module = import_module(self._module)
            if not self._name:
                return module
            if hasattr(module, self._name):
                return getattr(module, self._name)
            return import_module(f"{self._module}.{self._name}")

        def __getattr__(self, attribute: str) -> Any:
            return getattr(self._real(), attribute)

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return self._real()(*args, **kwargs)

        def __instancecheck__(self, thing: object) -> bool:
            return isinstance(thing, self._real())

    redis = _Late("redis", "")
    sa = _Late("sqlalchemy", "")
    Broker = _Late("chunkmill.broker", "Broker")
    Client = _Late("chunkmill.client", "Client")
    ClientPart = _Late("chunkmill.client.base", "ClientPart")
    store_errors = _Late("chunkmill.client.base", "store_errors")
    Deliverer = _Late("chunkmill.client.outbox", "Deliverer")
    connected_processes = _Late("chunkmill.db.connect", "connected_processes")
    create_db = _Late("chunkmill.db.connect", "create_db")
    migrate = _Late("chunkmill.db.connect", "migrate")
    require_at_least = _Late("chunkmill.db.connect", "require_at_least")
    require_migrated = _Late("chunkmill.db.connect", "require_migrated")
    write_migrations = _Late("chunkmill.db.connect", "write_migrations")
    encoding_problem = _Late("chunkmill.db.requirements", "encoding_problem")
    numbers = _Late("chunkmill.db.requirements", "numbers")
    pgvector_problem = _Late("chunkmill.db.requirements", "pgvector_problem")
    version_problem = _Late("chunkmill.db.requirements", "version_problem")
    require_name = _Late("chunkmill.domain.arguments", "require_name")
    Change = _Late("chunkmill.domain.comparing", "Change")
    Comparison = _Late("chunkmill.domain.comparing", "Comparison")
    ComparisonQuote = _Late("chunkmill.domain.comparing", "ComparisonQuote")
    Contender = _Late("chunkmill.domain.comparing", "Contender")
    as_json = _Late("chunkmill.domain.comparing", "as_json")
    Gates = _Late("chunkmill.domain.gates", "Gates")
    Stack = _Late("chunkmill.embedded", "Stack")
    StackStatus = _Late("chunkmill.embedded", "StackStatus")
    temporary_folder = _Late("chunkmill.embedded", "temporary_folder")
    Environment = _Late("chunkmill.embedded.environment", "Environment")
    user_name = _Late("chunkmill.embedded.paths", "user_name")
    keys = _Late("chunkmill.ledger.access", "keys")
    forget_model = _Late("chunkmill.ledger.provider.answering", "forget_model")
    history = _Late("chunkmill.monitor", "history")
    Gauges = _Late("chunkmill.monitor.gauges", "Gauges")
    Database = _Late("chunkmill.monitor.servers", "Database")
    RedisServer = _Late("chunkmill.monitor.servers", "RedisServer")
    Status = _Late("chunkmill.monitor.servers", "Status")
    read_database = _Late("chunkmill.monitor.servers", "read_database")
    read_redis = _Late("chunkmill.monitor.servers", "read_redis")
    read_spaces = _Late("chunkmill.monitor.servers", "read_spaces")
    read_status = _Late("chunkmill.monitor.servers", "read_status")
    refused_message = _Late("chunkmill.monitor.servers", "refused_message")
    shares_sessions = _Late("chunkmill.monitor.servers", "shares_sessions")
    Fault = _Late("chunkmill.monitor.snapshot", "Fault")
    unconfirmed_line = _Late("chunkmill.monitor.snapshot", "unconfirmed_line")
    provider_model = _Late("chunkmill.openai.catalogue", "provider_model")
    from_tokenizer_file = _Late("chunkmill.openai.plan.tokens", "from_tokenizer_file")
    Indexer = _Late("chunkmill.poller.indexer", "Indexer")
    Poller = _Late("chunkmill.poller.poller", "Poller")
    Reembedder = _Late("chunkmill.poller.reembedding", "Reembedder")
    Settings = _Late("chunkmill.settings", "Settings")
    redis_tls = _Late("chunkmill.settings.addresses", "redis_tls")
    canaries = _Late("chunkmill.spaces", "canaries")
    registry = _Late("chunkmill.spaces", "registry")
    Space = _Late("chunkmill.spaces.registry", "Space")
    MetricsServer = _Late("chunkmill.telemetry.exposition", "MetricsServer")
    Process = _Late("chunkmill.telemetry.exposition", "Process")
    Profile = _Late("chunkmill.tuning.profiles", "Profile")
    ProfileLookup = _Late("chunkmill.tuning.profiles", "ProfileLookup")
    find_profile = _Late("chunkmill.tuning.profiles", "find_profile")
    memory_limit = _Late("chunkmill.tuning.profiles", "memory_limit")
    profile_path = _Late("chunkmill.tuning.profiles", "profile_path")
    write_profile = _Late("chunkmill.tuning.profiles", "write_profile")
    write_whole = _Late("chunkmill.tuning.profiles", "write_whole")
    yardsticks = _Late("chunkmill.tuning.yardsticks", "yardsticks")

__all__ = [
    "Broker",
    "Change",
    "Client",
    "ClientPart",
    "Comparison",
    "ComparisonQuote",
    "Contender",
    "Database",
    "Deliverer",
    "Environment",
    "Fault",
    "Gates",
    "Gauges",
    "Indexer",
    "MetricsServer",
    "Poller",
    "Process",
    "Profile",
    "ProfileLookup",
    "RedisServer",
    "Reembedder",
    "Settings",
    "Space",
    "Stack",
    "StackStatus",
    "Status",
    "as_json",
    "canaries",
    "connected_processes",
    "create_db",
    "encoding_problem",
    "find_profile",
    "forget_model",
    "from_tokenizer_file",
    "history",
    "keys",
    "memory_limit",
    "migrate",
    "numbers",
    "pgvector_problem",
    "profile_path",
    "provider_model",
    "read_database",
    "read_redis",
    "read_spaces",
    "read_status",
    "redis",
    "redis_tls",
    "refused_message",
    "registry",
    "require_at_least",
    "require_migrated",
    "require_name",
    "sa",
    "shares_sessions",
    "store_errors",
    "temporary_folder",
    "unconfirmed_line",
    "user_name",
    "version_problem",
    "write_migrations",
    "write_profile",
    "write_whole",
    "yardsticks",
]
