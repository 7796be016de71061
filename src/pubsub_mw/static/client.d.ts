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
export function backoff(attempt: number, random: number): number;
/** @param {number} code a close code, whose range says whether a client reconnects */
export function mayReconnect(code: number): boolean;
/**
 * Connect, and stay connected until `close()` or until the server says that trying again is no use.
 *
 * @param {string | Options} [url] where the endpoint is mounted, if not in the folder of this module
 * @param {Options} [options]
 */
export function connect(url?: string | Options, options?: Options): Readonly<{
    state: State;
    /** The connection's id, from the first `connected` on. */
    connection: string | null;
    user: string | null;
    /**
     * Listen to a channel, over all reconnects, until unsubscribed or refused.
     *
     * @param {string} name
     * @param {MessageCallback} callback
     * @param {SubscribeOptions} [options]
     */
    subscribe(name: string, callback: MessageCallback, options?: SubscribeOptions): {
        channel: string;
        unsubscribe: () => void;
    };
    /**
     * End all subscriptions to a channel, or those with this callback.
     *
     * @param {string} name
     * @param {MessageCallback} [callback]
     */
    unsubscribe(name: string, callback?: MessageCallback): void;
    /**
     * Returns a function that takes the callback off again.
     *
     * @template {keyof Events} Name
     * @param {Name} name
     * @param {Events[Name]} callback
     */
    on<Name extends keyof Events>(name: Name, callback: Events[Name]): () => undefined;
    close(): void;
}>;
export type State = "connecting" | "connected" | "waiting" | "closed";
export type Message = {
    channel: string;
    event: string;
    data: any;
    position: string;
};
export type MessageCallback = (data: any, message: Message) => void;
/**
 * `recovered`: true: what was missed follows; false: it is lost; null: no position was given
 */
export type Subscribed = {
    channel: string;
    position: string;
    recovered: boolean | null;
};
/**
 * publications were lost: refetch
 */
export type Gap = {
    channel: string;
    position: string | null;
    reason: string;
};
/**
 * `code`: an error or close code
 */
export type RealtimeError = Error & {
    code?: string | number;
    channel?: string;
};
export type Options = {
    /**
     * a function is called for each
     * attempt to connect, and when the grant has expired
     */
    grant?: string | (() => string | null | Promise<string | null>) | undefined;
    WebSocket?: (new (url: string) => WebSocket) | undefined;
};
export type SubscribeOptions = {
    /**
     * go on after it; only the first subscription to a channel sets it
     */
    position?: string | null | undefined;
    /**
     * also after each reconnect
     */
    onSubscribed?: ((frame: Subscribed) => void) | undefined;
    onGap?: ((gap: Gap) => void) | undefined;
    /**
     * refused, or ended by the server
     */
    onError?: ((error: RealtimeError) => void) | undefined;
};
export type Events = {
    state: (state: State) => void;
    gap: (gap: Gap) => void;
    error: (error: RealtimeError) => void;
    /**
     * what came for this connection or user alone
     */
    private: MessageCallback;
};
export type Realtime = ReturnType<typeof connect>;
