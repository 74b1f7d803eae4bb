// The islands of data.py taken apart: text, feature tables and firings as typed arrays.
window.legato = window.legato || {};
legato.browser = {};
(() => {
  const B = legato.browser;

  async function inflated(id) {
    const text = document.getElementById(id).textContent;
    let bytes;
    if (Uint8Array.fromBase64) bytes = Uint8Array.fromBase64(text);
    else {
      const characters = atob(text);
      bytes = new Uint8Array(characters.length);
      for (let i = 0; i < bytes.length; i++) bytes[i] = characters.charCodeAt(i);
    }
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Uint8Array(await new Response(stream).arrayBuffer());
  }

  const half = bits => {
    const sign = bits & 0x8000 ? -1 : 1, exponent = bits >> 10 & 31, fraction = bits & 1023;
    if (exponent === 31) return fraction ? NaN : sign * Infinity;
    return sign * (exponent ? 2 ** (exponent - 25) * (1024 + fraction) : 2 ** -24 * fraction);
  };

  // {name: typed array} of planes of bytes; see pack.py. Indices have -1 for none.
  function unpacked(bytes, header) {
    const arrays = {};
    let at = 0;
    for (const [name, {kind, size, scale}] of Object.entries(header)) {
      const width = +kind[1], start = at;
      at += width * size;
      if (kind === "u1") { arrays[name] = bytes.subarray(start, at); continue; }
      const word = i => {
        let value = 0;
        for (let plane = width - 1; plane >= 0; plane--) value = value * 256 + bytes[start + plane * size + i];
        return value;
      };
      if (kind[0] === "u") {
        const none = 256 ** width - 1, values = arrays[name] = new Int32Array(size);
        for (let i = 0; i < size; i++) { const value = word(i); values[i] = value === none ? -1 : value; }
      } else {
        const values = arrays[name] = new Float32Array(size);
        for (let i = 0; i < size; i++) {
          const value = word(i);
          values[i] = kind === "f2" ? half(value) * scale : value === 0x8000 ? NaN : (value << 16 >> 16) * scale;
        }
      }
    }
    return arrays;
  }

  // Text shown, its tokens as strings, and it all in lower case for searching, with where each token begins.
  async function readText() {
    const meta = B.meta = JSON.parse(new TextDecoder().decode(await inflated("browser-meta")));
    const {word, doc, valid} = unpacked(await inflated("browser-text"), meta.text);
    const lower = meta.words.map(text => text.toLowerCase());
    const begins = new Int32Array(word.length + 1), pieces = [];
    for (let n = 0, at = 0; n < word.length; n++) {
      const piece = word[n] < 0 || doc[n] !== doc[Math.max(0, n - 1)] ? "\n" + (lower[word[n]] || "") : lower[word[n]];
      pieces.push(piece);
      begins[n + 1] = at += piece.length;
    }
    B.text = {word, doc, valid, begins, lower: pieces.join("")};
  }

  B.word = number => number < 0 ? "" : B.meta.words[number];
  B.token = position => B.word(B.text.word[position]);

  // An arm's tables; it is unpacked when first asked for.
  const opened = new Map();
  B.arm = name => {
    if (!opened.has(name)) {
      const number = B.meta.arms.findIndex(arm => arm.name === name);
      if (number < 0) return null;
      opened.set(name, inflated(`browser-arm-${number}`).then(bytes => new Arm(B.meta.arms[number], bytes)));
    }
    return opened.get(name);
  };

  class Arm {
    constructor(header, bytes) {
      Object.assign(this, header);
      const a = this.arrays = unpacked(bytes, header.arrays);
      this.largest = a.largest;
      this.starts = new Int32Array(this.latents + 1);
      for (let i = 0; i < this.latents; i++) this.starts[i + 1] = this.starts[i] + a.count[i];
      this.positions = new Int32Array(this.starts[this.latents]);
      for (let i = 0, at = 0; i < this.latents; i++) {
        for (let p = this.starts[i], position = 0; p < this.starts[i + 1]; p++) {
          let gap = 0, shift = 0, byte;
          do { byte = a.gaps[at++]; gap |= (byte & 127) << shift; shift += 7; } while (byte & 128);
          this.positions[p] = position += gap;
        }
      }
      for (const column of this.columns) column.values = this.column(column);
      this.byName = Object.fromEntries(this.columns.map(column => [column.name, column]));
      this.styleIndex = B.meta.arms.findIndex(arm => arm.name === this.name);
    }

    column({name, less}) {
      if (!less) return this.arrays[name];
      const [real, nothing] = less.map(part => this.arrays[part]);
      return real.map((value, i) => value - nothing[i]);
    }

    value(name, latent) { return this.byName[name] ? this.byName[name].values[latent] : NaN; }

    list(name, latent) {
      const all = this.arrays[name];
      if (!all) return [];
      const width = all.length / this.latents;
      return all.subarray(latent * width, (latent + 1) * width);
    }

    // Share of its largest activation that a latent has at a position, 0 where it does not fire.
    share(latent, position) {
      let low = this.starts[latent], high = this.starts[latent + 1];
      while (low < high) {
        const middle = low + high >> 1;
        if (this.positions[middle] < position) low = middle + 1; else high = middle;
      }
      return low < this.starts[latent + 1] && this.positions[low] === position ? this.level(low) : 0;
    }

    level(pair) { return (this.arrays.values[pair] + 1) / B.meta.levels; }

    // What fires at a position, strongest first: [latent, activation].
    firingAt(position) {
      const found = [];
      for (let i = 0; i < this.latents; i++) {
        const share = this.share(i, position);
        if (share) found.push([i, share * this.largest[i]]);
      }
      return found.sort((a, b) => b[1] - a[1]);
    }

    // {name, latent, cosine} of the nearest latent in another arm, null without.
    match(latent, other) {
      const number = this.matches.indexOf(other);
      if (number < 0 || this.arrays[`match${number}`][latent] < 0) return null;
      return {
        name: other, latent: this.arrays[`match${number}`][latent],
        cosine: this.arrays[`match_cosine${number}`][latent],
      };
    }

    kind(latent) {
      const number = this.byName.cluster_name ? this.byName.cluster_name.values[latent] : -1;
      return number < 0 ? "" : B.meta.kinds[number];
    }

    // The tokens at the centres of its strongest passages, without repetition.
    peaks(latent) {
      const seen = new Set();
      for (const centre of this.list("top", latent)) if (centre >= 0) seen.add(B.token(centre));
      return [...seen];
    }
  }

  B.unpacked = unpacked;
  B.readText = readText;
})();
