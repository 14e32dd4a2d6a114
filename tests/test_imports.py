"""What `import compress` gives, and what it costs: names on demand, no torch, no side effects."""

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import compress
from support.refusals import refused


def python(code: str) -> str:
    """What a fresh interpreter prints for `code`."""
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return child.stdout.strip()


@pytest.mark.parametrize(
    "statement",
    [
        "import compress",
        "import compress; compress.Recipe, compress.UsageError, compress.__version__",
        "import compress.cli.main",
        "from compress.cli.main import main; main(['--help'])",
        "from compress.cli.main import main; main(['run', '--help'])",
        "from compress.cli.main import main; main(['bench', 'quantize', '--help'])",
        "from compress.cli.main import main; main(['recipes'])",
    ],
)
def test_heavy_libraries_wait_until_they_are_needed(statement):
    heavy = "{'torch', 'transformers', 'lm_eval', 'datasets', 'matplotlib'}"
    assert python(f"{statement}; import sys; print('loaded', {heavy} & {{*sys.modules}})").endswith(
        "loaded set()"
    )


def test_importing_leaves_the_environment_alone():
    code = (
        "import os; before = dict(os.environ); import compress.cli.main; "
        "print(os.environ == before)"
    )
    assert python(code) == "True"


@pytest.mark.parametrize("name", compress.__all__)
def test_every_name_can_be_had_and_is_listed(name):
    assert getattr(compress, name) is not None
    assert name in dir(compress)


def test_names_are_those_of_their_modules():
    from compress.loading.load import load
    from compress.pipeline.run import run

    assert compress.run is run
    assert compress.load is load


def test_no_module_takes_the_place_of_a_public_name():
    """A package `compress.run` would replace the function once any of its modules is imported."""
    folder = Path(compress.__file__).parent
    modules = {file.stem for file in folder.glob("*.py")} | {
        part.name for part in folder.iterdir() if (part / "__init__.py").is_file()
    }
    assert modules.isdisjoint({*compress.__all__, "kernels", "eval", "recipes"})


def test_unknown_name_is_an_attribute_error():
    with refused(AttributeError, "'qantize'"):
        _ = compress.qantize


def test_version_is_that_of_the_distribution():
    assert compress.__version__ == version("modelpress")


def test_plan_is_the_function_whatever_is_imported_first():
    """In one process, which forgets this project in between and keeps the libraries."""
    code = """
import sys
for first in ("import compress.pipeline.plan", "import compress.pipeline.run", "compress.plan"):
    for name in [name for name in sys.modules if name.partition(".")[0] == "compress"]:
        del sys.modules[name]
    import compress
    exec(first)
    from compress.pipeline.plan import make_plan
    from compress import plan
    print(plan.__name__, plan is compress.plan)
"""
    assert python(code).splitlines() == ["plan True"] * 3


def test_plan_of_a_recipe(checkpoint):
    recipe = compress.Recipe.from_dict(
        {"model": str(checkpoint()), "quantize": {"method": "rtn", "bits": 3, "group_size": 32}}
    )
    planned = compress.plan(recipe)
    assert planned.average_bits == 3
    assert planned.problems == []
