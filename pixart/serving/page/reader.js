// Settings out of a picture: chosen here, or dropped anywhere on the page. The beginning of a PNG or JPEG
// has them; WebP has them at its end.
const input = element.querySelector('input');
const read = file => {
  const part = file.type == 'image/webp' ? file : file.slice(0, 2 ** 20);
  const reader = new FileReader();
  reader.onload = () => { props.value = reader.result; trigger('submit', ''); };
  reader.readAsDataURL(part);
};
input.addEventListener('change', () => {
  if (input.files[0]) read(input.files[0]);
  input.value = '';
});
document.addEventListener('dragover', event => {
  if ([...event.dataTransfer.types].includes('Files')) event.preventDefault();
});
document.addEventListener('drop', event => {
  if (!event.dataTransfer.files[0]) return;
  event.preventDefault();
  read(event.dataTransfer.files[0]);
});
