// Keys, zoom, and words for screen readers. Without it the forms do all that is needed.
"use strict";
const root = document.documentElement;
root.classList.add("script");

const QUESTIONS = ["quality", "alignment"], SIDES = ["left", "right", "tie"];
const form = () => document.getElementById("ballot");
let byKeys = false;

function say(text) {
  const place = document.getElementById("said");
  if (place) place.textContent = text;
}

function chosen(question) {
  const found = form().querySelector(`input[name="${question}"]:checked`);
  return found && found.value;
}

function current() {
  return QUESTIONS.find((question) => !chosen(question));
}

function mark() {
  for (const question of QUESTIONS) {
    document.getElementById(question).classList.toggle("now", question === current());
  }
}

function answer(side) {
  const question = current();
  if (!question) return;
  const input = form().querySelector(`input[name="${question}"][value="${side}"]`);
  input.checked = true;
  byKeys = true;
  mark();
  const fieldset = document.getElementById(question);
  say(`${fieldset.querySelector("legend").textContent}: ${input.parentElement.textContent.trim().split(/\s/)[0]}`);
  if (!current()) form().requestSubmit();
}

function zoom() {
  const is = root.classList.toggle("zoomed");
  document.getElementById("zoom").setAttribute("aria-pressed", String(is));
  if (!is) return;
  for (const frame of document.querySelectorAll("figure a")) {
    frame.scrollTo((frame.scrollWidth - frame.clientWidth) / 2, (frame.scrollHeight - frame.clientHeight) / 2);
  }
}

// Hidden until both are there: neither may show first.
function reveal() {
  const images = [...document.querySelectorAll("figure img")];
  root.classList.remove("ready");
  const all = images.map((image) => image.decode().catch(() => undefined));
  return Promise.all(all).then(() => root.classList.add("ready"));
}

function begin() {
  const keys = document.getElementById("keys");
  try { keys.checked = localStorage.getItem("pixart-keys") !== "off"; } catch { /* blocked: on */ }
  keys.addEventListener("change", () => {
    try { localStorage.setItem("pixart-keys", keys.checked ? "on" : "off"); } catch { /* for this page */ }
  });
  document.getElementById("zoom").addEventListener("click", zoom);
  const frames = [...document.querySelectorAll("figure a")];
  for (const frame of frames) {
    frame.addEventListener("click", (event) => {
      if (event.ctrlKey || event.metaKey || event.shiftKey || event.detail === 0) return;
      event.preventDefault();
      zoom();
    });
    frame.addEventListener("scroll", () => {
      for (const other of frames) {
        if (Math.abs(other.scrollTop - frame.scrollTop) > 1) other.scrollTop = frame.scrollTop;
        if (Math.abs(other.scrollLeft - frame.scrollLeft) > 1) other.scrollLeft = frame.scrollLeft;
      }
    });
  }
  form().addEventListener("change", mark);
  form().addEventListener("submit", () => {
    const by = form().querySelector('input[name="by"]') || form().appendChild(document.createElement("input"));
    Object.assign(by, { type: "hidden", name: "by", value: byKeys ? "keys" : "form" });
  });
  document.addEventListener("keydown", (event) => {
    if (!keys.checked || event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
    const key = event.key.toLowerCase();
    if (["1", "2", "3"].includes(key) && root.classList.contains("ready")) answer(SIDES[key - 1]);
    else if (key === "u") document.getElementById("undo").requestSubmit();
    else if (key === "z") zoom();
    else return;
    event.preventDefault();
  });
  mark();
  reveal();
  // Put in after loading, or nobody is told.
  setTimeout(() => say(document.getElementById("where").textContent), 50);
}

if (form()) begin();
