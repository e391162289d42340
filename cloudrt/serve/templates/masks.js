// From the probability of a class to its mask: the same integer arithmetic as cloudrt's rules, so that rows are equal.
// Levels are uint8 in column-major order: the pixel (x, y) is at x * height + y.
"use strict";

// Return the components that a rule keeps: runs [first, end) of positions, ascending, and their area.
function applyRule(levels, height, rule, presence) {
  const empty = { runs: new Int32Array(0), area: 0 };
  if (presence !== null && presence < rule.presence) return empty;
  if (rule.gate_pixels > 0) {
    let above = 0;
    for (const level of levels) above += level > rule.gate_threshold;
    if (above < rule.gate_pixels) return empty;
  }
  const starts = [], ends = [], parents = [], areas = [];
  const root = (one) => {
    while (parents[one] !== one) one = parents[one] = parents[parents[one]];
    return one;
  };
  let before = 0;  // first run of the previous column
  for (let column = 0; column < levels.length; column += height) {
    const here = starts.length, next = column + height;
    let other = before;
    for (let at = column; at < next; at++) {
      if (levels[at] <= rule.threshold) continue;
      const start = at;
      while (at < next && levels[at] > rule.threshold) at++;
      const run = starts.push(start) - 1;
      ends.push(at);
      parents.push(run);
      areas.push(at - start);
      // 8-connected: runs of neighbouring columns that overlap or touch at a corner.
      while (other < here && ends[other] + height < start) other++;
      for (let one = other; one < here && starts[one] + height <= at; one++) {
        const left = root(one), right = root(run);
        if (left === right) continue;
        const [low, high] = left < right ? [left, right] : [right, left];
        parents[high] = low;
        areas[low] += areas[high];
      }
    }
    before = here;
  }
  const kept = [];
  let area = 0;
  for (let run = 0; run < starts.length; run++) {
    if (areas[root(run)] <= rule.min_area) continue;
    kept.push(starts[run], ends[run]);
    area += ends[run] - starts[run];
  }
  return { runs: Int32Array.from(kept), area };
}

// Return the RLE text: 1-based starts and lengths; runs that continue in the next column are joined.
function encodeRuns(runs) {
  const numbers = [];
  for (let i = 0; i < runs.length; i += 2) {
    const last = numbers.length - 2;
    if (last >= 0 && numbers[last] + numbers[last + 1] === runs[i] + 1) numbers[last + 1] += runs[i + 1] - runs[i];
    else numbers.push(runs[i] + 1, runs[i + 1] - runs[i]);
  }
  return numbers.join(" ");
}

// Return the outline as an SVG path through the middles of the edges between pixels that are on and off.
// Edges are followed with the mask on their right; two pixels that touch at a corner are inside one outline.
function traceRuns(runs, width, height) {
  const stride = height + 2;
  const mask = new Uint8Array((width + 2) * stride), seen = new Uint8Array(mask.length);
  for (let i = 0; i < runs.length; i += 2) {
    const begin = (Math.floor(runs[i] / height) + 1) * stride + (runs[i] % height) + 1;
    mask.fill(1, begin, begin + runs[i + 1] - runs[i]);
  }
  const step = [stride, 1, -stride, -1];  // to the right, down, left, up
  const ahead = [[0, -1], [-stride, 0], [-stride - 1, -stride], [-1, -stride - 1]];  // pixels ahead: right, left
  const parts = [];
  for (let i = 0; i < runs.length; i += 2) {
    const begin = (Math.floor(runs[i] / height) + 1) * stride + (runs[i] % height) + 1;
    if (mask[begin - 1] || seen[begin]) continue;  // only the first pixel of a run has an edge above it
    let vertex = begin, way = 0, lastX = NaN, lastY = NaN, slopeX = NaN, slopeY = NaN;
    const points = [];
    do {
      if (way === 0) seen[vertex] = 1;
      const end = vertex + step[way];
      const x = (Math.floor(vertex / stride) + Math.floor(end / stride)) / 2 - 1;
      const y = ((vertex % stride) + (end % stride)) / 2 - 1;
      if (x - lastX === slopeX && y - lastY === slopeY) points.length -= 1;
      else [slopeX, slopeY] = [x - lastX, y - lastY];
      points.push(`${x} ${y}`);
      [lastX, lastY, vertex] = [x, y, end];
      const [right, left] = ahead[way];
      if (mask[vertex + left]) way = (way + 3) % 4;
      else if (!mask[vertex + right]) way = (way + 1) % 4;
    } while (vertex !== begin || way !== 0);
    parts.push(`M${points.join("L")}Z`);
  }
  return parts.join("");
}

// Return a place for the name of the class: the middle of the longest run, but not at the edge of the picture.
function nameAt(runs, width, height) {
  let longest = 0;
  for (let i = 2; i < runs.length; i += 2) {
    if (runs[i + 1] - runs[i] > runs[longest + 1] - runs[longest]) longest = i;
  }
  const column = Math.floor(runs[longest] / height);
  const middle = (runs[longest] + runs[longest + 1]) / 2 - column * height;
  return [Math.min(Math.max(column + 0.5, 0.08 * width), 0.92 * width), Math.min(Math.max(middle, 12), height - 12)];
}
