"""${message}

Revises: ${down_revision | comma,n}
"""

from __future__ import annotations

import sqlalchemy as sa

from alembic import op
${imports if imports else ""}
revision = ${repr(up_revision)}
down_revision = ${repr(down_revision)}
branch_labels = None
depends_on = None
oldest_code = ${repr(down_revision)}  # the oldest code that may run on this; docs/upgrades.md


def upgrade() -> None:
    # Under load, give up a lock that does not come at once rather than queue every query behind it.
    op.execute("SET LOCAL lock_timeout = '4s'")
    ${upgrades if upgrades else "pass"}


def downgrade() -> None:
    op.execute("SET LOCAL lock_timeout = '4s'")
    ${downgrades if downgrades else "pass"}
