import { connect } from "pubsub-mw"; // the page's import map says where it is: /realtime/client.js

const find = (id) => document.getElementById(id);
const [list, form] = [find("comments"), find("write")];

// --- live: everything that this page knows of realtime

const realtime = connect();

realtime.subscribe(list.dataset.channel, show, {
  position: list.dataset.position || null, // what was written since the page was made comes first
  onGap: refetch, // the history was lost: ask the app
  async onSubscribed() {
    if (!find("notice").hidden) await refetch(); // the page could not be told its position
    find("notice").hidden = true;
  },
});

async function refetch() {
  (await (await fetch(list.dataset.url)).json()).forEach(show);
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

// --- the list: each comment once, the newest first, whichever way it came

function show(comment) {
  const after = [...list.children].find((item) => Number(item.dataset.id) <= comment.id) ?? null;
  if (after && Number(after.dataset.id) === comment.id) return;

  const item = find("entry").content.firstElementChild.cloneNode(true);
  item.dataset.id = comment.id;
  item.querySelector("b").textContent = comment.name;
  item.querySelector("time").dateTime = comment.written;
  item.querySelector(".text").textContent = comment.text;
  item.classList.add("new");
  localTime(item);
  list.insertBefore(item, after);
  find("count").textContent = list.children.length;
}

function localTime(item) {
  const time = item.querySelector("time");
  time.textContent = new Date(time.dateTime).toLocaleString([], { day: "numeric", month: "short", hour: "2-digit", minute: "2-digit" });
}
for (const item of list.children) localTime(item);

// --- writing one: the form as it is, Django's CSRF token in it

form?.addEventListener("submit", async (event) => {
  event.preventDefault();
  const { text } = form.elements;
  const button = form.querySelector("button");
  button.disabled = true;
  try {
    const body = new FormData(form);
    const answer = await send(form.action, { method: "POST", body, headers: { Accept: "application/json" } });
    if ([401, 403].includes(answer.status)) throw new Error("you are logged out: reload");
    if (!answer.ok) throw new Error(`the server answered ${answer.status}`);
    show(await answer.json());
    text.value = "";
    find("problem").textContent = "";
  } catch (problem) {
    find("problem").textContent = `Not sent (${problem.message}). Your comment is still here: try again.`;
  }
  button.disabled = false;
});

// Another text is another comment. The same one sent again, because no answer came, has the key it had.
form?.elements.text.addEventListener("input", () => {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  form.elements.key.value = Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
});
