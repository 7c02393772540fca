// Which features are listed, and in which order; all of it stands in the address of the page.
"use strict";

const ORDERS = {
  match: { name: "best match", of: () => null },
  ap: { name: "detection of a class", of: (sae) => sae.ap, classes: true },
  pure: { name: "images of one class", of: (sae) => sae.most, classes: true },
  frequency: { name: "frequency", of: (sae) => sae.numbers.frequency },
  mean: { name: "mean value", of: (sae) => sae.numbers.mean },
  max: { name: "largest value", of: (sae) => sae.numbers.max },
  monosemanticity: { name: "monosemanticity", of: (sae) => sae.numbers.monosemanticity, optional: true },
  number: { name: "number", of: () => null },
};

function orders(sae) {
  return Object.keys(ORDERS).filter((key) => {
    const order = ORDERS[key];
    return !(order.classes && !sae.classes.length) && !(order.optional && !order.of(sae));
  });
}

// The address `#/feature/12?q=cat&sort=max&f=-3,-1`, taken apart; f and v are bounds in powers of ten.
function route() {
  const [path, query] = location.hash.replace(/^#/, "").split("?");
  const given = new URLSearchParams(query || "");
  const found = /^\/feature\/(\d+)$/.exec(path);
  const bounds = (name) => {
    const pair = (given.get(name) || "").split(",").map((text) => (text.trim() === "" ? NaN : Number(text)));
    return [Number.isNaN(pair[0]) ? -Infinity : pair[0], Number.isNaN(pair[1] ?? NaN) ? Infinity : pair[1]];
  };
  return {
    feature: found ? Number(found[1]) : null,
    sae: Number(given.get("sae")) || 0,
    q: given.get("q") || "",
    sort: Object.hasOwn(ORDERS, given.get("sort") || "") ? given.get("sort") : "",
    turned: given.has("turned"),
    shown: given.has("shown"),
    f: bounds("f"),
    v: bounds("v"),
  };
}

function address(state, feature = null) {
  const query = new URLSearchParams();
  if (state.sae) query.set("sae", state.sae);
  if (state.q) query.set("q", state.q);
  if (state.sort) query.set("sort", state.sort);
  for (const name of ["turned", "shown"]) if (state[name]) query.set(name, "1");
  for (const name of ["f", "v"]) {
    if (state[name].some(Number.isFinite)) {
      query.set(name, state[name].map((x) => (Number.isFinite(x) ? Number(x.toFixed(3)) : "")).join(","));
    }
  }
  const text = query.toString().replaceAll("%2C", ",");
  return `#/${feature === null ? "" : `feature/${feature}`}${text ? `?${text}` : ""}`;
}

// How well each feature fits what is searched for: a map from feature to a number. A feature of this number comes
// first, then those that detect a class of this very name, then of one that contains it.
function fits(sae, text) {
  const sought = text.trim().toLowerCase(), fit = new Map();
  const raise = (feature, by) => fit.set(feature, Math.max(by, fit.get(feature) ?? -1));
  const bonus = sae.lower.map((name) => (name === sought ? 2 : name.includes(sought) ? 1 : 0));
  const { feature, label, ap } = sae.found;
  for (let i = 0; i < feature.length; i++) if (bonus[label[i]]) raise(feature[i], bonus[label[i]] + (ap[i] ?? 0));
  for (let s = 0; s < sae.n_features; s++) if (bonus[sae.label[s]]) raise(s, bonus[sae.label[s]]);
  if (/^\d+$/.test(sought) && Number(sought) < sae.n_features) raise(Number(sought), 4);
  return fit;
}

// The features that a state asks for, in order.
function choose(sae, state) {
  const fit = state.q.trim() ? fits(sae, state.q) : null;
  const sort = state.sort || (fit ? "match" : orders(sae).find((key) => key !== "match" && key !== "frequency"));
  const within = (x, [low, high]) => (low === -Infinity && high === Infinity) || (x >= low && x <= high);
  const chosen = [];
  for (let s = 0; s < sae.n_features; s++) {
    if (fit && !fit.has(s)) continue;
    if (state.shown && !sae.shown[s]) continue;
    if (within(sae.logs.f[s], state.f) && within(sae.logs.v[s], state.v)) chosen.push(s);
  }
  const values = sort === "match" && fit ? null : ORDERS[sort].of(sae);
  const by = values ? (s) => values[s] ?? -1 : sort === "match" && fit ? (s) => fit.get(s) : (s) => -s;
  const silent = (s) => (sae.logs.f[s] === -Infinity ? 1 : 0), sign = state.turned ? -1 : 1;
  // Those that never fire come last, whatever the order.
  const key = Float64Array.from({ length: sae.n_features }, () => 0);
  for (const s of chosen) key[s] = by(s);
  return chosen.sort((a, b) => silent(a) - silent(b) || sign * (key[b] - key[a]) || sign * (a - b));
}
