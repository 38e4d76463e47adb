"use strict";
// Questions to the daemon that served this page.

const TIMEOUT_MS = 8000;
const TOKEN_KEY = "kvcensus-token";

/** The daemon did not answer at all. */
class Unreachable extends Error {}

/** The daemon wants a token; `given`: it had one. */
class TokenNeeded extends Error {
  constructor(given) {
    super(given ? "the token was refused" : "a token is needed");
    this.given = given;
  }
}

/** The daemon answered that it cannot. */
class Refused extends Error {}

const Daemon = {
  token: sessionStorage.getItem(TOKEN_KEY) ?? "",

  /** Keep a token for as long as the tab lives; "" forgets it. */
  keep(token) {
    Daemon.token = token;
    if (token) sessionStorage.setItem(TOKEN_KEY, token);
    else sessionStorage.removeItem(TOKEN_KEY);
  },

  /** The answer to a GET. Parameters that are null are left out. Throws Unreachable, TokenNeeded, Refused. */
  async get(path, parameters = {}) {
    const given = Object.entries(parameters).filter(([, value]) => value !== null);
    const asked = given.length ? `${path}?${new URLSearchParams(given)}` : path;
    const token = Daemon.token;
    const headers = token ? { Accept: "application/json", Authorization: `Bearer ${token}` } : { Accept: "application/json" };
    let response, body;
    try {
      response = await fetch(asked, { headers, cache: "no-store", redirect: "error", signal: AbortSignal.timeout(TIMEOUT_MS) });
      body = await response.json();
    } catch (error) {
      throw new Unreachable(error.name === "TimeoutError" ? `no answer within ${TIMEOUT_MS / 1000} s` : "no connection");
    }
    if (response.status === 401) throw new TokenNeeded(Boolean(token));
    if (!response.ok) throw new Refused(body.error?.message ?? `status ${response.status}`);
    return body;
  },
};
