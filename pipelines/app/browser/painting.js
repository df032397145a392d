// A picture and a mask that is painted over it, as the value {"picture": data URL, "mask": "0110..."}: a digit for each
// pixel, row by row, 1 where it is painted.
const box = element.querySelector(".smalti-painting");
const canvas = box.querySelector("canvas");
const [brush] = box.querySelectorAll("input");
const context = canvas.getContext("2d", { willReadFrequently: true });
const image = new Image();
let mask = new Uint8Array(props.width * props.height);
let last = null;
let paint = 1;
canvas.width = props.width;
canvas.height = props.height;
canvas.style.width = `${props.width * Math.max(1, Math.round(336 / props.width))}px`;
brush.max = Math.max(2, Math.round(props.width / 3));
brush.value = Math.max(1, Math.round(props.width / 9));

function draw() {
  context.clearRect(0, 0, props.width, props.height);
  if (!image.complete || !image.naturalWidth) return;
  context.drawImage(image, 0, 0, props.width, props.height);
  const pixels = context.getImageData(0, 0, props.width, props.height);
  mask.forEach((painted, index) => {
    if (!painted) return;
    // White, and what is below only just seen, with a tint that no grey picture has.
    [255, 244, 230].forEach((level, channel) => {
      const at = 4 * index + channel;
      pixels.data[at] = 0.85 * level + 0.15 * pixels.data[at];
    });
  });
  context.putImageData(pixels, 0, 0);
}

function tell() {
  const value = props.value ? JSON.parse(props.value) : {};
  if (value.picture) props.value = JSON.stringify({ ...value, mask: mask.join("") });
}

function take() {
  const value = props.value ? JSON.parse(props.value) : {};
  mask = Uint8Array.from(value.mask || new Array(props.width * props.height).fill(0), Number);
  box.classList.toggle("filled", Boolean(value.picture));
  image.src = value.picture || "";
  draw();
}

function picture_of_mask() {
  const sheet = Object.assign(document.createElement("canvas"), { width: props.width, height: props.height });
  const pixels = new ImageData(props.width, props.height);
  mask.forEach((painted, index) => pixels.data.set([255 * painted, 255 * painted, 255 * painted, 255], 4 * index));
  sheet.getContext("2d").putImageData(pixels, 0, 0);
  return sheet.toDataURL("image/png");
}

function save(href, download) {
  Object.assign(document.createElement("a"), { href, download }).click();
}

function place(event) {
  const frame = canvas.getBoundingClientRect();
  return [
    ((event.clientX - frame.left) / frame.width) * props.width,
    ((event.clientY - frame.top) / frame.height) * props.height,
  ];
}

function dab([x, y]) {
  const radius = Math.max(0.71, brush.value / 2);
  for (let row = 0; row < props.height; row++) {
    for (let column = 0; column < props.width; column++) {
      if (Math.hypot(column + 0.5 - x, row + 0.5 - y) <= radius) mask[row * props.width + column] = paint;
    }
  }
}

function stroke(event) {
  const next = place(event);
  const steps = Math.max(1, Math.ceil(2 * Math.hypot(next[0] - last[0], next[1] - last[1])));
  for (let step = 1; step <= steps; step++) {
    dab(last.map((from, axis) => from + ((next[axis] - from) * step) / steps));
  }
  last = next;
  draw();
}

canvas.addEventListener("pointerdown", (event) => {
  if (!box.classList.contains("filled")) return;
  canvas.setPointerCapture(event.pointerId);
  last = place(event);
  stroke(event);
});
canvas.addEventListener("pointermove", (event) => last && stroke(event));
for (const end of ["pointerup", "pointercancel"]) {
  canvas.addEventListener(end, () => {
    if (last) tell();
    last = null;
  });
}
box.querySelectorAll("button").forEach((button) => {
  button.addEventListener("click", () => {
    const { action } = button.dataset;
    if (action === "paint" || action === "erase") {
      paint = Number(action === "paint");
      box.querySelectorAll("[data-action]").forEach((other) => other.classList.toggle("on", other === button));
      return;
    }
    if (action === "save") {
      save(image.src, "image.png");
      save(picture_of_mask(), "mask.png");
      return;
    }
    mask = action === "clear" ? mask.fill(0) : mask.map((painted) => 1 - painted);
    draw();
    tell();
  });
});
image.onload = draw;
take();
watch("value", take);
