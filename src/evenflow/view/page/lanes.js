// Lanes: rows of boxes on a canvas. What is narrower than a pixel is mixed into an image of one row, so that a frame
// costs by what is seen: a hundred thousand ops can be dragged about.
"use strict";

const Lanes = (() => {
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

  // Draws a group of rows as boxes of one height, batched by colour; returns those that are wider than `names`.
  function draw(ctx, group, fills, area, top, height, names) {
    const { left, width, from, perSecond, columns } = area;
    const paths = fills.map(() => null), named = [];
    const until = from + width / perSecond;
    for (let row = Ops.firstAfter(group.end, from); row < group.start.length && group.start[row] < until; row++) {
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
      if (wide > names) named.push({ row, x: left + x, wide });
    }
    columns.draw(ctx, left, top, height);
    paths.forEach((path, tone) => {
      if (!path) return;
      ctx.fillStyle = fills[tone].css;
      ctx.fill(path);
    });
    return named;
  }

  // Writes the microbatch on each box where there is room, or the whole op where a rank holds several stages.
  function write(ctx, named, { boxes, numStages }, fills, ink, top, height) {
    ctx.textAlign = "center";
    for (const { row, x, wide } of named) {
      const parts = boxes.rows[row].parts;
      const full = parts.map(part => `${part.stage}${part.kind}${part.microbatch}`).join("&");
      const name = numStages > 1 || parts.length > 1 ? full : `${parts[0].microbatch}`;
      if (name.length * 6.6 + 3 > wide) continue;
      ctx.fillStyle = fills[boxes.tone[row]].dark ? "#fff" : ink;
      ctx.fillText(name, x + wide / 2, top + height / 2 - (height > 16 ? 1 : 0));
    }
  }

  return { Columns, draw, write };
})();
