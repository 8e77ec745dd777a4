"""The nodes, as every version of ComfyUI takes them: classes with INPUT_TYPES, RETURN_TYPES and FUNCTION."""

from typing import Any


class PixArtKVLoader:
    """A PixArt transformer of any format that pixart reads, K/V compression included, to a MODEL."""

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "load"
    CATEGORY = "loaders/pixart"
    DESCRIPTION = "Loads PixArt-Σ and PixArt-α transformers, also with K/V compression."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        import folder_paths  # ComfyUI's

        compression = (
            "LAYERS:RATIO[:SAMPLING], such as 14-27:2:average, opens a dense model compressed"
        )
        return {
            "required": {"checkpoint": (folder_paths.get_filename_list("diffusion_models"),)},
            "optional": {"kv_compress": ("STRING", {"default": "", "tooltip": compression})},
        }

    @classmethod
    def VALIDATE_INPUTS(cls, kv_compress: str = "") -> bool | str:
        """True, or one line on what is wrong, which ComfyUI shows before anything runs."""
        from pixart.config import KVCompression

        try:
            if kv_compress.strip():
                KVCompression.parse(kv_compress.strip())
        except ValueError as error:
            return str(error)
        return True

    def load(self, checkpoint: str, kv_compress: str = "") -> tuple[Any]:
        """(ModelPatcher,) of a file in ComfyUI's models/diffusion_models."""
        import folder_paths

        from pixart.comfyui.loader import load_model
        from pixart.config import KVCompression

        path = folder_paths.get_full_path_or_raise("diffusion_models", checkpoint)
        text = kv_compress.strip()
        return (load_model(path, KVCompression.parse(text) if text else None),)


class PixArtPatchAttention:
    """A MODEL of ComfyUI's PixArt whose attention our kernel computes."""

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "patch"
    CATEGORY = "loaders/pixart"
    DESCRIPTION = (
        "Computes the attention of a PixArt model with pixart's kernel, on GPUs that run it."
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"model": ("MODEL",)}}

    def patch(self, model: Any) -> tuple[Any]:
        """(ModelPatcher,), a clone; the same as before, with a warning, where the kernel cannot run."""
        from pixart.comfyui.attention import patch_attention

        return (patch_attention(model),)
