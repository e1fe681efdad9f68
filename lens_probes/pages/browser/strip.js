// The prompt as a strip of tokens, coloured by a quantity: a click or the arrow keys pick a token.

const WINDOW = 60; // tokens of a prompt that a grid shows at a time

let page = null; // what `show` was given last

const text = () => page.texts[state.text];
const rowsOf = (prompt = state.prompt) => text()?.prompts.get(prompt) ?? [];
const pickedRow = () => rowsOf()[state.token];

/** The tokens that a grid shows: all of them, or those around the picked one. */
function tokensShown(prompt = state.prompt) {
  const rows = rowsOf(prompt);
  const first = Math.min(Math.max(0, state.token - WINDOW / 2), Math.max(0, rows.length - WINDOW));
  return rows.slice(first, first + WINDOW);
}

/** A token's name on an axis: its text and its position. */
const tokenName = (row) => `${visible(text().text[row], 14)} ${text().position[row]}`;

/** The quantities that can colour the strip: one number per token, at the picked layer where they have layers. */
function colouring() {
  return page.results.filter((result) => result.text === text()).flatMap((result) =>
    [...result.over("layer", "token"), ...result.over("token")].filter((quantity) => !quantity.into));
}

function colourOf(quantity, row) {
  const token = quantity?.result.row(text(), row);
  if (token === undefined) return [NaN, null];
  const layer = quantity.axes.includes("layer") ? quantity.result.indexOf("layer", state.layer) : 0;
  return [quantity.at({ layer, token }), scaleOf(quantity)];
}

function drawStrip(place) {
  const quantity = colouring().find((each) => each.id === state.colour);
  const key = JSON.stringify([state.text, state.prompt, state.colour, quantity?.axes.includes("layer") ? state.layer : "", isDark()]);
  if (drawStrip.key !== key || drawStrip.page !== page) drawTokens(place, quantity);
  Object.assign(drawStrip, { key, page });
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

function drawTokens(place, quantity) {
  place.replaceChildren(...rowsOf().map((row, index) => {
    const [value, scale] = colourOf(quantity, row);
    const fill = scale ? scale(value) : theme().paper;
    return element("span", { role: "option", id: `token-${index}`, class: "token", "aria-selected": "false", dir: "auto", style: { background: fill, color: inkOn(fill) },
      title: quantity ? `${quantity.says}: ${written(value)}` : null, onclick: () => select({ token: index }) },
      visible(text().text[row], 30));
  }));
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
  return page.results.map((result) => result.labels[axis] ?? []).reduce((most, own) => (own.length > most.length ? own : most), []);
}
