// [layer token k]: the entries of the vocabulary nearest or most probable at the picked token, and those pinned.

/** The ids of the best entries in a layer, the best first. */
function idsAt(top, layer, token) {
  const ids = Array.from({ length: top.size("k") }, (_, k) => top.at({ layer, token, k }));
  return ids.filter((id) => !Number.isNaN(id));
}

/** The number beside an entry: a probability, or a score; `own`: that of the token's own entry, or of the target. */
function besideOf(result) {
  const found = result.over("layer", "token", "k").find((each) => !each.into);
  const own = found && result.over("layer", "token").find((each) => found.name.endsWith(`_${each.name}`));
  const probable = found?.name.endsWith("log_prob");
  const read = (quantity) => (place) => (probable ? Math.exp(quantity.at(place)) : quantity.at(place));
  return found && { title: probable ? "probability" : found.says, at: read(found), own: own && read(own) };
}

/** The text of an entry, from those of the result or of the prompts. */
const entryText = (result, id, longest) =>
  visible(result.vocab[id] ?? text()?.text[text().id.indexOf(Number(id))] ?? `entry ${id}`, longest);

function bestOf(result, top, layer, token) {
  const number = besideOf(result);
  return idsAt(top, layer, token).map((id, k) =>
    `${number ? `${number.at({ layer, token, k }).toFixed(3)}  ` : ""}${entryText(result, id)}`);
}

function entriesOfToken(panel) {
  const { result } = panel, token = result.row(text(), pickedRow());
  if (token === undefined) return nothing(panel, NONE);
  const top = panel.quantities.find((each) => each.into), number = besideOf(result);
  const what = result.quantity("target_id") ? "target" : "own token";
  caption(panel, `${top.says.charAt(0).toUpperCase()}${top.says.slice(1)}, at ${tokenName(pickedRow())}${
    number ? `; beside each: ${number.title}` : ""}. Boxed: the ${what}; where it is not among these, it stands in the `
    + "last column with its rank. Click an entry to pin it and follow it.");
  const own = entriesTable(panel, top, number, pickedRow());
  const other = otherRow() === undefined ? undefined : result.row(text(), otherRow());
  if (other === undefined) {
    panel.body.replaceChildren(own.element);
    return () => own.table;
  }
  const shared = entriesTable(panel, top, number, otherRow(), (layer) => {
    const ids = new Set(idsAt(top, layer, token));
    return idsAt(top, layer, other).filter((id) => ids.has(id)).length;
  });
  beside(panel.body, ["this prompt", "the other prompt"], [own.element, shared.element]);
  return () => ({ head: ["prompt", ...shared.table.head], rows: [
    ...own.table.rows.map(([layer, ...row]) => ["this prompt", layer, "", ...row]),
    ...shared.table.rows.map((row) => ["the other prompt", ...row])] });
}

/** The entries at a token, as an element and as a table of texts. `shared(layer)`: how many both prompts have. */
function entriesTable(panel, top, number, row, shared = null) {
  const { result } = panel, token = result.row(text(), row);
  const rank = result.over("layer", "token").find((each) => each.name === "rank");
  const target = result.quantity("target_id"), own = target?.at({ token }) ?? text().id[row];
  const layers = result.names("layer", top.size("layer"));
  const ranks = rank ? [`rank of ${target ? "target" : "own token"}`] : [];
  const best = Array.from({ length: top.size("k") }, (_, k) => String(k + 1));
  const isApart = (layer) => rank && !Number.isNaN(own) && !idsAt(top, layer, token).includes(own);
  const last = rank ? [target ? "target" : "own token"] : [];
  const head = ["layer", ...(shared ? ["in both"] : []), ...ranks, ...best, ...last];
  const saidOf = (layer, digits) => `${
    number?.own ? `${written(Number(number.own({ layer, token }).toPrecision(digits)))}, ` : ""}rank ${
    written(rank.at({ layer, token }))}`;
  const cell = (id, said) => {
    const pinned = state.pins.includes(String(id));
    const button = element("button", { class: pinned ? "entry pinned" : "entry", type: "button", dir: "auto",
      "aria-pressed": String(pinned), title: pinned ? "pinned: click to let go" : "click to pin and follow",
      onclick: () => pin(id) }, element("bdi", {}, entryText(result, id, 16)));
    return element("td", { class: id === own ? "own" : null }, button,
      said ? element("small", {}, ` ${said}`) : null);
  };
  const line = (label, layer) => {
    const ids = idsAt(top, layer, token);
    return element("tr", { class: layer === layerOf(result) ? "picked" : null },
      element("th", { scope: "row" }, label),
      shared ? element("td", {}, String(shared(layer))) : null,
      rank ? element("td", { class: ids.includes(own) ? "" : "apart" }, written(rank.at({ layer, token }))) : null,
      ids.map((id, k) => cell(id, number?.at({ layer, token, k }).toFixed(2))),
      Array.from({ length: last.length ? best.length - ids.length : 0 }, () => element("td")),
      isApart(layer) ? cell(own, saidOf(layer, 2)) : null);
  };
  const table = element("table", { class: "entries" },
    element("caption", { class: "unseen" }, `${top.says}, at ${tokenName(row)}`),
    element("thead", {}, element("tr", {}, head.map((each) => element("th", { scope: "col" }, each)))),
    element("tbody", {}, layers.map(line)));
  const texts = (layer) => best.map((_, k) => {
    const id = idsAt(top, layer, token)[k];
    return id === undefined ? "" : `${entryText(result, id)}${
      number ? ` ${number.at({ layer, token, k }).toFixed(3)}` : ""}`;
  });
  const lastText = (layer) => (isApart(layer) ? `${entryText(result, own)} ${saidOf(layer, 4)}` : "");
  const label = `${top.says}${shared ? ", the other prompt" : ""}`;
  return { element: element("div", { class: "scroll tall", tabindex: 0, role: "group", "aria-label": label }, table),
    table: { head, rows: layers.map((name, layer) => [name, ...(shared ? [String(shared(layer))] : []),
      ...(rank ? [written(rank.at({ layer, token }))] : []), ...texts(layer), ...last.map(() => lastText(layer))]) } };
}

function pin(id) {
  const name = String(id), isPinned = state.pins.includes(name);
  select({ pins: isPinned ? state.pins.filter((each) => each !== name) : [...state.pins, name] });
}

/** A box that pins any entry whose text the file holds, and a button for each pinned one that lets it go. */
function pinning(panel) {
  const { result } = panel, list = element("datalist", { id: `${panel.id}-entries` });
  const entries = Object.entries(result.vocab);
  const matching = (typed) => entries.filter(([id, own]) => `#${id}` === typed || visible(own, 60).includes(typed));
  const said = element("span", { role: "status" });
  const box = element("input", { type: "text", list: list.id, "aria-label": "pin an entry", autocomplete: "off",
    spellcheck: "false", placeholder: "text or #id", size: 14,
    oninput: () => {
      const found = matching(visible(box.value, 60)).slice(0, 20);
      list.replaceChildren(...found.map(([id, own]) => element("option", { value: `#${id}` }, visible(own, 60))));
    },
    onchange: () => {
      const typed = visible(box.value, 60), found = matching(typed);
      const [id] = found.find(([, own]) => visible(own, 60) === typed) ?? (found.length === 1 ? found[0] : []);
      if (id !== undefined && !state.pins.includes(id)) pin(id);
      else if (typed) said.textContent = `${found.length || "None"} of the ${entries.length} entries here ${
        found.length > 1 ? "match" : "matches"}: type it whole, or its #id.`;
    } });
  panel.controls.append(element("label", { class: "choice" }, element("span", {}, "pin"), box), list,
    ...state.pins.map((id) => element("button", { type: "button", "aria-label": `let go of ${entryText(result, id)}`,
      onclick: () => pin(id) }, `${entryText(result, id)} ×`)), said);
}

/** Pinned entries through layers or tokens, or where none is pinned those that are first in any layer. */
function followed(panel) {
  const { result } = panel, token = result.row(text(), pickedRow()), number = besideOf(result);
  if (token === undefined || !number) return nothing(panel, NONE);
  pinning(panel);
  const top = panel.quantities.find((each) => each.into), layers = result.names("layer", top.size("layer"));
  const firsts = [...new Set(layers.map((_, layer) => idsAt(top, layer, token)[0]).reverse())];
  const ids = state.pins.length ? state.pins.map(Number) : firsts.filter((id) => id !== undefined).slice(0, 6);
  const colours = [theme().ink, ...OTHERS], overTokens = view(panel.id, "over", "layers") === "tokens";
  panel.controls.append(choice("over", [["layers", "layers"], ["tokens", "tokens of the prompt"]],
    overTokens ? "tokens" : "layers", (to) => setView(panel.id, "over", to)));
  const other = otherRow() === undefined ? undefined : result.row(text(), otherRow());
  const placesOf = (prompt, row) => (overTokens
    ? tokensShown(prompt).map((each) => ({ layer: layerOf(result), token: result.row(text(), each) }))
    : layers.map((_, layer) => ({ layer, token: row })));
  const along = (id, places) => places.map((place) => {
    const k = place.token === undefined ? -1 : idsAt(top, place.layer, place.token).indexOf(id);
    return k < 0 ? NaN : number.at({ ...place, k });
  });
  const lines = ids.map((id, i) => ({ name: entryText(result, id), colour: colours[i % colours.length],
    wide: i ? 2 : 3, y: along(id, placesOf(state.prompt, token)) }));
  const x = overTokens ? tokensShown().map(tokenName) : layers, axis = overTokens ? "token" : "layer";
  if (other !== undefined) {
    const places = placesOf(Number(state.other), other).slice(0, x.length);
    lines.push(...ids.map((id, i) => ({ ...lines[i], name: `${lines[i].name} in the other prompt`, dashed: true,
      wide: 1.5, y: along(id, places) })));
  }
  const where = overTokens ? `in ${layers[layerOf(result)]}` : `at ${tokenName(pickedRow())}`;
  const there = () =>
    (overTokens ? "in the other prompt, by position" : `at ${tokenName(otherRow())} of the other prompt`);
  caption(panel, `${state.pins.length ? "The pinned entries" : "The entries that are first in any layer"}, ${where}${
    other === undefined ? "" : `; dashed: ${there()}`}. A line breaks where its entry is not among the ${
    top.size("k")} that were kept.${overTokens ? windowed() : ""}`);
  lineChart(panel.body, { label: `Entries by ${axis}`, x, lines, xTitle: axis, yTitle: number.title,
    at: overTokens ? state.token - firstShown() : layerOf(result) });
  return () => chartTable(x, lines, axis, number.title);
}
