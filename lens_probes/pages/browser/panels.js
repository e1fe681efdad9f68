// What each result shows follows from the axes of its quantities: each group of equal axes is one panel.
//
// A panel: { id, title, result, wide, draw(body) -> () => table }. It draws the selection of `state`, and keeps choices
// of its own with `view(id, name)`.

function panelsOf(result) {
  const panels = [];
  const add = (key, title, draw, more = {}) => panels.push({ id: `${result.id}-${key}`, title, result, draw, ...more });
  const byAxes = Map.groupBy(result.quantities.filter((each) => !isOnlyNull(each)), (each) => each.axes.join(" "));
  const facts = [];
  for (const [axes, quantities] of byAxes) {
    const numbers = quantities.filter((each) => !each.into);
    const key = axes.replaceAll(" ", "-");
    if (axes === "layer token" && numbers.length) {
      add("grid", "By layer and token", gridOfPrompt, { quantities: numbers, wide: true, token: true });
      add("path", "The picked token through the layers", pathOfToken, { quantities: numbers, token: true, chart: true });
    } else if (axes === "layer token k" && quantities.some((each) => each.into)) {
      add("entries", "Entries at the picked token, by layer", entriesOfToken, { quantities, wide: true, token: true });
      add("followed", "Entries followed through the layers", followed, { quantities, token: true, chart: true });
    } else if (axes === "component token") {
      add("components", "Heads and MLPs at the picked token", components, { quantities: numbers, token: true });
    } else if (axes.endsWith(" pair")) {
      add(key, "From token to token, in the picked head", pairs, { quantities: numbers, token: true });
    } else if (axes === "" || axes === "token") facts.push(...quantities);
    else if (numbers.length) add(key, generalTitle(numbers), general, { quantities: numbers, token: numbers[0].axes.includes("token") });
  }
  if (!result.over("layer", "token").length && result.classes.some((each) => each.layers)) {
    add("classes", "Word classes through the layers", classesOfCorpus, { chart: true });
  }
  if (facts.length) add("facts", facts.some((each) => each.axes.length) ? "At the picked token" : "In one number", factsOf,
    { quantities: facts, token: facts.some((each) => each.axes.length) });
  return panels;
}

/** A null that has fewer axes than its quantity stands in the caption of that. */
function isOnlyNull(quantity) {
  return quantity.result.quantities.some((each) => each.null === quantity.name && each.axes.length > quantity.axes.length);
}

function generalTitle(quantities) {
  const axes = quantities[0].axes.map((axis) => axis.replace("kv_head", "key/value head").replace("other_", "other "));
  const by = axes.length > 1 ? `${axes.slice(0, -1).join(", ")} and ${axes.at(-1)}` : axes[0];
  return quantities.length === 1 ? quantities[0].heading : `By ${by}`;
}

/** The quantity that a panel shows, and the picker for it if there are several. */
function shownOf(panel) {
  const quantity = panel.quantities.find((each) => each.name === view(panel.id, "q")) ?? panel.quantities[0];
  if (panel.quantities.length > 1) {
    panel.controls.append(choice("show", panel.quantities.map((each) => [each.name, each.says]), quantity.name,
      (name) => setView(panel.id, "q", name)));
  }
  return quantity;
}

const layerOf = (result) => result.indexOf("layer", state.layer);
const headOf = (result) => result.indexOf("head", state.head);

function caption(panel, text, quantity) {
  const rounded = quantity?.rounded ? ` Rounded to steps of ${written(quantity.rounded)}.` : "";
  panel.caption.textContent = `${text}${rounded}`;
}

// [layer token]: the grid of the prompt

function gridSpec(panel, quantity, prompt) {
  const { result } = panel;
  const rows = tokensShown(prompt).filter((row) => result.row(text(), row) !== undefined);
  const own = rows.map((row) => result.row(text(), row));
  const top = result.over("layer", "token", "k").find((each) => each.into);
  const numbers = result.over("layer", "token").filter((each) => !each.into);
  const entry = (layer, token, k = 0) => result.vocab[top.at({ layer, token, k })] ?? "";
  return {
    label: `${quantity.heading}: ${text().line(prompt)}`, key: [quantity.id, text().number, prompt, rows[0]],
    rows: result.names("layer", quantity.size("layer")), columns: rows.map(tokenName), rowTitle: "layer", columnTitle: "token",
    scale: scaleOf(quantity), value: (layer, c) => quantity.at({ layer, token: own[c] }),
    text: top && ((layer, c) => visible(entry(layer, own[c]), 12)), textTitle: top?.says,
    picked: prompt === state.prompt ? [layerOf(result), rows.indexOf(pickedRow())] : null,
    outlined: top ? outlines(top, own) : [],
    tip: (layer, c) => [`${result.labels.layer[layer]}, ${tokenName(rows[c])}`,
      ...numbers.map((each) => `${each.says}: ${written(each.at({ layer, token: own[c] }))}`),
      ...(top ? bestOf(panel.result, top, layer, own[c]) : [])],
    onpick: (layer, c) => select({ layer: result.labels.layer[layer], token: rowsOf().indexOf(rows[c]) }), rowsShown: rows,
  };
}

/** The cells where a pinned entry is among the best. */
function outlines(top, own) {
  const found = [], pinned = new Set(state.pins.map(Number));
  if (!pinned.size) return found;
  for (let layer = 0; layer < top.size("layer"); layer += 1) {
    own.forEach((token, c) => {
      for (let k = 0; k < top.size("k"); k += 1) {
        if (pinned.has(top.at({ layer, token, k }))) { found.push([layer, c]); break; }
      }
    });
  }
  return found;
}

/** The number beside an entry: a probability, or a score. */
function besideOf(result) {
  const beside = result.over("layer", "token", "k").find((each) => !each.into);
  const probable = beside?.name.endsWith("log_prob");
  return beside && { title: probable ? "probability" : beside.says,
    at: (place) => (probable ? Math.exp(beside.at(place)) : beside.at(place)) };
}

function bestOf(result, top, layer, token) {
  const beside = besideOf(result);
  return Array.from({ length: top.size("k") }, (_, k) => k).filter((k) => !Number.isNaN(top.at({ layer, token, k })))
    .map((k) => `${beside ? `${beside.at({ layer, token, k }).toFixed(3)}  ` : ""}${visible(result.vocab[top.at({ layer, token, k })] ?? "")}`);
}

function gridOfPrompt(panel) {
  const quantity = shownOf(panel);
  const spec = gridSpec(panel, quantity, state.prompt);
  const all = rowsOf().length, first = spec.rowsShown.length ? text().position[spec.rowsShown[0]] : 0;
  caption(panel, `${quantity.title}.${spec.text ? " In each cell the top entry." : ""}${
    all > WINDOW ? ` Tokens ${first} to ${first + spec.rowsShown.length - 1} of ${all}; the window follows the picked one.` : ""}`, quantity);
  if (!spec.columns.length) return nothing(panel, "This result has no number for this prompt.");
  if (state.other === "") grid(panel.body, spec);
  else compared(panel, spec, gridSpec(panel, quantity, Number(state.other)));
  return () => gridTable(spec);
}

function nothing(panel, why) {
  panel.body.replaceChildren(element("p", { class: "nothing" }, why));
  return () => ({ head: ["nothing"], rows: [] });
}

// [layer token]: the path of the picked token, with its null and the word classes

function pathOfToken(panel) {
  const { result } = panel, quantity = shownOf(panel), token = result.row(text(), pickedRow());
  if (token === undefined) return nothing(panel, "This result has no number for this token.");
  const layers = result.names("layer", quantity.size("layer"));
  const along = (each, row) => layers.map((_, layer) => each.at({ layer, token: row }));
  const nullOf = result.quantity(quantity.null), classes = result.classes.filter((each) => each.layers && each.quantity === quantity.name);
  const beside = view(panel.id, "beside", classes.length ? "classes" : "tokens");
  panel.controls.append(choice("beside", [...(classes.length ? [["classes", "medians of word classes"]] : []),
    ["tokens", "tokens of the prompt"], ["none", "nothing"]], beside, (to) => setView(panel.id, "beside", to)));
  const lines = [];
  if (beside === "classes") lines.push(...classLines(classes, result.classes.filter((each) => each.layers && each.quantity === quantity.null)));
  if (beside === "tokens") for (const row of tokensShown()) {
    const own = result.row(text(), row);
    if (own !== undefined && own !== token) lines.push({ name: tokenName(row), y: along(quantity, own), colour: theme().faint, wide: 0.7 });
  }
  if (nullOf) lines.push({ name: `null: ${nullOf.says}`, y: along(nullOf, token), colour: theme().mark, wide: 1.5, dashed: true });
  const bold = { name: tokenName(pickedRow()), y: along(quantity, token), colour: theme().ink, wide: 4 };
  lines.push(bold);
  caption(panel, `${quantity.title}. Thick: the picked token.${nullOf ? ` Dashed: ${nullOf.says}.` : ""}${
    beside === "classes" ? " Bands: 95 % intervals of the medians." : ""}`, quantity);
  lineChart(panel.body, { label: `${quantity.heading} of ${tokenName(pickedRow())} by layer`, x: layers, lines, xTitle: "layer",
    yTitle: quantity.title, upsideDown: quantity.low_on_top, logarithmic: quantity.logarithmic, at: layerOf(result) });
  return () => chartTable(layers, lines, "layer", quantity.says);
}

/** Where no token is kept, as of a corpus: medians by word class. */
function classesOfCorpus(panel) {
  const { result } = panel, all = result.classes.filter((each) => each.layers);
  const names = [...new Map(all.map((each) => [each.quantity, each.title]))];
  const name = names.some(([known]) => known === view(panel.id, "q")) ? view(panel.id, "q") : names[0][0];
  panel.controls.append(choice("show", names, name, (to) => setView(panel.id, "q", to)));
  const shown = all.filter((each) => each.quantity === name), lines = classLines(shown, []), [{ title, low_on_top, logarithmic }] = shown;
  const layers = result.labels.layer.map((label) => named(label));
  caption(panel, `${title}: medians. Bands: 95 % intervals.`);
  lineChart(panel.body, { label: title, x: layers, lines, xTitle: "layer", yTitle: title, upsideDown: low_on_top, logarithmic, at: layerOf(result) });
  return () => chartTable(layers, lines, "layer", title);
}

function classLines(classes, nulls) {
  const names = classes.map((each) => each.word_class);
  const lines = (found, dashed) => found.filter((each) => each.n >= 10 || found.every((other) => other.n < 10)).map((each) => ({
    name: `${each.word_class}${dashed ? ": null" : ` (${each.n} words)`}`, y: each.median.map((value) => value ?? NaN),
    low: dashed ? undefined : each.low, high: dashed ? undefined : each.high, colour: classColour(each.word_class, names), dashed,
    wide: dashed ? 1.2 : 2 }));
  return [...lines(classes, false), ...lines(nulls, true)];
}

// [layer token k]: the entries of the vocabulary nearest or most probable at the picked token

function entriesOfToken(panel) {
  const { result } = panel, token = result.row(text(), pickedRow());
  if (token === undefined) return nothing(panel, "This result has no number for this token.");
  const top = panel.quantities.find((each) => each.into), beside = besideOf(result), rank = result.over("layer", "token").find((each) => each.name === "rank");
  const layers = result.names("layer", top.size("layer")), n = top.size("k"), own = result.quantity("target_id")?.at({ token }) ?? text().id[pickedRow()];
  const what = result.quantity("target_id") ? "target" : "own token";
  const cell = (layer, k) => {
    const id = top.at({ layer, token, k });
    if (Number.isNaN(id)) return element("td", {}, "");
    const pinned = state.pins.includes(String(id));
    const label = visible(result.vocab[id] ?? String(id), 16);
    return element("td", { class: id === own ? "own" : null },
      element("button", { class: pinned ? "entry pinned" : "entry", type: "button", "aria-pressed": String(pinned), dir: "auto",
        title: pinned ? "pinned: click to let go" : "click to pin and follow", onclick: () => pin(id) },
        element("bdi", {}, label)), beside ? element("small", {}, ` ${beside.at({ layer, token, k }).toFixed(2)}`) : null);
  };
  const held = layers.map((_, layer) => Array.from({ length: n }, (__, k) => top.at({ layer, token, k })).includes(own));
  const head = ["layer", ...(rank ? [`rank of ${what}`] : []), ...Array.from({ length: n }, (_, k) => String(k + 1))];
  const table = element("table", { class: "entries" },
    element("caption", { class: "unseen" }, `${top.says}, at ${tokenName(pickedRow())}`),
    element("thead", {}, element("tr", {}, head.map((each) => element("th", { scope: "col" }, each)))),
    element("tbody", {}, layers.map((label, layer) => element("tr", { class: layer === layerOf(result) ? "picked" : null },
      element("th", { scope: "row" }, label),
      rank ? element("td", { class: held[layer] ? "" : "apart" }, written(rank.at({ layer, token }))) : null,
      Array.from({ length: n }, (_, k) => cell(layer, k))))));
  panel.body.replaceChildren(element("div", { class: "scroll tall", tabindex: 0, role: "group", "aria-label": top.says }, table));
  caption(panel, `${top.says.charAt(0).toUpperCase()}${top.says.slice(1)}, at ${tokenName(pickedRow())}${beside ? `; beside each: ${beside.title}` : ""}. `
    + `Boxed: the ${what}. Click an entry to pin it and follow it.`);
  return () => ({ head, rows: layers.map((label, layer) => [label, ...(rank ? [written(rank.at({ layer, token }))] : []),
    ...Array.from({ length: n }, (_, k) => {
      const id = top.at({ layer, token, k });
      return Number.isNaN(id) ? "" : `${visible(result.vocab[id] ?? "")}${beside ? ` ${beside.at({ layer, token, k }).toFixed(3)}` : ""}`;
    })]) });
}

function pin(id) {
  const pins = state.pins.includes(String(id)) ? state.pins.filter((each) => each !== String(id)) : [...state.pins, String(id)];
  select({ pins });
}

/** Pinned entries through the layers, or where none is pinned those that are first in any layer. */
function followed(panel) {
  const { result } = panel, token = result.row(text(), pickedRow()), beside = besideOf(result);
  if (token === undefined || !beside) return nothing(panel, "This result has no number for this token.");
  const top = panel.quantities.find((each) => each.into), layers = result.names("layer", top.size("layer"));
  const place = (layer, id) => Array.from({ length: top.size("k") }, (_, k) => k).find((k) => top.at({ layer, token, k }) === id);
  const firsts = [...new Set(layers.map((_, layer) => top.at({ layer, token, k: 0 })).reverse())].filter((id) => !Number.isNaN(id));
  const ids = state.pins.length ? state.pins.map(Number) : firsts.slice(0, 6);
  const colours = [theme().ink, ...OTHERS];
  const lines = ids.map((id, i) => ({ name: visible(result.vocab[id] ?? `entry ${id}`), colour: colours[i % colours.length], wide: i ? 2 : 3,
    y: layers.map((_, layer) => { const k = place(layer, id); return k === undefined ? NaN : beside.at({ layer, token, k }); }) }));
  caption(panel, `${state.pins.length ? "The pinned entries" : "The entries that are first in any layer (pin others in the table)"}, at `
    + `${tokenName(pickedRow())}. A line breaks where its entry is not among the ${top.size("k")} that were kept.`);
  lineChart(panel.body, { label: "Entries by layer", x: layers, lines, xTitle: "layer", yTitle: beside.title, at: layerOf(result) });
  return () => chartTable(layers, lines, "layer", beside.title);
}

// [component token]: what heads and MLPs add

function components(panel) {
  const { result } = panel, quantity = shownOf(panel), token = result.row(text(), pickedRow());
  if (token === undefined || Number.isNaN(quantity.at({ component: 0, token }))) return nothing(panel, "This token has no target: pick an earlier one.");
  const names = result.labels.component, place = new Map(names.map((name, i) => [name, i]));
  const layers = [...new Set(names.map((name) => /^L(\d+)/.exec(name)?.[1]).filter(Boolean))];
  const parts = [...new Set(names.map((name) => /^L\d+(.+)$/.exec(name)?.[1]).filter(Boolean))];
  const heads = parts.filter((part) => part.startsWith("H")), others = parts.filter((part) => !part.startsWith("H")).reverse();
  const columns = [...heads, ...others];
  const at = (r, c) => { const i = place.get(`L${layers[r]}${columns[c]}`); return i === undefined ? undefined : quantity.at({ component: i, token }); };
  const most = Math.max(...layers.flatMap((_, r) => columns.map((__, c) => Math.abs(at(r, c) ?? 0)))) || 1;
  const scale = scaleOf({ title: quantity.title, span: { low: -most, high: most, signed: true } });
  const alone = names.filter((name) => !/^L\d/.test(name)).map((name) => `${name} ${written(quantity.at({ component: place.get(name), token }))}`);
  const total = result.quantity("total");
  caption(panel, `${quantity.title}, at ${tokenName(pickedRow())}${total ? `: ${written(total.at({ token }))} in all` : ""}. Not in the grid: ${alone.join(", ")}. `
    + "Click a head to pick it.", quantity);
  const spec = { label: quantity.heading, rows: layers, columns: columns.map((name) => named(name.replace("_mlp", "MLP").replace("_attn_bias", "bias"))),
    rowTitle: "layer", columnTitle: "head", scale, value: at, widest: 44, picked: [layers.indexOf(String(/\d+/.exec(state.layer)?.[0])), Math.max(0, heads.indexOf(state.head))],
    onpick: (r, c) => select({ layer: layerLabel(layers[r]), ...(c < heads.length ? { head: heads[c] } : {}) }) };
  if (spec.picked[0] < 0) spec.picked = null;
  grid(panel.body, spec);
  return () => gridTable(spec);
}

/** The label of a layer by number where labels are those of states: the state after it. */
function layerLabel(label) {
  const layers = axisLabels("layer");
  return layers.includes(label) ? label : layers.findLast((each) => /\d+/.exec(each)?.[0] === /\d+/.exec(label)?.[0]) ?? label;
}

// [layer head pair]: from token to token

function pairs(panel) {
  const { result } = panel, quantity = shownOf(panel), all = result.pairsOf?.get(state.prompt);
  if (result.text !== text() || !all) return nothing(panel, "This result has no number for this prompt.");
  const rows = tokensShown(), first = rowsOf().indexOf(rows[0]), place = placeOf(quantity), keys = keysOf(result, rows);
  const values = new Map(all.map(([query, key, pair]) => [query * 65536 + key, quantity.at({ ...place, pair })]));
  const at = (query, key) => values.get((query + first) * 65536 + key + (keys === rows ? first : 0));
  const sink = sinkOf(all, values), name = `L${/\d+/.exec(result.labels.layer?.[place.layer] ?? "")?.[0] ?? ""}${result.labels.head?.[place.head] ?? ""}`;
  const names = keys === rows ? rows.map(tokenName) : keys;
  const columns = names.map((label, i) => `${label}${(keys === rows ? i + first : i) === sink?.key ? " ◆" : ""}`);
  const spec = { label: `${quantity.heading} in ${name}`, key: [quantity.id, text().number, state.prompt, place, first], rows: rows.map(tokenName), columns, rowTitle: "from", columnTitle: "to",
    scale: scaleOf(quantity), value: at, picked: keys === rows ? [state.token - first, state.token - first] : null, square: true,
    onpick: (query) => select({ token: query + first }),
    tip: (query, key) => [`${name}: from ${tokenName(rows[query])}`, `to ${names[key]}`, `${quantity.says}: ${written(at(query, key))}`] };
  caption(panel, `${quantity.title}, in ${name}.${sink ? ` ◆ sink: ${keys === rows ? tokenName(rowsOf()[sink.key]) : names[sink.key]} gets ${written(sink.mean)} of a query on average.` : ""}`, quantity);
  grid(panel.body, spec);
  panel.body.querySelector(".strips")?.remove();
  if (keys === rows) panel.body.append(strips(quantity, at, rows, state.token - first));
  return () => gridTable(spec);
}

/** The tokens that are looked at: those that look, or where a result says so the names of others. */
function keysOf(result, rows) {
  if (!result.tokens.key) return rows;
  const other = page.texts[result.tokens.key.text];
  return (other.prompts.get(state.prompt) ?? []).map((row) => `${visible(other.text[row], 14)} ${other.position[row]}`);
}

function placeOf(quantity) {
  const { result } = quantity;
  return { layer: layerOf(result), head: headOf(result) };
}

/** The token that gets most attention of the others, if it gets a third or more. */
function sinkOf(all, values) {
  const sums = new Map();
  for (const [query, key] of all) if (query > key || query < key) {
    const [sum, n] = sums.get(key) ?? [0, 0];
    sums.set(key, [sum + (values.get(query * 65536 + key) ?? 0), n + 1]);
  }
  const means = [...sums].filter(([, [, n]]) => n > 2).map(([key, [sum, n]]) => ({ key, mean: sum / n }));
  const most = means.reduce((best, each) => (each.mean > (best?.mean ?? 1 / 3) ? each : best), null);
  return most;
}

/** What the picked token looks at, and what looks at it, as two coloured strips. */
function strips(quantity, at, rows, picked) {
  const scale = scaleOf(quantity);
  const strip = (title, value) => element("div", { class: "flow" }, element("b", {}, title),
    rows.map((row, i) => {
      const found = value(i);
      if (found === undefined) return null;
      const fill = scale(found);
      return element("span", { class: "token", dir: "auto", title: written(found), style: { background: fill, color: inkOn(fill) } }, visible(text().text[row], 16));
    }));
  return element("div", { class: "strips" }, strip("from it", (i) => at(picked, i)), strip("to it", (i) => at(i, picked)));
}

// Numbers per token or per result

function factsOf(panel) {
  const { result } = panel, token = result.row(text(), pickedRow());
  const value = (each) => {
    if (each.axes.length && token === undefined) return "—";
    const found = each.at({ token });
    return each.into && !Number.isNaN(found) ? visible(result.vocab[found] ?? String(found)) : written(found);
  };
  const medians = (each) => result.classes.filter((own) => !own.layers && own.quantity === each.name)
    .map((own) => `${own.word_class} ${written(own.median[0])} (${own.n})`).join(", ");
  const withMedians = panel.quantities.some(medians);
  const table = { head: ["quantity", "value", ...(withMedians ? ["medians by word class (n)"] : [])],
    rows: panel.quantities.map((each) => [each.title, value(each), ...(withMedians ? [medians(each)] : [])]) };
  const where = panel.quantities.some((each) => each.axes.length) ? `At ${tokenName(pickedRow())}.` : "";
  caption(panel, where);
  panel.body.replaceChildren(element("div", { class: "scroll facts", tabindex: 0, role: "group", "aria-label": panel.title }, tableOf(table, "")));
  return () => table;
}
