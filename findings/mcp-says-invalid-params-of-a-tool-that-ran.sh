#!/usr/bin/env bash
# MCP's SDK for TypeScript 1.20.2 answers "invalid params" to a call whose tool ran, with the code of one that did not run.
#
# Seen: a server has a tool `pay`, whose output schema says that `receipt` is a text. A call with an amount that is no number
# gets the JSON-RPC error -32602, and the tool does not run. A call with a valid amount runs the tool, which returns the
# number 17 as `receipt`. It gets the error -32602, too.
#
# Why: the SDK checks the arguments and the tool's result in one function, and throws `InvalidParams` for both. From 1.21.0
# on, both are results with `isError`. The releases from 1.12.0 to 1.20.2 do it as seen here.
#
# Why it matters: JSON-RPC 2.0 (section 5.1) has -32602 for "Invalid method parameter(s)", which reads as "nothing happened:
# correct the call and send it again". An agent that does so, or a gateway that frees an idempotency key on this code, pays
# twice. Only the text of the message tells the two apart. The script needs Node 18 or newer and npm.
#
# The output that was seen:
#
#     @modelcontextprotocol/sdk 1.20.2
#     amount "much": the tool ran 0 time(s), error -32602
#     amount 5: the tool ran 1 time(s), error -32602
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
npm install --silent --no-audit --no-fund @modelcontextprotocol/sdk@1.20.2 zod@3.25.76 >/dev/null

cat >finding.mjs <<'NODE'
import { readFileSync } from "node:fs";
import http from "node:http";
import { McpServer } from "@modelcontextprotocol/sdk/server/mcp.js";
import { StreamableHTTPServerTransport } from "@modelcontextprotocol/sdk/server/streamableHttp.js";
import { z } from "zod";

let runs = 0;

const api = http.createServer(async (request, response) => {
  const server = new McpServer({ name: "shop", version: "1" });
  const schemas = { inputSchema: { amount: z.number() }, outputSchema: { receipt: z.string() } };
  server.registerTool("pay", schemas, async () => {
    runs += 1;
    return { content: [], structuredContent: { receipt: 17 } };
  });
  const transport = new StreamableHTTPServerTransport({ sessionIdGenerator: undefined, enableJsonResponse: true });
  await server.connect(transport);
  await transport.handleRequest(request, response);
});
await new Promise((resolve) => api.listen(0, "127.0.0.1", resolve));

async function pay(amount) {
  runs = 0;
  const call = { jsonrpc: "2.0", id: 1, method: "tools/call", params: { name: "pay", arguments: { amount } } };
  const response = await fetch(`http://127.0.0.1:${api.address().port}/mcp`, {
    method: "POST",
    headers: { "Content-Type": "application/json", Accept: "application/json, text/event-stream" },
    body: JSON.stringify(call),
  });
  const { error } = await response.json();
  console.log(`amount ${JSON.stringify(amount)}: the tool ran ${runs} time(s), error ${error?.code}`);
  return [runs, error?.code];
}

const { version } = JSON.parse(readFileSync("node_modules/@modelcontextprotocol/sdk/package.json"));
console.log(`@modelcontextprotocol/sdk ${version}`);
const seen = [...(await pay("much")), ...(await pay(5))];
process.exit(String(seen) === "0,-32602,1,-32602" ? 0 : 1);
NODE
node finding.mjs
