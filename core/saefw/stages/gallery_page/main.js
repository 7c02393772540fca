// Reads the address, shows what it asks for, and listens.
"use strict";

let turn = 0, seen = { key: "", features: [] }, left = 0, cover = 80;

function failed(error) {
  byId("failed").hidden = false;
  byId("failed").textContent = String(error.message || error);
}

// Shows what the address says.
async function show() {
  const mine = ++turn, state = route(), sae = await openSae(state.sae);
  if (mine !== turn) return;
  const key = address(state);
  if (seen.key !== key || !seen.features.length) seen = { key, features: choose(sae, state) };
  const on = state.feature !== null && state.feature < sae.n_features, was = !byId("browse").hidden;
  if (on) {
    if (was) left = scrollY;
    byId("browse").hidden = true;
    await showFeature(sae, state, state.feature, seen.features, () => mine === turn);
    if (mine !== turn) return;
    byId("page").hidden = false;
    scrollTo(0, 0);
    byId("title").focus({ preventScroll: true });
  } else {
    byId("page").hidden = true;
    byId("browse").hidden = false;
    controls(sae, state);
    showList(sae, state, seen.features);
    showMap(sae, state, seen.features);
    document.title = `Features of ${sae.name}`;
    if (!was) scrollTo(0, left);
    drawList();
  }
  byId("search").value = state.q === byId("search").value.trim() ? byId("search").value : state.q;
  byId("saes").value = sae.number;
  byId("home").href = state.sae ? `#/?sae=${state.sae}` : "#/";
  document.body.dataset.ready = location.hash || "#/";
}

function controls(sae, state) {
  const known = orders(sae).filter((key) => key !== "match" || state.q.trim());
  byId("sort").replaceChildren(...known.map((key) => element("option", { value: key }, ORDERS[key].name)));
  byId("sort").value = state.sort || (state.q.trim() ? "match" : known.find((key) => key !== "frequency"));
  byId("shown").checked = state.shown;
  byId("frequency-of").textContent = `share of ${unit(sae)} on which it fires`;
  for (const name of ["f", "v"]) {
    state[name].forEach((x, i) => { byId(name + i).value = Number.isFinite(x) ? short(10 ** x) : ""; });
  }
  if (byId("classes").dataset.sae !== String(sae.number)) {
    byId("classes").dataset.sae = sae.number;
    byId("classes").replaceChildren(...sae.classes.map((name) => element("option", { value: name })));
  }
}

// Goes to the list with some things changed; typing makes no history.
function change(what, replace = false) {
  const next = address({ ...route(), ...what });
  if (!replace) location.hash = next;
  else {
    history.replaceState(null, "", next);
    show().catch(failed);
  }
}

function lit(by) {
  document.body.style.setProperty("--cover", by / 100);
  document.body.classList.toggle("plain", by === 0);
  byId("cover").value = by;
}

function bound(id) {
  const value = Number(byId(id).value.replace(",", "."));
  return byId(id).value.trim() && value > 0 ? Math.log10(value) : id.endsWith("0") ? -Infinity : Infinity;
}

function listen() {
  byId("search").addEventListener("input", () => { scrollTo(0, 0); change({ q: byId("search").value.trim(), sort: "" }, true); });
  byId("search").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && seen.features.length) location.hash = address(route(), seen.features[0]);
  });
  byId("sort").addEventListener("change", () => change({ sort: byId("sort").value }));
  byId("turn").addEventListener("click", () => change({ turned: !route().turned }));
  byId("shown").addEventListener("change", () => change({ shown: byId("shown").checked }));
  byId("saes").addEventListener("change", () => change({ sae: Number(byId("saes").value), f: [-Infinity, Infinity], v: [-Infinity, Infinity] }));
  byId("clear").addEventListener("click", () => change({ q: "", shown: false, f: [-Infinity, Infinity], v: [-Infinity, Infinity] }));
  for (const name of ["f", "v"]) {
    for (const i of [0, 1]) byId(name + i).addEventListener("change", () => change({ [name]: [bound(name + 0), bound(name + 1)] }));
  }
  byId("cover").addEventListener("input", () => lit(Number(byId("cover").value)));
  listenToMap(change, (feature) => { location.hash = address(route(), feature); });
  addEventListener("hashchange", () => show().catch(failed));
  addEventListener("scroll", drawList, { passive: true });
  addEventListener("resize", () => { lay(); drawMap(); });
  byId("filters").addEventListener("toggle", drawMap);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawMap);
  byId("large").addEventListener("click", () => byId("large").close());
  document.addEventListener("keydown", pressed);
}

function pressed(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const typing = event.target.matches("input:not([type=range], [type=checkbox]), select"), way = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (event.key === "Escape" && !byId("large").open) {
    if (event.target === byId("search")) byId("search").blur();
    else if (!byId("page").hidden) location.hash = byId("back").getAttribute("href");
    return;
  }
  if (typing && !(event.target === byId("search") && event.key === "ArrowDown")) return;
  if (byId("large").open) { if (way) large.by(way); }
  else if (event.key === "/") { event.preventDefault(); byId("search").focus(); byId("search").select(); }
  else if (event.key === "p") { const now = Number(byId("cover").value); if (now) cover = now; lit(now ? 0 : cover); }
  else if (event.target.matches("input[type=range]")) return;
  else if (!byId("page").hidden) {
    if (way) { const link = byId(way < 0 ? "before" : "after"); if (!link.hidden) location.hash = link.getAttribute("href"); }
  } else {
    const by = { ArrowUp: -list.columns, ArrowDown: list.columns }[event.key] ?? way;
    if (by) { event.preventDefault(); step(by); }
  }
}

async function start() {
  await openGallery();
  byId("saes").replaceChildren(...gallery.saes.map((sae) => element("option", { value: sae.number }, sae.name)));
  const several = gallery.saes.length > 1;
  byId("saes").hidden = !several;
  byId("only").hidden = several;
  byId("only").textContent = gallery.saes[0].name;
  if (matchMedia("(max-width: 800px)").matches) byId("filters").open = false;
  listen();
  lit(cover);
  await show();
}

start().catch(failed);
