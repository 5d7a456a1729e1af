// Runs calls of one client as they are ordered: a line of JSON comes for each, and a line with its result goes back.
// An order has the `url` of the proxy, a `prompt`, the `key` to send or none, whether to `stream`, and `timeout_s`.
import { readFileSync } from "node:fs";
import { createInterface } from "node:readline";

const say = (result) => process.stdout.write(JSON.stringify(result) + "\n");

// The header with the key of a call, if it has one.
export const headers = (order) => (order.key ? { "Idempotency-Key": order.key } : {});

// Says the version, then runs one call for each order.
export async function run(call, name) {
  const { version } = JSON.parse(readFileSync(new URL(`node_modules/${name}/package.json`, import.meta.url)));
  say({ version });
  for await (const line of createInterface({ input: process.stdin })) {
    try {
      say({ answer: await call(JSON.parse(line)) });
    } catch (error) {
      const name = ["Error", "DOMException"].includes(error.constructor.name) ? error.name : error.constructor.name;
      say({ error: name, status: error.status ?? error.statusCode ?? (error.code >= 400 ? error.code : null), text: String(error) });
    }
  }
}

// The text of a stream, of whose events `text` takes the piece.
export async function joined(stream, text) {
  const pieces = [];
  for await (const event of stream) pieces.push(text(event) ?? "");
  return pieces.join("");
}
