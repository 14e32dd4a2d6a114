"""Checkpoints under lm-eval's own command: the models `modelpress` and `modelpress-multimodal`.

    modelpress lm-eval --model modelpress --model_args pretrained=OUT --tasks hellaswag

lm-eval finds models in a table of its own and reads no entry points, so what others add has to be
imported before its command runs; importing this file adds both, and `main` is lm-eval's command
behind that. A script that calls `lm_eval.simple_evaluate(model="modelpress")` imports it as well.

Beside `pretrained`, `--model_args` takes what `compress.load` does (`dtype`, `packed`,
`activation_bits`) and what lm-eval's `hf` does. Where `modelpress eval` measures a checkpoint, the
same weights run here: packed linears packed where that is faster, fp32 on a CPU, visual tokens
pruned as the checkpoint says.
"""

import inspect
import logging
import sys
from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from compress.errors import CompressError, UsageError, unknown
from compress.eval.harness import share
from compress.eval.multimodal import is_multimodal, loaded_multimodal
from compress.memory import chosen_device
from compress.pipeline.evaluation import load_measured
from compress.ranks import launched

NAMES = ("modelpress", "modelpress-multimodal")
OWN = ("pretrained", "dtype", "packed", "activation_bits")  # of --model_args, beside lm-eval's
HIDDEN = {"self", "args", "kwargs"}
Multimodal: Any = loaded_multimodal()


def _loaded(
    pretrained: object, device: str | None, dtype: str | None, packed: bool | None, bits: int | None
) -> tuple[Any, Any]:
    """A checkpoint and its tokenizer or processor, as `modelpress eval` loads it."""
    if not isinstance(pretrained, str) or not pretrained:
        raise UsageError("--model_args: expected pretrained=FOLDER or a hub id")
    place = device or "cuda"
    if place.startswith("cuda") and not torch.cuda.is_available():
        # cuda:0 is what its command says where nobody has said anything; its `hf` does the same.
        logging.getLogger("lm_eval").warning("no GPU here: %s runs on the CPU", pretrained)
        place = "cpu"
    if launched()[1] > 1:
        place = "cpu" if place == "cpu" else "auto"  # each rank its own GPU
    place = chosen_device(place)
    kind = None if dtype in (None, "auto") else getattr(torch, str(dtype), None)
    if dtype not in (None, "auto") and not isinstance(kind, torch.dtype):
        raise UsageError(f"--model_args: dtype: expected float32, bfloat16 or auto, found {dtype}")
    dense = None if packed is None else not packed
    model, processor = load_measured(pretrained, place, dense=dense, activation_bits=bits)
    return (model if kind is None else model.to(kind)), processor


def _check_options(options: dict[str, Any], *kinds: Any) -> None:
    """UsageError for what none of lm-eval's models takes, and nobody would read."""
    known = set(OWN)
    for kind in kinds:
        known |= inspect.signature(kind.__init__).parameters.keys()
    for name in options:
        if name not in known:
            raise UsageError(f"--model_args: {unknown('argument', name, sorted(known - HIDDEN))}")


@register_model(NAMES[0])
class ModelpressLM(HFLM):
    """A checkpoint that reads text."""

    def __init__(
        self,
        pretrained: str = "",
        device: str | None = None,
        dtype: str | None = None,
        packed: bool | None = None,
        activation_bits: int | None = None,
        **options: Any,
    ):
        """`options`: of lm-eval's `hf`, such as max_length or add_bos_token."""
        _check_options(options, HFLM)
        model, tokenizer = _loaded(pretrained, device, dtype, packed, activation_bits)
        if is_multimodal(tokenizer):
            tokenizer = tokenizer.tokenizer
        super().__init__(pretrained=model, tokenizer=tokenizer, **options)
        if launched()[1] > 1:
            share(self)


@register_model(NAMES[1])
class ModelpressMultimodalLM(Multimodal):
    """A checkpoint that takes images, and prunes visual tokens where it was made to."""

    def __init__(
        self,
        pretrained: str = "",
        device: str | None = None,
        dtype: str | None = None,
        packed: bool | None = None,
        activation_bits: int | None = None,
        **options: Any,
    ):
        """`options`: of lm-eval's `hf-multimodal`."""
        _check_options(options, Multimodal, HFLM)
        model, processor = _loaded(pretrained, device, dtype, packed, activation_bits)
        if not is_multimodal(processor):
            raise UsageError(f"{pretrained} reads text alone: give --model {NAMES[0]}")
        options.setdefault("convert_img_format", True)
        super().__init__(pretrained=model, tokenizer=processor, **options)
        if launched()[1] > 1:
            share(self)


def main(arguments: Sequence[str]) -> None:
    """lm-eval's command with these arguments; raises UsageError for what it refuses."""
    before = sys.argv
    sys.argv = ["lm_eval", *arguments]
    try:
        cli_evaluate()
    except SystemExit as error:  # argparse's, which has said why
        if error.code:
            raise UsageError("lm-eval does not take this command: see above") from None
    except CompressError:
        raise
    except ValueError as error:  # a task or a model that it does not know
        raise UsageError(f"lm-eval: {error}") from error
    finally:
        sys.argv = before
