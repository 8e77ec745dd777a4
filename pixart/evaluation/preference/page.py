"""`preference page`: the study as one HTML file for voters whom no server reaches. It keeps votes in the
browser; the voter saves them as votes.json and sends that. Made of the same form as the server's pages."""

import base64
import hashlib
import json
import shutil
from pathlib import Path

from pixart.evaluation.preference import pages
from pixart.evaluation.preference.adding import FORMAT
from pixart.evaluation.preference.options import Page
from pixart.evaluation.preference.study import (
    PICTURES,
    SIDES,
    Study,
    check_pictures,
    read_study,
)
from pixart.files import check_writable, write_bytes, written_aside

MOST_INLINED = 2**28  # bytes of pictures: browsers take long over more, and mail takes none
KINDS = {"inlined": "data:", "beside": "'self' file: data:"}


def write_page(options: Page) -> str:
    """Write the page; returns a sentence. ValueError where pictures are missing, or too large to be in it."""
    study = read_study(options.study)
    check_pictures(study)
    if options.beside:
        return _write_beside(study, options.output or study.folder / "page")
    output = options.output or study.folder / "page.html"
    if output.is_dir():
        raise ValueError(f"--output must be a file, got the folder {output}; or give --beside")
    size = sum(study.picture(name).stat().st_size for name in study.pictures)
    if size > MOST_INLINED:
        raise ValueError(
            f"{output}: the pictures have {size / 1e6:,.0f} MB, at most {MOST_INLINED / 1e6:,.0f} go into a "
            "page; give --beside"
        )
    check_writable(output)
    content = page(
        study, {name: _inlined(study.picture(name)) for name in study.pictures}, "inlined"
    )
    write_bytes(output, content.encode())
    return (
        f"{output}: {len(study.pairs)} pairs, {len(content) / 1e6:.1f} MB; what voters save, votes.json, "
        "is taken in by `add`"
    )


def _write_beside(study: Study, folder: Path) -> str:
    if folder.exists() and not (folder / "index.html").is_file() and any(folder.iterdir()):
        raise ValueError(f"--output must be a new folder, {folder} holds something else")
    with written_aside(folder) as aside:
        aside.mkdir()
        shutil.copytree(study.folder / PICTURES, aside / PICTURES)
        sources = {name: f"{PICTURES}/{name}" for name in study.pictures}
        (aside / "index.html").write_text(page(study, sources, "beside"), encoding="utf-8")
    return f"{folder}/index.html: {len(study.pairs)} pairs; give voters the whole folder"


def _inlined(path: Path) -> str:
    return f"data:image/jpeg;base64,{base64.b64encode(path.read_bytes()).decode()}"


def page(study: Study, sources: dict[str, str], kind: str) -> str:
    """The HTML. sources: the address of each picture. kind: of KINDS."""
    here = Path(__file__).parent
    style = (here / "vote.css").read_text(encoding="utf-8")
    scripts = [(here / name).read_text(encoding="utf-8") for name in ("vote.js", "page.js")]
    data = {
        "format": FORMAT,
        "study": study.id,
        "pairs": [
            {"id": pair.id, "prompt": pair.prompt, "width": pair.width, "height": pair.height,
             **{side: sources[getattr(pair, side)] for side in SIDES}}
            for pair in study.pairs
        ],
    }  # fmt: skip
    # "</script>" in a prompt would end the element.
    text = json.dumps(data, ensure_ascii=False).replace("<", "\\u003c")
    policy = (
        f"default-src 'none'; img-src {KINDS[kind]}; style-src {_hashed(style)}; "
        f"script-src {' '.join(map(_hashed, scripts))}; base-uri 'none'; form-action 'none'"
    )
    head = f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n<style>{style}</style>'
    form = pages.form("", {"left": "data:,", "right": "data:,"}, (1, 1), "", "")
    inline = "".join(f"<script>{script}</script>\n" for script in scripts)
    body = _BODY.format(how=pages.HOW, form=form, total=len(study.pairs))
    body += f'<script type="application/json" id="data">{text}</script>\n{inline}'
    return pages.document("Which picture is better?", body, head)


def _hashed(content: str) -> str:
    digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
    return f"'sha256-{digest}'"


_BODY = """<noscript><main class="text"><h1>Which picture is better?</h1><p>This page keeps votes by JavaScript,
which is off. Allow it for this page, or ask whoever sent it for an address where you can vote without.</p>
</main></noscript>
<header class="scripted">
<p class="where" id="where">Pair 1 of {total}</p>
<progress id="bar" max="{total}" value="0" aria-label="Pairs done"></progress>
</header>
<main class="scripted">
{form}
<section id="done" class="text" hidden><h1 tabindex="-1">All done</h1>
<p>You have judged all {total} pairs. Save votes.json, and send it to whoever gave you this page. Thank you!</p>
</section>
<p id="lost" role="alert" hidden>This browser does not let the page keep anything: save votes.json before you
close it.</p>
</main>
<footer class="scripted">
<form id="undo"><button type="submit" class="quiet">Undo the last vote</button></form>
<button type="button" class="quiet" id="save">Save votes.json</button>
<details><summary>How to vote</summary>{how}</details>
<label class="scripted"><input type="checkbox" id="keys" checked> Keys 1, 2, 3 vote</label>
</footer>
<p id="said" class="unseen" role="status" aria-live="polite"></p>
"""
