// Jobs of this browser, newest first: tiles that fill, then the token view of the chosen picture.
const status = element.querySelector(".ts-status");
const empty = element.querySelector(".ts-empty");
const example = element.querySelector(".ts-example img");
const list = element.querySelector(".ts-jobs");
const entries = new Map();
let shown = { boot: "", version: -1 };

const STATES = { queued: "Waiting", running: "Drawing", done: "Done", stopped: "Stopped", failed: "Failed" };

function progressText(job) {
  if (job.stopping) return "Stopping…";
  if (job.state === "queued") return `Waiting: ${job.note}`;
  if (job.state === "running") {
    if (!job.step) return "Starting…";
    if (job.step < job.total) return `${job.unit[0].toUpperCase()}${job.unit.slice(1)} ${job.step} of ${job.total}`;
    return `Painting picture ${Math.min(job.items.filter((i) => i.name).length + 1, job.items.length)} of ${job.items.length}`;
  }
  if (job.state === "stopped")
    return job.step ? `Stopped at ${job.step} of ${job.total} ${job.unit}s` : "Stopped before it began";
  if (job.state === "failed") return "Failed";
  const count = job.items.length;
  const kept = job.keep ? `, first ${job.keep} tokens kept` : "";
  return `${count} picture${count > 1 ? "s" : ""}, ${job.total} ${job.unit}s${count > 1 ? " each" : ""}${kept}, ${job.took} s`;
}

function createTile(entry, index) {
  const tile = make("figure", "ts-tile");
  const button = make("button", "ts-card ts-thumb");
  button.type = "button";
  const mosaic = make("canvas", "ts-mosaic");
  const image = make("img");
  image.hidden = true;
  image.draggable = true;
  button.append(mosaic, image);
  const caption = make("figcaption");
  const seed = make("span", "ts-seed");
  const link = make("a", "ts-download", "Download");
  link.hidden = true;
  caption.append(seed, link);
  tile.append(button, caption);
  button.addEventListener("click", () => {
    entry.selected = index;
    entry.chosen = true;
    updateJob(entry, entry.job);
  });
  return { node: tile, button, mosaic, image, seed, link };
}

function createEntry(job) {
  const card = createCard(job);
  const warning = make("p", "ts-warning");
  const grid = make("div", "ts-grid");
  const view = new TokenView();
  const use = make("button", "ts-button", "Use these settings");
  const keep = make("button", "ts-button", "Keep this seed");
  const vary = make("button", "ts-button", "Vary");
  const finish = make("button", "ts-button", "Finish");
  vary.title = "Four others that keep the first quarter of these tokens";
  finish.title = "Go on to all tokens of the model";
  for (const button of [use, keep, vary, finish]) button.type = "button";
  view.extra.append(vary, finish, use, keep);
  card.error.before(warning);
  card.node.append(grid, view.node);
  const entry = { ...card, vary, finish, warning, grid, view, tiles: [], selected: 0 };
  const event = (what) => trigger("use_settings", { id: job.id, index: entry.selected, what });
  use.addEventListener("click", () => event("all"));
  for (const [button, what] of [[vary, "vary"], [finish, "finish"]])
    button.addEventListener("click", () => trigger("more", { id: job.id, index: entry.selected, what }));
  keep.addEventListener("click", () => event("seed"));
  return entry;
}

function updateJob(entry, job) {
  entry.job = job;
  const words = job.style ? `${job.prompt}, ${job.style}` : job.prompt;
  const painted = job.items.filter((item) => item.name).length / job.items.length;
  const part = job.total ? (0.6 * job.step) / job.total + 0.4 * painted : 0;
  const active = updateCard(entry, job, job.model ? `${words} · ${job.model}` : words, progressText(job), part);
  entry.warning.hidden = !job.warning;
  setText(entry.warning, job.warning);
  const nothing = !job.step && !active;
  entry.grid.hidden = job.state === "queued" || nothing;
  entry.grid.classList.toggle("one", job.items.length === 1);
  while (entry.tiles.length < job.items.length) {
    const tile = createTile(entry, entry.tiles.length);
    entry.tiles.push(tile);
    entry.grid.append(tile.node);
  }
  job.items.forEach((item, i) => {
    const tile = entry.tiles[i];
    if (!item.name && !item.source) drawMosaic(tile.mosaic, item.tokens, job.total);
    if (item.source && tile.source !== item.source) {
      tile.source = item.source;
      tile.image.src = fileUrl(item.source);
      tile.image.hidden = false;
      tile.mosaic.hidden = true;
    }
    tile.image.classList.toggle("coarse", !item.name && active);
    tile.image.alt = `${job.prompt}, picture ${i + 1}`;
    tile.button.setAttribute("aria-label", `Picture ${i + 1}: ${job.prompt}`);
    tile.button.setAttribute("aria-pressed", String(i === entry.selected && job.items.length > 1));
    setText(tile.seed, `seed ${item.seed}`);
    const final = !active && item.source;
    tile.link.hidden = !final;
    if (final) {
      tile.link.href = fileUrl(item.source);
      tile.link.download = item.name ? item.name.split("/").pop() : `${item.seed}.webp`;
      tile.link.setAttribute("aria-label", `Download picture ${i + 1}`);
    }
  });
  const item = job.items[entry.selected];
  const ready = !active && item.sheet;
  entry.view.node.hidden = !ready;
  entry.vary.hidden = !job.variable;
  entry.finish.hidden = !job.finishable;
  if (ready) {
    const ordered = item.lengths.length > 1;
    setText(entry.view.title, `${ordered ? "Token by token" : "Tokens"}${job.items.length > 1 ? `: picture ${entry.selected + 1}` : ""}`);
    entry.view.show({
      sheet: item.sheet,
      lengths: item.lengths,
      tokens: item.tokens,
      count: item.tokens.length,
      alt: job.prompt,
    });
  }
}

// Screen readers hear quarters, not every token.
function announce(jobs) {
  const job = jobs.find((each) => each.state === "running") || jobs[0];
  if (!job) return setText(status, "");
  const quarter = job.total ? Math.floor((4 * job.step) / job.total) : 0;
  const progress = job.state === "running" && job.step < job.total ? `, ${25 * quarter} %` : "";
  setText(status, `${STATES[job.state]}: ${job.prompt}${progress}${job.error ? `. ${job.error}` : ""}`);
}

function update() {
  const page = props.value;
  if (!isNews(page, shown)) return;
  shown = page;
  syncEntries(list, entries, page.jobs, createEntry, updateJob, (entry) => entry.view.halt());
  empty.hidden = page.jobs.length > 0;
  if (page.example && example.hidden) {
    example.src = fileUrl(page.example);
    example.hidden = false;
  }
  const running = page.jobs.find((job) => job.state === "running");
  const busy = page.jobs.some((job) => job.state === "queued" || job.state === "running");
  document.querySelector("#ask")?.toggleAttribute("data-busy", busy);
  document.title = running && running.total ? `(${running.step}/${running.total}) Tessera` : "Tessera";
  announce(page.jobs);
}

watch("value", update);
update();
