// The page: contents, pickers, the strip, findings, and the panels of every result. `lensProbes.show(data)` fills it.

let panels = [];
const at = (id) => document.getElementById(id);

/** Show packed data instead of everything that was shown. */
async function show(data) {
  page = await read(data);
  document.title = page.title;
  at("title").textContent = page.title;
  Object.assign(state, firstSelection(), fromAddress(location.hash));
  settle();
  panels = page.results.flatMap(panelsOf);
  drawFindings();
  drawResults();
  drawContents();
  refresh();
  document.body.dataset.ready = "yes";
}

/** What is picked at first: the first token of the first prompt that tokenizers did not add, a middle layer. */
function firstSelection() {
  const layers = axisLabels("layer"), heads = axisLabels("head");
  return { text: 0, prompt: 0, token: 0, layer: layers.at(-1) ?? "", head: heads[0] ?? "", colour: "", other: "", pins: [], views: {} };
}

/** Make the selection one that these data have. */
function settle() {
  const layers = axisLabels("layer"), heads = axisLabels("head");
  if (!page.texts[state.text]) state.text = 0;
  if (text() && !text().prompts.has(state.prompt)) [state.prompt] = text().prompts.keys();
  if (state.token >= rowsOf().length || !location.hash.includes("token=")) {
    state.token = Math.min(Math.max(0, rowsOf().findIndex((row) => !text().special[row])), Math.max(0, rowsOf().length - 1));
  }
  if (layers.length && !layers.includes(state.layer)) state.layer = layers.at(-1);
  if (heads.length && !heads.includes(state.head)) [state.head] = heads;
  if (state.other !== "" && !text()?.prompts.has(Number(state.other))) state.other = "";
  if (!colouring().some((each) => each.id === state.colour)) state.colour = colouring()[0]?.id ?? "";
}

// Above the panels

function drawPickers() {
  const place = at("pickers"), key = JSON.stringify([state.text, state.prompt, state.other, state.colour, state.layer, state.head]);
  if (drawPickers.key === key && drawPickers.page === page) return;
  Object.assign(drawPickers, { key, page });
  const held = document.activeElement?.getAttribute("aria-label");
  const prompts = page.texts.filter((each) => page.results.some((result) => result.text === each)).flatMap((each) => [...each.prompts.keys()].map((prompt) => [`${each.number}.${prompt}`, `${prompt}: ${each.line(prompt)}`]));
  const made = [];
  if (prompts.length) {
    made.push(choice("prompt", prompts, `${state.text}.${state.prompt}`, (to) => pickPrompt(...to.split(".").map(Number))));
    made.push(choice("compare with", [["", "no other prompt"], ...[...text().prompts.keys()].filter((each) => each !== state.prompt)
      .map((prompt) => [prompt, `${prompt}: ${text().line(prompt)}`])], state.other, (other) => select({ other })));
    made.push(choice("colour", colouring().map((each) => [each.id, `${each.result.name}: ${each.says}`]), state.colour, (colour) => select({ colour })));
  }
  for (const axis of ["layer", "head"]) {
    const labels = axisLabels(axis);
    if (labels.length) made.push(choice(axis, labels.map((label) => [label, named(label)]), state[axis], (to) => select({ [axis]: to })));
  }
  place.replaceChildren(...made);
  if (held) [...place.querySelectorAll("select")].find((each) => each.getAttribute("aria-label") === held)?.focus();
}

function pickPrompt(number, prompt) {
  const other = number === state.text && String(prompt) !== state.other ? state.other : "";
  state.text = number;
  const rows = rowsOf(prompt);
  select({ prompt, other, token: Math.max(0, rows.findIndex((row) => !text().special[row])),
    colour: colouring().some((each) => each.id === state.colour) ? state.colour : colouring()[0]?.id ?? "" });
}

function drawFindings() {
  const found = page.results.flatMap((result) => result.findings.map((finding) => element("li", {}, element("b", {}, `${result.name}: `), named(finding, 2000))));
  at("findings").replaceChildren(...(found.length ? found : [element("li", {}, "These results say nothing in words: see their panels.")]));
}

function drawContents() {
  const link = (id, label) => element("li", {}, element("button", { type: "button", class: "link", onclick: () => goTo(id) }, label));
  at("contents").replaceChildren(...page.results.map((result) => element("li", {}, element("button", { type: "button", class: "link",
    onclick: () => goTo(result.id) }, headingOf(result)), element("ul", {}, panels.filter((panel) => panel.result === result).map((panel) => link(panel.id, panel.title))))));
}

function goTo(id) {
  at(id).scrollIntoView();
  at(id).querySelector("h2, h3").focus({ preventScroll: true });
}

/** The name of a result; several of one name are told apart by number. */
function headingOf(result) {
  const same = page.results.filter((each) => each.name === result.name);
  return same.length > 1 ? `${result.name} ${same.indexOf(result) + 1}` : result.name;
}

// The panels

function drawResults() {
  watcher.disconnect();
  at("results").replaceChildren(...page.results.map((result) => {
    const own = panels.filter((panel) => panel.result === result).map(panelElement);
    return element("section", { id: result.id, "aria-labelledby": `${result.id}-name` },
      element("h2", { id: `${result.id}-name`, tabindex: -1 }, headingOf(result)),
      element("p", {}, named(result.question, 400)),
      result.conditions ? element("p", { class: "conditions" }, named(result.conditions, 400)) : null,
      element("div", { class: "panels" }, own), settingsOf(result));
  }));
  for (const panel of panels) watcher.observe(panel.root);
}

function settingsOf(result) {
  const rows = [["probe", result.probe], ["run", result.run], ...Object.entries(result.settings), ...result.left_out.map((each) => ["not drawn", each])];
  return element("details", {}, element("summary", {}, "Settings and provenance"),
    element("dl", {}, rows.filter(([, value]) => value).flatMap(([name, value]) => [element("dt", {}, name), element("dd", {}, named(value, 4000))])));
}

function panelElement(panel) {
  panel.controls = element("div", { class: "controls" });
  panel.caption = element("p", { class: "caption" });
  panel.body = element("div", { class: "body" });
  const shown = element("div", { class: "scroll tall", tabindex: 0, role: "group", "aria-label": `Table: ${panel.title}` });
  panel.details = element("details", { class: "numbers", ontoggle: () => { if (panel.details.open && panel.table) shown.replaceChildren(tableOf(panel.table(), panel.title)); } },
    element("summary", {}, "Table"), shown);
  const save = ["CSV", "PNG", "SVG"].map((format) => element("button", { type: "button", "aria-label": `${format} of ${panel.title}`,
    onclick: () => exported(panel, format.toLowerCase()) }, format));
  panel.root = element("article", { id: panel.id, class: panel.wide ? "panel wide" : "panel", "aria-label": `${headingOf(panel.result)}: ${panel.title}` },
    element("header", {}, element("h3", { tabindex: -1 }, panel.title), element("div", { class: "saves" }, save)),
    panel.controls, panel.caption, panel.body, panel.details);
  return panel.root;
}

/** Panels are drawn when they come into sight, and again when what they show has changed. */
const watcher = new IntersectionObserver((entries) => {
  for (const entry of entries) {
    const panel = panels.find((each) => each.root === entry.target);
    if (!panel) continue;
    panel.inSight = entry.isIntersecting;
    widths.set(panel.body, panel.body.clientWidth);
  }
  drawInSight();
}, { rootMargin: "300px" });

function drawPanel(panel) {
  const follows = JSON.stringify([panel.token ? [state.text, state.prompt, state.token, state.pins, state.other] : 0, state.layer, state.head, state.views,
    isDark(), widthOf(panel.body)]);
  if (panel.drawn === follows) return;
  panel.drawn = follows;
  const held = panel.root.contains(document.activeElement) ? document.activeElement : null;
  const label = held?.getAttribute("aria-label"), pressed = held?.textContent;
  panel.controls.replaceChildren();
  panel.table = panel.draw(panel);
  const isPicture = panel.body.querySelector("svg, .chart");
  for (const button of panel.root.querySelectorAll(".saves button")) button.hidden = !isPicture && button.textContent !== "CSV";
  if (panel.details.open) panel.details.lastChild.replaceChildren(tableOf(panel.table(), panel.title));
  if (held && !held.isConnected) regain(panel, label, pressed);
}

/** A panel that is drawn anew gives the focus back to what stands where it was. */
function regain(panel, label, pressed) {
  const all = [...panel.root.querySelectorAll("select, button, [tabindex]")];
  const same = all.find((each) => label && each.getAttribute("aria-label") === label) ?? all.find((each) => each.textContent === pressed)
    ?? panel.body.querySelector("[tabindex]");
  same?.focus({ preventScroll: true });
}

function refresh() {
  document.documentElement.dataset.theme = isDark() ? "dark" : "light";
  if (text()) drawStrip(at("strip"));
  at("strip").hidden = !text();
  drawPickers();
  drawInSight();
}

/** Panels in sight: grids and tables at once, then charts, which take longest, one after the other. */
function drawInSight() {
  const seen = panels.filter((panel) => panel.inSight), mine = Symbol("turn");
  for (const panel of seen) widths.set(panel.body, panel.body.clientWidth);
  const charts = seen.filter((panel) => panel.chart || panel.body.querySelector(".chart"));
  for (const panel of seen) if (!charts.includes(panel)) drawPanel(panel);
  drawInSight.turn = mine;
  document.body.dataset.drawing = "yes";
  const next = () => {
    if (drawInSight.turn !== mine) return; // the selection has moved on
    const panel = charts.shift();
    if (!panel) delete document.body.dataset.drawing;
    else {
      drawPanel(panel);
      setTimeout(next);
    }
  };
  requestAnimationFrame(() => setTimeout(next));
}

function toggleTheme() {
  select({ theme: isDark() ? "light" : "dark" });
}

listeners.push(refresh);
at("strip").addEventListener("keydown", stripKeys);
at("theme").addEventListener("click", toggleTheme);
addEventListener("hashchange", () => { if (page) { Object.assign(state, firstSelection(), fromAddress(location.hash)); settle(); refresh(); } });
addEventListener("keydown", (event) => { if (event.key === "Escape") hideTip(); });
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => page && refresh());
let resizing = 0;
addEventListener("resize", () => { clearTimeout(resizing); resizing = setTimeout(() => page && refresh(), 120); });

globalThis.lensProbes = { show };
const given = JSON.parse(at("data").textContent);
if (given) show(given);
