// Examples of a unit: where a corpus activates it most, the same of random tokens, and all of its activations.

const AXES_OF_EXAMPLES = ["example", "sample", "bin", "edge"];

/** Whether a quantity is a part of the panel of examples. */
const isOfExamples = ({ axes }) =>
  axes.join(" ") === "layer unit k" || axes.some((axis) => AXES_OF_EXAMPLES.includes(axis));

function examples(panel) {
  const { result } = panel, layer = layerOf(result), unit = unitOf(result, layer);
  const [value] = result.over("layer", "unit", "k").filter((each) => !each.into);
  if (unit === undefined) return noUnit(panel, layer);
  const place = { layer, unit }, share = result.over("layer", "unit")[0];
  caption(panel, `${pickUnit(panel, layer, unit)}.${
    share ? ` ${share.heading}: ${written(share.at(place))}.` : ""}`, value);
  const lists = [["the largest activations", listOf(result, place)], ["random tokens, the most active first",
    randomOf(result, place)]].filter(([, rows]) => rows.length);
  panel.histogram ??= element("div"); // kept, so that its chart is
  beside(panel.body, [...lists.map(([title]) => title), "all tokens"],
    [...lists.map(([title, rows]) => examplesTable(title, rows, value)), panel.histogram]);
  histogram(panel.histogram, result, place, value);
  return () => ({ head: ["list", value.says, "position", "before", "token", "after"],
    rows: lists.flatMap(([title, rows]) => rows.map((row) =>
      [title, written(row.value), written(row.position), row.before, row.token, row.after])) });
}

/** The context of an example, and where it stands in its prompt. */
function contextOf(result, example) {
  const [context] = result.over("example", "window"), [position] = result.over("example");
  const n = context.size("window"), middle = (n - 1) / 2;
  const texts = Array.from({ length: n }, (_, window) => result.vocab[context.at({ example, window })] ?? "");
  const joined = (from, to) => named(texts.slice(from, to).join(""));
  return { position: position.at({ example }), before: joined(0, middle), token: joined(middle, middle + 1),
    after: joined(middle + 1, n) };
}

/** The examples with the largest activations. */
function listOf(result, place) {
  const both = result.over("layer", "unit", "k"), value = both.find((each) => !each.into);
  const example = both.find((each) => each.into);
  return Array.from({ length: value.size("k") }, (_, k) => ({ ...place, k }))
    .filter((at) => !Number.isNaN(example.at(at)))
    .map((at) => ({ value: value.at(at), ...contextOf(result, example.at(at)) }));
}

/** The tokens of the random sample. */
function randomOf(result, place) {
  const [value] = result.over("layer", "unit", "sample"), [example] = result.over("sample");
  if (!value || !example) return [];
  return Array.from({ length: value.size("sample") }, (_, sample) =>
    ({ value: value.at({ ...place, sample }), ...contextOf(result, example.at({ sample })) }))
    .sort((one, other) => other.value - one.value);
}

function examplesTable(title, rows, value) {
  const line = (row) => element("tr", {}, element("th", { scope: "row" }, written(row.value)),
    element("td", {}, written(row.position)),
    element("td", { class: "context", dir: "auto" }, row.before, element("mark", {}, row.token), row.after));
  const head = [nameOf(value), "position", "context"].map((name) => element("th", { scope: "col" }, name));
  return element("div", { class: "scroll tall", tabindex: 0, role: "group", "aria-label": title },
    element("table", { class: "examples" }, element("caption", { class: "unseen" }, title),
      element("thead", {}, element("tr", {}, head)), element("tbody", {}, rows.map(line))));
}

/** How many tokens have which activation. */
function histogram(body, result, place, value) {
  const [counts] = result.over("layer", "unit", "bin"), [edge] = result.over("edge");
  const all = Array.from({ length: counts.size("bin") }, (_, bin) => counts.at({ ...place, bin }));
  const first = all.findIndex((n) => n > 0), last = all.findLastIndex((n) => n > 0);
  const bins = all.map((_, bin) => bin).slice(Math.max(first, 0), last + 1);
  barChart(body, { label: "Number of tokens by activation", values: bins.map((bin) => all[bin]), logarithmic: true,
    names: bins.map((bin) => `${written(edge.at({ edge: bin }))} to ${written(edge.at({ edge: bin + 1 }))}`),
    xTitle: nameOf(value), yTitle: counts.title });
}

/** "activation" of "activation, the largest first". */
const nameOf = (quantity) => quantity.says.replace(/,.*/, "");
