// Draws the page's interactive plots with plotly.js, each once it comes near the window.
window.legato = window.legato || {};
legato.unpack = async name => {
  const packed = Uint8Array.from(atob(document.getElementById(name).textContent), c => c.charCodeAt(0));
  return new Response(new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
};
(() => {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const coarse = matchMedia("(pointer: coarse)").matches;
  const plots = [...document.querySelectorAll(".plot")];
  let library = null, specs = null;

  const ready = () => library ??= (async () => {
    specs = JSON.parse(await legato.unpack("plot-data"));
    const script = document.createElement("script");
    script.textContent = await legato.unpack("plotly-js");
    document.head.append(script);
  })();

  // A colour of the page stands in a plot as var(--name).
  const painted = value => {
    if (typeof value === "string") {
      const name = value.startsWith("var(") && value.slice(4, -1);
      return name ? getComputedStyle(document.documentElement).getPropertyValue(name).trim() : value;
    }
    if (Array.isArray(value)) return typeof value.at(-1) === "number" || value.at(-1) === null ? value : value.map(painted);
    if (value && typeof value === "object")
      return Object.fromEntries(Object.entries(value).map(([key, inner]) => [key, painted(inner)]));
    return value;
  };

  const merged = (base, more) => {
    const result = {...base};
    for (const [key, value] of Object.entries(more || {}))
      result[key] = value && typeof value === "object" && !Array.isArray(value) ? merged(base[key] || {}, value) : value;
    return result;
  };

  const axis = {
    gridcolor: "var(--rule)", linecolor: "var(--faint)", zerolinecolor: "var(--faint)", zeroline: false,
    ticks: "outside", ticklen: 4, tickcolor: "var(--faint)", automargin: true,
    title: {font: {size: 12, color: "var(--muted)"}, standoff: 8},
  };
  const frame = {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", showlegend: false,
    font: {family: getComputedStyle(document.body).fontFamily, size: 11.5, color: "var(--muted)"},
    margin: {l: 44, r: 12, t: 8, b: 36}, hovermode: "closest", dragmode: coarse ? false : "zoom",
    hoverlabel: {bgcolor: "var(--surface)", bordercolor: "var(--faint)", align: "left", namelength: -1,
                 font: {color: "var(--ink)", size: 12.5}},
    xaxis: axis, yaxis: axis,
    modebar: {bgcolor: "rgba(0,0,0,0)", color: "var(--faint)", activecolor: "var(--ink)"},
  };
  const config = {
    displaylogo: false, responsive: true, displayModeBar: coarse ? false : "hover",
    modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d", "zoomIn2d", "zoomOut2d", "toImage"],
  };

  const draw = element => {
    const spec = specs[element.dataset.plot];
    const view = spec.views[element.view];
    const holder = element.querySelector(".panels");
    holder.classList.toggle("square", spec.square);
    holder.style.setProperty("--columns", Math.min(spec.columns, view.panels.length));
    holder.style.setProperty("--height", spec.height + "px");
    while (holder.children.length > view.panels.length) {
      Plotly.purge(holder.lastChild.lastChild);
      holder.lastChild.remove();
    }
    while (holder.children.length < view.panels.length) {
      const cell = document.createElement("div");
      cell.append(document.createElement("h4"), document.createElement("div"));
      holder.append(cell);
    }
    view.panels.forEach((panel, number) => {
      const cell = holder.children[number];
      cell.firstChild.textContent = panel.title;
      cell.firstChild.hidden = !panel.title;
    });
    view.panels.forEach((panel, number) => {
      const traces = panel.traces.slice();
      if (panel.steps.length) traces[0] = {...traces[0], ...panel.steps[element.step]};
      Plotly.react(holder.children[number].lastChild, painted(traces), painted(merged(frame, panel.layout)), config);
    });
    const note = element.querySelector(".view-note");
    if (note) note.textContent = view.note;
  };

  const begin = async element => {
    if (element.begun) return;
    element.begun = true;
    try {
      await ready();
      element.querySelector(".waiting").remove();
      draw(element);
      element.classList.add("drawn");
    } catch (error) {
      element.querySelector(".panels").textContent = "This browser cannot draw the plot: " + error.message;
      throw error;
    }
  };

  for (const element of plots) {
    element.view = 0;
    const slider = element.querySelector("input[type=range]");
    element.step = slider ? +slider.value : 0;
    element.addEventListener("change", event => {
      if (event.target.type !== "radio") return;
      element.view = +event.target.value;
      if (element.classList.contains("drawn")) draw(element);
    });
    slider?.addEventListener("input", () => {
      element.step = +slider.value;
      element.querySelector("output").textContent = slider.dataset.labels.split("|")[element.step];
      if (element.classList.contains("drawn")) draw(element);
    });
  }
  const near = new IntersectionObserver(entries => {
    for (const entry of entries) if (entry.isIntersecting) { near.unobserve(entry.target); begin(entry.target); }
  }, {rootMargin: "600px"});
  plots.forEach(element => near.observe(element));
  addEventListener("beforeprint", () => plots.forEach(begin));
  dark.addEventListener("change", () => plots.filter(p => p.classList.contains("drawn")).forEach(draw));
})();
