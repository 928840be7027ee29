// Keeps a page up to date: applies the fragments that its stream sends, makes times relative, draws the plots from
// their tables. Every page is complete without it. HTML comes from our own server only, escaped there.
"use strict";
(() => {
  const body = document.body;
  let clockAhead = Date.now() / 1000 - Number(body.dataset.now || Date.now() / 1000);

  // Times.
  const UNITS = [["d", 86400], ["h", 3600], ["min", 60], ["s", 1]];
  function span(seconds) {
    for (const [unit, length] of UNITS) {
      if (seconds >= 2 * length || length === 1) return `${Math.round(seconds / length)} ${unit}`;
    }
  }
  function relative(seconds) {
    if (Math.abs(seconds) < 1) return "now";
    return seconds > 0 ? `${span(seconds)} ago` : `in ${span(-seconds)}`;
  }
  function retime(root) {
    const now = Date.now() / 1000 - clockAhead;
    for (const one of root.querySelectorAll("time[datetime]")) {
      if (one.closest("table.data")) continue; // a plot's table keeps its absolute times
      const words = relative(now - Date.parse(one.dateTime) / 1000);
      if (one.textContent !== words) one.textContent = words;
    }
  }

  // Plots: the first column's data-x is the time, every column with data-y a line, a row's data-mark a checkpoint.
  const plots = new Map(); // holder -> {plot, key}
  const COLOURS = ["#2f7fc1", "#d1772b", "#2a9d62", "#b0589a", "#8c8c2c", "#6b6fd6", "#c24a4a", "#3d9ea8"];
  function read(table) {
    const heads = [...table.tHead.rows[0].cells].map((cell) => cell.textContent.trim());
    const rows = [...table.tBodies[0].rows];
    const columns = heads.map((_, n) => n).filter((n) => n > 0 && rows.some((row) => row.cells[n] && "y" in row.cells[n].dataset));
    const x = rows.map((row) => Number(row.cells[0].dataset.x));
    const lines = columns.map((n) => rows.map((row) => {
      const value = row.cells[n] && row.cells[n].dataset.y;
      return value === undefined || value === "" ? null : Number(value);
    }));
    const marks = rows.filter((row) => row.dataset.mark).map((row) => [Number(row.cells[0].dataset.x), row.dataset.mark]);
    return { names: columns.map((n) => heads[n]), data: [x, ...lines], marks, percent: table.dataset.unit === "percent" };
  }
  function show(value, percent) {
    if (value == null) return "–";
    return percent ? `${(value * 100).toFixed(1)} %` : Number(value.toPrecision(4)).toString();
  }
  const utc = (seconds) => new Date(seconds * 1000).toISOString(); // as every time on the pages
  function clock(u, ticks, _, __, step) {
    return ticks.map((tick) => {
      if (step >= 86400) return utc(tick).slice(5, 10);
      return tick % 86400 === 0 ? `${utc(tick).slice(5, 10)}\n00:00` : utc(tick).slice(11, step < 60 ? 19 : 16);
    });
  }
  function draw(holder) {
    const table = holder.querySelector("table.data");
    if (!table || typeof uPlot === "undefined") return;
    let canvas = holder.parentNode.querySelector(".canvas");
    if (!canvas) {
      canvas = document.createElement("div");
      canvas.className = "canvas";
      canvas.setAttribute("role", "img");
      holder.before(canvas);
    }
    canvas.setAttribute("aria-label", `Plot: ${table.caption ? table.caption.textContent : ""}; the table below has the figures`);
    fold(holder, table);
    const { names, data, marks, percent } = read(table);
    const style = getComputedStyle(body);
    const [text, line] = [style.getPropertyValue("--soft").trim(), style.getPropertyValue("--line").trim()];
    const key = JSON.stringify([names, percent, text]);
    const width = Math.max(canvas.clientWidth, 200);
    const known = plots.get(canvas);
    if (known && known.key === key) {
      known.marks.list = marks;
      known.plot.setData(data);
      return;
    }
    if (known) known.plot.destroy();
    const shared = { list: marks };
    const axis = { stroke: text, grid: { stroke: line, width: 1 }, ticks: { stroke: line, width: 1 } };
    const plot = new uPlot({
      width, height: 220,
      scales: percent ? { y: { range: (_, low, high) => [Math.max(0, Math.floor((low - 0.02) * 20) / 20), Math.min(1, Math.ceil((high + 0.02) * 20) / 20)] } } : { y: { range: (_, low, high) => [Math.min(0, low * 1.1), (high || 1) * 1.1] } },
      tzDate: (seconds) => uPlot.tzDate(new Date(seconds * 1000), "Etc/UTC"),
      axes: [{ ...axis, values: clock }, { ...axis, size: 62, values: (_, ticks) => ticks.map((tick) => (percent ? `${Math.round(tick * 100)} %` : show(tick))) }],
      series: [{ label: "UTC", value: (_, value) => (value == null ? "–" : utc(value).slice(5, 19).replace("T", " ")) }, ...names.map((name, n) => ({
        label: name, stroke: COLOURS[n % COLOURS.length], width: 2, spanGaps: true,
        dash: /expected/.test(name) ? [6, 5] : undefined, points: { show: data[0].length < 60, size: 5 }, value: (_, value) => show(value, percent),
      }))],
      hooks: { draw: [(u) => drawMarks(u, shared.list, text)] },
    }, data, canvas);
    plots.set(canvas, { plot, key, marks: shared });
  }
  function drawMarks(u, marks, colour) {
    const { ctx } = u;
    ctx.save();
    ctx.strokeStyle = ctx.fillStyle = colour;
    ctx.font = `${11 * devicePixelRatio}px system-ui, sans-serif`;
    ctx.setLineDash([3 * devicePixelRatio, 3 * devicePixelRatio]);
    let right = -Infinity;
    for (const [at, name] of marks) {
      const x = Math.round(u.valToPos(at, "x", true));
      if (x < u.bbox.left || x > u.bbox.left + u.bbox.width) continue;
      ctx.beginPath(); ctx.moveTo(x, u.bbox.top); ctx.lineTo(x, u.bbox.top + u.bbox.height); ctx.stroke();
      if (x > right) { ctx.fillText(name, x + 4, u.bbox.top + u.bbox.height - 5 * devicePixelRatio); right = x + ctx.measureText(name).width + 8; }
    }
    ctx.restore();
  }
  function fold(holder, table) { // the figures stay, one click or key press away
    if (table.parentNode.tagName === "DETAILS") return;
    const details = document.createElement("details");
    const summary = document.createElement("summary");
    summary.textContent = "Figures as a table";
    details.open = holder.dataset.open === "yes";
    details.addEventListener("toggle", () => { holder.dataset.open = details.open ? "yes" : ""; });
    table.before(details);
    details.append(summary, table);
  }
  const drawAll = () => document.querySelectorAll("[data-plot]").forEach(draw);

  // Live updates.
  function rowFrom(html) {
    const template = document.createElement("template");
    template.innerHTML = html;
    return template.content.querySelector("tr");
  }
  function replaceRow(old, html) {
    const row = rowFrom(html);
    if (!row) return null;
    retime(row);
    const focused = old && old.contains(document.activeElement);
    if (old) old.replaceWith(row);
    if (focused) { const link = row.querySelector("a"); if (link) link.focus(); }
    return row;
  }
  const focusable = (place) => [...place.querySelectorAll("a, summary")]; // what the keyboard may be on while news comes
  function apply({ at, fragments }) {
    clockAhead = Date.now() / 1000 - at;
    const tbody = document.querySelector("tbody[data-rows]");
    const rows = new Map(tbody ? [...tbody.rows].map((row) => [row.dataset.row, row]) : []);
    for (const [name, html] of Object.entries(fragments)) {
      if (name.startsWith("row:")) {
        const id = name.slice(4);
        rows.set(id, replaceRow(rows.get(id), html));
      } else if (!name.startsWith("order:")) {
        const place = document.querySelector(`[data-fragment="${CSS.escape(name)}"]`);
        if (!place || place.contains(document.activeElement) && document.activeElement.matches("input, select")) continue;
        const held = focusable(place).indexOf(document.activeElement);
        const open = [...place.querySelectorAll(":scope > details")].map((one) => one.open);
        place.innerHTML = html;
        [...place.querySelectorAll(":scope > details")].forEach((one, n) => { if (open[n] && !place.hasAttribute("data-plot")) one.open = true; });
        retime(place);
        if (place.hasAttribute("data-plot")) draw(place);
        if (held >= 0) { const same = focusable(place)[held]; if (same) same.focus({ preventScroll: true }); }
      }
    }
    const order = tbody && fragments[`order:${tbody.dataset.rows}`];
    if (order !== undefined && order !== null) {
      const wanted = order ? order.split("\n").map((name) => name.slice(4)) : [];
      const kept = new Set(wanted);
      for (const row of [...tbody.rows]) if (!kept.has(row.dataset.row)) row.remove();
      wanted.forEach((id, n) => {
        const row = rows.get(id);
        if (row && tbody.rows[n] !== row) tbody.insertBefore(row, tbody.rows[n] || null);
      });
    }
    body.dataset.updates = String(Number(body.dataset.updates || 0) + 1);
  }
  const link = document.getElementById("link");
  function say(words, broken) {
    if (link.textContent === words) return;
    link.textContent = words;
    link.classList.toggle("broken", Boolean(broken));
  }
  let stream = null;
  let again = 0;
  function listen() {
    if (!body.dataset.live || stream) return;
    stream = new EventSource(body.dataset.live + location.search);
    stream.onmessage = (event) => {
      const news = JSON.parse(event.data);
      apply(news);
      say(news.trouble ? `standing still: ${news.trouble}` : "live", news.trouble);
    };
    stream.onerror = () => {
      say("connection lost, trying again", true);
      if (stream && stream.readyState === EventSource.CLOSED) { // refused: a browser does not try again by itself
        stream = null;
        clearTimeout(again);
        again = setTimeout(listen, 5000);
      }
    };
  }
  function hush() { if (stream) { stream.close(); stream = null; } }
  // A page that nobody sees costs nothing.
  document.addEventListener("visibilitychange", () => (document.hidden ? hush() : listen()));
  addEventListener("pagehide", hush);
  addEventListener("pageshow", (event) => { if (event.persisted) listen(); });

  // Actions that cannot be taken back ask once more.
  document.addEventListener("submit", (event) => {
    const question = event.target.dataset && event.target.dataset.confirm;
    if (question && !confirm(question)) event.preventDefault();
  });
  // Filters apply as they are chosen.
  document.querySelectorAll("form.filters select").forEach((one) => one.addEventListener("change", () => one.form.requestSubmit()));

  let resized = 0;
  addEventListener("resize", () => {
    cancelAnimationFrame(resized);
    resized = requestAnimationFrame(() => plots.forEach(({ plot }, canvas) => plot.setSize({ width: Math.max(canvas.clientWidth, 200), height: 220 })));
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
  retime(document);
  drawAll();
  setInterval(() => retime(document), 5000);
  listen();
})();
