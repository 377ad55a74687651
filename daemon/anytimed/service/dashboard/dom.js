// Elements. What the daemon says enters as text only: there is no way in here for markup.

const SVG = 'http://www.w3.org/2000/svg';

export const by = (id) => document.getElementById(id);

// An element with attributes (null or false: left out) and children, which are elements or text.
export function el(tag, attributes = {}, ...children) {
  return filled(document.createElement(tag), attributes, children);
}

export function svg(tag, attributes = {}, ...children) {
  return filled(document.createElementNS(SVG, tag), attributes, children);
}

function filled(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === true) node.setAttribute(name, '');
    else if (value !== null && value !== false && value !== undefined) node.setAttribute(name, String(value));
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

// Touch the page only where something changes: a live region must not be read again for nothing.
export function say(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

// Replace the children where `key` is another than the last time.
const keys = new WeakMap();
export function refill(node, key, make) {
  if (keys.get(node) === key) return false;
  keys.set(node, key);
  node.replaceChildren(...make());
  return true;
}

// A table with a caption. columns: [name, class]; rows: lists of text or elements, the first the row's heading. Roles are
// given, for on a narrow screen the style makes lists of the rows, which would take a table's meaning away.
export function table(caption, columns, rows, options = {}) {
  const cell = (value, i) => {
    const [name, kind] = columns[i];
    const tag = i === 0 ? 'th' : 'td';
    const roles = i === 0 ? { role: 'rowheader', scope: 'row' } : { role: 'cell' };
    return el(tag, { ...roles, class: kind, 'data-label': name }, value);
  };
  const head = columns.map(([name, kind]) => el('th', { role: 'columnheader', scope: 'col', class: kind }, name));
  return el('table', { role: 'table', class: options.class },
    el('caption', { class: options.seen ? null : 'unseen' }, caption),
    el('thead', { role: 'rowgroup' }, el('tr', { role: 'row' }, ...head)),
    el('tbody', { role: 'rowgroup' }, ...rows.map((row) => el('tr', { role: 'row' }, ...row.map(cell)))));
}
