"""How many chunks each enqueue refused, and how many it deleted because its source does not have them any more.

Revises: 0027
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0028"
down_revision = "0027"
branch_labels = None
depends_on = None
oldest_code = "0005"


def upgrade() -> None:
    op.execute("SET LOCAL lock_timeout = '4s'")
    op.add_column("job_streams", sa.Column("n_refused", sa.BigInteger(), server_default="0", nullable=False))
    op.add_column("job_streams", sa.Column("n_deleted", sa.BigInteger()))


def downgrade() -> None:
    op.execute("SET LOCAL lock_timeout = '4s'")
    op.drop_column("job_streams", "n_deleted")
    op.drop_column("job_streams", "n_refused")
