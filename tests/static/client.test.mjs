/** The client against a scripted server: what it sends, what it tells the page, and when. */

import assert from "node:assert/strict";
import { execFile } from "node:child_process";
import { describe, test } from "node:test";
import { promisify } from "node:util";

import { backoff, connect, mayReconnect } from "../../src/pubsub_mw/static/client.js";
import {
  CONNECTED,
  connected,
  golden,
  JITTER,
  lostAndFound,
  message,
  opened,
  script,
  settled,
  spy,
  subscribed,
  until,
} from "./scripted_websocket.mjs";

const FIRST_DELAY_SECONDS = 0.5 * JITTER;
const DEAD_SECONDS = CONNECTED.ping + 8;

/** Be a page that can hide, and can be told that the network is back. */
function page(t) {
  const events = new EventTarget();
  globalThis.addEventListener = events.addEventListener.bind(events);
  globalThis.document = { hidden: false };
  t.after(() => {
    delete globalThis.addEventListener;
    delete globalThis.document;
  });
  return { tell: (type) => events.dispatchEvent(new Event(type)) };
}

describe("back-off", () => {
  const table = [
    // attempt, random, seconds
    [0, 0, 0],
    [0, 0.5, 0.25],
    [0, 1, 0.5],
    [1, 1, 1],
    [2, 1, 2],
    [3, 1, 4],
    [4, 1, 8],
    [5, 1, 16],
    [6, 1, 20],
    [6, 0.25, 5],
    [5_000, 1, 20],
  ];
  for (const [attempt, random, seconds] of table) {
    test(`of attempt ${attempt} with ${random} is ${seconds} s`, () => assert.equal(backoff(attempt, random), seconds));
  }
});

describe("close codes", () => {
  const ranges = { 1000: true, 1006: true, 2999: true, 3000: true, 3499: true, 3500: false, 3999: false };
  const applications = { 4000: true, 4499: true, 4500: false, 4999: false };
  for (const [code, expected] of Object.entries({ ...ranges, ...applications })) {
    test(`${code} ${expected ? "lets" : "does not let"} a client reconnect`, () => {
      assert.equal(mayReconnect(Number(code)), expected);
    });
  }
  for (const [name, [code, expected]] of Object.entries(golden.close_codes)) {
    test(`${name} ${expected ? "lets" : "does not let"} a client reconnect`, async (t) => {
      assert.equal(mayReconnect(code), expected);
      const { net, realtime } = await connected(t);
      const onError = spy();
      realtime.on("error", onError);
      net.socket.end(code, "because");
      assert.equal(realtime.state, expected ? "waiting" : "closed");
      assert.deepEqual(
        onError.calls.map(([error]) => [error.code, error.message]),
        expected ? [] : [[code, "because"]],
      );
      await net.pass(FIRST_DELAY_SECONDS);
      assert.equal(net.sockets.length, expected ? 2 : 1);
    });
  }
});

describe("the address", () => {
  const table = [
    ["/realtime", "http://site.test/page", "ws://site.test/realtime/"],
    ["/realtime/", "https://site.test/page", "wss://site.test/realtime/"],
    ["realtime", "https://site.test/app/page", "wss://site.test/app/realtime/"],
    ["https://other.test:8443/rt", "http://site.test/", "wss://other.test:8443/rt/"],
    ["wss://other.test/rt", "http://site.test/", "wss://other.test/rt/"],
    ["ws://other.test", undefined, "ws://other.test/"],
  ];
  for (const [url, baseURI, expected] of table) {
    test(`of ${url} on ${baseURI} is ${expected}`, async (t) => {
      const net = script(t);
      if (baseURI) globalThis.document = { baseURI };
      t.after(() => delete globalThis.document);
      const realtime = connect(url, { WebSocket: net.WebSocket });
      t.after(() => realtime.close());
      await settled();
      assert.equal(net.socket.url, expected);
    });
  }

  test("is by default the folder that the module came from", async (t) => {
    const net = script(t);
    const realtime = connect({ WebSocket: net.WebSocket });
    t.after(() => realtime.close());
    await settled();
    assert.equal(net.socket.url, new URL("../../src/pubsub_mw/static/", import.meta.url).href);
  });

  test("that is none is refused at once", () => assert.throws(() => connect("//:"), TypeError));
});

describe("connecting", () => {
  test("goes through its states and tells them", async (t) => {
    const { net, realtime } = await opened(t);
    const onState = spy();
    const remove = realtime.on("state", onState);
    assert.equal(realtime.state, "connecting");
    net.socket.accept();
    net.socket.push({ ...CONNECTED, user: "7" });
    assert.deepEqual([realtime.state, realtime.connection, realtime.user], ["connected", "c1", "7"]);
    net.socket.end();
    await net.pass(FIRST_DELAY_SECONDS);
    remove();
    const onLaterState = spy();
    realtime.on("state", onLaterState);
    realtime.close();
    realtime.close();
    assert.deepEqual(onState.calls.flat(), ["connected", "waiting", "connecting"]);
    assert.deepEqual(onLaterState.calls.flat(), ["closed"]);
    assert.equal(realtime.state, "closed");
  });

  test("shows the channels that were subscribed before, and needs no further frame for them", async (t) => {
    const { net } = await connected(t, (realtime) => {
      realtime.subscribe("news", spy());
      realtime.subscribe("room:42", spy(), { position: "e.7.t" });
    });
    assert.deepEqual(net.socket.sent, [{ type: "connect", channels: { news: null, "room:42": "e.7.t" } }]);
  });

  test("asks for channels that were subscribed between connect and connected", async (t) => {
    const { net, realtime } = await opened(t);
    net.socket.accept();
    realtime.subscribe("late", spy(), { position: "e.1.t" });
    assert.equal(net.socket.sent.length, 1);
    net.socket.push(CONNECTED);
    assert.deepEqual(net.socket.sent.slice(1), [{ type: "subscribe", channel: "late", position: "e.1.t" }]);
  });

  test("answers pings", async (t) => {
    const { net } = await connected(t);
    net.socket.push({ type: "ping" });
    assert.deepEqual(net.socket.sent.at(-1), { type: "pong" });
  });

  test("understands every golden frame, and ignores one that is newer than it", async (t) => {
    for (const frame of [...golden.frames.server, { type: "hologram", channel: "room:42" }, { type: "error" }]) {
      await t.test(`${frame.type} ${frame.channel ?? ""} ${frame.code ?? ""}`, async (t) => {
        const { net, realtime } = await connected(t, (realtime) => realtime.subscribe("room:42", spy()));
        realtime.on("error", spy());
        net.socket.push(frame);
        assert.deepEqual(net.reported(), []);
      });
    }
  });

  test("leaves no timer behind that keeps Node alive once it is closed", async () => {
    const module = new URL("../../src/pubsub_mw/static/client.js", import.meta.url);
    const program = `
      import { connect } from ${JSON.stringify(module)};
      let socket;
      const WebSocket = class { constructor() { socket = this; } send() {} close() {} };
      const push = (frame) => socket.onmessage({ data: JSON.stringify(frame) });
      const later = () => new Promise((resolve) => setImmediate(resolve));
      Math.random = () => 1;
      for (const stage of ["connecting", "connected", "unavailable", "waiting"]) {
        const realtime = connect("ws://server", { WebSocket, transports: ["websocket"] });
        realtime.subscribe("news", () => {});
        await later();
        socket.onopen();
        if (stage !== "connecting") push(${JSON.stringify(CONNECTED)});
        if (stage === "unavailable") push({ type: "error", code: "unavailable", message: "", channel: "news" });
        if (stage === "waiting") socket.onclose({ code: 1006, reason: "" });
        realtime.close();
      }
      const started = Date.now();
      process.on("exit", () => console.log(Date.now() - started));`;
    const { stdout } = await promisify(execFile)(process.execPath, ["--input-type=module", "--eval", program]);
    assert.ok(Number(stdout) < 400, `Node was kept alive for ${stdout} ms`);
  });
});

describe("delivery", () => {
  test("reaches every callback of a channel, with one subscription on the server", async (t) => {
    const [first, second] = [spy(), spy()];
    const { net } = await connected(t, (realtime) => {
      realtime.subscribe("room", first);
      realtime.subscribe("room", second);
    });
    assert.deepEqual(net.socket.sent[0].channels, { room: null });
    net.socket.push(subscribed("room", "e.0.t"), message("room", "e.1.t", { text: "hi" }));
    for (const { calls } of [first, second]) {
      assert.equal(calls.length, 1);
      const [data, { channel, event, position }] = calls[0];
      assert.deepEqual([data, channel, event, position], [{ text: "hi" }, "room", "message", "e.1.t"]);
    }
  });

  test("goes on when a callback throws, with the error reported and the position advanced", async (t) => {
    const second = spy();
    const { net } = await connected(t, (realtime) => {
      realtime.subscribe("room", () => {
        throw new Error("mine");
      });
      realtime.subscribe("room", second);
    });
    net.socket.push(subscribed("room", "e.0.t"), message("room", "e.1.t"));
    assert.equal(second.calls.length, 1);
    assert.deepEqual(
      net.reported().map((error) => error.message),
      ["mine"],
    );
    await lostAndFound(net);
    assert.deepEqual(net.socket.sent[0].channels, { room: "e.1.t" });
  });

  test("reports to reportError where there is one", async (t) => {
    globalThis.reportError = spy();
    t.after(() => delete globalThis.reportError);
    const { net } = await connected(t, (realtime) =>
      realtime.subscribe("room", () => {
        throw new Error("mine");
      }),
    );
    net.socket.push(subscribed("room", "e.0.t"), message("room", "e.1.t"));
    assert.deepEqual(
      globalThis.reportError.calls.map(([error]) => error.message),
      ["mine"],
    );
    assert.deepEqual(net.reported(), []);
  });

  test("skips a callback that an earlier one unsubscribed", async (t) => {
    const second = spy();
    let subscription;
    const { net } = await connected(t, (realtime) => {
      realtime.subscribe("room", () => subscription.unsubscribe());
      subscription = realtime.subscribe("room", second);
    });
    net.socket.push(subscribed("room", "e.0.t"), message("room", "e.1.t"), message("room", "e.2.t"));
    assert.deepEqual(second.calls, []);
  });

  test("does not give a callback the publication during which it subscribed", async (t) => {
    const late = spy();
    const { net } = await connected(t, (realtime) => {
      const subscription = realtime.subscribe("room", () => {
        subscription.unsubscribe();
        realtime.subscribe("room", late);
      });
      realtime.subscribe("room", spy());
    });
    net.socket.push(subscribed("room", "e.0.t"), message("room", "e.1.t"));
    assert.equal(late.calls.length, 0);
    net.socket.push(message("room", "e.2.t"));
    assert.deepEqual(
      late.calls.map(([data]) => data),
      ["e.2.t"],
    );
  });

  test("ignores a channel that nobody listens to", async (t) => {
    const { net, realtime } = await connected(t);
    const onGap = spy();
    realtime.on("gap", onGap);
    net.socket.push(message("other", "e.1.t"), { type: "gap", channel: "other", position: "e.9.t", reason: "epoch" });
    await lostAndFound(net);
    assert.deepEqual(net.socket.sent[0].channels, {});
    assert.deepEqual([net.reported(), onGap.calls], [[], []]);
  });

  test("needs a function to deliver to", async (t) => {
    const { realtime } = await opened(t);
    assert.throws(() => realtime.subscribe("room"), TypeError);
  });
});

describe("positions", () => {
  for (const recovered of [true, false, null]) {
    test(`begin where subscribed says, recovered: ${recovered}`, async (t) => {
      const onSubscribed = spy();
      const { net } = await connected(t, (realtime) => {
        realtime.subscribe("room", spy(), { position: "e.3.t", onSubscribed });
      });
      net.socket.push(subscribed("room", "e.5.t", recovered));
      assert.deepEqual(onSubscribed.calls, [[subscribed("room", "e.5.t", recovered)]]);
      await lostAndFound(net);
      assert.deepEqual(net.socket.sent[0].channels, { room: "e.5.t" });
    });
  }

  test("come from the last message or gap, and go back with resume on every reconnect", async (t) => {
    const { net } = await connected(t, (realtime) => {
      realtime.subscribe("a", spy());
      realtime.subscribe("b", spy());
      realtime.subscribe("c", spy());
    });
    net.socket.push(subscribed("a", "e.0.t"), subscribed("b", "e.0.t"), message("a", "e.1.t"), message("a", "e.2.t"));
    net.socket.push({ type: "gap", channel: "b", position: "f.9.t", reason: "epoch" });
    await lostAndFound(net);
    const expected = { type: "connect", channels: { a: "e.2.t", b: "f.9.t", c: null } };
    assert.deepEqual(net.socket.sent, [{ ...expected, resume: "token-1" }]);
    await lostAndFound(net);
    assert.deepEqual(net.socket.sent, [{ ...expected, resume: "token-2" }]);
  });

  test("are given to a late subscriber at once", async (t) => {
    const { net, realtime } = await connected(t, (realtime) => realtime.subscribe("room", spy()));
    net.socket.push(subscribed("room", "e.0.t"), message("room", "e.1.t"));
    const [onSubscribed, left] = [spy(), spy()];
    realtime.subscribe("room", spy(), { onSubscribed, position: "ignored" });
    realtime.subscribe("room", spy(), { onSubscribed: left }).unsubscribe();
    await settled();
    const [[frame]] = onSubscribed.calls;
    assert.deepEqual(frame, { ...subscribed("room", "e.1.t"), members: undefined });
    assert.equal(onSubscribed.calls.length, 1);
    assert.deepEqual(left.calls, []);
    assert.equal(net.socket.sent.length, 1);
  });

  test("are given to a subscriber during a reconnect only when that is over", async (t) => {
    const { net, realtime } = await connected(t, (realtime) => realtime.subscribe("room", spy()));
    net.socket.push(subscribed("room", "e.0.t"), message("room", "e.1.t"));
    net.socket.end();
    const onSubscribed = spy();
    realtime.subscribe("room", spy(), { onSubscribed });
    await settled();
    assert.deepEqual(onSubscribed.calls, []);
    await net.pass(FIRST_DELAY_SECONDS);
    net.socket.accept();
    net.socket.push(CONNECTED, subscribed("room", "e.1.t", true));
    assert.deepEqual(onSubscribed.calls, [[subscribed("room", "e.1.t", true)]]);
  });
});

describe("gaps", () => {
  test("are told to the channel's subscriptions and to the page", async (t) => {
    const [onGap, onAnyGap] = [spy(), spy()];
    const { net, realtime } = await connected(t, (realtime) => realtime.subscribe("room", spy(), { onGap }));
    realtime.on("gap", onAnyGap);
    net.socket.push(subscribed("room", "e.0.t"), {
      type: "gap",
      channel: "room",
      position: "e.9.t",
      reason: "trimmed",
    });
    const expected = [[{ channel: "room", position: "e.9.t", reason: "trimmed" }]];
    assert.deepEqual(onGap.calls, expected);
    assert.deepEqual(onAnyGap.calls, expected);
  });

  test("are told when what was missed could not be recovered", async (t) => {
    const [onGap, onAnyGap] = [spy(), spy()];
    const { net, realtime } = await connected(t, (realtime) => realtime.subscribe("room", spy(), { onGap }));
    realtime.on("gap", onAnyGap);
    net.socket.push(subscribed("room", "e.0.t", true));
    assert.deepEqual(onGap.calls, []);
    await lostAndFound(net);
    net.socket.push(subscribed("room", "e.9.t", false));
    const expected = [[{ channel: "room", position: "e.9.t", reason: "unrecovered" }]];
    assert.deepEqual(onGap.calls, expected);
    assert.deepEqual(onAnyGap.calls, expected);
  });
});

describe("unsubscribing", () => {
  const setUp = async (t, ...callbacks) => {
    const { net, realtime } = await connected(t, (realtime) => {
      for (const callback of callbacks) realtime.subscribe("room", callback);
    });
    net.socket.push(subscribed("room", "e.0.t"));
    return { net, realtime, frames: () => net.socket.sent.slice(1) };
  };
  const UNSUBSCRIBE = { type: "unsubscribe", channel: "room" };
  const UNSUBSCRIBED = { type: "unsubscribed", channel: "room", code: "client", reason: "as asked" };

  test("sends unsubscribe when the last one leaves", async (t) => {
    const [first, second] = [spy(), spy()];
    const { net, realtime, frames } = await setUp(t, first, second);
    realtime.unsubscribe("room", first);
    assert.deepEqual(frames(), []);
    net.socket.push(message("room", "e.1.t"));
    assert.deepEqual([first.calls.length, second.calls.length], [0, 1]);
    realtime.unsubscribe("room", second);
    realtime.unsubscribe("room", second);
    realtime.unsubscribe("room");
    assert.deepEqual(frames(), [UNSUBSCRIBE]);
    net.socket.push(message("room", "e.2.t"), UNSUBSCRIBED);
    assert.equal(second.calls.length, 1);
    assert.deepEqual(frames(), [UNSUBSCRIBE]);
  });

  test("ends all subscriptions to a channel at once", async (t) => {
    const { realtime, frames } = await setUp(t, spy(), spy());
    realtime.unsubscribe("room");
    assert.deepEqual(frames(), [UNSUBSCRIBE]);
  });

  test("before the connection stands sends nothing about the channel", async (t) => {
    const { net } = await connected(t, (realtime) => realtime.subscribe("room", spy()).unsubscribe());
    assert.deepEqual(net.socket.sent, [{ type: "connect", channels: {} }]);
  });

  test("and subscribing again while that is under way ends up subscribed, from the new position", async (t) => {
    const { net, realtime, frames } = await setUp(t, spy());
    const again = spy();
    realtime.unsubscribe("room");
    realtime.subscribe("room", again, { position: "e.4.t" });
    net.socket.push(message("room", "e.5.t"));
    assert.deepEqual(frames(), [UNSUBSCRIBE]);
    net.socket.push(UNSUBSCRIBED);
    assert.deepEqual(frames(), [UNSUBSCRIBE, { type: "subscribe", channel: "room", position: "e.4.t" }]);
    net.socket.push(subscribed("room", "e.4.t", true), message("room", "e.5.t"));
    assert.deepEqual(
      again.calls.map(([data]) => data),
      ["e.5.t"],
    );
  });

  test("while subscribing waits for the answer, which is nobody's", async (t) => {
    const { net, realtime } = await connected(t);
    const onSubscribed = spy();
    const subscription = realtime.subscribe("room", spy(), { onSubscribed });
    subscription.unsubscribe();
    const frames = () => net.socket.sent.slice(1);
    assert.deepEqual(frames(), [{ type: "subscribe", channel: "room" }]);
    net.socket.push(subscribed("room", "e.0.t", false), message("room", "e.1.t"));
    assert.deepEqual(frames(), [{ type: "subscribe", channel: "room" }, UNSUBSCRIBE]);
    assert.deepEqual(onSubscribed.calls, []);
    net.socket.push(UNSUBSCRIBED);
    await lostAndFound(net);
    assert.deepEqual(net.socket.sent[0].channels, {});
  });

  test("and subscribing again while subscribing asks anew, for the position may be another", async (t) => {
    const { net, realtime } = await connected(t);
    const [onGap, callback] = [spy(), spy()];
    realtime.subscribe("room", spy()).unsubscribe();
    realtime.subscribe("room", callback, { position: "e.2.t", onGap });
    net.socket.push(subscribed("room", "e.9.t"), message("room", "e.10.t"), UNSUBSCRIBED);
    assert.deepEqual(net.socket.sent.slice(1), [
      { type: "subscribe", channel: "room" },
      UNSUBSCRIBE,
      { type: "subscribe", channel: "room", position: "e.2.t" },
    ]);
    net.socket.push(subscribed("room", "e.2.t", true), message("room", "e.3.t"));
    assert.deepEqual(
      callback.calls.map(([data]) => data),
      ["e.3.t"],
    );
  });

  test("is forgotten with the link it was asked on", async (t) => {
    const { net, realtime } = await setUp(t, spy());
    realtime.unsubscribe("room");
    await lostAndFound(net);
    realtime.subscribe("room", spy());
    assert.deepEqual(net.socket.sent.slice(1), [{ type: "subscribe", channel: "room" }]);
  });

  test("is not confused when the server ends the subscription at the same moment", async (t) => {
    const { net, realtime, frames } = await setUp(t, spy());
    const [again, onError] = [spy(), spy()];
    realtime.on("error", onError);
    realtime.unsubscribe("room");
    net.socket.push({ type: "unsubscribed", channel: "room", code: "forbidden", reason: "revoked" });
    realtime.subscribe("room", again);
    assert.deepEqual(frames(), [UNSUBSCRIBE]);
    net.socket.push({ type: "error", code: "not_subscribed", message: "", channel: "room" });
    assert.deepEqual(frames(), [UNSUBSCRIBE, { type: "subscribe", channel: "room" }]);
    assert.deepEqual(onError.calls, []);
  });
});

describe("a subscription that is refused", () => {
  const refusal = (code, channel = "room") => ({ type: "error", code, message: "no", channel });

  test("is told to its callbacks and to the page, and not asked for again", async (t) => {
    const [onError, onAnyError] = [spy(), spy()];
    const { net, realtime } = await connected(t, (realtime) => {
      realtime.subscribe("room", spy(), { onError });
      realtime.subscribe("room", spy(), { onError });
      realtime.subscribe("other", spy());
    });
    realtime.on("error", onAnyError);
    net.socket.push(refusal("forbidden"), subscribed("other", "e.0.t"));
    assert.equal(onError.calls.length, 2);
    assert.equal(onAnyError.calls.length, 1);
    const [error] = onAnyError.calls[0];
    assert.ok(error instanceof Error);
    assert.deepEqual([error.code, error.message, error.channel], ["forbidden", "no", "room"]);
    await lostAndFound(net);
    assert.deepEqual(net.socket.sent[0].channels, { other: "e.0.t" });
  });

  test("can be subscribed anew", async (t) => {
    const { net, realtime } = await connected(t, (realtime) => realtime.subscribe("room", spy(), { onError: spy() }));
    net.socket.push(refusal("forbidden"));
    realtime.subscribe("room", spy());
    assert.deepEqual(net.socket.sent.at(-1), { type: "subscribe", channel: "room" });
  });

  test("is reported when nobody listens for errors", async (t) => {
    const { net } = await connected(t, (realtime) => realtime.subscribe("room", spy()));
    net.socket.push(refusal("forbidden"));
    assert.deepEqual(
      net.reported().map((error) => error.code),
      ["forbidden"],
    );
  });

  test("is not reported when its own onError heard it", async (t) => {
    const { net } = await connected(t, (realtime) => realtime.subscribe("room", spy(), { onError: spy() }));
    net.socket.push(refusal("forbidden"));
    assert.deepEqual(net.reported(), []);
  });

  test("later, by the server, is told with its reason", async (t) => {
    const onError = spy();
    const { net, realtime } = await connected(t, (realtime) => realtime.subscribe("room", spy(), { onError }));
    realtime.on("error", spy());
    net.socket.push(subscribed("room", "e.0.t"));
    net.socket.push({ type: "unsubscribed", channel: "room", code: "forbidden", reason: "revoked" });
    const [[error]] = onError.calls;
    assert.deepEqual([error.code, error.message, error.channel], ["forbidden", "revoked", "room"]);
    await lostAndFound(net);
    assert.deepEqual(net.socket.sent[0].channels, {});
  });

  test("after all its callbacks left is nobody's error, and a new one is asked for", async (t) => {
    const { net, realtime } = await connected(t);
    const onError = spy();
    realtime.on("error", onError);
    realtime.subscribe("room", spy(), { position: "bad" }).unsubscribe();
    realtime.subscribe("room", spy());
    net.socket.push(refusal("bad_position"));
    assert.deepEqual(net.socket.sent.at(-1), { type: "subscribe", channel: "room" });
    assert.deepEqual(onError.calls, []);
  });

  test("for being unavailable is asked for again, with back-off", async (t) => {
    const onError = spy();
    const { net, realtime } = await connected(t, (realtime) => {
      realtime.subscribe("a", spy(), { onError, position: "e.1.t" });
      realtime.subscribe("b", spy(), { onError });
    });
    realtime.on("error", onError);
    const frames = () => net.socket.sent.slice(1);
    net.socket.push(refusal("unavailable", "a"), refusal("unavailable", "b"));
    await net.pass(backoff(0, JITTER) - 0.001);
    assert.deepEqual(frames(), []);
    await net.pass(0.001);
    const both = [
      { type: "subscribe", channel: "a", position: "e.1.t" },
      { type: "subscribe", channel: "b" },
    ];
    assert.deepEqual(frames(), both);
    net.socket.push(refusal("unavailable", "a"), {
      type: "unsubscribed",
      channel: "b",
      code: "unavailable",
      reason: "",
    });
    await net.pass(backoff(1, JITTER) - 0.001);
    assert.deepEqual(frames(), both);
    await net.pass(0.001);
    assert.deepEqual(frames(), [...both, ...both]);
    net.socket.push(subscribed("a", "e.1.t", true), refusal("unavailable", "b"));
    await net.pass(backoff(0, JITTER));
    assert.deepEqual(frames(), [...both, ...both, both[1]]);
    net.socket.push(refusal("unavailable", "b"));
    await lostAndFound(net);
    assert.deepEqual(net.socket.sent.slice(1), []);
    net.socket.push(refusal("unavailable", "b"));
    await net.pass(20);
    assert.deepEqual(net.socket.sent.slice(1), [both[1]]);
    assert.deepEqual(onError.calls, []);
    assert.equal(realtime.state, "connected");
  });

  test("is not confused with the refusal of another command that names the channel", async (t) => {
    const callback = spy();
    const { net, realtime } = await connected(t, (realtime) => realtime.subscribe("room", callback));
    realtime.on("error", spy());
    net.socket.push(subscribed("room", "e.0.t"), { ...refusal("forbidden"), id: "p1" }, message("room", "e.1.t"));
    assert.equal(callback.calls.length, 1);
  });
});

describe("reconnecting", () => {
  test("waits longer after each failure", async (t) => {
    const { net } = await connected(t);
    for (const attempt of [0, 1, 2, 3, 4, 5, 6, 7]) {
      const { length } = net.sockets;
      net.socket.end();
      await net.pass(backoff(attempt, JITTER) - 0.001);
      assert.equal(net.sockets.length, length);
      await net.pass(0.001);
      assert.equal(net.sockets.length, length + 1);
    }
  });

  for (const proof of [{ type: "ping" }, message("room", "e.1.t")]) {
    test(`starts over with a short wait once a ${proof.type} came`, async (t) => {
      const { net } = await connected(t);
      for (const attempt of [0, 1, 2]) {
        net.socket.end();
        await net.pass(backoff(attempt, JITTER));
      }
      net.socket.accept();
      net.socket.push(CONNECTED, proof);
      net.socket.end();
      const { length } = net.sockets;
      await net.pass(FIRST_DELAY_SECONDS);
      assert.equal(net.sockets.length, length + 1);
    });
  }

  test("waits longer when the server accepts and drops the connection again and again", async (t) => {
    const { net } = await connected(t);
    for (const attempt of [0, 1, 2, 3]) {
      const { length } = net.sockets;
      net.socket.end(3006);
      await net.pass(backoff(attempt, JITTER) - 0.001);
      assert.equal(net.sockets.length, length);
      await net.pass(0.001);
      net.socket.accept();
      net.socket.push(CONNECTED);
    }
  });

  test("does not wait for the close of a connection that the server announced to end", async (t) => {
    const { net, realtime } = await connected(t);
    net.socket.push({ type: "disconnect", code: 3001, reason: "restarting", retry: 4 });
    assert.deepEqual([realtime.state, net.socket.isLive], ["waiting", false]);
    net.socket.end(3001);
    await net.pass(4 + FIRST_DELAY_SECONDS - 0.001);
    assert.equal(net.sockets.length, 1);
    await net.pass(0.001);
    assert.equal(net.sockets.length, 2);
  });

  for (const [code, retry, state] of [
    [3001, 0, "waiting"],
    [3001, null, "closed"],
    [3503, null, "closed"],
    [3503, 1, "closed"],
  ]) {
    test(`after disconnect ${code} with retry ${retry} is ${state}`, async (t) => {
      const { net, realtime } = await connected(t);
      realtime.on("error", spy());
      net.socket.push({ type: "disconnect", code, reason: "", retry });
      assert.equal(realtime.state, state);
    });
  }

  test("happens when nothing came for the ping interval and 8 s", async (t) => {
    const { net, realtime } = await connected(t);
    await net.pass(DEAD_SECONDS - 1);
    net.socket.push({ type: "ping" });
    await net.pass(DEAD_SECONDS - 0.001);
    assert.equal(realtime.state, "connected");
    await net.pass(0.001);
    assert.deepEqual([realtime.state, net.socket.isLive], ["waiting", false]);
  });

  test("happens when a connection does not come about in time", async (t) => {
    const { net, realtime } = await opened(t);
    await net.pass(10);
    assert.deepEqual([realtime.state, net.socket.isLive], ["waiting", false]);
  });

  test("leaves the socket it gave up, whatever that still does", async (t) => {
    const callback = spy();
    const { net, realtime } = await connected(t, (realtime) => realtime.subscribe("room", callback));
    const [stale] = net.sockets;
    await net.pass(DEAD_SECONDS);
    await net.pass(FIRST_DELAY_SECONDS);
    assert.equal(net.sockets.length, 2);
    stale.push(CONNECTED, subscribed("room", "e.0.t"), message("room", "e.1.t"));
    stale.end(3503, "too late");
    assert.equal(realtime.state, "connecting");
    assert.deepEqual(callback.calls, []);
  });

  test("does not happen after close, and close is final", async (t) => {
    const { tell } = page(t);
    const { net, realtime } = await connected(t, (realtime) => realtime.subscribe("room", spy()));
    realtime.close();
    assert.deepEqual([realtime.state, net.socket.isLive], ["closed", false]);
    realtime.subscribe("other", spy());
    await net.pass(100);
    tell("online");
    await net.pass(100);
    assert.equal(net.sockets.length, 1);
  });

  test("can be ended from within any callback", async (t) => {
    for (const state of ["connected", "waiting", "connecting"]) {
      await t.test(state, async (t) => {
        const { net, realtime } = await opened(t);
        realtime.on("state", (now) => now === state && realtime.close());
        net.socket.accept();
        net.socket.push(CONNECTED);
        net.socket.end();
        await net.pass(100);
        assert.equal(realtime.state, "closed");
        assert.ok(!net.socket.isLive);
      });
    }
  });
});

describe("waking up", () => {
  for (const type of ["online", "visibilitychange"]) {
    test(`by ${type} ends a wait at once`, async (t) => {
      const { tell } = page(t);
      const { net, realtime } = await connected(t);
      net.socket.end();
      tell(type);
      await settled();
      assert.deepEqual([realtime.state, net.sockets.length], ["connecting", 2]);
      await net.pass(1);
      assert.equal(net.sockets.length, 2);
    });

    test(`by ${type} replaces a link that died while timers stood still`, async (t) => {
      const { tell } = page(t);
      const { net, realtime } = await connected(t);
      t.mock.timers.setTime(Date.now() + 1000 * (DEAD_SECONDS + 1)); // sleeps: the clock moves, no timer fires
      assert.ok(net.socket.isLive);
      tell(type);
      await settled();
      assert.deepEqual([realtime.state, net.sockets.length], ["connecting", 2]);
    });

    test(`by ${type} leaves a live link alone`, async (t) => {
      const { tell } = page(t);
      const { net, realtime } = await connected(t);
      await net.pass(DEAD_SECONDS - 1);
      tell(type);
      await settled();
      assert.deepEqual([realtime.state, net.sockets.length], ["connected", 1]);
    });
  }

  test("does not come from being hidden", async (t) => {
    const { tell } = page(t);
    const { net, realtime } = await connected(t);
    net.socket.end();
    document.hidden = true;
    tell("visibilitychange");
    await settled();
    assert.equal(realtime.state, "waiting");
    tell("online");
    await settled();
    assert.equal(realtime.state, "connecting");
  });
});

describe("own channels", () => {
  const USER_7 = { ...CONNECTED, user: "7" };
  const own = (channel, position) => message(channel, position);

  test("reach the page as private, and their positions go back with resume", async (t) => {
    const onPrivate = spy();
    const { net, realtime } = await opened(t);
    realtime.on("private", onPrivate);
    net.socket.accept();
    net.socket.push(USER_7, own("#connection-c1", "e.1.t"), own("#user-7", "e.4.t"), own("#user-7", "e.5.t"));
    assert.deepEqual(
      onPrivate.calls.map(([data, { channel }]) => [data, channel]),
      [
        ["e.1.t", "#connection-c1"],
        ["e.4.t", "#user-7"],
        ["e.5.t", "#user-7"],
      ],
    );
    await lostAndFound(net, USER_7);
    const channels = { "#connection-c1": "e.1.t", "#user-7": "e.5.t" };
    assert.deepEqual(net.socket.sent, [{ type: "connect", resume: "token-1", channels }]);
    net.socket.push(subscribed("#user-7", "e.5.t", true), own("#user-7", "e.6.t"));
    assert.equal(onPrivate.calls.length, 4);
  });

  test("tell their gaps to the page", async (t) => {
    const onGap = spy();
    const { net, realtime } = await opened(t);
    realtime.on("gap", onGap);
    net.socket.accept();
    net.socket.push(USER_7, subscribed("#user-7", "e.9.t", false));
    net.socket.push({ type: "gap", channel: "#connection-c1", position: "f.1.t", reason: "epoch" });
    assert.deepEqual(onGap.calls.flat(), [
      { channel: "#user-7", position: "e.9.t", reason: "unrecovered" },
      { channel: "#connection-c1", position: "f.1.t", reason: "epoch" },
    ]);
    await lostAndFound(net, USER_7);
    assert.deepEqual(net.socket.sent[0].channels, { "#user-7": "e.9.t", "#connection-c1": "f.1.t" });
  });

  test("are forgotten with a connection that was not resumed, and that is told as their gap", async (t) => {
    const onGap = spy();
    const { net, realtime } = await opened(t);
    realtime.on("gap", onGap);
    net.socket.accept();
    net.socket.push(USER_7, own("#user-7", "e.4.t"));
    await lostAndFound(net, USER_7);
    assert.deepEqual(onGap.calls, []);
    await lostAndFound(net, { ...USER_7, connection: "c2" });
    assert.equal(realtime.connection, "c2");
    assert.deepEqual(onGap.calls.flat(), [
      { channel: "#user-7", position: null, reason: "unrecovered" },
      { channel: "#connection-c1", position: null, reason: "unrecovered" },
    ]);
    await lostAndFound(net, { ...USER_7, connection: "c2" });
    assert.deepEqual(net.socket.sent[0].channels, {});
  });
});

describe("who is there", () => {
  const [ANN, BOB, CYD] = ["ann", "bob", "cyd"].map((user) => ({ user, info: { name: user } }));
  const present = (members) => ({ ...subscribed("presence-room", "e.0.t"), members });
  const [join, leave] = ["join", "leave"].map((type) => (member) => ({ type, channel: "presence-room", member }));

  /** Be connected, and listen to the channel. */
  async function there(t, onMembers = spy()) {
    const { net, realtime } = await connected(t);
    const subscription = realtime.subscribe("presence-room", () => {}, { onMembers });
    return { net, realtime, subscription, onMembers };
  }

  test("is a list that changes with who comes and goes", async (t) => {
    const { net, subscription, onMembers } = await there(t);
    assert.deepEqual(subscription.members, []);
    net.socket.push(present([ANN]), join(BOB), leave(ANN), leave(CYD));
    assert.deepEqual(onMembers.calls, [
      [[ANN], present([ANN])],
      [[ANN, BOB], join(BOB)],
      [[BOB], leave(ANN)],
      [[BOB], leave(CYD)],
    ]);
    assert.deepEqual(subscription.members, [BOB]);
  });

  test("is each user once, with the newest info", async (t) => {
    const { net, subscription } = await there(t);
    net.socket.push(present([ANN, BOB]), join({ ...ANN, info: null }));
    assert.deepEqual(subscription.members, [BOB, { ...ANN, info: null }]);
  });

  test("stays as it was told last while not connected, and is told anew after that", async (t) => {
    const { net, subscription, onMembers } = await there(t);
    net.socket.push(present([ANN, BOB]));
    net.socket.end();
    assert.deepEqual(subscription.members, [ANN, BOB]);
    await net.pass(10);
    net.socket.accept();
    net.socket.push({ ...CONNECTED, resume: "token-2" }, present([BOB, CYD]));
    assert.deepEqual(subscription.members, [BOB, CYD]);
    assert.deepEqual(onMembers.calls.at(-1), [[BOB, CYD], present([BOB, CYD])]);
  });

  test("is told to a late subscriber at once", async (t) => {
    const { net, realtime } = await there(t);
    net.socket.push(present([ANN]), join(BOB));
    const onMembers = spy();
    realtime.subscribe("presence-room", () => {}, { onMembers });
    await settled();
    const [[members, change]] = onMembers.calls;
    assert.deepEqual([members, change.type, onMembers.calls.length], [[ANN, BOB], "subscribed", 1]);
  });

  test("is nobody's when nobody listens", async (t) => {
    const { net } = await connected(t);
    net.socket.push(join(ANN), leave(ANN));
    assert.deepEqual(net.reported(), []);
  });

  test("is no list on a channel that shows nobody", async (t) => {
    const onMembers = spy();
    const { net, realtime } = await connected(t);
    const subscription = realtime.subscribe("room", () => {}, { onMembers });
    net.socket.push(subscribed("room", "e.0.t"));
    assert.deepEqual([subscription.members, onMembers.calls], [[], []]);
  });
});

describe("grants", () => {
  const EXPIRED = { type: "error", code: "grant_expired", message: "expired" };
  const numbered = () => {
    let count = 0;
    return () => `grant-${++count}`;
  };

  test("given as text go into connect", async (t) => {
    const { net } = await connected(t, undefined, { grant: "text" });
    assert.equal(net.socket.sent[0].grant, "text");
  });

  test("given as a function are asked for before every connect", async (t) => {
    const next = numbered();
    const { net } = await connected(t, undefined, { grant: async () => next() });
    assert.equal(net.socket.sent[0].grant, "grant-1");
    await lostAndFound(net);
    assert.equal(net.socket.sent[0].grant, "grant-2");
  });

  test("that are none are left out", async (t) => {
    const { net } = await connected(t, undefined, { grant: () => null });
    assert.deepEqual(net.socket.sent, [{ type: "connect", channels: {} }]);
  });

  for (const [kind, grant] of [
    [
      "throws",
      () => {
        throw new Error("offline");
      },
    ],
    [
      "rejects",
      async () => {
        throw new Error("offline");
      },
    ],
    [
      "rejects with no Error",
      async () => {
        throw "offline";
      },
    ],
  ]) {
    test(`whose function ${kind} are an error, and asked for again with back-off`, async (t) => {
      let calls = 0;
      const onError = spy();
      const net = script(t);
      const realtime = connect("ws://server", { WebSocket: net.WebSocket, grant: () => (calls++, grant()) });
      realtime.on("error", onError);
      t.after(() => realtime.close());
      await settled();
      assert.deepEqual(
        onError.calls.map(([error]) => error.message),
        ["offline"],
      );
      assert.deepEqual([realtime.state, calls], ["waiting", 1]);
      await net.pass(backoff(0, JITTER));
      assert.deepEqual([realtime.state, calls], ["waiting", 2]);
      await net.pass(backoff(1, JITTER) - 0.001);
      assert.equal(calls, 2);
      assert.equal(net.sockets.length, 0);
    });
  }

  test("that never come are given up, and come too late", async (t) => {
    const answers = [];
    const { net, realtime } = await opened(t, { grant: () => new Promise((resolve) => answers.push(resolve)) });
    await net.pass(10);
    assert.equal(realtime.state, "waiting");
    await net.pass(FIRST_DELAY_SECONDS);
    answers[0]("late");
    await settled();
    assert.equal(net.sockets.length, 0);
    answers[1]("fresh");
    await settled();
    net.socket.accept();
    assert.equal(net.socket.sent[0].grant, "fresh");
  });

  test("that fail too late are nobody's error", async (t) => {
    const failures = [];
    const { net, realtime } = await opened(t, { grant: () => new Promise((_, reject) => failures.push(reject)) });
    const onError = spy();
    realtime.on("error", onError);
    await net.pass(10);
    await net.pass(FIRST_DELAY_SECONDS);
    failures[0](new Error("late"));
    await settled();
    assert.deepEqual([realtime.state, onError.calls], ["connecting", []]);
  });

  test("that come after close open nothing", async (t) => {
    let answer;
    const { net, realtime } = await opened(t, { grant: () => new Promise((resolve) => (answer = resolve)) });
    realtime.close();
    answer("late");
    await settled();
    assert.deepEqual(net.sockets, []);
  });

  test("that expire on a live connection are renewed by the function", async (t) => {
    const { net, realtime } = await connected(t, undefined, { grant: numbered() });
    const onError = spy();
    realtime.on("error", onError);
    net.socket.push(EXPIRED);
    await settled();
    assert.deepEqual(net.socket.sent.slice(1), [{ type: "grant", grant: "grant-2" }]);
    net.socket.push({ type: "ping" }, EXPIRED);
    await settled();
    assert.deepEqual(net.socket.sent.at(-1), { type: "grant", grant: "grant-3" });
    assert.deepEqual(onError.calls, []);
  });

  test("that expire are waited for by what is subscribed meanwhile, and asked for once", async (t) => {
    const answers = [];
    const grant = () => new Promise((resolve) => answers.push(resolve));
    const { net, realtime } = await opened(t, { grant });
    answers[0]("grant-1");
    await settled();
    net.socket.accept();
    net.socket.push(CONNECTED, EXPIRED);
    await settled();
    const onError = spy();
    realtime.on("error", onError);
    for (const name of ["a", "b"]) {
      realtime.subscribe(name, spy(), { onError, position: "e.1.t" });
      net.socket.push({ ...EXPIRED, channel: name });
    }
    const fetched = realtime.fetch("http://server/");
    fetched.catch(() => {});
    await until(() => net.socket.sent.at(-1).type === "request");
    const { length } = net.socket.sent;
    answers[1]("grant-2");
    await settled();
    const asked = ["a", "b"].map((channel) => ({ type: "subscribe", channel, position: "e.1.t" }));
    assert.deepEqual(net.socket.sent.slice(length), [{ type: "grant", grant: "grant-2" }, ...asked]);
    net.socket.push(subscribed("a", "e.1.t", true), subscribed("b", "e.1.t", true));
    await net.pass(20);
    assert.deepEqual([net.socket.sent.length, answers.length, onError.calls], [length + 3, 2, []]);
  });

  test("that came after a refusal was under way are asked with again, with back-off, or by the next socket", async (t) => {
    const onError = spy();
    const { net, realtime } = await connected(t, (realtime) => realtime.subscribe("a", spy(), { onError }), {
      grant: numbered(),
    });
    realtime.on("error", onError);
    net.socket.push(EXPIRED);
    await settled();
    const { length } = net.socket.sent;
    for (const attempt of [0, 1]) {
      net.socket.push({ ...EXPIRED, channel: "a" });
      await net.pass(backoff(attempt, JITTER) - 0.001);
      assert.equal(net.socket.sent.length, length + attempt);
      await net.pass(0.001);
      assert.deepEqual(net.socket.sent.at(-1), { type: "subscribe", channel: "a" });
    }
    net.socket.push({ ...EXPIRED, channel: "a" });
    await lostAndFound(net);
    assert.deepEqual([net.socket.sent[0].grant, net.socket.sent[0].channels], ["grant-3", { a: null }]);
    net.socket.push(EXPIRED);
    await settled();
    assert.deepEqual(net.socket.sent.at(-1), { type: "grant", grant: "grant-4" });
    assert.deepEqual(onError.calls, []);
  });

  test("that are renewed by an expired one again are an error, not asked for in a loop", async (t) => {
    const { net, realtime } = await connected(t, undefined, { grant: () => "stale" });
    const onError = spy();
    realtime.on("error", onError);
    for (let times = 0; times < 3; times++) {
      net.socket.push(EXPIRED);
      await settled();
    }
    assert.equal(net.socket.sent.length, 2);
    assert.deepEqual(
      onError.calls.map(([error]) => error.code),
      ["grant_expired", "grant_expired"],
    );
  });

  test("that cannot be renewed on a live connection are an error, and it reconnects with back-off", async (t) => {
    let isOnline = true;
    const grant = async () => {
      if (!isOnline) throw new Error("offline");
      return "text";
    };
    const { net, realtime } = await opened(t, { grant });
    const onError = spy();
    realtime.on("error", onError);
    net.socket.accept();
    net.socket.push(CONNECTED);
    isOnline = false;
    net.socket.push(EXPIRED);
    await settled();
    assert.deepEqual(
      onError.calls.map(([error]) => error.message),
      ["offline"],
    );
    isOnline = true;
    await net.pass(FIRST_DELAY_SECONDS);
    net.socket.accept();
    assert.deepEqual([net.socket.sent[0].grant, net.socket.sent[0].resume], ["text", "token-1"]);
  });

  test("given as text that expire are an error", async (t) => {
    const { net, realtime } = await connected(t, undefined, { grant: "text" });
    const onError = spy();
    realtime.on("error", onError);
    net.socket.push(EXPIRED);
    assert.deepEqual(
      onError.calls.map(([error]) => error.code),
      ["grant_expired"],
    );
    net.socket.end(3501, "expired");
    assert.equal(realtime.state, "closed");
  });

  for (const how of ["close", "disconnect"]) {
    test(`that expired, told by ${how}, are asked for anew by a function, with back-off`, async (t) => {
      const { net, realtime } = await connected(t, undefined, { grant: numbered() });
      const expire = () =>
        how === "close"
          ? net.socket.end(3501)
          : net.socket.push({ type: "disconnect", code: 3501, reason: "expired", retry: null });
      for (const attempt of [0, 1, 2]) {
        const { length } = net.sockets;
        expire();
        assert.equal(realtime.state, "waiting");
        await net.pass(backoff(attempt, JITTER) - 0.001);
        assert.equal(net.sockets.length, length);
        await net.pass(0.001);
        net.socket.accept();
        assert.equal(net.socket.sent[0].grant, `grant-${attempt + 2}`);
      }
    });
  }
});

test("a socket that cannot even be made is an error, and tried again with back-off", async (t) => {
  const net = script(t);
  const WebSocket = class {
    constructor() {
      throw new Error("mixed content");
    }
  };
  const realtime = connect("ws://server", { WebSocket, transports: ["websocket"] });
  t.after(() => realtime.close());
  const onError = spy();
  realtime.on("error", onError);
  await settled();
  assert.equal(realtime.state, "waiting");
  await net.pass(FIRST_DELAY_SECONDS);
  assert.deepEqual(
    onError.calls.map(([error]) => error.message),
    ["mixed content", "mixed content"],
  );
});

test("the module touches nothing global", async () => {
  const before = Reflect.ownKeys(globalThis);
  await import("../../src/pubsub_mw/static/client.js?again");
  assert.deepEqual(Reflect.ownKeys(globalThis), before);
});
