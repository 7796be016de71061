// Socket.IO with its Redis adapter, WebSocket transport alone. The channel is a room, named in the query string.
// Usage: node socketio.js <port> <redis port>
const { createServer } = require("node:http");
const { Server } = require("socket.io");
const { createAdapter } = require("@socket.io/redis-adapter");
const { createClient } = require("redis");

const [port, redisPort] = process.argv.slice(2).map(Number);

async function main() {
  const publisher = createClient({ url: `redis://127.0.0.1:${redisPort}` });
  const subscriber = publisher.duplicate();
  await Promise.all([publisher.connect(), subscriber.connect()]);
  const server = createServer();
  const io = new Server(server, {
    adapter: createAdapter(publisher, subscriber),
    transports: ["websocket"],
    perMessageDeflate: false,
    serveClient: false,
  });
  io.on("connection", async (socket) => {
    await socket.join(socket.handshake.query.channel);
    socket.emit("ready");
  });
  server.listen({ port, host: "127.0.0.1", backlog: 4096 });
}

main();
