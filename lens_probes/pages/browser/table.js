// Every panel as a table of texts: for screen readers, and for the CSV file.

const SHOWN_ROWS = 400;

/** A table of { head, rows }; the first column names the row. */
function tableOf({ head, rows }, caption) {
  const first = rows.slice(0, SHOWN_ROWS);
  const body = first.map((row) =>
    element("tr", {}, row.map((cell, i) => element(i ? "td" : "th", i ? {} : { scope: "row" }, String(cell)))));
  const more = rows.length > SHOWN_ROWS ? `; the first ${SHOWN_ROWS} of ${rows.length} rows, the CSV file has all` : "";
  return element("table", {},
    caption || more ? element("caption", {}, `${caption}${more}`) : null,
    element("thead", {}, element("tr", {}, head.map((cell) => element("th", { scope: "col" }, cell)))),
    element("tbody", {}, body));
}

/** One row per cell of a grid, so that a spreadsheet can pivot it. */
function gridTable(spec) {
  const head = [spec.rowTitle, spec.columnTitle, spec.scale.title];
  const rows = [];
  spec.rows.forEach((row, r) => spec.columns.forEach((column, c) => {
    const value = spec.value(r, c);
    if (value !== undefined) rows.push([row, column, written(value), ...(spec.text ? [spec.text(r, c)] : [])]);
  }));
  return { head: spec.text ? [...head, spec.textTitle ?? "text"] : head, rows };
}

/** One row per point of a chart's lines; where a line has a band, its bounds stand before it. */
function chartTable(x, lines, xTitle, yTitle) {
  const columns = lines.flatMap(({ name, y, low, high }) => [
    ...(low ? [[`low of ${name}`, low], [`high of ${name}`, high]] : []), [name, y]]);
  return { head: [xTitle, ...columns.map(([name]) => `${name}: ${yTitle}`)],
    rows: x.map((label, i) => [label, ...columns.map(([, values]) => written(values[i]))]) };
}

/** Text that a spreadsheet takes as text: it would run a cell that begins like a formula. */
function csvOf({ head, rows }) {
  const cell = (value) => {
    const text = String(value).replaceAll("−", "-");
    const safe = /^[=+@\t\r]|^-(?![\d.])/.test(text) ? `'${text}` : text;
    return `"${safe.replaceAll('"', '""')}"`;
  };
  return [head, ...rows].map((row) => row.map(cell).join(",")).join("\r\n");
}
