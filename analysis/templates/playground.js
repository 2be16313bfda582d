// The tab of the live app that generates: what its form asks, and how an answer is shown.

const ASKED = read("playground-data");
const LOOKS = { base: [S.colors[7], ""], projected: [S.colors[0], "/"], random: [S.null, "."], spd: [S.colors[1], "x"] };
let answered = null;

const given = (name) => $(`ask-${name}`).value;
const numberGiven = (name) => (given(name) === "" ? null : Number(given(name)));
const chosen = (name) => [...document.querySelectorAll(`#ask-${name} input:checked`)].map((box) => box.value);

function question() {
  return {
    run: chosen("run")[0], prompt: given("prompt"), layers: chosen("layers").map(Number), kinds: chosen("kinds"),
    form: chosen("form")[0], rank: numberGiven("rank"), strength: numberGiven("strength"), tokens: numberGiven("tokens"),
    temperature: numberGiven("temperature"), seed: numberGiven("seed"), also: chosen("also"),
  };
}

async function generate(event) {
  event.preventDefault();
  $("go").disabled = true;
  $("go").textContent = "Generating…";
  $("answer").classList.add("busy");
  let answer;
  try {
    const response = await fetch("generate", {
      method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(question()) });
    answer = await response.json();
  } catch {
    answer = { error: "the app does not answer; look at the terminal that runs it" };
  }
  $("message").textContent = answer.error || "";
  if (!answer.error) showAnswer(answer);
  $("answer").classList.remove("busy");
  $("go").textContent = "Generate";
  $("go").disabled = false;
}

function showAnswer(answer) {
  answered = answer;
  const changes = answer.said.slice(1).map((said) => `${ASKED.names[said.policy]} ${said.kl.toFixed(3)}`).join("; ");
  const sides = answer.said.map((said, i) => el("div", { class: "side" },
    el("h4", {}, ASKED.names[said.policy], el("small", {}, said.ended ? "ended by itself" : "cut at the limit")),
    el("div", { class: "text", tabindex: "0", id: `said-${said.policy}` },
      ...(i ? marked(said.pieces.map(([same, before, after]) => [before, after, same]), "after") : [said.text]))));
  $("answer").replaceChildren(
    el("section", { class: "panel" }, el("h2", {}, "What comes next?"),
      el("p", { class: "says" }, `Next token after the prompt. KL from base, in nats: ${changes}.`),
      el("div", { class: "plot", id: "next-tokens" })),
    el("section", { class: "panel" }, el("h2", {}, "What does it say?"),
      el("p", { class: "legend" }, el("ins", {}, "solid underline"), ` only here, not in the base · ${answer.facts}`),
      el("article", { class: "card" }, el("div", { class: "sides" }, ...sides))));
  drawNextTokens();
}

// Probabilities of the most probable next tokens, a bar per policy: never told apart by colour alone.
function drawNextTokens() {
  if (!answered) return;
  const tokens = answered.tokens.map((token, i) => `${i + 1}. ${label(token)}`);  // two tokens may look alike
  const bars = answered.said.map((said) => {
    const [fill, shape] = LOOKS[said.policy], name = ASKED.names[said.policy];
    return { type: "bar", orientation: "h", y: tokens, x: said.probabilities, name,
      marker: { color: fill, pattern: { shape, fillmode: "overlay", fgcolor: "rgba(255,255,255,.8)", size: 7 } },
      hovertemplate: `%{y}: %{x:.4f}<extra>${name}</extra>` };
  });
  Plotly.react("next-tokens", bars, layout("probability of the next token", "token", {
    height: 420, barmode: "group", bargap: 0.25, margin: { t: 34, l: 90, r: 16, b: 50 }, showlegend: true,
    legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", traceorder: "normal" },
    xaxis: { rangemode: "tozero" }, yaxis: { autorange: "reversed", type: "category" } }), CONFIG);
}

function showTab(name) {
  show("playground", name === "playground");
  show("all-views", name === "views");
  for (const tab of ["playground", "views"]) $(`tab-${tab}`).dataset.chosen = tab === name ? "yes" : "no";
  window.dispatchEvent(new Event("resize"));  // figures that were drawn while they were hidden
}

function showNumbers() {
  $("rank-label").textContent = `Rank: ${given("rank")} of ${$("ask-rank").max} directions per block`;
  $("strength-label").textContent = `Strength: ${Number(given("strength")).toFixed(2)}`;
}

function changeForm() {  // the slider keeps its share of the width
  const share = numberGiven("rank") / Number($("ask-rank").max);
  $("ask-rank").max = ASKED.widths[chosen("form")[0]];
  $("ask-rank").value = Math.max(1, Math.round(share * Number($("ask-rank").max)));
  showNumbers();
}

$("ask").noValidate = true;  // what is out of range is refused in words by the app
$("ask").addEventListener("submit", generate);
for (const id of ["ask-rank", "ask-strength"]) $(id).addEventListener("input", showNumbers);
$("ask-form").addEventListener("change", changeForm);
for (const tab of ["playground", "views"]) $(`tab-${tab}`).addEventListener("click", () => showTab(tab));
alsoDrawn.push(drawNextTokens);
showNumbers();
