"""Keyword search in one collection, and its mix with the search by vectors.

The lexemes of a collection's texts are in its table ``keywords_<id>``, which triggers of migration 0016 fill. A text
matches if it has any of the query's terms. Its score is the sum, over the terms that it has, of the term's weight times
``ts_rank`` with normalisation 1: the weight falls with the number of texts that have the term, ``ts_rank`` grows with
the number of times that the text has it, less and less, and normalisation 1 divides by 1 + the logarithm of the text's
length. That is BM25 in all but its constants (decision 70 compares them).

A search costs about the same in a collection of any size, because common terms only add to the score of texts that a
rarer term or the vectors have found. Terms are looked up, the rarest first, until they match about ``MAX_MATCHES``
texts together. The statistics of the table say how common a term is, and a term that is not in them is counted.
"""

from __future__ import annotations

import math
import shlex
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import psycopg
import sqlalchemy as sa

from chunkmill.domain import keyword_query, mixing
from chunkmill.domain.filters import Filter
from chunkmill.domain.mixing import Hybrid, KeywordState
from chunkmill.domain.results import Hits, SearchHit
from chunkmill.errors import InvalidInput, StoreUnavailable
from chunkmill.spaces.collections import Collection
from chunkmill.spaces.registry import Space
from chunkmill.store import golden
from chunkmill.system.numbers import NDArray, np

MAX_MATCHES = 10_000
"""About how many texts are ranked by keywords. On two busy cores that takes 0.3 s by one term and 0.7 s by 24 terms."""
MAX_LEXEMES = 48
"""How many words of a query are read, in the order of the text."""
MAX_TERMS = 24
"""How many terms of a query count: the rarest ones."""
WINDOW = 2_000
"""How many chunks get their keywords in one transaction: about 1 s for texts of 80 words."""
PATIENCE_S = 10
"""How many seconds the creation of a table of keywords waits for transactions that write. It is tried again later."""


@dataclass(frozen=True, slots=True)
class KeywordIndex:
    """A row of ``keyword_indexes``."""

    collection_id: int
    language: str
    """The text search configuration, with its schema."""
    state: KeywordState

    @property
    def table_name(self) -> str:
        return f"keywords_{self.collection_id}"


@dataclass(frozen=True, slots=True)
class Term:
    """A term of a query: a lexeme, a prefix or a phrase."""

    query: str
    """As a tsquery."""
    carriers: tuple[str, ...]
    """The lexemes or the prefix that a text must have to match; for a phrase, all of its lexemes, the rarest first."""
    weight: float = 0.0
    """How much it says that a text has the term."""
    matches: int = 0
    """About how many texts have the term, or for a phrase its rarest lexeme."""

    @property
    def is_phrase(self) -> bool:
        return len(self.carriers) > 1


@dataclass(frozen=True, slots=True)
class Candidate:
    """A chunk that the vectors or the keywords found, with both scores."""

    chunk_id: str
    cosine: float
    keyword: float
    outdated: SearchHit | None = None
    """The hit, if the chunk has only its old vector."""


def are_kept(conn: sa.Connection) -> bool:
    """False on the schema of an earlier release, on which this code runs too during an upgrade."""
    return bool(conn.execute(sa.text("SELECT to_regclass('keyword_indexes') IS NOT NULL")).scalar_one())


def require_kept(conn: sa.Connection) -> None:
    """Raise :class:`StoreUnavailable` on the schema of an earlier release."""
    if not are_kept(conn):
        raise StoreUnavailable("the database has no tables for keywords yet. Run: chunkmill migrate")


def find(conn: sa.Connection, collection_id: int) -> KeywordIndex | None:
    """The keywords of a collection; None if they are off, or the schema has none yet."""
    if not are_kept(conn):
        return None
    query = "SELECT collection_id, language, state FROM keyword_indexes WHERE collection_id = :collection"
    row = conn.execute(sa.text(query), {"collection": collection_id}).one_or_none()
    return None if row is None else KeywordIndex(row.collection_id, row.language, KeywordState(row.state))


def require_ready(conn: sa.Connection, collection: Collection) -> KeywordIndex:
    """The keywords of a collection. Raises :class:`InvalidInput` if it has none, or not yet for all chunks."""
    require_kept(conn)
    index = find(conn, collection.id)
    if index is None:
        raise InvalidInput(
            f"collection {collection.name!r} has no keywords. Call client.keywords({collection.name!r}, "
            f"language='english') once, or run: chunkmill keywords {shlex.quote(collection.name)} --language english"
        )
    if index.state is not KeywordState.READY:
        language = index.language.removeprefix("pg_catalog.")
        raise InvalidInput(
            f"not all chunks of collection {collection.name!r} have their keywords yet. A poller gives them theirs, "
            f"and client.keywords({collection.name!r}, language={language!r}) waits for it."
        )
    return index


def choose_mix(
    conn: sa.Connection,
    collection: Collection,
    how: bool | Hybrid | None,
    *,
    is_text: bool,
    k: int,
    offset: int | None = None,
) -> tuple[KeywordIndex, Hybrid] | None:
    """The keywords to mix in, and how; None if the search uses vectors alone.

    If ``how`` is None, what the golden queries chose is used, and a search that cannot be mixed uses vectors alone. If
    ``how`` is given and the search cannot be mixed, this raises :class:`InvalidInput`.
    """
    if how is False:
        return None
    if how is None:
        if not is_text or (offset is None and k > mixing.MAX_MIXED) or not are_kept(conn):
            return None
        alpha, index = golden.chosen_alpha(conn, collection.id, collection.space_id), find(conn, collection.id)
        if alpha is None or index is None or index.state is not KeywordState.READY:
            return None
        _require_reachable(k, offset)
        return index, alpha
    if not is_text:
        raise InvalidInput(
            "hybrid needs the text of the query, and not a vector or a chunk. Pass the text, or hybrid=False."
        )
    _require_reachable(k, offset)
    index = require_ready(conn, collection)
    if how is True:
        chosen = golden.chosen_alpha(conn, collection.id, collection.space_id)
        return index, mixing.DEFAULT_ALPHA if chosen is None else chosen
    return index, how


def _require_reachable(k: int, offset: int | None) -> None:
    if offset is None and k > mixing.MAX_MIXED:
        raise InvalidInput(f"k is {k}; a hybrid search returns at most {mixing.MAX_MIXED:,} hits.")
    if offset is not None and offset + k > mixing.PAGED:
        raise InvalidInput(
            f"offset + k is {offset + k:,}; the pages of a hybrid search reach {mixing.PAGED} hits. With hybrid=False "
            "they have no end."
        )


def languages(conn: sa.Connection) -> list[str]:
    """The names of the text search configurations that a collection may have."""
    query = """
        SELECT CASE n.nspname WHEN 'pg_catalog' THEN c.cfgname ELSE n.nspname || '.' || c.cfgname END AS name
        FROM pg_ts_config c
        JOIN pg_namespace n ON n.oid = c.cfgnamespace
        ORDER BY n.nspname <> 'pg_catalog', name
    """
    return list(conn.execute(sa.text(query)).scalars())


def create(conn: sa.Connection, collection_id: int, language: str) -> str:
    """Create the table of a collection's keywords, if there is none. Returns its language, with its schema.

    Raises :class:`InvalidInput` if Postgres has no such text search configuration, and :class:`StoreUnavailable` if
    transactions that write never paused, so that the triggers could not be created.
    """
    known = languages(conn)
    if language not in known:
        raise InvalidInput(f"language is {language!r}; it must be one of: {', '.join(known)}.")
    conn.execute(sa.text(f"SET LOCAL lock_timeout = '{PATIENCE_S}s'"))
    call = "SELECT create_keywords(:collection, :language)"
    try:
        made: str = conn.execute(
            sa.text(call), {"collection": collection_id, "language": qualified(language)}
        ).scalar_one()
    except sa.exc.OperationalError as error:
        if isinstance(error.orig, psycopg.errors.LockNotAvailable):
            raise StoreUnavailable(
                f"writers held the tables for {PATIENCE_S} s, so no keywords were created. Make the call again."
            ) from None
        raise
    return made


def qualified(language: str) -> str:
    """The name with its schema. A name without one is that of a configuration of Postgres' own."""
    return language if "." in language else f"pg_catalog.{language}"


def drop(conn: sa.Connection, collection_id: int) -> bool:
    """Drop the keywords of a collection, and what its golden queries chose. Returns whether there were any."""
    return bool(conn.execute(sa.text("SELECT drop_keywords(:collection)"), {"collection": collection_id}).scalar_one())


def forget_dropped(conn: sa.Connection, collection_id: int) -> None:
    """Drop the keywords of a dropped collection, and delete its golden queries."""
    if are_kept(conn):
        conn.execute(sa.text("SELECT forget_dropped_keywords(:collection)"), {"collection": collection_id})


def fill(db: sa.Engine, collection_id: int, *, deadline: float | None = None) -> bool:
    """Add keywords for the chunks that existed before, window by window. Returns whether all have theirs.

    It may be interrupted at any point; the next call goes on. Several may do it at once: one works on a window, and
    the others return. ``deadline`` is a time of ``time.monotonic``, at which this returns too.
    """
    while True:
        with db.begin() as conn:
            index = find(conn, collection_id)
        if index is None or index.state is KeywordState.READY:
            return index is not None
        if index.state is KeywordState.BEGUN and not _begin(db, collection_id):
            return False
        with db.begin() as conn:
            call = "SELECT fill_keywords(:collection, :most)"
            parameters = {"collection": collection_id, "most": WINDOW}
            n_chunks = conn.execute(sa.text(call), parameters).scalar_one()
        if n_chunks < WINDOW:
            # All chunks have their keywords, or another process is adding them.
            with db.begin() as conn:
                index = find(conn, collection_id)
            return index is not None and index.state is KeywordState.READY
        if deadline is not None and time.monotonic() >= deadline:
            return False


def _begin(db: sa.Engine, collection_id: int) -> bool:
    """Wait until all writers see the new table. False if they never paused long enough."""
    try:
        # In a transaction of its own, because writers wait until its end.
        with db.begin() as conn:
            conn.execute(sa.text(f"SET LOCAL lock_timeout = '{PATIENCE_S}s'"))
            conn.execute(sa.text("SELECT begin_filling_keywords(:collection)"), {"collection": collection_id})
    except sa.exc.OperationalError as error:
        if isinstance(error.orig, psycopg.errors.LockNotAvailable):
            return False
        raise
    return True


def unfinished(conn: sa.Connection) -> list[int]:
    """The collections whose keywords are not ready. Keywords of collections that are gone are dropped."""
    gone = """
        SELECT i.collection_id
        FROM keyword_indexes i
        WHERE NOT EXISTS (SELECT FROM collections k WHERE k.id = i.collection_id)
    """
    for collection_id in conn.execute(sa.text(gone)).scalars().all():
        drop(conn, collection_id)
    query = "SELECT collection_id FROM keyword_indexes WHERE state <> :ready ORDER BY collection_id"
    return list(conn.execute(sa.text(query), {"ready": KeywordState.READY}).scalars())


def measure(conn: sa.Connection, index: KeywordIndex) -> tuple[int, int]:
    """How many texts have keywords, as the statistics say, and the bytes on disk."""
    query = """
        SELECT greatest(c.reltuples, 0)::bigint AS texts, pg_total_relation_size(c.oid) AS bytes
        FROM pg_class c
        WHERE c.oid = to_regclass(:name)
    """
    row = conn.execute(sa.text(query), {"name": index.table_name}).one()
    return row.texts, row.bytes


def read_terms(conn: sa.Connection, index: KeywordIndex, text: str) -> list[Term]:
    """The terms of a query that count, with their weights, the rarest first. Any text is a query.

    A query of stop words alone has none.
    """
    asked = keyword_query.read(text)
    lex = """
        SELECT kind, query, lexemes
        FROM (
            SELECT 0 AS kind, lexeme AS query, ARRAY[lexeme] AS lexemes, positions[1] AS place
            FROM unnest(to_tsvector(CAST(:language AS regconfig), :words))
            UNION ALL
            SELECT 1, lexeme, ARRAY[lexeme], 0
            FROM unnest(CAST(:prefixes AS text[])) AS p(prefix),
                 unnest(to_tsvector(CAST(:language AS regconfig), prefix))
            UNION ALL
            SELECT 2, phraseto_tsquery(CAST(:language AS regconfig), phrase)::text,
                   tsvector_to_array(to_tsvector(CAST(:language AS regconfig), phrase)), 0
            FROM unnest(CAST(:phrases AS text[])) AS p(phrase)
        ) t
        WHERE cardinality(lexemes) > 0
        ORDER BY kind, place, query
    """
    parameters = {
        "language": index.language,
        "words": asked.words,
        "prefixes": list(asked.prefixes),
        "phrases": list(asked.phrases),
    }
    terms: dict[str, Term] = {}
    n_words = 0
    for kind, query, lexemes in conn.execute(sa.text(lex), parameters):
        quoted = tuple(_quoted(lexeme) for lexeme in lexemes)
        if kind == 0:
            n_words += 1
            if n_words > MAX_LEXEMES:
                continue
            term = Term(quoted[0], quoted)
        elif kind == 1:
            term = Term(f"{quoted[0]}:*", (f"{quoted[0]}:*",))
        else:
            # A phrase that consists of one lexeme and stop words is treated as a word.
            term = Term(query if len(quoted) > 1 else quoted[0], quoted)
        terms[term.query] = term
    return _weighed(conn, index, list(terms.values()))


def _quoted(lexeme: str) -> str:
    """A lexeme as a tsquery, whatever characters it has."""
    escaped = lexeme.replace("\\", "\\\\").replace("'", "''")
    return f"'{escaped}'"


def _weighed(conn: sa.Connection, index: KeywordIndex, terms: Sequence[Term]) -> list[Term]:
    """The terms that are in the collection, rarest first, with the weight of BM25, ln(1 + (N - n + ½) / (n + ½)).

    Here n of N texts have the term. For a phrase n is that of its rarest lexeme.
    """
    carriers = sorted({carrier for term in terms for carrier in term.carriers})
    if not carriers:
        return []
    # The most common lexemes, 1,000 by default, are in the statistics of the table. Another one is counted, which is
    # cheap because it is rarer, and counting ends at the number from which it is not looked up anyway.
    statement = f"""
        WITH common AS MATERIALIZED (
            SELECT e.lexeme, s.most_common_elem_freqs[e.place] AS frequency
            FROM pg_stats s
            JOIN pg_class c ON c.oid = to_regclass(:name) AND c.relname = s.tablename
            JOIN pg_namespace n ON n.oid = c.relnamespace AND n.nspname = s.schemaname
            CROSS JOIN LATERAL unnest(CAST(CAST(s.most_common_elems AS text) AS text[]))
                WITH ORDINALITY AS e(lexeme, place)
            WHERE s.attname = 'terms'
        )
        SELECT t.carrier, m.frequency,
               CASE WHEN m.frequency IS NULL THEN (
                   SELECT count(*)
                   FROM (
                       SELECT
                       FROM {index.table_name} k
                       WHERE k.terms @@ CAST(t.carrier AS tsquery)
                       LIMIT :most
                   ) matching
               ) END AS counted
        FROM unnest(CAST(:carriers AS text[])) AS t(carrier)
        LEFT JOIN common m ON t.carrier = '''' || replace(replace(m.lexeme, '\\', '\\\\'), '''', '''''') || ''''
    """
    parameters = {"name": index.table_name, "carriers": carriers, "most": MAX_MATCHES + 1}
    with _through_indexes(conn):
        n_texts = _n_texts(conn, index)
        rows = conn.execute(sa.text(statement), parameters).all()
    matches = {row.carrier: round(row.frequency * n_texts) if row.counted is None else row.counted for row in rows}
    n_texts = max(n_texts, *matches.values())
    weighed = []
    for term in terms:
        rarest_first = tuple(sorted(term.carriers, key=lambda carrier: (matches[carrier], carrier)))
        if n := matches[rarest_first[0]]:
            weight = math.log(1 + (n_texts - n + 0.5) / (n + 0.5))
            weighed.append(Term(term.query, rarest_first, weight, n))
    return sorted(weighed, key=lambda term: (term.matches, term.query))[:MAX_TERMS]


def _n_texts(conn: sa.Connection, index: KeywordIndex) -> int:
    """How many texts the collection's keywords have: exactly if they are few, and else about as the planner does."""
    query = f"""
        SELECT (SELECT count(*) FROM (SELECT FROM {index.table_name} LIMIT :few) k) AS counted,
               (
                   SELECT CASE WHEN c.relpages > 0
                               THEN c.reltuples * pg_relation_size(c.oid)
                                    / (c.relpages * CAST(current_setting('block_size') AS float8))
                               ELSE 0 END
                   FROM pg_class c
                   WHERE c.oid = to_regclass(:name)
               ) AS estimated
    """
    row = conn.execute(sa.text(query), {"name": index.table_name, "few": MAX_MATCHES}).one()
    return int(row.counted if row.counted < MAX_MATCHES else max(row.counted, row.estimated))


@contextmanager
def _through_indexes(conn: sa.Connection) -> Iterator[None]:
    """Let the planner read no table from the first row to the last. It cannot know how rare a term is."""
    conn.execute(sa.text("SET LOCAL enable_seqscan = off"))
    yield
    conn.execute(sa.text("SET LOCAL enable_seqscan TO DEFAULT"))


def _looked_up(terms: Sequence[Term]) -> str:
    """A tsquery for the texts that are ranked: those with one of the rarest terms, at most about ``MAX_MATCHES``."""
    if terms[0].matches > MAX_MATCHES:
        # All are common. A phrase is looked up by one lexeme, so that the limit of rows ends that too.
        return terms[0].carriers[0]
    chosen, total = [], 0
    for term in terms:
        total += term.matches
        if total > MAX_MATCHES:
            break
        chosen.append(term)
    return " | ".join(f"({term.query})" for term in chosen)


def _score(terms: Sequence[Term]) -> tuple[str, dict[str, object]]:
    """An expression for the keyword score of ``k.terms``, and its parameters."""
    parts: list[str] = []
    parameters: dict[str, object] = {}
    for i, term in enumerate(terms):
        parameters[f"q_{i}"], parameters[f"w_{i}"] = term.query, term.weight
        rank = f":w_{i} * ts_rank('{{1,1,1,1}}', k.terms, CAST(:q_{i} AS tsquery), 1)"
        # Of a phrase, ts_rank looks at how near the words are and not whether they stand next to each other.
        parts.append(f"CASE WHEN k.terms @@ CAST(:q_{i} AS tsquery) THEN {rank} ELSE 0 END" if term.is_phrase else rank)
    return "(" + " + ".join(parts or ["CAST(0 AS float8)"]) + ")", parameters


def find_by_keywords(
    conn: sa.Connection,
    index: KeywordIndex,
    space: Space,
    terms: Sequence[Term],
    *,
    most: int,
    condition: str = "true",
    parameters: dict[str, object] | None = None,
) -> list[str]:
    """The ids of the ``most`` chunks with a vector that have the highest keyword scores above 0, best first.

    ``condition`` is one on ``c.metadata``, with its ``parameters``.
    """
    if not terms:
        return []
    score, of_terms = _score(terms)
    statement = f"""
        SELECT c.chunk_id
        FROM (
            SELECT k.content_hash, {score} AS score
            FROM (
                SELECT content_hash, terms
                FROM {index.table_name}
                WHERE terms @@ CAST(:looked_up AS tsquery)
                LIMIT :most_matches
            ) k
        ) s
        JOIN chunks c ON c.content_hash = s.content_hash AND c.collection_id = :collection
        WHERE s.score > 0 AND {condition}
          AND EXISTS (SELECT FROM {space.table_name} v WHERE v.content_hash = s.content_hash)
        ORDER BY s.score DESC, c.chunk_id
        LIMIT :most
    """
    with _through_indexes(conn):
        rows = conn.execute(
            sa.text(statement),
            {
                **(parameters or {}),
                **of_terms,
                "looked_up": _looked_up(terms),
                "most_matches": MAX_MATCHES,
                "collection": index.collection_id,
                "most": most,
            },
        )
        return list(rows.scalars())


def score_both(
    conn: sa.Connection,
    index: KeywordIndex,
    space: Space,
    query: NDArray[np.float32],
    terms: Sequence[Term],
    chunk_ids: Sequence[str],
) -> list[Candidate]:
    """The cosine and the keyword score of chunks of the collection, by id. Chunks without a vector are left out."""
    score, of_terms = _score(terms)
    statement = f"""
        SELECT c.chunk_id,
               1 - (v.embedding <=> CAST(:query AS {space.vector_type})) AS cosine,
               coalesce({score}, 0) AS keyword
        FROM unnest(CAST(:ids AS text[])) AS i(id)
        JOIN chunks c ON c.collection_id = :collection AND c.chunk_id = i.id
        JOIN {space.table_name} v ON v.content_hash = c.content_hash
        LEFT JOIN {index.table_name} k ON k.content_hash = c.content_hash
    """
    parameters = {
        **of_terms,
        "query": "[" + ",".join(map(repr, query.astype(float).tolist())) + "]",
        "ids": list(chunk_ids),
        "collection": index.collection_id,
    }
    with _through_indexes(conn):
        rows = conn.execute(sa.text(statement), parameters)
        return [Candidate(row.chunk_id, float(row.cosine), float(row.keyword)) for row in rows]


def score_text(conn: sa.Connection, index: KeywordIndex, terms: Sequence[Term], text: str) -> float:
    """The keyword score of a text that need not be stored."""
    return score_texts(conn, index, terms, [text])[0]


def score_texts(conn: sa.Connection, index: KeywordIndex, terms: Sequence[Term], texts: Sequence[str]) -> list[float]:
    """The keyword scores of texts that need not be stored, in the same order."""
    if not terms or not texts:
        return [0.0] * len(texts)
    score, parameters = _score(terms)
    statement = f"""
        SELECT {score} AS score
        FROM unnest(CAST(:texts AS text[])) WITH ORDINALITY AS t(text, place)
        CROSS JOIN LATERAL (SELECT to_tsvector(CAST(:language AS regconfig), left(t.text, 65536)) AS terms) k
        ORDER BY t.place
    """
    rows = conn.execute(sa.text(statement), parameters | {"language": index.language, "texts": list(texts)})
    return [float(score) for score in rows.scalars()]


def depth(k: int, offset: int | None) -> int:
    """How many of the nearest chunks a mixed search for this number of hits is given.

    With an offset it is always the same number, because pages that have other candidates would not fit together.
    """
    return max(k, mixing.DEPTH) if offset is None else mixing.PAGED


def search_mixed(
    conn: sa.Connection,
    index: KeywordIndex,
    how: Hybrid,
    space: Space,
    query: NDArray[np.float32],
    text: str,
    nearest: Hits,
    *,
    k: int,
    offset: int | None = None,
    where: Filter | None = None,
) -> Hits:
    """The ``k`` chunks that are best by a mix of the cosine to ``query``, ``(d,)``, and of the keywords of ``text``.

    ``nearest`` are the chunks that a search by vectors with the same filter ``where`` returned in this transaction, for
    :func:`depth` hits. The candidates are these and the best by keywords. All of them get both scores, so that no chunk
    gets a score of 0 only because one of the searches did not return it. Raises :class:`StoreUnavailable` if somebody
    drops the keywords meanwhile.
    """
    pool = candidates(conn, index, space, query, text, nearest, most=depth(k, offset), where=where)
    cosines, scores = scores_of(pool)
    mixed = mixing.mixed(cosines, scores, how)
    best = mixing.order(mixed, cosines, [candidate.chunk_id for candidate in pool])[offset or 0 :][:k]
    plan = nearest.explanation
    if plan is not None:
        n_more = len(pool) - len(nearest)
        plan = replace(
            plan, because=f"{plan.because} Keywords added {n_more:,} chunks to the {len(nearest):,} nearest."
        )
    return Hits(_hits(conn, index, space, [(pool[i], float(mixed[i])) for i in best]), plan)


def candidates(
    conn: sa.Connection,
    index: KeywordIndex,
    space: Space,
    query: NDArray[np.float32],
    text: str,
    nearest: Sequence[SearchHit],
    *,
    most: int = mixing.DEPTH,
    where: Filter | None = None,
) -> list[Candidate]:
    """What a mixed search orders: the ``nearest`` chunks and the ``most`` best by keywords, all with both scores.

    The arguments are those of :func:`search_mixed`.
    """
    condition, parameters = (where or Filter()).sql("c.metadata")
    try:
        terms = read_terms(conn, index, text)
        by_keywords = find_by_keywords(conn, index, space, terms, most=most, condition=condition, parameters=parameters)
        ids = list(dict.fromkeys([*(hit.chunk_id for hit in nearest), *by_keywords]))
        both = score_both(conn, index, space, query, terms, ids)
        # A chunk that has only its old vector gets the keyword score of its old text.
        old = [hit for hit in nearest if hit.outdated]
        scores = score_texts(conn, index, terms, [hit.text for hit in old])
        return both + [
            Candidate(hit.chunk_id, hit.score, keyword, hit) for hit, keyword in zip(old, scores, strict=True)
        ]
    except sa.exc.ProgrammingError as error:
        if isinstance(error.orig, psycopg.errors.UndefinedTable):
            raise StoreUnavailable("the keywords of the collection were dropped meanwhile. Search again.") from None
        raise


def scores_of(candidates: Sequence[Candidate]) -> tuple[mixing.Scores, mixing.Scores]:
    """The cosines and the keyword scores, both ``(n,)``."""
    return (
        np.array([candidate.cosine for candidate in candidates], dtype=np.float64),
        np.array([candidate.keyword for candidate in candidates], dtype=np.float64),
    )


def _hits(
    conn: sa.Connection, index: KeywordIndex, space: Space, best: Sequence[tuple[Candidate, float]]
) -> list[SearchHit]:
    """The hits of candidates and their mixed scores, in the same order."""
    query = f"""
        SELECT c.chunk_id, t.text, c.metadata, v.truncated
        FROM unnest(CAST(:ids AS text[])) AS i(id)
        JOIN chunks c ON c.collection_id = :collection AND c.chunk_id = i.id
        JOIN contents t ON t.content_hash = c.content_hash
        JOIN {space.table_name} v ON v.content_hash = c.content_hash
    """
    parameters = {"ids": [candidate.chunk_id for candidate, _ in best], "collection": index.collection_id}
    hits = {
        row.chunk_id: SearchHit(0.0, row.chunk_id, row.text, row.metadata, row.truncated)
        for row in conn.execute(sa.text(query), parameters)
    }
    return [
        replace(hit, score=candidate.cosine, keyword=candidate.keyword, mixed=mixed_score)
        for candidate, mixed_score in best
        if (hit := candidate.outdated or hits.get(candidate.chunk_id))
    ]
