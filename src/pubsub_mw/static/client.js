/**
 * Keep a page connected, and what it hears of each channel complete and in order.
 *
 * In:     callbacks from the page; frames from the server, through one transport
 * Out:    each publication to each callback, in offset order; gaps, errors, changes of state
 * Owns:   the positions, the resume token, at most one open transport
 * Never:  moves a position past what was delivered; leaves a gap untold; hears a transport it closed
 */

const BACKOFF_BASE_SECONDS = 0.5;
const BACKOFF_CAP_SECONDS = 20;
const CONNECT_TIMEOUT_SECONDS = 15; // of one attempt, from asking for the grant to `connected`
const PING_TIMEOUT_SECONDS = 8; // a link is dead when nothing came for `ping` + this
const GRANT_EXPIRED = 3501;

/**
 * @typedef {"connecting" | "connected" | "waiting" | "closed"} State
 * @typedef {{ channel: string, event: string, data: any, position: string }} Message
 * @typedef {(data: any, message: Message) => void} MessageCallback
 * @typedef {{ channel: string, position: string, recovered: boolean | null }} Subscribed
 *   `recovered`: true: what was missed follows; false: it is lost; null: no position was given
 * @typedef {{ channel: string, position: string | null, reason: string }} Gap publications were lost: refetch
 * @typedef {Error & { code?: string | number, channel?: string }} RealtimeError `code`: an error or close code
 *
 * @typedef {object} Options
 * @property {string | (() => string | null | Promise<string | null>)} [grant] a function is called for each
 *   attempt to connect, and when the grant has expired
 * @property {new (url: string) => WebSocket} [WebSocket]
 *
 * @typedef {object} SubscribeOptions
 * @property {string | null} [position] go on after it; only the first subscription to a channel sets it
 * @property {(frame: Subscribed) => void} [onSubscribed] also after each reconnect
 * @property {(gap: Gap) => void} [onGap]
 * @property {(error: RealtimeError) => void} [onError] refused, or ended by the server
 *
 * @typedef {object} Events
 * @property {(state: State) => void} state
 * @property {(gap: Gap) => void} gap
 * @property {(error: RealtimeError) => void} error
 * @property {MessageCallback} private what came for this connection or user alone
 *
 * @typedef {ReturnType<typeof connect>} Realtime
 */

/**
 * The delay before a reconnect, in seconds: full jitter, so that many clients spread out.
 *
 * @param {number} attempt 0 for the first
 * @param {number} random 0 <= random < 1
 */
export function backoff(attempt, random) {
  return random * Math.min(BACKOFF_CAP_SECONDS, BACKOFF_BASE_SECONDS * 2 ** attempt);
}

/** @param {number} code a close code, whose range says whether a client reconnects */
export function mayReconnect(code) {
  return !((code >= 3500 && code < 4000) || (code >= 4500 && code < 5000));
}

/** @param {string} [path] by default the folder that this module came from */
function endpoint(path) {
  const page = globalThis.document?.baseURI ?? globalThis.location?.href;
  const url = new URL(path ?? new URL(".", import.meta.url), page);
  url.protocol = url.protocol.replace("http", "ws");
  url.pathname = url.pathname.replace(/\/*$/, "/");
  return url.href;
}

/**
 * A transport carries whole frames and tells how it ended. After `close()` it calls nothing any more.
 *
 * @param {new (url: string) => WebSocket} WebSocket
 * @param {string} url
 * @param {{ onOpen(): void, onFrame(frame: any): void, onEnd(code: number, reason: string): void }} calls
 */
function openWebSocket(WebSocket, url, { onOpen, onFrame, onEnd }) {
  const socket = new WebSocket(url);
  socket.onopen = onOpen;
  socket.onmessage = (event) => onFrame(JSON.parse(event.data));
  socket.onclose = (event) => onEnd(event.code, event.reason);
  return {
    /** @param {object} frame */
    send: (frame) => socket.send(JSON.stringify(frame)),
    close() {
      socket.onopen = socket.onmessage = socket.onclose = null;
      socket.close();
    },
  };
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
 * Connect, and stay connected until `close()` or until the server says that trying again is no use.
 *
 * @param {string | Options} [url] where the endpoint is mounted, if not in the folder of this module
 * @param {Options} [options]
 */
export function connect(url, options = {}) {
  if (typeof url === "object") [url, options] = [undefined, url];
  const address = endpoint(url);
  const { grant, WebSocket = globalThis.WebSocket } = options;

  /**
   * @typedef {SubscribeOptions & { callback: MessageCallback }} Listener
   * @typedef {{ position: any, listeners: Set<Listener> }} Channel
   */
  /** @type {Map<string, Channel>} what the page wants */
  const channels = new Map();
  /**
   * What the server was asked for: to subscribe for `channel` (whose listeners may all have left since), or, where
   * that is missing, to unsubscribe. No second command of a channel is sent before the first is answered.
   *
   * @type {Map<string, { channel?: Channel, subscribed?: boolean }>}
   */
  const asked = new Map();
  /** @type {Map<string, string | null>} positions of the channels that the server itself subscribes */
  const own = new Map();
  /** @type {Set<Listener>} */
  const ownListeners = new Set([
    { callback: (...message) => each(callbacks.private, (callback) => callback(...message)) },
  ]);
  /** @type {{ [Name in keyof Events]: Set<Events[Name]> }} */
  const callbacks = { state: new Set(), gap: new Set(), error: new Set(), private: new Set() };
  const stop = new AbortController();

  let resume = /** @type {string | undefined} */ (undefined);
  let transport = /** @type {ReturnType<typeof openWebSocket> | undefined} */ (undefined);
  let generation = 0; // of the transport: what was awaited for an older one is dropped
  let attempt = 0;
  let isRenewing = false; // a second `grant_expired` at once means that the function has no fresh grant
  let timer = 0; // until the next attempt, or until a silent link is dead
  let deadAt = 0;
  let pingSeconds = 0;
  let resubscribeAttempt = 0;
  let resubscribeTimer = 0;

  function open() {
    drop();
    expectFrame(CONNECT_TIMEOUT_SECONDS);
    withGrant((grant) => {
      transport = openWebSocket(WebSocket, address, { onOpen: () => greet(grant), onFrame: receive, onEnd: end });
    });
    become("connecting");
  }

  function drop() {
    generation++;
    transport?.close();
    transport = undefined;
    asked.clear();
    clearTimeout(timer);
    clearTimeout(resubscribeTimer);
  }

  function reconnect(retrySeconds = 0) {
    drop();
    timer = setTimeout(open, 1000 * (retrySeconds + backoff(attempt++, Math.random())));
    become("waiting");
  }

  /**
   * @param {number} code
   * @param {string} message
   * @param {number | null} [retrySeconds] null: never
   */
  function end(code, message, retrySeconds) {
    const renewable = code === GRANT_EXPIRED && typeof grant === "function";
    if (renewable || (mayReconnect(code) && retrySeconds !== null)) return reconnect(retrySeconds ?? 0);
    realtime.close();
    fail({ code, message });
  }

  /** @param {State} state */
  function become(state) {
    if (state === realtime.state) return;
    realtime.state = state;
    each(callbacks.state, (callback) => callback(state));
  }

  /** @param {number} seconds */
  function expectFrame(seconds) {
    deadAt = Date.now() + 1000 * seconds;
    clearTimeout(timer);
    timer = setTimeout(reconnect, 1000 * seconds);
  }

  /** @param {(grant: string | undefined) => void} use */
  async function withGrant(use) {
    const current = generation;
    try {
      await null; // so that a first error, too, finds the page listening
      const text = typeof grant === "function" ? await grant() : grant;
      if (current === generation) use(text ?? undefined);
    } catch (error) {
      if (current !== generation) return;
      reconnect();
      fail(error);
    }
  }

  /** @param {string} [grant] */
  function greet(grant) {
    const positions = new Map(own);
    for (const [name, channel] of channels) {
      asked.set(name, { channel });
      positions.set(name, channel.position);
    }
    transport?.send({ type: "connect", grant, resume, channels: Object.fromEntries(positions) });
  }

  /** @param {any} frame */
  function receive(frame) {
    if (frame.type === "connected") pingSeconds = frame.ping;
    expectFrame(pingSeconds + PING_TIMEOUT_SECONDS);
    pushes[frame.type]?.(frame);
  }

  /** @type {Record<string, (frame: any) => void>} */
  const pushes = {
    ping() {
      attempt = 0;
      isRenewing = false;
      transport?.send({ type: "pong" });
    },

    connected({ connection, user, resume: token }) {
      const before = realtime.connection;
      resume = token;
      realtime.connection = connection;
      realtime.user = user;
      become("connected");
      settleAll();
      if (before && before !== connection) forget(before);
    },

    disconnect: ({ code, reason, retry }) => end(code, reason, retry),

    subscribed(frame) {
      const name = frame.channel;
      resubscribeAttempt = 0;
      const held = asked.get(name);
      if (held) held.subscribed = true;
      settle(name);
      const listeners = advance(frame);
      each(listeners, (listener) => listener.onSubscribed?.(frame));
      if (frame.recovered === false) lose(frame, listeners);
    },

    message(frame) {
      attempt = 0;
      each(advance(frame), (listener) => listener.callback(frame.data, frame));
    },

    gap: (frame) => lose(frame, advance(frame)),

    unsubscribed(frame) {
      if (frame.code === "client") retire(frame.channel);
      else refuse({ ...frame, message: frame.reason });
    },

    error(frame) {
      if (frame.code === "not_subscribed") retire(frame.channel);
      else if (frame.channel && !frame.id) refuse(frame);
      else if (frame.code === "grant_expired" && typeof grant === "function" && !isRenewing) {
        isRenewing = true;
        withGrant((grant) => transport?.send({ type: "grant", grant }));
      } else fail(frame);
    },
  };

  /** @param {any} frame Take its position. Returns those whom it is for. */
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

  /** @param {string} before a connection that was not resumed, so that what came for it meanwhile is lost */
  function forget(before) {
    own.set(`#connection-${before}`, null);
    for (const channel of own.keys()) {
      own.delete(channel);
      lose({ channel, position: null }, ownListeners);
    }
  }

  /**
   * @param {{ channel: string, position: string | null, reason?: string }} frame
   * @param {Set<Listener>} listeners
   */
  function lose({ channel, position, reason = "unrecovered" }, listeners) {
    const gap = { channel, position, reason };
    each(listeners, (listener) => listener.onGap?.(gap));
    if (listeners.size) each(callbacks.gap, (callback) => callback(gap));
  }

  /**
   * @param {any} cause an Error, a frame, or whatever the page threw
   * @param {Set<Listener>} [listeners]
   */
  function fail(cause, listeners = new Set()) {
    const { code, message = String(cause), channel } = Object(cause);
    const error = cause instanceof Error ? cause : Object.assign(new Error(message), { code, channel });
    each(listeners, (listener) => listener.onError?.(error));
    each(callbacks.error, (callback) => callback(error));
    if (!callbacks.error.size && ![...listeners].some((listener) => listener.onError)) report(error);
  }

  /** @param {string} name Ask the server for what it lacks to be what the page wants. */
  function settle(name) {
    const channel = channels.get(name);
    const held = asked.get(name);
    if (realtime.state !== "connected") return;
    if (channel && !held) {
      asked.set(name, { channel });
      transport?.send({ type: "subscribe", channel: name, position: channel.position ?? undefined });
    } else if (held?.subscribed && held.channel !== channel) {
      asked.set(name, {});
      transport?.send({ type: "unsubscribe", channel: name });
    }
  }

  function settleAll() {
    resubscribeTimer = 0;
    for (const name of channels.keys()) settle(name);
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
    if (frame.code === "unavailable") {
      resubscribeTimer ||= setTimeout(settleAll, 1000 * backoff(resubscribeAttempt++, Math.random()));
    } else if (channel === channels.get(name)) {
      channels.delete(name);
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

  const realtime = {
    state: /** @type {State} */ ("connecting"),
    /** The connection's id, from the first `connected` on. */
    connection: /** @type {string | null} */ (null),
    user: /** @type {string | null} */ (null),

    /**
     * Listen to a channel, over all reconnects, until unsubscribed or refused.
     *
     * @param {string} name
     * @param {MessageCallback} callback
     * @param {SubscribeOptions} [options]
     */
    subscribe(name, callback, options = {}) {
      if (typeof callback !== "function") throw new TypeError("the callback is not a function");
      /** @type {Channel} */
      const channel = channels.get(name) ?? { position: options.position ?? null, listeners: new Set() };
      const listener = { ...options, callback };
      channel.listeners.add(listener);
      channels.set(name, channel);
      settle(name);
      if (asked.get(name)?.subscribed) queueMicrotask(() => each(channel.listeners, welcome));
      return { channel: name, unsubscribe: () => leave(name, (other) => other === listener) };

      /** @param {Listener} other */
      function welcome(other) {
        if (other === listener) other.onSubscribed?.({ channel: name, position: channel.position, recovered: null });
      }
    },

    /**
     * End all subscriptions to a channel, or those with this callback.
     *
     * @param {string} name
     * @param {MessageCallback} [callback]
     */
    unsubscribe(name, callback) {
      leave(name, (listener) => !callback || listener.callback === callback);
    },

    /**
     * Returns a function that takes the callback off again.
     *
     * @template {keyof Events} Name
     * @param {Name} name
     * @param {Events[Name]} callback
     */
    on(name, callback) {
      callbacks[name].add(callback);
      return () => void callbacks[name].delete(callback);
    },

    close() {
      drop();
      stop.abort();
      become("closed");
    },
  };

  for (const type of ["online", "visibilitychange"]) {
    const wake = () => {
      if (type !== "online" && document.hidden) return;
      // The clock tells more than the timers, which stand still while a machine sleeps.
      if (realtime.state === "waiting" || Date.now() > deadAt) open();
    };
    globalThis.addEventListener?.(type, wake, { signal: stop.signal });
  }
  open();
  return /** @type {Readonly<typeof realtime>} */ (realtime);
}
