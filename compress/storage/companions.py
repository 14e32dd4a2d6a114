"""What a model folder holds beside its weights, copied into a result.

Everything goes along, at any depth (tokenizer and processor files of whatever name, chat templates,
licences, code for generation), but for weights and their indices, what says how weights are packed,
what a result has of its own (config.json, card, report), and hidden files. A folder inside that has
weights of its own is another model.

    copy_companions(source, final)
"""

import os
import shutil
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

# Weights of any framework, and what training leaves of itself.
WEIGHTS = (
    "*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle", "*.msgpack", "*.h5",
    "*.npz", "*.npy", "*.gguf", "*.ggml", "*.onnx", "*.onnx_data", "*.onnx.data", "*.tflite",
    "*.mlmodel", "*.ot", "*.nemo", "*.distcp",
)  # fmt: skip
INDICES = ("*.index.json",)
# Of ModelOpt, of AutoGPTQ and GPTQModel, of AWQ, of quanto.
MARKERS = ("hf_quant_config.json", "quantize_config.json", "quant_config.json", "quanto_qmap.json")
# What a result writes itself, and what is about the source alone.
OWN = ("config.json", "README.md", "recipe.yaml", "modelpress.json", "report.html")
OWN_FOLDERS = ("eval", "__pycache__")


def copy_companions(source: Path, final: Path) -> None:
    """Copies the companions in `source` to the same places below `final`.

    What lies on the way to `final`, if that is inside `source`, is left out.
    """
    for path in companions(source, final):
        target = final / path.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)


def companions(source: Path, final: Path) -> Iterator[Path]:
    """The files to copy, in order."""
    above = {folder.resolve() for folder in (final, *final.parents)} - {source.resolve()}
    for place, folders, files in os.walk(source):
        here = Path(place)
        top = here == source
        if not top and (here.resolve() in above or any(_is(file, WEIGHTS) for file in files)):
            folders.clear()
            continue
        folders[:] = sorted(
            name
            for name in folders
            if not name.startswith(".") and not (top and name in OWN_FOLDERS)
        )
        for file in sorted(files):
            own = top and file in OWN
            if not (own or file.startswith(".") or _is(file, (*WEIGHTS, *INDICES, *MARKERS))):
                yield here / file


def _is(file: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(file.lower(), pattern) for pattern in patterns)
