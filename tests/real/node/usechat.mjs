// A chat as Vercel's AI SDK has it: it asks under a key, keeps the address of the answer, and resumes there after a reload.
import { createElement, useEffect } from "react";
import { createRoot } from "react-dom/client";
import { useChat } from "@ai-sdk/react";
import { DefaultChatTransport } from "ai";

const address = sessionStorage.getItem("address");
const transport = new DefaultChatTransport({
  api: "/v1/ui",
  fetch: async (url, init) => {
    if (init.method !== "POST") return fetch(url, init);
    const headers = { ...init.headers, "Idempotency-Key": crypto.randomUUID() };
    const answer = await fetch(url, { ...init, headers });
    sessionStorage.setItem("address", answer.headers.get("Link").match(/<([^>]+)>; rel="resume"/)[1]);
    return answer;
  },
  prepareReconnectToStreamRequest: () => ({ api: address }),
});

function Chat() {
  const { messages, sendMessage, status } = useChat({ transport, resume: address !== null });
  useEffect(() => { if (address === null) sendMessage({ text: "hi" }); }, []);
  const text = messages.filter(one => one.role === "assistant")
    .flatMap(one => one.parts.filter(part => part.type === "text").map(part => part.text)).join("");
  return [
    createElement("pre", { id: "text", key: "text" }, text.trim()),
    createElement("p", { id: "state", key: "state" }, `${status} with ${address === null ? "a call" : "the address"}`),
  ];
}

createRoot(document.querySelector("main")).render(createElement(Chat));
