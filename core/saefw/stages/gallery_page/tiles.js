// Draws images with the patches lit on which a feature fires.
"use strict";

let palette;

// The colour of each value of a patch, as the four bytes of a pixel; a faint one covers little of the image.
function colourOf(value) {
  palette ??= gallery.colours.map((hex, i) => {
    const x = i / 255, bytes = [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
    return [...bytes, i ? Math.round(255 * (0.25 + 0.75 * Math.sqrt(x))) : 0];
  });
  return palette[value];
}

// A tile: the image, and over it a canvas with a pixel a patch; `map` holds its bytes, or there is none.
function tile(sae, image, map) {
  const made = element("div", { className: "tile" });
  made.style.aspectRatio = `${sae.size[0]} / ${sae.size[1]}`;
  made.append(element("img", { src: imagePath(sae, image[0]), alt: "", loading: "lazy", decoding: "async" }));
  if (map && sae.grid) {
    const [rows, columns] = sae.grid;
    const canvas = element("canvas", { width: columns, height: rows }), context = canvas.getContext("2d");
    const pixels = context.createImageData(columns, rows);
    map.forEach((value, p) => pixels.data.set(colourOf(value), 4 * p));
    context.putImageData(pixels, 0, 0);
    made.append(canvas);
    made.classList.add("mapped");
  }
  return made;
}

// The map of the image of this rank.
function mapOf(sae, page, rank) {
  const n = sae.grid ? sae.grid[0] * sae.grid[1] : 0;
  return page.maps ? page.maps.subarray(rank * n, (rank + 1) * n) : null;
}

// Some of a feature's images, side by side.
async function strip(sae, feature, n) {
  const made = element("div", { className: "strip" });
  const page = await openFeature(sae, feature);
  (page.images || []).slice(0, n).forEach((image, rank) => made.append(tile(sae, image, mapOf(sae, page, rank))));
  return made;
}

// What a feature is called: the class of most of its images, and of how many.
function calledBy(sae, feature) {
  return sae.label[feature] < 0 ? "" : sae.classes[sae.label[feature]];
}

function ofImages(sae, feature) {
  return sae.label[feature] < 0 ? "" : `${sae.most[feature]} of ${sae.n_images[feature]}`;
}
