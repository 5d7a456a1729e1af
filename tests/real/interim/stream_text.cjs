// Streams a text with the Node SDKs of OpenAI and Anthropic, and with Vercel's: prints what each read.
const { OpenAI } = require("openai");
const { Anthropic } = require("@anthropic-ai/sdk");
const { streamText } = require("ai");
const { createOpenAI } = require("@ai-sdk/openai");

const [url] = process.argv.slice(2);
const read = { openai: "", anthropic: "", ai: "" };

(async () => {
  const chat = new OpenAI({ baseURL: `${url}/v1`, apiKey: "k", maxRetries: 0 });
  const chunks = await chat.chat.completions.create({ model: "m", messages: [], stream: true });
  for await (const chunk of chunks) read.openai += chunk.choices[0].delta.content ?? "";
  const messages = new Anthropic({ baseURL: url, apiKey: "k", maxRetries: 0 }).messages;
  const asked = { model: "m", max_tokens: 9, messages: [{ role: "user", content: "x" }], stream: true };
  for await (const event of await messages.create(asked)) read.anthropic += event.delta?.text ?? "";
  const model = createOpenAI({ baseURL: `${url}/v1`, apiKey: "k" }).chat("m");
  for await (const text of streamText({ model, prompt: "x" }).textStream) read.ai += text;
  console.log(JSON.stringify(read));
})();
