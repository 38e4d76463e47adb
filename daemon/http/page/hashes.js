"use strict";
// Block hashes as they are written: hex here, and in logs of engines also as 64-bit integers of either sign.

const Hashes = {
  BYTES_MAX: 240,

  /**
   * What a text may mean: `{readings: [{hex, said}], problem}`. Digits alone can be a decimal number or hex: both
   * readings are there, the likelier one first. `said` tells of a conversion, `problem` why there is no reading.
   */
  read(text) {
    const plain = text.trim().replace(/^[[('"\s]+|[\])'",\s]+$/g, "");
    if (!plain) return { readings: [], problem: "Type or paste a block hash." };
    if (/^[-+]?\d+$/.test(plain)) return Hashes.digits(plain);
    const digits = plain.replace(/^0x/i, "");
    const wrong = digits.search(/[^0-9a-f]/i);
    if (wrong >= 0) return { readings: [], problem: `“${digits[wrong]}” (character ${wrong + 1}) is neither hex nor part of a number.` };
    const problem = Hashes.problemOf(digits);
    return problem ? { readings: [], problem } : { readings: [{ hex: digits.toLowerCase(), said: "" }], problem: "" };
  },

  digits(text) {
    const readings = [];
    const number = BigInt(text);
    if (number >= -(2n ** 63n) && number < 2n ** 64n) {
      const hex = BigInt.asUintN(64, number).toString(16).padStart(16, "0");
      readings.push({ hex, said: `Read as a ${number < 0n ? "signed " : ""}64-bit integer: ${number} is ${hex}.` });
    }
    if (/^\d+$/.test(text) && !Hashes.problemOf(text)) {
      const reading = { hex: text, said: "Read as hex, though it could be a decimal number." };
      if ([16, 32, 64].includes(text.length)) readings.unshift(reading);
      else readings.push(reading);
    }
    const problem = readings.length ? "" : `${text} is no 64-bit integer: those go from -2^63 to 2^64 - 1.`;
    return { readings, problem };
  },

  problemOf(digits) {
    if (digits.length % 2) return `${digits.length} hex digits: a hash has an even number of them. Is one missing?`;
    if (!digits.length) return "0x is followed by nothing.";
    if (digits.length > 2 * Hashes.BYTES_MAX) return `${digits.length / 2} bytes: a hash has at most ${Hashes.BYTES_MAX}.`;
    return "";
  },

  /** A hash of 8 bytes as logs show it, null for another length. */
  integers(hex) {
    if (hex.length !== 16) return null;
    const unsigned = BigInt(`0x${hex}`);
    return { unsigned: String(unsigned), signed: String(BigInt.asIntN(64, unsigned)) };
  },

  /** The two ends of a long hash. */
  short(hex) {
    return hex.length > 20 ? `${hex.slice(0, 8)}…${hex.slice(-8)}` : hex;
  },
};
