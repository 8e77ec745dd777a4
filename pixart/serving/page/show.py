"""What the page shows of jobs, as HTML. Whatever a client wrote is escaped."""

from collections.abc import Iterator
from html import escape
from itertools import islice

from pixart.serving.orders import Job, Preview, Result
from pixart.serving.page.command_line import command_of
from pixart.serving.page.reading import metadata_of

SHOWN = 60  # pictures in the gallery
_STAGES = {
    "load": "Getting the model ready", "text": "Reading the prompt", "denoise": "Drawing",
    "decode": "Finishing", "write": "Finishing",
}  # fmt: skip
EMPTY = '<p class="hint">What you draw is shown here.</p>'


def image_of(job: Job, number: int) -> str:
    return f"/v1/jobs/{job.id}/images/{number}"


def now(job: Job | None) -> str:
    """The job that is followed: how far it is, and its picture so far."""
    if job is None:
        return EMPTY
    bar = "" if job.has_ended else (
        f'<progress aria-label="Progress" max="1" value="{job.progress:.3f}"></progress>'
    )  # fmt: skip
    return (
        f'<div class="now" data-state="{job.state}" data-job="{escape(job.id)}">'
        f'<p role="status">{escape(said(job))}</p>{bar}{_picture(job)}{_remarks(job)}</div>'
    )


def _remarks(job: Job) -> str:
    return "".join(f'<p class="hint">{escape(one)}</p>' for one in job.remarks)


def said(job: Job) -> str:
    """One line on how a job stands, for people."""
    count = len(job.order.requests)
    if job.state == "waiting":
        before = {0: "yours is next", 1: "1 order is before yours"}
        return f"Waiting: {before.get(job.position, f'{job.position} orders are before yours')}"
    if job.state == "drawing":
        which = f"picture {job.picture + 1} of {count}, " if count > 1 else ""
        at = f"step {job.step} of {job.steps}" if job.steps else "…"
        return f"{_STAGES.get(job.stage, 'Drawing')}: {which}{at}"
    if job.state == "done":
        seconds = sum(sum(one.seconds.values()) for one in job.results)
        return f"Done in {seconds:.1f} s" + (f": {count} pictures" if count > 1 else "")
    if job.state == "failed":
        return f"Not drawn: {job.error}"
    return "Cancelled" + (f": {len(job.results)} of {count} were finished" if job.results else "")


def _picture(job: Job) -> str:
    prompt = _described(_prompt(job, job.picture))
    if not job.has_ended and job.preview is not None:
        return (
            f'<img class="preview" alt="So far: {prompt}" width="{job.preview.width}" '
            f'height="{job.preview.height}" {_ratio(job.preview)} '
            f'src="/v1/jobs/{escape(job.id)}/preview?version={job.version}">'
        )
    if not job.results:
        return ""
    number = len(job.results) - 1
    result = job.results[number]
    return (
        f'<a href="{image_of(job, number)}" target="_blank" rel="noopener">'
        f'<img class="picture" alt="{_described(result.request.prompt)}" width="{result.width}" '
        f'height="{result.height}" {_ratio(result)} src="{image_of(job, number)}"></a>'
        f"{_tools(job, number, result)}"
    )


def _ratio(picture: Preview | Result) -> str:
    """So that the style can say how wide it is where it may be so high."""
    return f'style="--ratio: {picture.width / picture.height:.4f}"'


def _prompt(job: Job, number: int) -> str:
    requests = job.order.requests
    return requests[min(number, len(requests) - 1)].prompt


def _described(prompt: str) -> str:
    """What a picture, and the link around it, is called; never nothing."""
    return escape(prompt if prompt.strip() else "No prompt")


def gallery(jobs: list[Job]) -> str:
    """The pictures of one client, the newest first."""
    found = list(islice(_figures(jobs), SHOWN))
    if not found:
        return '<p class="hint">No pictures yet.</p>'
    return f'<ul class="gallery">{"".join(found)}</ul>'


def _figures(jobs: list[Job]) -> Iterator[str]:
    for job in reversed(jobs):
        for number in reversed(range(len(job.results))):
            result = job.results[number]
            prompt = _described(result.request.prompt)
            yield (
                f'<li><figure><a href="{image_of(job, number)}" target="_blank" rel="noopener">'
                f'<img loading="lazy" alt="{prompt}" width="{result.width}" height="{result.height}" '
                f'src="{image_of(job, number)}"></a><figcaption><span>{prompt}</span>'
                f"{_tools(job, number, result)}</figcaption></figure></li>"
            )


def _tools(job: Job, number: int, result: Result) -> str:
    name = f"{result.request.seed}-{job.id[:8]}-{number}.{result.format}"
    of = f"of seed {result.request.seed}"
    place = f'data-job="{escape(job.id)}" data-number="{number}"'
    command = escape(command_of(metadata_of(result.content)))
    return (
        f'<div class="tools"><span class="facts">{result.width} × {result.height}, seed {result.request.seed}'
        f'</span><a class="download" download="{escape(name)}" href="{image_of(job, number)}" '
        f'aria-label="Download the picture {of}">Download</a>'
        f'<button type="button" class="again" {place} aria-label="Take the settings {of}">Settings</button>'
        f'<button type="button" class="begin" {place} aria-label="Begin with the picture {of}">Begin with it'
        f'</button><button type="button" class="copy" data-command="{command}" '
        f'aria-label="Copy the command line {of}">Copy command</button></div>'
    )
