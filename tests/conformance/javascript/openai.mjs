// OpenAI's own client: both encodings, its errors, and the flow of batches in its documentation.

import OpenAI, { toFile } from "openai";
import { add, alias, check, end, key, model, query, seconds, texts, url } from "./cases.mjs";

const api = new OpenAI({ baseURL: `${url}/v1`, apiKey: key });

async function ask(body) {
  const answer = await api.embeddings.create({ model, input: texts, ...body });
  check(answer.usage.prompt_tokens > 0 && answer.data.every((item, i) => item.index === i), answer.usage);
  return answer.data.map((item) => item.embedding);
}

async function refused(call, name, code) {
  try {
    await call();
  } catch (error) {
    check(error instanceof OpenAI[name] && (code === null || error.code === code), [name, error.message]);
    return;
  }
  throw new Error(`no ${name}`);
}

add("as it asks by default (base64)", await ask({}));
add("float", await ask({ encoding_format: "float" }));
add("one text", await ask({ input: texts[0] }), texts.slice(0, 1));
add("the model's own dimensions", await ask({ dimensions: 384 }));
add("an alias", await ask({ model: alias }));
add("a query", await ask({ input: query, input_type: "query" }), [query], "query");

await refused(() => ask({ model: "no-such-model" }), "NotFoundError", "model_not_found");
await refused(() => ask({ input: [] }), "BadRequestError", "empty_input");
await refused(() => new OpenAI({ baseURL: `${url}/v1`, apiKey: "wrong" }).models.list(), "AuthenticationError", "invalid_api_key");

const content = texts
  .map((text, n) =>
    JSON.stringify({ custom_id: `request-${n}`, method: "POST", url: "/v1/embeddings", body: { model, input: text } }),
  )
  .join("\n");
const file = await api.files.create({ file: await toFile(Buffer.from(content), "requests.jsonl"), purpose: "batch" });
let batch = await api.batches.create({
  input_file_id: file.id,
  endpoint: "/v1/embeddings",
  completion_window: "24h",
  metadata: { description: "nightly" },
});
const deadline = Date.now() + 1000 * seconds;
while (!["completed", "failed", "expired", "cancelled"].includes(batch.status)) {
  check(Date.now() < deadline, batch);
  await new Promise((resolve) => setTimeout(resolve, 200));
  batch = await api.batches.retrieve(batch.id);
}
check(batch.status === "completed" && batch.request_counts.completed === texts.length, batch);
const answers = {};
for (const line of (await (await api.files.content(batch.output_file_id)).text()).trim().split("\n")) {
  const answer = JSON.parse(line);
  answers[answer.custom_id] = answer.response.body.data[0].embedding;
}
add("a batch", texts.map((_, n) => answers[`request-${n}`]));
const listed = [];
for await (const each of api.batches.list({ limit: 1 })) listed.push(each.id); // it asks for the pages
check(listed.includes(batch.id), listed);
const second = await api.batches.create({ input_file_id: file.id, endpoint: "/v1/embeddings", completion_window: "24h" });
try {
  check(["cancelling", "cancelled"].includes((await api.batches.cancel(second.id)).status), second);
} catch (error) {
  check(error instanceof OpenAI.ConflictError, error.message); // it was faster
  check(["completed", "finalizing"].includes((await api.batches.retrieve(second.id)).status), second);
}
check((await api.files.delete(file.id)).deleted, file);
end();
