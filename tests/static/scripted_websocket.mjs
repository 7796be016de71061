/**
 * Stand in for the network: a WebSocket whose server is the test.
 *
 * In:     a node:test context, whose timers, clock and randomness it takes over
 * Out:    `connectTo(script)`: the client under test; `script.sockets`: every socket it opened
 * Owns:   the two laws that hold in every test: never two live sockets, never a frame outside the golden shapes
 * Never:  answers by itself
 */

import assert from "node:assert/strict";
import { readFileSync } from "node:fs";

import { connect } from "../../src/pubsub_mw/static/client.js";

export const golden = JSON.parse(readFileSync(new URL("../frames.json", import.meta.url), "utf8"));

export const JITTER = 0.5; // what Math.random() answers, so that every back-off is known
export const CONNECTED = { type: "connected", connection: "c1", resume: "token-1", user: null, ping: 25 };

const shapes = new Map();
for (const { type, ...fields } of golden.frames.client) {
  shapes.set(type, new Set([...(shapes.get(type) ?? []), ...Object.keys(fields)]));
}

/** Let everything that was promised happen. */
export const settled = () => new Promise((resolve) => setImmediate(resolve));

/** Wait for what takes the platform more than one turn, such as reading a body. */
export async function until(condition) {
  for (let turn = 0; !condition(); turn++) {
    assert.ok(turn < 10_000, `did not come about: ${condition}`);
    await settled();
  }
}

/** Collect the calls of a callback. */
export function spy() {
  const calls = [];
  return Object.assign((...args) => void calls.push(args), { calls });
}

/** @param {import("node:test").TestContext} t */
export function script(t) {
  t.mock.timers.enable({ apis: ["setTimeout", "Date"] });
  t.mock.method(Math, "random", () => JITTER);
  const reported = t.mock.method(console, "error", () => {}).mock;
  const sockets = [];

  class ScriptedWebSocket {
    sent = [];
    isOpen = false;
    isLive = true;

    constructor(url) {
      assert.ok(!sockets.some((socket) => socket.isLive), "two sockets are live");
      this.url = url;
      sockets.push(this);
    }

    send(text) {
      assert.ok(this.isOpen, "sent on a socket that is not open");
      const frame = JSON.parse(text);
      const { type, ...fields } = frame;
      assert.ok(shapes.has(type), `there is no command ${type}`);
      for (const field of Object.keys(fields)) assert.ok(shapes.get(type).has(field), `${type} has no field ${field}`);
      this.sent.push(frame);
    }

    close() {
      this.isOpen = this.isLive = false;
    }

    // What the server does, or the network.

    accept() {
      this.isOpen = true;
      this.onopen?.({});
    }

    push(...frames) {
      for (const frame of frames) this.onmessage?.({ data: JSON.stringify(frame) });
    }

    end(code = 1006, reason = "") {
      this.isOpen = this.isLive = false;
      this.onclose?.({ code, reason });
    }
  }

  return {
    sockets,
    WebSocket: ScriptedWebSocket,
    /** The newest socket. */
    get socket() {
      return sockets.at(-1);
    },
    /** Move time on, and let what it sets off happen. */
    async pass(seconds) {
      for (let left = seconds; left > 0; left -= 1) {
        t.mock.timers.tick(Math.min(left, 1) * 1000);
        await settled();
      }
    },
    /** What reached nobody but the console. */
    reported: () => reported.calls.map((call) => call.arguments[0]),
  };
}

/** Start a client on a script; its socket waits to be accepted. */
export async function opened(t, options = {}) {
  const net = script(t);
  const realtime = connect("ws://server/realtime", { WebSocket: net.WebSocket, transports: ["websocket"], ...options });
  t.after(() => realtime.close());
  await settled();
  return { net, realtime };
}

/** Start a client and connect it, with the channels that `prepare` subscribes. */
export async function connected(t, prepare = () => {}, options = {}) {
  const { net, realtime } = await opened(t, options);
  prepare(realtime);
  net.socket.accept();
  net.socket.push(CONNECTED);
  return { net, realtime };
}

/** Lose the link, wait, and be connected again, by default as the same connection. */
export async function lostAndFound(net, again = { ...CONNECTED, resume: "token-2" }) {
  net.socket.end();
  await net.pass(10); // the longest back-off with this jitter
  net.socket.accept();
  net.socket.push(again);
}

export const subscribed = (channel, position, recovered = null) => ({
  type: "subscribed",
  channel,
  position,
  recovered,
});
export const message = (channel, position, data = position) => ({
  type: "message",
  channel,
  event: "message",
  data,
  position,
});
