// The list of features: of thousands only those cards are there that are in sight.
"use strict";

const list = { features: [], cards: new Map(), columns: 1, width: 0, height: 0, sae: null, state: null };
const LEAST = 264, GAP = 14, STRIP = 4, WORDS = 76;

function showList(sae, state, features) {
  const other = list.sae !== sae;
  Object.assign(list, { sae, state, features });
  for (const card of list.cards.values()) if (other || !features.length) card.remove();
  if (other || !features.length) list.cards.clear();
  const fire = sae.logs.f.reduce((n, x) => n + (x > -Infinity ? 1 : 0), 0);
  byId("count").textContent = features.length === sae.n_features
    ? `${sae.n_features.toLocaleString("en")} features, ${fire.toLocaleString("en")} fire`
    : `${features.length.toLocaleString("en")} of ${sae.n_features.toLocaleString("en")} features`;
  lay();
}

// Fits the cards to the width there is.
function lay() {
  if (!list.sae || byId("browse").hidden) return;
  const box = byId("list"), width = box.clientWidth;
  list.columns = Math.max(1, Math.floor((width + GAP) / (LEAST + GAP)));
  list.width = (width + GAP) / list.columns - GAP;
  const side = (list.width - 24 - (STRIP - 1) * 6) / STRIP;
  list.height = Math.ceil(side * (list.sae.size[1] / list.sae.size[0])) + WORDS;
  box.style.height = `${Math.ceil(list.features.length / list.columns) * (list.height + GAP)}px`;
  drawList();
}

function drawList() {
  if (!list.sae || byId("browse").hidden) return;
  const pitch = list.height + GAP, top = -byId("list").getBoundingClientRect().top;
  const from = Math.max(0, Math.floor(top / pitch) - 2) * list.columns;
  const to = Math.min(list.features.length, (Math.ceil((top + innerHeight) / pitch) + 2) * list.columns);
  const wanted = new Set();
  for (let i = from; i < to; i++) {
    const feature = list.features[i];
    wanted.add(feature);
    if (!list.cards.has(feature)) {
      list.cards.set(feature, cardOf(list.sae, feature));
      byId("list").append(list.cards.get(feature));
    }
    const card = list.cards.get(feature), column = i % list.columns, row = Math.floor(i / list.columns);
    card.href = address(list.state, feature);
    card.style.width = `${list.width}px`;
    card.style.height = `${list.height}px`;
    card.style.transform = `translate(${column * (list.width + GAP)}px, ${row * pitch}px)`;
    card.dataset.place = i;
  }
  for (const [feature, card] of list.cards) {
    if (!wanted.has(feature)) {
      card.remove();
      list.cards.delete(feature);
    }
  }
}

function cardOf(sae, feature) {
  const card = element("a", { className: "card" });
  card.dataset.feature = feature;
  const fires = sae.logs.f[feature] > -Infinity;
  const head = element("div", { className: "head" }, element("b", {}, `#${feature}`));
  if (calledBy(sae, feature)) {
    head.append(
      element("span", { className: "called", title: calledBy(sae, feature) }, calledBy(sae, feature)),
      element("span", { className: "few" }, ofImages(sae, feature)),
    );
  }
  const words = fires
    ? `fires on ${percent(sae.numbers.frequency[feature])} · up to ${short(sae.numbers.max[feature])}`
    : "never fires";
  card.append(head, element("div", { className: "few" }, words));
  card.classList.toggle("silent", !fires);
  if (sae.shown[feature]) {
    const place = element("div", { className: "strip" });
    head.after(place);
    strip(sae, feature, STRIP).then((made) => place.replaceWith(made), failed);
  }
  return card;
}

// Moves the focus by so many cards.
function step(by) {
  const here = Number(document.activeElement?.closest?.(".card")?.dataset.place ?? -1);
  const place = Math.min(list.features.length - 1, Math.max(0, here < 0 ? 0 : here + by));
  if (!list.features.length) return;
  const pitch = list.height + GAP, top = byId("list").getBoundingClientRect().top + scrollY;
  const y = top + Math.floor(place / list.columns) * pitch, margin = byId("top").offsetHeight + GAP;
  if (y < scrollY + margin) scrollTo(0, y - margin);
  if (y + pitch > scrollY + innerHeight) scrollTo(0, y + pitch - innerHeight);
  drawList();
  list.cards.get(list.features[place])?.focus({ preventScroll: true });
}
