// Sends images, keeps their probabilities, and applies the rules of the sliders to them.
"use strict";

const find = (id) => document.getElementById(id);
const width = Number(document.body.dataset.width), height = Number(document.body.dataset.height);
const [status, gallery] = [find("status"), find("gallery")];
const cards = [];
let scenes = 0;

function make(tag, values = {}, ...inside) {
  const drawn = ["svg", "image", "g", "path", "text", "title"].includes(tag);
  const element = drawn ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(values)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value);
  }
  element.append(...inside);
  return element;
}

const classes = [...document.querySelectorAll(".rule")].map((group, index) => ({
  index, group, name: group.dataset.name, colour: group.dataset.colour, dash: group.dataset.dash,
  original: JSON.parse(group.dataset.rule), rule: JSON.parse(group.dataset.rule),
  shown: find(`show-${index}`), sliders: [...group.querySelectorAll("input[type=range]")],
  swatch: group.querySelector(".swatch"),
}));

function percent(share) {
  if (share > 0 && share < 0.001) return "<0.1%";
  return share ? `${(100 * share).toFixed(1)}%` : "0%";
}

// ---- Rules -----------------------------------------------------------------------------------------------------------

const waiting = new Map();  // card -> classes whose mask is out of date
let spent = 0, changed = 0;

function refresh(card, one) {
  const found = applyRule(card.levels[one.index], height, one.rule, card.presence[one.index]);
  card.masks[one.index] = found;
  const share = found.area / (width * height), layer = card.layers[one.index];
  const path = traceRuns(found.runs, width, height);
  layer.replaceChildren();
  if (found.area) {
    const [x, y] = nameAt(found.runs, width, height);
    layer.append(
      make("title", {}, `${one.name}: ${percent(share)}`),
      make("path", { class: "outline halo", d: path }), make("path", { class: "outline", d: path }),
      make("text", { class: "name", x, y }, one.name),
    );
  }
  const presence = card.presence[one.index];
  card.areas[one.index].textContent =
    `${one.name} ${percent(share)}${presence === null ? "" : `, presence ${Math.round(presence / 2.55)}%`}`;
}

function describe(card) {
  const words = classes.map((one) => `${one.name} ${percent(card.masks[one.index].area / (width * height))}`);
  card.scene.setAttribute("aria-label", `${card.name}: ${words.join(", ")}`);
  return words.join(", ");
}

function work() {
  const begun = performance.now();
  for (const [card, some] of waiting) {
    for (const one of some) refresh(card, one);
    describe(card);
    waiting.delete(card);
    changed += 1;
    if (performance.now() - begun > 24) break;  // the rest in the next frame
  }
  spent += performance.now() - begun;
  if (waiting.size) requestAnimationFrame(work);
  else if (changed) {  // not if there are no images, or they were removed
    find("time").textContent = `Applied to ${changed} ${changed === 1 ? "image" : "images"} in ${spent.toFixed(1)} ms`;
    spent = changed = 0;
  }
}

function apply(some) {
  if (!waiting.size) requestAnimationFrame(work);
  for (const card of cards) if (card.levels) waiting.set(card, new Set([...(waiting.get(card) || []), ...some]));
  if (!waiting.size) find("time").textContent = "";
}

function show(slider, value) {
  slider.value = value;
  slider.setAttribute("aria-valuetext", `${value}, ${slider.dataset.unit}`);
  slider.parentElement.querySelector(".value").textContent = value;
}

for (const one of classes) {
  for (const slider of one.sliders) {
    slider.addEventListener("input", () => {
      one.rule[slider.dataset.kind] = slider.valueAsNumber;
      show(slider, slider.valueAsNumber);
      apply([one]);
    });
    show(slider, one.rule[slider.dataset.kind]);  // a reload may keep the positions of sliders
  }
}

find("reset").addEventListener("click", () => {
  for (const one of classes) {
    one.rule = { ...one.original };
    for (const slider of one.sliders) show(slider, one.rule[slider.dataset.kind]);
  }
  apply(classes);
  status.textContent = "The rules are those of the model again.";
});

// ---- Images ----------------------------------------------------------------------------------------------------------

function addCard(name, file) {
  const url = URL.createObjectURL(file);
  const picture = make("image", { href: url, width, height, preserveAspectRatio: "none" });
  picture.addEventListener("error", () => picture.remove());  // a format that browsers do not show
  const layers = classes.map((one) => make("g", { class: `k${one.index}` }));
  const scene = make("svg", { class: "scene", viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": name },
    picture, ...layers);
  const areas = classes.map(() => make("span"));
  const note = make("span", { class: "busy" }, "Waiting for the server…");
  const card = { name, file, url, picture, scene, layers, areas, note, levels: null, masks: [], presence: [] };
  card.list = make("ul", { class: "areas", hidden: "" },
    ...classes.map((one) => make("li", {}, one.swatch.cloneNode(true), areas[one.index])));
  card.save = make("button", { type: "button", onclick: () => savePicture(card) }, "Download picture (PNG)");
  card.row = make("button", { type: "button", onclick: () => saveRows([card], `${name}.csv`) }, "Download rows (CSV)");
  card.outlines = make("button", { type: "button", onclick: () => saveOutlines(card) }, "Download polygons (GeoJSON)");
  card.outlines.hidden = !document.body.dataset.geojson;
  const remove = make("button", { type: "button", "aria-label": `Remove ${name}`, onclick: () => removeCard(card) }, "Remove");
  card.save.disabled = card.row.disabled = card.outlines.disabled = true;
  card.item = make("li", {}, make("figure", { class: "panel" }, scene,
    make("figcaption", {}, make("span", { class: "key" }, name), " ", note, card.list,
      make("p", { class: "actions" }, card.save, card.row, card.outlines, remove))));
  gallery.append(card.item);
  cards.push(card);
  find("none").hidden = true;
  return card;
}

function removeCard(card) {
  cards.splice(cards.indexOf(card), 1);
  waiting.delete(card);
  URL.revokeObjectURL(card.url);
  card.item.remove();
  find("none").hidden = cards.length > 0;
  find("rows").disabled = !cards.some((one) => one.levels);
  status.textContent = `${card.name} is removed.`;
  find("files").focus();
}

function fail(card, reason) {
  card.note.className = "note";
  card.note.textContent = reason;
}

const pause = (seconds) => new Promise((resolve) => setTimeout(resolve, 1000 * seconds));

async function ask(path, values = {}) {
  const token = find("token").value;
  const headers = { ...values.headers, ...(token ? { Authorization: `Bearer ${token}` } : {}) };
  for (let tries = 1; ; tries++) {
    const answer = await fetch(path, { ...values, headers });
    if (answer.status !== 503 || tries === 8) return answer;
    await pause(Number(answer.headers.get("Retry-After")) || 1);
  }
}

async function reason(answer) {
  if (answer.status === 401) find("access").hidden = false;
  try {
    return (await answer.json()).detail;
  } catch {
    return `the server answered with status ${answer.status}`;
  }
}

async function segment(card) {
  card.note.className = "busy";
  card.note.textContent = "Waiting for the server…";
  try {
    const headers = { "Content-Type": "application/octet-stream", Accept: "application/json" };
    const answer = await ask("v1/segment?levels=true", { method: "POST", body: card.file, headers });
    if (!answer.ok) {
      fail(card, await reason(answer));
      status.textContent = `${card.name}: ${card.note.textContent}`;
      return;
    }
    const [found] = (await answer.json()).images;
    const text = atob(found.levels), all = new Uint8Array(text.length);
    for (let i = 0; i < text.length; i++) all[i] = text.charCodeAt(i);
    card.levels = classes.map((one) => all.subarray(one.index * width * height, (one.index + 1) * width * height));
    card.presence = classes.map((one) => found.classes[one.name].presence);
  } catch {
    fail(card, "the server cannot be reached");
    status.textContent = `${card.name}: the server cannot be reached`;
    return;
  }
  if (!cards.includes(card)) return;  // removed in the meantime
  for (const one of classes) refresh(card, one);
  card.note.textContent = "";
  card.list.hidden = false;
  card.save.disabled = card.row.disabled = card.outlines.disabled = find("rows").disabled = false;
  status.textContent = `${card.name}: ${describe(card)}`;
}

async function send(some) {
  const left = [...some];
  const next = async () => {
    while (left.length) await segment(left.shift());
  };
  await Promise.all([next(), next(), next(), next()]);
}

const add = (files) => send([...files].map((file) => addCard(file.name, file)));

find("files").addEventListener("change", (event) => {
  add(event.target.files);
  event.target.value = "";
});
find("access").addEventListener("submit", (event) => {
  event.preventDefault();
  find("access").hidden = true;
  send(cards.filter((card) => !card.levels));
});
find("scene").addEventListener("click", async () => {
  const name = `scene-${scenes}.jpg`;
  status.textContent = "Drawing a scene…";
  try {
    const answer = await ask(`v1/scenes/${scenes++ % Number(document.body.dataset.scenes)}.jpg`);
    if (answer.ok) await send([addCard(name, await answer.blob())]);
    else status.textContent = await reason(answer);
  } catch {
    status.textContent = "The server cannot be reached.";
  }
});
for (const kind of ["dragover", "dragleave", "drop"]) {
  find("drop").addEventListener(kind, (event) => {
    event.preventDefault();
    find("drop").classList.toggle("over", kind === "dragover");
    if (kind === "drop") add(event.dataTransfer.files);
  });
}

// ---- Downloads -------------------------------------------------------------------------------------------------------

function save(blob, name) {
  const url = URL.createObjectURL(blob);
  make("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

function quote(text) {
  return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}

function rowsOf(some) {
  const lines = some.filter((card) => card.levels).flatMap((card) =>
    classes.map((one) => `${quote(`${card.name}_${one.name}`)},${encodeRuns(card.masks[one.index].runs)}`));
  return [`${document.body.dataset.key},EncodedPixels`, ...lines, ""].join("\n");
}

const saveRows = (some, name) => save(new Blob([rowsOf(some)], { type: "text/csv" }), name);
find("rows").addEventListener("click", () => saveRows(cards, "submission.csv"));

// The server computes the polygons, with the rules of the sliders; the file name may state the position of the image.
async function saveOutlines(card) {
  const rules = Object.fromEntries(classes.map((one) => [one.name, one.rule]));
  const form = new FormData();
  form.append("images", card.file, card.name);
  status.textContent = `${card.name}: waiting for the polygons…`;
  try {
    const headers = { Accept: "application/geo+json" };
    const path = `v1/segment?rules=${encodeURIComponent(JSON.stringify(rules))}`;
    const answer = await ask(path, { method: "POST", body: form, headers });
    if (!answer.ok) {
      status.textContent = `${card.name}: ${await reason(answer)}`;
      return;
    }
    save(await answer.blob(), `${card.name}.geojson`);
    status.textContent = `${card.name}: the polygons are downloaded.`;
  } catch {
    status.textContent = `${card.name}: the server cannot be reached`;
  }
}

async function savePicture(card) {
  const scale = Math.max(1, Math.round(1050 / width));
  const canvas = make("canvas", { width: scale * width, height: scale * height }), drawing = canvas.getContext("2d");
  drawing.scale(scale, scale);
  const picture = new Image();
  picture.src = card.url;
  try {
    await picture.decode();
    drawing.drawImage(picture, 0, 0, width, height);
  } catch {
    drawing.fillRect(0, 0, width, height);
  }
  drawing.lineJoin = "round";
  for (const one of classes) {
    if (!one.shown.checked || !card.masks[one.index].area) continue;
    const path = new Path2D(traceRuns(card.masks[one.index].runs, width, height)), unit = Math.max(width, height) / 525;
    for (const [colour, line] of [["#0008", 4.6], [one.colour, 2.2]]) {
      drawing.strokeStyle = colour;
      drawing.lineWidth = line * unit;
      drawing.setLineDash(colour === "#0008" || one.dash === "none" ? [] : one.dash.split(" ").map((step) => step * unit));
      drawing.stroke(path);
    }
  }
  canvas.toBlob((blob) => save(blob, `${card.name}.png`));
}
