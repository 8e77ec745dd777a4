// What the page does by itself: keys, the die, what the buttons below pictures do.
(() => {
  const say = text => { document.querySelector('#told p')?.replaceChildren(text); };
  const press = id => document.getElementById(id)?.click();
  const write = (id, text) => {
    const field = document.querySelector(`#${id} textarea, #${id} input`);
    field.value = text;
    field.dispatchEvent(new Event('input', {bubbles: true}));
  };

  document.addEventListener('keydown', event => {
    if (event.key == 'Enter' && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      press('draw');
    }
  }, true);

  const copy = async text => {
    try { await navigator.clipboard.writeText(text); return true; } catch { /* only where it is secure */ }
    const area = document.createElement('textarea');
    area.value = text;
    document.body.append(area);
    area.select();
    const done = document.execCommand('copy');
    area.remove();
    return done;
  };

  document.addEventListener('click', async event => {
    const button = event.target.closest('button');
    if (!button) return;
    if (button.id == 'die') write('seed', String(crypto.getRandomValues(new Uint32Array(1))[0]));
    if (button.matches('.tools .copy')) {
      const done = await copy(button.dataset.command);
      say(done ? 'The command line is copied.' : button.dataset.command);
    }
    if (button.matches('.tools .begin')) {
      const {job, number} = button.dataset;
      const answer = await fetch(`/v1/jobs/${job}/images/${number}`);
      if (!answer.ok) return say('The picture is not kept any longer.');
      const group = document.getElementById('begin-group');
      if (!document.querySelector('#begin .stage')) group.querySelector('button').click();
      await until(() => document.querySelector('#begin .stage'));
      document.querySelector('#begin .stage').dispatchEvent(
        new CustomEvent('pixart-open', {detail: await answer.blob(), bubbles: true}));
      say('The picture is taken to begin with.');
    }
  });

  const until = async there => {
    for (let k = 0; k < 100 && !there(); k++) await new Promise(done => setTimeout(done, 20));
  };

  // Gradio's drawings tell nothing that is not beside them in words.
  const hush = () => {
    document.querySelectorAll('svg:not([aria-hidden])').forEach(one => one.setAttribute('aria-hidden', 'true'));
    for (const keys of ['numeric', 'decimal'])
      document.querySelectorAll(`.${keys} :is(input, textarea)`).forEach(one => { one.inputMode = keys; });
    for (const one of document.querySelectorAll('[id]')) if (!one.id) one.removeAttribute('id');
  };
  new MutationObserver(hush).observe(document.documentElement, {
    childList: true, subtree: true, attributes: true, attributeFilter: ['id', 'aria-hidden'],
  });
})();
