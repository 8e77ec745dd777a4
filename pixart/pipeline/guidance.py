"""The guidance that a request asks for."""

from pixart.pipeline.request import Request
from pixart.sampler.guidance import APG, Guidance


def guidance_of(request: Request) -> Guidance:
    """The guidance of a request whose scale is filled in. ValueError for settings that would do nothing
    at that scale."""
    assert request.guidance is not None
    return _with_scale(request, request.guidance)


def upscale_guidance_of(request: Request) -> Guidance:
    """That of the passes which make its picture larger. What goes with guidance goes with this one where it
    guides, and is spared where it does not."""
    if request.upscale_guidance is None:  # the picture itself is made larger
        return guidance_of(request)
    if request.upscale_guidance <= 1:
        return Guidance(request.upscale_guidance)
    return _with_scale(request, request.upscale_guidance)


def _with_scale(request: Request, scale: float) -> Guidance:
    apg = None
    if request.apg:
        named = {"eta": request.apg_eta, "momentum": request.apg_momentum, "norm": request.apg_norm}
        apg = APG(**{name: value for name, value in named.items() if value is not None})
    return Guidance(
        scale=scale,
        interval=request.guidance_interval or (0.0, 1.0),
        rescale=request.guidance_rescale or 0.0,
        apg=apg,
        pag=request.pag or 0.0,
    )
