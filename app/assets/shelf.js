// Pictures of the outputs folder, and which one is chosen.
const grid = element.querySelector(".ts-shelf");
const empty = element.querySelector(".ts-empty");
let chosen = null;

function update() {
  const page = props.value;
  if (!page || !page.files) return;
  empty.hidden = page.files.length > 0;
  setText(empty.querySelector("p"), page.note);
  grid.replaceChildren(
    ...page.files.map((file) => {
      const button = make("button", "ts-card ts-thumb");
      button.type = "button";
      button.title = file.name;
      button.setAttribute("aria-label", file.name);
      button.setAttribute("aria-pressed", String(file.name === page.chosen));
      const image = make("img");
      image.loading = "lazy";
      image.src = fileUrl(file.path);
      image.alt = "";
      button.append(image);
      button.addEventListener("click", () => {
        chosen?.setAttribute("aria-pressed", "false");
        chosen = button;
        button.setAttribute("aria-pressed", "true");
        trigger("choose", { name: file.name });
      });
      return button;
    })
  );
}

watch("value", update);
update();
