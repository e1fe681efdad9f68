// What `packed` wrote, read back: results with labelled arrays.

const FARTHEST = 16; // nats: colours end there, or the first layers would leave none for the others
const ARRAYS = { uint8: Uint8Array, uint16: Uint16Array, int32: Int32Array, float32: Float32Array };

/** An array as it was sent: its values are computed where they are read. */
async function unpacked(packed) {
  const letters = atob(packed.data), bytes = new Uint8Array(letters.length);
  for (let i = 0; i < letters.length; i += 1) bytes[i] = letters.charCodeAt(i);
  const inflating = new DecompressionStream("deflate"), writer = inflating.writable.getWriter();
  writer.write(bytes);
  writer.close();
  const codes = new ARRAYS[packed.type](await new Response(inflating.readable).arrayBuffer());
  const { type, missing, low = [0], step = [1] } = packed, size = Math.ceil(codes.length / low.length) || 1;
  const rounded = (i) => {
    const group = low.length > 1 ? Math.floor(i / size) : 0;
    return codes[i] === missing ? NaN : low[group] + step[group] * codes[i];
  };
  return { read: type === "float32" ? (i) => codes[i] : rounded, length: codes.length };
}

const cellName = (layer, other) => `${layer} ${other}`;

/** A quantity: its declaration, and `at({axis: index})`. */
class Quantity {
  constructor(declared, values, result) {
    Object.assign(this, declared);
    this.values = values;
    this.result = result;
    this.id = `${result.id}.${declared.name}`;
    this.rounded = (declared.values.step ?? []).reduce((most, step) => Math.max(most, step), 0);
    this.heading = declared.says.charAt(0).toUpperCase() + declared.says.slice(1);
  }

  size(axis) {
    return this.shape[this.axes.indexOf(axis)];
  }

  /** Whether the page holds the numbers of a layer and head (or unit). */
  has(place) {
    return !this.in_cells || this.result.cellOf.has(cellName(place.layer, place[this.axes[1]]));
  }

  /** Where in its array a place is. */
  indexOf(place) {
    const { axes, shape, in_cells } = this;
    const last = axes.length - (this.symmetric ? 2 : 0);
    let index = in_cells ? this.result.cellOf.get(cellName(place.layer, place[axes[1]])) : 0;
    for (let i = in_cells ? 2 : 0; i < last; i += 1) index = index * shape[i] + place[axes[i]];
    if (this.symmetric) {
      const [i, j] = [place[axes[last]], place[axes[last + 1]]].sort((a, b) => b - a);
      const n = shape[last];
      index = index * ((n * (n + 1)) / 2) + (i * (i + 1)) / 2 + j;
    }
    return index;
  }

  at(place) {
    return this.has(place) ? this.values.read(this.indexOf(place)) : NaN;
  }

  /** Its numbers along the last axis, at a place on the others: quicker than asking for each. */
  along(place) {
    if (!this.has(place)) return () => NaN;
    const first = this.indexOf({ ...place, [this.axes.at(-1)]: 0 });
    return (i) => this.values.read(first + i);
  }

  /** Whether a number is of a special token: a unit's activation there may be hundreds of times larger. */
  isAside(i) {
    const { text, tokens } = this.result, row = i % this.shape.at(-1);
    if (!text || this.axes.join(" ") !== "layer unit token") return false;
    return Boolean(text.special[tokens.token.rows?.[row] ?? row]);
  }

  /** The bounds of its colours: those declared, or what 2 % of its values lie beyond. */
  get span() {
    if (!this.spanned) {
      const step = Math.max(1, Math.floor(this.values.length / 20000));
      const some = [];
      for (let i = 0; i < this.values.length; i += step) some.push(this.values.read(i));
      const ordinary = some.filter((_, n) => !this.isAside(n * step));
      const known = Float64Array.from((ordinary.length ? ordinary : some).filter(Number.isFinite)).sort();
      const quantile = (share) => known[Math.round(share * (known.length - 1))] ?? 0;
      const above = this.high === null || this.high > 0;
      const signed = above && (this.low === null ? quantile(0) < 0 && quantile(1) > 0 : this.low < 0);
      const far = this.unit === "nats" && !this.logarithmic ? FARTHEST : Infinity;
      const low = Math.max(this.low ?? quantile(0.02), -far), high = Math.min(this.high ?? quantile(0.98), far);
      const farthest = Math.max(Math.abs(quantile(0.01)), Math.abs(quantile(0.99))) || 1;
      this.spanned = signed ? { low: -farthest, high: farthest, signed }
        : { low, high: high > low ? high : low + 1, signed };
    }
    return this.spanned;
  }
}

/** A table of tokens, with its prompts. */
class Text {
  constructor(packed, number) {
    Object.assign(this, packed);
    this.number = number;
    this.prompts = new Map();
    this.lines = new Map();
    packed.prompt.forEach((prompt, row) => {
      if (!this.prompts.has(prompt)) this.prompts.set(prompt, []);
      this.prompts.get(prompt).push(row);
    });
  }

  /** The beginning of a prompt, in one line. */
  line(prompt) {
    if (!this.lines.has(prompt)) {
      const rows = this.prompts.get(prompt).filter((row) => !this.special[row]).slice(0, 80);
      this.lines.set(prompt, named(rows.map((row) => this.text[row]).join("").trim(), 60));
    }
    return this.lines.get(prompt);
  }
}

/** The pairs of a prompt: `at(query, key)` is the number of one on the axis of pairs, or undefined. */
class Pairs {
  constructor() {
    this.queries = 0;
    this.keys = 0;
    this.numbers = [];
  }

  at(query, key) {
    const number = query >= 0 && query < this.queries && key >= 0 && key < this.keys
      ? this.numbers[query * this.keys + key] : 0;
    return number ? number - 1 : undefined;
  }
}

/** The pairs of each prompt, from what was sent. */
function pairsByPrompt(prompt, query, key) {
  const found = new Map();
  for (let i = 0; i < prompt.length; i += 1) {
    if (!found.has(prompt.read(i))) found.set(prompt.read(i), new Pairs());
    const own = found.get(prompt.read(i));
    own.queries = Math.max(own.queries, query.read(i) + 1);
    own.keys = Math.max(own.keys, key.read(i) + 1);
  }
  for (const own of found.values()) own.numbers = new Uint32Array(own.queries * own.keys); // 0: no pair
  for (let i = 0; i < prompt.length; i += 1) {
    const own = found.get(prompt.read(i));
    own.numbers[query.read(i) * own.keys + key.read(i)] = i + 1;
  }
  return found;
}

class Result {
  constructor(packed, texts, number) {
    Object.assign(this, packed);
    this.id = `r${number}`;
    this.text = this.tokens.token ? texts[this.tokens.token.text] : null;
    const rows = this.tokens.token?.rows;
    this.rowOf = rows ? new Map(rows.map((row, own) => [row, own])) : null;
    this.cellOf = new Map(packed.cells.map((cell, i) => [cellName(...cell), i]));
  }

  static async read(packed, texts, number) {
    const result = new Result(packed, texts, number);
    const arrays = await Promise.all(packed.quantities.map((each) => unpacked(each.values)));
    result.quantities = packed.quantities.map((each, i) => new Quantity(each, arrays[i], result));
    if (packed.pairs) {
      const columns = ["prompt", "query", "key"].map((name) => unpacked(packed.pairs[name]));
      result.pairsOf = pairsByPrompt(...await Promise.all(columns));
    }
    return result;
  }

  quantity(name) {
    return this.quantities.find((each) => each.name === name);
  }

  over(...axes) {
    return this.quantities.filter((each) => each.axes.join(" ") === axes.join(" "));
  }

  /** The row of a token of the page in this result, or undefined. */
  row(text, row) {
    if (this.text !== text) return undefined;
    return this.rowOf ? this.rowOf.get(row) : row;
  }

  /** The texts of an axis: labels, or prompts, or numbers. */
  names(axis, size) {
    const own = axis.replace(/^other_/, "");
    if (own === "prompt" && this.prompts) return this.prompts.text.map((text) => named(text.trim(), 60));
    const labels = this.labels[own];
    return labels ? labels.map((label) => named(String(label))) : Array.from({ length: size }, (_, i) => String(i));
  }

  /** The index of a layer or head that was picked in another result: of the same label, or of the nearest number. */
  indexOf(axis, label) {
    const labels = this.labels[axis];
    if (!labels) return 0;
    if (labels.includes(label)) return labels.indexOf(label);
    const apart = labels.map((each) => Math.abs((numberIn(each) ?? Infinity) - (numberIn(label) ?? 0)));
    return apart.lastIndexOf(Math.min(...apart)); // the state after a layer, not that before it
  }
}

/** The number of a layer or head, of its label: "5_post" and "H5" have 5. */
const numberIn = (label) => /\d+/.exec(label)?.[0];

/** Everything that `packed` wrote. */
async function read(data) {
  const texts = data.texts.map((each, number) => new Text(each, number));
  const results = await Promise.all(data.results.map((each, number) => Result.read(each, texts, number)));
  return { title: data.title, texts, results };
}
