// A field for a set of tags, or for classes: chips, and a combobox that completes from the vocabulary (WAI-ARIA's pattern).

import { json } from "./server.js";

const MOST = 12;
let fields = 0;

const element = (name, properties = {}, ...children) => {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
};

/** A tag with its weight, as the server reads it. */
export const written = ({ tag, weight }) => (weight === 1 ? tag : `(${tag}:${weight})`);

export class TagField {
  /** `vocabulary()`: {model, tags: [{tag, count}], known: Set, classes}. Where `classes` is true its words are classes, which
   *  have no weights but commas; with `single` the field then has one at most. */
  constructor(vocabulary, single = false) {
    this.vocabulary = vocabulary;
    this.single = single;
    this.tags = [];
    this.found = [];
    this.at = -1;
    const id = `options-${fields++}`;
    this.input = element("input", { type: "text", spellcheck: false });
    for (const [name, value] of Object.entries({
      role: "combobox", "aria-label": "Add a tag", "aria-autocomplete": "list", "aria-expanded": "false",
      "aria-controls": id, "aria-describedby": "tags-hint",
    })) this.input.setAttribute(name, value);
    this.options = element("ul", { id, className: "options", hidden: true });
    this.options.setAttribute("role", "listbox");
    this.options.setAttribute("aria-label", "Known tags");
    this.unknown = element("div", { className: "unknown", hidden: true });
    this.unknown.setAttribute("role", "alert");
    this.node = element("div", { className: "tags" }, this.input, this.options, this.unknown);
    this.node.onclick = (event) => event.target === this.node && this.input.focus();
    this.input.oninput = () => this.typed();
    this.input.onkeydown = (event) => this.key(event);
    this.input.onblur = () => this.close();
  }

  /** Its words as they are written; what is typed counts. */
  words() {
    const typed = this.input.value.trim();
    return [...this.tags.map(written), ...(typed ? [typed] : [])];
  }

  /** The tags as one text. */
  text() {
    return this.words().join(", ");
  }

  /** What it holds, also what is typed and not taken yet. */
  get state() {
    return { tags: this.tags, typed: this.input.value };
  }

  set state({ tags, typed }) {
    this.tags = tags;
    this.input.value = typed;
    this.show();
  }

  /** Replaces the tags, each given as it is written. */
  set(tags) {
    this.tags = [];
    this.input.value = "";
    const { known, classes } = this.vocabulary();
    for (const text of tags) {
      const [, tag, weight] = (!classes && !known.has(text) && text.match(/^\((.+):([\d.]+)\)$/)) || [text, text, "1"];
      this.add(tag, Number(weight), false);
    }
    this.show();
  }

  /** The tags that the server reads in a text; null if it finds an unknown one. */
  async read(text) {
    const model = encodeURIComponent(this.vocabulary().model);
    const answer = json(`/api/v1/prompt?model=${model}&text=${encodeURIComponent(text)}`);
    return answer.then(({ tags }) => tags, () => null);
  }

  /** Takes what is typed, if it is known; else says what is like it. Whether nothing is left. */
  async take() {
    this.close();
    const typed = this.input.value;
    const { known, classes } = this.vocabulary();
    const parts = (classes ? [typed] : typed.split(",")).map((part) => part.trim()).filter(Boolean);
    let strange = parts.filter((part) => !known.has(part));
    for (const part of parts) if (known.has(part)) this.add(part, 1, false);
    const weighed = strange.length ? await this.read(strange.join(", ")) : [];
    if (this.input.value !== typed) return false;
    for (const { tag, weight } of weighed ?? []) this.add(tag, weight, false);
    if (weighed) strange = [];
    this.input.value = strange.join(", ");
    if (strange.length === 0) {
      this.unknown.hidden = true;
      this.show();
      return true;
    }
    await this.suggest(strange[0].replace(/^[([]+|(:[\d.]+)?[)\]]+$/g, ""));
    this.show();
    return false;
  }

  async suggest(text) {
    const model = encodeURIComponent(this.vocabulary().model);
    const { tags } = await json(`/api/v1/vocabulary?model=${model}&near=${encodeURIComponent(text)}`);
    const choices = tags.slice(0, 4).map(({ tag }) =>
      element("button", { type: "button", className: "chip", textContent: tag, onclick: () => this.add(tag) }));
    const question = choices.length ? ", did you mean" : "";
    const what = this.vocabulary().classes ? "class" : "tag";
    this.unknown.replaceChildren(`There is no ${what} “${text}”${question} `, ...choices);
    this.unknown.hidden = false;
  }

  add(tag, weight = 1, clear = true) {
    if (this.single && this.vocabulary().classes) this.tags = [];
    const own = this.tags.find((other) => other.tag === tag);
    if (own) own.weight = weight;
    else this.tags.push({ tag, weight });
    if (clear) {
      this.input.value = "";
      this.unknown.hidden = true;
      this.input.focus();
    }
    this.show();
  }

  show() {
    const { classes } = this.vocabulary();
    for (const chip of this.node.querySelectorAll(":scope > .chip")) chip.remove();
    for (const own of this.tags) {
      const { tag, weight } = own;
      const chip = element("button", { type: "button", className: "chip", textContent: tag });
      if (!classes) chip.title = "↑ and ↓ weigh it";
      if (weight !== 1) chip.append(element("small", { textContent: ` ×${weight}` }));
      chip.setAttribute("aria-label", `Remove ${written(own)}`);
      chip.onclick = () => {
        this.tags = this.tags.filter((other) => other !== own);
        this.show();
        this.input.focus();
      };
      chip.onkeydown = (event) => {
        const change = { ArrowUp: 1, ArrowDown: -1 }[event.key];
        if (!change || classes) return;
        event.preventDefault();
        own.weight = Math.min(10, Math.max(0.1, Math.round(10 * weight + change) / 10));
        this.show();
        this.node.querySelectorAll(":scope > .chip")[this.tags.indexOf(own)].focus();
      };
      this.input.before(chip);
    }
    this.input.placeholder = this.tags.length ? "" : classes ? "a number or a name" : "cat, face, …";
  }

  typed() {
    this.unknown.hidden = true;
    // What is in brackets may have commas.
    const open = (this.input.value.match(/\(/g) ?? []).length > (this.input.value.match(/\)/g) ?? []).length;
    if (this.input.value.includes(",") && !open && !this.vocabulary().classes) {
      this.take();
      return;
    }
    const text = this.input.value.trim().toLowerCase();
    const rank = (tag) => {
      const at = tag.toLowerCase().indexOf(text);
      // At the beginning of the tag, of a word in it, anywhere.
      return at < 0 ? 3 : at === 0 ? 0 : /\W/.test(tag[at - 1]) ? 1 : 2;
    };
    const ranked = this.vocabulary().tags.filter(({ tag }) => !this.tags.some((own) => own.tag === tag)).map((tag) => [rank(tag.tag), tag]);
    ranked.sort((a, b) => a[0] - b[0]);
    this.found = text ? ranked.filter(([rank]) => rank < 3).slice(0, MOST).map(([, tag]) => tag) : [];
    this.at = -1;
    this.list();
  }

  list() {
    const open = this.found.length > 0;
    this.options.hidden = !open;
    this.input.setAttribute("aria-expanded", String(open));
    const option = ({ tag, count }, index) => {
      const made = element("li", { id: `${this.options.id}-${index}` }, tag, element("span", { textContent: count ?? "" }));
      made.setAttribute("role", "option");
      made.setAttribute("aria-selected", String(index === this.at));
      made.onpointerdown = (event) => {
        event.preventDefault();
        this.close();
        this.add(tag);
      };
      return made;
    };
    this.options.replaceChildren(...this.found.map(option));
    const selected = this.options.children[this.at];
    selected?.scrollIntoView({ block: "nearest" });
    if (selected) this.input.setAttribute("aria-activedescendant", selected.id);
    else this.input.removeAttribute("aria-activedescendant");
  }

  close() {
    this.found = [];
    this.at = -1;
    this.list();
  }

  /** Whether a text is a known tag, or a class's number or one of its names. */
  isExact(text) {
    const { known, tags, classes } = this.vocabulary();
    const names = () => tags.flatMap(({ tag }) => tag.split(",")).map((name) => name.trim().toLowerCase());
    return known.has(text) || (classes && (/^\d+$/.test(text) || names().includes(text.toLowerCase())));
  }

  key(event) {
    const { key } = event;
    if ((key === "ArrowDown" || key === "ArrowUp") && this.found.length) {
      event.preventDefault();
      const step = key === "ArrowDown" ? 1 : -1;
      this.at = (this.at + step + this.found.length + (this.at < 0 && step < 0 ? 1 : 0)) % this.found.length;
      this.list();
    } else if (key === "Enter" && !event.ctrlKey && !event.metaKey && this.input.value.trim()) {
      event.preventDefault();
      const exact = this.isExact(this.input.value.trim());
      const chosen = this.found[this.at] ?? (exact ? null : this.found[0]);
      if (chosen) {
        this.close();
        this.add(chosen.tag);
      } else this.take();
    } else if (key === "Escape" && this.found.length) {
      event.stopPropagation();
      this.close();
    } else if (key === "Backspace" && !this.input.value && this.tags.length) {
      this.tags.pop();
      this.show();
    }
  }
}
