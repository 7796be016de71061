/** What a page written in TypeScript may and may not do. Only compiled, against the shipped types. */

import {
  backoff,
  connect,
  type Gap,
  type Member,
  type Message,
  type Realtime,
  type RealtimeError,
  type RequestError,
} from "../../src/pubsub_mw/static/client.js";

const realtime: Realtime = connect();
connect("/realtime");
connect({ grant: "token", maxPending: 10, maxFrameBytes: 1024 });
connect("wss://example.test/realtime", { grant: async () => (await fetch("/grant")).text(), WebSocket });

const subscription = realtime.subscribe(
  "room:42",
  (data, message: Message) => console.log(data.text, message.position),
  {
    position: null,
    onSubscribed: ({ channel, position, recovered }) =>
      console.log(channel.length, position.length, recovered === null),
    onMembers: (members, { type, member }) => console.log(members.length, type === "join" && member?.user),
    onGap: (gap: Gap) => console.log(gap.reason),
    onError: (error: RealtimeError) => console.log(error.message, error.code, error.channel),
  },
);
console.log(subscription.members.map(({ user }: Member) => user));
subscription.unsubscribe();
realtime.unsubscribe("room:42");

const remove: () => void = realtime.on("state", (state) => console.log(state === "waiting"));
remove();
realtime.on("private", (data, { event }) => console.log(data, event));
realtime.on("error", ({ code }) => console.log(code));
const response: Response = await realtime.fetch("/rooms/42/messages", { json: { text: "hi" }, keepalive: false });
realtime.fetch(new URL("/rooms/42", location.href), { method: "PUT", body: new FormData(), signal: AbortSignal.timeout(1) });
realtime.fetch(new Request("/rooms/42")).catch(({ code, message }: RequestError) => console.log(code, message));
for await (const chunk of readAll(response.body!)) console.log(chunk.byteLength);
async function* readAll(body: ReadableStream<Uint8Array>) {
  const reader = body.getReader();
  for (let part = await reader.read(); !part.done; part = await reader.read()) yield part.value;
}

const id: string | null = realtime.connection ?? realtime.user;
const seconds: number = backoff(0, Math.random());
console.log(id, seconds);
realtime.close();

// @ts-expect-error: no such state
realtime.on("state", (state) => state === "open");
// @ts-expect-error: no such event
realtime.on("message", () => {});
// @ts-expect-error: who is there is not the page's to set
subscription.members.push({ user: "7", info: null });
// @ts-expect-error: the state is not the page's to set
realtime.state = "closed";
// @ts-expect-error: a callback is needed
realtime.subscribe("room:42");
// @ts-expect-error: no such option
realtime.fetch("/rooms/42", { jsno: {} });
// @ts-expect-error: no such option
connect({ token: "text" });
