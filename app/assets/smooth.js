// Clips that became smoother, newest first: before and after, side by side.
const status = element.querySelector(".ts-status");
const empty = element.querySelector(".ts-empty");
const list = element.querySelector(".ts-jobs");
const entries = new Map();
let shown = { boot: "", version: -1 };

function progressText(job) {
  if (job.stopping) return "Stopping…";
  if (job.state === "queued") return `Waiting: ${job.note}`;
  if (job.state === "failed") return "Failed";
  if (job.state === "running") return job.done ? `Frame ${job.done} of ${job.total}` : "Reading…";
  if (job.state === "stopped") return job.done ? `Stopped at frame ${job.done} of ${job.total}` : "Stopped";
  return `${job.before.frames} frames became ${job.after.frames} in ${job.took} s`;
}

function createSide(entry, name) {
  const node = make("figure", "ts-side");
  const screen = make("div", "ts-card");
  const caption = make("figcaption", "ts-tile-foot");
  const text = make("span", "ts-seed");
  const links = make("span", "ts-links");
  caption.append(text, links);
  node.append(screen, caption);
  entry.sides.append(node);
  return { node, name, screen, text, links, source: "", files: "" };
}

function createEntry(job) {
  const node = make("section", "ts-job");
  const head = make("div", "ts-head");
  const title = make("h2", "ts-prompt");
  const stop = make("button", "ts-button ts-stop", "Stop");
  stop.type = "button";
  stop.addEventListener("click", () => trigger("stop_job", { id: job.id }));
  head.append(title, stop);
  const meta = make("p", "ts-meta");
  const bar = make("div", "ts-bar");
  bar.append(make("i"));
  const error = make("p", "ts-error");
  const sides = make("div", "ts-sides");
  node.append(head, meta, bar, error, sides);
  const entry = { node, title, stop, meta, bar, error, sides };
  entry.before = createSide(entry, "Before");
  entry.after = createSide(entry, "After");
  return entry;
}

function updateSide(side, data) {
  side.node.hidden = !data.source;
  setText(side.text, `${side.name}: ${data.frames} frames at ${Number(data.rate.toFixed(2))} a second`);
  if (!data.source || side.source === data.source) return false;
  side.source = data.source;
  const kind = /\.(mp4|webm)$/.test(data.source) ? "video" : "picture";
  side.screen.replaceChildren(medium(data.source, kind));
  return true;
}

function updateEntry(entry, job) {
  const active = job.state === "queued" || job.state === "running";
  entry.node.dataset.state = job.state;
  setText(entry.title, `${job.title}, ${job.factor} × the frames`);
  setText(entry.meta, progressText(job));
  entry.stop.hidden = !active || job.stopping;
  entry.bar.hidden = job.state !== "running";
  entry.bar.firstChild.style.width = `${(100 * job.done) / job.total}%`;
  entry.error.hidden = !job.error;
  setText(entry.error, job.error);
  updateSide(entry.before, job.before);
  const [one, two] = [entry.before, entry.after];
  // Both begin at once, so that they can be compared.
  if (updateSide(two, job.after)) {
    const videos = [one, two].map((side) => side.screen.querySelector("video"));
    if (videos.every(Boolean)) videos[1].addEventListener("playing", () => (videos[0].currentTime = 0), { once: true });
    else if (one.source) one.screen.replaceChildren(medium(one.source, "picture"));
  }
  const key = JSON.stringify(job.files);
  if (two.files === key) return;
  two.files = key;
  two.links.replaceChildren(...downloads(job.files, { webp: "WebP" }));
}

function update() {
  const page = props.value;
  if (!isNews(page, shown)) return;
  shown = page;
  syncEntries(list, entries, page.jobs, createEntry, updateEntry, () => {});
  empty.hidden = page.jobs.length > 0;
  const job = page.jobs.find((each) => each.state === "running") || page.jobs[0];
  setText(status, job ? `${job.title}: ${job.state}${job.error ? `. ${job.error}` : ""}` : "");
}

watch("value", update);
update();
