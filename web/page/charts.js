/* The charts of the operator's page and of a run's report: one cursor and one zoom go through all of them. */

import uPlot from "/page/vendor/uplot-1.6.32/uPlot.esm.js";
import { clock, dollars, number, since, span } from "/page/words.js";

const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
const stepped = uPlot.paths.stepped({ align: 1 });
const together = uPlot.sync("fleet");

/* Room at the right of each chart, for a second axis where there is one: times stand below each other. */
const RIGHT = 52;

const PERCENTILES = ["p50", "p95", "p99"];

/* From the top of the stack to its bottom: each is drawn over the one before. */
const STACK = ["cold", "booting", "draining", "hot"];

/* How times are said: by the clock of a fleet that runs, or as seconds since a run began. */
export const BY_CLOCK = { scale: { time: true }, tick: (t) => (t % 60 ? clock(t) : clock(t).slice(0, 5)), say: clock };
export const SINCE_START = {
  scale: { time: false },
  tick: since,
  say: since,
  incrs: [1, 5, 10, 30, 60, 300, 600, 1800, 3600, 7200, 14400, 21600, 43200, 86400, 172800, 604800],
};

export class Charts {
  /* counts: what became of the requests by when they came, as a report has it; only then they are drawn. */
  constructor(onZoom, times = BY_CLOCK, counts = null) {
    this.latency = document.getElementById("c-latency") && "first";
    this.marked = null;
    this.onZoom = onZoom;
    this.times = times;
    this.counts = counts;
    this.plots = [];
    this.data = null;
    new ResizeObserver(() => this.resize()).observe(document.getElementById("c-fleet"));
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw(this.data, true));
  }

  /* history: columns as GET /history gives them; anew: also when only the colours have changed. */
  draw(history, anew = false) {
    if (!history) return;
    this.data = history;
    if (anew || !this.plots.length) {
      for (const plot of this.plots) plot.destroy();
      this.plots = [this.fleet(), this.waiting(), this.dollars()];
      if (this.counts) this.plots.push(this.requests());
      if (this.latency) this.plots.push(this.answers());
    }
    const [fleet, waiting, money, last] = this.plots;
    const requests = this.counts && last, answers = this.latency && last;
    const x = history.at_s;
    let below = x.map(() => 0);
    const stacked = {};
    for (const name of [...STACK].reverse()) stacked[name] = below = history[name].map((n, i) => n + below[i]);
    /* What was before the first sample is not known; a short past is not drawn as a long one. */
    const scale = { min: Math.max(history.from, Math.min(x[0] ?? history.from, history.to - 60)), max: history.to };
    const [cold, booting, draining, hot] = STACK.map((name) => stacked[name]);
    const over = history.offered.map((load, i) => (load > draining[i] ? load : null));
    for (const [plot, columns] of [
      [fleet, [x, cold, booting, over, draining, hot, history.wanted_hot, history.offered]],
      [waiting, [x, history.held, ...(this.counts ? [] : [history.held_high]), history.oldest_wait_s]],
      [money, [x, history.usd_h]],
      ...(requests ? [[requests, this.rates()]] : []),
      ...(answers ? [[answers, [x, ...PERCENTILES.map((p) => history[`${this.latency}_${p}`])]]] : []),
    ]) {
      plot.setData(columns, false);
      plot.batch(() => {
        plot.setScale("x", scale);
        for (const name of Object.keys(plot.scales)) if (name !== "x") plot.setScale(name, { min: null, max: null });
      });
      if (plot.cursor.idx == null && columns[0].length) plot.setLegend({ idx: columns[0].length - 1 });
    }
  }

  mark(epochS) {
    this.marked = epochS;
    for (const plot of this.plots) plot.redraw(false);
  }

  resize() {
    for (const plot of this.plots) {
      const width = plot.root.parentElement.clientWidth;
      if (width && width !== plot.width) plot.setSize({ width, height: plot.height });
    }
  }

  make(id, height, series, axes, scales) {
    const at = document.getElementById(id);
    const dim = colour("dim"), line = colour("line");
    const axis = { stroke: dim, grid: { stroke: line, width: 1 }, ticks: { stroke: line, width: 1 }, font: "12px system-ui" };
    return new uPlot({
      width: at.clientWidth || 600,
      height,
      padding: [null, axes.some((a) => a.side === 1) ? 0 : RIGHT, null, null],
      cursor: { sync: { key: together.key, setSeries: false }, drag: { x: true, y: false, setScale: false }, points: { size: 6 } },
      scales: { x: this.times.scale, ...scales },
      axes: [{ ...axis, values: (_, at) => at.map(this.times.tick), space: 80, ...(this.times.incrs && { incrs: this.times.incrs }) }, ...axes.map((more) => ({ ...axis, size: 64, ...more }))],
      series: [{ label: "time", value: (_, v) => (v == null ? "–" : this.times.say(v)) }, ...series],
      hooks: {
        draw: [(plot) => this.drawMark(plot)],
        setSelect: [(plot) => {
          if (plot.select.width > 8) {
            this.onZoom(plot.posToVal(plot.select.left, "x"), plot.posToVal(plot.select.left + plot.select.width, "x"));
          }
          plot.setSelect({ left: 0, width: 0, top: 0, height: 0 }, false);
        }],
        ready: [(plot) => plot.over.addEventListener("dblclick", () => this.onZoom(null, null))],
      },
    }, [[]].concat(series.map(() => [])), at);
  }

  drawMark(plot) {
    if (this.marked == null) return;
    const x = plot.valToPos(this.marked, "x", true);
    if (x < plot.bbox.left || x > plot.bbox.left + plot.bbox.width) return;
    const ctx = plot.ctx;
    ctx.save();
    ctx.strokeStyle = colour("act");
    ctx.lineWidth = 2 * devicePixelRatio;
    ctx.beginPath();
    ctx.moveTo(x, plot.bbox.top);
    ctx.lineTo(x, plot.bbox.top + plot.bbox.height);
    ctx.stroke();
    ctx.restore();
  }

  fleet() {
    const areas = STACK.map((name) => ({
      label: name,
      fill: colour(name),
      stroke: colour("card"),
      width: 1,
      paths: stepped,
      points: { show: false },
      value: (_, __, ___, i) => (i == null ? "–" : number(this.data[name][i], 1)),
    }));
    const lines = [
      { label: "wanted hot", stroke: colour("act"), width: 1.5, dash: [6, 4], paths: stepped, points: { show: false } },
      { label: "load offered", stroke: colour("load"), width: 2, points: { show: false } },
    ];
    for (const s of lines) s.value = (_, v) => number(v, 2);
    /* Seen where it is above what is hot: more arrives than can be served. */
    areas.splice(2, 0, {
      label: "too much load",
      fill: colour("lost"),
      width: 0,
      points: { show: false },
      value: (_, v, __, i) => (v == null ? "–" : number(v - this.data.hot[i] - this.data.draining[i], 2)),
    });
    return this.make("c-fleet", 260, [...areas, ...lines], [{ label: "instances", incrs: [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000] }], {
      y: { range: (_, __, most) => [0, Math.max(2, Math.ceil((most || 0) * 1.08))] },
    });
  }

  waiting() {
    const positive = { range: (_, __, most) => [0, Math.max(1, (most || 0) * 1.1)] };
    const high = { label: "of high priority", scale: "y", stroke: colour("act"), width: 1.5, dash: [3, 3], paths: stepped, points: { show: false }, value: (_, v) => number(v) };
    return this.make("c-wait", 150, [
      { label: "requests waiting", scale: "y", stroke: colour("booting"), fill: colour("booting") + "33", width: 1.5, paths: stepped, points: { show: false }, value: (_, v) => number(v) },
      ...(this.counts ? [] : [high]),
      { label: "longest wait", scale: "s", stroke: colour("draining"), width: 1.5, points: { show: false }, value: (_, v) => span(v) },
    ], [{ label: "requests" }, { label: "seconds", scale: "s", side: 1, size: RIGHT - 16, labelSize: 16, grid: { show: false } }], { y: positive, s: positive });
  }

  /* Rates from counts in equal parts of the time, stacked: each step goes on to the next. */
  rates() {
    const { width_s: width, in_time: good, late, failed } = this.counts;
    const steps = (counts) => [...counts, counts.at(-1) ?? 0].map((n) => n / width);
    const bottom = steps(good), middle = steps(good.map((n, i) => n + late[i]));
    const top = steps(good.map((n, i) => n + late[i] + failed[i]));
    return [top.map((_, i) => i * width), top, middle, bottom];
  }

  requests() {
    const said = (names) => (_, __, ___, i) => (i == null ? "–" : number(this.counts[names][Math.min(i, this.counts[names].length - 1)] / this.counts.width_s, 2));
    const area = (label, name, fill) => ({ label, fill: colour(fill), width: 0, paths: stepped, points: { show: false }, value: said(name) });
    return this.make("c-requests", 150, [area("failed", "failed", "lost"), area("served late", "late", "draining"), area("served in time", "in_time", "hot")], [{ label: "requests / s" }], {
      y: { range: (_, __, most) => [0, Math.max(0.1, (most || 0) * 1.08)] },
    });
  }

  /* Of the last minute, by what clients told. */
  answers() {
    const line = (label, stroke, width) => ({ label, stroke: colour(stroke), width, points: { show: false }, spanGaps: false, value: (_, v) => (v == null ? "–" : span(v, 3)) });
    return this.make("c-latency", 170, [line("half within (p50)", "hot", 2), line("95 % within (p95)", "booting", 1.5), line("99 % within (p99)", "draining", 1.5)], [{ label: "seconds" }], {
      y: { range: (_, __, most) => [0, most ? most * 1.1 : 1] },
    });
  }

  /* which: first, token or whole. */
  show(which) {
    this.latency = which;
    this.draw(this.data);
  }

  dollars() {
    return this.make("c-usd", 130, [
      { label: "dollars an hour", stroke: colour("hot"), fill: colour("hot") + "33", width: 1.5, paths: stepped, points: { show: false }, value: (_, v) => dollars(v) },
    ], [{ label: "$ / h" }], { y: { range: (_, __, most) => [0, Math.max(0.1, (most || 0) * 1.15)] } });
  }
}
