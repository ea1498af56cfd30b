// Speaks with the server; asks for the token when that is needed.

const login = document.getElementById("login");

/** The text of an error's answer. */
async function why(response) {
  const text = await response.text();
  try {
    return JSON.parse(text).detail;
  } catch {
    return text || `${response.status} ${response.statusText}`;
  }
}

/** An answer; throws an Error with what the server says is wrong. */
export async function ask(path, options = {}) {
  let response;
  try {
    response = await fetch(path, options);
  } catch {
    throw new Error("The server cannot be reached.");
  }
  if (response.status === 401) {
    await token();
    return ask(path, options);
  }
  if (!response.ok) throw new Error(await why(response));
  return response;
}

/** JSON, where a whole number that has no exact one here, such as a large seed, is the text of its digits. Browsers that do
 *  not tell the text have null for it. */
export const parse = (text) => JSON.parse(text, (_, value, context) => {
  if (!Number.isInteger(value) || Number.isSafeInteger(value)) return value;
  const digits = context?.source ?? null;
  return digits === null || /^\d+$/.test(digits) ? digits : value;
});

/** An answer's JSON. */
export const json = async (path) => parse(await (await ask(path)).text());

/** The answer to something that is posted as JSON. */
export async function post(path, body) {
  const headers = { "content-type": "application/json" };
  return parse(await (await ask(path, { method: "POST", headers, body: JSON.stringify(body) })).text());
}

let asking = null;

/** Asks for the token until it is right. */
function token() {
  asking ??= new Promise((resolve) => {
    const form = login.querySelector("form");
    form.onsubmit = async (event) => {
      event.preventDefault();
      const body = JSON.stringify({ token: document.getElementById("token").value });
      const headers = { "content-type": "application/json" };
      const response = await fetch("/api/v1/session", { method: "POST", headers, body }).catch(() => null);
      document.getElementById("login-problem").textContent = response?.ok ? "" : "That is not the token.";
      if (!response?.ok) return;
      login.close();
      asking = null;
      resolve();
    };
    login.oncancel = (event) => event.preventDefault();
    login.showModal();
  });
  return asking;
}

/** Calls `see` with a job whenever it changes, until its end; resolves then. */
export function watch(id, see) {
  return new Promise((resolve, reject) => {
    const events = new EventSource(`/api/v1/jobs/${id}/events`);
    let failures = 0;
    events.addEventListener("job", (event) => {
      failures = 0;
      const job = parse(event.data);
      see(job);
      if (["done", "failed", "cancelled"].includes(job.stage)) {
        events.close();
        resolve(job);
      }
    });
    // It connects again by itself; a server that is gone stays gone.
    events.onerror = () => {
      failures += 1;
      if (failures < 3 && events.readyState !== EventSource.CLOSED) return;
      events.close();
      reject(new Error("The server has gone, or forgot the job."));
    };
  });
}
