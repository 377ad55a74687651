// The four charts, and which columns of the history each draws.

import { Chart } from './chart.js';
import { clock, fixed, loss, short, tick, whole } from './format.js';
import { STYLES } from './lines.js';

const MOST_SOURCES = 5; // shown at first; the others can be chosen
// As many decimals as the distance of two ticks needs.
const graded = (value, step) => {
  const digits = [0, 1, 2, 3, 4, 5].find((d) => Math.abs(step * 10 ** d - Math.round(step * 10 ** d)) < 1e-6 * step * 10 ** d);
  return fixed(value, digits ?? 6);
};
const tokens = { x: 'tokens', xText: (x) => `${short(x)} tokens`, xTick: tick };
const nats = { unit: 'nats per token', yText: loss, yTick: graded };

const HOUR = 3600;
const EVERY = [1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, HOUR, 2 * HOUR, 3 * HOUR, 6 * HOUR, 12 * HOUR];

// Round times of the reader's clock, days where it is long.
function timeTicks(low, high, about) {
  const far = (seconds) => -60 * new Date(seconds * 1000).getTimezoneOffset();
  const rough = (high - low) / about;
  const every = EVERY.find((s) => s >= rough) ?? 24 * HOUR * Math.ceil(rough / (24 * HOUR));
  const ticks = [];
  for (let t = Math.ceil((low + far(low)) / every) * every - far(low); t <= high; t += every) {
    const at = new Date(t * 1000);
    const two = (v) => String(v).padStart(2, '0');
    const day = `${two(at.getMonth() + 1)}-${two(at.getDate())}`;
    const time = `${two(at.getHours())}:${two(at.getMinutes())}`;
    ticks.push([t, every >= 24 * HOUR ? day : every >= 60 ? (at.getHours() + at.getMinutes() === 0 ? day : time) : `${time}:${two(at.getSeconds())}`]);
  }
  return ticks.length ? ticks : [[low, clock(low)]];
}

export class Charts {
  constructor(node) {
    this.holdout = new Chart({ title: 'Hold-out loss', ...nats, ...tokens });
    this.prequential = new Chart({ title: 'Prequential loss', ...nats, unit: 'nats per token, before it is trained on', ...tokens });
    this.speed = new Chart({
      title: 'Speed', unit: 'tokens per second', x: 'time', xText: (x) => clock(x), xTicks: timeTicks,
      yText: (y) => whole(y), yTick: tick, zero: true,
    });
    this.gradient = new Chart({ title: 'Gradient norm', unit: 'at y', yText: (y) => fixed(y, 3), yTick: graded, ...tokens });
    node.replaceChildren(...[this.holdout, this.prequential, this.speed, this.gradient].map((chart) => chart.node));
  }

  show(history, kind) {
    const { steps, evaluations } = history;
    const measured = (name, column, style, shown = true) => ({ key: column, name, style, shown, x: evaluations.tokens, y: evaluations[column] });
    this.holdout.show([
      measured('x, exported', 'loss_x', 1),
      measured('y, gradient', 'loss_y', 2),
      measured('z, fast', 'loss_z', 3, false),
    ], kind);

    const named = [...steps.prequential];
    const all = { key: '\u0000all', name: 'all batches', style: 0, shown: true, x: steps.tokens, y: steps.loss, low: steps.loss_low, high: steps.loss_high };
    this.prequential.show([all, ...named.map(([name, y], i) => ({
      key: name, name, style: 1 + (i % (STYLES - 1)), shown: i < MOST_SOURCES && named.length > 1,
      x: steps.tokens, y,
    }))], kind);

    const banded = (column, style, x) => ({ key: column, style, plain: true, shown: true, x, y: steps[column], low: steps[`${column}_low`], high: steps[`${column}_high`] });
    this.speed.show([{ ...banded('tokens_per_s', 1, steps.time), name: 'tokens/s' }], 'linear');
    this.gradient.show([{ ...banded('grad_norm', 1, steps.tokens), name: 'norm' }], kind);
  }
}

