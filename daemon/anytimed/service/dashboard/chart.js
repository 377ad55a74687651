// A chart of lines: drawn as SVG, read by pointer and by keyboard, told in a sentence and in a table.
// What a series is: see lines.js.

import { el, refill, say, svg, table } from './dom.js';
import { lastOf, line, nearest, sample } from './lines.js';
import { axis, linearTicks, logTicks, range } from './scale.js';

const HEIGHT = 216;
const EDGE = { left: 46, right: 12, top: 14, bottom: 24 };
const TABLE_ROWS = 12;
let made = 0;

export class Chart {
  // text: { title, unit, x: 'tokens' | …, xText, yText, yTick, zero }
  constructor(text) {
    this.text = text;
    this.hidden = new Map(); // by key, what the reader chose
    this.series = [];
    this.kind = 'linear';
    this.cursor = null;
    const id = `chart-${++made}`;
    this.clip = `${id}-clip`;
    this.at = el('p', { class: 'at' });
    this.legend = el('div', { class: 'legend', role: 'group', 'aria-label': `${text.title}: lines` });
    this.summary = el('p', { class: 'unseen', id: `${id}-told` });
    this.plot = el('div', {
      class: 'plot', tabindex: 0, role: 'slider', 'aria-label': `${text.title}: place in the run`,
      'aria-describedby': `${id}-told`, 'aria-orientation': 'horizontal',
    });
    this.rows = el('div', { class: 'rows', role: 'group', 'aria-label': `${text.title}, as a table` });
    this.details = el('details', {}, el('summary', {}, 'as a table'), this.rows);
    this.details.addEventListener('toggle', () => {
      this.rows.tabIndex = this.details.open ? 0 : -1; // it may be wider than its place
      this.fillTable();
    });
    this.node = el('figure', { class: 'chart', 'aria-labelledby': `${id}-title` },
      el('div', { class: 'head' }, el('h3', { id: `${id}-title` }, text.title), el('span', { class: 'quiet' }, text.unit), this.at),
      this.legend, this.plot, this.summary, this.details);
    this.listen();
    new ResizeObserver(() => this.draw()).observe(this.plot);
  }

  // series: as above; kind: of the x axis, "linear" or "log"
  show(series, kind) {
    this.series = series;
    this.kind = kind;
    this.fillLegend();
    this.draw();
  }

  visible() {
    return this.series.filter((s) => !(this.hidden.get(s.key) ?? !s.shown));
  }

  fillLegend() {
    const key = JSON.stringify(this.series.map((s) => [s.key, s.name, s.style]));
    refill(this.legend, key, () => this.series.map((s) => this.entry(s)));
    const chosen = new Set(this.visible().map((s) => s.key));
    this.series.forEach((s, i) => this.legend.children[i].setAttribute('aria-pressed', chosen.has(s.key)));
  }

  entry(s) {
    const button = el('button', { type: 'button' }, sample(s), el('span', { class: 'of' }, s.name), el('span', { class: 'value' }));
    button.addEventListener('click', () => {
      this.hidden.set(s.key, this.visible().some((v) => v.key === s.key));
      this.fillLegend();
      this.draw();
    });
    return button;
  }

  draw() {
    const width = this.plot.clientWidth;
    if (!width) return;
    const shown = this.visible();
    const xs = [...new Set(shown.flatMap((s) => s.x.filter((x, i) => s.y[i] !== null && (this.kind !== 'log' || x > 0))))];
    this.xs = xs.sort((a, b) => a - b);
    const area = { w: width - EDGE.left - EDGE.right, h: HEIGHT - EDGE.top - EDGE.bottom };
    const frame = svg('svg', { width, height: HEIGHT, viewBox: `0 0 ${width} ${HEIGHT}`, 'aria-hidden': 'true' });
    if (!xs.length) {
      this.plot.replaceChildren(frame, el('p', { class: 'empty' }, shown.length ? 'nothing measured yet' : 'no line is chosen'));
      this.scale = null;
      this.tell();
      return;
    }
    const across = axis(this.kind, xs[0], xs.at(-1));
    const points = shown.flatMap((s) => s.x.flatMap((x, i) => (s.y[i] === null || (this.kind === 'log' && x <= 0) ? [] : [[across(x), s.y[i]]])));
    const y = range(points, this.text);
    const down = axis('linear', y.low, y.high);
    this.scale = { x: (v) => EDGE.left + area.w * across(v), y: (v) => EDGE.top + area.h * (1 - down(v)), area, y01: y };
    frame.append(svg('clipPath', { id: this.clip }, svg('rect', { x: EDGE.left, y: EDGE.top, width: area.w, height: area.h })));
    this.drawAxes(frame, xs, y, area);
    const lines = svg('g', { 'clip-path': `url(#${this.clip})` });
    for (const s of [...shown].sort((a, b) => (a.style === 0 ? -1 : b.style === 0 ? 1 : 0))) lines.append(line(s, this.scale, this.kind));
    frame.append(lines);
    if (y.top > y.high) frame.append(svg('text', { class: 'off', x: EDGE.left + 4, y: EDGE.top - 4 }, `▲ up to ${this.text.yText(y.top)}, off the scale`));
    this.over = svg('g');
    frame.append(this.over);
    this.plot.replaceChildren(frame);
    this.drawCursor();
    if (this.details.open) this.fillTable();
  }

  drawAxes(frame, xs, y, area) {
    const { scale } = this;
    const levels = linearTicks(y.low, y.high, 5);
    const step = levels.length > 1 ? levels[1] - levels[0] : y.high - y.low;
    for (const value of levels) {
      const at = scale.y(value);
      frame.append(svg('path', { class: 'grid', d: `M${EDGE.left} ${at}h${area.w}` }),
        svg('text', { class: 'tick y', x: EDGE.left - 7, y: at + 4 }, this.text.yTick(value, step)));
    }
    const about = Math.max(2, Math.floor(area.w / 78));
    const ticks = this.text.xTicks?.(xs[0], xs.at(-1), about)
      ?? (this.kind === 'log' ? logTicks : linearTicks)(xs[0], xs.at(-1), about).map((v) => [v, this.text.xTick(v)]);
    for (const [value, label] of ticks) {
      const at = scale.x(value);
      if (at > EDGE.left + area.w - 6 && ticks.length > 1) frame.append(svg('text', { class: 'tick last', x: EDGE.left + area.w + EDGE.right, y: HEIGHT - 7 }, label));
      else frame.append(svg('text', { class: 'tick x', x: at, y: HEIGHT - 7 }, label));
      frame.append(svg('path', { class: 'grid', d: `M${at} ${EDGE.top + area.h}v4` }));
    }
    frame.append(svg('path', { class: 'base', d: `M${EDGE.left} ${EDGE.top + area.h}h${area.w}` }));
  }

  // --- reading it

  listen() {
    this.plot.addEventListener('pointermove', (event) => {
      if (!this.scale) return;
      const at = event.clientX - this.plot.getBoundingClientRect().left;
      let best = 0;
      this.xs.forEach((x, i) => {
        if (Math.abs(this.scale.x(x) - at) < Math.abs(this.scale.x(this.xs[best]) - at)) best = i;
      });
      this.move(best);
    });
    this.plot.addEventListener('pointerleave', () => this.move(null));
    this.plot.addEventListener('blur', () => this.move(null));
    this.plot.addEventListener('keydown', (event) => {
      if (!this.scale) return;
      const last = this.xs.length - 1;
      const leap = Math.max(1, Math.round(last / 20));
      const from = this.index() ?? last;
      const to = {
        ArrowLeft: from - 1, ArrowDown: from - 1, ArrowRight: from + 1, ArrowUp: from + 1,
        PageUp: from + leap, PageDown: from - leap, Home: 0, End: last, Escape: null,
      }[event.key];
      if (to === undefined) return;
      event.preventDefault();
      this.move(to === null ? null : Math.min(last, Math.max(0, to)));
    });
  }

  move(index) {
    this.cursor = index === null ? null : this.xs?.[index] ?? null;
    this.drawCursor();
  }

  // Of the place that is read; lines move on beneath it.
  index() {
    if (this.cursor === null || !this.xs?.length) return null;
    const at = this.xs.findIndex((x) => x >= this.cursor);
    return at < 0 ? this.xs.length - 1 : at;
  }

  drawCursor() {
    this.over?.replaceChildren();
    const index = this.index();
    if (this.scale && index !== null) {
      const at = this.scale.x(this.xs[index]);
      this.over.append(svg('path', { class: 'cursor', d: `M${at} ${EDGE.top}v${this.scale.area.h}` }));
      for (const s of this.visible()) {
        const i = nearest(s, this.xs[index]);
        if (i === null) continue;
        const y = this.scale.y(s.y[i]);
        if (y >= EDGE.top - 1) this.over.append(svg('circle', { class: `dot s${s.style}`, cx: this.scale.x(s.x[i]), cy: y, r: 4 }));
      }
    }
    this.tell();
  }

  // The figures at the cursor, or the newest, in the legend, for the screen reader, and in a sentence.
  tell() {
    const index = this.index();
    const x = index === null ? null : this.xs[index];
    const told = [];
    this.series.forEach((s, i) => {
      const at = x === null ? lastOf(s) : nearest(s, x);
      const value = at === null ? '' : this.text.yText(s.y[at]);
      say(this.legend.children[i].querySelector('.value'), value);
      if (value && this.visible().includes(s)) told.push(`${s.name} ${value}`);
    });
    const place = x === null ? '' : this.text.xText(x);
    say(this.at, place);
    const last = this.xs?.length ? this.xs.length - 1 : 0;
    this.plot.setAttribute('aria-valuemin', 0);
    this.plot.setAttribute('aria-valuemax', last);
    this.plot.setAttribute('aria-valuenow', index ?? last);
    const newest = this.xs?.length ? this.text.xText(this.xs[last]) : '';
    this.plot.setAttribute('aria-valuetext', told.length ? `${place || newest}: ${told.join(', ')}` : 'nothing measured yet');
    say(this.summary, this.sentence(newest));
  }

  sentence(newest) {
    const parts = this.visible().map((s) => {
      const values = s.y.filter((v) => v !== null);
      if (!values.length) return `${s.name}: nothing yet`;
      const low = values.reduce((a, b) => Math.min(a, b));
      const high = values.reduce((a, b) => Math.max(a, b));
      return `${s.name}: now ${this.text.yText(values.at(-1))}, lowest ${this.text.yText(low)}, highest ${this.text.yText(high)}`;
    });
    return parts.length ? `${this.text.title}, ${this.text.unit}, until ${newest || 'now'}. ${parts.join('. ')}.` : `${this.text.title}: no line is chosen.`;
  }

  fillTable() {
    if (!this.details.open || !this.xs) return;
    const shown = this.visible();
    const last = this.xs.length - 1;
    const picked = [...new Set(Array.from({ length: TABLE_ROWS }, (_, i) => Math.round((last * i) / (TABLE_ROWS - 1))))].filter((i) => i >= 0);
    const rows = picked.reverse().map((i) => [this.text.xText(this.xs[i]), ...shown.map((s) => {
      const at = nearest(s, this.xs[i]);
      return at === null ? '–' : this.text.yText(s.y[at]);
    })]);
    const columns = [[this.text.x, ''], ...shown.map((s) => [s.name, 'n'])];
    this.rows.replaceChildren(table(`${this.text.title}, ${this.text.unit}, newest first`, columns, rows, { class: 'small' }));
  }
}
