// Files that a visitor picks, drops or pastes, as the value {"files": [data URL, ...]}; none is larger than `most` bytes,
// and there are at most `count`. The server checks both again.
const box = element.querySelector(".smalti-picker");
const input = box.querySelector("input");
const shown = box.querySelector(".shown");
const problem = box.querySelector(".problem");
input.multiple = props.count > 1;
input.accept = props.accept;

function draw() {
  const files = props.value ? JSON.parse(props.value).files : [];
  box.classList.toggle("filled", files.length > 0);
  shown.replaceChildren(
    ...files.slice(0, 12).map((file) => {
      if (!file.startsWith("data:image/")) {
        const text = document.createElement("span");
        text.textContent = "1 file";
        return text;
      }
      const image = document.createElement("img");
      image.src = file;
      image.alt = "the image that was picked";
      image.onerror = () => image.replaceWith("(no picture to show)");
      return image;
    }),
    ...(files.length > 12 ? [`and ${files.length - 12} more`] : []),
  );
}

function read(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
}

async function take(files) {
  const size = files.reduce((sum, file) => sum + file.size, 0);
  const megabytes = (bytes) => (bytes / 2 ** 20).toFixed(1);
  problem.textContent = "";
  if (!files.length) return;
  if (files.length > props.count) {
    problem.textContent = `${files.length} files; at most ${props.count} are taken at once.`;
  } else if (size > props.most) {
    problem.textContent = `${megabytes(size)} MB; at most ${megabytes(props.most)} MB are taken at once.`;
  } else {
    const read_files = await Promise.all(files.map(read));
    props.value = JSON.stringify({ files: read_files });
    draw();
    return;
  }
  props.value = "";
  draw();
}

input.addEventListener("change", () => {
  take([...input.files]);
  input.value = "";
});
box.addEventListener("dragover", (event) => event.preventDefault());
box.addEventListener("drop", (event) => {
  event.preventDefault();
  take([...event.dataTransfer.files]);
});
box.addEventListener("paste", (event) => take([...event.clipboardData.files]));
draw();
watch("value", () => {
  problem.textContent = "";
  draw();
});
