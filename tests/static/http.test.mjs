/** The client without a WebSocket, against a scripted `fetch`: what it asks for, in which order, and when it gives up. */

import assert from "node:assert/strict";
import { describe, test } from "node:test";

import { connect } from "../../src/pubsub_mw/static/client.js";
import { CONNECTED, JITTER, message, script, settled, spy, subscribed, until } from "./scripted_websocket.mjs";

const OWN = "#connection-c1";
const RESTART_SECONDS = 0.05;

/** Take the place of the network. Each request waits in `asked` until the test answers it. */
function network(t) {
  const asked = [];
  t.mock.method(globalThis, "fetch", (url, init) => {
    return new Promise((resolve, reject) => {
      init.signal.addEventListener("abort", () => reject(init.signal.reason));
      const { pathname, searchParams: query } = new URL(url);
      const request = { path: pathname, query, token: init.headers.get("authorization"), isAborted: () => init.signal.aborted };
      if (init.body) request.frames = JSON.parse(init.body).frames;
      request.answer = (content, status = 200) => resolve(new Response(JSON.stringify(content), { status }));
      request.fail = () => reject(new TypeError("network"));
      request.stream = () => {
        let push;
        const body = new ReadableStream({ start: (controller) => (push = (text) => controller.enqueue(text)) });
        resolve(new Response(body.pipeThrough(new TextEncoderStream())));
        return push;
      };
      asked.push(request);
    });
  });
  return asked;
}

/** Start a client by one transport. Its greeting is answered, and it has asked for what there is to hear. */
async function greeted(t, transport, prepare = () => {}, options = {}) {
  const clock = script(t);
  const asked = network(t);
  const realtime = connect("http://server/realtime", { transports: [transport], ...options });
  t.after(() => realtime.close());
  prepare(realtime);
  await until(() => asked.length);
  const [greeting] = asked;
  assert.deepEqual([greeting.path, greeting.token], ["/realtime/send", null]);
  greeting.answer({ frames: [{ ...CONNECTED, ticket: "x" }] });
  await until(() => asked.length > 1);
  return { clock, asked, realtime, reading: asked[1], greeting };
}

const events = (...frames) => frames.map((frame) => `data: ${JSON.stringify(frame)}\nid: x\n\n`).join("");

describe("a stream", () => {
  test("is asked for with every channel and position, and is what connects", async (t) => {
    const callback = spy();
    const { realtime, reading, greeting } = await greeted(t, "sse", (realtime) => {
      realtime.subscribe("room:1", callback, { position: "e.1.t" });
      realtime.subscribe("b", callback);
    });
    assert.deepEqual(greeting.frames, [{ type: "connect" }]);
    assert.deepEqual([reading.path, reading.token], ["/realtime/events", "Bearer token-1"]);
    assert.deepEqual(reading.query.getAll("channel"), ["room:1", "b"]);
    assert.deepEqual(reading.query.getAll("position"), ["e.1.t", ""]);
    assert.equal(realtime.state, "connecting");
    const push = reading.stream();
    const text = ":  \n\nretry: 1\n\n" + events(CONNECTED, subscribed("room:1", "e.1.t", true), message("room:1", "e.2.t", "\u2028"));
    for (const character of text) push(character);
    await until(() => callback.calls.length);
    assert.equal(callback.calls[0][0], "\u2028");
    assert.deepEqual([realtime.state, realtime.transport], ["connected", "sse"]);
  });

  test("is opened anew once for several new channels, from where it was", async (t) => {
    const { clock, asked, realtime, reading } = await greeted(t, "sse", (realtime) => realtime.subscribe("a", spy()));
    reading.stream()(events(CONNECTED, subscribed("a", "e.0.t"), message("a", "e.1.t")));
    await until(() => realtime.state === "connected");
    await settled();
    realtime.subscribe("b", spy());
    realtime.subscribe("c", spy());
    await clock.pass(RESTART_SECONDS);
    await until(() => asked.length > 2);
    assert.ok(reading.isAborted());
    assert.deepEqual(asked[2].query.getAll("channel"), ["a", "b", "c"]);
    assert.deepEqual(asked[2].query.getAll("position"), ["e.1.t", "", ""]);
    assert.equal(asked.length, 3);
  });

  test("is opened anew for what changed while the grant was renewed, with the fresh one", async (t) => {
    const answers = [];
    let calls = 0;
    const grant = () => (calls++ ? new Promise((resolve) => answers.push(resolve)) : "first");
    const listen = (realtime) => ["a", "b"].forEach((name) => realtime.subscribe(name, spy()));
    const { clock, asked, realtime, reading } = await greeted(t, "sse", listen, { grant });
    const expired = { type: "error", code: "grant_expired", message: "" };
    reading.stream()(events(CONNECTED, subscribed("a", "e.0.t"), subscribed("b", "e.0.t"), expired));
    await until(() => answers.length);
    realtime.subscribe("c", spy());
    realtime.unsubscribe("b");
    await clock.pass(1);
    assert.deepEqual([asked.length, reading.isAborted()], [2, false]);
    answers[0]("fresh");
    await until(() => asked.length > 2);
    assert.deepEqual(asked[2].frames, [{ type: "grant", grant: "fresh" }]);
    await clock.pass(1);
    assert.deepEqual([asked.length, reading.isAborted()], [3, false]);
    asked[2].answer({ frames: [{ type: "accepted", resume: "token-2" }] });
    await settled();
    await settled();
    await clock.pass(RESTART_SECONDS);
    await until(() => asked.length > 3);
    assert.deepEqual([asked[3].path, asked[3].token], ["/realtime/events", "Bearer token-2"]);
    assert.deepEqual(asked[3].query.getAll("channel"), ["a", "c"]);
    assert.equal(calls, 2);
  });

  test("that refuses a channel for an expired grant is opened anew with it", async (t) => {
    const onError = spy();
    const { clock, asked, realtime, reading } = await greeted(t, "sse", (realtime) => {
      realtime.subscribe("a", spy(), { onError });
    });
    reading.stream()(events(CONNECTED, { type: "error", code: "grant_expired", message: "", channel: "a" }));
    await until(() => realtime.state === "connected");
    await settled();
    await clock.pass(0.5 * JITTER);
    await clock.pass(RESTART_SECONDS);
    await until(() => asked.length > 2);
    assert.deepEqual([asked[2].query.getAll("channel"), onError.calls], [["a"], []]);
  });

  test("that ends without a word is a reconnect", async (t) => {
    const { clock, asked, realtime, reading } = await greeted(t, "sse");
    reading.answer({}, 503);
    await until(() => realtime.state === "waiting");
    await clock.pass(0.5 * JITTER);
    await until(() => asked.length > 2);
    assert.deepEqual(asked[2].frames, [{ type: "connect", resume: "token-1" }]);
  });

  test("that is held back is given up as soon after a reconnect as at first", async (t) => {
    const { clock, asked, realtime, reading } = await greeted(t, "sse");
    reading.stream()(events(CONNECTED));
    await until(() => realtime.state === "connected");
    await clock.pass(33);
    assert.equal(realtime.state, "waiting");
    await clock.pass(0.5 * JITTER);
    await until(() => asked.length > 2);
    asked[2].answer({ frames: [CONNECTED] });
    await until(() => asked.length > 3);
    asked[3].stream();
    await clock.pass(10);
    assert.ok(asked[3].isAborted());
  });
});

describe("a poll", () => {
  test("follows the other, with the cursor, and is a sign of life", async (t) => {
    const callback = spy();
    const { asked, realtime, reading } = await greeted(t, "longpoll", (realtime) => realtime.subscribe("a", callback));
    assert.deepEqual([realtime.state, reading.path, reading.query.get("wait")], ["connected", "/realtime/poll", "25"]);
    reading.answer({ frames: [subscribed("a", "e.0.t"), message("a", "e.1.t")], cursor: "so far" });
    await until(() => asked.length > 2);
    assert.equal(callback.calls.length, 1);
    const { query } = asked[2];
    assert.deepEqual([query.get("cursor"), query.get("channel"), query.get("position")], ["so far", "a", null]);
  });

  test("for a channel that the cursor may not know begins where the page is", async (t) => {
    const callback = spy();
    const { clock, asked, realtime, reading } = await greeted(t, "longpoll");
    realtime.subscribe("a", callback, { position: "e.1.t" });
    reading.answer({ frames: [], cursor: "without it" });
    await until(() => asked.length > 2);
    assert.deepEqual(asked[2].query.getAll("channel"), []);
    await clock.pass(RESTART_SECONDS);
    await until(() => asked.length > 3);
    assert.deepEqual([asked[3].query.get("cursor"), asked[3].query.get("position")], [null, "e.1.t"]);
    const unavailable = { type: "error", channel: "a", code: "unavailable", message: "" };
    asked[3].answer({ frames: [unavailable], cursor: "without it" });
    await until(() => asked.length > 4);
    asked[4].answer({ frames: [subscribed("a", "e.3.t")], cursor: "with it" });
    await until(() => asked.length > 5);
    await clock.pass(1);
    await until(() => asked.length > 6);
    assert.equal(asked.at(-1).query.get("position"), "e.1.t");
  });

  test("names no channel again that was refused", async (t) => {
    const onError = spy();
    const { clock, asked, reading } = await greeted(t, "longpoll", (realtime) => {
      realtime.subscribe("a", spy());
      realtime.subscribe("presence-b", spy(), { onError });
    });
    const busy = { type: "error", channel: "presence-b", code: "busy", message: "" };
    reading.answer({ frames: [subscribed("a", "e.1.t"), busy], cursor: "" });
    await until(() => onError.calls.length);
    await clock.pass(RESTART_SECONDS);
    await until(() => asked.length > 3);
    assert.deepEqual(asked[3].query.getAll("channel"), ["a"]);
  });

  test("waits for the fresh grant, for which the function is called once", async (t) => {
    const answers = [];
    let calls = 0;
    const grant = () => (calls++ ? new Promise((resolve) => answers.push(resolve)) : "first");
    const callback = spy();
    const listen = (realtime) => realtime.subscribe("a", callback);
    const { clock, asked, realtime, reading } = await greeted(t, "longpoll", listen, { grant });
    const expired = { type: "error", code: "grant_expired", message: "" };
    reading.answer({ frames: [subscribed("a", "e.0.t"), message("a", "e.1.t"), expired], cursor: "so far" });
    await until(() => answers.length);
    realtime.subscribe("b", spy());
    await clock.pass(1);
    assert.equal(asked.length, 2);
    answers[0]("fresh");
    await until(() => asked.length > 2);
    await clock.pass(1);
    assert.deepEqual([asked.length, asked[2].frames], [3, [{ type: "grant", grant: "fresh" }]]);
    asked[2].answer({ frames: [{ type: "accepted", resume: "token-2" }] });
    await until(() => asked.length > 3);
    await clock.pass(1);
    assert.deepEqual([asked.length, asked[3].path, asked[3].token], [4, "/realtime/poll", "Bearer token-2"]);
    assert.deepEqual(asked[3].query.getAll("channel"), ["a", "b"]);
    assert.deepEqual(asked[3].query.getAll("position"), ["e.1.t", ""]);
    assert.deepEqual([calls, realtime.state, callback.calls.length], [2, "connected", 1]);
  });

  test("whose url is too long for a proxy is told, by a short message", async (t) => {
    const onError = spy();
    const { realtime, reading } = await greeted(t, "longpoll", (realtime) => realtime.subscribe("a", spy()));
    realtime.on("error", onError);
    reading.answer({}, 414);
    await until(() => realtime.state === "waiting");
    const [[{ code, message }]] = onError.calls;
    assert.deepEqual([code, message], [414, "poll: 414"]);
  });

  test("that is cut waits half as long the next time, and at last gives up", async (t) => {
    const { asked, realtime } = await greeted(t, "longpoll");
    for (const seconds of ["25", "12.5", "6.25", "3.125", "1.5625"]) {
      await until(() => asked.at(-1).query?.get("wait") === seconds);
      assert.equal(realtime.state, "connected");
      asked.at(-1).fail();
    }
    await until(() => realtime.state === "waiting");
  });
});

describe("what is sent by POST", () => {
  const paths = (request) => request.frames.map(({ path }) => path);

  test("goes in the order of the calls, what waits together", async (t) => {
    const { asked, realtime } = await greeted(t, "longpoll");
    const all = ["/1", "/2", "/3"].map((path) => realtime.fetch(path));
    for (const fetched of all) fetched.catch(() => {});
    await until(() => asked.length > 2);
    assert.deepEqual([paths(asked[2]), asked[2].token], [["/1"], "Bearer token-1"]);
    await settled();
    asked[2].answer({ frames: [{ type: "accepted", id: "1" }] });
    await until(() => asked.length > 3);
    assert.deepEqual(paths(asked[3]), ["/2", "/3"]);
    const answer = { type: "response", id: "2", status: 200, headers: {}, body: "again", position: "e.7.t" };
    asked[3].answer({ frames: [answer, { type: "error", id: "3", code: "busy", message: "no" }] });
    assert.equal(await (await all[1]).text(), "again");
    await assert.rejects(all[2], { code: "busy" });
  });

  test("and waited for the greeting goes once, after it", async (t) => {
    const all = [];
    const { asked } = await greeted(t, "longpoll", (realtime) => {
      for (const path of ["/1", "/2", "/3"]) all.push(realtime.fetch(path));
      for (const fetched of all) fetched.catch(() => {});
    });
    const sent = () => asked.slice(1).filter(({ frames }) => frames);
    await until(() => sent().length);
    await settled();
    assert.deepEqual(sent().map(paths), [["/1", "/2", "/3"]]);
    sent()[0].answer({ frames: [{ type: "response", id: "1", status: 200, headers: {}, body: "", position: "e.1.t" }] });
    await all[0];
    await settled();
    assert.equal(sent().length, 1);
  });

  test("for what is told of what was too much goes once", async (t) => {
    const { asked, realtime, reading } = await greeted(t, "longpoll", () => {}, { grant: () => "text" });
    const abort = new AbortController();
    realtime.on("error", () => abort.abort());
    const fetched = assert.rejects(realtime.fetch("/1", { signal: abort.signal }), { name: "AbortError" });
    await until(() => asked.length > 2);
    asked[2].answer({ frames: [{ type: "accepted", id: "1" }] });
    reading.answer({ frames: [{ type: "error", code: "grant_expired", message: "" }], cursor: "" });
    await until(() => asked.length > 3);
    asked.find(({ frames }) => frames?.[0].type === "grant").answer({}, 413);
    await fetched;
    await settled();
    assert.equal(asked.filter(({ frames }) => frames?.[0].type === "cancel").length, 1);
  });

  test("and answered there is out of its place, and moves no position", async (t) => {
    const { clock, asked, realtime } = await greeted(t, "longpoll");
    const fetched = realtime.fetch("/1");
    await until(() => asked.length > 2);
    asked[2].answer({ frames: [{ type: "response", id: "1", status: 200, headers: {}, body: "", position: "e.7.t" }] });
    await fetched;
    realtime.subscribe("a", spy());
    await clock.pass(RESTART_SECONDS);
    await until(() => asked.length > 3);
    assert.ok(!asked[3].query.getAll("channel").includes(OWN));
  });

  test("is sent one by one if it is too much together, and refused if it is too much alone", async (t) => {
    const { asked, realtime } = await greeted(t, "longpoll");
    const all = ["/1", "/2", "/3"].map((path) => realtime.fetch(path));
    for (const fetched of all) fetched.catch(() => {});
    await until(() => asked.length > 2);
    asked[2].answer({ frames: [] });
    await until(() => asked.length > 3);
    asked[3].answer({}, 413);
    await until(() => asked.length > 4);
    assert.deepEqual(paths(asked[4]), ["/2"]);
    asked[4].answer({}, 413);
    await assert.rejects(all[1], { code: "too_large" });
    await until(() => asked.length > 5);
    assert.deepEqual(paths(asked[5]), ["/3"]);
    assert.equal(realtime.state, "connected");
  });

  for (const [code, closeCode] of [["grant_invalid", 3500], ["grant_expired", 3501], ["revoked", 3503]]) {
    test(`and refused as ${code} at the greeting is the end`, async (t) => {
      const onError = spy();
      script(t);
      const asked = network(t);
      const realtime = connect("http://server/realtime", { transports: ["sse"], grant: "text" });
      realtime.on("error", onError);
      await until(() => asked.length);
      asked[0].answer({ frames: [{ type: "error", code, message: "no" }] });
      await until(() => realtime.state === "closed");
      assert.equal(onError.calls[0][0].code, closeCode);
    });
  }

  test("and not to be stored now is tried again, by the same transport", async (t) => {
    const clock = script(t);
    const asked = network(t);
    const realtime = connect("http://server/realtime", { transports: ["sse", "longpoll"] });
    t.after(() => realtime.close());
    await until(() => asked.length);
    asked[0].answer({ frames: [{ type: "error", code: "unavailable", message: "later" }] });
    await until(() => realtime.state === "waiting");
    await clock.pass(0.5 * JITTER);
    await until(() => asked.length > 1);
    asked[1].answer({ frames: [CONNECTED] });
    await until(() => asked.length > 2);
    assert.equal(asked[2].path, "/realtime/events");
  });

  test("is over with the client", async (t) => {
    const { asked, realtime, reading } = await greeted(t, "longpoll");
    realtime.fetch("/1").catch(() => {});
    await until(() => asked.length > 2);
    realtime.close();
    assert.ok(reading.isAborted() && asked[2].isAborted());
  });
});

describe("the ladder", () => {
  test("goes down when a transport does not come about, around, and is remembered", async (t) => {
    const values = new Map();
    globalThis.sessionStorage = { getItem: (key) => values.get(key) ?? null, setItem: (key, value) => values.set(key, value) };
    t.after(() => delete globalThis.sessionStorage);
    const clock = script(t);
    const asked = network(t);
    const realtime = connect("http://server/realtime", { WebSocket: clock.WebSocket });
    await settled();
    clock.socket.end();
    await clock.pass(0.5 * JITTER);
    await until(() => asked.length);
    asked[0].answer({ frames: [CONNECTED] });
    await until(() => asked.length > 1);
    assert.equal(asked[1].path, "/realtime/events");
    asked[1].fail();
    await until(() => realtime.state === "waiting");
    await clock.pass(1 * JITTER);
    await until(() => asked.length > 2);
    asked[2].answer({ frames: [CONNECTED] });
    await until(() => asked.length > 3);
    assert.deepEqual([asked[3].path, realtime.transport], ["/realtime/poll", "longpoll"]);
    realtime.close();
    const next = connect("http://server/realtime", { WebSocket: clock.WebSocket });
    t.after(() => next.close());
    await until(() => asked.length > 4);
    assert.equal(clock.sockets.length, 1);
  });

  test("is climbed by a WebSocket that opens beside what there is", async (t) => {
    const { clock, realtime, reading } = await (async () => {
      const clock = script(t);
      const asked = network(t);
      const realtime = connect("http://server/realtime", { WebSocket: clock.WebSocket, transports: ["websocket", "sse"] });
      t.after(() => realtime.close());
      await settled();
      clock.socket.end();
      await clock.pass(0.5 * JITTER);
      await until(() => asked.length);
      asked[0].answer({ frames: [CONNECTED] });
      await until(() => asked.length > 1);
      return { clock, realtime, reading: asked[1] };
    })();
    const push = reading.stream();
    push(events(CONNECTED, { type: "ping" }));
    await until(() => realtime.state === "connected");
    await clock.pass(20);
    assert.equal(clock.sockets.length, 2);
    clock.socket.end();
    assert.equal(realtime.state, "connected");
    push(events({ type: "ping" }));
    await settled();
    await clock.pass(30);
    push(events({ type: "ping" }));
    await settled();
    await clock.pass(10);
    assert.equal(clock.sockets.length, 3);
    clock.socket.accept();
    await settled();
    clock.socket.accept();
    clock.socket.push(CONNECTED);
    assert.deepEqual([realtime.state, realtime.transport, reading.isAborted()], ["connected", "websocket", true]);
  });
});
