// Units of a layer by the tokens of the prompt: a click picks a unit and a token. The strip can show the picked unit.

const UNITS_SHOWN = 40;

/** The units of a layer that the page holds, by index. */
function unitsHeld(result, layer) {
  const held = result.cells.filter(([own]) => own === layer).map(([, unit]) => unit);
  return result.cells.length ? held : result.labels.unit.map((_, unit) => unit);
}

/** The picked unit, or the first that the page holds of this layer; undefined if it holds none. */
function unitOf(result, layer) {
  const held = unitsHeld(result, layer), picked = result.indexOf("unit", state.unit);
  return held.includes(picked) ? picked : held[0];
}

/** The tokens of a prompt in a result, without special ones. */
const ordinaryOf = (result, prompt = result.text.prompts.keys().next().value) => result.text.prompts.get(prompt)
  .filter((row) => !result.text.special[row]).map((row) => result.row(result.text, row))
  .filter((token) => token !== undefined);

/** The label of the unit that is picked at first: one that stands out, if tokens are known, or the first; undefined. */
function firstUnit() {
  const result = page.results.find(({ labels }) => labels.unit);
  const [quantity] = result?.over("layer", "unit", "token") ?? [];
  const [first] = quantity ? standingOut(quantity, 0, ordinaryOf(result)) : [];
  return result?.labels.unit[first ?? result.cells[0]?.[1] ?? 0];
}

/** The picker of a unit; says which unit is shown where the page does not hold the picked one. */
function pickUnit(panel, layer, unit) {
  const { result } = panel, { unit: units, layer: layers } = result.labels, picked = result.indexOf("unit", state.unit);
  panel.controls.append(choice("unit", unitsHeld(result, layer).map((each) => [units[each], named(units[each])]),
    units[unit], (to) => select({ unit: to })));
  const missing = unit === picked ? "" : ` (the page does not hold ${named(units[picked])} of it)`;
  return `${named(units[unit])} of layer ${named(layers[layer])}${missing}`;
}

const noUnit = (panel, layer) =>
  nothing(panel, `The page holds no unit of layer ${named(panel.result.labels.layer[layer])}: pick another layer.`);

function unitsOfPrompt(panel) {
  const { result } = panel, quantity = shownOf(panel), layer = layerOf(result), unit = unitOf(result, layer);
  const rows = tokensShown().filter((row) => result.row(text(), row) !== undefined);
  if (!rows.length) return nothing(panel, NONE);
  if (unit === undefined) return noUnit(panel, layer);
  const own = rows.map((row) => result.row(text(), row));
  const order = standingOut(panel.quantities[0], layer, ordinaryOf(result, state.prompt)); // of all windows the same
  const shown = order.slice(0, UNITS_SHOWN), { unit: units } = result.labels;
  if (!shown.includes(unit)) shown[shown.length - 1] = unit;
  const spec = { label: `${quantity.heading}: ${text().line(state.prompt)}`,
    key: [quantity.id, text().number, state.prompt, rows[0], layer, shown.at(-1)],
    rows: shown.map((each) => named(units[each])), columns: rows.map(tokenName), rowTitle: "unit", columnTitle: "token",
    scale: scaleOf(quantity), rowsShown: rows,
    value: (r, c) => quantity.at({ layer, unit: shown[r], token: own[c] }),
    picked: [shown.indexOf(unit), rows.indexOf(pickedRow())],
    onpick: (r, c) => select({ unit: units[shown[r]], token: rowsOf().indexOf(rows[c]) }) };
  const { low, high, signed } = quantity.span;
  const ends = signed ? `±${written(high)}` : `${written(low)} and ${written(high)}`;
  const some = shown.length < order.length
    ? ` Shown are ${UNITS_SHOWN} units, first those that stand out most at one token of this prompt.` : "";
  caption(panel, `${quantity.title}. Colours end at ${ends}. Picked: ${pickUnit(panel, layer, unit)}.${some}${
    windowed()}`, quantity);
  grid(panel.body, spec);
  return () => gridTable(spec);
}

/** The units of a layer, first those whose largest value is farthest above their mean, in standard deviations. */
function standingOut(quantity, layer, tokens) {
  const far = new Map(unitsHeld(quantity.result, layer).map((unit) => {
    const values = tokens.map((token) => quantity.at({ layer, unit, token })), n = values.length;
    const mean = values.reduce((sum, value) => sum + value, 0) / n;
    const spread = Math.sqrt(values.reduce((sum, value) => sum + (value - mean) ** 2, 0) / n);
    return [unit, (Math.max(...values) - mean) / spread || 0];
  }));
  return [...far.keys()].sort((a, b) => far.get(b) - far.get(a) || a - b);
}
