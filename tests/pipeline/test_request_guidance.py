import pytest

from pixart.pipeline.guidance import guidance_of
from pixart.pipeline.request import Request
from pixart.sampler.guidance import APG, Guidance


def test_a_request_has_its_guidance():
    assert guidance_of(Request("", guidance=3.0)) == Guidance(3.0)
    assert guidance_of(Request("", guidance=3.0, apg=False)) == Guidance(3.0)
    every = Request(
        "", guidance=3.0, guidance_interval=(0.1, 0.5), guidance_rescale=0.3, apg=True, apg_norm=5.0, pag=2.0
    )  # fmt: skip
    assert guidance_of(every) == Guidance(3.0, (0.1, 0.5), 0.3, APG(0.0, -0.5, 5.0), 2.0)
    with pytest.raises(ValueError, match="apg must be given with guidance above 1, got 1"):
        guidance_of(Request("", guidance=1.0, apg=True))
