// ai with @ai-sdk/openai: generated text, also streamed.
import { createOpenAI } from "@ai-sdk/openai";
import { generateText, streamText } from "ai";
import { headers, joined, run } from "./calls.mjs";

await run(async (order) => {
  const model = createOpenAI({ baseURL: `${order.url}/v1`, apiKey: "sk-1" }).chat("m");
  const asked = { model, prompt: order.prompt, headers: headers(order), timeout: 1000 * order.timeout_s };
  if (!order.stream) return (await generateText(asked)).text;
  let failure;
  const onError = ({ error }) => (failure = error);
  // After a time-out `textStream` ends as if the text were complete; only `onAbort` tells.
  const onAbort = () => (failure = new DOMException("aborted", "AbortError"));
  const text = await joined(streamText({ ...asked, onError, onAbort }).textStream, (one) => one);
  if (failure) throw failure;
  return text;
}, "ai");
