// The feature browser: what is open, keys, links. The other parts: browser_unpack, _strips, _table and _latent.js.
//
// Handles for tests and for links into the page:
//   #feature-browser[data-ready]     set once the data are unpacked and the table stands
//   #feature-search                  words, "phrases", latent numbers, conditions: eta2>0.2 kind=token
//   #feature-count                   how many latents the search left, in words (a live region)
//   [data-arm="NAME"]                buttons that choose the arm
//   #feature-table [data-latent]     rows of the table; [data-column] the buttons that sort by a column
//   #latent-panel[data-open="ARM/N"] the panel of the open latent; without data-open it shows pairs side by side
//   .strip .tok[data-position]       tokens of a passage (--a: shade); .tok .lane bars of two arms (--h: height)
//   #token-note                      what a token's note says
//   #latent/ARM/N                    as the page's hash opens that latent
(() => {
  const B = legato.browser, {el} = B;
  const root = document.getElementById("feature-browser");
  if (!root) return;
  const find = id => root.querySelector(`#${id}`);
  const search = find("feature-search"), count = find("feature-count"), holder = find("feature-table");
  const panel = find("latent-panel");
  const narrow = matchMedia("(max-width: 900px)");
  const FIRST = ["cluster_name", "density", "kappa1_hold", "half_life", "kappa1_gain", "match_cosine", "eta2"];
  const state = {arm: null, other: null, sort: {name: "kappa1_hold", down: true}, more: [], sorted: false};
  let table, found;

  // --- the table ------------------------------------------------------------------------------------------------------

  const columns = () => {
    const {arm} = state;
    const numeric = ({name, heading, meaning, values}) =>
      ({name, heading, meaning, width: 4.6, values, cell: i => B.number(values[i])});
    const listed = [...new Set([...FIRST, ...state.more])].map(name => arm.byName[name]).filter(Boolean);
    const tokens = i => B.pieces(arm.peaks(i).slice(0, 3));
    const shown = listed.filter(({name}) => name !== "cluster_name").map(numeric);
    const result = [
      {name: "latent", heading: "latent", width: 4.2, values: Int32Array.from({length: arm.latents}, (_, i) => i), cell: String},
      {name: "tokens", heading: "strongest on", text: true, width: 9.5, cell: tokens,
        meaning: "the tokens at the centres of its strongest passages"},
    ];
    if (found.fit) result.push({
      name: "fit", heading: "fit", width: 4, values: found.fit, cell: i => found.fit[i] > 1 ? "–" : `${Math.round(100 * found.fit[i])} %`,
      meaning: "harmonic mean of the share of its activation on what you search for and the share of those tokens where it fires",
    });
    if (arm.byName.cluster_name) result.push({
      name: "cluster_name", heading: "kind", text: true, width: 5, values: arm.byName.cluster_name.values,
      cell: i => arm.kind(i) || "–", meaning: arm.byName.cluster_name.meaning,
    });
    result.push({
      name: "firings", heading: "firings", width: 4.2, values: arm.arrays.firings, meaning: "on the text shown",
      cell: i => arm.arrays.firings[i].toLocaleString("en"),
    });
    const ahead = ({name}) => name === "kappa1_hold" || name === "kappa1_gain";
    result.splice(found.fit ? 3 : 2, 0, ...shown.filter(ahead));
    return result.concat(shown.filter(column => !ahead(column)));
  };

  // Small counts make extreme numbers, so with nothing asked for, latents that fire rarely come after the others.
  const OFTEN = 50;

  function refresh() {
    const query = search.value.trim();
    found = B.search(query, state.arm);
    const all = columns();
    const sort = found.fit && !state.sorted ? {name: "fit", down: true} : state.sort;
    const column = all.find(({name, values}) => name === sort.name && values) || all.find(({name}) => name === "latent");
    B.sorted(found.rows, column.values, sort.down);
    if (!query && !state.sorted) {
      const often = i => state.arm.arrays.firings[i] >= OFTEN;
      found.rows = [...found.rows.filter(often), ...found.rows.filter(i => !often(i))];
    }
    count.textContent = found.told;
    table.show(found.rows, all, {name: column.name, down: sort.down});
  }

  function sortBy(name) {
    const current = found.fit && !state.sorted ? {name: "fit", down: true} : state.sort;
    state.sort = {name, down: current.name === name ? !current.down : name !== "latent" && name !== "cluster_name"};
    state.sorted = true;
    refresh();
    table.cursor = 0;
    holder.scrollTop = 0;
  }

  async function choose(name) {
    const arm = await B.arm(name);
    if (!arm) return false;
    state.arm = arm;
    const others = arm.matches.filter(other => B.meta.arms.some(one => one.name === other));
    if (!others.includes(state.other)) state.other = others[0] || null;
    root.querySelectorAll("[data-arm]").forEach(one => one.setAttribute("aria-pressed", String(one.dataset.arm === name)));
    const beside = find("feature-beside");
    beside.parentElement.hidden = others.length < 2;
    beside.replaceChildren(...others.map(other => el("option", {value: other, selected: other === state.other}, other)));
    const taken = new Set([...FIRST, ...state.more]);
    find("feature-columns").replaceChildren(el("option", {value: ""}, "add a column…"),
      ...arm.columns.filter(one => !taken.has(one.name)).map(one => el("option", {value: one.name, title: one.meaning || null}, one.heading)));
    find("feature-filter-column").replaceChildren(el("option", {value: "firings"}, "firings"),
      ...arm.columns.filter(one => one.name !== "cluster_name").map(one => el("option", {value: one.name}, one.heading)));
    find("feature-kind").parentElement.hidden = !arm.byName.cluster_name;
    refresh();
    return true;
  }

  // --- what is open ---------------------------------------------------------------------------------------------------

  const actions = {
    close: () => go(null),
    move: by => {
      table.move(by);
      if (panel.dataset.open && table.current !== undefined) go(table.current, true);
    },
  };

  // To a latent of the arm, or back to the pairs; the address follows.
  function go(latent, replace = false) {
    const hash = latent === null ? "" : B.link(state.arm.name, latent);
    const url = location.pathname + location.search + hash;
    history[replace ? "replaceState" : "pushState"](null, "", url);
    follow();
  }

  async function follow() {
    const parts = location.hash.match(/^#latent\/([^/]+)\/(\d+)$/);
    B.unpin();
    const name = parts && decodeURIComponent(parts[1]), latent = parts && +parts[2];
    const arm = parts && B.arm(name);
    if (arm && latent < (await arm).latents) {
      if (state.arm.name !== name) await choose(name);
      panel.dataset.open = `${name}/${latent}`;
      root.classList.add("opened");
      await B.showLatent(panel, state.arm, latent, state.other, actions);
      table.open = latent;
      const at = found.rows.indexOf(latent);
      if (at >= 0) table.put(at); else table.mark();
      if (narrow.matches) find("latent-title").focus();
      else if (panel.getBoundingClientRect().top < 0 || panel.getBoundingClientRect().top > innerHeight * 0.7)
        root.scrollIntoView({block: "start"});
    } else {
      const was = panel.dataset.open;
      delete panel.dataset.open;
      root.classList.remove("opened");
      table.open = -1;
      table.mark();
      await B.showShowcase(panel, state.arm.name);
      if (was) holder.focus({preventScroll: true});
    }
  }

  // --- keys -----------------------------------------------------------------------------------------------------------

  const inSight = () => {
    const {top, bottom} = root.getBoundingClientRect();
    return top < innerHeight * 0.8 && bottom > innerHeight * 0.2;
  };

  function onKey(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const {target, key} = event, writes = target.closest("input, select, textarea");
    const here = root.contains(target) || (target.contains(root) && inSight());
    if (key === "/" && !writes) { search.focus(); search.select(); root.scrollIntoView({block: "nearest"}); }
    else if (!here) return;
    else if (key === "Escape") {
      if (B.unpin()) { /* the note only */ }
      else if (panel.dataset.open) actions.close();
      else if (target === search) { search.value = ""; refresh(); holder.focus({preventScroll: true}); }
      else return;
    } else if (target === search && (key === "ArrowDown" || key === "Enter")) {
      refresh();  // what was typed a moment ago counts
      holder.focus({preventScroll: true});
      if (key === "Enter" && table.current !== undefined) go(table.current);
    } else if (writes) return;
    else {
      const page = Math.max(1, Math.floor(holder.clientHeight / 34) - 2), onTable = target === holder;
      const by = {j: 1, k: -1, ...(onTable && {ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page, Home: -1e9, End: 1e9})}[key];
      if (by) actions.move(by);
      else if (key === "Enter" && (onTable || target.contains(root)) && table.current !== undefined) go(table.current);
      else return;
    }
    event.preventDefault();
  }

  // --- start ----------------------------------------------------------------------------------------------------------

  async function start() {
    if (!("DecompressionStream" in window)) throw new Error("this browser is too old to unpack the data (it needs DecompressionStream)");
    await B.readText();
    const {arms, left_out: leftOut, tokens, whole} = B.meta;
    find("feature-arms").append(...arms.map(({name, colour}) => el("button", {type: "button", "data-arm": name},
      el("i", {class: "dot", "--colour": colour, "aria-hidden": "true"}), name)));
    find("feature-scope").append(`${tokens.toLocaleString("en")} held-out tokens are shown here. `
      + (leftOut.length ? `Not in this page: ${leftOut.length > 8 ? `${leftOut.slice(0, 8).join(", ")} and ${leftOut.length - 8} more` : leftOut.join(", ")} (see strips/). ` : "")
      + (whole ? "" : "Only firings inside the passages of a latent are in this page, so a search finds those. ")
      + "Numbers are rounded; features/*.parquet has them in full.");
    find("feature-kind").append(...B.meta.kinds.map(kind => el("option", {value: kind}, kind)));
    table = new B.Table(holder, {onSort: sortBy, onOpen: latent => go(latent)});
    B.notes(root);
    const first = arms.find(({baseline}) => !baseline) || arms[0];
    await choose(first.name);
    find("feature-arms").addEventListener("click", async event => {
      const one = event.target.closest("[data-arm]");
      if (!one) return;
      await choose(one.dataset.arm);
      if (panel.dataset.open) go(null); else follow();
    });
    let typing = 0;
    search.addEventListener("input", () => {
      clearTimeout(typing);
      typing = setTimeout(() => { state.sorted = false; holder.scrollTop = 0; refresh(); }, 120);
    });
    find("feature-beside").addEventListener("change", event => { state.other = event.target.value; follow(); });
    find("feature-kind").addEventListener("change", event => {
      search.value = [search.value.replace(/\bkind[=:]\S*\s*/g, "").trim(), event.target.value && `kind=${event.target.value}`].filter(Boolean).join(" ");
      refresh();
    });
    find("feature-columns").addEventListener("change", event => {
      if (!event.target.value) return;
      state.more.push(event.target.value);
      state.sort = {name: event.target.value, down: true};
      state.sorted = true;
      choose(state.arm.name).then(() => { holder.scrollLeft = holder.scrollWidth; });
    });
    find("feature-filter").addEventListener("submit", event => {
      event.preventDefault();
      const [name, sign, value] = ["column", "sign", "value"].map(part => find(`feature-filter-${part}`).value);
      if (value === "") return;
      search.value = `${search.value.trim()} ${name}${sign}${value}`.trim();
      refresh();
    });
    addEventListener("hashchange", follow);
    addEventListener("popstate", follow);
    document.addEventListener("keydown", onKey);
    await follow();
    root.dataset.ready = "";
    if (panel.dataset.open) root.scrollIntoView({block: "start"});
  }

  start().catch(error => {
    count.textContent = `The feature browser cannot start: ${error.message}.`;
    console.error(error);
  });
})();
