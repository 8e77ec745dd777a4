"""`prepare`: pictures and captions to VAE moments and text features, once, on disk.

What cannot be used is quarantined: it is left out, listed in report.json with its resolution and
reason, and the work goes on.

The source is cut into chunks of 64 samples, which any number of processes share (pixart.dataset.chunks). One that
would prepare the same resolution from something else or otherwise is refused meanwhile.
"""

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pixart.dataset.chunks import Chunks, Work, open_chunk_worker
from pixart.dataset.controls import Controls
from pixart.dataset.encoding import Encoders, Encoding
from pixart.dataset.features import FORMAT, ShardStore
from pixart.dataset.loading import Settings
from pixart.dataset.parts import merged_reports, write_report
from pixart.files import write_json

if TYPE_CHECKING:
    from pixart.dataset.options import Prepare

CHUNK = 64
THREADS = 4  # that read and scale pictures while one encodes


class Preparation(Chunks):
    """The features of a source in `directory`; see the module. workers: threads that read and
    scale pictures while others are encoded. controls: where the pictures come from that steer. `run` returns this
    resolution's report."""

    def __init__(
        self,
        directory: Path,
        encoders: Encoders,
        settings: Settings,
        workers: int = 4,
        controls: Controls | None = None,
    ) -> None:
        if settings.resolution < 1 or settings.resolution % encoders.multiple:
            raise ValueError(
                f"resolution must be a multiple of {encoders.multiple}, got {settings.resolution}"
            )
        if not settings.max_ratio >= 1:
            raise ValueError(f"max_ratio must be at least 1, got {settings.max_ratio}")
        if settings.min_side is not None and settings.min_side < 1:
            raise ValueError(f"min_side must be at least 1, got {settings.min_side}")
        self.encoders, self.settings, self.controls = encoders, settings, controls
        resolution = settings.resolution
        super().__init__(
            directory,
            Encoding(ShardStore(directory / "features"), encoders, settings, workers, controls),
            CHUNK,
            str(resolution),
            f"preparing other data or with other settings at {resolution} px",
        )

    def finish(self, parts: list[str]) -> dict[str, Any]:
        if not parts:
            raise ValueError("source must hold at least one picture or caption, it holds none")
        merged = self.merged(parts)
        vae = {
            "identity": self.encoders.vae_identity,
            "scaling_factor": self.encoders.vae.scaling_factor,
        }
        index = {
            "format": FORMAT,
            **asdict(self.settings),
            "vae": vae,
            "text": {"identity": self.encoders.text_identity},
            **({"control": self.controls.identity} if self.controls else {}),
            "parts": parts,
            "samples": merged.samples,
        }
        report = {
            "prepared": len(merged.samples),
            "rejected": merged.rejected,
            "notes": merged.notes,
        }
        write_json(self.directory / f"index-{self.settings.resolution}.json", index)
        write_report(self.work, self.settings.resolution, report)
        self._merge_reports()
        return report

    def _merge_reports(self) -> None:
        """report.json from every resolution's own, again until nobody has added to them meanwhile:
        of processes that end together, the last to write it has then seen what all have found."""
        written, merged = None, merged_reports(self.work)
        while merged != written:
            write_json(self.report, merged, indent=1)
            written, merged = merged, merged_reports(self.work)


def open_preparation(options: "Prepare") -> Preparation:
    """What a command line asks for. Raises what opening its model and what makes its controls raises."""
    import torch

    from pixart.dataset.controls import open_controls
    from pixart.dataset.encoding import open_encoders
    from pixart.device import choose_device

    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    device = choose_device(options.device)
    controls = open_controls(options.control, options.preprocessor_weights, device)
    encoders = open_encoders(
        options.model,
        device=device,
        vae_dtype=dtypes[options.vae_dtype],
        text_dtype=dtypes[options.text_dtype] if options.text_dtype else None,
        max_length=options.max_length,
        text_encoder=options.text_encoder,
        text_memory=options.text_encoder_memory,
    )
    settings = Settings(
        options.resolution, options.square, options.max_ratio, options.half, options.min_side
    )
    return Preparation(options.output, encoders, settings, options.workers or THREADS, controls)


def open_worker(options: "Prepare", made_by: list[Any], claim: Path) -> Work:
    """What does chunks of `options` in a process of any machine; see `open_chunk_worker`."""
    return open_chunk_worker(
        partial(open_preparation, options), options.output, options.model, made_by, claim
    )
