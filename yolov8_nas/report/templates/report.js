// Unpacks Plotly, and draws the plots in the page's own colours, again when the colour scheme or the width changes.
(async () => {
  "use strict";
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const narrow = matchMedia("(max-width: 640px)");

  // Values of colour keys that begin with "@" are names of CSS variables.
  const coloured = (value, key, style) => {
    if (Array.isArray(value)) return value.map((item) => coloured(item, key, style));
    if (value && typeof value === "object") {
      return Object.fromEntries(Object.entries(value).map(([name, inner]) => [name, coloured(inner, name, style)]));
    }
    const named = typeof value === "string" && value.startsWith("@") && /color(scale)?$/.test(key);
    return named ? style.getPropertyValue("--" + value.slice(1)).trim() : value;
  };

  const draw = () => {
    const style = getComputedStyle(document.documentElement);
    for (const source of document.querySelectorAll("script[data-plot]")) {
      const figure = coloured(JSON.parse(source.textContent), "", style);
      figure.layout.font.family = getComputedStyle(document.body).fontFamily;
      // On a phone a finger scrolls the page, not the plot.
      figure.layout.dragmode = narrow.matches ? false : "zoom";
      Plotly.react(source.dataset.plot, figure.data, figure.layout, {
        responsive: true,
        displayModeBar: false,
      });
    }
  };

  const unpack = async (packed) => {
    const bytes = Uint8Array.from(atob(packed), (letter) => letter.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Response(stream).text();
  };

  if (!("DecompressionStream" in window)) {
    document.querySelector("#old-browser").hidden = false;
    return;
  }
  const plotly = document.createElement("script");
  plotly.textContent = await unpack(document.querySelector("#plotly").textContent);
  document.body.append(plotly);
  dark.addEventListener("change", draw);
  narrow.addEventListener("change", draw);
  draw();
})();
