// openai: a chat completion, also streamed.
import OpenAI from "openai";
import { joined, run } from "./calls.mjs";

await run(async (order) => {
  const client = new OpenAI({ baseURL: `${order.url}/v1`, apiKey: "sk-1", timeout: 1000 * order.timeout_s });
  if (order.key) client.idempotencyHeader = "Idempotency-Key";
  const asked = { model: "m", messages: [{ role: "user", content: order.prompt }], stream: order.stream };
  const answer = await client.chat.completions.create(asked, order.key ? { idempotencyKey: order.key } : {});
  return order.stream ? joined(answer, (one) => one.choices[0].delta.content) : answer.choices[0].message.content;
}, "openai");
