// Searching, sorting and the table of latents, of which only the rows in sight exist.
(() => {
  const B = legato.browser, {el} = B;
  const ROW = 34, SPARE = 6;
  const FEWEST_SHARE = 0.1;  // of a latent's activation on what is searched for, unless one of its peaks is there

  // --- searching ------------------------------------------------------------------------------------------------------

  const FILTER = /^([a-z_]\w*)(<=|>=|≤|≥|<|>|=|:)(.+)$/i;

  // {terms, filters, wrong} of a query: words and "phrases", conditions such as eta2>0.2 or kind=token.
  function parsed(query, arm) {
    const terms = [], filters = [], wrong = [];
    for (const [part, phrase] of query.matchAll(/"([^"]*)"?|\S+/g)) {
      const condition = phrase === undefined && part.match(FILTER);
      if (phrase !== undefined) { if (phrase) terms.push(phrase.toLowerCase()); continue; }
      if (!condition) { terms.push(part.toLowerCase()); continue; }
      const [, name, sign, value] = condition;
      if (name === "kind") { filters.push(i => arm.kind(i).toLowerCase().startsWith(value.toLowerCase())); continue; }
      const column = arm.byName[name] || (name === "firings" && {values: arm.arrays.firings})
        || (name === "latent" && {values: Int32Array.from({length: arm.latents}, (_, i) => i)});
      const limit = parseFloat(value.replace("−", "-"));
      if (!column || isNaN(limit)) { wrong.push(part); continue; }
      const {values} = column;
      filters.push({
        ">": i => values[i] > limit, "<": i => values[i] < limit, "=": i => Math.abs(values[i] - limit) < 5e-4,
        ">=": i => values[i] >= limit, "<=": i => values[i] <= limit, ":": i => Math.abs(values[i] - limit) < 5e-4,
        "≥": i => values[i] >= limit, "≤": i => values[i] <= limit,
      }[sign]);
    }
    return {terms, filters, wrong};
  }

  // Positions of the text shown whose tokens are in an occurrence of the term; short terms must be whole tokens.
  function places(term) {
    const {word, begins, lower} = B.text, found = new Uint8Array(word.length);
    let n = 0, times = 0;
    if (term.length < 3) {
      for (; n < word.length; n++) if (B.token(n).trim().toLowerCase() === term) { found[n] = 1; times++; }
      return {found, times};
    }
    for (let at = lower.indexOf(term); at >= 0; at = lower.indexOf(term, at + term.length)) {
      while (begins[n + 1] <= at) n++;
      for (let m = n; m < word.length && begins[m] < at + term.length; m++) found[m] = 1;
      times++;
    }
    return {found, times};
  }

  // Which latents the term means, and how well each fits it: the harmonic mean of the share of its activation that lies
  // on the term and the share of the term's tokens on which it fires.
  function searched(term, arm) {
    const {found, times} = places(term), fit = new Float32Array(arm.latents), means = new Uint8Array(arm.latents);
    const size = found.reduce((sum, one) => sum + one, 0);
    const number = /^#?\d+$/.test(term) ? +term.replace("#", "") : -1;
    for (let i = 0; i < arm.latents; i++) {
      let on = 0, all = 0, hits = 0;
      for (let p = arm.starts[i]; p < arm.starts[i + 1]; p++) {
        const level = arm.level(p);
        all += level;
        if (found[arm.positions[p]]) { on += level; hits++; }
      }
      const share = all ? on / all : 0;
      fit[i] = number === i ? 2 : hits ? 2 / (1 / share + size / hits) : 0;  // a latent asked for comes first
      const named = number === i || arm.kind(i).toLowerCase().startsWith(term);
      means[i] = named || share >= FEWEST_SHARE || arm.list("top", i).some(centre => centre >= 0 && found[centre]);
    }
    return {fit, means, times};
  }

  // {rows, fit, told} for a query: the latents that satisfy all of it; told: what was understood, for the reader.
  B.search = (query, arm) => {
    const {terms, filters, wrong} = parsed(query, arm);
    const results = terms.map(term => searched(term, arm));
    const rows = [];
    for (let i = 0; i < arm.latents; i++)
      if (results.every(({means}) => means[i]) && filters.every(filter => filter(i))) rows.push(i);
    const fit = results.length ? Float32Array.from({length: arm.latents}, (_, i) => Math.min(...results.map(r => r.fit[i]))) : null;
    const told = [`${rows.length.toLocaleString("en")} of ${arm.latents.toLocaleString("en")} latents`,
      ...terms.map((term, i) => /^#?\d+$/.test(term) && !results[i].times ? "" : `“${term}” is in the text ${results[i].times} ×`),
      ...wrong.map(part => `“${part}” is no condition on a column`)].filter(Boolean).join(" · ");
    return {rows, fit, told};
  };

  // Rows in the order of a column, latents without a value last.
  B.sorted = (rows, values, down) => rows.sort((a, b) => {
    const x = values[a], y = values[b], xNone = Number.isNaN(x), yNone = Number.isNaN(y);
    if (xNone || yNone) return xNone - yNone || a - b;
    return (down ? y - x : x - y) || a - b;
  });

  // --- the table ------------------------------------------------------------------------------------------------------

  // columns: [{name, heading, meaning, width, cell(i), text}], widths in rem, those of text at least that. onSort(name), onOpen(latent).
  B.Table = class {
    constructor(holder, {onSort, onOpen}) {
      this.onOpen = onOpen;
      this.head = el("div", {role: "row", class: "row head", "aria-rowindex": 1});
      this.body = el("div", {class: "rows", role: "rowgroup"});
      this.holder = holder;
      holder.append(el("div", {role: "rowgroup", class: "head-group"}, this.head), this.body);
      this.rows = [];
      this.cursor = 0;
      this.made = new Map();
      let waiting = false;
      const later = () => {
        if (waiting) return;
        waiting = true;
        requestAnimationFrame(() => { waiting = false; this.draw(); });
      };
      holder.addEventListener("scroll", later, {passive: true});
      new ResizeObserver(later).observe(holder);
      this.head.addEventListener("click", event => {
        const cell = event.target.closest("[data-column]");
        if (cell) onSort(cell.dataset.column);
      });
      this.body.addEventListener("click", event => {
        const row = event.target.closest("[data-latent]");
        if (row) { this.cursor = this.rows.indexOf(+row.dataset.latent); this.mark(); onOpen(+row.dataset.latent); }
      });
    }

    show(rows, columns, sort) {
      this.columns = columns;
      this.rows = rows;
      this.holder.style.setProperty("--columns", columns.map(({width, text}) => text ? `minmax(${width}rem, ${width}fr)` : `${width}rem`).join(" "));
      this.holder.style.setProperty("--width", `${columns.reduce((sum, {width}) => sum + width, 0)}rem`);
      this.holder.setAttribute("aria-rowcount", rows.length + 1);
      this.holder.setAttribute("aria-colcount", columns.length);
      this.head.replaceChildren(...columns.map(({name, heading, meaning, text}) => el("div", {
        role: "columnheader", class: text ? "text" : "", title: meaning || null,
        "aria-sort": sort.name === name ? sort.down ? "descending" : "ascending" : "none",
      }, el("button", {type: "button", tabindex: "-1", "data-column": name}, heading))));
      this.made.forEach(row => row.remove());
      this.made.clear();
      this.body.style.height = `${rows.length * ROW}px`;
      this.cursor = Math.max(0, Math.min(this.cursor, rows.length - 1));
      this.draw();
    }

    draw() {
      const first = Math.max(0, Math.floor(this.holder.scrollTop / ROW) - SPARE);
      const last = Math.min(this.rows.length, Math.ceil((this.holder.scrollTop + this.holder.clientHeight) / ROW) + SPARE);
      this.made.forEach((row, at) => { if (at < first || at >= last) { row.remove(); this.made.delete(at); } });
      for (let at = first; at < last; at++) if (!this.made.has(at)) this.made.set(at, this.row(at));
      this.mark();
    }

    row(at) {
      const latent = this.rows[at];
      const row = el("div", {
        role: "row", class: "row", id: `row-${latent}`, "data-latent": latent, "aria-rowindex": at + 2,
      }, ...this.columns.map(({cell, text}) => {
        const content = cell(latent);
        return el("div", {role: "gridcell", class: text ? "text" : ""}, ...(Array.isArray(content) ? content : [content]));
      }));
      row.style.top = `${at * ROW}px`;
      this.body.append(row);
      return row;
    }

    mark() {
      this.made.forEach((row, at) => {
        row.classList.toggle("cursor", at === this.cursor);
        row.setAttribute("aria-selected", String(+row.dataset.latent === this.open));
      });
      const row = this.made.get(this.cursor);
      if (row) this.holder.setAttribute("aria-activedescendant", row.id);
      else this.holder.removeAttribute("aria-activedescendant");
    }

    move(by) { this.put(Math.max(0, Math.min(this.rows.length - 1, this.cursor + by))); }

    put(at) {
      this.cursor = at;
      const top = at * ROW, room = this.holder.clientHeight - this.head.offsetHeight;
      if (top < this.holder.scrollTop) this.holder.scrollTop = top;
      else if (top + ROW > this.holder.scrollTop + room) this.holder.scrollTop = top + ROW - room;
      this.draw();
    }

    get current() { return this.rows[this.cursor]; }
  };
})();
