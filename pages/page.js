"use strict";
// The page's data lies in #data as JSON. Its text is only ever set as text; the one exception is
// data.formulas, MathML that pages/formulas.py rebuilt from a list of allowed elements.
// The filters are the page's address: page.html#view=answers&correct=wrong&code=yes can be shared.

const data = JSON.parse(document.getElementById("data").textContent);
const pieces = new RegExp(data.pieces, "g");
const last = data.columns.length - 1; // correct, code and cut off are about this column
const byId = id => document.getElementById(id);

function make(tag, className, ...children) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  element.append(...children);
  return element;
}

// ---- what there is to filter

const right = x => x ? "right" : "wrong";
const habit = x => x ? "code" : "language";

// One answer per problem and sample: [problem, sample number, cells].
const answers = data.problems.flatMap((problem, i) =>
  problem.samples.map((cells, j) => ({
    problem, group: i, number: j, cells,
    level: problem.level, subject: problem.subject,
    correct: cells[last] && right(cells[last].right),
    code: cells[last] && (cells[last].code ? "yes" : "no"),
    cut: cells[last] && (cells[last].cut ? "yes" : "no"),
    change: last > 0 && cells[0] && cells[last] &&
      right(cells[0].right) + " to " + right(cells[last].right),
    habit: last > 0 && cells[0] && cells[last] &&
      habit(cells[0].code) + " to " + habit(cells[last].code),
    texts: () => [problem.problem, problem.answer, ...cells.map(c => c ? c.text : "")],
  })));

const samples = data.runs.flatMap(run => run.samples.map(sample => ({
  sample, run: run.name, step: String(sample.step),
  correct: right(sample.correct), code: sample.code ? "yes" : "no",
  clipped: sample.clipped && (sample.clipped.includes(1) ? "yes" : "no"),
  texts: () => [sample.problem, sample.answer, sample.response],
}))).sort((a, b) => a.sample.step - b.sample.step);

const views = {
  answers: { title: "Answers", items: answers, show: showProblem, filters: {
    correct: data.columns[last] + " is", change: "verdict went from",
    code: "uses code", habit: "habit went from", cut: "cut off",
    level: "level", subject: "subject" } },
  samples: { title: "Training samples", items: samples, show: showSample, filters: {
    run: "run", step: "step", correct: "is", code: "uses code", clipped: "has clipped tokens" } },
  runs: { title: "Curves and settings", items: [], filters: {} },
};
const colours = { log_ratio: "log-ratio", entropy: "entropy", none: "nothing" };

// ---- the filters: read from the address and written to it

function readState() {
  const given = Object.fromEntries(new URLSearchParams(location.hash.slice(1)));
  // Short forms for links: #wrong=1, #right=1, #code=1.
  if (given.wrong) given.correct = "wrong";
  if (given.right) given.correct = "right";
  if (given.code === "1") given.code = "yes";
  const full = Object.keys(views).filter(name => available(name));
  if (!full.includes(given.view)) given.view = full[0];
  return given;
}

function available(name) {
  return name === "runs" ? data.runs.length > 0 : views[name].items.length > 0;
}

function writeState(changes) {
  const kept = Object.entries({ ...state, ...changes })
    .filter(([key, value]) => value && !["wrong", "right"].includes(key));
  history.replaceState(null, "", "#" + new URLSearchParams(kept));
  draw();
}

function chosenItems() {
  const { items, filters } = views[state.view];
  const wanted = Object.keys(filters).filter(key => state[key]);
  const query = (state.q || "").toLowerCase();
  return items.filter(item => wanted.every(key => item[key] === state[key])
    && (!query || item.texts().some(text => text.toLowerCase().includes(query))));
}

function drawFilters() {
  const { items, filters } = views[state.view];
  const form = byId("filters");
  form.replaceChildren();
  for (const [key, title] of Object.entries(filters)) {
    const values = [...new Set(items.map(item => item[key]))].filter(Boolean)
      .sort((a, b) => a.localeCompare(b, "en", { numeric: true }));
    if (values.length > 1 || state[key]) form.append(select(key, title, ["", ...values]));
  }
  if (state.view === "samples" && samples.some(item => item.sample.tokens)) {
    form.append(select("colour", "tokens coloured by", Object.keys(colours), colours));
  }
  if (items.length) {
    const box = make("input");
    box.type = "search";
    box.value = state.q || "";
    let waiting;
    box.addEventListener("input", () => {
      clearTimeout(waiting);
      waiting = setTimeout(() => writeQuery(box.value), 200);
    });
    form.append(make("label", "", "contains ", box));
  }
}

function select(key, title, values, names = {}) {
  const menu = make("select");
  menu.name = key;
  if (state[key] && !values.includes(state[key])) values = [...values, state[key]];
  for (const value of values) {
    const option = make("option", "", names[value] || value || "any");
    option.value = value;
    menu.append(option);
  }
  menu.value = state[key] || values[0];
  menu.addEventListener("change", () => writeState({ [key]: menu.value }));
  return make("label", "", title + " ", menu);
}

function writeQuery(text) { // leaves the form alone, so that the box keeps its cursor
  state.q = text;
  const kept = Object.entries(state).filter(([key, value]) =>
    value && !["wrong", "right"].includes(key));
  history.replaceState(null, "", "#" + new URLSearchParams(kept));
  drawList();
}

// ---- text, formulas and tokens

function fill(element, text) {
  let end = 0;
  for (const match of text.matchAll(pieces)) {
    const piece = match[0];
    const mathml = Object.hasOwn(data.formulas, piece) && data.formulas[piece];
    if (!mathml && !piece.startsWith("```")) continue;
    element.append(text.slice(end, match.index));
    end = match.index + piece.length;
    if (mathml) {
      const box = make("span");
      box.innerHTML = mathml;
      box.firstChild.setAttribute("title", piece);
      // A block stands on lines of its own, so the line breaks around it would show as gaps.
      if (box.firstChild.getAttribute("display") === "block") {
        element.lastChild.data = element.lastChild.data.trimEnd();
        end += /^[ \t]*\n*/.exec(text.slice(end, end + 9))[0].length;
      }
      element.append(...box.childNodes);
    } else {
      element.append(make("code", "", piece));
      if (text[end] === "\n") end++; // a block of its own too
    }
  }
  element.append(text.slice(end));
  return element;
}

function tokens(sample, by) {
  const box = make("div", "text");
  sample.tokens.forEach((text, i) => {
    const entropy = sample.entropy[i], ratio = sample.log_ratio && sample.log_ratio[i];
    const token = make("span", "token", text);
    const shown = x => x === null || x === undefined ? "not measured" : x.toFixed(4);
    token.title = `entropy ${shown(entropy)} nats, log-ratio ${shown(ratio)}`;
    if (by === "entropy") token.style.background = shade("230, 159, 0", entropy / 2);
    // Blue: likelier than before; vermilion: less likely. Full colour at the usual clip of 0.2. Of
    // a square root, since most ratios are small.
    if (by === "log_ratio" && ratio) {
      token.style.background = shade(ratio > 0 ? "0, 114, 178" : "213, 94, 0",
                                     Math.sqrt(Math.abs(ratio) / 0.2));
    }
    if (sample.clipped && sample.clipped[i]) token.classList.add("clipped");
    box.append(token);
  });
  return box;
}

const shade = (colour, share) => `rgba(${colour}, ${Math.min(share, 1) * 0.65})`;

// ---- one entry of a list

function facts(...parts) {
  return make("div", "facts", ...parts.filter(Boolean).flatMap((part, i) =>
    i ? [" · ", part] : [part]));
}

function showProblem(items) {
  const { problem, group } = items[0];
  const head = make("div", "problem",
    facts(make("b", "", `problem ${group + 1}`), problem.level && "level " + problem.level,
          problem.subject, `right answer: ${problem.answer}`),
    fill(make("div", "text"), problem.problem));
  return make("article", "", head, ...items.map(item =>
    make("div", "cells", ...item.cells.map((cell, i) => showCell(cell, i, item)))));
}

function showCell(cell, i, item) {
  const name = make("b", "", data.columns[i]);
  if (!cell) return make("div", "cell none", facts(name, "no such sample"));
  const sample = item.problem.samples.length > 1 && `sample ${item.number + 1}`;
  return make("div", "cell " + right(cell.right),
    facts(name, sample, make("span", "badge", right(cell.right)),
          cell.answer === null ? "no answer" : "answer: " + cell.answer,
          cell.code && make("span", "badge code", "code"),
          cell.cut && make("span", "badge cut", "cut off")),
    fill(make("div", "text"), cell.text));
}

function showSample([{ sample, run }]) {
  const by = state.colour || "log_ratio";
  const number = x => x === null ? "-" : Number(x.toPrecision(4));
  const body = sample.tokens && by !== "none" ? tokens(sample, by)
    : fill(make("div", "text"), sample.response);
  return make("article", "",
    make("div", "problem",
      facts(data.runs.length > 1 && run, make("b", "", `step ${sample.step}`),
            `row ${sample.row}`, `right answer: ${sample.answer}`),
      fill(make("div", "text"), sample.problem)),
    make("div", "cells", make("div", "cell " + right(sample.correct),
      facts(make("span", "badge", right(sample.correct)), `reward ${number(sample.reward)}`,
            `advantage ${number(sample.advantage)}`,
            sample.code && make("span", "badge code", "code"),
            sample.finished === false && make("span", "badge cut", "cut off")),
      body)));
}

function showSettings() {
  const keys = data.runs.length ? Object.keys(data.runs[0].config) : [];
  const row = (key, values, differs) => make("tr", differs ? "differs" : "",
    make("td", "", key), ...values.map(value => make("td", "", String(value ?? "-"))));
  const head = make("tr", "", make("th", "", "setting"),
    ...data.runs.map(run => make("th", "", run.name)));
  const origin = data.runs.length ? Object.keys(data.runs[0].from) : [];
  return make("table", "", head,
    ...keys.map(key => row(key, data.runs.map(run => run.config[key]),
                           data.differing.includes(key))),
    ...origin.map(key => row(key, data.runs.map(run => run.from[key]), false)));
}

// ---- drawing

let state = readState(), left = [];

function draw() {
  state = readState();
  byId("views").replaceChildren(...Object.keys(views).filter(available).flatMap(name => {
    const button = make("button", "", views[name].title);
    button.type = "button";
    button.setAttribute("aria-pressed", String(name === state.view));
    button.addEventListener("click", () => writeState({ view: name }));
    return [button, " "];
  }));
  drawFilters();
  drawList();
}

function drawList() {
  const items = chosenItems();
  byId("runs").hidden = state.view !== "runs";
  byId("count").textContent = describe(items);
  const groups = new Map();
  items.forEach((item, i) => {
    const key = state.view === "answers" ? item.group : i;
    if (!groups.has(key)) groups.set(key, []);
    groups.get(key).push(item);
  });
  left = [...groups.values()];
  byId("list").replaceChildren();
  more();
}

function describe(items) {
  if (state.view === "runs") return "";
  const all = views[state.view].items.length;
  if (state.view === "samples") return `${items.length} of ${all} samples`;
  const problems = new Set(items.map(item => item.group)).size;
  const shares = data.columns.map((name, i) => {
    const cells = items.map(item => item.cells[i]).filter(Boolean);
    const share = cells.filter(cell => cell.right).length / cells.length;
    return cells.length ? `${name} ${(100 * share).toFixed(1)} % right` : name;
  });
  return `${items.length} of ${all} answers, ${problems} of ${data.problems.length} problems; `
    + `of these: ${shares.join(", ")}`;
}

// Articles are drawn until two windows are full, and on as the reader scrolls: the browser takes far
// longer to lay out a formula than to filter an answer.
function more() {
  const page = document.documentElement;
  while (left.length && page.scrollHeight - scrollY < 3 * innerHeight) {
    byId("list").append(views[state.view].show(left.shift()));
  }
}

addEventListener("scroll", more);
addEventListener("hashchange", draw);
byId("filters").addEventListener("submit", event => event.preventDefault());
if (data.runs.length) byId("runs").append(showSettings());
draw();
