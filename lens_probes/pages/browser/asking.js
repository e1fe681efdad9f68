// The boxes of the served page: a question goes to the server, and the page shows the answer. Only `serve` adds this file.

const PAUSE = 300; // milliseconds between two looks at how far a question is

let asked = null; // the question whose answer is awaited
let shown = ""; // the question that the page shows the answer to

const box = (name, attributes) => element(name, { autocomplete: "off", spellcheck: "false", ...attributes });
const boxes = {
  text: box("textarea", { id: "ask-text", rows: 2 }),
  second: box("textarea", { id: "ask-second", rows: 2 }),
  target: box("input", { id: "ask-target", type: "text", maxlength: 500, "aria-describedby": "ask-target-help" }),
  layer: box("input", { id: "ask-layer", type: "number", min: 0, "aria-describedby": "ask-layer-help" }),
  topics: box("textarea", { id: "ask-topics", rows: 6, "aria-describedby": "ask-topics-help" }),
};
const model = element("p", { class: "conditions" });
const askButton = element("button", { type: "submit", class: "ask" }, "Ask");
const cancelButton = element("button", { type: "button", hidden: true, onclick: cancel }, "Cancel");
const bar = element("progress", { "aria-label": "Progress of the question", hidden: true });
const status = element("p", { role: "status" });
const problem = element("p", { role: "alert" });
const without = element("ul", { class: "without" });

const labelled = (name, label, help) => element("div", { class: `box ${name}` }, element("label", { for: `ask-${name}` }, label), boxes[name],
  help ? element("p", { id: `ask-${name}-help`, class: "conditions" }, help) : null);

const form = element("form", { class: "asking", "aria-label": "Ask the model", onsubmit: ask, onkeydown: askKeys }, model,
  labelled("text", "Text"), labelled("second", "Second text, to compare (may be empty)"),
  labelled("target", "Target word (may be empty)", "Any one token of the vocabulary, by its text or as #id. A leading space counts: most words begin with one."),
  element("details", { class: "box" }, element("summary", {}, "Topics, and attention of a long text"),
    labelled("topics", "Topics", "One text per line, as topic: text. Two topics or more, each with two texts or more."),
    labelled("layer", "Layer", "Attention and sources of one layer only. A text that is too long for all layers has the middle one without it.")),
  element("div", { class: "box controls" }, askButton, cancelButton, bar, status), problem, without);

/** What the boxes ask; raises where a line of the topics has no topic. */
function question() {
  const texts = [boxes.text.value, boxes.second.value].filter((each) => each.trim()), topics = {};
  for (const line of boxes.topics.value.split("\n").filter((each) => each.trim())) {
    const [, topic, prompt] = /^([^:]+):\s*(.+)$/.exec(line.trim()) ?? [];
    if (!topic) throw new Error(`Each line of the topics must be topic: text; got ${visible(line, 60)}`);
    (Object.hasOwn(topics, topic) ? topics[topic] : (topics[topic] = [])).push(prompt);
  }
  const id = /^#(\d+)$/.exec(boxes.target.value)?.[1];
  return { texts, target: id ? Number(id) : boxes.target.value, layer: boxes.layer.value === "" ? null : Number(boxes.layer.value), topics };
}

async function call(path, method = "GET", body = undefined) {
  let response;
  try {
    response = await fetch(path, { method, body: body && JSON.stringify(body), keepalive: method === "DELETE",
      headers: body ? { "Content-Type": "application/json" } : {} });
  } catch {
    throw new Error("The server does not answer: see its terminal, start it again, and ask again.");
  }
  if (response.status === 204) return null;
  const answer = await response.json().catch(() => ({ error: `The server answered with ${response.status}.` }));
  if (!response.ok) throw new Error(answer.error);
  return answer;
}

async function ask(event) {
  event.preventDefault();
  if (asked) return;
  const own = { id: "" }, start = performance.now();
  asked = own;
  problem.textContent = status.textContent = "";
  waiting(true);
  try {
    const what = question();
    own.id = (await call("questions", "POST", what)).id;
    if (asked !== own) return void call(`questions/${own.id}`, "DELETE").catch(() => null);
    while (await isPending(own)) await new Promise((resolve) => { setTimeout(resolve, PAUSE); });
    if (asked !== own) return;
    const answer = await call(`questions/${own.id}/answer`);
    own.id = "";
    if (asked === own) await showAnswer(what, answer);
    if (asked === own) status.textContent = `Answered in ${((performance.now() - start) / 1000).toFixed(1)} s.`;
  } catch (error) {
    if (asked === own) problem.textContent = named(error.message, 2000);
  } finally {
    if (asked === own) {
      asked = null;
      waiting(false);
    }
  }
}

/** Whether a question still waits or runs; shows how far it is, and raises its error. */
async function isPending(own) {
  if (asked !== own) return false;
  const { state: at, doing, part, parts, ahead, error } = await call(`questions/${own.id}`);
  if (asked !== own) return false;
  if (at === "failed") throw new Error(error);
  status.textContent = at === "waiting" ? `Waiting: ${ahead} before this one.` : `${doing}${parts ? ` (${Math.min(part + 1, parts)} of ${parts})` : ""}`;
  if (at === "running" && parts) Object.assign(bar, { max: parts, value: part });
  else bar.removeAttribute("value");
  return at !== "done";
}

function waiting(is) {
  const held = document.activeElement === cancelButton;
  askButton.disabled = is;
  cancelButton.hidden = bar.hidden = !is;
  form.setAttribute("aria-busy", String(is));
  if (held && !is) askButton.focus();
}

function cancel() {
  const own = asked;
  asked = null;
  if (own?.id) call(`questions/${own.id}`, "DELETE").catch(() => null);
  waiting(false);
  status.textContent = "Cancelled.";
}

/** The answer takes the place of the page's results. What was picked in an answer to the same question stays picked. */
async function showAnswer(what, answer) {
  for (const chart of document.querySelectorAll(".js-plotly-plot")) Plotly.purge(chart);
  const kept = new URLSearchParams(location.hash.slice(1)), same = JSON.stringify(what) === shown;
  if (!same) for (const name of ["text", "prompt", "token", "other"]) kept.delete(name);
  if (!same && what.texts.length > 1) kept.set("other", "1");
  shown = JSON.stringify(what);
  for (const [name, own] of Object.entries(boxes)) alsoKept[`ask.${name}`] = own.value;
  history.replaceState(null, "", `#${kept}`);
  document.body.dataset.answered = "yes";
  await show(answer.page);
  keepInAddress();
  without.replaceChildren(...answer.without.map((sentence) => element("li", {}, `Without ${named(sentence, 2000)}`)));
}

/** Ctrl and Enter ask from any box. */
function askKeys(event) {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
}

/** An address that holds a question fills the boxes; nothing is asked before the button is pressed. */
function fromLink() {
  const found = new URLSearchParams(location.hash.slice(1));
  for (const [name, own] of Object.entries(boxes)) own.value = found.get(`ask.${name}`) ?? "";
  if (!found.has("ask.text")) return;
  for (const [name, own] of Object.entries(boxes)) alsoKept[`ask.${name}`] = own.value;
  try {
    shown = JSON.stringify(question());
  } catch {
    return;
  }
  status.textContent = "This address holds a question: press Ask to see its answer.";
}

async function begin() {
  document.querySelector("main").prepend(form);
  fromLink();
  try {
    const about = await call("model");
    model.textContent = `${named(about.model)} (${about.class}, ${about.layers} layers)`;
    boxes.layer.max = about.layers - 1;
    for (const name of ["text", "second"]) boxes[name].maxLength = about.letters;
    const hash = location.hash;
    await show({ title: `lens_probes on ${about.model}`, texts: [], results: [] });
    history.replaceState(null, "", hash || location.pathname); // what it holds waits for the answer
  } catch (error) {
    problem.textContent = named(error.message, 2000);
  }
}

addEventListener("pagehide", () => { if (asked) cancel(); });
begin();
