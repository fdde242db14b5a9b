// Sends one message with a default client: everything comes from the environment.
// Usage: NODE_PATH=… node driver.cjs PACKAGE
const name = process.argv[2];
const sdk = require(name);
const messages = [{ role: "user", content: "hello" }];
const options = { maxRetries: 0, timeout: 5000 };

async function main() {
  const client = new (sdk.default ?? sdk)();
  if (name.startsWith("anthropic")) {
    const body = { model: "claude-3-5-sonnet-latest", max_tokens: 64, messages };
    return (await client.messages.create(body, options)).content[0].text;
  }
  const body = { model: "gpt-4o", messages };
  return (await client.chat.completions.create(body, options)).choices[0].message.content;
}

main().then(console.log, (error) => {
  console.error(`${error?.constructor?.name}: ${error?.message}`);
  process.exit(1);
});
