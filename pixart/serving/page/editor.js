// A picture to begin with or to go by, and its mask. element, props, trigger, watch: given by gr.HTML.
const find = query => element.querySelector(query);
const [stage, canvas, file, note] = ['.stage', 'canvas', 'input[type=file]', '.note'].map(find);
const [brushes, paint, brush] = ['.brushes', '.paint', '.brush'].map(find);
const context = canvas.getContext('2d');
const img = new Image();
img.alt = canvas.dataset.what;
let source = null, strokes = [], stroke = null;

const maskFile = () => {
  if (!strokes.length) return null;
  const mask = document.createElement('canvas');
  [mask.width, mask.height] = [canvas.width, canvas.height];
  const on = mask.getContext('2d');
  on.fillRect(0, 0, mask.width, mask.height);
  strokes.forEach(one => draw(on, one, '#fff'));
  return mask.toDataURL('image/png');
};
const keep = () => {
  props.value = source ? JSON.stringify({image: source, mask: maskFile()}) : '';
  trigger('input', '');
};
const draw = (on, one, colour) => {
  on.strokeStyle = on.fillStyle = colour;
  on.lineWidth = one.width;
  on.lineCap = on.lineJoin = 'round';
  on.beginPath();
  one.points.forEach(([x, y], k) => k ? on.lineTo(x, y) : on.moveTo(x, y));
  if (one.points.length == 1) on.lineTo(one.points[0][0] + 0.01, one.points[0][1]);
  on.stroke();
};
const redraw = () => {
  context.clearRect(0, 0, canvas.width, canvas.height);
  strokes.forEach(one => draw(context, one, '#e5007d'));
};
const show = () => { stage.hidden = brushes.hidden = !source; };
const remove = () => {
  [source, strokes, file.value, note.textContent] = [null, [], '', ''];
  img.remove();
  show();
};
const open = blob => {
  const limit = Number(document.getElementById('limits')?.dataset.picture || 1e7);
  if (blob.size > limit) {
    note.textContent = `The picture has ${(blob.size / 1e6).toFixed(1)} MB; ${(limit / 1e6).toFixed(1)} ` +
      'MB are the most that can be sent';
    return;
  }
  const reader = new FileReader();
  reader.onload = () => {
    img.onload = () => {
      source = reader.result;
      stage.prepend(img);
      strokes = [];
      [canvas.width, canvas.height] = [img.naturalWidth, img.naturalHeight];
      note.textContent = `${img.naturalWidth} × ${img.naturalHeight} pixels`;
      show(); redraw(); keep();
    };
    img.onerror = () => { remove(); keep(); note.textContent = 'This is not a picture that a browser shows'; };
    img.src = reader.result;
  };
  reader.readAsDataURL(blob);
};
const at = event => {
  const box = canvas.getBoundingClientRect();
  return [(event.clientX - box.left) / box.width * canvas.width,
          (event.clientY - box.top) / box.height * canvas.height];
};

file.addEventListener('change', () => file.files[0] && open(file.files[0]));
element.addEventListener('dragover', event => event.preventDefault());
element.addEventListener('drop', event => {
  event.preventDefault();
  event.stopPropagation();  // elsewhere on the page it gives its settings
  if (event.dataTransfer.files[0]) open(event.dataTransfer.files[0]);
});
element.addEventListener('pixart-open', event => open(event.detail));
find('.remove').addEventListener('click', () => { remove(); keep(); file.focus(); });
watch('value', () => { if (!props.value && source) remove(); });

if (paint) {
  paint.addEventListener('change', () => canvas.classList.toggle('on', paint.checked));
  find('.undo').addEventListener('click', () => { strokes.pop(); redraw(); keep(); });
  find('.clear').addEventListener('click', () => { strokes = []; redraw(); keep(); });
  canvas.addEventListener('pointerdown', event => {
    if (!paint.checked) return;
    canvas.setPointerCapture(event.pointerId);
    const width = Math.max(1, brush.value / 100 * Math.min(canvas.width, canvas.height) / 2);
    stroke = {width, points: [at(event)]};
    strokes.push(stroke);
    redraw();
  });
  canvas.addEventListener('pointermove', event => {
    if (!stroke) return;
    stroke.points.push(at(event));
    redraw();
  });
  const end = () => { if (stroke) { stroke = null; keep(); } };
  canvas.addEventListener('pointerup', end);
  canvas.addEventListener('pointercancel', end);
}
