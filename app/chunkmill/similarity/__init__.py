"""Similarity of vectors in NumPy: measures, nearest vectors, k-means, principal components and normalisation.

It needs no database, no Celery and no torch, and works on any arrays: on what ``client.embed``, ``client.vectors`` and
exported files give, and on memory-mapped arrays that are larger than the memory. docs/similarity.md has examples.

These rules hold for every function:

- A *vector* is one-dimensional, ``(d,)``, and *vectors* are the rows of a two-dimensional array, ``(n, d)``, with
  ``d >= 1``. An empty list stands for no vectors. Anything that NumPy makes such an array of is taken: lists, integers,
  float16, arrays that are not contiguous. Nothing that is given is changed.
- The result is float64 if an argument is float64 or has integers of 32 or 64 bits, as lists of Python numbers do.
  Otherwise it is float32.
- NaN, infinities, complex numbers, texts and ragged lists are refused with
  :class:`~chunkmill.errors.InvalidInput`, which names the argument and its row.
- A result that is beyond the largest number of its type is infinite. No result is NaN.
"""

from chunkmill.similarity.clusters import Clusters, kmeans
from chunkmill.similarity.components import Components, principal_components
from chunkmill.similarity.matrix import blocks, cosine, dot, euclidean, manhattan
from chunkmill.similarity.measures import Measure, normalise
from chunkmill.similarity.nearest import Nearest, top_k, top_k_of_batches

__all__ = [
    "Clusters",
    "Components",
    "Measure",
    "Nearest",
    "blocks",
    "cosine",
    "dot",
    "euclidean",
    "kmeans",
    "manhattan",
    "normalise",
    "principal_components",
    "top_k",
    "top_k_of_batches",
]
