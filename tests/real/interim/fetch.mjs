// Two requests of Node's fetch (undici): prints what each got.
const found = [];
for (const url of process.argv.slice(2)) {
  try {
    const response = await fetch(url, {
      method: "POST", body: "1", headers: { "Idempotency-Key": url }, signal: AbortSignal.timeout(3000),
    });
    found.push([response.status, (await response.text()).trim()]);
  } catch (error) {
    found.push(error.name);
  }
}
console.log(JSON.stringify(found));
