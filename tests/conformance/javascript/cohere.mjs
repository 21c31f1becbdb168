// Cohere's client, second version of its API.

import { CohereClientV2 } from "cohere-ai";
import { add, check, end, key, model, query, texts, url } from "./cases.mjs";

const api = new CohereClientV2({ token: key, environment: url, baseUrl: url });
const answer = await api.embed({ texts, model, inputType: "search_document", embeddingTypes: ["float"] });
check(answer.meta.billedUnits.inputTokens > 0, answer.meta);
add("documents", answer.embeddings.float);
const asked = await api.embed({ texts: [query], model, inputType: "search_query", embeddingTypes: ["float"] });
add("a query", asked.embeddings.float, [query], "query");
end();
