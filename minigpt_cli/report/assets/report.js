// The charts of a report. Their data is the JSON in #data; report/page_data.py describes it.
"use strict";
(() => {
  const CHARTS = [
    { key: "loss", title: "Loss (nats per token; points: validation)", log: true, validation: "val_loss" },
    { key: "val_bits_per_byte", title: "Validation: bits per byte", log: true, isValidation: true },
    { key: "lr", title: "Learning rate", exact: true },
    { key: "grad_norm", title: "Gradient norm before clipping", log: true, limits: true },
    { key: "tokens_per_second", title: "Tokens per second" },
    { key: "mfu", title: "MFU (share of the device's dense peak)", format: (v) => (100 * v).toFixed(1) + "%" },
    { key: "memory_bytes", title: "Peak memory (GB)", exact: true, format: (v) => short(v / 1e9) },
    { key: "loss_scale", title: "Loss scale (fp16)", log: true, exact: true },
    { key: "skip_rate", title: "Share of skipped steps (fp16)", exact: true },
  ];
  const COLORS = 6;
  const DASHES = [[], [8, 4], [2, 3], [12, 3, 2, 3]]; // for more runs than colours
  const NEAR = 6; // pixels from the cursor to a mark whose text is shown

  const byId = (id) => document.getElementById(id);
  const { runs } = JSON.parse(byId("data").textContent);
  runs.forEach((run, number) => Object.assign(run, { number, shown: true }));
  const controls = {
    axis: byId("axis"), smoothing: byId("smoothing"), log: byId("log"), marks: byId("marks"),
  };
  let plots = [];
  let zoom = null; // [min, max] of the x axis, null: everything

  function element(tag, parent, text, className) {
    const made = document.createElement(tag);
    if (text) made.textContent = text;
    if (className) made.className = className;
    parent.append(made);
    return made;
  }

  // A canvas needs the colour itself, in the theme that holds.
  const probe = element("span", document.body);
  probe.hidden = true;
  function color(name, alpha = 1) {
    probe.style.color = `var(--${name})`;
    const [r, g, b] = getComputedStyle(probe).color.match(/[\d.]+/g);
    return `rgba(${r}, ${g}, ${b}, ${alpha})`;
  }
  const runColor = (run, alpha) => color(`run${run.number % COLORS}`, alpha);

  function short(value) {
    const size = Math.abs(value);
    for (const [unit, name] of [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e4, "k"]]) {
      if (size >= unit) return +(value / (name === "k" ? 1e3 : unit)).toPrecision(4) + name;
    }
    return size && size < 1e-3 ? value.toExponential(2).replace(/\.?0+e/, "e") : String(+value.toPrecision(5));
  }

  function duration(seconds) {
    const minutes = Math.floor(seconds / 60);
    const pad = (number) => String(number).padStart(2, "0");
    return `${Math.floor(minutes / 60)}:${pad(minutes % 60)}:${pad(Math.floor(seconds % 60))}`;
  }

  function place(value) {
    if (controls.axis.value === "seconds") return duration(value);
    return controls.axis.value === "step" ? Math.round(value).toLocaleString("en") : short(value);
  }

  function tick(value) {
    return controls.axis.value === "step" && value < 1e5 ? value.toLocaleString("en")
      : controls.axis.value === "step" ? short(value) : place(value);
  }

  function smoothed(values, weight) {
    let sum = 0, total = 0;
    return values.map((value) => {
      if (value === null) return null;
      sum = sum * weight + value * (1 - weight);
      total = total * weight + (1 - weight);
      return sum / total; // without the bias towards 0 of the first values
    });
  }

  // The x values and the curve of a run, or null if they weren't recorded.
  function curveOf(run, key, isValidation) {
    const table = isValidation ? run.validation : run.training;
    const x = table.axes[controls.axis.value], curve = table.curves[key];
    return x && curve ? { x, ...curve } : null;
  }

  // The aligned data, series and bands of a chart.
  function content(chart, isLog) {
    const weight = chart.exact || chart.isValidation ? 0 : +controls.smoothing.value;
    const tables = [], series = [{}], bands = [], readings = [];
    const add = (x, values, options) => {
      tables.push([x, isLog ? values.map((v) => (v > 0 ? v : null)) : values]);
      series.push({ width: 1.5, points: { show: false }, ...options });
    };
    for (const run of runs.filter((each) => each.shown)) {
      const dash = DASHES[Math.floor(run.number / COLORS) % DASHES.length];
      const found = curveOf(run, chart.key, chart.isValidation);
      if (found) {
        const { x, mean, low, high } = found;
        const few = x.length < 40 || chart.isValidation;
        if (low) {
          add(x, high, { width: 0 });
          add(x, low, { width: 0 });
          bands.push({ series: [series.length - 2, series.length - 1], fill: runColor(run, 0.2) });
        }
        const smooth = weight ? smoothed(mean, weight) : null;
        add(x, mean, {
          stroke: runColor(run, smooth ? 0.3 : 1), dash, width: smooth ? 1 : 1.5,
          points: { show: few && !smooth, size: 5, fill: runColor(run, 1) },
        });
        if (smooth) add(x, smooth, { stroke: runColor(run, 1), dash, width: 2 });
        readings.push({ run, x, values: smooth ?? mean, low, high, name: "" });
      }
      const validation = chart.validation && curveOf(run, chart.validation, true);
      if (validation) {
        add(validation.x, validation.mean, {
          stroke: runColor(run, 1), dash: [3, 3],
          points: { show: true, size: 8, width: 2, stroke: runColor(run, 1), fill: color("back") },
        });
        readings.push({ run, x: validation.x, values: validation.mean, name: "validation " });
      }
    }
    return { data: tables.length ? uPlot.join(tables) : null, series, bands, readings };
  }

  function nearest(x, at) {
    let low = 0, high = x.length - 1;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (x[middle] < at) low = middle + 1; else high = middle;
    }
    return low > 0 && at - x[low - 1] < x[low] - at ? low - 1 : low;
  }

  function showReadout(plot, chart, readings, box) {
    box.replaceChildren();
    const left = plot.cursor.left;
    if (left === undefined || left < 0) return;
    const at = plot.posToVal(left, "x"), format = chart.format ?? short;
    element("span", box, `${byId("axis").selectedOptions[0].text} ${place(at)}`);
    for (const { run, x, values, low, high, name } of readings) {
      const index = nearest(x, at), value = values[index];
      const span = element("span", box);
      element("i", span, "", "swatch").dataset.color = run.number % COLORS;
      const range = low ? ` (${format(low[index])} to ${format(high[index])})` : "";
      const who = runs.length > 1 ? `${run.name} ` : "";
      span.append(`${who}${name}${value === null ? "not finite" : format(value) + range}`);
    }
    for (const { mark } of visibleMarks(plot).filter(({ x }) => Math.abs(x - left) < NEAR).slice(0, 3)) {
      element("span", box, `${mark.kind} at ${place(mark[controls.axis.value])}: ${mark.text}`, mark.kind);
    }
  }

  function visibleMarks(plot) {
    if (!controls.marks.checked) return [];
    const { min, max } = plot.scales.x, axis = controls.axis.value;
    return runs.filter((run) => run.shown).flatMap((run) => run.marks
      .filter((mark) => mark[axis] !== null && mark[axis] >= min && mark[axis] <= max)
      .map((mark) => ({ mark, run, x: plot.valToPos(mark[axis], "x") })));
  }

  function drawLine(plot, points, stroke, dash) {
    const { ctx } = plot;
    ctx.strokeStyle = stroke;
    ctx.lineWidth = devicePixelRatio;
    ctx.setLineDash(dash.map((length) => length * devicePixelRatio));
    ctx.beginPath();
    points.forEach(([x, y]) => ctx.lineTo(x, y));
    ctx.stroke();
  }

  function drawMarks(plot, chart) {
    const { ctx, bbox } = plot, scale = devicePixelRatio;
    const bottom = bbox.top + bbox.height, right = bbox.left + bbox.width;
    const kinds = { spike: color("warn"), nonfinite: color("bad"), rollback: color("link") };
    ctx.save();
    ctx.beginPath();
    ctx.rect(bbox.left, bbox.top, bbox.width, bbox.height);
    ctx.clip();
    for (const { mark, run, x } of visibleMarks(plot)) {
      const at = bbox.left + x * scale;
      if (mark.kind === "checkpoint") {
        ctx.fillStyle = runColor(run);
        ctx.beginPath();
        ctx.moveTo(at, bottom - 7 * scale);
        ctx.lineTo(at + 5 * scale, bottom);
        ctx.lineTo(at - 5 * scale, bottom);
        ctx.fill();
      } else {
        drawLine(plot, [[at, bbox.top], [at, bottom]], kinds[mark.kind], mark.kind === "rollback" ? [] : [4, 3]);
      }
    }
    for (const { value, text, stroke, left, below } of limitsOf(chart)) {
      const y = plot.valToPos(value, "y", true);
      drawLine(plot, [[bbox.left, y], [right, y]], stroke, [6, 4]);
      ctx.fillStyle = stroke;
      ctx.font = `${11 * scale}px system-ui, sans-serif`;
      ctx.textAlign = left ? "left" : "right";
      ctx.fillText(text, left ? bbox.left + 4 * scale : right - 4 * scale, y + (below ? 12 : -3) * scale);
    }
    ctx.restore();
  }

  // The clip threshold of each shown run; the percentiles if there is only one run.
  function limitsOf(chart) {
    if (!chart.limits) return [];
    const shown = runs.filter((run) => run.shown);
    const found = shown.filter((run) => run.clip_norm).map((run) => ({
      value: run.clip_norm, text: `clip_norm ${run.clip_norm}`, left: true,
      stroke: shown.length > 1 ? runColor(run) : color("bad"),
    }));
    if (shown.length === 1) {
      for (const key of ["p90", "p95"]) {
        if (shown[0][key]) {
          found.push({
            value: shown[0][key], text: `${key.slice(1)}% ${short(shown[0][key])}`, stroke: color("muted"), below: key === "p90",
          });
        }
      }
    }
    return found;
  }

  function yRange(chart, isLog) {
    return (plot, low, high) => {
      if (low === null || high === null) return isLog ? [0.1, 1] : [0, 1];
      const limits = limitsOf(chart).map((limit) => limit.value);
      for (const limit of limits.filter((value) => value < 3 * high)) { // not a far one
        low = Math.min(low, limit);
        high = Math.max(high, limit);
      }
      if (isLog) { // ticks begin at the lower end, so it is a round number
        const decade = 10 ** Math.floor(Math.log10(low));
        return [Math.floor(low / decade) * decade, high * 1.05];
      }
      const isFlat = high - low <= 1e-6 * Math.abs(high); // no picture of rounding
      const margin = isFlat ? Math.abs(high) * 0.05 || 1 : (high - low) * 0.05;
      return [low >= 0 ? Math.max(0, low - margin) : low - margin, high + margin];
    };
  }

  function wholeRange() {
    const axis = controls.axis.value;
    const ends = runs.filter((run) => run.shown)
      .flatMap((run) => [run.training.axes[axis], run.validation.axes[axis]])
      .filter((x) => x).flatMap((x) => [x[0], x[x.length - 1]]);
    const low = Math.min(...ends), high = Math.max(...ends);
    return low < high ? [low, high] : [low - 1, low + 1];
  }

  let isFollowing = false; // the other charts show the part that was dragged across in one
  function follow(source) {
    if (isFollowing) return;
    isFollowing = true;
    const { min, max } = source.scales.x;
    zoom = [min, max];
    for (const plot of plots) if (plot !== source) plot.setScale("x", { min, max });
    isFollowing = false;
  }

  function resetZoom() {
    zoom = null;
    isFollowing = true;
    const [min, max] = wholeRange();
    for (const plot of plots) plot.setScale("x", { min, max });
    isFollowing = false;
  }

  // A finger's drag zooms, as the mouse's does.
  function listenToTouch(over) {
    const kinds = { touchstart: "mousedown", touchmove: "mousemove", touchend: "mouseup" };
    for (const [kind, mouse] of Object.entries(kinds)) {
      over.addEventListener(kind, (event) => {
        const { clientX, clientY } = event.changedTouches[0];
        const place = { clientX, clientY, movementX: 1, bubbles: true };
        if (kind === "touchstart") over.dispatchEvent(new MouseEvent("mouseenter", place));
        over.dispatchEvent(new MouseEvent(mouse, place));
      }, { passive: true });
    }
  }

  function draw(chart, box) {
    const isLog = Boolean(chart.log) && controls.log.checked;
    const { data, series, bands, readings } = content(chart, isLog);
    box.replaceChildren();
    element("h3", box, chart.title);
    if (!data) {
      element("p", box, "Not recorded on this axis.", "note");
      return null;
    }
    const readout = element("div", box, "", "readout");
    const [min, max] = zoom ?? wholeRange();
    const axis = {
      stroke: color("muted"), grid: { stroke: color("line", 0.6), width: 1 }, ticks: { stroke: color("line"), width: 1 },
      font: "12px system-ui, sans-serif",
    };
    const format = chart.format ?? short;
    const plot = new uPlot({
      width: box.clientWidth,
      height: box.clientWidth > 700 ? 340 : 240,
      series, bands,
      padding: [null, 24, null, null],
      scales: {
        x: { time: false, auto: false, range: (_, from, to) => [from ?? min, to ?? max] },
        y: { distr: isLog ? 3 : 1, range: yRange(chart, isLog) },
      },
      axes: [
        { ...axis, values: (_, splits) => splits.map(tick), space: 80 },
        { ...axis, values: (_, splits) => splits.map((value) => (value === null ? "" : format(value))), size: 64 },
      ],
      legend: { show: false },
      cursor: {
        y: false,
        points: { show: false },
        drag: { x: true, y: false },
        sync: { key: "minigpt", filters: { pub: (kind) => kind === "mousemove" || kind === "mouseleave" } },
        bind: { dblclick: () => () => { resetZoom(); return null; } },
      },
      hooks: {
        draw: [(self) => drawMarks(self, chart)],
        setCursor: [(self) => showReadout(self, chart, readings, readout)],
        setScale: [(self, key) => { if (key === "x" && plots.includes(self)) follow(self); }],
      },
    }, data, box);
    plot.setScale("x", { min, max });
    plot.ctx.canvas.setAttribute("aria-label", chart.title);
    plot.ctx.canvas.setAttribute("role", "img");
    listenToTouch(plot.over);
    return plot;
  }

  const boxes = CHARTS.filter((chart) => runs.some((run) => (
    (chart.isValidation ? run.validation : run.training).curves[chart.key]
    || (chart.validation && run.validation.curves[chart.validation])
  ))).map((chart) => {
    const box = element("div", byId("charts"), "", "chart");
    box.dataset.chart = chart.key;
    return { chart, box };
  });

  function drawAll() {
    plots.forEach((plot) => plot.destroy());
    plots = [];
    byId("weight").value = (+controls.smoothing.value).toFixed(2);
    plots = boxes.map(({ chart, box }) => draw(chart, box)).filter((plot) => plot);
  }

  controls.axis.addEventListener("change", () => { zoom = null; drawAll(); });
  for (const name of ["smoothing", "log", "marks"]) controls[name].addEventListener("input", drawAll);
  byId("controls").addEventListener("submit", (event) => event.preventDefault());
  byId("reset").addEventListener("click", resetZoom);
  if (runs.length > 1) {
    for (const run of runs) {
      const label = element("label", byId("shown"));
      const box = element("input", label);
      Object.assign(box, { type: "checkbox", checked: true });
      element("i", label, "", "swatch").dataset.color = run.number % COLORS;
      label.append(run.name);
      box.addEventListener("input", () => { run.shown = box.checked; drawAll(); });
    }
  }
  for (const option of controls.axis.options) {
    option.disabled = !runs.some((run) => run.training.axes[option.value]);
  }

  const prefersDark = matchMedia("(prefers-color-scheme: dark)");
  byId("theme").addEventListener("click", () => {
    const { dataset } = document.documentElement;
    const isDark = dataset.theme ? dataset.theme === "dark" : prefersDark.matches;
    dataset.theme = isDark ? "light" : "dark";
    drawAll();
  });
  prefersDark.addEventListener("change", drawAll);
  let width = innerWidth;
  addEventListener("resize", () => { // a phone's address bar changes only the height
    if (innerWidth !== width) { width = innerWidth; drawAll(); }
  });

  byId("theme").hidden = false;
  if (boxes.length) {
    byId("controls").hidden = false;
    drawAll();
  }
})();
