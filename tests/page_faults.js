() => {
  const faults = [];
  const parse = c => { const m = c.match(/rgba?\(([^)]+)\)/); const v = m ? m[1].split(/[ ,/]+/).map(Number) : [0, 0, 0, 0];
                       return v.length > 3 ? v : [...v, 1]; };
  const light = c => { const f = c.slice(0, 3).map(v => { v /= 255; return v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; });
                       return 0.2126 * f[0] + 0.7152 * f[1] + 0.0722 * f[2]; };
  const over = (top, under) => { const a = top[3]; return [0, 1, 2].map(i => top[i] * a + under[i] * (1 - a)).concat(1); };
  const behind = element => {
    const layers = [];
    for (let e = element; e; e = e.parentElement) { const c = parse(getComputedStyle(e).backgroundColor); if (c[3]) layers.push(c); if (c[3] === 1) break; }
    const canvas = parse(getComputedStyle(document.documentElement).backgroundColor);
    const dark = matchMedia('(prefers-color-scheme: dark)').matches && getComputedStyle(document.documentElement).colorScheme.includes('dark');
    let color = canvas[3] === 1 ? canvas : dark ? [18, 18, 18, 1] : [255, 255, 255, 1];
    for (const layer of layers.reverse()) color = over(layer, color);
    return color;
  };
  if (document.documentElement.scrollWidth > innerWidth) {
    const wide = [...document.body.querySelectorAll('*')].filter(e => e.getBoundingClientRect().right > innerWidth + 1)
      .map(e => e.tagName + '.' + e.className).slice(0, 4);
    faults.push('wider than the window: ' + document.documentElement.scrollWidth + ' of ' + innerWidth + ', ' + wide.join(' '));
  }
  for (const image of document.images) if (!image.hasAttribute('alt')) faults.push('image without alt: ' + image.src.slice(0, 60));
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  const seen = new Set();
  while (walker.nextNode()) {
    const text = walker.currentNode.textContent.trim(), element = walker.currentNode.parentElement;
    if (!text || !element.checkVisibility({opacityProperty: true, visibilityProperty: true}) || element.closest('script, style')) continue;
    const style = getComputedStyle(element), svg = element.closest('svg');
    const ink = over(parse(svg ? style.fill : style.color), behind(element)), paper = behind(element);
    const [a, b] = [light(ink), light(paper)].sort((x, y) => y - x);
    const contrast = (a + 0.05) / (b + 0.05);
    const name = element.tagName + '.' + element.getAttribute('class');
    if (contrast < 4.5 && !seen.has(name)) { seen.add(name); faults.push('contrast ' + contrast.toFixed(2) + ' of ' + name + ': ' + text.slice(0, 40)); }
  }
  return faults;
}
