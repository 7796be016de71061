import { connect } from "pubsub-mw";

const find = (id) => document.getElementById(id);
const realtime = connect();
let writing = null;

find("ask").addEventListener("submit", async (event) => {
  event.preventDefault();
  writing = new AbortController();
  find("text").textContent = find("problem").textContent = "";
  showState();
  try {
    const answer = await realtime.fetch(find("ask").action, { signal: writing.signal });
    if (!answer.ok) throw new Error(`the server answered ${answer.status}`);
    const words = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    for (let word; !(word = await words.read()).done; ) find("text").append(word.value);
  } catch (problem) {
    if (problem.name !== "AbortError") find("problem").textContent = `It broke off: ${problem.message}`;
  }
  writing = null;
  showState();
});

find("stop").addEventListener("click", () => writing?.abort()); // the generator ends too, within a second

const states = { connecting: "connecting…", connected: "connected", waiting: "cut off, trying again…", closed: "disconnected: reload" };
function showState() {
  find("state").dataset.state = realtime.state;
  find("state").textContent = writing && realtime.state === "connected" ? "writing…" : states[realtime.state];
  find("text").ariaBusy = String(Boolean(writing));
  find("write").disabled = Boolean(writing);
  find("stop").disabled = !writing;
}
realtime.on("state", showState);
showState();
