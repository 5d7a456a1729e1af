#!/usr/bin/env bash
# The client of Durable Streams (@durable-streams/client 0.2.7) drops the bytes of a stream whose type is text/event-stream.
#
# Seen: a server of the protocol has one stream twice, byte for byte the same: once as `text/plain`, once as
# `text/event-stream`. The client reads the first whole. Of the second it returns nothing, and no error.
#
# Why: the client takes every response of the type `text/event-stream` for the protocol's own frames, also the answer to a
# read without `live=sse`. It skips all events that are not called `data` or `control`.
#
# Why it matters: the stream of an LLM's API is `text/event-stream`. The protocol allows any type (section 7). A server
# that keeps the type loses what was said before a reader came, and the reader sees a gap that nothing tells. A server has
# to give such a stream another type, as oncegate does.
#
# The output that was seen:
#
#     text/plain: "data: hello\n\n"
#     text/event-stream: ""
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
npm install --prefix "$work" --no-audit --no-fund --loglevel error @durable-streams/client@0.2.7 >/dev/null

cat >"$work/finding.mjs" <<'JAVASCRIPT'
import { createServer } from "node:http";
import { stream } from "@durable-streams/client";

const TEXT = "data: hello\n\n";
const fields = { "Stream-Next-Offset": "12", "Stream-Up-To-Date": "true", "Stream-Closed": "true" };
const server = createServer((request, response) => {
  const type = request.url.startsWith("/plain") ? "text/plain" : "text/event-stream";
  response.writeHead(200, { "Content-Type": type, ...fields }).end(TEXT);
});
await new Promise((resolve) => server.listen(0, "127.0.0.1", resolve));

const seen = {};
for (const [type, path] of [["text/plain", "plain"], ["text/event-stream", "events"]]) {
  const url = `http://127.0.0.1:${server.address().port}/${path}`;
  const reading = await stream({ url, offset: "-1", live: false, warnOnHttp: false });
  seen[type] = await reading.text();
  console.log(`${type}: ${JSON.stringify(seen[type])}`);
}
server.closeAllConnections();
server.close();
process.exitCode = seen["text/plain"] === TEXT && seen["text/event-stream"] === "" ? 0 : 1;
JAVASCRIPT
cd "$work"
node finding.mjs
