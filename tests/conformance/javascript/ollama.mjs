// Ollama's own client, with its route of today and the one that it had before.

import { Ollama } from "ollama";
import { add, end, key, model, texts, url } from "./cases.mjs";

const api = new Ollama({ host: url, headers: { Authorization: `Bearer ${key}` } });
add("embed", (await api.embed({ model, input: texts })).embeddings);
add("embeddings, the older route", [(await api.embeddings({ model, prompt: texts[0] })).embedding], texts.slice(0, 1));
end();
