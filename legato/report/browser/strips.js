// Passages drawn token by token, what a pointer on a token tells, and the small charts. Text is only ever textContent.
(() => {
  const B = legato.browser;

  // An element with attributes and children; strings become text, null is left out.
  const el = B.el = (tag, attributes = {}, ...children) => {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (value === null || value === false) continue;
      if (name.startsWith("--")) made.style.setProperty(name, value);
      else made.setAttribute(name, value === true ? "" : value);
    }
    made.append(...children.filter(child => child !== null));
    return made;
  };

  B.number = value => {
    if (value === undefined || !isFinite(value)) return "–";
    const size = Math.abs(value);
    if (size !== 0 && size < 0.001) return value.toExponential(1).replace("e-", "e−").replace(/^-/, "−");
    const digits = size >= 1000 ? 0 : size >= 100 ? 1 : size >= 10 ? 2 : 3;
    return value.toFixed(digits).replace("-", "−");
  };
  // An activation, of which the page knows no more than two digits.
  B.rough = value => B.number(+value.toPrecision(2)).replace(/\.0+$|(\.\d*[1-9])0+$/, "$1");
  B.signed = value => (value > 0 ? "+" : "") + B.number(value);
  B.link = (arm, latent) => `#latent/${encodeURIComponent(arm)}/${latent}`;
  B.visible = text => text === "" ? "∅" : text.replace(/\r\n|\n|\r/g, "↵").replaceAll("\t", "⇥");

  // A passage. refs: [{arm, latent}], the first shades the text; two of them are drawn as bars under every token.
  B.strip = (refs, centre, whole = false) => {
    const {context_length: length, before, window: wide} = B.meta, {doc} = B.text;
    const context = Math.floor(centre / length);
    let start = whole ? context * length : Math.max(context * length, centre - before);
    let end = Math.min((context + 1) * length, doc.length, whole ? Infinity : start + wide);
    while (doc[start] !== doc[centre]) start++;
    while (doc[end - 1] !== doc[centre]) end--;
    const strip = el("div", {class: "strip", dir: "ltr", "data-centre": centre});
    strip.refs = refs;
    for (let position = start; position < end; position++) {
      const shares = refs.map(({arm, latent}) => arm.share(latent, position));
      const token = el("span", {
        class: "tok" + (position === centre ? " peak" : "") + (B.text.valid[position] ? "" : " aside"),
        "data-position": position, "--a": shares[0] ? shares[0].toFixed(2) : null,
      }, el("bdi", {}, B.visible(B.token(position))));
      if (shares.some(Boolean)) token.append(el("span", {class: "heard"}, ` (${refs.map(({arm, latent}, i) =>
        shares[i] ? `${refs.length > 1 ? arm.name + " " : ""}${B.rough(shares[i] * arm.largest[latent])}` : null)
        .filter(Boolean).join(", ")}) `));
      if (refs.length > 1) refs.forEach(({arm}, i) => token.append(el("i", {
        class: "lane", "aria-hidden": "true", "--colour": arm.colour,
        "--h": shares[i] ? Math.max(0.16, shares[i]).toFixed(2) : "0",
      })));
      strip.append(token);
    }
    strip.style.setProperty("--own", refs[0].arm.colour);
    if (refs[0].arm.baseline) strip.style.setProperty("--most", "30%");  // its colour is the text's
    return strip;
  };

  // What a latent is called in running text: its arm's colour, its number, the tokens it is strongest on.
  B.latentLink = (arm, latent, note = "") => el("a", {class: "latent-link", href: B.link(arm.name, latent), "data-latent": latent},
    el("i", {class: "dot", "--colour": arm.colour, "aria-hidden": "true"}),
    el("span", {}, String(latent)), el("span", {class: "peaks"}, ...B.pieces(arm.peaks(latent).slice(0, 3))),
    note ? el("span", {class: "note-number"}, note) : null);
  B.pieces = strings => strings.map(text => el("bdi", {class: "piece"}, B.visible(text)));

  // --- the pointer's note ---------------------------------------------------------------------------------------------

  let note = null, pinned = false;

  B.notes = root => {
    note = el("div", {id: "token-note", role: "status", hidden: true});
    root.append(note);
    root.addEventListener("pointerover", event => {
      const token = event.target.closest(".tok");
      if (token && !pinned && event.pointerType !== "touch") show(token, false);
    });
    root.addEventListener("pointerout", event => { if (!pinned && event.target.closest(".tok")) note.hidden = true; });
    root.addEventListener("click", event => {
      const token = event.target.closest(".tok");
      if (token) show(token, true);
      else if (!event.target.closest("#token-note a, #token-note button") && note.contains(event.target)) return;
      else B.unpin();
    });
    addEventListener("scroll", () => { if (!pinned) note.hidden = true; }, {passive: true});
  };
  B.unpin = () => { const was = pinned; pinned = false; if (note) note.hidden = true; return was; };

  function show(token, pin) {
    pinned = pin;
    const {refs} = token.parentElement, position = +token.dataset.position, length = B.meta.context_length;
    note.replaceChildren(
      el("p", {class: "which"}, el("bdi", {}, `“${B.visible(B.token(position)).slice(0, 400)}”`),
        el("small", {}, `context ${Math.floor(position / length)}, position ${position % length}`)),
      ...refs.map(({arm, latent}) => {
        const share = arm.share(latent, position);
        return el("p", {}, el("i", {class: "dot", "--colour": arm.colour}), `${arm.name} ${latent}: `, el("b", {},
          share ? B.rough(share * arm.largest[latent]) : "silent"), share ? `, ${Math.round(100 * share)} % of its largest` : "");
      }));
    if (!B.text.valid[position]) note.append(el("p", {}, "Special token or outlier: it counts nowhere."));
    else if (!pin) note.append(el("p", {class: "hint"}, "Click to see what else fires here."));
    else if (!B.meta.whole) note.append(el("p", {class: "hint"}, "What else fires here is not in this page: the run is too large."));
    else for (const arm of new Set(refs.map(ref => ref.arm))) {
      const firing = arm.firingAt(position);
      note.append(el("p", {class: "hint"}, `${firing.length} latents of ${arm.name} fire here, strongest first:`),
        el("p", {class: "others"}, ...firing.slice(0, 8).map(([i, value]) => B.latentLink(arm, i, B.rough(value)))));
    }
    note.classList.toggle("pinned", pin);
    note.hidden = false;
    const at = token.getBoundingClientRect(), own = note.getBoundingClientRect();
    const below = at.bottom + 8 + own.height < innerHeight || at.top < own.height + 8;
    note.style.left = `${Math.max(8, Math.min(at.left, document.documentElement.clientWidth - own.width - 8))}px`;
    note.style.top = `${below ? at.bottom + 8 : at.top - own.height - 8}px`;
  }

  // --- charts ---------------------------------------------------------------------------------------------------------

  const W = 260, H = 112, LEFT = 34, BOTTOM = 18, TOP = 8, RIGHT = 6;
  const svg = (tag, attributes, text = null) => {
    const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    if (text !== null) made.textContent = text;
    return made;
  };
  const frame = (label, top, low, bottomLabels, counts = false) => {
    const chart = svg("svg", {viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": label, class: "chart"});
    const y = value => TOP + (top - value) / (top - low || 1) * (H - TOP - BOTTOM);
    const x = share => LEFT + share * (W - LEFT - RIGHT);
    chart.append(svg("line", {x1: LEFT, x2: W - RIGHT, y1: y(Math.max(low, 0)), y2: y(Math.max(low, 0)), class: "axis"}));
    chart.append(svg("text", {x: LEFT - 5, y: y(top) + 6, class: "end"}, counts ? top.toLocaleString("en") : B.number(top)));
    chart.append(svg("text", {x: LEFT - 5, y: y(Math.max(low, 0)) + 4, class: "end"}, "0"));
    for (const [share, text] of bottomLabels)
      chart.append(svg("text", {x: x(share), y: H - 4, class: share === 0 ? "" : share === 1 ? "end" : "middle"}, text));
    return {chart, x, y};
  };
  const bars = (label, values, top, bottomLabels, colour, counts = false) => {
    const {chart, x, y} = frame(label, top, 0, bottomLabels, counts);
    values.forEach((value, i) => {
      if (value > 0) chart.append(svg("rect", {
        x: x(i / values.length) + 0.5, width: Math.max(1, (W - LEFT - RIGHT) / values.length - 1),
        y: Math.min(y(value), y(0) - 1), height: Math.max(1, y(0) - y(value)), style: `fill:${colour}`,
      }));
    });
    return chart;
  };
  const lines = (label, series, lags, top, low) => {
    const place = lags.map(lag => Math.log2(lag) / Math.log2(lags.at(-1) || 2));
    const {chart, x, y} = frame(label, top, low, lags.map((lag, i) => [place[i] || 0, String(lag)]));
    for (const {values, name, style, dash} of series) {
      const points = values.map((value, i) => isFinite(value) ? `${x(place[i] || 0)},${y(value)}` : null).filter(Boolean);
      chart.append(svg("polyline", {points: points.join(" "), class: "line", style, "stroke-dasharray": dash || "none"}));
      values.forEach((value, i) => {
        if (!isFinite(value)) return;
        const dot = svg("circle", {cx: x(place[i] || 0), cy: y(value), r: dash ? 1.2 : 2.4, style: style.replace("stroke", "fill")});
        dot.append(svg("title", {}, `${name}, lag ${lags[i]}: ${B.number(value)}`));
        chart.append(dot);
      });
    }
    return chart;
  };

  B.densityChart = (arm, latent) => {
    const shape = [...arm.list("histogram", latent)], sum = shape.reduce((a, b) => a + b, 0), n = arm.arrays.firings[latent];
    const counts = shape.map(value => value / sum * n), most = arm.largest[latent];
    return bars(`Histogram of its ${n} activations, from 0 to ${B.number(most)}`, counts, Math.round(Math.max(...counts)),
      [[0, "0"], [1, B.number(most)]], arm.colour, true);
  };
  B.positionChart = (arm, latent) => {
    const shape = [...arm.list("profile", latent)];
    if (!shape.length) return null;
    const top = arm.arrays.profile_top[latent], last = B.meta.context_length - 1;
    return bars(`Firing rate over position in the context, at most ${B.number(top)}`, shape.map(v => v / 255 * top), top,
      [[0, "0"], [1, String(last)]], arm.colour);
  };
  B.lagChart = (refs, measure) => {
    const [{arm, latent}] = refs;
    const lags = arm.columns.map(c => c.name.match(`^${measure}(\\d+)$`)).filter(Boolean).map(m => +m[1]);
    if (!lags.length) return null;
    const along = (a, i, suffix = "") => lags.map(lag => a.value(`${measure}${lag}${suffix}`, i));
    const series = [
      {name: "order shuffled", values: along(arm, latent, "_within_null"), style: "stroke:var(--muted)", dash: "5 3"},
      {name: "position alone", values: along(arm, latent, "_cross_null"), style: "stroke:var(--muted)", dash: "1.5 3"},
      ...refs.map(ref => ({name: `${ref.arm.name} ${ref.latent}`, values: along(ref.arm, ref.latent), style: `stroke:${ref.arm.colour}`})).reverse(),
    ].filter(({values}) => values.some(isFinite));
    const all = series.flatMap(({values}) => values).filter(isFinite);
    const top = Math.max(0.05, ...all), low = Math.min(0, ...all);
    const told = series.map(({name, values}) => `${name} ${B.number(values[0])} at lag ${lags[0]}`).join("; ");
    return lines(`${measure} over lag in tokens: ${told}`, series, lags, top, low);
  };
})();
