"""The guidance that a request asks for."""

from pixart.pipeline.request import Request
from pixart.sampler.guidance import APG, Guidance


def guidance_of(request: Request) -> Guidance:
    """The guidance of a request whose scale is filled in. ValueError for settings that would do nothing
    at that scale."""
    assert request.guidance is not None
    apg = None
    if request.apg:
        named = {"eta": request.apg_eta, "momentum": request.apg_momentum, "norm": request.apg_norm}
        apg = APG(**{name: value for name, value in named.items() if value is not None})
    return Guidance(
        scale=request.guidance,
        interval=request.guidance_interval or (0.0, 1.0),
        rescale=request.guidance_rescale or 0.0,
        apg=apg,
        pag=request.pag or 0.0,
    )
