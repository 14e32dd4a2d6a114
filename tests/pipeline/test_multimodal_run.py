"""A run on a multimodal model: the decoder is quantised, what it is shown stays as it was.

The oracles are plain transformers, the safetensors library and compressed-tensors' own matching.
"""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import compress
from compress.errors import CheckpointError
from compress.models.skeleton import Skeleton
from compress.models.vision import vision_at_work
from compress.pipeline.run import Job, run
from compress.recipe.sections import Rotate
from compress.rotation.model import RotatedModel
from support.refusals import refused
from support.tiny_models import LAYERS, tiny_inputs
from support.tiny_recipes import BITS, HALF, images, recipe_of

FAMILIES = ("llava", "llava_siglip", "llava_next", "llava_onevision", "qwen2_vl", "qwen2_5_vl")
DOWN = {"overrides": [{"match": "re:.*down_proj$", "bits": 4}]}
TEMPLATE = "{% for m in messages %}{% for p in m['content'] %}{% if p['type'] == 'image' %}"
TEMPLATE += "IMAGE {% else %}{{ p['text'] }}{% endif %}{% endfor %}{% endfor %}"


@torch.no_grad()
def plain_logits(folder, kind="AutoModelForImageTextToText"):
    """Of transformers alone, in fp32; nothing may be missing or left over."""
    import transformers

    model, loading = getattr(transformers, kind).from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(loading.values()), loading
    return model.eval()(**tiny_inputs(model)).logits


def error(found, expected):
    return float((found - expected).abs().max() / expected.abs().max())


# ---- rotation and what stays in 16 bits ---------------------------------------------------------


@pytest.mark.parametrize("kind", ["hadamard", "random"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_rotated_model_gives_the_logits_of_its_source(folder_of, tmp_path, family, kind):
    folder = folder_of(family)
    run(recipe_of(folder, rotate=kind), tmp_path / "out", self_check=False)
    assert error(plain_logits(tmp_path / "out"), plain_logits(folder)) < 2e-5
    source, result = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "out"))
    changed = {n for n in source.keys() & result.keys() if not torch.equal(source[n], result[n])}
    skeleton = Skeleton(folder)
    vision = {skeleton.reader.written_name(name) for name in skeleton.vision_names()}
    assert vision < result.keys()
    rotated = {n for n in vision if any(w in n for w in ("linear_2", "mlp.2", "newline"))}
    assert changed & vision == rotated and rotated  # all else is copied, to the bit and by name


@pytest.mark.parametrize("family", FAMILIES)
def test_the_decoder_alone_is_quantised_and_the_rest_is_ignored(folder_of, tmp_path, family):
    from compressed_tensors.utils import match_named_modules
    from transformers import AutoModelForImageTextToText

    folder = folder_of(family)
    quantize = BITS | {"method": "rtn"}
    run(recipe_of(folder, quantize=quantize), tmp_path / "out", self_check=False)
    plain = AutoModelForImageTextToText.from_pretrained(folder)
    linears = {n for n, m in plain.named_modules() if isinstance(m, torch.nn.Linear)}
    decoder = {n for n in linears if n.startswith("model.language_model.")}
    assert len(decoder) == 7 * LAYERS and len(linears) > len(decoder) + 1
    listed = {m["name"]: m["bits"] for m in compress.inspect(tmp_path / "out")["modules"]}
    assert {name for name, bits in listed.items() if bits == 8} == decoder
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    (group,) = config["config_groups"].values()
    matched = {n for n, _ in match_named_modules(plain, group["targets"], config["ignore"])}
    assert matched == decoder


def test_the_self_check_reloads_several_widths_with_an_image(folder_of, samples, tmp_path):
    recipe = recipe_of(
        folder_of("qwen2_5_vl"), calibration=images(samples), rotate="hadamard",
        quantize=BITS | DOWN, prune_visual_tokens=HALF,
    )  # fmt: skip
    result = run(recipe, tmp_path / "out")
    assert result.self_check["relative_error"] <= 1e-5
    assert result.self_check["tokens"] > 16  # more than the text of the probe


@pytest.mark.parametrize("family", FAMILIES)
def test_names_of_files_and_of_modules_lead_to_the_modules(folder_of, family):
    skeleton = Skeleton(folder_of(family))
    written = load_file(folder_of(family) / "model.safetensors").keys()
    modules = [name for name, _ in skeleton.model.named_parameters()]
    assert sorted(map(skeleton.spec.module_name, written)) == sorted(modules)
    assert list(map(skeleton.spec.module_name, modules)) == modules


def test_the_self_check_catches_a_projector_that_was_not_rotated(folder_of, tmp_path, monkeypatch):
    monkeypatch.setattr(RotatedModel, "vision_tensors", unrotated)
    # What the walk sees is right; only what is written is not.
    monkeypatch.setattr(Job, "_vision_at_work", right_vision)
    with refused(CheckpointError, "final", "relative error"):
        run(recipe_of(folder_of(), rotate="hadamard"), tmp_path / "out", check_source=False)
    assert not (tmp_path / "out" / "config.json").exists()


ROTATED = RotatedModel.vision_tensors


def unrotated(model, rounded=True):
    plain = RotatedModel(model.skeleton, Rotate(kind="none"), model.dtype, model.device)
    return ROTATED(plain)


def right_vision(job):
    return vision_at_work(job.skeleton, ROTATED(job.model), job.model.device)


def old_names(name):
    """As the published LLaVA checkpoints spell them."""
    name = name.replace("model.language_model.", "language_model.model.")
    name = name.replace("lm_head.", "language_model.lm_head.", 1) if name[:2] == "lm" else name
    return name.removeprefix("model.").replace("vision_tower.", "vision_tower.vision_model.")


def test_old_and_new_spellings_of_a_checkpoint_are_read_alike(folder_of, tmp_path):
    source = folder_of("llava_next")
    skeleton = Skeleton(source)
    tensors = {name: skeleton.reader.tensor(name) for name in skeleton.reader.names}
    files = {}
    for spelling, rename in (("new", str), ("old", old_names)):
        folder = shutil.copytree(source, tmp_path / spelling)
        save_file({rename(n): t for n, t in tensors.items()}, folder / "model.safetensors",
                  metadata={"format": "pt"})  # fmt: skip
        assert error(plain_logits(folder), plain_logits(source)) == 0
        run(recipe_of(folder, rotate="hadamard"), tmp_path / f"out-{spelling}", self_check=False)
        files[spelling] = load_file(tmp_path / f"out-{spelling}" / "model.safetensors")
    assert "vision_tower.vision_model.embeddings.patch_embedding.weight" in files["old"]
    again = {skeleton.spec.module_name(name): tensor for name, tensor in files["old"].items()}
    assert again.keys() == files["new"].keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in files["new"].items())
    logits = [plain_logits(tmp_path / f"out-{spelling}") for spelling in files]
    assert torch.equal(*logits)


def test_a_tied_qwen_with_a_flat_config_is_untied_by_rotation(folder_of, tmp_path):
    """Published Qwen2-VL files have the decoder's settings at the top level."""
    folder = shutil.copytree(folder_of("qwen2_vl"), tmp_path / "tied")
    config = json.loads((folder / "config.json").read_text())
    text = config.pop("text_config")
    text.pop("model_type")
    (folder / "config.json").write_text(json.dumps(text | config | {"tie_word_embeddings": True}))
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("lm_head.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    expected = plain_logits(folder)
    for kind in ("hadamard", "none"):
        result = run(recipe_of(folder, rotate=kind), tmp_path / kind, self_check=False)
        assert result.plan.untied is (kind == "hadamard")
        assert error(plain_logits(tmp_path / kind), expected) < 2e-5


def test_a_bf16_model_keeps_its_dtype_throughout(folder_of, tmp_path):
    source = tmp_path / "bf16"
    model, processor = compress.load(folder_of(), dtype=torch.bfloat16)
    model.save_pretrained(source)
    processor.save_pretrained(source)
    run(recipe_of(source, rotate="hadamard"), tmp_path / "out", self_check=False)
    assert {t.dtype for t in load_file(tmp_path / "out/model.safetensors").values()} == {
        torch.bfloat16
    }
    half = recipe_of(source, model={"path": str(source), "dtype": "float16"})
    run(half, tmp_path / "half", self_check=False)
    loaded, _ = compress.load(tmp_path / "half", dtype="auto")
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float16}


def test_layers_can_be_removed_from_the_decoder(folder_of, samples, tmp_path):
    allocate = {"method": "remove", "narrow": 1, "importance": "position"}
    recipe = recipe_of(folder_of("qwen2_vl"), allocate=allocate, prune_visual_tokens=HALF)
    result = run(recipe, tmp_path / "out", self_check=False)
    model, _ = compress.load(tmp_path / "out")
    assert len(model.model.language_model.layers) == LAYERS - 1 == len(result.plan.layers)


# ---- calibration data ---------------------------------------------------------------------------


def test_answers_and_images_are_calibrated_on(folder_of, samples, tmp_path):
    folder = folder_of()
    lines = [json.loads(line) for line in samples.read_text().splitlines()]
    longer = samples.with_name("answered.jsonl")
    longer.write_text("".join(json.dumps(row | {"answer": "w20 w21"}) + "\n" for row in lines))
    tokens = []
    for data in (samples, longer):
        recipe = recipe_of(folder, calibration=images(data), quantize=BITS)
        result = run(recipe, tmp_path / data.stem, self_check=False)
        facts = json.loads((result.path / "modelpress.json").read_text())
        assert facts["calibration"]["prompts"] == 3
        assert "3 prompts with images" in (result.path / "README.md").read_text()
        tokens.append(result.layers[0]["effective_sample_size"])
    assert tokens == [39, 41]


def test_text_is_calibrated_on_as_for_a_text_model(folder_of, tmp_path):
    """A LLaVA calibrated on text has the decoder of a Llama with the same weights and text."""
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = folder_of()
    config = AutoConfig.from_pretrained(folder).text_config
    llama = AutoModelForCausalLM.from_config(config)
    skeleton = Skeleton(folder)
    named = {n.replace("model.language_model.", "model."): n for n in skeleton.reader.names}
    state = {n: skeleton.reader.tensor(named[n]) for n, _ in llama.named_parameters()}
    llama.load_state_dict(state)
    llama.save_pretrained(tmp_path / "llama")
    for file in folder.glob("tokenizer*"):
        shutil.copy(file, tmp_path / "llama")
    text = tmp_path / "text.txt"
    words = torch.randint(2, 80, (2000,), generator=torch.Generator().manual_seed(0))
    text.write_text(" ".join(f"w{word}" for word in words))
    files = []
    for source in (folder, tmp_path / "llama"):
        recipe = recipe_of(
            source, rotate="hadamard", calibration={"dataset": str(text), "length": 32},
            quantize=BITS | {"bits": 3},
        )  # fmt: skip
        run(recipe, tmp_path / f"out-{source.name}", self_check=False)
        files.append(load_file(tmp_path / f"out-{source.name}" / "model.safetensors"))
    for name, tensor in files[1].items():
        inside = name.replace("model.", "model.language_model.", 1)
        assert torch.equal(files[0][inside if name.startswith("model.") else name], tensor), name


def test_what_a_processor_needs_is_copied(folder_of, tmp_path):
    for family in ("llava", "qwen2_vl"):
        source = shutil.copytree(folder_of(family), tmp_path / family)
        token = "<image>" if family == "llava" else "<|image_pad|>"
        (source / "chat_template.jinja").write_text(TEMPLATE.replace("IMAGE", token))
        run(recipe_of(source), tmp_path / f"{family}-out", self_check=False)
        apart = ("config.json", "model.safetensors")
        for file in source.iterdir():
            if file.name not in apart:
                copied = tmp_path / f"{family}-out" / file.name
                assert copied.read_bytes() == file.read_bytes()
    assert (tmp_path / "qwen2_vl-out" / "preprocessor_config.json").is_file()
    assert (tmp_path / "llava-out" / "processor_config.json").is_file()
