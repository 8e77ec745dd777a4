"""The HTML that voters see, of the server and of the page alike. Everything works by forms alone; vote.js
adds keys, zoom and what a screen reader is told. Nothing here knows of models."""

from collections.abc import Mapping
from html import escape
from pathlib import Path

from pixart.evaluation.preference.study import Pair

FILES = {"/vote.css": "text/css; charset=utf-8", "/vote.js": "text/javascript; charset=utf-8"}
LONG = 110  # characters of a prompt that fit into a line, as in page.js
WORDS = {"left": "First", "right": "Second", "tie": "Tie"}  # keys 1, 2, 3
QUESTIONS = {
    "quality": ("Quality", "Which picture is better made? Details, style, no flaws."),
    "alignment": ("Alignment", "Which shows more of what the prompt says?"),
}
_SHARED = '<link rel="stylesheet" href="/vote.css">\n<script src="/vote.js" defer></script>'
_UNDO = '<button type="submit" class="quiet" accesskey="u">Undo the last vote</button>'


def file(place: str) -> bytes:
    """The contents of one of FILES."""
    return (Path(__file__).parent / place.removeprefix("/")).read_bytes()


def document(title: str, body: str, head: str = _SHARED) -> str:
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(title)}</title>
{head}
</head>
<body>
{body}
</body>
</html>
"""


def welcome(done: int, total: int) -> str:
    begin = "Go on" if done else "Begin"
    return document(
        "Which picture is better?",
        f"""<main class="text">
<h1>Which picture is better?</h1>
<p>You see a prompt and two pictures that were made from it, {total} times. Say for each two which is better
made, and which shows more of what the prompt says. There is no right answer; if you see no difference, it is
a tie. Stop whenever you like: this browser remembers where you were.</p>
{HOW}
{_so_far(done, total)}
<p><a class="button" href="/vote">{begin}</a></p>
<p class="small">What is kept: your answers, how long each took, whether you used a phone, and a random number
in a cookie that keeps your answers together. Nothing else: no name, no address.</p>
</main>""",
    )


HOW = """<ul>
<li><strong>Quality</strong>: which picture is better made? Details, realism or style as the prompt asks, no
flaws.</li>
<li><strong>Alignment</strong>: which shows more of what the prompt says? Things, how many, colours, where they
are, words.</li>
<li>On a keyboard: <kbd>1</kbd> first, <kbd>2</kbd> second, <kbd>3</kbd> tie, for quality and then for alignment;
<kbd>U</kbd> takes the last vote back, <kbd>Z</kbd> zooms into both pictures.</li>
</ul>"""


def ballot(pair: Pair, done: int, total: int, token: str) -> str:
    """A pair to vote on."""
    title = f"Pair {done + 1} of {total}"
    sources = {side: f"/picture/{getattr(pair, side)}" for side in ("left", "right")}
    hidden = _hidden({"token": token, "pair": pair.id})
    body = f"""<header>
<p class="where" id="where">{title}</p>
<progress max="{total}" value="{done}" aria-label="Pairs done"></progress>
</header>
<main>
{form(pair.prompt, sources, (pair.width, pair.height), hidden, ' method="post" action="/vote"')}
</main>
<footer>
<form method="post" action="/undo" id="undo">{_hidden({"token": token})}{_UNDO}</form>
<a href="/" class="quiet">How to vote</a>
<a href="/progress" class="quiet">Progress</a>
<label class="scripted"><input type="checkbox" id="keys" checked> Keys 1, 2, 3 vote</label>
</footer>
<p id="said" class="unseen" role="status" aria-live="polite"></p>"""
    return document(title, body)


def form(
    prompt: str, sources: Mapping[str, str], size: tuple[int, int], hidden: str, where: str
) -> str:
    """Prompt, two pictures and two questions. sources: addresses of "left" and "right"."""
    width, height = size
    figures = "\n".join(
        f"""<figure>
<a href="{escape(source)}" target="_blank" rel="noopener" title="Open alone, in full size">
<img id="{side}" src="{escape(source)}" width="{width}" height="{height}" alt="{WORDS[side]} picture"></a>
<figcaption>{WORDS[side]}</figcaption>
</figure>"""
        for side, source in sources.items()
    )
    questions = "\n".join(_question(name) for name in QUESTIONS)
    long = ' class="long"' if len(prompt) > LONG else ""
    return f"""<form id="ballot"{long}{where}>
{hidden}<h1><span class="label">Prompt</span> <span id="prompt" tabindex="0">{escape(prompt)}</span></h1>
<div class="pictures">
{figures}
</div>
<div class="questions">
{questions}
<div class="send"><button type="submit">Vote</button>
<button type="button" class="quiet scripted" id="zoom" aria-pressed="false">Zoom <kbd>Z</kbd></button></div>
</div>
</form>"""


def _question(name: str) -> str:
    title, asked = QUESTIONS[name]
    choices = "\n".join(
        f'<label><input type="radio" name="{name}" value="{side}" required> <span>{word} '
        f"<kbd>{number}</kbd></span></label>"
        for number, (side, word) in enumerate(WORDS.items(), start=1)
    )
    return f"""<fieldset id="{name}" aria-describedby="{name}-asked">
<legend>{title}</legend>
<p class="asked" id="{name}-asked">{asked}</p>
<div class="choices">
{choices}
</div>
</fieldset>"""


def finished(total: int, token: str) -> str:
    return document(
        "All done",
        f"""<main class="text">
<h1>All done</h1>
<p role="status">You have judged all {total} pairs. Thank you!</p>
<form method="post" action="/undo" id="undo">{_hidden({"token": token})}{_UNDO}</form>
<p><a href="/progress">Progress of all</a></p>
</main>""",
    )


def progress(done: int, total: int, votes: int, voters: int, spread: Mapping[int, int]) -> str:
    """How far the study is, of which nothing says who leads."""
    rows = "\n".join(
        f'<tr><th scope="row">{count}</th><td>{pairs}</td></tr>' for count, pairs in spread.items()
    )
    return document(
        "Progress",
        f"""<main class="text">
<h1>Progress</h1>
{_so_far(done, total)}
<p>{votes} vote{"" if votes == 1 else "s"} by {voters} voter{"" if voters == 1 else "s"} in all.</p>
<table>
<caption>How many pairs have how many votes</caption>
<thead><tr><th scope="col">Votes</th><th scope="col">Pairs</th></tr></thead>
<tbody>
{rows}
</tbody>
</table>
<p><a class="button" href="/vote">{"Go on" if done else "Begin"}</a></p>
</main>""",
    )


def error(reason: str) -> str:
    return document(
        "Something is wrong",
        f"""<main class="text">
<h1>Something is wrong</h1>
<p role="alert">{escape(reason)}</p>
<p><a class="button" href="/">To the beginning</a></p>
</main>""",
    )


def _so_far(done: int, total: int) -> str:
    return (
        f'<p>You: {done} of {total}. <progress max="{total}" value="{done}" '
        'aria-label="Pairs done"></progress></p>'
    )


def _hidden(values: Mapping[str, str]) -> str:
    return "".join(
        f'<input type="hidden" name="{name}" value="{escape(value)}">\n'
        for name, value in values.items()
    )
