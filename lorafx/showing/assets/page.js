"use strict";
// The page of lorafx.show: a history of graphs, stage by stage. Only what is open is drawn, so that large ones open fast.

const data = JSON.parse(document.getElementById("content").textContent);
const $ = (id) => document.getElementById(id);
const DRAWN = 250; // operators that are laid out as a picture at most
const OPEN = 400; // rows up to which groups stand open

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value !== undefined) made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

// --- what there is -------------------------------------------------------------------------------------------------

const lines = data.lines.map((row) => Object.fromEntries(data.fields.map((field, i) => [field, row[i]])));
const keys = new Map(); // lines that read the same are one, whatever a pass has noted about them
for (const line of lines) {
  const text = [line.name, line.code, line.shape, line.dtype].join("\n");
  if (!keys.has(text)) keys.set(text, keys.size);
  line.key = keys.get(text);
}
const partsOf = (stage) => data.stages[stage].parts.map((number) => data.parts[number]);
const linesOf = (part) => (part ? part.lines.map((number) => lines[number]) : []);
const named = (stage, title) => partsOf(stage).find((part) => part.title === title);
const last = data.stages.length - 1;
const state = { before: 0, after: last, part: data.open?.part ?? "the call", module: data.open?.module ?? "",
                tab: "lines", search: "" };

const isWithin = (path, inner) => inner === path || inner.startsWith(path + ".");
const belongs = (line, module) => !module || isWithin(module, line.module) || isWithin(module, line.site);

// --- comparing two stages ------------------------------------------------------------------------------------------

/** Rows of two listings side by side: equal lines next to one another, in the order that keeps most of them so. */
function aligned(left, right) {
  const places = new Map(right.map((line, i) => [line.key, i]));
  const rows = [];
  let done = 0, run = { removed: [], added: [] };
  const flush = () => {
    const kind = run.added.length && run.added.length < run.removed.length ? "fused" : "added";
    for (let i = 0; i < Math.max(run.removed.length, run.added.length); i++) {
      const [a, b] = [run.removed[i], run.added[i]];
      rows.push({ a, b, left: a && "removed", right: b && kind });
    }
    run = { removed: [], added: [] };
  };
  const kept = new Set(increasing(left.map((line) => places.get(line.key) ?? -1)));
  left.forEach((line, i) => {
    if (!kept.has(i)) return run.removed.push(line);
    const place = places.get(line.key);
    run.added.push(...right.slice(done, place));
    done = place + 1;
    flush();
    rows.push({ a: line, b: right[place] });
  });
  run.added.push(...right.slice(done));
  flush();
  return rows;
}

/** The indices of a longest increasing subsequence of the numbers that are not negative. */
function increasing(numbers) {
  const ends = [], from = new Array(numbers.length).fill(-1);
  numbers.forEach((number, i) => {
    if (number < 0) return;
    let low = 0, high = ends.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (numbers[ends[middle]] < number) low = middle + 1;
      else high = middle;
    }
    from[i] = low ? ends[low - 1] : -1;
    ends[low] = i;
  });
  const found = [];
  for (let i = ends.at(-1) ?? -1; i >= 0; i = from[i]) found.push(i);
  return found.reverse();
}

const changed = (row) => row.left || row.right;

/** Two listings module by module, each with its rows side by side, in the order in which modules come. */
function compared(left, right) {
  const modules = [...new Set(aligned(left, right).map((row) => (row.b ?? row.a).module))];
  const at = (listing) => Map.groupBy(listing, (line) => line.module);
  const [before, after] = [at(left), at(right)];
  for (const module of before.keys()) if (!modules.includes(module)) modules.push(module);
  return modules.map((module) => ({ module, rows: aligned(before.get(module) ?? [], after.get(module) ?? []) }));
}

function changes(stage) {
  let removed = 0, added = 0;
  for (const number of data.stages[stage].parts) {
    const part = data.parts[number];
    if (data.stages[stage - 1].parts.includes(number)) continue;
    const rows = aligned(linesOf(named(stage - 1, part.title)), linesOf(part));
    removed += rows.filter((row) => row.left).length;
    added += rows.filter((row) => row.right).length;
  }
  return { removed, added };
}

// --- the sides -----------------------------------------------------------------------------------------------------

function drawSteps() {
  for (const id of ["before", "after"]) {
    const options = data.stages.map((stage, i) => element("option", { value: i }, `${i}  ${stage.name}`));
    $(id).replaceChildren(...options);
    $(id).value = state[id];
  }
  $("passes").replaceChildren(...data.stages.slice(1).map((stage, i) => {
    const { removed, added } = stage.changes ??= changes(i + 1);
    const chosen = state.after === i + 1 && state.before === i ? "chosen" : "";
    const idle = removed + added ? "" : "idle";
    const count = removed + added ? `−${removed} +${added}` : "";
    return element("li", { class: `${chosen} ${idle}`, title: stage.name, onclick: () => show({ before: i, after: i + 1 }) },
                   stage.name.split("{")[0], element("span", { class: "count" }, count));
  }));
}

function drawTree() {
  const titles = [...new Set([...partsOf(state.before), ...partsOf(state.after)].map((part) => part.title))];
  $("tree").replaceChildren(...titles.map((title) => {
    const part = named(state.after, title) ?? named(state.before, title);
    const all = [...linesOf(named(state.before, title)), ...linesOf(named(state.after, title))];
    const root = { children: new Map(), path: "" };
    for (const path of new Set(all.map((line) => line.module))) {
      let node = root;
      for (const atom of path ? path.split(".") : []) {
        const below = node.path ? `${node.path}.${atom}` : atom;
        if (!node.children.has(atom)) node.children.set(atom, { children: new Map(), path: below });
        node = node.children.get(atom);
      }
    }
    const layers = part.layers.filter(Boolean);
    const label = layers.length ? `${title} × ${layers.length}` : title;
    return branch(title, root, label, layers.join("\n"), title === state.part);
  }));
}

function branch(title, node, label, hint, open) {
  const chosen = state.part === title && state.module === node.path ? "chosen" : "";
  const own = element("span", { class: `module ${chosen}`, title: hint, "data-module": node.path,
    onclick: (event) => { event.preventDefault(); show({ part: title, module: node.path, search: "" }); } }, label);
  if (!node.children.size) return element("div", {}, own);
  const inside = [...node.children].map(([atom, child]) =>
    branch(title, child, atom, child.path, open && isWithin(child.path, state.module)));
  return element("details", open ? { open: "" } : {}, element("summary", {}, own), ...inside);
}

// --- the views -----------------------------------------------------------------------------------------------------

function chosenLines(stage) {
  return linesOf(named(stage, state.part)).filter((line) => belongs(line, state.module));
}

function drawLines() {
  const groups = compared(chosenLines(state.before), chosenLines(state.after));
  const rows = groups.reduce((all, group) => all + group.rows.length, 0);
  const boxes = groups.map((group) => {
    const count = group.rows.filter(changed).length;
    const title = `${group.module || "(the graph itself)"}  ·  ${counted(group.rows.length, "line")}${count ? `, ${count} changed` : ""}`;
    const box = element("details", { class: `group ${count ? "changed" : ""}` }, element("summary", {}, title));
    const fill = () => { if (box.open && box.children.length === 1) box.append(...group.rows.map(pair)); };
    box.addEventListener("toggle", fill);
    if (rows <= OPEN || (count && groups.length <= OPEN)) { box.open = true; fill(); }
    return box;
  });
  return [element("div", { class: "pair heads" }, ...stageNames().map((name) => element("div", {}, name))), ...boxes];
}

const counted = (number, what) => `${number} ${what}${number === 1 ? "" : "s"}`;
const stageNames = () => [state.before, state.after].map((stage) =>
  stage ? `after ${data.stages[stage].name}${stage === last ? ", the last pass" : ""}` : "as captured");

function pair(row) {
  return element("div", { class: "pair" }, cell(row.a, row.left), cell(row.b, row.right));
}

function cell(line, kind) {
  const made = element("div", { class: kind });
  if (!line) return made;
  made.append(element("span", { class: "name" }, line.name), ` = ${line.code}  `,
              element("span", { class: "shape" }, `${line.shape} ${line.dtype}`));
  return hovered(made, line);
}

function drawGraphs() {
  const stages = [state.before, state.after].map((stage) => ({ own: chosenLines(stage), all: linesOf(named(stage, state.part)) }));
  const marks = new Map();
  for (const row of compared(stages[0].own, stages[1].own).flatMap((group) => group.rows)) {
    if (row.left) marks.set(row.a, row.left);
    if (row.right) marks.set(row.b, row.right);
  }
  const names = stageNames();
  return [element("div", { class: "graphs" }, ...stages.map((stage, i) =>
    element("div", {}, element("h2", {}, names[i]), picture(stage.own, stage.all, marks))))];
}

function picture(own, all, marks) {
  if (!own.length) return "nothing of it at this stage";
  if (own.length > DRAWN) return `${own.length} operators: choose a module on the left to see at most ${DRAWN} of them as a graph`;
  const inside = new Set(own), names = new Set(own.map((line) => line.name)), read = new Set(own.flatMap((line) => line.inputs));
  const around = all.filter((line) => !inside.has(line) && (read.has(line.name) || line.inputs.some((name) => names.has(name))));
  const graph = new dagre.graphlib.Graph().setGraph({ nodesep: 14, ranksep: 26 }).setDefaultEdgeLabel(() => ({}));
  const shown = [...own, ...around.slice(0, DRAWN)].filter((line) => !isSize(line));
  for (const line of shown) {
    const label = line.code.split("(")[0];
    graph.setNode(line.name, { line, label, width: 7 * Math.max(label.length, line.shape.length, 6) + 18, height: 36 });
  }
  for (const line of shown) for (const name of line.inputs) if (graph.hasNode(name)) graph.setEdge(name, line.name);
  dagre.layout(graph);
  return drawn(graph, inside, marks);
}

/** Numbers that say how large something is: edges from these to all that is reshaped would cross everything else. */
const isSize = (line) => !line.shape && /^(input$|sym_size|.*_guards_fn\()/.test(line.code);

function svg(tag, attributes = {}, text = "") {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.textContent = text;
  return made;
}

function drawn(graph, inside, marks) {
  const { width, height } = graph.graph();
  const scale = Math.min(1, Math.max(0.5, ($("view").clientWidth / 2 - 40) / (width + 20))); // smaller could not be read
  const root = svg("svg", { width: scale * (width + 20), height: scale * (height + 20),
                            viewBox: `-10 -10 ${width + 20} ${height + 20}` });
  const arrow = svg("marker", { id: "arrow", viewBox: "0 0 8 8", refX: 7, refY: 4, markerWidth: 7, markerHeight: 7, orient: "auto" });
  arrow.append(svg("path", { d: "M0 0 L8 4 L0 8 z", class: "arrow" }));
  root.append(arrow);
  for (const edge of graph.edges()) {
    const points = graph.edge(edge).points.map((point) => `${point.x},${point.y}`).join(" ");
    root.append(svg("polyline", { class: "edge", points, "marker-end": "url(#arrow)" }));
  }
  for (const name of graph.nodes()) {
    const { x, y, width, height, label, line } = graph.node(name);
    const group = svg("g", { class: `node ${marks.get(line) ?? ""} ${inside.has(line) ? "" : "around"}`,
                             transform: `translate(${x - width / 2},${y - height / 2})` });
    group.append(svg("rect", { width, height, rx: 5 }), svg("text", { x: 9, y: 15 }, label),
                 svg("text", { x: 9, y: 29, class: "small" }, line.shape));
    root.append(hovered(group, line));
  }
  return root;
}

/** The adapters at their sites: a row a layer, a column a place in it, by the norm of the change of the weight. */
function drawHeat() {
  if (!data.heats.length) return ["no adapter is active"];
  return [...new Set(data.heats.map((heat) => heat.adapter))].flatMap((adapter) => {
    const own = data.heats.filter((heat) => heat.adapter === adapter);
    const at = (heat) => heat.site.match(/^(.*?\.?\d+)\.(.*)$/)?.slice(1) ?? ["", heat.site];
    const rows = [...new Set(own.map((heat) => at(heat)[0]))], columns = [...new Set(own.map((heat) => at(heat)[1]))];
    const most = Math.max(...own.map((heat) => heat.change ?? 0), Number.MIN_VALUE);
    const found = new Map(own.map((heat) => [at(heat).join("\n"), heat]));
    const head = element("tr", {}, element("th"), ...columns.map((column) => element("th", {}, column)));
    const body = rows.map((row) => element("tr", {}, element("th", {}, row || "(no layer)"),
      ...columns.map((column) => heatCell(found.get(`${row}\n${column}`), most))));
    return [element("h2", {}, `${adapter} (${own[0].kind}): how much it changes each weight, by the Frobenius norm`),
            element("table", {}, head, ...body)];
  });
}

function heatCell(heat, most) {
  if (!heat) return element("td");
  const share = Math.sqrt((heat.change ?? 0) / most);
  const colour = heat.change === null ? "" : `background: hsl(14 ${share ? 85 : 0}% ${96 - 36 * share}%)`;
  const text = [`${heat.adapter}, ${heat.kind} at ${heat.site}`, heat.scaling === null ? "" : `scaling ${heat.scaling}`,
    ...Object.keys(heat.norms).map((name) => `${name}  (${heat.shapes[name].join(", ")})  norm ${heat.norms[name]?.toPrecision(4)}`)];
  const shown = heat.change === null ? "–" : heat.change ? heat.change.toPrecision(3) : "0";
  const cell = element("td", { class: heat.change === null ? "" : "hot", style: colour, onclick: () => show(placeOf(heat.site)) }, shown);
  return hinted(cell, text.filter(Boolean).join("\n"));
}

/** Where the lines of a site are: in the part whose layer holds it, by the longest such path. */
function placeOf(site) {
  const held = partsOf(last).flatMap((part) => part.layers.map((layer) => ({ part, layer })))
    .filter(({ layer }) => !layer || isWithin(layer, site)).sort((a, b) => b.layer.length - a.layer.length)[0];
  const inside = held.layer ? site.slice(held.layer.length + 1) : site;
  return { part: held.part.title, module: inside, tab: "lines" };
}

function drawFound() {
  const wanted = state.search.toLowerCase(), found = [];
  for (const part of partsOf(state.after)) {
    for (const line of linesOf(part)) {
      const text = [line.name, line.code, line.module, line.source, line.made_by, line.site].join(" ").toLowerCase();
      if (text.includes(wanted)) found.push({ part, line });
    }
  }
  const shown = found.slice(0, DRAWN).map(({ part, line }) => {
    const row = cell(line, undefined);
    row.prepend(element("span", { class: "shape" }, `${part.title}  `));
    row.addEventListener("click", () => show({ part: part.title, module: line.module, search: "", tab: "lines" }));
    return element("div", { class: "pair found" }, row);
  });
  return [element("h2", {}, counted(found.length, "line")), ...shown];
}

// --- hovering ------------------------------------------------------------------------------------------------------

function hovered(made, line) {
  const text = [`${line.name} = ${line.code}`, `${line.shape} ${line.dtype}`, line.module && `module: ${line.module}`,
    line.site && `site: ${line.site}${line.adapter ? `, adapter ${line.adapter}` : ""}`,
    `written by: ${line.made_by || "the model"}`, line.source];
  return hinted(made, text.filter((each) => each?.trim()).join("\n"));
}

function hinted(made, text) {
  made.addEventListener("mousemove", (event) => {
    const tip = $("tip");
    tip.textContent = text;
    tip.hidden = false;
    tip.style.left = `${Math.max(4, Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 10))}px`;
    tip.style.top = `${Math.max(4, Math.min(event.clientY + 14, innerHeight - tip.offsetHeight - 10))}px`;
  });
  made.addEventListener("mouseleave", () => { $("tip").hidden = true; });
  return made;
}

// --- the page ------------------------------------------------------------------------------------------------------

const VIEWS = { lines: drawLines, graph: drawGraphs, heat: drawHeat };

function show(change = {}) {
  Object.assign(state, change);
  drawSteps();
  drawTree();
  $("tip").hidden = true;
  $("search").value = state.search;
  $("place").textContent = [state.part, state.module].filter(Boolean).join(" / ");
  for (const button of document.querySelectorAll("#tabs button")) {
    button.className = button.dataset.tab === state.tab ? "chosen" : "";
  }
  $("view").replaceChildren(...(state.search ? drawFound() : VIEWS[state.tab]()));
}

const step = (by) => {
  const after = state.before === state.after - 1 ? state.after + by : by > 0 ? 1 : last;
  if (after >= 1 && after <= last) show({ before: after - 1, after });
};

$("title").textContent = document.title = data.title;
$("back").onclick = () => step(-1);
$("on").onclick = () => step(1);
$("whole").onclick = () => show({ before: 0, after: last });
for (const id of ["before", "after"]) $(id).onchange = () => show({ [id]: Number($(id).value) });
for (const button of document.querySelectorAll("#tabs button")) {
  button.onclick = () => show({ tab: button.dataset.tab, search: "" });
}
$("search").oninput = () => show({ search: $("search").value });
document.addEventListener("keydown", (event) => {
  if (/INPUT|SELECT/.test(event.target.tagName)) return;
  if (event.key === "ArrowLeft") step(-1);
  if (event.key === "ArrowRight") step(1);
});
show();
