// Vercel's AI SDK with its provider for OpenAI, and with the one for compatible servers.

import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { embed, embedMany } from "ai";
import { add, check, end, key, model, query, texts, url } from "./cases.mjs";

const openai = createOpenAI({ baseURL: `${url}/v1`, apiKey: key });
const compatible = createOpenAICompatible({ name: "gateway", baseURL: `${url}/v1`, apiKey: key });
for (const [name, made] of [
  ["@ai-sdk/openai", openai.embedding(model)],
  ["@ai-sdk/openai-compatible", compatible.embeddingModel(model)],
]) {
  const answer = await embedMany({ model: made, values: texts });
  check(answer.usage.tokens > 0, answer.usage);
  add(`${name}, embedMany`, answer.embeddings);
  add(`${name}, embed`, [(await embed({ model: made, value: query })).embedding], [query]);
}
end();
