const maps = read("data-maps"), example = read("data-example");
const n = example.tokens.length;
const bytes = text => Uint8Array.from(atob(text), c => c.charCodeAt(0));
const named = {k: "keys", v: "values"};
const shown = {map: 0, layer: 0, kind: "", head: 0, row: example.rows.length - 1};

function choices(id, entries, value, change) {
  options($(id), entries, value);
  $(id).onchange = () => change($(id).value);
}

function plain(text) {  // plotly reads tags in titles
  const box = document.createElement("i");
  box.innerHTML = text.replace(/<br>[^]*/, "");
  return box.textContent;
}

function drawMap() {
  const fig = structuredClone(maps[shown.map]);
  const ring = {type: "scatter", x: [], y: [], mode: "markers", hoverinfo: "skip", showlegend: false,
    marker: {symbol: "square-open", size: 17, color: "#d55e00", line: {width: 3}}};
  const trace = fig.data.find(t => t.meta === shown.kind);
  if (trace && trace.x.includes(String(shown.layer)))
    fig.data.push({...ring, x: [String(shown.layer)], y: [String(shown.head)], xaxis: trace.xaxis, yaxis: trace.yaxis});
  Plotly.react("maps", fig.data, inked(fig.layout), CONFIG);
}

function colour(pre, values, {top, from} = {}) {
  const order = [...values.keys()].sort((a, b) => values[b] - values[a]).slice(0, 3);
  pre.replaceChildren(...example.tokens.map((text, i) => {
    const span = el("span", { title: `position ${i} · ${(values[i] / 255).toFixed(2)}` }, text);
    span.style.setProperty("--w", (values[i] / 255).toFixed(3));
    if (example.scored.includes(i)) span.classList.add("s");
    if (i === from) span.classList.add("from");
    if (top && order.includes(i) && values[i] > 12) span.classList.add("top");
    return span;
  }));
}

function strip(title, values, marks, extra) {
  const pre = el("pre");
  colour(pre, values, marks);
  return el("div", { class: "strip" + (extra || "") }, el("h3", {}, title), pre);
}

function drawTexts() {
  const from = example.rows[shown.row], boxes = [];
  const gradient = example.gradient[`${shown.layer}.${shown.kind}`];
  for (let m = 0; m < example.group; m++) {
    const q = shown.head * example.group + m;
    const row = bytes(example.pattern[shown.layer][q]).subarray(shown.row * n, (shown.row + 1) * n);
    boxes.push(strip(`query head ${q} attends to (0 to 1)`, row, {top: true, from}));
  }
  if (gradient) boxes.push(strip(
    `gradient norm of these ${named[shown.kind]}, of the largest`, bytes(gradient[shown.head]), {top: true}, " gradient"));
  $("texts").replaceChildren(...boxes);
  $("explain").textContent = `Example ${example.id}. Attention from position ${from} (${JSON.stringify(example.tokens[from])}), ` +
    `which predicts ${JSON.stringify(example.tokens[from + 1])}. Dashed: scored tokens. Bold: the three largest.`;
}

function drawPatterns() {
  const data = [], layout = {template: maps[0].layout.template, height: 330, margin: {l: 60, r: 10, t: 34, b: 44},
    coloraxis: {colorscale: "Cividis", cmin: 0, cmax: 1, colorbar: {title: {text: "attention"}}}, annotations: []};
  const g = example.group;
  for (let m = 0; m < g; m++) {
    const q = shown.head * g + m, all = bytes(example.pattern[shown.layer][q]);
    const id = m ? String(m + 1) : "";
    const token = i => label(`${i} ${JSON.stringify(example.tokens[i])}`);
    data.push({type: "heatmap", coloraxis: "coloraxis", xaxis: "x" + id, yaxis: "y" + id, x: [...Array(n).keys()], y: example.rows,
      z: example.rows.map((_, r) => Array.from(all.subarray(r * n, (r + 1) * n), v => v / 255)),
      customdata: example.rows.map(r => example.tokens.map((_, c) => `${token(r)} → ${token(c)}`)),
      hovertemplate: "%{customdata}: %{z:.2f}<extra></extra>"});
    const from = (m + .02) / g, to = (m + 1) / g - .03;
    layout["xaxis" + id] = {domain: [from, to], title: {text: "attended position"}, anchor: "y" + id};
    layout["yaxis" + id] = {anchor: "x" + id, autorange: "reversed", matches: m ? "y" : undefined, showticklabels: !m,
      title: {text: m ? "" : "position"}};
    layout.annotations.push({text: `query head ${q}`, xref: "paper", yref: "paper", x: (from + to) / 2, y: 1.02, xanchor: "center",
      yanchor: "bottom", showarrow: false});
  }
  Plotly.react("patterns", data, inked(layout), CONFIG).then(plot => {
    plot.removeAllListeners("plotly_click");
    plot.on("plotly_click", event => choose({row: example.rows.indexOf(event.points[0].y)}));
  });
}

function choose(change) {
  Object.assign(shown, change);
  $("chosen").textContent = `Layer ${shown.layer}, ${named[shown.kind] || shown.kind}, KV head ${shown.head}`;
  $("layer").value = shown.layer; $("kind").value = shown.kind; $("head").value = shown.head; $("row").value = shown.row;
  drawMap(); drawTexts();
  if (!("row" in change) || Object.keys(change).length > 1) drawPatterns();
}

function begin() {
  const first = maps[0].data[0], kinds = maps[0].data.map(t => t.meta);
  let best = -Infinity;
  for (const trace of maps[0].data) trace.z.forEach((row, y) => row.forEach((value, x) => {
    if (value > best) { best = value; Object.assign(shown, {layer: +trace.x[x], kind: trace.meta, head: +trace.y[y]}); }
  }));
  shown.row = Math.max(0, example.rows.indexOf(Math.min(...example.scored) - 1));
  const same = values => values.map(v => [v, named[v] || v]);
  choices("map", maps.map((m, i) => [i, plain(m.layout.title.text)]), 0, v => { shown.map = +v; drawMap(); });
  choices("layer", same(example.pattern.map((_, i) => i)), shown.layer, v => choose({layer: +v}));
  choices("kind", same(kinds), shown.kind, v => choose({kind: v}));
  choices("head", same(first.y.map(Number)), shown.head, v => choose({head: +v}));
  choices("row", example.rows.map((p, i) => [i, `${p} ${JSON.stringify(example.tokens[p])} → ${JSON.stringify(example.tokens[p + 1] || "")}`]),
    shown.row, v => choose({row: +v}));
  choose({...shown});
  $("maps").on("plotly_click", event => {
    const point = event.points[0];
    if (point.data.meta) choose({layer: +point.x, kind: point.data.meta, head: +point.y});
  });
}
begin();
media.addEventListener("change", () => choose({...shown}));
