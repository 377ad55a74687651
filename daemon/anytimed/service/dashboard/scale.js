// From figures to places on a plot: ticks, logarithms, and a range that a few wild points do not spoil.

const STEPS = [1, 2, 2.5, 5, 10];

export function linearTicks(low, high, about) {
  const rough = (high - low) / Math.max(about, 1);
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * (STEPS.find((s) => s * power >= rough * 0.999) ?? 10);
  const ticks = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i += 1) ticks.push(i * step);
  return ticks;
}

// Powers of ten, and 2 and 5 between them where there is room.
export function logTicks(low, high, about) {
  const first = Math.floor(Math.log10(low));
  const last = Math.ceil(Math.log10(high));
  const made = (factors) => {
    const ticks = [];
    for (let p = first; p <= last; p += 1) for (const f of factors) ticks.push(f * 10 ** p);
    return ticks.filter((t) => t >= low * 0.999 && t <= high * 1.001);
  };
  const all = [[1, 2, 5], [1, 3], [1]].map(made);
  const fits = all.find((ticks) => ticks.length <= about + 1) ?? all[2];
  const every = Math.ceil(fits.length / (about + 1));
  return fits.filter((_, i) => i % every === 0);
}

// x: figures to [0, 1]
export function axis(kind, low, high) {
  const place = kind === 'log' ? (v) => Math.log10(Math.max(v, low)) : (v) => v;
  const [a, b] = [place(low), place(high)];
  return (value) => (b > a ? (place(value) - a) / (b - a) : 0.5);
}

const COLUMNS = 80;

// The lowest and highest y to show for points [x in [0, 1], y]: of what lies in the first twentieth, and of lone peaks,
// what is far off is left out. The newest is always shown.
export function range(points, { zero = false } = {}) {
  if (!points.length) return null;
  const tops = Array(COLUMNS).fill(-Infinity);
  const feet = Array(COLUMNS).fill(Infinity);
  let top = -Infinity;
  let foot = Infinity;
  let newest = points[0];
  for (const point of points) {
    const [x, y] = point;
    const column = Math.min(COLUMNS - 1, Math.floor(x * COLUMNS));
    tops[column] = Math.max(tops[column], y);
    feet[column] = Math.min(feet[column], y);
    top = Math.max(top, y);
    foot = Math.min(foot, y);
    if (x >= newest[0]) newest = point;
  }
  const settled = tops.slice(COLUMNS / 20).filter(Number.isFinite);
  const sorted = (settled.length ? settled : tops.filter(Number.isFinite)).sort((a, b) => a - b);
  let high = sorted[Math.ceil((sorted.length - 1) * 0.95)];
  const lows = feet.filter(Number.isFinite).sort((a, b) => a - b);
  let low = lows[Math.floor((lows.length - 1) * 0.05)];
  const span = Math.max(high - low, Math.abs(high) * 0.02, 1e-9);
  high = top <= high + 0.6 * span ? top : high + 0.25 * span;
  low = foot >= low - 0.6 * span ? foot : low - 0.25 * span;
  high = Math.max(high, newest[1]);
  low = zero ? Math.min(0, low) : Math.min(low, newest[1]);
  const pad = Math.max(0.06 * (high - low), 0.004 * Math.abs(high), 1e-9);
  return { low: zero && low === 0 ? 0 : low - pad, high: high + pad, top, foot };
}
