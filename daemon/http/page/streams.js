"use strict";
// The tables of streams and of buses.

class Streams {
  constructor() {
    this.rates = new Map();
    this.table = new LiveTable(at("streams-table"), {
      title: "stream",
      key: (stream) => stream.stream,
      columns: [
        { title: "state", value: (one) => one.state, show: (one) => one.state },
        { title: "epoch", number: true, value: (one) => one.epoch, show: (one) => Words.count(one.epoch) },
        { title: "seq", number: true, value: (one) => one.last_seq, show: (one) => (one.last_seq < 0 ? NOTHING : Words.count(one.last_seq)) },
        { title: "gaps", number: true, value: (one) => one.gaps, show: (one) => Words.count(one.gaps) },
        { title: "lost", number: true, minor: true, value: (one) => one.unrecovered_messages, show: (one) => Words.count(one.unrecovered_messages) },
        { title: "messages/s", number: true, value: (one) => this.rates.get(one.stream)?.messages ?? null, show: (one) => Words.rate(this.rates.get(one.stream)?.messages ?? null) },
      ],
      details: (one) => [
        ["source", `${one.source} at ${one.endpoint}`],
        ["in this epoch", `${Words.many(one.messages, "message")}, ${Words.count(one.blocks_stored)} blocks stored, ${Words.count(one.blocks_removed)} removed`],
        ["last commit", `${Words.moment(one.committed_ms)}; sent ${Words.moment(one.engine_ms)}`],
        ["since the daemon started", `${Words.many(one.gaps, "gap")}, ${Words.many(one.unrecovered_messages, "message")} lost for good`],
      ],
    });
    this.buses = new LiveTable(at("buses-table"), {
      title: "bus",
      key: (bus) => bus.bus,
      columns: [
        { title: "state", value: (one) => one.state + one.problem, show: (one) => [one.state, element("span", { class: "why" }, one.problem)] },
        { title: "workers", number: true, value: (one) => one.workers, show: (one) => Words.count(one.workers) },
        { title: "position", number: true, value: (one) => one.position, show: (one) => (one.position < 0 ? NOTHING : Words.count(one.position)) },
        { title: "pending", number: true, value: (one) => one.pending, show: (one) => Words.count(one.pending) },
      ],
      details: (one) => [["servers", one.servers.join(", ")], ["JetStream", one.jetstream || "none"], ["refused", Words.many(one.refused, "message")]],
    });
    at("streams-filter").addEventListener("input", () => {
      this.table.filter(wordsMatch(at("streams-filter").value, (one) => [one.stream, one.source, one.state, one.endpoint].join(" ")));
      this.count();
    });
  }

  show(look, rates) {
    this.rates = rates;
    this.table.update(look.streams);
    this.buses.update(look.buses);
    at("buses").hidden = !look.buses.length;
    this.count();
  }

  count() {
    say(at("streams-shown"), `${Words.count(this.table.shown)} of ${Words.count(this.table.rows.length)}`);
  }
}
