// What the drivers for Node share; the counterpart of observe.py.
//
//     node driver.mjs ADDRESS KEY FOLDER
import { writeFileSync } from "node:fs";
import { join } from "node:path";
import zlib from "node:zlib";

export const [ADDRESS, KEY, FOLDER] = process.argv.slice(2);
export const BASE_URL = `${ADDRESS}/v1`;
export const MODEL = "tiny";
export const CONVERSATION = ["a small red circle moving right", "make it blue", "how does it move?"];
export const TITLE_REQUEST = "Suggest a short title for this conversation.";
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

// Return a picture of a red square on black, without an imaging library.
export function makeSquarePng(size = 64) {
  const rows = Buffer.alloc(size * (1 + 3 * size));
  for (let y = 0; y < size; y++)
    for (let x = 0; x < size; x++)
      if (Math.max(Math.abs(x - size / 2), Math.abs(y - size / 2)) < size / 4)
        rows.set([0xdc, 0x1e, 0x1e], y * (1 + 3 * size) + 1 + 3 * x);
  const header = Buffer.alloc(13);
  header.writeUInt32BE(size, 0);
  header.writeUInt32BE(size, 4);
  header.set([8, 2, 0, 0, 0], 8);
  const chunk = (kind, data) => {
    const body = Buffer.concat([Buffer.from(kind), data]);
    const ends = [Buffer.alloc(4), Buffer.alloc(4)];
    ends[0].writeUInt32BE(data.length);
    ends[1].writeUInt32BE(crc32(body));
    return Buffer.concat([ends[0], body, ends[1]]);
  };
  const signature = Buffer.from("89504e470d0a1a0a", "hex");
  return Buffer.concat([
    signature, chunk("IHDR", header), chunk("IDAT", zlib.deflateSync(rows)), chunk("IEND", Buffer.alloc(0)),
  ]);
}

function crc32(data) {
  let sum = ~0;
  for (const byte of data) {
    sum ^= byte;
    for (let bit = 0; bit < 8; bit++) sum = (sum >>> 1) ^ (sum & 1 ? 0xedb88320 : 0);
  }
  return ~sum >>> 0;
}

export const makeSquareUrl = () => `data:image/png;base64,${makeSquarePng().toString("base64")}`;

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
