// The page: contents, pickers, the strip, findings, and the panels of every result. `lensProbes.show(data)` fills it.

const FRAMES_STILL = 20; // without drawing, after which a way to a panel is at its end
const FIRST_FINDINGS = 2; // those that are not folded, so that the strip is in sight; on a phone one

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

/** What is picked at first: the first token of the first prompt that tokenizers did not add, the last layer. */
function firstSelection() {
  const [layer, head, unit] = [axisLabels("layer").at(-1), axisLabels("head")[0], firstUnit()];
  return { text: 0, prompt: 0, token: 0, layer: layer ?? "", head: head ?? "", unit: unit ?? "", colour: "",
    other: "", pins: [], views: {} };
}

/** Make the selection one that these data have. */
function settle() {
  const first = firstSelection();
  if (!page.texts[state.text]) state.text = 0;
  if (text() && !text().prompts.has(state.prompt)) [state.prompt] = text().prompts.keys();
  if (state.token >= rowsOf().length || !location.hash.includes("token=")) {
    const ordinary = rowsOf().findIndex((row) => !text().special[row]);
    state.token = Math.min(Math.max(0, ordinary), Math.max(0, rowsOf().length - 1));
  }
  for (const axis of ["layer", "head", "unit"]) {
    const known = axis === "unit" ? page.results.flatMap(({ labels }) => labels.unit ?? []) : axisLabels(axis);
    if (first[axis] && !known.includes(state[axis])) state[axis] = first[axis];
  }
  if (isCompared() && !text()?.prompts.has(Number(state.other))) state.other = "";
  if (!colouring().some((each) => each.id === state.colour)) state.colour = colouring()[0]?.id ?? "";
}

// Above the panels

function drawPickers() {
  const { other, colour } = state;
  const place = at("pickers"), key = JSON.stringify([state.text, state.prompt, other, colour, state.layer, state.head]);
  if (drawPickers.key === key && drawPickers.page === page) return;
  Object.assign(drawPickers, { key, page });
  const held = document.activeElement?.getAttribute("aria-label"), made = [];
  const add = (label, options, chosen, onchoose) => made.push(choice(label, options, chosen, onchoose));
  const line = (each, prompt) => `${prompt}: ${each.line(prompt)}`;
  const prompts = page.texts.filter((each) => page.results.some((result) => result.text === each))
    .flatMap((each) => [...each.prompts.keys()].map((prompt) => [`${each.number}.${prompt}`, line(each, prompt)]));
  if (prompts.length > 1) {
    const chosen = `${state.text}.${state.prompt}`;
    add("prompt", prompts, chosen, (to) => pickPrompt(...to.split(".").map(Number)));
    const others = [...text().prompts.keys()].filter((each) => each !== state.prompt);
    const compared = [["", "no other prompt"], ...others.map((prompt) => [prompt, line(text(), prompt)])];
    if (others.length) add("compare with", compared, other, (to) => select({ other: to }));
  }
  if (prompts.length) {
    const colours = colouring().map((each) => [each.id, `${headingOf(each.result)}: ${each.says}`]);
    add("colour", colours, colour, (to) => select({ colour: to }));
  }
  for (const axis of ["layer", "head"]) {
    const labels = axisLabels(axis);
    if (labels.length) {
      add(axis, labels.map((label) => [label, named(label)]), state[axis], (to) => select({ [axis]: to }));
    }
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
  const found = page.results.flatMap((result) => result.findings.map((finding) =>
    element("li", {}, element("b", {}, `${headingOf(result)}: `), named(finding, 2000))));
  if (!found.length) found.push(element("li", {}, "These results say nothing in words: see their panels."));
  const n = isNarrow() ? 1 : FIRST_FINDINGS, first = found.slice(0, n), more = found.slice(n);
  at("findings").replaceChildren(...first);
  at("more-findings").hidden = !more.length;
  at("more-findings").open = false;
  at("more-findings").firstElementChild.textContent = `${more.length} more`;
  at("more-findings").lastElementChild.replaceChildren(...more);
}

function drawContents() {
  const link = (id, label, ...more) => element("li", {},
    element("button", { type: "button", class: "link", onclick: () => goTo(id) }, label), ...more);
  at("contents").replaceChildren(...page.results.map((result) => {
    const own = panels.filter((panel) => panel.result === result).map((panel) => link(panel.id, panel.title));
    const isOnly = sameName(result).length === 1, of = isOnly ? "" : ` (${named(result.conditions, 400)})`;
    return link(result.id, `${numbered(result)}${of}`, element("ul", {}, own));
  }));
}

let going = 0; // the number of the last way to a panel; whatever the reader does ends it
for (const kind of ["wheel", "touchstart", "pointerdown", "keydown"]) {
  addEventListener(kind, () => { going += 1; }, { capture: true, passive: true });
}

/** Shows a panel or a result below the strip, which covers more where the text is long. Panels that come into sight on
 * the way are drawn, and push it down: it is followed until all are. */
function goTo(id) {
  const above = document.querySelector(".selection"), sticks = getComputedStyle(above).position === "sticky";
  const target = at(id), mine = going += 1;
  target.style.scrollMarginTop = `${sticks ? above.offsetHeight + 8 : 8}px`;
  let still = 0;
  const follow = () => {
    if (mine !== going || still > FRAMES_STILL) return;
    still = document.body.dataset.drawing ? 0 : still + 1;
    target.scrollIntoView({ behavior: "instant" });
    requestAnimationFrame(follow);
  };
  follow();
  target.querySelector("h2, h3").focus({ preventScroll: true });
}

/** The name of a result; several of one name are told apart by number, and by the conditions that differ. */
function headingOf(result) {
  const conditionsOf = (each) => each.conditions.split(", ");
  const shared = (part) => sameName(result).every((each) => conditionsOf(each).includes(part));
  const own = conditionsOf(result).filter((part) => !shared(part)).join(", ");
  return own ? `${numbered(result)} (${named(own)})` : numbered(result);
}

const sameName = (result) => page.results.filter((each) => each.name === result.name);

function numbered(result) {
  const same = sameName(result);
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
  const rows = [["probe", result.probe], ["run", result.run], ...Object.entries(result.settings),
    ...result.left_out.map((each) => ["not drawn", each])].filter(([, value]) => value);
  const terms = rows.flatMap(([name, value]) => [element("dt", {}, name), element("dd", {}, named(value, 4000))]);
  return element("details", {}, element("summary", {}, "Settings and provenance"), element("dl", {}, terms));
}

function panelElement(panel) {
  const { title } = panel;
  panel.controls = element("div", { class: "controls" });
  panel.caption = element("p", { class: "caption" });
  panel.body = element("div", { class: "body" });
  panel.shown = element("div", { class: "scroll tall", tabindex: 0, role: "group", "aria-label": `Table: ${title}` });
  panel.details = element("details", { class: "numbers", ontoggle: () => drawTable(panel) },
    element("summary", {}, "Table"), panel.shown);
  const save = ["CSV", "PNG", "SVG"].map((format) => element("button", { type: "button",
    "aria-label": `${format} of ${title}`, onclick: () => exported(panel, format.toLowerCase()) }, format));
  const label = `${headingOf(panel.result)}: ${title}`;
  panel.root = element("article", { id: panel.id, class: "panel", "aria-label": label },
    element("header", {}, element("h3", { tabindex: -1 }, title), element("div", { class: "saves" }, save)),
    panel.controls, panel.caption, panel.body, panel.details);
  panel.root.classList.toggle("wide", Boolean(panel.wide));
  return panel.root;
}

function drawTable(panel) {
  if (panel.details.open && panel.table) panel.shown.replaceChildren(tableOf(panel.table(), panel.title));
}

/** Panels are drawn when they come into sight, and again when what they show has changed. */
const watcher = new IntersectionObserver((entries) => {
  for (const entry of entries) {
    const panel = panels.find((each) => each.root === entry.target);
    if (panel) panel.inSight = entry.isIntersecting;
  }
  drawInSight();
}, { rootMargin: "300px" });

function drawPanel(panel) {
  const { prompt, token, pins, other, layer, head, unit, views } = state;
  const follows = JSON.stringify([panel.token ? [state.text, prompt, token, pins, other] : 0, layer, head, unit, views,
    isDark(), widthOf(panel.body)]);
  if (panel.drawn === follows) return;
  panel.drawn = follows;
  const held = panel.root.contains(document.activeElement) ? document.activeElement : null;
  const label = held?.getAttribute("aria-label"), pressed = held?.textContent;
  panel.controls.replaceChildren();
  panel.table = panel.draw(panel);
  const isPicture = panel.body.querySelector("svg, .chart, table");
  for (const button of panel.root.querySelectorAll(".saves button")) {
    button.hidden = !isPicture && button.textContent !== "CSV";
  }
  drawTable(panel);
  if (held && !held.isConnected) regain(panel, label, pressed);
}

/** A panel that is drawn anew gives the focus back to what stands where it was. */
function regain(panel, label, pressed) {
  const all = [...panel.root.querySelectorAll("select, input, button, [tabindex]")];
  const same = all.find((each) => label && each.getAttribute("aria-label") === label)
    ?? all.find((each) => each.textContent === pressed) ?? panel.body.querySelector("[tabindex]");
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
  for (const panel of panels) {
    panel.root.classList.toggle("wide", Boolean(panel.wide || (panel.compares && isCompared())));
  }
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
addEventListener("hashchange", () => {
  if (!page) return;
  Object.assign(state, firstSelection(), fromAddress(location.hash));
  settle();
  refresh();
});
addEventListener("keydown", (event) => { if (event.key === "Escape") hideTip(); });
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => page && refresh());
let resizing = 0;
addEventListener("resize", () => {
  clearTimeout(resizing);
  resizing = setTimeout(() => page && refresh(), 120);
});

globalThis.lensProbes = { show };
const given = JSON.parse(at("data").textContent);
if (given) show(given);
