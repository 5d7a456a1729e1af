// svix: a message, under the key that the SDK makes or under the caller's.
import { Svix } from "svix";
import { run } from "./calls.mjs";

await run(async (order) => {
  const client = new Svix("sk_1", { serverUrl: order.url, requestTimeout: 1000 * order.timeout_s });
  const message = { eventType: "asked", payload: { prompt: order.prompt } };
  return (await client.message.create("app_1", message, order.key ? { idempotencyKey: order.key } : {})).payload.answer;
}, "svix");
