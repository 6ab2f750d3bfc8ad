// Memory: what each rank holds over time, a line each, and the caps that are near.
"use strict";

const Memory = (() => {
  const RED = "#cc2626";
  const toneOf = (at, number) =>
    `hsl(${Math.round(215 + 125 * (at / Math.max(1, number - 1)))} 60% ${at % 2 ? 42 : 55}%)`;

  const most = numbers => numbers.reduce((one, other) => Math.max(one, other), 0);

  // What is drawn of ranks that hold something: their peaks, the caps that would not flatten the lines, the top.
  function limits(ranks) {
    const held = ranks.map((given, rank) => ({ given, rank })).filter(({ given }) => given.held);
    const peaks = held.map(({ given }) => Math.max(given.peak || 0, most(given.held.amounts)));
    const caps = [...new Set(ranks.map(given => given.cap).filter(Number.isFinite))];
    const near = caps.filter(cap => cap < most(peaks) * 3);
    return { held, peaks, caps: near, top: most([...peaks, ...near]) * 1.08 || 1 };
  }

  function draw(ctx, { held, caps, top }, area, height) {
    const y = amount => area.top + height * (1 - amount / top);
    ctx.beginPath();
    ctx.rect(area.left, area.top, area.width, height);
    ctx.clip();
    held.forEach(({ given }, number) => {
      ctx.fillStyle = toneOf(number, held.length);
      line(ctx, given.held, area, y);
    });
    ctx.strokeStyle = ctx.fillStyle = RED;
    ctx.textAlign = "right";
    ctx.setLineDash([6, 4]);
    for (const cap of caps) {
      ctx.beginPath();
      ctx.moveTo(area.left, y(cap));
      ctx.lineTo(area.left + area.width, y(cap));
      ctx.stroke();
      ctx.fillText("cap", area.left + area.width - 4, y(cap) + 12);
    }
  }

  // Boxes and no path: a path of thousands of lines takes a hundred times as long to draw.
  function line(ctx, { seconds, amounts }, area, y) {
    let at = Math.max(0, Ops.firstAfter(seconds, area.from) - 1), now = amounts[at] ?? 0;
    let column = area.left, low = now, high = now;
    const upTo = x => {  // what one column spans, and on from there
      ctx.fillRect(column, y(high) - 0.75, 1.5, y(low) - y(high) + 1.5);
      ctx.fillRect(column, y(now) - 0.75, x - column, 1.5);
    };
    for (; at < seconds.length && column <= area.left + area.width; at++) {
      const x = area.left + (seconds[at] - area.from) * area.perSecond;
      if (x >= column + 1.5) {
        upTo(x);
        [column, low, high] = [x, now, now];
      }
      now = amounts[at];
      [low, high] = [Math.min(low, now), Math.max(high, now)];
    }
    upTo(column + 1.5);
  }

  // The line below: who held how much at most, and of how much.
  function legend({ held, peaks }, format, countsMicrobatches) {
    const told = held.map(({ given, rank }, at) =>
      `<span><i style="background:${toneOf(at, held.length)}"></i>rank ${rank}: ${format(peaks[at])}`
      + (Number.isFinite(given.cap) ? ` of ${format(given.cap)}` : "") + "</span>");
    return `<b>held${countsMicrobatches ? " (microbatches' activations)" : ""}, at most:</b> ${told.join(" ")}`;
  }

  return { draw, legend, limits };
})();
