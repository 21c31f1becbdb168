// Hugging Face's client, which posts to the address as it is given.

import { InferenceClient } from "@huggingface/inference";
import { add, end, key, query, texts, url } from "./cases.mjs";

for (const [name, address] of [
  ["the address alone", url],
  ["/embed", `${url}/embed`],
]) {
  const api = new InferenceClient(key).endpoint(address);
  add(name, await api.featureExtraction({ inputs: texts, normalize: true }));
  add(`${name}, a query`, await api.featureExtraction({ inputs: [query], prompt_name: "query" }), [query], "query");
}
end();
