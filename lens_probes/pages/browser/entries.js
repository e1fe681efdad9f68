// [layer token k]: the entries of the vocabulary nearest or most probable at the picked token, and those pinned.

/** The ids of the best entries in a layer, the best first. */
function idsAt(top, layer, token) {
  const ids = Array.from({ length: top.size("k") }, (_, k) => top.at({ layer, token, k }));
  return ids.filter((id) => !Number.isNaN(id));
}

/** The number beside an entry: a probability, or a score. */
function besideOf(result) {
  const found = result.over("layer", "token", "k").find((each) => !each.into);
  const probable = found?.name.endsWith("log_prob");
  return found && { title: probable ? "probability" : found.says,
    at: (place) => (probable ? Math.exp(found.at(place)) : found.at(place)) };
}

const entryText = (result, id, longest) => visible(result.vocab[id] ?? `entry ${id}`, longest);

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
    number ? `; beside each: ${number.title}` : ""}. Boxed: the ${what}. Click an entry to pin it and follow it.`);
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
  const head = ["layer", ...(shared ? ["in both"] : []), ...ranks, ...best];
  const cell = (id, layer, k) => {
    const pinned = state.pins.includes(String(id)), value = number?.at({ layer, token, k });
    const button = element("button", { class: pinned ? "entry pinned" : "entry", type: "button", dir: "auto",
      "aria-pressed": String(pinned), title: pinned ? "pinned: click to let go" : "click to pin and follow",
      onclick: () => pin(id) }, element("bdi", {}, entryText(result, id, 16)));
    return element("td", { class: id === own ? "own" : null }, button,
      number ? element("small", {}, ` ${value.toFixed(2)}`) : null);
  };
  const line = (label, layer) => {
    const ids = idsAt(top, layer, token);
    return element("tr", { class: layer === layerOf(result) ? "picked" : null },
      element("th", { scope: "row" }, label),
      shared ? element("td", {}, String(shared(layer))) : null,
      rank ? element("td", { class: ids.includes(own) ? "" : "apart" }, written(rank.at({ layer, token }))) : null,
      ids.map((id, k) => cell(id, layer, k)));
  };
  const table = element("table", { class: "entries" },
    element("caption", { class: "unseen" }, `${top.says}, at ${tokenName(row)}`),
    element("thead", {}, element("tr", {}, head.map((each) => element("th", { scope: "col" }, each)))),
    element("tbody", {}, layers.map(line)));
  const texts = (layer) => idsAt(top, layer, token).map((id, k) =>
    `${entryText(result, id)}${number ? ` ${number.at({ layer, token, k }).toFixed(3)}` : ""}`);
  const label = `${top.says}${shared ? ", the other prompt" : ""}`;
  return { element: element("div", { class: "scroll tall", tabindex: 0, role: "group", "aria-label": label }, table),
    table: { head, rows: layers.map((name, layer) => [name, ...(shared ? [String(shared(layer))] : []),
      ...(rank ? [written(rank.at({ layer, token }))] : []), ...texts(layer)]) } };
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

/** Pinned entries through the layers, or where none is pinned those that are first in any layer. */
function followed(panel) {
  const { result } = panel, token = result.row(text(), pickedRow()), number = besideOf(result);
  if (token === undefined || !number) return nothing(panel, NONE);
  pinning(panel);
  const top = panel.quantities.find((each) => each.into), layers = result.names("layer", top.size("layer"));
  const firsts = [...new Set(layers.map((_, layer) => idsAt(top, layer, token)[0]).reverse())];
  const ids = state.pins.length ? state.pins.map(Number) : firsts.filter((id) => id !== undefined).slice(0, 6);
  const colours = [theme().ink, ...OTHERS];
  const along = (id, row) => layers.map((_, layer) => {
    const k = idsAt(top, layer, row).indexOf(id);
    return k < 0 ? NaN : number.at({ layer, token: row, k });
  });
  const lines = ids.map((id, i) => ({ name: entryText(result, id), colour: colours[i % colours.length],
    wide: i ? 2 : 3, y: along(id, token) }));
  const other = otherRow() === undefined ? undefined : result.row(text(), otherRow());
  if (other !== undefined) {
    lines.push(...ids.map((id, i) => ({ ...lines[i], name: `${lines[i].name} in the other prompt`, dashed: true,
      wide: 1.5, y: along(id, other) })));
  }
  caption(panel, `${state.pins.length ? "The pinned entries" : "The entries that are first in any layer"}, at ${
    tokenName(pickedRow())}${other === undefined ? "" : `; dashed: at ${tokenName(otherRow())} of the other prompt`}. `
    + `A line breaks where its entry is not among the ${top.size("k")} that were kept.`);
  lineChart(panel.body, { label: "Entries by layer", x: layers, lines, xTitle: "layer", yTitle: number.title,
    at: layerOf(result) });
  return () => chartTable(layers, lines, "layer", number.title);
}
