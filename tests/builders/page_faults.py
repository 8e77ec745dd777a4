"""SCRIPT: JavaScript that returns what is wrong with a page, a line each, for readers who do not see it as it
was drawn: the basics of WCAG 2.2 A and AA that a program can tell. It reads computed styles, so it holds for
the colour scheme and width that are shown.

Contrast is (L1 + 0.05) / (L2 + 0.05) of relative luminances: 4.5 at least, 3 for large letters (24 px, or
18.66 px and bold) and for what controls are drawn with.
"""

SCRIPT = r"""
const faults = [];
const say = (what, one) => faults.push(one ? `${what}: <${one.tagName.toLowerCase()}${
  one.id ? '#' + one.id : ''}> ${(one.textContent || one.outerHTML).trim().slice(0, 60)}` : what);
const all = query => [...document.querySelectorAll(query)];
const shown = one => one.checkVisibility({checkOpacity: true, checkVisibilityCSS: true});

// The document.
if (!document.documentElement.lang) say('no language');
if (!document.title.trim()) say('no title');
if (!document.querySelector('meta[name=viewport]')) say('no viewport');
if (/user-scalable\s*=\s*no|maximum-scale/.test(
  document.querySelector('meta[name=viewport]')?.content || '')) say('cannot be zoomed');
for (const one of ['main', 'h1'])
  if (all(one).filter(shown).length != 1) say(`${all(one).length} of <${one}>, must be one`);
const ids = all('[id]').map(one => one.id);
for (const id of new Set(ids))
  if (ids.filter(other => other == id).length > 1) say(`id ${id} is there more than once`);
for (const one of all('a[href^="#"]')) {
  const id = decodeURIComponent(one.getAttribute('href').slice(1));
  if (id && !document.getElementById(id)) say(`leads to #${id}, which is not there`, one);
}
for (const one of all('[aria-labelledby], [aria-describedby], label[for]'))
  for (const name of ['aria-labelledby', 'aria-describedby', 'for'])
    for (const id of (one.getAttribute(name) || '').split(/\s+/).filter(Boolean))
      if (!document.getElementById(id)) say(`${name} names #${id}, which is not there`, one);

// Headings go down one step at a time.
let level = 0;
for (const one of all('h1, h2, h3, h4, h5, h6').filter(shown)) {
  const now = Number(one.tagName[1]);
  if (now > level + 1) say(`h${now} after h${level}`, one);
  if (!one.textContent.trim()) say('empty heading', one);
  level = now;
}

// Tables.
for (const one of all('table').filter(shown)) {
  if (!one.caption?.textContent.trim()) say('table without caption', one);
  if (![...one.querySelectorAll('th')].some(th => th.scope)) say('table without scopes', one);
}
for (const one of all('th')) if (!one.scope) say('header without scope', one);

// Names of what can be used, and words for pictures.
const named = one => (one.getAttribute('aria-label') || one.getAttribute('title') || one.textContent
  || (one.labels && [...one.labels].map(l => l.textContent).join('')) || one.alt || one.value
  || [...one.querySelectorAll('img')].map(i => i.alt).join('')
  || (one.getAttribute('aria-labelledby') || '').split(/\s+/)
       .map(id => document.getElementById(id)?.textContent || '').join('')).trim();
for (const one of all('a[href], button, input:not([type=hidden]), select, textarea, summary'))
  if (!named(one)) say('has no name', one);
for (const one of all('input:not([type=hidden]):not([type=submit]):not([type=button]), select, textarea'))
  if (!one.labels?.length && !one.getAttribute('aria-label') && !one.getAttribute('aria-labelledby'))
    say('has no label', one);
for (const one of all('img')) if (!one.hasAttribute('alt')) say('picture without alt', one);
for (const one of all('img')) if (one.complete && !one.naturalWidth && one.loading != 'lazy')
  say(`picture does not load (${one.getAttribute('src')})`, one);
for (const one of all('svg'))
  if (one.getAttribute('aria-hidden') != 'true' && !(one.getAttribute('role') == 'img' &&
      (one.getAttribute('aria-label') || one.getAttribute('aria-labelledby') ||
       one.querySelector('title')))) say('drawing without role and name', one);
for (const one of all('[tabindex]')) if (one.tabIndex > 0) say('jumps the order of Tab', one);
for (const one of all('figure')) if (!one.closest('[aria-hidden=true]') && !one.querySelector('img, svg'))
  say('empty figure', one);

// What scrolls by itself can be scrolled with a keyboard.
for (const one of all('body *').filter(shown)) {
  const style = getComputedStyle(one);
  if (/auto|scroll/.test(style.overflowX) && one.scrollWidth > one.clientWidth + 1 && one.tabIndex < 0
      && !one.querySelector('a[href], button, input')) say('scrolls, but not with a keyboard', one);
}

// Contrast.
const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
const rgba = colour => {
  canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
  const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data;
  return [r, g, b, a / 255];
};
const over = (top, under) => [0, 1, 2].map(k => top[k] * top[3] + under[k] * (1 - top[3])).concat(1);
const behind = one => {
  const layers = [];
  for (let at = one; at; at = at.parentElement) {
    const style = getComputedStyle(at);
    if (style.backgroundImage != 'none') return null;
    layers.push(rgba(style.backgroundColor));
  }
  const scheme = getComputedStyle(document.documentElement).colorScheme;
  const base = /dark/.test(scheme) && matchMedia('(prefers-color-scheme: dark)').matches
    ? [18, 18, 18, 1] : [255, 255, 255, 1];
  return layers.reverse().reduce((under, top) => over(top, under), base);
};
const luminance = c => [0.2126, 0.7152, 0.0722].reduce((sum, weight, k) => {
  const v = c[k] / 255;
  return sum + weight * (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
}, 0);
const contrast = (a, b) => {
  const [x, y] = [luminance(a), luminance(b)].sort((p, q) => q - p);
  return (x + 0.05) / (y + 0.05);
};
const seen = new Set();
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walker.nextNode()) {
  const one = walker.currentNode.parentElement;
  if (!walker.currentNode.textContent.trim() || seen.has(one) || !shown(one)) continue;
  seen.add(one);
  const box = one.getBoundingClientRect();
  if (box.width <= 1 || box.height <= 1) continue;  // for screen readers alone
  const under = behind(one);
  if (!under) continue;
  const style = getComputedStyle(one);
  const inside = one.closest('svg');
  let opacity = 1;
  for (let at = one; at; at = at.parentElement) opacity *= Number(getComputedStyle(at).opacity);
  const top = rgba(inside ? style.fill : style.color);
  top[3] *= opacity;
  const size = parseFloat(style.fontSize), bold = Number(style.fontWeight) >= 700;
  const least = size >= 24 || (bold && size >= 18.66) ? 3 : 4.5;
  const found = contrast(over(top, under), under);
  if (found < least - 0.005 && !one.closest('[disabled], [aria-disabled=true]'))
    say(`contrast ${found.toFixed(2)}, must be ${least}`, one);
}
return faults;
"""
