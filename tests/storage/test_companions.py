"""What goes along with a model, and what does not."""

import pytest

from compress.checkpoint.export import export
from compress.pipeline.run import run
from compress.storage.companions import copy_companions
from support.tiny_checkpoints import recipe_for, write_checkpoint

COPIED = [
    "tokenizer.json",
    "tokenizer.model",
    "tekken.json",
    "params.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "LICENSE",
    "LICENSE.txt",
    "USE_POLICY.md",
    "NOTICE",
    "chat_template.jinja",
    "additional_chat_templates/tool_use.jinja",
    "custom_generate/generate.py",
    "custom_generate/requirements.txt",
    "modeling_own.py",
    "generation_config.json",
    "preprocessor_config.json",
    "pruning.json",
    "1_Pooling/config.json",
    "figures/deep/er/plot.png",
    "eval_notes.md",
    "sentencepiece.bpe.model",
    "training.json",
]
LEFT = [
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "consolidated.00.pth",
    "tf_model.h5",
    "flax_model.msgpack",
    "model.Q4_K_M.gguf",
    "optimizer.pt",
    "config.json",
    "README.md",
    "recipe.yaml",
    "modelpress.json",
    "report.html",
    "eval/results.json",
    "hf_quant_config.json",
    "quantize_config.json",
    "original/consolidated.00.pth",
    "original/params.json",
    "onnx/model.onnx",
    "onnx/config.json",
    "checkpoint-500/model.safetensors",
    "checkpoint-500/config.json",
    "checkpoint-500/inner/tokenizer.json",
    ".gitattributes",
    ".git/HEAD",
    ".cache/huggingface/x.lock",
    ".env",
    "__pycache__/modeling_own.pyc",
    "figures/.DS_Store",
]


def put(folder, names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"{name} of {folder.name}")


def files_below(folder):
    found = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix() for path in found}


def test_all_but_weights_and_what_says_how_they_are_packed_goes_along(tmp_path):
    source, final = tmp_path / "source", tmp_path / "final"
    put(source, [*COPIED, *LEFT])
    copy_companions(source, final)
    assert files_below(final) == {*COPIED}
    for name in COPIED:
        assert (final / name).read_text() == f"{name} of source"


@pytest.mark.parametrize("inside", ["out/.modelpress/final", "a/b/out/final", "final"])
def test_a_result_inside_the_source_is_not_copied_into_itself(tmp_path, inside):
    put(tmp_path, ["tokenizer.json", "x/y.txt", f"{inside}/made.json"])
    final = tmp_path / inside
    copy_companions(tmp_path, final)
    assert files_below(final) == {"tokenizer.json", "x/y.txt", "made.json"}


def test_links_of_a_download_are_followed_to_their_files(tmp_path):
    put(tmp_path / "blobs", ["abc"])
    source = tmp_path / "snapshot"
    source.mkdir()
    (source / "tokenizer.json").symlink_to(tmp_path / "blobs" / "abc")
    copy_companions(source, tmp_path / "final")
    copied = tmp_path / "final" / "tokenizer.json"
    assert copied.read_text() == "abc of blobs"
    assert not copied.is_symlink()


def test_a_run_and_an_export_bring_them_along(tmp_path):
    source = write_checkpoint(tmp_path / "source")
    more = ["LICENSE", "additional_chat_templates/tool_use.jinja", "tekken.json"]
    put(source, [*more, "pytorch_model.bin"])
    recipe = recipe_for(source, quantize={"method": "rtn"})
    for overwrite in (False, True):  # folders of companions are written over as well
        run(recipe, tmp_path / "out", self_check=False, overwrite=overwrite)
    export(tmp_path / "out", "gptq", tmp_path / "gptq", round_scales=True)
    export(tmp_path / "out", "gptq", tmp_path / "gptq", round_scales=True, overwrite=True)
    for result in (tmp_path / "out", tmp_path / "gptq"):
        assert {*more, "tokenizer.json", "recipe.yaml"} <= files_below(result)
        assert "pytorch_model.bin" not in files_below(result)
