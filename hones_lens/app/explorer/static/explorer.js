// The explorer's page: draws what a backend computes, and tells it what was clicked.
// A backend has: scene, state, view, live (whether it computes), ask(state), listen(fn(state, view)).
// Text of tokens only ever goes through textContent.

const MINUS = "\u2212", TIMES = "\u00d7", NO = "\u2013";

export function number(x, digits = 3) {
  if (x === null || x === undefined || Number.isNaN(x)) return NO;
  if (x === 0) return "0";
  const size = Math.abs(x);
  const text = size >= 0.001 && size < 1e5 ? size.toPrecision(digits) : size.toExponential(digits - 1);
  return (x < 0 ? MINUS : "") + (size >= 1000 && size < 1e5 ? size.toFixed(0) : text);
}

export function percent(p) {
  if (p === null || p === undefined) return NO;
  if (p > 0 && p < 1e-4) return "< 0.01 %";
  if (p > 0.9999) return "> 99.99 %";
  if (p < 0.01 || p > 0.99) return (100 * p).toFixed(2) + " %";
  return (100 * p).toFixed(1) + " %";
}

const name = (kind, place) => `L${place[0]}${kind === "head" ? "H" : "N"}${place[1]}`;
const same = (a, b) => Boolean(a && b && a[0] === b[0] && a[1] === b[1]);
const quoted = (text) => `\u201c${text}\u201d`;

function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (key === "on") for (const [event, fn] of Object.entries(value)) element.addEventListener(event, fn);
    else if (key === "style") for (const [k, v] of Object.entries(value)) element.style.setProperty(k, v);
    else if (key === "key") element.dataset.key = value;
    else element.setAttribute(key, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return element;
}

// One tab stop for a grid of cells; arrow keys move inside.
function roving(grid, cells, columns) {
  grid.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns, ArrowUp: -columns }[event.key];
    const at = cells.indexOf(event.target);
    if (!step || at < 0) return;
    event.preventDefault();
    event.stopPropagation();
    const to = cells[at + step];
    if (!to || (Math.abs(step) === 1 && Math.floor(at / columns) !== Math.floor((at + step) / columns))) return;
    stop(cells, at + step);
    to.focus();
  });
}
function stop(cells, at) {
  cells.forEach((cell, i) => (cell.tabIndex = i === at ? 0 : -1));
}

function tint(element, share) {
  const strength = Math.min(1, Math.abs(share));
  const colour = share < 0 ? "var(--negative)" : "var(--selected)";
  element.style.background = `color-mix(in srgb, ${colour} ${(100 * strength).toFixed(1)}%, transparent)`;
  element.classList.toggle("hx-strong", strength > 0.55);
}

function decode(packed) {
  const text = atob(packed.bytes);
  return { ...packed, at: (i) => text.charCodeAt(i) };
}

export function mount(el, backend) {
  const scene = backend.scene;
  let state = backend.state, view = backend.view, listed = "fed", started = null;
  let attention = { of: null };
  const cards = {};
  const root = h("div", { class: "hx", role: "application", "aria-label": "Explorer of a model's heads and neurons" });

  // -- talking to the backend ---------------------------------------------------------------------

  function change(part) {
    started = performance.now();
    state = { ...state, ...part };
    draw();
    backend.ask(state);
  }
  function edit(kind, place, factor) {
    const kept = state.edits.filter((e) => !(e.kind === kind && e.layer === place[0] && e.index === place[1]));
    if (factor !== 1) kept.push({ kind, layer: place[0], index: place[1], factor });
    change({ edits: kept });
  }
  const edited = (kind, place) =>
    state.edits.find((e) => e.kind === kind && e.layer === place[0] && e.index === place[1]);

  // -- what is looked at --------------------------------------------------------------------------

  const label = (position) => {
    for (const [i, image] of scene.images.entries()) {
      const at = image.cells.indexOf(position);
      if (at >= 0) {
        const which = scene.images.length > 1 ? ` of picture ${i + 1}` : "";
        return `patch (${Math.floor(at / image.columns)}, ${at % image.columns})${which}`;
      }
    }
    return quoted(scene.tokens[position].text ?? "image");
  };
  const target = () => scene.answer[view.answer ? view.answer.step : 0].text;

  function values() {
    if (state.show === "neuron") {
      return view.neuron && same(view.neuron.place, state.neuron) ? view.neuron.activation : null;
    }
    if (state.show !== "head") return null;
    if (view.head && same(view.head.place, state.head) && view.head.attention) return view.head.attention;
    if (!view.attention) return null;
    if (attention.of !== view.attention) attention = { ...decode(view.attention), of: view.attention };
    const [layer, head] = state.head, keys = attention.keys, start = (layer * scene.heads + head) * keys;
    const largest = attention.largest[layer][head];
    return Array.from({ length: keys }, (_, i) => (attention.at(start + i) / 255) * largest);
  }

  // -- pieces -------------------------------------------------------------------------------------

  function card(key, title, ...extra) {
    const heading = h("h3", {}, title), body = h("div", { class: "hx-body" });
    const section = h("section", { class: `hx-card hx-${key}`, "aria-label": title }, h("header", {}, heading, ...extra), body);
    cards[key] = { section, heading, body };
    return section;
  }

  function patches(image, where) {
    const cells = [];
    for (const position of image.cells) { // null: the patch has no token
      cells.push(
        h("button", {
          class: "hx-patch", type: "button", tabindex: -1, "data-patch": position, disabled: position === null,
          on: { click: () => change({ lens: position }) },
        }),
      );
    }
    const grid = h("div", {
      class: `hx-patches hx-${where}`, role: "group", "aria-label": `patches, ${image.rows} rows of ${image.columns}`,
      style: { "grid-template-columns": `repeat(${image.columns}, 1fr)`, "grid-template-rows": `repeat(${image.rows}, 1fr)` },
    }, cells);
    stop(cells, 0);
    roving(grid, cells, image.columns);
    return { image, grid, cells, where };
  }

  const onPatches = (image, all) => image.cells.filter((position) => position !== null).map((position) => all[position]);

  function drawPatches({ image, cells, where }, all) {
    const mine = all ? image.cells.map((position) => all[position]) : null;
    const most = all ? Math.max(...scene.images.flatMap((m) => onPatches(m, all).map(Math.abs)), 1e-12) : 1;
    cells.forEach((cell, i) => {
      const value = mine ? mine[i] : null;
      const share = value === null ? 0 : value / most;
      cell.className = "hx-patch";
      if (value === null || value === undefined) cell.style.background = "none";
      else if (where === "over" && state.show === "head") cell.style.background = `rgb(10 13 18 / ${(0.68 * (1 - share)).toFixed(3)})`;
      else tint(cell, where === "over" ? 0.9 * share : share);
      if (value !== null && Math.abs(share) === 1 && where === "over") cell.classList.add("hx-most");
      const chosen = image.cells[i] !== null && image.cells[i] === state.lens;
      cell.classList.toggle("hx-chosen", chosen);
      cell.setAttribute("aria-pressed", String(chosen));
      const said = value === null || value === undefined ? "" : `: ${state.show === "head" ? percent(value) + " of the attention" : "activation " + number(value)}`;
      const title = `row ${Math.floor(i / image.columns)}, column ${i % image.columns}${said}`;
      cell.title = title;
      cell.setAttribute("aria-label", title);
    });
  }

  function tokens(title, rows, most, note) {
    const row = ([text, value, raw]) => h("li", {
      class: value < 0 ? "hx-minus" : "", title: `${raw}: ${number(value, 5)}`, style: { "--p": `${((100 * Math.abs(value)) / most).toFixed(1)}%` },
    }, h("span", { class: "hx-word" }, text), h("output", {}, number(value)));
    return h("div", {}, h("h4", { title: note }, title), h("ol", { class: "hx-effects" }, rows.map(row)));
  }
  function twoLists(up, down, notes) {
    const most = Math.max(...[...up, ...down].map((row) => Math.abs(row[1])), 1e-12);
    return h("div", { class: "hx-two" }, tokens("promotes", up, most, notes), tokens("suppresses", down, most, notes));
  }

  function places(kind, rows, chosen, note) {
    const most = Math.max(...rows.map((row) => Math.abs(row[2])), 1e-12);
    return h("ol", { class: "hx-list hx-places" }, rows.map(([layer, index, value, shown = value]) => {
      const place = [layer, index], on = same(place, chosen);
      const bar = h("i", { class: value < 0 ? "hx-minus" : "", style: { width: `${((100 * Math.abs(value)) / most).toFixed(1)}%` } });
      return h("li", {}, h("button", {
        type: "button", class: on ? "hx-on" : "", "aria-pressed": String(on), key: `${note}-${name(kind, place)}`, "data-place": `${layer}.${index}`,
        title: `${name(kind, place)}: ${note} ${number(shown, 5)}`,
        on: { click: () => change(kind === "head" ? { head: place, show: "head" } : { neuron: place, show: "neuron" }) },
      }, h("span", { class: "hx-word" }, name(kind, place), edited(kind, place) ? h("em", {}, "edited") : null), h("span", { class: "hx-bar" }, bar), h("output", {}, number(shown))));
    }));
  }

  function controls(kind, place) {
    const now = edited(kind, place), ablated = Boolean(now && now.factor === null);
    const factor = now && now.factor !== null ? now.factor : 1;
    const output = h("output", {}, ablated ? NO : `${TIMES} ${factor.toFixed(1)}`);
    const slider = h("input", {
      type: "range", min: 0, max: 4, step: 0.1, value: ablated ? 1 : factor, key: `scale-${kind}`, disabled: !backend.live,
      "aria-label": `scale ${name(kind, place)}`, title: backend.live ? "multiply its output; double-click: back to 1" : "scaling needs the model",
      on: {
        input: (event) => edit(kind, place, Number(event.target.value)),
        dblclick: () => edit(kind, place, 1),
      },
    });
    const why = kind === "head" ? "replace it by the mean of its layer's other heads, at every position" : "set it to zero, at every position";
    return h("div", { class: "hx-controls" },
      h("button", {
        type: "button", class: `hx-toggle${ablated ? " hx-on" : ""}`, "aria-pressed": String(ablated), key: `ablate-${kind}`, title: why,
        on: { click: () => edit(kind, place, ablated ? 1 : null) },
      }, ablated ? "Ablated" : "Ablate"),
      h("label", {}, "scale", slider, output));
  }
  const missing = () => h("p", { class: "hx-note" }, backend.live ? "computing \u2026" : "This page does not keep these numbers; the live explorer computes them.");

  // -- sections -----------------------------------------------------------------------------------

  const overlays = [], folds = [];
  function buildPicture() {
    const choices = h("div", { class: "hx-choices", role: "group", "aria-label": "what lies over the picture" });
    const figures = scene.images.map((image) => {
      const [left, top, right, bottom] = image.region.map((x) => 100 * x);
      const over = patches(image, "over");
      over.grid.style.cssText += `left:${left}%;top:${top}%;width:${right - left}%;height:${bottom - top}%;`;
      overlays.push(over);
      const picture = h("img", { src: image.src, alt: "the picture", draggable: "false" });
      return h("div", { class: "hx-picture", style: { "aspect-ratio": `${image.width} / ${image.height}` } }, picture, over.grid);
    });
    const section = card("image", scene.images.length > 1 ? "Pictures" : "Picture");
    cards.image.body.append(choices, ...figures, h("div", { class: "hx-scale", "aria-hidden": "true" }), h("p", { class: "hx-note" }));
    if (!figures.length) cards.image.body.replaceChildren(h("p", { class: "hx-note" }, "This prompt has no picture."));
    return section;
  }
  function drawPicture() {
    if (!scene.images.length) return;
    const body = cards.image.body, all = values();
    const choice = (show, text) => h("button", {
      type: "button", class: state.show === show ? "hx-on" : "", "aria-pressed": String(state.show === show), key: `show-${show}`,
      on: { click: () => change({ show }) },
    }, text);
    body.firstChild.replaceChildren(choice("head", "Attention"), choice("neuron", "Activation"), choice("picture", "Picture"));
    overlays.forEach((over) => drawPatches(over, all));
    body.classList.toggle("hx-grey", state.show === "neuron");
    const [note, scale] = [body.lastChild, body.lastChild.previousSibling];
    scale.hidden = !all;
    if (!all) { note.textContent = "Click a patch for its logit lens."; return; }
    const spans = scene.images.map((m) => onPatches(m, all));
    const flat = spans.flat(), most = flat.reduce((a, b) => (Math.abs(b) > Math.abs(a) ? b : a), 0);
    scale.className = `hx-scale hx-of-${state.show}`;
    if (state.show === "head") {
      const sum = flat.reduce((a, b) => a + b, 0);
      scale.replaceChildren(h("span", {}, "0"), h("i"), h("span", {}, percent(most)));
      note.textContent = `Where ${name("head", state.head)} looks from ${label(view.token ?? state.token)}: ${percent(sum)} of its attention lies on the picture, ${percent(most)} on the brightest patch.`;
    } else {
      const size = Math.abs(most);
      scale.replaceChildren(h("span", {}, number(-size)), h("i"), h("span", {}, number(size)));
      note.textContent = `Activation of ${name("neuron", state.neuron)} at the patches: from ${number(Math.min(...flat))} to ${number(Math.max(...flat))}.`;
    }
  }

  function drawAnswer() {
    const { body } = cards.answer, a = view.answer;
    if (!a) return body.replaceChildren(missing());
    const changed = state.edits.length > 0 && a.text !== scene.text;
    const chips = scene.answer.map((cell, i) => {
      const fell = a.p[i] - a.was[i], at = scene.first + i, on = i === a.step;
      return h("button", {
        type: "button", class: `hx-token hx-said${on ? " hx-on" : ""}`, "aria-pressed": String(on), key: `said-${i}`,
        title: `${cell.raw}: ${number(a.p[i], 6)}${state.edits.length ? `, unedited ${number(a.was[i], 6)}` : ""}; log-probability ${number(Math.log(a.p[i]), 4)} nats`,
        on: { click: () => change({ token: at, lens: at }) },
      }, h("span", {}, cell.text), h("output", { class: fell < -0.005 ? "hx-down" : fell > 0.005 ? "hx-up" : "" }, percent(a.p[i])));
    });
    const likely = h("ol", { class: "hx-list hx-likely" }, a.likely.map(([text, p, was, raw]) =>
      h("li", { title: `${raw}: ${number(p, 6)}, unedited ${number(was, 6)}` },
        h("span", { class: "hx-word" }, text),
        h("span", { class: "hx-bar" }, h("i", { style: { width: `${(100 * p).toFixed(2)}%` } }), h("b", { style: { left: `${(100 * was).toFixed(2)}%` } })),
        h("output", {}, percent(p)))));
    const edits = state.edits.map((e) => {
      const place = [e.layer, e.index], text = `${name(e.kind, place)} ${e.factor === null ? "ablated" : `${TIMES} ${number(e.factor, 2)}`}`;
      return h("button", { type: "button", class: "hx-edit", title: "undo", "aria-label": `undo: ${text}`, key: `edit-${text}`, on: { click: () => edit(e.kind, place, 1) } }, text, h("span", { "aria-hidden": "true" }, "\u00d7"));
    });
    if (edits.length > 1) edits.push(h("button", { type: "button", class: "hx-plain", key: "clear", on: { click: () => change({ edits: [] }) } }, "undo all"));
    body.replaceChildren(
      h("div", { class: "hx-two hx-wide" },
        h("div", {},
          h("p", { class: "hx-says", "aria-live": "polite" }, h("strong", {}, a.text || "(nothing)"), changed ? h("s", { title: "without the edits" }, scene.text) : null),
          h("h4", { title: "of the unedited answer, token by token" }, state.edits.length ? `probability of ${quoted(scene.text)}` : "its tokens"),
          h("div", { class: "hx-tokens" }, chips)),
        h("div", {}, h("h4", { title: "the mark is the probability without edits" }, a.step ? `token ${a.step + 1} is likeliest to be` : "likeliest to come first"), likely)),
      h("div", { class: "hx-edits" }, edits.length ? edits : h("span", { class: "hx-note" }, "Nothing is changed. Ablate or scale a head or a neuron below.")),
      ...(edits.length && !backend.live ? [h("p", { class: "hx-note hx-frozen" }, "This page keeps the answer under an edit; all else is shown without it. The live explorer computes the rest.")] : []));
  }

  function buildPrompt() {
    const section = card("prompt", "Prompt", h("span", { class: "hx-hint" }, "click a token to look from it"));
    const cells = [];
    for (let position = 0; position <= scene.first; position++) {
      const here = scene.images.findIndex((m) => m.start === position);
      if (here >= 0) {
        const image = scene.images[here], grid = patches(image, "fold"), share = h("output");
        const fold = h("button", { type: "button", class: "hx-token hx-fold", "aria-expanded": "false", key: `fold-${here}`, title: "open the patches" }, h("span", {}, `${image.rows} ${TIMES} ${image.columns} patches`), share);
        const drawer = h("div", { class: "hx-drawer", hidden: true }, grid.grid);
        grid.grid.style.aspectRatio = `${image.columns} / ${image.rows}`;
        fold.addEventListener("click", () => {
          drawer.hidden = !drawer.hidden;
          fold.setAttribute("aria-expanded", String(!drawer.hidden));
        });
        folds.push({ grid, share, image, fold });
        cells.push(fold, drawer);
      }
      const cell = scene.tokens[position];
      if (cell.image) continue;
      cells.push(h("button", {
        type: "button", class: "hx-token", "data-token": position, key: `token-${position}`,
        on: { click: () => change({ token: position, lens: position }) },
      }, cell.text));
    }
    cards.prompt.body.append(h("div", { class: "hx-tokens hx-flow" }, cells));
    return section;
  }
  function drawPrompt() {
    const all = values();
    const texts = [...cards.prompt.body.querySelectorAll("[data-token]")];
    const most = all ? Math.max(...texts.map((t) => Math.abs(all[t.dataset.token] ?? 0)), 1e-12) : 1;
    texts.forEach((element) => {
      const position = Number(element.dataset.token), value = all ? all[position] ?? null : null, cell = scene.tokens[position];
      tint(element, value === null ? 0 : (0.75 * value) / most);
      element.classList.toggle("hx-on", position === state.token);
      element.setAttribute("aria-pressed", String(position === state.token));
      element.title = `${cell.raw}, position ${position}` + (value === null ? "" : state.show === "head" ? `: ${percent(value)} of the attention` : `: activation ${number(value)}`);
    });
    folds.forEach(({ grid, share, image }) => {
      const mine = all ? onPatches(image, all) : null;
      share.textContent = !mine ? "" : state.show === "head" ? percent(mine.reduce((a, b) => a + b, 0)) : `up to ${number(Math.max(...mine), 2)}`;
      drawPatches(grid, all);
    });
  }

  const heads = [];
  const cellText = (value, most) => value.toFixed(most < 1 ? 2 : 1).replace(/^-(?=[0.]*$)/, "").replace("-", MINUS);
  function buildHeads() {
    const section = card("heads", "Heads");
    const every = scene.heads > 16 ? 4 : 1, body = cards.heads.body;
    const grid = h("div", { class: `hx-map${scene.heads > 16 ? " hx-small" : ""}`, role: "group", "aria-label": "heads by layer", style: { "grid-template-columns": `max-content repeat(${scene.heads}, minmax(0, 1fr))` } });
    for (let layer = 0; layer < scene.layers; layer++) {
      const shown = scene.layers <= 16 || layer % 4 === 0;
      grid.append(h("span", { class: "hx-axis" }, shown ? `L${layer}` : ""));
      for (let head = 0; head < scene.heads; head++) {
        const cell = h("button", { type: "button", tabindex: -1, class: "hx-cell", "data-head": `${layer}.${head}`, on: { click: () => change({ head: [layer, head], show: "head" }) } });
        heads.push({ cell, place: [layer, head] });
        grid.append(cell);
      }
    }
    grid.append(h("span", { class: "hx-axis" }));
    for (let head = 0; head < scene.heads; head++) grid.append(h("span", { class: "hx-axis hx-under" }, head % every ? "" : `H${head}`));
    roving(grid, heads.map((each) => each.cell), scene.heads);
    body.append(grid, h("p", { class: "hx-note" }));
    return section;
  }
  function drawHeads() {
    const m = view.map, note = cards.heads.body.lastChild;
    if (!m) return;
    const most = Math.max(...m.scores.flat().map((v) => Math.abs(v ?? 0)), 1e-12);
    heads.forEach(({ cell, place }, i) => {
      const value = m.scores[place[0]][place[1]], on = same(place, state.head);
      tint(cell, value === null ? 0 : value / most);
      cell.textContent = scene.heads <= 12 && value !== null ? cellText(value, most) : "";
      cell.classList.toggle("hx-on", on);
      cell.classList.toggle("hx-edited", Boolean(edited("head", place)));
      cell.setAttribute("aria-pressed", String(on));
      const text = `${name("head", place)}: ${number(value, 4)}${edited("head", place) ? ", edited" : ""}`;
      cell.title = text;
      cell.setAttribute("aria-label", text);
    });
    stop(heads.map((each) => each.cell), heads.findIndex(({ place }) => same(place, state.head)));
    note.textContent = scene.scores
      ? `Scores of a run. ${scene.scores} without the head.`
      : `What each head adds to the logit of ${quoted(target())}, above the vocabulary's mean.`;
  }

  function drawHead() {
    const place = state.head, { heading, body } = cards.head, d = view.head;
    heading.textContent = `Head ${name("head", place)}`;
    const from = label(view.token ?? state.token);
    if (!d || !same(d.place, place)) return body.replaceChildren(controls("head", place), missing());
    const rows = d.directions.map((each) => h("tr", { title: `singular value ${number(each.size, 4)}; it writes ${number(each.along, 4)} along this direction here` },
      h("td", {}, number(each.size)), h("td", {}, number(each.along)), h("td", {}, each.up.slice(0, 4).map(([text, , raw]) => h("code", { title: raw }, text)))));
    body.replaceChildren(controls("head", place),
      h("p", { class: "hx-note" }, `What it writes at ${from}${backend.live && edited("head", place) ? ", as edited" : ""}, in logits of the tokens (length ${number(d.norm)} in the stream):`),
      twoLists(d.up, d.down, "what its output adds to each token's logit, above the vocabulary's mean"),
      h("details", { class: "hx-more", open: cards.head.open }, h("summary", { key: "directions" }, "directions it can write in"),
        h("table", {}, h("thead", {}, h("tr", {}, h("th", { title: "singular value of W_V W_O, with the norm's weight" }, "gain"), h("th", { title: "length that it writes along it here" }, "here"), h("th", {}, "tokens"))), h("tbody", {}, rows))));
    body.lastChild.addEventListener("toggle", (event) => (cards.head.open = event.target.open));
  }

  function buildNeurons() {
    const choices = h("div", { class: "hx-choices", role: "group", "aria-label": "which neurons" });
    const layer = h("input", { type: "number", min: 0, max: scene.layers - 1, "aria-label": "layer of a neuron", key: "layer", placeholder: "layer" });
    const index = h("input", { type: "number", min: 0, max: scene.neurons - 1, "aria-label": "index of a neuron", key: "index", placeholder: "index" });
    const form = h("form", { class: "hx-open", on: { submit: (event) => {
      event.preventDefault();
      if (layer.value !== "" && index.value !== "") change({ neuron: [Number(layer.value), Number(index.value)], show: "neuron" });
    } } }, h("span", {}, "open"), layer, index, h("button", { type: "submit", class: "hx-toggle" }, "Go"));
    const section = card("neurons", "Neurons");
    cards.neurons.body.append(choices, h("div"), h("p", { class: "hx-note" }), form);
    return section;
  }
  function drawNeurons() {
    const [choices, list, note] = cards.neurons.body.children;
    const choice = (key, text) => h("button", { type: "button", class: listed === key ? "hx-on" : "", "aria-pressed": String(listed === key), key: `list-${key}`, on: { click: () => { listed = key; draw(); } } }, text);
    choices.replaceChildren(choice("fed", `fed by ${name("head", state.head)}`), choice("direct", `towards ${quoted(target())}`));
    if (listed === "fed") {
      const known = view.head && same(view.head.place, state.head);
      // Ordered and drawn by what is written; the figure is the change of the activation.
      list.replaceChildren(known ? places("neuron", view.head.feeds.map(([l, i, change, written]) => [l, i, Math.sign(change) * Math.abs(written), change]), state.neuron, "fed") : missing());
      note.textContent = `Change of the activation at ${label(view.token ?? state.token)} that ${name("head", state.head)} makes directly; bars: times the length of the neuron's output row.`;
    } else {
      list.replaceChildren(view.map ? places("neuron", view.map.neurons, state.neuron, "adds") : missing());
      note.textContent = `What the neuron adds to the logit of ${quoted(target())}, above the vocabulary's mean.`;
    }
  }

  function drawNeuron() {
    const place = state.neuron, { heading, body } = cards.neuron, d = view.neuron;
    heading.textContent = `Neuron ${name("neuron", place)}`;
    if (!d || !same(d.place, place)) return body.replaceChildren(controls("neuron", place), missing());
    const at = d.activation[view.token ?? state.token];
    const turned = d.sign < 0 ? "active below 0, so its output row is turned round" : "its output row as it is";
    body.replaceChildren(controls("neuron", place),
      h("p", { class: "hx-note" }, `Activation ${number(at)} at ${label(view.token ?? state.token)}; adds ${number(d.direct)} to the logit of ${quoted(target())}. What it promotes and suppresses there (${turned}), a unit of activation:`),
      twoLists(d.up, d.down, "sign of the activation here times output row times the unembedding, above the vocabulary's mean"),
      h("div", {}, h("h4", { title: "change of the activation here that each head makes directly" }, "heads that feed it"), places("head", d.fed, state.head, "feeds")));
  }

  function drawLens() {
    const { heading, body } = cards.lens, d = view.lens;
    heading.textContent = `Logit lens of ${label(state.lens)}`;
    if (!d || d.position !== state.lens) return body.replaceChildren(missing());
    const rows = d.rows.map((row, i) => h("tr", {}, h("th", { scope: "row" }, i ? `L${i - 1}` : "in"), row.map(([text, p, raw]) =>
      h("td", { title: `${raw}: ${number(p, 5)}`, style: { "--p": `${(100 * p).toFixed(1)}%` } }, h("span", { class: "hx-word" }, text), h("output", {}, percent(p))))));
    const look = h("button", { type: "button", class: "hx-plain", key: "look", on: { click: () => change({ token: state.lens }) } }, "look from here");
    body.replaceChildren(h("table", { class: "hx-lens-rows" }, h("tbody", {}, rows)),
      h("p", { class: "hx-note" }, "What the stream would say after each block, read through the final norm and the unembedding. ", state.lens === state.token ? null : look));
  }

  // -- all together -------------------------------------------------------------------------------

  function draw() {
    const focused = root.contains(document.activeElement) || el.getRootNode().activeElement ? (el.getRootNode().activeElement ?? document.activeElement)?.dataset?.key : null;
    drawAnswer();
    drawPicture();
    drawPrompt();
    drawHeads();
    drawHead();
    drawNeurons();
    drawNeuron();
    drawLens();
    const again = focused ? [...root.querySelectorAll("[data-key]")].find((element) => element.dataset.key === focused) : null;
    if (again && again !== document.activeElement) again.focus({ preventScroll: true });
  }

  function build() {
    const sizes = `${scene.layers} layers of ${scene.heads} heads and ${scene.neurons.toLocaleString("en")} neurons`;
    root.append(
      h("header", { class: "hx-top" }, h("h2", {}, scene.model), h("span", { class: "hx-hint" }, sizes + (backend.live ? "" : " \u00b7 a saved page"))),
      h("div", { class: "hx-columns" },
        h("div", { class: "hx-column" }, buildPicture(), buildPrompt(), card("lens", "Logit lens")),
        h("div", { class: "hx-column" }, card("answer", "Answer"),
          h("div", { class: "hx-pair" },
            h("div", { class: "hx-column" }, buildHeads(), buildNeurons()),
            h("div", { class: "hx-column" }, card("head", "Head"), card("neuron", "Neuron"))))));
    el.classList.add("hones-explorer");
    el.replaceChildren(root);
  }

  build();
  draw();
  const forget = backend.listen((nextState, nextView, mine) => {
    view = nextView;
    if (mine || !backend.busy()) state = nextState;
    draw();
    if (started !== null && !backend.busy()) {
      const from = started;
      started = null;
      requestAnimationFrame(() => setTimeout(() => {
        el.dataset.milliseconds = (performance.now() - from).toFixed(1);
        el.dataset.drawn = String(Number(el.dataset.drawn ?? 0) + 1);
      }));
    }
  });
  return () => { forget?.(); el.replaceChildren(); };
}

// -- backends: a kernel, or numbers kept in the page --------------------------------------------------

const SECTIONS = ["answer", "map", "attention", "head", "neuron", "lens"];

export function ofKernel(model) {
  let sent = 0, got = 0, next = null, since = 0;
  const read = () => ({ ...Object.fromEntries(SECTIONS.map((section) => [section, model.get(section)])), token: model.get("shown").token });
  const send = (state) => {
    sent += 1;
    since = performance.now();
    model.set("asked", { ...state, n: sent });
    model.save_changes();
  };
  const busy = () => got < sent && performance.now() - since < 10000;
  return {
    scene: model.get("scene"), state: model.get("shown"), view: read(), live: true,
    busy: () => busy() || next !== null,
    ask(state) { if (busy()) next = state; else send(state); },
    listen(fn) {
      // A notebook may tell of all that changed at once, or of one part after the other.
      let told = false;
      const tell = () => {
        told = false;
        const { n, ...state } = model.get("shown");
        if (n === sent) got = sent;
        if (got === sent && next !== null) { const later = next; next = null; send(later); }
        fn(state, read(), n === sent && next === null && got === sent);
      };
      const changed = () => {
        if (!told) queueMicrotask(tell);
        told = true;
      };
      const events = ["shown", ...SECTIONS].map((part) => `change:${part}`);
      events.forEach((event) => model.on(event, changed));
      return () => events.forEach((event) => model.off(event, changed));
    },
  };
}

export function ofPage({ scene, state, kept }) {
  let tell = () => {};
  const look = (state) => {
    const token = state.token, step = Math.max(0, token - scene.first), view = { token };
    const edits = state.edits.map((e) => `${name(e.kind, [e.layer, e.index])}`).join("+");
    const keys = {
      answer: `${edits}@${step}`, map: `${step}`, attention: `${token}`, head: `${token}@${state.head.join(".")}`,
      neuron: `${token}@${state.neuron.join(".")}`, lens: `${state.lens}`,
    };
    for (const section of SECTIONS) view[section] = kept[section][keys[section]] ?? null;
    return view;
  };
  return {
    scene, state, view: look(state), live: false, busy: () => false,
    ask(state) {
      const last = { ...state, edits: state.edits.slice(-1) }; // one at a time: these runs are kept
      tell(last, look(last), true);
    },
    listen(fn) { tell = fn; return () => {}; },
  };
}

export default {
  render({ model, el }) {
    return mount(el, ofKernel(model));
  },
};
