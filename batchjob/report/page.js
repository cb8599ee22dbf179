"use strict";
// What the page does: theme, tables, image browser. Plain JavaScript that reads nothing outside the page.
const $ = (id) => document.getElementById(id);
const capital = (text) => text[0].toUpperCase() + text.slice(1);
const make = (tag, props = {}, ...inside) => {
  const node = Object.assign(document.createElement(tag), props);
  node.append(...inside);
  return node;
};

// --- theme, copy, full size -----------------------------------------------------------------------------------------
$("theme").addEventListener("click", () => {
  const root = document.documentElement;
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
});
for (const button of document.querySelectorAll(".copy")) {
  button.addEventListener("click", () => {
    const code = button.parentElement.querySelector("code");
    getSelection().selectAllChildren(code);
    document.execCommand("copy"); // the clipboard API is not there for a page opened from disk
    button.textContent = "copied";
  });
}
for (const button of document.querySelectorAll(".zoom")) {
  button.addEventListener("click", () => {
    const on = button.closest("figure").classList.toggle("zoomed");
    button.setAttribute("aria-pressed", String(on));
    button.textContent = on ? "fit to page" : "full size";
  });
}

// Sections are folded. The address of a section opens it, and printing opens all.
const unfold = () => {
  const at = /^#[a-z]+$/.test(location.hash) && document.querySelector(location.hash + " > details.fold");
  if (at) { at.open = true; at.parentElement.scrollIntoView(); }
};
addEventListener("hashchange", unfold);
for (const link of document.querySelectorAll(".top nav a")) link.addEventListener("click", () => setTimeout(unfold));
addEventListener("beforeprint", () => {
  for (const fold of document.querySelectorAll("details.fold")) fold.open = true;
  for (const image of document.images) image.loading = "eager";
});
unfold();

function copyText(text) {
  const area = make("textarea", { value: text, className: "hidden" });
  document.body.append(area);
  area.select();
  document.execCommand("copy"); // the clipboard API is not there for a page opened from disk
  area.remove();
}

// --- tables ---------------------------------------------------------------------------------------------------------
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0], rows = [...body.rows], headers = [...table.tHead.rows[0].cells];
  const key = (row, column) => {
    const cell = row.cells[column], value = cell.dataset.sort;
    return value === undefined ? cell.textContent.trim() : value === "" ? NaN : Number(value);
  };
  const sort = (column) => {
    const header = headers[column], numeric = header.dataset.kind === "number";
    const first = header.dataset.first ?? (numeric ? "descending" : "ascending");
    const other = first === "ascending" ? "descending" : "ascending";
    const way = header.getAttribute("aria-sort") === first ? other : first;
    headers.forEach((h) => h.removeAttribute("aria-sort"));
    header.setAttribute("aria-sort", way);
    const sign = way === "ascending" ? 1 : -1;
    rows.sort((a, b) => {
      const [x, y] = [key(a, column), key(b, column)];
      if (typeof x === "number" && (isNaN(x) || isNaN(y))) return isNaN(x) - isNaN(y); // rows without a value come last
      return sign * (typeof x === "number" ? x - y : x.localeCompare(y));
    });
    body.append(...rows);
  };
  headers.forEach((header, column) => header.firstElementChild.addEventListener("click", () => sort(column)));
}

// Copies the rows and columns that are shown, with full precision; an interval gets its own column.
function csvOf(table) {
  const shown = [...table.tHead.rows[0].cells].map((cell, i) => [cell, i]).filter(([cell]) => !cell.hidden);
  const rows = [...table.tBodies[0].rows].filter((row) => !row.hidden);
  const quoted = (text) => (/[",\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text);
  const lines = [[], ...rows.map(() => [])];
  for (const [cell, column] of shown) {
    lines[0].push(cell.textContent.trim());
    rows.forEach((row, i) => lines[i + 1].push(row.cells[column].dataset.sort ?? row.cells[column].textContent.trim()));
    if (!rows.some((row) => row.cells[column].querySelector("small"))) continue;
    lines[0].push(`${cell.textContent.trim()} interval`);
    rows.forEach((row, i) => lines[i + 1].push((row.cells[column].querySelector("small")?.textContent ?? "").replaceAll("−", "-")));
  }
  return lines.map((line) => line.map(quoted).join(",")).join("\n") + "\n";
}

// Filters the table of heads.
function setUpFilters() {
  const rows = [...$("table").tBodies[0].rows];
  const filter = () => {
    const words = $("find").value.toLowerCase().split(/\s+/).filter(Boolean), only = $("clear")?.checked;
    const chosen = [...document.querySelectorAll("#filters select")].filter((s) => s.value);
    let shown = 0;
    for (const row of rows) {
      const ok = words.every((w) => ` ${row.dataset.find} `.includes(/^\d+$/.test(w) ? ` ${w} ` : w)) &&
        chosen.every((s) => row.dataset[s.dataset.key] === s.value) && (!only || row.dataset.clear);
      row.hidden = !ok;
      shown += ok;
    }
    $("count").textContent = shown === rows.length ? `${shown} heads` : `${shown} of ${rows.length} heads`;
  };
  $("filters").addEventListener("input", filter);
  for (const box of document.querySelectorAll("#filters [data-column]")) {
    box.addEventListener("change", () => {
      for (const row of $("table").rows) row.cells[box.dataset.column].hidden = !box.checked;
    });
  }
  $("csv").addEventListener("click", () => {
    copyText(csvOf($("table")));
    $("csv").textContent = "Copied";
    setTimeout(() => { $("csv").textContent = "Copy as CSV"; }, 1500);
  });
  $("filters").addEventListener("submit", (event) => event.preventDefault());
  filter();
}
setUpFilters();

// --- the image browser ----------------------------------------------------------------------------------------------
// Writes two decimals as the figures do: zero has no sign, and a tie goes to the even digit (0.125 is 0.12).
const two = (value) => {
  const isTie = Math.abs(value * 8 % 4) === 1;
  const text = (isTie ? value - Math.sign(value) * 1e-6 : value).toFixed(2).replace("-", "−");
  return text === "−0.00" ? "0.00" : text;
};
const signed = (value) => (value > 0 && two(value) !== "0.00" ? "+" : "") + two(value);
let page = null; // the parsed data, from when the browser comes into view
const unpacked = new Map();

function bytesOf(name) {
  const text = atob($(name).textContent), bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  return bytes;
}

async function unpack(name) {
  if (!unpacked.has(name)) {
    if (unpacked.size > 300) unpacked.clear();
    const stream = new Blob([bytesOf(name)]).stream().pipeThrough(new DecompressionStream("deflate"));
    unpacked.set(name, new Response(stream).arrayBuffer().then((buffer) => new Uint8Array(buffer)));
  }
  return unpacked.get(name);
}

const photoUrl = (image) => `data:image/jpeg;base64,${$(image.photo).textContent}`;

class Panel {
  // One run's view of the chosen image: its own layer, head and algorithm.
  constructor(number, run, many) {
    const [layer, head] = page.start.places[number];
    Object.assign(this, { number, run, layer, head, algorithm: 0, at: null, outlines: [] });
    const choose = (name, values, key) => {
      const select = make("select", {}, ...values.map((v, i) => make("option", { value: i, textContent: v })));
      select.value = this[key];
      select.dataset.key = key;
      select.addEventListener("change", () => { this[key] = Number(select.value); browser.changed(); });
      return make("label", {}, `${name} `, select);
    };
    this.layerLabel = choose("Layer", run.layers, "layer");
    this.headLabel = choose("Head", run.heads, "head");
    const controls = make("div", { className: "controls" }, this.layerLabel, this.headLabel);
    if (run.algorithms.length > 1) controls.append(this.algorithmLabel = choose("Algorithm", run.algorithms, "algorithm"));
    if (number === 0) {
      const back = make("a", { href: "#heads", className: "row-of", textContent: "its row in the table" });
      back.addEventListener("click", (event) => { event.preventDefault(); this.showRow(); });
      controls.append(back);
    }
    this.views = {};
    const views = make("div", { className: "views" });
    const names = { photo: "Photo", clusters: "Clusters", heat: run.attention, row: `${capital(run.rows_name)} of the patch` };
    for (const [key, name] of Object.entries(names)) {
      if (key === "clusters" && !run.algorithms.length) continue;
      const canvas = make("canvas", { tabIndex: 0 });
      canvas.setAttribute("role", "img");
      canvas.dataset.view = key;
      const caption = make("figcaption");
      caption.setAttribute("aria-live", key === "row" ? "polite" : "off");
      views.append(make("figure", { className: "view" }, canvas, caption));
      this.views[key] = { canvas, caption, name };
      canvas.addEventListener("pointermove", (event) => this.point(event));
      canvas.addEventListener("pointerdown", (event) => this.point(event));
      canvas.addEventListener("keydown", (event) => this.key(event));
    }
    this.strip = make("div", { className: "strip" });
    this.strip.setAttribute("role", "group");
    this.strip.setAttribute("aria-label", "Heads");
    this.node = make("div", { className: "panel" });
    if (many) this.node.append(make("h3", { textContent: run.name }));
    this.missing = make("p", { className: "quiet", textContent: "This run has no result for the image.", hidden: true });
    this.shown = make("div", {}, controls, this.strip, views);
    this.node.append(this.missing, this.shown);
  }

  get size() { return this.run.grid[0] * this.run.grid[1]; }
  labelsOf(head) {
    const { algorithms, layers, heads } = this.run;
    const start = ((this.algorithm * layers.length + this.layer) * heads.length + head) * this.size;
    return algorithms.length ? this.maps.subarray(start, start + this.size) : null;
  }
  heatOf(head) {
    const { algorithms, layers, heads } = this.run;
    const start = ((algorithms.length * layers.length + this.layer) * heads.length + head) * this.size;
    return this.maps.subarray(start, start + this.size);
  }

  showRow() {
    const { layers, heads, algorithms } = this.run;
    const find = `layer ${layers[this.layer]} head ${heads[this.head]}`;
    const rows = [...$("table").tBodies[0].rows].filter((row) => row.dataset.find.endsWith(find));
    const row = rows.find((r) => r.dataset.algorithm === algorithms[this.algorithm]) ?? rows[0];
    if (!row) { $("heads").scrollIntoView(); return; }
    row.hidden = false;
    row.scrollIntoView({ block: "center" });
    document.querySelectorAll("tr.flash").forEach((r) => r.classList.remove("flash"));
    row.classList.add("flash");
  }

  async show(image, photo, outlines) {
    const inside = image.runs[this.number];
    this.missing.hidden = Boolean(inside);
    this.shown.hidden = !inside;
    if (!inside) return;
    const turn = (this.turn = (this.turn || 0) + 1);
    const maps = await unpack(inside.maps);
    if (turn !== this.turn) return; // another image was chosen meanwhile
    Object.assign(this, { image, photo, inside, maps, outlines, rows: null });
    this.layerLabel.lastChild.value = this.layer;
    this.headLabel.lastChild.value = this.head;
    if (this.algorithmLabel) this.algorithmLabel.lastChild.value = this.algorithm;
    const [leader] = browser.panels;
    if (!this.at) this.at = this === leader ? this.brightest() : leader.placeIn(this);
    this.drawStrip();
    const name = inside.rows[`${this.layer},${this.head}`];
    const rows = name ? await unpack(name) : null;
    if (turn !== this.turn) return;
    this.rows = rows;
    this.draw();
  }

  brightest() {
    const heat = this.heatOf(this.head);
    let best = 0;
    heat.forEach((v, i) => { if (v > heat[best]) best = i; });
    return [Math.floor(best / this.run.grid[1]), best % this.run.grid[1]];
  }

  point(event) {
    const box = event.currentTarget.getBoundingClientRect(), [rows, columns] = this.run.grid, span = this.inside.span;
    const y = Math.floor((event.clientY - box.top) / box.height / span[0] * rows);
    const x = Math.floor((event.clientX - box.left) / box.width / span[1] * columns);
    this.moveTo(y, x);
  }
  key(event) {
    const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (step) { this.moveTo(this.at[0] + step[0], this.at[1] + step[1]); event.preventDefault(); }
    if (event.key === "n" || event.key === "N") browser.step(1);
    if (event.key === "p" || event.key === "P") browser.step(-1);
  }
  moveTo(y, x) {
    const [rows, columns] = this.run.grid;
    const at = [Math.max(0, Math.min(rows - 1, y)), Math.max(0, Math.min(columns - 1, x))];
    if (at[0] === this.at[0] && at[1] === this.at[1]) return;
    this.at = at;
    this.draw();
    for (const other of browser.panels.filter((p) => p !== this && p.inside)) {
      other.at = this.placeIn(other);
      other.draw();
    }
    address.write();
  }
  // The patch of another run at the same place of the photo.
  placeIn(other) {
    const place = [0, 1].map((i) => (this.at[i] + 0.5) / this.run.grid[i] * this.inside.span[i]);
    return [0, 1].map((i) => Math.max(0, Math.min(other.run.grid[i] - 1, Math.floor(place[i] / other.inside.span[i] * other.run.grid[i]))));
  }

  drawStrip() {
    const { heads } = this.run;
    if (this.strip.children.length !== heads.length) {
      this.strip.replaceChildren(...heads.map((head, i) => {
        const button = make("button", { type: "button" }, make("canvas"), make("span"));
        button.addEventListener("click", () => { this.head = i; browser.changed(); });
        return button;
      }));
    }
    heads.forEach((head, i) => {
      const button = this.strip.children[i], score = browser.score(this, i);
      button.setAttribute("aria-pressed", String(i === this.head));
      button.lastChild.textContent = `head ${head}` + (score === null ? "" : ` · ${two(score)}`);
      const canvas = button.firstChild, labels = this.labelsOf(i);
      canvas.width = 84;
      canvas.height = Math.round(84 * this.image.height / this.image.width);
      if (labels) this.paint(canvas, labels, page.palette, 0.64, true);
      else this.paint(canvas, this.heatOf(i), page.heat, 1, false);
    });
  }

  draw() {
    const [rows, columns] = this.run.grid, [y, x] = this.at, strength = Number($("opacity").value) / 100;
    const labels = this.labelsOf(this.head), width = 480, height = Math.round(width * this.image.height / this.image.width);
    for (const { canvas } of Object.values(this.views)) { canvas.width = width; canvas.height = height; }
    const seen = this.views.photo;
    seen.canvas.getContext("2d").drawImage(this.photo, 0, 0, width, height);
    outlineObjects(seen.canvas, this.outlines, true);
    seen.caption.replaceChildren(objectsKey(this.image));
    this.describe(seen.canvas, `Photo ${this.image.id}`);
    const head = `layer ${this.run.layers[this.layer]}, head ${this.run.heads[this.head]}`;
    if (labels) {
      const { canvas, caption, name } = this.views.clusters, own = labels[y * columns + x];
      this.paint(canvas, labels, page.palette, strength, true);
      this.outline(canvas, labels, own);
      outlineObjects(canvas, this.outlines, false);
      const count = labels.filter((v) => v === own).length, k = new Set(labels.filter((v) => v < 254)).size;
      const what = own === 255 ? "no label" : own === 254 ? `noise, ${count} patches` : `this patch's cluster: ${count} patches`;
      caption.textContent = `${name}, ${head}: k = ${k}; ${what}`;
      this.describe(canvas, `Clusters of ${this.image.id}, ${head}`);
    }
    const heat = this.views.heat;
    this.paint(heat.canvas, this.heatOf(this.head), page.heat, 1, false);
    outlineObjects(heat.canvas, this.outlines, false);
    heat.caption.textContent = `${heat.name}, ${head}: from 0 (dark) to its 99th percentile (bright)`;
    this.describe(heat.canvas, `${heat.name} of ${this.image.id}, ${head}`);
    this.drawRow(head);
    for (const { canvas } of Object.values(this.views)) this.ring(canvas);
  }

  drawRow(head) {
    const { canvas, caption } = this.views.row, cell = this.run.cell, [rows, columns] = this.run.grid, [y, x] = this.at;
    this.describe(canvas, `${capital(this.run.rows_name)} of patch row ${y}, column ${x} of ${this.image.id}, ${head}`);
    if (!this.rows) {
      this.paint(canvas, null, null, 0, false);
      const kept = Object.keys(this.inside.rows).length || page.runs[this.number].kept;
      caption.textContent = kept ? `No ${this.run.rows_name} rows of this image, layer and head are in the page.`
        : `No ${this.run.rows_name} rows were stored; --keep-maps N keeps those of N images.`;
      return;
    }
    const tall = Math.ceil(rows / cell), wide = Math.ceil(columns / cell), count = tall * wide;
    const query = Math.floor(y / cell) * wide + Math.floor(x / cell);
    this.paint(canvas, this.rows.subarray(query * count, (query + 1) * count), page.heat, 0.3 + 0.7 * Number($("opacity").value) / 100, false, [tall, wide], true);
    outlineObjects(canvas, this.outlines, false);
    const mean = cell > 1 ? `, mean over ${cell} × ${cell} patches` : "";
    caption.textContent = `${capital(this.run.rows_name)} of the patch in row ${y}, column ${x}, ${head}${mean}`;
  }

  describe(canvas, text) { canvas.setAttribute("aria-label", `${text}. Arrow keys move the patch.`); }

  paint(canvas, values, colours, strength, isLabels, grid = this.run.grid, onPhoto = false) {
    // Draws the photo in grey and each patch's colour over it, without interpolation.
    const context = canvas.getContext("2d", { willReadFrequently: true }), { width, height } = canvas;
    context.filter = "none";
    context.drawImage(this.photo, 0, 0, width, height);
    if (!values) return;
    const picture = context.getImageData(0, 0, width, height), data = picture.data, [rows, columns] = grid;
    // Cells of several patches may reach beyond the grid of patches.
    const reach = grid === this.run.grid ? [1, 1] : [rows * this.run.cell / this.run.grid[0], columns * this.run.cell / this.run.grid[1]];
    const [high, wide] = [this.inside.span[0] * reach[0], this.inside.span[1] * reach[1]];
    for (let py = 0; py < height; py++) {
      const row = Math.min(rows - 1, Math.floor((py + 0.5) / height / high * rows)) * columns;
      for (let px = 0; px < width; px++) {
        const value = values[row + Math.min(columns - 1, Math.floor((px + 0.5) / width / wide * columns))];
        const i = (py * width + px) * 4, grey = 0.299 * data[i] + 0.587 * data[i + 1] + 0.114 * data[i + 2];
        let share = isLabels && value === 255 ? 0 : strength;
        if (onPhoto) share = strength * (0.55 + 0.45 * value / 255); // dark colours let more of the photo through
        for (let c = 0; c < 3; c++) data[i + c] = share * colours[value][c] + (1 - share) * grey;
      }
    }
    context.putImageData(picture, 0, 0);
  }

  outline(canvas, labels, own) {
    const context = canvas.getContext("2d"), [rows, columns] = this.run.grid, [high, wide] = this.inside.span;
    const dx = canvas.width * wide / columns, dy = canvas.height * high / rows;
    const trace = (test) => {
      context.beginPath();
      for (let y = 0; y < rows; y++) for (let x = 0; x < columns; x++) {
        const here = labels[y * columns + x];
        if (x + 1 < columns && test(here, labels[y * columns + x + 1])) { context.moveTo((x + 1) * dx, y * dy); context.lineTo((x + 1) * dx, (y + 1) * dy); }
        if (y + 1 < rows && test(here, labels[(y + 1) * columns + x])) { context.moveTo(x * dx, (y + 1) * dy); context.lineTo((x + 1) * dx, (y + 1) * dy); }
      }
      context.stroke();
    };
    context.lineCap = "square";
    context.strokeStyle = "rgba(255,255,255,.75)"; context.lineWidth = 1;
    trace((a, b) => a !== b);
    context.strokeStyle = "#fff"; context.lineWidth = 3.5;
    trace((a, b) => (a === own) !== (b === own));
    context.strokeStyle = "#111"; context.lineWidth = 1.5;
    trace((a, b) => (a === own) !== (b === own));
  }

  ring(canvas) {
    const context = canvas.getContext("2d"), [rows, columns] = this.run.grid, [high, wide] = this.inside.span;
    const x = (this.at[1] + 0.5) / columns * wide * canvas.width, y = (this.at[0] + 0.5) / rows * high * canvas.height;
    for (const [colour, width] of [["#000", 4], ["#fff", 2]]) {
      context.strokeStyle = colour; context.lineWidth = width;
      context.beginPath(); context.arc(x, y, 7, 0, 7); context.stroke();
    }
  }
}

// Draws the outlines of annotated objects in the colours of their categories, or in white: dotted for small objects,
// dashed for crowds.
async function outlinesOf(image) {
  return image.objects && ($("objects")?.checked ?? false) ? JSON.parse(new TextDecoder().decode(await unpack(image.objects))) : [];
}
function outlineObjects(canvas, outlines, isColoured, scale = 1) {
  const context = canvas.getContext("2d"), { width, height } = canvas;
  context.lineCap = "butt";
  for (const [category, kind, lines] of outlines) {
    const path = new Path2D();
    for (const line of lines) {
      for (let i = 0; i < line.length; i += 2) path[i ? "lineTo" : "moveTo"](line[i] / 1000 * width, line[i + 1] / 1000 * height);
    }
    const wide = (kind === "instance" ? 2 : 1.2) * scale * (isColoured ? 1 : 0.75);
    context.setLineDash([]); context.strokeStyle = "#000"; context.lineWidth = wide + 1.6 * scale; context.stroke(path);
    context.setLineDash(kind === "small" ? [1.5, 1.5] : kind === "crowd" ? [7, 4] : []);
    context.strokeStyle = isColoured ? page.categories[category] : "#fff"; context.lineWidth = wide; context.stroke(path);
  }
  context.setLineDash([]);
}
function objectsKey(image) {
  const node = make("span", { className: "key" });
  if (!$("objects")?.checked) return make("span", { textContent: "Photo" });
  for (const { name, count } of image.key) {
    const swatch = make("i");
    swatch.style.background = page.categories[name];
    node.append(make("span", {}, swatch, `${name} ${count}`));
  }
  if (image.rest) node.append(make("span", { textContent: `${image.rest}, not scored (small: dotted, crowd: dashed)` }));
  if (image.shared) node.append(make("span", { textContent: image.shared }));
  if (!image.key.length && !image.rest) node.append("No annotated objects");
  return node;
}

// The address holds what is shown: #layer=11&head=3&image=…&patch=7,9. A second run has layer2=… and so on.
const address = {
  known() { return new URLSearchParams(location.hash.includes("=") ? location.hash.slice(1) : ""); },
  write() {
    const words = new URLSearchParams();
    browser.panels.forEach((panel, i) => {
      const which = i ? String(i + 1) : "", { layers, heads, algorithms } = panel.run;
      words.set(`layer${which}`, layers[panel.layer]);
      words.set(`head${which}`, heads[panel.head]);
      if (algorithms.length > 1) words.set(`algorithm${which}`, algorithms[panel.algorithm]);
    });
    words.set("image", page.images[browser.sequence[browser.position]].id);
    if (browser.panels[0].at) words.set("patch", browser.panels[0].at.join(","));
    if ($("order").value !== "row") words.set("order", $("order").value);
    if ($("objects") && !$("objects").checked) words.set("objects", "0");
    this.written = "#" + words;
    history.replaceState(null, "", this.written);
  },
  // Sets the panels as the address says, and returns the number of the image that it names, or null.
  read() {
    const words = this.known();
    browser.panels.forEach((panel, i) => {
      const which = i ? String(i + 1) : "";
      for (const [key, values] of [["layer", panel.run.layers], ["head", panel.run.heads], ["algorithm", panel.run.algorithms]]) {
        const at = values.findIndex((value) => String(value) === words.get(key + which));
        if (at >= 0) panel[key] = at;
      }
    });
    if ($("objects") && words.has("objects")) $("objects").checked = words.get("objects") !== "0";
    if (words.has("order") && [...$("order").options].some((o) => o.value === words.get("order"))) $("order").value = words.get("order");
    const image = page.images.findIndex((one) => one.id === words.get("image"));
    return image >= 0 ? image : null;
  },
  patch() {
    const at = (this.known().get("patch") ?? "").split(",").map(Number);
    return at.length === 2 && at.every((v, i) => Number.isInteger(v) && v >= 0 && v < browser.panels[0].run.grid[i]) ? at : null;
  },
};

const browser = {
  panels: [], position: 0, sequence: [],

  score(panel, head) {
    const scores = panel.inside?.score ?? null;
    return scores ? scores[panel.algorithm]?.[panel.layer]?.[head] ?? null : null;
  },
  scoreOf(image, number = 0) {
    const panel = this.panels[number], scores = image.runs[number]?.score;
    return scores ? scores[panel.algorithm]?.[panel.layer]?.[panel.head] ?? null : null;
  },
  // Images are ordered by the score, but not by that of the images that chose the head: it says nothing about the head.
  chosenOf(number) {
    const { run, layer, head } = this.panels[number];
    return run.chosen?.layer === layer && run.chosen.head === head ? run.chosen : null;
  },
  rankOf(image, number = 0) {
    return this.chosenOf(number) && image.runs[number]?.chose ? null : this.scoreOf(image, number);
  },
  gapOf(image, score = this.scoreOf) { // the first run's score minus the second's
    const [a, b] = [score.call(this, image, 0), this.panels[1] ? score.call(this, image, 1) : null];
    return a === null || b === null ? null : a - b;
  },

  start() {
    page = JSON.parse($("data").textContent);
    if (!page.images?.length) return;
    this.panels = page.runs.map((run, i) => new Panel(i, run, page.runs.length > 1));
    $("panels").append(...this.panels.map((p) => p.node));
    $("panels").classList.toggle("many", this.panels.length > 1);
    if (page.images.some((image) => image.runs[0]?.score)) {
      $("order").append(make("option", { value: "best", textContent: `best ${page.score} of the head first` }),
        make("option", { value: "worst", textContent: `worst ${page.score} of the head first` }));
    }
    if (page.runs.length > 1 && page.images.every((image) => !image.runs[0]?.score === !image.runs[1]?.score) && page.images.some((image) => image.runs[0]?.score)) {
      $("order").append(make("option", { value: "ahead", textContent: "first run most ahead first" }),
        make("option", { value: "behind", textContent: "second run most ahead first" }));
    }
    $("image").addEventListener("change", () => { this.position = Number($("image").value); this.show(); address.write(); });
    $("order").addEventListener("change", () => { this.position = 0; this.changed(true); });
    $("objects")?.addEventListener("change", () => { this.extremes(); this.show(true); address.write(); });
    $("previous").addEventListener("click", () => this.step(-1));
    $("next").addEventListener("click", () => this.step(1));
    $("opacity").addEventListener("input", () => this.panels.forEach((p) => p.maps && p.inside && p.draw()));
    $("browser").hidden = false;
    this.goTo(address.read(), page.start.image);
    addEventListener("hashchange", () => this.follow());
  },

  // Shows what the address asks for, after a click on a head or on Back.
  follow() {
    if (!location.hash.includes("=") || location.hash === address.written) return;
    this.goTo(address.read(), this.sequence[this.position]);
    $("images").scrollIntoView();
  },
  goTo(named, otherwise) {
    this.arrange();
    if (named !== null && !this.sequence.includes(named)) { // an order by score lacks the image that the address names
      $("order").value = "row";
      this.arrange();
    }
    this.position = Math.max(0, this.sequence.indexOf(named ?? otherwise));
    this.extremes();
    this.show();
  },

  showNumber(image) { // its place in the sequence may be none: an order by score leaves images out
    const place = this.sequence.indexOf(image);
    if (place < 0) this.goTo(image);
    else { this.position = place; this.show(); }
    address.write();
  },

  arrange() {
    const order = $("order").value, sign = order === "worst" || order === "behind" ? 1 : -1;
    const isGap = order === "ahead" || order === "behind", all = page.images.map((_, i) => i);
    const value = (i) => (isGap ? this.gapOf(page.images[i], this.rankOf) : this.rankOf(page.images[i]));
    const ranked = order === "row" ? [] : all.filter((i) => value(i) !== null).sort((a, b) => sign * (value(a) - value(b)));
    this.sequence = ranked.length ? ranked : all;
    const note = (this.chosenOf(0) ?? (isGap ? this.chosenOf(1) : null))?.note ?? "";
    $("ordered").textContent = note;
    $("ordered").hidden = !ranked.length || !note;
    $("image").replaceChildren(...this.sequence.map((i, position) => {
      const score = this.scoreOf(page.images[i]), kept = page.images[i].runs.some((r) => r && Object.keys(r.rows).length);
      const text = page.images[i].id + (score === null ? "" : ` · ${two(score)}`) + (kept ? " · attention kept" : "");
      return make("option", { value: position, textContent: text });
    }));
  },

  changed(fromStart = false) {
    // After another order, layer, head or algorithm the same image stays, unless a new order begins at its first image.
    const current = this.sequence[this.position];
    this.arrange();
    this.position = fromStart ? 0 : Math.max(0, this.sequence.indexOf(current));
    this.extremes();
    this.show(!fromStart);
    address.write();
  },

  step(by) {
    this.position = (this.position + by + this.sequence.length) % this.sequence.length;
    this.show();
    address.write();
  },

  async show(keepsPatch = false) {
    $("image").value = this.position;
    const image = page.images[this.sequence[this.position]], photo = new Image();
    photo.src = photoUrl(image);
    await photo.decode();
    if (image !== page.images[this.sequence[this.position]]) return;
    const outlines = await outlinesOf(image);
    if (!keepsPatch) this.panels.forEach((panel, i) => { panel.at = i ? null : address.known().get("image") === image.id ? address.patch() : null; });
    const [leader, ...others] = this.panels;
    await leader.show(image, photo, outlines); // the others mark its patch
    if (image !== page.images[this.sequence[this.position]]) return;
    await Promise.all(others.map((panel) => panel.show(image, photo, outlines)));
    const gap = this.gapOf(image);
    $("paired").hidden = gap === null;
    if (gap !== null) $("paired").textContent = `${capital(page.score)} of this image: ${two(this.scoreOf(image))} and ${two(this.scoreOf(image, 1))}, difference ${signed(gap)}`;
    document.body.dataset.shown = image.id;
  },

  extremes() {
    const scored = page.images.map((image, i) => [this.rankOf(image), i]).filter(([s]) => s !== null).sort((a, b) => b[0] - a[0]);
    if (scored.length < 2) { $("extremes").replaceChildren(); return; }
    const some = Math.min(5, Math.floor(scored.length / 2)), { run, layer, head } = this.panels[0];
    const group = (name, list) => make("div", {}, make("h3", { textContent: `${name} of layer ${run.layers[layer]}, head ${run.heads[head]}` }),
      make("div", { className: "strip" }, ...list.map(([score, i]) => {
        const image = page.images[i];
        const button = make("button", { type: "button", title: image.id }, `${two(score)}`);
        button.setAttribute("aria-label", `${image.id}, ${two(score)}`);
        button.addEventListener("click", () => { this.showNumber(i); $("browser").scrollIntoView({ block: "start" }); });
        this.thumbnails(button, image);
        return button;
      })));
    const notes = [this.chosenOf(0)?.note, page.is_sample ? "Only images on this page." : ""].filter(Boolean).join(" ");
    const said = notes ? [make("p", { className: "quiet", textContent: notes })] : [];
    $("extremes").replaceChildren(...said, group("Best images", scored.slice(0, some)), group("Worst images", scored.slice(-some).reverse()));
  },
};

// Draws an image with its objects, and below it the head's clusters: they show why its score is high or low.
browser.thumbnails = async (button, image) => {
  const [panel] = browser.panels, inside = image.runs[0], photo = new Image();
  photo.src = photoUrl(image);
  const [outlines, maps] = await Promise.all([outlinesOf(image), unpack(inside.maps), photo.decode()]);
  const look = Object.create(panel, { photo: { value: photo }, inside: { value: inside }, maps: { value: maps } });
  const labels = look.labelsOf(panel.head), size = { width: Math.round(216 * image.width / image.height), height: 216 };
  const above = make("canvas", size), below = make("canvas", size);
  above.getContext("2d").drawImage(photo, 0, 0, size.width, size.height);
  outlineObjects(above, outlines, true, 1.2);
  look.paint(below, labels ?? look.heatOf(panel.head), labels ? page.palette : page.heat, labels ? 0.64 : 1, Boolean(labels));
  outlineObjects(below, outlines, false, 1.2);
  button.prepend(above, below);
};

// Decodes the data only when the browser is about to be seen, so that a page with much data opens quickly.
new IntersectionObserver((entries, observer) => {
  if (entries.some((entry) => entry.isIntersecting)) { observer.disconnect(); browser.start(); }
}, { rootMargin: "600px" }).observe($("images"));
addEventListener("hashchange", () => { if (!page && location.hash.includes("=")) $("images").scrollIntoView(); });
if (location.hash.includes("=")) $("images").scrollIntoView();
