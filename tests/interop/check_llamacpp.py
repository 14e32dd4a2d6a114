"""Whether llama.cpp reads an exported GGUF file as what was written.

Not part of the tests: llama-cpp-python compiles llama.cpp. It takes an environment of its own that
borrows the project's packages:

    python -m venv ENV
    echo "import site; site.addsitedir('PROJECT/lib/python3.X/site-packages')" \\
        > ENV/lib/python3.X/site-packages/project.pth
    CMAKE_ARGS="-DGGML_BLAS=ON -DGGML_BLAS_VENDOR=OpenBLAS" ENV/bin/pip install --no-cache-dir \\
        llama-cpp-python==0.3.36             # a wheel from pip's cache may have no BLAS
    ENV/bin/python tests/interop/check_llamacpp.py

Each case quantises a model by rounding, exports it, and compares logits with those of transformers
(fp32, dense, weights read by their documented layout) on the first 1,000 tokens of python-stdlib's
held-out part, in two windows. Models are the demo model, and tiny random ones of each family.

    float    the same file with every tensor dequantised to fp32 by the library gguf: names, shapes,
             settings and the order of rows are right if logits agree to 2e-5
    packed   the file itself, blocks read by llama.cpp: with BLAS it multiplies batches in fp32, so
             that logits must agree as well, and the first token at 99 % of the positions or more
    kernels  the file itself as llama.cpp generates with it: its kernels round activations to 8
             bits, by which logits differ by one to three percent; shown, not judged
    tokens   whether llama.cpp cuts that text into the same tokens, by the demo model's tokenizer,
             and for `bytes as a fallback` by one such as SentencePiece makes

The key-value cache is fp32.
"""

import contextlib
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from compress.checkpoint.export import export  # noqa: E402
from compress.data.stdlib import python_stdlib  # noqa: E402
from compress.pipeline.run import run  # noqa: E402
from compress.recipe.recipe import Recipe  # noqa: E402
from support.tiny_checkpoints import (  # noqa: E402
    FAMILIES,
    dequantised,
    read_tensors,
    relative_error,
    widths_of,
    write_checkpoint,
)

DEMO = ROOT / "recipes" / "demo" / "lm"
POSITIONS, WINDOW = 1000, 500
SAME, ERROR = 0.99, 2e-5
# Columns of down_proj: 512, all others 192, which sub-blocks of 256 do not divide.
DOWN = "re:.*down_proj$"
DEMO_CASES = {
    "4 bits, groups of 32": {},
    "4 bits, groups of 64, asymmetric": {"group_size": 64, "symmetric": False},
    "8 bits, groups of 32": {"bits": 8},
    "8 bits, channel": {"bits": 8, "group_size": "channel"},
    "2 bits, groups of 256, in down_proj": {
        "bits": 8, "overrides": [{"match": DOWN, "bits": 2, "group_size": 256}]
    },
    "3 bits, groups of 256, in down_proj": {
        "overrides": [{"match": DOWN, "bits": 3, "group_size": 256}]
    },
    "6 bits, groups of 256, in down_proj": {
        "bits": 5, "overrides": [{"match": DOWN, "bits": 6, "group_size": 256}]
    },
    "4 bits, asymmetric, channel, in down_proj": {
        "overrides": [{"match": DOWN, "symmetric": False, "group_size": "channel"}]
    },
    "2, 3, 4, 8 bits, groups of 64, some wider": {
        "group_size": 64,
        "overrides": [
            {"match": DOWN, "bits": 8},
            {"match": r"re:.*layers\.[03]\.mlp\.(gate|up)_proj$", "bits": 2},
            {"match": r"re:.*layers\.[12]\.self_attn.*", "bits": 3},
        ],
    },
    "head of 8 bits": {"ignore": [], "overrides": [{"match": "lm_head", "bits": 8}]},
}  # fmt: skip
LONG = {"vocab_size": 2048, "max_position_embeddings": 512}  # the demo model's tokenizer fits
TINY_CASES = {family: LONG for family in FAMILIES if "sliding" not in family} | {
    "mistral": LONG | {"sliding_window": None},
    "llama, tied": LONG | {"tied": True},
    "llama, bytes as a fallback": LONG,
}


def as_float(source: Path, target: Path) -> Path:
    """Writes a GGUF file again, with all of its tensors in fp32."""
    import gguf

    reader = gguf.GGUFReader(source)
    fields = dict(reader.fields)
    writer = gguf.GGUFWriter(target, fields.pop("general.architecture").contents())
    for name, field in fields.items():
        if not name.startswith("GGUF."):
            element = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(name, field.contents(), field.types[0], element)
    for tensor in reader.tensors:
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        writer.add_tensor(tensor.name, values.reshape(tensor.shape[::-1]).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def fallback_tokenizer() -> PreTrainedTokenizerFast:
    """2,048 tokens: words begin with a mark, bytes stand for letters that are not in the list."""
    words = pre_tokenizers.Metaspace()
    learned = Tokenizer(models.BPE())
    learned.pre_tokenizer = words
    trainer = trainers.BpeTrainer(vocab_size=2048 - 259, limit_alphabet=60, show_progress=False)
    learned.train_from_iterator(python_stdlib("train")[:200], trainer)
    pieces = sorted(learned.get_vocab(), key=learned.get_vocab().get)
    known = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *pieces]
    # SentencePiece merges any two neighbours that form a piece.
    merges = [
        (piece[:i], piece[i:])
        for piece in pieces
        for i in range(1, len(piece))
        if piece[:i] in learned.get_vocab() and piece[i:] in learned.get_vocab()
    ]
    numbers = {piece: i for i, piece in enumerate(known)}
    unknown, first, last = known[:3]
    bpe = models.BPE(numbers, merges, unk_token=unknown, byte_fallback=True, fuse_unk=True)
    tokenizer = Tokenizer(bpe)
    mark = words.replacement
    steps = [normalizers.Prepend(mark), normalizers.Replace(" ", mark)]
    tokenizer.normalizer = normalizers.Sequence(steps)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=first, eos_token=last, unk_token=unknown
    )


@contextlib.contextmanager
def plain_layout():
    """Keeps blocks as they are in the file: those rearranged for the kernels do not go to BLAS."""
    import llama_cpp.llama_cpp as bindings

    original = bindings.llama_model_default_params

    def without_rearranging():
        parameters = original()
        parameters.use_extra_bufts = False
        return parameters

    bindings.llama_model_default_params = without_rearranging
    try:
        yield
    finally:
        bindings.llama_model_default_params = original


def by_llamacpp(
    file: Path, ids: list[int], text: str = "", batch: int = WINDOW
) -> tuple[torch.Tensor, list[int]]:
    """Logits [T, V] in windows, and the tokens of the text. BLAS takes batches from 32 on."""
    from llama_cpp import GGML_TYPE_F32, Llama

    with plain_layout() if batch >= 32 else contextlib.nullcontext():
        model = Llama(
            str(file), n_ctx=WINDOW, n_batch=WINDOW, n_ubatch=batch, n_threads=1, n_threads_batch=1,
            logits_all=True, verbose=False, type_k=GGML_TYPE_F32, type_v=GGML_TYPE_F32,
        )  # fmt: skip
    logits = []
    for start in range(0, len(ids), WINDOW):
        model.reset()
        model.eval(ids[start : start + WINDOW])
        logits.append(torch.from_numpy(np.array(model.scores[: model.n_tokens])))
    tokens = model.tokenize(text.encode(), add_bos=False)
    model.close()
    return torch.cat(logits), tokens


def reference(model: Path, weights: dict[str, torch.Tensor]) -> torch.nn.Module:
    """A dense model of the weights that the source checkpoint stands for, read by its layout."""
    config = AutoConfig.from_pretrained(model)
    config.tie_word_embeddings = "lm_head.weight" not in weights
    dense = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    missing, unexpected = dense.load_state_dict(weights, strict=False)
    assert not unexpected, unexpected
    assert set(missing) <= {"lm_head.weight"}, missing
    return dense


@torch.no_grad()
def check(name: str, folder: Path) -> tuple[str, bool]:
    """One row of the table, and whether all of it is as it should be."""
    text, model = "\n\n".join(python_stdlib("held_out"))[: 20 * POSITIONS], DEMO
    if name in TINY_CASES:
        family = name.partition(",")[0]
        model = write_checkpoint(folder / "model", family, torch.bfloat16, **TINY_CASES[name])
        for file in DEMO.glob("tokenizer*"):
            shutil.copy(file, model / file.name)
    if "fallback" in name:
        fallback_tokenizer().save_pretrained(model)
    ids = AutoTokenizer.from_pretrained(model)(text)["input_ids"]
    quantize = {"method": "rtn", "group_size": 32} | DEMO_CASES.get(name, {})
    recipe = Recipe.from_dict({"model": str(model), "quantize": quantize})
    run(recipe, folder / "source", self_check=False)
    wider = any(word in name for word in ("wider", "groups of 64, asymmetric"))
    export(folder / "source", "gguf", folder / "gguf", requantise=wider)

    windows = torch.tensor(ids[:POSITIONS]).view(-1, WINDOW)
    bits = widths_of(recipe, model)
    dense = reference(model, dequantised(read_tensors(folder / "source"), bits))
    expected = dense(input_ids=windows).logits.flatten(0, 1)
    file, ids_used = folder / "gguf" / "model.gguf", ids[:POSITIONS]
    exact, _ = by_llamacpp(as_float(file, folder / "float.gguf"), ids_used)
    packed, tokens = by_llamacpp(file, ids_used, text)
    kernels, _ = by_llamacpp(file, ids_used, batch=16)
    errors = [relative_error(logits, expected) for logits in (exact, packed, kernels)]
    same = [_same_first(logits, expected) for logits in (packed, kernels)]
    row = f"{name:42} float {errors[0]:.1e}   packed {errors[1]:.1e} {same[0]:7.2%}   "
    row += f"kernels {errors[2]:.1e} {same[1]:7.2%}   "
    row += f"tokens {'equal' if tokens == ids else 'DIFFER'}"
    return row, max(errors[:2]) <= ERROR and same[0] >= SAME and tokens == ids


def _same_first(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The share of positions at which the most likely token is the same."""
    return (found.argmax(-1) == expected.argmax(-1)).double().mean().item()


def main() -> int:
    rows = []
    for name in sys.argv[1:] or [*DEMO_CASES, *TINY_CASES]:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
            rows.append(check(name, Path(folder)))
        print(rows[-1][0], flush=True)
    failed = [row for row, fine in rows if not fine]
    print(f"{len(rows) - len(failed)} of {len(rows)} as they should be")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
