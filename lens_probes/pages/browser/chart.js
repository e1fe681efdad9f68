// Lines and bars, drawn by Plotly in the colours of the page.

const CHART = { displayModeBar: false }; // the page draws anew when its width changes

/** Text in lines of about so many letters. */
function linesOf(title, longest) {
  const lines = [""];
  for (const word of title.split(" ")) {
    if (lines.at(-1) && lines.at(-1).length + word.length >= longest) lines.push("");
    lines[lines.length - 1] += `${lines.at(-1) ? " " : ""}${word}`;
  }
  return lines;
}

function axisOf(title, more = {}) {
  const { ink, line } = theme();
  const text = linesOf(title, 40).map(plain).join("<br>");
  return { title: { text, font: { size: 12 }, standoff: 8 }, color: ink, gridcolor: line, zerolinecolor: line,
     linecolor: ink, tickfont: { size: 11 }, automargin: true, ...more };
}

function drawChart(body, traces, layout, label) {
  const { ink, paper } = theme();
  let place = body.querySelector(".chart");
  if (!place) {
    place = element("div", { class: "chart", role: "img" });
    body.replaceChildren(place);
  }
  place.setAttribute("aria-label", `${label}. The numbers are in the table below.`);
  const named = traces.filter((trace) => trace.showlegend !== false && trace.name);
  const rows = layout.showlegend === false ? 0 : legendRows(named.map((trace) => trace.name), widthOf(body) - 60);
  Plotly.react(place, traces, {
    font: { family: FONT, color: ink, size: 12 }, paper_bgcolor: paper, plot_bgcolor: paper,
    margin: { l: 66, r: 14, t: 10, b: 60 + 20 * rows }, width: widthOf(body), height: 310 + 20 * rows,
    hovermode: "closest", showlegend: true,
    legend: { orientation: "h", x: 0, y: 0, yref: "container", yanchor: "bottom", font: { size: 11 } }, ...layout,
  }, CHART);
}

/** How many rows names take, one after the other. */
function legendRows(names, room) {
  let rows = 1, left = room;
  for (const name of names) {
    const wide = name.length * 6.2 + 56;
    if (wide > left && left < room) [rows, left] = [rows + 1, room];
    left -= wide;
  }
  return rows;
}

/** Lines over named places. A line: { name, y, colour, wide, dashed, low, high }. */
function lineChart(body, { label, x, lines, xTitle, yTitle, upsideDown, logarithmic, at }) {
  const traces = [], has0 = lines.some((line) => line.y.includes(0) || line.low?.includes(0));
  const added = logarithmic && has0 ? 1 : 0; // no 0 on such an axis
  for (const line of lines) {
    const name = plain(line.name);
    if (line.low) traces.push(bandOf(line, x, name, added));
    const y = line.y.map((value) => (Number.isNaN(value) ? null : value + added));
    const look = { color: line.colour, width: line.wide ?? 2, dash: line.dashed ? "dash" : "solid" };
    traces.push({ type: "scatter", mode: modeOf(line.y), x, y, customdata: line.y, name, legendgroup: name, line: look,
      hovertemplate: "%{x}: %{customdata:.4~g}", connectgaps: false });
  }
  const shapes = at === undefined ? [] : [{ type: "line", x0: at, x1: at, yref: "paper", y0: 0, y1: 1,
    line: { color: theme().mark, width: 1.5, dash: "dot" } }];
  const type = logarithmic ? { type: "log" } : {};
  const yaxis = axisOf(added ? `1 + ${yTitle}` : yTitle, { autorange: upsideDown ? "reversed" : true, ...type });
  drawChart(body, traces, { xaxis: axisOf(xTitle, namedTicks(body)), yaxis, shapes }, label);
  body.querySelector(".chart").dataset.lines = lines.length;
}

/** An axis of names, of which as many are written as there is room for. */
const namedTicks = (body) => ({ type: "category", nticks: Math.max(4, Math.round(widthOf(body) / 55)) });

/** A line, with points where one of them may have no neighbour. */
function modeOf(y) {
  const isKnown = (i) => Number.isFinite(y[i] ?? NaN);
  return y.some((_, i) => isKnown(i) && !isKnown(i - 1) && !isKnown(i + 1)) ? "lines+markers" : "lines";
}

function bandOf(line, x, name, added) {
  const known = x.map((_, i) => i).filter((i) => line.low[i] !== null && line.high[i] !== null);
  return { type: "scatter", mode: "lines", fill: "toself", fillcolor: `${line.colour}26`, line: { width: 0 },
    x: [...known.map((i) => x[i]), ...known.map((i) => x[i]).reverse()], legendgroup: name, showlegend: false,
    hoverinfo: "skip",
    y: [...known.map((i) => line.high[i] + added), ...known.map((i) => line.low[i] + added).reverse()] };
}

/** Bars with intervals where there are any. */
function barChart(body, { label, names, values, low, high, colours, yTitle, xTitle, logarithmic }) {
  const interval = low && { error_y: { type: "data", symmetric: false, array: values.map((y, i) => (high[i] ?? y) - y),
    arrayminus: values.map((y, i) => y - (low[i] ?? y)), color: theme().ink } };
  drawChart(body, [{ type: "bar", x: names.map(plain), y: values, marker: { color: colours ?? theme().around[4] },
    hovertemplate: "%{x}: %{y:.4~g}<extra></extra>", ...interval }],
    { xaxis: axisOf(xTitle ?? "", namedTicks(body)), yaxis: axisOf(yTitle, logarithmic ? { type: "log" } : {}),
      showlegend: false, bargap: 0.4 }, label);
}
