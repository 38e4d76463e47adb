"use strict";
// A table of what is polled: rows keep their elements, so that focus, selection and open details survive a poll.

const collator = new Intl.Collator("en", { numeric: true });

/**
 * `columns`: `{title, value(row), show(row) -> nodes or text, text(row), number, minor}`. `value` is sorted by; `text`
 * says whether a cell has changed, and is `value` by default. `minor` columns are left out on narrow screens.
 * `key(row)` names a row and is shown in the first column; `details(row)` are pairs of texts under an opened row.
 */
class LiveTable {
  constructor(table, { key, title, columns, details }) {
    this.table = table;
    this.key = key;
    this.columns = columns;
    this.details = details;
    this.rows = [];
    this.matches = () => true;
    this.sort = { at: -1, descending: false };
    this.kept = new Map();
    this.opened = new Set();
    this.body = element("tbody");
    this.heads = [this.head(title, -1, {}), ...columns.map((column, at) => this.head(column.title, at, column))];
    table.append(element("thead", {}, element("tr", {}, ...this.heads)), this.body);
    this.arrows = new Arrows(this.body);
    this.body.addEventListener("keydown", (event) => this.close(event));
    this.mark();
  }

  head(title, at, column) {
    const button = element("button", { type: "button", click: () => this.sortBy(at) }, title);
    return element("th", { scope: "col", class: classOf(column) }, button);
  }

  sortBy(at) {
    const same = this.sort.at === at;
    this.sort = { at, descending: same ? !this.sort.descending : Boolean(this.columns[at]?.number) };
    this.mark();
    this.draw();
  }

  mark() {
    this.heads.forEach((head, number) => {
      if (number - 1 !== this.sort.at) head.removeAttribute("aria-sort");
      else head.setAttribute("aria-sort", this.sort.descending ? "descending" : "ascending");
    });
  }

  update(rows) {
    this.rows = rows;
    this.draw();
  }

  filter(matches) {
    this.matches = matches;
    this.draw();
  }

  draw() {
    const shown = this.rows.filter(this.matches).sort((one, other) => this.compare(one, other));
    const wanted = shown.flatMap((row) => this.elements(row));
    const staying = new Set(wanted);
    const focused = this.body.contains(document.activeElement) ? document.activeElement : null;
    for (const old of [...this.body.children]) if (!staying.has(old)) old.remove();
    let next = this.body.firstChild;
    for (const one of wanted) {
      if (one === next) next = next.nextSibling;
      else this.body.insertBefore(one, next);
    }
    if (focused && focused !== document.activeElement && this.body.contains(focused)) focused.focus({ preventScroll: true });
    this.arrows.refresh();
    this.shown = shown.length;
    if (this.kept.size > 2 * this.rows.length + 100) this.forget();
  }

  forget() {
    const known = new Set(this.rows.map(this.key));
    for (const key of this.kept.keys()) if (!known.has(key)) this.kept.delete(key);
  }

  compare(one, other) {
    const value = this.columns[this.sort.at]?.value ?? this.key;
    const [left, right] = [value(one), value(other)];
    const sign = this.sort.descending ? -1 : 1;
    if (left !== right) {
      if (left === null || right === null) return left === null ? 1 : -1;
      const order = typeof left === "number" ? left - right : collator.compare(left, right);
      if (order) return sign * order;
    }
    return collator.compare(this.key(one), this.key(other));
  }

  elements(row) {
    const key = this.key(row);
    let kept = this.kept.get(key);
    if (!kept) this.kept.set(key, (kept = this.make(key)));
    this.columns.forEach((column, at) => {
      const text = String((column.text ?? column.value)(row));
      if (kept.texts[at] === text) return;
      kept.texts[at] = text;
      const nodes = column.show(row);
      kept.cells[at].replaceChildren(...(Array.isArray(nodes) ? nodes : [nodes]));
    });
    if (!this.opened.has(key)) return [kept.row];
    const details = this.details(row);
    if (kept.told !== String(details)) kept.list.replaceChildren(...pairs(details));
    kept.told = String(details);
    return [kept.row, kept.more];
  }

  make(key) {
    const id = `more-${++LiveTable.made}`;
    const button = element(
      "button",
      { type: "button", class: "name", "data-item": true, tabindex: "-1", "aria-expanded": "false", "aria-controls": id,
        click: () => this.toggle(key) },
      key,
    );
    const cells = this.columns.map((column) => element("td", { class: classOf(column) }));
    const list = element("dl", { class: "pairs" });
    const more = element("tr", { class: "more", id }, element("td", { colspan: this.columns.length + 1 }, list));
    return { row: element("tr", {}, element("th", { scope: "row" }, button), ...cells), button, cells, texts: [], more, list };
  }

  toggle(key) {
    const opens = !this.opened.delete(key);
    if (opens) this.opened.add(key);
    this.kept.get(key).button.setAttribute("aria-expanded", String(opens));
    this.draw();
  }

  close(event) {
    const key = event.target.textContent;
    if (event.key === "Escape" && event.target.hasAttribute("data-item") && this.opened.has(key)) this.toggle(key);
  }
}
LiveTable.made = 0;

function classOf(column) {
  return [column.number ? "number" : "", column.minor ? "minor" : ""].join(" ").trim() || null;
}

/** Rows that have every word of a text in what `textOf` says of them. */
function wordsMatch(text, textOf) {
  const words = text.toLowerCase().split(/\s+/).filter(Boolean);
  return (row) => {
    const said = textOf(row).toLowerCase();
    return words.every((word) => said.includes(word));
  };
}
