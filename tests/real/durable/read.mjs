// Reads a Durable Stream to its end and writes its bytes: node read.mjs URL LIVE
import { stream } from "@durable-streams/client";

const [url, live] = process.argv.slice(2);
const reading = await stream({ url, offset: "-1", live: live === "false" ? false : live, warnOnHttp: false });
for await (const part of reading.bodyStream()) process.stdout.write(part);
