// Shared by the components; each gets this text in front of its own.

function make(tag, className, text) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
}

function fileUrl(path) {
  const root = (window.gradio_config && window.gradio_config.root) || "";
  return `${root}/gradio_api/file=${path.split("/").map(encodeURIComponent).join("/")}`;
}

// A file as what plays it: a picture or animation, a video that loops, or a sound.
function medium(path, kind) {
  const node = make({ video: "video", sound: "audio" }[kind] || "img");
  if (kind === "video") Object.assign(node, { muted: true, loop: true, autoplay: true, playsInline: true });
  if (kind === "video" || kind === "sound") node.controls = true;
  else node.alt = path.split("/").pop();
  node.src = fileUrl(path);
  return node;
}

// Links to the files of one thing in several formats: format -> file.
function downloads(files, names = {}) {
  return Object.entries(files).map(([kind, file]) => {
    const name = names[kind] || kind.toUpperCase();
    const link = make("a", "ts-download", name);
    link.href = fileUrl(file);
    link.download = file.split("/").pop();
    link.setAttribute("aria-label", `Download ${name}`);
    return link;
  });
}

function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

// Whether a page of jobs is newer than the one shown: a watcher that is being replaced may still
// deliver an older state.
function isNews(page, shown) {
  return Boolean(page && page.jobs) && !(page.boot === shown.boot && page.version < shown.version);
}

// Make the entries (id -> { node }) in the list those of the jobs, in their order.
function syncEntries(list, entries, jobs, create, update, halt) {
  const ids = new Set(jobs.map((job) => job.id));
  for (const [id, entry] of entries)
    if (!ids.has(id)) {
      halt(entry);
      entry.node.remove();
      entries.delete(id);
    }
  jobs.forEach((job, i) => {
    if (!entries.has(job.id)) entries.set(job.id, create(job));
    const entry = entries.get(job.id);
    update(entry, job);
    if (list.children[i] !== entry.node) list.insertBefore(entry.node, list.children[i] || null);
  });
}

// The card of a job, as every list of jobs has it: title, Stop, a line of text, bar, error; more nodes
// below.
function createCard(job, titleClass = "ts-prompt") {
  const node = make("section", "ts-job");
  const head = make("div", "ts-head");
  const title = make("h2", titleClass);
  const stop = make("button", "ts-button ts-stop", "Stop");
  stop.type = "button";
  stop.addEventListener("click", () => trigger("stop_job", { id: job.id }));
  head.append(title, stop);
  const meta = make("p", "ts-meta");
  const bar = make("div", "ts-bar");
  bar.append(make("i"));
  const error = make("p", "ts-error");
  node.append(head, meta, bar, error);
  return { node, title, stop, meta, bar, error };
}

// Its title, line of text and share of the work that is done; returns whether the job goes on.
function updateCard(entry, job, title, text, share) {
  const active = job.state === "queued" || job.state === "running";
  entry.node.dataset.state = job.state;
  setText(entry.title, title);
  setText(entry.meta, text);
  entry.stop.hidden = !active || job.stopping;
  entry.bar.hidden = job.state !== "running";
  entry.bar.firstChild.style.width = `${100 * share}%`;
  entry.error.hidden = !job.error;
  setText(entry.error, job.error);
  return active;
}

// Neighbouring ids get far apart hues (golden angle).
function tokenColour(id) {
  return `hsl(${(id * 137.508) % 360} 58% ${50 + ((id * 7) % 5) * 4}%)`;
}

// Tokens as a square mosaic that fills while they arrive.
function drawMosaic(canvas, tokens, total) {
  const side = Math.ceil(Math.sqrt(Math.max(total, 1)));
  canvas.width = canvas.height = side * 10;
  const context = canvas.getContext("2d");
  context.clearRect(0, 0, canvas.width, canvas.height);
  tokens.forEach((id, i) => {
    context.fillStyle = tokenColour(id);
    context.fillRect((i % side) * 10, Math.floor(i / side) * 10, 9, 9);
  });
}

// A picture at every prefix of its tokens: strip, slider, playback. No request per move.
class TokenView {
  constructor() {
    this.node = make("div", "ts-view");
    this.picture = make("div", "ts-view-picture ts-card");
    this.picture.setAttribute("role", "img");
    const side = make("div", "ts-view-side");
    this.title = make("div", "ts-view-title");
    this.strip = make("div", "ts-strip");
    this.strip.setAttribute("aria-hidden", "true");
    this.slider = make("input", "ts-slider");
    Object.assign(this.slider, { type: "range", min: 1, step: 1 });
    this.slider.setAttribute("aria-label", "Number of tokens");
    this.label = make("output", "ts-view-label");
    this.play = make("button", "ts-button ts-play", "Play");
    this.play.type = "button";
    this.extra = make("div", "ts-actions");
    const row = make("div", "ts-view-row");
    row.append(this.play, this.label);
    side.append(this.title, this.strip, this.slider, row, this.extra);
    this.node.append(this.picture, side);
    this.slider.addEventListener("input", () => {
      this.halt();
      this.draw();
    });
    this.strip.addEventListener("click", (event) => {
      const index = [...this.strip.children].indexOf(event.target);
      if (index < 0) return;
      this.halt();
      this.slider.value = index + 1;
      this.draw();
    });
    this.play.addEventListener("click", () => (this.timer ? this.halt() : this.start()));
  }

  // data: {sheet, lengths, tokens, count, alt, caption(index) -> text}
  show(data) {
    const key = JSON.stringify([data.sheet, data.tokens, data.lengths]);
    this.data = data;
    if (key === this.key) return;
    this.key = key;
    this.halt();
    this.slider.max = data.count;
    this.slider.value = data.count;
    this.strip.replaceChildren(
      ...data.tokens.map((id, i) => {
        const cell = make("i");
        cell.style.background = tokenColour(id);
        cell.title = `token ${i + 1}: ${id}`;
        return cell;
      })
    );
    const sliding = data.lengths.length > 1;
    this.slider.hidden = this.play.hidden = this.label.hidden = !sliding;
    this.picture.style.backgroundImage = `url("${fileUrl(data.sheet)}")`;
    this.picture.style.backgroundSize = `100% ${100 * data.lengths.length}%`;
    this.draw();
  }

  draw() {
    const { lengths, tokens, count, alt, caption } = this.data;
    const wanted = Number(this.slider.value);
    let index = 0;
    while (index + 1 < lengths.length && lengths[index + 1] <= wanted) index += 1;
    const last = Math.max(lengths.length - 1, 1);
    this.picture.style.backgroundPosition = `0 ${(100 * index) / last}%`;
    this.picture.dataset.length = lengths[index];
    this.picture.setAttribute("aria-label", `${alt}, from ${lengths[index]} of ${count} tokens`);
    const shown = lengths[index] === wanted ? "" : ` (picture at ${lengths[index]})`;
    const text = `${wanted} of ${count} tokens${shown}`;
    setText(this.label, caption ? `${text} · ${caption(index)}` : text);
    this.slider.setAttribute("aria-valuetext", text);
    this.slider.style.setProperty("--part", `${(100 * (wanted - 1)) / Math.max(count - 1, 1)}%`);
    [...this.strip.children].forEach((cell, i) => cell.classList.toggle("off", i >= wanted));
  }

  start() {
    const { lengths } = this.data;
    let index = -1;
    let rest = 0;
    setText(this.play, "Pause");
    this.timer = setInterval(() => {
      if (rest > 0) return void (rest -= 1);
      index = (index + 1) % lengths.length;
      if (index === lengths.length - 1) rest = 8; // The whole picture stays for a second.
      this.slider.value = lengths[index];
      this.draw();
    }, 125);
  }

  halt() {
    clearInterval(this.timer);
    this.timer = null;
    setText(this.play, "Play");
  }
}
