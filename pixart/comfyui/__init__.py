"""Nodes for ComfyUI: load PixArt with K/V compression, and put our attention kernel into a PixArt.

ComfyUI finds NODE_CLASS_MAPPINGS here when this folder, or a file that imports them, lies in its
custom_nodes; README.md says how. Nothing of ComfyUI is imported before a node runs.
"""

from pixart.comfyui.nodes import PixArtKVLoader, PixArtPatchAttention

NODE_CLASS_MAPPINGS = {
    "PixArtKVLoader": PixArtKVLoader,
    "PixArtPatchAttention": PixArtPatchAttention,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "PixArtKVLoader": "Load PixArt (K/V compression)",
    "PixArtPatchAttention": "PixArt Attention Kernel",
}

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
