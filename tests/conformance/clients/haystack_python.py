"""Haystack's embedders of documents and of texts."""

from __future__ import annotations

from cases import KEY, MODEL, QUERY, TEXTS, URL, case, end
from haystack import Document
from haystack.components.embedders import OpenAIDocumentEmbedder, OpenAITextEmbedder
from haystack.utils import Secret

known = {"model": MODEL, "api_base_url": f"{URL}/v1", "api_key": Secret.from_token(KEY)}
answer = OpenAIDocumentEmbedder(**known, progress_bar=False).run([Document(content=text) for text in TEXTS])
assert answer["meta"]["usage"]["prompt_tokens"] > 0, answer["meta"]
case("OpenAIDocumentEmbedder", [document.embedding for document in answer["documents"]])
case("OpenAITextEmbedder", [OpenAITextEmbedder(**known).run(QUERY)["embedding"]], [QUERY])
end()
