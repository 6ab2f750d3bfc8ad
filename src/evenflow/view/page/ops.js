// Ops: their text form, in words, and as columns that can be drawn and searched.
"use strict";

const Ops = (() => {
  const MOVED = { F: "activation", B: "gradient" };
  const MOVES = { S: "sends", R: "receives", H: "hands over" };
  const KINDS = "FBIWO";  // forward, backward, input gradient, weight gradient, overlap
  const MOVING = 0, WAITING = 1;  // what a strip is

  // The parts of an op: {kind, stage, microbatch} of one that computes, {move, ...} of a transfer, {all, stage}
  // of what data ranks do together. Source: src/evenflow/ir/op.py.
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

  function told(part, kinds) {
    if (part.kind) return `${kinds[part.kind].name} of stage ${part.stage}, microbatch ${part.microbatch}`;
    if (part.move) {
      const way = `stage ${part.source} to ${part.target}, microbatch ${part.microbatch}`;
      return `${MOVES[part.move]} the ${MOVED[part.payload]} from ${way}`;
    }
    return `${part.all === "G" ? "sums the gradients" : "gathers the parameters"} of stage ${part.stage}`;
  }

  // A lane as it is drawn: boxes of what computes, strips of what moves and waits. Each group has its rows (op and
  // place in the lane), their starts and ends, and tones: indices of colours.
  function columns(lane, numMicrobatches, numShades) {
    const boxes = [], strips = [];
    lane.ops.forEach((text, at) => {
      const parts = parse(text);
      if (computes(parts) && lane.start[at] > lane.came[at]) strips.push({ at, parts, waits: true });
      (computes(parts) ? boxes : strips).push({ at, parts });
    });
    const group = (rows, toneOf) => ({
      rows,
      start: Float64Array.from(rows, row => (row.waits ? lane.came : lane.start)[row.at]),
      end: Float64Array.from(rows, row => (row.waits ? lane.start : lane.end)[row.at]),
      tone: Uint8Array.from(rows, toneOf),
    });
    const last = Math.max(1, numMicrobatches - 1);
    return {
      boxes: group(boxes, ({ parts }) => {
        const shade = Math.round(Math.min(1, parts[0].microbatch / last) * (numShades - 1));
        return KINDS.indexOf(parts.length > 1 ? "O" : parts[0].kind) * numShades + shade;
      }),
      strips: group(strips, row => (row.waits ? WAITING : MOVING)),
      numStages: new Set(boxes.flatMap(({ parts }) => parts.map(part => part.stage))).size,
    };
  }

  // The first place whose end is after a moment: ends ascend, as ops of a lane are in turn.
  function firstAfter(ends, moment) {
    let low = 0, high = ends.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (ends[middle] > moment) high = middle;
      else low = middle + 1;
    }
    return low;
  }

  return { KINDS, MOVING, WAITING, columns, computes, firstAfter, told };
})();
