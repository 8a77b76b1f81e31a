/* The operator's page: asks GET /overview and GET /history every two seconds and shows what they say. */

import { Charts } from "/page/charts.js";
import { clock, dollars, moment, number, percent, span } from "/page/words.js";

const EVERY_MS = 2000;
const ROWS = 200; /* instances shown at once; Find narrows them down */
const $ = (id) => document.getElementById(id);
const token = document.querySelector("meta[name=page-token]").content;

let key = sessionStorage.getItem("operator-key");
let rangeS = null; /* seconds; chosen by how much there is when the page opens */
let zoomed = null;
let overview = null;
let opened = null;
let curve = { curve: [] };

/* -- asking ----------------------------------------------------------------------------------------- */

async function ask(path, method = "GET", body = undefined) {
  const headers = { "X-Page-Token": token };
  if (key) headers.Authorization = `Bearer ${key}`;
  if (method !== "GET") {
    body ??= {};
    headers["Content-Type"] = "application/json"; /* the server takes nothing else from a browser */
  }
  const answer = await fetch(path, { method, headers, body: body === undefined ? undefined : JSON.stringify(body), cache: "no-store", credentials: "omit", signal: AbortSignal.timeout(15000) });
  if (answer.status === 401) {
    await askForKey();
    return ask(path, method, body);
  }
  const said = await answer.json();
  if (!answer.ok) throw Object.assign(new Error(said.message), { status: answer.status });
  return said;
}

async function askForKey() {
  const dialog = $("key");
  if (!dialog.open) dialog.showModal();
  await new Promise((done) => dialog.addEventListener("close", done, { once: true }));
  key = $("key-value").value;
  $("key-value").value = "";
  sessionStorage.setItem("operator-key", key);
}

async function sure(what, means) {
  const dialog = $("ask");
  $("ask-what").textContent = what;
  $("ask-means").textContent = means;
  dialog.returnValue = "no";
  dialog.showModal();
  await new Promise((done) => dialog.addEventListener("close", done, { once: true }));
  return dialog.returnValue === "yes";
}

/* -- showing ---------------------------------------------------------------------------------------- */

function say(id, text) {
  const at = $(id);
  if (at.textContent !== text) at.textContent = text;
}

function element(name, text, className) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}

function showStrip(o) {
  const goal = o.policy.goal, now = o.latest;
  say("s-time", o.in_time == null ? "–" : percent(o.in_time));
  $("s-time").classList.toggle("bad", goal != null && o.in_time != null && o.in_time < goal);
  say("s-time-more", goal == null ? "no goal: policy " + o.policy.name : `goal ${percent(goal)}`);
  say("s-hot", now ? `${now.hot} / ${now.wanted_hot}` : "–");
  say("s-hot-more", now ? `${now.booting} coming, ${now.cold} cold` : "");
  say("s-load", now ? number(now.offered, 2) : "–");
  say("s-wait", now ? number(now.held) : "–");
  say("s-wait-more", now && now.held ? `oldest ${span(now.oldest_wait_s)}` : "nobody waits");
  say("s-usd", now ? dollars(now.usd_h) : "–");
  say("s-usd-more", `of at most ${dollars(o.limits.usd_h)}`);
  say("s-today", dollars(o.money.today.total));
  say("s-today-more", `yesterday ${dollars(o.money.yesterday.total)}`);
  say("s-turn", span(o.health.last_good_turn_age_s));
  const wrong = [...(o.health.status === "ok" ? [] : [o.health.message]), ...o.wrong];
  $("trouble").hidden = !wrong.length;
  say("trouble", wrong.map((one) => `${one[0].toUpperCase()}${one.slice(1)}.`).join(" "));
}

function showMoney(o) {
  const names = { hot_working: "hot and working", hot_idle: "hot and idle", loading: "booting and loading", stopped: "stopped, on disk", lost: "machines that failed", traffic: "bytes in and out", total: "in all" };
  const body = $("money").tBodies[0];
  for (const [name, words] of Object.entries(names)) {
    const row = $(`m-${name}`) || body.appendChild(Object.assign(element("tr"), { id: `m-${name}` }));
    if (!row.cells.length) row.append(element("td", words), element("td", "", "n"), element("td", "", "n"));
    row.cells[1].textContent = dollars(o.money.today[name]);
    row.cells[2].textContent = dollars(o.money.yesterday[name]);
  }
  const since = o.money.known_from == null ? "" : `Known since ${moment(o.money.known_from)}.`;
  const { budgets, credit } = o.money;
  const lasts = credit.hours_left == null ? "" : `, which lasts ${span(credit.hours_left * 3600)} at this rate`;
  const said = Object.entries(budgets).map(([name, b]) => `${dollars(b.spent_usd)} of the ${name}’s ${dollars(b.limit_usd)} are spent and ${dollars(b.bound_usd)} bound to be; at this rate it will be ${dollars(b.forecast_usd)}.`);
  if (credit.usd != null) said.push(`The account has ${dollars(credit.usd)}${lasts}.`);
  for (const p of o.money.price_increases) said.push(`The host of ${p.instance} asks for ${dollars(p.new_usd_h)} an hour instead of ${dollars(p.old_usd_h)}: ${p.verdict}.`);
  for (const d of o.money.reconciled) said.push(`${moment(d.day)}: the account was charged ${dollars(d.charged_usd)}, the ledger has ${dollars(d.ledger_usd)}.`);
  say("budgets", said.join(" "));
  say("month", o.money.month_usd == null ? since : `A month like the last day costs ${dollars(o.money.month_usd)}. ${since}`);
}

const cells = (i) => [
  null,
  null,
  span(i.seconds_in_state),
  `${i.num_gpus > 1 ? i.num_gpus + " × " : ""}${i.gpu_name || "?"}`,
  dollars(i.price_usd_h),
  dollars(i.usd_per_million_work),
  null,
  number(i.requests),
  number(i.failures),
];

function showInstances(o) {
  const body = $("instances").tBodies[0];
  const wanted = $("find").value.trim().toLowerCase();
  const all = o.instances.filter((i) => `${i.id} ${i.label} ${i.state} ${i.gpu_name} ${i.machine_id} ${i.why}`.toLowerCase().includes(wanted));
  const shown = all.slice(0, ROWS);
  say("count", `${o.instances.length} of at most ${o.limits.instances}${all.length > shown.length ? `; the first ${ROWS} of ${all.length} are shown` : ""}`);
  const there = new Set(shown.map((i) => i.label));
  for (const row of [...body.rows]) if (row.dataset.label && !there.has(row.dataset.label)) row.remove();
  const rows = new Map([...body.rows].map((row) => [row.dataset.label, row]));
  for (const i of shown) {
    const row = rows.get(i.label) || newRow(body, i);
    const texts = cells(i);
    texts.forEach((text, n) => {
      if (text !== null && row.cells[n].textContent !== text) row.cells[n].textContent = text;
    });
    const state = row.cells[1].firstChild;
    const word = i.taken_out && i.state !== "draining" ? `${i.state}, ${i.taken_out} asked` : i.state;
    if (state.textContent !== word) Object.assign(state, { textContent: word, className: `state ${i.state}` });
    row.cells[1].title = i.why;
    const share = i.throughput_work_s > 0 ? Math.min(1, i.work / (i.throughput_work_s * o.fleet.hold_s)) : 0;
    const meter = row.cells[6].firstChild;
    meter.value = share;
    meter.title = meter.textContent = `${number(i.work)} of ${number(i.throughput_work_s * o.fleet.hold_s)} units of work`;
  }
  if (opened && !there.has(opened.label)) close();
  say("gone", o.gone.length ? `Gone lately: ${o.gone.slice(0, 5).map((i) => `${i.id ?? i.label} (${i.why})`).join("; ")}` : "");
}

function newRow(body, i) {
  const row = body.appendChild(element("tr"));
  row.dataset.label = i.label;
  const button = element("button", i.id ?? "ordered", "link");
  button.setAttribute("aria-expanded", "false");
  button.addEventListener("click", () => toggle(i.label, row));
  for (let n = 0; n < 9; n++) row.append(element("td", undefined, [4, 5, 7, 8].includes(n) ? "n" : ""));
  row.cells[0].append(button);
  row.cells[1].append(element("span", i.state, `state ${i.state}`));
  row.cells[6].append(element("meter"));
  return row;
}

/* -- one instance opened ---------------------------------------------------------------------------- */

function close() {
  opened.row.remove();
  document.querySelector(`#instances tr[data-label="${CSS.escape(opened.label)}"] button`)?.setAttribute("aria-expanded", "false");
  opened = null;
}

async function toggle(label, row) {
  const was = opened && opened.label;
  if (opened) close();
  if (was === label) return;
  const i = overview.instances.find((one) => one.label === label);
  const more = element("tr", undefined, "opened");
  const cell = more.appendChild(element("td"));
  cell.colSpan = 9;
  row.after(more);
  row.querySelector("button").setAttribute("aria-expanded", "true");
  opened = { label, row: more };
  cell.append(element("p", `${i.label}: ${i.state} since ${moment(i.since)}, because: ${i.why || "–"}`));
  cell.append(element("p", `machine ${i.machine_id ?? "?"}${i.address ? `, ${i.address}` : ""}, ${dollars(i.running_usd_h)} an hour while it runs, ${dollars(i.stopped_usd_h)} stopped${i.contract_ends == null ? "" : `, contract until ${moment(i.contract_ends)}`}, ${number(i.throughput_work_s)} units of work a second`, "hint"));
  const log = cell.appendChild(element("details"));
  log.append(element("summary", "What its engine wrote before it was ready"));
  log.addEventListener("toggle", () => log.open && !log.dataset.asked && showLog(log, i));
  const costs = await ask(`/costs?from=${overview.now - 86400}`).catch((e) => ({ intervals: [], message: e.message }));
  const own = costs.intervals.filter((s) => s.label === label);
  if (own.length) cell.append(...timeline(own, overview.now));
  const buttons = cell.appendChild(element("div", undefined, "buttons"));
  for (const [act, what, means] of [
    ["drain", "Drain", "Its requests end first; then it is stopped, and keeps the model on its disk."],
    ["replace", "Replace", "Its requests end first; then it is destroyed with its disk, and another is rented in its place."],
    ["destroy", "Destroy", "It ends at once, with its disk and all requests on it."],
  ]) {
    const button = buttons.appendChild(element("button", `${what} …`));
    button.addEventListener("click", () => act_on(`/instances/${i.id}/${act}`, `${what} instance ${i.id}?`, means));
  }
  if (i.machine_id != null) {
    const button = buttons.appendChild(element("button", "Ban its machine …"));
    button.addEventListener("click", () => act_on(`/machines/${i.machine_id}/ban`, `Rent machine ${i.machine_id} no more for a day?`, "What is rented there now stays.", {}));
  }
}

async function showLog(at, i) {
  at.dataset.asked = "yes";
  const lines = at.appendChild(element("pre", "asking the instance over ssh …"));
  lines.tabIndex = 0;
  const said = await ask(`/log?instance=${i.id}`).catch((e) => ({ lines: [e.message] }));
  lines.textContent = said.lines.join("\n") || "nothing yet";
  if (said.ready) at.append(element("p", `What it wrote later may quote prompts, so it does not come here: python autoscaler_server.py logs ${i.id}`, "hint"));
}

function timeline(own, now) {
  const begin = Math.max(now - 86400, own[0].from);
  const bar = element("div", undefined, "timeline");
  bar.setAttribute("role", "img");
  bar.setAttribute("aria-label", own.map((s) => `${s.state} from ${clock(s.from)}`).join(", "));
  for (const s of own) {
    const part = bar.appendChild(element("i", undefined, s.state));
    part.style.flexGrow = Math.max(0, (s.to ?? now) - Math.max(begin, s.from));
    part.title = `${s.state} ${clock(s.from)} to ${s.to == null ? "now" : clock(s.to)}: ${s.why}`;
  }
  const list = element("ul");
  for (const s of own.slice(-6).reverse()) {
    list.append(element("li", `${clock(s.from)} ${s.state} for ${span((s.to ?? now) - s.from)}, ${dollars(s.usd)}: ${s.why}`));
  }
  return [bar, list];
}

async function act_on(path, question, means, body = undefined, method = "POST") {
  if (!(await sure(question, means))) return;
  try {
    await ask(path, method, body);
  } catch (e) {
    $("trouble").hidden = false;
    say("trouble", `Not done: ${e.message}`);
    return;
  }
  refresh();
}

/* -- decisions, bans, goal -------------------------------------------------------------------------- */

function showDecisions(o) {
  const list = $("decisions");
  const have = new Map([...list.children].map((li) => [li.dataset.at, li]));
  const all = [...o.decisions, ...o.acts.map((a) => ({ at: a.at, by: a.who, sentence: `${a.did}.`, orders: [] }))].sort((a, b) => b.at - a.at);
  const wanted = all.map((d) => have.get(String(d.at)) || decided(d));
  const same = wanted.length === list.children.length && wanted.every((li, n) => li === list.children[n]);
  if (!same) list.replaceChildren(...wanted);
}

function decided(d) {
  const li = element("li");
  li.dataset.at = d.at;
  const button = element("button", clock(d.at), "link");
  button.setAttribute("aria-label", `mark ${clock(d.at)} in the charts`);
  button.addEventListener("click", () => {
    for (const other of $("decisions").children) other.removeAttribute("aria-current");
    const again = charts.marked === d.at;
    if (!again) li.setAttribute("aria-current", "true");
    charts.mark(again ? null : d.at);
  });
  li.append(button, " ");
  if (d.by) li.append(element("b", `${d.by}: `));
  li.append(d.sentence);
  if (d.orders.length) {
    const orders = li.appendChild(element("ul"));
    for (const c of d.orders) {
      const one = orders.appendChild(element("li"));
      one.append(element("b", c.do), ` ${c.label ? c.label.split("/").pop() : ""}: ${c.why}`);
      if (c.evidence) one.append(element("div", c.evidence, "evidence"));
    }
  }
  return li;
}

function showBans(o) {
  const shown = JSON.stringify(o.bans);
  if ($("bans").dataset.shown === shown) return;
  $("bans").dataset.shown = shown;
  $("bans").replaceChildren(...o.bans.map((b) => {
    const li = element("li", `${b.machine} until ${moment(b.until)}: ${b.evidence}`);
    const button = li.appendChild(element("button", "Forgive …"));
    button.addEventListener("click", () => act_on(`/machines/${b.machine}/forgive`, `Rent machine ${b.machine} again?`, b.evidence));
    return li;
  }));
  if (!o.bans.length) $("bans").append(element("li", "none", "hint"));
}

function showGoal(o) {
  const goal = o.policy.goal;
  const has = o.curve.curve !== undefined && o.curve.curve.length > 1;
  const why = has || goal == null ? "" : ` What other goals would cost is not known: ${o.curve.message}.`;
  say("goal-now", goal == null ? `The policy is ${o.policy.name}, which has no goal.` : `${percent(goal)} of requests in time.${why}`);
  $("goal-choice").hidden = !has;
  $("goal-plain").hidden = has || goal == null;
  if (!has || o.curve.at === curve.at) return;
  curve = { ...o.curve, curve: [...o.curve.curve].sort((a, b) => a.met - b.met) };
  $("goal").max = curve.curve.length - 1;
  const near = curve.curve.findIndex((p) => p.met >= curve.goal);
  $("goal").value = near < 0 ? curve.curve.length - 1 : near;
  sayGoal();
}

function sayGoal() {
  const p = curve.curve[$("goal").value];
  say("goal-says", `${percent(p.met)} in time would have cost ${dollars(p.usd_day)} a day (replay of ${number(curve.hours, 1)} h, ${number(curve.requests)} requests).`);
}

/* -- what if, market --------------------------------------------------------------------------------- */

let whatIfShown = "";

function showWhatIf(w) {
  const shown = JSON.stringify(w);
  if (shown === whatIfShown) return;
  whatIfShown = shown;
  const said = { none: "", done: "", running: `playing, ${span(w.seconds)} so far …`, failed: `Not played: ${w.message}` };
  say("what-if-says", said[w.state]);
  const { now, then } = w.sides ?? {};
  $("what-if-sides").hidden = !now;
  if (!now) return;
  const rows = [
    ["in time", (s) => percent(s.met)],
    ["dollars a day", (s) => dollars(s.usd_day)],
    ["first token, p50 / p95 / p99", (s) => ["p50", "p95", "p99"].map((p) => span(s.ttft_s[p], 2)).join(" / ")],
    ["whole answer, p50 / p95", (s) => ["p50", "p95"].map((p) => span(s.e2e_s[p])).join(" / ")],
    ["most hot at once", (s) => number(s.most_hot)],
    ["starts", (s) => number(s.starts)],
    ["requests, failed", (s) => `${number(s.requests)}, ${number(s.failed)}`],
    ["hours played", (s) => number(s.hours, 1)],
  ];
  const cells = rows.map(([name, of]) => {
    const row = element("tr");
    row.append(element("th", name), element("td", of(now), "n"), element("td", then ? of(then) : "…", "n"));
    row.firstChild.scope = "row";
    return row;
  });
  const reports = element("tr");
  reports.append(element("th", "whole report"), ...["now", "then"].map((side) => {
    const cell = element("td", undefined, "n");
    const button = cell.appendChild(element("button", "save"));
    button.disabled = !w.sides[side];
    button.setAttribute("aria-label", `save the report of the fleet ${side === "now" ? "as it is" : "as you asked"}`);
    button.addEventListener("click", () => saveReport(side));
    return cell;
  }));
  $("what-if-sides").tBodies[0].replaceChildren(...cells, reports);
}

async function saveReport(side) {
  const answer = await fetch(`/what-if/${side}.html`, { headers: key ? { Authorization: `Bearer ${key}` } : {}, cache: "no-store" });
  const link = element("a");
  link.href = URL.createObjectURL(await answer.blob());
  link.download = `what-if-${side}.html`;
  link.click();
  URL.revokeObjectURL(link.href);
}

$("what-if").addEventListener("submit", async (event) => {
  event.preventDefault();
  const form = new FormData(event.target), asked = {};
  for (const [name, value] of form) if (value) asked[name] = name === "gpu" ? value.trim() : Number(value);
  if (asked.goal) asked.goal /= 100;
  try {
    showWhatIf(await ask("/what-if", "POST", asked));
  } catch (e) {
    say("what-if-says", `Not played: ${e.message}`);
  }
});

$("market-look").addEventListener("click", async () => {
  const button = $("market-look");
  button.disabled = true;
  try {
    const found = await ask("/market");
    $("market").hidden = false;
    $("market").querySelector("tbody").replaceChildren(...found.offers.map((o) => {
      const row = element("tr");
      row.append(
        element("td", `${o.num_gpus > 1 ? `${o.num_gpus} x ` : ""}${o.gpu_name}`),
        element("td", dollars(o.usd_per_million_work), "n"),
        element("td", dollars(o.usd_h), "n"),
        element("td", o.place ?? "–"),
        element("td", percent(o.reliability), "n"),
        element("td", `${o.machine}${o.avoided ? ", not rented" : ""}`),
      );
      return row;
    }));
    button.textContent = `Look again (${clock(found.at)}: ${found.found} offers)`;
  } catch (e) {
    button.textContent = `Look again (${e.message})`;
  }
  button.disabled = false;
});

for (const button of $("latencies").children) {
  button.addEventListener("click", () => {
    for (const one of $("latencies").children) one.setAttribute("aria-pressed", String(one === button));
    charts.show(button.dataset.which);
  });
}

/* -- the loop --------------------------------------------------------------------------------------- */

const charts = new Charts((from, to) => {
  zoomed = from == null ? null : [from, to];
  refresh();
});

async function refresh() {
  try {
    overview = await ask("/overview");
    if (rangeS === null) choose(overview.money.known_from > overview.now - 1200 ? 300 : 3600);
    const to = zoomed ? zoomed[1] : overview.now, from = zoomed ? zoomed[0] : overview.now - rangeS;
    const history = await ask(`/history?from=${from}&to=${to}&points=${Math.min(800, Math.max(120, Math.round(innerWidth / 3)))}`);
    const o = overview;
    document.title = `${o.fleet.label}: ${o.latest ? o.latest.hot : 0} hot`;
    say("title", `${o.fleet.label} · ${o.fleet.model}`);
    $("cloud").hidden = !o.fleet.local;
    if (o.fleet.local) $("cloud").href = o.fleet.cloud;
    say("where", `${o.fleet.local ? "local cloud" : "Vast.ai"}${o.fleet.speedup > 1 ? `, ${o.fleet.speedup} times faster than life` : ""}${o.manage ? "" : ", only watched: nothing is ordered"}`);
    showStrip(o);
    showMoney(o);
    showInstances(o);
    showDecisions(o);
    showBans(o);
    showWhatIf(o.what_if);
    say("measured", `Measured here: ${span(o.start_s)} from start to hot, ${span(o.load_s)} from order to hot.`);
    say("latency-says", o.latest?.answers ? `${number(o.latest.answers)} answers in the last minute, ${number(o.latest.answers_late)} of them not in time; by what clients told.` : "No client told of an answer in the last minute.");
    charts.draw(history);
    say("live", `live, ${clock(o.now)}`);
    $("live").className = "";
    showGoal(o);
  } catch (e) {
    say("live", `no answer: ${e.message}`);
    $("live").className = "lost";
  }
}

function choose(seconds) {
  rangeS = seconds;
  zoomed = null;
  for (const button of $("ranges").children) button.setAttribute("aria-pressed", String(Number(button.dataset.s) === seconds));
}

for (const button of $("ranges").children) {
  button.addEventListener("click", () => {
    choose(Number(button.dataset.s));
    refresh();
  });
}
$("find").addEventListener("input", () => overview && showInstances(overview));
$("goal").addEventListener("input", sayGoal);
$("goal-apply").addEventListener("click", () => applyGoal(Math.min(0.99999, Math.max(0.5, curve.curve[$("goal").value].met))));

$("goal-plain").addEventListener("submit", (event) => {
  event.preventDefault();
  applyGoal(Number(new FormData(event.target).get("goal")) / 100);
});

function applyGoal(goal) {
  act_on("/policy", `Keep ${percent(goal)} of requests in time from now on?`, "The level follows with the next replay.", { name: "objective", params: { goal } }, "PUT");
}

async function loop() {
  if (!document.hidden) await refresh();
  setTimeout(loop, EVERY_MS);
}
loop();
