// Two prompts side by side, and the difference of their numbers position by position.

function compared(panel, first, second) {
  const n = Math.min(first.columns.length, second.columns.length);
  const apart = (r, c) => second.value(r, c) - first.value(r, c);
  const most = Math.max(...first.rows.flatMap((_, r) => Array.from({ length: n }, (__, c) => Math.abs(apart(r, c)))).filter(Number.isFinite), 0) || 1;
  const columns = Array.from({ length: n }, (_, c) => (first.columns[c] === second.columns[c] ? first.columns[c]
    : `${second.columns[c].replace(/ \d+$/, "")} − ${first.columns[c]}`));
  const difference = { ...first, columns, value: apart, text: null, outlined: [], picked: first.picked?.[1] < n ? first.picked : null,
    label: `Difference: ${first.scale.title}`, scale: scaleOf({ title: `difference of ${first.scale.title}`, span: { low: -most, high: most, signed: true } }),
    tip: (r, c) => [`${first.rows[r]}, ${columns[c]}`, `${written(first.value(r, c))} and ${written(second.value(r, c))}`, `difference: ${written(apart(r, c))}`] };
  const parts = [["this prompt", first], ["the other prompt", { ...second, onpick: null }], ["the other minus this one, by position", difference]];
  panel.body.replaceChildren(element("div", { class: "beside" }, parts.map(([title]) => element("div", {}, element("h4", {}, title), element("div", {})))));
  parts.forEach(([, spec], i) => grid(panel.body.firstChild.children[i].lastChild, spec));
}
