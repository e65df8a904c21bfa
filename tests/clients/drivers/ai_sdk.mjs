// Vercel AI SDK: its OpenAI provider (responses by default) and its provider for compatible services.
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { Output, generateImage, generateText, streamText, tool, uploadFile } from "ai";
import { z } from "zod";
import {
  BASE_URL, CONVERSATION, KEY, MODEL, OVER_LONG, TITLE_REQUEST, TOOL_RESULT, describeBytes, hold, readPicture, observe,
} from "./observe.mjs";

const openai = createOpenAI({ baseURL: BASE_URL, apiKey: KEY });
const compatible = createOpenAICompatible({
  baseURL: BASE_URL, apiKey: KEY, name: "omnivideo", includeUsage: true, supportsStructuredOutputs: true,
});
const chat = { model: compatible(MODEL), maxRetries: 0 };
const colourTool = {
  look_up_colour: tool({
    description: "Return the colour of the thing.", inputSchema: z.object({}), execute: async () => TOOL_RESULT,
  }),
};
let history = [];

await observe("conversation", () =>
  hold(async (messages) => {
    history = messages;
    return (await generateText({ ...chat, messages })).text;
  }));

async function readStream(options, chunks) {
  const result = streamText(options);
  let count = 0;
  for await (const part of result.fullStream) {
    if (part.type === "error") throw part.error;
    count += 1;
  }
  chunks.push(count);
  return result.text;
}

for (const [feature, model] of [["streaming", compatible(MODEL)], ["streamed responses", openai(MODEL)]])
  await observe(feature, async () => {
    const chunks = [];
    const saw = await hold((messages) => readStream({ model, messages, maxRetries: 0 }, chunks));
    return { ...saw, chunks };
  });

// As the SDK's pages do it: the response's own messages are sent back, here with the items of the responses.
await observe("responses", async () => {
  const messages = [], answers = [];
  for (const words of CONVERSATION) {
    messages.push({ role: "user", content: words });
    const result = await generateText({ model: openai(MODEL), messages, maxRetries: 0 });
    messages.push(...result.response.messages);
    answers.push(result.text);
  }
  return { answers };
});

await observe("usage", async () => {
  const streamed = streamText({ ...chat, prompt: "hello" });
  await streamed.consumeStream();
  const whole = await generateText({ ...chat, prompt: "hello" });
  return [whole.usage, await streamed.usage].map((usage) => [usage.inputTokens, usage.outputTokens]);
});

await observe("picture", async () => {
  const content = [{ type: "text", text: "describe this" }, { type: "image", image: readPicture() }];
  return (await generateText({ ...chat, messages: [{ role: "user", content }] })).text;
});

await observe("tools", async () => {
  const result = await generateText({ ...chat, prompt: "what colour is it?", tools: colourTool });
  return { answer: result.text, calls: result.toolCalls.length };
});

await observe("forced tool", async () => {
  await generateText({ ...chat, prompt: "what colour is it?", tools: colourTool, toolChoice: "required" });
});

await observe("structured output", async () => {
  const messages = [...history, { role: "user", content: TITLE_REQUEST }];
  const output = Output.object({ schema: z.object({ title: z.string() }) });
  return (await generateText({ ...chat, messages, output })).output;
});

await observe("title", async () => {
  const messages = [...history, { role: "user", content: TITLE_REQUEST }];
  return (await generateText({ ...chat, messages })).text;
});

await observe("images", async () => {
  const model = compatible.imageModel(MODEL);
  const made = await generateImage({ model, prompt: "a red circle", maxRetries: 0 });
  const prompt = { text: "make it blue", images: [made.image.uint8Array] };
  const edited = await generateImage({ model, prompt, maxRetries: 0 });
  return [describeBytes(made.image.uint8Array), describeBytes(edited.image.uint8Array)];
});

await observe("files", async () => {
  const files = openai.files();
  const { providerReference: file } = await uploadFile({ api: files, data: readPicture(), filename: "square.png" });
  const { content } = await files.downloadFile({ file });
  const same = readPicture().equals(Buffer.from(await new Response(content).arrayBuffer()));
  const { filename } = await files.getFileMetadata({ file });
  return { same, named: filename === "square.png", deleted: (await files.deleteFile({ file })).deleted };
});

await observe("over-long text", async () => (await generateText({ ...chat, prompt: OVER_LONG })).text);
