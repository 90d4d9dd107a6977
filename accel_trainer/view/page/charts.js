// Draws the charts of the page with uPlot, in the colours of the page, and again when its width or scheme changes.
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const style = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const colour = index => style("--c" + index % 8);
const compact = new Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: 4 });
const short = value => value == null ? "-" : value === 0 ? "0"
  : Math.abs(value) < 1e-3 || Math.abs(value) >= 1e15 ? String(+value.toPrecision(4))
  : Math.abs(value) >= 1e4 ? compact.format(value) : String(+value.toPrecision(4));

// Marks the best epoch of each run that has one.
const bestEpochs = chart => ({
  hooks: { draw: [u => chart.series.forEach((one, index) => {
    if (one.best == null || one.best < u.scales.x.min || one.best > u.scales.x.max) return;
    const x = u.valToPos(one.best, "x", true), { left, top, width, height } = u.bbox, ratio = devicePixelRatio;
    u.ctx.save();
    u.ctx.strokeStyle = u.ctx.fillStyle = chart.series.length > 2 ? colour(index) : style("--quiet");
    u.ctx.setLineDash([4 * ratio, 4 * ratio]);
    u.ctx.lineWidth = ratio;
    u.ctx.beginPath(); u.ctx.moveTo(x, top); u.ctx.lineTo(x, top + height); u.ctx.stroke();
    if (one.mark) {
      u.ctx.font = `${12 * ratio}px system-ui, sans-serif`;
      u.ctx.textAlign = x > left + width / 2 ? "right" : "left";
      u.ctx.textBaseline = "top";
      u.ctx.fillText(one.mark, x + (x > left + width / 2 ? -5 : 5) * ratio, top + 3 * ratio);
    }
    u.ctx.restore();
  })] },
});

// Two fingers zoom along the x axis, one finger moves what is zoomed, two taps show all again.
const touchZoom = {
  hooks: { ready: [u => {
    const whole = () => { const x = u.data[0]; return x[0] < x[x.length - 1] ? [x[0], x[x.length - 1]] : null; };
    let start = null, lastTap = 0;
    const fingers = event => [...event.touches].map(one => one.clientX - u.over.getBoundingClientRect().left);
    const begin = event => {
      const places = fingers(event), { min, max } = u.scales.x;
      start = { low: Math.min(...places), high: Math.max(...places), number: places.length, min, max, moved: false };
    };
    u.over.addEventListener("touchstart", event => {
      begin(event);
      if (event.touches.length > 1) event.preventDefault();
    }, { passive: false });
    u.over.addEventListener("touchmove", event => {
      const places = fingers(event), all = whole();
      if (!start || !all || places.length !== start.number) return;
      const low = Math.min(...places), high = Math.max(...places), width = u.over.clientWidth;
      if (Math.abs(low - start.low) + Math.abs(high - start.high) < 6) return;
      start.moved = true;
      const isZoomed = start.max - start.min < all[1] - all[0];
      if (start.number === 1 && !isZoomed) return;
      event.preventDefault();
      const per = (start.max - start.min) / width;
      const scale = start.number === 1 ? 1 : Math.max(start.high - start.low, 20) / Math.max(high - low, 20);
      const span = Math.min((start.max - start.min) * scale, all[1] - all[0]);
      // What was under the middle of the fingers stays there.
      const middle = start.min + (start.low + start.high) / 2 * per;
      let min = middle - (low + high) / 2 / width * span;
      min = Math.min(Math.max(min, all[0]), all[1] - span);
      u.setScale("x", { min, max: min + span });
    }, { passive: false });
    u.over.addEventListener("touchend", event => {
      const now = Date.now(), all = whole();
      if (start && !start.moved && start.number === 1 && !event.touches.length) {
        if (now - lastTap < 350 && all) u.setScale("x", { min: all[0], max: all[1] });
        lastTap = now;
      }
      if (event.touches.length) begin(event); else start = null;
    });
  }] },
};

// Places of values without a neighbour, which no line shows.
const lone = values => values.flatMap((value, place) =>
  value != null && values[place - 1] == null && values[place + 1] == null ? [place] : []);

function axis(label) {
  return { label, labelSize: 22, stroke: style("--quiet"), grid: { stroke: style("--line"), width: 1 },
    ticks: { stroke: style("--line"), width: 1 }, font: "12px system-ui, sans-serif", labelFont: "12px system-ui, sans-serif" };
}
const sized = (u, texts) => 22 + 7 * Math.max(0, ...(texts ?? []).map(text => text.length));
const widened = (low, high) => low === high ? [low - 1, high + 1] : [low, high];
const widthIn = figure => Math.max(figure.clientWidth - 20, 200);

function drawCurves(chart, figure, isLog) {
  const isShort = chart.x.length <= 40;
  // Where nothing is touched the legend tells of the best epoch, or of the last that has values.
  const best = chart.x.indexOf(chart.series.find(one => one.best != null)?.best);
  const last = chart.x.length - 1 - [...chart.x].reverse().findIndex((_, back) =>
    chart.series.some(one => one.values[chart.x.length - 1 - back] != null));
  const rest = best >= 0 && chart.series.length <= 2 ? best : Math.min(last, chart.x.length - 1);
  const lastOf = one => one.values[rest] ?? [...one.values].reverse().find(value => value != null);
  const series = chart.series.map((one, index) => ({
    label: one.label, stroke: colour(one.colour ?? index), width: 2, spanGaps: chart.spanned ?? false,
    fill: chart.stacked ? colour(index) + "55" : undefined,
    dash: one.dash ?? ((one.colour ?? index) >= 8 ? [6, 4] : undefined),
    points: { show: isShort, filter: () => isShort ? null : lone(one.values), size: 5 },
    value: (u, value, at, place) => short(place == null ? lastOf(one) : one.values[place]),
  }));
  let values = chart.series.map(one => one.values);
  const bands = [];
  if (chart.stacked) {  // each on top of the ones before it
    values = values.map((_, top) => chart.x.map((_, place) =>
      values.slice(0, top + 1).reduce((sum, one) => sum + (one[place] ?? 0), 0)));
    for (let top = values.length; top > 1; top--) bands.push({ series: [top, top - 1] });
  } else if (chart.gap) {
    for (const pair of [[1, 2], [2, 1]]) bands.push({ series: pair, fill: style("--c1") + "22" });
  }
  const range = (u, low, high) => isLog ? uPlot.rangeLog(low, high, 10, false)
    : chart.stacked ? [0, high * 1.05 || 1] : uPlot.rangeNum(low, high, 0.08, false);
  return new uPlot({
    width: widthIn(figure), height: 250, bands,
    series: [{ label: chart.axis, value: (u, value, at, place) => String(chart.x[place ?? rest] ?? "-") }, ...series],
    scales: { x: { time: false, range: (u, low, high) => widened(low, high) }, y: { distr: isLog ? 3 : 1, range } },
    axes: [{ ...axis(chart.axis), size: 30,
      incrs: [1, 2, 5, 10, 20, 50, 100, 200, 500, 1e3, 2e3, 5e3, 1e4, 2e4, 5e4, 1e5, 1e6, 1e7] },
      { ...axis(chart.unit), values: (u, ticks) => ticks.map(tick => tick == null ? "" : short(tick)), size: sized }],
    cursor: { points: { size: 7 } }, plugins: [bestEpochs(chart), touchZoom],
  }, [chart.x, ...values], figure);
}

// A chart whose marks a function of ours draws: residuals as points or counted in cells, or the bars of a histogram.
function drawMarks(chart, figure, x, y, mark) {
  const place = u => (value, scale) => u.valToPos(value, scale, true);
  return new uPlot({
    width: widthIn(figure), height: 290, legend: { show: false },
    series: [{}, { paths: () => null, points: { show: false } }],
    scales: { x: { time: false, range: (u, low, high) => widened(low, high) }, y: { range: () => y } },
    axes: [{ ...axis(chart.axis), size: 30, values: (u, ticks) => ticks.map(short) },
      { ...axis(chart.unit ?? "residual"), values: (u, ticks) => ticks.map(short), size: sized }],
    cursor: { y: false, points: { show: false } }, plugins: [touchZoom],
    hooks: { draw: [u => {
      u.ctx.save();
      u.ctx.beginPath(); u.ctx.rect(u.bbox.left, u.bbox.top, u.bbox.width, u.bbox.height); u.ctx.clip();
      mark(u, u.ctx, place(u), devicePixelRatio);
      u.ctx.restore();
    }] },
  }, [x, x.map(() => null)], figure);
}

function drawResiduals(chart, figure) {
  const margin = (chart.y[1] - chart.y[0]) * 0.04, [left, right] = chart.x, most = Math.max(...chart.cells.map(cell => cell[2]), 2);
  const pad = chart.points ? (right - left) * 0.02 : 0;
  return drawMarks(chart, figure, [left - pad, right + pad], [chart.y[0] - margin, chart.y[1] + margin], (u, ctx, at, ratio) => {
    ctx.fillStyle = colour(0);
    if (chart.points) {
      ctx.globalAlpha = 0.55;
      for (const [x, y] of chart.points) {
        ctx.beginPath(); ctx.arc(at(x, "x"), at(y, "y"), 2.6 * ratio, 0, 7); ctx.fill();
      }
    }
    const wide = (right - left) / chart.columns, high = (chart.y[1] - chart.y[0]) / chart.rows;
    for (const [column, row, count] of chart.cells) {
      ctx.globalAlpha = 0.15 + 0.85 * Math.log(count) / Math.log(most);
      const x = at(left + column * wide, "x"), y = at(chart.y[0] + (row + 1) * high, "y");
      ctx.fillRect(x, y, at(left + (column + 1) * wide, "x") - x, at(chart.y[0] + row * high, "y") - y);
    }
    ctx.globalAlpha = 1;
    ctx.strokeStyle = colour(1); ctx.lineWidth = 1.5 * ratio; ctx.setLineDash([6 * ratio, 4 * ratio]);
    ctx.beginPath(); ctx.moveTo(u.bbox.left, at(0, "y")); ctx.lineTo(u.bbox.left + u.bbox.width, at(0, "y")); ctx.stroke();
  });
}

function drawHistogram(chart, figure) {
  const [low, high] = chart.x, wide = (high - low) / chart.counts.length, most = Math.max(...chart.counts, 1);
  return drawMarks(chart, figure, chart.x, [0, most * 1.06], (u, ctx, at, ratio) => {
    ctx.fillStyle = colour(0);
    chart.counts.forEach((count, bar) => {
      const x = at(low + bar * wide, "x"), y = at(count, "y");
      ctx.fillRect(x, y, Math.max(at(low + (bar + 1) * wide, "x") - x - ratio, ratio), at(0, "y") - y);
    });
    ctx.strokeStyle = colour(1); ctx.lineWidth = 1.5 * ratio; ctx.setLineDash([6 * ratio, 4 * ratio]);
    ctx.beginPath(); ctx.moveTo(at(0, "x"), u.bbox.top); ctx.lineTo(at(0, "x"), u.bbox.top + u.bbox.height); ctx.stroke();
  });
}

const KINDS = { curves: drawCurves, residuals: drawResiduals, histogram: drawHistogram };
// A scale of powers shows positive values only; it is offered for losses, and where values differ tenfold.
function mayBeLog(chart) {
  if (chart.kind !== "curves" || chart.stacked) return false;
  const values = chart.series.flatMap(one => one.values).filter(value => value != null);
  let low = Infinity, high = 0;
  for (const value of values) { low = Math.min(low, value); high = Math.max(high, value); }
  return values.length > 1 && low > 0 && (/loss/i.test(chart.title) || high >= 10 * low);
}

const figures = data.charts.map(chart => {
  const figure = document.createElement("figure"), title = document.createElement("figcaption");
  title.textContent = chart.title;
  figure.append(title);
  document.getElementById(chart.place).append(figure);
  const one = { chart, figure, plot: null, isLog: false };
  if (mayBeLog(chart)) {
    const button = title.appendChild(document.createElement("button"));
    button.textContent = "log scale";
    button.setAttribute("aria-pressed", "false");
    button.addEventListener("click", () => {
      one.isLog = !one.isLog;
      button.setAttribute("aria-pressed", String(one.isLog));
      drawOne(one);
    });
  }
  return one;
});

function drawOne(one) {
  one.plot?.destroy();
  one.plot = KINDS[one.chart.kind](one.chart, one.figure, one.isLog);
}
figures.forEach(drawOne);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => figures.forEach(drawOne));
const fit = () => figures.forEach(({ plot, figure }) => {
  if (figure.clientWidth) plot.setSize({ width: widthIn(figure), height: plot.height });
});
addEventListener("resize", fit);
for (const folded of document.querySelectorAll("details.assessment")) folded.addEventListener("toggle", fit);

// The table of all epochs is made when it is opened.
document.getElementById("epochs")?.addEventListener("toggle", event => {
  const place = event.target.querySelector(".scroll");
  if (place.firstChild) return;
  const table = place.appendChild(document.createElement("table"));
  const add = (cells, kind, part) => {
    const row = part.insertRow();
    cells.forEach((cell, index) => row.appendChild(document.createElement(index ? kind : "th")).textContent = cell ?? "-");
  };
  add(data.table.header, "th", table.createTHead());
  const body = table.createTBody();
  for (const row of data.table.rows) add(row, "td", body);
});

if (data.is_running) setTimeout(() => location.reload(), 10000);
