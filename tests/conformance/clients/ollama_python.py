"""Ollama's own client, with its route of today and the one that it had before."""

from __future__ import annotations

import asyncio

import ollama
from cases import KEY, MODEL, TEXTS, URL, case, end

bearer = {"Authorization": f"Bearer {KEY}"}
api = ollama.Client(URL, headers=bearer)
case("embed", api.embed(MODEL, TEXTS).embeddings)
case("embed, one text", api.embed(MODEL, TEXTS[0], truncate=True, dimensions=384).embeddings, TEXTS[:1])
case("embeddings, the older route", [api.embeddings(MODEL, TEXTS[0]).embedding], TEXTS[:1])
case("asynchronous", asyncio.run(ollama.AsyncClient(URL, headers=bearer).embed(MODEL, TEXTS)).embeddings)
end()
