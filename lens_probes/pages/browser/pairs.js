// [layer head pair]: from token to token, in the picked head.

const asking = { head: null }; // a served page asks for a head that it does not hold: head(layer, head)

function pairs(panel) {
  const { result } = panel, quantity = shownOf(panel), place = placeOf(result);
  if (result.text !== text() || !result.pairsOf?.has(state.prompt)) {
    return nothing(panel, "This result has no number for this prompt.");
  }
  if (!quantity.has(place)) return otherHeads(panel, quantity, place);
  const spec = pairsSpec(quantity, state.prompt), { sink } = spec;
  const sinks = sink ? ` ◆ sink: ${sink.name} gets ${written(sink.mean)} of a query on average.` : "";
  caption(panel, `${quantity.title}, in ${spec.head}.${sinks}${windowed()}`, quantity);
  askForHead(panel, place);
  if (isCompared()) {
    const other = Number(state.other);
    return compared(panel, spec, result.pairsOf.has(other) ? pairsSpec(quantity, other) : null);
  }
  grid(panel.body, spec);
  panel.body.querySelector(".strips")?.remove();
  if (spec.own) panel.body.append(strips(quantity, spec, state.token - firstShown()));
  return () => gridTable(spec);
}

const placeOf = (result) => ({ layer: layerOf(result), head: headOf(result) });

const headName = (result, { layer, head }) =>
  `L${numberIn(result.labels.layer?.[layer]) ?? ""}${result.labels.head?.[head] ?? ""}`;

/** What stands where the page does not hold the picked head: those that it holds. */
function otherHeads(panel, quantity, place) {
  const { result } = panel, { layer: layers, head: heads } = result.labels;
  caption(panel, `${quantity.title}.`, quantity);
  askForHead(panel, place);
  const held = result.cells.map(([layer, head]) => {
    const onclick = () => select({ layer: layerLabel(layers[layer]), head: heads[head] });
    return element("button", { type: "button", onclick }, headName(result, { layer, head }));
  });
  return nothing(panel, `The page does not hold ${headName(result, place)}. It holds:`,
    element("div", { class: "controls" }, held));
}

/** On a served page, a button that asks for the picked head if it is not shown. */
function askForHead(panel, place) {
  const { result } = panel, layer = numberIn(state.layer);
  const isShown = numberIn(result.labels.layer?.[place.layer]) === layer && panel.quantities[0].has(place);
  if (!asking.head || isShown || layer === undefined || !panel.quantities[0].axes.includes("pair")) return;
  const name = `L${layer}${state.head}`, said = element("span", { role: "status" });
  const button = element("button", { type: "button", onclick: async () => {
    button.disabled = true;
    said.textContent = "Asking, see above.";
    said.textContent = await asking.head(Number(layer), Number(numberIn(state.head)), panel.id);
    button.disabled = false;
  } }, `Ask for ${name}`);
  panel.controls.append(button, said);
}

function pairsSpec(quantity, prompt) {
  const { result } = quantity, place = placeOf(result), found = result.pairsOf.get(prompt);
  const rows = tokensShown(prompt), first = firstShown(), value = quantity.along(place);
  const keys = keysOf(result, prompt), start = keys ? 0 : first; // other tokens are shown from the first on
  const at = (query, key) => {
    const pair = found.at(query + first, key + start);
    return pair === undefined ? undefined : value(pair);
  };
  const sink = sinkOf(quantity, place, prompt), names = keys ?? rows.map(tokenName), head = headName(result, place);
  const sinkName = sink && (keys ? keys[sink.key] : tokenName(rowsOf(prompt)[sink.key]));
  const isPicked = !keys && prompt === state.prompt;
  return { label: `${quantity.heading} in ${head}`, key: [quantity.id, text().number, prompt, place, first], head,
    rows: rows.map(tokenName), columns: names.map((name, i) => `${name}${i + start === sink?.key ? " ◆" : ""}`),
    rowTitle: "from", columnTitle: "to", scale: scaleOf(quantity), value: at, square: true, own: !keys && rows,
    sink: sink && { ...sink, name: sinkName }, picked: isPicked ? [state.token - first, state.token - first] : null,
    onpick: (query) => select({ token: query + first }),
    tip: (query, key) => [`${head}: from ${tokenName(rows[query])}`, `to ${names[key]}`,
      `${quantity.says}: ${written(at(query, key))}`] };
}

/** The names of the tokens that are looked at, where these are others than those that look. */
function keysOf(result, prompt) {
  if (!result.tokens.key) return null;
  const other = page.texts[result.tokens.key.text];
  return (other.prompts.get(prompt) ?? []).map((row) => `${visible(other.text[row], 14)} ${other.position[row]}`);
}

/** The token that gets most attention of the others, if it gets a third or more; found once per head and prompt. */
function sinkOf(quantity, place, prompt) {
  quantity.sinks ??= new Map();
  const name = JSON.stringify([place, prompt]);
  if (!quantity.sinks.has(name)) {
    quantity.sinks.set(name, sinkAmong(quantity.result.pairsOf.get(prompt), quantity.along(place)));
  }
  return quantity.sinks.get(name);
}

function sinkAmong(found, value) {
  let sink = null;
  for (let key = 0; key < found.keys; key += 1) {
    let sum = 0, n = 0;
    for (let query = 0; query < found.queries; query += 1) {
      const pair = query === key ? undefined : found.at(query, key);
      if (pair === undefined) continue;
      n += 1;
      sum += value(pair) || 0;
    }
    if (n > 2 && sum / n > (sink?.mean ?? 1 / 3)) sink = { key, mean: sum / n };
  }
  return sink;
}

/** What the picked token looks at, and what looks at it, as two coloured strips. */
function strips(quantity, spec, picked) {
  const scale = scaleOf(quantity);
  const strip = (title, value) => element("div", { class: "flow" }, element("b", {}, title), spec.own.map((row, i) => {
    const found = value(i);
    if (found === undefined) return null;
    const fill = scale(found);
    return element("span", { class: "token", dir: "auto", title: written(found),
      style: { background: fill, color: inkOn(fill) } }, visible(text().text[row], 16));
  }));
  return element("div", { class: "strips" },
    strip("from it", (i) => spec.value(picked, i)), strip("to it", (i) => spec.value(i, picked)));
}
