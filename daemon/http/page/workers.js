"use strict";
// The table of workers.

class Workers {
  constructor() {
    this.rates = new Map();
    this.most = 1;
    this.table = new LiveTable(at("workers-table"), {
      title: "worker",
      key: (worker) => worker.worker_id,
      columns: [
        { title: "trust", value: (one) => TRUSTS.indexOf(one.trust), text: (one) => one.trust + one.reason, show: (one) => [trustMark(one.trust), element("span", { class: "why" }, one.reason)] },
        { title: "blocks by tier", number: true, value: (one) => one.blocks, text: (one) => [...tiersOf(one), this.most].join(), show: (one) => this.tiers(one) },
        { title: "blocks/s", number: true, value: (one) => this.rates.get(one.worker_id) ?? null, show: (one) => Words.rate(this.rates.get(one.worker_id) ?? null) },
        { title: "last seq", number: true, minor: true, value: (one) => one.last_seq, show: (one) => (one.last_seq < 0 ? NOTHING : Words.count(one.last_seq)) },
        { title: "age", number: true, minor: true, value: (one) => one.age_ms, show: (one) => Words.duration(one.age_ms) },
      ],
      details: (one) => [
        ["trust", `${one.trust.replace("_", " ")}${one.reason ? `: ${one.reason}` : ""}, since ${Words.moment(one.since_ms)}`],
        ["last seq, age", `${one.last_seq}, ${Words.duration(one.age_ms)}`],
        ...one.holdings.map((held) => [`${held.tier}, group ${held.group}`, `${Words.many(held.blocks, "block")}${held.bytes ? `, ${Words.size(held.bytes)}` : ""}; ${held.spec.kind}${held.spec.window ? ` of ${held.spec.window} tokens` : ""}`]),
      ],
    });
    for (const id of ["workers-filter", "workers-trust"]) at(id).addEventListener("input", () => this.filter());
  }

  show(look, rates) {
    this.rates = new Map(look.streams.filter((one) => rates.has(one.stream)).map((one) => [one.worker_id, rates.get(one.stream).blocks]));
    this.most = Math.max(1, ...look.workers.flatMap((worker) => [...tiersOf(worker).values()]));
    this.table.update(look.workers);
    this.count();
  }

  filter() {
    const trust = at("workers-trust").value;
    const words = wordsMatch(at("workers-filter").value, (one) => [one.worker_id, one.trust, one.reason, ...tiersOf(one).keys()].join(" "));
    this.table.filter((one) => words(one) && (!trust || (trust === "!fresh" ? one.trust !== "fresh" : one.trust === trust)));
    this.count();
  }

  count() {
    say(at("workers-shown"), `${Words.count(this.table.shown)} of ${Words.count(this.table.rows.length)}`);
  }

  tiers(worker) {
    const held = [...tiersOf(worker)];
    if (!held.length) return "0";
    return held.map(([tier, blocks]) => element("span", { class: "tier" }, element("span", {}, tier), bar(blocks / this.most, tier), element("span", {}, Words.count(blocks))));
  }
}

/** Blocks by tier over groups, fastest first. */
function tiersOf(worker) {
  const tiers = new Map();
  for (const tier of TIERS) {
    const blocks = worker.holdings.filter((held) => held.tier === tier).reduce((sum, held) => sum + held.blocks, 0);
    if (blocks) tiers.set(tier, blocks);
  }
  return tiers;
}
