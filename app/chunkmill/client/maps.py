"""The client's method that draws a collection in two dimensions."""

from __future__ import annotations

from functools import partial

from chunkmill.client.base import ClientPart
from chunkmill.client.stopping import end_if_stopped
from chunkmill.db.retry import transact
from chunkmill.domain.arguments import as_flag, as_number, as_text, as_word, require_name
from chunkmill.domain.maps import MAX_SAMPLE, CollectionMap, MapMethod, value_of
from chunkmill.errors import InvalidInput, install_command
from chunkmill.similarity import principal_components
from chunkmill.spaces import collections, registry
from chunkmill.store import golden, maps
from chunkmill.system.numbers import NDArray, np

LEAST_FOR_UMAP = 10
"""UMAP needs some neighbours of each point."""
TRIES = 5


class Maps(ClientPart):
    """The part of the client that draws collections."""

    def map(
        self,
        collection: str,
        *,
        by: str | None = None,
        sample: int = 5_000,
        method: MapMethod | str = MapMethod.PCA,
        texts: bool = False,
    ) -> CollectionMap:
        """Draw the vectors of a collection in two dimensions, coloured by the metadata field ``by``.

        At most ``sample`` distinct texts are drawn. They are chosen at random, and are the same ones each time. They
        are read a thousand at a time; ``4 * sample * d`` bytes of memory hold their vectors of ``d`` dimensions,
        however large the collection is. ``method`` is ``pca``, or ``umap``, which needs the extra ``umap`` and takes
        longer. The result is shown by a notebook, and :meth:`CollectionMap.save` writes it as a page or a picture. It
        has the beginnings of the texts only if ``texts`` is true, because whoever gets the file can read them.

        ``by`` is a key of the metadata. If no chunk has that key, it is read as a path: ``a.b`` is the key ``b`` of the
        object ``a``. Numbers are coloured by a scale. Of other values, the nine most frequent have a colour each.

        Raises :class:`NotFound`, and :class:`InvalidInput` if nothing has a vector yet or UMAP is not installed.
        """
        require_name("collection", collection)
        if by is not None:
            as_text("by", by)
        sample = as_number("sample", sample, least=2, most=MAX_SAMPLE)
        method, texts = as_word(MapMethod, method, "method"), as_flag("texts", texts)
        if method is MapMethod.UMAP:
            _require_umap()
        with self._transaction() as conn:
            row = collections.find(conn, collection)
            space = registry.get(conn, row.space_id)
        vectors: NDArray[np.float32] = np.empty((0, space.spec.dimensions), np.float32)
        read: list[maps.SampledContent] = []
        no_vector: NDArray[np.float32] = np.empty(0, np.float32)
        for most in maps.steps(sample):
            end_if_stopped()
            look = partial(
                maps.read, space=space, collection_id=row.id, field=by, with_text=texts,
                after=read[-1].content_hash if read else b"", most=most,
            )  # fmt: skip
            window = transact(self._db, look, what="reading vectors", tries=TRIES)
            if not window:
                break
            first = len(read)
            if first + len(window) > len(vectors):  # doubled, so that it is copied seldom
                larger = np.empty((min(sample, max(first + len(window), 2 * first)), vectors.shape[1]), np.float32)
                larger[:first] = vectors[:first]
                vectors = larger
            vectors[first : first + len(window)] = [one.vector for one in window]
            read += [
                maps.SampledContent(w.content_hash, w.chunk_id, w.kind, w.value, w.text, no_vector) for w in window
            ]
            if len(window) < most:
                break
        if not read:
            raise InvalidInput(
                f"collection {collection!r} has no vector yet, so there is nothing to draw. `chunkmill audit` shows "
                "what is missing."
            )
        vectors = vectors[: len(read)]
        with self._transaction() as conn:
            contents = max(len(read), golden.count_contents(conn, row.id))
        explained = None
        if method is MapMethod.PCA:
            made = principal_components(vectors)
            points, explained = made.points, (float(made.explained[0]), float(made.explained[1]))
        else:
            points = _by_umap(vectors)
        return CollectionMap(
            collection=collection,
            model=space.spec.model,
            space=space.spec.fingerprint,
            method=method,
            by=by,
            contents=contents,
            explained=explained,
            ids=tuple(one.chunk_id for one in read),
            values=tuple(value_of(one.kind, one.value) for one in read),
            points=points,
            texts=tuple(one.text or "" for one in read) if texts else None,
        )


def _require_umap() -> None:
    from importlib.util import find_spec

    if find_spec("umap") is None:
        raise InvalidInput(f"method umap needs umap-learn, which is not installed. Run: {install_command('umap')}")


def _by_umap(vectors: NDArray[np.float32]) -> NDArray[np.float64]:
    """``(n, 2)``. The same vectors give the same points on the same machine, which takes one thread."""
    if len(vectors) < LEAST_FOR_UMAP:
        raise InvalidInput(
            f"method umap needs at least {LEAST_FOR_UMAP} texts with a vector, and there are {len(vectors)}. Use pca."
        )
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its libraries, about which nobody can do anything here
        from umap import UMAP

        reducer = UMAP(metric="cosine", random_state=0, n_jobs=1, n_neighbors=min(15, len(vectors) - 1))
        return np.asarray(reducer.fit_transform(vectors), np.float64)
