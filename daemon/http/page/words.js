"use strict";
// Numbers and names as a person reads them.

const NOTHING = "–";

const Words = {
  /** 12,345; – for null. */
  count(number) {
    return number === null ? NOTHING : number.toLocaleString("en");
  },

  /** Of something that happens, each second: 0.4, 17, 1,234. */
  rate(number) {
    if (number === null) return NOTHING;
    return number > 0 && number < 10 ? number.toFixed(1) : Math.round(number).toLocaleString("en");
  },

  /** Bytes, as in 1.4 GiB. */
  size(bytes) {
    const units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
    let unit = 0;
    while (bytes >= 1024 && unit < units.length - 1) {
      bytes /= 1024;
      unit += 1;
    }
    return `${unit && bytes < 100 ? bytes.toFixed(1) : Math.round(bytes)} ${units[unit]}`;
  },

  /** Two units at most, as in 14 ms, 3.2 s, 5m10s, 3h12m, 4d02h; – for null. */
  duration(ms) {
    if (ms === null) return NOTHING;
    if (ms < 1000) return `${Math.round(ms)} ms`;
    if (ms < 10_000) return `${(ms / 1000).toFixed(1)} s`;
    const seconds = Math.floor(ms / 1000);
    if (seconds < 100) return `${seconds} s`;
    const two = (whole, parts, names) => `${whole}${names[0]}${String(parts).padStart(2, "0")}${names[1]}`;
    if (seconds < 3600) return two(Math.floor(seconds / 60), seconds % 60, "ms");
    if (seconds < 86_400) return two(Math.floor(seconds / 3600), Math.floor(seconds / 60) % 60, "hm");
    return two(Math.floor(seconds / 86_400), Math.floor(seconds / 3600) % 24, "dh");
  },

  /** A moment of the clock; – for 0. */
  moment(ms) {
    return ms ? new Date(ms).toLocaleString("sv") : NOTHING;
  },

  time(ms) {
    return new Date(ms).toLocaleTimeString("sv");
  },

  /** "1 worker", "2 workers". */
  many(number, one, more = `${one}s`) {
    return `${Words.count(number)} ${number === 1 ? one : more}`;
  },
};

const TIERS = ["hbm", "remote_hbm", "cpu_dram", "local_ssd", "object_store"];
const TRUSTS = ["fresh", "catching_up", "stale", "untrusted"];
const SYMBOLS = { fresh: "●", catching_up: "◐", stale: "○", untrusted: "✕" };

/** How far a worker can be believed: a symbol, a word and a colour that say the same. */
function trustMark(trust) {
  const symbol = element("b", { "aria-hidden": "true" }, SYMBOLS[trust] ?? "?");
  return element("span", { class: `trust ${TRUSTS.includes(trust) ? trust : ""}` }, symbol, ` ${trust.replace("_", " ")}`);
}
