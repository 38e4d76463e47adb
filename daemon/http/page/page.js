"use strict";
// Looks at the daemon every two seconds while the page is seen, and says how old what it shows is.

const EVERY_MS = 2000;
const THEMES = ["automatic", "light", "dark"];

class Page {
  constructor() {
    this.overview = new Overview();
    this.workers = new Workers();
    this.streams = new Streams();
    this.explorer = new Explorer((error) => this.askToken(error));
    this.look = null;
    this.lost = 0;
    this.stopped = false;
    at("ask").addEventListener("close", () => this.tokenGiven());
    at("forget").addEventListener("click", () => {
      Daemon.keep("");
      location.reload();
    });
    document.addEventListener("visibilitychange", () => this.again(0));
    document.addEventListener("keydown", (event) => this.key(event));
    for (const link of document.querySelectorAll("[data-jump]")) link.addEventListener("click", (event) => this.jump(event));
    this.theme();
    setInterval(() => this.tell(), 1000);
    this.again(0);
    this.explorer.follow();
  }

  again(ms) {
    clearTimeout(this.timer);
    if (document.hidden || this.stopped) return this.tell();
    this.timer = setTimeout(() => this.poll(), ms);
  }

  async poll() {
    if (this.polling) return;
    this.polling = true;
    const began = Date.now();
    try {
      this.show(await this.ask());
    } catch (error) {
      this.failed(error);
    }
    this.polling = false;
    this.again(Math.max(EVERY_MS, 5 * (Date.now() - began)));
  }

  async ask() {
    const [daemon, workers, streams] = await Promise.all([Daemon.get("/v1/daemon"), Daemon.get("/v1/workers"), Daemon.get("/v1/streams")]);
    return { atMs: Date.now(), daemon, problems: daemon.problems, workers: workers.workers, streams: streams.streams, buses: streams.buses };
  }

  show(look) {
    const rates = Rates.between(this.look, look);
    this.look = look;
    this.lost = 0;
    at("trouble").hidden = true;
    say(at("trouble"), "");
    at("forget").hidden = !Daemon.token;
    this.overview.show(look, rates);
    this.workers.show(look, rates);
    this.streams.show(look, rates);
    this.tell();
  }

  failed(error) {
    if (error instanceof TokenNeeded) return this.askToken(error);
    if (!this.lost) this.lost = Date.now();
    const what = error instanceof Unreachable ? "The daemon does not answer" : "The daemon cannot answer";
    say(at("trouble"), `${what} (${error.message}) since ${Words.time(this.lost)}. ${this.look ? `What is shown is of ${Words.time(this.look.atMs)}.` : ""} Trying again.`);
    at("trouble").hidden = false;
    this.tell();
  }

  tell() {
    const kind = this.stopped ? "token" : this.lost ? "lost" : document.hidden ? "paused" : !this.look ? "connecting" : this.look.daemon.ready ? "ready" : "unready";
    const words = { token: "✕ a token is needed", lost: "✕ not answering", paused: "paused", connecting: "connecting …", ready: "● ready", unready: "✕ not ready" };
    document.documentElement.dataset.state = kind;
    say(at("state"), words[kind]);
    document.title = `${words[kind]} – kvcensus`;
    if (!this.look) return;
    const oldMs = Date.now() - this.look.atMs;
    say(at("asof"), `figures of ${Words.time(this.look.atMs)}, ${oldMs < 1000 ? "just now" : `${Words.duration(1000 * Math.round(oldMs / 1000))} ago`}`);
  }

  askToken(error) {
    this.stopped = true;
    clearTimeout(this.timer);
    const loopback = /^(localhost|127\..*|\[::1\])$/.test(location.hostname);
    const readable = location.protocol === "http:" && !loopback ? " This page came without TLS: a token can be read on its way." : "";
    say(at("ask-why"), (error.given ? "The daemon refused the token that it was given." : "This daemon answers to nobody without one of its tokens.") + readable);
    if (!at("ask").open) at("ask").showModal();
    this.tell();
  }

  tokenGiven() {
    const token = at("token").value.trim();
    at("token").value = "";
    if (!/^[\x21-\x7e]+$/.test(token)) return this.askToken(new TokenNeeded(Boolean(token)));
    Daemon.keep(token);
    this.stopped = false;
    this.again(0);
    this.explorer.follow();
  }

  key(event) {
    const field = event.target.matches("input, select, textarea");
    if (event.key === "/" && !field && !event.ctrlKey && !event.altKey && !event.metaKey) {
      event.preventDefault();
      at("hash").focus();
      at("hash").select();
    } else if (event.key === "Escape" && field && event.target.type === "search") {
      event.target.value = "";
      event.target.dispatchEvent(new Event("input"));
    }
  }

  /** The address names a block and nothing else: jumps leave it alone. */
  jump(event) {
    event.preventDefault();
    const section = at(event.currentTarget.getAttribute("href").slice(1));
    section.scrollIntoView();
    section.focus({ preventScroll: true });
  }

  theme() {
    let chosen = localStorage.getItem("kvcensus-theme") ?? THEMES[0];
    const show = () => {
      document.documentElement.dataset.theme = chosen;
      say(at("theme"), `Theme: ${chosen}`);
    };
    at("theme").addEventListener("click", () => {
      chosen = THEMES[(THEMES.indexOf(chosen) + 1) % THEMES.length];
      localStorage.setItem("kvcensus-theme", chosen);
      show();
    });
    show();
  }
}

new Page();
