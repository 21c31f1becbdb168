"""Cohere's client, second version of its API."""

from __future__ import annotations

import cohere
from cases import KEY, MODEL, QUERY, TEXTS, URL, case, end

api = cohere.ClientV2(KEY, base_url=URL)
answer = api.embed(texts=TEXTS, model=MODEL, input_type="search_document", embedding_types=["float"])
assert answer.meta.billed_units.input_tokens > 0, answer.meta
case("documents", answer.embeddings.float_)
asked = api.embed(
    texts=[QUERY], model=MODEL, input_type="search_query", output_dimension=384, embedding_types=["float"]
)
case("a query", asked.embeddings.float_, [QUERY], "query")
end()
