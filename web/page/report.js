/* The report of one run: everything is in the page, nothing is asked of anybody. */

import { Charts, SINCE_START } from "/page/charts.js";
import { dollars, number, percent, since, span } from "/page/words.js";

const $ = (id) => document.getElementById(id);
const report = JSON.parse($("report").textContent);

function element(name, text, className) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}

function row(table, ...cells) {
  const made = $(table).tBodies[0].appendChild(element("tr"));
  cells.forEach((text, n) => made.append(element(n ? "td" : "th", text, n ? "n" : "")));
  made.firstChild.scope = "row";
}

function tile(name, value, more, bad = false) {
  const made = $("strip").appendChild(element("div", undefined, "tile"));
  made.append(element("span", name, "name"), element("strong", value, bad ? "bad" : ""), element("span", more, "more"));
}

const seconds = (s) => (s == null ? "–" : number(s, s < 1 ? 4 : s < 100 ? 3 : 1));
const words = (name) => name.replaceAll("_", " ");

function showStrip() {
  const { requests, objective, latency_s: latency, throughput, cost_usd: usd, cost } = report;
  const goal = report.policy?.began_as?.goal;
  const short = goal != null && objective.met_share != null && objective.met_share < goal;
  tile("in time", percent(objective.met_share), goal == null ? `${number(objective.missed)} missed` : `goal ${percent(goal)}`, short);
  tile("requests", number(requests.sent), requests.failed ? `${number(requests.failed)} failed` : "none failed", requests.failed > 0);
  tile("first token, mean", span(latency.ttft.mean), `p99 ${span(latency.ttft.p99)}`);
  tile("per output token, mean", latency.tpot.mean == null ? "–" : `${number(1e3 * latency.tpot.mean, 1)} ms`, latency.tpot.p99 == null ? "" : `p99 ${number(1e3 * latency.tpot.p99, 1)} ms`);
  tile("output tokens a second", number(throughput.output_tokens_s, 1), `${number(throughput.requests_s, 2)} requests a second`);
  tile("cost", dollars(usd.total), cost.usd_per_1m_output_tokens == null ? cost.why_unknown ?? "" : `${dollars(cost.usd_per_1m_output_tokens)} per million tokens`);
}

function showTables() {
  const columns = Object.keys(report.latency_s.ttft);
  const head = $("latency").tHead.appendChild(element("tr"));
  for (const name of ["", ...columns]) head.append(Object.assign(element("th", name, name ? "n" : ""), { scope: "col" }));
  for (const [name, values] of Object.entries(report.latency_s)) {
    row("latency", report.words[name]?.[0] ?? name, ...columns.map((column) => seconds(values[column])));
  }
  const { requests, tokens, objective, throughput, scaling } = report;
  for (const name of ["sent", "completed", "failed", "retried"]) row("requests", name, number(requests[name]));
  for (const [kind, n] of Object.entries(requests.failed_by_kind)) row("requests", `failed: ${words(kind)}`, number(n));
  for (const [kind, n] of Object.entries(objective.missed_by ?? {})) row("requests", `not in time: ${words(kind)}`, number(n));
  row("requests", "prompt tokens", number(tokens.prompt));
  row("requests", "output tokens", number(tokens.output));
  for (const [name, value] of Object.entries(throughput)) row("requests", report.words[name]?.[0] ?? words(name), number(value, 2));
  const names = { total: "in all", hot_working: "hot and working", hot_idle: "hot and idle", loading: "booting and loading", stopped: "stopped, on disk", lost: "machines that failed", traffic: "bytes in and out", if_all_hot: "if every instance were hot all the time" };
  for (const [name, said] of Object.entries(names)) row("money", said, dollars(report.cost_usd[name]));
  row("money", "per 1,000 requests", dollars(report.cost.usd_per_1k_requests));
  row("money", "utilisation", percent(report.cost.utilisation));
  for (const name of ["starts", "stops", "creates", "destroys"]) row("money", name, number(scaling[name]));
  row("money", "order to hot, mean", span(scaling.order_to_hot_s.mean));
  for (const point of report.curve?.curve ?? []) row("money", `${percent(point.met)} in time would have cost a day`, dollars(point.usd_day));
}

function showRun() {
  row("run", "engine", report.engine);
  row("run", "length", since(report.duration_s));
  row("run", "seed", String(report.seed));
  for (const [name, value] of Object.entries(report.settings)) {
    if (value != null) row("run", words(name), typeof value === "object" ? JSON.stringify(value) : String(value));
  }
  for (const sentence of report.beginning?.sentences ?? []) row("run", "began with", sentence);
  for (const [name, meaning] of Object.values(report.words)) $("words").append(element("dt", name), element("dd", meaning));
}

function showCharts() {
  const fleet = report.over_time.fleet;
  if (!fleet || !fleet.at_s.length) {
    $("pictures").hidden = true;
    return;
  }
  const charts = new Charts((from, to) => charts.draw(from == null ? fleet : { ...fleet, from, to }), SINCE_START, report.over_time.requests);
  charts.draw(fleet);
}

$("where").textContent = `${report.engine}, ${since(report.duration_s)} long${report.interrupted ? ", interrupted" : ""}`;
if (report.local) $("where").textContent += ". No GPU was used: times and prices are those of the local cloud, not of real machines.";
$("trouble").hidden = !report.beginning?.too_small;
$("trouble").textContent = report.beginning?.sentences.find((s) => s.includes("too small")) ?? "";
showStrip();
showTables();
showRun();
showCharts();
