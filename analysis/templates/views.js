// The views over the rank. Each reads the state and draws itself anew; nothing is computed that Python has not.

function drawRanks() {
  drawReadouts(); drawEnergy(); drawSpectrum(); drawEffects(); drawOverlap(); drawMap(); drawLayers();
}

function drawAll() {
  const r = run();
  $("facts").textContent = [r.model, r.task, `${D.runs.length} run${D.runs.length > 1 ? "s" : ""}`, r.evidence, "spd-lens " + D.version]
    .filter(Boolean).join(" · ");
  startEffects();
  drawRanks(); drawTexts(); drawSaved(); drawProvenance();
  alsoDrawn.forEach((drawOne) => drawOne());
}

/* ---- numbers ---- */
function drawReadouts() {
  const b = block(), r = state.rank, w = state.width, tiles = [];
  const tile = (value, what, ...notes) => tiles.push(el("div", { class: "tile" }, el("dt", {}, what), el("dd", {}, value),
    ...notes.filter(Boolean).map((note) => el("dd", { class: "note" }, note))));
  if (b.energy) tile(percent(at(b.energy, r, w)), "of the gradient energy kept", b.low ? `95% band ${between([0, at(b.low, r, w), at(b.high, r, w)], percent)}` : null);
  if (b.halves) tile(percent(at(b.halves, r, w)), "of unseen gradient energy kept", "directions of half the examples, energy of the other half");
  if (b.kept) tile(percent(at(b.kept, r, w)), "of the activation energy kept", `random directions ${percent(r / w)}`);
  const others = D.runs.map((_, j) => overlapCurve(state.run, j, "energy")).map((c) => at(c, r, w)).filter((x) => x !== null);
  if (others.length) {
    const [low, high] = [Math.min(...others), Math.max(...others)];
    tile(low === high ? percent(low) : `${percent(low, 0)} to ${percent(high, 0)}`, "of other runs' gradient energy kept", `random directions ${percent(r / w)}`);
  }
  const e = effectNow();
  const effect = (key, what, show) => tile(show(e[key][0]), what, between(e[key], show), e.random ? `random ${show(e.random[key][0])}` : null, e.place);
  if (e && e.loss) effect("loss", "nats: change of the aligned loss", (x) => signed(x));
  if (e && e.kl) effect("kl", "nats: KL from base", (x) => x.toFixed(3));
  $("readouts").replaceChildren(...tiles);
}

/* ---- energy and spectrum ---- */
function drawEnergy() {
  const b = block(), ranks = grid(b.width), traces = [];
  const chance = ranks.map((r) => r / b.width);
  if (b.low && b.high) {
    const edge = { mode: "lines", line: { width: 0 }, showlegend: false, hoverinfo: "skip" };
    traces.push({ x: ranks, y: b.high, ...edge }, { x: ranks, y: b.low, fill: "tonexty", fillcolor: S.colors[0] + "33", ...edge });
  }
  if (b.energy) traces.push(curve(ranks, b.energy, "gradients" + (b.low ? ", 95% band" : ""), line(0)));
  if (b.halves) traces.push(curve(ranks, b.halves, "gradients of examples not used for the directions", line(1)));
  if (b.kept) traces.push(curve(ranks, b.kept, "activations, in the gradients' directions", line(2)));
  if (b.activation) traces.push(curve(ranks, b.activation, "null: activations, in their own", nullLine("dot")));
  traces.push(curve(ranks, chance, "null: random directions, r/d", nullLine("longdash")));
  const figure = layout("rank r (directions kept)", "share of energy", { ...marker(state.rank, b.width),
    xaxis: rankAxis(b.width), yaxis: { range: [0, 1.03], tickformat: ".0%" } });
  draw("plot-energy", [...traces, pointsAt(traces, state.rank)], figure,
    b.energy ? `At rank ${state.rank} the directions hold ${percent(at(b.energy, state.rank, b.width))} of the gradient energy.` : "Energy against rank.");
  prose("energy-says", energySays(b));
}

function energySays(b) {
  if (!b.energy) return "This subspace was not extracted, so it has no spectrum of its own.";
  const ninety = countFor(b.energy, b.width, 0.9), null90 = b.activation ? countFor(b.activation, b.width, 0.9) : null;
  let text = `${siteName(state.site)}, ${headName(state.head)}: ${ninety} of ${b.width} directions hold 90% of the gradient energy`;
  text += null90 ? `; activations need ${null90} of their own.` : ".";
  if (b.kept) {
    const [kept, chance] = [at(b.kept, state.rank, b.width), state.rank / b.width];
    text += ` At rank ${state.rank} those directions keep ${percent(kept)} of the activation energy, random ones ${percent(chance)}.`;
  }
  return text;
}

function countFor(curveOf, width, share) {
  const index = curveOf.findIndex((x) => x >= share - 1e-9);
  return index < 0 ? width : grid(width)[index];
}

function drawSpectrum() {
  const b = block(), ranks = grid(b.width), traces = [];
  const positive = (values) => values.map((x) => (x > 1e-9 ? x : null));
  if (b.spectrum) traces.push(curve(ranks, positive(b.spectrum), "gradients", line(0), { hovertemplate: "direction %{x}: %{y:.2e}<extra></extra>" }));
  if (b.activation_spectrum) traces.push(curve(ranks, positive(b.activation_spectrum), "null: activations", nullLine("dot"), { hovertemplate: "direction %{x}: %{y:.2e}<extra></extra>" }));
  traces.push(curve(ranks, ranks.map(() => 1 / b.width), "null: all directions alike, 1/d", nullLine("longdash")));
  const figure = layout("direction, largest first", "share of energy", { ...marker(state.rank, b.width), xaxis: rankAxis(b.width),
    yaxis: { type: "log", exponentformat: "power", dtick: 1 } });
  draw("plot-spectrum", [...traces, pointsAt(traces, state.rank)], figure, "Share of the energy in each direction, on a logarithmic axis.");
}

/* ---- effects ---- */
function startEffects() {
  const tasks = (run().effects || []).map((e) => e.task), sweeps = run().rank_sweep || [];
  const same = state.startedFor === state.run, now = $("effect-task").value, family = $("sweep-family").value;
  const own = tasks.includes(run().task) ? run().task : tasks[0];
  state.startedFor = state.run;  // drawn anew for other colours, the choices stay
  options($("effect-task"), tasks.map((task) => [task, task]), same && now ? now : own);
  options($("sweep-family"), sweeps.map((sweep, i) => [i, sweep.name + (sweep.own ? " (this run)" : "")]), same && family ? family : 0);
  show("effect", tasks.length > 0 || sweeps.length > 0);
  show("effect-task-field", tasks.length > 1 && !sweeps.length);
  show("sweep-family-field", sweeps.length > 1);
}

const measured = () => (run().effects || []).find((e) => e.task === $("effect-task").value) || null;
const sweepNow = () => (run().rank_sweep || [])[Number($("sweep-family").value)] || null;

// The rank and width of the run's own blocks: the slider may stand on wider or narrower ones.
function usedRank() {
  const used = run().used;
  if (!used) return null;
  const [site, ranks] = Object.entries(used.ranks)[0], heads = Object.entries(run().blocks[site] || {});
  const entry = heads.find(([head]) => (head !== "all") === used.per_head) || heads[0];
  return { rank: Math.max(...ranks), width: entry ? entry[1].width : state.width, per_head: used.per_head };
}

// The slider's rank as the same share of another width.
const rankIn = (width) => Math.max(1, Math.round(state.rank / state.width * width));

// What is known of the effect nearest to the slider's rank.
function effectNow() {
  const sweep = sweepNow();
  if (sweep) {
    const wanted = rankIn(sweep.width);
    const row = sweep.rows.reduce((best, one) => Math.abs(one.rank - wanted) < Math.abs(best.rank - wanted) ? one : best);
    return { ...row, place: `rank ${row.rank} of ${sweep.width}` + (row.rank === wanted ? "" : ", the nearest swept") };
  }
  const e = measured(), used = usedRank();
  return e && e.projected && used ? { ...e.projected, random: e.random, place: `at the run's rank ${used.rank} of ${used.width}` } : null;
}

function drawEffects() {
  if ($("effect").hidden) return;
  const sweep = sweepNow(), e = measured(), used = usedRank();
  const shape = sweep || used || { width: state.width, per_head: !joint() }, rank = rankIn(shape.width);
  for (const [id, key] of [["plot-loss", "loss"], ["plot-kl", "kl"]]) {
    const traces = sweep ? sweptLines(sweep, key) : e && used ? singlePoint(e, key, used) : [];
    if (e && e.spd && !sweep) traces.push({ x: [0.9, shape.width * 1.1], y: [e.spd[key][0], e.spd[key][0]], mode: "lines", name: "after SPD, without projection",
      line: line(1), hovertemplate: `after SPD: ${e.spd[key][0].toFixed(4)} ${between(e.spd[key], (v) => v.toFixed(4))}<extra></extra>` });
    const figure = layout(`rank r per ${shape.per_head ? "head" : "site"}, at all sites projected`, "nats per token",
      { ...marker(rank, shape.width), xaxis: rankAxis(shape.width), yaxis: key === "kl" ? { rangemode: "tozero" } : {} });
    figure.shapes.push({ type: "line", xref: "paper", x0: 0, x1: 1, y0: 0, y1: 0, layer: "between", line: { color: S.null, width: 1 } });
    draw(id, sweep ? [...traces, pointsAt(traces, rank)] : traces, figure, `${key === "kl" ? "KL from base" : "Change of the aligned loss"} against rank.`);
  }
  prose("effect-says", effectSays(sweep, e, used));
}

function sweptLines(sweep, key) {
  const traces = [], edge = { mode: "lines", line: { width: 0 }, showlegend: false, hoverinfo: "skip" };
  for (const [name, pick, style, fill] of [["null: random subspaces, with the range of draws", (row) => row.random[key], nullLine(), S.null],
    ["projected, 95% over items", (row) => row[key], line(0), S.colors[0]]]) {
    const rows = sweep.rows.filter((row) => pick(row) && pick(row)[0] !== null), xs = rows.map((row) => row.rank), ys = rows.map(pick);
    if (!rows.length) continue;
    traces.push({ x: xs, y: ys.map((v) => v[2]), ...edge }, { x: xs, y: ys.map((v) => v[1]), fill: "tonexty", fillcolor: fill + "33", ...edge },
      curve(xs, ys.map((v) => v[0]), name, style));
  }
  return traces;
}

function singlePoint(e, key, used) {
  const traces = [], error = (v) => ({ type: "data", symmetric: false, array: [v[2] === null ? 0 : v[2] - v[0]], arrayminus: [v[1] === null ? 0 : v[0] - v[1]], thickness: 2, width: 6 });
  const hover = (v) => `%{y:.3f} ${between(v, (x) => x.toFixed(3))}`;
  if (e.random) {
    const each = e.random.each.map((pair) => pair[key === "kl" ? 1 : 0]);
    traces.push({ x: each.map((_, i) => used.rank * (1.14 + 0.03 * (i % 3))), y: each, mode: "markers", name: "null: each random subspace",
      marker: { symbol: "x-thin-open", size: 9, color: S.null, line: { width: 2 } }, hovertemplate: "%{y:.3f}<extra>one random subspace</extra>" });
    const v = e.random[key];
    traces.push({ x: [used.rank * 1.07], y: [v[0]], error_y: { ...error(v), color: S.null }, mode: "markers", name: "null: random, mean",
      marker: { symbol: "circle-open", size: 11, color: S.null, line: { width: 2 } }, hovertemplate: hover(v) + "<extra>random</extra>" });
  }
  const v = e.projected[key];
  traces.push({ x: [used.rank], y: [v[0]], error_y: { ...error(v), color: S.colors[0] }, mode: "markers", name: "projected",
    marker: { symbol: "circle", size: 12, color: S.colors[0] }, hovertemplate: hover(v) + "<extra>projected</extra>" });
  return traces;
}

function effectSays(sweep, e, used) {
  const parts = [];
  if (sweep) parts.push(sweep.says);
  else if (e && e.says) parts.push(...e.says);  // of other items and draws than a sweep's: not beside it
  if (!sweep && used) parts.push("Measured at the run's rank alone; `spd-lens analyze rank-sweep` measures others.");
  return parts.filter(Boolean).join(" ");
}

/* ---- overlap ---- */
function overlapCurve(i, j, measure) {
  const tables = (D.overlap[state.site] || {})[state.head];
  const table = tables && tables[measure];
  return table ? table[i][j] : null;
}

function drawOverlap() {
  const n = D.runs.length, b = block(), w = b.width, ranks = grid(w), r = state.rank, measure = $("measure").value;
  const own = run().name, energy = measure === "energy";
  show("overlap-plots", n > 1); show("overlap-row", n > 1);
  if (n < 2) {
    prose("overlap-says", "Name several runs, and this view compares them: spd-lens dashboard RUN RUN…");
    return;
  }
  $("overlap-caption").textContent = `What ${own}'s directions hold, against rank`;
  const traces = [];
  D.runs.forEach((other, j) => {
    const c = overlapCurve(state.run, j, measure);
    if (c) traces.push(curve(ranks, c, `${energy ? "gradients" : "directions"} of ${other.name}`, line(j)));
  });
  if (energy && b.halves) traces.push(curve(ranks, b.halves, `${own} itself, half against half`, { color: color("ink"), dash: "longdashdot", width: 1.8 }));
  traces.push(curve(ranks, ranks.map((k) => k / w), "null: random directions, r/d", nullLine("dot")));
  const name = energy ? "share of gradient energy held" : "mean squared cosine";
  draw("plot-overlap-rank", [...traces, pointsAt(traces, r)], layout("rank r (directions kept)", name, { ...marker(r, w),
    xaxis: rankAxis(w), yaxis: { range: [0, 1.03], ...(energy ? { tickformat: ".0%" } : {}) } }), "Overlap against rank.");
  const z = D.runs.map((_, i) => D.runs.map((__, j) => {
    if (i !== j) return at(overlapCurve(i, j, measure), r, w);
    const mine = (D.runs[i].blocks[state.site] || {})[state.head];
    return energy ? at(mine && mine.halves, r, w) : 1;
  }));
  const names = D.runs.map((x) => label(x.name));
  const chance = r / w;
  draw("plot-overlap", [{ type: "heatmap", x: names, y: names, z, zmin: 0, zmax: 1, colorscale: S.sequential, xgap: 2, ygap: 2,
    text: z.map((row) => row.map((x) => x === null ? "n/a" : energy ? percent(x, 0) : x.toFixed(2))), texttemplate: "%{text}", textfont: { size: 15 },
    hovertemplate: "subspace of %{y}<br>gradients of %{x}<br>%{text}<extra></extra>", hoverongaps: false, showscale: false }],
    layout(energy ? "gradients of" : "directions of", energy ? "subspace of" : "directions of",
      { xaxis: { type: "category", showgrid: false, ticks: "" }, yaxis: { type: "category", showgrid: false, autorange: "reversed", ticks: "" } }),
    `Overlap of ${n} runs at rank ${r}.`);
  const cells = z.flatMap((row, i) => row.filter((x, j) => i !== j && x !== null));
  const spread = cells.length ? `between runs ${percent(Math.min(...cells), 0)} to ${percent(Math.max(...cells), 0)}` : "no other run has this site";
  prose("overlap-says", `Rank ${r} of ${w}: ${spread}; random directions ${percent(chance, 0)}. ` +
    (energy ? "Diagonal: directions from half of a run's examples, gradients of its other half." : "Diagonal: 1 by definition. At high ranks mostly the tails are compared, and chance is high."));
}

/* ---- layer × head ---- */
const KINDS = { k: "keys", v: "values", q: "queries", z: "z", resid: "residual" };
function drawMap() {
  const blocks = run().blocks, measure = $("map-measure").value, r = state.rank;
  const sites = Object.keys(blocks).sort(bySite);
  const kinds = [...new Set(sites.map((s) => s.split(".")[1]))].sort();
  const layers = [...new Set(sites.map((s) => Number(s.split(".")[0])))].sort((a, b) => a - b);
  const cells = sites.flatMap((s) => Object.entries(blocks[s]).filter(([head]) => head !== "all" || Object.keys(blocks[s]).length === 1).map(([head, b]) => ({ s, head, b })));
  const energies = cells.filter((c) => c.b.energy);
  show("where", energies.length > 1);
  if (energies.length < 2) return;
  const total = cells.reduce((sum, c) => sum + (c.b.total || 0), 0);
  for (const option of $("map-measure").options) if (option.value === "share") option.disabled = !total;
  const chosen = measure === "share" && !total ? "held" : measure;
  const value = (b) => !b || !b.energy ? null : chosen === "share" ? b.total / total
    : chosen === "held" ? at(b.energy, joint() ? Math.max(1, Math.round(r / state.width * b.width)) : r, b.width) : countFor(b.energy, b.width, 0.9);
  const format = (x) => x === null || x === undefined ? "" : chosen === "ninety" ? String(x) : percent(x, chosen === "share" && x < 0.0995 ? 1 : 0);
  // a row per head, a blank one between kinds; the key of a row is "k 0", so that a click can be read back
  const rows = [], names = [];
  kinds.forEach((kind, k) => {
    const heads = [...new Set(cells.filter((c) => c.s.endsWith("." + kind)).map((c) => c.head))].sort((a, b) => a - b);
    if (k) { rows.push([null, null]); names.push(" ".repeat(k)); }
    for (const head of heads) { rows.push([kind, head]); names.push(`${KINDS[kind] || kind} ${head}`); }
  });
  const z = rows.map(([kind, head]) => layers.map((layer) => kind === null ? null : value((blocks[`${layer}.${kind}`] || {})[head])));
  const all = z.flat().filter((x) => x !== null), written = layers.length <= 14;
  const figure = layout("layer", "head", { height: 96 + rows.length * (rows.length > 24 ? 15 : 27), shapes: [],
    xaxis: { type: "category", showgrid: false, ticks: "" }, yaxis: { type: "category", showgrid: false, ticks: "", autorange: "reversed" } });
  const [layer, kind] = state.site.split("."), i = layers.indexOf(Number(layer)), j = rows.findIndex((row) => row[0] === kind && row[1] === state.head);
  if (j >= 0) figure.shapes.push({ type: "rect", x0: i - 0.5, x1: i + 0.5, y0: j - 0.5, y1: j + 0.5, line: { color: S.colors[1], width: 3 } });
  draw("plot-map", [{ type: "heatmap", x: layers.map(String), y: names, z, text: z.map((row) => row.map(format)), texttemplate: written ? "%{text}" : "", customdata: z.map((_, n) => layers.map((one) => [`${one}.${rows[n][0]}`, rows[n][1]])),
    hovertemplate: "layer %{x}, %{y}: %{text}<extra></extra>", hoverongaps: false, xgap: 2, ygap: 2, colorscale: S.sequential, showscale: !written,
    zmin: chosen === "ninety" ? 1 : 0, zmax: chosen === "held" ? 1 : Math.max(...all), colorbar: { thickness: 12, outlinewidth: 0, nticks: 5, tickformat: chosen === "ninety" ? "d" : ".0%" } }],
    figure, "Map of layers and heads.");
  const plot = $("plot-map");
  if (!plot.dataset.listens) {
    plot.dataset.listens = "yes";
    plot.on("plotly_click", (event) => {
      const [site, head] = event.points[0].customdata;
      if (!(site in run().blocks)) return;
      chooseSite(site); chooseHead(head); changed();
    });
  }
  const few = layers.length < 5 && run().used ? " Only the run's own layers were extracted; after `spd-lens analyze heads` all are here." : "";
  prose("where-says", `Outlined: the site and head chosen above; a click chooses another.` + (chosen === "share" ? ` If all were alike, each would have ${percent(1 / all.length)}.` : "") + few);
}

/* ---- layer sweep ---- */
function drawLayers() {
  const sweep = run().layer_sweep;
  show("layers", !!sweep);
  if (!sweep) return;
  const most = Math.max(...sweep.z.flat().filter((x) => x !== null).map(Math.abs));
  draw("plot-layers", [{ type: "heatmap", x: sweep.columns.map(label), y: sweep.rows.map(label), z: sweep.z, zmin: -most, zmax: most, colorscale: S.diverging, xgap: 2, ygap: 2,
    text: sweep.text, texttemplate: sweep.rows.length * sweep.columns.length <= 160 ? "%{text}" : "", hovertemplate: "%{y}, %{x}: %{text}<extra></extra>", hoverongaps: false,
    colorbar: { thickness: 12, outlinewidth: 0, title: { text: sweep.unit, side: "right", font: { size: 13 } } } }],
    layout(sweep.x, sweep.y, { height: Math.max(220, 110 + sweep.rows.length * (sweep.rows.length > 10 ? 19 : 36)), xaxis: { type: "category", showgrid: false, ticks: "" }, yaxis: { type: "category", showgrid: false, autorange: "reversed", ticks: "" } }),
    "Layer sweep.");
  prose("layers-says", sweep.says);
}
