// PNG, SVG and CSV of a panel. Files are named by panel; nothing leaves the browser but these.

function save(name, content, type) {
  const address = URL.createObjectURL(content instanceof Blob ? content : new Blob([content], { type }));
  element("a", { href: address, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(address), 1000);
}

/** The picture of a panel as SVG text: its grids, its table or its chart, below what the panel says of them. */
async function svgOf(panel) {
  const chart = panel.body.querySelector(".js-plotly-plot"), parts = [];
  if (panel.body.querySelector("table")) parts.push(tablePicture(panel.table()));
  if (chart) {
    const address = await Plotly.toImage(chart, { format: "svg" });
    const own = decodeURIComponent(address.slice(address.indexOf(",") + 1));
    parts.push(new DOMParser().parseFromString(own, "image/svg+xml").documentElement);
  } else parts.push(...[...panel.body.querySelectorAll("svg")].map((each) => each.cloneNode(true)));
  return new XMLSerializer().serializeToString(titled(joined(parts, panel), panel));
}

/** A picture with the name of its result and the caption of its panel above it. */
function titled(picture, panel) {
  const [wide, tall] = ["width", "height"].map((name) => Number(picture.getAttribute(name)));
  const width = Math.max(wide, 360), said = panel.caption.textContent.replace(/ Click [^.]*\./g, "") || panel.title;
  const lines = linesOf(`${headingOf(panel.result)}: ${said}`, Math.floor(width / LETTER) - 2);
  const top = 16 * lines.length + 12;
  picture.setAttribute("y", top);
  return drawn("svg", { width, height: tall + top, "font-family": FONT },
    drawn("rect", { width: "100%", height: "100%", fill: theme().paper }),
    ...lines.map((line, i) => drawn("text", { x: 6, y: 16 * i + 18, "font-size": 12, fill: theme().ink }, line)),
    picture);
}

/** A table as a picture; what is cut stands whole in the CSV file. */
function tablePicture({ head, rows }) {
  const all = [head, ...rows.slice(0, SHOWN_ROWS)].map((row) => row.map((cell) => cut(String(cell), 60 * LETTER)));
  const widths = head.map((_, c) => Math.max(...all.map((row) => lettersOf(row[c] ?? ""))) * 6.6 + 14);
  const left = widths.map((_, c) => widths.slice(0, c).reduce((sum, each) => sum + each, 6));
  const texts = all.flatMap((row, r) => row.map((cell, c) => drawn("text", { x: left[c], y: 18 * r + 14,
    fill: theme().ink, "font-size": 11, "font-weight": r && c ? "normal" : "bold" }, cell)));
  const [width, height] = [widths.reduce((sum, each) => sum + each, 6), 18 * all.length + 8];
  return drawn("svg", { width, height, "font-family": FONT }, ...texts);
}

/** Pictures side by side, each below its name if it has one, such as "the other prompt". */
function joined(parts, panel) {
  const all = [...panel.body.querySelectorAll("h4")].map((name) => name.textContent), names = [];
  const top = all.length === parts.length ? 18 : 0;
  let x = 0;
  for (const [i, part] of parts.entries()) {
    part.setAttribute("x", x);
    part.setAttribute("y", top);
    if (top) names.push(drawn("text", { x: x + 6, y: 12, "font-size": 12, fill: theme().faint }, all[i]));
    x += Number(part.getAttribute("width"));
  }
  const height = Math.max(...parts.map((part) => Number(part.getAttribute("height")))) + top;
  return drawn("svg", { width: x, height }, ...names, ...parts);
}

async function pngOf(svg, scale = 2) {
  const picture = new Image();
  picture.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(svg)}`;
  await picture.decode();
  const canvas = element("canvas", { width: picture.width * scale, height: picture.height * scale });
  canvas.getContext("2d").drawImage(picture, 0, 0, canvas.width, canvas.height);
  return new Promise((resolve) => { canvas.toBlob(resolve, "image/png"); });
}

async function exported(panel, format) {
  const name = `${panel.title.replace(/[^\w]+/g, "_").replace(/^_|_$/g, "").slice(0, 60)}.${format}`;
  if (format === "csv") return save(name, `\ufeff${csvOf(panel.table())}`, "text/csv");
  const svg = await svgOf(panel);
  return save(name, format === "svg" ? svg : await pngOf(svg), "image/svg+xml");
}
