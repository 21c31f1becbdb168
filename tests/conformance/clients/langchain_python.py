"""LangChain, which sends token ids of cl100k unless it is told not to."""

from __future__ import annotations

import asyncio

from cases import KEY, MODEL, QUERY, TEXTS, URL, case, end
from langchain_openai import OpenAIEmbeddings

WITH_EMPTY = [*TEXTS, ""]

as_ids = OpenAIEmbeddings(model=MODEL, base_url=f"{URL}/v1", api_key=KEY)
case("token ids, its default", as_ids.embed_documents(TEXTS))
case("an empty text among others", as_ids.embed_documents(WITH_EMPTY), WITH_EMPTY)
case("a query", [as_ids.embed_query(QUERY)], [QUERY])
case("asynchronous", asyncio.run(as_ids.aembed_documents(TEXTS)))
as_texts = OpenAIEmbeddings(model=MODEL, base_url=f"{URL}/v1", api_key=KEY, check_embedding_ctx_length=False)
case("texts (check_embedding_ctx_length=False)", as_texts.embed_documents(TEXTS))
marked = OpenAIEmbeddings(
    model=MODEL,
    base_url=f"{URL}/v1",
    api_key=KEY,
    check_embedding_ctx_length=False,
    model_kwargs={"extra_body": {"input_type": "query"}},
)
case("a query that says so", [marked.embed_query(QUERY)], [QUERY], "query")
end()
