// What the browser remembers. Storage may be forbidden, or full; then nothing is.

/** The value that a key has in "localStorage" or "sessionStorage"; null if it has none. */
export function recall(storage, key) {
  try {
    return JSON.parse(window[storage].getItem(key));
  } catch {
    return null;
  }
}

/** Gives a key a value; whether that went well. */
export function remember(storage, key, value) {
  try {
    window[storage].setItem(key, JSON.stringify(value));
    return true;
  } catch {
    return false;
  }
}
