// A grid of coloured cells as SVG: rows and columns with labels, a text in each cell, one cell picked, some outlined.

const FONT = "Helvetica, Arial, sans-serif";
const LETTER = 6.3; // pixels, of labels at 11 px

const lettersOf = (label) => [...label].reduce((sum, each) => sum + (each.codePointAt(0) > 0x2e7f ? 2 : 1), 0);

function cut(text, room) {
  const most = Math.floor(room / LETTER);
  return lettersOf(text) <= most ? text : most < 3 ? "" : `${[...text].slice(0, most - 1).join("")}…`;
}

/** Sizes of a grid in the width that there is; wider ones scroll in their panel. */
function layoutOf(spec, width) {
  const [n, m] = [spec.rows.length, spec.columns.length];
  const longestRow = Math.max(...spec.rows.map(lettersOf)), longestColumn = Math.max(...spec.columns.map(lettersOf));
  const left = spec.rowGroups ? 110 : Math.min(Math.max(longestRow * LETTER + 12, 54), 130);
  const narrowest = spec.text ? 40 : spec.columnGroups ? 3 : 12;
  const w = Math.max(narrowest, Math.min((width - left - 14) / m, spec.widest ?? 84));
  const slanted = !spec.columnGroups && longestColumn * LETTER + 6 > w;
  const top = (spec.columnGroups ? 74 : slanted ? Math.min(longestColumn, 14) * 4.9 + 16 : 22) + 16;
  const h = spec.square ? Math.max(3, Math.min(w, 26)) : spec.rowGroups ? Math.max(3, Math.min(w, 8)) : 18;
  const wide = spec.square ? h : w;
  return { n, m, left, w: wide, h, top, slanted, width: Math.max(left + wide * m + 40, 250), height: top + h * n + 52 };
}

function labels(svg, spec, at) {
  const { ink, faint } = theme();
  const text = (x, y, content, more = {}) =>
    svg.append(drawn("text", { x, y, fill: ink, "font-size": 11, ...more }, content));
  text(at.left, 12, cut(`${spec.columnTitle} →`, at.width - at.left), { fill: faint });
  text(2, 12, cut(`${spec.rowTitle} ↓`, at.left - 4), { fill: faint });
  // Every nth, and the picked one, which takes the room of its neighbours.
  const isWritten = (i, picked, n) => i === picked || (i % n === 0 && !(Math.abs(i - picked) < n));
  const everyRow = Math.ceil(12 / at.h), everyColumn = Math.ceil(13 / at.w);
  if (spec.rowGroups) grouped(spec.rowGroups, (name, middle) =>
    text(at.left - 6, at.top + (middle + 0.5) * at.h + 4, cut(name, at.left - 8), { "text-anchor": "end" }));
  else spec.rows.forEach((label, r) => {
    const picked = spec.picked?.[0] === r;
    if (!isWritten(r, spec.picked?.[0], everyRow)) return;
    text(at.left - 6, at.top + (r + 0.5) * at.h + 4, cut(label, at.left - 8),
      { "text-anchor": "end", "font-weight": picked ? "bold" : "normal" });
  });
  const slant = (c, label, weight = "normal") => {
    const [x, y] = [at.left + (c + 0.5) * at.w, at.top - 6];
    text(x, y, cut(label, 92), { transform: `rotate(-50 ${x} ${y})`, "font-weight": weight });
  };
  if (spec.columnGroups) grouped(spec.columnGroups, (name, middle) => slant(middle, name));
  else spec.columns.forEach((label, c) => {
    const weight = spec.picked?.[1] === c ? "bold" : "normal";
    if (!isWritten(c, spec.picked?.[1], everyColumn)) return;
    if (at.slanted) slant(c, label, weight);
    else text(at.left + (c + 0.5) * at.w, at.top - 6, label, { "text-anchor": "middle", "font-weight": weight });
  });
}

/** Runs of equal names: each with its middle. */
function grouped(groups, each) {
  for (let first = 0; first < groups.length;) {
    let last = first;
    while (groups[last + 1] === groups[first]) last += 1;
    each(groups[first], (first + last) / 2, first);
    first = last + 1;
  }
}

function legend(svg, scale, x, y) {
  const { ink } = theme();
  const n = 24, wide = 7;
  for (let i = 0; i < n; i += 1) {
    const along = i / (n - 1);
    const value = along < 0.5 ? scale.low + (scale.middle - scale.low) * along * 2
      : scale.middle + (scale.high - scale.middle) * (along - 0.5) * 2;
    svg.append(drawn("rect", { x: x + i * wide, y, width: wide + 0.5, height: 9, fill: scale(value) }));
  }
  const mark = (value, anchor, at) => svg.append(drawn("text",
    { x: at, y: y + 22, fill: ink, "font-size": 10.5, "text-anchor": anchor }, written(Number(value.toPrecision(3)))));
  mark(scale.low, "start", x);
  mark(scale.middle, "middle", x + (n * wide) / 2);
  mark(scale.high, "end", x + n * wide);
}

/** Draw a grid into a panel's body; `spec.onpick(row, column)` is told of clicks and arrow keys.
 *
 * Specs of one `key` differ in the pick only: then the cells stay, and only labels and marks are drawn again.
 */
function grid(body, spec) {
  const width = widthOf(body), key = JSON.stringify([spec.key, isDark(), width]), before = grids.get(body);
  const same = spec.key !== undefined && before?.key === key && body.contains(before.area);
  const now = same ? Object.assign(before, { spec }) : fresh(body, spec, width, key);
  now.marks.replaceChildren();
  labels(now.marks, spec, now.at);
  marked(now.marks, spec, now.at);
  if (spec.picked && now.at.width > width) intoSight(now.area, now.at.left + spec.picked[1] * now.at.w, now.at.w);
}

const grids = new WeakMap(); // what stands in a body: { key, spec, at, area, marks }

function fresh(body, spec, width, key) {
  const at = layoutOf(spec, width);
  const svg = drawn("svg", { width: at.width, height: at.height, viewBox: `0 0 ${at.width} ${at.height}`,
    "font-family": FONT, "aria-hidden": "true" });
  const cells = drawn("g", { "font-size": 10.5, "text-anchor": "middle" }), marks = drawn("g");
  const gap = gapOf(at);
  for (let r = 0; r < at.n; r += 1) {
    for (let c = 0; c < at.m; c += 1) {
      const value = spec.value(r, c);
      if (value === undefined) continue;
      const fill = spec.scale(value), x = at.left + c * at.w, y = at.top + r * at.h;
      cells.append(drawn("rect", { x, y, width: at.w - gap, height: at.h - gap, fill }));
      const label = spec.text && cut(spec.text(r, c), at.w - 3);
      if (label) cells.append(drawn("text", { x: x + at.w / 2, y: y + 13, fill: inkOn(fill) }, label));
    }
  }
  svg.append(cells, marks);
  borders(svg, spec, at);
  legend(svg, spec.scale, at.left, at.top + at.h * at.n + 12);
  const help = `${spec.onpick ? "Arrow keys move the selection. " : ""}The numbers are in the table below.`;
  const area = element("div",
    { class: "scroll", tabindex: 0, role: "group", "aria-label": `${spec.label}. ${help}` }, svg);
  const now = { key, spec, at, area, marks };
  grids.set(body, now);
  listen(now, svg);
  body.replaceChildren(area);
  return now;
}

const gapOf = (at) => (at.h > 6 ? 1 : 0);

/** The picked cell, and those outlined. */
function marked(marks, spec, at) {
  const gap = gapOf(at);
  const outline = (r, c, more) => marks.append(drawn("rect", { x: at.left + c * at.w, y: at.top + r * at.h,
    width: at.w - gap, height: at.h - gap, fill: "none", stroke: theme().mark, ...more }));
  for (const [r, c] of spec.outlined ?? []) outline(r, c, { "stroke-width": 1.5, "stroke-dasharray": "3 2" });
  if (spec.picked) outline(...spec.picked, { "stroke-width": 2.5, class: "picked" });
}

function borders(svg, spec, at) {
  const [right, below] = [at.left + at.m * at.w, at.top + at.n * at.h];
  const line = (x1, y1, x2, y2) =>
    svg.append(drawn("line", { x1, y1, x2, y2, stroke: theme().ink, "stroke-width": 0.6 }));
  const down = (c) => line(at.left + c * at.w, at.top, at.left + c * at.w, below);
  const across = (r) => line(at.left, at.top + r * at.h, right, at.top + r * at.h);
  if (spec.columnGroups) grouped(spec.columnGroups, (_, __, first) => down(first));
  if (spec.rowGroups) grouped(spec.rowGroups, (_, __, first) => across(first));
}

/** The width of a panel's body as last measured: to ask for it while drawing would lay out the page each time. */
const widths = new WeakMap();
const widthOf = (body) => widths.get(body) || body.clientWidth || 600;

function intoSight(area, x, width) {
  const isOut = x < area.scrollLeft + 60 || x + width > area.scrollLeft + area.clientWidth;
  if (isOut) area.scrollLeft = x - area.clientWidth / 2;
}

function listen(now, svg) {
  const { at, area } = now;
  const cellOf = (event) => {
    const box = svg.getBoundingClientRect();
    const c = Math.floor((event.clientX - box.left - at.left) / at.w);
    const r = Math.floor((event.clientY - box.top - at.top) / at.h);
    return r >= 0 && c >= 0 && r < at.n && c < at.m && now.spec.value(r, c) !== undefined ? [r, c] : null;
  };
  svg.addEventListener("mousemove", (event) => {
    const { spec } = now, cell = cellOf(event);
    const plainly = (r, c) => [`${spec.rows[r]}, ${spec.columns[c]}: ${written(spec.value(r, c))}`];
    if (cell) showTip(event, (spec.tip ?? plainly)(...cell));
    else hideTip();
  });
  svg.addEventListener("mouseleave", hideTip);
  svg.addEventListener("click", (event) => { const cell = cellOf(event); if (cell) now.spec.onpick?.(...cell); });
  area.addEventListener("keydown", (event) => {
    const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (!step || !now.spec.onpick) return;
    event.preventDefault();
    const [r, c] = now.spec.picked ?? [0, 0];
    now.spec.onpick(Math.min(Math.max(r + step[0], 0), at.n - 1), Math.min(Math.max(c + step[1], 0), at.m - 1));
  });
}

// The tip beside the pointer: lines of text.

function showTip(event, lines) {
  const tip = document.getElementById("tip");
  tip.replaceChildren(...lines.map((line) => element("div", {}, line)));
  tip.hidden = false;
  const [wide, tall] = [tip.offsetWidth, tip.offsetHeight];
  const below = event.clientY + 18, above = Math.max(4, event.clientY - tall - 10);
  tip.style.left = `${Math.max(4, Math.min(event.clientX + 14, innerWidth - wide - 8))}px`;
  tip.style.top = `${below + tall > innerHeight ? above : below}px`;
}

function hideTip() {
  document.getElementById("tip").hidden = true;
}
