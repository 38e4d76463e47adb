"use strict";
// Who holds a block, and its chain. The address of the page says which block: #hash=…, or #root for the starts.

const CHILDREN_MAX = 200;
const ANCESTORS_MAX = 4;
const SCOPE = { model: "model_id", tokenizer: "tokenizer_id", adapter: "adapter_id", tenant: "tenant_id" };

class Explorer {
  constructor(onToken) {
    this.onToken = onToken;
    this.read = null;
    this.asked = 0;
    at("find").addEventListener("submit", (event) => {
      event.preventDefault();
      this.find(at("hash").value);
    });
    at("found").addEventListener("keydown", (event) => this.walk(event));
    addEventListener("hashchange", () => this.follow());
  }

  async find(text) {
    const { readings, problem } = Hashes.read(text);
    at("hash").setAttribute("aria-invalid", String(Boolean(problem)));
    say(at("hash-problem"), problem);
    say(at("hash-said"), "");
    if (problem) return;
    let chosen = readings[0];
    try {
      for (const reading of readings.length > 1 ? readings : []) {
        const { residencies } = await Daemon.get("/v1/locate", { block_hash: reading.hex });
        if (residencies.length) {
          chosen = reading;
          break;
        }
      }
    } catch (error) {
      return this.failed(error);
    }
    this.read = chosen;
    const target = `#hash=${chosen.hex}`;
    if (location.hash === target) this.follow();
    else location.hash = target;
  }

  /** Show what the address of the page names. */
  async follow() {
    const named = new URLSearchParams(location.hash.slice(1));
    if (!named.has("hash") && !named.has("root")) return;
    const number = ++this.asked;
    const hash = named.get("hash") ?? "";
    at("hash").value = hash;
    say(at("hash-said"), this.read?.hex === hash ? this.read.said : "");
    say(at("hash-problem"), "");
    const scope = named.has("model") ? Object.fromEntries(Object.entries(SCOPE).map(([word, field]) => [field, named.get(word)])) : null;
    try {
      const seen = named.has("root") ? await this.roots(scope) : await this.block(hash, scope);
      if (number !== this.asked) return;
      at("found").replaceChildren(...seen);
      const list = at("found").querySelector(".children");
      if (list) new Arrows(list).refresh();
      at("found").querySelector("h3")?.focus();
    } catch (error) {
      if (number === this.asked) this.failed(error);
    }
  }

  failed(error) {
    say(at("hash-problem"), `The daemon could not say: ${error.message}.`);
    if (error instanceof TokenNeeded) this.onToken(error);
  }

  async roots(scope) {
    if (!scope) throw new Refused("#root needs &model=…");
    const children = await this.children(scope, "root");
    return [element("h3", { tabindex: "-1" }, "Starts of chains"), element("p", {}, scopeText(scope)), ...this.childList(children, scope)];
  }

  async block(hash, wanted) {
    const { residencies } = await Daemon.get("/v1/locate", { block_hash: hash, ...(wanted ?? {}) });
    const scopes = [...new Map(residencies.map((one) => [scopeText(one), scopeOf(one)])).values()];
    const scope = wanted ?? scopes[0] ?? null;
    const held = scope ? residencies.filter((one) => scopeText(one) === scopeText(scope)) : [];
    const parent = held.find((one) => one.prefix_hash !== null)?.prefix_hash ?? null;
    const children = scope ? await this.children(scope, hash) : null;
    const above = scope ? await this.ancestors(scope, parent) : [];
    const workers = new Set(held.map((one) => one.worker_id)).size;
    const integers = Hashes.integers(hash);
    return [
      scope ? this.breadcrumb(scope, above, hash) : null,
      element("h3", { tabindex: "-1" }, "Block ", element("code", {}, hash), " ", this.copyButton(hash)),
      integers ? element("p", { class: "quiet" }, `as an integer ${[...new Set([integers.unsigned, integers.signed])].join(", signed ")}`) : null,
      scopes.length > 1 ? element("p", {}, "This hash is in several scopes: ", ...scopes.map((one) => element("a", { href: target(hash, one) }, scopeText(one)))) : null,
      scope ? element("p", {}, scopeText(scope)) : null,
      scope && parent ? element("p", {}, "Parent ", element("a", { href: target(parent, scope), id: "parent" }, parent === "root" ? "none: it starts a chain" : element("code", {}, parent))) : null,
      scope && held.length && !parent ? element("p", {}, "Its parent was never reported.") : null,
      element("h4", {}, held.length ? `Held by ${Words.many(workers, "worker")}` : "Nobody holds this block now"),
      held.length ? holders(held) : null,
      ...(scope ? this.childList(children, scope) : []),
      element("p", { class: "quiet" }, `asked at ${Words.time(Date.now())} `, element("button", { type: "button", click: () => this.follow() }, "Ask again")),
    ].filter((one) => one !== null);
  }

  async children(scope, hash) {
    const { residencies, more } = await Daemon.get("/v1/children", { ...scope, prefix_hash: hash, limit: CHILDREN_MAX });
    const blocks = new Map();
    for (const one of residencies) blocks.set(one.block_hash, [...(blocks.get(one.block_hash) ?? []), one]);
    return { blocks: [...blocks].sort(([one], [other]) => (one < other ? -1 : 1)), more };
  }

  /** Some blocks above, the nearest last. */
  async ancestors(scope, parent) {
    const above = [];
    while (parent && parent !== "root" && above.length < ANCESTORS_MAX) {
      above.unshift(parent);
      const { residencies } = await Daemon.get("/v1/locate", { block_hash: parent, ...scope });
      parent = residencies.find((one) => one.prefix_hash !== null)?.prefix_hash ?? null;
    }
    return parent === "root" ? above : ["", ...above];
  }

  breadcrumb(scope, above, hash) {
    const step = (one) => element("li", {}, one ? element("a", { href: target(one, scope) }, element("code", {}, Hashes.short(one))) : "…");
    return element("nav", { "aria-label": "Chain" }, element("ol", { class: "crumbs" },
      element("li", {}, element("a", { href: target("root", scope) }, "start")), ...above.map(step),
      element("li", { "aria-current": "page" }, element("code", {}, Hashes.short(hash)))));
  }

  childList(children, scope) {
    const { blocks, more } = children;
    const many = Words.many(blocks.length, "child", "children");
    const title = element("h4", {}, blocks.length ? (more ? `The first ${many} by hash; there are more` : many) : "No children");
    const item = ([hash, held]) => element("li", {}, element("a", { href: target(hash, scope), "data-item": true, tabindex: "-1" }, element("code", {}, hash)),
      element("span", { class: "quiet" }, ` on ${Words.many(new Set(held.map((one) => one.worker_id)).size, "worker")}`));
    const list = element("ul", { class: "children links", "aria-label": "Children" }, ...blocks.map(item));
    return [title, list];
  }

  copyButton(text) {
    const button = element("button", { type: "button", click: async () => say(button, (await copied(text)) ? "Copied" : "Not copied") }, "Copy");
    return button;
  }

  walk(event) {
    if (event.key === "ArrowRight" && event.target.matches("[data-item]")) event.target.click();
    else if (event.key === "ArrowRight") at("found").querySelector("[data-item]")?.focus();
    else if (event.key === "ArrowLeft") at("parent")?.click();
    else return;
    event.preventDefault();
  }
}

function scopeOf(one) {
  return Object.fromEntries(Object.values(SCOPE).map((field) => [field, one[field]]));
}

function scopeText(scope) {
  const adapter = scope.adapter_id === null ? "no adapter" : `adapter ${JSON.stringify(scope.adapter_id)}`;
  return [`model ${scope.model_id}`, `tokenizer ${scope.tokenizer_id ?? scope.model_id}`, adapter, scope.tenant_id ? `tenant ${scope.tenant_id}` : "no tenant"].join(" · ");
}

function target(hash, scope) {
  const named = Object.entries(SCOPE).filter(([, field]) => scope[field] !== null).map(([word, field]) => [word, scope[field]]);
  return `#${new URLSearchParams([hash === "root" ? ["root", ""] : ["hash", hash], ...named])}`;
}

function holders(held) {
  const heads = ["worker", "trust", "tier", "rank", "group", "tokens", "copies"];
  const row = (one) => element("tr", {}, element("th", { scope: "row" }, one.worker_id),
    ...[trustMark(one.trust), one.tier, one.rank ?? NOTHING, one.group, one.token_count || NOTHING, one.ref_count].map((value) => element("td", {}, value instanceof Node ? value : String(value))));
  const sorted = [...held].sort((one, other) => collator.compare(one.worker_id + one.tier, other.worker_id + other.tier));
  return element("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Who holds it" },
    element("table", {}, element("thead", {}, element("tr", {}, ...heads.map((head) => element("th", { scope: "col" }, head)))), element("tbody", {}, ...sorted.map(row))));
}

/** Whether a text is on the clipboard now. Without TLS there is no `navigator.clipboard` beyond loopback. */
async function copied(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    const field = element("textarea", {}, text);
    document.body.append(field);
    field.select();
    const done = document.execCommand("copy");
    field.remove();
    return done;
  }
}
