"use strict";
// Charts of the report. The data are columns over rollout steps: run.columns[name][i] belongs to step run.steps[i].
const run = JSON.parse(document.getElementById("run-data").textContent);
const SVG_NAMESPACE = document.getElementById("svg").namespaceURI;
const charts = [];
let hovered = run.steps.length - 1;

const percent = (value) => `${(100 * value).toFixed(1)} %`;
const significant = (value) => {
  const size = Math.abs(value);
  if (size >= 1000) return Math.round(value).toLocaleString("en-US").replace("-", "−");
  if (size !== 0 && size < 0.001) return value.toExponential(2).replace(/\.?0*e/, "e").replaceAll("-", "−");
  return String(Number(value.toPrecision(4))).replace("-", "−");
};
const seconds = (value) => `${value < 10 ? value.toFixed(2) : value.toFixed(1)} s`;
const isNumber = (value) => typeof value === "number";

function html(tag, className, text) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text; // never innerHTML: model text is untrusted
  return element;
}

function svg(tag, attributes, parent) {
  const element = document.createElementNS(SVG_NAMESPACE, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (parent) parent.appendChild(element);
  return element;
}

// Round ticks that span [low, high]: steps of 1, 2 or 5 times a power of ten.
function ticks(low, high, count) {
  const rough = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= rough * 0.999);
  const first = Math.floor(low / step + 1e-9);
  const last = Math.ceil(high / step - 1e-9);
  return Array.from({ length: last - first + 1 }, (_, k) => Number(((first + k) * step).toPrecision(12)));
}

function column(name, label, color) {
  if (!run.columns[name]) return null;
  return { label, color, x: run.steps, y: run.columns[name] };
}

const heldOut = run.held_out.map(([step]) => step);
const xLow = Math.min(run.steps[0], ...heldOut); // 0, the model before the first step, where that was evaluated
const xHigh = Math.max(run.steps.at(-1), xLow + 1);

class Chart {
  constructor({ section, title, about = "", series, format = significant, wide = false, height = 180, zero = false }) {
    Object.assign(this, { format, height, zero, series: series.filter(Boolean), xPad: 0, yPad: 0 });
    if (!this.series.some((one) => one.y.some(isNumber))) return;
    this.card = html("figure", `card chart${wide ? " wide" : ""}`);
    this.card.style.margin = "0";
    this.card.tabIndex = 0;
    this.card.setAttribute("aria-label", title);
    const heading = this.card.appendChild(html("h3", "", title));
    this.at = heading.appendChild(html("span", "at"));
    if (about) this.card.append(html("p", "about", about));
    this.legend = this.card.appendChild(html("div", "legend"));
    this.readouts = this.series.map((one) => this.addReadout(one));
    this.frame = this.card.appendChild(svg("svg", { height, role: "img", "aria-label": title }));
    document.querySelector(`[data-section="${section}"] .charts`).append(this.card);
    this.card.addEventListener("pointermove", (event) => this.point(event));
    this.card.addEventListener("pointerleave", () => hover(run.steps.length - 1));
    this.card.addEventListener("keydown", (event) => {
      const turn = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (turn) { hover(hovered + turn); event.preventDefault(); }
    });
    new ResizeObserver(() => requestAnimationFrame(() => this.draw())).observe(this.card);
    charts.push(this);
  }

  addReadout(one) {
    const entry = this.legend.appendChild(html("span"));
    if (one.color) entry.appendChild(html("i")).style.background = one.color;
    entry.append(one.label);
    return entry.appendChild(html("b"));
  }

  yDomain() {
    const values = this.series.flatMap((one) => one.y.filter(isNumber));
    let [low, high] = [Math.min(...values), Math.max(...values)];
    if (this.zero) [low, high] = [Math.min(low, 0), Math.max(high, 0)];
    if (low === high) [low, high] = low === 0 ? [0, 1] : [low - Math.abs(low) / 2, high + Math.abs(high) / 2];
    return [low, high];
  }

  draw() {
    const width = this.frame.clientWidth;
    if (!width) return;
    const [low, high] = this.yDomain();
    const yTicks = ticks(low, high, this.height > 200 ? 5 : 4);
    this.left = 12 + 6.4 * Math.max(...yTicks.map((tick) => this.tickText(tick).length));
    this.width = width;
    const [bottom, top] = [this.height - 22, 8];
    this.slot = (width - this.left - 8) / (xHigh - xLow + 2 * this.xPad); // width of one step
    this.xOf = (x) => this.left + (x - xLow + this.xPad) * this.slot;
    const [yLow, yHigh] = [yTicks[0] - this.yPad, yTicks.at(-1) + this.yPad];
    this.yOf = (y) => bottom - ((y - yLow) / (yHigh - yLow)) * (bottom - top);
    this.frame.replaceChildren();
    for (const tick of yTicks) {
      svg("line", { x1: this.left, x2: width - 8, y1: this.yOf(tick), y2: this.yOf(tick), class: "grid" }, this.frame);
      svg("text", { x: this.left - 8, y: this.yOf(tick) + 4, "text-anchor": "end" }, this.frame).textContent = this.tickText(tick);
    }
    this.drawXAxis(bottom);
    this.drawSeries();
    this.cross = svg("line", { y1: top, y2: bottom, class: "cross" }, this.frame);
    this.marks = this.hasMarks ? this.series.map((one) => svg("circle", { r: 4.5, fill: one.color, class: "dot" }, this.frame)) : [];
    this.update();
  }

  tickText(tick) { return this.format === percent ? `${Math.round(100 * tick * 100) / 100} %` : significant(tick); }

  drawXAxis(bottom) {
    svg("line", { x1: this.left, x2: this.width - 8, y1: bottom, y2: bottom, class: "axis" }, this.frame);
    const whole = ticks(xLow, xHigh, Math.max(2, Math.floor(this.width / 90))).filter((tick) => Number.isInteger(tick));
    for (const tick of whole.filter((tick) => tick >= xLow && tick <= xHigh)) {
      svg("text", { x: this.xOf(tick), y: bottom + 16, "text-anchor": "middle" }, this.frame).textContent = String(tick);
    }
  }

  drawSeries() {
    for (const one of this.series) {
      let path = "";
      let pen = "M";
      one.y.forEach((y, i) => {
        if (isNumber(y)) { path += `${pen}${this.xOf(one.x[i]).toFixed(1)},${this.yOf(y).toFixed(1)}`; pen = "L"; } else if (!one.sparse) pen = "M";
      });
      svg("path", { d: path, class: "series", stroke: one.color, "stroke-width": one.y.length > 150 ? 1.5 : 2 }, this.frame);
      const known = one.y.filter(isNumber).length;
      if (one.sparse ? 14 * known < this.width : known <= 2) {
        one.y.forEach((y, i) => isNumber(y) && svg("circle", { cx: this.xOf(one.x[i]), cy: this.yOf(y), r: 4, fill: one.color, class: "dot" }, this.frame));
      }
    }
  }

  point(event) {
    const x = event.clientX - this.frame.getBoundingClientRect().left;
    const step = xLow - this.xPad + (x - this.left) / this.slot;
    let nearest = 0;
    run.steps.forEach((other, i) => { if (Math.abs(other - step) < Math.abs(run.steps[nearest] - step)) nearest = i; });
    hover(nearest);
  }

  // A sparse series shows its newest value at that step; the others show the step's own.
  indexOf(one) {
    if (!one.sparse) return hovered;
    return one.x.findLastIndex((x) => x <= run.steps[hovered]);
  }

  update() {
    if (!this.cross) return;
    const x = this.xOf(run.steps[hovered]);
    this.cross.setAttribute("x1", x);
    this.cross.setAttribute("x2", x);
    this.at.textContent = `step ${run.steps[hovered]}`;
    this.series.forEach((one, k) => {
      const i = this.indexOf(one);
      const value = one.y[i];
      this.readouts[k].textContent = isNumber(value) ? this.format(value) : "–";
      const mark = this.marks[k];
      if (!mark) return;
      mark.style.display = isNumber(value) ? "" : "none";
      if (isNumber(value)) { mark.setAttribute("cx", this.xOf(one.x[i])); mark.setAttribute("cy", this.yOf(value)); }
    });
  }

  get hasMarks() { return true; }
}

// Series piled on each other, as bars: a step's bar is as high as its sum.
class StackedChart extends Chart {
  constructor(options) {
    super(options);
    this.xPad = 0.5;
  }

  get hasMarks() { return false; }

  yDomain() { return [0, Math.max(...run.steps.map((_, i) => this.heightOf(this.series.length - 1, i)), 1e-9)]; }

  heightOf(k, i) { return this.series.slice(0, k + 1).reduce((sum, one) => sum + (one.y[i] ?? 0), 0); }

  drawSeries() {
    const width = Math.min(this.slot > 4 ? this.slot - 1.5 : this.slot, 48);
    this.series.forEach((one, k) => one.y.forEach((y, i) => {
      if (!y) return;
      const top = this.yOf(this.heightOf(k, i));
      const height = this.yOf(this.heightOf(k, i) - y) - top;
      svg("rect", { x: this.xOf(one.x[i]) - width / 2, y: top, width, height: height > 4 ? height - 1 : height, fill: one.color }, this.frame);
    }));
  }
}

// Questions by r̂ over time: a column a step, a row a value k/K, stronger where more questions lie.
class HeatMap extends Chart {
  constructor({ name, ...options }) {
    const counts = (run.columns[name] ?? []).map((bins) => bins ?? []); // empty for a step that sampled nothing
    const shares = counts.map((bins) => { const total = bins.reduce((a, b) => a + b, 0); return bins.map((bin) => (total ? bin / total : 0)); });
    const part = (pick) => shares.map((bins) => (bins.length ? bins.filter((_, k) => pick(k, bins.length - 1)).reduce((a, b) => a + b, 0) : null));
    super({ ...options, format: percent, series: [
      { label: "all wrong, r̂ = 0", x: run.steps, y: part((k) => k === 0) },
      { label: "mixed", x: run.steps, y: part((k, last) => k > 0 && k < last) },
      { label: "all right, r̂ = 1", x: run.steps, y: part((k, last) => k === last) },
    ] });
    this.shares = shares;
    this.numBins = Math.max(2, ...shares.map((bins) => bins.length));
    this.xPad = 0.5;
    this.yPad = 0.5 / (this.numBins - 1); // a row lies around its value k/K
    this.strongest = Math.max(...shares.flat());
    if (this.card) this.addScale();
  }

  get hasMarks() { return false; }

  yDomain() { return [0, 1]; }

  tickText(tick) { return tick.toFixed(1); }

  opacity(share) { return (0.05 + 0.95 * Math.sqrt(share / this.strongest)).toFixed(3); }

  addScale() {
    const scale = html("span", "scale", "0 %");
    for (let k = 0; k <= 8; k += 1) scale.appendChild(html("i")).style.opacity = k ? this.opacity((this.strongest * k) / 8) : 0;
    scale.append(`${percent(this.strongest)} of the questions`);
    this.legend.append(scale);
  }

  drawSeries() {
    const height = (this.yOf(0) - this.yOf(1)) / (this.numBins - 1);
    const every = Math.max(1, Math.ceil(1.5 / this.slot)); // no column thinner than 1.5 pixels
    for (let i = 0; i < this.shares.length; i += every) {
      const x = this.xOf(run.steps[i] - 0.5);
      const width = Math.min(this.slot * every, this.width - 8 - x);
      this.shares[i].forEach((share, k) => {
        const y = this.yOf(k / (this.numBins - 1)) - height / 2;
        if (share) svg("rect", { x, y, width, height, fill: "var(--blue)", "fill-opacity": this.opacity(share), "shape-rendering": "crispEdges" }, this.frame);
      });
    }
  }

  point(event) {
    super.point(event);
    const y = event.clientY - this.frame.getBoundingClientRect().top;
    const k = Math.round(((this.yOf(0) - y) / (this.yOf(0) - this.yOf(1))) * (this.numBins - 1));
    const share = this.shares[hovered][k];
    if (isNumber(share)) this.at.textContent = `step ${run.steps[hovered]}, r̂ = ${k}/${this.numBins - 1}: ${percent(share)}`;
  }
}

function hover(index) {
  hovered = Math.min(Math.max(index, 0), run.steps.length - 1);
  charts.forEach((chart) => chart.update());
}

new Chart({
  section: "learning", title: "Accuracy", about: "On held-out questions, with the weights after a step; of the answers sampled in it, before the prompt filter.",
  format: percent, wide: true, height: 280, zero: true,
  series: [
    { label: "held-out", color: "var(--blue)", sparse: true, x: heldOut, y: run.held_out.map(([, accuracy]) => accuracy) },
    column("accuracy", "sampled", "var(--orange)"),
  ],
});
new Chart({
  section: "learning", title: "Entropy", zero: true,
  about: "Nats a token: exact over trained tokens, estimated over all sampled ones.",
  series: [column("entropy", "trained", "var(--blue)"), column("entropy_sampled", "sampled", "var(--orange)")],
});
new Chart({
  section: "learning", title: "Answer length", about: "Tokens.", zero: true,
  series: [column("answer_length_mean", "mean", "var(--blue)"), column("answer_length_p90", "90th percentile", "var(--orange)")],
});
new HeatMap({
  section: "sampling", name: "correct_rate_histogram", title: "Distribution of r̂", wide: true, height: 240,
  about: "Questions by the share of their answers that are right, r̂; all questions sampled. Only mixed ones train.",
});
new Chart({
  section: "sampling", title: "Questions a step", zero: true, about: "Sampled until the quota of mixed ones is met.",
  series: [column("groups_sampled", "sampled", "var(--gray)"), column("groups_mixed", "mixed", "var(--orange)"), column("groups_trained", "trained", "var(--blue)")],
});
new Chart({
  section: "sampling", title: "Truncated and unknown answers", about: "Cut at the length limit (counted as wrong); not judged (dropped).",
  format: percent, zero: true,
  series: [column("truncated_rate", "truncated", "var(--orange)"), column("unknown_rate", "unknown", "var(--gray)")],
});
new StackedChart({
  section: "sampling", title: "How verdicts came about", about: "Answers by the reason of their verdict; what never occurred is left out.",
  format: percent, wide: true, height: 240,
  series: Object.keys(run.columns).filter((name) => name.startsWith("verdict/")).map(
    (name, k) => column(name, name.slice("verdict/".length), ["var(--blue)", "var(--orange)", "var(--gray)", "var(--aqua)", "var(--violet)", "var(--yellow)", "var(--red)"][k % 7]),
  ),
});
new Chart({
  section: "optimization", title: "Loss", about: "The objective and the parts that right and wrong answers contribute.",
  series: [column("loss", "loss", "var(--blue)"), column("loss_positive", "right answers", "var(--aqua)"), column("loss_negative", "wrong answers", "var(--red)")],
});
new Chart({
  section: "optimization", title: "Gradient norm", about: "Before clipping, over the updates of a step.", zero: true,
  series: [column("grad_norm", "mean", "var(--blue)"), column("grad_norm_max", "largest", "var(--orange)")],
});
new Chart({
  section: "optimization", title: "KL to the old policy", about: "Nats a token.", zero: true, series: [column("kl_old", "KL", "var(--blue)")],
});
new Chart({
  section: "optimization", title: "Engine against trainer", about: "|Δ log-prob| of trained tokens for the same weights, nats.", zero: true,
  series: [column("mismatch_mean", "mean", "var(--blue)"), column("mismatch_max", "largest", "var(--orange)")],
});
new Chart({
  section: "optimization", title: "Largest likelihood ratio", about: "R = π⁺ / π over a step's trained tokens.", zero: true,
  series: [column("ratio_max", "largest R", "var(--blue)")],
});
new Chart({
  section: "optimization", title: "Clamped tokens", format: percent, zero: true,
  about: "Wrong answers' tokens raised to ε; about half at ε = 1.",
  series: [column("clamp_rate", "clamped", "var(--blue)")],
});
// One series for each range of r̂ that the run has numbers of: hard questions first.
const byRate = (name) => Object.keys(run.columns).filter((column) => column.startsWith(`${name}/`)).sort().map((key) => {
  const range = key.slice(name.length + 1);
  const color = ["var(--violet)", "var(--blue)", "var(--aqua)", "var(--yellow)", "var(--orange)"][Math.round(5 * parseFloat(range))];
  return column(key, `r̂ ${range.replace("-", "–")}`, color);
});
new Chart({
  section: "optimization", title: "Clamped tokens by r̂", format: percent, zero: true,
  about: "The same, by the share of right answers to the question.", series: byRate("clamp_rate"),
});
new Chart({
  section: "optimization", title: "Implicit negative ratio by r̂",
  about: "Mean of (1 − r̂R) / (1 − r̂) over wrong answers' tokens; 1 where nothing has moved.", series: byRate("negative_ratio"),
});
new StackedChart({
  section: "optimization", title: "Gradient by r̂", format: percent,
  about: "Where |∂loss / ∂log π| of a step's tokens lies.", series: byRate("gradient_share"),
});
const cosines = run.steps.map((step, i) => [step, (run.columns.gradient_cosine ?? [])[i]]).filter(([, cosine]) => isNumber(cosine));
new Chart({
  section: "optimization", title: "Right against wrong answers", zero: true,
  about: "Cosine between the gradients of both; −1: they ask for opposite changes.",
  series: [{ label: "cosine", color: "var(--blue)", sparse: true, x: cosines.map(([step]) => step), y: cosines.map(([, cosine]) => cosine) }],
});
new Chart({
  section: "optimization", title: "Learning rate", about: "Of the last update of a step.", zero: true, series: [column("learning_rate", "learning rate", "var(--blue)")],
});
new StackedChart({
  section: "time", title: "Time of a rollout step", about: "Seconds by phase.", wide: true, height: 260, format: seconds,
  series: [
    column("time/generate", "generate", "var(--blue)"), column("time/verify", "verify", "var(--aqua)"),
    column("time/prepare", "old log-probs", "var(--violet)"), column("time/update", "update", "var(--orange)"),
    column("time/evaluate", "held-out evaluation", "var(--yellow)"), column("time/rest", "everything else", "var(--gray)"),
  ],
});
new Chart({
  section: "time", title: "Generating", about: "Tokens a second.", zero: true,
  series: [column("tokens_per_second/generate", "tokens/s", "var(--blue)")],
});
new Chart({
  section: "time", title: "Updating", about: "Trained tokens a second.", zero: true,
  series: [column("tokens_per_second/update", "tokens/s", "var(--orange)")],
});
new Chart({
  section: "time", title: "Collecting ahead", about: "Seconds that a step's answers took while others trained, and the wait for new weights before.",
  zero: true, format: seconds,
  series: [column("ahead/collect", "collecting", "var(--blue)"), column("ahead/wait", "waiting", "var(--gray)")],
});
// Of the fleet: the whole, and a line for each server, as far as they can be told apart.
const serverNames = [...new Set(Object.keys(run.columns).filter((name) => name.startsWith("server/")).map((name) => name.split("/")[1]))].sort();
const ofServers = (field) => serverNames.slice(0, 8).map((name, k) => column(
  `server/${name}/${field}`, name, ["var(--blue)", "var(--orange)", "var(--aqua)", "var(--violet)", "var(--yellow)", "var(--red)", "var(--gray)", "var(--ink-2)"][k],
));
new Chart({
  section: "fleet", title: "Tokens by server", about: "Tokens a second of the whole step; with more than eight servers the first eight.",
  wide: true, height: 240, zero: true, series: ofServers("tokens_per_second"),
});
new Chart({
  section: "fleet", title: "Whole fleet", about: "Tokens a second of the whole step.", zero: true,
  series: [column("fleet/tokens_per_second", "tokens/s", "var(--blue)")],
});
new Chart({
  section: "fleet", title: "Idle", about: "Share of the step in which a server had nothing to generate.", format: percent, zero: true,
  series: [...ofServers("idle_share"), column("fleet/idle_share", "all", "var(--ink)")],
});
new Chart({
  section: "fleet", title: "Queue", about: "Answers that a server had to generate, averaged over the step.", zero: true, series: ofServers("queue"),
});
new Chart({
  section: "fleet", title: "Waste", about: "Tokens generated for nobody.", zero: true,
  series: [...ofServers("wasted_tokens"), column("fleet/wasted_tokens", "all", "var(--ink)")],
});
new Chart({
  section: "fleet", title: "Servers", about: "That can serve at the end of a step; started again and answers asked again until then.", zero: true,
  series: [
    column("fleet/healthy", "healthy", "var(--blue)"), column("fleet/restarts", "restarts", "var(--orange)"), column("fleet/retries", "retries", "var(--red)"),
  ],
});
new Chart({
  section: "fleet", title: "Taking over weights", about: "Seconds.", format: seconds, zero: true,
  series: [...ofServers("sync_seconds"), column("fleet/sync_seconds", "slowest", "var(--ink)")],
});
new Chart({
  section: "fleet", title: "Gate", about: "|Δ log-prob| on fixed questions after each sync, nats.", zero: true,
  series: [column("gate_mean", "mean", "var(--blue)"), column("gate_max", "largest", "var(--orange)")],
});
for (const section of document.querySelectorAll("[data-section]")) section.hidden = !section.querySelector(".chart");
