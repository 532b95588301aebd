"""The page's markup, style and script; `page.render` fills in the data. Nothing is loaded from elsewhere."""

TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>@TITLE@</title>
<style>
:root { color-scheme: light dark; --ink: #1c1b1a; --quiet: #6c6862; --paper: #fbfaf7; --line: #d9d4ca; --red: #b3261e }
@media (prefers-color-scheme: dark) {
  :root { --ink: #ece8e1; --quiet: #a09a90; --paper: #191817; --line: #3a3733; --red: #ff7a70 } }
body { margin: 2rem auto; max-width: 84rem; padding: 0 1.2rem; background: var(--paper); color: var(--ink);
       font: 15px/1.5 system-ui, sans-serif }
h1 { font-size: 1.1rem; margin: 0 } h2 { font-size: 1rem; margin: 2rem 0 .5rem }
.verdict { font-weight: 700; font-size: 1.7rem }
.single-op, .systematic { color: var(--red) } .clean, .noise { color: #2f7d4f }
.invalid, .inconclusive { color: #b07a00 }
.quiet { color: var(--quiet) } .scroll { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .12rem .5rem; text-align: right; white-space: nowrap } th { font-weight: 600 }
td:first-child, th:first-child { text-align: left }
#taps tr { cursor: pointer }
#taps tbody tr:hover, tr.chosen { background: color-mix(in srgb, var(--line) 50%, transparent) }
#map td { width: 1.05rem; height: 1.05rem; padding: 0; border: 1px solid var(--paper); cursor: pointer }
#map th { font-weight: 400; padding: 0 .4rem; font-size: .8rem } #map td.first { outline: 3px solid var(--red) }
#map td.none { cursor: default } tr.broken td:first-child { color: var(--red); font-weight: 600 }
svg { max-width: 100%; height: auto } .axis { stroke: var(--line) } .curve { fill: none; stroke-width: 1.5 }
text { fill: var(--quiet); font-size: 11px } label { margin-right: 1rem }
</style>
</head>
<body>
<h1 class="quiet">engine parity</h1>
<p class="verdict @VERDICT@" id="verdict">@VERDICT@</p>
<p id="sentence">@SENTENCE@</p>
<p class="quiet" id="about"></p>
<h2>Layers and operations</h2>
<p><label><input type="radio" name="shade" value="local" checked> local error over its floor</label>
<label><input type="radio" name="shade" value="whole"> whole error |a-b| / |b|</label></p>
<div class="scroll"><table id="map"></table></div>
<p class="quiet" id="legend"></p>
<h2 id="tapname">Choose a cell</h2>
<div id="detail"></div>
<h2>All taps</h2>
<div class="scroll"><table id="taps"><thead><tr><th>tap</th><th>class</th><th>type</th><th>|a-b|/|b|</th>
<th>|a|/|b|</th><th>cosine</th><th>max |a-b|</th><th>local</th><th>floor</th><th>by</th><th>aligned</th></tr></thead>
<tbody></tbody></table></div>
<h2>Notes</h2>
<ul id="notes"></ul>
<script type="application/json" id="data">@DATA@</script>
<script>
"use strict";
const { report, curves } = JSON.parse(document.getElementById("data").textContent);
const byName = new Map(report.taps.map(tap => [tap.name, tap]));
const firstName = report.first ? report.first.tap : null;
const number = x => x === null || x === undefined ? "\\u2013" : x === 0 ? "0" :
  Math.abs(x) < 1e-3 || Math.abs(x) >= 1e5 ? Number(x).toExponential(2) : Number(x).toPrecision(3);
const element = (tag, text, parent, set = {}) => {
  const made = Object.assign(document.createElement(tag), set);
  if (text !== null) made.textContent = text;
  parent.append(made);
  return made;
};
const engines = report.engines;
document.getElementById("about").textContent =
  `${engines.ours || "ours"} against ${engines.reference || "the reference"}; ${report.model || "model not named"}, ` +
  `${report.tokens} tokens, ${report.taps.length} taps. Local divergence: spread over layers ` +
  `${report.axes.spread.toFixed(2)}, peak ${number(report.axes.peak)}.`;

// One scale for both views: decades, from "as good as equal" to "nothing left".
const scales = { local: [0, 6, tap => tap.noise_floor ? Math.log10(tap.local_relative_l2 / tap.noise_floor) : -9],
                 whole: [-7, 0, tap => tap.relative_l2 ? Math.log10(tap.relative_l2) : -9] };
const colour = (tap, view) => {
  const [low, high, of] = scales[view];
  const share = Math.min(1, Math.max(0, (of(tap) - low) / (high - low)));
  return `hsl(${140 - 140 * Math.min(1, share * 1.6)} ${35 + 40 * share}% ${72 - 34 * share}%)`;
};
const layers = [...new Set(report.taps.map(tap => tap.layer).filter(layer => layer !== null))].sort((a, b) => a - b);
// Operations in the order of execution: where, on the average of its layers, each comes in its layer; those that
// only some layers have together, so that a kind of layer stays in one piece.
const places = new Map(), within = new Map();
for (const layer of layers) {
  const own = report.taps.filter(tap => tap.layer === layer);
  own.forEach((tap, i) => {
    places.set(tap.op, [...(places.get(tap.op) || []), i / own.length]);
    within.set(tap.op, `${within.get(tap.op) || ""} ${layer}`);
  });
}
const mean = values => values.reduce((a, b) => a + b, 0) / values.length;
const place = op => mean(places.get(op));
const kin = op => [...places.keys()].filter(other => within.get(other) === within.get(op));
const band = op => places.get(op).length === layers.length ? place(op) : mean(kin(op).map(place));
const ops = [...places.keys()].sort((a, b) => band(a) - band(b) || place(a) - place(b));
const ends = report.taps.filter(tap => tap.layer === null);
const start = ends.filter(tap => report.taps.indexOf(tap) < report.taps.findIndex(other => other.layer !== null));
function drawMap(view) {
  const map = document.getElementById("map");
  map.textContent = "";
  const head = element("tr", null, map);
  element("th", "operation", head);
  for (const layer of layers) element("th", layer, head);
  const cell = (tap, row) => {
    const made = element("td", "", row, { title: tap ? `${tap.name}: local ${number(tap.local_relative_l2)}, ` +
      `floor ${number(tap.noise_floor)}, whole ${number(tap.relative_l2)}` : "", className: tap ? "" : "none" });
    if (!tap) return;
    made.style.background = colour(tap, view);
    made.dataset.tap = tap.name;
    if (tap.name === firstName) made.classList.add("first");
    made.onclick = () => choose(tap.name);
  };
  const lone = tap => {
    const row = element("tr", null, map);
    element("th", tap.name, row);
    cell(tap, row);
  };
  start.forEach(lone);
  for (const op of ops) {
    const row = element("tr", null, map);
    element("th", op, row);
    for (const layer of layers) cell(byName.get(`${op}-${layer}`), row);
  }
  ends.filter(tap => !start.includes(tap)).forEach(lone);
  document.getElementById("legend").textContent = view === "local"
    ? "Green: within the computed noise floor. Red: a million times above it. Outlined: the first broken operation."
    : "Green: 1e-7 and below. Red: 1 and above. Outlined: the first broken operation.";
}
function plot(title, lines, axis, parent) {
  const width = 620, height = 190, left = 54, bottom = 24, top = 20;
  const shown = lines.filter(line => line.values && line.values.length);
  if (!shown.length) return;
  const all = shown.flatMap(line => line.values).filter(v => v > 0);
  const high = all.length ? Math.ceil(Math.log10(Math.max(...all))) : 0;
  const low = all.length ? Math.max(high - 9, Math.floor(Math.log10(Math.min(...all)))) : -1;
  const span = Math.max(1, high - low);
  const y = v => top + (height - top - bottom) * (high - Math.max(low, v > 0 ? Math.log10(v) : low)) / span;
  const x = (i, n) => left + (width - left - 12) * (n > 1 ? i / (n - 1) : 0.5);
  const space = "http://www.w3.org/2000/svg";
  const svg = document.createElementNS(space, "svg");
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.setAttribute("width", width);
  const draw = (tag, set, text) => {
    const made = document.createElementNS(space, tag);
    for (const [key, value] of Object.entries(set)) made.setAttribute(key, value);
    if (text !== undefined) made.textContent = text;
    svg.append(made);
  };
  draw("text", { x: left, y: 13 }, title);
  for (let decade = low; decade <= high; decade += Math.max(1, Math.ceil(span / 5))) {
    draw("line", { class: "axis", x1: left, x2: width - 12, y1: y(10 ** decade), y2: y(10 ** decade) });
    draw("text", { x: left - 6, y: y(10 ** decade) + 4, "text-anchor": "end" }, `1e${decade}`);
  }
  draw("text", { x: width - 12, y: height - 6, "text-anchor": "end" }, axis);
  const inks = ["#8a857c", "#c4453a"];
  shown.forEach((line, index) => {
    const n = line.values.length;
    const points = line.values.map((v, i) => `${x(i, n).toFixed(1)},${y(v).toFixed(1)}`);
    if (n > 1) draw("polyline", { class: "curve", stroke: inks[index], points: points.join(" ") });
    else draw("circle", { cx: x(0, 1), cy: y(line.values[0]), r: 3, fill: inks[index] });
    draw("text", { x: left + 190 + 110 * index, y: 13, style: `fill: ${inks[index]}` }, line.name);
  });
  parent.append(svg);
}
function choose(name) {
  const tap = byName.get(name), curve = curves[name] || {}, detail = document.getElementById("detail");
  document.getElementById("tapname").textContent = name;
  detail.textContent = "";
  const what = [tap.weight ? `${tap.weight}${tap.qtype ? ` (${tap.qtype})` : ""}` : tap.class,
    `local ${number(tap.local_relative_l2)} against a floor of ${number(tap.noise_floor)} (${tap.method})`,
    `|a-b|/|b| ${number(tap.relative_l2)}`, `|a|/|b| ${number(tap.norm_ratio)}`, `cosine ${number(tap.cosine)}`,
    `largest |a-b| ${number(tap.max_abs)} at [${tap.max_at}]`];
  element("p", what.join("; "), detail, { className: "quiet" });
  plot("by token", [{ name: "whole", values: curve.tokens }, { name: "local", values: curve.local }],
    "token", detail);
  plot("by head or channel group", [{ name: "whole", values: curve.heads }], "head", detail);
  const rows = document.querySelectorAll("#taps tbody tr");
  for (const row of rows) row.classList.toggle("chosen", row.dataset.tap === name);
}
const body = document.querySelector("#taps tbody");
for (const tap of report.taps) {
  const row = element("tr", null, body, { className: tap.broken ? "broken" : "", onclick: () => choose(tap.name) });
  row.dataset.tap = tap.name;
  for (const text of [tap.name, tap.class, tap.qtype || "", number(tap.relative_l2), number(tap.norm_ratio),
    number(tap.cosine), number(tap.max_abs), number(tap.local_relative_l2), number(tap.noise_floor), tap.method,
    tap.aligned]) element("td", text, row);
}
const notes = document.getElementById("notes");
const lone = side => report.unmatched[side].length ? [`only in ${side}: ${report.unmatched[side].join(", ")}`] : [];
for (const note of [...report.notes, ...lone("ours"), ...lone("reference")]) element("li", note, notes);
for (const choice of document.querySelectorAll("input[name=shade]")) choice.onchange = () => drawMap(choice.value);
drawMap("local");
if (firstName && byName.has(firstName)) choose(firstName);
else if (report.taps.length) choose(report.taps[report.taps.length - 1].name);
</script>
</body>
</html>
"""
