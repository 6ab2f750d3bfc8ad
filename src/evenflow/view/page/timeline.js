// Timeline: a lane for each rank and, below, what each rank holds; of a run's page and of the playground.
//
// uPlot (MIT, its license lies beside this file) has the canvas, the axes, the scales and the cursor; what is on
// them is drawn by lanes.js and memory.js. `data` is what view/timeline_data.py makes.
"use strict";

class Timeline {
  static GUTTER = 84;
  static LANE = 22;
  static HALF_LANE = 13;
  static GAP = 9;
  static STRIP = 4;
  static FONT = "11px system-ui, sans-serif";
  static POWERS = Array.from({ length: 60 }, (_, at) => 2 ** at);
  static STRIPS = [{ parts: [123, 63, 165] }, { parts: [221, 136, 136] }].map(each => ({ ...each, css: `rgb(${each.parts})` }));

  constructor(place, data) {
    this.place = place;
    place.classList.add("timeline");
    place.innerHTML = '<div class="bar"><span class="legend"></span><span class="zoom">'
      + '<button data-by="0.5" title="zoom in">+</button><button data-by="2" title="zoom out">−</button>'
      + '<button data-by="0" title="all of the step">all</button></span></div>'
      + '<div class="lanes"></div><div class="memory"></div><div class="tip" hidden></div>';
    [this.bar, this.lanesPlace, this.memoryPlace, this.tip] = place.children;
    this.bar.lastChild.addEventListener("click", event => {
      if (event.target.dataset.by) this.zoom(+event.target.dataset.by);
    });
    new ResizeObserver(() => {
      for (const chart of this.charts) if (chart.width !== this.width) chart.setSize({ width: this.width, height: chart.height });
    }).observe(place);
    this.charts = [];
    this.update(data);
  }

  // Draws another step.
  update(data) {
    this.data = data;
    const numShades = data.kinds.F.tones.length;
    const tones = [...Ops.KINDS].flatMap(kind => data.kinds[kind].tones);
    this.fills = tones.map(({ parts, dark }) => ({ parts, dark, css: `rgb(${parts})` }));
    let top = Timeline.GAP;
    this.ranks = data.ranks.map(given => {
      const lanes = ["measured", "predicted"].filter(name => given[name]).map((name, at) => {
        const lane = { name, given: given[name], top, height: at ? Timeline.HALF_LANE : Timeline.LANE,
          drawn: Ops.columns(given[name], data.microbatches, numShades) };
        top += lane.height + 2;
        return lane;
      });
      top += Timeline.GAP;
      return { given, lanes };
    });
    this.height = top;
    const moments = this.ranks.flatMap(({ lanes }) => lanes.flatMap(({ given }) => [given.start[0] || 0, given.end.at(-1) || 0]));
    this.extent = [Math.min(0, ...moments), Math.max(1e-9, ...moments)];
    this.bytes = new Map(data.edges.map(edge => [`${edge.source}>${edge.target}${edge.payload}`, edge.num_bytes]));
    this.tip.hidden = true;
    this.makeCharts();
    this.makeLegend();
  }

  get width() {
    return Math.max(320, this.place.clientWidth);
  }

  // How far below the plot's top each lane has its middle: those of rank 0, of rank 1, ...
  get middles() {
    return this.ranks.flatMap(({ lanes }) => lanes.map(lane => lane.top + (lane.height - Timeline.STRIP) / 2));
  }

  // -- where it looks

  look([from, until]) {
    const [first, last] = this.extent, whole = last - first;
    const wide = Math.min(whole * 1.04, Math.max(whole * 1e-5, until - from));
    const low = Math.min(Math.max(from, first - whole * 0.02), last + whole * 0.02 - wide);
    this.view = [low, low + wide];
    for (const chart of this.charts) chart.setScale("x", { min: this.view[0], max: this.view[1] });
  }

  zoom(factor, around = (this.view[0] + this.view[1]) / 2) {
    const [from, until] = this.view;
    this.look(factor ? [around - (around - from) * factor, around + (until - around) * factor] : this.extent);
  }

  // -- charts

  makeCharts() {
    for (const chart of this.charts) chart.destroy();
    this.charts = [];
    this.memoryPlace.innerHTML = "";
    this.look(this.extent);
    const noAxis = { size: Timeline.GUTTER, values: () => [], grid: { show: false }, ticks: { show: false } };
    this.chart = this.make(this.lanesPlace, this.height + 34, [0, 1], noAxis, (ctx, area) => this.drawLanes(ctx, area));
    const limits = Memory.limits(this.data.ranks);
    this.memoryPlace.hidden = !limits.held.length;
    if (!limits.held.length) return;
    const counts = this.data.countsMicrobatches;
    const format = counts ? amount => `${+amount.toFixed(2)}` : Units.bytes;
    const axis = { ...this.axis, size: Timeline.GUTTER, incrs: counts ? undefined : Timeline.POWERS,
      values: (_, splits) => splits.map(each => (each ? Units.short(`${format(each)} `) : "0")) };
    this.make(this.memoryPlace, 170, [0, limits.top], axis, (ctx, area, height) => Memory.draw(ctx, limits, area, height));
    const label = document.createElement("div");
    label.className = "held";
    label.innerHTML = Memory.legend(limits, format, counts);
    this.memoryPlace.append(label);
  }

  get axis() {
    return { grid: { stroke: "#f0f0f0" }, ticks: { stroke: "#ddd" }, font: Timeline.FONT, stroke: this.data.ink };
  }

  make(place, height, range, axis, draw) {
    const times = { ...this.axis, size: 30, space: 90,
      values: (_, splits) => splits.map(each => (each ? Units.short(Units.seconds(each)) : "0")) };
    const chart = new uPlot({
      width: this.width,
      height,
      padding: [4, 12, 0, 0],
      legend: { show: false },
      cursor: { y: false, points: { show: false }, drag: { x: false, y: false, setScale: false } },
      scales: { x: { time: false, range: () => this.view }, y: { range: () => range } },
      series: [{}, { paths: () => null, points: { show: false } }],
      axes: [times, axis],
      hooks: { draw: [u => this.onCanvas(u, draw)] },
    }, [this.extent, [null, null]], place);
    this.charts.push(chart);
    this.listen(chart);
    return chart;
  }

  // The part of a canvas that is drawn on, in pixels of the page, and how time lies on it.
  area(chart) {
    const ratio = devicePixelRatio, { left, width, top } = chart.bbox;
    const numColumns = Math.ceil(width / ratio);
    if (this.columns?.canvas.width !== numColumns) this.columns = new Lanes.Columns(numColumns);
    return { left: left / ratio, width: width / ratio, top: top / ratio, from: this.view[0],
      perSecond: width / ratio / (this.view[1] - this.view[0]), columns: this.columns };
  }

  onCanvas(chart, draw) {
    const ctx = chart.ctx, ratio = devicePixelRatio;
    ctx.save();
    ctx.setTransform(ratio, 0, 0, ratio, 0, 0);
    ctx.font = Timeline.FONT;
    ctx.textBaseline = "alphabetic";
    draw(ctx, this.area(chart), chart.bbox.height / ratio);
    ctx.restore();
  }

  drawLanes(ctx, area) {
    const [first, last] = this.extent;
    ctx.textBaseline = "middle";
    this.ranks.forEach(({ lanes }, number) => {
      for (const lane of lanes) {
        const top = area.top + lane.top;
        ctx.textAlign = "right";
        ctx.fillStyle = lane === lanes[0] ? this.data.ink : "#888";
        ctx.fillText(lane === lanes[0] ? `rank ${number}` : lane.name, area.left - 8, top + lane.height / 2);
        ctx.save();
        ctx.beginPath();
        ctx.rect(area.left, top, area.width, lane.height);
        ctx.clip();
        ctx.fillStyle = this.data.idle;
        ctx.fillRect(area.left + (first - area.from) * area.perSecond, top, (last - first) * area.perSecond, lane.height);
        const named = Lanes.draw(ctx, lane.drawn.boxes, this.fills, area, top, lane.height, 11);
        const strip = top + lane.height - Timeline.STRIP;
        Lanes.draw(ctx, lane.drawn.strips, Timeline.STRIPS, area, strip, Timeline.STRIP, Infinity);
        Lanes.write(ctx, named, lane.drawn, this.fills, this.data.ink, top, lane.height);
        ctx.restore();
      }
    });
  }

  makeLegend() {
    const lanes = this.ranks.flatMap(rank => rank.lanes);
    const numShades = this.data.kinds.F.tones.length;
    const used = new Set(lanes.flatMap(({ drawn }) => [...new Set(drawn.boxes.tone)].map(tone => Math.floor(tone / numShades))));
    const strips = new Set(lanes.flatMap(({ drawn }) => [...new Set(drawn.strips.tone)]));
    const entries = [...used].sort().map(kind => [this.fills[kind * numShades + numShades / 2].css, this.data.kinds[Ops.KINDS[kind]].name]);
    if (strips.has(Ops.MOVING)) entries.push([Timeline.STRIPS[Ops.MOVING].css, "transfer"]);
    if (strips.has(Ops.WAITING)) entries.push([Timeline.STRIPS[Ops.WAITING].css, "waits for a value"]);
    entries.push([this.data.idle, "idle"]);
    this.bar.firstChild.innerHTML = entries.map(([tone, name]) => `<span><i style="background:${tone}"></i>${name}</span>`).join("")
      + '<span class="hint">drag to move, Ctrl + wheel to zoom, double-click for all</span>';
  }

  // -- the pointer

  under(x, y) {
    const area = this.area(this.chart);
    const moment = area.from + x / area.perSecond, near = 2 / area.perSecond;
    for (const [number, rank] of this.ranks.entries()) {
      for (const lane of rank.lanes) {
        if (y < lane.top || y >= lane.top + lane.height) continue;
        const { boxes, strips } = lane.drawn;
        for (const group of y >= lane.top + lane.height - Timeline.STRIP ? [strips, boxes] : [boxes, strips]) {
          const row = Ops.firstAfter(group.end, moment - near);
          if (row < group.start.length && group.start[row] <= moment + near) return { number, rank, lane, row: group.rows[row] };
        }
      }
    }
    return null;
  }

  describe({ number, rank, lane, row: { at, parts, waits } }) {
    const given = lane.given, op = given.ops[at];
    const [came, start, end] = [given.came[at], given.start[at], given.end[at]];
    const lines = [`<b>${op}</b> ${lane.name}, rank ${number}`, ...parts.map(part => Ops.told(part, this.data.kinds))];
    if (waits) lines.push(`waits ${Units.seconds(start - came)} for what it takes`);
    lines.push(`${Units.seconds(end - start)}, from ${Units.seconds(start)} to ${Units.seconds(end)}`);
    if (!waits && start > came && Ops.computes(parts)) lines.push(`waited ${Units.seconds(start - came)} before`);
    const other = rank.lanes.find(each => each !== lane);
    const twin = other && Ops.computes(parts) ? other.given.ops.indexOf(op) : -1;
    if (twin >= 0) lines.push(`${other.name}: ${Units.seconds(other.given.end[twin] - other.given.start[twin])}`);
    const moved = parts.filter(part => part.move).map(part => this.bytes.get(`${part.source}>${part.target}${part.payload}`) || 0);
    if (moved.length) lines.push(Units.bytes(moved.reduce((sum, each) => sum + each, 0)));
    if (given.held_bytes.length) lines.push(`${Units.bytes(given.held_bytes[at])} held after it`);
    return lines.join("<br>");
  }

  showTip(event) {
    const found = this.under(event.offsetX, event.offsetY);
    this.tip.hidden = !found;
    if (!found) return;
    this.tip.innerHTML = this.describe(found);
    const box = this.place.getBoundingClientRect(), wide = this.tip.offsetWidth;
    const x = event.clientX - box.left, y = event.clientY - box.top;
    this.tip.style.left = `${x + 16 + wide > box.width ? x - 12 - wide : x + 16}px`;
    this.tip.style.top = `${y + 14}px`;
  }

  listen(chart) {
    const over = chart.over;
    over.style.touchAction = "pan-y";
    let dragged = null;
    over.addEventListener("pointerdown", event => {
      if (event.button) return;
      dragged = { x: event.clientX, view: this.view };
      this.tip.hidden = true;
      over.setPointerCapture(event.pointerId);
    });
    over.addEventListener("pointermove", event => {
      if (dragged) {
        const [from, until] = dragged.view;
        const moved = (dragged.x - event.clientX) / over.clientWidth * (until - from);
        this.look([from + moved, until + moved]);
      } else if (chart === this.chart) this.showTip(event);
    });
    for (const name of ["pointerup", "pointercancel"]) over.addEventListener(name, () => { dragged = null; });
    over.addEventListener("pointerleave", () => { this.tip.hidden = true; });
    over.addEventListener("dblclick", () => this.look(this.extent));
    over.addEventListener("wheel", event => {
      const [from, until] = this.view, whole = until - from;
      if (event.ctrlKey || event.metaKey) {
        event.preventDefault();
        this.zoom(Math.exp(event.deltaY * 0.003), from + whole * event.offsetX / over.clientWidth);
      } else if (event.deltaX || event.shiftKey) {
        event.preventDefault();
        const moved = (event.deltaX || event.deltaY) / over.clientWidth * whole;
        this.look([from + moved, until + moved]);
      }
    }, { passive: false });
  }
}
