// One file: a picture or animation, a video that loops, or a sound.
function showFile() {
  const { path, kind } = props.value || {};
  const box = element.querySelector(".ts-player");
  if (!box || box.dataset.path === path) return;
  box.dataset.path = path || "";
  box.replaceChildren(...(path ? [medium(path, kind)] : []));
}

watch("value", showFile);
showFile();
