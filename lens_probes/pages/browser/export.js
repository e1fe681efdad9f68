// PNG, SVG and CSV of a panel. Files are named by panel; nothing leaves the browser but these.

function save(name, content, type) {
  const address = URL.createObjectURL(content instanceof Blob ? content : new Blob([content], { type }));
  element("a", { href: address, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(address), 1000);
}

/** The picture of a panel as SVG text: a grid's own, or a chart's. */
async function svgOf(body) {
  const chart = body.querySelector(".js-plotly-plot");
  if (chart) {
    const address = await Plotly.toImage(chart, { format: "svg" });
    return decodeURIComponent(address.slice(address.indexOf(",") + 1));
  }
  const parts = [...body.querySelectorAll("svg")].map((each) => each.cloneNode(true));
  const copy = parts.length > 1 ? joined(parts) : parts[0];
  copy.setAttribute("xmlns", "http://www.w3.org/2000/svg");
  copy.prepend(drawn("rect", { width: "100%", height: "100%", fill: theme().paper }));
  return new XMLSerializer().serializeToString(copy);
}

/** Pictures side by side. */
function joined(parts) {
  let x = 0;
  for (const part of parts) {
    part.setAttribute("x", x);
    x += Number(part.getAttribute("width"));
  }
  const height = Math.max(...parts.map((part) => Number(part.getAttribute("height"))));
  return drawn("svg", { width: x, height }, ...parts);
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
  const svg = await svgOf(panel.body);
  return save(name, format === "svg" ? svg : await pngOf(svg), "image/svg+xml");
}
