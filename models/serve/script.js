"use strict";

const $ = id => document.getElementById(id);
const state = { model: null, files: new Map(), example: null, theta: null, answer: null, asking: null };
const STEPS = 1000;

/** An element of text and children; text is never read as HTML. */
function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

const percent = share => `${(100 * share).toFixed(1)} %`;

function say(text, bad = false) {
  $("status").textContent = text;
  $("status").classList.toggle("bad", bad);
}

/** The threshold at a slider's position: cubic, as trained thresholds lie near 0. */
const thetaAt = position => state.model.theta.largest * (position / STEPS) ** 3;
const positionOf = theta => Math.min(STEPS, Math.round(STEPS * Math.cbrt(theta / state.model.theta.largest)));

function swatch(color) {
  const box = make("span", { className: "swatch" });
  box.style.background = color;
  return box;
}

function bar(share) {
  const inner = make("i");
  inner.style.width = `${100 * Math.min(1, share)}%`;
  return make("span", { className: "bar" }, inner);
}

function figure(uri, title, detail = "") {
  const caption = make("figcaption", {}, make("b", { textContent: title }), detail);
  return make("figure", {}, make("img", { src: uri, alt: title }), caption);
}

function head(...names) {
  return make("thead", {}, make("tr", {}, ...names.map(name => make("th", { scope: "col", textContent: name }))));
}

// ---- what is asked

function choose(kind, file) {
  state.files.set(kind, file);
  choosing(null);
  const box = $(`drop-${kind}`);
  box.querySelector(".text span").textContent = `${file.name}, ${(file.size / 2 ** 20).toFixed(2)} MB`;
  box.querySelector("img")?.remove();
  const preview = make("img", { src: URL.createObjectURL(file), alt: "" });
  preview.onload = () => URL.revokeObjectURL(preview.src);
  preview.onerror = () => preview.remove();  // formats that browsers cannot show
  box.prepend(preview);
}

/** Take an example, or none, in place of files. */
function choosing(example) {
  state.example = example;
  for (const button of document.querySelectorAll(".example"))
    button.setAttribute("aria-pressed", String(Number(button.dataset.number) === example));
  if (example === null) return;
  state.files.clear();
  for (const kind of state.model.files) {
    const box = $(`drop-${kind}`);
    box.querySelector("input").value = "";
    box.querySelector("img")?.remove();
    box.querySelector(".text span").textContent = "choose a file, or drop it here";
  }
}

function fileInput(kind) {
  const input = make("input", { type: "file", id: `file-${kind}`, accept: ".png,.jpg,.jpeg,.webp,.bmp,.tif,.tiff,.npy" });
  input.setAttribute("aria-label", `${kind} file`);
  const text = make("span", { className: "text" }, make("strong", { textContent: kind }),
    make("span", { textContent: "choose a file, or drop it here" }));
  const box = make("label", { className: "drop", id: `drop-${kind}` }, text, input);
  input.onchange = () => input.files.length && choose(kind, input.files[0]);
  box.ondragover = event => { event.preventDefault(); box.classList.add("over"); };
  box.ondragleave = () => box.classList.remove("over");
  box.ondrop = event => {
    event.preventDefault();
    box.classList.remove("over");
    if (event.dataTransfer.files.length) choose(kind, event.dataTransfer.files[0]);
  };
  return box;
}

function setTheta(theta) {
  state.theta = theta;
  const { trained } = state.model.theta;
  $("theta").value = positionOf(theta ?? trained);
  $("theta-value").textContent = theta === null ? `${trained.toPrecision(3)}, as trained` : theta.toPrecision(3);
  $("theta").setAttribute("aria-valuetext", $("theta-value").textContent);
  $("theta-reset").hidden = theta === null;
}

function showModel(model) {
  state.model = model;
  $("model").textContent = `${model.recipe}: ${model.network} on ${model.encoder}, fusion ${model.fusion}, `
    + `${model.classes.length} classes of ${model.modalities.join(" and ")}; cen_ext ${model.version}, on ${model.device}`;
  $("files").replaceChildren(...model.files.map(fileInput));
  for (const name of model.modalities) {
    const box = make("input", { type: "checkbox", name: "plug", value: name, checked: true, disabled: model.why_all !== null });
    box.onchange = () => state.answer && ask();
    $("plugs").append(make("label", {}, box, name));
  }
  $("why-all").hidden = model.why_all === null;
  $("why-all").textContent = model.why_all ?? "";
  if (model.theta.why_fixed !== null) {
    $("theta").disabled = true;
    $("theta-reset").hidden = true;
    $("theta-note").textContent = `Not to be moved: ${model.theta.why_fixed}.`;
    return;
  }
  $("theta-marks").append(make("option", { value: positionOf(model.theta.trained) }));
  $("theta-note").textContent = "A channel whose scale lies below θ is replaced by the other modalities' mean. "
    + `0: none is; ${model.theta.largest.toPrecision(3)}: every one that may be.`;
  $("theta").oninput = () => setTheta(thetaAt(Number($("theta").value)));
  $("theta").onchange = () => state.answer && ask();
  $("theta-reset").onclick = () => { setTheta(null); if (state.answer) ask(); };
  setTheta(null);
}

function showExamples(examples) {
  $("examples").hidden = examples.length === 0;
  examples.forEach((example, number) => {
    const images = Object.entries(example.images).map(([name, uri]) => make("img", { src: uri, alt: name }));
    const button = make("button", { type: "button", className: "example" }, make("div", {}, ...images),
      make("span", { textContent: example.name }));
    button.dataset.number = number;
    button.setAttribute("aria-pressed", "false");
    button.onclick = () => { choosing(number); ask(true); };
    $("example-list").append(button);
  });
}

function question() {
  const form = new FormData();
  if (state.example === null) for (const [kind, file] of state.files) form.append(kind, file, file.name);
  else form.append("example", state.example);
  if (state.theta !== null) form.append("theta", state.theta);
  const out = [...document.querySelectorAll("[name=plug]:not(:checked)")].map(box => box.value);
  form.append("unplug", out.join(","));
  return form;
}

async function ask(move = false) {
  if (state.example === null && state.files.size === 0) {
    say("Choose a file first.", true);
    return;
  }
  state.asking?.abort();  // only the last question counts
  const asking = state.asking = new AbortController();
  $("run").disabled = true;
  say("Segmenting …");
  try {
    const response = await fetch("api/predict", { method: "POST", body: question(), signal: asking.signal });
    const answer = await response.json();
    if (!response.ok) say(answer.error, true);
    else {
      state.answer = answer;
      show(answer);
      if (move) reveal();
      const seconds = Object.values(answer.seconds).reduce((sum, each) => sum + each, 0);
      say(`Done in ${seconds.toFixed(2)} seconds.`);
    }
  } catch (error) {
    if (error.name !== "AbortError") say("The server cannot be reached.", true);
  } finally {
    if (state.asking === asking) $("run").disabled = false;
  }
}

// ---- what is answered

/** Bring the picture into view where the form fills the window, as on phones. */
function reveal() {
  const smooth = !matchMedia("(prefers-reduced-motion: reduce)").matches;
  if ($("results").getBoundingClientRect().top > innerHeight / 2)
    $("results").scrollIntoView({ behavior: smooth ? "smooth" : "auto" });
}

function layers(answer) {
  const { labels, confidence, relied_on: relied } = answer.images;
  const found = new Map(Object.entries(labels).reverse().map(([name, uri]) => [name === "ensemble" ? name : `branch ${name}`, uri]));
  if (relied) found.set("modality relied on", relied);
  return found.set("confidence", confidence);
}

function showLayer() {
  const found = layers(state.answer);
  $("layer").src = found.get($("which").value);
  $("layer").alt = `${$("which").value}, over the picture`;
  $("layer").style.opacity = $("opacity").value / 100;
}

function show(answer) {
  $("nothing").hidden = true;
  $("found").hidden = false;
  const inputs = answer.images.inputs;
  $("base").src = inputs.rgb ?? Object.values(inputs)[0];
  const before = $("which").value, names = [...layers(answer).keys()];
  $("which").replaceChildren(...names.map(name => make("option", { value: name, textContent: name })));
  $("which").value = names.includes(before) ? before : names[0];
  showLayer();
  const seconds = Object.entries(answer.seconds).map(([phase, time]) => `${phase} ${(1000 * time).toFixed(0)} ms`);
  $("facts").textContent = `${answer.size.width} × ${answer.size.height} pixels, mean confidence ${percent(answer.confidence)}; ${seconds.join(", ")}`;
  $("warnings").replaceChildren(...answer.warnings.map(text => make("li", { textContent: text })));
  showClasses(answer);
  showMaps(answer);
  showRelied(answer);
  showExchange(answer);
}

function showClasses(answer) {
  const outputs = [...answer.outputs].reverse();
  const seen = answer.classes.filter(each => outputs.some(name => each.shares[name] > 0))
    .sort((a, b) => b.shares.ensemble - a.shares.ensemble);
  const rows = seen.map(each => make("tr", {}, make("th", { scope: "row" }, swatch(each.color), each.name),
    ...outputs.map((name, first) => make("td", {}, percent(each.shares[name]), ...(first === 0 ? [bar(each.shares[name])] : [])))));
  $("classes").replaceChildren(head("share of pixels", ...outputs), make("tbody", {}, ...rows));
}

function showMaps(answer) {
  const weight = name => answer.alpha && name in answer.alpha ? `, α = ${answer.alpha[name].toFixed(3)}` : "";
  const inputs = Object.entries(answer.images.inputs).map(([name, uri]) => figure(uri, name, ": input"));
  const branches = Object.entries(answer.images.labels).filter(([name]) => name !== "ensemble")
    .map(([name, uri]) => figure(uri, name, `: branch${weight(name)}`));
  $("maps").replaceChildren(...inputs, ...branches, figure(answer.images.labels.ensemble, "ensemble"));
}

function showRelied(answer) {
  const { why_not: whyNot, shares } = answer.relied_on;
  const parts = [];
  if (whyNot) parts.push(make("p", { textContent: `There is no such map: ${whyNot}.` }));
  else {
    const map = figure(answer.images.relied_on, "modality relied on");
    const entries = Object.entries(shares).map(([name, share]) =>
      make("li", {}, swatch(state.model.colors[name]), `${name} ${percent(share)}`));
    map.append(make("ul", { className: "legend" }, ...entries));
    parts.push(map);
  }
  const sure = figure(answer.images.confidence, "confidence", ": the ensemble's probability of its class");
  sure.append(make("span", { className: "ramp" }), make("span", { className: "ends muted" }, make("span", { textContent: "0" }), make("span", { textContent: "1" })));
  $("relied").replaceChildren(...parts, sure);
}

function showExchange(answer) {
  const layers = answer.exchanged;
  if (layers.length === 0) {
    $("exchange-note").textContent = "No layer of this network exchanges channels.";
    $("exchange").replaceChildren();
    return;
  }
  const names = Object.keys(layers[0].shares);
  $("exchange-note").textContent = `The share of a layer's channels that a modality takes from the others, ${layers.length} layers`
    + (answer.theta === null ? "." : `, θ = ${answer.theta.toPrecision(3)}.`);
  const rows = layers.map(layer => make("tr", {}, make("th", { scope: "row", textContent: layer.name }),
    make("td", { textContent: layer.channels }),
    ...names.map(name => make("td", {}, percent(layer.shares[name]), bar(layer.shares[name])))));
  $("exchange").replaceChildren(head("layer", "channels", ...names), make("tbody", {}, ...rows));
}

// ---- start

$("form").onsubmit = event => { event.preventDefault(); ask(true); };
$("which").onchange = showLayer;
$("opacity").oninput = showLayer;
// A file that misses its box must not replace the page.
for (const name of ["dragover", "drop"]) addEventListener(name, event => event.preventDefault());

(async () => {
  try {
    showModel(await (await fetch("api/model")).json());
    showExamples(await (await fetch("api/examples")).json());
  } catch {
    say("The server cannot be reached.", true);
  }
})();
