// OpenAI's SDK for Node against the server: node node_client.mjs http://127.0.0.1:8998/v1
import { createRequire } from "node:module";
import assert from "node:assert/strict";

const OpenAI = createRequire(process.cwd() + "/")("openai");
const client = new OpenAI({ baseURL: process.argv[2], apiKey: "none", maxRetries: 0 });
const messages = [{ role: "user", content: "How are you?" }];
const settings = { model: "chat", messages, max_tokens: 20, seed: 5, temperature: 1 };
const tools = [
  {
    type: "function",
    function: { name: "first", parameters: { type: "object", properties: { x: { enum: [1, 2] } }, required: ["x"] } },
  },
];

const names = [];
for await (const model of client.models.list()) names.push(model.id);
assert.deepEqual(names, ["chat", "text"]);

const whole = await client.chat.completions.create({ ...settings, n: 2, logprobs: true, top_logprobs: 1 });
assert.equal(whole.choices.length, 2);
assert.equal(whole.usage.total_tokens, whole.usage.prompt_tokens + whole.usage.completion_tokens);
assert.equal(whole.choices[0].logprobs.content[0].top_logprobs.length, 1);

let text = "", usage = null;
const stream = await client.chat.completions.create({ ...settings, stream: true, stream_options: { include_usage: true } });
for await (const chunk of stream) {
  text += chunk.choices[0]?.delta?.content ?? "";
  usage = chunk.usage ?? usage;
}
assert.equal(text, whole.choices[0].message.content);
assert.equal(usage.completion_tokens <= 20, true);

const helper = client.chat.completions.stream({ ...settings, tools, tool_choice: "required", parallel_tool_calls: false, max_tokens: 60 });
const final = await helper.finalChatCompletion();
const call = final.choices[0].message.tool_calls[0];
assert.equal(final.choices[0].finish_reason, "tool_calls");
assert.equal(call.function.name, "first");
const result = { role: "tool", tool_call_id: call.id, content: "3" };
const after = await client.chat.completions.create({ ...settings, tools, messages: [...messages, final.choices[0].message, result] });
assert.ok(after.choices[0].finish_reason);

const form = { type: "json_schema", json_schema: { name: "a", schema: { enum: ["yes", "no"] } } };
const answer = await client.chat.completions.create({ ...settings, response_format: form });
assert.ok(["yes", "no"].includes(JSON.parse(answer.choices[0].message.content)));

const thinking = await client.chat.completions.create({ ...settings, chat_template_kwargs: { open_thinking: true } });
assert.ok(thinking.choices[0].message.reasoning_content.length > 0);

await assert.rejects(client.chat.completions.create({ ...settings, model: "gpt-4" }), OpenAI.NotFoundError);
await assert.rejects(client.chat.completions.create({ ...settings, temperature: -1 }), OpenAI.BadRequestError);

const endless = await client.chat.completions.create({ ...settings, max_tokens: 1900, ignore_eos: true, stream: true });
let seen = 0;
for await (const chunk of endless) if (++seen > 5) break; // closes the connection
console.log("ok");
