// The lines of a chart.
//
// A series is { key, name, style, x, y, low, high, shown, plain }: columns of figures, null where there is none. low and
// high, where given, draw a band; plain: a line alone in its chart, without markers. Each style has a colour (in the
// stylesheet), a dash and a marker of its own, so that no line is told by its colour alone.

import { svg } from './dom.js';

export const STYLES = 7; // 0 is the quiet one
const FEW = 24; // each gets a marker
const APART = 64; // pixels between two markers
const DASHES = ['', '', '7 3', '2 3', '10 3 2 3', '', '5 2 1 2'];
const MARKERS = [
  null,
  (x, y) => `M${x - 3} ${y}a3 3 0 1 0 6 0a3 3 0 1 0 -6 0z`,
  (x, y) => `M${x - 3} ${y - 3}h6v6h-6z`,
  (x, y) => `M${x} ${y - 4}l4 7h-8z`,
  (x, y) => `M${x} ${y - 4}l4 4l-4 4l-4 -4z`,
  (x, y) => `M${x - 3} ${y - 3}l6 6m0 -6l-6 6`,
  (x, y) => `M${x} ${y + 4}l4 -7h-8z`,
];

const dash = (s) => DASHES[s.style] || null;
const marked = (s) => MARKERS[s.style] && !s.plain;
const place = (v) => Math.round(v * 10) / 10;

// As the legend shows it.
export function sample(s) {
  return svg('svg', { class: `sample s${s.style}`, viewBox: '0 0 30 10', width: 30, height: 10, 'aria-hidden': 'true' },
    svg('path', { class: 'line', d: 'M1 5H29', 'stroke-dasharray': dash(s) }),
    marked(s) ? svg('path', { class: 'mark', d: MARKERS[s.style](15, 5) }) : null);
}

// scale: { x, y } from figures to pixels; kind: of the x axis, where a logarithm has no place for zero
export function line(s, scale, kind) {
  const drawn = (i) => kind !== 'log' || s.x[i] > 0;
  const parts = [];
  const marks = [];
  let bare = -Infinity;
  for (let i = 0; i < s.x.length; i += 1) {
    if (s.y[i] === null || !drawn(i)) continue;
    const [x, y] = [place(scale.x(s.x[i])), place(scale.y(s.y[i]))];
    parts.push(`${x} ${y}`);
    if (s.x.length <= FEW || x - bare > APART) {
      marks.push(MARKERS[s.style]?.(x, y));
      bare = x;
    }
  }
  return svg('g', { class: `s${s.style}` },
    s.low ? svg('path', { class: 'band', d: band(s, scale, drawn) }) : null,
    svg('path', { class: 'line', d: parts.length ? `M${parts.join('L')}` : '', 'stroke-dasharray': dash(s) }),
    marked(s) ? svg('path', { class: 'mark', d: marks.join('') }) : null);
}

function band(s, scale, drawn) {
  const at = s.x.map((_, i) => i).filter((i) => s.low[i] !== null && s.high[i] !== null && drawn(i));
  const edge = (column) => at.map((i) => `${place(scale.x(s.x[i]))} ${place(scale.y(column[i]))}`);
  return at.length ? `M${[...edge(s.high), ...edge(s.low).reverse()].join('L')}z` : '';
}

// The row of a series that is nearest to x.
export function nearest(s, x) {
  let best = null;
  for (let i = 0; i < s.x.length; i += 1) {
    if (s.y[i] !== null && (best === null || Math.abs(s.x[i] - x) < Math.abs(s.x[best] - x))) best = i;
  }
  return best;
}

export function lastOf(s) {
  const at = s.y.findLastIndex((v) => v !== null);
  return at < 0 ? null : at;
}
