// Draws the page's plots with Vega-Lite, each once it comes near the window.
window.legato = window.legato || {};
legato.unpack = async name => {
  const packed = Uint8Array.from(atob(document.getElementById(name).textContent), c => c.charCodeAt(0));
  return new Response(new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
};
(() => {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const plots = [...document.querySelectorAll(".plot")];
  const MANY = 3000; // rows of data, from which on a canvas is faster than an element per mark
  let library = null, data = null;

  const ready = () => library ??= (async () => {
    data = JSON.parse(await legato.unpack("plot-data"));
    const script = document.createElement("script");
    script.textContent = await legato.unpack("vega-js");
    document.head.append(script);
  })();

  // The colours of the figures become those of the page's light or dark scheme.
  const painted = value => {
    const style = getComputedStyle(document.documentElement);
    const colour = name => style.getPropertyValue(data.colours[name]).trim();
    const known = inner => typeof inner === "string" && Object.hasOwn(data.colours, inner);
    return JSON.parse(JSON.stringify(value), (_, inner) => known(inner) ? colour(inner) : inner);
  };
  const rows = chart => Object.values(chart.datasets || {}).flat()
    .reduce((sum, row) => sum + (Array.isArray(row.z) ? row.z.length : 1), 0);

  const draw = async element => {
    const {views, height, columns, square} = data.plots[element.dataset.plot];
    const view = views[element.view];
    const holder = element.querySelector(".panels");
    holder.classList.toggle("square", square);
    holder.style.setProperty("--columns", Math.min(columns, view.panels.length));
    holder.style.setProperty("--height", height + "px");
    while (holder.children.length > view.panels.length) holder.lastChild.remove();
    while (holder.children.length < view.panels.length) {
      const cell = document.createElement("div");
      cell.append(document.createElement("h4"), document.createElement("div"));
      holder.append(cell);
    }
    const config = {...painted(data.config), font: getComputedStyle(document.body).fontFamily};
    await Promise.all(view.panels.map(async (panel, number) => {
      const [title, place] = holder.children[number].children;
      title.textContent = panel.title;
      title.hidden = !panel.title;
      const chart = panel.charts[Math.min(element.step, panel.charts.length - 1)];
      // The page's security policy allows no eval: expressions are interpreted.
      const options = {mode: "vega-lite", actions: false, ast: true, config, defaultStyle: false,
        renderer: rows(chart) > MANY ? "canvas" : "svg", tooltip: {theme: "page", disableDefaultStyle: true}};
      place.result?.finalize();
      place.result = await vegaEmbed(place, painted(chart), options);
    }));
    const note = element.querySelector(".view-note");
    note.textContent = view.note;
  };

  const begin = async element => {
    if (element.begun) return;
    element.begun = true;
    try {
      await ready();
      element.querySelector(".waiting").remove();
      await draw(element);
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
