// The map of an SAE: every feature that fires, by the logarithms of its frequency and of its mean value.
"use strict";

const map = { sae: null, state: null, chosen: null, box: null, over: null };
const EDGE = { left: 48, right: 10, top: 8, bottom: 36 };

function showMap(sae, state, features) {
  Object.assign(map, { state, chosen: new Uint8Array(sae.n_features) });
  for (const s of features) map.chosen[s] = 1;
  if (map.sae !== sae) {
    map.sae = sae;
    map.bounds = ["f", "v"].map((name) => {
      const finite = sae.logs[name].filter(Number.isFinite);
      const low = finite.reduce((a, b) => Math.min(a, b), Infinity), high = finite.reduce((a, b) => Math.max(a, b), -Infinity);
      const room = 0.05 * (high - low) || 0.5;
      return finite.length ? [low - room, high + room] : [-1, 1];
    });
  }
  drawMap();
}

function scales(canvas) {
  const [[f0, f1], [v0, v1]] = map.bounds;
  const width = canvas.clientWidth - EDGE.left - EDGE.right, height = canvas.clientHeight - EDGE.top - EDGE.bottom;
  return {
    x: (f) => EDGE.left + ((f - f0) / (f1 - f0)) * width,
    y: (v) => EDGE.top + (1 - (v - v0) / (v1 - v0)) * height,
    f: (x) => f0 + ((x - EDGE.left) / width) * (f1 - f0),
    v: (y) => v0 + (1 - (y - EDGE.top) / height) * (v1 - v0),
  };
}

function drawMap() {
  const canvas = byId("map"), many = devicePixelRatio || 1;
  if (!map.sae || !canvas.clientWidth) return;
  canvas.width = canvas.clientWidth * many;
  canvas.height = canvas.clientHeight * many;
  const context = canvas.getContext("2d"), scale = scales(canvas), style = getComputedStyle(document.body);
  const colour = (name) => style.getPropertyValue(name);
  context.scale(many, many);
  context.font = `11px ${style.fontFamily}`;
  context.strokeStyle = colour("--rule");
  context.fillStyle = colour("--faint");
  const right = canvas.clientWidth - EDGE.right, bottom = canvas.clientHeight - EDGE.bottom;
  for (const [[low, high], across] of [[map.bounds[0], true], [map.bounds[1], false]]) {
    let free = -Infinity;
    for (const value of ticks(10 ** low, 10 ** high, across ? [1] : undefined)) {
      const place = across ? scale.x(Math.log10(value)) : scale.y(Math.log10(value));
      context.beginPath();
      context.moveTo(across ? place : EDGE.left, across ? EDGE.top : place);
      context.lineTo(across ? place : right, across ? bottom : place);
      context.stroke();
      if (across && place < free) continue;
      free = place + 44;
      context.textAlign = across ? "center" : "right";
      context.textBaseline = across ? "top" : "middle";
      context.fillText(short(value), across ? place : EDGE.left - 5, across ? bottom + 4 : place);
    }
  }
  context.textAlign = "center";
  context.textBaseline = "bottom";
  context.fillText(`share of ${unit(map.sae)} on which it fires`, (EDGE.left + right) / 2, canvas.clientHeight - 1);
  context.save();
  context.translate(0, (EDGE.top + bottom) / 2);
  context.rotate(-Math.PI / 2);
  context.textBaseline = "top";
  context.fillText("mean value", 0, 0);
  context.restore();
  const n = map.sae.n_features, radius = n > 5000 ? 1 : n > 800 ? 1.5 : 2.5;
  for (const chosen of [0, 1]) {
    context.fillStyle = colour(chosen ? "--accent" : "--off");
    context.globalAlpha = n > 5000 ? 0.6 : 0.8;
    for (let s = 0; s < n; s++) {
      if (map.chosen[s] !== chosen || map.sae.logs.f[s] === -Infinity) continue;
      context.fillRect(scale.x(map.sae.logs.f[s]) - radius, scale.y(map.sae.logs.v[s]) - radius, 2 * radius, 2 * radius);
    }
  }
  context.globalAlpha = 1;
  const box = map.box || boxOf(scale, right, bottom);
  if (box) {
    context.strokeStyle = context.fillStyle = colour("--accent");
    context.lineWidth = 1.5;
    context.strokeRect(box[0], box[1], box[2] - box[0], box[3] - box[1]);
    context.globalAlpha = 0.1;
    context.fillRect(box[0], box[1], box[2] - box[0], box[3] - box[1]);
  }
}

// The box of the bounds that are set, in pixels.
function boxOf(scale, right, bottom) {
  const { f, v } = map.state;
  if (![...f, ...v].some(Number.isFinite)) return null;
  const clip = (x, low, high) => Math.min(high, Math.max(low, x));
  return [
    clip(scale.x(f[0]), EDGE.left, right), clip(scale.y(v[1]), EDGE.top, bottom),
    clip(scale.x(f[1]), EDGE.left, right), clip(scale.y(v[0]), EDGE.top, bottom),
  ];
}

// The feature nearest to a place, if one is within ten pixels.
function nearest(x, y) {
  const scale = scales(byId("map"));
  let best = null, least = 100;
  for (let s = 0; s < map.sae.n_features; s++) {
    const distance = (scale.x(map.sae.logs.f[s]) - x) ** 2 + (scale.y(map.sae.logs.v[s]) - y) ** 2;
    if (distance < least) [best, least] = [s, distance];
  }
  return best;
}

function listenToMap(changed, opened) {
  const canvas = byId("map"), plain = byId("hint").textContent;
  let start = null;
  canvas.addEventListener("pointerdown", (event) => {
    start = [event.offsetX, event.offsetY];
    canvas.setPointerCapture(event.pointerId);
  });
  canvas.addEventListener("pointermove", (event) => {
    if (start) {
      const [x, y] = [event.offsetX, event.offsetY];
      map.box = [Math.min(x, start[0]), Math.min(y, start[1]), Math.max(x, start[0]), Math.max(y, start[1])];
      drawMap();
    } else if (map.sae) {
      const s = nearest(event.offsetX, event.offsetY);
      byId("hint").textContent = s === null ? plain : `${s} ${calledBy(map.sae, s)}`;
      canvas.classList.toggle("over", s !== null);
    }
  });
  canvas.addEventListener("pointerup", (event) => {
    const box = map.box, scale = scales(canvas);
    start = map.box = null;
    if (box && box[2] - box[0] > 4 && box[3] - box[1] > 4) {
      changed({ f: [scale.f(box[0]), scale.f(box[2])], v: [scale.v(box[3]), scale.v(box[1])] });
    } else {
      const s = nearest(event.offsetX, event.offsetY);
      drawMap();
      if (s !== null) opened(s);
    }
  });
  canvas.addEventListener("pointercancel", () => { start = map.box = null; drawMap(); });
}

// What a feature fires on.
function unit(sae) {
  return sae.grid ? "patches" : "images";
}
