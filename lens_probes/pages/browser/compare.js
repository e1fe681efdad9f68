// Two prompts side by side, and the difference of their numbers position by position.

/** A name of this prompt and one of the other, where they differ. */
const bothNames = (one, other) => (one === other ? one : `${other.replace(/ \d+$/, "")} − ${one}`);

/** The numbers of the other prompt minus those of this one, where both have some. */
function difference(first, second) {
  const apart = (r, c) => {
    const one = first.value(r, c), other = second.value(r, c);
    return one === undefined || other === undefined ? undefined : other - one;
  };
  const rows = first.rows.slice(0, second.rows.length).map((name, r) => bothNames(name, second.rows[r]));
  const columns = first.columns.slice(0, second.columns.length).map((name, c) => bothNames(name, second.columns[c]));
  const all = rows.flatMap((_, r) => columns.map((__, c) => Math.abs(apart(r, c)))).filter(Number.isFinite);
  const most = Math.max(...all, 0) || 1, span = { low: -most, high: most, signed: true };
  const isIn = first.picked && first.picked[0] < rows.length && first.picked[1] < columns.length;
  return { ...first, rows, columns, value: apart, text: first.text && (() => ""), outlined: [],
    picked: isIn ? first.picked : null, label: `Difference: ${first.scale.title}`,
    scale: scaleOf({ title: `difference of ${first.scale.title}`, span }),
    tip: (r, c) => [`${rows[r]}, ${columns[c]}`, `${written(first.value(r, c))} and ${written(second.value(r, c))}`,
      `difference: ${written(apart(r, c))}`] };
}

/** Draw a grid of this prompt, one of the other, and their difference; gives the table of all three. */
function compared(panel, first, second) {
  if (!second?.columns.length || !second.rows.length) {
    grid(panel.body, first);
    panel.body.append(element("p", { class: "nothing" }, "The other prompt has no number here."));
    return () => gridTable(first);
  }
  const specs = [first, { ...second, onpick: null }, difference(first, second)];
  const titles = ["this prompt", "the other prompt", "the other minus this one, by position"];
  const places = specs.map(() => element("div"));
  beside(panel.body, titles, places);
  specs.forEach((spec, i) => grid(places[i], spec));
  return () => {
    const tables = specs.map(gridTable);
    return { head: ["prompt", ...tables[0].head],
      rows: tables.flatMap(({ rows }, i) => rows.map((row) => [titles[i], ...row])) };
  };
}

/** Parts of a panel side by side, each with a title. */
function beside(body, titles, parts) {
  body.replaceChildren(element("div", { class: "beside" },
    parts.map((part, i) => element("div", {}, element("h4", {}, titles[i]), part))));
}
