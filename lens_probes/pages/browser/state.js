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

/** In a notebook's frame there is no address to keep it in. */
function keepInAddress() {
  try {
    history.replaceState(null, "", `#${fragment()}`);
  } catch {
    return;
  }
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
