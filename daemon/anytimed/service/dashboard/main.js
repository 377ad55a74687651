// Starts the page: what is asked for, what is drawn when, and what the reader chose.

import { Charts } from './charts.js';
import { by, say } from './dom.js';
import { duration } from './format.js';
import { Live } from './live.js';
import { Model, POINTS } from './model.js';
import { showCheckpoints, showEvents, showFigures, showSince, showSources, showState, tickAges } from './panels.js';

const DRAW_MS = 400;
const STALE_S = 20;
const model = new Model();
const charts = new Charts(by('charts'));
let drawn = null;
let drawnAt = 0;
let pending = false;
let rendered = false;

const chosen = (name) => document.querySelector(`input[name="${name}"]:checked`).value;
const since = () => (chosen('window') ? model.now() - Number(chosen('window')) : 0);

const live = new Live(POINTS, since, {
  status(status) {
    model.told(status);
    showState(status, model.now());
    showSources(status);
    tick();
    mark();
  },
  history(history) {
    model.remembered(history);
    draw();
    mark();
  },
  record(kind, record) {
    const taken = model.add(kind, record);
    soon();
    return taken;
  },
  contact: contact,
  back() {
    model.forgetClock();
  },
});

// Not more often than the eye follows.
function soon() {
  if (pending) return;
  pending = true;
  setTimeout(() => requestAnimationFrame(() => {
    pending = false;
    draw();
  }), Math.max(0, drawnAt + DRAW_MS - performance.now()));
}

function draw() {
  if (model.history === null) return;
  drawnAt = performance.now();
  const key = `${model.version} ${chosen('axis')}`;
  if (key === drawn) return;
  drawn = key;
  charts.show(model.history, chosen('axis'));
  showEvents(model.history.events, model.now());
  if (model.status) showCheckpoints(model.status, model.history.events, model.now());
}

// Ages go on between two statuses.
function tick() {
  const { status } = model;
  if (status === null) return;
  const now = model.now();
  showFigures(status, now);
  showSince(status, now);
  showCheckpoints(status, model.history?.events ?? [], now);
  tickAges(now);
}

function contact() {
  const silent = live.silentFor();
  document.body.classList.toggle('stale', live.lost);
  by('lost').hidden = !live.lost;
  say(by('contact'), live.lost ? 'not connected' : live.streaming ? 'live' : silent === null ? 'connecting' : 'asking every 2 s');
  by('contact').className = live.lost ? 'bad' : 'quiet';
  const late = model.status === null ? 0 : model.now() - model.status.time;
  say(by('heard'), live.lost ? ` · last heard ${silent === null ? 'never' : `${duration(silent)} ago`}`
    : late > STALE_S ? ` · the loop has not reported for ${duration(late)}` : '');
}

function mark() {
  if (rendered || model.status === null || model.history === null) return;
  rendered = true;
  requestAnimationFrame(() => setTimeout(() => performance.mark('rendered')));
}

// --- what the reader chooses

const remembered = {
  get: (key) => { try { return localStorage.getItem(key); } catch { return null; } },
  set: (key, value) => { try { localStorage.setItem(key, value); } catch { /* a private window may keep nothing */ } },
};

function choose(scheme) {
  if (scheme) document.documentElement.dataset.scheme = scheme;
  else delete document.documentElement.dataset.scheme;
}

by('scheme').value = ['light', 'dark'].includes(remembered.get('scheme')) ? remembered.get('scheme') : '';
choose(by('scheme').value);
by('scheme').addEventListener('change', () => {
  choose(by('scheme').value);
  remembered.set('scheme', by('scheme').value);
});
by('axis').addEventListener('change', draw);
by('window').addEventListener('change', () => live.askHistory());
by('routine').addEventListener('change', () => model.history && showEvents(model.history.events, model.now()));

setInterval(() => {
  tick();
  contact();
}, 1000);
live.start();
