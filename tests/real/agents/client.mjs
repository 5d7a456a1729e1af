// What client.py does, with the SDK of TypeScript. Arguments: the generation of the SDK, and the order as JSON.
import { setTimeout as sleep } from "node:timers/promises";

const [generation, order] = [process.argv[2], JSON.parse(process.argv[3])];
const isNew = generation === "2";
const CONSENT = { action: "accept", content: { yes: true } };

async function connected() {
  const info = { name: "agent", version: "1" };
  const capabilities = { elicitation: {} };
  if (isNew) {
    const { Client, StreamableHTTPClientTransport } = await import("@modelcontextprotocol/client");
    const client = new Client(info, { capabilities, versionNegotiation: { mode: order.mode } });
    client.setRequestHandler("elicitation/create", () => CONSENT);
    await client.connect(new StreamableHTTPClientTransport(new URL(order.url)));
    return client;
  }
  const { Client } = await import("@modelcontextprotocol/sdk/client/index.js");
  const { StreamableHTTPClientTransport } = await import("@modelcontextprotocol/sdk/client/streamableHttp.js");
  const { ElicitRequestSchema } = await import("@modelcontextprotocol/sdk/types.js");
  const client = new Client(info, { capabilities });
  client.setRequestHandler(ElicitRequestSchema, () => CONSENT);
  await client.connect(new StreamableHTTPClientTransport(new URL(order.url)));
  return client;
}

async function call(client, one) {
  const seen = [];
  const params = { name: one.tool, arguments: one.arguments };
  if (one.key) params._meta = { idempotencyKey: one.key };
  const options = { timeout: 1000 * (one.timeout ?? 30) };
  if (one.progress) options.onprogress = ({ progress }) => seen.push(progress);
  try {
    const { content, isError } = await client.callTool(params, ...(isNew ? [options] : [undefined, options]));
    return { text: content[0].text, is_error: isError ?? false, progress: seen };
  } catch (error) {
    const name = error.constructor.name;
    if (/timed out/i.test(error.message)) return { timeout: true, name };
    if (typeof error.code !== "number") return { broken: String(error), name };
    return { code: error.code, message: error.message, problem: error.data?.error?.code ?? null, name };
  }
}

const answers = [];
const client = await connected();
if (order.at_once) answers.push(...(await Promise.all(order.calls.map((one) => call(client, one)))));
for (const one of order.at_once ? [] : order.calls) {
  answers.push(await call(client, one));
  await sleep(1000 * (order.pause ?? 0));
}
console.log(JSON.stringify(answers));
process.exit(0);
