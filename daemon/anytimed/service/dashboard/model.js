// What the page knows of the run: the last status, and the history as columns that grow with every record.

export const POINTS = 500;
const MOST_ROWS = 3 * POINTS;
const MOST_EVENTS = 2 * POINTS;
const FIGURES = {
  step: ['loss', 'tokens_per_s', 'grad_norm'],
  evaluation: ['loss_x', 'loss_y', 'loss_z'],
};
const PLURAL = { step: 'steps', evaluation: 'evaluations' };
export const ROUTINE = new Set(['commit', 'export', 'mirrored', 'verified', 'state']);
export const GUARD = new Set(['skipped', 'spike', 'rollback', 'jump']);

const number = (value) => (typeof value === 'number' && Number.isFinite(value) ? value : null);

export class Model {
  constructor() {
    this.status = null;
    this.history = null;
    this.version = 0; // of the history: what is drawn is drawn again when it changes
    this.ahead = null; // of the daemon's clock before ours, in seconds
  }

  // The daemon's time. A status is never told before its time, so the largest difference is the nearest to the truth.
  now() {
    return Date.now() / 1000 + (this.ahead ?? 0);
  }

  told(status) {
    this.status = status;
    const ahead = number(status.time) === null ? 0 : status.time - Date.now() / 1000;
    this.ahead = this.ahead === null ? ahead : Math.max(this.ahead, ahead);
  }

  forgetClock() {
    this.ahead = null;
  }

  remembered(history) {
    // A source may be called what an object has already.
    history.steps.prequential = new Map(Object.entries(history.steps.prequential));
    this.history = history;
    this.version += 1;
  }

  // Take a record in. False where the history has to be asked for again: steps were taken again, or there is too much.
  add(kind, record) {
    if (this.history === null) return true;
    this.version += 1;
    if (kind === 'event') return this.addEvent(record);
    const columns = this.history[PLURAL[kind]];
    const step = number(record.step);
    if (columns === undefined || step === null) return true;
    const last = columns.step.at(-1) ?? -1;
    if (step === last) return true;
    if (step < last || columns.step.length >= MOST_ROWS) return false;
    const rows = columns.step.length;
    columns.step.push(step);
    columns.time.push(number(record.time) ?? this.now());
    columns.tokens.push(kind === 'step' ? number(record.tokens) ?? 0 : this.tokensAt(step));
    for (const name of FIGURES[kind]) {
      for (const end of ['', '_low', '_high']) columns[name + end].push(number(record[name]));
    }
    if (kind === 'step') {
      const losses = new Map(Object.entries(record.prequential ?? {}));
      for (const name of losses.keys()) {
        if (!columns.prequential.has(name)) columns.prequential.set(name, Array(rows).fill(null));
      }
      for (const [name, column] of columns.prequential) column.push(number(losses.get(name)));
    }
    return true;
  }

  addEvent(record) {
    const { events } = this.history;
    if (record.id === undefined || !events.some((event) => event.id === record.id)) events.push(record);
    return events.length < MOST_EVENTS;
  }

  // Tokens trained on until a step; an evaluation's own are those of the hold-out.
  tokensAt(step) {
    const { steps } = this.history;
    const at = steps.step.findLastIndex((known) => known <= step);
    return at < 0 ? number(this.status?.tokens) ?? 0 : steps.tokens[at];
  }
}
