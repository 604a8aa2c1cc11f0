"use strict";
// Every number comes from the page's data: counts of elements, computed with the certificates. Shares are rounded down.
const page = JSON.parse(document.getElementById("data").textContent);
const radiusSlider = document.getElementById("radius");
const kSlider = document.getElementById("k");
const IN = [0xe6, 0x61, 0x00], OUT = [0x5d, 0x3a, 0x9b];
const PLOT = { left: 44, right: 452, top: 12, bottom: 256 };

const bytes = (base64) => Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
const percent = (count, of) => `${(Math.floor((1000 * count) / of) / 10).toFixed(1)} %`;
const downwards = (cosine) => (Math.floor(1000 * cosine) / 1000).toFixed(3);
const x = (step) => PLOT.left + ((PLOT.right - PLOT.left) * step) / (page.radii.length - 1);
const y = (share) => PLOT.bottom - (PLOT.bottom - PLOT.top) * share;

const articles = page.certificates.map((certificate, index) => {
  const element = document.getElementById(`c${index}`);
  const part = (role) => element.querySelector(`[data-role="${role}"]`);
  return {
    certificate,
    element,
    part,
    canvas: element.querySelector("canvas"),
    paths: element.querySelectorAll("path[data-method]"),
    pale: bytes(certificate.pale),
    sets: certificate.sets.map((set) => ({ ...set, steps: bytes(set.steps) })),
  };
});

// A byte of `steps` says for how many steps of the slider its pixel is certified: 1..127 in, 129..255 out.
function paint(article, set, step) {
  const { canvas, pale } = article;
  const context = canvas.getContext("2d");
  const picture = context.createImageData(canvas.width, canvas.height);
  const shown = { in: 0, out: 0 };
  for (let pixel = 0; pixel < pale.length; pixel++) {
    const code = set.steps[pixel];
    const inside = code > 0 && code < 128 && step < code;
    const outside = code > 128 && step < code - 128;
    shown.in += inside;
    shown.out += outside;
    const colour = inside ? IN : outside ? OUT : null;
    for (let channel = 0; channel < 3; channel++) {
      picture.data[4 * pixel + channel] = colour ? 0.35 * pale[pixel] + 0.65 * colour[channel] : pale[pixel];
    }
    picture.data[4 * pixel + 3] = 255;
  }
  context.putImageData(picture, 0, 0);
  return shown;
}

// Between two radii of the grid the smaller value holds: the curve is drawn as steps that never exceed it.
function staircase(counts, k) {
  let path = `M${x(0)} ${y(counts[0] / k).toFixed(2)}`;
  for (let step = 1; step < counts.length; step++) {
    path += `V${y(counts[step] / k).toFixed(2)}H${x(step).toFixed(2)}`;
  }
  return path;
}

function show() {
  const step = radiusSlider.valueAsNumber;
  const choice = kSlider.valueAsNumber;
  const radius = page.radii[step];
  const share = page.shares[choice];
  const radiusText = String(radius);
  const shareText = page.labels[choice];
  document.getElementById("radius-shown").value = radiusText;
  document.getElementById("k-shown").value = shareText;
  radiusSlider.setAttribute("aria-valuetext", radiusText);
  kSlider.setAttribute("aria-valuetext", shareText);
  for (const article of articles) {
    const { certificate, element, part, sets, paths } = article;
    const set = sets[choice];
    const shown = paint(article, set, step);
    const count = set.counts[0][step];
    paths.forEach((path) => {
      const counts = set.counts[path.dataset.method];
      path.setAttribute("d", counts ? staircase(counts, set.k) : "");
    });
    part("attacked").replaceChildren(...set.attacked.map(([at, left]) => {
      const circle = document.createElementNS(part("attacked").namespaceURI, "circle");
      const values = { class: "attacked", r: 4, cx: x(at / page.radii[1]), cy: y(left) };
      Object.entries(values).forEach(([name, value]) => circle.setAttribute(name, value));
      return circle;
    }));
    part("now").setAttribute("x1", x(step));
    part("now").setAttribute("x2", x(step));
    part("dot").setAttribute("cx", x(step));
    part("dot").setAttribute("cy", y(count / set.k));
    part("chance").setAttribute("y1", y(set.k / certificate.n));
    part("chance").setAttribute("y2", y(set.k / certificate.n));
    part("set-caption").textContent = `Certified set of the top ${shareText} at radius ${radiusText}`;
    part("reading").textContent =
      `At L2 radius ${radiusText}: at least ${percent(count, set.k)} of the top ${shareText} stays ` +
      `(${count} of ${set.k} elements). Element by element, ${set.inside[step]} are surely in and ` +
      `${set.outside[step]} surely outside.` +
      (certificate.cosines ? ` The map keeps a cosine of at least ${downwards(certificate.cosines[step])}.` : "");
    article.canvas.setAttribute("aria-label", `${shown.in} pixels surely in the top set, ${shown.out} surely outside`);
    Object.assign(element.dataset, {
      overlap: count, size: set.k, share: percent(count, set.k), inside: set.inside[step], outside: set.outside[step],
      shownIn: shown.in, shownOut: shown.out,
    });
  }
  Object.assign(document.documentElement.dataset, { radius: radiusText, k: share });
}

// #radius=0.03&k=0.2 opens the page there, at the next radius that is not smaller.
function followAddress() {
  const wanted = new URLSearchParams(location.hash.slice(1));
  if (wanted.has("radius")) {
    const step = page.radii.findIndex((radius) => radius >= Number(wanted.get("radius")));
    radiusSlider.valueAsNumber = step < 0 ? page.radii.length - 1 : step;
  }
  if (wanted.has("k")) {
    const choice = page.shares.indexOf(Number(wanted.get("k")));
    if (choice >= 0) kSlider.valueAsNumber = choice;
  }
  show();
}

document.querySelector("form").addEventListener("submit", (event) => event.preventDefault());
radiusSlider.addEventListener("input", show);
kSlider.addEventListener("input", show);
window.addEventListener("hashchange", followAddress);
followAddress();
