// Draws the charts of the page with uPlot, in the colours of the page, and again when its width or scheme changes.
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const style = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const colour = index => style("--c" + index % 8);
const compact = new Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: 4 });
const short = value => value == null ? "-" : value === 0 ? "0"
  : Math.abs(value) < 1e-3 || Math.abs(value) >= 1e15 ? String(+value.toPrecision(4))
  : Math.abs(value) >= 1e4 ? compact.format(value) : String(+value.toPrecision(5));

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

// Places of values without a neighbour, which no line shows.
const lone = values => values.flatMap((value, place) =>
  value != null && values[place - 1] == null && values[place + 1] == null ? [place] : []);

function axis(label) {
  return { label, labelSize: 22, stroke: style("--quiet"), grid: { stroke: style("--line"), width: 1 },
    ticks: { stroke: style("--line"), width: 1 }, font: "12px system-ui, sans-serif", labelFont: "12px system-ui, sans-serif" };
}

function draw(chart, figure) {
  const isShort = chart.epochs.length <= 40;
  const series = chart.series.map((one, index) => ({
    label: one.label, stroke: colour(one.colour ?? index), width: 2, spanGaps: false,
    fill: chart.stacked ? colour(index) + "55" : undefined,
    dash: one.dash ?? ((one.colour ?? index) >= 8 ? [6, 4] : undefined),
    points: { show: isShort, filter: () => isShort ? null : lone(one.values), size: 5 },
    value: (u, value, at, place) => place == null ? "-" : short(one.values[place]),
  }));
  let values = chart.series.map(one => one.values);
  const bands = [];
  if (chart.stacked) {  // each on top of the ones before it
    values = values.map((_, top) => chart.epochs.map((_, place) =>
      values.slice(0, top + 1).reduce((sum, one) => sum + (one[place] ?? 0), 0)));
    for (let top = values.length; top > 1; top--) bands.push({ series: [top, top - 1] });
  } else if (chart.gap) {
    for (const pair of [[1, 2], [2, 1]]) bands.push({ series: pair, fill: style("--c1") + "22" });
  }
  return new uPlot({
    width: Math.max(figure.clientWidth - 20, 200), height: 250, series: [{ label: "epoch" }, ...series], bands,
    scales: { x: { time: false, range: (u, low, high) => low === high ? [low - 1, high + 1] : [low, high] },
      y: { range: (u, low, high) => chart.stacked ? [0, high * 1.05 || 1] : uPlot.rangeNum(low, high, 0.08, false) } },
    axes: [{ ...axis("epoch"), size: 30, incrs: [1, 2, 5, 10, 20, 50, 100, 200, 500, 1e3, 2e3, 5e3, 1e4, 1e5] },
      { ...axis(chart.unit), values: (u, ticks) => ticks.map(short),
        size: (u, texts) => 22 + 7 * Math.max(0, ...(texts ?? []).map(text => text.length)) }],
    cursor: { points: { size: 7 } }, plugins: [bestEpochs(chart)],
  }, [chart.epochs, ...values], figure);
}

const figures = data.charts.map(chart => {
  const figure = document.createElement("figure"), title = document.createElement("figcaption");
  title.textContent = chart.title;
  figure.append(title);
  document.getElementById("charts").append(figure);
  return { chart, figure, plot: null };
});

function drawAll() {
  for (const one of figures) {
    one.plot?.destroy();
    one.plot = draw(one.chart, one.figure);
  }
}
drawAll();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
addEventListener("resize", () => figures.forEach(({ plot, figure }) =>
  plot.setSize({ width: Math.max(figure.clientWidth - 20, 200), height: 250 })));

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
