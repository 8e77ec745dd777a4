"""A picture that stays in the browser until it is drawn with, and a brush for its mask."""

from html import escape
from importlib.resources import files

import gradio as gr


def picture_editor(id: str, what: str, *, has_mask: bool) -> gr.HTML:
    """Its value is text: JSON of `image` and `mask`, data URLs of files, or "" while there is no picture. So
    Gradio keeps no file of it. what: what people call the picture."""
    return gr.HTML(
        "",
        html_template=_markup(id, what, has_mask),
        js_on_load=script("editor.js"),
        elem_id=id,
        elem_classes="editor",
        apply_default_css=False,
    )


def file_reader(id: str) -> gr.HTML:
    """Its value is a data URL of the beginning of a picture's file that was chosen, or dropped anywhere on
    the page; it triggers `submit`."""
    return gr.HTML(
        "",
        html_template=(
            f'<label class="file" for="{id}-file">Settings from a picture</label>'
            f'<input id="{id}-file" type="file" accept="image/png,image/jpeg,image/webp">'
        ),
        js_on_load=script("reader.js"),
        elem_id=id,
        elem_classes="reader",
        apply_default_css=False,
    )


def script(name: str) -> str:
    return (files("pixart.serving.page") / name).read_text(encoding="utf-8")


def _markup(id: str, what: str, has_mask: bool) -> str:
    brush = (
        '<label><input type="checkbox" class="paint"> Paint what to draw anew</label>'
        '<label>Brush <input type="range" class="brush" min="1" max="100" value="30"></label>'
        '<button type="button" class="undo">Undo</button>'
        '<button type="button" class="clear">Clear the mask</button>'
    )  # fmt: skip
    return (
        f'<label class="file" for="{id}-file">Choose a {escape(what)}</label>'
        f'<input id="{id}-file" type="file" accept="image/png,image/jpeg,image/webp">'
        f'<div class="stage" hidden><canvas data-what="The {escape(what)}" aria-label="Mask"></canvas></div>'
        f'<div class="brushes" hidden>{brush if has_mask else ""}'
        f'<button type="button" class="remove">Remove the picture</button></div>'
        f'<p class="note" role="status"></p>'
    )
