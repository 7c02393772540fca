// Loads what the pages show. A page opened from a folder cannot fetch files, but it can load scripts: each calls `take`.
"use strict";

const parts = new Map();

// The part of this name, as it will be: {promise, give, fail}.
function part(name) {
  if (!parts.has(name)) {
    const made = {};
    made.promise = new Promise((give, fail) => Object.assign(made, { give, fail }));
    parts.set(name, made);
  }
  return parts.get(name);
}

// Called by the scripts in data/.
function take(name, value) {
  part(name).give(value);
}

function load(name, path) {
  const known = parts.has(name), made = part(name);
  if (!known) {
    const script = document.createElement("script");
    script.src = `data/${path}.js`;
    script.onerror = () => { parts.delete(name); made.fail(new Error(`data/${path}.js cannot be loaded`)); };
    document.head.append(script);
  }
  return made.promise;
}

let gallery;

async function openGallery() {
  gallery = await load("gallery", "gallery");
  gallery.saes.forEach((sae, number) => { sae.number = number; });
}

// Everything that is said of all features of an SAE, and what the search and the map need beside it.
async function openSae(number) {
  const sae = gallery.saes[number] || gallery.saes[0];
  if (!sae.numbers) {
    const index = await load(String(sae.number), `${sae.number}/index`);
    const logs = (values) => Float64Array.from(values, (x) => (x > 0 ? Math.log10(x) : -Infinity));
    sae.logs = { f: logs(index.numbers.frequency), v: logs(index.numbers.mean) };
    sae.lower = sae.classes.map((name) => name.toLowerCase());
    Object.assign(sae, index);
  }
  return sae;
}

// The page of a feature: {histogram, classes, near, images, maps}, the last two where it shows images.
async function openFeature(sae, feature) {
  const number = Math.floor(feature / gallery.shard);
  const pages = await load(`${sae.number}/${number}`, `${sae.number}/${Math.floor(number / gallery.scripts)}/${number}`);
  const page = pages[feature % gallery.shard];
  if (typeof page.maps === "string") {
    const packed = Uint8Array.from(atob(page.maps), (letter) => letter.charCodeAt(0));
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
    page.maps = new Response(stream).arrayBuffer().then((bytes) => new Uint8Array(bytes));
  }
  return { ...page, maps: await page.maps };
}

function imagePath(sae, example) {
  return `images/${sae.images}/${Math.floor(example / gallery.images)}/${example}.webp`;
}

// Words

function short(x) {
  return x === null || x === undefined ? "–" : String(Number(x.toPrecision(3)));
}

function percent(x) {
  return `${Number((100 * x).toPrecision(2))} %`;
}

// Round numbers between two positive values: these times the powers of ten, or more where that gives few.
function ticks(low, high, by = null) {
  for (const digits of by ? [by] : [[1], [1, 2, 5], [1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9]]) {
    const found = [];
    for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++) {
      found.push(...digits.map((digit) => digit * 10 ** power).filter((x) => x >= low && x <= high));
    }
    if (found.length > 2 || by || digits.length > 3) return found;
  }
  return [];
}

// A new element with properties; what it holds is added as text or as elements, never as HTML.
function element(tag, properties = {}, ...inside) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...inside);
  return made;
}

function byId(id) {
  return document.getElementById(id);
}
