// Keys for the whole page, and the theme switch.
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    const buttons = [...document.querySelectorAll("#create, #speak, #make-sound, #make-clip, #tell, #make-smooth")];
    buttons.find((button) => button.offsetParent)?.click();
  } else if (event.key === "Escape" && document.querySelector("#ask[data-busy]")) {
    document.querySelector("#stop")?.click();
  } else if (event.key === "/" && !/INPUT|TEXTAREA/.test(document.activeElement.tagName)) {
    const filter = document.querySelector("#filter textarea, #filter input");
    if (filter?.offsetParent) {
      event.preventDefault();
      filter.focus();
    }
  }
});

const remembered = localStorage.getItem("tessera.theme");
if (remembered) {
  const apply = () => document.body?.classList.toggle("dark", remembered === "dark");
  document.addEventListener("DOMContentLoaded", () => setTimeout(apply, 0));
  window.addEventListener("load", () => setTimeout(apply, 300));
}
document.addEventListener("click", (event) => {
  if (!event.target.closest?.("#theme")) return;
  const dark = document.body.classList.toggle("dark");
  localStorage.setItem("tessera.theme", dark ? "dark" : "light");
});
