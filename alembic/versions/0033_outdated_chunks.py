"""What a replaced chunk was, for searches that find it by its old vector until it has its new one.

The old text and vector are copied when the chunk is replaced, so that a prune, or a deletion of another chunk with the
same text, need not know of them. The triggers are created when the first collection is set so; nobody pays before that. The functions run in the name of the owner, because pollers read no texts and no vectors.

Revises: 0032
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from pgvector.sqlalchemy import VECTOR
from sqlalchemy.dialects.postgresql import JSONB

revision = "0033"
down_revision = "0032"
branch_labels = None
depends_on = None
oldest_code = "0005"


def upgrade() -> None:
    # A new foreign key takes a lock on the table that it refers to, for which writers of collections would queue.
    op.execute("SET LOCAL lock_timeout = '4s'")
    op.create_table(
        "outdated_collections",
        sa.Column("collection_id", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("now()"), nullable=False),
        sa.ForeignKeyConstraint(
            ["collection_id"],
            ["collections.id"],
            name=op.f("fk_outdated_collections_collection_id_collections"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("collection_id", name=op.f("pk_outdated_collections")),
    )
    op.create_table(
        "outdated_chunks",
        sa.Column("collection_id", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("chunk_id", sa.Text(), nullable=False),
        sa.Column("space_id", sa.Integer(), nullable=False),
        sa.Column("text", sa.Text(), nullable=False),
        sa.Column("metadata", JSONB(), nullable=False),
        sa.Column("embedding", VECTOR(), nullable=False),
        sa.Column("truncated", sa.Boolean(), nullable=False),
        sa.PrimaryKeyConstraint("collection_id", "chunk_id", "space_id", name=op.f("pk_outdated_chunks")),
    )
    for name, takes, returns, declare, body in FUNCTIONS:
        op.execute(_create(name, takes, returns, declare, body))
        if returns != "trigger":
            op.execute(f"REVOKE ALL ON FUNCTION {name} FROM PUBLIC")


def downgrade() -> None:
    op.execute("SET LOCAL lock_timeout = '4s'")
    for name, *_ in reversed(FUNCTIONS):
        # With the functions go their triggers.
        op.execute(f"DROP FUNCTION {name} CASCADE")
    op.drop_table("outdated_chunks")
    op.drop_table("outdated_collections")


def _create(name: str, takes: str, returns: str, declare: str, body: str) -> str:
    """A function of the owner's. It sees the tables of this installation and the types of pgvector, whatever its
    caller's search path is."""
    return f"""
        DO $do$
        DECLARE
            places text;
        BEGIN
            SELECT string_agg(quote_ident(name), ', ' ORDER BY name <> current_schema())
            INTO places
            FROM (
                SELECT current_schema() AS name
                UNION
                SELECT n.nspname
                FROM pg_extension e
                JOIN pg_namespace n ON n.oid = e.extnamespace
                WHERE e.extname = 'vector'
            ) names;
            EXECUTE format($create$
                CREATE OR REPLACE FUNCTION {name}({takes}) RETURNS {returns}
                LANGUAGE plpgsql SECURITY DEFINER SET search_path = %s, pg_temp
                AS $body$
                {declare}
                BEGIN
                {body.replace("%", "%%")}
                END
                $body$
            $create$, places);
        END
        $do$
    """


# A space of a collection: the active one, or one that it is on its way to or came from, so that searches of that one, and
# those after a flip or a rollback, find the same chunks.
FUNCTIONS = (
    (
        "keep_outdated_chunks", "", "trigger",
        "DECLARE kept record;",
        """
        -- A chunk that is replaced again while it waits stays what it was when it last had a vector.
        FOR kept IN
            SELECT k.id, s.space_id
            FROM outdated_collections o
            JOIN collections k ON k.id = o.collection_id
            CROSS JOIN LATERAL (
                SELECT k.space_id
                UNION
                SELECT x.space_id FROM collection_spaces x WHERE x.collection_id = k.id
            ) s
            WHERE k.id IN (SELECT w.collection_id FROM written w)
              AND to_regclass(format('vectors_%s', s.space_id)) IS NOT NULL
            ORDER BY k.id, s.space_id
        LOOP
            EXECUTE format(
                'INSERT INTO outdated_chunks '
                '(collection_id, chunk_id, space_id, text, metadata, embedding, truncated) '
                'SELECT w.collection_id, w.chunk_id, %s, t.text, r.metadata, v.embedding::vector, v.truncated '
                'FROM written w '
                'JOIN replaced r ON r.collection_id = w.collection_id AND r.chunk_id = w.chunk_id '
                'JOIN contents t ON t.content_hash = r.content_hash '
                'JOIN vectors_%s v ON v.content_hash = r.content_hash '
                'WHERE w.collection_id = %s AND w.content_hash <> r.content_hash '
                'AND NOT EXISTS (SELECT FROM vectors_%s n WHERE n.content_hash = w.content_hash) '
                'ORDER BY w.chunk_id '
                'ON CONFLICT (collection_id, chunk_id, space_id) DO UPDATE SET text = excluded.text, '
                'metadata = excluded.metadata, embedding = excluded.embedding, truncated = excluded.truncated',
                kept.space_id, kept.space_id, kept.id, kept.space_id);
        END LOOP;
        RETURN NULL;
        """,
    ),
    (
        "forget_outdated_chunks", "", "trigger",
        "",
        """
        DELETE FROM outdated_chunks o
        USING deleted d
        WHERE o.collection_id = d.collection_id AND o.chunk_id = d.chunk_id;
        RETURN NULL;
        """,
    ),
    (
        "serve_outdated_chunks", "collection integer, wanted boolean", "void",
        "",
        """
        IF NOT wanted THEN
            DELETE FROM outdated_collections o WHERE o.collection_id = collection;
            -- In the order in which an enqueue writes them, so that neither waits for the other for ever.
            PERFORM FROM outdated_chunks o WHERE o.collection_id = collection ORDER BY o.space_id, o.chunk_id FOR UPDATE;
            DELETE FROM outdated_chunks o WHERE o.collection_id = collection;
            RETURN;
        END IF;
        IF NOT EXISTS (
            SELECT FROM pg_trigger t WHERE t.tgname = 'forget_outdated_chunks' AND t.tgrelid = to_regclass('chunks')
        ) THEN
            LOCK TABLE chunks IN SHARE ROW EXCLUSIVE MODE;
            CREATE OR REPLACE TRIGGER keep_outdated_chunks AFTER UPDATE ON chunks
                REFERENCING OLD TABLE AS replaced NEW TABLE AS written
                FOR EACH STATEMENT EXECUTE FUNCTION keep_outdated_chunks();
            CREATE OR REPLACE TRIGGER forget_outdated_chunks AFTER DELETE ON chunks
                REFERENCING OLD TABLE AS deleted
                FOR EACH STATEMENT EXECUTE FUNCTION forget_outdated_chunks();
        END IF;
        INSERT INTO outdated_collections (collection_id) VALUES (collection) ON CONFLICT DO NOTHING;
        IF FOUND THEN
            -- An enqueue that was under way when it was ended may have left some.
            DELETE FROM outdated_chunks o WHERE o.collection_id = collection;
        END IF;
        """,
    ),
    (
        # Deletes copies of collections that are not set so any more, or have left the space, and those whose chunk has
        # its vector. Returns how many.
        "tidy_outdated_chunks", "most integer", "integer",
        "DECLARE kept record; looked_at text[]; gone integer; total integer := 0;",
        """
        FOR kept IN
            SELECT DISTINCT o.collection_id, o.space_id
            FROM collections k
            CROSS JOIN LATERAL (
                SELECT c.collection_id, c.space_id FROM outdated_chunks c WHERE c.collection_id = k.id
            ) o
        LOOP
            IF NOT is_outdated_served(kept.collection_id, kept.space_id) THEN
                PERFORM FROM outdated_chunks o
                WHERE o.collection_id = kept.collection_id AND o.space_id = kept.space_id
                ORDER BY o.chunk_id
                FOR UPDATE;
                DELETE FROM outdated_chunks o
                WHERE o.collection_id = kept.collection_id AND o.space_id = kept.space_id
                  AND NOT is_outdated_served(kept.collection_id, kept.space_id);
            ELSE
                -- The copies are locked first, so that an enqueue which replaces such a chunk waits. The deletion then
                -- looks at the chunks once more: it sees what was committed before the copies were locked.
                EXECUTE format(
                    'SELECT array_agg(x.chunk_id) FROM ('
                    'SELECT o.chunk_id FROM outdated_chunks o '
                    'JOIN chunks c ON c.collection_id = o.collection_id AND c.chunk_id = o.chunk_id '
                    'WHERE o.collection_id = $1 AND o.space_id = $2 '
                    'AND EXISTS (SELECT FROM vectors_%s v WHERE v.content_hash = c.content_hash) '
                    'LIMIT $3 FOR UPDATE OF o SKIP LOCKED) x', kept.space_id)
                INTO looked_at USING kept.collection_id, kept.space_id, most;
                EXECUTE format(
                    'DELETE FROM outdated_chunks o USING chunks c '
                    'WHERE o.collection_id = $1 AND o.space_id = $2 AND o.chunk_id = ANY($3) '
                    'AND c.collection_id = o.collection_id AND c.chunk_id = o.chunk_id '
                    'AND EXISTS (SELECT FROM vectors_%s v WHERE v.content_hash = c.content_hash)', kept.space_id)
                USING kept.collection_id, kept.space_id, looked_at;
            END IF;
            GET DIAGNOSTICS gone = ROW_COUNT;
            total := total + gone;
        END LOOP;
        RETURN total;
        """,
    ),
    (
        "is_outdated_served", "collection integer, space integer", "boolean",
        "",
        """
        RETURN to_regclass(format('vectors_%s', space)) IS NOT NULL
           AND EXISTS (SELECT FROM outdated_collections o WHERE o.collection_id = collection)
           AND (EXISTS (SELECT FROM collections k WHERE k.id = collection AND k.space_id = space)
                OR EXISTS (
                    SELECT FROM collection_spaces x WHERE x.collection_id = collection AND x.space_id = space
                ));
        """,
    ),
)  # fmt: skip
