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
  const { missing, low = 0, step = 1 } = packed;
  const read = packed.type === "float32" ? (i) => codes[i] : (i) => (codes[i] === missing ? NaN : low + step * codes[i]);
  return { read, length: codes.length };
}

/** A quantity: its declaration, and `at({axis: index})`. */
class Quantity {
  constructor(declared, values, result) {
    Object.assign(this, declared);
    this.values = values;
    this.result = result;
    this.id = `${result.id}.${declared.name}`;
    this.rounded = declared.values.step ?? 0;
    this.heading = declared.says.charAt(0).toUpperCase() + declared.says.slice(1);
  }

  size(axis) {
    return this.shape[this.axes.indexOf(axis)];
  }

  at(place) {
    const { axes, shape } = this;
    const last = axes.length - (this.symmetric ? 2 : 0);
    let index = 0;
    for (let i = 0; i < last; i += 1) index = index * shape[i] + place[axes[i]];
    if (this.symmetric) {
      const [i, j] = [place[axes[last]], place[axes[last + 1]]].sort((a, b) => b - a);
      const n = shape[last];
      index = index * ((n * (n + 1)) / 2) + (i * (i + 1)) / 2 + j;
    }
    return this.values.read(index);
  }

  /** The bounds of its colours: those declared, or what 2 % of its values lie beyond. */
  get span() {
    if (!this.spanned) {
      const step = Math.max(1, Math.floor(this.values.length / 20000));
      const some = [];
      for (let i = 0; i < this.values.length; i += step) some.push(this.values.read(i));
      const known = Float64Array.from(some.filter(Number.isFinite)).sort();
      const quantile = (share) => known[Math.round(share * (known.length - 1))] ?? 0;
      const signed = this.low === null ? quantile(0) < 0 && (this.high === null || this.high > 0) && quantile(1) > 0
        : this.low < 0 && (this.high === null || this.high > 0);
      const far = this.unit === "nats" && !this.logarithmic ? FARTHEST : Infinity;
      const [low, high] = [Math.max(this.low ?? quantile(0.02), -far), Math.min(this.high ?? quantile(0.98), far)];
      const farthest = Math.max(Math.abs(quantile(0.01)), Math.abs(quantile(0.99))) || 1;
      this.spanned = signed ? { low: -farthest, high: farthest, signed } : { low, high: high > low ? high : low + 1, signed };
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
    packed.prompt.forEach((prompt, row) => {
      if (!this.prompts.has(prompt)) this.prompts.set(prompt, []);
      this.prompts.get(prompt).push(row);
    });
  }

  /** A prompt in one line. */
  line(prompt, longest = 60) {
    const rows = this.prompts.get(prompt).filter((row) => !this.special[row]);
    return named(rows.map((row) => this.text[row]).join("").trim(), longest);
  }
}

class Result {
  constructor(packed, texts, number) {
    Object.assign(this, packed);
    this.id = `r${number}`;
    this.text = this.tokens.token ? texts[this.tokens.token.text] : null;
    const rows = this.tokens.token?.rows;
    this.rowOf = rows ? new Map(rows.map((row, own) => [row, own])) : null;
  }

  static async read(packed, texts, number) {
    const result = new Result(packed, texts, number);
    const arrays = await Promise.all(packed.quantities.map((each) => unpacked(each.values)));
    result.quantities = packed.quantities.map((each, i) => new Quantity(each, arrays[i], result));
    if (packed.pairs) {
      const [prompt, query, key] = await Promise.all(["prompt", "query", "key"].map((name) => unpacked(packed.pairs[name])));
      result.pairsOf = new Map();
      for (let i = 0; i < prompt.length; i += 1) {
        const number = prompt.read(i);
        if (!result.pairsOf.has(number)) result.pairsOf.set(number, []);
        result.pairsOf.get(number).push([query.read(i), key.read(i), i]);
      }
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

  /** The index of a layer or head that was picked in another result: of the same label, or of the same number. */
  indexOf(axis, label) {
    const labels = this.labels[axis];
    if (!labels) return 0;
    if (labels.includes(label)) return labels.indexOf(label);
    const number = /\d+/.exec(label)?.[0];
    const found = labels.findLastIndex((each) => /\d+/.exec(each)?.[0] === number);
    return found < 0 ? labels.length - 1 : found;
  }
}

/** Everything that `packed` wrote. */
async function read(data) {
  const texts = data.texts.map((each, number) => new Text(each, number));
  const results = await Promise.all(data.results.map((each, number) => Result.read(each, texts, number)));
  return { title: data.title, texts, results };
}
