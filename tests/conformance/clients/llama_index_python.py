"""llama-index: OpenAI's class, which takes only OpenAI's names, the one for similar servers, and that for TEI."""

from __future__ import annotations

import asyncio

from cases import ALIAS, KEY, MODEL, QUERY, TEXTS, URL, case, end
from llama_index.embeddings.openai import OpenAIEmbedding
from llama_index.embeddings.openai_like import OpenAILikeEmbedding
from llama_index.embeddings.text_embeddings_inference import TextEmbeddingsInference

IN_A_LINE = [text.replace("\n", " ") for text in TEXTS]
"""OpenAI's class sends spaces for line breaks."""

openai = OpenAIEmbedding(model=ALIAS, api_base=f"{URL}/v1", api_key=KEY)
case("OpenAIEmbedding", openai.get_text_embedding_batch(TEXTS), IN_A_LINE)
case("OpenAIEmbedding, asynchronous", asyncio.run(openai.aget_text_embedding_batch(TEXTS)), IN_A_LINE)
case("OpenAIEmbedding, a query", [openai.get_query_embedding(QUERY)], [QUERY])
like = OpenAILikeEmbedding(model_name=MODEL, api_base=f"{URL}/v1", api_key=KEY)
case("OpenAILikeEmbedding", like.get_text_embedding_batch(TEXTS), IN_A_LINE)
tei = TextEmbeddingsInference(model_name=MODEL, base_url=URL, auth_token=KEY, text_instruction="", query_instruction="")
case("TextEmbeddingsInference", tei.get_text_embedding_batch(TEXTS))
case("TextEmbeddingsInference, a query", [tei.get_query_embedding(QUERY)], [QUERY])
end()
