// Any other quantity: two of its axes make a grid, one a line or bars; the others follow the selection or are picked.

const ACROSS = ["head", "kv_head", "unit", "component", "topic", "statistic"];
const COLUMNS = 64;

/** Which axes are drawn: those named twice, else layers down and the next across. */
function drawnAxes(quantity) {
  const free = quantity.axes.filter((axis) => axis !== "token" && axis !== "pair");
  const twice = free.find((axis) => free.includes(`other_${axis}`));
  if (twice) return [twice, `other_${twice}`];
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
      panel.controls.append(choice(axis.replace("_", " "), names.map((name, i) => [i, name]), place[axis], (to) => setView(panel.id, axis, to)));
    }
  }
  return place;
}

function general(panel) {
  const { result } = panel, quantity = shownOf(panel), axes = drawnAxes(quantity), place = fixedPlace(panel, quantity, axes);
  if (quantity.axes.includes("token") && place.token === undefined) return nothing(panel, "This result has no number for this token.");
  const nullOf = result.quantity(quantity.null);
  const baseline = nullOf && nullOf.axes.every((axis) => axis in place) ? ` Null: ${nullOf.says}, ${written(nullOf.at(place))}.` : "";
  const where = quantity.axes.includes("token") ? `, at ${tokenName(pickedRow())}` : axes[0] !== "layer" && "layer" in place
    ? `, in L${/\d+/.exec(result.labels.layer[place.layer])[0]}${"head" in place ? result.labels.head[place.head] : ""}` : "";
  caption(panel, `${quantity.title}${where}.${baseline}`, quantity);
  return axes.length === 1 ? generalLine(panel, quantity, axes[0], place) : generalGrid(panel, quantity, axes, place);
}

function generalLine(panel, quantity, axis, place) {
  const names = panel.result.names(axis, quantity.size(axis)), y = names.map((_, i) => quantity.at({ ...place, [axis]: i }));
  if (axis !== "layer") {
    barChart(panel.body, { label: quantity.heading, names, values: y, yTitle: quantity.title, xTitle: axis });
    return () => ({ head: [axis, quantity.says], rows: names.map((name, i) => [name, written(y[i])]) });
  }
  const lines = [{ name: quantity.says, y, colour: theme().around[4], wide: 2.5 }];
  const nullOf = panel.result.quantity(quantity.null);
  if (nullOf?.axes.join() === quantity.axes.join()) {
    lines.push({ name: `null: ${nullOf.says}`, y: names.map((_, i) => nullOf.at({ ...place, [axis]: i })), colour: theme().mark, dashed: true });
  }
  lineChart(panel.body, { label: quantity.heading, x: names, lines, xTitle: axis, yTitle: quantity.title, upsideDown: quantity.low_on_top,
    logarithmic: quantity.logarithmic, at: layerOf(panel.result) });
  return () => chartTable(names, lines, axis, quantity.says);
}

function generalGrid(panel, quantity, [down, across], place) {
  const { result } = panel, rows = result.names(down, quantity.size(down));
  let columns = result.names(across, quantity.size(across)), first = 0, order = null;
  if (across === "other_prompt") order = byTopic(result);
  else if (columns.length > COLUMNS) {
    first = Math.min(Number(view(panel.id, "from", 0)) || 0, columns.length - 1);
    const starts = Array.from({ length: Math.ceil(columns.length / COLUMNS) }, (_, i) => i * COLUMNS);
    panel.controls.append(choice(across, starts.map((start) => [start, `${columns[start]} to ${columns[Math.min(start + COLUMNS, columns.length) - 1]}`]),
      first, (to) => setView(panel.id, "from", to)));
    columns = columns.slice(first, first + COLUMNS);
  }
  const topics = order?.map((i) => named(result.prompts.topic[i], 16)), groups = topics?.some((each) => each) ? topics : undefined;
  const index = (i) => (order ? order[i] : i);
  const spec = { label: quantity.heading, key: [quantity.id, place, first], rows: rows.map((_, i) => rows[index(i)]), columns: columns.map((_, i) => columns[index(i)]),
    rowTitle: down.replace("_", " "), columnTitle: across.replace("_", " "), scale: scaleOf(quantity), widest: 44, rowGroups: groups, columnGroups: groups,
    square: down === "prompt" && across === "other_prompt",
    value: (r, c) => quantity.at({ ...place, [down]: index(r), [across]: index(c) + first }), ...pickIn(result, down, across) };
  grid(panel.body, spec);
  return () => gridTable(spec);
}

const byTopic = (result) => result.prompts.topic.map((topic, i) => [topic, i]).sort((a, b) => (a[0] < b[0] ? -1 : a[0] > b[0] ? 1 : a[1] - b[1])).map(([, i]) => i);

/** A grid by layer and head shows the picked head, and a click picks another. */
function pickIn(result, down, across) {
  if (down !== "layer") return {};
  const picks = across === "head";
  return { picked: [layerOf(result), picks ? headOf(result) : 0],
    onpick: (r, c) => select({ layer: layerLabel(result.labels.layer[r]), ...(picks ? { head: result.labels.head[c] } : {}) }) };
}
