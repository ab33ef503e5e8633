// The page: asks for what has changed, and shows it. Text from files is only ever text here.

const COLORS = ["#1f77b4", "#d95f02", "#2ca02c", "#c5283d", "#7f5fc5", "#8c564b", "#d6589f", "#5b6670",
                "#a08a00", "#0d98a8"];
const POLL = 2000, MOST_ALERTS = innerWidth < 760 ? 3 : 8;
const byId = (id) => document.getElementById(id);
const runs = new Map();  // by name
const view = { order: [], version: "", offset: 0, hidden: new Set(), alone: null, sort: null, all: false };
const rows = new Map(), heads = new Map();

function make(tag, text, name) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (name) made.className = name;
  return made;
}

function duration(seconds) {
  if (seconds === null) return "";
  if (seconds >= 172800) return `${number(seconds / 86400, 1)} days`;
  const whole = Math.max(Math.floor(seconds), 0), two = (n) => String(n).padStart(2, "0");
  const [hours, minutes, rest] = [Math.floor(whole / 3600), Math.floor(whole / 60) % 60, whole % 60];
  return hours ? `${hours}:${two(minutes)}:${two(rest)}` : `${minutes}:${two(rest)}`;
}

const age = (run) => (run.written === null ? null : Date.now() / 1000 + view.offset - run.written);

function ago(run) {
  const seconds = age(run);
  if (seconds === null) return "";
  return seconds < 60 ? `${Math.max(Math.floor(seconds), 0)} s ago` : `${duration(seconds)} ago`;
}

const STATES = ["failed", "running", "queued", "waiting", "stopped", "done"];
const percent = (share) => (share === null ? "" : `${number(100 * share, 1)} %`);
const COLUMNS = [  // name, value to sort by, text
  ["run", (run) => run.name],
  ["state", (run) => STATES.indexOf(run.state)],
  ["step", (run) => run.step, (run) =>
    number(run.step, 0) + (run.steps === null ? "" : ` / ${number(run.steps, 0)}`)],
  ["loss", (run) => run.loss,
    (run) => (run.loss === null && run.step ? "not finite" : number(run.loss))],
  ["validation loss", (run) => run.valid_loss, (run) => number(run.valid_loss)],
  ["bits per byte", (run) => run.valid_bits_per_byte, (run) => number(run.valid_bits_per_byte)],
  ["tokens/s", (run) => run.tokens_per_second, (run) => number(run.tokens_per_second, 0)],
  ["goodput", (run) => run.goodput, (run) => percent(run.goodput)],
  ["left", (run) => run.seconds_left, (run) => duration(run.seconds_left)],
  ["written", age, ago],
];

const charts = {
  loss: new Chart(byId("loss"), (y) => number(y)),
  validation: new Chart(byId("validation"), (y) => number(y)),
  speed: new Chart(byId("speed"), (y) => number(y, 0)),
};

function color(index) {
  return index < COLORS.length ? COLORS[index] : `hsl(${(index * 137.5) % 360} 60% ${38 + (index % 3) * 8}%)`;
}

const wanted = () => {
  const word = byId("filter").value.toLowerCase();
  return view.order.map((name) => runs.get(name)).filter((run) => run && run.name.toLowerCase().includes(word));
};

function drawCharts() {
  const over = byId("over").value, log = byId("log").checked;
  const shown = wanted().filter((run) => !view.hidden.has(run.name));
  const bits = shown.some((run) => run.validated.valid_bits_per_byte.some((y) => y !== null));
  byId("scored").textContent = bits ? "Validation, bits per byte" : "Validation loss, nats per token";
  const curves = (kind, name) => shown.map((run) =>
    ({ name: run.name, color: run.color, x: run[kind][over], y: run[kind][name] }));
  const alone = shown.some((run) => run.name === view.alone) ? view.alone : null;
  const across = shown.flatMap((run) => run.trained[over]);  // the same for all charts
  const show = (chart, kind, name) => chart.show(curves(kind, name), { over, log, alone, across });
  show(charts.loss, "trained", "loss");
  show(charts.validation, "validated", bits ? "valid_bits_per_byte" : "valid_loss");
  show(charts.speed, "trained", "tokens_per_second");
}

function drawAlerts() {
  const levels = ["bad", "warning", "note"];
  const found = wanted().flatMap((run) => run.alerts.map((alert) => ({ run, ...alert })));
  found.sort((a, b) => levels.indexOf(a.level) - levels.indexOf(b.level) || b.time.localeCompare(a.time));
  const items = found.slice(0, view.all ? found.length : MOST_ALERTS).map((alert) => {
    const item = make("li", undefined, alert.level);
    item.append(make("b", alert.run.name), alert.text);
    if (alert.count > 1) item.append(` (${number(alert.count, 0)} times)`);
    if (alert.time) item.append(make("time", alert.time.replace("T", " ")));
    return item;
  });
  byId("alerts").querySelector("ul").replaceChildren(...items);
  byId("alerts").hidden = !found.length;
  byId("more").hidden = found.length <= MOST_ALERTS;
  byId("more").textContent = view.all ? "fewer" : `all ${found.length} alerts`;
}

function counted(list) {
  return STATES.map((state) => [list.filter((run) => run.state === state).length, state])
    .filter(([count]) => count).map(([count, state]) => `${count} ${state}`);
}

function newRow(run) {
  const row = make("tr", undefined, "run"), button = make("button");
  button.type = "button";
  button.append(make("i"), make("span", run.name));
  button.addEventListener("click", () => {
    if (!view.hidden.delete(run.name)) view.hidden.add(run.name);
    draw();
  });
  for (const [name] of COLUMNS) row.insertCell().dataset.label = name;
  row.cells[0].className = "name";
  row.cells[0].append(button);
  row.cells[1].className = "state";
  row.addEventListener("pointerenter", (event) => {
    if (event.pointerType === "mouse") { view.alone = run.name; drawCharts(); }
  });
  row.addEventListener("pointerleave", () => { view.alone = null; drawCharts(); });
  return row;
}

function fillRow(row, run) {
  const button = row.querySelector("button");
  button.setAttribute("aria-pressed", String(!view.hidden.has(run.name)));
  button.querySelector("i").style.background = run.color;
  row.cells[1].replaceChildren(make("span", run.state, run.state));
  if (run.reason && run.state !== "failed") row.cells[1].append(make("span", run.reason, "reason"));
  COLUMNS.forEach(([, , text], i) => { if (text) row.cells[i].textContent = text(run); });
  if (run.steps && run.state === "running") {
    const bar = make("progress");
    bar.max = run.steps;
    bar.value = run.step;
    bar.setAttribute("aria-label", "progress");
    row.cells[2].append(bar);
  }
}

function sorted(list) {
  if (!view.sort) return list;
  const value = COLUMNS[view.sort.column][1], sign = view.sort.up ? 1 : -1;
  return [...list].sort((a, b) => {
    const [x, y] = [value(a), value(b)], none = (v) => v === null || v === undefined;
    if (none(x) || none(y)) return none(x) - none(y);
    return sign * (typeof x === "string" ? x.localeCompare(y) : x - y);
  });
}

function drawTable() {
  const groups = new Map();
  for (const run of wanted()) groups.set(run.group, [...(groups.get(run.group) || []), run]);
  const bodies = [...groups].map(([name, list]) => {
    const body = make("tbody"), row = body.insertRow(), cell = row.insertCell();
    row.className = "group";
    cell.colSpan = COLUMNS.length;
    cell.append(make("b", name), counted(list).join(", "));
    const left = Math.max(...list.map((run) => run.seconds_left ?? -1));
    if (left >= 0 && list.length > 1) cell.append(`; the running ones end in ${duration(left)}`);
    for (const run of sorted(list)) {
      if (!rows.has(run.name)) rows.set(run.name, newRow(run));
      fillRow(rows.get(run.name), run);
      body.append(rows.get(run.name));
    }
    return body;
  });
  const focused = document.activeElement;
  const table = byId("runs");
  table.replaceChildren(table.tHead, ...bodies);
  if (focused && table.contains(focused)) focused.focus({ preventScroll: true });
  heads.forEach((head, column) => {
    if (view.sort?.column === column) head.setAttribute("aria-sort", view.sort.up ? "ascending" : "descending");
    else head.removeAttribute("aria-sort");
  });
}

function draw() {
  byId("counts").replaceChildren(...counted([...runs.values()]).map((text) => make("span", text)));
  drawAlerts();
  drawCharts();
  drawTable();
}

function take(state) {
  view.version = state.version;
  view.offset = state.now - Date.now() / 1000;
  for (const run of state.runs) runs.set(run.name, run);
  const there = new Set(state.order);
  for (const name of runs.keys()) if (!there.has(name)) { runs.delete(name); rows.delete(name); }
  const moved = state.order.join("\n") !== view.order.join("\n");
  view.order = state.order;
  view.order.forEach((name, index) => { if (runs.has(name)) runs.get(name).color = color(index); });
  document.title = byId("title").textContent = state.title;
  if (moved || state.runs.length) draw();
}

async function poll() {
  const trouble = byId("trouble");
  try {
    const answer = await fetch(`state?since=${encodeURIComponent(view.version)}`);
    if (!answer.ok) throw new Error(answer.statusText);
    take(await answer.json());
    trouble.hidden = true;
  } catch (error) {
    if (trouble.hidden) {
      trouble.textContent = `No answer since ${new Date().toLocaleTimeString()} (${error.message}): ` +
        "does python -m launch watch still run?";
      trouble.hidden = false;
    }
  }
  setTimeout(poll, document.hidden ? 5 * POLL : POLL);
}

COLUMNS.forEach(([name], column) => {
  const head = make("th", undefined, name === "state" ? "state" : ""), button = make("button", name);
  head.scope = "col";
  button.type = "button";
  button.addEventListener("click", () => {
    const before = view.sort?.column === column ? view.sort : null;
    view.sort = before && !before.up ? null : { column, up: !before };
    draw();
  });
  head.append(button);
  byId("runs").tHead.rows[0].append(head);
  heads.set(column, head);
});
for (const id of ["filter", "over", "log"]) byId(id).addEventListener("input", draw);
byId("controls").addEventListener("submit", (event) => event.preventDefault());
byId("more").addEventListener("click", () => { view.all = !view.all; drawAlerts(); });

const held = JSON.parse(byId("state").textContent);
if (held) {
  byId("when").textContent = `as it was on ${new Date(1000 * held.now).toLocaleString("sv")}`;
  byId("when").hidden = false;
  take(held);
} else {
  poll();
  setInterval(() => rows.forEach((row, name) => {
    const last = COLUMNS.length - 1;
    if (runs.has(name)) row.cells[last].textContent = ago(runs.get(name));
  }), 1000);
}
