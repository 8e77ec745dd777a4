import itertools

import pytest
import torch

from pixart.sampler.loop import Cancelled, initial_noise, sample, seed_generators
from pixart.sampler.schedulers import make_scheduler
from pixart.sampler.windows import Windows

# Height and width, side of windows: one window and a bit, many, and one direction only.
SIZES = [((18, 18), 16), ((40, 56), 16), ((16, 64), 16), ((128, 128), 64), ((130, 34), 32)]


def noise(height, width, images=1):
    return initial_noise((4, height, width), seed_generators(range(images)))


class Recorder:
    def __init__(self, denoise=lambda latents, timesteps, captions: latents):
        self.denoise, self.asked = denoise, []

    def __call__(self, latents, timesteps, captions):
        assert latents.is_contiguous() and timesteps.shape == (len(latents),)
        self.asked.append((tuple(latents.shape), captions, timesteps[0].item()))
        return self.denoise(latents, timesteps, captions)


@pytest.mark.parametrize(("size", "side"), SIZES)
@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5])
def test_weights_of_all_windows_add_up_to_one(size, side, overlap):
    latents, ones = noise(*size), Recorder(lambda x, t, c: torch.ones_like(x))
    windows = Windows(ones, side, side, overlap=overlap)
    output = windows(latents, torch.ones(1), "conditional")
    torch.testing.assert_close(output, torch.ones_like(latents), rtol=0, atol=1e-6)
    # A prediction that every window makes alike, whatever its place, comes out as it is.
    same = Windows(Recorder(), side, side, overlap=overlap)
    torch.testing.assert_close(
        same(latents, torch.ones(1), "conditional"), latents, rtol=0, atol=2e-6
    )


@pytest.mark.parametrize(("size", "side"), SIZES)
def test_windows_are_of_one_size_reach_all_ends_and_overlap_as_asked(size, side):
    """Each window paints the places that it has; their coordinates come as latents."""
    seen = []

    def look(latents, timesteps, captions):
        seen.append(latents[0, :2].long())
        return latents

    rows, columns = torch.meshgrid(*(torch.arange(n).float() for n in size), indexing="ij")
    Windows(look, side, side, overlap=0.25)(
        torch.stack([rows, columns])[None], torch.ones(1), "conditional"
    )
    for axis, whole in enumerate(size):
        starts = sorted({each[axis].min().item() for each in seen})
        assert all(each[axis].max() - each[axis].min() == min(side, whole) - 1 for each in seen)
        assert starts[0] == 0 and starts[-1] == whole - min(side, whole)
        steps = [after - before for before, after in itertools.pairwise(starts)]
        assert all(start % 2 == 0 for start in starts)
        assert all(step <= 0.75 * side for step in steps)
        assert not steps or max(steps) - min(steps) <= 2  # evenly spread, to a patch


@pytest.mark.parametrize("size", [(16, 16), (12, 16), (8, 8)])
def test_a_picture_no_larger_than_a_window_is_denoised_as_it_is(size):
    def denoise(latents, timesteps, captions):
        return torch.cat([torch.sin(latents * 3), latents], 1)

    latents, timesteps = noise(*size, images=2), torch.tensor([3.0, 3.0])
    recorder = Recorder(denoise)
    output = Windows(recorder, 16, 16)(latents, timesteps, "both")
    assert torch.equal(output, denoise(latents, timesteps, "both"))
    assert recorder.asked == [((2, 4, *size), "both", 3.0)]


def test_both_halves_of_guidance_are_in_every_window_and_variances_come_out_too():
    def denoise(latents, timesteps, captions):
        half = torch.cat([torch.zeros(len(latents) // 2), torch.ones(len(latents) // 2)])
        prediction = latents + half.view(-1, 1, 1, 1)
        return torch.cat([prediction, 7 * torch.ones_like(latents)], 1).bfloat16()

    recorder = Recorder(denoise)
    latents = torch.zeros(4, 4, 24, 40)
    output = Windows(recorder, 16, 16)(latents, torch.full((4,), 5.0), "both")
    assert output.shape == (4, 8, 24, 40) and output.dtype == torch.float32
    torch.testing.assert_close(output[:2, :4], torch.zeros(2, 4, 24, 40))
    torch.testing.assert_close(output[2:, :4], torch.ones(2, 4, 24, 40))
    torch.testing.assert_close(output[:, 4:], torch.full((4, 4, 24, 40), 7.0))
    # Two rows of windows, three columns: 12 latents at most from one to the next.
    assert recorder.asked == [((4, 4, 16, 16), "both", 5.0)] * 6


def test_windows_leave_no_seam():
    """A denoiser that pulls each window to its own brightness: what differs from window to window, as it
    does in pictures, fades over the whole overlap and jumps nowhere."""

    def denoise(latents, timesteps, captions):
        return latents.mean((1, 2, 3), keepdim=True).expand_as(latents)

    ramp = torch.linspace(-1, 1, 128).expand(1, 4, 32, 128).contiguous()
    output = Windows(denoise, 32, 32, overlap=0.5)(ramp, torch.ones(1), "conditional")
    steps = output[0, 0, 0].diff()
    # Brightness of neighbouring windows differs by 0.25. Pieces cut side by side would have that as a jump;
    # a raised cosine over 16 latents is no steeper than pi / 2 / 16 of it.
    assert steps.abs().max() < 0.25 * torch.pi / 2 / 16 * 1.1
    assert (steps > -1e-6).all()


def test_a_smooth_denoiser_draws_with_windows_what_it_draws_at_once():
    """Of values that do not depend on each other; what neighbours do to each other in a window is cut off
    at its ends, where its weight is next to nothing."""

    def local(latents, timesteps, captions):
        return 0.3 * latents

    def blurred(latents, timesteps, captions):
        kernel = torch.ones(4, 1, 3, 3) / 9
        padded = torch.nn.functional.pad(latents, (1, 1, 1, 1), mode="replicate")
        return 0.9 * torch.nn.functional.conv2d(padded, kernel, groups=4)

    start = noise(48, 48)
    for denoise, tolerance in ((local, 1e-5), (blurred, 0.05)):
        whole = sample(denoise, start, make_scheduler(), 8, guidance=1.0)
        pieces = sample(Windows(denoise, 32, 32), start, make_scheduler(), 8, guidance=1.0)
        assert (whole - pieces).abs().max() < tolerance * whole.abs().max()


def test_cancelling_stops_between_windows():
    asked = itertools.chain([False] * 2, itertools.repeat(True))
    recorder = Recorder()
    windows = Windows(recorder, 16, 16, cancel=lambda: next(asked))
    with pytest.raises(Cancelled, match="cancelled at timestep 9"):
        windows(noise(32, 32), torch.full((1,), 9.0), "conditional")
    assert len(recorder.asked) == 3


@pytest.mark.parametrize(
    ("height", "width", "options", "message"),
    [
        (15, 16, {}, "window must be a multiple of 2 latents high and wide, got 15 x 16"),
        (16, 0, {}, "window must be a multiple of 2 latents high and wide, got 16 x 0"),
        (
            16,
            12,
            {"multiple": 8},
            "window must be a multiple of 8 latents high and wide, got 16 x 12",
        ),
        (16, 16, {"overlap": 1.0}, "overlap must be from 0 to 0.75 of a window, got 1.0"),
    ],
)
def test_impossible_windows_are_refused(height, width, options, message):
    with pytest.raises(ValueError, match=message):
        Windows(Recorder(), height, width, **options)
