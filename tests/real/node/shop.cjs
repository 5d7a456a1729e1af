// Takes on a customer and charges them, with the keys and retries that Stripe's SDK has by itself.
// node shop.cjs PORT ACCOUNT RETRIES SECONDS: prints the ids of both, or what the SDK says of its failure.
const Stripe = require("stripe");

const [port, account, retries, seconds] = process.argv.slice(2);
const stripe = new Stripe(account, {
  host: "127.0.0.1", port: Number(port), protocol: "http", timeout: 1000 * seconds, maxNetworkRetries: Number(retries),
});

async function main() {
  const customer = await stripe.customers.create({ email: "node@example.com" });
  const card = { number: "4242424242424242", exp_month: 12, exp_year: 2040, cvc: "123" };
  const method = await stripe.paymentMethods.create({ type: "card", card });
  await stripe.paymentMethods.attach(method.id, { customer: customer.id });
  const charge = await stripe.charges.create({ amount: 500, currency: "eur", customer: customer.id, source: method.id });
  return { customer: customer.id, charge: charge.id };
}

main()
  .catch((error) => ({ status: error.statusCode, message: error.message }))
  .then((made) => console.log(JSON.stringify(made)));
