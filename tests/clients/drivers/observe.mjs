// What the drivers for Node share; the counterpart of observe.py.
//
//     node driver.mjs ADDRESS KEY FOLDER
import { readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";

export const [ADDRESS, KEY, FOLDER] = process.argv.slice(2);
export const BASE_URL = `${ADDRESS}/v1`;
export const MODEL = "tiny";
export const CONVERSATION = ["a small red circle moving right", "make it blue", "how does it move?"];
export const TITLE_REQUEST = "Suggest a short title for this conversation.";
export const OVER_LONG = "a red circle ".repeat(400);
export const TOOL_NAME = "look_up_colour";
export const TOOL_RESULT = "the colour is green";

const seen = {};

// Write down what a function returns or raises, for each feature.
export async function observe(feature, look) {
  try {
    seen[feature] = { saw: (await look()) ?? null };
  } catch (error) {
    console.error(feature, error);
    seen[feature] = { error: `${error?.name}: ${error?.message}`.slice(0, 1000) };
  }
  writeFileSync(join(FOLDER, "observations.json"), JSON.stringify(seen, null, 1));
}

// Return the picture that is described: a red square on white, 640x480.
export const readPicture = () => readFileSync(new URL("picture.png", import.meta.url));

export const encodePicture = () => `data:image/png;base64,${readPicture().toString("base64")}`;

// Return what the test checks of a file: its first bytes and its length.
export function describeBytes(data) {
  const bytes = Buffer.from(data);
  return { begins: bytes.subarray(0, 12).toString("hex"), length: bytes.length };
}

// Hold the conversation with a function from all messages to the next answer.
export async function hold(answer) {
  const messages = [];
  for (const words of CONVERSATION) {
    messages.push({ role: "user", content: words });
    messages.push({ role: "assistant", content: await answer([...messages]) });
  }
  return { answers: messages.filter((message) => message.role === "assistant").map((message) => message.content) };
}
