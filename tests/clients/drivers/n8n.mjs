// n8n with the workflow of docs/clients.md: a chat trigger, an AI agent with memory, and the OpenAI chat model.
import { execFileSync, spawn } from "node:child_process";
import { openSync, readFileSync, writeFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";
import { BASE_URL, CONVERSATION, FOLDER, KEY, OVER_LONG, TITLE_REQUEST, observe } from "./observe.mjs";

const COMMAND = join(dirname(fileURLToPath(import.meta.url)), "..", "node_modules", "n8n", "bin", "n8n");
const PORT = JSON.parse(readFileSync(join(FOLDER, "settings.json"))).PORT;
const ENVIRONMENT = {
  ...process.env, N8N_USER_FOLDER: FOLDER, N8N_PORT: PORT, N8N_LISTEN_ADDRESS: "127.0.0.1",
  N8N_DIAGNOSTICS_ENABLED: "false", N8N_VERSION_NOTIFICATIONS_ENABLED: "false", N8N_TEMPLATES_ENABLED: "false",
  N8N_PERSONALIZATION_ENABLED: "false", N8N_ENFORCE_SETTINGS_FILE_PERMISSIONS: "false",
  N8N_HIRING_BANNER_ENABLED: "false", N8N_PUBLIC_API_DISABLED: "true",
};
const sleep = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds));

// Return the workflow of the documentation, under another name, with chat completions or responses, whole or streamed.
function buildWorkflow(id, responsesApiEnabled, streaming) {
  const workflow = JSON.parse(JSON.parse(readFileSync(join(FOLDER, "settings.json"))).WORKFLOW);
  const [chat, agent, model] = workflow.nodes;
  chat.webhookId = id;
  if (streaming) chat.parameters.options.responseMode = "streaming";
  agent.parameters.options.enableStreaming = streaming;
  model.parameters.responsesApiEnabled = responsesApiEnabled;
  return { ...workflow, id, name: id };
}

function call(...options) {
  execFileSync(process.execPath, [COMMAND, ...options], { env: ENVIRONMENT, stdio: "inherit", timeout: 300_000 });
}

function install(workflows) {
  const credential = { id: "omnivideo", name: "omnivideo", type: "openAiApi", data: { apiKey: KEY, url: BASE_URL } };
  writeFileSync(join(FOLDER, "credentials.json"), JSON.stringify([credential]));
  writeFileSync(join(FOLDER, "workflows.json"), JSON.stringify(workflows));
  call("import:credentials", `--input=${join(FOLDER, "credentials.json")}`);
  call("import:workflow", `--input=${join(FOLDER, "workflows.json")}`);
  for (const { id } of workflows) call("publish:workflow", `--id=${id}`);
}

async function send(id, sessionId, chatInput) {
  const answer = await fetch(`http://127.0.0.1:${PORT}/webhook/${id}/chat`, {
    method: "POST", headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ action: "sendMessage", sessionId, chatInput }),
  });
  const text = await answer.text();
  if (!answer.ok) throw new Error(`${answer.status} ${text}`);
  return text;
}

// Wait until the page of a workflow's chat is there; n8n calls itself ready before it has activated its workflows.
async function waitForChat(id) {
  for (let tries = 0; tries < 300; tries++) {
    try {
      if ((await fetch(`http://127.0.0.1:${PORT}/webhook/${id}/chat`)).ok) return;
    } catch {}
    await sleep(1000);
  }
  throw new Error(`n8n did not start the chat ${id}`);
}

async function holdWhole(id) {
  const answers = [];
  for (const words of CONVERSATION) answers.push(JSON.parse(await send(id, `session-${id}`, words)).output);
  return { answers };
}

async function holdStreamed(id) {
  const answers = [], chunks = [];
  for (const words of CONVERSATION) {
    const lines = (await send(id, `session-${id}`, words)).trim().split("\n").map((line) => JSON.parse(line));
    const items = lines.filter((line) => line.type === "item");
    const error = lines.find((line) => line.type === "error");
    if (error) throw new Error(JSON.stringify(error));
    answers.push(items.map((line) => line.content).join(""));
    chunks.push(items.length);
  }
  return { answers, chunks };
}

const workflows = [
  buildWorkflow("chat", false, false), buildWorkflow("responses", true, false),
  buildWorkflow("streamedchat", false, true), buildWorkflow("streamedresponses", true, true),
];
install(workflows);
const log = openSync(join(FOLDER, "n8n.log"), "w");
const server = spawn(process.execPath, [COMMAND, "start"], { env: ENVIRONMENT, stdio: ["ignore", log, log] });
try {
  for (const { id } of workflows) await waitForChat(id);
  await observe("conversation", () => holdWhole("chat"));
  await observe("responses", () => holdWhole("responses"));
  await observe("streaming", () => holdStreamed("streamedchat"));
  await observe("streamed responses", () => holdStreamed("streamedresponses"));
  await observe("title", async () => JSON.parse(await send("chat", "session-chat", TITLE_REQUEST)).output);
  await observe("over-long text", async () => JSON.parse(await send("chat", "long", OVER_LONG)).output);
} finally {
  server.kill("SIGTERM");
  await new Promise((resolve) => server.once("exit", resolve));
}
