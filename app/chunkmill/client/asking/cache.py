"""Vectors of the texts that were asked for last, in memory: least recently used first out, each for a limited time.

The key is the fingerprint of the space, the kind, and the hash of the text, so a space that changes finds nothing of
the old one, and no text is kept.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import stat
import struct
import tempfile
import threading
import time
import weakref
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from chunkmill.client.asking.gathered import DistinctTexts
from chunkmill.domain.embedded import EmbeddedText
from chunkmill.domain.retention import QueryCache
from chunkmill.errors import InvalidInput
from chunkmill.system.files import open_regular
from chunkmill.system.numbers import np
from chunkmill.telemetry import metrics as m
from chunkmill.telemetry.counts import COUNTS

ENTRY_BYTES = 600
"""How many bytes an entry takes besides its numbers: the key, the objects of Python, and its place in the dictionary.
Measured with tracemalloc."""
KINDS = ("document", "query")
MOST_DIMENSIONS = 65_536

Key = tuple[str, str, bytes]
"""Fingerprint, kind, and content hash."""


@dataclass(frozen=True, slots=True)
class _Entry:
    embedded: EmbeddedText
    made_at: float
    """Unix time."""

    @property
    def bytes(self) -> int:
        return self.embedded.vector.nbytes + ENTRY_BYTES


class VectorCache:
    """It is thread-safe. With a ``limit`` of 0 bytes it is off."""

    def __init__(self, limit: int, seconds: float, kinds: Iterable[str]) -> None:
        self._limit = limit
        self._seconds = seconds
        self._kinds = frozenset(kinds)
        self._entries: OrderedDict[Key, _Entry] = OrderedDict()
        self._bytes = self._hits = self._misses = 0
        self._mutex = threading.Lock()
        _all.add(self)
        weakref.finalize(self, _forget_bytes, self._entries)

    def read(self, fingerprint: str, kind: str, dimensions: int, gathered: DistinctTexts) -> None:
        """Add the known vectors of what is missing."""
        if not self._limit or kind not in self._kinds:
            return
        wanted, oldest = list(gathered.missing), time.time() - self._seconds
        hits: list[tuple[bytes, EmbeddedText]] = []
        with self._mutex:
            before = self._bytes
            for content_hash in wanted:
                key = (fingerprint, kind, content_hash)
                entry = self._entries.get(key)
                if entry is None:
                    continue
                if entry.made_at < oldest or entry.embedded.vector.shape != (dimensions,):
                    self._remove(key)
                    continue
                self._entries.move_to_end(key)
                hits.append((content_hash, entry.embedded))
            self._hits += len(hits)
            self._misses += len(wanted) - len(hits)
            grown = self._bytes - before
        for content_hash, embedded in hits:
            gathered.add(content_hash, embedded)
        COUNTS.add_all(
            (
                (m.QUERY_CACHE_HITS, len(hits)),
                (m.QUERY_CACHE_MISSES, len(wanted) - len(hits)),
                (m.QUERY_CACHE_BYTES, grown),
            )
        )

    def keep(self, fingerprint: str, kind: str, embedded: Iterable[tuple[bytes, EmbeddedText]]) -> None:
        """Keep vectors that were made just now."""
        if not self._limit or kind not in self._kinds:
            return
        now = time.time()
        self._put(((fingerprint, kind, content_hash), _entry(one, now)) for content_hash, one in embedded)

    def statistics(self) -> QueryCache:
        with self._mutex:
            return QueryCache(self._hits, self._misses, len(self._entries), self._bytes, self._limit)

    def clear(self) -> None:
        with self._mutex:
            gone, self._bytes = self._bytes, 0
            self._entries.clear()
        COUNTS.add(m.QUERY_CACHE_BYTES, -gone)

    def save(self, path: Path) -> int:
        """Write all entries into a file, which replaces an older one. Returns how many."""
        with self._mutex:
            entries = list(self._entries.items())
        try:
            with _replacing(path) as file:
                digest = hashlib.sha256()
                for piece in _written(entries):
                    digest.update(piece)
                    file.write(piece)
                file.write(digest.digest())
        except OSError as error:
            raise InvalidInput(f"path: {path} cannot be written ({error.strerror}).") from error
        return len(entries)

    def load(self, path: Path) -> int:
        """Add the entries of a file that are not too old; of those that do not fit, the ones used last. Returns how
        many. Nothing is added if anything in the file is wrong."""
        try:
            with open_regular(path) as file:
                if stat.S_IMODE(os.fstat(file.fileno()).st_mode) & stat.S_IWOTH:
                    raise InvalidInput(
                        f"path: everybody on this machine may write to {path}, so its vectors cannot be trusted: "
                        "chmod o-w it, if you know who wrote it, or save the cache again."
                    )
                entries = self._read_file(file)
        except OSError as error:
            raise InvalidInput(f"path: {path} cannot be read ({error.strerror}).") from error
        except _WrongFile as error:
            raise InvalidInput(f"path: {path} is not a query cache of this release: {error}. Save it again.") from None
        self._put(entries)
        return len(entries)

    def _read_file(self, file: BinaryIO) -> Sequence[tuple[Key, _Entry]]:
        """The entries of a file, which are as many bytes as the cache has at most."""
        oldest, size = time.time() - self._seconds, 0
        kept: deque[tuple[Key, _Entry]] = deque()
        for key, entry in _read(file):
            if entry.made_at < oldest or key[1] not in self._kinds:
                continue
            kept.append((key, entry))
            size += entry.bytes
            while size > self._limit:
                size -= kept.popleft()[1].bytes
        return kept

    def _put(self, entries: Iterable[tuple[Key, _Entry]]) -> None:
        with self._mutex:
            before = self._bytes
            for key, entry in entries:
                self._remove(key)
                self._entries[key] = entry
                self._bytes += entry.bytes
            while self._bytes > self._limit:
                self._remove(next(iter(self._entries)))
            grown = self._bytes - before
        COUNTS.add(m.QUERY_CACHE_BYTES, grown)

    def _remove(self, key: Key) -> None:
        if (entry := self._entries.pop(key, None)) is not None:
            self._bytes -= entry.bytes


def _entry(embedded: EmbeddedText, made_at: float) -> _Entry:
    # The vector is copied, because it is a row of an answer whose other vectors would stay in memory with it.
    vector = np.array(embedded.vector, np.float32)
    vector.flags.writeable = False
    return _Entry(EmbeddedText(vector, embedded.tokens, embedded.truncated), made_at)


# --- the file --------------------------------------------------------------------------------------------------------

# All numbers are little-endian. The file ends with the SHA-256 of all before, which shows a file that was cut or
# damaged; it is not a signature. There is no compression, so nothing grows as it is read.
_HEAD = struct.Struct("<8sII")
_MAGIC, _VERSION = b"chunkmil", 1
# Fingerprint, content hash, kind, whether the text was cut, tokens, dimensions, Unix time. The numbers follow.
_RECORD = struct.Struct("<32s32sBBiId")
_DIGEST_BYTES = 32


class _WrongFile(Exception):
    pass


def _written(entries: Sequence[tuple[Key, _Entry]]) -> Iterator[bytes]:
    yield _HEAD.pack(_MAGIC, _VERSION, len(entries))
    for (fingerprint, kind, content_hash), entry in entries:
        embedded = entry.embedded
        yield _RECORD.pack(
            bytes.fromhex(fingerprint),
            content_hash,
            KINDS.index(kind),
            embedded.truncated,
            embedded.tokens,
            len(embedded.vector),
            entry.made_at,
        )
        yield embedded.vector.astype("<f4").tobytes()


def _read(file: BinaryIO) -> Iterator[tuple[Key, _Entry]]:
    """The entries. Raises :class:`_WrongFile`, at the latest after the last one."""
    digest = hashlib.sha256()

    def take(size: int) -> bytes:
        piece = file.read(size)
        if len(piece) != size:
            raise _WrongFile("it ends too early")
        digest.update(piece)
        return piece

    magic, version, count = _HEAD.unpack(take(_HEAD.size))
    if (magic, version) != (_MAGIC, _VERSION):
        raise _WrongFile("it begins in another way")
    now = time.time()
    fingerprints: dict[bytes, str] = {}
    for number in range(count):
        fingerprint, content_hash, kind, truncated, tokens, dimensions, made_at = _RECORD.unpack(take(_RECORD.size))
        if kind >= len(KINDS) or truncated > 1 or tokens < 0 or not 0 < dimensions <= MOST_DIMENSIONS:
            raise _WrongFile(f"entry {number} holds what no entry holds")
        vector = np.frombuffer(take(4 * dimensions), "<f4")
        if not (math.isfinite(made_at) and np.isfinite(vector).all()):
            raise _WrongFile(f"a number of entry {number} is not finite")
        name = fingerprints.setdefault(fingerprint, fingerprint.hex())
        # If an entry is of the future, another clock wrote it.
        yield (
            (name, KINDS[kind], content_hash),
            _entry(EmbeddedText(vector, tokens, bool(truncated)), min(made_at, now)),
        )
    expected = digest.digest()
    if file.read(_DIGEST_BYTES + 1) != expected:
        raise _WrongFile("its digest is not that of its content")


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file beside ``path``, which takes its place at the end. Only its owner may read it."""
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _forget_bytes(entries: OrderedDict[Key, _Entry]) -> None:
    """A client is gone: forget how many bytes its cache held."""
    COUNTS.add(m.QUERY_CACHE_BYTES, -sum(entry.bytes for entry in entries.values()))


_all: weakref.WeakSet[VectorCache] = weakref.WeakSet()


def _begin_in_child() -> None:
    """Make new mutexes: a thread that held one at the fork does not run in the child and would never release it."""
    for cache in list(_all):
        cache._mutex = threading.Lock()


os.register_at_fork(after_in_child=_begin_in_child)
