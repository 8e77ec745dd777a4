"""Parameters and multiply-adds (MACs) of denoisers.

A UNet is counted in a forward pass on the meta device by torch.utils.flop_counter, which sees the operators
that PyTorch is asked for and their sizes: the count is that of a module with weights, and takes no memory. A
PixArt is counted by `pixart.cost`, which agrees with that counter. Norms, activations, softmax, sums and
interpolations count nothing; a MAC is 2 FLOP.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from torch import nn, set_grad_enabled
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pixart import cost
from pixart.checkpoint.load import empty_model
from pixart.config import PixArtConfig

FLOP_PER_MAC = 2
LAYERS = (nn.Linear, nn.Conv2d)


@dataclass(frozen=True)
class Count:
    """MACs of one forward pass. layers: of linear layers and convolutions, which is what papers count;
    attention: of QKᵀ and AV; inside: of the layers in transformer blocks."""

    parameters: int
    layers: int
    attention: int
    inside: int


def count(
    module: nn.Module, forward: Callable[[nn.Module], Any], inside: Collection[str] = ()
) -> Count:
    """forward: runs the module once, on inputs that lie where its weights do. inside: names of modules whose
    layers are counted apart, none of which holds another."""
    layers = {name for name, one in module.named_modules() if isinstance(one, LAYERS)}
    found = flops_by_module(module, forward)
    total, ours = found[""], {name: found.get(name, 0) for name in layers}
    within = sum(
        flops for name, flops in ours.items() if any(name.startswith(f"{one}.") for one in inside)
    )
    return Count(
        parameters=parameters(module),
        layers=sum(ours.values()) // FLOP_PER_MAC,
        attention=(total - sum(ours.values())) // FLOP_PER_MAC,
        inside=within // FLOP_PER_MAC,
    )


def flops_by_module(module: nn.Module, forward: Callable[[nn.Module], Any]) -> dict[str, int]:
    """What torch's counter finds in each module, all that it holds included; "" is the module itself."""
    mode = FlopCounterMode(display=False)
    # The counter does not know all attention that a CPU has, so that the plain one is taken. With gradients
    # on, PixArt asks for its layers as they are; without them it asks for several in one.
    with set_grad_enabled(True), sdpa_kernel(SDPBackend.MATH), mode:
        forward(module)
    own = type(module).__name__
    found = {
        str(name).removeprefix(own).removeprefix("."): sum(flops.values())
        for name, flops in mode.get_flop_counts().items()
        if name != "Global"
    }
    return {"": 0} | found


def parameters(module: nn.Module) -> int:
    """Numbers that training changes."""
    return sum(weight.numel() for weight in module.parameters())


def count_transformer(config: PixArtConfig, side: int, caption_tokens: int) -> Count:
    """A PixArt on a latent of side × side. caption_tokens: L, all seen."""
    tokens = (side // config.patch_size) ** 2
    inside, attention = cost.caption_keys_flops(config, caption_tokens), 0
    for layer in range(config.depth):
        for operation, flops in cost.block_flops(config, layer, tokens, caption_tokens).items():
            if operation in cost.ATTENTION:
                attention += flops
            else:
                inside += flops
    whole = cost.forward_flops(config, tokens, caption_tokens)
    return Count(
        parameters=parameters(empty_model(config)),
        layers=(whole - attention) // FLOP_PER_MAC,
        attention=attention // FLOP_PER_MAC,
        inside=inside // FLOP_PER_MAC,
    )
