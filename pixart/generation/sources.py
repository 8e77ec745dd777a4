"""What requests are drawn from, looked at before a model is opened: whether all pictures are there, can be
read and belong together, and whether they are still those of a picture that is drawn again.
"""

from collections.abc import Collection
from dataclasses import replace

from pixart.files import printable
from pixart.pipeline.inputs import Inputs
from pixart.pipeline.limits import ALPHA, PICTURES
from pixart.pipeline.metadata import Metadata
from pixart.pipeline.request import Request


class Sources:
    """Of the requests of one run."""

    def __init__(self) -> None:
        self._inputs = Inputs()
        self._checked: set[Request] = set()

    def check(self, request: Request) -> None:
        """ValueError for a picture that is not there or cannot be read whole, and for a mask that does
        not go with it; sizes that a model decides are left to the model."""
        of_pictures = {
            name: getattr(request, name) for name in (*PICTURES, "invert_mask", "outpaint")
        }
        like = Request("", **of_pictures)
        if like in self._checked:
            return
        for picture in like.control_image or ():
            self._inputs.size(picture)
            self._inputs.open(picture)
        if like.image is not None:
            from pixart.pipeline.editing import border_of, check_inputs
            from pixart.resolution import Resolved

            left, top, right, bottom = border_of(like)
            height, width = self._inputs.size(like.image)
            size = Resolved(height + top + bottom, width + left + right, "")
            check_inputs(replace(like, fit="exact"), size, self._inputs)
        self._checked.add(like)

    def digests(self, request: Request) -> dict[str, str]:
        """By which `find_drawn` tells whether a picture was drawn from these files."""
        return self._inputs.digests(request)

    def check_same(self, drawn: Metadata, given: Collection[str]) -> None:
        """ValueError for the first picture that another was drawn from and that is not the same any more.
        given: settings that are given anew, whose pictures need not be."""
        for setting in (name for name in PICTURES if name not in given):
            for picture in _pictures_of(drawn.request, setting):
                option, shown = f"--{setting.replace('_', '-')}", printable(picture)
                try:
                    digest = self._inputs.digest(picture)
                except ValueError as error:
                    raise ValueError(f"was drawn from {error}; give it anew by {option}") from error
                if digest != drawn.inputs.get(picture):
                    raise ValueError(
                        f"was drawn from {shown}, which is another picture now; give it anew by {option}"
                    )


def _pictures_of(request: Request, setting: str) -> tuple[str, ...]:
    value = getattr(request, setting)
    if value is None or (setting, value) == ("mask", ALPHA):
        return ()
    return value if isinstance(value, tuple) else (value,)
