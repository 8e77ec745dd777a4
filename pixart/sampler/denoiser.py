"""What the sampler calls to denoise: a transformer beside the captions of a picture, which are
encoded once and not at every step, launched kernel by kernel or replayed as a CUDA graph.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from pixart.model.blocks import EncodedCaption
from pixart.model.transformer import PixArt
from pixart.sampler.cuda_graphs import CudaGraphs
from pixart.sampler.guidance import Captions
from pixart.text.encoder import PromptEmbeddings


class PictureDenoiser:
    """A `pixart.sampler.Denoiser` for one picture.

    prompts: the embeddings of each choice of captions. height, width: pixels, for micro-conditioned
    models. graphs: replays recorded launches; the model must then be on a CUDA device.
    """

    def __init__(
        self,
        transformer: PixArt,
        prompts: Mapping[Captions, PromptEmbeddings],
        height: int,
        width: int,
        device: torch.device,
        graphs: "CudaGraphs | None" = None,
    ) -> None:
        self.transformer, self.prompts, self.device, self.graphs = (
            transformer,
            prompts,
            device,
            graphs,
        )
        self._encoded: dict[Captions, EncodedCaption] = {}
        self._sizes: tuple[Tensor, ...] = ()
        if transformer.config.micro_condition:
            size = torch.tensor([[height, width]], dtype=torch.float32, device=device)
            self._sizes = (size, size[:, :1] / size[:, 1:])

    def __call__(self, latents: Tensor, timesteps: Tensor, captions: Captions, /) -> Tensor:
        caption = self._encode(captions)
        if self.graphs is None:
            return self.transformer(latents, timesteps, caption, None, *self._sizes)
        return self.graphs(self.transformer, latents, timesteps, caption, self._sizes)

    def _encode(self, captions: Captions) -> EncodedCaption:
        if captions not in self._encoded:
            prompt = self.prompts[captions]
            # The mask stays on the host: its counts are needed there.
            caption = self.transformer.encode_caption(prompt.features.to(self.device), prompt.mask)
            if self.graphs is not None:  # so that one recording serves every prompt
                caption = caption.pad(self.transformer.config.model_max_length)
            self._encoded[captions] = caption
        return self._encoded[captions]
