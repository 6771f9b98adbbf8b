// Grids of this browser, newest first; each fills cell by cell.
const status = element.querySelector(".ts-status");
const empty = element.querySelector(".ts-empty");
const list = element.querySelector(".ts-jobs");
const entries = new Map();
let shown = { boot: "", version: -1 };

function progressText(job) {
  if (job.stopping) return "Stopping…";
  if (job.state === "queued") return `Waiting: ${job.note}`;
  if (job.state === "running") return `Picture ${Math.min(job.done + 1, job.cells)} of ${job.cells}, seed ${job.seed}`;
  if (job.state === "failed") return "Failed";
  if (job.state === "stopped") return job.done ? `Stopped after ${job.done} of ${job.cells} pictures` : "Stopped before it began";
  return `${job.cells} pictures, seed ${job.seed}, ${job.seconds} s`;
}

function createEntry(job) {
  const node = make("section", "ts-job");
  const head = make("div", "ts-head");
  const prompt = make("h2", "ts-prompt");
  const stop = make("button", "ts-button ts-stop", "Stop");
  stop.type = "button";
  stop.addEventListener("click", () => trigger("stop_job", { id: job.id }));
  head.append(prompt, stop);
  const meta = make("p", "ts-meta");
  const bar = make("div", "ts-bar");
  bar.append(make("i"));
  const error = make("p", "ts-error");
  const image = make("img", "ts-sheet");
  const link = make("a", "ts-download", "Download");
  node.append(head, meta, bar, error, image, link);
  return { node, prompt, stop, meta, bar, error, image, link };
}

function updateJob(entry, job) {
  const active = job.state === "queued" || job.state === "running";
  entry.node.dataset.state = job.state;
  setText(entry.prompt, job.prompt);
  setText(entry.meta, progressText(job));
  entry.stop.hidden = !active || job.stopping;
  entry.bar.hidden = job.state !== "running";
  entry.bar.firstChild.style.width = `${(100 * (job.done + job.part)) / job.cells}%`;
  entry.error.hidden = !job.error;
  setText(entry.error, job.error);
  entry.image.hidden = !job.source;
  if (job.source && entry.source !== job.source) {
    entry.source = job.source;
    entry.image.src = fileUrl(job.source);
    entry.image.alt = `Grid of ${job.prompt}, ${job.done} of ${job.cells} pictures`;
  }
  entry.link.hidden = !job.name;
  if (job.name) {
    entry.link.href = fileUrl(job.source);
    entry.link.download = job.name.split("/").pop();
  }
}

function update() {
  const page = props.value;
  if (!page || !page.jobs) return;
  // A watcher that is being replaced may still deliver an older state.
  if (page.boot === shown.boot && page.version < shown.version) return;
  shown = page;
  const ids = new Set(page.jobs.map((job) => job.id));
  for (const [id, entry] of entries)
    if (!ids.has(id)) {
      entry.node.remove();
      entries.delete(id);
    }
  page.jobs.forEach((job, i) => {
    if (!entries.has(job.id)) entries.set(job.id, createEntry(job));
    const entry = entries.get(job.id);
    updateJob(entry, job);
    if (list.children[i] !== entry.node) list.insertBefore(entry.node, list.children[i] || null);
  });
  empty.hidden = page.jobs.length > 0;
  const job = page.jobs.find((each) => each.state === "running") || page.jobs[0];
  setText(status, job ? `${progressText(job)}${job.error ? `. ${job.error}` : ""}` : "");
}

watch("value", update);
update();
