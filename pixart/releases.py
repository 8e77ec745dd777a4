"""The published checkpoints: where they are, and what their files do not say."""

from dataclasses import dataclass

from pixart.config import MAX_LENGTH, PixArtConfig


@dataclass(frozen=True)
class Release:
    """A published XL/2 checkpoint. pixels: native side; file: its .pth, if that is all there is."""

    hub_id: str
    family: str
    pixels: int
    pe_interpolation: float
    micro_condition: bool = False
    file: str | None = None

    @property
    def model_max_length(self) -> int:
        return MAX_LENGTH[self.family]

    @property
    def config(self) -> PixArtConfig:
        return PixArtConfig(
            input_size=self.pixels // 8,
            model_max_length=self.model_max_length,
            pe_interpolation=self.pe_interpolation,
            micro_condition=self.micro_condition,
        )


def _released() -> tuple[Release, ...]:
    hub = "PixArt-alpha/"
    # α-256 was trained with a coordinate step of 1, Σ-256 with a step of 2.
    # The 2K model attends to every key, although its official config file is called "kvcompress".
    return (
        Release(hub + "PixArt-Sigma-XL-2-256x256", "sigma", 256, 0.5),
        Release(hub + "PixArt-Sigma-XL-2-512-MS", "sigma", 512, 1.0),
        Release(hub + "PixArt-Sigma-XL-2-1024-MS", "sigma", 1024, 2.0),
        Release(hub + "PixArt-Sigma-XL-2-2K-MS", "sigma", 2048, 4.0),
        Release(hub + "PixArt-alpha", "alpha", 256, 1.0, file="PixArt-XL-2-SAM-256x256.pth"),
        Release(hub + "PixArt-alpha", "alpha", 256, 1.0, file="PixArt-XL-2-256x256.pth"),
        Release(hub + "PixArt-XL-2-512x512", "alpha", 512, 1.0),
        Release(hub + "PixArt-XL-2-1024-MS", "alpha", 1024, 2.0, micro_condition=True),
        Release(hub + "PixArt-LCM-XL-2-1024-MS", "alpha", 1024, 2.0, micro_condition=True),
        # Draws in one step from timestep 400, which nothing in its files says: --scheduler dmd.
        Release(hub + "PixArt-Alpha-DMD-XL-2-512x512", "alpha", 512, 1.0),
    )


# By the name users know: the last part of the hub id, or the file's stem.
RELEASED: dict[str, Release] = {
    (release.file or release.hub_id).rpartition("/")[2].removesuffix(".pth"): release
    for release in _released()
}
