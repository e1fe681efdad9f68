// The selection: which prompt, token, layer, head and pinned entries. The address's fragment holds it.

const state = {
  text: 0, prompt: 0, token: 0, layer: "", head: "", unit: "", colour: "", other: "", pins: [], views: {}, theme: "",
};
const listeners = [];
const alsoKept = {}; // what a served page keeps in the address beside it: its question

/** Change the selection; everything that follows it is told. */
function select(change) {
  Object.assign(state, change);
  for (const listener of listeners) listener();
  keepInAddress();
}

/** What a panel shows where it has a choice of its own. */
function view(panel, name, otherwise) {
  return state.views[`${panel}.${name}`] ?? otherwise;
}

function setView(panel, name, value) {
  select({ views: { ...state.views, [`${panel}.${name}`]: String(value) } });
}

function fragment() {
  const { pins, views, ...plainly } = state;
  const kept = { ...alsoKept, ...plainly, pins: pins.join(",") };
  for (const [name, value] of Object.entries(views)) kept[`v.${name}`] = value;
  return new URLSearchParams(Object.entries(kept).filter(([, value]) => value !== "")).toString();
}

const BETWEEN = 300; // ms: browsers refuse many changes of the address at once, as of a key that is held down
let lastWrite = -BETWEEN, due = 0;

/** Write the selection into the address, at once or as soon as that is allowed again. */
function keepInAddress() {
  if (due) return;
  const wait = lastWrite + BETWEEN - performance.now();
  if (wait <= 0) return writeAddress();
  due = setTimeout(writeAddress, wait);
  document.body.dataset.writing = "yes";
}

function writeAddress() {
  clearTimeout(due);
  due = 0;
  lastWrite = performance.now();
  delete document.body.dataset.writing;
  try {
    history.replaceState(null, "", `#${fragment()}`);
  } catch {
    return; // in a notebook's frame there is no address to keep it in
  }
}

/** The address's fragment, with all that is selected. */
function addressNow() {
  if (due) writeAddress();
  return location.hash;
}

/** The selection of an address, of which only what is known is taken. */
function fromAddress(hash) {
  const found = new URLSearchParams(hash.replace(/^#/, ""));
  const change = { views: {} };
  for (const name of ["text", "prompt", "token"]) {
    if (/^\d+$/.test(found.get(name) ?? "")) change[name] = Number(found.get(name));
  }
  for (const name of ["layer", "head", "unit", "colour", "other", "theme"]) {
    if (found.has(name)) change[name] = found.get(name);
  }
  if (found.has("pins")) change.pins = found.get("pins").split(",").filter((each) => /^\d+$/.test(each));
  for (const [name, value] of found) if (name.startsWith("v.")) change.views[name.slice(2)] = value;
  return change;
}
