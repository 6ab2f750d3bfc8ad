// Timeline: a lane for each rank and, below, what each rank holds; of a run's page and of the playground.
//
// uPlot (MIT, its license lies beside this file) has the canvas, the axes, the scales and the cursor; the boxes
// are drawn here. Ops narrower than a pixel are mixed column by column into an image of one row, so that a frame
// costs by what is seen, and a hundred thousand ops can be dragged about.
"use strict";

const Timeline = (() => {
  const KINDS = { F: "forward", B: "backward", I: "input gradient", W: "weight gradient", O: "overlap" };
  const MOVED = { F: "activation", B: "gradient" };
  const MOVES = { S: "sends", R: "receives", H: "hands over" };
  const POWERS = Array.from({ length: 60 }, (_, at) => 2 ** at);
  const NUM_SHADES = 8;
  const GUTTER = 84, LANE = 22, HALF_LANE = 13, GAP = 9, STRIP = 4;
  const INK = "#222", IDLE = "#e9e9e9", FONT = "11px system-ui, sans-serif";

  // -- units

  const scaled = (value, units) => {
    const found = value === 0 ? units.find(([size]) => size === 1) : units.find(([size]) => Math.abs(value) >= size);
    const [size, name] = found || units[units.length - 1];
    const number = value / size;
    const digits = Math.abs(number) >= 100 ? 1 : Math.abs(number) >= 10 ? 2 : 3;
    return `${number.toFixed(size === 1 && Number.isInteger(number) ? 0 : digits)} ${name}`;
  };
  const seconds = value => scaled(value, [[1, "s"], [1e-3, "ms"], [1e-6, "µs"]]);
  const bytes = value => scaled(value, [[2 ** 40, "TiB"], [2 ** 30, "GiB"], [2 ** 20, "MiB"], [1024, "KiB"], [1, "B"]]);
  const percent = value => `${(100 * value).toFixed(1)} %`;

  // -- ops

  // The parts of an op: {kind, stage, microbatch} of one that computes, {move, ...} of a transfer, {all, stage}.
  function parse(text) {
    return text.split("&").map(word => {
      let found = /^(\d+)([FBIW])(\d+)$/.exec(word);
      if (found) return { kind: found[2], stage: +found[1], microbatch: +found[3] };
      found = /^([SRH])(\d+)>(\d+)([FB])(\d+)$/.exec(word);
      if (found) {
        const [, move, source, target, payload, microbatch] = found;
        return { move, source: +source, target: +target, payload, microbatch: +microbatch };
      }
      return { all: word[0], stage: +word.slice(1) };
    });
  }

  const computes = parts => parts[0].kind !== undefined;

  function told(part) {
    if (part.kind) return `${KINDS[part.kind]} of stage ${part.stage}, microbatch ${part.microbatch}`;
    if (part.move) {
      const way = `stage ${part.source} to ${part.target}, microbatch ${part.microbatch}`;
      return `${MOVES[part.move]} the ${MOVED[part.payload]} from ${way}`;
    }
    return `${part.all === "G" ? "sums the gradients" : "gathers the parameters"} of stage ${part.stage}`;
  }

  // A lane's columns as they are drawn: numbers alone, and the place of each row in the lane that was given.
  function column(lane, numMicrobatches) {
    const boxes = [], strips = [];
    lane.ops.forEach((text, at) => {
      const parts = parse(text);
      (computes(parts) ? boxes : strips).push({ at, parts });
      if (computes(parts) && lane.start[at] > lane.came[at]) strips.push({ at, parts, waits: true });
    });
    const group = rows => ({
      rows,
      start: Float64Array.from(rows, row => (row.waits ? lane.came : lane.start)[row.at]),
      end: Float64Array.from(rows, row => (row.waits ? lane.start : lane.end)[row.at]),
    });
    const drawn = { boxes: group(boxes), strips: group(strips.sort((one, two) => startOf(lane, one) - startOf(lane, two))) };
    const top = Math.max(1, numMicrobatches - 1);
    drawn.boxes.tone = Uint8Array.from(boxes, ({ parts }) => {
      const shade = Math.round(Math.min(1, parts[0].microbatch / top) * (NUM_SHADES - 1));
      return "FBIWO".indexOf(parts.length > 1 ? "O" : parts[0].kind) * NUM_SHADES + shade;
    });
    drawn.strips.tone = Uint8Array.from(drawn.strips.rows, row => (row.waits ? 1 : 0));
    drawn.numStages = new Set(boxes.flatMap(({ parts }) => parts.map(part => part.stage))).size;
    return drawn;
  }

  const startOf = (lane, row) => (row.waits ? lane.came : lane.start)[row.at];

  // The first row that ends after a moment; rows of a lane do not overlap.
  function firstAfter(ends, moment) {
    let low = 0, high = ends.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (ends[middle] > moment) high = middle;
      else low = middle + 1;
    }
    return low;
  }

  const toneOf = parts => ({
    parts,
    css: `rgb(${parts.join()})`,
    dark: 0.299 * parts[0] + 0.587 * parts[1] + 0.114 * parts[2] < 128,  // luma: ITU-R BT.601
  });

  const MOVING = toneOf([123, 63, 165]), WAITING = toneOf([221, 136, 136]);

  function tones(colours) {
    const mix = (light, dark, share) => light.map((part, at) => Math.round(255 * (part + (dark[at] - part) * share)));
    return [..."FBIWO"].flatMap(kind =>
      Array.from({ length: NUM_SHADES }, (_, shade) => toneOf(mix(...colours[kind], shade / (NUM_SHADES - 1)))));
  }

  // -- drawing

  // Columns of pixels in which many ops lie: each gets the mean of their colours, as a screen would mix them.
  class Columns {
    constructor(width) {
      this.sums = new Float32Array(4 * width);
      this.image = new ImageData(width, 1);
      this.canvas = new OffscreenCanvas(width, 1);
    }

    add(column, [red, green, blue], share) {
      const sums = this.sums, at = 4 * column;
      this.some = true;
      sums[at] += red * share;
      sums[at + 1] += green * share;
      sums[at + 2] += blue * share;
      sums[at + 3] += share;
    }

    draw(ctx, left, top, height) {
      if (!this.some) return;
      const { sums, image: { data }, canvas } = this;
      for (let at = 0; at < sums.length; at += 4) {
        const share = sums[at + 3] || 1;
        data[at] = sums[at] / share;
        data[at + 1] = sums[at + 1] / share;
        data[at + 2] = sums[at + 2] / share;
        data[at + 3] = 255 * Math.min(1, sums[at + 3]);
      }
      canvas.getContext("2d").putImageData(this.image, 0, 0);
      ctx.imageSmoothingEnabled = false;
      ctx.drawImage(canvas, left, top, canvas.width, height);
      sums.fill(0);
      this.some = false;
    }
  }

  // Draws rows as boxes of one height, batched by colour, and notes in `area` those wide enough for a name.
  function draw(ctx, group, fills, area, top, height, names) {
    const { left, width, from, perSecond, columns } = area;
    const paths = fills.map(() => null);
    const until = from + width / perSecond;
    for (let row = firstAfter(group.end, from); row < group.start.length && group.start[row] < until; row++) {
      const x = (Math.max(group.start[row], from) - from) * perSecond;
      const wide = (Math.min(group.end[row], until) - Math.max(group.start[row], from)) * perSecond;
      const tone = group.tone[row];
      if (wide < 1.5) {
        const column = Math.floor(x), here = Math.min(wide, column + 1 - x);
        columns.add(column, fills[tone].parts, here);
        if (wide > here && column + 1 < width) columns.add(column + 1, fills[tone].parts, wide - here);
        continue;
      }
      (paths[tone] ||= new Path2D()).rect(left + x, top, wide > 3 ? wide - 0.5 : wide, height);
      if (wide > names) area.named.push({ group, row, x: left + x, wide, top, height });
    }
    columns.draw(ctx, left, top, height);
    paths.forEach((path, tone) => {
      if (!path) return;
      ctx.fillStyle = fills[tone].css;
      ctx.fill(path);
    });
  }

  // -- the view

  // data: {microbatches, colours, edges: {"0>1F": bytes}, ranks: [{measured, predicted, held, cap, peak}]}, where
  // a lane is {ops, came, start, end} and what is measured may be absent. Seconds and bytes.
  function mount(place, data) {
    place.classList.add("timeline");
    place.innerHTML = '<div class="bar"><span class="legend"></span><span class="zoom">'
      + '<button data-by="0.5" title="zoom in">+</button><button data-by="2" title="zoom out">−</button>'
      + '<button data-by="0" title="all of the step">all</button></span></div>'
      + '<div class="lanes"></div><div class="memory"></div><div class="tip" hidden></div>';
    const [bar, lanesPlace, memoryPlace, tip] = place.children;
    let shown, chart, memoryChart, extent, view, columns;

    function take(given) {
      const ranks = given.ranks.map(rank => ({
        given: rank,
        lanes: ["measured", "predicted"].filter(name => rank[name]).map(name => ({
          name, given: rank[name], drawn: column(rank[name], given.microbatches),
        })),
      }));
      let top = GAP;
      const both = ranks.some(rank => rank.lanes.length > 1);
      for (const rank of ranks) {
        rank.top = top;
        rank.lanes.forEach((lane, at) => {
          lane.top = top;
          lane.height = at && both ? HALF_LANE : LANE;
          top += lane.height + 2;
        });
        top += GAP;
      }
      const moments = ranks.flatMap(rank => rank.lanes.flatMap(lane => [lane.given.start[0] || 0, lane.given.end.at(-1) || 0]));
      return {
        given, ranks, height: top, fills: tones(given.colours),
        extent: [Math.min(0, ...moments), Math.max(1e-9, ...moments)],
      };
    }

    function clamp([from, until]) {
      const whole = extent[1] - extent[0];
      const wide = Math.min(whole * 1.04, Math.max(whole * 1e-5, until - from));
      const low = Math.min(Math.max(from, extent[0] - whole * 0.02), extent[1] + whole * 0.02 - wide);
      return [low, low + wide];
    }

    function look(window) {
      view = clamp(window);
      for (const each of [chart, memoryChart]) if (each) each.setScale("x", { min: view[0], max: view[1] });
    }

    function area(u) {
      const ratio = devicePixelRatio, { left, width, top } = u.bbox;
      const numColumns = Math.ceil(width / ratio);
      if (columns?.canvas.width !== numColumns) columns = new Columns(numColumns);
      return { ratio, left: left / ratio, width: width / ratio, top: top / ratio, from: view[0],
        perSecond: width / ratio / (view[1] - view[0]), named: [], columns };
    }

    function drawLanes(u) {
      const ctx = u.ctx, drawing = area(u);
      ctx.save();
      ctx.setTransform(drawing.ratio, 0, 0, drawing.ratio, 0, 0);
      ctx.font = FONT;
      ctx.textBaseline = "middle";
      const { extent: [first, last] } = shown;
      shown.ranks.forEach((rank, number) => {
        ctx.textAlign = "right";
        ctx.fillStyle = INK;
        ctx.fillText(`rank ${number}`, drawing.left - 8, drawing.top + rank.lanes[0].top + LANE / 2);
        if (rank.lanes.length > 1) {
          ctx.fillStyle = "#888";
          ctx.fillText("predicted", drawing.left - 8, drawing.top + rank.lanes[1].top + HALF_LANE / 2);
        }
        ctx.save();
        ctx.beginPath();
        ctx.rect(drawing.left, 0, drawing.width, shown.height + drawing.top);
        ctx.clip();
        for (const lane of rank.lanes) {
          const top = drawing.top + lane.top, at = (first - drawing.from) * drawing.perSecond;
          ctx.fillStyle = IDLE;
          ctx.fillRect(drawing.left + at, top, (last - first) * drawing.perSecond, lane.height);
          drawing.named = [];
          draw(ctx, lane.drawn.boxes, shown.fills, drawing, top, lane.height, 11);
          draw(ctx, lane.drawn.strips, [MOVING, WAITING], drawing, top + lane.height - STRIP, STRIP, Infinity);
          ctx.textAlign = "center";
          for (const { group, row, x, wide, height } of drawing.named) {
            const parts = group.rows[row].parts;
            const full = parts.map(part => `${part.stage}${part.kind}${part.microbatch}`).join("&");
            const name = lane.drawn.numStages > 1 || parts.length > 1 ? full : `${parts[0].microbatch}`;
            if (name.length * 6.6 + 3 > wide) continue;
            ctx.fillStyle = shown.fills[group.tone[row]].dark ? "#fff" : INK;
            ctx.fillText(name, x + wide / 2, top + height / 2 - (height > 16 ? 1 : 0));
          }
        }
        ctx.restore();
      });
      ctx.restore();
    }

    const options = (height, y, hook) => ({
      width: Math.max(320, place.clientWidth),
      height,
      padding: [4, 12, 0, 0],
      legend: { show: false },
      cursor: { y: false, points: { show: false }, drag: { x: false, y: false, setScale: false } },
      scales: { x: { time: false, range: () => view }, y },
      series: [{}, { show: true, paths: () => null, points: { show: false } }],
      hooks: { draw: [hook] },
    });

    const AXIS = { grid: { stroke: "#f0f0f0" }, ticks: { stroke: "#ddd" }, font: FONT, stroke: INK };
    const short = text => text.replace(/(\.\d*?)0+ /, "$1 ").replace(". ", " ");
    const timeAxis = { ...AXIS, size: 30, space: 90, values: (_, splits) => splits.map(each => (each ? short(seconds(each)) : "0")) };

    function makeCharts() {
      chart?.destroy();
      memoryChart?.destroy();
      memoryChart = null;
      view = clamp([extent[0] - (extent[1] - extent[0]) * 0.005, extent[1] + (extent[1] - extent[0]) * 0.005]);
      chart = new uPlot({
        ...options(shown.height + 34, { range: () => [0, 1] }, drawLanes),
        axes: [timeAxis, { size: GUTTER, values: () => [], grid: { show: false }, ticks: { show: false } }],
      }, [[extent[0], extent[1]], [null, null]], lanesPlace);
      listen(chart);
      const held = shown.ranks.filter(rank => rank.given.held);
      memoryPlace.hidden = !held.length;
      if (held.length) makeMemory(held);
    }

    function makeMemory(held) {
      const isFinite = Number.isFinite;
      const peaks = held.map(rank => Math.max(rank.given.peak || 0, ...rank.given.held.bytes));
      const caps = [...new Set(shown.ranks.map(rank => rank.given.cap).filter(isFinite))];
      const peak = Math.max(...peaks);
      const near = caps.filter(cap => cap < peak * 3);  // one that is far above would flatten the curves
      const most = Math.max(peak, ...near) * 1.08 || 1;
      const format = shown.given.countsMicrobatches ? value => `${+value.toFixed(2)}` : bytes;
      memoryPlace.innerHTML = "";
      memoryChart = new uPlot({
        ...options(170, { range: () => [0, most] }, u => drawMemory(u, held, near, most)),
        axes: [timeAxis, { ...AXIS, size: GUTTER, incrs: shown.given.countsMicrobatches ? undefined : POWERS,
          values: (_, splits) => splits.map(each => (each ? short(`${format(each)} `) : "0")) }],
      }, [[extent[0], extent[1]], [null, null]], memoryPlace);
      listen(memoryChart);
      const label = document.createElement("div");
      label.className = "held";
      const told = held.map((rank, at) => `<span><i style="background:${memoryTone(at, held.length)}"></i>rank ${shown.ranks.indexOf(rank)}: ${format(peaks[at])}`
        + (isFinite(rank.given.cap) ? ` of ${format(rank.given.cap)}` : "") + "</span>");
      label.innerHTML = `<b>held${shown.given.countsMicrobatches ? " (microbatches' activations)" : ""}, at most:</b> ${told.join(" ")}`;
      memoryPlace.append(label);
    }

    const memoryTone = (at, number) => `hsl(${Math.round(215 + 125 * (at / Math.max(1, number - 1)))} 60% ${at % 2 ? 42 : 55}%)`;

    function drawMemory(u, held, caps, most) {
      const ctx = u.ctx, drawing = area(u), height = u.bbox.height / drawing.ratio;
      const y = value => drawing.top + height * (1 - value / most);
      ctx.save();
      ctx.setTransform(drawing.ratio, 0, 0, drawing.ratio, 0, 0);
      ctx.beginPath();
      ctx.rect(drawing.left, drawing.top, drawing.width, height);
      ctx.clip();
      held.forEach((rank, number) => {
        const { seconds: moments, bytes: amounts } = rank.given.held;
        // Boxes and no path: a path of thousands of lines takes a hundred times as long to draw.
        ctx.fillStyle = memoryTone(number, held.length);
        let at = Math.max(0, firstAfter(moments, drawing.from) - 1), now = amounts[at] ?? 0;
        let column = drawing.left, low = now, high = now;
        const upTo = x => {  // what one column spans, and on from there
          ctx.fillRect(column, y(high) - 0.75, 1.5, y(low) - y(high) + 1.5);
          ctx.fillRect(column, y(now) - 0.75, x - column, 1.5);
        };
        for (; at < moments.length && column <= drawing.left + drawing.width; at++) {
          const x = drawing.left + (moments[at] - drawing.from) * drawing.perSecond;
          if (x >= column + 1.5) {
            upTo(x);
            [column, low, high] = [x, now, now];
          }
          now = amounts[at];
          [low, high] = [Math.min(low, now), Math.max(high, now)];
        }
        upTo(column + 1.5);
      });
      ctx.strokeStyle = "#cc2626";
      ctx.fillStyle = "#cc2626";
      ctx.font = FONT;
      ctx.setLineDash([6, 4]);
      for (const cap of caps) {
        ctx.beginPath();
        ctx.moveTo(drawing.left, y(cap));
        ctx.lineTo(drawing.left + drawing.width, y(cap));
        ctx.stroke();
        ctx.fillText("cap", drawing.left + 4, y(cap) - 4);
      }
      ctx.restore();
    }

    // -- the pointer

    function under(x, y) {
      const drawing = area(chart);
      const moment = drawing.from + x / drawing.perSecond, near = 2 / drawing.perSecond;
      for (const [number, rank] of shown.ranks.entries()) {
        for (const lane of rank.lanes) {
          if (y < lane.top || y >= lane.top + lane.height) continue;
          const inStrip = y >= lane.top + lane.height - STRIP;
          for (const group of inStrip ? [lane.drawn.strips, lane.drawn.boxes] : [lane.drawn.boxes, lane.drawn.strips]) {
            const row = firstAfter(group.end, moment - near);
            if (row < group.start.length && group.start[row] <= moment + near) return { number, rank, lane, row: group.rows[row] };
          }
        }
      }
      return null;
    }

    function describe({ number, rank, lane, row }) {
      const given = lane.given, { at, parts } = row;
      const [came, start, end] = [given.came[at], given.start[at], given.end[at]];
      const lines = [`<b>${given.ops[at]}</b> ${lane.name}, rank ${number}`, ...parts.map(told)];
      if (row.waits) lines.push(`waits ${seconds(start - came)} for what it takes`);
      lines.push(`${seconds(end - start)}, from ${seconds(start)} to ${seconds(end)}`);
      if (!row.waits && start > came && computes(parts)) lines.push(`waited ${seconds(start - came)} before`);
      const other = rank.lanes.find(each => each !== lane);
      const twin = other && computes(parts) ? other.given.ops.indexOf(given.ops[at]) : -1;
      if (twin >= 0) {
        const took = other.given.end[twin] - other.given.start[twin];
        lines.push(`${other.name}: ${seconds(took)}`);
      }
      const moved = parts.filter(part => part.move);
      const carried = moved.map(part => shown.given.edges[`${part.source}>${part.target}${part.payload}`] || 0);
      if (moved.length) lines.push(bytes(carried.reduce((sum, each) => sum + each, 0)));
      if (lane.given.held_bytes?.length) lines.push(`${bytes(lane.given.held_bytes[at])} held after it`);
      return lines.join("<br>");
    }

    function listen(u) {
      const over = u.over;
      over.style.touchAction = "pan-y";
      let dragged = null;
      over.addEventListener("pointerdown", event => {
        if (event.button) return;
        dragged = { x: event.clientX, view: [...view] };
        over.setPointerCapture(event.pointerId);
      });
      over.addEventListener("pointermove", event => {
        if (dragged) {
          const moved = (dragged.x - event.clientX) / over.clientWidth * (dragged.view[1] - dragged.view[0]);
          look([dragged.view[0] + moved, dragged.view[1] + moved]);
        }
        const found = !dragged && u === chart ? under(event.offsetX, event.offsetY) : null;
        tip.hidden = !found;
        if (!found) return;
        tip.innerHTML = describe(found);
        const box = place.getBoundingClientRect();
        const x = event.clientX - box.left, y = event.clientY - box.top;
        tip.style.left = `${x + 16 + tip.offsetWidth > box.width ? x - 12 - tip.offsetWidth : x + 16}px`;
        tip.style.top = `${y + 14}px`;
      });
      for (const name of ["pointerup", "pointercancel"]) over.addEventListener(name, () => { dragged = null; });
      over.addEventListener("pointerleave", () => { tip.hidden = true; });
      over.addEventListener("dblclick", () => look(extent));
      over.addEventListener("wheel", event => {
        const whole = view[1] - view[0];
        if (event.ctrlKey || event.metaKey) {
          event.preventDefault();
          zoom(Math.exp(event.deltaY * 0.003), view[0] + whole * event.offsetX / over.clientWidth);
        } else if (event.deltaX || event.shiftKey) {
          event.preventDefault();
          const moved = (event.deltaX || event.deltaY) / over.clientWidth * whole;
          look([view[0] + moved, view[1] + moved]);
        }
      }, { passive: false });
    }

    function zoom(factor, around = (view[0] + view[1]) / 2) {
      look(factor ? [around - (around - view[0]) * factor, around + (view[1] - around) * factor] : extent);
    }

    function legend() {
      const used = new Set(shown.ranks.flatMap(rank => rank.lanes.flatMap(lane =>
        [...new Set(lane.drawn.boxes.tone)].map(tone => Math.floor(tone / NUM_SHADES)))));
      const entries = [...used].sort().map(kind => [shown.fills[kind * NUM_SHADES + NUM_SHADES / 2].css, Object.values(KINDS)[kind]]);
      const strips = new Set(shown.ranks.flatMap(rank => rank.lanes.flatMap(lane => [...new Set(lane.drawn.strips.tone)])));
      if (strips.has(0)) entries.push([MOVING.css, "transfer"]);
      if (strips.has(1)) entries.push([WAITING.css, "waits for a value"]);
      entries.push([IDLE, "idle"]);
      bar.firstChild.innerHTML = entries.map(([tone, name]) => `<span><i style="background:${tone}"></i>${name}</span>`).join("")
        + '<span class="hint">drag to move, Ctrl + wheel to zoom, double-click for all</span>';
    }

    function update(given) {
      shown = take(given);
      extent = shown.extent;
      tip.hidden = true;
      makeCharts();
      legend();
    }

    bar.lastChild.addEventListener("click", event => {
      if (event.target.dataset.by) zoom(+event.target.dataset.by);
    });
    new ResizeObserver(() => {
      const width = Math.max(320, place.clientWidth);
      for (const each of [chart, memoryChart]) if (each && each.width !== width) each.setSize({ width, height: each.height });
    }).observe(place);
    update(data);
    return {
      update,
      get view() { return [...view]; },
      get extent() { return [...extent]; },
      // How far below the plot's top each lane has its middle: those of rank 0, of rank 1, ...
      get middles() { return shown.ranks.flatMap(rank => rank.lanes.map(lane => lane.top + (lane.height - STRIP) / 2)); },
    };
  }

  return { mount, seconds, bytes, percent };
})();
