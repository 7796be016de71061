import { connect } from "pubsub-mw"; // the page's import map says where it is: {realtime}/client.js

const find = (id) => document.getElementById(id);
const [list, form] = [find("comments"), find("write")];

// --- live: everything that this page knows of realtime

const realtime = connect();

realtime.subscribe(list.dataset.channel, show, {
  position: list.dataset.position, // what was written since the page was made comes first
  onGap: async () => (await (await fetch(form.action)).json()).forEach(show), // the history was lost: ask the app
});

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

// --- writing one: a plain POST of the form, Django's CSRF token in it

form.addEventListener("submit", async (event) => {
  event.preventDefault();
  const { name, text } = form.elements;
  const button = form.querySelector("button");
  button.disabled = true;
  try {
    const answer = await fetch(form.action, { method: "POST", body: new FormData(form), headers: { Accept: "application/json" } });
    if (!answer.ok) throw new Error(`the server answered ${answer.status}`);
    show(await answer.json());
    text.value = "";
    localStorage.name = name.value;
    find("problem").textContent = "";
  } catch (problem) {
    find("problem").textContent = `Not sent (${problem.message}). Your comment is still here: try again.`;
  }
  button.disabled = false;
});

// Another text is another comment. The same one sent again, because no answer came, has the key it had.
form.elements.text.addEventListener("input", () => {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  form.elements.key.value = Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
});

form.elements.name.value ||= localStorage.name ?? "";
