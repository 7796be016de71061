import { connect } from "pubsub-mw"; // the page's import map says where it is: /realtime/client.js

const find = (id) => document.getElementById(id);
const [list, log, form] = [find("messages"), find("log"), find("say")];
const me = document.body.dataset.name;

// --- live: everything that this page knows of realtime

// Who this is, so that a logout in another window ends this one's connection.
const grant = async () => (await (await fetch("/grant")).json()).grant;
const realtime = connect(me ? { grant } : {});
realtime.on("error", ({ code }) => code === 3503 && location.reload());
find("leave")?.form.addEventListener("submit", () => realtime.close()); // here the answer loads the page anew

realtime.subscribe(list.dataset.channel, show, {
  position: list.dataset.position || null, // what was said since the page was made comes first
  onGap: refetch, // too long away, or the history was lost: ask the app
  async onSubscribed() {
    if (!find("notice").hidden) await refetch(); // the page could not be told its position
    find("notice").hidden = true;
  },
});

// Who is here: each person once, whichever windows they have open.
if (me) {
  realtime.subscribe(`presence-${list.dataset.channel}`, () => {}, {
    onMembers(members) {
      find("here").hidden = false;
      find("here").lastElementChild.textContent = members.map(({ info }) => info.name).sort().join(", ");
    },
  });
}

/** Over the connection while there is one, else by HTTP. It is the same view. */
const send = (...request) => (realtime.state === "connected" ? realtime : window).fetch(...request);

const words = { connecting: "connecting…", connected: "live", waiting: "offline, trying again…", closed: "disconnected: reload" };
function showState() {
  find("state").dataset.state = realtime.state;
  find("state").textContent = words[realtime.state];
}
realtime.on("state", showState);
showState();

async function refetch() {
  const messages = await (await fetch(list.dataset.url)).json();
  messages.forEach(show);
  // What is older than these may have a hole before it.
  for (const item of [...list.children]) if (item.dataset.id < messages[0]?.id) item.remove();
}

// --- the list: each message once, in the order of ids, whichever way it came

function show(message) {
  let before = list.lastElementChild;
  while (before && Number(before.dataset.id) > message.id) before = before.previousElementSibling;
  if (before && Number(before.dataset.id) === message.id) return;

  const item = find("entry").content.firstElementChild.cloneNode(true);
  item.dataset.id = message.id;
  item.querySelector("b").textContent = message.name;
  item.querySelector("time").dateTime = message.sent;
  item.querySelector(".text").textContent = message.text;
  decorate(item);

  const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 80;
  before ? before.after(item) : list.prepend(item);
  while (list.children.length > 500) list.firstElementChild.remove();
  if (atEnd) toEnd();
  else find("newer").hidden = false;
  if (document.hidden) document.title = `(${++unseen}) #${room}`;
}

function decorate(item) {
  const name = item.querySelector("b").textContent;
  const time = item.querySelector("time");
  const hue = [...name].reduce((sum, letter) => (sum * 31 + letter.codePointAt(0)) % 360, 7);
  item.style.setProperty("--hue", hue);
  item.querySelector(".avatar").textContent = [...name][0].toUpperCase();
  item.classList.toggle("mine", name === me);
  time.textContent = new Date(time.dateTime).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit" });
}

function toEnd() {
  log.scrollTop = log.scrollHeight;
  find("newer").hidden = true;
}
find("newer").addEventListener("click", toEnd);
log.addEventListener("scroll", () => {
  if (log.scrollHeight - log.scrollTop - log.clientHeight < 80) find("newer").hidden = true;
});

const room = document.title.slice(1);
let unseen = 0;
document.addEventListener("visibilitychange", () => {
  unseen = 0;
  document.title = `#${room}`;
});

// --- saying something: the form as it is

form?.addEventListener("submit", async (event) => {
  event.preventDefault();
  const { text } = form.elements;
  const button = form.querySelector("button");
  button.disabled = true;
  try {
    const body = new FormData(form);
    const answer = await send(form.action, { method: "POST", body, headers: { Accept: "application/json" } });
    if (!answer.ok) throw new Error(answer.status === 401 ? "you are logged out: reload" : `the server answered ${answer.status}`);
    show(await answer.json());
    toEnd();
    text.value = "";
    find("problem").textContent = "";
  } catch (problem) {
    find("problem").textContent = `Not sent (${problem.message}). Your message is still here: try again.`;
  }
  button.disabled = false;
  text.focus();
});

// Another text is another message. The same one sent again, because no answer came, has the key it had.
form?.elements.text.addEventListener("input", () => {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  form.elements.key.value = Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
});

// --- a name to begin with

const names = "Ada Basho Carmen Dilip Edda Farid Greta Hana Ines Jonas Kofi Lena Milo Nora Omar Pia Rumi Sol Tove Yuki".split(" ");
if (find("name")) find("name").value = names[Math.floor(Math.random() * names.length)];

find("second-window").addEventListener("click", (event) => {
  event.preventDefault();
  window.open(event.target.href, "_blank", "popup,noopener,width=480,height=720");
});

for (const item of list.children) decorate(item);
toEnd();
