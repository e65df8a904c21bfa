// promptfoo: `promptfoo eval` with a conversation, as its pages describe it, its own assertions, pictures and clips.
import { execFileSync } from "node:child_process";
import { readFileSync, readdirSync, writeFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";
import {
  BASE_URL, CONVERSATION, FOLDER, KEY, MODEL, OVER_LONG, TITLE_REQUEST, describeBytes, encodePicture, observe,
} from "./observe.mjs";

const COMMAND = join(dirname(fileURLToPath(import.meta.url)), "..", "node_modules", "promptfoo", "dist", "src", "main.js");
const MEDIA = join(FOLDER, "media");
const PROMPT = `[
{% for turn in _conversation %}{"role": "user", "content": {{ turn.input | dump }}},
{"role": "assistant", "content": {{ turn.output | dump }}},
{% endfor %}{"role": "user", "content": {{ question | dump }}}
]`;

function evaluate(name, provider, prompt, tests) {
  const config = { prompts: [prompt], providers: [provider], tests, evaluateOptions: { maxConcurrency: 1, cache: false } };
  writeFileSync(join(FOLDER, `${name}.json`), JSON.stringify(config));
  const environment = {
    ...process.env, OPENAI_API_KEY: KEY, PROMPTFOO_DISABLE_TELEMETRY: "1", PROMPTFOO_DISABLE_UPDATE: "1",
    PROMPTFOO_CONFIG_DIR: join(FOLDER, "promptfoo"), PROMPTFOO_PASS_RATE_THRESHOLD: "0", PROMPTFOO_DISABLE_REMOTE_GENERATION: "1",
    PROMPTFOO_INLINE_MEDIA: "true", PROMPTFOO_MEDIA_PATH: MEDIA,
  };
  const output = join(FOLDER, `${name}.out.json`);
  const options = ["eval", "-c", join(FOLDER, `${name}.json`), "-o", output, "--no-cache", "--no-table", "--no-share"];
  execFileSync(process.execPath, [COMMAND, ...options], { env: environment, stdio: "inherit", timeout: 300_000 });
  const { results } = JSON.parse(readFileSync(output)).results;
  const failed = results.find((result) => result.error && !result.response?.output);
  if (failed) throw new Error(failed.error);
  return results;
}

const chat = { id: `openai:chat:${MODEL}`, config: { apiBaseUrl: BASE_URL } };
const ask = (question, more = {}) => ({ vars: { question }, metadata: { conversationId: "one" }, ...more });
const turns = CONVERSATION.map((question, index) =>
  ask(question, { assert: [{ type: "contains", value: ["circle", "blue", "right"][index] }] }));
let usage = [];

await observe("conversation", () => {
  const results = evaluate("conversation", chat, PROMPT, [...turns, ask(TITLE_REQUEST)]);
  results.sort((one, other) => one.testIdx - other.testIdx);
  if (!results.slice(0, 3).every((result) => result.success)) throw new Error("promptfoo's own assertions failed");
  usage = results.map(({ response }) => [response.tokenUsage.prompt, response.tokenUsage.completion]);
  observe("title", () => results[3].response.output);
  return { answers: results.slice(0, 3).map((result) => result.response.output) };
});

await observe("usage", () => usage);

await observe("picture", () => {
  const parts = [{ type: "text", text: "describe this" }, { type: "image_url", image_url: { url: encodePicture() } }];
  return evaluate("picture", chat, JSON.stringify([{ role: "user", content: parts }]), [{ vars: { question: "" } }])[0].response.output;
});

await observe("responses", () => {
  const provider = { id: `openai:responses:${MODEL}`, config: { apiBaseUrl: BASE_URL } };
  const results = evaluate("responses", provider, PROMPT, turns);
  results.sort((one, other) => one.testIdx - other.testIdx);
  return { answers: results.map((result) => result.response.output) };
});

await observe("structured output", () => {
  const schema = { type: "object", properties: { title: { type: "string" } }, required: ["title"], additionalProperties: false };
  const response_format = { type: "json_schema", json_schema: { name: "title", schema, strict: true } };
  const provider = { ...chat, config: { ...chat.config, response_format } };
  const { output } = evaluate("structured", provider, JSON.stringify([{ role: "user", content: TITLE_REQUEST }]), [{ vars: { question: "" } }])[0].response;
  return typeof output === "string" ? JSON.parse(output) : output;
});

await observe("images", () => {
  const provider = { id: `openai:image:${MODEL}`, config: { apiBaseUrl: BASE_URL, response_format: "b64_json" } };
  const tests = ["a red circle", "a blue square"].map((question) => ({ vars: { question } }));
  return evaluate("images", provider, "{{question}}", tests).map(({ response }) =>
    describeBytes(Buffer.from(response.output.split("base64,")[1], "base64")));
});

await observe("videos", () => {
  const config = { apiBaseUrl: BASE_URL, size: "1280x720", seconds: 4, poll_interval_ms: 200 };
  const make = (name, question, more) =>
    evaluate(name, { id: `openai:video:${MODEL}`, config: { ...config, ...more } }, "{{question}}", [{ vars: { question } }])[0];
  const { video } = make("video", CONVERSATION[0], {}).response;
  make("remix", "make it blue", { remix_video_id: video.id });
  const clips = readdirSync(MEDIA, { recursive: true }).filter((name) => name.endsWith(".mp4"));
  if (clips.length !== 2) throw new Error(`${clips.length} clips were stored`);
  return clips.map((name) => describeBytes(readFileSync(join(MEDIA, name))));
});

await observe("over-long text", async () => evaluate("long", chat, OVER_LONG, [{ vars: { question: "" } }])[0].response.output);
