"use strict";
// Arrow keys within a list: one stop for Tab, however long it is.

const STEPS = { ArrowDown: 1, ArrowUp: -1, PageDown: 10, PageUp: -10, Home: -Infinity, End: Infinity };

/** Moves the focus among the elements with `data-item` in `list`. Call `refresh` when they have changed. */
class Arrows {
  constructor(list) {
    this.list = list;
    list.addEventListener("keydown", (event) => this.move(event));
    list.addEventListener("focusin", (event) => this.settle(event.target));
  }

  items() {
    return [...this.list.querySelectorAll("[data-item]")];
  }

  move(event) {
    const step = STEPS[event.key];
    const items = this.items();
    const here = items.indexOf(event.target);
    if (step === undefined || here < 0 || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    const wanted = items[Math.min(items.length - 1, Math.max(0, here + step))];
    wanted.focus();
    wanted.scrollIntoView({ block: "nearest" });
  }

  /** Tab comes back to where one was. */
  settle(item) {
    if (!item.hasAttribute("data-item") || item === this.stop) return;
    this.stop?.setAttribute("tabindex", "-1");
    item.setAttribute("tabindex", "0");
    this.stop = item;
  }

  refresh() {
    if (this.stop && this.list.contains(this.stop)) return;
    const first = this.list.querySelector("[data-item]");
    if (first) this.settle(first);
  }
}
