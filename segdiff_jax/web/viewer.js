// Draws what viewer.py sends. Names of classes only ever become text, never markup.
const root = element.querySelector('.viewer');
const make = (tag, attributes = {}, text = '') => {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.textContent = text;
  return node;
};
const load = (url) => new Promise((done, failed) => {
  const image = new Image();
  image.onload = () => done(image);
  image.onerror = failed;
  image.src = url;
});
const pixels = (image) => {
  const canvas = make('canvas');
  [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
  const context = canvas.getContext('2d', { willReadFrequently: true });
  context.drawImage(image, 0, 0);
  return context.getImageData(0, 0, canvas.width, canvas.height).data;
};

async function show(text) {
  root.replaceChildren();
  if (!text) return;
  const found = JSON.parse(text);
  const { width, height, classes } = found;
  const images = ['photo', 'labels', 'uncertainty', 'scores'].map((k) => found[k] && load(found[k]));
  const [photo, labelImage, uncertainty, scoreImage] = await Promise.all(images);
  const labels = pixels(labelImage), scores = pixels(scoreImage);
  const [rows, columns, across] = found.grid;
  const hidden = new Set();
  let view = 'overlay', strength = 0.55, emphasised = -1;

  const canvas = make('canvas', { role: 'img', 'aria-label': 'Photo with the classes painted over' });
  [canvas.width, canvas.height] = [width, height];
  const tip = make('div', { class: 'tip', hidden: '' });
  const stage = make('div', { class: 'stage' });
  stage.append(canvas, tip);
  const context = canvas.getContext('2d');

  const layer = make('canvas');
  [layer.width, layer.height] = [width, height];
  function draw() {
    const top = layer.getContext('2d');
    const painted = top.createImageData(width, height);
    const alpha = view === 'classes' ? 255 : Math.round(255 * strength);
    for (let i = 0; i < width * height; i++) {
      const label = labels[4 * i];
      if (label >= classes.length || hidden.has(label)) continue;
      painted.data.set(classes[label].color, 4 * i);
      painted.data[4 * i + 3] = emphasised < 0 || emphasised === label ? alpha : alpha / 5;
    }
    top.putImageData(painted, 0, 0);
    context.globalAlpha = 1;
    if (view === 'uncertainty') return context.drawImage(uncertainty, 0, 0, width, height);
    if (view === 'classes') {
      context.fillStyle = '#000';
      context.fillRect(0, 0, width, height);
    } else context.drawImage(photo, 0, 0, width, height);
    if (view !== 'photo') context.drawImage(layer, 0, 0);
  }

  const views = [['overlay', 'Overlay'], ['classes', 'Classes'], ['photo', 'Photo']];
  if (uncertainty) views.push(['uncertainty', 'Uncertainty']);
  const bar = make('div', { class: 'views', role: 'group', 'aria-label': 'View' });
  for (const [name, title] of views) {
    const button = make('button', { type: 'button', 'aria-pressed': name === view }, title);
    button.onclick = () => {
      view = name;
      for (const other of bar.querySelectorAll('button')) {
        other.setAttribute('aria-pressed', other === button);
      }
      draw();
    };
    bar.append(button);
  }
  const strong = make('label', {}, 'Strength of the colours');
  const slider = make('input', { type: 'range', min: 0, max: 100, value: 100 * strength });
  slider.oninput = () => { strength = slider.value / 100; draw(); };
  strong.append(slider);
  bar.append(strong);

  const percent = (share) => `${(100 * share).toFixed(share < 0.1 ? 1 : 0)} %`;
  const legend = make('ul', { class: 'classes' });
  const order = classes.map((_, i) => i).sort((a, b) => classes[b].share - classes[a].share);
  for (const i of order) {
    const item = make('li');
    const label = make('label');
    const box = make('input', { type: 'checkbox' });
    box.checked = true;
    box.onchange = () => { hidden[box.checked ? 'delete' : 'add'](i); draw(); };
    const swatch = make('i', { style: `background: rgb(${classes[i].color.join(',')})` });
    const share = classes[i].share;
    const said = share ? percent(share) : 'not found';
    label.append(box, swatch, make('span', {}, classes[i].name), make('b', {}, said));
    item.append(label);
    if (!share) item.className = 'absent';
    item.onpointerenter = () => { emphasised = share ? i : -1; draw(); };
    item.onpointerleave = () => { emphasised = -1; draw(); };
    legend.append(item);
  }

  function score(i, u, v) {  // bilinear, half-pixel centres
    const x = Math.min(columns - 1, Math.max(0, u * columns - 0.5));
    const y = Math.min(rows - 1, Math.max(0, v * rows - 0.5));
    const [x0, y0] = [Math.floor(x), Math.floor(y)];
    const [x1, y1] = [Math.min(columns - 1, x0 + 1), Math.min(rows - 1, y0 + 1)];
    const left = (i % across) * columns, top = Math.floor(i / across) * rows;
    const at = (a, b) => scores[4 * ((top + b) * across * columns + left + a)] / 255;
    const mix = (a, b, part) => a + (b - a) * part;
    return mix(mix(at(x0, y0), at(x1, y0), x - x0), mix(at(x0, y1), at(x1, y1), x - x0), y - y0);
  }
  canvas.onpointermove = canvas.onpointerdown = (event) => {
    const box = canvas.getBoundingClientRect();
    const u = (event.clientX - box.left) / box.width, v = (event.clientY - box.top) / box.height;
    if (u < 0 || v < 0 || u >= 1 || v >= 1) return;
    const label = labels[4 * (Math.floor(v * height) * width + Math.floor(u * width))];
    const best = classes.map((c, i) => [score(i, u, v), i]).sort((a, b) => b[0] - a[0]).slice(0, 5);
    tip.replaceChildren(make('strong', {}, label < classes.length ? classes[label].name : 'none of them'));
    for (const [value, i] of best) {
      const line = make('div');
      const meter = make('i');
      meter.style.width = `${100 * value}%`;
      meter.style.background = `rgb(${classes[i].color.join(',')})`;
      line.append(make('span', {}, classes[i].name), make('b', {}, value.toFixed(2)), meter);
      tip.append(line);
    }
    tip.hidden = false;
    const [x, y] = [event.clientX - box.left, event.clientY - box.top];
    tip.style.left = `${Math.max(0, x > box.width / 2 ? x - tip.offsetWidth - 14 : x + 14)}px`;
    tip.style.top = `${Math.max(0, Math.min(box.height - tip.offsetHeight, y + 14))}px`;
  };
  // A finger leaves as soon as it is lifted: what it touched stays readable.
  canvas.onpointerleave = (event) => { if (event.pointerType === 'mouse') tip.hidden = true; };

  root.append(bar, stage, legend);
  const rest = 1 - classes.reduce((sum, one) => sum + one.share, 0);
  if (rest > 0.0005) root.append(make('p', { class: 'rest' }, `none of them: ${percent(rest)}`));
  draw();
}
show(props.value);
watch('value', () => show(props.value));
