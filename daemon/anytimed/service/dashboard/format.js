// Numbers as they are set here: thin spaces between thousands and before units.

export const NARROW = '\u202f';
export const NONE = '–';

const known = (value) => typeof value === 'number' && Number.isFinite(value);

export function whole(value) {
  if (!known(value)) return NONE;
  return String(Math.round(value)).replace(/\B(?=(\d{3})+$)/g, NARROW);
}

export function fixed(value, digits) {
  if (!known(value)) return NONE;
  if (Math.abs(value) >= 1e6) return value.toExponential(2);
  const [head, tail] = value.toFixed(digits).split('.');
  const grouped = head.replace(/\B(?=(\d{3})+$)/g, NARROW);
  return tail ? `${grouped}.${tail}` : grouped;
}

export const loss = (value) => fixed(value, 4);

const scaled = (value, units, digits) => {
  if (!known(value)) return NONE;
  let at = 0;
  let left = Math.abs(value);
  while (left >= 999.5 && at < units.length - 1) {
    left /= 1000;
    at += 1;
  }
  const shown = at === 0 ? String(Math.round(left)) : digits(left);
  return `${value < 0 ? '−' : ''}${shown}${units[at] ? NARROW + units[at] : ''}`;
};
const three = (left) => left.toFixed(left < 9.995 ? 2 : left < 99.95 ? 1 : 0);
const least = (left) => String(Number(left.toPrecision(3)));

// 12.8 k, 1.31 M, 41.9 G
export const short = (value) => scaled(value, ['', 'k', 'M', 'G', 'T', 'P'], three);
// For an axis: 20 k, 1.5 M
export const tick = (value) => scaled(value, ['', 'k', 'M', 'G', 'T', 'P'], least);
export const bytes = (value) => scaled(value, ['B', 'kB', 'MB', 'GB', 'TB', 'PB'], three);

export const percent = (value, digits = 1) => (known(value) ? `${(100 * value).toFixed(digits)}${NARROW}%` : NONE);

// 42 s, 3 min 05 s, 2 h 10 min, 4 d 3 h
export function duration(seconds) {
  if (!known(seconds)) return NONE;
  const s = Math.max(0, Math.floor(seconds));
  const two = (value) => String(value).padStart(2, '0');
  if (s < 60) return `${s}${NARROW}s`;
  if (s < 3600) return `${Math.floor(s / 60)}${NARROW}min ${two(s % 60)}${NARROW}s`;
  if (s < 86400) return `${Math.floor(s / 3600)}${NARROW}h ${two(Math.floor((s % 3600) / 60))}${NARROW}min`;
  return `${Math.floor(s / 86400)}${NARROW}d ${Math.floor((s % 86400) / 3600)}${NARROW}h`;
}

const two = (value) => String(value).padStart(2, '0');

// Local time; the date too where it is not today's.
export function clock(seconds, now = Date.now() / 1000) {
  if (!known(seconds)) return NONE;
  const at = new Date(seconds * 1000);
  const time = `${two(at.getHours())}:${two(at.getMinutes())}:${two(at.getSeconds())}`;
  const day = `${at.getFullYear()}-${two(at.getMonth() + 1)}-${two(at.getDate())}`;
  return at.toDateString() === new Date(now * 1000).toDateString() ? time : `${day} ${time}`;
}

// For the command line of a shell.
export const quoted = (text) => (/^[\w@%+=:,./-]+$/.test(text) ? text : `'${text.replaceAll("'", "'\\''")}'`);
