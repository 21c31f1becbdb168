"""Search at every size: recall against exact search in the same run, and latency beside the best single plan.

Collections of several sizes are in one space. All of them are asked in one shuffled order on one connection, about
their own topics and about others', with and without filters. Recall comes first: what fails its gate has no latency.
Then come writes beside an index, deletions, bytes and the build.
"""

from __future__ import annotations

import contextlib
import math
import random
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import sqlalchemy as sa
from numpy.typing import NDArray

from chunkmill.broker import Broker
from chunkmill.client import Client
from chunkmill.db.connect import create_db, migrate
from chunkmill.domain.chunks import content_hash
from chunkmill.domain.serving import SegmentKind, kind_for
from chunkmill.models import resolve_spec
from chunkmill.poller.indexer import Indexer
from chunkmill.settings import Settings
from chunkmill.spaces import collections, registry
from chunkmill.spaces.registry import Space
from chunkmill.store import indexing, segments
from chunkmill.store.write import write_vectors
from chunkmill_workers.benchmarks.report import Say, document
from chunkmill_workers.benchmarks.servers import Servers, temporary_stack
from chunkmill_workers.benchmarks.stats import Measurement, Target, in_turns, promise, summary
from chunkmill_workers.benchmarks.topics import DIMENSIONS, INTRINSIC, SHARES, TOPICS, Corpus, Kind, World

K = 10
SIZES, QUICK_SIZES, MILLION_SIZES = (1, 10, 500, 3_000, 10_000, 100_000), (1, 10, 500, 1_500), (1_000_000,)
OWN, OTHERS = "own topics", "others' topics"
NO_FILTER = "no filter"
RECALL, SLOWNESS = Target(0.98), Target(2, at_most=True)
WRITES, GRAPH_BYTES = Target(0.5), Target(1_200, at_most=True)
MAINTENANCE = Target(60, at_most=True)
BEAMS = (10, 20, 40, 80, 160, 320, 640, 1_000)
LARGE = 50_000
TRANSACTION_ROWS = 500
FRESH = 20
"""How many new chunks are looked for in the moment after their commit."""
MIB = 2**20


@dataclass(frozen=True, slots=True)
class Cell:
    """One question that is asked several times: of which collection, about whose topics, through which filter."""

    corpus: Corpus
    topics: str
    share: str

    @property
    def group(self) -> str:
        return f"{self.corpus.rows:,} rows, topics {self.corpus.kind}"

    @property
    def name(self) -> str:
        return f"{self.topics}, {self.share}"

    @property
    def filter(self) -> dict[str, int] | None:
        return {SHARES[self.share][0]: 1} if self.share != NO_FILTER else None


@dataclass(slots=True)
class CellTruth:
    """What is known of a cell."""

    queries: NDArray[np.float32]
    truth: dict[int, set[str]] = field(default_factory=dict)
    """By the number of the query: the ids of the chunks that an exact search finds."""
    recalls: dict[int, float] = field(default_factory=dict)
    beam: int | None = None
    """With it the segment alone has the recall that the search has; None if none of ``BEAMS`` gives it."""

    @property
    def recall(self) -> float:
        return float(np.mean(list(self.recalls.values())))


def run(
    *, rounds: int, quick: bool, say: Say, million: bool = False, sizes: Sequence[int] | None = None
) -> dict[str, Any]:
    """The result. With ``million`` there is a collection of a million rows too, which takes an hour and a half."""
    sizes = sizes or (QUICK_SIZES if quick else SIZES + (MILLION_SIZES if million else ()))
    n_queries, n_timed = (3, 2) if quick else (20, 6)
    world = World()
    corpora = [Corpus(kind, rows, i, len(sizes)) for kind in Kind for i, rows in enumerate(sizes)]
    say("starting Postgres and Redis")
    with _stack(max(sizes)) as servers, _bench(servers.settings) as bench:
        for corpus in corpora:
            say(f"storing {corpus.rows:,} chunks with topics {corpus.kind}")
            bench.load(corpus, world)
        builds = bench.index(corpora, say)
        cells = _cells(corpora, world, n_queries)
        say("recall of every cell")
        _look(bench, cells)
        curve = _curve(bench, cells, say)
        measurements = _latencies(bench, cells, n_timed, rounds, say)
        largest = max((corpus for corpus in corpora if corpus.kind is Kind.OWN), key=lambda corpus: corpus.rows)
        measurements += builds + _bytes(bench, largest)
        measurements += _writes(servers, bench, corpora, largest, world, rounds, quick, say)
        measurements += _maintenance(bench, largest, say)
        versions = servers.versions | {"pgvector": bench.pgvector()}
    settings = {
        "sizes": list(sizes),
        "rows_of_the_space": sum(corpus.rows for corpus in corpora),
        "topics": TOPICS,
        "intrinsic_dimensions": INTRINSIC,
        "dimensions": DIMENSIONS,
        "k": K,
        "queries_of_a_cell": n_queries,
        "timed_queries_of_a_round": n_timed,
        "order": "all cells and plans shuffled in each round, on one connection",
        "index_memory_mb": servers.settings.index_memory_mb,
        "writes": f"{TRANSACTION_ROWS} rows a transaction, while an indexer flushes and merges; the collection without "
        "an index is in a database without triggers",
    }
    name = "search-million" if million else "search"
    return document(name, measurements, settings=settings, versions=versions, extra={"curve": curve})


@contextlib.contextmanager
def _stack(rows: int) -> Iterator[Servers]:
    """Servers that may use as much memory as the graph of so many rows needs, as docs/settings.md advises."""
    kind = kind_for(rows, DIMENSIONS)
    enough = math.ceil(1.25 * indexing.graph_bytes(kind, rows, DIMENSIONS) / MIB)
    with temporary_stack() as servers:
        settings = servers.settings
        index_memory_mb = max(settings.index_memory_mb, enough)
        yield replace(servers, settings=settings.model_copy(update={"index_memory_mb": index_memory_mb}))


class Bench:
    """One database, asked through one connection."""

    def __init__(self, client: Client, db: sa.Engine, settings: Settings, space: Space) -> None:
        self.client = client
        self.db = db
        self.settings = settings
        self.space = space

    def load(self, corpus: Corpus, world: World, first: int = 0, rows: int | None = None) -> None:
        self.enqueue(corpus, first, rows)
        self.write(corpus, world, first, rows)

    def enqueue(self, corpus: Corpus, first: int = 0, rows: int | None = None) -> None:
        self.client.enqueue(corpus.chunks(first, rows), collection=corpus.name)

    def write(
        self, corpus: Corpus, world: World, first: int = 0, rows: int | None = None, step: int = TRANSACTION_ROWS * 8
    ) -> None:
        """Give the chunks their vectors, in the place of a worker."""
        for part, vectors in corpus.blocks(world, first, rows):
            for at in range(0, len(part), step):
                chosen = part[at : at + step]
                hashes = [content_hash(corpus.text(row)) for row in chosen]
                n_tokens, truncated = np.full(len(chosen), 8, np.int32), np.zeros(len(chosen), np.bool_)
                with self.db.begin() as conn:
                    write_vectors(
                        conn, self.space, self.space.spec.fingerprint, hashes, n_tokens, truncated,
                        vectors[at : at + step],
                    )  # fmt: skip

    def index(self, corpora: Sequence[Corpus], say: Say) -> list[Measurement]:
        """Build what each collection needs. Returns how long the largest ones took, and how much memory."""
        made = []
        largest = max(corpus.rows for corpus in corpora)
        for corpus in corpora:
            say(f"indexing {corpus.rows:,} chunks with topics {corpus.kind}")
            with _watched_memory(self.db) as memory:
                began = time.perf_counter()
                self.client.index(corpus.name)
                seconds = time.perf_counter() - began
            if corpus.rows == largest:
                group = f"build of {corpus.rows:,} rows, topics {corpus.kind}"
                dimensions = self.space.spec.dimensions
                kind = kind_for(corpus.rows, dimensions)
                expected = indexing.graph_bytes(kind, corpus.rows, dimensions) / MIB
                details = {"expected_mib": round(expected), "index_memory_mb": self.settings.index_memory_mb}
                made.append(Measurement(group, "time", "s", [seconds]))
                if memory.peak:
                    made.append(
                        Measurement(
                            group, "the server's memory, more than before", "MiB", [memory.peak], details=details
                        )
                    )
        with self.db.connect().execution_options(isolation_level="AUTOCOMMIT") as conn:
            conn.execute(sa.text("VACUUM (ANALYZE)"))
        return made

    def ask(self, cell: Cell, query: NDArray[np.float32], *, exact: bool = False) -> list[str]:
        """The ids of the nearest chunks."""
        hits = self.client.search(query, collection=cell.corpus.name, k=K, metadata=cell.filter, exact=exact)
        return [hit.chunk_id for hit in hits]

    def ask_segment(self, cell: Cell, query: NDArray[np.float32], table: str, beam: int) -> list[str]:
        """The same from the collection's largest segment alone, in one statement, with this beam."""
        passes = "AND c.metadata @> CAST(:filter AS jsonb)" if cell.filter else ""
        statement = f"""
            SELECT c.chunk_id, t.text, c.metadata, n.distance
            FROM (
                SELECT s.content_hash, s.embedding <=> CAST(:query AS halfvec({DIMENSIONS})) AS distance
                FROM {table} s
                WHERE (SELECT true FROM chunks c
                       WHERE c.content_hash = s.content_hash AND c.collection_id = :collection {passes} LIMIT 1)
                ORDER BY s.embedding <=> CAST(:query AS halfvec({DIMENSIONS}))
                LIMIT {K}
            ) n
            JOIN chunks c ON c.content_hash = n.content_hash AND c.collection_id = :collection
            JOIN contents t ON t.content_hash = n.content_hash
            ORDER BY n.distance
        """
        setting = """
            SELECT set_config('hnsw.ef_search', :beam, true), set_config('hnsw.iterative_scan', 'relaxed_order', true),
                   set_config('plan_cache_mode', 'force_custom_plan', true)
        """
        with self.db.begin() as conn:
            collection = collections.find(conn, cell.corpus.name)
            conn.execute(sa.text(setting), {"beam": str(beam)})
            parameters = {
                "query": "[" + ",".join(map(repr, query.astype(float).tolist())) + "]",
                "collection": collection.id,
                "filter": _json(cell.filter),
            }
            return [row.chunk_id for row in conn.execute(sa.text(statement), parameters)]

    def segments_of(self, corpus: Corpus) -> Sequence[segments.Segment]:
        """The live segments of a collection, the largest first."""
        with self.db.begin() as conn:
            index = segments.find(conn, collections.find(conn, corpus.name).id, self.space.id)
        return sorted(index.segments, key=lambda part: -part.rows) if index else []

    def number(self, query: str, **parameters: object) -> float:
        with self.db.begin() as conn:
            return float(conn.execute(sa.text(query), parameters).scalar_one() or 0)

    def pgvector(self) -> str:
        with self.db.begin() as conn:
            query = "SELECT extversion FROM pg_extension WHERE extname = 'vector'"
            return str(conn.execute(sa.text(query)).scalar_one())


@contextlib.contextmanager
def _bench(settings: Settings) -> Iterator[Bench]:
    """A client and its database, with one connection for all that is asked."""
    db = create_db(settings.require_database_url(), role="client", pool_size=1)
    with Client(db, Broker.connect(settings), settings) as client:
        with db.begin() as conn:
            space = registry.register(conn, resolve_spec(settings.embedding_model))
        yield Bench(client, db, settings, space)


def _json(filter_: Mapping[str, int] | None) -> str:
    return "{" + ", ".join(f'"{key}": {value}' for key, value in (filter_ or {}).items()) + "}"


def _cells(corpora: Sequence[Corpus], world: World, n: int) -> dict[Cell, CellTruth]:
    made = {}
    for corpus in corpora:
        for topics in (OWN, OTHERS):
            if topics == OTHERS and not len(corpus.other_topics):
                continue
            queries = corpus.queries(world, n, own=topics == OWN)
            for share in (NO_FILTER, *SHARES):
                if share == NO_FILTER or corpus.rows >= SHARES[share][1]:
                    made[Cell(corpus, topics, share)] = CellTruth(queries)
    return made


def _look(bench: Bench, cells: Mapping[Cell, CellTruth]) -> None:
    """Ask every question exactly and as users ask it, in one shuffled order, and note the recalls."""
    questions = [(cell, i) for cell, asked in cells.items() for i in range(len(asked.queries))]
    random.Random(1).shuffle(questions)
    for cell, i in questions:
        query = cells[cell].queries[i]
        right, hits = set(bench.ask(cell, query, exact=True)), bench.ask(cell, query)
        assert len(set(hits)) == len(hits), f"a chunk is found twice: {cell}"
        cells[cell].truth[i] = right
        cells[cell].recalls[i] = _recall(right, hits)


def _recall(right: set[str], hits: Sequence[str]) -> float:
    """The share of the nearest chunks that were found. If nothing passes the filter, nothing may be found."""
    return len(right & set(hits)) / len(right) if right else float(not hits)


def _curve(bench: Bench, cells: Mapping[Cell, CellTruth], say: Say) -> list[dict[str, Any]]:
    """Recall and latency of the largest segments alone with several beams, beside the search's own."""
    points: list[dict[str, Any]] = []
    largest = max(cell.corpus.rows for cell in cells)
    for cell, asked in cells.items():
        parts = bench.segments_of(cell.corpus)
        if not parts:
            continue
        is_shown = cell.corpus.rows == largest and cell.share == NO_FILTER
        # A filter makes the graph alone slow, so that fewer beams are tried of it, with fewer queries.
        beams, n = (BEAMS, len(asked.queries)) if cell.share == NO_FILTER else (BEAMS[2::2], 6)
        for beam in beams if parts[0].kind is SegmentKind.HNSW else BEAMS[:1]:
            seconds, recalls = [], []
            for i, query in enumerate(asked.queries[:n]):
                began = time.perf_counter()
                hits = bench.ask_segment(cell, query, parts[0].table_name, beam)
                seconds.append(time.perf_counter() - began)
                recalls.append(_recall(asked.truth[i], hits))
            recall = float(np.mean(recalls))
            if asked.beam is None and recall >= float(np.mean([asked.recalls[i] for i in range(len(recalls))])) - 1e-9:
                asked.beam = beam
            if is_shown:
                points.append(_point(cell, "graph alone", recall, seconds, beam))
            elif asked.beam is not None:
                break
        if is_shown:
            say(f"recall against latency: {cell.group}, {cell.name}")
            for plan, exact in (("chunkmill", False), ("exact", True)):
                seconds = []
                for query in asked.queries[:: 4 if exact else 1]:
                    began = time.perf_counter()
                    bench.ask(cell, query, exact=exact)
                    seconds.append(time.perf_counter() - began)
                points.append(_point(cell, plan, 1.0 if exact else asked.recall, seconds, None))
    return points


def _point(cell: Cell, plan: str, recall: float, seconds: Sequence[float], beam: int | None) -> dict[str, Any]:
    return {
        "rows": cell.corpus.rows,
        "kind": cell.corpus.kind,
        "topics": cell.topics,
        "plan": plan,
        "beam": beam,
        "recall": round(recall, 4),
        "p50_ms": round(1_000 * float(np.median(seconds)), 3),
    }


def _latencies(bench: Bench, cells: Mapping[Cell, CellTruth], n: int, rounds: int, say: Say) -> list[Measurement]:
    """p95 of each cell beside the best plan, in rounds; each round asks everything in another order."""
    tables = {cell: next((p.table_name for p in bench.segments_of(cell.corpus)), None) for cell in cells}
    samples: dict[tuple[Cell, str], list[list[float]]] = {}
    for number in range(rounds):
        say(f"round {number + 1} of {rounds}: {len(cells)} cells")
        questions = []
        for cell, asked in cells.items():
            plans = ["chunkmill", "exact"] + (["segment alone"] if asked.beam and tables[cell] else [])
            for plan in plans:
                samples.setdefault((cell, plan), []).append([])
                # An exact scan of many rows takes long, and always as long.
                times = min(n, 2) if plan == "exact" and cell.corpus.rows >= LARGE else n
                questions += [(cell, plan, (number * n + i) % len(asked.queries)) for i in range(times)]
        random.Random(number).shuffle(questions)
        for cell, plan, i in questions:
            query, table, beam = cells[cell].queries[i], tables[cell], cells[cell].beam
            began = time.perf_counter()
            if plan == "segment alone":
                assert table is not None
                assert beam is not None
                bench.ask_segment(cell, query, table, beam)
            else:
                bench.ask(cell, query, exact=plan == "exact")
            samples[cell, plan][-1].append(1_000 * (time.perf_counter() - began))
    return [row for cell, asked in cells.items() for row in _rows_of(cell, asked, samples)]


def _rows_of(
    cell: Cell, asked: CellTruth, samples: Mapping[tuple[Cell, str], Sequence[Sequence[float]]]
) -> list[Measurement]:
    """The recall of a cell, and its p95 beside that of the best plan, if the recall passes."""
    plans = {plan: times for (of, plan), times in samples.items() if of == cell}
    p95 = {plan: [float(np.percentile(part, 95)) for part in times] for plan, times in plans.items()}
    best = min((plan for plan in p95 if plan != "chunkmill"), key=lambda plan: float(np.median(p95[plan])))
    details = {
        "recall_min": min(asked.recalls.values()),
        "best_plan": best,
        "beam_of_the_segment_alone": asked.beam,
        "plans": {
            plan: {"p50_ms": round(float(np.median(np.concatenate(times))), 3),
                   "p95_ms": round(float(np.percentile(np.concatenate(times), 95)), 3)}
            for plan, times in plans.items()
        },
    }  # fmt: skip
    recall = Measurement(cell.group, f"{cell.name}: recall@{K}", "share", [asked.recall], target=RECALL)
    refused = None if RECALL.met_by(asked.recall) else f"recall@{K} is {asked.recall:.3f}; the gate is {RECALL.value}"
    latency = Measurement(cell.group, f"{cell.name}: p95", "ms", p95["chunkmill"], refused=refused, details=details)
    if refused is None:
        ratio = summary([a / b for a, b in zip(p95["chunkmill"], p95[best], strict=True)])
        latency.ratios["to the best single plan"] = ratio | promise(SLOWNESS, ratio["median"])
    return [recall, latency]


def _bytes(bench: Bench, corpus: Corpus) -> list[Measurement]:
    """What a row takes on the disk, by part."""
    group = f"bytes of a row, {corpus.rows:,} rows of {DIMENSIONS} dimensions"
    made = []
    parts = bench.segments_of(corpus)
    if parts:
        part = parts[0]
        table = bench.number("SELECT pg_table_size(to_regclass(:name))", name=part.table_name) / part.rows
        made.append(Measurement(group, "segment", "bytes", [table]))
        graph = bench.number("SELECT pg_indexes_size(to_regclass(:name))", name=part.table_name) / part.rows
        if graph:
            made.append(Measurement(group, "graph", "bytes", [graph], target=GRAPH_BYTES))
    rows = bench.number(f"SELECT count(*) FROM {bench.space.table_name}")
    stored = bench.number("SELECT pg_total_relation_size(to_regclass(:name))", name=bench.space.table_name)
    return [*made, Measurement(group, "vectors, with their key", "bytes", [stored / rows])]


def _writes(
    servers: Servers,
    bench: Bench,
    corpora: Sequence[Corpus],
    corpus: Corpus,
    world: World,
    rounds: int,
    quick: bool,
    say: Say,
) -> list[Measurement]:
    """The rate of writes into a collection with an index, beside the same one in a database of as many rows without."""
    rows = 1_000 if quick else 5_000
    url = sa.make_url(servers.settings.require_database_url())
    with bench.db.connect().execution_options(isolation_level="AUTOCOMMIT") as conn:
        conn.execute(sa.text("CREATE DATABASE without_indexes"))
    plain_url = url.set(database="without_indexes").render_as_string(hide_password=False)
    migrate(plain_url)
    plain_settings = servers.settings.model_copy(update={"database_url": plain_url})
    group = f"writes into a collection of {corpus.rows:,} rows"
    names = {"with an index": bench}
    stop = threading.Event()
    builder_db = create_db(servers.settings.require_database_url(), role="poller")
    threads = Indexer(builder_db, servers.settings.model_copy(update={"index_seconds": 1.0})).start(stop)
    with _bench(plain_settings) as plain:
        for stored in corpora:
            say(f"storing {stored.rows:,} chunks with topics {stored.kind} in a database without indexes")
            plain.load(stored, world)
        with plain.db.connect().execution_options(isolation_level="AUTOCOMMIT") as conn:
            conn.execute(sa.text("VACUUM (ANALYZE)"))
        names["without an index"] = plain
        done = dict.fromkeys(names, corpus.rows)

        def enqueue(name: str) -> float:
            began = time.perf_counter()
            names[name].enqueue(corpus, done[name], rows)
            return rows / (time.perf_counter() - began)

        def write(name: str) -> float:
            began = time.perf_counter()
            names[name].write(corpus, world, done[name], rows, TRANSACTION_ROWS)
            done[name] += rows
            return rows / (time.perf_counter() - began)

        rates: dict[str, dict[str, list[float]]] = {
            "enqueue": {n: [] for n in names},
            "vectors": {n: [] for n in names},
        }
        for _ in range(rounds):
            for what, act in (("enqueue", enqueue), ("vectors", write)):
                got = in_turns({name: (lambda act=act, name=name: act(name)) for name in names}, 1, say)
                for name, values in got.items():
                    rates[what][name] += values
        made = []
        for what, unit in (("enqueue", "chunks/s"), ("vectors", "rows/s")):
            base, ours = rates[what]["without an index"], rates[what]["with an index"]
            made.append(Measurement(group, f"{what}, without an index", unit, base))
            ratio = summary([a / b for a, b in zip(ours, base, strict=True)])
            indexed = Measurement(group, f"{what}, with an index", unit, ours)
            indexed.ratios["to without an index"] = ratio | promise(WRITES, ratio["median"])
            made.append(indexed)
        tail = bench.number("SELECT count(*) FROM serving_tail")
        if tail:
            size = bench.number("SELECT pg_total_relation_size('serving_tail')")
            made.append(Measurement(group, "a row of the tail", "bytes", [size / tail], details={"rows": int(tail)}))
        seen = [_is_found_at_once(bench, corpus, world, done["with an index"] + i) for i in range(FRESH)]
        made.append(Measurement(
            group, f"of {FRESH} new chunks, found in the commit that wrote them", "chunks", [float(sum(seen))],
            target=Target(FRESH),
        ))  # fmt: skip
    stop.set()
    for thread in threads:
        thread.join()
    builder_db.dispose()
    return made


def _is_found_at_once(bench: Bench, corpus: Corpus, world: World, row: int) -> bool:
    bench.enqueue(corpus, row, 1)
    bench.write(corpus, world, row, 1)
    ((_, vectors),) = corpus.blocks(world, row, 1)
    hits = bench.client.search(vectors[0], collection=corpus.name, k=1)
    return hits[0].chunk_id == f"{row}"


def _maintenance(bench: Bench, corpus: Corpus, say: Say) -> list[Measurement]:
    """How long each step lasts that follows the deletion of a tenth of the collection, for a million rows."""
    say("deleting a tenth of the largest collection")
    bench.client.delete(corpus.name, (f"{row}" for row in range(0, corpus.rows, 10)))
    tables = ["chunks", "contents", bench.space.table_name, "serving_tail"]
    tables += [part.table_name for part in bench.segments_of(corpus)]
    seconds = {}
    for table in tables:
        with bench.db.connect().execution_options(isolation_level="AUTOCOMMIT") as conn:
            began = time.perf_counter()
            conn.execute(sa.text(f"VACUUM {table}"))
            seconds[f"VACUUM {table}"] = time.perf_counter() - began
    with bench.db.begin() as conn:
        number = collections.find(conn, corpus.name).id
        began = time.perf_counter()
        call = "SELECT stale_segments(:collection, :space, 0, :share)"
        parameters = {"collection": number, "space": bench.space.id, "share": indexing.STALE_SHARE}
        conn.execute(sa.text(call), parameters)
        seconds["the search for rows without a chunk"] = time.perf_counter() - began
    longest = max(seconds, key=lambda name: seconds[name])
    group = f"after deleting a tenth of {corpus.rows:,} rows"
    millions = bench.number("SELECT count(*) FROM chunks") / 1e6
    return [
        Measurement(
            group, "longest maintenance, for a million rows", "s", [seconds[longest] / max(millions, 1e-6)],
            target=MAINTENANCE if corpus.rows >= 100_000 else None,
            details={"longest": longest, "seconds": {name: round(value, 3) for name, value in seconds.items()}},
        )
    ]  # fmt: skip


class _Memory:
    """``peak`` is how many MiB the server's processes had more than at the beginning; 0 if that cannot be read."""

    def __init__(self) -> None:
        self.peak = 0.0


@contextlib.contextmanager
def _watched_memory(db: sa.Engine) -> Iterator[_Memory]:
    """Look at the memory of the server's processes five times a second, each shared page counted once."""
    memory, stop = _Memory(), threading.Event()
    own = create_db(db.url.render_as_string(hide_password=False), role="client", pool_size=1)
    query = sa.text("SELECT pid FROM pg_stat_activity WHERE pid <> pg_backend_pid()")

    def pss() -> float:
        with own.begin() as conn:
            return sum(_pss_mib(pid) for pid in conn.execute(query).scalars())

    before = pss()

    def look() -> None:
        while not stop.wait(0.2):
            memory.peak = max(memory.peak, pss() - before)

    thread = threading.Thread(target=look, name="memory", daemon=True)
    thread.start()
    try:
        yield memory
    finally:
        stop.set()
        thread.join()
        own.dispose()


def _pss_mib(pid: int) -> float:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0.0
    return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024
