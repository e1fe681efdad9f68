// The prompt as a strip of tokens, coloured by a quantity: a click or the arrow keys pick a token.

const WINDOW = 60; // tokens of a prompt that a grid shows at a time
const PICKED = ["layer", "head", "unit"];

const isNarrow = () => matchMedia("(max-width: 600px)").matches; // as in the style sheet

let page = null; // what `show` was given last

const text = () => page.texts[state.text];
const rowsOf = (prompt = state.prompt) => text()?.prompts.get(prompt) ?? [];
const pickedRow = () => rowsOf()[state.token];
const isCompared = () => state.other !== "";

/** The token of the other prompt at the picked one's position, or undefined. */
const otherRow = () => (isCompared() ? rowsOf(Number(state.other))[state.token] : undefined);

/** The number of the first token that a grid shows: of another prompt too, so that positions are the same. */
const firstShown = () => Math.min(Math.max(0, state.token - WINDOW / 2), Math.max(0, rowsOf().length - WINDOW));

/** The tokens that a grid shows: all of them, or those around the picked one. */
const tokensShown = (prompt = state.prompt) => rowsOf(prompt).slice(firstShown(), firstShown() + WINDOW);

/** A token's name on an axis: its text and its position. */
const tokenName = (row) => `${visible(text().text[row], 14)} ${text().position[row]}`;

/** The quantities that can colour the strip: one number per token, at the picked layer, head, unit. */
function colouring() {
  const plainly = (result) => [...result.over("layer", "token"), ...result.over("token")];
  const picked = ({ axes }) => axes.includes("token") && axes.every((axis) => [...PICKED, "token"].includes(axis));
  return page.results.filter((result) => result.text === text())
    .flatMap((result) => [...new Set([...plainly(result), ...result.quantities.filter(picked)])])
    .filter((quantity) => !quantity.into);
}

function colourOf(quantity, row, scale) {
  const token = quantity.result.row(text(), row);
  if (token === undefined) return [NaN, theme().paper];
  const value = quantity.at({ ...pickedPlace(quantity), token });
  return [value, scale(value)];
}

/** The picked layer, head and unit in a quantity: of units the first that the page holds where it lacks the picked. */
function pickedPlace({ axes, result }) {
  const place = Object.fromEntries(PICKED.map((axis) => [axis, result.indexOf(axis, state[axis])]));
  return axes.includes("unit") ? { ...place, unit: unitOf(result, place.layer) } : place;
}

/** Where its values are from, as "20 N3"; empty where it is the same for all. */
function pickedName(quantity) {
  const place = pickedPlace(quantity), { labels } = quantity.result;
  return PICKED.filter((axis) => quantity.axes.includes(axis)).map((axis) => named(labels[axis][place[axis]] ?? ""))
    .join(" ");
}

function drawStrip(place) {
  const quantity = colouring().find((each) => each.id === state.colour);
  const of = JSON.stringify([state.text, state.prompt]);
  const picks = PICKED.map((axis) => (quantity?.axes.includes(axis) ? state[axis] : ""));
  const colours = JSON.stringify([of, state.colour, picks, isDark()]);
  if (drawStrip.page !== page || drawStrip.of !== of) drawTokens(place);
  if (drawStrip.page !== page || drawStrip.colours !== colours) colourTokens(place, quantity);
  Object.assign(drawStrip, { of, colours, page });
  for (const token of place.querySelectorAll(".picked")) markToken(token, false);
  const picked = place.children[state.token];
  if (!picked) return;
  markToken(picked, true);
  place.setAttribute("aria-activedescendant", picked.id);
  if (rowsOf().length > 20) place.scrollTop = picked.offsetTop - place.clientHeight / 2;
}

function markToken(token, picked) {
  token.classList.toggle("picked", picked);
  token.setAttribute("aria-selected", String(picked));
}

function drawTokens(place) {
  place.replaceChildren(...rowsOf().map((row, index) => element("span",
    { role: "option", id: `token-${index}`, class: "token", "aria-selected": "false", dir: "auto",
      onclick: () => select({ token: index }) }, visible(text().text[row], 30))));
}

/** The colours of tokens that stand there already: another layer leaves the tokens. */
function colourTokens(place, quantity) {
  const scale = quantity && scaleOf(quantity), where = quantity && pickedName(quantity);
  rowsOf().forEach((row, index) => {
    const token = place.children[index];
    const [value, fill] = quantity ? colourOf(quantity, row, scale) : [NaN, theme().paper];
    Object.assign(token.style, { background: fill, color: inkOn(fill) });
    token.title = quantity ? `${quantity.says}${where && `, ${where}`}: ${written(value)}` : "";
  });
}

/** Arrow keys, Home and End move the pick; up and down move the layer. */
function stripKeys(event) {
  const last = rowsOf().length - 1;
  const to = { ArrowLeft: state.token - 1, ArrowRight: state.token + 1, Home: 0, End: last }[event.key];
  const step = { ArrowUp: -1, ArrowDown: 1 }[event.key];
  if (to === undefined && step === undefined) return;
  event.preventDefault();
  if (to !== undefined) select({ token: Math.min(Math.max(to, 0), last) });
  else moveLayer(step);
}

function moveLayer(step) {
  const layers = axisLabels("layer");
  const to = Math.min(Math.max(layers.indexOf(state.layer) + step, 0), layers.length - 1);
  if (layers.length) select({ layer: layers[to] });
}

/** The labels of an axis in the result that has most of them. */
function axisLabels(axis) {
  return page.results.map((result) => result.labels[axis] ?? [])
    .reduce((most, own) => (own.length > most.length ? own : most), []);
}
