// The page of a feature: its images, its statistics, its classes and its neighbours.
"use strict";

async function showFeature(sae, state, feature, features, current) {
  const page = await openFeature(sae, feature);
  if (!current()) return;
  const numbers = Object.fromEntries(Object.keys(sae.numbers).map((name) => [name, sae.numbers[name][feature]]));
  const fires = numbers.frequency > 0, called = calledBy(sae, feature);
  byId("title").replaceChildren(`Feature ${feature}`);
  if (called) byId("title").append(element("span", { className: "called" }, called));
  byId("said").textContent = [
    fires ? `Fires on ${percent(numbers.frequency)} of ${unit(sae)} of the ${sae.split} split` : `Fires nowhere in the ${sae.split} split`,
    ...(called ? [`${ofImages(sae, feature)} images are of this class`] : []),
  ].join(" · ");
  showTiles(sae, page, numbers, fires);
  showNumbers(numbers, sae, feature);
  showHistogram(page.histogram, numbers);
  showClasses(sae, page);
  showNear(sae, state, page);
  const at = features.indexOf(feature);
  for (const [id, other] of [["before", features[at - 1]], ["after", at < 0 ? undefined : features[at + 1]]]) {
    byId(id).toggleAttribute("hidden", other === undefined);
    byId(id).href = other === undefined ? "" : address(state, other);
  }
  byId("back").href = address(state);
  document.title = `Feature ${feature}${called ? `: ${called}` : ""}`;
}

function showTiles(sae, page, numbers, fires) {
  const tiles = byId("tiles"), images = page.images || [];
  tiles.replaceChildren();
  byId("none").hidden = images.length > 0;
  byId("none").textContent = fires ? "This gallery holds no images of it." : "It fires on no image.";
  byId("scale").hidden = !images.length || !sae.grid;
  byId("most").textContent = `${short(numbers.max)} (in units of the SAE)`;
  byId("under").textContent = "";
  const context = byId("colours").getContext("2d"), pixels = context.createImageData(256, 1);
  for (let i = 0; i < 256; i++) pixels.data.set([...colourOf(i).slice(0, 3), 255], 4 * i);
  context.putImageData(pixels, 0, 0);
  images.forEach((image, rank) => {
    const made = tile(sae, image, mapOf(sae, page, rank)), figure = element("figure", {}, made);
    const name = image[1] < 0 ? image[2] : sae.classes[image[1]];
    figure.append(element("figcaption", { title: image[2] }, element("span", {}, name), element("span", { className: "few" }, short(image[3]))));
    figure.tabIndex = 0;
    figure.setAttribute("role", "button");
    figure.dataset.example = image[0];
    const enlarge = () => showLarge(sae, page, rank, numbers);
    figure.addEventListener("click", enlarge);
    figure.addEventListener("keydown", (event) => { if (event.key === "Enter") enlarge(); });
    listenToPatches(made, sae, mapOf(sae, page, rank), numbers);
    tiles.append(figure);
  });
}

// Says the value of the patch under the pointer.
function listenToPatches(made, sae, values, numbers) {
  if (!values || !sae.grid) return;
  made.addEventListener("pointermove", (event) => {
    const [rows, columns] = sae.grid, box = made.getBoundingClientRect();
    const row = Math.floor(((event.clientY - box.top) / box.height) * rows);
    const column = Math.floor(((event.clientX - box.left) / box.width) * columns);
    const value = values[row * columns + column];
    if (value !== undefined) byId("under").textContent = `here: ${short((value / 255) * numbers.max)}`;
  });
  made.addEventListener("pointerleave", () => { byId("under").textContent = ""; });
}

const large = { by: null };

function showLarge(sae, page, rank, numbers) {
  const image = page.images[rank];
  byId("one").replaceChildren(tile(sae, image, mapOf(sae, page, rank)));
  const columns = sae.grid ? sae.grid[1] : 1;
  byId("about").textContent = [
    ...(image[1] < 0 ? [] : [sae.classes[image[1]]]),
    image[2],
    `value ${short(image[3])}` + (image[5] < 0 ? "" : ` at row ${Math.floor(image[5] / columns) + 1}, column ${(image[5] % columns) + 1}`),
    ...(sae.rank_by === "max" ? [] : [`score ${short(image[4])}`]),
    `${rank + 1} of ${page.images.length}`,
  ].join(" · ");
  large.by = (by) => {
    const next = rank + by;
    if (next >= 0 && next < page.images.length) showLarge(sae, page, next, numbers);
  };
  if (!byId("large").open) byId("large").showModal();
}

function showNumbers(numbers, sae, feature) {
  const told = [
    ["frequency", percent(numbers.frequency)], ["mean", short(numbers.mean)], ["median", short(numbers.p50)],
    ["90th percentile", short(numbers.p90)], ["99th percentile", short(numbers.p99)], ["largest", short(numbers.max)],
    ...(numbers.monosemanticity === undefined ? [] : [["monosemanticity", short(numbers.monosemanticity)]]),
    ...(sae.classes.length ? [["best AP", short(sae.ap[feature])]] : []),
  ];
  byId("numbers").replaceChildren(...told.map(([name, value]) => element("div", {}, element("dt", {}, name), element("dd", {}, value))));
}

// Bars over a logarithmic axis, their areas as the counts; bin 8 e + i begins at 2^e (1 + i / 8).
function showHistogram([first, counts], numbers) {
  byId("spread").hidden = !counts.length;
  if (!counts.length) return;
  const at = (code) => Math.floor(code / 8) + Math.log2(1 + (((code % 8) + 8) % 8) / 8);
  const low = at(first), high = at(first + counts.length), width = 320, height = 96, bottom = 18;
  const x = (log) => ((log - low) / (high - low || 1)) * width;
  const density = counts.map((n, i) => n / (at(first + i + 1) - at(first + i)));
  const most = density.reduce((a, b) => Math.max(a, b), 0);
  const drawn = (tag, given, text) => {
    const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(given)) made.setAttribute(name, value);
    if (text !== undefined) made.textContent = text;
    return made;
  };
  const svg = drawn("svg", { viewBox: `0 0 ${width} ${height + bottom}`, role: "img", "aria-label": "Histogram of its positive values" });
  counts.forEach((n, i) => {
    if (!n) return;
    const tall = Math.max(1, (density[i] / most) * height);
    const left = x(at(first + i)), bar = drawn("rect", { x: left, y: height - tall, width: Math.max(0.5, x(at(first + i + 1)) - left - 0.5), height: tall });
    bar.append(drawn("title", {}, `${n.toLocaleString("en")} from ${short(2 ** at(first + i))} to ${short(2 ** at(first + i + 1))}`));
    svg.append(bar);
  });
  let free = -Infinity;
  for (const value of ticks(2 ** low, 2 ** high)) {
    const place = x(Math.log2(value));
    if (place < free || place < 8 || place > width - 8) continue;
    free = place + 38;
    svg.append(drawn("text", { x: place, y: height + 14, "text-anchor": "middle" }, short(value)));
  }
  for (const [name, value] of [["p50", numbers.p50], ["p99", numbers.p99]]) {
    const place = x(Math.log2(value)), line = drawn("line", { x1: place, x2: place, y1: 0, y2: height });
    line.append(drawn("title", {}, `${name === "p50" ? "median" : "99th percentile"}: ${short(value)}`));
    svg.append(line);
  }
  byId("histogram").replaceChildren(svg);
}

function showClasses(sae, page) {
  byId("detects").hidden = !page.classes.length;
  const body = byId("of-classes").tBodies[0];
  body.replaceChildren(...page.classes.map(([label, ap, rate, share]) => {
    const name = sae.classes[label], row = element("tr", {}, element("th", { title: name, scope: "row" }, name));
    for (const value of [ap, rate, share]) {
      const cell = element("td", {}, value === null ? "–" : value.toFixed(2));
      cell.style.setProperty("--share", `${100 * (value ?? 0)}%`);
      row.append(cell);
    }
    return row;
  }));
}

function showNear(sae, state, page) {
  byId("like").hidden = !page.near.length;
  byId("near").replaceChildren(...page.near.map(([other, cosine]) => {
    const row = element("a", { className: "other", href: address(state, other) });
    const place = element("div", { className: "strip" });
    row.append(place, element("b", {}, `#${other}`), element("span", { className: "called" }, calledBy(sae, other)), element("span", { className: "few" }, cosine.toFixed(2)));
    if (sae.shown[other]) strip(sae, other, 2).then((made) => place.replaceWith(made), failed);
    return row;
  }));
}
