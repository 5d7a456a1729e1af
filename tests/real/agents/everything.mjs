// A server with all that the conformance suite of MCP asks for, made with the SDK of TypeScript (1.32), with sessions.
// Argument: the descriptor of its socket. The names and the shapes of what it has are those of the suite.
import { randomUUID } from "node:crypto";
import { createServer } from "node:http";
import { json } from "node:stream/consumers";
import { setTimeout as sleep } from "node:timers/promises";
import { McpServer, ResourceTemplate } from "@modelcontextprotocol/sdk/server/mcp.js";
import { completable } from "@modelcontextprotocol/sdk/server/completable.js";
import { StreamableHTTPServerTransport } from "@modelcontextprotocol/sdk/server/streamableHttp.js";
import * as types from "@modelcontextprotocol/sdk/types.js";
import { z } from "zod";

const PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mP8z8BQDwAEhQGAhKmMIQAAAABJRU5ErkJggg==";
const WAV = "UklGRiQAAABXQVZFZm10IBAAAAABAAEAQB8AAEAfAAABAAgAZGF0YQAAAAA=";
const image = { type: "image", data: PNG, mimeType: "image/png" };
const text = (words) => ({ type: "text", text: words });
const embedded = (uri, words, mimeType = "text/plain") => ({ type: "resource", resource: { uri, mimeType, text: words } });
const says = (...content) => ({ content });
const user = (content) => ({ role: "user", content });

// Events of the streams that clients may come back to, by session.
class Events {
  #events = [];

  async storeEvent(stream, message) {
    this.#events.push({ id: randomUUID(), stream, message });
    return this.#events.at(-1).id;
  }

  async replayEventsAfter(last, { send }) {
    const place = this.#events.findIndex(({ id }) => id === last);
    const { stream } = this.#events[place];
    for (const { id, message } of this.#events.slice(place + 1).filter((one) => one.stream === stream)) {
      if (Object.keys(message).length) await send(id, message);
    }
    return stream;
  }
}

function tools(server) {
  const tool = (name, run, inputSchema = {}) => server.registerTool(name, { description: name, inputSchema }, run);
  const ask = async (extra, message, requestedSchema) => {
    const params = { message, requestedSchema };
    const { action, content } = await extra.sendRequest({ method: "elicitation/create", params }, types.ElicitResultSchema);
    return says(text(`${action}: ${JSON.stringify(content)}`));
  };
  const object = (properties, required = []) => ({ type: "object", properties, required });
  tool("test_simple_text", async () => says(text("simple")));
  tool("test_image_content", async () => says(image));
  tool("test_audio_content", async () => says({ type: "audio", data: WAV, mimeType: "audio/wav" }));
  tool("test_embedded_resource", async () => says(embedded("test://embedded-resource", "embedded")));
  tool("test_multiple_content_types", async () =>
    says(text("several"), image, embedded("test://mixed-content-resource", "{}", "application/json")));
  tool("test_tool_with_logging", async (_, extra) => {
    for (const data of ["begun", "under way", "done"]) {
      await extra.sendNotification({ method: "notifications/message", params: { level: "info", data } });
      await sleep(50);
    }
    return says(text("logged"));
  });
  tool("test_tool_with_progress", async (_, extra) => {
    const progressToken = extra._meta?.progressToken;
    for (const progress of progressToken === undefined ? [] : [0, 50, 100]) {
      await extra.sendNotification({ method: "notifications/progress", params: { progressToken, progress, total: 100 } });
      await sleep(50);
    }
    return says(text("done"));
  });
  tool("test_error_handling", async () => {
    throw new Error("it fails, as it should");
  });
  tool("test_sampling", async ({ prompt }, extra) => {
    const params = { messages: [user(text(prompt))], maxTokens: 100 };
    const { content } = await extra.sendRequest({ method: "sampling/createMessage", params }, types.CreateMessageResultSchema);
    return says(text(content.text));
  }, { prompt: z.string() });
  tool("test_elicitation", ({ message }, extra) =>
    ask(extra, message, object({ username: { type: "string" }, email: { type: "string" } }, ["username", "email"])),
  { message: z.string() });
  tool("test_elicitation_sep1034_defaults", (_, extra) => ask(extra, "with defaults", object({
    name: { type: "string", default: "John Doe" }, age: { type: "integer", default: 30 },
    score: { type: "number", default: 95.5 }, verified: { type: "boolean", default: true },
    status: { type: "string", enum: ["active", "inactive", "pending"], default: "active" },
  })));
  const plain = ["option1", "option2", "option3"];
  const titled = ["First", "Second", "Third"].map((title, place) => ({ const: `value${place + 1}`, title }));
  tool("test_elicitation_sep1330_enums", (_, extra) => ask(extra, "of several kinds", object({
    untitledSingle: { type: "string", enum: plain }, titledSingle: { type: "string", oneOf: titled },
    legacyEnum: { type: "string", enum: ["opt1", "opt2", "opt3"], enumNames: ["One", "Two", "Three"] },
    untitledMulti: { type: "array", items: { type: "string", enum: plain } },
    titledMulti: { type: "array", items: { anyOf: titled } },
  })));
  tool("test_reconnection", async (_, extra) => {
    extra.closeSSEStream?.();
    await sleep(100);
    return says(text("reconnected"));
  });
  tool("json_schema_2020_12_tool", async () => says(text("taken")));
  // The list has this tool's schema as the suite wants it: zod would write it anew.
  const listed = server.server._requestHandlers.get("tools/list");
  server.server.setRequestHandler(types.ListToolsRequestSchema, async (...request) => {
    const list = await listed(...request);
    list.tools.find(({ name }) => name === "json_schema_2020_12_tool").inputSchema = {
      $schema: "https://json-schema.org/draft/2020-12/schema", type: "object",
      $defs: { address: object({ street: { type: "string" }, city: { type: "string" } }) },
      properties: { name: { type: "string" }, address: { $ref: "#/$defs/address" } }, additionalProperties: false,
    };
    return list;
  });
}

function resources(server) {
  const about = (description, mimeType) => ({ description, mimeType });
  const read = (uri, content) => ({ contents: [{ uri: String(uri), ...content }] });
  server.registerResource("text", "test://static-text", about("a text", "text/plain"), async (uri) =>
    read(uri, { mimeType: "text/plain", text: "static" }));
  server.registerResource("binary", "test://static-binary", about("an image", "image/png"), async (uri) =>
    read(uri, { mimeType: "image/png", blob: PNG }));
  server.registerResource("watched", "test://watched-resource", about("one to watch", "text/plain"), async (uri) =>
    read(uri, { mimeType: "text/plain", text: "watched" }));
  const template = new ResourceTemplate("test://template/{id}/data", { list: undefined });
  server.registerResource("template", template, about("by its id", "application/json"), async (uri, { id }) =>
    read(uri, { mimeType: "application/json", text: JSON.stringify({ id }) }));
  server.server.setRequestHandler(types.SubscribeRequestSchema, async () => ({}));
  server.server.setRequestHandler(types.UnsubscribeRequestSchema, async () => ({}));
}

function prompts(server) {
  const prompt = (name, run, argsSchema) => server.registerPrompt(name, { description: name, argsSchema }, run);
  const asks = (...contents) => ({ messages: contents.map(user) });
  prompt("test_simple_prompt", async () => asks(text("simple")));
  prompt("test_prompt_with_arguments", async ({ arg1, arg2 }) => asks(text(`${arg1} and ${arg2}`)), {
    arg1: completable(z.string(), () => ["paris", "park"]), arg2: z.string(),
  });
  prompt("test_prompt_with_embedded_resource", async ({ resourceUri }) =>
    asks(embedded(resourceUri, "embedded"), text("read it")), { resourceUri: z.string() });
  prompt("test_prompt_with_image", async () => asks(image, text("look at it")));
}

function everything() {
  const capabilities = { logging: {}, resources: { subscribe: true } };
  const server = new McpServer({ name: "everything", version: "1" }, { capabilities });
  for (const register of [tools, resources, prompts]) register(server);
  return server;
}

const sessions = new Map();
const LOCAL = /^(localhost|127\.0\.0\.1|\[::1\])(:\d+)?$/;

createServer(async (request, response) => {
  // Against DNS rebinding.
  if (!LOCAL.test(request.headers.host)) return response.writeHead(403).end();
  const message = request.method === "POST" ? await json(request) : undefined;
  const id = request.headers["mcp-session-id"];
  let transport = sessions.get(id);
  if (!transport && id) return response.writeHead(404).end();
  if (!transport) {
    transport = new StreamableHTTPServerTransport({
      sessionIdGenerator: randomUUID, eventStore: new Events(), retryInterval: 200,
      onsessioninitialized: (id) => sessions.set(id, transport),
    });
    await everything().connect(transport);
  }
  await transport.handleRequest(request, response, message);
}).listen({ fd: Number(process.argv[2]) });
