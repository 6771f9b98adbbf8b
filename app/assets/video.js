// Clips and stories of this browser, newest first. Frames that are there play while others are made.
const status = element.querySelector(".ts-status");
const empty = element.querySelector(".ts-empty");
const list = element.querySelector(".ts-jobs");
const entries = new Map();
let shown = { boot: "", version: -1 };

// Frames in columns below each other, played in a loop.
class ClipPlayer {
  constructor(onFrame) {
    this.node = make("div", "ts-clip");
    const card = make("div", "ts-card");
    this.canvas = make("canvas");
    this.canvas.setAttribute("role", "img");
    card.append(this.canvas);
    this.play = make("button", "ts-button ts-play", "Pause");
    this.play.type = "button";
    this.slider = make("input", "ts-slider");
    Object.assign(this.slider, { type: "range", min: 0, max: 0, step: 1, value: 0 });
    this.slider.setAttribute("aria-label", "Frame");
    this.row = make("div", "ts-clip-row");
    this.row.append(this.play, this.slider);
    this.node.append(card, this.row);
    this.images = new Map();
    this.frames = [];
    this.index = 0;
    this.onFrame = onFrame;
    this.still = matchMedia("(prefers-reduced-motion: reduce)").matches;
    this.play.addEventListener("click", () => this.pause(!this.still));
    this.slider.addEventListener("input", () => {
      this.pause(true);
      this.index = Number(this.slider.value);
      this.draw();
    });
    this.pause(this.still);
  }

  pause(still) {
    this.still = still;
    setText(this.play, still ? "Play" : "Pause");
  }

  // sheets: [file, frames in it] each. What plays goes on until all of them have arrived.
  async show(sheets, rate) {
    this.rate = rate;
    const key = JSON.stringify(sheets);
    if (key === this.key) return;
    this.key = key;
    const loaded = await Promise.all(
      sheets.map(async ([path]) => {
        if (!this.images.has(path)) {
          const image = new Image();
          image.src = fileUrl(path);
          this.images.set(path, image.decode().then(() => image, () => null));
        }
        return this.images.get(path);
      })
    );
    if (key !== this.key || this.halted || loaded.includes(null)) return;
    const wanted = new Set(sheets.map(([path]) => path));
    for (const path of this.images.keys()) if (!wanted.has(path)) this.images.delete(path);
    this.frames = sheets.flatMap(([, count], i) => Array.from({ length: count }, (_, k) => [loaded[i], k, count]));
    this.slider.max = Math.max(this.frames.length - 1, 0);
    this.row.hidden = this.frames.length < 2;
    this.node.dataset.frames = this.frames.length;
    if (this.index >= this.frames.length) this.index = 0;
    this.draw();
    this.timer ??= setTimeout(() => this.tick(), 1000 / this.rate);
  }

  tick() {
    if (!this.still && this.frames.length > 1) {
      this.index = (this.index + 1) % this.frames.length;
      this.draw();
    }
    this.timer = this.halted ? null : setTimeout(() => this.tick(), 1000 / this.rate);
  }

  draw() {
    const frame = this.frames[this.index];
    if (!frame) return;
    const [image, row, count] = frame;
    const [width, height] = [image.naturalWidth, image.naturalHeight / count];
    if (this.canvas.width !== width || this.canvas.height !== height) {
      this.canvas.width = width;
      this.canvas.height = height;
    }
    const context = this.canvas.getContext("2d");
    context.drawImage(image, 0, row * height, width, height, 0, 0, width, height);
    this.slider.value = this.index;
    this.slider.setAttribute("aria-valuetext", `frame ${this.index + 1} of ${this.frames.length}`);
    this.onFrame(this.index);
  }

  halt() {
    this.halted = true;
    clearTimeout(this.timer);
  }
}

function progressText(job) {
  if (job.stopping) return "Stopping…";
  if (job.state === "queued") return `Waiting: ${job.note}`;
  if (job.state === "failed") return "Failed";
  const frames = job.items.reduce((sum, item) => sum + item.frames, 0);
  const seen = `${frames} frame${frames === 1 ? "" : "s"}`;
  if (job.state === "running") {
    if (!job.step) return "Starting…";
    const scene = job.scenes.length ? `Scene ${job.scene + 1} of ${job.scenes.length}, step` : "Step";
    return `${scene} ${job.step} of ${job.total}${frames ? `, ${seen}` : ""}`;
  }
  const stopped = job.state === "stopped" ? `, stopped at step ${job.step} of ${job.total}` : "";
  if (!frames) return stopped ? "Stopped before anything was there" : "";
  const from = job.begins_with && job.begins_with !== job.title ? `, begins with ${job.begins_with}` : "";
  const count = job.items.length > 1 ? `${job.items.length} clips, ${seen}` : `${seen}, ${(frames / job.rate).toFixed(1)} s`;
  return `${count} at ${Number(job.rate.toFixed(2))} a second, made in ${job.took} s${from}${stopped}`;
}

function createTile(entry, index) {
  const node = make("figure", "ts-clip-tile");
  const player = new ClipPlayer((frame) => mark(entry, index, frame));
  const caption = make("figcaption", "ts-tile-foot");
  const seed = make("span", "ts-seed");
  const links = make("span", "ts-links");
  caption.append(seed, links);
  const actions = make("div", "ts-actions");
  const button = (text, what, title) => {
    const node = make("button", "ts-button", text);
    node.type = "button";
    node.title = title;
    node.addEventListener("click", () => trigger(what, { id: entry.job.id, index }));
    actions.append(node);
  };
  button("Go on from it", "go_on", "Begin the next clip with the last frames of this one");
  if (entry.job.can_smooth) button("Smoother", "smoothen", "Make frames between its frames");
  node.append(player.node, caption, actions);
  entry.grid.append(node);
  return { node, player, seed, links, actions, files: "" };
}

function createEntry(job) {
  const line = make("ol", "ts-timeline");
  line.append(
    ...job.scenes.map(([prompt, seconds]) => {
      const cell = make("li");
      cell.style.flexGrow = seconds;
      cell.append(make("b", "", `${seconds} s`), prompt);
      return cell;
    })
  );
  line.hidden = !job.scenes.length;
  const grid = make("div", "ts-clips");
  const card = createCard(job, "ts-prompt ts-clamp");
  card.node.append(line, grid);
  return { ...card, line, grid, tiles: [], job };
}

// Marks the scene of the frame that is seen.
function mark(entry, index, frame) {
  if (index || !entry.job.scenes.length) return;
  const time = (frame + 0.5) / entry.job.rate;
  let end = 0;
  let now = entry.job.scenes.findIndex(([, seconds]) => (end += seconds) > time);
  if (now < 0) now = entry.job.scenes.length - 1;
  if (now === entry.seen) return;
  entry.line.children[entry.seen]?.classList.remove("seen");
  entry.line.children[now].classList.add("seen");
  entry.seen = now;
}

function updateTile(tile, item, job, active) {
  tile.node.hidden = !item.sheets.length;
  if (item.sheets.length) tile.player.show(item.sheets, job.rate);
  tile.player.canvas.setAttribute("aria-label", `Clip of: ${job.title || job.scenes.map(([prompt]) => prompt).join(", ")}`);
  tile.actions.hidden = !item.name;
  setText(tile.seed, `seed ${item.seed}`);
  const key = JSON.stringify(item.files);
  if (tile.files === key) return;
  tile.files = key;
  tile.links.replaceChildren(...downloads(item.files, { png: "APNG", webm: "WebM", webp: "WebP" }));
}

function updateEntry(entry, job) {
  entry.job = job;
  const title = job.scenes.length ? `A story of ${job.scenes.length} scene${job.scenes.length === 1 ? "" : "s"}` : job.title;
  const named = job.model ? `${title} · ${job.model}` : title;
  const active = updateCard(entry, job, named, progressText(job), job.total ? job.step / job.total : 0);
  [...entry.line.children].forEach((cell, i) => {
    cell.classList.toggle("now", job.state === "running" && job.step > 0 && i === job.scene);
    cell.classList.toggle("late", active && (!job.step || i > job.scene));
  });
  entry.grid.classList.toggle("one", job.items.length === 1);
  job.items.forEach((item, i) => {
    entry.tiles[i] ??= createTile(entry, i);
    updateTile(entry.tiles[i], item, job, active);
  });
}

function update() {
  const page = props.value;
  if (!isNews(page, shown)) return;
  shown = page;
  const halt = (entry) => entry.tiles.forEach((tile) => tile.player.halt());
  syncEntries(list, entries, page.jobs, createEntry, updateEntry, halt);
  empty.hidden = page.jobs.length > 0;
  const job = page.jobs.find((each) => each.state === "running") || page.jobs[0];
  setText(status, job ? `${job.title || "Story"}: ${job.state}${job.error ? `. ${job.error}` : ""}` : "");
}

watch("value", update);
update();
