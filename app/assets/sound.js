// Speech and sounds of this browser, newest first. Speech is heard while it is made.
const status = element.querySelector(".ts-status");
const empty = element.querySelector(".ts-empty");
const list = element.querySelector(".ts-jobs");
const entries = new Map();
const LEAD = 0.15; // Seconds between the arrival of the first piece and its sound.
let shown = { boot: "", version: -1 };
let context = null;

// Puts pieces of 16-bit samples back to back on the audio clock.
class Player {
  constructor(node) {
    this.node = node;
    this.taken = 0;
    this.begin = null;
    this.sources = [];
    this.chain = Promise.resolve();
  }

  // Every piece once, in order.
  take(folder, count, rate) {
    for (; this.taken < count; this.taken += 1) {
      const url = fileUrl(`${folder}/${this.taken}.pcm`);
      this.chain = this.chain.then(() => this.play(url, rate)).catch(() => this.halt());
    }
  }

  async play(url, rate) {
    if (this.halted) return;
    const answer = await fetch(url);
    if (!answer.ok) throw new Error(answer.statusText);
    const samples = new Int16Array(await answer.arrayBuffer());
    if (this.halted) return;
    context ??= new AudioContext();
    if (context.state === "suspended") context.resume();
    const buffer = context.createBuffer(1, samples.length, rate);
    buffer.getChannelData(0).set(Float32Array.from(samples, (x) => x / 32768));
    const source = context.createBufferSource();
    source.buffer = buffer;
    source.connect(context.destination);
    const soonest = context.currentTime + LEAD;
    if (this.begin === null) {
      this.begin = this.next = soonest;
      this.node.dataset.heardWhile = this.node.dataset.state;
    } else if (this.next < context.currentTime) {
      this.begin += soonest - this.next; // The voice fell behind: a pause, not a lost piece.
      this.next = soonest;
    }
    source.start(this.next);
    this.sources.push(source);
    this.next += buffer.duration;
    this.node.dataset.scheduled = (this.next - this.begin).toFixed(3);
  }

  get playing() {
    return this.begin !== null && !this.halted && context.currentTime < this.next;
  }

  get time() {
    return this.playing ? context.currentTime - this.begin : null;
  }

  halt() {
    this.halted = true;
    for (const source of this.sources) source.stop();
    this.sources = [];
  }
}

function progressText(job) {
  if (job.stopping) return "Stopping…";
  if (job.state === "queued") return `Waiting: ${job.note}`;
  if (job.state === "failed") return "Failed";
  if (job.state === "running") {
    if (!job.step) return "Starting…";
    const spoken = job.spoken ? `, ${job.spoken} s of speech` : "";
    return `${job.unit[0].toUpperCase()}${job.unit.slice(1)} ${job.step} of ${job.total}${spoken}`;
  }
  const seconds = job.items.reduce((sum, item) => sum + item.seconds, 0);
  if (job.state === "stopped" && !seconds) return "Stopped";
  const who = job.voice ? `, ${job.voice}${job.speed === 1 ? "" : ` at ${job.speed}×`}` : "";
  const stopped = job.state === "stopped" ? `, stopped at ${job.unit} ${job.step} of ${job.total}` : "";
  return `${seconds.toFixed(1)} s of sound in ${job.took} s${who}${stopped}`;
}

function createItem(entry) {
  const node = make("figure", "ts-sound");
  const wave = make("img", "ts-wave");
  const spectrum = make("img", "ts-wave");
  const audio = make("audio");
  audio.controls = true;
  audio.preload = "metadata";
  audio.addEventListener("play", () => entry.player.halt());
  const caption = make("figcaption", "ts-tile-foot");
  const seed = make("span", "ts-seed");
  const links = make("span", "ts-links");
  caption.append(seed, links);
  node.append(wave, spectrum, audio, caption);
  entry.items.append(node);
  return { node, wave, spectrum, audio, seed, links, files: "" };
}

function createEntry(job) {
  const card = createCard(job, "ts-prompt ts-clamp");
  const words = make("p", "ts-words");
  const items = make("div", "ts-sounds");
  card.node.append(words, items);
  const entry = { ...card, words, items, tiles: [], player: new Player(card.node) };
  entry.stop.addEventListener("click", () => {
    entry.player.halt();
    updateEntry(entry, entry.job);
  });
  // Only what begins while somebody listens plays by itself; browsers want a click before.
  const active = job.state === "queued" || job.state === "running";
  entry.live = active && navigator.userActivation?.hasBeenActive !== false;
  return entry;
}

function updateItem(tile, item, job, active) {
  tile.node.hidden = !item.wave;
  setText(tile.seed, `seed ${item.seed}`);
  for (const [image, source, what] of [[tile.wave, item.wave, "Waveform"], [tile.spectrum, item.spectrum, "Spectrogram"]])
    if (source && image.dataset.source !== source) {
      image.dataset.source = source;
      image.src = fileUrl(source);
      image.alt = `${what} of: ${job.title}`;
    }
  const key = JSON.stringify(item.files);
  if (active || tile.files === key) return;
  tile.files = key;
  if (item.files.wav && !tile.audio.src) tile.audio.src = fileUrl(item.files.wav);
  tile.links.replaceChildren(...downloads(item.files));
}

function updateEntry(entry, job) {
  entry.job = job;
  const active = updateCard(entry, job, job.title, progressText(job), job.total ? job.step / job.total : 0);
  if (entry.player.playing) entry.stop.hidden = false;
  if (job.pieces !== undefined) {
    if (entry.live) entry.player.take(job.folder, job.pieces, job.rate);
    for (let i = entry.words.childNodes.length; i < job.words.length; i += 1)
      entry.words.append(make("span", "", `${job.words[i][0]} `));
  }
  entry.words.hidden = !entry.words.childNodes.length;
  job.items.forEach((item, i) => {
    entry.tiles[i] ??= createItem(entry);
    updateItem(entry.tiles[i], item, job, active);
  });
}

// Lights up the word that is heard, from the stream or from the file.
function light() {
  for (const entry of entries.values()) {
    const job = entry.job;
    if (!job.words) continue;
    const audio = entry.tiles[0]?.audio;
    const time = entry.player.time ?? (audio && !audio.paused ? audio.currentTime : null);
    if (time === null && entry.lit === undefined) continue;
    const index = time === null ? undefined : job.words.findLastIndex((word) => word[1] <= time);
    if (index === entry.lit) continue;
    entry.words.childNodes[entry.lit]?.classList.remove("on");
    entry.words.childNodes[index]?.classList.add("on");
    entry.lit = index;
    if (index === undefined) updateEntry(entry, job); // The end of the sound: no Stop any more.
  }
}
setInterval(light, 80);

function update() {
  const page = props.value;
  if (!isNews(page, shown)) return;
  shown = page;
  syncEntries(list, entries, page.jobs, createEntry, updateEntry, (entry) => entry.player.halt());
  empty.hidden = page.jobs.length > 0;
  const job = page.jobs.find((each) => each.state === "running") || page.jobs[0];
  setText(status, job ? `${job.title}: ${job.state}${job.error ? `. ${job.error}` : ""}` : "");
}

watch("value", update);
update();
