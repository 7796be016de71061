/** The types of client.js, by hand: they are the page's reference, and client.js is checked against them. */

export type State = "connecting" | "connected" | "waiting" | "closed";

export type Message = { channel: string; event: string; data: any; position: string };

export type MessageCallback = (data: any, message: Message) => void;

/** `recovered`: true: what was missed follows; false: it is lost; null: no position was given. */
export type Subscribed = { channel: string; position: string; recovered: boolean | null; members?: Member[] };

/** Who is on a presence channel: each user once, over all tabs and devices. `info`: from the grant. */
export type Member = { user: string; info: any };

/** Publications were lost: fetch the state anew. */
export type Gap = { channel: string; position: string | null; reason: string };

/** `code`: an error or close code; or 414, where a proxy takes no url as long as the names of all channels. */
export type RealtimeError = Error & { code?: string | number; channel?: string };

export type TransportName = "websocket" | "sse" | "longpoll";

/** `subscribed`: the list is told anew, and may have changed by more than one. */
export type MembersChange = { type: "join" | "leave"; member: Member } | { type: "subscribed"; member?: undefined };

export type Options = {
  /** Which may be used, the best first. By default all three, in this order. */
  transports?: TransportName[];
  /** A function is called for each attempt to connect, and when the grant has expired. */
  grant?: string | (() => string | null | Promise<string | null>);
  WebSocket?: new (url: string) => WebSocket;
  /** How many requests may wait while not connected; further ones are refused as `not_connected`. By default 64. */
  maxPending?: number;
  /** The server's `max_frame_bytes`; a request that is larger is refused as `too_large`. By default 65,536. */
  maxFrameBytes?: number;
};

export type SubscribeOptions = {
  /** Go on after it; only the first subscription to a channel sets it. */
  position?: string | null;
  /** Called after each reconnect, too. */
  onSubscribed?: (frame: Subscribed) => void;
  onGap?: (gap: Gap) => void;
  /** Who is there now, on a presence channel: told anew after subscribing and after a reconnect, and at each change. */
  onMembers?: (members: readonly Member[], change: MembersChange) => void;
  /** The subscription was refused, or ended by the server. */
  onError?: (error: RealtimeError) => void;
};

export type Subscription = {
  channel: string;
  /** Who is there, on a presence channel; as last told, also while not connected. */
  readonly members: readonly Member[];
  unsubscribe: () => void;
};

export type Events = {
  state: (state: State) => void;
  gap: (gap: Gap) => void;
  error: (error: RealtimeError) => void;
  /** What came for this connection or user alone. */
  private: MessageCallback;
};

export type RequestOptions = RequestInit & {
  /** The body, as JSON; the method is then POST unless given. */
  json?: unknown;
  /** false: do not wait for a connection, but reject at once if there is none. */
  keepalive?: boolean;
};

/**
 * Why `fetch` rejected, or a body broke off. `code`: an error code of the server (`busy`, `forbidden`, `expired`, ...);
 * `too_large`; `not_connected`: it was not sent; `connection_lost`: it was sent, and may have run, but its answer is
 * lost; `broken_off`: the app failed in the middle of its answer.
 */
export type RequestError = TypeError & { code?: string };

export type Realtime = {
  readonly state: State;
  /** The one that was connected last. */
  readonly transport: TransportName | null;
  /** The connection's id, from the first `connected` on. */
  readonly connection: string | null;
  readonly user: string | null;

  /** Listen to a channel, over all reconnects, until unsubscribed or refused. */
  subscribe(channel: string, callback: MessageCallback, options?: SubscribeOptions): Subscription;

  /** End all subscriptions to a channel, or those with this callback. */
  unsubscribe(channel: string, callback?: MessageCallback): void;

  /**
   * Request a path of the app through the connection: as `window.fetch` does, in the order of the calls, and over all
   * reconnects. The answer is a real `Response`, whose body arrives as the app yields it.
   *
   * Different from `window.fetch`: only the origin of the endpoint can be requested; redirects are not followed; a
   * request waits for a connection, see `keepalive` and `maxPending`. An unsafe method gets Django's `X-CSRFToken`
   * from the cookie `csrftoken`, unless that header is set or the cookie hidden from scripts.
   *
   * It rejects with the reason of `signal`, or with a `RequestError`; a body that breaks off ends with one, too.
   * In Chromium, `text()`, `json()`, `blob()` and `arrayBuffer()` fail without that reason, as "Failed to fetch"; a reader
   * of `body` gets it.
   */
  fetch(input: string | URL | Request, init?: RequestOptions): Promise<Response>;

  /** Returns a function that takes the callback off again. */
  on<Name extends keyof Events>(name: Name, callback: Events[Name]): () => void;

  /** End the connection for good. What was not answered yet is rejected. */
  close(): void;
};

/**
 * Connect, and stay connected until `close()` or until the server says that trying again is no use.
 *
 * @param url where the endpoint is mounted, if not in the folder of this module
 */
export function connect(url?: string | Options, options?: Options): Realtime;

/**
 * The delay before a reconnect, in seconds: full jitter, so that many clients spread out.
 *
 * @param attempt 0 for the first
 * @param random 0 <= random < 1
 */
export function backoff(attempt: number, random: number): number;

/** @param code a close code, whose range says whether a client reconnects */
export function mayReconnect(code: number): boolean;
