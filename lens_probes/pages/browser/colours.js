// Colours: blue scales for amounts, red to blue around 0, word classes as in the figures; all told apart colour-blind.

const LIGHT = {
  up: ["#f7fbff", "#c6dbef", "#6baed6", "#2171b5", "#08306b"],
  around: ["#b2182b", "#ef8a62", "#f7f7f7", "#67a9cf", "#2166ac"],
  ink: "#222222", faint: "#6b6b6b", paper: "#ffffff", missing: "#e3e3e3", mark: "#c2410c", line: "#d8d8d8",
};
const DARK = {
  up: ["#14202e", "#1d3f63", "#2f72ad", "#7db8e8", "#e6f3ff"],
  around: ["#ff8a75", "#a8402f", "#23282f", "#2f72ad", "#8fc7f5"],
  ink: "#e8e8e8", faint: "#a8adb4", paper: "#161a1f", missing: "#33383f", mark: "#ffb454", line: "#3a4048",
};
const CLASSES = {
  content: ["#0072B2", "#4da9e0"], function: ["#D55E00", "#ff8a3d"], number: ["#009E73", "#35c79c"],
  punctuation: ["#AA4499", "#d98acb"], special: ["#777777", "#a5a5a5"],
};
const OTHERS = ["#56B4E9", "#E69F00", "#117733", "#CC6677", "#999933"];

function isDark() {
  return state.theme ? state.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}

const theme = () => (isDark() ? DARK : LIGHT);

function classColour(name, among) {
  if (CLASSES[name]) return CLASSES[name][isDark() ? 1 : 0];
  return OTHERS[among.filter((each) => !CLASSES[each]).indexOf(name) % OTHERS.length];
}

const channels = (colour) => [1, 3, 5].map((i) => parseInt(colour.slice(i, i + 2), 16));

function between(stops, share) {
  const place = Math.min(Math.max(share, 0), 1) * (stops.length - 1);
  const first = Math.min(Math.floor(place), stops.length - 2);
  const [from, to] = [channels(stops[first]), channels(stops[first + 1])];
  const mixed = from.map((channel, i) => Math.round(channel + (to[i] - channel) * (place - first)));
  return `#${mixed.map((channel) => channel.toString(16).padStart(2, "0")).join("")}`;
}

/** Black or white, whichever is read better on a colour. */
function inkOn(colour) {
  const [red, green, blue] = channels(colour).map((channel) => {
    const share = channel / 255;
    return share <= 0.04 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
  });
  return 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.19 ? "#111111" : "#ffffff";
}

/** The colours of a quantity: a function of a value, with the marks of its legend. */
function scaleOf(quantity) {
  const { low, high, signed } = quantity.span;
  const place = quantity.logarithmic ? (value) => Math.log10(Math.max(value, 0) + 1) : (value) => value;
  const [from, to] = [place(low), place(high)];
  const stops = signed ? theme().around : theme().up;
  const share = (value) => {
    const along = (place(value) - from) / (to - from || 1);
    return quantity.low_on_top && !signed ? 1 - along : along;
  };
  const isMissing = (value) => Number.isNaN(value) || value === undefined;
  const scale = (value) => (isMissing(value) ? theme().missing : between(stops, share(value)));
  const middle = signed ? 0 : quantity.logarithmic ? 10 ** ((from + to) / 2) - 1 : (low + high) / 2;
  return Object.assign(scale, { low, high, middle, title: quantity.title });
}
