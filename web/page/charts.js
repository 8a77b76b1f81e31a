/* The three charts: one cursor and one zoom go through all of them. */

import uPlot from "/page/vendor/uplot-1.6.32/uPlot.esm.js";
import { clock, dollars, number, span } from "/page/words.js";

const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
const stepped = uPlot.paths.stepped({ align: 1 });
const together = uPlot.sync("fleet");

/* From the top of the stack to its bottom: each is drawn over the one before. */
const STACK = ["cold", "booting", "draining", "hot"];

export class Charts {
  constructor(onZoom) {
    this.marked = null;
    this.onZoom = onZoom;
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
    }
    const [fleet, waiting, money] = this.plots;
    const x = history.at_s;
    let below = x.map(() => 0);
    const stacked = {};
    for (const name of [...STACK].reverse()) stacked[name] = below = history[name].map((n, i) => n + below[i]);
    /* What was before the first sample is not known; a short past is not drawn as a long one. */
    const scale = { min: Math.max(history.from, Math.min(x[0] ?? history.from, history.to - 60)), max: history.to };
    for (const [plot, columns] of [
      [fleet, [...STACK.map((name) => stacked[name]), history.wanted_hot, history.offered]],
      [waiting, [history.held, history.oldest_wait_s]],
      [money, [history.usd_h]],
    ]) {
      plot.setData([x, ...columns], false);
      plot.batch(() => {
        plot.setScale("x", scale);
        for (const name of Object.keys(plot.scales)) if (name !== "x") plot.setScale(name, { min: null, max: null });
      });
      if (plot.cursor.idx == null && x.length) plot.setLegend({ idx: x.length - 1 });
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
      cursor: { sync: { key: together.key, setSeries: false }, drag: { x: true, y: false, setScale: false }, points: { size: 6 } },
      scales: { x: { time: true }, ...scales },
      axes: [{ ...axis, values: (_, times) => times.map((t) => (t % 60 ? clock(t) : clock(t).slice(0, 5))), space: 80 }, ...axes.map((more) => ({ ...axis, size: 64, ...more }))],
      series: [{ label: "time", value: (_, v) => (v == null ? "–" : clock(v)) }, ...series],
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
    return this.make("c-fleet", 260, [...areas, ...lines], [{ label: "instances" }], {
      y: { range: (_, __, most) => [0, Math.max(2, Math.ceil((most || 0) * 1.08))] },
    });
  }

  waiting() {
    const positive = { range: (_, __, most) => [0, Math.max(1, (most || 0) * 1.1)] };
    return this.make("c-wait", 150, [
      { label: "requests waiting", scale: "y", stroke: colour("booting"), fill: colour("booting") + "33", width: 1.5, paths: stepped, points: { show: false }, value: (_, v) => number(v) },
      { label: "longest wait", scale: "s", stroke: colour("draining"), width: 1.5, points: { show: false }, value: (_, v) => span(v) },
    ], [{ label: "requests" }, { label: "seconds", scale: "s", side: 1, grid: { show: false } }], { y: positive, s: positive });
  }

  dollars() {
    return this.make("c-usd", 130, [
      { label: "dollars an hour", stroke: colour("hot"), fill: colour("hot") + "33", width: 1.5, paths: stepped, points: { show: false }, value: (_, v) => dollars(v) },
    ], [{ label: "$ / h" }], { y: { range: (_, __, most) => [0, Math.max(0.1, (most || 0) * 1.15)] } });
  }
}
