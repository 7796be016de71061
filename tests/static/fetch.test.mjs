/** Requests through the connection, against a scripted server: what goes out, what comes back, and what fails how. */

import assert from "node:assert/strict";
import { describe, test } from "node:test";

import { backoff } from "../../src/pubsub_mw/static/client.js";
import {
  CONNECTED,
  connected,
  JITTER,
  lostAndFound,
  message,
  opened,
  settled,
  spy,
  subscribed,
  until,
} from "./scripted_websocket.mjs";

const LOST = { name: "TypeError", code: "connection_lost" };
const NOT_CONNECTED = { name: "TypeError", code: "not_connected" };
const OWN = "#connection-c1";

let offset = 0;
/** A part of the answer to request `id`, at the next position of the connection's own channel. */
const part = (type, id, fields) => ({ type, id, position: `e.${++offset}.t`, ...fields });
const response = (id, body = "", fields = {}) => part("response", id, { status: 200, headers: {}, body, ...fields });
const start = (id, status = 200) => part("response_start", id, { status, headers: { "content-type": "text/plain" } });
const chunk = (id, body, fields) => part("response_chunk", id, { body, ...fields });
const end = (id, error) => part("response_end", id, error && { error });
const refusal = (id, code) => ({ type: "error", code, message: `no: ${code}`, id });

const requests = (net) => net.socket.sent.filter((frame) => frame.type === "request");
const cancels = (net) => net.socket.sent.filter((frame) => frame.type === "cancel");
const ids = (net) => requests(net).map(({ id }) => id);

/** Start a request, and wait until it is sent. An unhandled rejection fails a test, so the promise is held here. */
async function fetching(t, net, realtime, input = "/path", init = undefined) {
  const count = requests(net).length;
  const promise = realtime.fetch(input, init);
  promise.catch(() => {});
  await until(() => requests(net).length > count);
  return { promise, frame: requests(net).at(-1) };
}

/** Be connected, with one request on its way. */
async function asking(t, input, init) {
  const { net, realtime } = await connected(t);
  return { net, realtime, ...(await fetching(t, net, realtime, input, init)) };
}

/** Be connected, with a response that has begun. */
async function streaming(t, init) {
  const made = await asking(t, "/stream", init);
  const { id } = made.frame;
  made.net.socket.push(start(id), chunk(id, "one "));
  const answer = await made.promise;
  const reader = answer.body.getReader();
  const read = async () => new TextDecoder().decode((await reader.read()).value);
  assert.equal(await read(), "one ");
  return { ...made, id, answer, reader, read };
}

/** What one request looks like on the wire. */
async function sent(t, input, init) {
  const { frame } = await asking(t, input, init);
  const { type, id, ...fields } = frame;
  assert.equal(type, "request");
  assert.match(id, /^[A-Za-z0-9_.:-]{1,64}$/);
  return fields;
}

describe("a request", () => {
  for (const input of ["/a/b?c=d%20e#f", new URL("http://server/a/b?c=d%20e"), new Request("http://server/a/b?c=d e")]) {
    test(`for ${input.constructor.name} is its path and query`, async (t) => {
      assert.deepEqual(await sent(t, input), { method: "GET", path: "/a/b?c=d%20e", headers: {}, body: "" });
    });
  }

  const put = () => new Request("http://server/a", { method: "PUT", headers: { "If-Match": "x" }, body: "text" });

  test("takes method, headers and body from a Request", async (t) => {
    const headers = { "content-type": "text/plain;charset=UTF-8", "if-match": "x" };
    assert.deepEqual(await sent(t, put()), { method: "PUT", path: "/a", headers, body: "text" });
  });

  test("takes what its init says rather than what its Request says", async (t) => {
    const own = { method: "PATCH", headers: { prefer: "y" } };
    assert.deepEqual(await sent(t, put(), own), { path: "/a", body: "text", ...own });
  });

  test("with json posts it, with its content type", async (t) => {
    const headers = { "content-type": "application/json" };
    const expected = { method: "POST", path: "/path", headers, body: '{"text":"hé"}' };
    assert.deepEqual(await sent(t, "/path", { json: { text: "hé" } }), expected);
  });

  test("with json may name another method and content type", async (t) => {
    const own = { method: "PUT", headers: { "content-type": "application/ld+json" } };
    assert.deepEqual(await sent(t, "/path", { json: null, ...own }), { path: "/path", body: "null", ...own });
  });

  test("with json keeps the method of its Request, unless that has none for a body", async (t) => {
    const { net, realtime } = await connected(t);
    const methods = [];
    for (const method of ["PUT", "PATCH", "POST", "GET"]) {
      const input = new Request("http://server/a", { method });
      methods.push((await fetching(t, net, realtime, input, { json: 1 })).frame.method);
    }
    assert.deepEqual(methods, ["PUT", "PATCH", "POST", "POST"]);
  });

  test("with undefined as json has none", async (t) => {
    const { method, body } = await sent(t, "/path", { json: undefined });
    assert.deepEqual([method, body], ["GET", ""]);
  });

  const BYTES = [0xff, 0x00, 0x3e];
  const BASE64 = "/wA+";
  for (const [kind, body, expected, type] of [
    ["a string", "a\u0000é€𝄞", { body: "a\u0000é€𝄞" }, "text/plain;charset=UTF-8"],
    ["URLSearchParams", new URLSearchParams({ a: "b c" }), { body: "a=b+c" }, "application/x-www-form-urlencoded"],
    ["a Blob of text", new Blob(["text"], { type: "text/csv" }), { body: "text" }, "text/csv"],
    ["a Blob of bytes", new Blob([new Uint8Array(BYTES)]), { body: BASE64, encoding: "base64" }, undefined],
    ["an ArrayBuffer", new Uint8Array(BYTES).buffer, { body: BASE64, encoding: "base64" }, undefined],
    ["a view", new Uint8Array([1, ...BYTES, 2]).subarray(1, 4), { body: BASE64, encoding: "base64" }, undefined],
    ["text with a byte order mark", "\ufefftext", { body: "\ufefftext" }, "text/plain;charset=UTF-8"],
  ]) {
    test(`carries ${kind} as the platform encodes it`, async (t) => {
      const { headers, method, path, ...content } = await sent(t, "/path", { method: "POST", body });
      assert.deepEqual([method, path], ["POST", "/path"]);
      assert.deepEqual(content, expected);
      assert.equal(headers["content-type"]?.split(";charset=UTF-8")[0], type?.split(";charset=UTF-8")[0]);
    });
  }

  test("carries a form with its files, as multipart with its boundary", async (t) => {
    const form = new FormData();
    form.set("name", "ann");
    form.set("file", new Blob(["text"], { type: "text/csv" }), "a.csv");
    const { headers, body } = await sent(t, "/path", { method: "POST", body: form });
    const back = await new Response(body, { headers }).formData();
    assert.equal(back.get("name"), "ann");
    assert.deepEqual([back.get("file").name, await back.get("file").text()], ["a.csv", "text"]);
  });

  test("has an id of its own", async (t) => {
    const { net, realtime } = await asking(t);
    await fetching(t, net, realtime);
    assert.equal(new Set(ids(net)).size, 2);
  });

  test("goes out in the order of the calls, however long their bodies take to read", async (t) => {
    const { net, realtime } = await connected(t);
    let finish;
    const slow = new ReadableStream({ start: (controller) => (finish = () => controller.close()) });
    const slowly = { method: "POST", body: slow, duplex: "half" };
    for (const [path, init] of [["/1", slowly], ["/2"], ["/3", { json: 3 }]]) realtime.fetch(path, init).catch(() => {});
    await settled();
    assert.deepEqual(requests(net), []);
    finish();
    await until(() => requests(net).length === 3);
    assert.deepEqual(
      requests(net).map(({ path }) => path),
      ["/1", "/2", "/3"],
    );
  });

  test("whose body cannot be read is rejected, and does not hold up the next", async (t) => {
    const { net, realtime } = await connected(t);
    const broken = new ReadableStream({ start: (controller) => controller.error(new Error("disk")) });
    const refused = assert.rejects(realtime.fetch("/1", { method: "POST", body: broken, duplex: "half" }), /disk/);
    const { frame } = await fetching(t, net, realtime, "/2");
    await refused;
    assert.equal(frame.path, "/2");
  });

  test("whose body never ends does not hold up the next once it is aborted", async (t) => {
    const { net, realtime } = await connected(t);
    const abort = new AbortController();
    const endless = { method: "POST", body: new ReadableStream(), duplex: "half", signal: abort.signal };
    const aborted = assert.rejects(realtime.fetch("/1", endless), { name: "AbortError" });
    realtime.fetch("/2").catch(() => {});
    await settled();
    abort.abort();
    await aborted;
    await until(() => requests(net).length);
    assert.deepEqual(requests(net)[0].path, "/2");
  });

  for (const input of ["https://other.test/a", "//other.test/a", "http://server:81/a", "https://server/a"]) {
    test(`for ${input}, of another origin, is refused`, async (t) => {
      const { net, realtime } = await connected(t);
      await assert.rejects(realtime.fetch(input), { name: "TypeError", message: /window\.fetch/ });
      assert.deepEqual(requests(net), []);
    });
  }

  test("is relative to the page", async (t) => {
    globalThis.document = { baseURI: "http://server/rooms/42/" };
    t.after(() => delete globalThis.document);
    assert.equal((await sent(t, "messages")).path, "/rooms/42/messages");
  });

  for (const [why, input, init] of [
    ["a GET with a body", "/a", { body: "text" }],
    ["no method", "/a", { method: "no method" }],
    ["no URL", "http://", {}],
  ]) {
    test(`that fetch would refuse, for ${why}, is refused alike`, async (t) => {
      const { realtime } = await connected(t);
      await assert.rejects(realtime.fetch(input, init), TypeError);
    });
  }

  test("larger than a frame may be is refused, and points at window.fetch", async (t) => {
    const { net, realtime } = await connected(t, undefined, { maxFrameBytes: 200 });
    const tooLarge = { name: "TypeError", code: "too_large", message: /maxFrameBytes.*window\.fetch/ };
    await assert.rejects(realtime.fetch("/a", { json: "é".repeat(70) }), tooLarge);
    const { frame } = await fetching(t, net, realtime, "/a", { json: "e".repeat(70) });
    assert.ok(JSON.stringify(frame).length <= 200);
    assert.equal(requests(net).length, 1);
  });

  test("may by default be as large as a server takes by default", async (t) => {
    const { net, realtime } = await connected(t);
    const post = (length) => ({ method: "POST", body: "x".repeat(length), headers: { "content-type": "a" } });
    const { frame } = await fetching(t, net, realtime, "/a", post(0));
    const room = 65_536 - JSON.stringify(frame).length;
    await fetching(t, net, realtime, "/a", post(room));
    await assert.rejects(realtime.fetch("/a", post(room + 1)), { code: "too_large" });
  });

  test("of bytes that is far too large is refused for that, too", async (t) => {
    const { realtime } = await connected(t);
    const body = new Uint8Array(1_000_000).fill(255);
    await assert.rejects(realtime.fetch("/a", { method: "POST", body }), { code: "too_large" });
  });
});

describe("Django's CSRF token", () => {
  const TOKEN = "AbC123";
  for (const [cookie, method, headers, expected] of [
    [`csrftoken=${TOKEN}`, "POST", {}, TOKEN],
    [`a=b; csrftoken=${TOKEN}; c=d`, "PUT", {}, TOKEN],
    [`csrftoken=${TOKEN}`, "PATCH", {}, TOKEN],
    [`csrftoken=${TOKEN}`, "DELETE", {}, TOKEN],
    [`csrftoken=${TOKEN}`, "POST", { "X-CSRFToken": "mine" }, "mine"],
    [`csrftoken=${TOKEN}`, "GET", {}, undefined],
    [`csrftoken=${TOKEN}`, "HEAD", {}, undefined],
    [`csrftoken=${TOKEN}`, "OPTIONS", {}, undefined],
    [`my-csrftoken=${TOKEN}; xcsrftoken=${TOKEN}`, "POST", {}, undefined],
    ["csrftoken=", "POST", {}, undefined],
    ["", "POST", {}, undefined],
  ]) {
    test(`of the cookies ${JSON.stringify(cookie)} goes with ${method} as ${expected}`, async (t) => {
      globalThis.document = { cookie, baseURI: "http://server/" };
      t.after(() => delete globalThis.document);
      const sentHeaders = (await sent(t, "/a", { method, headers })).headers;
      assert.equal(sentHeaders["x-csrftoken"], expected);
    });
  }
});

describe("a response", () => {
  test("is one, with status, headers and body", async (t) => {
    const { net, promise, frame } = await asking(t);
    net.socket.push(response(frame.id, '{"a":"é"}', { status: 201, headers: { "content-type": "application/json" } }));
    const answer = await promise;
    assert.ok(answer instanceof Response);
    assert.deepEqual([answer.status, answer.ok, answer.headers.get("Content-Type")], [201, true, "application/json"]);
    assert.deepEqual(await answer.json(), { a: "é" });
  });

  for (const status of [302, 400, 404, 500, 503]) {
    test(`of status ${status} is no rejection`, async (t) => {
      const { net, promise, frame } = await asking(t);
      net.socket.push(response(frame.id, "why", { status }));
      const answer = await promise;
      assert.deepEqual([answer.status, await answer.text()], [status, "why"]);
    });
  }

  for (const status of [204, 205, 304]) {
    for (const type of ["response", "response_start"]) {
      test(`of status ${status} has no body, as ${type}`, async (t) => {
        const { net, promise, frame } = await asking(t);
        net.socket.push(...(type === "response" ? [response(frame.id, "", { status })] : [start(frame.id, status)]));
        const answer = await promise;
        assert.deepEqual([answer.status, answer.body], [status, null]);
        if (type === "response_start") net.socket.push(chunk(frame.id, "nowhere"), end(frame.id));
      });
    }
  }

  test("that is empty has an empty body, and no content type of its own", async (t) => {
    const { net, promise, frame } = await asking(t);
    net.socket.push(response(frame.id));
    const answer = await promise;
    assert.deepEqual([await answer.text(), answer.headers.get("content-type")], ["", null]);
  });

  test("of bytes is those bytes", async (t) => {
    const { net, promise, frame } = await asking(t);
    net.socket.push(response(frame.id, "/wA+", { encoding: "base64" }));
    assert.deepEqual([...new Uint8Array(await (await promise).arrayBuffer())], [0xff, 0x00, 0x3e]);
  });

  test("that no Response can be is a rejection", async (t) => {
    const { net, promise, frame } = await asking(t);
    net.socket.push(response(frame.id, "", { status: 999 }));
    await assert.rejects(promise, RangeError);
  });

  test("in parts is there at its start, and its chunks as they come", async (t) => {
    const { net, id, answer, read, reader } = await streaming(t);
    assert.deepEqual([answer.status, answer.headers.get("content-type")], [200, "text/plain"]);
    const second = read();
    net.socket.push(start(id), chunk(id, "two ")); // a second start changes nothing
    assert.equal(await second, "two ");
    net.socket.push(chunk(id, "/w==", { encoding: "base64" }), chunk(id, ""), end(id));
    assert.deepEqual([...(await reader.read()).value], [0xff]);
    assert.equal((await reader.read()).done, true);
    await reader.closed;
  });

  test("in parts that breaks off is an error of the body", async (t) => {
    const { net, id, reader, read } = await streaming(t);
    const next = read();
    net.socket.push(end(id, "the application failed"));
    await assert.rejects(next, { name: "TypeError", code: "broken_off", message: "the application failed" });
    await assert.rejects(reader.closed);
  });

  test("goes to its own request, in whatever order they come", async (t) => {
    const { net, realtime, promise, frame } = await asking(t);
    const other = await fetching(t, net, realtime);
    net.socket.push(start(frame.id), start(other.frame.id), chunk(other.frame.id, "b"), chunk(frame.id, "a"));
    net.socket.push(end(other.frame.id), end(frame.id));
    assert.deepEqual([await (await promise).text(), await (await other.promise).text()], ["a", "b"]);
  });

  test("that nobody asked for, or twice, is nobody's", async (t) => {
    const { net, realtime, promise, frame } = await asking(t);
    const onAny = spy();
    for (const name of ["error", "private", "gap"]) realtime.on(name, onAny);
    const foreign = [response("x"), start("x"), chunk("x", "?"), end("x", "?"), refusal("x", "busy")];
    net.socket.push(...foreign, response(frame.id, "once"), response(frame.id, "twice"), refusal(frame.id, "busy"));
    assert.equal(await (await promise).text(), "once");
    assert.deepEqual([net.reported(), onAny.calls], [[], []]);
  });

  test("moves the position of the connection's own channel", async (t) => {
    const { net, id } = await streaming(t);
    net.socket.push(chunk(id, "two"), { ...chunk("x", ""), position: "e.99.t" });
    await lostAndFound(net);
    assert.deepEqual(net.socket.sent[0].channels, { [OWN]: "e.99.t" });
  });

  test("shows that the link works, so that the next wait is a short one", async (t) => {
    const { net } = await connected(t);
    await lostAndFound(net);
    net.socket.push(response("x"));
    net.socket.end();
    const { length } = net.sockets;
    await net.pass(backoff(0, JITTER));
    assert.equal(net.sockets.length, length + 1);
  });
});

describe("a refusal", () => {
  for (const code of ["busy", "forbidden", "bad_frame", "cancelled", "expired", "one of the future"]) {
    test(`as ${code} rejects with it, and is no error of the page`, async (t) => {
      const { net, realtime, promise, frame } = await asking(t);
      const onError = spy();
      realtime.on("error", onError);
      net.socket.push(refusal(frame.id, code));
      await assert.rejects(promise, { name: "TypeError", code, message: `no: ${code}` });
      await lostAndFound(net);
      assert.deepEqual([requests(net), onError.calls], [[], []]);
    });
  }

  test("as unavailable has it sent again, with back-off, and those behind it wait", async (t) => {
    const { net, realtime, promise, frame } = await asking(t);
    net.socket.push(refusal(frame.id, "unavailable"));
    const next = realtime.fetch("/next");
    await net.pass(backoff(0, JITTER) - 0.001);
    await settled();
    assert.deepEqual(ids(net), [frame.id]);
    await net.pass(0.001);
    assert.deepEqual(ids(net), [frame.id, frame.id, "2"]);
    assert.deepEqual(requests(net)[1], requests(net)[0]);
    net.socket.push(refusal(frame.id, "unavailable"));
    await net.pass(backoff(1, JITTER) - 0.001);
    assert.equal(requests(net).length, 3);
    await net.pass(0.001);
    assert.equal(requests(net).length, 4);
    net.socket.push(response(frame.id, "late"));
    assert.equal(await (await promise).text(), "late");
    net.socket.push(refusal("2", "unavailable"));
    await net.pass(backoff(0, JITTER));
    assert.deepEqual(ids(net).slice(4), ["2"]);
    net.socket.push(response("2"));
    assert.equal((await next).status, 200);
  });

  test("as unavailable is forgotten with the link, after which the request goes out at once", async (t) => {
    const { net, frame } = await asking(t);
    net.socket.push(refusal(frame.id, "unavailable"));
    await lostAndFound(net);
    assert.deepEqual(ids(net), [frame.id]);
    await net.pass(30);
    assert.deepEqual(ids(net), [frame.id]);
  });
});

describe("aborting", () => {
  test("rejects with an AbortError, and tells the server", async (t) => {
    const abort = new AbortController();
    const { net, realtime, promise, frame } = await asking(t, "/a", { signal: abort.signal });
    const onError = spy();
    realtime.on("error", onError);
    abort.abort();
    await assert.rejects(promise, { name: "AbortError" });
    assert.deepEqual(cancels(net), [{ type: "cancel", id: frame.id }]);
    net.socket.push(refusal(frame.id, "cancelled"), start(frame.id), chunk(frame.id, "late"), end(frame.id, "cancelled"));
    assert.deepEqual([onError.calls, net.reported()], [[], []]);
  });

  test("rejects with the reason it was given, also by the signal of a Request", async (t) => {
    const abort = new AbortController();
    const { promise } = await asking(t, new Request("http://server/a", { signal: abort.signal }));
    abort.abort(new Error("mine"));
    await assert.rejects(promise, { message: "mine" });
  });

  test("before it began sends nothing", async (t) => {
    const { net, realtime } = await connected(t);
    await assert.rejects(realtime.fetch("/a", { signal: AbortSignal.abort() }), { name: "AbortError" });
    await settled();
    assert.deepEqual(requests(net), []);
  });

  test("while it waits for a connection sends nothing, then or later", async (t) => {
    const { net, realtime } = await opened(t);
    const abort = new AbortController();
    const promise = realtime.fetch("/a", { signal: abort.signal });
    await settled();
    abort.abort();
    await assert.rejects(promise, { name: "AbortError" });
    net.socket.accept();
    net.socket.push(CONNECTED);
    assert.deepEqual(
      net.socket.sent.map(({ type }) => type),
      ["connect"],
    );
  });

  test("while its body is read lets the next one go", async (t) => {
    const { net, realtime } = await connected(t);
    const abort = new AbortController();
    const promise = realtime.fetch("/a", { json: 1, signal: abort.signal });
    promise.catch(() => {});
    const next = fetching(t, net, realtime, "/b");
    abort.abort();
    await assert.rejects(promise, { name: "AbortError" });
    assert.equal((await next).frame.path, "/b");
    assert.deepEqual([requests(net).length, cancels(net)], [1, []]);
  });

  for (const [state, seconds] of [
    ["waiting", 0],
    ["connecting", 10],
  ]) {
    test(`while ${state} is not sent again`, async (t) => {
      const abort = new AbortController();
      const { net, realtime, promise } = await asking(t, "/a", { signal: abort.signal });
      net.socket.end();
      await net.pass(seconds);
      assert.equal(realtime.state, state);
      abort.abort();
      await assert.rejects(promise, { name: "AbortError" });
      await net.pass(10 - seconds);
      net.socket.accept();
      net.socket.push(CONNECTED);
      assert.deepEqual([requests(net), cancels(net)], [[], []]);
    });
  }

  test("in the middle of a body ends that with the reason, and tells the server", async (t) => {
    const abort = new AbortController();
    const { net, id, reader } = await streaming(t, { signal: abort.signal });
    abort.abort();
    await assert.rejects(reader.read(), { name: "AbortError" });
    assert.deepEqual(cancels(net), [{ type: "cancel", id }]);
    net.socket.push(chunk(id, "late"), end(id, "cancelled"));
    assert.deepEqual(net.reported(), []);
  });

  test("after the answer is complete changes nothing", async (t) => {
    const abort = new AbortController();
    const { net, promise, frame } = await asking(t, "/a", { signal: abort.signal });
    net.socket.push(response(frame.id, "kept"));
    const answer = await promise;
    abort.abort();
    assert.equal(await answer.text(), "kept");
    assert.deepEqual(cancels(net), []);
  });

  test("by cancelling the body tells the server", async (t) => {
    const { net, id, reader } = await streaming(t);
    await reader.cancel();
    assert.deepEqual(cancels(net), [{ type: "cancel", id }]);
    net.socket.push(chunk(id, "late"), end(id));
    await lostAndFound(net);
    assert.deepEqual([requests(net), net.reported()], [[], []]);
  });

  test("by cancelling a body that is complete does not tell the server", async (t) => {
    const { net, promise, frame } = await asking(t);
    net.socket.push(response(frame.id, "unread"));
    await (await promise).body.cancel();
    assert.deepEqual(cancels(net), []);
  });
});

describe("waiting for a connection", () => {
  test("happens in order, until there is one", async (t) => {
    const { net, realtime } = await opened(t);
    const promises = ["/1", "/2", "/3"].map((path) => realtime.fetch(path));
    await net.pass(1);
    net.socket.accept();
    assert.deepEqual(requests(net), []);
    net.socket.push(CONNECTED);
    await until(() => requests(net).length === 3);
    assert.deepEqual(
      requests(net).map(({ path }) => path),
      ["/1", "/2", "/3"],
    );
    net.socket.push(...ids(net).map((id) => response(id, id)));
    assert.deepEqual(await Promise.all(promises.map(async (promise) => (await promise).text())), ["1", "2", "3"]);
  });

  test("is bounded: the first one beyond it is refused", async (t) => {
    for (const [options, bound] of [
      [{}, 64],
      [{ maxPending: 2 }, 2],
      [{ maxPending: 0 }, 0],
    ]) {
      await t.test(`by ${bound}`, async (t) => {
        const { net, realtime } = await opened(t, options);
        for (let count = 0; count < bound; count++) realtime.fetch("/a").catch(() => {});
        await assert.rejects(realtime.fetch("/b"), NOT_CONNECTED);
        net.socket.accept();
        net.socket.push(CONNECTED);
        await until(() => requests(net).length === bound);
        await fetching(t, net, realtime, "/c");
      });
    }
  });

  test("is not for a request that says so", async (t) => {
    const { net, realtime } = await opened(t);
    const impatient = { keepalive: false };
    await assert.rejects(realtime.fetch("/a", impatient), NOT_CONNECTED);
    net.socket.accept();
    net.socket.push(CONNECTED);
    await fetching(t, net, realtime, "/a", impatient);
    net.socket.end();
    await assert.rejects(realtime.fetch("/a", impatient), NOT_CONNECTED);
  });

  test("is over when the client is closed, and nothing is taken any more", async (t) => {
    const { realtime } = await opened(t);
    const waiting = assert.rejects(realtime.fetch("/a"), NOT_CONNECTED);
    realtime.close();
    await waiting;
    await assert.rejects(realtime.fetch("/b"), NOT_CONNECTED);
  });

  test("from within the callback that tells of the connection keeps the order", async (t) => {
    const { net, realtime } = await opened(t);
    realtime.fetch("/1").catch(() => {});
    realtime.on("state", (state) => state === "connected" && realtime.fetch("/2").catch(() => {}));
    net.socket.accept();
    net.socket.push(CONNECTED);
    await until(() => requests(net).length === 2);
    assert.deepEqual(
      requests(net).map(({ path }) => path),
      ["/1", "/2"],
    );
  });
});

describe("after a reconnect", () => {
  test("a request without an answer is sent again under its id, before newer ones", async (t) => {
    const { net, realtime, promise, frame } = await asking(t, "/a", { json: 1 });
    net.socket.end();
    const newer = realtime.fetch("/b");
    await net.pass(10);
    net.socket.accept();
    net.socket.push(CONNECTED);
    await until(() => requests(net).length === 2);
    assert.deepEqual(requests(net)[0], frame);
    assert.equal(requests(net)[1].path, "/b");
    net.socket.push(response(frame.id, "once"), response(requests(net)[1].id));
    assert.equal(await (await promise).text(), "once");
    assert.equal((await newer).status, 200);
    await lostAndFound(net);
    assert.deepEqual(requests(net), []);
  });

  test("a request whose answer comes by recovery is answered once", async (t) => {
    const { net, promise, frame } = await asking(t);
    net.socket.push(message(OWN, "e.1.t"));
    await lostAndFound(net);
    net.socket.push(subscribed(OWN, "e.1.t", true), response(frame.id, "recovered"), response(frame.id, "again"));
    assert.equal(await (await promise).text(), "recovered");
  });

  test("a body in the middle goes on, and its request is not sent again", async (t) => {
    const { net, id, read, reader } = await streaming(t);
    const next = read();
    await lostAndFound(net);
    net.socket.push(subscribed(OWN, net.socket.sent[0].channels[OWN], true), chunk(id, "two "));
    assert.equal(await next, "two ");
    net.socket.push(end(id));
    assert.equal((await reader.read()).done, true);
    assert.deepEqual(requests(net), []);
  });

  test("parts that come twice, by recovery and for the request that was sent again, are taken once", async (t) => {
    const { net, frame, promise } = await asking(t);
    await lostAndFound(net);
    const [begin, a, b, c, last] = ["response_start", ..."abc", "response_end"].map((name, index) => {
      const fields = name.length > 1 ? { type: name } : { type: "response_chunk", body: name };
      return { status: index ? undefined : 200, headers: {}, id: frame.id, position: `e.${10 + index}.t`, ...fields };
    });
    net.socket.push(begin, a, begin, a, b, b, c, last, c, last);
    assert.equal(await (await promise).text(), "abc");
    await lostAndFound(net);
    assert.equal(net.socket.sent[0].channels[OWN], "e.14.t");
  });

  test("an old answer that is sent again moves no position back", async (t) => {
    const { net, frame } = await asking(t);
    net.socket.push(message(OWN, "e.900.t"), { ...response(frame.id), position: "e.99.t" });
    await lostAndFound(net);
    assert.equal(net.socket.sent[0].channels[OWN], "e.900.t");
    net.socket.push({ ...response("x"), position: "f.1.t" });
    await lostAndFound(net);
    assert.equal(net.socket.sent[0].channels[OWN], "f.1.t");
  });

  test("a body in the middle can be cancelled", async (t) => {
    const { net, id, reader } = await streaming(t);
    await lostAndFound(net);
    await reader.cancel();
    assert.deepEqual(cancels(net), [{ type: "cancel", id }]);
  });

  const OTHER = { ...CONNECTED, connection: "c2" };

  test("as another connection, what was sent is rejected, for it may have run", async (t) => {
    const { net, promise } = await asking(t);
    await lostAndFound(net, OTHER);
    await assert.rejects(promise, LOST);
    assert.deepEqual(requests(net), []);
  });

  test("as another connection, a body in the middle is an error", async (t) => {
    const { net, reader, read } = await streaming(t);
    const next = read();
    await lostAndFound(net, OTHER);
    await assert.rejects(next, LOST);
    await assert.rejects(reader.closed);
  });

  test("as another connection, what was refused as unavailable is rejected, for it may be stored", async (t) => {
    const { net, promise, frame } = await asking(t);
    net.socket.push(refusal(frame.id, "unavailable"));
    await lostAndFound(net, OTHER);
    await assert.rejects(promise, LOST);
    assert.deepEqual(requests(net), []);
  });

  test("as another connection, what was never sent is sent", async (t) => {
    const { net, realtime } = await connected(t);
    net.socket.end();
    const promise = realtime.fetch("/a");
    await net.pass(10);
    net.socket.accept();
    net.socket.push(OTHER);
    await until(() => requests(net).length === 1);
    net.socket.push(response(ids(net)[0], "ran"));
    assert.equal(await (await promise).text(), "ran");
  });

  test("as another connection, nothing old is sent by a page that requests as soon as it hears of it", async (t) => {
    const { net, realtime, promise } = await asking(t, "/old");
    realtime.on("state", (state) => state === "connected" && realtime.fetch("/new").catch(() => {}));
    await lostAndFound(net, OTHER);
    await assert.rejects(promise, LOST);
    await until(() => requests(net).length === 1);
    assert.equal(requests(net)[0].path, "/new");
  });

  for (const [how, lose] of [
    ["could not be recovered", subscribed(OWN, "e.900.t", false)],
    ["has a gap", { type: "gap", channel: OWN, position: "e.900.t", reason: "trimmed" }],
  ]) {
    test(`whose own channel ${how}, what was sent is rejected, and a body is an error`, async (t) => {
      const { net, realtime, reader } = await streaming(t);
      const { promise } = await fetching(t, net, realtime);
      await lostAndFound(net);
      net.socket.push(lose);
      await assert.rejects(promise, LOST);
      await assert.rejects(reader.read(), LOST);
      await fetching(t, net, realtime, "/later");
    });
  }

  test("whose user channel has a gap, nothing is rejected", async (t) => {
    const { net, promise, frame } = await asking(t);
    net.socket.push({ type: "gap", channel: "#user-7", position: "e.9.t", reason: "trimmed" }, response(frame.id));
    assert.equal((await promise).status, 200);
  });
});

describe("at the end", () => {
  test("of a closed client, what was sent is rejected, and a body is an error", async (t) => {
    const { net, realtime, reader } = await streaming(t);
    const { promise } = await fetching(t, net, realtime);
    realtime.close();
    await assert.rejects(promise, LOST);
    await assert.rejects(reader.read(), LOST);
  });

  test("of a connection that the server ended for good, all is rejected", async (t) => {
    const { net, realtime, promise } = await asking(t);
    realtime.on("error", spy());
    net.socket.end(3503, "ended by the application");
    await assert.rejects(promise, LOST);
    await assert.rejects(realtime.fetch("/b"), NOT_CONNECTED);
  });

  for (const how of ["close", "disconnect"]) {
    test(`by ${how} as too big, what was sent is not sent for ever`, async (t) => {
      const { net, realtime, promise } = await asking(t);
      const big = { code: 1009, reason: "a frame may have 1 byte" };
      if (how === "close") net.socket.end(big.code, big.reason);
      else net.socket.push({ type: "disconnect", ...big, retry: 0 });
      await assert.rejects(promise, { ...LOST, message: big.reason });
      assert.equal(realtime.state, "waiting");
      await net.pass(10);
      net.socket.accept();
      net.socket.push(CONNECTED);
      assert.deepEqual(requests(net), []);
    });
  }
});
