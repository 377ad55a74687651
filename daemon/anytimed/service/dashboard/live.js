// How the page stays current: server-sent events; where there are none, or they break off, it asks every two seconds.

const POLL_MS = 2000;
const HISTORY_MS = 6000;
const SILENT_MS = 6000;
const AGAIN_MS = 15000;
const LOST_MS = 5000;
const TIMEOUT_MS = 5000;

export class Live {
  // say: { status(json), history(json), record(kind, json) -> false to have the history asked for again, contact() }
  // since: () -> the time from which on the history is wanted
  constructor(points, since, say) {
    this.points = points;
    this.since = since;
    this.say = say;
    this.heardAt = null; // milliseconds, of performance.now()
    this.streaming = false;
    this.lost = false;
    this.asking = false;
    this.historyAt = 0;
    this.wanted = 0;
  }

  async start() {
    await Promise.allSettled([this.askStatus(), this.askHistory()]);
    this.connect();
    setInterval(() => this.look(), 1000);
    document.addEventListener('visibilitychange', () => (document.hidden ? this.disconnect() : this.connect()));
  }

  silentFor() {
    return this.heardAt === null ? null : (performance.now() - this.heardAt) / 1000;
  }

  heard() {
    this.heardAt = performance.now();
    if (this.lost) {
      this.lost = false;
      this.say.back();
      this.askHistory();
    }
    this.say.contact();
  }

  // A browser has six connections to a host, for all of its windows: one that nobody looks at takes none.
  disconnect() {
    clearTimeout(this.again);
    this.stream?.close();
    this.stream = null;
    this.streaming = false;
  }

  connect() {
    this.disconnect();
    const stream = new EventSource('events');
    this.stream = stream;
    stream.onopen = () => {
      const again = this.opened;
      this.streaming = this.opened = true;
      this.heard();
      if (again) this.askHistory(); // what was missed
    };
    stream.addEventListener('status', (event) => {
      this.heard();
      this.say.status(JSON.parse(event.data));
    });
    for (const kind of ['step', 'evaluation', 'event']) {
      stream.addEventListener(kind, (event) => {
        this.heard();
        if (this.say.record(kind, JSON.parse(event.data)) === false) this.askHistory();
      });
    }
    stream.onerror = () => {
      this.streaming = false;
      // The browser tries again where a connection broke off, and gives up where the answer was no stream.
      if (stream.readyState === EventSource.CLOSED) this.again = setTimeout(() => this.connect(), AGAIN_MS);
      this.look();
    };
  }

  // Once a second: whether there is something to ask, or nothing heard for too long.
  look() {
    const silent = this.heardAt === null ? Infinity : performance.now() - this.heardAt;
    if (silent > (this.streaming ? SILENT_MS : POLL_MS - 500)) this.askStatus();
    if (!this.streaming && !document.hidden && silent < LOST_MS && performance.now() - this.historyAt > HISTORY_MS) this.askHistory();
    if (silent > LOST_MS + (this.streaming ? SILENT_MS : 0)) this.lost = true;
    this.say.contact();
  }

  async askStatus() {
    if (this.asking) return;
    this.asking = true;
    try {
      const status = await get('status');
      this.heard();
      this.say.status(status);
    } catch {
      this.say.contact();
    } finally {
      this.asking = false;
    }
  }

  async askHistory() {
    this.historyAt = performance.now();
    const wanted = ++this.wanted;
    try {
      const since = this.since();
      const history = await get(`history?points=${this.points}${since ? `&since=${since.toFixed(3)}` : ''}`);
      if (wanted === this.wanted) this.say.history(history);
    } catch {
      this.say.contact();
    }
  }
}

async function get(url) {
  const answer = await fetch(url, { signal: AbortSignal.timeout(TIMEOUT_MS), cache: 'no-store' });
  if (!answer.ok) throw new Error(`${url}: ${answer.status}`);
  return answer.json();
}
