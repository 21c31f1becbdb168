"""Turns the vectors of one request's inputs into the vectors of its contents. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from chunkmill.domain.vectors import unfit, why_unfit
from chunkmill.openai.plan.packing import PackedInput
from chunkmill.openai.wire.answers import EmbeddedRequest
from chunkmill.openai.wire.vectors import pool


class AssembledVectors(NamedTuple):
    """The vectors that one request gave its contents."""

    rows: list[PackedInput]
    """Contents that have a vector."""
    vectors: NDArray[np.float32]
    """(rows, dimensions) float32, in the order of ``rows``."""
    problems: list[tuple[PackedInput, str]]
    """Contents that have no vector, with the reason."""


def assemble(
    answer: EmbeddedRequest, rows: Sequence[PackedInput], *, normalize: bool, half: bool = False
) -> AssembledVectors:
    """The vectors of a request's contents ``rows``. A content has a vector only if all its windows have one.

    ``half`` says that the space stores half precision, which not every vector fits.
    """
    done: list[PackedInput] = []
    vectors: list[NDArray[np.float32]] = []
    problems: list[tuple[PackedInput, str]] = []
    for row in rows:
        places = range(row.position, row.position + row.windows)
        wrong = next((answer.problems[place] for place in places if place in answer.problems), None)
        if wrong is not None:
            problems.append((row, wrong))
            continue
        own = answer.vectors[places.start : places.stop]
        vector = pool(own, row.weights, normalize=normalize) if row.windows > 1 else own[0]
        if vector is None:
            problems.append((row, "the mean of the text's windows is zero"))
            continue
        if unfit(vector[None], half=half)[0]:
            problems.append((row, why_unfit(vector)[1]))
            continue
        done.append(row)
        vectors.append(vector)
    matrix = np.stack(vectors) if vectors else np.empty((0, answer.vectors.shape[1]), np.float32)
    return AssembledVectors(done, matrix, problems)
