// Reads what edm2k writes into a PNG: the iTXt chunk "edm2k", JSON of all parameters.

import { parse } from "./server.js";

const SIGNATURE = [137, 80, 78, 71, 13, 10, 26, 10];

/** The parameters in a PNG file's bytes; null if it has none. */
export function parameters(buffer) {
  const bytes = new Uint8Array(buffer);
  const view = new DataView(buffer);
  if (!SIGNATURE.every((byte, at) => bytes[at] === byte)) return null;
  const text = (part) => new TextDecoder().decode(part);
  for (let at = 8; at + 12 <= bytes.length; ) {
    const length = view.getUint32(at);
    const kind = text(bytes.subarray(at + 4, at + 8));
    const data = bytes.subarray(at + 8, at + 8 + length);
    if (kind === "IDAT" || kind === "IEND") return null;
    if (kind === "iTXt") {
      // keyword 0, compressed?, method, language 0, translated keyword 0, text
      const end = data.indexOf(0);
      if (text(data.subarray(0, end)) === "edm2k" && data[end + 1] === 0) {
        const language = data.indexOf(0, end + 3);
        const begin = data.indexOf(0, language + 1) + 1;
        try {
          return parse(text(data.subarray(begin)));
        } catch {
          return null;
        }
      }
    }
    at += 12 + length;
  }
  return null;
}
