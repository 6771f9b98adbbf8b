// Files of the outputs folder, and which one is chosen.
const grid = element.querySelector(".ts-shelf");
const empty = element.querySelector(".ts-empty");
let chosen = null;

// A sound has no looks: its name stands there.
function thumbnail(file) {
  if (file.kind === "sound") {
    const name = file.name.split("/").pop().replace(/^\d+_|_\d+(-\d+)?\.\w+$/g, "");
    const tile = make("span", "ts-thumb-sound", name.replaceAll("-", " "));
    tile.prepend(make("b", "", "♪"));
    return tile;
  }
  const node = make(file.kind === "video" ? "video" : "img");
  if (file.kind === "video") Object.assign(node, { muted: true, loop: true, playsInline: true, preload: "metadata" });
  else Object.assign(node, { loading: "lazy", alt: "" });
  node.src = fileUrl(file.path);
  return node;
}

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
      button.append(thumbnail(file));
      const video = button.querySelector("video");
      button.addEventListener("pointerenter", () => video?.play());
      button.addEventListener("pointerleave", () => video?.pause());
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
