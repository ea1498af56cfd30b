// Begins: the theme, the two views, what the server is.

import { choose, isUsed, start, toast } from "./draw.js";
import { show } from "./runs.js";
import { json } from "./server.js";
import { recall, remember } from "./store.js";

const $ = (id) => document.getElementById(id);
const root = document.documentElement;

const system = matchMedia("(prefers-color-scheme: dark)");
const paint = () => (root.dataset.theme = recall("localStorage", "theme") ?? (system.matches ? "dark" : "light"));
system.onchange = paint;
paint();
$("theme").onclick = () => {
  root.dataset.theme = root.dataset.theme === "dark" ? "light" : "dark";
  remember("localStorage", "theme", root.dataset.theme);
};

const views = ["draw", "runs"];

function select(view) {
  for (const name of views) {
    const tab = $(`tab-${name}`);
    $(name).hidden = name !== view;
    tab.setAttribute("aria-selected", String(name === view));
    tab.tabIndex = name === view ? 0 : -1;
  }
  if (view === "runs") runs();
}

const runs = () => show(() => !$("runs").hidden, async (snapshot) => {
  try {
    if (!(await choose(snapshot))) return;
    select("draw");
    toast(`Drawing with ${snapshot}.`);
  } catch (error) {
    toast(error.message);
  }
});

for (const view of views) {
  $(`tab-${view}`).onclick = () => select(view);
  $(`tab-${view}`).onkeydown = (event) => {
    if (event.key !== "ArrowLeft" && event.key !== "ArrowRight") return;
    const other = views.find((name) => name !== view);
    if ($(`tab-${other}`).hidden) return;
    select(other);
    $(`tab-${other}`).focus();
  };
}

try {
  const server = await json("/api/v1/server");
  $("device").textContent = `${server.version} on ${server.device}`;
  $("tab-runs").hidden = !server.runs;
  await start(server.started);
  if (!isUsed() && server.runs) select("runs");
} catch (error) {
  toast(error.message);
}
