// Node's `ws`: one WebSocket server, a set of sockets per channel, `send` to each. Published to over TCP, as the
// reference is: `PUB <channel> <size>\n<payload>`. Usage: node ws.js <port> <publish port>
const net = require("node:net");
const http = require("node:http");
const { WebSocketServer } = require("ws");

const [port, publishPort] = process.argv.slice(2).map(Number);
const channels = new Map();

const server = http.createServer();
const sockets = new WebSocketServer({ server, perMessageDeflate: false, clientTracking: false });
sockets.on("connection", (socket, request) => {
  const name = request.url.slice(1);
  if (!channels.has(name)) channels.set(name, new Set());
  const channel = channels.get(name);
  channel.add(socket);
  socket.on("close", () => channel.delete(socket));
  socket.on("error", () => {});
});
server.listen({ port, host: "127.0.0.1", backlog: 4096 });

net
  .createServer((publisher) => {
    let rest = Buffer.alloc(0);
    publisher.on("error", () => {});
    publisher.on("data", (data) => {
      rest = rest.length ? Buffer.concat([rest, data]) : data;
      for (;;) {
        const end = rest.indexOf(10);
        if (end < 0) return;
        const [, name, size] = rest.toString("latin1", 0, end).split(" ");
        if (rest.length < end + 1 + Number(size)) return;
        const payload = rest.toString("utf8", end + 1, end + 1 + Number(size));
        rest = rest.subarray(end + 1 + Number(size));
        for (const socket of channels.get(name) ?? []) socket.send(payload);
      }
    });
  })
  .listen(publishPort, "127.0.0.1");
