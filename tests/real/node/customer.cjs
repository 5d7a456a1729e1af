// Creates a customer with a given key. node customer.cjs PORT ACCOUNT KEY: prints what the SDK says of its failure.
const Stripe = require("stripe");

const [port, account, idempotencyKey] = process.argv.slice(2);
const stripe = new Stripe(account, { host: "127.0.0.1", port: Number(port), protocol: "http", maxNetworkRetries: 0 });

stripe.customers
  .create({ email: "node@example.com" }, { idempotencyKey })
  .then(({ id }) => ({ id }))
  .catch(({ statusCode, code, rawType, message }) => ({ statusCode, code, rawType, message }))
  .then((said) => console.log(JSON.stringify(said)));
