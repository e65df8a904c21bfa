// openai-node: the routes that the service has in common with OpenAI's.
import http from "node:http";
import OpenAI, { toFile } from "openai";
import {
  BASE_URL, CONVERSATION, KEY, MODEL, OVER_LONG, TITLE_REQUEST, TOOL_NAME, TOOL_RESULT, describeBytes, hold, readPicture,
  encodePicture, observe,
} from "./observe.mjs";

const client = new OpenAI({ baseURL: BASE_URL, apiKey: KEY, maxRetries: 0, timeout: 120_000 });
const sleep = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds));
const tools = [{ type: "function", function: { name: TOOL_NAME, parameters: { type: "object", properties: {} } } }];
const schema = { type: "object", properties: { title: { type: "string" } }, required: ["title"], additionalProperties: false };
let history = [];

const chat = async (messages, more = {}) => client.chat.completions.create({ model: MODEL, messages, ...more });
const say = (content) => ({ role: "user", content });

await observe("models", async () => (await client.models.list()).data.map((model) => model.id));

await observe("conversation", () =>
  hold(async (messages) => {
    history = messages;
    return (await chat(messages)).choices[0].message.content;
  }));

await observe("streaming", async () => {
  const chunks = [];
  const saw = await hold(async (messages) => {
    let text = "", count = 0;
    for await (const chunk of await chat(messages, { stream: true })) {
      text += chunk.choices[0]?.delta?.content ?? "";
      count += 1;
    }
    chunks.push(count);
    return text;
  });
  return { ...saw, chunks };
});

await observe("usage", async () => {
  const usages = [(await chat([say("hello")])).usage];
  for await (const chunk of await chat([say("hello")], { stream: true, stream_options: { include_usage: true } }))
    usages[1] = chunk.usage ?? usages[1];
  return usages.map((usage) => [usage.prompt_tokens, usage.completion_tokens]);
});

await observe("picture", async () => {
  const parts = [{ type: "text", text: "describe this" }, { type: "image_url", image_url: { url: encodePicture() } }];
  return (await chat([say(parts)])).choices[0].message.content;
});

await observe("responses", async () => {
  const answers = [];
  let previous;
  for (const words of CONVERSATION) {
    const response = await client.responses.create({ model: MODEL, input: words, previous_response_id: previous });
    previous = response.id;
    answers.push(response.output_text);
  }
  return { answers };
});

await observe("streamed responses", async () => {
  const answers = [], chunks = [];
  let previous;
  for (const words of CONVERSATION) {
    let text = "", count = 0;
    const stream = await client.responses.create({
      model: MODEL, input: words, previous_response_id: previous, stream: true,
    });
    for await (const event of stream) {
      if (event.type === "response.output_text.delta") text += event.delta;
      if (event.type === "response.completed") previous = event.response.id;
      count += 1;
    }
    answers.push(text);
    chunks.push(count);
  }
  return { answers, chunks };
});

await observe("tools", async () => {
  const messages = [say("what colour is it?")];
  const offered = (await chat(messages, { tools })).choices[0].message;
  const call = { id: "call_1", type: "function", function: { name: TOOL_NAME, arguments: "{}" } };
  messages.push({ role: "assistant", content: null, tool_calls: [call] });
  messages.push({ role: "tool", tool_call_id: "call_1", content: TOOL_RESULT });
  const told = (await chat(messages, { tools })).choices[0].message;
  return { answer: offered.content, calls: offered.tool_calls?.length ?? 0, told: told.content };
});

await observe("forced tool", async () => {
  await chat([say("what colour is it?")], { tools, tool_choice: "required" });
});

await observe("structured output", async () => {
  const response_format = { type: "json_schema", json_schema: { name: "title", schema, strict: true } };
  const answer = await chat([...history, say(TITLE_REQUEST)], { response_format });
  return JSON.parse(answer.choices[0].message.content);
});

await observe("title", async () => (await chat([...history, say(TITLE_REQUEST)])).choices[0].message.content);

await observe("images", async () => {
  const options = { model: MODEL, response_format: "b64_json" };
  const made = await client.images.generate({ prompt: "a red circle", ...options });
  const data = Buffer.from(made.data[0].b64_json, "base64");
  const image = await toFile(data, "made.png", { type: "image/png" });
  const edited = await client.images.edit({ image, prompt: "make it blue", ...options });
  return [describeBytes(data), describeBytes(Buffer.from(edited.data[0].b64_json, "base64"))];
});

async function waitForVideo(video) {
  while (["queued", "in_progress"].includes(video.status)) {
    await sleep(200);
    video = await client.videos.retrieve(video.id);
  }
  if (video.status !== "completed") throw new Error(JSON.stringify(video));
  return video;
}

await observe("videos", async () => {
  const video = await waitForVideo(await client.videos.create({ model: MODEL, prompt: CONVERSATION[0], size: "64x64" }));
  const remix = await waitForVideo(await client.videos.remix(video.id, { prompt: "make it blue" }));
  const download = async ({ id }) => describeBytes(await (await client.videos.downloadContent(id)).arrayBuffer());
  return [await download(video), await download(remix)];
});

await observe("files", async () => {
  const data = readPicture();
  const file = await client.files.create({ file: await toFile(data, "square.png"), purpose: "vision" });
  const content = Buffer.from(await (await client.files.content(file.id)).arrayBuffer());
  const listed = (await client.files.list()).data.some((item) => item.id === file.id);
  return { same: content.equals(data), listed, deleted: (await client.files.delete(file.id)).deleted };
});

await observe("batches", async () => {
  const body = { model: MODEL, messages: [say("hello")] };
  const line = JSON.stringify({ custom_id: "one", method: "POST", url: "/v1/chat/completions", body });
  const file = await client.files.create({ file: await toFile(Buffer.from(line), "lines.jsonl"), purpose: "batch" });
  let batch = await client.batches.create({
    input_file_id: file.id, endpoint: "/v1/chat/completions", completion_window: "24h",
  });
  while (!["completed", "failed", "expired", "cancelled"].includes(batch.status)) {
    await sleep(100);
    batch = await client.batches.retrieve(batch.id);
  }
  const lines = (await (await client.files.content(batch.output_file_id)).text()).trim().split("\n");
  return { status: batch.status, lines: lines.map((item) => JSON.parse(item).response.status_code) };
});

await observe("webhooks", async () => {
  const received = [];
  const server = http.createServer((request, response) => {
    const parts = [];
    request.on("data", (part) => parts.push(part));
    request.on("end", () => {
      received.push([Buffer.concat(parts).toString(), request.headers]);
      response.end();
    });
  });
  await new Promise((resolve) => server.listen(0, "127.0.0.1", resolve));
  const url = `http://127.0.0.1:${server.address().port}/hook`;
  const hook = await client.post("/webhooks", { body: { url, event_types: ["video.completed"] } });
  const video = await waitForVideo(await client.videos.create({ model: MODEL, prompt: "a red ball", size: "64x64" }));
  for (let tries = 0; tries < 300 && !received.length; tries++) await sleep(100);
  const event = await client.webhooks.unwrap(...received[0], hook.secret);
  await client.delete(`/webhooks/${hook.id}`);
  server.close();
  return { type: event.type, same: event.data.id === video.id };
});

await observe("over-long text", async () => (await chat([say(OVER_LONG)])).choices[0].message.content);
