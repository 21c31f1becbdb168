// LangChain in JavaScript, which sends texts, each on one line unless it is told not to change them.

import { OpenAIEmbeddings } from "@langchain/openai";
import { add, end, key, model, query, texts, url } from "./cases.mjs";

const known = { model, apiKey: key, configuration: { baseURL: `${url}/v1` } };
const plain = new OpenAIEmbeddings(known);
const inOneLine = new OpenAIEmbeddings({ ...known, stripNewLines: true });
const whole = new OpenAIEmbeddings({ ...known, stripNewLines: false });
add("embedDocuments", await inOneLine.embedDocuments(texts), texts.map((text) => text.replaceAll("\n", " ")));
add("embedDocuments with line breaks", await whole.embedDocuments(texts));
add("embedQuery", [await plain.embedQuery(query)], [query]);
end();
