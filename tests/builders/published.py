"""Pipelines in the exact file layout of the published repositories, with small random weights.

`build_sigma` writes what `PixArt-alpha/PixArt-Sigma-XL-2-1024-MS` holds, and without the
transformer what `PixArt-alpha/pixart_sigma_sdxlvae_T5_diffusers` holds; `build_alpha` writes
`PixArt-alpha/PixArt-XL-2-1024-MS`. File names, class names, config keys, sharding, special ids and
scaling factors are the published ones; widths and depths are not.
"""

import functools
import io
import json
import random
import string
from pathlib import Path

import torch

EXTRA_IDS = 100
SPECIAL_TOKENS = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
CORPUS = """A small cactus with a happy face in the desert. a red circle left of a blue square,
the green triangle above and below: yellow star on black, white or large. Two birds without a tree!
one photo, painting of river and mountain at night; light morning in dark snow, next to a house?
The cat and dog on a boat right of the moon, with cloud in an orange sky."""

SCHEDULER = {
    "_class_name": "DPMSolverMultistepScheduler",
    "_diffusers_version": "0.27.0.dev0",
    "algorithm_type": "dpmsolver++",
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "beta_start": 0.0001,
    "dynamic_thresholding_ratio": 0.995,
    "euler_at_final": False,
    "lambda_min_clipped": float("-inf"),
    "lower_order_final": True,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "sample_max_value": 1.0,
    "solver_order": 2,
    "solver_type": "midpoint",
    "steps_offset": 0,
    "thresholding": False,
    "timestep_spacing": "linspace",
    "trained_betas": None,
    "use_karras_sigmas": False,
    "use_lu_lambdas": False,
    "variance_type": None,
}

TRANSFORMER = {
    "_class_name": "Transformer2DModel",
    "_diffusers_version": "0.27.0.dev0",
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "attention_head_dim": 72,
    "attention_type": "default",
    "caption_channels": 32,
    "cross_attention_dim": 144,
    "double_self_attention": False,
    "dropout": 0.0,
    "in_channels": 4,
    "interpolation_scale": 2,
    "norm_elementwise_affine": False,
    "norm_eps": 1e-06,
    "norm_num_groups": 32,
    "norm_type": "ada_norm_single",
    "num_attention_heads": 2,
    "num_embeds_ada_norm": 1000,
    "num_layers": 2,
    "num_vector_embeds": None,
    "only_cross_attention": False,
    "out_channels": 8,
    "patch_size": 2,
    "sample_size": 128,
    "upcast_attention": False,
    "use_additional_conditions": False,
    "use_linear_projection": False,
}


def build_sigma(
    path: str | Path,
    *,
    with_transformer: bool = True,
    sample_size: int = 128,
    num_layers: int = 2,
    heads: int = 2,
    d_model: int = 32,
    vae_channels: tuple[int, ...] = (16, 16, 16, 16),
    seed: int = 0,
) -> Path:
    """A Σ pipeline: 300 tokens, the SDXL VAE's scaling factor; sample_size is the latent side."""
    path = _build_shared(path, "PixArtSigmaPipeline", d_model, seed)
    _build_vae(path / "vae", vae_channels, 0.13025, seed, force_upcast=False, sample_size=512)
    if with_transformer:
        scale = sample_size / 64 if sample_size < 64 else sample_size // 64
        changes = {"sample_size": sample_size, "interpolation_scale": scale}
        _build_transformer(path / "transformer", num_layers, heads, d_model, changes, seed)
    return path


def build_alpha(
    path: str | Path,
    *,
    sample_size: int = 128,
    num_layers: int = 2,
    heads: int = 2,
    d_model: int = 32,
    vae_channels: tuple[int, ...] = (16, 16, 16, 16),
    seed: int = 0,
) -> Path:
    """An α pipeline: 120 tokens, the SD VAE's scaling factor, sizes as conditions at 1024 px.

    The config has neither `interpolation_scale` nor `use_additional_conditions`, as published: both
    follow from sample_size (2 and true at 128; at other sizes there is no size conditioning).
    """
    path = _build_shared(path, "PixArtAlphaPipeline", d_model, seed)
    _build_vae(path / "vae", vae_channels, 0.18215, seed, sample_size=256)
    changes = {"sample_size": sample_size, "_diffusers_version": "0.22.0.dev0"}
    absent = ("interpolation_scale", "use_additional_conditions")
    _build_transformer(path / "transformer", num_layers, heads, d_model, changes, seed, absent)
    return path


def _build_shared(path: str | Path, pipeline_class: str, d_model: int, seed: int) -> Path:
    path = Path(path)
    index = {
        "_class_name": pipeline_class,
        "_diffusers_version": "0.27.0.dev0",
        "scheduler": ["diffusers", "DPMSolverMultistepScheduler"],
        "text_encoder": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "T5Tokenizer"],
        "transformer": ["diffusers", "Transformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    _write_json(path / "model_index.json", index)
    scheduler = dict(SCHEDULER)
    _write_json(path / "scheduler" / "scheduler_config.json", scheduler)
    vocabulary = build_tokenizer(path / "tokenizer")
    _build_text_encoder(path / "text_encoder", vocabulary, d_model, seed)
    return path


def build_tokenizer(directory: str | Path) -> int:
    """The slow T5 tokenizer's four files (no tokenizer.json); returns the number of tokens."""
    directory = Path(directory)
    extra = [f"<extra_id_{i}>" for i in range(EXTRA_IDS)]
    model = _sentencepiece_model()
    pieces = _piece_count(model)
    total = pieces + EXTRA_IDS
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "spiece.model").write_bytes(model)
    # T5 numbers its sentinels downwards from the last id.
    _write_json(directory / "added_tokens.json", {t: total - 1 - i for i, t in enumerate(extra)})
    plain = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    special = {name: {"content": token, **plain} for name, token in SPECIAL_TOKENS.items()}
    _write_json(
        directory / "special_tokens_map.json", {"additional_special_tokens": extra, **special}
    )
    known = {0: "<pad>", 1: "</s>", 2: "<unk>"} | {total - 1 - i: t for i, t in enumerate(extra)}
    decoder = {str(i): {"content": known[i], **plain, "special": True} for i in sorted(known)}
    config = {
        "added_tokens_decoder": decoder,
        "additional_special_tokens": extra,
        "clean_up_tokenization_spaces": True,
        "eos_token": "</s>",
        "extra_ids": EXTRA_IDS,
        "legacy": True,
        "model_max_length": 512,
        "pad_token": "<pad>",
        "sp_model_kwargs": {},
        "tokenizer_class": "T5Tokenizer",
        "unk_token": "<unk>",
    }
    _write_json(directory / "tokenizer_config.json", config)
    return total


@functools.cache
def _sentencepiece_model() -> bytes:
    import sentencepiece

    rng = random.Random(0)
    sentences = [" ".join(rng.choices(CORPUS.split(), k=8)) for _ in range(300)]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=model,
        vocab_size=200,
        hard_vocab_limit=False,
        required_chars=string.ascii_letters + string.digits + "'-",
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def _piece_count(model: bytes) -> int:
    import sentencepiece

    return sentencepiece.SentencePieceProcessor(model_proto=model).vocab_size()


def _build_text_encoder(directory: Path, vocabulary: int, d_model: int, seed: int) -> None:
    from safetensors.torch import save_file
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=-(-vocabulary // 128) * 128,  # 32100 tokens sit in 32128 rows in the real one
        d_model=d_model,
        d_kv=16,
        d_ff=2 * d_model,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
    torch.manual_seed(seed)
    model = T5EncoderModel(config).eval()
    published = config.to_dict() | {
        "architectures": ["T5EncoderModel"],
        "torch_dtype": "float32",
        "transformers_version": "4.36.1",
        "_name_or_path": "t5-v1_1-xxl",
    }
    published.pop("dtype", None)
    _write_json(directory / "config.json", published)
    tensors = {
        name: tensor.clone().contiguous()
        for name, tensor in model.state_dict().items()
        if name != "encoder.embed_tokens.weight"  # the same tensor as shared.weight
    }
    names = sorted(tensors)
    weight_map, total = {}, 0
    for i, part in enumerate((names[: len(names) // 2], names[len(names) // 2 :]), start=1):
        file = f"model-{i:05d}-of-00002.safetensors"
        save_file({n: tensors[n] for n in part}, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
        total += sum(tensors[n].numel() * 4 for n in part)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    _write_json(directory / "model.safetensors.index.json", index)


def _build_vae(
    directory: Path,
    channels: tuple[int, ...],
    scaling_factor: float,
    seed: int,
    **changes: object,
) -> None:
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    vae = AutoencoderKL(
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        scaling_factor=scaling_factor,
        **changes,
    )
    vae.save_pretrained(directory)
    absent = ("shift_factor", "latents_mean", "latents_std", "use_quant_conv")
    absent += ("use_post_quant_conv", "mid_block_add_attention")
    config = json.loads((directory / "config.json").read_text())
    config = {key: value for key, value in config.items() if key not in absent}
    _write_json(directory / "config.json", config | {"_diffusers_version": "0.27.0.dev0"})


def _build_transformer(
    directory: Path,
    num_layers: int,
    heads: int,
    d_model: int,
    changes: dict[str, object],
    seed: int,
    absent: tuple[str, ...] = (),
) -> None:
    from diffusers import PixArtTransformer2DModel

    config = TRANSFORMER | {
        "caption_channels": d_model,
        "cross_attention_dim": heads * TRANSFORMER["attention_head_dim"],
        "num_attention_heads": heads,
        "num_layers": num_layers,
    }
    config = {k: v for k, v in (config | changes).items() if k not in absent}
    torch.manual_seed(seed)
    model = PixArtTransformer2DModel.from_config({k: v for k, v in config.items() if k[0] != "_"})
    model.save_pretrained(directory)
    _write_json(directory / "config.json", config)


def _write_json(file: Path, content: dict[str, object]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
