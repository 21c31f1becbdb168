"""The paid routes: ProviderBatches, contents in flight, lanes, charges; and doorbells by route.

Pollers of 0004 go on without their indexes, only slower while much is due. They do not look at the route: until they
are replaced too, keep to the local one.

Revises: 0004
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

ROUTES = {"old": "'local', 'auto'", "new": "'local', 'openai', 'openai-sync', 'auto'"}
UNRUNG = "state = 'available' AND rung_at IS NULL"
RUNG = "state = 'available' AND rung_at IS NOT NULL"
OLD = (
    ("ix_chunk_batches_unrung", ["priority", "job_id", "id", "not_before"], UNRUNG),
    ("ix_chunk_batches_rung", ["priority", "rung_at"], RUNG),
)
NEW = (
    ("ix_chunk_batches_unrung_by_route", ["route", "priority", "job_id", "id", "not_before"], UNRUNG),
    ("ix_chunk_batches_rung_by_route", ["route", "priority", "rung_at"], RUNG),
)


def upgrade() -> None:
    op.execute("SET LOCAL lock_timeout = '4s'")
    _allow_routes("new")
    op.add_column("jobs", sa.Column("deadline", sa.DateTime(timezone=True), nullable=True))
    op.add_column("jobs", sa.Column("routing", postgresql.JSONB(), server_default=sa.text("'[]'"), nullable=False))
    _create_tables()
    _validate_routes()
    for old, new in zip(OLD, NEW, strict=True):
        _replace(old, by=new)


def downgrade() -> None:
    """Refused while a job of a paid route is there: what it means is not known to the code of 0004."""
    op.execute("SET LOCAL lock_timeout = '4s'")
    _allow_routes("old")
    for table in (
        "budget_notices",
        "charges",
        "provider_suspects",
        "provider_batch_members",
        "provider_inputs",
        "provider_batches",
        "provider_lanes",
    ):
        op.drop_table(table)
    op.drop_column("jobs", "routing")
    op.drop_column("jobs", "deadline")
    _validate_routes()
    for old, new in zip(OLD, NEW, strict=True):
        _replace(new, by=old)


def _allow_routes(which: str) -> None:
    """NOT VALID, so that the lock is short; ``_validate_routes`` reads the tables without one."""
    for table in ("jobs", "chunk_batches"):
        op.execute(f"ALTER TABLE {table} DROP CONSTRAINT ck_{table}_route")
        op.execute(f"ALTER TABLE {table} ADD CONSTRAINT ck_{table}_route CHECK (route IN ({ROUTES[which]})) NOT VALID")


def _validate_routes() -> None:
    with op.get_context().autocommit_block():
        for table in ("jobs", "chunk_batches"):
            op.execute(f"ALTER TABLE {table} VALIDATE CONSTRAINT ck_{table}_route")


def _replace(old: tuple[str, list[str], str], *, by: tuple[str, list[str], str]) -> None:
    """CONCURRENTLY, so that workers go on; what an interrupted run left half built is made again."""
    name, columns, where = by
    with op.get_context().autocommit_block():
        op.drop_index(name, table_name="chunk_batches", postgresql_concurrently=True, if_exists=True)
        op.create_index(name, "chunk_batches", columns, postgresql_where=sa.text(where), postgresql_concurrently=True)
        op.drop_index(old[0], table_name="chunk_batches", postgresql_concurrently=True, if_exists=True)


def _create_tables() -> None:
    big, integer, text, at = sa.BigInteger, sa.Integer, sa.Text, sa.DateTime(timezone=True)
    now = sa.text("now()")

    def count(name: str, kind: type[sa.Integer] = integer) -> sa.Column[int]:
        return sa.Column(name, kind(), server_default="0", nullable=False)

    op.create_table(
        "provider_lanes",
        sa.Column("route", text(), nullable=False),
        sa.Column("paused_until", at),
        sa.Column("pause_reason", text()),
        sa.Column("stopped_at", at),
        sa.Column("stop_code", text()),
        sa.Column("stop_reason", text()),
        sa.Column("held_reason", text()),
        sa.Column("max_inputs", integer()),
        sa.Column("next_request_at", at),
        sa.Column("next_token_at", at),
        sa.PrimaryKeyConstraint("route", name=op.f("pk_provider_lanes")),
    )
    op.create_table(
        "provider_batches",
        sa.Column("id", big(), sa.Identity(always=True), nullable=False),
        sa.Column("space_id", integer(), nullable=False),
        sa.Column("state", text(), nullable=False),
        sa.Column("token", text(), nullable=False),
        sa.Column("server", text()),
        count("attempt"),
        sa.Column("lease_owner", text()),
        sa.Column("lease_until", at),
        sa.Column("not_before", at, server_default=now, nullable=False),
        sa.Column("rung_at", at),
        count("failures"),
        count("n_requests"),
        count("n_inputs"),
        count("n_contents"),
        count("n_tokens", big),
        count("n_bytes", big),
        sa.Column("input_file_id", text()),
        count("uploads"),
        count("creates"),
        count("resends"),
        sa.Column("creating_since", at),
        sa.Column("batch_id", text()),
        sa.Column("provider_status", text()),
        count("n_done"),
        sa.Column("output_file_id", text()),
        sa.Column("error_file_id", text()),
        count("downloads"),
        count("n_written"),
        count("n_dead"),
        count("n_returned"),
        sa.Column("oddities", postgresql.JSONB(), server_default=sa.text("'{}'"), nullable=False),
        sa.Column("cancel_requested_at", at),
        sa.Column("error_code", text()),
        sa.Column("error", text()),
        sa.Column("created_at", at, server_default=now, nullable=False),
        sa.Column("submitted_at", at),
        sa.Column("ended_at", at),
        sa.Column("closed_at", at),
        sa.CheckConstraint(
            "state IN ('gathering', 'gathered', 'uploaded', 'creating', 'submitted', 'collecting', 'cleaning', "
            "'closed')",
            name=op.f("ck_provider_batches_state"),
        ),
        sa.ForeignKeyConstraint(["space_id"], ["spaces.id"], name=op.f("fk_provider_batches_space_id_spaces")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_provider_batches")),
    )
    op.create_index("ix_provider_batches_created", "provider_batches", ["creating_since"])
    op.create_index(
        "ix_provider_batches_open", "provider_batches", ["not_before"], postgresql_where=sa.text("state <> 'closed'")
    )
    op.create_index("uq_provider_batches_batch_id", "provider_batches", ["batch_id"], unique=True)
    op.create_index(
        "uq_provider_batches_gathering",
        "provider_batches",
        ["space_id"],
        unique=True,
        postgresql_where=sa.text("state = 'gathering'"),
    )
    op.create_table(
        "provider_batch_members",
        sa.Column("provider_batch_id", big(), nullable=False),
        sa.Column("chunk_batch_id", big(), nullable=False),
        sa.ForeignKeyConstraint(
            ["provider_batch_id"],
            ["provider_batches.id"],
            name=op.f("fk_provider_batch_members_provider_batch_id_provider_batches"),
        ),
        sa.PrimaryKeyConstraint("provider_batch_id", "chunk_batch_id", name=op.f("pk_provider_batch_members")),
    )
    op.create_index(op.f("ix_provider_batch_members_chunk_batch_id"), "provider_batch_members", ["chunk_batch_id"])
    op.create_table(
        "provider_inputs",
        sa.Column("space_id", integer(), nullable=False),
        sa.Column("content_hash", sa.LargeBinary(), nullable=False),
        sa.Column("provider_batch_id", big()),
        sa.Column("chunk_batch_id", big(), nullable=False),
        sa.Column("attempt", integer(), nullable=False),
        sa.Column("job_id", big(), nullable=False),
        count("request_no"),
        count("position"),
        sa.Column("n_tokens", integer(), nullable=False),
        sa.Column("sent_tokens", integer(), nullable=False),
        sa.Column("truncated", sa.Boolean(), nullable=False),
        sa.Column("weights", postgresql.ARRAY(integer())),
        sa.PrimaryKeyConstraint("space_id", "content_hash", name=op.f("pk_provider_inputs")),
    )
    op.create_index(op.f("ix_provider_inputs_chunk_batch_id"), "provider_inputs", ["chunk_batch_id"])
    op.create_index(
        op.f("ix_provider_inputs_provider_batch_id_request_no_position"),
        "provider_inputs",
        ["provider_batch_id", "request_no", "position"],
    )
    op.create_table(
        "provider_suspects",
        sa.Column("space_id", integer(), nullable=False),
        sa.Column("content_hash", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("space_id", "content_hash", name=op.f("pk_provider_suspects")),
    )
    op.create_table(
        "charges",
        sa.Column("day", sa.Date(), nullable=False),
        sa.Column("route", text(), nullable=False),
        sa.Column("space_id", integer(), nullable=False),
        sa.Column("job_id", big(), nullable=False),
        sa.Column("provider_batch_id", big(), nullable=False),
        sa.Column("contents", big(), nullable=False),
        sa.Column("tokens", big(), nullable=False),
        sa.Column("usd", sa.Numeric(18, 10), nullable=False),
        sa.PrimaryKeyConstraint("day", "route", "space_id", "job_id", "provider_batch_id", name=op.f("pk_charges")),
    )
    op.create_index(op.f("ix_charges_job_id"), "charges", ["job_id"])
    op.create_table(
        "budget_notices",
        sa.Column("month", sa.Date(), nullable=False),
        sa.Column("percent", sa.SmallInteger(), nullable=False),
        sa.Column("created_at", at, server_default=now, nullable=False),
        sa.PrimaryKeyConstraint("month", "percent", name=op.f("pk_budget_notices")),
    )
