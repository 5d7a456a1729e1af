// What a2a_client.py does, with the SDK of JavaScript. Argument: the order as JSON.
import { ClientFactory } from "@a2a-js/sdk/client";
import { Role } from "@a2a-js/sdk";

const order = JSON.parse(process.argv[2]);

async function* sent(client, params, options) {
  if (order.stream) yield* client.sendMessageStream(params, options);
  else yield { payload: { $case: "task", value: await client.sendMessage(params, options) } };
}

const artifactText = ({ parts }) => parts.map(({ content }) => content.value).join("");

async function send(client, one) {
  const part = { content: { $case: "text", value: one.text }, metadata: undefined, filename: "", mediaType: "" };
  const message = {
    messageId: one.id, role: Role.ROLE_USER, parts: [part], contextId: "", taskId: "", metadata: undefined,
    extensions: [], referenceTaskIds: [],
  };
  const tasks = new Set();
  const texts = [];
  const signal = AbortSignal.timeout(1000 * (one.timeout ?? 30));
  try {
    for await (const { payload } of sent(client, { tenant: "", message, configuration: undefined, metadata: undefined }, { signal })) {
      tasks.add(payload.value.id ?? payload.value.taskId);
      if (payload.$case === "artifactUpdate") texts.push(artifactText(payload.value.artifact));
      if (payload.$case === "task") texts.push(...payload.value.artifacts.map(artifactText));
    }
  } catch (error) {
    const { name } = error.constructor;
    return signal.aborted ? { timeout: true, name } : { error: String(error), name };
  }
  return { tasks: [...tasks], texts };
}

const face = { url: order.url, protocolBinding: "JSONRPC", tenant: "", protocolVersion: order.version };
const card = { name: "agent", version: "1", capabilities: { streaming: true, extensions: [] }, supportedInterfaces: [face] };
const client = await new ClientFactory().createFromAgentCard(card);
const answers = [];
for (const one of order.messages) answers.push(await send(client, one));
console.log(JSON.stringify(answers));
process.exit(0);
