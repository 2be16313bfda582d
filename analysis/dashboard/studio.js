"use strict";
// What the studio does without asking the server: colours, tabs, the numbers beside the sliders.

window.dash_clientside = Object.assign({}, window.dash_clientside, { studio: {
  theme: (clicks) => {
    const root = document.documentElement, dark = window.matchMedia("(prefers-color-scheme: dark)").matches;
    const now = root.dataset.theme || (dark ? "dark" : "light");
    root.dataset.theme = clicks ? (now === "dark" ? "light" : "dark") : now;
    passTheme();
    recolor();
    return root.dataset.theme;
  },
  tab: () => {
    const onViews = window.dash_clientside.callback_context.triggered.some((one) => one.prop_id.startsWith("tab-views"));
    setTimeout(() => window.dispatchEvent(new Event("resize")), 0);
    return [onViews, !onViews, onViews ? "no" : "yes", onViews ? "yes" : "no"];
  },
  numbers: (rank, strength, width) => [`Rank: ${rank} of ${width} directions per block`, `Strength: ${Number(strength).toFixed(2)}`],
  width: (form, widths, width, rank) => [widths[form], Math.max(1, Math.round(Number(rank) / width * widths[form]))],
} });

// The views have a switch of their own; here they follow this page.
function passTheme() {
  const frame = document.querySelector("iframe.frame"), theme = document.documentElement.dataset.theme;
  if (frame && frame.contentWindow && frame.contentWindow.setTheme) frame.contentWindow.setTheme(theme);
}

// Plotly knows no CSS: a figure that came in after the switch is given the page's ink.
function recolor() {
  if (!window.Plotly) return;
  const style = getComputedStyle(document.documentElement);
  const ink = style.getPropertyValue("--ink").trim(), line = style.getPropertyValue("--line").trim();
  for (const plot of document.querySelectorAll(".js-plotly-plot")) {
    if (!plot.layout || (plot.layout.font && plot.layout.font.color === ink && plot.layout.yaxis.gridcolor === line)) continue;
    window.Plotly.relayout(plot, { "font.color": ink, "xaxis.gridcolor": line, "yaxis.gridcolor": line });
  }
}

new MutationObserver(recolor).observe(document.documentElement, { childList: true, subtree: true });
document.addEventListener("load", (event) => { if (event.target.matches && event.target.matches("iframe.frame")) passTheme(); }, true);
