"""Hugging Face's client, which posts to the address as it is given."""

from __future__ import annotations

import asyncio

from cases import KEY, QUERY, TEXTS, URL, case, end
from huggingface_hub import AsyncInferenceClient, InferenceClient

for address in (URL, f"{URL}/embed"):
    api = InferenceClient(address, token=KEY)
    name = "the address alone" if address == URL else "/embed"
    case(name, api.feature_extraction(TEXTS))
    case(f"{name}, one text", api.feature_extraction(TEXTS[0], normalize=True, truncate=True), TEXTS[:1])
    case(f"{name}, a query", api.feature_extraction(QUERY, prompt_name="query"), [QUERY], "query")


async def asynchronous() -> None:
    async with AsyncInferenceClient(URL, token=KEY) as api_async:
        case("asynchronous", await api_async.feature_extraction(TEXTS))


asyncio.run(asynchronous())
end()
