// One card a tokenizer: the picture, its reconstructions by prefix length, and the token view.
const status = element.querySelector(".ts-status");
const empty = element.querySelector(".ts-empty");
const list = element.querySelector(".ts-jobs");
let shown = { boot: "", version: -1, id: "" };
let rows = [];

function number(value, unit) {
  return value === null || value === undefined ? "" : `${value} ${unit}`;
}

function createRow() {
  const node = make("section", "ts-job");
  const head = make("div", "ts-head");
  const name = make("h2", "ts-prompt");
  head.append(name);
  const meta = make("p", "ts-meta");
  const error = make("p", "ts-error");
  const shelf = make("div", "ts-filmstrip");
  const view = new TokenView();
  node.append(head, meta, error, shelf, view.node);
  list.append(node);
  return { node, name, meta, error, shelf, view };
}

function frame(caption, detail) {
  const figure = make("figure", "ts-frame");
  const picture = make("div", "ts-card");
  picture.setAttribute("role", "img");
  picture.setAttribute("aria-label", caption);
  figure.append(picture, make("figcaption", "", caption), make("figcaption", "ts-detail", detail));
  return { figure, picture };
}

function metaText(row, job) {
  if (row.state === "queued") return job.note ? `Waiting: ${job.note}` : "Waiting";
  if (row.state === "running") return row.done ? `${row.done} lengths done…` : "Encoding…";
  if (row.state === "stopped") return "Stopped";
  if (row.state === "failed") return "Failed";
  const bits = row.bits.length ? `, ${row.bits[row.bits.length - 1]} bits per pixel` : ", continuous";
  return `${row.num_tokens} tokens${bits}, ${row.size}×${row.size}, ${row.seconds} s`;
}

function updateRow(entry, row, job) {
  setText(entry.name, row.tokenizer);
  setText(entry.meta, metaText(row, job));
  entry.error.hidden = !row.error;
  setText(entry.error, row.error);
  const key = `${row.original}|${row.sheet}`;
  if (entry.key !== key) {
    entry.key = key;
    entry.shelf.replaceChildren();
    if (row.original) {
      const { figure, picture } = frame("original", "");
      picture.style.backgroundImage = `url("${fileUrl(row.original)}")`;
      entry.shelf.append(figure);
    }
    row.lengths.forEach((length, i) => {
      const detail = [number(row.psnr[i], "dB"), number(row.bits[i], "bpp")].filter(Boolean).join(" · ");
      const { figure, picture } = frame(`${length} token${length > 1 ? "s" : ""}`, detail);
      picture.style.backgroundImage = `url("${fileUrl(row.sheet)}")`;
      picture.style.backgroundSize = `100% ${100 * row.lengths.length}%`;
      picture.style.backgroundPosition = `0 ${(100 * i) / Math.max(row.lengths.length - 1, 1)}%`;
      entry.shelf.append(figure);
    });
  }
  const ready = Boolean(row.sheet) && row.ordered;
  entry.view.node.hidden = !ready;
  if (ready) {
    setText(entry.view.title, "Token by token");
    entry.view.show({
      sheet: row.sheet,
      lengths: row.lengths,
      tokens: row.tokens,
      count: row.num_tokens,
      alt: job.name,
      caption: (i) => `${row.psnr[i]} dB`,
    });
  }
}

function update() {
  const page = props.value;
  if (!page || !page.jobs) return;
  if (page.boot === shown.boot && page.version < shown.version) return;
  const job = page.jobs[0];
  const id = job ? job.id : "";
  if (id !== shown.id) {
    rows.forEach((entry) => entry.view.halt());
    list.replaceChildren();
    rows = [];
  }
  shown = { boot: page.boot, version: page.version, id };
  empty.hidden = Boolean(job);
  if (!job) return;
  job.rows.forEach((row, i) => {
    if (!rows[i]) rows[i] = createRow();
    updateRow(rows[i], row, job);
  });
  const ready = job.rows.filter((row) => row.state === "done").length;
  setText(status, job.error || `${job.name}: ${ready} of ${job.rows.length} tokenizers done`);
}

watch("value", update);
update();
