"use strict";
// Tables: a click on a column's name sorts by it, another one the other way round.
for (const table of document.querySelectorAll("table.sorted")) {
  const heads = [...table.querySelectorAll("th")];
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const up = head.getAttribute("aria-sort") !== "ascending";
    heads.forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const key = (row) => row.cells[column].dataset.sort;
    const number = (text) => text !== "" && !Number.isNaN(Number(text));
    const rows = [...table.tBodies[0].rows].sort((a, b) => {
      const [x, y] = [key(a), key(b)];
      if (x === "" || y === "") return (x === "") - (y === "");
      const order = number(x) && number(y) ? Number(x) - Number(y) : x.localeCompare(y);
      return up ? order : -order;
    });
    table.tBodies[0].append(...rows);
  }));
}

// Curves: mean over seeds with its standard deviation, or every seed, over what is chosen.
(() => {
  const holder = document.getElementById("chart");
  if (!holder) return;
  const data = JSON.parse(document.getElementById("curves").textContent);
  const units = Object.fromEntries(data.quantities);
  const canvas = holder.querySelector("canvas"), tip = holder.querySelector(".tip");
  const legend = document.getElementById("legend");
  const control = (name) => document.getElementById("chart-" + name);
  const AXES = { tokens: "tokens", flops: "training FLOPs", seconds: "time", step: "steps" };
  const hidden = new Set();
  const left = 58, right = 12, top = 10, bottom = 38;
  let zoom = null, drawn = [], view = null, at = null, drag = null, held = null;

  const number = (value, digits = 4) => {
    if (value === null || value === undefined || !Number.isFinite(value)) return "";
    const size = Math.abs(value);
    if (size >= 1e15 || (size > 0 && size < 1e-4)) return value.toExponential(2);
    for (const [unit, name] of [[1e12, "T"], [1e9, "B"], [1e6, "M"]])
      if (size >= unit) return Number((value / unit).toPrecision(digits)) + " " + name;
    return Number(value.toPrecision(Math.max(digits, 4))).toLocaleString("en");
  };
  const duration = (seconds) => seconds >= 3600 ? number(seconds / 3600) + " h"
    : seconds >= 120 ? number(seconds / 60) + " min" : number(seconds) + " s";
  const shown = (axis, value) => axis === "seconds" ? duration(value) : number(value);

  function smoothed(values, width) {  // the mean of neighbours, of few where it falls steeply
    if (!width) return values;
    const sums = [0], counts = [0];
    values.forEach((v, i) => {
      sums.push(sums[i] + (v ?? 0));
      counts.push(counts[i] + (v === null ? 0 : 1));
    });
    let last = values.length - 1;
    while (last >= 0 && values[last] === null) last -= 1;
    return values.map((v, i) => {
      if (v === null) return null;
      const reach = Math.min(width, i >> 1), a = i - reach, b = Math.min(i + reach, last) + 1;
      return counts[b] > counts[a] ? (sums[b] - sums[a]) / (counts[b] - counts[a]) : null;
    });
  }

  function series() {  // of all visible arms: x, mean, deviation and seeds
    const axis = control("x").value, quantity = control("y").value;
    const amount = Number(control("smooth").value);
    let widest = 0;
    const found = data.arms.map((arm, index) => {
      const curve = arm.curves[quantity];
      if (!curve || !curve[axis] || hidden.has(index)) return null;
      const width = Math.round((amount / 100) ** 2 * curve.values[0].length / 6);
      widest = Math.max(widest, width);
      const seeds = curve.values.map((values) => smoothed(values, width));
      const count = seeds.length, mean = [], deviation = [];
      curve.tokens.forEach((_, i) => {
        const known = seeds.map((s) => s[i]).filter((v) => v !== null);
        const all = known.length === count;  // a mean of fewer seeds would jump
        const m = known.reduce((a, b) => a + b, 0) / known.length;
        mean.push(all ? m : null);
        deviation.push(all && count > 1
          ? Math.sqrt(known.reduce((a, v) => a + (v - m) ** 2, 0) / (count - 1)) : null);
      });
      return { arm, index, curve, x: curve[axis], seeds, mean, deviation };
    }).filter(Boolean);
    control("smooth-text").textContent = widest ? `mean of up to ${2 * widest + 1} points` : "off";
    return found;
  }

  const linesOf = (s) => control("seeds").checked ? s.seeds : [s.mean];

  function bounds(found, logX, logY) {
    let [x0, x1, y0, y1] = [Infinity, -Infinity, Infinity, -Infinity];
    for (const s of found) for (const line of linesOf(s)) {
      const n = line.length, skip = logX || n < 30 ? 0 : Math.floor(n / 10);  // the first fall is steep
      line.forEach((v, i) => {
        const x = s.x[i];
        if (v === null || x === null || (logX && x <= 0) || (logY && v <= 0)) return;
        x0 = Math.min(x0, x); x1 = Math.max(x1, x);
        const around = line === s.mean ? s.deviation[i] ?? 0 : 0;
        y0 = Math.min(y0, v - around > 0 || !logY ? v - around : v);
        if (i >= skip) y1 = Math.max(y1, v + around);
      });
    }
    if (!(x1 > -Infinity)) return null;
    if (x1 === x0) { x0 *= 0.99; x1 = x1 * 1.01 + 1e-9; }
    const room = 0.04 * (y1 - y0) || Math.abs(0.01 * y0) || 1;
    return { x0: logX ? x0 : Math.min(x0, 0), x1: x1 * 1.01,
      y0: logY ? y0 * 0.995 : y0 - room, y1: y1 + room };
  }

  function ticks(a, b, log, count) {
    if (log && b / a > 8) {
      const found = [], steps = b / a > 1e3 ? [1] : [1, 2, 5];
      for (let e = Math.floor(Math.log10(a)); e <= Math.ceil(Math.log10(b)); e += 1)
        for (const m of steps) if (m * 10 ** e >= a && m * 10 ** e <= b) found.push(m * 10 ** e);
      return found;
    }
    const raw = (b - a) / count, size = 10 ** Math.floor(Math.log10(raw));
    const step = [1, 2, 5, 10].find((m) => m * size >= raw) * size, found = [];
    for (let i = Math.ceil(a / step); i * step <= b; i += 1) found.push(i * step);
    return found;
  }

  function draw() {
    const scale = devicePixelRatio || 1, width = holder.clientWidth, height = canvas.clientHeight;
    canvas.width = Math.round(width * scale); canvas.height = Math.round(height * scale);
    const g = canvas.getContext("2d");
    g.scale(scale, scale);
    g.clearRect(0, 0, width, height);
    g.font = "12px system-ui, sans-serif";
    const logX = control("log-x").checked, logY = control("log-y").checked;
    drawn = series();
    const full = bounds(drawn, logX, logY);
    if (!full) {
      view = null;
      g.fillText("Nothing to draw: no run that is shown has this.", left, top + 30);
      return describe();
    }
    const box = zoom || full, f = (v, log) => log ? Math.log(v) : v;
    const wide = width - left - right, high = height - top - bottom;
    const [a, b, c, d] = [f(box.x0, logX), f(box.x1, logX), f(box.y0, logY), f(box.y1, logY)];
    const X = (v) => left + wide * (f(v, logX) - a) / (b - a);
    const Y = (v) => top + high * (1 - (f(v, logY) - c) / (d - c));
    const back = (v, log) => log ? Math.exp(v) : v;
    view = { box, full, X, Y, wide, high, width, height,
      toX: (p) => back(a + (b - a) * (p - left) / wide, logX),
      toY: (p) => back(c + (d - c) * (1 - (p - top) / high), logY) };
    const axis = control("x").value, quantity = control("y").value;
    g.fillStyle = "#5a6b7b"; g.strokeStyle = "#e3e8ee"; g.lineWidth = 1;
    g.textAlign = "center"; g.textBaseline = "top";
    const unit = axis !== "seconds" ? 1 : box.x1 >= 7200 ? 3600 : box.x1 >= 300 ? 60 : 1;
    for (const t of ticks(box.x0 / unit, box.x1 / unit, logX, Math.max(2, wide / 110))) {
      const p = X(t * unit);
      g.beginPath(); g.moveTo(p, top); g.lineTo(p, top + high); g.stroke();
      g.fillText(number(t), p, top + high + 5);
    }
    g.textAlign = "right"; g.textBaseline = "middle";
    const levels = ticks(box.y0, box.y1, logY, Math.max(2, high / 50));
    const decimalsOf = (t) => (String(Number(t.toPrecision(6))).split(".")[1] || "").length;
    const decimals = Math.max(0, ...levels.map(decimalsOf));
    for (const t of levels) {
      const p = Y(t);
      g.beginPath(); g.moveTo(left, p); g.lineTo(left + wide, p); g.stroke();
      g.fillText(t.toFixed(Math.min(decimals, 5)), left - 6, p);
    }
    g.textAlign = "center"; g.textBaseline = "bottom";
    const over = axis !== "seconds" ? AXES[axis]
      : { 1: "seconds", 60: "minutes", 3600: "hours" }[unit];
    const quantityText = `${quantity} (${units[quantity]})`;
    const count = drawn.length === 1 ? "1 curve" : `${drawn.length} curves`;
    canvas.setAttribute("aria-label", `${quantityText} over ${over}, ${count}`);
    g.fillText(over, left + wide / 2, height - 2);
    g.save();
    g.translate(11, top + high / 2); g.rotate(-Math.PI / 2); g.textBaseline = "middle";
    g.fillText(quantityText, 0, 0);
    g.restore();
    g.save();
    g.beginPath(); g.rect(left, top, wide, high); g.clip();
    const near = at && nearest();
    const one = near ? near.s.index : held;
    for (const s of drawn) {
      g.globalAlpha = one !== null && one !== s.index ? 0.25 : 1;
      g.strokeStyle = g.fillStyle = s.arm.color;
      if (!control("seeds").checked && s.seeds.length > 1) band(g, s, X, Y);
      g.setLineDash(s.arm.dash);
      g.lineWidth = one === s.index ? 2.5 : control("seeds").checked ? 1 : 1.5;
      for (const line of linesOf(s)) path(g, s.x, line, X, Y);
      g.setLineDash([1, 3]); g.lineWidth = 1;
      for (const border of s.arm.borders) if (border[axis] !== null) {
        g.beginPath(); g.moveTo(X(border[axis]), top); g.lineTo(X(border[axis]), top + high);
        g.stroke();
      }
    }
    g.setLineDash([]); g.globalAlpha = 1;
    if (near) {
      g.fillStyle = near.s.arm.color;
      g.beginPath(); g.arc(near.px, near.py, 4, 0, 7); g.fill();
    }
    if (at) {
      g.strokeStyle = "#9aa7b3";
      g.beginPath(); g.moveTo(at.x, top); g.lineTo(at.x, top + high); g.stroke();
    }
    if (drag && at) {
      g.fillStyle = "rgba(31, 119, 180, .15)";
      g.fillRect(drag.x, drag.y, at.x - drag.x, at.y - drag.y);
    }
    g.restore();
    describe(near);
  }

  const drawable = (p, q) => Number.isFinite(p) && Number.isFinite(q);

  function path(g, xs, line, X, Y) {
    let open = false;
    g.beginPath();
    line.forEach((v, i) => {
      const p = xs[i] === null ? NaN : X(xs[i]), q = v === null ? NaN : Y(v);
      if (!drawable(p, q)) { open = false; return; }
      if (open) g.lineTo(p, q); else g.moveTo(p, q);
      open = true;
    });
    g.stroke();
    const known = line.filter((v) => v !== null).length;
    if (known <= 30) line.forEach((v, i) => {  // few points, such as validations: show each
      if (v === null || xs[i] === null || !drawable(X(xs[i]), Y(v))) return;
      g.beginPath(); g.arc(X(xs[i]), Y(v), 2.5, 0, 7); g.fill();
    });
  }

  function band(g, s, X, Y) {
    const upper = [], lower = [];
    s.mean.forEach((m, i) => {
      if (m === null || s.deviation[i] === null || s.x[i] === null) return;
      const p = X(s.x[i]), u = Y(m + s.deviation[i]), l = Y(Math.max(m - s.deviation[i], 1e-9));
      if (drawable(p, u) && drawable(p, l)) { upper.push([p, u]); lower.unshift([p, l]); }
    });
    if (!upper.length) return;
    const alpha = g.globalAlpha;
    g.globalAlpha = 0.18 * alpha;
    g.beginPath();
    [...upper, ...lower].forEach(([p, q], i) => i ? g.lineTo(p, q) : g.moveTo(p, q));
    g.fill();
    g.globalAlpha = alpha;
  }

  function index(xs, x) {  // of the value nearest to x, of ascending values
    let [a, b] = [0, xs.length - 1];
    while (b - a > 1) {
      const m = (a + b) >> 1;
      if (xs[m] !== null && xs[m] <= x) a = m; else b = m;
    }
    return xs[b] !== null && Math.abs(xs[b] - x) < Math.abs(xs[a] - x) ? b : a;
  }

  function valueAt(s, x) {  // null beyond the curve's end
    const i = index(s.x, x), last = s.x[s.x.length - 1];
    const beyond = last !== null && x > last * 1.02;
    return { i, mean: beyond ? null : s.mean[i], deviation: s.deviation[i] };
  }

  function nearest() {
    let best = null;
    for (const s of drawn) {
      const i = index(s.x, view.toX(at.x));
      linesOf(s).forEach((line, seed) => {
        if (line[i] === null) return;
        const px = view.X(s.x[i]), py = view.Y(line[i]);
        const far = Math.hypot((px - at.x) / 4, py - at.y);
        if (far < (best ? best.far : 60)) best = { s, i, seed, px, py, far };
      });
    }
    return best;
  }

  function describe(near) {
    const axis = control("x").value, x = at && view ? view.toX(at.x) : null;
    [...legend.children].forEach((button, k) => {
      button.setAttribute("aria-pressed", String(!hidden.has(k)));
      const s = drawn.find((found) => found.index === k);
      let text = "";
      if (s) {
        const ends = s.mean.map((m, i) => m === null ? -1 : i);
        const { i, mean } = x === null ? { i: Math.max(...ends) } : valueAt(s, x);
        const value = x === null ? s.mean[i] : mean;
        text = value === null || value === undefined ? "" : value.toFixed(4);
        if (text && s.deviation[i] !== null) text += " ± " + s.deviation[i].toFixed(4);
      }
      button.querySelector(".value").textContent = text;
    });
    control("where").textContent = x === null ? "values at the end of each curve"
      : `values at ${shown(axis, x)}${axis === "seconds" ? "" : " " + AXES[axis]}`;
    control("out").disabled = !zoom;
    tip.hidden = !near;
    if (!near) return;
    const { s, i, seed } = near, each = control("seeds").checked;
    const lines = [s.arm.label];
    if (each && s.seeds.length > 1) lines.push(s.curve.runs[seed]);
    const value = each ? s.seeds[seed][i] : s.mean[i], spread = each ? null : s.deviation[i];
    lines.push(value.toFixed(4) + (spread === null ? "" : ` ± ${spread.toFixed(4)}`));
    for (const name of ["step", "tokens", "flops", "seconds"]) {
      const found = s.curve[name] && s.curve[name][i];
      if (!found) continue;
      lines.push(name === "step" ? `step ${number(found)}` : name === "seconds" ? duration(found)
        : `${number(found)} ${name === "flops" ? "FLOPs" : "tokens"}`);
    }
    tip.replaceChildren(...lines.map((line, k) => {
      const part = document.createElement(k ? "div" : "strong");
      part.textContent = line;
      return part;
    }));
    const space = tip.offsetWidth + 16;
    const across = near.px + space > view.width ? near.px - space : near.px + 12;
    tip.style.left = Math.max(0, across) + "px";
    tip.style.top = Math.max(0, Math.min(near.py + 10, view.height - tip.offsetHeight - 4)) + "px";
  }

  const place = (event) => {
    const box = canvas.getBoundingClientRect();
    return { x: Math.min(Math.max(event.clientX - box.left, left), box.width - right),
      y: Math.min(Math.max(event.clientY - box.top, top), box.height - bottom) };
  };
  const zoomTo = (x0, x1, y0, y1) => {
    const [a, b] = [Math.min(x0, x1), Math.max(x0, x1)];
    zoom = { x0: a, x1: b, y0: Math.min(y0, y1), y1: Math.max(y0, y1) };
  };
  canvas.addEventListener("pointerdown", (event) => {
    drag = at = place(event);
    if (event.isTrusted) canvas.setPointerCapture(event.pointerId);
    draw();
  });
  canvas.addEventListener("pointermove", (event) => { at = place(event); draw(); });
  canvas.addEventListener("pointerup", (event) => {
    const [from, to] = [drag, place(event)];
    drag = null;
    if (from && view && Math.abs(from.x - to.x) > 8) {
      const flat = Math.abs(from.y - to.y) < 12;  // a drag along the axis keeps the height
      zoomTo(view.toX(from.x), view.toX(to.x), flat ? view.box.y0 : view.toY(from.y),
        flat ? view.box.y1 : view.toY(to.y));
    }
    draw();
  });
  canvas.addEventListener("pointercancel", () => { drag = at = null; draw(); });
  canvas.addEventListener("pointerleave", (event) => {
    if (drag || event.pointerType === "touch") return;  // a finger leaves what it has touched
    at = null;
    draw();
  });
  canvas.addEventListener("dblclick", () => { zoom = null; draw(); });
  control("out").addEventListener("click", () => { zoom = null; at = null; draw(); });
  for (const name of ["x", "y", "log-x", "log-y"])
    control(name).addEventListener("change", () => { zoom = null; draw(); });
  control("seeds").addEventListener("change", draw);
  control("smooth").addEventListener("input", draw);
  for (const name of ["all", "none"]) control(name).addEventListener("click", () => {
    hidden.clear();
    if (name === "none") data.arms.forEach((_, k) => hidden.add(k));
    draw();
  });

  for (const [name] of data.quantities) control("y").add(new Option(name, name));
  const curves = data.arms.flatMap((arm) => Object.values(arm.curves));
  for (const [name, text] of Object.entries(AXES)) {
    const any = curves.some((curve) => curve[name] && curve[name].some((v) => v > 0));
    if (any) control("x").add(new Option(text, name));
  }
  control("seeds").closest("label").hidden = !data.arms.some((arm) => arm.runs.length > 1);
  data.arms.forEach((arm, k) => {
    const button = document.createElement("button");
    button.type = "button";
    button.title = arm.runs.join(", ");
    button.innerHTML = '<svg viewBox="0 0 28 8"><path d="M0 4H28"></path></svg>';
    const stroke = button.querySelector("path");
    stroke.setAttribute("stroke", arm.color);
    stroke.setAttribute("stroke-dasharray", arm.dash.join(" ") || "none");
    const [label, value] = ["label", "value"].map((name) => {
      const part = document.createElement("span");
      part.className = name;
      return part;
    });
    label.textContent = arm.label;
    button.append(label, value);
    button.addEventListener("click", () => {
      if (hidden.has(k)) hidden.delete(k); else hidden.add(k);
      draw();
    });
    button.addEventListener("pointerenter", () => { held = k; draw(); });
    button.addEventListener("pointerleave", () => { held = null; draw(); });
    legend.append(button);
  });
  new ResizeObserver(draw).observe(holder);
  draw();
})();
