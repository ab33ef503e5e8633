// Curves on a canvas: axes with round numbers, and the point that is nearest to the pointer.

const LEFT = 62, RIGHT = 12, TOP = 10, BOTTOM = 26;

function number(value, digits = 4) {
  if (value === null || value === undefined) return "";
  const size = Math.abs(value);
  if (size >= 1e15 || (size > 0 && size < 1e-4)) return value.toExponential(2);
  return value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });
}

function short(value) {
  for (const [unit, letter] of [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "k"]])
    if (Math.abs(value) >= unit) return String(+(value / unit).toPrecision(4)) + letter;
  return String(+value.toPrecision(6));
}

function ticks(low, high, count) {
  const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((times) => times * power >= rough * 0.999);
  const found = [];
  for (let n = Math.ceil(low / step - 1e-9); n * step <= high + step * 1e-9; n++) found.push(n * step);
  return found;
}

function logTicks(low, high, count) {
  const found = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++)
    for (const times of [1, 2, 5]) found.push(times * 10 ** power);
  const inside = found.filter((x) => x >= low * 0.999 && x <= high * 1.001);
  const tens = inside.filter((x) => Math.abs(Math.log10(x) - Math.round(Math.log10(x))) < 1e-9);
  if (inside.length <= count) return inside;
  return tens.filter((_, i) => i % Math.ceil(tens.length / count) === 0);
}

// Of what curves come to, long ones after their first tenth, without what is far above the rest: a
// run that diverges leaves the picture at its top rather than flatten the others.
function heights(lines) {
  const late = (y) => y.slice(y.length < 30 ? 0 : Math.floor(y.length / 10));
  const values = lines.flatMap((line) => late(line.y).filter((y) => y !== null))
    .sort((a, b) => a - b);
  if (!values.length) return null;
  const at = (share) => values[Math.floor(share * (values.length - 1))];
  const high = Math.min(at(1), at(0.75) + 3 * Math.max(at(0.75) - at(0.25), 1e-3 * Math.abs(at(0.75))));
  const room = Math.max((high - at(0)) * 0.06, Math.abs(high) * 1e-3, 1e-9);
  return [at(0) - room, high + room];
}

class Chart {
  constructor(canvas, format) {
    this.canvas = canvas;
    this.format = format;
    this.output = canvas.parentElement.querySelector("output");
    this.lines = [];
    this.across = [];
    canvas.addEventListener("pointermove", (event) => this.point(event));
    canvas.addEventListener("pointerdown", (event) => this.point(event));
    canvas.addEventListener("pointerleave", () => { this.near = null; this.draw(); });
    new ResizeObserver(() => this.draw()).observe(canvas);
  }

  show(lines, options) {
    Object.assign(this, { lines, near: null, ...options });
    this.draw();
  }

  draw() {
    const { canvas, lines } = this, scale = devicePixelRatio || 1;
    const width = canvas.clientWidth, height = canvas.clientHeight;
    canvas.width = Math.round(width * scale);
    canvas.height = Math.round(height * scale);
    const pen = canvas.getContext("2d");
    pen.scale(scale, scale);
    pen.font = "12px system-ui, sans-serif";
    this.output.textContent = this.near ? this.near.text : "";
    const range = heights(lines);
    const all = this.across.filter((x) => x !== null && (!this.log || x > 0));
    if (!range || !all.length) {
      pen.fillStyle = "#566575";
      pen.textAlign = "center";
      pen.fillText("nothing yet", width / 2, height / 2);
      return;
    }
    let left = all.reduce((a, b) => Math.min(a, b)), right = all.reduce((a, b) => Math.max(a, b));
    if (!this.log) left = Math.min(left, 0);
    if (right <= left) [left, right] = this.log ? [left / 2, left * 2] : [left, left + 1];
    const place = this.log ? Math.log : (x) => x, [low, high] = range;
    const span = width - LEFT - RIGHT, rise = height - TOP - BOTTOM;
    this.toX = (x) => LEFT + span * (place(x) - place(left)) / (place(right) - place(left));
    this.toY = (y) => TOP + rise * (high - y) / (high - low);
    this.axes(pen, width, height, this.log ? logTicks(left, right, 5) : ticks(left, right, 4),
              ticks(low, high, 4));
    pen.save();
    pen.beginPath();
    pen.rect(LEFT, 0, span + RIGHT, height - BOTTOM);
    pen.clip();
    for (const line of lines) if (line.name !== this.alone) this.line(pen, line, this.alone ? 0.15 : 1, 1.5);
    for (const line of lines) if (line.name === this.alone) this.line(pen, line, 1, 2.5);
    if (this.near) {
      pen.fillStyle = this.near.color;
      pen.beginPath();
      pen.arc(this.near.px, this.near.py, 4, 0, 7);
      pen.fill();
    }
    pen.restore();
  }

  axes(pen, width, height, across, up) {
    pen.strokeStyle = "#e8edf2";
    pen.fillStyle = "#566575";
    pen.lineWidth = 1;
    pen.textAlign = "right";
    pen.textBaseline = "middle";
    for (const y of up) {
      const at = Math.round(this.toY(y)) + 0.5;
      pen.beginPath();
      pen.moveTo(LEFT, at);
      pen.lineTo(width - RIGHT, at);
      pen.stroke();
      pen.fillText(short(y), LEFT - 6, at);
    }
    pen.textAlign = "center";
    pen.textBaseline = "top";
    for (const x of across) {
      const text = short(x), half = pen.measureText(text).width / 2;
      pen.fillText(text, Math.min(this.toX(x), width - half - 2), height - BOTTOM + 7);
    }
  }

  line(pen, line, opacity, thickness) {
    pen.globalAlpha = opacity;
    pen.strokeStyle = pen.fillStyle = line.color;
    pen.lineWidth = thickness;
    pen.lineJoin = "round";
    pen.beginPath();
    let drawn = 0, last = null;
    line.x.forEach((x, i) => {
      const y = line.y[i];
      if (x === null || y === null || (this.log && x <= 0)) { last = null; return; }
      const point = [this.toX(x), this.toY(y)];
      if (last) pen.lineTo(...point); else pen.moveTo(...point);
      last = point;
      drawn++;
    });
    pen.stroke();
    if (drawn === 1 && last) pen.fillRect(last[0] - 2, last[1] - 2, 4, 4);
    pen.globalAlpha = 1;
  }

  point(event) {
    const box = this.canvas.getBoundingClientRect();
    const x = event.clientX - box.left, y = event.clientY - box.top;
    let best = 40 ** 2;
    this.near = null;
    if (!this.toX) return;
    for (const line of this.lines) {
      if (this.alone && line.name !== this.alone) continue;
      line.x.forEach((value, i) => {
        if (value === null || line.y[i] === null || (this.log && value <= 0)) return;
        const px = this.toX(value), py = this.toY(line.y[i]);
        const far = (px - x) ** 2 + (py - y) ** 2;
        if (far >= best) return;
        best = far;
        const at = this.over === "hours" ? `${number(value, 2)} h` : `${this.over} ${number(value, 0)}`;
        this.near = { px, py, color: line.color, text: `${line.name}: ${this.format(line.y[i])} at ${at}` };
      });
    }
    this.draw();
  }
}
