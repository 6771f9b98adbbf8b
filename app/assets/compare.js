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
  return `${job.cells} pictures, seed ${job.seed}, ${job.took} s`;
}

function createEntry(job) {
  const card = createCard(job);
  const image = make("img", "ts-sheet");
  const link = make("a", "ts-download", "Download");
  card.node.append(image, link);
  return { ...card, image, link };
}

function updateJob(entry, job) {
  updateCard(entry, job, job.prompt, progressText(job), (job.done + job.part) / job.cells);
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
  if (!isNews(page, shown)) return;
  shown = page;
  syncEntries(list, entries, page.jobs, createEntry, updateJob, () => {});
  empty.hidden = page.jobs.length > 0;
  const job = page.jobs.find((each) => each.state === "running") || page.jobs[0];
  setText(status, job ? `${progressText(job)}${job.error ? `. ${job.error}` : ""}` : "");
}

watch("value", update);
update();
