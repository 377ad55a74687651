// Everything that is not a curve: state, figures, sources, checkpoints, events.

import { by, el, refill, say, table } from './dom.js';
import { GUARD, ROUTINE } from './model.js';
import { NARROW, NONE, bytes, clock, duration, fixed, loss, percent, quoted, short, whole } from './format.js';

const MOST_EVENTS = 200;
const MOST_CHECKPOINTS = 8;
const KINDS = {
  training: 'good', 'waiting for data': 'calm', starting: 'calm', paused: 'calm', stopping: 'warn', stopped: 'bad',
};

// --- state

export function showState(status, now) {
  const state = by('state');
  say(state, status.state);
  state.className = `pill ${KINDS[status.state] ?? 'calm'}`;
  say(by('reason'), status.reason || '');
  const degraded = status.degraded ?? [];
  by('degraded').hidden = degraded.length === 0;
  refill(by('degraded'), JSON.stringify(degraded), () => degraded.map((text) => el('li', {}, el('strong', {}, 'degraded '), text)));
  const name = String(status.directory ?? '').split('/').filter(Boolean).slice(-2).join('/');
  say(by('run'), name);
  by('run').title = status.directory ?? '';
  document.title = `${status.degraded?.length ? '⚠ ' : ''}${name || 'run'} · ${status.state} · anytimed`;
  say(by('identity'), `run ${status.run_id} · term ${status.term} · pid ${status.pid} · ${status.directory}`);
  showSince(status, now);
}

export function showSince(status, now) {
  say(by('since'), `${status.state} for ${duration(now - status.since)}`);
}

// --- figures

const age = (found, now) => (found ? `${duration(now - found.time)}` : 'none yet');

function figures(status, now) {
  const { evaluation, commit, export: published, accelerator } = status;
  const made = [
    ['step', whole(status.step), status.skipped ? `${whole(status.skipped)} skipped` : ''],
    ['tokens', short(status.tokens), ''],
    ['speed', short(status.tokens_per_s), 'tokens/s'],
    ['batch loss', loss(status.loss), 'nats per token, at y'],
    ['hold-out loss of x', loss(evaluation?.loss_x), evaluation ? `y ${loss(evaluation.loss_y)}` : 'not evaluated yet'],
    ['last commit', age(commit, now), commit ? `ago · step ${whole(commit.step)}` : ''],
    ['last export', age(published, now), published ? `ago · step ${whole(published.step)}` : ''],
  ];
  if (accelerator) {
    const used = accelerator.memory_used_bytes / accelerator.memory_total_bytes;
    made.push(['device memory', bytes(accelerator.memory_used_bytes), `of ${bytes(accelerator.memory_total_bytes)} · ${percent(used, 0)}`, used]);
    if (typeof accelerator.utilisation === 'number') made.push(['utilisation', percent(accelerator.utilisation, 0), accelerator.name ?? '', accelerator.utilisation]);
  } else {
    made.push(['device', status.device ?? NONE, '']);
  }
  return made;
}

export function showFigures(status, now) {
  const found = figures(status, now);
  const node = by('figures');
  refill(node, found.map(([name]) => name).join(), () => found.map(([name, , , level]) => el('div', {},
    el('dt', {}, name), el('dd', { class: 'value' }),
    level === undefined ? null : el('dd', { class: 'level' }, el('meter', { min: 0, max: 1, 'aria-label': name })),
    el('dd', { class: 'quiet' }))));
  found.forEach(([, value, note, level], i) => {
    const figure = node.children[i];
    const shown = figure.querySelector('.value');
    say(shown, value);
    shown.classList.toggle('words', value.length > 10);
    say(figure.querySelector('.quiet'), note);
    if (Number.isFinite(level)) figure.querySelector('meter').value = level;
  });
}

// --- sources

function condition(source) {
  if (source.suspended) return [`suspended: ${source.suspended}`, 'bad'];
  if (source.unavailable) return [`unavailable: ${source.unavailable}`, 'warn'];
  if (source.unacknowledged) return [`not acknowledged: ${source.unacknowledged}`, 'warn'];
  if (source.dry) return ['everything is read', 'calm'];
  return source.pass_number > 1 ? [`pass ${whole(source.pass_number)}`, 'calm'] : ['reading', 'good'];
}

export function showSources(status) {
  const sources = Object.entries(status.sources ?? {});
  const columns = [['source', ''], ['share', 'n'], ['records', 'n'], ['tokens', 'n'], ['held out', 'n'], ['rejected', 'n'], ['lag', 'n'], ['state', 'words']];
  const rows = sources.map(([name, s]) => {
    const [told, kind] = condition(s);
    const lag = s.lag_unit === 'bytes' || s.lag_unit === undefined ? bytes(s.lag_bytes) : `${short(s.lag_bytes)} ${s.lag_unit}`;
    return [name, percent(s.share), whole(s.records), short(s.tokens), whole(s.held_out), whole(s.rejected), lag, told, kind, s.share];
  });
  refill(by('sources'), JSON.stringify(rows), () => {
    const filled = rows.map(([name, share, records, tokens, held, rejected, lag, told, kind, part]) => [name, shared(share, part),
      records, tokens, held, rejected === '0' ? rejected : el('span', { class: 'warn' }, rejected), lag, el('span', { class: `tell ${kind}` }, told)]);
    return rows.length ? [table('Sources: share of the draws, what was read of each, what is left, and how it is', columns, filled, { class: 'cards' })]
      : [el('p', { class: 'quiet' }, 'no source is known yet')];
  });
}

function shared(text, part) {
  const bar = el('span', { class: 'part', 'aria-hidden': 'true' }, el('i'));
  bar.firstChild.style.inlineSize = `${Math.min(100, Math.max(0, 100 * (part || 0)))}%`;
  return el('span', { class: 'shared' }, bar, text);
}

// --- checkpoints

export function showCheckpoints(status, events, now) {
  const { commit, export: published, mirror, upload, verification } = status;
  const url = status.exports_url ?? '';
  const command = `anytimed pull ${quoted(url)} --to model`;
  const digest = published?.digest ?? published?.sha256;
  const recent = events.filter((event) => event.what === 'commit' || event.what === 'export').slice(-MOST_CHECKPOINTS).reverse();
  // In three parts: what the reader may have in hand, the command, stays while the others change.
  refill(by('pull'), command, () => [el('div', { class: 'copyable' },
    el('code', { id: 'command', tabindex: 0, role: 'group', 'aria-label': 'Command that pulls the newest export' }, command), copier(command))]);
  const key = JSON.stringify([published, commit, mirror?.commit, mirror?.url, upload?.checkpoint, verification, url]);
  refill(by('facts'), key, () => [
    ...fact('newest export', published ? el('code', {}, published.checkpoint ?? NONE) : 'none yet', published),
    ...(digest ? fact('digest', el('code', {}, digest)) : []),
    ...fact('published at', el('code', {}, url || NONE)),
    ...(upload ? fact('uploading', el('code', {}, upload.checkpoint), null, el('span', { class: 'quiet', id: 'upload' })) : []),
    ...fact('newest commit', commit ? el('code', {}, String(commit.path ?? '').split('/').slice(-2).join('/')) : 'none yet', commit),
    ...(mirror ? fact('mirror', el('code', {}, mirror.url), mirror.commit) : []),
    ...(verification ? fact('commits read again', verification.found, verification) : []),
  ]);
  refill(by('recent'), JSON.stringify(recent.map((e) => [e.id, e.step, e.time])), () => (recent.length ? [table(
    'Recent commits and exports, newest first', [['kind', ''], ['step', 'n'], ['what', 'words'], ['age', 'n']],
    recent.map((e) => [e.what, whole(e.step), el('code', {}, named(e)), ticking(e.time)]), { class: 'small', seen: true },
  )] : []));
  if (upload && by('upload')) {
    say(by('upload'), `${bytes(upload.done_bytes)} of ${bytes(upload.total_bytes)}, ${bytes(upload.bytes_per_s)}/s`);
  }
  tickAges(now);
}

const named = (e) => String(e.checkpoint ?? e.digest ?? String(e.path ?? '').split('/').at(-1) ?? '') || NONE;

function fact(name, value, dated = null, more = null) {
  const step = dated && Number.isFinite(dated.step) ? `step ${whole(dated.step)}, ` : '';
  const when = dated ? el('span', { class: 'quiet' }, ` ${step}`, ticking(dated.time), ' ago') : null;
  return [el('dt', {}, name), el('dd', {}, value, when, more)];
}

const ticking = (time) => el('time', { class: 'age', 'data-time': time, title: clock(time) });

export function tickAges(now) {
  for (const node of document.querySelectorAll('time.age')) say(node, duration(now - Number(node.dataset.time)));
}

function copier(text) {
  const button = el('button', { type: 'button', class: 'copy' }, 'Copy');
  button.addEventListener('click', async () => {
    try {
      await navigator.clipboard.writeText(text);
    } catch {
      // Only a secure page may write to the clipboard: select it, so that one key is left to press.
      getSelection().selectAllChildren(by('command'));
      say(button, 'Selected');
      return;
    }
    say(button, 'Copied');
    setTimeout(() => say(button, 'Copy'), 2000);
  });
  return button;
}

// --- events

export function showEvents(events, now) {
  const only = by('routine').checked;
  const shown = events.filter((event) => !only || !ROUTINE.has(event.what)).slice(-MOST_EVENTS).reverse();
  const last = shown[0];
  refill(by('events'), JSON.stringify([only, shown.length, last?.id, last?.time, last?.what]), () => [
    shown.length ? el('ol', { reversed: true }, ...shown.map((event) => entry(event, now))) : el('p', { class: 'quiet' }, 'none yet'),
  ]);
}

function entry(event, now) {
  const guard = GUARD.has(event.what);
  const kind = guard ? 'guard' : event.what === 'degraded' ? 'trouble' : ROUTINE.has(event.what) ? 'routine' : '';
  const time = typeof event.time === 'number' ? new Date(event.time * 1000).toISOString() : null;
  return el('li', { class: kind },
    el('time', { datetime: time, class: 'quiet' }, clock(event.time, now)),
    el('span', { class: 'what' }, guard ? `guard: ${event.what}` : String(event.what)),
    el('span', { class: 'told' }, event.told ?? plain(event)));
}

// Where a record brings no sentence: what it says, as it says it.
function plain(event) {
  const rest = Object.entries(event).filter(([key]) => !['kind', 'time', 'what', 'id', 'of'].includes(key));
  const value = (v) => (typeof v === 'number' ? (Number.isInteger(v) ? whole(v) : fixed(v, 4)) : typeof v === 'string' ? v : JSON.stringify(v));
  return rest.map(([key, v]) => `${key.replaceAll('_', ' ')}${NARROW}${value(v)}`).join(' · ');
}
