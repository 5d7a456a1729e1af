// stripe: a customer, under the key that the SDK makes or under the caller's.
import Stripe from "stripe";
import { run } from "./calls.mjs";

await run(async (order) => {
  const { hostname, port } = new URL(order.url);
  const options = { host: hostname, port: Number(port), protocol: "http", timeout: 1000 * order.timeout_s };
  const key = order.key ? { idempotencyKey: order.key } : {};
  return (await new Stripe("sk_1", options).customers.create({ description: order.prompt }, key)).description;
}, "stripe");
