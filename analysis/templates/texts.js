// Completions side by side, saved tables, provenance: text alone, put in as text.

const PER_PAGE = 3;
const reading = { page: 0, search: "" };

function startTexts() {
  $("text-set").addEventListener("change", () => { reading.page = 0; startAgainst(); listTexts(); });
  for (const id of ["text-against", "text-changed"]) $(id).addEventListener("change", () => { reading.page = 0; listTexts(); });
  $("text-search").addEventListener("input", () => { reading.page = 0; listTexts(); });
  $("text-previous").addEventListener("click", () => { reading.page -= 1; listTexts(); });
  $("text-next").addEventListener("click", () => { reading.page += 1; listTexts(); });
}

function drawTexts() {
  const sets = run().texts || [];
  show("texts", sets.length > 0);
  if (!sets.length) return;
  const before = Number($("text-set").value) || 0;
  options($("text-set"), sets.map((set, i) => [i, set.title]), Math.min(before, sets.length - 1));
  reading.page = 0;
  startAgainst();
  listTexts();
}

function startAgainst() {
  const others = run().texts[Number($("text-set").value)].columns.slice(1);
  options($("text-against"), others.map((name) => [name, policyName(name)]), others[0]);
  show("text-against-field", others.length > 1);
}

const policyName = (name) => ({ base: "base", projected: "under the projection", spd: "after SPD", random: "random subspace" })[name] || name;
const textOf = (item) => [item.id, item.prompt, item.text, item.gold || "", ...Object.values(item.pieces).map((list) => list.map((p) => p[p.length > 1 ? 1 : 0]).join(""))].join("\n").toLowerCase();
const differs = (item) => Object.values(item.pieces).some((list) => list.some((p) => p.length > 1 && !p[2]));

function listTexts() {
  const set = run().texts[Number($("text-set").value)];
  const wanted = $("text-search").value.trim().toLowerCase();
  let items = set.items;
  if ($("text-changed").checked) items = items.filter(differs);
  if (wanted) items = items.filter((item) => textOf(item).includes(wanted));
  const pages = Math.max(1, Math.ceil(items.length / PER_PAGE));
  reading.page = Math.min(Math.max(reading.page, 0), pages - 1);
  const first = reading.page * PER_PAGE, shown = items.slice(first, first + PER_PAGE);
  $("text-list").replaceChildren(...(shown.length ? shown.map((item) => card(set, item)) : [el("p", { class: "empty" }, "No completion is like that.")]));
  const cut = set.total > set.items.length ? `, the first ${set.items.length} of ${set.total} are in this page` : "";
  $("text-place").textContent = shown.length ? `${first + 1}–${first + shown.length} of ${items.length}${cut}` : "0";
  $("text-previous").disabled = reading.page === 0;
  $("text-next").disabled = reading.page >= pages - 1;
}

function card(set, item) {
  const sides = set.columns.map((name, i) => {
    const text = el("div", { class: "text", tabindex: "0", "aria-label": policyName(name) });
    const against = $("text-against").value;
    if (i === 0) text.append(...(item.pieces[against] ? marked(item.pieces[against], "before") : [item.text]));
    else text.append(...marked(item.pieces[name], "after"));
    const notes = [];
    if (item.scores) notes.push(`score ${item.scores[name]}`);
    if (item.ends[name] === "length") notes.push("cut at the limit");
    if (i > 0) notes.push(item.pieces[name].some((p) => p.length > 1 && !p[2]) ? percent(common(item.pieces[name]), 0) + " of the words in common" : "the same words");
    return el("div", { class: "side" }, el("h4", {}, policyName(name), ...notes.map((note) => el("small", {}, note))), text);
  });
  const gold = item.gold ? el("span", {}, "gold: " + ending(item.gold)) : null;
  return el("article", { class: "card" }, el("header", {}, el("h3", {}, item.id), gold),
    el("div", { class: "prompt", tabindex: "0", "aria-label": "prompt" }, item.prompt), el("div", { class: "sides" }, ...sides));
}

// The end of a gold completion is where its answer stands.
function ending(text) {
  const last = text.trim().split("\n").at(-1);
  return last.length > 80 ? "…" + last.slice(-80) : last;
}

function marked(pieces, side) {
  return pieces.flatMap((p) => {
    const text = p[p.length > 1 && side === "after" ? 1 : 0];
    if (!text) return [];
    if (p.length === 1 || p[2]) return [text];
    const words = text.trimEnd();  // a mark ends with its last word
    return [el(side === "after" ? "ins" : "del", {}, words), text.slice(words.length)];
  });
}

// The share of the words of both texts that is in both.
function common(pieces) {
  const words = (text) => (text.match(/\S+/g) || []).length;
  let same = 0, all = 0;
  for (const p of pieces) {
    const [a, b] = p.length === 1 ? [words(p[0]), words(p[0])] : [words(p[0]), words(p[1])];
    all += a + b;
    if (p.length === 1 || p[2]) same += a + b;
  }
  return all ? same / all : 1;
}

function drawSaved() {
  const tables = run().saved || [];
  show("saved", tables.length > 0);
  $("saved-list").replaceChildren(...tables.map((table) => {
    const name = table.name.replace(/[_-]/g, " ");
    const link = table.href ? el("p", {}, el("a", { href: encodeURI(table.href).replace(/[?#]/g, encodeURIComponent), target: "_blank", rel: "noopener" }, `open the page of ${name}`)) : null;
    const says = [table.question, table.rows === undefined ? "" : `${table.rows} rows`].filter(Boolean).join(" · ");
    return el("details", {}, el("summary", {}, name + (table.href ? " ↗" : "")), el("p", { class: "says" }, says), link, table.head ? preview(table) : null);
  }));
}

function preview(table) {
  const head = el("tr", {}, ...table.columns.map((name) => el("th", { scope: "col" }, name)));
  const rows = table.head.map((row) => el("tr", {}, ...row.map((cell) => el("td", {}, cell))));
  return el("div", { class: "preview", tabindex: "0", role: "region", "aria-label": `first rows of ${table.name}` }, el("table", {}, el("thead", {}, head), el("tbody", {}, ...rows)));
}

function drawProvenance() {
  const tables = run().provenance || [];
  show("provenance", tables.length > 0);
  $("provenance-list").replaceChildren(...tables.map((table, i) => {
    const rows = table.rows.map(([key, value]) => el("tr", {}, el("th", { scope: "row" }, key), el("td", {}, value)));
    const box = el("details", {}, el("summary", {}, table.title), el("table", {}, el("tbody", {}, ...rows)));
    if (i < 2) box.open = true;
    return box;
  }));
}

start();
