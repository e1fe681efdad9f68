// What each result shows follows from the axes of its quantities: each group of equal axes is one panel.
//
// A panel: { id, title, result, wide, draw(panel) -> () => table }. It draws the selection of `state`, and keeps
// choices of its own with `view(id, name)`. One that `compares` is wide while two prompts are compared.

function panelsOf(result) {
  const panels = [];
  const add = (key, title, draw, more = {}) => panels.push({ id: `${result.id}-${key}`, title, result, draw, ...more });
  const hasExamples = result.over("example", "window").length > 0;
  const shown = result.quantities.filter((each) => !isOnlyNull(each) && !(hasExamples && isOfExamples(each)));
  const byAxes = Map.groupBy(shown, (each) => each.axes.join(" ")), facts = [];
  for (const [axes, quantities] of byAxes) {
    const numbers = quantities.filter((each) => !each.into);
    const key = axes.replaceAll(" ", "-"), token = { quantities: numbers, token: true, compares: true };
    if (axes === "layer token" && numbers.length) {
      add("grid", "By layer and token", gridOfPrompt, { ...token, wide: true });
      add("path", "The picked token through the layers", pathOfToken, { ...token, compares: false, chart: true });
    } else if (axes === "layer token k" && quantities.some((each) => each.into)) {
      add("entries", "Entries at the picked token, by layer", entriesOfToken, { ...token, quantities, wide: true });
      add("followed", "Entries followed through layers and tokens", followed,
        { ...token, quantities, compares: false, chart: true });
    } else if (axes === "layer unit token" && numbers.length) {
      add("units", "Units of the picked layer by token", unitsOfPrompt, { ...token, compares: false, wide: true });
    } else if (axes === "component token") {
      add("components", "Heads and MLPs at the picked token", components, token);
    } else if (axes.endsWith(" pair")) {
      add(key, "From token to token, in the picked head", pairs, token);
    } else if (axes === "" || axes === "token") facts.push(...quantities);
    else if (numbers.length) {
      const { axes: own } = numbers[0];
      add(key, generalTitle(numbers), general,
        { quantities: numbers, token: own.includes("token"), wide: own.includes("unit") });
    }
  }
  if (hasExamples) add("examples", "Examples of the picked unit", examples, { wide: true });
  if (!result.over("layer", "token").length && result.classes.some((each) => each.layers)) {
    add("classes", "Word classes through the layers", classesOfCorpus, { chart: true });
  }
  if (facts.length) {
    const ofToken = facts.some((each) => each.axes.length);
    add("facts", ofToken ? "At the picked token" : "In one number", factsOf, { quantities: facts, token: ofToken });
  }
  return panels;
}

/** A null that has fewer axes than its quantity stands in the caption of that. */
function isOnlyNull(quantity) {
  const { quantities } = quantity.result;
  return quantities.some((each) => each.null === quantity.name && each.axes.length > quantity.axes.length);
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
    const options = panel.quantities.map((each) => [each.name, each.says]);
    panel.controls.append(choice("show", options, quantity.name, (name) => setView(panel.id, "q", name)));
  }
  return quantity;
}

const layerOf = (result) => result.indexOf("layer", state.layer);
const headOf = (result) => result.indexOf("head", state.head);

function caption(panel, text, quantity) {
  const rounded = quantity?.rounded ? ` Rounded to steps of at most ${written(quantity.rounded)}.` : "";
  panel.caption.textContent = `${text}${rounded}${heldOf(quantity)}`;
}

/** Which heads or units the page holds, where it does not hold all. */
function heldOf(quantity) {
  if (!quantity?.in_cells) return "";
  const { shape, axes, result } = quantity;
  return ` All would be too many for a page: it holds ${result.cells.length} of ${shape[0] * shape[1]} ${axes[1]}s.`;
}

function nothing(panel, why, ...more) {
  panel.body.replaceChildren(element("p", { class: "nothing" }, why), ...more);
  return () => ({ head: ["nothing"], rows: [] });
}

const NONE = "This result has no number for this token.";

// [layer token]: the grid of the prompt

function gridSpec(panel, quantity, prompt) {
  const { result } = panel;
  const rows = tokensShown(prompt).filter((row) => result.row(text(), row) !== undefined);
  const own = rows.map((row) => result.row(text(), row));
  const top = result.over("layer", "token", "k").find((each) => each.into);
  const numbers = result.over("layer", "token").filter((each) => !each.into);
  const entry = (layer, token, k = 0) => result.vocab[top.at({ layer, token, k })] ?? "";
  const tip = (layer, c) => [`${result.labels.layer[layer]}, ${tokenName(rows[c])}`,
    ...numbers.map((each) => `${each.says}: ${written(each.at({ layer, token: own[c] }))}`),
    ...(top ? bestOf(result, top, layer, own[c]) : [])];
  return {
    label: `${quantity.heading}: ${text().line(prompt)}`, key: [quantity.id, text().number, prompt, rows[0]],
    rows: result.names("layer", quantity.size("layer")), columns: rows.map(tokenName),
    rowTitle: "layer", columnTitle: "token", scale: scaleOf(quantity), tip, rowsShown: rows,
    value: (layer, c) => quantity.at({ layer, token: own[c] }),
    text: top && ((layer, c) => visible(entry(layer, own[c]), 12)), textTitle: top?.says,
    picked: prompt === state.prompt ? [layerOf(result), rows.indexOf(pickedRow())] : null,
    outlined: top ? outlines(top, own) : [],
    onpick: (layer, c) => select({ layer: result.labels.layer[layer], token: rowsOf().indexOf(rows[c]) }),
  };
}

/** The cells where a pinned entry is among the best. */
function outlines(top, own) {
  const found = [], pinned = new Set(state.pins.map(Number));
  if (!pinned.size) return found;
  for (let layer = 0; layer < top.size("layer"); layer += 1) {
    own.forEach((token, c) => {
      if (idsAt(top, layer, token).some((id) => pinned.has(id))) found.push([layer, c]);
    });
  }
  return found;
}

function gridOfPrompt(panel) {
  const quantity = shownOf(panel);
  const spec = gridSpec(panel, quantity, state.prompt);
  caption(panel, `${quantity.title}.${spec.text ? " In each cell the top entry." : ""}${windowed()}`, quantity);
  if (!spec.columns.length) return nothing(panel, "This result has no number for this prompt.");
  if (isCompared()) return compared(panel, spec, gridSpec(panel, quantity, Number(state.other)));
  grid(panel.body, spec);
  return () => gridTable(spec);
}

/** Which tokens a grid shows, where it does not show all. */
function windowed() {
  const all = rowsOf().length, first = firstShown();
  return all <= WINDOW ? ""
    : ` Tokens ${first} to ${first + WINDOW - 1} of ${all}; the window follows the picked one.`;
}

// [layer token]: the path of the picked token, with its null and the word classes

function pathOfToken(panel) {
  const { result } = panel, quantity = shownOf(panel), token = result.row(text(), pickedRow());
  if (token === undefined) return nothing(panel, NONE);
  const layers = result.names("layer", quantity.size("layer"));
  const along = (each, row) => layers.map((_, layer) => each.at({ layer, token: row }));
  const nullOf = result.quantity(quantity.null);
  const classes = result.classes.filter((each) => each.layers && each.quantity === quantity.name);
  const chosen = view(panel.id, "beside", classes.length ? "classes" : "tokens");
  const options = [["tokens", "tokens of the prompt"], ["none", "nothing"]];
  if (classes.length) options.unshift(["classes", "medians of word classes"]);
  panel.controls.append(choice("beside", options, chosen, (to) => setView(panel.id, "beside", to)));
  const lines = [];
  if (chosen === "classes") {
    const ofNull = result.classes.filter((each) => each.layers && each.quantity === quantity.null);
    lines.push(...classLines(classes, ofNull));
  }
  if (chosen === "tokens") {
    for (const row of tokensShown()) {
      const own = result.row(text(), row);
      if (own === undefined || own === token) continue;
      lines.push({ name: tokenName(row), y: along(quantity, own), colour: theme().faint, wide: 0.7 });
    }
  }
  const band = nullOf?.axes.includes("token") && nullBand(nullOf, pickedRow());
  if (nullOf) {
    const y = along(nullOf, token);
    lines.push({ name: `null: ${nullOf.says}`, y, ...band, colour: theme().mark, wide: 1.5, dashed: true });
  }
  const thick = { name: tokenName(pickedRow()), y: along(quantity, token), colour: theme().ink, wide: 4 };
  const other = otherRow() === undefined ? undefined : result.row(text(), otherRow());
  if (other !== undefined) {
    const name = `${tokenName(otherRow())} of the other prompt`;
    lines.push({ name, y: along(quantity, other), colour: theme().around[3], wide: 4 });
  }
  lines.push(thick);
  const apart = other === undefined ? [] : [{ name: "the other minus this one",
    y: layers.map((_, layer) => quantity.at({ layer, token: other }) - thick.y[layer]) }];
  caption(panel, [`${quantity.title}. Thick: the picked token.`, nullOf && `Dashed: ${nullOf.says}.`,
    band && `Its band: ${band.said}.`,
    chosen === "classes" && `${band ? "Other bands" : "Bands"}: 95 % intervals of the medians.`,
    ...apart.map(({ name, y }) => `In ${layers[layerOf(result)]}, ${name}: ${written(y[layerOf(result)])}.`),
  ].filter(Boolean).join(" "), quantity);
  lineChart(panel.body, { label: `${quantity.heading} of ${tokenName(pickedRow())} by layer`, x: layers, lines,
    xTitle: "layer", yTitle: quantity.title, upsideDown: quantity.low_on_top, logarithmic: quantity.logarithmic,
    at: layerOf(result) });
  return () => chartTable(layers, [...apart, ...lines], "layer", quantity.says);
}

/** In which range the null of the picked token's word class lies, layer by layer; found once per class. */
function nullBand(nullOf, picked) {
  const { word_class: classes, special } = text(), own = classes[picked], { result } = nullOf;
  nullOf.bands ??= new Map();
  const key = JSON.stringify([own, special[picked]]);
  if (!nullOf.bands.has(key)) {
    const alike = classes.map((_, row) => row).filter((row) => classes[row] === own && special[row] === special[picked])
      .map((row) => result.row(text(), row)).filter((token) => token !== undefined);
    const sorted = Array.from({ length: nullOf.size("layer") }, (_, layer) => Float64Array.from(
      alike.map((token) => nullOf.at({ layer, token })).filter((value) => !Number.isNaN(value))).sort());
    const n = Math.max(...sorted.map((values) => values.length)), tail = n < 20 ? 0 : 0.05;
    const bound = (share) => sorted.map((values) => values[Math.round(share * (values.length - 1))] ?? null);
    nullOf.bands.set(key, n < 2 ? null : { low: bound(tail), high: bound(1 - tail),
      said: `${tail ? "the middle 90 % of " : ""}the null of ${n}${own ? ` ${named(own)}` : ""} tokens` });
  }
  return nullOf.bands.get(key);
}

/** Where no token is kept, as of a corpus: medians by word class. */
function classesOfCorpus(panel) {
  const { result } = panel, all = result.classes.filter((each) => each.layers);
  const names = [...new Map(all.map((each) => [each.quantity, each.title]))];
  const chosen = view(panel.id, "q"), name = names.some(([known]) => known === chosen) ? chosen : names[0][0];
  panel.controls.append(choice("show", names, name, (to) => setView(panel.id, "q", to)));
  const shown = all.filter((each) => each.quantity === name);
  const [{ title, low_on_top, logarithmic }] = shown, nulls = all.filter((each) => each.quantity === shown[0].null);
  const lines = classLines(shown, nulls);
  const layers = result.labels.layer.map((label) => named(label));
  caption(panel, `${title}: medians. Bands: 95 % intervals.${nulls.length ? ` Dashed: ${nulls[0].title}.` : ""}`);
  lineChart(panel.body, { label: title, x: layers, lines, xTitle: "layer", yTitle: title, upsideDown: low_on_top,
    logarithmic, at: layerOf(result) });
  return () => chartTable(layers, lines, "layer", title);
}

function classLines(classes, nulls) {
  const names = classes.map((each) => each.word_class);
  const isShown = (each, among) => each.n >= 10 || among.every((other) => other.n < 10);
  const lines = (found, dashed) => found.filter((each) => isShown(each, found)).map((each) => ({
    name: `${each.word_class}${dashed ? ": null" : ` (${each.n} words)`}`, y: each.median.map((value) => value ?? NaN),
    low: dashed ? undefined : each.low, high: dashed ? undefined : each.high,
    colour: classColour(each.word_class, names), dashed, wide: dashed ? 1.2 : 2 }));
  return [...lines(classes, false), ...lines(nulls, true)];
}

// [component token]: what heads and MLPs add

function components(panel) {
  const { result } = panel, quantity = shownOf(panel), token = result.row(text(), pickedRow());
  const isKnown = (row) => row !== undefined && !Number.isNaN(quantity.at({ component: 0, token: row }));
  if (!isKnown(token)) return nothing(panel, "This token has no target: pick an earlier one.");
  const names = result.labels.component, place = new Map(names.map((name, i) => [name, i]));
  const alone = names.filter((name) => !/^L\d/.test(name))
    .map((name) => `${name} ${written(quantity.at({ component: place.get(name), token }))}`);
  const total = result.quantity("total");
  caption(panel, `${quantity.title}, at ${tokenName(pickedRow())}${
    total ? `: ${written(total.at({ token }))} in all` : ""}. Not in the grid: ${alone.join(", ")}. `
    + "Click a head to pick it.", quantity);
  const spec = componentsSpec(quantity, place, token);
  if (isCompared()) {
    const other = otherRow() === undefined ? undefined : result.row(text(), otherRow());
    return compared(panel, spec, isKnown(other) ? componentsSpec(quantity, place, other) : null);
  }
  grid(panel.body, spec);
  return () => gridTable(spec);
}

function componentsSpec(quantity, place, token) {
  const names = [...place.keys()];
  const found = (pattern) => [...new Set(names.map((name) => pattern.exec(name)?.[1]).filter(Boolean))];
  const layers = found(/^L(\d+)/), parts = found(/^L\d+(.+)$/);
  const heads = parts.filter((part) => part.startsWith("H"));
  const columns = [...heads, ...parts.filter((part) => !part.startsWith("H")).reverse()];
  const value = (r, c) => {
    const component = place.get(`L${layers[r]}${columns[c]}`);
    return component === undefined ? undefined : quantity.at({ component, token });
  };
  const most = Math.max(...layers.flatMap((_, r) => columns.map((__, c) => Math.abs(value(r, c) ?? 0)))) || 1;
  const row = layers.indexOf(String(numberIn(state.layer)));
  return { label: quantity.heading, rows: layers, rowTitle: "layer", columnTitle: "head", value, widest: 44,
    columns: columns.map((name) => named(name.replace("_mlp", "MLP").replace("_attn_bias", "bias"))),
    scale: scaleOf({ title: quantity.title, span: { low: -most, high: most, signed: true } }),
    picked: row < 0 ? null : [row, Math.max(0, heads.indexOf(state.head))],
    onpick: (r, c) => select({ layer: layerLabel(layers[r]), ...(c < heads.length ? { head: heads[c] } : {}) }) };
}

/** The label of a layer by number where labels are those of states: the state after it. */
function layerLabel(label) {
  const layers = axisLabels("layer");
  return layers.includes(label) ? label : layers.findLast((each) => numberIn(each) === numberIn(label)) ?? label;
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
  caption(panel, panel.quantities.some((each) => each.axes.length) ? `At ${tokenName(pickedRow())}.` : "");
  panel.body.replaceChildren(
    element("div", { class: "scroll facts", tabindex: 0, role: "group", "aria-label": panel.title },
      tableOf(table, "")));
  return () => table;
}
