// The tools of server.py, made with the SDK of TypeScript. Arguments: the descriptor of its socket, the log, and the
// generation of the SDK: 2 speaks the protocol of 2026-07-28 and the older ones, 1 the older ones.
import { randomUUID } from "node:crypto";
import { appendFileSync } from "node:fs";
import { createServer } from "node:http";
import { json } from "node:stream/consumers";
import { setTimeout as sleep } from "node:timers/promises";
import { z } from "zod";

const [descriptor, log, generation] = process.argv.slice(2);
const sdk = generation === "2" ? await newer() : await older();
const CONSENT = { type: "object", properties: { yes: { type: "boolean" } }, required: ["yes"] };
const text = (words) => ({ content: [{ type: "text", text: words }] });
const note = (words) => appendFileSync(log, `${words}\n`);

// What both generations have under other names: a transport of sessions, and of a call its signal, the token of its
// progress, a way to notify its client, and one to ask the user.
async function newer() {
  const server = await import("@modelcontextprotocol/server");
  const node = await import("@modelcontextprotocol/node");
  const call = ({ mcpReq }) => ({
    signal: mcpReq.signal, token: mcpReq._meta?.progressToken, notify: mcpReq.notify, ask: mcpReq.elicitInput,
    answers: mcpReq.inputResponses,
  });
  return { ...server, ...node, Transport: node.NodeStreamableHTTPServerTransport, call };
}

async function older() {
  const server = await import("@modelcontextprotocol/sdk/server/mcp.js");
  const http = await import("@modelcontextprotocol/sdk/server/streamableHttp.js");
  const { ElicitResultSchema } = await import("@modelcontextprotocol/sdk/types.js");
  const call = (extra) => ({
    signal: extra.signal, token: extra._meta?.progressToken, notify: extra.sendNotification,
    ask: (params) => extra.sendRequest({ method: "elicitation/create", params }, ElicitResultSchema),
  });
  return { ...server, Transport: http.StreamableHTTPServerTransport, call };
}

function tools({ era } = { era: "legacy" }) {
  const server = new sdk.McpServer({ name: "tools", version: "1" });
  const tool = (name, schema, run) =>
    server.registerTool(name, { description: name, inputSchema: z.object(schema) }, (words, context) => run(words, sdk.call(context)));
  const amount = { amount: z.number() };
  for (const [name, done] of [["charge", "charged"], ["refund", "refunded"]]) {
    tool(name, amount, ({ amount }) => {
      note(`${name} ${amount}`);
      return text(`${done} ${amount}`);
    });
  }
  tool("fail", amount, ({ amount }) => {
    note(`fail ${amount}`);
    throw new Error("the card is expired");
  });
  tool("slow", { seconds: z.number() }, async ({ seconds }, { signal, token, notify }) => {
    note("slow begins");
    const params = { progressToken: token, progress: 1, total: 2 };
    if (token !== undefined) await notify({ method: "notifications/progress", params });
    try {
      await sleep(1000 * seconds, null, { signal });
    } catch (error) {
      note("slow is cancelled");
      throw error;
    }
    note("slow ends");
    return text("done");
  });
  tool("pay", amount, async ({ amount }, { ask, answers }) => {
    const question = { message: `Pay ${amount}?`, requestedSchema: CONSENT };
    if (era === "modern" && !answers?.consent) {
      // On the wire of 2026-07-28 these are two rounds.
      return sdk.inputRequired({ inputRequests: { consent: sdk.inputRequired.elicit(question) } });
    }
    const { content } = era === "modern" ? answers.consent : await ask(question);
    note(`pay ${amount}`);
    return text(`paid ${amount}: ${content.yes ? "True" : "False"}`);
  });
  return server;
}

const sessions = new Map();

async function inSession(request, response, message) {
  const id = request.headers["mcp-session-id"];
  let transport = sessions.get(id);
  if (!transport && id) return response.writeHead(404).end();
  if (!transport) {
    transport = new sdk.Transport({
      sessionIdGenerator: randomUUID, onsessioninitialized: (id) => sessions.set(id, transport),
    });
    await tools().connect(transport);
  }
  await transport.handleRequest(request, response, message);
}

const stateless = generation === "2" ? sdk.toNodeHandler(sdk.createMcpHandler(tools, { legacy: "reject" })) : null;

createServer(async (request, response) => {
  const message = request.method === "POST" ? await json(request) : undefined;
  const isOlder = !stateless || (await sdk.isLegacyRequest(await sdk.toWebRequest(request, message)));
  await (isOlder ? inSession : stateless)(request, response, message);
}).listen({ fd: Number(descriptor) });
