"""Voyage's client, which sends a null for every option that it has."""

from __future__ import annotations

import voyageai
from cases import KEY, MODEL, QUERY, TEXTS, URL, case, end

api = voyageai.Client(KEY, base_url=f"{URL}/v1")
answer = api.embed(TEXTS, model=MODEL, input_type="document")
assert answer.total_tokens > 0, answer
case("documents", answer.embeddings)
case("a query", api.embed([QUERY], model=MODEL, input_type="query").embeddings, [QUERY], "query")
end()
