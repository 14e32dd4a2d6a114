"""Whether embedding and head are one tensor: as transformers decides it, not as config.json says.

The oracle is transformers on the source.
"""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from compress.checkpoint.export import export
from compress.errors import CheckpointError
from compress.models.skeleton import Skeleton
from compress.pipeline.inputs import RunInputs
from compress.pipeline.plan import make_plan
from compress.pipeline.run import run
from support.gguf_files import FILE, Read
from support.tiny_checkpoints import logits_of, recipe_for, relative_error
from support.tiny_recipes import recipe_of

TABLE, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def rewritten(source, target, change, **config):
    """A copy of a checkpoint with other tensors and other keys in its config.json."""
    folder = shutil.copytree(source, target)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config_of(folder) | config))
    return folder


def as_it_is(tensors):
    pass


def equal_head(tensors):
    tensors[HEAD] = tensors[TABLE].clone()


def no_head(tensors):
    del tensors[HEAD]


def no_table(tensors):
    del tensors[TABLE]


def one_number_differs(tensors):
    equal_head(tensors)
    tensors[HEAD][-1, -1] += 1


def wider_head(tensors):
    """Equal numbers in another dtype."""
    tensors[HEAD] = tensors[TABLE].bfloat16()
    tensors[TABLE] = tensors[HEAD].float()


SAID_TIED = [
    (as_it_is, False),
    (one_number_differs, False),
    (equal_head, True),
    (wider_head, True),
    (no_head, True),
    (no_table, True),
]


@pytest.mark.parametrize("rotate", ["none", "hadamard"])
@pytest.mark.parametrize("change, tied", SAID_TIED, ids=lambda v: getattr(v, "__name__", v))
def test_the_head_is_the_one_that_transformers_uses(
    checkpoint, tmp_path, press, change, tied, rotate
):
    folder = rewritten(checkpoint(), tmp_path / "model", change, tie_word_embeddings=True)
    assert Skeleton(folder).tied is tied
    recipe = recipe_for(folder, rotate=rotate, quantize={"method": "none"})
    result = press(recipe)
    assert relative_error(logits_of(result), logits_of(folder)) < 1e-5
    one_tensor = tied and rotate == "none"
    assert config_of(result)["tie_word_embeddings"] is one_tensor
    assert (HEAD in load_file(result / "model.safetensors")) is not one_tensor
    notes = make_plan(RunInputs.of(recipe, Skeleton(folder))).notes
    assert any("a head of its own" in note for note in notes) is not tied


def test_a_head_of_its_own_may_lie_in_another_shard(checkpoint, tmp_path, press):
    folder = rewritten(checkpoint(), tmp_path / "model", as_it_is, tie_word_embeddings=True)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    shards = {"a.safetensors": {HEAD}, "b.safetensors": set(tensors) - {HEAD}}
    for name, held in shards.items():
        save_file({n: tensors[n] for n in held}, folder / name, metadata={"format": "pt"})
    index = {n: name for name, held in shards.items() for n in held}
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": index})
    )
    assert Skeleton(folder).tied is False
    result = press(recipe_for(folder, quantize={"method": "none"}))
    assert relative_error(logits_of(result), logits_of(folder)) < 1e-5


@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_vl"])
@pytest.mark.parametrize("place", ["top", "text_config", "both"])
def test_the_flag_may_stand_at_the_top_or_in_the_text_part(folder_of, tmp_path, family, place):
    source = folder_of(family)
    said = {"top": (True, False), "text_config": (False, True), "both": (True, True)}[place]
    text = config_of(source)["text_config"] | {"tie_word_embeddings": said[1]}
    folder = rewritten(
        source, tmp_path / "model", as_it_is, tie_word_embeddings=said[0], text_config=text
    )
    run(recipe_of(folder), tmp_path / "out", self_check=False)
    assert torch.equal(Skeleton(tmp_path / "out").read("lm_head"), Skeleton(source).read("lm_head"))
    config = config_of(tmp_path / "out")
    assert config["tie_word_embeddings"] is False
    assert config["text_config"]["tie_word_embeddings"] is False


def test_an_exported_gguf_keeps_a_head_of_its_own(packed, tmp_path):
    source = packed("qwen2")
    folder = rewritten(source.folder, tmp_path / "model", as_it_is, tie_word_embeddings=True)
    for name, change, expected in (("own", as_it_is, True), ("equal", equal_head, False)):
        tied = rewritten(folder, tmp_path / name, change)
        export(tied, "gguf", tmp_path / f"out-{name}")
        read = Read(tmp_path / f"out-{name}" / FILE)
        assert ("output.weight" in read.values) is expected


def test_a_head_that_nothing_ties_must_be_there(checkpoint, tmp_path):
    folder = rewritten(checkpoint(), tmp_path / "model", no_head)
    with pytest.raises(CheckpointError, match=HEAD):
        Skeleton(folder)
