// The page without a server: votes stay in this browser until they are saved as votes.json.
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const KEY = `pixart-study-${data.study}`;
let shown = null, since = 0;
let state = load();

function load() {
  let kept = null;
  try { kept = JSON.parse(localStorage.getItem(KEY)); } catch { /* blocked, or damaged */ }
  if (kept && /^p[0-9a-f]{16}$/.test(kept.voter) && Number.isInteger(kept.order) && kept.votes) return kept;
  const digits = Array.from(crypto.getRandomValues(new Uint8Array(8)), (n) => n.toString(16).padStart(2, "0"));
  return { voter: `p${digits.join("")}`, order: 0, votes: {} };
}

function keep() {
  try {
    localStorage.setItem(KEY, JSON.stringify(state));
  } catch {
    document.getElementById("lost").hidden = false;
  }
}

// FNV-1a: an order of the voter's own, the same after every visit.
function hash(text) {
  let value = 2166136261;
  for (let k = 0; k < text.length; k++) value = Math.imul(value ^ text.charCodeAt(k), 16777619) >>> 0;
  return value;
}

function next() {
  const met = {};
  for (const pair of data.pairs) if (state.votes[pair.id]) met[pair.prompt] = (met[pair.prompt] || 0) + 1;
  const rank = (pair) => [met[pair.prompt] || 0, hash(state.voter + pair.id)];
  return data.pairs.filter((pair) => !state.votes[pair.id]).reduce((best, pair) => {
    if (!best) return pair;
    const [a, b] = rank(pair), [c, d] = rank(best);
    return a < c || (a === c && b < d) ? pair : best;
  }, null);
}

function show(pair) {
  shown = pair;
  const done = Object.keys(state.votes).length;
  document.getElementById("bar").value = done;
  document.getElementById("where").textContent = pair ? `Pair ${done + 1} of ${data.pairs.length}` : `${done} of ${data.pairs.length}`;
  form().hidden = !pair;
  document.getElementById("done").hidden = Boolean(pair);
  if (!pair) {
    document.querySelector("#done h1").focus();
    return;
  }
  form().reset();
  byKeys = false;
  document.getElementById("prompt").textContent = pair.prompt;
  form().classList.toggle("long", pair.prompt.length > 110);
  for (const side of ["left", "right"]) {
    const image = document.getElementById(side), link = image.parentElement;
    image.width = pair.width;
    image.height = pair.height;
    image.src = pair[side];
    if (pair[side].startsWith("data:")) link.removeAttribute("href");
    else link.href = pair[side];
  }
  mark();
  reveal().then(() => { since = performance.now(); });
  scrollTo(0, 0);
  say(document.getElementById("where").textContent);
}

form().addEventListener("submit", (event) => {
  event.preventDefault();
  if (!shown || !chosen("quality") || !chosen("alignment")) return;
  state.order += 1;
  state.votes[shown.id] = {
    quality: chosen("quality"),
    alignment: chosen("alignment"),
    ms: Math.max(0, Math.round(performance.now() - since)),
    order: state.order,
    agent: `page ${/Mobi/.test(navigator.userAgent) ? "phone" : "desk"} ${byKeys ? "keys" : "form"}`,
  };
  keep();
  show(next());
});

document.getElementById("undo").addEventListener("submit", (event) => {
  event.preventDefault();
  const last = Object.entries(state.votes).sort((a, b) => b[1].order - a[1].order)[0];
  if (!last) return;
  delete state.votes[last[0]];
  keep();
  show(data.pairs.find((pair) => pair.id === last[0]));
});

document.getElementById("save").addEventListener("click", () => {
  const known = new Set(data.pairs.map((pair) => pair.id));
  const votes = Object.entries(state.votes).filter(([pair]) => known.has(pair));
  const content = {
    format: data.format, version: 1, study: data.study, voter: state.voter,
    votes: votes.map(([pair, vote]) => ({ pair, ...vote })),
  };
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([JSON.stringify(content)], { type: "application/json" }));
  link.download = "votes.json";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  say(`Saved ${votes.length} votes`);
});

keep();
show(next());
