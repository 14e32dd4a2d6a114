"""A folder of shards that has no index, as transformers reads it.

Shards `model-0000k-of-0000n.safetensors`, all of them, say by themselves what an index would, but
transformers opens `model.safetensors` or an index alone.

    with indexed(folder) as place:
        model = AutoModelForCausalLM.from_pretrained(place)
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from compress.storage.files import write_json
from compress.storage.safetensors import INDEX_FILE, SINGLE_FILE, weight_files
from compress.storage.safetensors_header import read_header


@contextmanager
def indexed(folder: str | Path) -> Iterator[Path]:
    """The folder itself, or, while the context is open, one of links to its files with an index.

    Raises CheckpointError for a folder that has no weights, or not all of its shards.
    """
    folder = Path(folder)
    if (folder / SINGLE_FILE).is_file() or (folder / INDEX_FILE).is_file():
        yield folder
        return
    shards = {file.name: read_header(file) for file in weight_files(folder)}
    index = {name: file for file, entries in shards.items() for name in entries}
    size = sum(entry.nbytes for entries in shards.values() for entry in entries.values())
    with tempfile.TemporaryDirectory(prefix="modelpress-") as temporary:
        place = Path(temporary)
        for path in folder.resolve().iterdir():
            (place / path.name).symlink_to(path)
        write_json(place / INDEX_FILE, {"metadata": {"total_size": size}, "weight_map": index})
        yield place
