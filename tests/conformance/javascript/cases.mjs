// What the scripts share: what to embed comes by standard input, and what a client made of it leaves by standard output.
// They are copied beside node_modules before they run, because Node looks for packages there.

import { readFileSync, writeSync } from "node:fs";

const given = JSON.parse(readFileSync(0, "utf8"));
export const { url, key, model, alias, texts, query, seconds } = given;

const cases = {};

// `asked`: the texts that were asked for.
export function add(name, vectors, asked = texts, kind = "document") {
  cases[name] = { texts: asked, kind, vectors: vectors.map((vector) => Array.from(vector)) };
}

export function check(holds, what) {
  if (!holds) throw new Error(JSON.stringify(what) ?? "check");
}

export function end() {
  const bytes = Buffer.from(JSON.stringify(cases));
  for (let written = 0; written < bytes.length; ) written += writeSync(1, bytes, written);
}
