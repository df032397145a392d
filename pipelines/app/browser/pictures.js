// Pictures beside each other, as the value {"pictures": [{"src", "caption"}], "chosen": number or null, "side": pixels}
// says; all text is set as text. A click chooses a picture where one is chosen at all.
const box = element.querySelector(".smalti-pictures");

function draw() {
  const value = props.value ? JSON.parse(props.value) : { pictures: [] };
  box.replaceChildren(
    ...value.pictures.map((picture, index) => {
      const figure = document.createElement("figure");
      const image = document.createElement("img");
      const caption = document.createElement("figcaption");
      image.src = picture.src;
      image.alt = picture.caption;
      image.onload = () => {
        // A whole number of screen pixels for each pixel, so that small images are crisp.
        const times = Math.max(1, Math.round(value.side / image.naturalWidth));
        image.style.width = `${image.naturalWidth * times}px`;
        caption.style.maxWidth = `max(96px, ${image.naturalWidth * times}px)`;
      };
      caption.textContent = picture.caption;
      figure.append(image, caption);
      if (typeof value.chosen === "number") {
        figure.tabIndex = 0;
        figure.classList.toggle("chosen", index === value.chosen);
        const choose = () => {
          props.value = JSON.stringify({ ...value, chosen: index });
          draw();
        };
        figure.onclick = choose;
        figure.onkeydown = (event) => event.key === "Enter" && choose();
      }
      return figure;
    }),
  );
}

draw();
watch("value", draw);
