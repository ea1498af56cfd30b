// Training runs: the list, curves that grow, sample grids, snapshots.

import { json } from "./server.js";

const $ = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";
const EVERY = 3000;

const element = (name, properties = {}, ...children) => {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
};

const images = (n) => (n >= 1e6 ? `${+(n / 1e6).toFixed(2)}M` : n >= 1e3 ? `${+(n / 1e3).toFixed(2)}k` : `${n}`);
const short = (x) => (x === 0 || (Math.abs(x) >= 0.01 && Math.abs(x) < 1e4) ? `${+x.toPrecision(4)}` : x.toExponential(1));
function time(seconds) {
  if (seconds < 90) return `${Math.round(seconds)} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  return seconds < 172800 ? `${(seconds / 3600).toFixed(1)} h` : `${(seconds / 86400).toFixed(1)} days`;
}

/** What is shown: {name, points, next, grid}; `draw` is told which snapshot to draw with. */
let chosen = null;
let timer = null;
let drawWith = () => {};

/** Shows the runs as long as `visible()` says so. */
export async function show(visible, draw) {
  drawWith = draw;
  clearTimeout(timer);
  if (!visible()) return;
  try {
    const runs = await json("/api/v1/runs");
    if (!chosen && runs.length) chosen = fresh(runs[0].name);
    list(runs);
    const run = runs.find(({ name }) => name === chosen?.name);
    if (run) await detail(run);
  } catch (error) {
    $("run").replaceChildren(element("p", { className: "hint", textContent: error.message }));
  }
  timer = setTimeout(() => show(visible, draw), EVERY);
}

const fresh = (name) => ({ name, points: [], next: 0, grid: null });

function list(runs) {
  const focused = document.activeElement?.dataset?.run;
  const card = (run) => {
    const share = run.duration ? Math.min(run.nimg / run.duration, 1) : 0;
    const of = run.duration ? ` of ${images(run.duration)}` : "";
    const left = run.running && run.seconds_left ? `, ${time(run.seconds_left)} left` : "";
    const made = element("button", { type: "button" },
      element("strong", { textContent: run.name, className: run.running ? "live" : "" }),
      element("small", { textContent: `${images(run.nimg)}${of} images${left}` }),
      element("progress", { max: 1, value: share, ariaLabel: "Share of the images" }));
    made.dataset.run = run.name;
    made.setAttribute("role", "option");
    made.setAttribute("aria-selected", String(run.name === chosen.name));
    made.onclick = () => {
      chosen = fresh(run.name);
      list(runs);
      detail(run);
    };
    return made;
  };
  $("run-list").replaceChildren(...runs.map(card));
  if (focused) [...$("run-list").children].find(({ dataset }) => dataset.run === focused)?.focus();
}

async function detail(run) {
  const mine = chosen;
  const part = await json(`/api/v1/runs/${encodeURIComponent(run.name)}/stats?from=${mine.next}`);
  if (mine !== chosen) return;
  mine.points = part.anew ? part.points : [...mine.points, ...part.points];
  mine.next = part.next;
  const unchanged = mine.drawn === mine.points.length && mine.grids === run.grids.length && mine.shots === run.snapshots.length;
  const old = $("run").dataset.run === run.name;
  const head = numbers(run);
  if (unchanged && old) {
    $("run").querySelector(".numbers").replaceWith(head);
    return;
  }
  Object.assign(mine, { drawn: mine.points.length, grids: run.grids.length, shots: run.snapshots.length });
  const of = (key) => mine.points.filter((point) => Number.isFinite(point[key])).map((point) => [point.nimg, point[key]]).sort((a, b) => a[0] - b[0]);
  const charts = element("div", { className: "charts" },
    chart("Loss", [["training", of("loss")], ["validation", of("validation_loss")]]),
    chart("Learning rate", [["", of("lr")]], true),
    chart("Images a second", [["", of("images_per_s")]], true));
  $("run").dataset.run = run.name;
  $("run").replaceChildren(element("h2", { textContent: run.name, className: run.running ? "live" : "" }), head, charts,
    ...grids(run, mine), ...snapshots(run));
}

function numbers(run) {
  const of = run.duration ? ` of ${images(run.duration)}` : "";
  const rows = [
    ["Images seen", images(run.nimg) + of],
    ["Loss", run.loss?.toFixed(4)],
    ["Validation loss", run.validation_loss?.toFixed(4)],
    ["Learning rate", run.lr && short(run.lr)],
    ["Images a second", run.images_per_s && short(run.images_per_s)],
    ["Trained for", run.seconds && time(run.seconds)],
    run.running ? ["Time left", run.seconds_left && time(run.seconds_left)] : ["Quiet for", time(run.quiet_seconds)],
  ];
  const known = rows.filter(([, value]) => value);
  return element("dl", { className: "numbers" }, ...known.map(([name, value]) =>
    element("div", {}, element("dt", { textContent: name }), element("dd", { textContent: value }))));
}

function grids(run, mine) {
  if (!run.grids.length) return [];
  const last = run.grids.length - 1;
  const at = Math.min(mine.grid ?? last, last);
  const image = element("img", {});
  const caption = element("h3", {});
  const slider = element("input", { type: "range", min: 0, max: last, value: at, ariaLabel: "Which sample grid" });
  const put = (index) => {
    const { name, nimg } = run.grids[index];
    image.src = `/api/v1/runs/${encodeURIComponent(run.name)}/grids/${encodeURIComponent(name)}`;
    image.alt = `Sample grid after ${images(nimg)} images`;
    caption.textContent = `Samples after ${images(nimg)} images`;
  };
  slider.oninput = () => {
    const index = Number(slider.value);
    // The newest one follows the run.
    mine.grid = index === last ? null : index;
    put(index);
  };
  put(at);
  return [element("div", { className: "grids" }, caption, ...(last ? [slider] : []), image)];
}

function snapshots(run) {
  if (!run.snapshots.length) return [];
  const item = ({ model, nimg, ema }) => {
    const button = element("button", { type: "button", textContent: `${images(nimg)} images, EMA ${ema}` });
    button.onclick = () => drawWith(model);
    return element("li", {}, button);
  };
  const newest = [...run.snapshots].reverse();
  return [element("div", { className: "snapshots" }, element("h3", { textContent: "Draw with a snapshot" }),
    element("ul", {}, ...newest.map(item)))];
}

const node = (name, attributes, text) => {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  return made;
};

/** Round numbers between two, five or so. */
function ticks(low, high) {
  const rough = (high - low) / 5 || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((step) => step >= rough);
  const all = [];
  for (let at = Math.ceil(low / step) * step; at <= high + step * 1e-9; at += step) all.push(at);
  return all;
}

/** A figure of up to two curves over the images seen. */
function chart(title, series, fromZero = false) {
  // Letters keep their size, so a wide place gets a wide figure.
  const wide = !fromZero && $("run").clientWidth > 700;
  const [width, height, left, bottom, top] = wide ? [960, 320, 54, 24, 8] : [480, 240, 54, 24, 8];
  const points = series.flatMap(([, curve]) => curve);
  const caption = element("figcaption", {}, title);
  const readout = element("span", {});
  series.forEach(([name], index) => {
    if (name) caption.append(element("span", { className: index ? "key second" : "key", textContent: name }));
  });
  caption.append(readout);
  const svg = node("svg", { class: "chart", viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `${title} over the images seen` });
  const figure = element("figure", {}, caption, svg);
  if (!points.length) return figure;
  const end = Math.max(...points.map(([x]) => x), 1);
  // The first tenth falls steeply and would flatten the rest; it may leave the figure at the top.
  const late = fromZero ? points : points.filter(([x]) => x >= end * 0.1);
  const values = late.map(([, y]) => y);
  let [low, high] = [Math.min(...values), Math.max(...values)];
  const margin = (high - low || Math.abs(high) || 1) * 0.08;
  [low, high] = [fromZero ? 0 : low - margin, high + margin];
  const x = (value) => left + (value / end) * (width - left - 8);
  const y = (value) => top + ((high - value) / (high - low)) * (height - top - bottom);
  for (const value of ticks(low, high)) {
    svg.append(node("line", { class: "rule", x1: left, x2: width - 8, y1: y(value), y2: y(value) }));
    svg.append(node("text", { x: left - 6, y: y(value) + 4, "text-anchor": "end" }, short(value)));
  }
  for (const value of ticks(0, end)) {
    const anchor = x(value) > width - 24 ? "end" : "middle";
    svg.append(node("text", { x: Math.min(x(value), width - 2), y: height - 6, "text-anchor": anchor }, images(value)));
  }
  const [inner, tall] = [width - left - 8, height - top - bottom];
  const pane = node("svg", { x: left, y: top, width: inner, height: tall, viewBox: `${left} ${top} ${inner} ${tall}` });
  series.forEach(([, curve], index) => {
    const at = ([px, py]) => `${x(px).toFixed(1)},${y(py).toFixed(1)}`;
    pane.append(node("polyline", { class: index ? "curve second" : "curve", points: curve.map(at).join(" ") }));
  });
  svg.append(pane);
  const cursor = node("line", { class: "cursor", y1: top, y2: height - bottom, visibility: "hidden" });
  svg.append(cursor);
  svg.onpointermove = (event) => {
    const box = svg.getBoundingClientRect();
    const seen = ((((event.clientX - box.left) / box.width) * width - left) / (width - left - 8)) * end;
    const nearest = (curve) => curve.reduce((best, point) => (Math.abs(point[0] - seen) < Math.abs(best[0] - seen) ? point : best), curve[0]);
    const found = series.filter(([, curve]) => curve.length).map(([name, curve]) => [name, nearest(curve)]);
    const at = x(found[0][1][0]);
    for (const side of ["x1", "x2"]) cursor.setAttribute(side, at);
    cursor.setAttribute("visibility", "visible");
    readout.textContent = `at ${images(found[0][1][0])}: ${found.map(([name, [, value]]) => `${name} ${short(value)}`.trim()).join(", ")}`;
  };
  svg.onpointerleave = () => {
    cursor.setAttribute("visibility", "hidden");
    readout.textContent = "";
  };
  return figure;
}
