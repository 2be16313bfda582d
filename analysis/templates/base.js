"use strict";
// What the scripts of every page share. Text from models and data goes into a page through textContent alone, and into
// figures through `label`.

const $ = (id) => document.getElementById(id);
const read = (id) => JSON.parse($(id).textContent);
const CONFIG = { displaylogo: false, responsive: true, modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"] };
const media = window.matchMedia("(prefers-color-scheme: dark)");
const color = (name) => getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();

// Plotly reads a few tags in labels: what looks like one is shown, not obeyed.
const label = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");

function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "class") node.className = value; else node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

function options(select, pairs, chosen) {
  select.replaceChildren(...pairs.map(([value, text]) => el("option", { value }, text)));
  select.value = chosen;
}

// A figure's layout in the page's own colours; Plotly knows no CSS.
function inked(layout) {
  const line = color("line"), defaults = layout.template?.layout ?? {};
  layout.font = { ...layout.font, color: color("ink") };
  // among the defaults, since a colour of an axis's own would draw a grid where there is none
  for (const axis of ["xaxis", "yaxis"]) Object.assign(defaults[axis] ?? {}, { gridcolor: line, zerolinecolor: line, linecolor: line });
  return layout;
}
