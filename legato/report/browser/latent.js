// The panel of one latent, and what stands there while none is open: passages of two arms side by side.
(() => {
  const B = legato.browser, {el} = B;
  let measure = "kappa", forced = false;

  const FACTS = [
    ["density", "firing rate"], ["kappa1_hold", "hold"], ["kappa1_excess_within", "kappa 1 excess"],
    ["kappa1_excess_cross", "beyond position"],
    ["half_life", "half-life, tokens"], ["run_length_ratio", "run length ratio"], ["eta2", "position eta²"],
    ["document_eta2", "document eta²"], ["token_mi_adjusted", "token share, adj."], ["offset_jaccard", "offset Jaccard"],
    ["mean_activation", "mean activation"],
  ];

  const cosine = value => `cosine ${value.toFixed(2).replace("-", "−")}`;
  const legend = refs => el("p", {class: "lanes-legend"}, "Bars under the tokens: ", ...refs.map(({arm, latent}, i) =>
    el("span", {}, el("i", {class: "dot", "--colour": arm.colour}), `${i ? "lower" : "upper"} ${arm.name} ${latent}`)));

  // Fill the panel with a latent; other: name of the arm to set beside it.
  B.showLatent = async (panel, arm, latent, other, actions) => {
    const theirs = other && arm.matches.includes(other) ? await B.arm(other) : null;
    const match = theirs && arm.match(latent, other);
    const fires = arm.arrays.firings[latent] > 0;
    const beside = match && (match.cosine >= B.meta.loose_match || forced);
    const own = {arm, latent}, refs = beside ? [own, {arm: theirs, latent: match.latent}] : [own];
    const redraw = () => B.showLatent(panel, arm, latent, other, actions);
    panel.style.setProperty("--own", arm.colour);
    panel.setAttribute("aria-label", `${arm.name}, latent ${latent}`);
    const button = (text, label, action) => {
      const made = el("button", {type: "button", class: "quiet", "aria-label": label, title: label}, text);
      made.addEventListener("click", action);
      return made;
    };
    const kind = arm.kind(latent);
    panel.replaceChildren(
      el("header", {},
        el("h3", {id: "latent-title", tabindex: "-1"}, el("i", {class: "dot", "--colour": arm.colour}), `${arm.name} ${latent}`),
        kind ? el("span", {class: "kind"}, kind) : null,
        el("span", {class: "peaks"}, ...B.pieces(arm.peaks(latent).slice(0, 5))),
        el("span", {class: "tools"}, button("↑", "Previous latent in the table (k)", () => actions.move(-1)),
          button("↓", "Next latent in the table (j)", () => actions.move(1)), button("✕", "Close (Esc)", actions.close))),
      fires ? facts(arm, latent, match && theirs, match) : el("p", {class: "absent"},
        "It does not fire on the text shown in this page, so there is nothing to draw."),
      fires ? charts(refs, redraw) : null,
      fires ? matching(arm, latent, match, theirs, redraw) : null,
      fires ? passages(refs) : null,
      logits(arm, latent),
      alike(arm, latent),
      everything(arm, latent));
    panel.scrollTop = 0;
  };

  function facts(arm, latent, theirs, match) {
    return el("dl", {class: "facts-grid"}, ...FACTS.filter(([name]) => arm.byName[name]).map(([name, label]) => {
      const value = arm.value(name, latent), shown = name === "half_life" && arm.value("half_life_censored", latent) > 0
        ? `> ${B.number(value)}` : B.number(value);
      const set = theirs && match.cosine >= B.meta.loose_match ? B.number(theirs.value(name, match.latent)) : null;
      return el("div", {title: arm.byName[name].meaning}, el("dt", {}, label), el("dd", {}, shown,
        set === null ? null : el("small", {title: `its match, ${theirs.name} ${match.latent}`}, `${theirs.baseline ? "base" : theirs.name} ${set}`)));
    }));
  }

  function charts(refs, redraw) {
    const [{arm, latent}] = refs;
    const figure = (title, chart, ...more) => chart && el("figure", {}, el("figcaption", {}, title, ...more), chart);
    const measures = ["kappa", "ac"].filter(name => arm.columns.some(column => column.name.match(`^${name}\\d+$`)));
    const choice = measures.length < 2 ? null : el("span", {class: "choice"}, ...measures.map(name => {
      const made = el("button", {type: "button", "aria-pressed": String(measure === name)}, name === "ac" ? "AC" : name);
      made.addEventListener("click", () => { measure = name; redraw(); });
      return made;
    }));
    return el("div", {class: "charts"},
      figure("Firings by activation", B.densityChart(arm, latent)),
      figure("Hold over lag ", B.lagChart(refs, measures.includes(measure) ? measure : measures[0]), ...(choice ? [choice] : [])),
      figure("Firing rate by position", B.positionChart(arm, latent)),
      el("p", {class: "hint"}, "Hold: coloured as the arms; dashed, tokens shuffled inside each document; dotted, position alone."));
  }

  function matching(arm, latent, match, theirs, redraw) {
    if (!theirs) return null;
    if (!match) return el("p", {class: "match"}, `No latent of ${theirs.name} to set beside it.`);
    const link = B.latentLink(theirs, match.latent, cosine(match.cosine));
    const words = match.cosine >= B.meta.close_match ? ` Best match in ${theirs.name}: ` : match.cosine >= B.meta.loose_match
      ? `Only a loose match in ${theirs.name}: ` : `No good match in ${theirs.name}; the nearest direction is `;
    const line = el("p", {class: "match"}, words, link);
    if (match.cosine < B.meta.loose_match) {
      const made = el("button", {type: "button", "aria-pressed": String(forced)}, forced ? "leave it out" : "show it all the same");
      made.addEventListener("click", () => { forced = !forced; redraw(); });
      line.append(" ", made);
    }
    return line;
  }

  function passages(refs) {
    const [{arm, latent}] = refs, drawn = [];
    const far = centre => drawn.every(other => Math.floor(other / B.meta.context_length) !== Math.floor(centre / B.meta.context_length)
      || Math.abs(other - centre) >= B.meta.window);
    const group = (title, centres) => {
      const fresh = [...centres].filter(centre => centre >= 0 && far(centre));
      drawn.push(...fresh);
      return fresh.length ? el("section", {class: "passages"}, el("h4", {}, title), ...fresh.map(centre => passage(refs, centre))) : null;
    };
    const n = arm.arrays.firings[latent];
    const quantiles = B.meta.quantiles.map(q => `${Math.round(100 * q)} %`).join(", ");
    return el("div", {}, refs.length > 1 ? legend(refs) : null,
      group(`Strongest of ${n.toLocaleString("en")} firings`, arm.list("top", latent)),
      group(`Middling: at ${quantiles} of its firings`, arm.list("quantile", latent)),
      group("Drawn at random among its firings", arm.list("random", latent)));
  }

  function passage(refs, centre) {
    const [{arm, latent}] = refs, length = B.meta.context_length;
    const strip = B.strip(refs, centre), holder = el("div", {class: "passage"});
    const more = el("button", {type: "button", class: "quiet", "aria-expanded": "false"}, "whole context");
    more.addEventListener("click", () => {
      const opened = more.getAttribute("aria-expanded") === "true";
      more.setAttribute("aria-expanded", String(!opened));
      more.textContent = opened ? "whole context" : "less";
      holder.lastChild.replaceWith(B.strip(refs, centre, !opened));
    });
    holder.append(el("p", {class: "where"}, el("b", {}, B.rough(arm.share(latent, centre) * arm.largest[latent])),
      ` in context ${Math.floor(centre / length)} at ${centre % length} `, B.meta.whole ? more : null), strip);
    return holder;
  }

  function logits(arm, latent) {
    const list = (name, sign) => [...arm.list(name, latent)].map((word, k) => word < 0 ? null : el("span", {class: "logit"},
      ...B.pieces([B.word(word)]), el("small", {}, `${sign}${(arm.list(`${name}_z`, latent)[k] / 10).toFixed(1)}`))).filter(Boolean);
    const up = list("promoted", "+"), down = list("suppressed", "−");
    if (!up.length) return null;
    return el("section", {class: "logits"}, el("h4", {}, "Logits it moves, on the direct path"),
      el("p", {}, el("span", {class: "label"}, "raises"), ...up), el("p", {}, el("span", {class: "label"}, "lowers"), ...down),
      el("p", {class: "hint"}, "Decoder row through the final norm and the unembedding, later layers left out; in standard "
        + "deviations over the tokens of the run’s text."));
  }

  function alike(arm, latent) {
    const list = (title, name, word, least) => {
      const shares = arm.list(`${name}_share`, latent);
      const links = [...arm.list(name, latent)].map((i, k) => [i, (shares[k] - 100) / 100]).filter(([i, share]) => i >= 0 && share >= least);
      return el("section", {}, el("h4", {}, title), ...(links.length
        ? links.map(([i, share]) => B.latentLink(arm, i, `${word} ${share.toFixed(2).replace("-", "−")}`)) : [el("p", {class: "hint"}, "None.")]));
    };
    return el("div", {class: "alike"}, list("Nearest decoder directions", "similar", "cosine", -1),
      list("Fire together", "together", "Jaccard", 0.01));
  }

  function everything(arm, latent) {
    const all = el("details", {class: "everything"}, el("summary", {}, "All its numbers"));
    all.addEventListener("toggle", () => {
      if (all.open && !all.querySelector("dl")) all.append(el("dl", {}, ...arm.columns.filter(({name}) => name !== "cluster_name")
        .flatMap(({name, heading, meaning}) => [el("dt", {title: meaning || null}, heading), el("dd", {}, B.number(arm.value(name, latent)))])));
    });
    return all;
  }

  // Pairs of matched latents on the same passages.
  B.showShowcase = async (panel, name) => {
    const all = B.meta.showcase, mine = all.filter(({arm, other}) => arm === name || other === name);
    const shown = await Promise.all(mine.map(async one => ({...one, own: await B.arm(one.arm), theirs: await B.arm(one.other)})));
    panel.removeAttribute("aria-label");
    panel.style.removeProperty("--own");
    panel.replaceChildren(el("header", {}, el("h3", {}, "The same passages in two arms")),
      el("p", {class: "facts"}, "Each pair of latents has close decoder directions. A latent that holds draws an unbroken row of "
        + "bars under a phrase or a passage; one that flickers draws a broken one. Open a latent in the table to see all of its own."),
      ...(shown.length ? shown.map(pairs) : [el("p", {class: "absent"}, "No arm here is matched with a baseline.")]));
    panel.scrollTop = 0;
  };

  function pairs({own, theirs, pairs: n, median, share, gains, losses, random}) {
    if (!n) return el("p", {class: "absent"}, `No latent of ${own.name} has a close match in ${theirs.name} and fires often enough to compare.`);
    const group = (title, items) => items.length ? el("section", {class: "passages"}, el("h4", {}, title),
      ...items.filter(([, , , centre]) => centre >= 0).map(([i, j, difference, centre]) => {
        const refs = [{arm: own, latent: i}, {arm: theirs, latent: j}];
        return el("div", {class: "passage"}, el("p", {class: "where pair"}, B.latentLink(own, i), B.latentLink(theirs, j),
          el("span", {class: "note-number"}, `kappa excess ${B.number(own.value("kappa1_excess_within", i))} against ${
            B.number(theirs.value("kappa1_excess_within", j))} (${B.signed(difference)})`)), B.strip(refs, centre));
      })) : null;
    return el("div", {class: "pairs"},
      el("p", {class: "facts"}, `${n.toLocaleString("en")} latents of ${own.name} have a close match in ${theirs.name} (decoder cosine above ${
        B.meta.close_match}, both firing 20 times or more). ${Math.round(100 * share)} % of them hold better than their match; the median difference of the `
        + `kappa excess at lag 1 is ${B.signed(median)}. For ${own.name} as a whole: ${B.meta.mechanism[own.name]}`),
      el("p", {class: "lanes-legend"}, "Bars under the tokens: ", el("span", {}, el("i", {class: "dot", "--colour": own.colour}), `upper ${own.name}`),
        el("span", {}, el("i", {class: "dot", "--colour": theirs.colour}), `lower ${theirs.name}`)),
      group("Drawn at random from these pairs", random),
      group(`Picked: the largest differences in favour of ${own.name}, strongest passage`, gains),
      group(`Picked: the largest differences in favour of ${theirs.name}, strongest passage`, losses));
  }
})();
