/**
 * Keep a page connected, and what it hears of each channel complete and in order.
 *
 * In:     callbacks and requests from the page; frames from the server, through the best transport that delivers
 * Out:    each publication to each callback, in offset order; an answer to each request; gaps, errors, states
 * Owns:   the positions, the resume token, at most one open transport
 * Never:  moves a position past what was delivered; leaves a gap untold; hears a transport it closed
 */

const BACKOFF_BASE_SECONDS = 0.5;
const BACKOFF_CAP_SECONDS = 20;
const CONNECT_TIMEOUT_SECONDS = 10; // of one attempt, grant included
const CLIMB_PATIENCE = 40; // times the longest back-off: until a better transport is tried
const PING_TIMEOUT_SECONDS = 8; // beyond `ping`: then the link is dead
const GRANT_EXPIRED = 3501;
/** @type {Record<string, number>} */
const REFUSALS = { grant_invalid: 3500, grant_expired: GRANT_EXPIRED, revoked: 3503 }; // by HTTP, as close codes
const MAX_SEND_FRAMES = 32; // in one POST
const RESTART_MS = 50; // so that several new channels come with one restart

/** @import { Events, Member, MessageCallback, Options, Realtime, State, SubscribeOptions, TransportName } from "./client.d.ts" */

/**
 * @param {number} attempt
 * @param {number} random
 */
export function backoff(attempt, random) {
  return random * Math.min(BACKOFF_CAP_SECONDS, BACKOFF_BASE_SECONDS * 2 ** attempt);
}

/** @param {number} code */
export function mayReconnect(code) {
  return !/^[34][5-9]..$/.test(String(code));
}

const pageUrl = () => globalThis.document?.baseURI ?? globalThis.location?.href;

/** @param {string} [path] default: the folder of this module */
function endpoint(path) {
  const url = new URL(path ?? new URL(".", import.meta.url), pageUrl());
  url.protocol = url.protocol.replace("ws", "http");
  url.pathname = url.pathname.replace(/\/*$/, "/");
  return url.href;
}

/**
 * What a transport calls, until `close()`. `positions()`: of what the server is asked for from now on; `wait()`: seconds
 * that a poll may last; < 0: nothing can be opened anew, until a fresh grant is accepted.
 *
 * @typedef {{ onOpen(): void, onFrame(frame: any): void, onEnd(code: number, message: string): void,
 *   positions(): Map<string, string | null>, resume(): string | undefined, wait(): number }} Calls
 * @typedef {{ send(frame: any): void, close(): void, restart?(): void }} Transport `restart`: with new channels
 */

/**
 * @param {string} url
 * @param {Calls} calls
 * @param {new (url: string) => WebSocket} WebSocket
 * @returns {Transport}
 */
function openWebSocket(url, { onOpen, onFrame, onEnd }, WebSocket) {
  const socket = new WebSocket(url.replace("http", "ws"));
  socket.onopen = onOpen;
  socket.onmessage = (event) => onFrame(JSON.parse(event.data));
  socket.onclose = (event) => onEnd(event.code, event.reason);
  return {
    send: (frame) => socket.send(JSON.stringify(frame)),
    close() {
      socket.onopen = socket.onmessage = socket.onclose = null;
      socket.close();
    },
  };
}

/**
 * What is sent goes by POST, one after another; what comes, comes by one answer without an end, or by many.
 *
 * @param {string} url
 * @param {Calls} calls
 * @param {TransportName} transport
 * @returns {Transport}
 */
function openHttp(url, { onFrame, onEnd, positions, resume, wait }, transport) {
  const sending = new AbortController();
  /** @type {any[]} */
  const unsent = [];
  let reading = new AbortController();
  let restartTimer = 0;

  /**
   * @param {string} path
   * @param {AbortSignal} signal
   * @param {any[]} [frames]
   */
  async function ask(path, signal, frames) {
    const headers = new Headers({ "content-type": "application/json" });
    if (frames?.[0].type !== "connect") headers.set("authorization", `Bearer ${resume()}`);
    const init = frames && { method: "POST", body: JSON.stringify({ transport, frames }) };
    const response = await fetch(url + path, { ...init, headers, signal });
    if (response.ok) return response;
    const { status } = response;
    throw { status, message: `${path.split("?")[0]}: ${status}` };
  }

  async function read() {
    clearTimeout(restartTimer);
    restartTimer = 0;
    if (wait() < 0) return;
    reading.abort();
    reading = new AbortController();
    const { signal } = reading;
    /** @param {any} frame */
    const take = (frame) => signal.aborted || onFrame(frame);
    let channels = "";
    let places = "";
    for (const [name, position] of positions()) {
      channels += `&channel=${encodeURIComponent(name)}`;
      places += `&position=${position ?? ""}`;
    }
    for (let seconds = wait(); wait() >= 0; ) {
      try {
        const path = transport === "sse" ? "events?frames=1" : `poll?wait=${seconds}`;
        const response = await ask(path + channels + places, signal);
        if (transport === "sse") await readEvents(response, take);
        const answer = await response.json();
        places = `&cursor=${answer.cursor}`;
        for (const frame of [{ type: "ping" }, ...answer.frames]) take(frame);
      } catch (/** @type {any} */ { status, message }) {
        if (status === 414) take({ type: "error", code: status, message });
        if (signal.aborted) return;
        seconds /= 2; // it may have been cut for being idle so long
        if (transport === "sse" || status || seconds < 1) return onEnd(1006, message);
      }
    }
  }

  async function write() {
    for (let limit = MAX_SEND_FRAMES; unsent.length; ) {
      const frames = unsent.slice(0, limit);
      try {
        const answer = await (await ask("send", sending.signal, frames)).json();
        for (const frame of answer.frames) if (!sending.signal.aborted) answered(frame, frames[0].type === "connect");
      } catch (/** @type {any} */ { status, message }) {
        if (sending.signal.aborted) return;
        if (status !== 413) return onEnd(1006, message);
        limit = 1;
        if (frames.length > 1) continue;
        onFrame({ ...frames[0], type: "error", code: "too_large", message });
      }
      // Not before, for an empty `unsent` means that nobody writes.
      unsent.splice(0, frames.length);
    }
  }

  /**
   * @param {any} frame
   * @param {boolean} isGreeting
   */
  function answered(frame, isGreeting) {
    if (isGreeting && frame.type === "error") return onEnd(REFUSALS[frame.code] ?? 3005, frame.message);
    // Connected is who gets something.
    onFrame(isGreeting && transport === "sse" ? { ...frame, type: "accepted" } : { ...frame, isAside: true });
    // A stream goes on when the grant is renewed; polls ended, to begin with the fresh one.
    if (frame.resume && (isGreeting || transport !== "sse") && !sending.signal.aborted) read();
  }

  return {
    send({ channels, ...frame }) {
      // Channels are named to what brings them.
      if (frame.type !== "pong" && unsent.push(frame) === 1) write();
    },
    restart() {
      restartTimer ||= setTimeout(read, RESTART_MS);
    },
    close() {
      clearTimeout(restartTimer);
      sending.abort();
      reading.abort();
    },
  };
}

/**
 * @param {Response} response
 * @param {(frame: any) => void} take
 */
async function readEvents({ body }, take) {
  const reader = /** @type {ReadableStream} */ (body).pipeThrough(new TextDecoderStream()).getReader();
  for (let text = "", part; !(part = await reader.read()).done; ) {
    const events = (text + part.value).split("\n\n");
    text = /** @type {string} */ (events.pop());
    for (const event of events) if (/^data/.test(event)) take(JSON.parse(event.slice(6).split("\n", 1)[0]));
  }
  throw Error("ended");
}

/**
 * @param {string} id
 * @param {Request} request
 * @param {number} maxBytes
 */
async function encodeRequest(id, request, maxBytes) {
  const { method, url, headers } = request;
  const { pathname, search } = new URL(url);
  const token = /(?:^|;\s)csrftoken=([^;]+)/.exec(globalThis.document?.cookie)?.[1]; // Django's names
  if (token && /^[PD]/.test(method) && !headers.has("x-csrftoken")) headers.set("x-csrftoken", token);
  const body = encodeBody(new Uint8Array(await request.arrayBuffer()));
  const frame = { type: "request", id, method, path: pathname + search, headers: Object.fromEntries(headers), ...body };
  if (new Blob([JSON.stringify(frame)]).size <= maxBytes) return frame;
  throw failure("too_large", "over maxFrameBytes: use window.fetch");
}

/** @param {Uint8Array} bytes */
function encodeBody(bytes) {
  try {
    return { body: new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(bytes) };
  } catch {
    return { body: btoa(bytes.reduce((text, byte) => text + String.fromCharCode(byte), "")), encoding: "base64" };
  }
}

/** @param {{ body: string, encoding?: "base64" }} frame */
function decodeBody({ body, encoding }) {
  return encoding ? Uint8Array.from(atob(body), (byte) => byte.charCodeAt(0)) : new TextEncoder().encode(body);
}

/**
 * Whether to advance to a position: what is sent again keeps its old one.
 *
 * @param {string} position
 * @param {string | null} [than]
 */
function isNewer(position, than) {
  const [epoch, offset] = position.split(".");
  const [lastEpoch, lastOffset] = (than ?? "").split(".");
  return epoch !== lastEpoch || +offset > +lastOffset;
}

/**
 * @param {string} code
 * @param {string} message
 */
function failure(code, message) {
  return Object.assign(new TypeError(message), { code });
}

/**
 * @param {string} address
 * @param {TransportName} [name]
 * @returns {any}
 */
function remember(address, name) {
  const key = `pubsub-mw ${address}`;
  try {
    return name ? sessionStorage.setItem(key, name) : sessionStorage.getItem(key);
  } catch {} // there is none
}

/** @param {unknown} error */
function report(error) {
  (globalThis.reportError ?? console.error)(error);
}

/**
 * Visit what is in the set when its turn comes; an error of one spares the others.
 *
 * @template T
 * @param {Set<T>} items
 * @param {(item: T) => void} visit
 */
function each(items, visit) {
  for (const item of [...items]) {
    try {
      if (items.has(item)) visit(item);
    } catch (error) {
      report(error);
    }
  }
}

/**
 * @param {string | Options} [url]
 * @param {Options} [options]
 * @returns {Realtime}
 */
export function connect(url, options = {}) {
  if (typeof url === "object") [url, options] = [undefined, url];
  const address = endpoint(url);
  const { grant, WebSocket = globalThis.WebSocket, maxPending = 64, maxFrameBytes = 65536 } = options;
  const { transports = ["websocket", "sse", "longpoll"] } = options;
  const getGrant = typeof grant === "function" && grant;
  const ladder = transports.filter((name) => name !== "websocket" || WebSocket);

  /**
   * @typedef {SubscribeOptions & { callback: MessageCallback }} Listener
   * @typedef {{ position: any, listeners: Set<Listener>, members?: Member[] }} Channel
   */
  /** @type {Map<string, Channel>} what the page wants */
  const channels = new Map();
  /**
   * What the server was asked: to subscribe for `channel`, or, without one, to unsubscribe. A channel's next command
   * waits for the answer.
   *
   * @type {Map<string, { channel?: Channel, subscribed?: boolean }>}
   */
  const asked = new Map();
  /** @type {Map<string, string | null>} positions of what the server itself subscribes */
  const own = new Map();
  /** @type {Set<Listener>} */
  const ownListeners = new Set([{ callback: (...message) => tell("private", ...message) }]);
  /**
   * `sentIn`: a generation; 0: never; -1: to be sent again.
   *
   * @typedef {{ id: string, request: Request, frame?: object, sentIn: number, position?: string, resolve: Function, reject: Function,
   *   controller?: ReadableStreamDefaultController }} Pending
   */
  /** @type {Map<string, Pending>} unanswered, by id, in order */
  const requests = new Map();
  /** @type {{ [Name in keyof Events]: Set<Events[Name]> }} */
  const callbacks = { state: new Set(), gap: new Set(), error: new Set(), private: new Set() };
  const stop = new AbortController();

  /** @type {string | undefined} */
  let resume;
  /** @type {Transport | undefined} */
  let transport;
  /** @type {Transport | undefined} */
  let probe; // of a better one
  let level = Math.max(0, ladder.indexOf(remember(address))); // on the ladder
  let hasDelivered = false; // a ping, so it stands idle time, and nobody keeps back what comes
  let climbs = 0;
  let climbTimer = 0;
  let generation = 0; // of the transport
  let attempt = 0;
  // Since `grant_expired`; told so again, the function has no fresh grant. No stream can be opened anew meanwhile.
  let isRenewing = false;
  let timer = 0; // until the next attempt, or until a silent link is dead
  let deadAt = 0;
  let pingSeconds = 0;
  let settleAttempt = 0;
  let settleTimer = 0; // until what was unavailable is asked for again
  let requestCount = 0;

  function open() {
    drop();
    hasDelivered = false;
    pingSeconds = 0;
    expectFrame(CONNECT_TIMEOUT_SECONDS);
    withGrant((grant) => {
      const greet = () => transport?.send({ type: "connect", grant, resume, channels: Object.fromEntries(positions()) });
      transport = make(ladder[level], greet, receive, end);
      if (transport.restart) greet();
    });
    become("connecting");
  }

  /**
   * @param {TransportName} name
   * @param {() => void} onOpen
   * @param {(frame: any) => void} onFrame
   * @param {(code: number, message: string) => void} onEnd
   */
  function make(name, onOpen, onFrame, onEnd) {
    const calls = { onOpen, onFrame, onEnd, positions, resume: () => resume, wait: () => (isRenewing ? -1 : pingSeconds) };
    return name === "websocket" ? openWebSocket(address, calls, WebSocket) : openHttp(address, calls, name);
  }

  /** Try what is better: a WebSocket beside what there is; a stream would take the place of the polls in any case. */
  function climb() {
    climbs++;
    const onEnd = () => (level > 1 ? climbTo(level - 1) : climbLater());
    if (ladder[0] !== "websocket") climbTo(level - 1);
    else probe = make("websocket", () => climbTo(0), () => {}, onEnd);
  }

  /** @param {number} better */
  function climbTo(better) {
    level = better;
    open();
  }

  function climbLater() {
    climbTimer = setTimeout(climb, 1000 * CLIMB_PATIENCE * backoff(climbs, 1));
  }

  function drop() {
    generation++;
    transport?.close();
    probe?.close();
    transport = undefined;
    asked.clear();
    clearTimeout(timer);
    clearTimeout(climbTimer);
    clearTimeout(settleTimer);
  }

  /**
   * @param {number} code
   * @param {string} message
   * @param {number | null} [retrySeconds] null: never
   */
  function end(code, message, retrySeconds = 0) {
    if (code === 1009) abandon(message); // too big: never send it again
    if (code < 3000 && !hasDelivered) level = (level + 1) % ladder.length;
    if ((retrySeconds === null || !mayReconnect(code)) && (code !== GRANT_EXPIRED || !getGrant)) {
      realtime.close();
      return fail({ code, message });
    }
    drop();
    timer = setTimeout(open, 1000 * (Number(retrySeconds) + backoff(attempt++, Math.random())));
    become("waiting");
  }

  /**
   * @param {keyof Events} name
   * @param {any[]} values
   */
  function tell(name, ...values) {
    each(/** @type {Set<Function>} */ (callbacks[name]), (callback) => callback(...values));
  }

  /** @param {State} state */
  function become(state) {
    if (state === realtime.state) return;
    realtime.state = state;
    tell("state", state);
  }

  /** @param {number} seconds */
  function expectFrame(seconds) {
    deadAt = Date.now() + 1000 * seconds;
    clearTimeout(timer);
    timer = setTimeout(end, 1000 * seconds, 1006, "silence");
  }

  /** @param {(grant: string | undefined) => void} use */
  async function withGrant(use) {
    const current = generation;
    try {
      await null; // so that the page hears a first error, too
      const text = getGrant ? await getGrant() : grant;
      if (current === generation) use(text ?? undefined);
    } catch (error) {
      if (current !== generation) return;
      end(1006, "");
      fail(error);
    }
  }

  function positions() {
    const positions = new Map(own);
    const before = new Map(asked);
    asked.clear();
    for (const [name, channel] of channels) {
      const held = before.get(name);
      asked.set(name, held?.channel === channel ? held : { channel });
      positions.set(name, channel.position);
    }
    return positions;
  }

  /** @param {any} frame */
  function receive(frame) {
    if (frame.type === "connected") pingSeconds = frame.ping;
    expectFrame(pingSeconds + PING_TIMEOUT_SECONDS);
    pushes[frame.type.replace(/_.*/, "")]?.(frame);
  }

  /** @type {Record<string, (frame: any) => void>} */
  const pushes = {
    ping() {
      hasDelivered = true;
      if (!level) climbs = 0;
      attempt = 0;
      isRenewing = false;
      transport?.send({ type: "pong" });
    },

    accepted(frame) {
      if (!frame.resume) return;
      resume = frame.resume;
      isRenewing = false;
      settleAll();
    },

    connected(frame) {
      const { connection, user } = frame;
      const before = realtime.connection;
      if (before !== connection) abandon("the connection was lost");
      Object.assign(realtime, { connection, user, transport: ladder[level] });
      remember(address, ladder[level]);
      if (level && realtime.state !== "connected") climbLater();
      become("connected");
      pushes.accepted(frame);
      if (before && before !== connection) forget(before);
    },

    disconnect: ({ code, reason, retry }) => end(code, reason, retry),

    subscribed(frame) {
      const name = frame.channel;
      settleAttempt = 0;
      const held = asked.get(name);
      if (held) held.subscribed = true;
      if (held?.channel) held.channel.members = frame.members;
      settle(name);
      const listeners = advance(frame);
      each(listeners, (listener) => welcome(listener, frame));
      if (frame.recovered === false) lose(frame, listeners);
    },

    message(frame) {
      attempt = 0;
      each(advance(frame), (listener) => listener.callback(frame.data, frame));
    },

    gap: (frame) => lose(frame, advance(frame)),

    join: change,
    leave: change,

    unsubscribed(frame) {
      if (frame.code === "client") retire(frame.channel);
      else refuse({ ...frame, message: frame.reason });
    },

    /** Or its start, chunk or end. */
    response({ type, id, position, error, isAside, ...frame }) {
      attempt = settleAttempt = 0;
      const name = `#connection-${realtime.connection}`;
      if (!isAside && isNewer(position, own.get(name))) own.set(name, position);
      const pending = requests.get(id);
      if (!pending || !isNewer(position, pending.position)) return;
      pending.position = position;
      if (frame.status && !pending.controller) {
        const body = new ReadableStream({
          start: (controller) => void (pending.controller = controller),
          cancel: () => cancel(pending, "cancelled"),
        });
        pending.resolve({ ...frame, body });
      }
      if (frame.body) pending.controller?.enqueue(decodeBody(frame));
      if (/(e|end)$/.test(type)) finish(pending, error && failure("broken_off", error));
    },

    error(frame) {
      const pending = requests.get(frame.id);
      if (pending && frame.code === "unavailable") {
        pending.sentIn = -1;
        settleLater();
      } else if (pending) finish(pending, failure(frame.code, frame.message));
      else if (frame.id) return; // cancelled
      else if (frame.code === "not_subscribed") retire(frame.channel);
      else if (frame.channel) refuse(frame);
      else if (frame.code === "grant_expired" && getGrant && !isRenewing) {
        isRenewing = true;
        withGrant((grant) => {
          transport?.send({ type: "grant", grant });
          settleAll();
        });
      } else fail(frame);
    },
  };

  /** @param {any} frame Take its position. Returns its listeners. */
  function advance({ channel: name, position }) {
    if (name.startsWith("#")) {
      own.set(name, position);
      return ownListeners;
    }
    const channel = asked.get(name)?.channel;
    if (!channel) return new Set();
    channel.position = position;
    return channel.listeners;
  }

  /** @param {any} frame */
  function change(frame) {
    const channel = asked.get(frame.channel)?.channel;
    if (!channel) return;
    const members = (channel.members ?? []).filter(({ user }) => user !== frame.member.user);
    if (frame.type === "join") members.push(frame.member);
    channel.members = members;
    each(channel.listeners, (listener) => listener.onMembers?.(members, frame));
  }

  /**
   * @param {Listener} listener
   * @param {any} frame
   */
  function welcome(listener, frame) {
    listener.onSubscribed?.(frame);
    if (frame.members) listener.onMembers?.(frame.members, frame);
  }

  /** @param {string} before not resumed: what came for it meanwhile is lost */
  function forget(before) {
    own.set(`#connection-${before}`, null);
    for (const channel of own.keys()) {
      own.delete(channel);
      lose({ channel, position: null }, ownListeners);
    }
  }

  /**
   * @param {any} frame
   * @param {Set<Listener>} listeners
   */
  function lose({ channel, position, reason = "unrecovered" }, listeners) {
    const gap = { channel, position, reason };
    if (channel === `#connection-${realtime.connection}`) abandon(reason);
    each(listeners, (listener) => listener.onGap?.(gap));
    if (listeners.size) tell("gap", gap);
  }

  /**
   * @param {any} cause an Error, a frame, or whatever the page threw
   * @param {Set<Listener>} [listeners]
   */
  function fail(cause, listeners = new Set()) {
    const { code, message = String(cause), channel } = Object(cause);
    const error = cause instanceof Error ? cause : Object.assign(new Error(message), { code, channel });
    each(listeners, (listener) => listener.onError?.(error));
    tell("error", error);
    if (!callbacks.error.size && ![...listeners].some((listener) => listener.onError)) report(error);
  }

  /** @param {string} name Ask the server for what it lacks. */
  function settle(name) {
    const channel = channels.get(name);
    const held = asked.get(name);
    if (realtime.state !== "connected") return;
    if (transport?.restart) {
      if (held?.channel !== channel) transport.restart();
    } else if (channel && !held) {
      asked.set(name, { channel });
      transport?.send({ type: "subscribe", channel: name, position: channel.position ?? undefined });
    } else if (held?.subscribed && held.channel !== channel) {
      asked.set(name, {});
      transport?.send({ type: "unsubscribe", channel: name });
    }
  }

  function settleAll() {
    clearTimeout(settleTimer);
    settleTimer = 0;
    for (const [name] of [...asked, ...channels]) settle(name);
    sendRequests();
  }

  function settleLater() {
    settleTimer ||= setTimeout(settleAll, 1000 * backoff(settleAttempt++, Math.random()));
  }

  function sendRequests() {
    if (realtime.state !== "connected") return;
    for (const pending of requests.values()) {
      if (!pending.frame || (settleTimer && pending.sentIn < 0)) return; // to keep the order
      if (pending.controller || pending.sentIn === generation) continue;
      pending.sentIn = generation;
      transport?.send(pending.frame);
    }
  }

  /**
   * @param {Pending} pending
   * @param {unknown} [error]
   */
  function finish(pending, error) {
    requests.delete(pending.id);
    pending.reject(error);
    if (error) pending.controller?.error(error);
    else pending.controller?.close();
  }

  /**
   * @param {Pending} pending
   * @param {unknown} reason
   */
  function cancel(pending, reason) {
    if (!requests.has(pending.id)) return;
    if (realtime.state === "connected" && pending.sentIn) transport?.send({ type: "cancel", id: pending.id });
    finish(pending, reason);
    sendRequests();
  }

  /** @param {string} message Give up what was sent; when closed, all. */
  function abandon(message) {
    for (const pending of requests.values()) {
      const code = pending.sentIn ? "connection_lost" : "not_connected";
      if (pending.sentIn || realtime.state === "closed") finish(pending, failure(code, message));
    }
  }

  /** @param {string} name */
  function retire(name) {
    asked.delete(name);
    settle(name);
  }

  /** @param {any} frame */
  function refuse(frame) {
    const name = frame.channel;
    const channel = asked.get(name)?.channel;
    if (!channel) return;
    asked.delete(name);
    if (frame.code === "unavailable" || frame.code === "grant_expired") settleLater();
    else if (channel === channels.get(name)) {
      channels.delete(name);
      transport?.restart?.();
      fail(frame, channel.listeners);
    } else settle(name);
  }

  /**
   * @param {string} name
   * @param {(listener: Listener) => boolean} leaves
   */
  function leave(name, leaves) {
    const listeners = channels.get(name)?.listeners ?? new Set();
    for (const listener of listeners) if (leaves(listener)) listeners.delete(listener);
    if (!listeners.size) channels.delete(name);
    settle(name);
  }

  /** @type {{ -readonly [Name in keyof Realtime]: Realtime[Name] }} */
  const realtime = {
    state: "connecting",
    transport: null,
    connection: null,
    user: null,

    subscribe(name, callback, options = {}) {
      if (typeof callback !== "function") throw new TypeError("the callback is not a function");
      /** @type {Channel} */
      const channel = channels.get(name) ?? { position: options.position ?? null, listeners: new Set() };
      const listener = { ...options, callback };
      channel.listeners.add(listener);
      channels.set(name, channel);
      settle(name);
      if (asked.get(name)?.subscribed) queueMicrotask(() => each(channel.listeners, late));
      return {
        channel: name,
        get members() {
          return channel.members ?? [];
        },
        unsubscribe: () => leave(name, (other) => other === listener),
      };

      /** @param {Listener} other */
      function late(other) {
        const { position, members } = channel;
        if (other === listener) welcome(other, { type: "subscribed", channel: name, position, recovered: null, members });
      }
    },

    unsubscribe(name, callback) {
      leave(name, (listener) => !callback || listener.callback === callback);
    },

    on(name, callback) {
      callbacks[name].add(callback);
      return () => void callbacks[name].delete(callback);
    },

    async fetch(input, { json, keepalive, ...init } = {}) {
      if (json !== undefined) {
        const method = input instanceof Request && input.method !== "GET" ? input.method : "POST";
        init = { method, ...init, body: new Blob([JSON.stringify(json)], { type: "application/json" }) };
      }
      const { origin } = new URL(address);
      const request = new Request(input instanceof Request ? input : new URL(input, pageUrl() ?? origin), init);
      if (new URL(request.url).origin !== origin) throw new TypeError("another origin: use window.fetch");
      request.signal.throwIfAborted();
      const limit = keepalive === false || realtime.state === "closed" ? 0 : maxPending;
      if (realtime.state !== "connected" && requests.size >= limit) throw failure("not_connected", "not connected");
      const id = String(++requestCount);
      const { body, ...head } = await new Promise((resolve, reject) => {
        /** @type {Pending} */
        const pending = { id, request, sentIn: 0, resolve, reject };
        requests.set(id, pending);
        request.signal.onabort = () => cancel(pending, request.signal.reason);
        encodeRequest(id, request, maxFrameBytes)
          .then((frame) => (pending.frame = frame))
          .catch((error) => finish(pending, error))
          .then(sendRequests);
      });
      return new Response([204, 205, 304].includes(head.status) ? null : body, head);
    },

    close() {
      drop();
      stop.abort();
      become("closed");
      abandon("closed");
    },
  };

  for (const type of ["online", "visibilitychange"]) {
    const wake = () => {
      if (type !== "online" && document.hidden) return;
      // Timers stand still while a machine sleeps.
      if (realtime.state === "waiting" || Date.now() > deadAt) open();
    };
    globalThis.addEventListener?.(type, wake, { signal: stop.signal });
  }
  open();
  return realtime;
}
