// @anthropic-ai/sdk: a message, also streamed.
import Anthropic from "@anthropic-ai/sdk";
import { headers, joined, run } from "./calls.mjs";

await run(async (order) => {
  const client = new Anthropic({ baseURL: order.url, apiKey: "sk-1", timeout: 1000 * order.timeout_s });
  const asked = { model: "m", max_tokens: 64, messages: [{ role: "user", content: order.prompt }] };
  const options = { headers: headers(order) };
  if (!order.stream) return (await client.messages.create(asked, options)).content[0].text;
  return joined(client.messages.stream(asked, options), (one) => one.delta?.text);
}, "@anthropic-ai/sdk");
