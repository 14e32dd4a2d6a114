"""The demo model, its linears rounded to the nearest, as a compressed-tensors folder.

Written from the layout's functions alone, in a second; what `run` makes of it is tested elsewhere.
"""

import itertools
import json
import shutil
from pathlib import Path

from compress.checkpoint.compressed_tensors import quantization_config
from compress.checkpoint.packed_formats import FORMATS, codes_of_signed
from compress.scheme import Scheme
from compress.storage.safetensors import CheckpointReader, save_tensors
from support.tiny_quantised import round_weight

DEMO = Path(__file__).parents[2] / "recipes" / "demo" / "lm"


def quantise_folder(source: Path, folder: Path, schemes: list[Scheme]) -> Path:
    """Every linear inside a layer in the next of `schemes`, in turn; scales in its own dtype."""
    reader, tensors, modules = CheckpointReader(source), {}, {}
    turn = itertools.cycle(schemes)
    for name in reader.names:
        tensor = reader.tensor(name)
        if ".layers." not in name or tensor.dim() != 2:
            tensors[name] = tensor
            continue
        module = name.removesuffix(".weight")
        modules[module] = scheme = next(turn)
        codes, scale, zero_point, _ = round_weight(tensor.float(), scheme)
        weight = codes_of_signed(codes, scale.to(tensor.dtype), zero_point, scheme)
        packed = FORMATS["pack-quantized"].write(weight, scheme)
        tensors |= {f"{module}.{key}": value for key, value in packed.items()}
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    save_tensors(folder / "model.safetensors", tensors)
    config = json.loads((folder / "config.json").read_text())
    section = quantization_config(modules, ["lm_head", "re:.*(vision|projector).*"])
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": section}))
    return folder
