"use strict";
// Elements. What comes from outside enters as text only: nothing here, or anywhere on the page, makes markup of it.

/** The element of the page with this id. */
function at(id) {
  return document.getElementById(id);
}

/**
 * A new element. `settings` are attributes; a function is a listener of the event of its name; null and false are left
 * out. Children are elements or texts.
 */
function element(tag, settings = {}, ...children) {
  return furnish(document.createElement(tag), settings, children);
}

/** The same for a drawing. */
function drawing(tag, settings = {}, ...children) {
  return furnish(document.createElementNS("http://www.w3.org/2000/svg", tag), settings, children);
}

function furnish(made, settings, children) {
  for (const [name, value] of Object.entries(settings)) {
    if (typeof value === "function") made.addEventListener(name, value);
    else if (value !== null && value !== false) made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.filter((child) => child !== null));
  return made;
}

/** Give an element a text, unless it has it: a live region speaks only of changes. */
function say(where, text) {
  if (where.textContent !== text) where.textContent = text;
}

/** A bar that is full at 1. */
function bar(share, kind) {
  const inner = element("span", { class: kind });
  inner.style.width = `${Math.min(100, Math.max(0, 100 * share))}%`;
  return element("span", { class: "bar", "aria-hidden": "true" }, inner);
}

/** A list of pairs: name, and text or element. */
function pairs(entries) {
  return entries.flatMap(([name, value]) => [element("dt", {}, name), element("dd", {}, value)]);
}
