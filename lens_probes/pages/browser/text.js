// Text of tokens, topics and models reaches the page through here: as text, never as HTML.

const UNSEEN = /[\p{Cc}\p{Cf}\p{Zl}\p{Zp}\p{Co}\p{Cn}\p{Cs}]/u;
const RIGHT_TO_LEFT = /[\p{Script=Hebrew}\p{Script=Arabic}\p{Script=Syriac}\p{Script=Thaana}\p{Script=Nko}]/u;

function seen(character) {
  if (character === "\n") return "⏎";
  if (character === "\t") return "⇥";
  if (/\p{Zs}/u.test(character)) return "·";
  return UNSEEN.test(character) ? `\\u${character.codePointAt(0).toString(16).padStart(4, "0")}` : character;
}

/** A token as it is shown: spaces as ·, line ends as ⏎, unseen characters by number, cut if it is long. */
function visible(text, longest = 24) {
  const shown = [...text].map(seen).join("");
  const cut = [...shown].length > longest ? `${[...shown].slice(0, longest - 1).join("")}…` : shown;
  return RIGHT_TO_LEFT.test(cut) ? `\u2068${cut}\u2069` : cut;
}

/** The same for names and sentences, whose spaces are no news. */
function named(text, longest = 400) {
  return text.split(" ").map((part) => visible(part, longest)).join(" ");
}

/** Text for a label of Plotly, which reads some of HTML. */
function plain(text) {
  return text.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");
}

/** A number in four digits, or — where there is none. */
function written(value) {
  if (value === null || value === undefined || Number.isNaN(value)) return "—";
  if (!Number.isFinite(value)) return value > 0 ? "∞" : "−∞";
  const whole = Number.isInteger(value) || Math.abs(value) >= 10000;
  const text = whole ? Math.round(value).toLocaleString("en") : String(Number(value.toPrecision(4)));
  return text.replace("-", "−");
}

/** An element with attributes, listeners (onclick: ...) and children; texts become text nodes. */
function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else if (key === "style") Object.assign(made.style, value);
    else made.setAttribute(key, value === true ? "" : value);
  }
  made.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return made;
}

/** The same in SVG. */
function drawn(name, attributes = {}, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

/** A choice among [value, text] pairs. */
function choice(label, options, chosen, onchoose) {
  const select = element("select", { onchange: () => onchoose(select.value), "aria-label": label });
  for (const [value, text] of options) {
    select.append(element("option", { value, selected: String(value) === String(chosen) }, text));
  }
  return element("label", { class: "choice" }, element("span", {}, label), select);
}
