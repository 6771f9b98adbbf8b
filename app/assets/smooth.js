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
  const entry = { ...createCard(job), sides: make("div", "ts-sides") };
  entry.node.append(entry.sides);
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
  updateCard(entry, job, `${job.title}, ${job.factor} × the frames`, progressText(job), job.done / job.total);
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
