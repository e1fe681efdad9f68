// The boxes of the served page: a question goes to the server, and the page shows the answer. Only `serve` adds it.

const PAUSE = 300; // milliseconds between two looks at how far a question is

let asked = null; // the question whose answer is awaited
let shown = ""; // the question that the page shows the answer to,
let data = null; // and what it shows

const box = (name, attributes) => element(name, { autocomplete: "off", spellcheck: "false", ...attributes });
const chooser = (id, options) => element("select", { id, autocomplete: "off", "aria-describedby": `${id}-help` },
  options.map(([value, name]) => element("option", { value }, name))); // "": as if nothing was chosen
const boxes = {
  text: box("textarea", { id: "ask-text", rows: 2 }),
  second: box("textarea", { id: "ask-second", rows: 2 }),
  target: box("input", { id: "ask-target", type: "text", maxlength: 500, "aria-describedby": "ask-target-help" }),
  metric: chooser("ask-metric", [["", "cosine"], ["euclidean", "Euclidean distance"], ["dot", "dot product"]]),
  reference: chooser("ask-reference", [["", "embeddings (W_E), without positions"],
    ["embed_pos", "embeddings at the token's own position"], ["unembed", "unembeddings (W_U)"]]),
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

const labelled = (name, label, help) => element("div", { class: `box ${name}` },
  element("label", { for: `ask-${name}` }, label), boxes[name],
  help ? element("p", { id: `ask-${name}-help`, class: "conditions" }, help) : null);

const HELP = {
  target: "Any one token of the vocabulary, by its text or as #id. A leading space counts: most words begin with one.",
  metric: "Of RankShift: how close a state and an entry of the vocabulary are.",
  reference: "Of RankShift: the vectors that stand for the entries.",
  topics: "One text per line, as topic: text. Two topics or more, each with two texts or more.",
  layer: "Attention and sources of one layer only. A text that is too long for all layers has the middle one; then a "
    + "button below asks for the head that you pick.",
};
const MORE = "Topics, nearest entries, attention of a long text";
const besideText = [labelled("second", "Second text, to compare (may be empty)"),
  labelled("target", "Target word (may be empty)", HELP.target)]; // folded on a phone, so that the answer is in sight
const form = element("form", { class: "asking", "aria-label": "Ask the model", onsubmit: ask, onkeydown: askKeys },
  model,
  labelled("text", "Text"), ...(isNarrow() ? [] : besideText),
  element("details", { class: "box" },
    element("summary", {}, isNarrow() ? `Second text, target, ${MORE.toLowerCase()}` : MORE),
    ...(isNarrow() ? besideText : []),
    labelled("topics", "Topics", HELP.topics), labelled("metric", "Nearest by", HELP.metric),
    labelled("reference", "Nearest among", HELP.reference), labelled("layer", "Layer", HELP.layer)),
  element("div", { class: "box controls" }, askButton, cancelButton, bar, status), problem, without);

/** What the boxes ask; raises where a line of the topics has no topic. */
function question() {
  const texts = [boxes.text.value, boxes.second.value].filter((each) => each.trim()), topics = {};
  for (const line of boxes.topics.value.split("\n").filter((each) => each.trim())) {
    const [, topic, prompt] = /^([^:]+):\s*(.+)$/.exec(line.trim()) ?? [];
    if (!topic) throw new Error(`Each line of the topics must be topic: text; got ${visible(line, 60)}`);
    (Object.hasOwn(topics, topic) ? topics[topic] : (topics[topic] = [])).push(prompt);
  }
  const id = /^#(\d+)$/.exec(boxes.target.value)?.[1], target = id ? Number(id) : boxes.target.value;
  return { texts, target, layer: boxes.layer.value === "" ? null : Number(boxes.layer.value), topics,
    metric: boxes.metric.value || undefined, reference: boxes.reference.value || undefined };
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

function ask(event) {
  event.preventDefault();
  return put(question, showAnswer);
}

/** The picked head of a text that is too long for all: its attention takes the place of what the page shows of it. */
asking.head = (layer, head, panel) =>
  put(() => ({ ...JSON.parse(shown), layer, head }), (_, answer) => showHead(answer, panel));

/** Put a question that is `made`, and show its answer; its progress on the way, and its error, which is returned. */
async function put(made, showIt) {
  if (asked) return "Another question is being answered.";
  const own = { id: "" }, start = performance.now();
  asked = own;
  problem.textContent = status.textContent = "";
  waiting(true);
  try {
    const what = made();
    own.id = (await call("questions", "POST", what)).id;
    if (asked !== own) call(`questions/${own.id}`, "DELETE").catch(() => null);
    while (await isPending(own)) await new Promise((resolve) => { setTimeout(resolve, PAUSE); });
    if (asked !== own) return "Cancelled.";
    const answer = await call(`questions/${own.id}/answer`);
    own.id = "";
    if (asked === own) await showIt(what, answer);
    if (asked === own) status.textContent = `Answered in ${((performance.now() - start) / 1000).toFixed(1)} s.`;
  } catch (error) {
    if (asked === own) problem.textContent = named(error.message, 2000);
  } finally {
    if (asked === own) {
      asked = null;
      waiting(false);
    }
  }
  return problem.textContent;
}

/** Whether a question still waits or runs; shows how far it is, and raises its error. */
async function isPending(own) {
  if (asked !== own) return false;
  const { state: at, doing, part, parts, ahead, error } = await call(`questions/${own.id}`);
  if (asked !== own) return false;
  if (at === "failed") throw new Error(error);
  const step = parts ? ` (${Math.min(part + 1, parts)} of ${parts})` : "";
  status.textContent = at === "waiting" ? `Waiting: ${ahead} before this one.` : `${doing}${step}`;
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

/** The answer takes the place of the page's results. What was picked in an answer about the same texts stays picked. */
async function showAnswer(what, answer) {
  const kept = new URLSearchParams(addressNow().slice(1));
  const same = shown && JSON.stringify(JSON.parse(shown).texts) === JSON.stringify(what.texts);
  if (!same) for (const name of ["text", "prompt", "token", "other"]) kept.delete(name);
  if (!same && what.texts.length > 1) kept.set("other", "1");
  shown = JSON.stringify(what);
  for (const [name, own] of Object.entries(boxes)) alsoKept[`ask.${name}`] = own.value;
  history.replaceState(null, "", `#${kept}`);
  document.body.dataset.answered = "yes";
  await showData(answer.page);
  without.replaceChildren(...answer.without.map((sentence) => element("li", {}, `Without ${named(sentence, 2000)}`)));
}

async function showData(given) {
  addressNow(); // what was picked last stays picked
  for (const chart of document.querySelectorAll(".js-plotly-plot")) Plotly.purge(chart);
  data = given;
  await show(data);
  keepInAddress();
}

/** Results of pairs of tokens, for one head, in the place of those that the page has; the reader stays at the panel. */
async function showHead(answer, panel) {
  const { texts, results } = answer.page;
  const numberOf = (own) => data.texts.findIndex((each) => String(each.id) === String(own.id)
    && String(each.prompt) === String(own.prompt));
  for (const result of results) {
    for (const table of Object.values(result.tokens)) table.text = numberOf(texts[table.text]);
    data.results[data.results.findIndex((each) => each.name === result.name)] = result;
  }
  await showData(data);
  goTo(panel);
}

/** Ctrl and Enter ask from any box. */
function askKeys(event) {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
}

/** An address that holds a question fills the boxes; nothing is asked before the button is pressed. */
function fromLink() {
  const found = new URLSearchParams(location.hash.slice(1));
  for (const [name, own] of Object.entries(boxes)) {
    own.value = found.get(`ask.${name}`) ?? "";
    if (own.value && own.closest("details")) own.closest("details").open = true;
  }
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
    boxes.reference.querySelector("[value=embed_pos]").disabled = !about.positions;
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
