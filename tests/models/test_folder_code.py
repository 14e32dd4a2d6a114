"""The Python in a model folder never runs, whoever says yes, and no child process is told yes."""

import ast
import builtins
import json
import shutil
from pathlib import Path

import pytest

import compress
from compress.errors import CompressError
from compress.models.skeleton import Skeleton
from support.tiny_folders import tiny_folder

ROOT = Path(__file__).parents[2]
PRODUCT = [
    p for room in ("compress", "eval", "kernels", "recipes") for p in (ROOT / room).rglob("*.py")
]
CODE = """\
from pathlib import Path
Path({marker!r}).write_text("the folder's code ran")
from transformers import PretrainedConfig, PreTrainedTokenizerFast, ProcessorMixin
class Config(PretrainedConfig):
    model_type = "evil"
class Tokenizer(PreTrainedTokenizerFast):
    pass
class Processor(ProcessorMixin):
    pass
"""
# The file that names the code, and what it says.
CONFIG = {"auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Config"}}
PLACES = {
    "config": ("config.json", CONFIG | {"model_type": "evil"}),
    "known type": ("config.json", CONFIG),
    "tokenizer": ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": [None, "evil.Tokenizer"]},
                                            "tokenizer_class": "Tokenizer"}),
    "tokenizer, old": ("tokenizer_config.json", {"auto_map": ["evil.Tokenizer", "evil.Tokenizer"],
                                                 "tokenizer_class": "Tokenizer"}),
    "processor": ("processor_config.json", {"auto_map": {"AutoProcessor": "evil.Processor"},
                                            "processor_class": "Processor"}),
    "image processor": ("preprocessor_config.json", {
        "auto_map": {"AutoProcessor": "evil.Processor", "AutoImageProcessor": "evil.Processor"}}),
}  # fmt: skip


@pytest.fixture
def planted(tmp_path, monkeypatch):
    """Puts code in a folder and says yes to every question; the function gives the code's mark."""
    monkeypatch.setattr(builtins, "input", lambda *_: "y")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))

    def plant(folder, place):
        name, says = PLACES[place]
        file = folder / name
        known = json.loads(file.read_text()) if file.is_file() else {}
        file.write_text(json.dumps(known | says))
        (folder / "evil.py").write_text(CODE.format(marker=str(tmp_path / "ran")))
        return tmp_path / "ran"

    return plant


def attempt(call, *arguments):
    """Whether it is refused or not is another matter; what is refused is in one line."""
    try:
        call(*arguments)
    except CompressError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize("place", [p for p in PLACES if "processor" not in p])
def test_code_of_a_language_model_does_not_run(checkpoint, planted, tmp_path, place):
    folder = shutil.copytree(checkpoint("llama"), tmp_path / "model")
    mark = planted(folder, place)
    attempt(lambda: Skeleton.open(folder).tokenizer())
    attempt(compress.load, folder)
    assert not mark.exists()


@pytest.mark.parametrize("place", PLACES)
def test_code_of_a_multimodal_model_does_not_run(planted, tmp_path, place):
    folder = tiny_folder(tmp_path / "model")
    mark = planted(folder, place)
    attempt(lambda: Skeleton.open(folder).processor())
    attempt(lambda: Skeleton.open(folder).tokenizer())
    attempt(compress.load, folder)
    assert not mark.exists()


def calls(file, *names):
    """The calls of functions of these names in a file, with their keywords."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        named = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
        if named and node.func.attr in names:
            yield f"{file}:{node.lineno}", node, {k.arg: k.value for k in node.keywords}


def test_every_reader_is_told_to_run_no_code():
    found = [call for file in PRODUCT for call in calls(file, "from_pretrained", "from_config")]
    assert len(found) > 5
    for place, _, keywords in found:
        told = keywords.get("trust_remote_code")
        assert isinstance(told, ast.Constant) and told.value is False, place


def test_every_child_process_reads_nothing():
    found = [call for file in PRODUCT for call in calls(file, "run", "Popen")]
    found = [(p, keys) for p, c, keys in found if ast.unparse(c.func).startswith("subprocess.")]
    assert len(found) > 4
    for place, keywords in found:
        assert ast.unparse(keywords.get("stdin", ast.Constant(None))) == "subprocess.DEVNULL", place
