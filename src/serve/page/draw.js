// The form, what is being drawn, and the gallery.

import { ask, json, post, watch } from "./server.js";
import { parameters } from "./png.js";
import { recall, remember } from "./store.js";
import { TagField } from "./tags.js";

const $ = (id) => document.getElementById(id);
const number = (id) => ($(id).value === "" ? undefined : Number($(id).value));

let models = [];
let model = null;
let vocabulary = { model: "", tags: [], known: new Set(), classes: false };
let sets = [];
/** What guidance leads away from. */
let negative = null;
/** Pictures to be like: data: URLs. */
let likes = [];
/** Guidance, where nothing else is said. */
let usual = 1;
/** Of the churn, what has no field: a picture may bring it. */
let churn = {};
/** The number of the job that is being drawn. */
let running = null;
/** Whether a job has been asked for and has no number yet. */
let asking = false;
/** What the gallery's dialog shows. */
let shown = null;
/** What to remember of this tab: its last jobs, of the server that was started then. */
let kept = { started: 0, jobs: [] };
const MOST_JOBS = 32;
/** The fields of the form that are remembered by their values. */
const FIELDS = ["solver", "steps", "guidance", "rho", "sigma-min", "sigma-max", "low", "high", "churn", "width", "height", "seeds",
  "per-condition", "invent", "condition-seed"];
/** A noise level as large as any. */
const ABOVE_ALL = 1e6;
/** Whether the form is what it was, or what it begins with. */
let ready = false;
/** How many jobs this tab has asked for, also before it was loaded again. */
let turn = 0;
/** How often a model was chosen. */
let choices = 0;

export function toast(text) {
  $("toast").textContent = text;
  clearTimeout(toast.timer);
  toast.timer = setTimeout(() => ($("toast").textContent = ""), 5000);
}

/** Sets the form up, as it was before the page was loaded again. `started`: when the server was. */
export async function start(started) {
  models = await json("/api/v1/models");
  $("model").onchange = () => choose($("model").value).catch(({ message }) => {
    toast(message);
    $("model").value = model?.name ?? "";
  });
  negative = new TagField(() => vocabulary, true);
  negative.input.setAttribute("aria-describedby", "negative-hint");
  $("negative").append(negative.node);
  $("add-set").onclick = () => addSet().input.focus();
  $("dice").onclick = otherSeeds;
  $("invent-grid").onclick = () => {
    setWords([]);
    $("invent").value = $("per-condition").value = 4;
    const first = Math.floor(Math.random() * 1e6);
    $("seeds").value = `${first}-${first + 15}`;
    $("condition-seed").value = Math.floor(Math.random() * 1e6);
    $("form").requestSubmit();
  };
  $("form").onsubmit = (event) => {
    event.preventDefault();
    draw();
  };
  $("cancel").onclick = cancel;
  $("again").onclick = () => {
    $("picture").close();
    restore(shown.parameters, shown.model).catch(({ message }) => toast(message));
  };
  $("restore").onchange = (event) => take(event.target);
  $("like").onchange = async (event) => {
    for (const file of event.target.files) await addLike(file);
    event.target.value = "";
  };
  // The browser shows what is wrong with a field, but not in what is closed.
  $("more").addEventListener("invalid", () => ($("more").open = true), true);
  document.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !$("draw").hidden) {
      // In a field the browser would submit once more.
      event.preventDefault();
      $("form").requestSubmit();
    }
    if (event.key === "Escape" && running && !document.querySelector("dialog[open]")) cancel();
  });
  dropping();
  const before = recall("sessionStorage", "jobs");
  kept = { started, jobs: before?.started === started ? before.jobs : [] };
  turn = kept.jobs.at(-1)?.turn ?? 0;
  again();
  await defaults();
  await choose(models[0]?.name);
  const form = recall("sessionStorage", "form");
  if (form) await refill(form).catch(({ message }) => toast(`The form is not as it was: ${message}`));
  // Its pictures take room that the jobs need.
  remember("sessionStorage", "form", null);
  addEventListener("pagehide", () => {
    if (!model) return;
    const fields = Object.fromEntries(FIELDS.map((id) => [id, $(id).value]));
    const [words, complete] = [sets.map((field) => field.state), $("complete").checked];
    const form = { model: model.name, fields, churn, words, avoided: negative.state, complete, likes };
    // Pictures may be more than a browser keeps.
    remember("sessionStorage", "form", form) || remember("sessionStorage", "form", { ...form, likes: [] });
  });
  ready = true;
  $("go").disabled = !model;
}

/** The jobs that this tab had before it was loaded again, as far as the server knows them: what goes on, and what they made. */
async function again() {
  const look = async (drawn) => ({ drawn, job: await json(`/api/v1/jobs/${drawn.id}`).catch(() => null) });
  const known = (await Promise.all(kept.jobs.map(look))).filter(({ job }) => job);
  const open = ({ job }) => ["queued", "running"].includes(job.stage);
  // First what goes on, as the server soon cancels what nobody watches.
  for (const { drawn, job } of known.filter(open)) {
    running ??= job.id;
    follow(job, drawn);
  }
  for (const { drawn, job } of known.filter((one) => !open(one))) {
    for (const picture of job.pictures) await keep(picture, drawn).catch(() => {});
  }
}

/** Fills the form as it was. */
async function refill(form) {
  if (!(await choose(form.model))) return;
  for (const id of FIELDS) $(id).value = form.fields[id];
  churn = form.churn;
  setWords([]);
  form.words.forEach((state, number) => ((number === 0 ? sets[0] : addSet()).state = state));
  negative.state = form.avoided;
  $("complete").checked = form.complete;
  form.likes.forEach((url, number) => showLike(url, `picture ${number + 1}`));
}

/** What `edm2k sample` does when it is told nothing, as the API's description has it. */
async function defaults() {
  const { properties } = (await json("/api/v1/openapi.json")).components.schemas.Sampler;
  apply(Object.fromEntries(Object.entries(properties).map(([key, property]) => [key, property.default])));
  usual = properties.guidance.default;
  $("guidance").value = "";
}

function apply(sampler) {
  for (const [id, key] of [["solver"], ["steps"], ["guidance"], ["rho"], ["sigma-min", "sigma_min"], ["sigma-max", "sigma_max"]]) {
    $(id).value = sampler[key ?? id] ?? "";
  }
  const [low, high] = sampler.guidance_interval ?? ["", ""];
  [$("low").value, $("high").value] = [low, high === ABOVE_ALL ? "" : high];
  churn = sampler.churn ?? {};
  $("churn").value = churn.s_churn ?? 0;
}

/** Draws with this model from now on, a snapshot of a run perhaps; false if another was chosen before that was ready. */
export async function choose(name) {
  $("model-row").hidden = models.length === 0 && !name;
  if (!name) return false;
  const choice = ++choices;
  const named = () => models.find((known) => known.name === name);
  if (!named()) {
    const found = await json(`/api/v1/models?model=${encodeURIComponent(name)}`);
    if (!named()) models.push(...found);
  }
  const chosen = named();
  const [takes, classes] = [chosen.tags !== "no" || chosen.classes > 0, chosen.classes > 0];
  const { tags } = takes ? await json(`/api/v1/vocabulary?model=${encodeURIComponent(name)}`) : { tags: [] };
  if (choice !== choices) return false;
  const changes = classes !== vocabulary.classes;
  model = chosen;
  vocabulary = { model: name, tags, known: new Set(tags.map(({ tag }) => tag)), classes };
  $("model").replaceChildren(...models.map(({ name }) => new Option(name)));
  $("model").value = name;
  $("conditions").hidden = !takes;
  $("conditions-legend").textContent = classes ? "Classes" : "Tags";
  $("tags-hint").textContent = classes
    ? `Type to find one of the ${model.classes} classes, Enter adds it. Each is drawn by itself. Without any, each seed draws a random one.`
    : "Type to find a tag, Enter or a comma adds it. Without any, the model draws what it likes.";
  $("negative-hint").textContent = classes
    ? "A class to avoid: guidance leads away from it."
    : "Tags to avoid: guidance leads away from these.";
  negative.input.setAttribute("aria-label", classes ? "Add a class to avoid" : "Add a tag to avoid");
  $("add-set").hidden = classes;
  // The server decides, as tags to avoid count too.
  $("guidance").placeholder = model.guided ? usual : 1;
  $("unguided").hidden = model.guided;
  $("like-row").hidden = !model.like;
  $("invent-row").hidden = !model.invents;
  // What nobody sees must not keep anybody from drawing.
  $("invent").disabled = $("condition-seed").disabled = !model.invents;
  $("complete-row").hidden = !model.invents || model.tags !== "plain";
  for (const side of ["width", "height"]) {
    $(side).value = model[side];
    $(side).step = $(side).min = model.multiple;
  }
  if (sets.length === 0 || changes) {
    setWords([]);
    negative.set([]);
  }
  $("go").disabled = !ready;
  return true;
}

/** Whether there is something to draw with, or something being drawn. */
export const isUsed = () => model !== null || running !== null;

function addSet(tags = []) {
  const field = new TagField(() => vocabulary);
  const remove = Object.assign(document.createElement("button"), { type: "button", className: "quiet", textContent: "✕" });
  sets.push(field);
  field.input.setAttribute("aria-label", vocabulary.classes ? "Add a class" : `Add a tag to set ${sets.length}`);
  remove.setAttribute("aria-label", `Remove set ${sets.length}`);
  remove.onclick = () => {
    sets = sets.filter((other) => other !== field);
    field.node.remove();
    if (sets.length === 0) addSet();
  };
  if (!vocabulary.classes) field.node.append(remove);
  $("sets").append(field.node);
  field.set(tags);
  return field;
}

/** Replaces what is asked for: classes, or texts of tags, each a set. */
function setWords(texts) {
  sets.forEach((field) => field.node.remove());
  sets = [];
  if (vocabulary.classes) addSet(texts);
  else for (const text of texts.length ? texts : [""]) addSet(parts(text));
}

const parts = (text) => text.split(",").map((tag) => tag.trim()).filter(Boolean);

function otherSeeds() {
  const count = seedCount($("seeds").value) || 4;
  const first = Math.floor(Math.random() * 1e9);
  $("seeds").value = count > 1 ? `${first}-${first + count - 1}` : `${first}`;
}

function seedCount(text) {
  const count = (part) => {
    const [first, last = first] = part.split("-").map(Number);
    return last - first + 1;
  };
  return text.split(",").filter((part) => part.trim()).reduce((sum, part) => sum + count(part), 0);
}

/** A file as a data: URL. */
const dataUrl = (file) => new Promise((resolve, reject) => {
  const reader = new FileReader();
  reader.onload = () => resolve(reader.result);
  reader.onerror = () => reject(reader.error);
  reader.readAsDataURL(file);
});

const addLike = async (file) => showLike(await dataUrl(file), file.name);

function showLike(url, name) {
  likes.push(url);
  const image = Object.assign(new Image(), { src: url, alt: name });
  const remove = Object.assign(document.createElement("button"), { type: "button", title: "Remove" });
  remove.setAttribute("aria-label", `Remove ${name}`);
  remove.onclick = () => {
    likes = likes.filter((other) => other !== url);
    remove.remove();
  };
  remove.append(image);
  $("likes").append(remove);
}

/** The form as a request. */
function request() {
  const interval = [number("low"), number("high")];
  const guided = interval.some((level) => level !== undefined);
  const invents = !$("invent-row").hidden;
  // Where there is no guidance, it has no interval.
  const guides = model.guided || number("guidance") !== undefined || negative.text() !== "";
  const s_churn = number("churn");
  const classes = vocabulary.classes ? sets.flatMap((field) => field.words()) : [];
  const any = vocabulary.classes && classes.length === 0;
  return {
    model: model.name,
    tags: model.tags === "no" ? [] : sets.map((field) => field.text()).filter(Boolean),
    classes: any ? ["random"] : classes,
    negative: $("conditions").hidden ? "" : negative.text(),
    complete: !$("complete-row").hidden && $("complete").checked && sets.some((field) => field.text()),
    like: model.like ? likes : [],
    invent: invents ? number("invent") ?? 0 : 0,
    condition_seed: invents ? number("condition-seed") ?? 0 : 0,
    per_condition: any ? 1 : number("per-condition") ?? 1,
    seeds: $("seeds").value.trim() || undefined,
    width: number("width"),
    height: number("height"),
    sampler: {
      solver: $("solver").value,
      steps: number("steps"),
      guidance: number("guidance"),
      guidance_interval: guided && guides ? [interval[0] ?? 0, interval[1] ?? ABOVE_ALL] : null,
      sigma_min: number("sigma-min"),
      sigma_max: number("sigma-max"),
      rho: number("rho"),
      ...(s_churn ? { churn: { ...churn, s_churn } } : {}),
    },
  };
}

/** Asks for what the form says. */
async function draw() {
  if (asking || !ready || !model) return;
  asking = true;
  $("problem").textContent = "";
  try {
    for (const field of [...sets, negative]) {
      if (!$("conditions").hidden && !(await field.take())) return field.input.focus();
    }
    if (running) await cancel();
    const wanted = request();
    const { factor } = model;
    const job = await post("/api/v1/generate", wanted);
    running = job.id;
    const last = kept.jobs.at(-1) ?? { id: 0 };
    // A server that was started anew counts from 1 again.
    if (job.id <= last.id) kept = { started: (await json("/api/v1/server")).started, jobs: [] };
    turn += 1;
    const drawn = { ...wanted, id: job.id, turn, like: [], factor };
    kept.jobs = [...kept.jobs, drawn].slice(-MOST_JOBS);
    remember("sessionStorage", "jobs", kept);
    follow(job, drawn);
  } catch (error) {
    $("problem").textContent = error.message;
  } finally {
    asking = false;
  }
}

/** Shows a job until its end. */
async function follow(job, drawn) {
  $("stage").hidden = false;
  if (running === job.id) board(job, drawn);
  const saved = new Map();
  let problem = "";
  try {
    const end = await watch(job.id, (seen) => {
      if (running === job.id) progress(seen, drawn);
      for (const picture of seen.pictures) {
        if (!saved.has(picture.index)) saved.set(picture.index, keep(picture, drawn));
      }
    });
    await Promise.all(saved.values());
    const unwritten = end.pictures.filter((picture) => picture.unwritten);
    if (end.stage === "failed") problem = end.why;
    else if (unwritten.length) problem = `The server could not write ${unwritten.length} of them: ${unwritten[0].unwritten}`;
  } catch (error) {
    problem = error.message;
  }
  if (running !== job.id) return;
  running = null;
  $("cancel").hidden = true;
  $("problem").textContent = problem;
}

async function cancel() {
  const id = running;
  if (id) await ask(`/api/v1/jobs/${id}`, { method: "DELETE" }).catch((error) => toast(error.message));
}

const shape = (wanted) => `${wanted.width} / ${wanted.height}`;
const isSmall = ({ width, factor }) => width * factor <= 128;

/** An empty place for each picture. */
function board(job, wanted) {
  const count = Math.round(job.of / wanted.sampler.steps);
  $("board").style.setProperty("--shape", shape(wanted));
  // A row for each condition, or as many as look well.
  const columns = wanted.per_condition > 1 ? wanted.per_condition : count <= 4 ? count : Math.min(8, Math.ceil(Math.sqrt(count)));
  $("board").style.gridTemplateColumns = `repeat(${Math.min(columns, count)}, minmax(0, ${columns > 4 ? 8 : 13}rem))`;
  $("board").replaceChildren(...Array.from({ length: count }, () => document.createElement("div")));
  $("cancel").hidden = false;
  // Whoever has scrolled down the form sees where it goes.
  $("progress-text").scrollIntoView({ block: "nearest" });
  progress(job, wanted);
}

const time = (seconds) => (seconds < 90 ? `${seconds.toFixed(seconds < 10 ? 1 : 0)} s` : `${Math.round(seconds / 60)} min`);

function progress(job, wanted) {
  $("progress").value = job.done / job.of;
  const texts = {
    queued: job.ahead ? `Waiting: ${job.ahead} before it` : "Waiting",
    running: `${Math.round((100 * job.done) / job.of)} %` +
      (job.rate ? `, ${job.rate.toFixed(job.rate < 10 ? 1 : 0)} it/s, ${time(job.seconds_left)} left` : ""),
    done: "Done",
    failed: "Failed",
    cancelled: `Cancelled ${job.why}`,
  };
  $("progress-text").textContent = texts[job.stage];
  if (job.stage === "done") $("progress").value = 1;
  const place = (index, src, alt, noisy) => {
    const cell = $("board").children[index];
    if (!cell) return;
    const image = cell.firstChild ?? cell.appendChild(new Image());
    image.classList.toggle("noisy", noisy);
    image.classList.toggle("small", isSmall(wanted));
    if (image.getAttribute("src") !== src) Object.assign(image, { src, alt });
  };
  for (const { index, image } of job.previews) place(index, image, `Preview of picture ${index + 1}`, true);
  for (const { index, url, seed } of job.pictures) place(index, url, `Picture of seed ${seed}`, false);
}

/** What a picture shows, in words. */
function words({ condition }) {
  if (condition?.class !== undefined) return condition.name ?? `class ${condition.class}`;
  return condition?.tags || (condition?.like ? `like ${condition.like}` : "no condition");
}

/** Puts a finished picture of a job into the gallery: the file itself, as the server forgets it some time. */
async function keep(picture, { turn, model, factor }) {
  const blob = await (await ask(picture.url)).blob();
  const { parameters, seed } = picture;
  const src = URL.createObjectURL(blob);
  const image = Object.assign(new Image(), { src, alt: `${words(parameters)}, seed ${seed}` });
  image.classList.toggle("small", isSmall({ width: parameters.width, factor }));
  const caption = Object.assign(document.createElement("span"), { textContent: words(parameters) });
  const button = Object.assign(document.createElement("button"), { type: "button" });
  button.append(image, caption);
  button.onclick = () => open({ src, parameters, seed, model, small: image.classList.contains("small") });
  const item = document.createElement("li");
  item.append(button);
  // The newest first, whichever arrives first.
  item.place = [turn, picture.index];
  const isOlder = ({ place: [other, index] }) => other < turn || (other === turn && index < picture.index);
  $("gallery").insertBefore(item, [...$("gallery").children].find(isOlder) ?? null);
  $("empty").hidden = true;
}

function open(picture) {
  shown = picture;
  const { parameters, seed, src } = picture;
  // Fingerprints are for programs.
  const { sampler, condition, model, hashes: _, ...others } = parameters;
  const known = Object.entries({ seed, model, ...condition, ...others, ...sampler }).filter(([, value]) => value !== null);
  const rows = known.flatMap(([key, value]) => {
    const text = typeof value === "object" ? JSON.stringify(value) : String(value);
    return [Object.assign(document.createElement("dt"), { textContent: key.replaceAll("_", " ") }),
      Object.assign(document.createElement("dd"), { textContent: text })];
  });
  $("parameters").replaceChildren(...rows);
  Object.assign($("large"), { src, alt: words(parameters) });
  $("large").classList.toggle("small", picture.small);
  Object.assign($("download"), { href: src, download: `${String(seed).padStart(6, "0")}.png` });
  $("picture").showModal();
}

/** What the server calls the model of a picture: by its file's name without the ending. */
function nameOf({ model }) {
  const stem = model.replace(/(?!^)\.[^.]*$/, "");
  const known = models.find(({ name }) => name === stem || name.endsWith(`/${stem}`));
  return known?.name;
}

/** The text by which a condition is asked for again; null if there is none that would. */
function textOf(condition) {
  const { negative, ...own } = condition;
  if (Object.keys(own).length === 0) return "";
  if (vocabulary.classes) {
    // Classes are listed by their number. One that had another name was of another model, or of other names.
    const label = vocabulary.tags[own.class]?.tag ?? null;
    return own.name && label !== own.name && label !== String(own.class) ? null : label;
  }
  // What was invented or completed for tags has become tags; features have to be completed again.
  return (model?.tags === "plain" ? own.tags : own.asked) ?? null;
}

/** Takes over the conditions of a picture, all or none of them; whether it did. */
function restoreConditions(conditions) {
  const plain = model?.tags === "plain" || vocabulary.classes;
  const invented = !plain && model?.invents && conditions.every(({ invented }, place) => invented === place);
  const texts = invented ? [] : conditions.map(textOf);
  const avoided = new Set(conditions.map(({ negative }) => (negative ? textOf(negative) : "")));
  const seeds = new Set(conditions.map(({ condition_seed }) => condition_seed));
  const [seed] = seeds;
  // A model of classes draws a random one where none is asked for.
  const none = vocabulary.classes && (conditions.length === 0 || texts.includes(""));
  const again = !none && (conditions.length === 0 || (!$("conditions").hidden && ![...texts, ...avoided].includes(null) &&
    avoided.size === 1 && (texts.length < 2 || !texts.includes("")) && (plain || (seeds.size === 1 && seed != null))));
  setWords(again ? texts.filter(Boolean) : []);
  negative.set(!again ? [] : vocabulary.classes ? [...avoided].filter(Boolean) : parts([...avoided].join()));
  $("complete").checked = false;
  $("invent").value = again && invented ? conditions.length : 0;
  if (again && seed != null) $("condition-seed").value = seed;
  likes = [];
  $("likes").replaceChildren();
  return again;
}

/** Takes over the parameters of a picture, of this model of the server if that is known; says what it cannot. */
export async function restore(about, name = nameOf(about)) {
  if (name && !(await choose(name))) return;
  apply(about.sampler);
  $("width").value = about.width;
  $("height").value = about.height;
  $("per-condition").value = about.per_condition ?? 1;
  const seeds = about.seeds ?? [about.seed];
  const apart = new Set(seeds).size === seeds.length && !seeds.includes(null);
  if (apart) $("seeds").value = seeds.join(",");
  const conditions = about.conditions ?? (about.condition ? [about.condition] : []);
  const lost = [
    [!name, "its model"],
    [!restoreConditions(conditions), "its conditions"],
    [!apart, "its seeds"],
    [about.towards, "the seed that it goes towards"],
    [about.from, "what it began from"],
    [about.sampler.guidance !== 1 && (about.gnet ?? null) !== (model?.gnet ?? null),
      about.gnet ? "the network that guided it" : "guidance without another network"],
  ];
  const named = lost.filter(([is]) => is).map(([, what]) => what);
  toast(named.length ? `Parameters taken over, but not ${named.join(", ")}.` : "Parameters taken over.");
}

/** Restores from the file in an input. */
async function take(input) {
  try {
    for (const file of input.files) await drop(file);
  } catch ({ message }) {
    toast(message);
  }
  input.value = "";
}

async function drop(file) {
  const about = parameters(await file.arrayBuffer());
  // A training's sample grid names no model.
  if (about?.model && about.sampler) await restore(about);
  else if (model?.like) await addLike(file);
  else toast(`${file.name} has no parameters of edm2k.`);
}

/** Files may be dropped anywhere. */
function dropping() {
  let depth = 0;
  const veil = (change) => {
    depth = change === 0 ? 0 : depth + change;
    $("veil").hidden = depth <= 0;
  };
  document.addEventListener("dragenter", (event) => event.dataTransfer?.types.includes("Files") && veil(1));
  document.addEventListener("dragleave", (event) => event.dataTransfer?.types.includes("Files") && veil(-1));
  document.addEventListener("dragover", (event) => event.preventDefault());
  document.addEventListener("drop", async (event) => {
    event.preventDefault();
    veil(0);
    for (const file of event.dataTransfer.files) await drop(file).catch((error) => toast(error.message));
  });
}
