"use strict";
// The head of the page, the figures at a glance, and the index.

const HISTORY = 60;

class Overview {
  constructor() {
    this.history = { messages: [], blocks: [] };
  }

  show(look, rates) {
    const { daemon, workers, streams } = look;
    say(at("about"), `version ${daemon.version} · up ${Words.duration(1000 * daemon.uptime_s)} · ${daemon.backend}`);
    const list = at("problems");
    if (list.textContent !== look.problems.join("")) list.replaceChildren(...look.problems.map((one) => element("li", {}, one)));
    list.hidden = !look.problems.length;
    const messages = this.note("messages", Rates.total(rates, "messages"));
    const blocks = this.note("blocks", Rates.total(rates, "blocks"));
    const trusts = TRUSTS.map((trust) => [trust, workers.filter((worker) => worker.trust === trust).length]);
    at("figures").replaceChildren(
      ...figure("Workers", Words.count(workers.length), ...trusts.filter(([, many]) => many).map(([trust, many]) => element("span", {}, `${Words.count(many)} `, trustMark(trust)))),
      ...figure("Blocks held", Words.count(workers.reduce((sum, worker) => sum + worker.blocks, 0))),
      ...figure("Messages/s", Words.rate(messages), this.line("messages")),
      ...figure("Blocks/s", Words.rate(blocks), this.line("blocks")),
      ...figure("Streams", Words.count(streams.length), element("span", {}, `${Words.count(streams.filter((one) => one.state === "live").length)} live`)),
    );
    const index = daemon.index;
    at("index-figures").replaceChildren(...pairs([
      ["Backend", daemon.backend],
      ["Records", Words.count(index ? index.records : null)],
      ["On disk", index ? Words.size(index.stored_bytes) : NOTHING],
      ...(index && index.limit_bytes ? [["In use of the limit", `${Words.size(index.live_bytes)} of ${Words.size(index.limit_bytes)}`]] : []),
      ["Waiting for the writer", `${Words.many(daemon.queued_messages, "message")}, ${Words.size(daemon.queued_bytes)}`],
    ]));
  }

  note(name, rate) {
    if (rate !== null) this.history[name] = [...this.history[name], rate].slice(-HISTORY);
    return rate;
  }

  line(name) {
    const seen = this.history[name];
    const most = Math.max(1, ...seen);
    const first = HISTORY - seen.length;
    const points = seen.map((rate, number) => `${(100 * (first + number)) / (HISTORY - 1)},${23 - (22 * rate) / most}`).join(" ");
    return drawing("svg", { viewBox: "0 0 100 24", preserveAspectRatio: "none", class: "line", "aria-hidden": "true" }, drawing("polyline", { points }));
  }
}

function figure(name, value, ...more) {
  return [element("div", {}, element("dt", {}, name), element("dd", {}, element("strong", {}, value), ...more))];
}
