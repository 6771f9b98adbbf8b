// The newest comparison: the recording and what each codec keeps of it.
const status = element.querySelector(".ts-status");
const empty = element.querySelector(".ts-empty");
const list = element.querySelector(".ts-jobs");
let shown = { boot: "", version: -1, id: "" };
let rows = [];

function createRow() {
  const node = make("section", "ts-job ts-codec");
  const name = make("h2", "ts-prompt");
  const meta = make("p", "ts-meta");
  const error = make("p", "ts-error");
  const spectrum = make("img", "ts-wave");
  const audio = make("audio");
  audio.controls = true;
  audio.preload = "metadata";
  node.append(name, meta, error, spectrum, audio);
  list.append(node);
  return { node, name, meta, error, spectrum, audio };
}

function metaText(row, job) {
  if (row.state === "queued") return job.note ? `Waiting: ${job.note}` : job.state === "stopped" ? "Stopped" : "Waiting";
  if (row.state === "running") return "Encoding and decoding…";
  if (row.state === "failed") return "Failed";
  const bits = row.bitrate === null ? "continuous" : `${(row.bitrate / 1000).toFixed(2)} kbit/s`;
  const tokens = `${row.codebooks} × ${Number(row.token_rate.toFixed(1))} tokens/s`;
  const quality = row.si_snr === null ? "" : ` · SI-SNR ${row.si_snr} dB`;
  const windows = row.approximate ? " · in windows" : "";
  return `${bits} · ${tokens} · ${row.rate / 1000} kHz · real-time factor ${row.encode} to encode, ${row.decode} to decode${quality}${windows}`;
}

function updateRow(entry, row, meta) {
  setText(entry.name, row.name);
  setText(entry.meta, meta);
  entry.error.hidden = !row.error;
  setText(entry.error, row.error);
  entry.spectrum.hidden = entry.audio.hidden = !row.source;
  if (!row.source || entry.source === row.source) return;
  entry.source = row.source;
  entry.audio.src = fileUrl(row.source);
  entry.spectrum.src = fileUrl(row.spectrum);
  entry.spectrum.alt = `Spectrogram of ${row.name}`;
}

function update() {
  const page = props.value;
  if (!isNews(page, shown)) return;
  const job = page.jobs[0];
  const id = job ? job.id : "";
  if (id !== shown.id) {
    list.replaceChildren();
    rows = [];
  }
  shown = { boot: page.boot, version: page.version, id };
  empty.hidden = Boolean(job);
  if (!job) return;
  [job.original, ...job.rows].forEach((row, i) => {
    rows[i] ??= createRow();
    const original = `the recording · ${job.seconds} s · ${row.rate / 1000} kHz`;
    updateRow(rows[i], row, i ? metaText(row, job) : original);
  });
  const ready = job.rows.filter((row) => row.state === "done").length;
  setText(status, job.error || `${job.name}: ${ready} of ${job.rows.length} codecs done`);
}

watch("value", update);
update();
