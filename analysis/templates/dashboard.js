// The state that all views share, the controls that change it, and what every figure has in common.

const D = read("data");
const S = D.style;
const alsoDrawn = [];  // what an app draws beside the views
const state = { run: 0, site: null, head: null, rank: 1 };

// Sentences in which `commands` stand between backticks.
function prose(id, text) {
  $(id).replaceChildren(...text.split("`").map((part, i) => (i % 2 ? el("code", {}, part) : document.createTextNode(part))));
}

const percent = (x, digits = 1) => x === undefined || x === null ? "–" : (100 * x).toFixed(digits) + "%";
const signed = (x, digits = 3) => (x < 0 ? "−" : "+") + Math.abs(x).toFixed(digits);
const between = ([, low, high], show) => low === null || high === null ? "" : `[${show(low)}, ${show(high)}]`;

const run = () => D.runs[state.run];
const block = () => run().blocks[state.site][state.head];
const grid = (width) => D.grids[String(width)];
const headName = (head) => head === "all" ? "all heads, joint" : "head " + head;
const joint = () => state.head === "all";

// Value of a curve at a rank: of the nearest rank that the grid has.
function at(curve, rank, width) {
  if (!curve || !curve.length) return null;
  const ranks = grid(width);
  let best = 0;
  for (let i = 0; i < curve.length; i++) if (Math.abs(ranks[i] - rank) < Math.abs(ranks[best] - rank)) best = i;
  return curve[best];
}

/* ---- theme ---- */
let theme = null;  // the reader's choice; without one the system's
const isDark = () => (theme ?? (media.matches ? "dark" : "light")) === "dark";
function applyTheme() {
  document.documentElement.dataset.theme = isDark() ? "dark" : "light";
  $("theme").textContent = isDark() ? "Light" : "Dark";
  $("theme").setAttribute("aria-label", isDark() ? "Switch to light colours" : "Switch to dark colours");
}
function setTheme(name) { theme = name; applyTheme(); drawAll(); }

/* ---- figures ---- */
function layout(x, y, more = {}) {
  const ink = color("ink"), line = color("line");
  const title = (text) => ({ text, standoff: 8, font: { size: 13 } });
  const axis = { gridcolor: line, linecolor: line, tickcolor: line, zeroline: false, automargin: true, ticks: "outside" };
  return {
    font: { family: 'system-ui, "Liberation Sans", sans-serif', size: 13, color: ink },
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", height: 320,
    margin: { l: 62, r: 12, t: 24, b: 46 }, hovermode: "closest", showlegend: false,
    hoverlabel: { bgcolor: color("panel"), bordercolor: line, font: { color: ink } },
    ...more,
    xaxis: { ...axis, title: title(x), ...more.xaxis },
    yaxis: { ...axis, title: title(y), ...more.yaxis },
  };
}

// A logarithmic axis of ranks: what matters happens in the first few directions.
function rankAxis(width) {
  const ticks = [];
  for (let r = 1; r < width / 1.3; r *= 2) ticks.push(r);
  ticks.push(width);
  return { type: "log", range: [Math.log10(0.9), Math.log10(width * 1.12)], tickvals: ticks, ticktext: ticks.map(String) };
}

// The line that moves with the slider, in every figure over ranks.
function marker(rank, width) {
  const right = rank > width / 6;
  return {
    shapes: [{ type: "line", x0: rank, x1: rank, yref: "paper", y0: 0, y1: 1, opacity: 0.8, line: { color: color("ink"), width: 1.6 } }],
    annotations: [{ x: Math.log10(rank), xref: "x", y: 1, yref: "paper", yanchor: "bottom", xanchor: right ? "right" : "left",
      text: "rank " + rank, showarrow: false, font: { size: 12 } }],
  };
}

const line = (i) => ({ color: S.colors[i % S.colors.length], dash: S.dashes[i % S.dashes.length], width: 2.2 });
const nullLine = (dash = "dot") => ({ color: S.null, dash, width: 1.8 });

function curve(x, y, name, lineStyle, more = {}) {
  return { x: x.slice(0, y.length), y, name: label(name), plain: name, mode: "lines", line: lineStyle,
    hovertemplate: `rank %{x}: %{y:.3f}<extra>${label(name)}</extra>`, ...more };
}

function pointsAt(traces, rank) {
  const x = [], y = [], colors = [];
  for (const trace of traces) {
    if (trace.showlegend === false || !trace.x || trace.mode !== "lines") continue;
    let best = 0;
    trace.x.forEach((r, i) => { if (Math.abs(r - rank) < Math.abs(trace.x[best] - rank)) best = i; });
    if (trace.y[best] === null || trace.y[best] === undefined) continue;
    x.push(trace.x[best]); y.push(trace.y[best]); colors.push(trace.line.color);
  }
  return { x, y, mode: "markers", marker: { size: 9, color: colors, line: { color: color("ground"), width: 1.5 } },
    showlegend: false, hoverinfo: "skip", name: "at rank" };
}

function draw(id, traces, figure, spoken) {
  $(id).setAttribute("aria-label", spoken);
  key(id, traces);
  return Plotly.react(id, traces, figure, CONFIG);
}

// The key under a figure, as HTML: it wraps at any width, where plotly's own would cover the axis.
function key(id, traces) {
  const entries = traces.filter((t) => t.name && t.showlegend !== false && t.type !== "heatmap").map((t) => el("li", {}, swatch(t), t.plain ?? t.name));
  const old = $(id).parentElement.querySelector(`ul.key[data-of="${id}"]`);
  if (old) old.remove();
  if (entries.length) $(id).after(el("ul", { class: "key", "data-of": id }, ...entries));
}

const DASHARRAY = { solid: "", dash: "7 4", dot: "2 3", dashdot: "7 3 2 3", longdash: "11 5", longdashdot: "11 4 2 4" };
const POINTS = { "x-thin-open": "M10 2 L18 10 M18 2 L10 10", "circle-open": "M14 2 a4 4 0 1 0 .01 0 Z", circle: "M14 2 a4 4 0 1 0 .01 0 Z", square: "M10 2 H18 V10 H10 Z" };
function swatch(trace) {
  const make = (tag, attributes) => {
    const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    return node;
  };
  const svg = make("svg", { width: 28, height: 12, viewBox: "0 0 28 12", "aria-hidden": "true" });
  if (trace.mode === "lines") svg.append(make("line", { x1: 0, x2: 28, y1: 6, y2: 6, stroke: trace.line.color, "stroke-width": 2.2, "stroke-dasharray": DASHARRAY[trace.line.dash] || "" }));
  else svg.append(make("path", { d: POINTS[trace.marker.symbol], stroke: trace.marker.color, "stroke-width": 2, fill: trace.marker.symbol.endsWith("-open") ? "none" : trace.marker.color }));
  return svg;
}

function show(id, visible) { $(id).hidden = !visible; }

/* ---- controls ---- */
const bySite = (a, b) => parseInt(a) - parseInt(b) || a.localeCompare(b);

function chooseRun(index) {
  state.run = index;
  const sites = Object.keys(run().blocks).sort(bySite);
  // an analysis of all layers may show many sites: begin with one that the run projects
  const used = sites.filter((site) => run().used && site in run().used.ranks);
  options($("site"), sites.map((site) => [site, siteName(site)]), null);
  chooseSite(sites.includes(state.site) ? state.site : (used.length ? used : sites).at(-1));
}

function siteName(site) {
  const used = run().used && site in run().used.ranks && Object.keys(run().blocks).length > Object.keys(run().used.ranks).length;
  const [layer, kind] = site.split(".");
  return `layer ${layer}, ${kind.toUpperCase()}` + (used ? " (projected)" : "");
}

function chooseSite(site) {
  state.site = site;
  const heads = Object.keys(run().blocks[site]).sort((a, b) => (a === "all") - (b === "all") || a - b);
  options($("head"), heads.map((head) => [head, headName(head)]), null);
  $("site").value = site;
  chooseHead(heads.includes(state.head) ? state.head : heads[0]);
}

function chooseHead(head) {
  const before = state.head === null ? null : state.rank / state.width;
  state.head = head;
  state.width = block().width;
  $("head").value = head;
  for (const id of ["rank", "rank-number"]) $(id).max = state.width;
  // heads are narrower than all of them together: the slider keeps its share of the width
  chooseRank(before === null ? startRank() : Math.round(before * state.width));
}

function startRank() {
  const used = run().used;
  if (!used || !(state.site in used.ranks)) return Math.round(state.width / 2);
  const ranks = used.ranks[state.site];
  return used.per_head === !joint() ? ranks[joint() ? 0 : Number(state.head)] ?? ranks[0] : Math.round(state.width / 2);
}

function chooseRank(rank) {
  state.rank = Math.min(Math.max(Math.round(rank) || 1, 1), state.width);
  $("rank").value = state.rank;
  if (document.activeElement !== $("rank-number")) $("rank-number").value = state.rank;
  $("rank-of").textContent = `${state.rank} of ${state.width} directions ${joint() ? "of all heads" : "per head"}`;
}

let scheduled = false;
function changed() {  // at most one drawing per frame, however fast the slider moves
  if (scheduled) return;
  scheduled = true;
  requestAnimationFrame(() => { scheduled = false; drawRanks(); });
}

function start() {
  applyTheme();
  media.addEventListener("change", () => { if (theme === null) setTheme(null); });
  $("theme").addEventListener("click", () => setTheme(isDark() ? "light" : "dark"));
  $("controls").addEventListener("submit", (event) => event.preventDefault());
  options($("run"), D.runs.map((r, i) => [i, r.name]), 0);
  show("run-field", D.runs.length > 1);
  $("run").addEventListener("change", () => { chooseRun(Number($("run").value)); drawAll(); });
  $("site").addEventListener("change", () => { chooseSite($("site").value); changed(); });
  $("head").addEventListener("change", () => { chooseHead($("head").value); changed(); });
  $("rank").addEventListener("input", () => { chooseRank(Number($("rank").value)); changed(); });
  $("rank-number").addEventListener("input", () => { if ($("rank-number").value) { chooseRank(Number($("rank-number").value)); changed(); } });
  $("rank-number").addEventListener("blur", () => { $("rank-number").value = state.rank; });
  for (const id of ["measure", "map-measure", "effect-task", "sweep-family", "outcome"]) $(id).addEventListener("change", changed);
  startTexts();
  chooseRun(0);
  drawAll();
  document.documentElement.dataset.ready = "yes";
}
