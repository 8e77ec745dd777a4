"""Write `pixart_kernels` as a repository that Hugging Face's `kernels` loads: get_kernel, get_local_kernel.

    python kernels/hub_repository.py --output dist/hub-kernels

`kernels` imports a package under a name of its own, so that imports inside it must be relative; and
several versions may live in one process, beside an installed `pixart_kernels` too, so that the
operators are registered in a namespace that follows from the content. Needs nothing but Python.
"""

import argparse
import ast
import hashlib
import json
import re
import shutil
import sys
from pathlib import Path

SOURCE = Path(__file__).parent / "pixart_kernels"
NAME = "pixart-kernels"  # `kernels` takes small letters, digits and hyphens
VERSION = 1  # of the interface: what users ask for in get_kernel(..., version=1)
BACKENDS = ("cpu", "cuda", "rocm")  # what `kernels` chooses a folder by; all hold the same code
_NAMESPACE = '\nNAMESPACE = "pixart"\n'
_IMPORT = re.compile(r"^(\s*from )pixart_kernels(?:\.([\w.]+))?(?= import )", re.MULTILINE)
CARD = """---
library_name: kernels
license: apache-2.0
tags:
- kernels
---
# {name}

Fused attention with KV compression and adaLN modulation for diffusion transformers, in Triton; on a CPU
plain PyTorch. Version {version}, operators in `torch.ops.{namespace}`.

```python
from kernels import get_kernel

ops = get_kernel("OWNER/{name}", version={version}, trust_remote_code=True)
out = ops.flash_attention(q, k, v)  # (B, N, H, D), D up to 128
```

OWNER: whoever this repository belongs to. `kernels` loads those of organisations that it does not list with
`trust_remote_code=True` only.
"""


def files(source: Path = SOURCE) -> tuple[str, dict[str, bytes]]:
    """The operators' namespace, and by path inside the package its content, as `kernels` can import it."""
    found = {
        path.relative_to(source).as_posix(): path.read_bytes()
        for pattern in ("*.py", "*.json", "py.typed")
        for path in sorted(source.rglob(pattern))
    }
    content = b"".join(name.encode() + b"\0" + data + b"\0" for name, data in found.items())
    namespace = f"pixart_{hashlib.sha256(content).hexdigest()[:12]}"
    for name, data in found.items():
        if name.endswith(".py"):
            found[name] = _relative(name, data.decode("utf-8")).encode("utf-8")
    place = "dispatch/registration.py"
    text = found[place].decode("utf-8")
    if text.count(_NAMESPACE) != 1:
        raise ValueError(
            f"{place} must have one line {_NAMESPACE.strip()}, for the namespace to replace"
        )
    found[place] = text.replace(_NAMESPACE, f'\nNAMESPACE = "{namespace}"\n').encode("utf-8")
    return namespace, found


def _relative(name: str, text: str) -> str:
    """The text of a module of the package with its imports of the package relative."""
    dots = "." * (name.count("/") + 1)
    text = _IMPORT.sub(lambda match: f"{match[1]}{dots}{match[2] or ''}", text)
    for node in ast.walk(ast.parse(text)):
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        if any(module.split(".")[0] == "pixart_kernels" for module in modules):
            raise ValueError(
                f"{name} must import the package as `from pixart_kernels... import`, "
                f"got another form in line {node.lineno}"
            )
    return text


def write(output: Path, source: Path = SOURCE) -> str:
    """Write the repository to a folder, in the place of an earlier one. Returns the operators' namespace.

    source: the package's folder. Raises ValueError if the output holds something else.
    """
    if (
        output.exists()
        and not (output / "build" / f"torch-{BACKENDS[0]}" / "metadata.json").is_file()
    ):
        raise ValueError(f"--output must be new or an earlier output, got {output}; choose another")
    namespace, content = files(source)
    aside = output.with_name(f"{output.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    for backend in BACKENDS:
        folder = aside / "build" / f"torch-{backend}"
        for name, data in content.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        metadata = json.dumps(_metadata(backend, namespace), indent=2)
        (folder / "metadata.json").write_text(metadata + "\n", encoding="utf-8")
    card = CARD.format(name=NAME, version=VERSION, namespace=namespace)
    (aside / "README.md").write_text(card, encoding="utf-8")
    shutil.copy(SOURCE.parent / "LICENSE", aside / "LICENSE")
    shutil.rmtree(output, ignore_errors=True)
    aside.rename(output)
    return namespace


def _metadata(backend: str, namespace: str) -> dict[str, object]:
    return {
        "id": f"_pixart_kernels_{backend}_{namespace.removeprefix('pixart_')}",  # the module's name
        "name": NAME,
        "version": VERSION,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": backend},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("dist/hub-kernels"), help="a folder")
    options = parser.parse_args()
    try:
        namespace = write(options.output)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{options.output}: operators in torch.ops.{namespace}, for {', '.join(BACKENDS)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
