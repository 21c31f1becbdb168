"""LiteLLM's four providers that fit: three of OpenAI's form, and Ollama's."""

from __future__ import annotations

import asyncio

import litellm
from cases import KEY, MODEL, TEXTS, URL, case, end

BASES = {"openai": f"{URL}/v1", "hosted_vllm": f"{URL}/v1", "infinity": f"{URL}/v1", "ollama": URL}

for provider, base in BASES.items():
    answer = litellm.embedding(f"{provider}/{MODEL}", TEXTS, api_base=base, api_key=KEY)
    case(provider, [item["embedding"] for item in answer.data])
    assert answer.usage.prompt_tokens > 0, (provider, answer.usage)
awaited = asyncio.run(litellm.aembedding(f"openai/{MODEL}", TEXTS, api_base=BASES["openai"], api_key=KEY))
case("openai, asynchronous", [item["embedding"] for item in awaited.data])
end()
