"""T5 from memory and streamed: the same bits, which are transformers' too, in little memory."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from t5_files import random_t5, save_folder
from text_encoders import encoder
from torch import Tensor

from pixart.pipeline import Pipeline
from pixart.sampler.loop import Cancelled
from pixart.text import stream as stream_module
from pixart.text.networks import open_t5
from pixart.text.stream import Footprint, T5Network, choose_memory, computed_in

CPU = torch.device("cpu")
EMBEDDED = Path(stream_module.__file__).parents[1] / "assets" / "shapes" / "text_encoder"
# (length, padding) of prompts, in no order.
LENGTHS = [(20, 0), (1, 0), (7, 5), (3, 0), (140, 0), (20, 0), (24, 17)]  # beyond 128 all are far
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(scope="module")
def random_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_folder(tmp_path_factory.mktemp("t5") / "text_encoder", random_t5(), shards=3)


def prompts(vocabulary: int) -> list[tuple[list[int], int]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randint(vocabulary, (length,), generator=generator).tolist(), padding)
        for length, padding in LENGTHS
    ]


def network(folder: Path, dtype: torch.dtype, memory: Any, slots: int | None = None) -> T5Network:
    opened = open_t5(folder, None)
    return T5Network(opened.weights, opened.shape, dtype, CPU, memory, "here", slots)


def of_transformers(folder: Path, dtype: torch.dtype, asked: Any) -> list[Tensor]:
    from transformers import T5EncoderModel

    model = T5EncoderModel.from_pretrained(folder, torch_dtype=dtype).eval()
    # Ours takes fp32 where a CPU has no bf16 products; PyTorch rounds there after every step.
    model = model.to(computed_in(dtype, CPU))
    found = []
    for ids, padding in asked:
        mask = torch.tensor([[1] * (len(ids) - padding) + [0] * padding])
        with torch.no_grad():
            output = model(input_ids=torch.tensor([ids]), attention_mask=mask)
        found.append(output.last_hidden_state[0].float())
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("which", ["embedded", "random"])
def test_streamed_features_have_the_bits_of_resident_ones_and_the_values_of_transformers(
    which: str, dtype: torch.dtype, random_folder: Path
) -> None:
    folder = EMBEDDED if which == "embedded" else random_folder
    resident = network(folder, dtype, "resident")
    asked = prompts(resident.vocabulary)
    if dtype == torch.float16:  # a CPU has no products of it
        asked = [prompt for prompt in asked if len(prompt[0]) < 20]
    kept = resident(asked)
    for slots in (1, 2):
        streamed = network(folder, dtype, "stream", slots)
        assert all(map(torch.equal, streamed(asked), kept))
    alone = [streamed([one])[0] for one in asked]  # with buffers that hold the last blocks
    assert all(map(torch.equal, alone, kept)), "who shares the pass changes nothing"
    # Rounding differs between versions of transformers; in bf16 a number has 8 bits.
    rounding = 1e-5 if dtype == torch.float32 else 2e-2
    for ours, theirs in zip(kept, of_transformers(folder, dtype, asked), strict=True):
        assert ours.dtype == dtype and ours.shape == theirs.shape
        assert (ours.float() - theirs).norm() <= rounding * theirs.norm()


def test_a_cpu_without_products_of_bf16_computes_them_in_fp32_either_way(
    random_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = prompts(320)
    exact = network(random_folder, torch.float32, "resident")(asked)
    monkeypatch.setattr(stream_module, "has_bf16_products", lambda device: True)
    rounded = network(random_folder, torch.bfloat16, "resident")(asked)
    monkeypatch.setattr(stream_module, "has_bf16_products", lambda device: False)
    assert computed_in(torch.bfloat16, CPU) == torch.float32
    kept, streamed = (
        network(random_folder, torch.bfloat16, memory)(asked) for memory in ("resident", "stream")
    )
    for one, other, few, whole in zip(kept, streamed, rounded, exact, strict=True):
        assert one.dtype == torch.bfloat16 and one.equal(other)
        assert (one.float() - whole).norm() < (few.float() - whole).norm()


def test_weights_that_do_not_fit_are_streamed_and_those_that_do_are_kept(
    pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = encoder(pipeline).footprint()
    assert needed.resident > needed.stream > 0
    weights = sum(one.numel() * 4 for one in weights_of(pipeline).values())
    assert needed.resident == weights
    for free, memory in ((needed.resident + 2**30, "resident"), (2**29, "stream")):
        monkeypatch.setattr(stream_module, "free_memory", lambda device, free=free: free)
        model = encoder(pipeline)
        model.encode(["a cat"])
        assert model._network.memory == memory  # type: ignore[union-attr]


def weights_of(pipeline: Path) -> dict[str, Tensor]:
    from pixart.tensors import read_tensors
    from pixart.weights import T5_WEIGHTS, find_weights

    files, _ = find_weights(pipeline / "text_encoder", None, T5_WEIGHTS)
    return {name: one for file in files for name, one in read_tensors(file).items()}


def test_files_that_cannot_be_mapped_are_kept_in_memory_or_refused(
    random_folder: Path, tmp_path: Path
) -> None:
    weights = random_t5()
    (tmp_path / "config.json").write_bytes((random_folder / "config.json").read_bytes())
    for is_zip in (True, False):
        file = tmp_path / "pytorch_model.bin"
        torch.save(weights, file, _use_new_zipfile_serialization=is_zip)
        opened = open_t5(tmp_path, None)
        assert opened.weights.is_mapped == is_zip
        if is_zip:
            streamed = opened.load(torch.float32, CPU, "stream")
            expected = network(random_folder, torch.float32, "resident")(prompts(320))
            assert all(map(torch.equal, streamed(prompts(320)), expected))
    assert choose_memory("auto", opened.weights, Footprint(2**60, 1), CPU) == "resident"
    with pytest.raises(ValueError, match="must be resident for PyTorch files .* got stream"):
        opened.load(torch.float32, CPU, "stream")


def test_all_prompts_of_a_call_go_through_each_block_together(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    texts = ["a red circle", "", "a large blue star on black", "a red circle "]
    alone = Pipeline.from_pretrained(cache_dir=None, text_encoder_memory="resident")
    alone.prepare(texts)
    filled: list[int] = []
    fill = stream_module._Buffers._fill
    monkeypatch.setattr(
        stream_module._Buffers,
        "_fill",
        lambda self, layer: filled.append(layer) or fill(self, layer),
    )
    for cache in (None, tmp_path / "prompts"):
        filled.clear()
        pipe = Pipeline.from_pretrained(cache_dir=cache, text_encoder_memory="stream")
        seen: list[str] = []
        pipe.prepare(texts, seen.append)
        assert (
            sorted(seen) == sorted(texts) and filled == [0, 1] and not pipe.text_encoder.is_loaded
        )
        for text in texts:
            kept = alone.captions.features(text.strip())
            assert pipe.captions.features(text.strip()).features.equal(kept.features)
        pipe.prepare(texts)
        assert filled == [0, 1], "what is encoded needs no pass"
    monkeypatch.setattr("pixart.text.encoder.tokens_of_pass", lambda device: 8)
    pipe = Pipeline.from_pretrained(cache_dir=None, text_encoder_memory="stream")
    asked = iter([False, True])
    with pytest.raises(Cancelled):
        pipe.prepare(texts, cancel=lambda: next(asked))
    assert 1 <= len(pipe.captions.held) < 3, "what a pass has encoded stays"


def test_what_is_not_streamed_is_refused_in_one_line(pipeline: Path) -> None:
    with pytest.raises(ValueError, match="text-encoder-memory must be auto, .*, got 'disk'"):
        encoder(pipeline, memory="disk")
    with pytest.raises(ValueError, match="bitsandbytes, got stream: only a T5"):
        from pixart.text.encoder import TextEncoder

        TextEncoder(
            pipeline, torch.bfloat16, CPU, 300, "8bit", None, memory="stream"
        )._check_memory()


_PROGRAM = """
import json, sys, threading, time
import torch
from pathlib import Path
from pixart.device import has_bf16_products
from pixart.text import stream
from pixart.text.networks import open_t5

def anonymous():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024

before, peak, done = anonymous(), [0], threading.Event()
def watch():
    while not done.wait(0.02):
        peak[0] = max(peak[0], anonymous())
threading.Thread(target=watch, daemon=True).start()
if sys.argv[2] == "fp32":
    stream.has_bf16_products = lambda device: False
network = open_t5(Path(sys.argv[1]), None).load(torch.bfloat16, torch.device("cpu"), "stream")
features = network([([1, 2, 3, 1], 0), ([5, 1], 0)])
done.set()
print(json.dumps({"before": before, "peak": peak[0], "shape": list(features[0].shape)}))
"""


@pytest.mark.exhaustive
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("products", ["bf16", "fp32"])
def test_t5_xxl_streams_through_a_gigabyte_and_a_half(tmp_path: Path, products: str) -> None:
    """A file of holes: 9.5 GB of zeros that take no place on the disk."""
    import json

    from pixart.text.t5 import T5Shape

    xxl = {"d_model": 4096, "d_ff": 10240, "num_layers": 24, "num_heads": 64, "vocab_size": 32128}
    folder = tmp_path / "text_encoder"
    save_folder(folder, {}, **xxl)
    config = json.loads((folder / "config.json").read_text())
    header: dict[str, Any] = {}
    end = 0
    for name, shape in T5Shape.of(config).tensors.items():
        begin, end = end, end + 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    ran = subprocess.run(
        [sys.executable, "-c", _PROGRAM, str(folder), products],
        capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    said = json.loads(ran.stdout)
    assert said["shape"] == [4, 4096] and end > 9e9
    print(said)
    assert said["peak"] <= 1.5 * 2**30, said
