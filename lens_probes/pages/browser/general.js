// Any other quantity: two of its axes make a grid, one a line or bars; the others follow the selection or are picked.

const ACROSS = ["head", "kv_head", "unit", "component", "topic", "statistic"];
const COLUMNS = 64;

/** Which axes are drawn: those named twice, else layers down and the next across. */
function drawnAxes(quantity) {
  const free = quantity.axes.filter((axis) => axis !== "token" && axis !== "pair");
  const twice = free.find((axis) => free.includes(`other_${axis}`));
  if (twice) return [twice, `other_${twice}`];
  if (free.includes("dimension")) return ["prompt", "dimension"];
  const prompt = free.filter((axis) => axis !== "prompt");
  const rows = prompt.includes("layer") ? "layer" : prompt[0] ?? free[0];
  const across = [...ACROSS, ...prompt].find((axis) => axis !== rows && prompt.includes(axis));
  return across ? [rows, across] : [rows];
}

/** Where a quantity is read on the axes that are not drawn. */
function fixedPlace(panel, quantity, axes) {
  const { result } = panel, place = {};
  for (const axis of quantity.axes.filter((each) => !axes.includes(each))) {
    if (axis === "token") place.token = result.row(text(), pickedRow());
    else if (axis === "prompt" && result.text === text()) place.prompt = state.prompt;
    else if (axis === "layer") place.layer = layerOf(result);
    else if (axis === "head") place.head = headOf(result);
    else {
      const names = result.names(axis, quantity.size(axis));
      place[axis] = Math.min(Number(view(panel.id, axis, 0)) || 0, names.length - 1);
      panel.controls.append(choice(axis.replace("_", " "), names.map((name, i) => [i, name]), place[axis],
        (to) => setView(panel.id, axis, to)));
    }
  }
  return place;
}

function general(panel) {
  const { result } = panel, quantity = shownOf(panel), axes = drawnAxes(quantity);
  const place = fixedPlace(panel, quantity, axes);
  if (quantity.axes.includes("token") && place.token === undefined) return nothing(panel, NONE);
  if ("head" in place && "layer" in place && !quantity.has(place)) return otherHeads(panel, quantity, place);
  const nullOf = result.quantity(quantity.null);
  const isOneNull = nullOf && nullOf.axes.every((axis) => axis in place);
  const where = quantity.axes.includes("token") ? `, at ${tokenName(pickedRow())}`
    : axes[0] !== "layer" && "layer" in place ? `, in ${headName(result, place)}` : "";
  caption(panel, `${quantity.title}${where}.${isOneNull ? ` Null: ${nullOf.says}, ${written(nullOf.at(place))}.` : ""}`,
    quantity);
  return axes.length === 1 ? generalLine(panel, quantity, axes[0], place) : generalGrid(panel, quantity, axes, place);
}

function generalLine(panel, quantity, axis, place) {
  const { result } = panel, names = result.names(axis, quantity.size(axis));
  const along = (each) => names.map((_, i) => each.at({ ...place, [axis]: i })), y = along(quantity);
  if (axis !== "layer") {
    barChart(panel.body, { label: quantity.heading, names, values: y, yTitle: quantity.title, xTitle: axis });
    return () => ({ head: [axis, quantity.says], rows: names.map((name, i) => [name, written(y[i])]) });
  }
  const lines = [{ name: quantity.says, y, colour: theme().around[4], wide: 2.5 }];
  const nullOf = result.quantity(quantity.null);
  if (nullOf?.axes.join() === quantity.axes.join()) {
    lines.push({ name: `null: ${nullOf.says}`, y: along(nullOf), colour: theme().mark, dashed: true });
  }
  lineChart(panel.body, { label: quantity.heading, x: names, lines, xTitle: axis, yTitle: quantity.title,
    upsideDown: quantity.low_on_top, logarithmic: quantity.logarithmic, at: layerOf(result) });
  return () => chartTable(names, lines, axis, quantity.says);
}

function generalGrid(panel, quantity, [down, across], place) {
  const { result } = panel, isSquare = across === "other_prompt";
  const every = result.names(across, quantity.size(across)), names = result.names(down, quantity.size(down));
  const first = isSquare || every.length <= COLUMNS ? 0 : columnsFrom(panel, across, every);
  const order = down === "prompt" && result.prompts ? byTopic(result) : names.map((_, i) => i);
  const rowAt = (r) => order[r], columnAt = isSquare ? rowAt : (c) => c + first;
  const topics = down === "prompt" && result.prompts && order.map((i) => named(result.prompts.topic[i], 16));
  const groups = topics && topics.some((each) => each) ? topics : undefined;
  const shown = isSquare ? every : every.slice(first, first + COLUMNS);
  const spec = { label: quantity.heading, key: [quantity.id, place, first], rows: names.map((_, r) => names[rowAt(r)]),
    columns: shown.map((_, c) => every[columnAt(c)]), rowTitle: down.replace("_", " "),
    columnTitle: across.replace("_", " "), scale: scaleOf(quantity), widest: 44, square: isSquare,
    rowGroups: groups, columnGroups: isSquare ? groups : undefined,
    value: (r, c) => quantity.at({ ...place, [down]: rowAt(r), [across]: columnAt(c) }),
    ...pickIn(result, down, across, first, shown.length) };
  grid(panel.body, spec);
  return () => gridTable(spec);
}

/** The first of the columns that are shown, where there are too many for one grid. */
function columnsFrom(panel, across, every) {
  const picked = across === "unit" ? panel.result.indexOf("unit", state.unit) : 0;
  const first = Number(view(panel.id, "from", picked - (picked % COLUMNS)));
  const starts = Array.from({ length: Math.ceil(every.length / COLUMNS) }, (_, i) => i * COLUMNS);
  const from = starts.includes(first) ? first : 0;
  const last = (start) => every[Math.min(start + COLUMNS, every.length) - 1];
  panel.controls.append(choice(across, starts.map((start) => [start, `${every[start]} to ${last(start)}`]), from,
    (to) => setView(panel.id, "from", to)));
  return from;
}

/** The prompts in the order of their topics. */
function byTopic(result) {
  const { topic } = result.prompts;
  return topic.map((_, i) => i).sort((a, b) => (topic[a] < topic[b] ? -1 : topic[a] > topic[b] ? 1 : a - b));
}

/** A grid by layer and head (or unit) shows the picked one, and a click picks another. `first`: its first column. */
function pickIn(result, down, across, first, columns) {
  if (down !== "layer") return {};
  const picks = ["head", "unit"].includes(across), picked = picks ? result.indexOf(across, state[across]) - first : 0;
  return { picked: picked >= 0 && picked < columns ? [layerOf(result), picked] : null,
    onpick: (r, c) => select({ layer: layerLabel(result.labels.layer[r]),
      ...(picks ? { [across]: result.labels[across][c + first] } : {}) }) };
}
