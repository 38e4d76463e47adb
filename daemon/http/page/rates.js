"use strict";
// What happened between two looks at the streams. Counts are those of an epoch: they begin anew with each.

const Rates = {
  /** By stream, each second: `{messages, blocks}`. Streams that only one look saw have none. */
  between(before, after) {
    const rates = new Map();
    const seconds = before ? (after.atMs - before.atMs) / 1000 : 0;
    if (seconds <= 0) return rates;
    const old = new Map(before.streams.map((stream) => [stream.stream, stream]));
    for (const stream of after.streams) {
      const was = old.get(stream.stream);
      if (!was) continue;
      const grown = (count) => Rates.grown(was.epoch === stream.epoch ? count(was) : 0, count(stream)) / seconds;
      rates.set(stream.stream, {
        messages: grown((one) => one.messages),
        blocks: grown((one) => one.blocks_stored + one.blocks_removed),
      });
    }
    return rates;
  },

  grown(before, after) {
    return after >= before ? after - before : after;
  },

  /** The sum of one rate over all streams, null before there is any. */
  total(rates, name) {
    return rates.size ? [...rates.values()].reduce((sum, rate) => sum + rate[name], 0) : null;
  },
};
