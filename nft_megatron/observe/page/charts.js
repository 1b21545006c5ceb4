"use strict";
// The kinds of charts, on uPlot. All have the same steps, visible range and cursor; panels.js says which charts there are.
const run = JSON.parse(document.getElementById("run-data").textContent); // run.columns[name][i] belongs to step run.steps[i]
const rowOf = new Map(run.steps.map((step, i) => [step, i]));
const heldOut = new Map(run.held_out); // may begin at 0, the model before the first step
const steps = [...new Set([...heldOut.keys(), ...run.steps])].sort((a, b) => a - b);
const view = { from: steps[0], to: steps.at(-1), at: steps.length - 1, smoothing: 0 }; // at: index of the step under the cursor
const charts = [];

const isNumber = (value) => typeof value === "number";
const percent = (value) => `${(100 * value).toFixed(1)} %`;
const seconds = (value) => `${value < 10 ? value.toFixed(2) : value.toFixed(1)} s`;
const significant = (value) => {
  const size = Math.abs(value);
  if (size >= 1000) return Math.round(value).toLocaleString("en-US").replace("-", "−");
  if (size !== 0 && size < 0.001) return value.toExponential(2).replace(/\.?0*e/, "e").replaceAll("-", "−");
  return String(Number(value.toPrecision(4))).replace("-", "−");
};
const theme = getComputedStyle(document.documentElement);
const palette = new Map(); // asking the style costs a layout
const color = (name) => palette.get(name) ?? palette.set(name, theme.getPropertyValue(`--${name}`)).get(name);
const sum = (values) => values.reduce((a, b) => a + b, 0);

function html(tag, className, text) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text; // never innerHTML: model text is untrusted
  return element;
}

function column(name, label, color, sparse = false) {
  const values = run.columns[name];
  return values && { label, color, sparse, y: steps.map((step) => values[rowOf.get(step)] ?? null) };
}

// Exponential moving average of the numbers in y, over the sum of its weights: it does not lean to 0 at the start.
function smooth(y, weight) {
  let [total, norm] = [0, 0];
  return y.map((value) => {
    if (!isNumber(value)) return null;
    [total, norm] = [weight * total + (1 - weight) * value, weight * norm + (1 - weight)];
    return total / norm;
  });
}

class Chart {
  static isLines = true; // and so can be smoothed, and drawn on a logarithmic axis
  static margin = 0; // around the visible range, in steps

  // zero: whether the axis always shows 0
  constructor(section, title, about, series, { format = significant, wide = false, height = 180, zero = true } = {}) {
    Object.assign(this, { title, format, height, zero, log: false, series: series.filter((one) => one?.y.some(isNumber)) });
    if (!this.series.length) return;
    this.card = html("figure", `card chart${wide ? " wide" : ""}`);
    this.card.tabIndex = 0;
    this.card.setAttribute("aria-label", title);
    const heading = this.card.appendChild(html("h3", "", title));
    this.at = heading.appendChild(html("span", "at"));
    this.card.appendChild(html("p", "about", `${about} `)).append(this.omitted = html("span"));
    this.legend = this.card.appendChild(html("div", "legend"));
    this.frame = this.card.appendChild(html("div", "frame"));
    this.frame.style.height = `${height}px`;
    if (this.constructor.isLines) this.addLogButton(heading);
    this.card.addEventListener("keydown", (event) => {
      const turn = event.target === this.card && { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (turn) { pointAt(view.at + turn); event.preventDefault(); }
    });
    document.querySelector(`[data-section="${section}"] .charts`).append(this.card);
    charts.push(this);
  }

  addLogButton(heading) {
    const button = heading.appendChild(html("button", "log", "log"));
    const values = this.series.flatMap((one) => one.y.filter(isNumber));
    const numOmitted = values.filter((value) => value <= 0).length;
    Object.assign(button, { type: "button", title: "Logarithmic axis", disabled: numOmitted === values.length, ariaPressed: "false" });
    button.addEventListener("click", () => {
      this.log = !this.log;
      button.ariaPressed = String(this.log);
      this.omitted.textContent = this.log && numOmitted ? `Not shown: ${numOmitted} values ≤ 0.` : "";
      this.build();
    });
  }

  // The steps, each series as measured, each series smoothed.
  data() {
    this.smoothed = this.series.map((one) => (view.smoothing ? smooth(one.y, view.smoothing) : one.y.map(() => null)));
    const shown = (y) => (this.log ? y.map((value) => (value > 0 ? value : null)) : y);
    return [steps, ...this.series.map((one) => shown(one.y)), ...this.smoothed.map(shown)];
  }

  of(k) { return this.series[(k - 1) % this.series.length]; } // what uPlot's series k shows

  lines() {
    const line = (one) => ({
      stroke: () => color(one.color), width: steps.length > 150 ? 1.5 : 2, spanGaps: one.sparse,
      points: { show: hasRoom, size: 8, width: 2, stroke: () => color("card"), fill: () => color(one.color) },
    });
    return [...this.series.map(line), ...this.series.map((one) => ({ ...line(one), points: { show: false }, class: "smoothed" }))];
  }

  readout(k, i) {
    const [value, smoothed] = [this.of(k).y[i], this.smoothed?.[k - 1]?.[i]];
    return (isNumber(value) ? this.format(value) : "–") + (isNumber(smoothed) ? ` (${this.format(smoothed)})` : "");
  }

  yRange(plot, low, high) {
    if (this.log) {
      const [from, to] = low === null ? [0.1, 1] : high / low < 1.01 ? [low / 2, high * 2] : [low, high];
      return uPlot.rangeLog(from, to, 10, false);
    }
    const [from, to] = low === null ? [0, 1] : this.zero ? [Math.min(low, 0), Math.max(high, 0)] : [low, high];
    const [bottom, top] = uPlot.rangeNum(from, to, 0.05, true); // an end at 0 stays there
    return [bottom, this.format === percent && to <= 1 ? Math.min(top, 1) : top];
  }

  tickText(tick) { return this.format === percent ? `${significant(100 * tick)} %` : significant(tick); }

  atText() { return `step ${steps[view.at]}`; }

  draw() {}

  options() {
    const { isLines, margin } = this.constructor;
    const pad = () => margin || (view.from === view.to ? 0.5 : 0);
    const axis = { stroke: () => color("ink-3"), font: "11px system-ui, sans-serif", ticks: { show: false } };
    return {
      width: this.width, height: this.height, padding: [8, 14, 0, 0],
      series: [{}, ...this.lines().map((line, k) => ({ label: this.of(k + 1).label, value: (plot, _, k, i) => this.readout(k, i), ...line }))],
      scales: {
        x: { time: false, range: () => [view.from - pad(), view.to + pad()] },
        y: { distr: this.log ? 3 : 1, range: (plot, low, high) => this.yRange(plot, low, high) },
      },
      axes: [
        { ...axis, grid: { show: false }, size: 22, gap: 4, space: 60, incrs: wholeSteps, values: (plot, ticks) => ticks.map(String) },
        {
          ...axis, grid: { stroke: () => color("grid"), width: 1 }, gap: 8, space: 34,
          size: (plot, texts) => 14 + 6.4 * Math.max(1, ...(texts ?? []).map((text) => text.length)),
          values: (plot, ticks) => ticks.map((tick) => (isNumber(tick) ? this.tickText(tick) : "")),
        },
      ],
      legend: { mount: (plot, table) => this.legend.prepend(table), markers: { width: 0, fill: (plot, k) => `var(--${this.of(k).color})` } },
      cursor: {
        y: false, drag: { setScale: false, dist: 5 }, bind: { dblclick: () => () => zoom() },
        points: isLines ? { size: 9, width: 2, stroke: () => color("card"), fill: (plot, k) => color(this.of(k).color) } : { show: false },
        sync: { key: "steps", scales: ["x", null], filters: { pub: (type) => type === "mousemove", sub: () => true } },
        dataIdx: (plot, k, i) => (k && this.of(k).sparse ? newest(this.of(k).y, i) : i),
      },
      hooks: {
        setCursor: [(plot) => { if (plot.cursor.idx !== null) { view.at = plot.cursor.idx; this.at.textContent = this.atText(plot); } }],
        setSelect: [(plot) => {
          const [left, right] = [0, plot.select.width].map((x) => Math.round(plot.posToVal(plot.select.left + x, "x")));
          plot.setSelect({ left: 0, width: 0 }, false);
          zoom(left, right);
        }],
        setSeries: [(plot, k, { show }) => { if (show !== undefined) this.toggle(plot, k, show); }],
        draw: [(plot) => this.draw(plot)],
      },
    };
  }

  toggle(plot, k, show) { if (k <= this.series.length) plot.setSeries(k + this.series.length, { show }, false); }

  // Whether the room for the chart has changed.
  measure() {
    const before = this.width;
    this.width = this.frame.clientWidth;
    return this.width !== before;
  }

  build() {
    const options = this.options();
    this.plot?.series.forEach((one, k) => { options.series[k].show = one.show; });
    this.plot?.destroy();
    this.plot = new uPlot(options, [], this.frame);
    this.refresh();
    this.plot.over.addEventListener("mouseleave", () => pointAt(Infinity)); // at rest, all charts tell the last visible step
    this.plot.over.addEventListener("pointermove", (event) => {
      if (event.pointerType === "touch") this.plot.setCursor({ left: event.offsetX, top: event.offsetY });
    });
    queueMicrotask(() => pointAt(view.at)); // after uPlot's own, which lays it out
  }

  refresh() {
    if (this.constructor.isLines) this.series.forEach((_, k) => { this.plot.series[k + 1].alpha = view.smoothing ? 0.3 : 1; });
    this.plot.setData(this.data());
  }
}

const wholeSteps = [0, 1, 2, 3, 4, 5, 6].flatMap((n) => [1, 2, 5].map((k) => k * 10 ** n));

const newest = (y, i) => { const k = y.findLastIndex((value, k) => k <= i && isNumber(value)); return k < 0 ? null : k; };

// Whether there is room for a dot at each visible value.
function hasRoom(plot, k) {
  const [first, last] = plot.series[0].idxs;
  return 14 * plot.data[k].slice(first, last + 1).filter(isNumber).length < plot.width;
}

// Series piled on each other, as bars: a step's bar is as high as its sum.
class StackedChart extends Chart {
  static isLines = false;
  static margin = 0.5;

  data() { return [steps, ...this.series.map((one) => one.y)]; }

  tops(plot, k) { return steps.map((_, i) => sum(this.series.slice(0, k).map((one, j) => (plot.series[j + 1].show ? one.y[i] ?? 0 : 0)))); }

  lines() {
    const bound = (shift) => ({ unit: 1, values: (plot, k) => this.tops(plot, k + shift) });
    const paths = uPlot.paths.bars({ size: [0.86, 48], disp: { y0: bound(-1), y1: bound(0) } });
    return this.series.map((one) => ({ fill: () => color(one.color), width: 0, points: { show: false }, paths }));
  }

  yRange(plot) {
    const [first, last] = plot.series[0].idxs;
    return [0, Math.max(...this.tops(plot, this.series.length).slice(first, last + 1), 1e-9)];
  }

  toggle(plot) { plot.redraw(); }
}

// Questions by r̂ over time: a column per step, a row per value k/K, stronger where more questions lie.
class HeatMap extends StackedChart {
  constructor(section, name, title, about, options) {
    const shares = steps.map((step) => {
      const bins = run.columns[name]?.[rowOf.get(step)] ?? []; // empty for a step that sampled nothing
      return bins.map((bin) => bin / (sum(bins) || 1));
    });
    const part = (label, pick) => ({ label, y: shares.map((bins) => (bins.length ? sum(bins.filter((_, k) => pick(k, bins.length - 1))) : null)) });
    const [wrong, right] = [part("all wrong, r̂ = 0", (k) => k === 0), part("all right, r̂ = 1", (k, last) => k === last)];
    super(section, title, about, [wrong, part("mixed", (k, last) => k > 0 && k < last), right], { ...options, format: percent });
    this.shares = shares;
    this.last = Math.max(1, ...shares.map((bins) => bins.length - 1));
    this.strongest = Math.max(...shares.flat());
    if (this.card) this.addScale();
  }

  opacity(share) { return 0.05 + 0.95 * Math.sqrt(share / this.strongest); }

  addScale() {
    const scale = html("span", "scale", "0 %");
    for (let k = 0; k <= 8; k += 1) scale.appendChild(html("i")).style.opacity = k ? this.opacity((this.strongest * k) / 8) : 0;
    scale.append(`${percent(this.strongest)} of the questions`);
    this.legend.append(scale);
  }

  lines() { return this.series.map(() => ({ paths: () => null, points: { show: false } })); }

  yRange() { return [-0.5 / this.last, 1 + 0.5 / this.last]; }

  tickText(tick) { return tick.toFixed(1); }

  draw({ ctx, bbox, valToPos }) {
    const [x, y] = [(step) => Math.round(valToPos(step, "x", true)), (k) => Math.round(valToPos(k / this.last, "y", true))];
    ctx.save();
    ctx.beginPath();
    ctx.rect(bbox.left, bbox.top, bbox.width, bbox.height);
    ctx.clip();
    ctx.fillStyle = color("blue");
    this.shares.forEach((bins, i) => bins.forEach((share, k) => {
      ctx.globalAlpha = share && this.opacity(share);
      ctx.fillRect(x(steps[i] - 0.5), y(k + 0.5), x(steps[i] + 0.5) - x(steps[i] - 0.5), y(k - 0.5) - y(k + 0.5));
    }));
    ctx.restore();
  }

  atText(plot) {
    const k = Math.round(plot.posToVal(plot.cursor.top, "y") * this.last);
    const share = plot.cursor.event && this.shares[view.at][k];
    return super.atText() + (isNumber(share) ? `, r̂ = ${k}/${this.last}: ${percent(share)}` : "");
  }
}

// Put every chart's cursor on a step, or on the nearest one that is visible.
function pointAt(index) {
  const [first, last] = [steps.findIndex((step) => step >= view.from), steps.findLastIndex((step) => step <= view.to)];
  view.at = Math.min(Math.max(index, first), last);
  for (const { plot } of charts) plot.setCursor({ left: plot.valToPos(steps[view.at], "x"), top: 0 }, true, false);
}

// Show in every chart the steps from one to another; all of them by default.
function zoom(from = steps[0], to = steps.at(-1)) {
  const inside = steps.filter((step) => step >= Math.min(from, to) && step <= Math.max(from, to));
  if (inside.length) [view.from, view.to] = [inside[0], inside.at(-1)];
  [controls.from.value, controls.to.value] = [view.from, view.to];
  controls.reset.disabled = view.from === steps[0] && view.to === steps.at(-1);
  for (const { plot } of charts) plot.setData(plot.data); // which asks for the range
  queueMicrotask(() => pointAt(view.at));
}

const controls = Object.fromEntries([...document.querySelectorAll("[data-control]")].map((element) => [element.dataset.control, element]));

// To be called when panels.js has made the charts.
function showCharts() {
  for (const section of document.querySelectorAll("[data-section]")) section.hidden = !section.querySelector(".chart");
  for (const input of [controls.from, controls.to]) {
    [input.min, input.max] = [steps[0], steps.at(-1)];
    input.addEventListener("change", () => zoom(...[controls.from, controls.to].map((one) => (one.value === "" ? undefined : Number(one.value)))));
  }
  controls.reset.addEventListener("click", () => zoom());
  controls.smoothing.addEventListener("input", () => {
    view.smoothing = controls.smoothing.valueAsNumber;
    controls.weight.textContent = view.smoothing ? view.smoothing.toFixed(2) : "off";
    charts.forEach((chart) => chart.refresh());
  });
  controls.bar.hidden = false;
  charts.forEach((chart) => chart.measure()); // all before the first is drawn: each would cost a layout
  charts.forEach((chart) => chart.build());
  zoom();
  new ResizeObserver(() => charts.forEach((chart) => {
    if (chart.measure()) chart.plot.setSize({ width: chart.width, height: chart.height });
  })).observe(document.querySelector("main"));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    palette.clear();
    charts.forEach(({ plot }) => plot.redraw());
  });
}
