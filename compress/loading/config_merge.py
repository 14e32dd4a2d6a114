"""Letting a quantisation config of ours stand beside the config of the checkpoint.

    AutoModelForCausalLM.from_pretrained(path, quantization_config=ModelpressConfig(packed=True))

gives transformers two configs: that argument, and the checkpoint's own. In the releases of SEEN,
`AutoHfQuantizer.merge_quantization_configs` refuses a pair whose classes differ in `__name__`, of
whatever family the argument is, before it copies the argument's loading attributes to the
checkpoint's config. The quantiser that loads the model is then chosen by one of those attributes.
A subclass for each class of checkpoint would need people to know how theirs was made. So the name
of a class made with `MergesWithCheckpoint` equals that of every config whose checkpoints are read
here, and no other; it prints as what it is.

This file can go once transformers asks the config given as an argument whether it goes with the
checkpoint, or compares classes by their family. tests/loading/test_config_merge.py fails then, and
with every release that is newer than SEEN, so that somebody looks.
"""

SEEN = ("5.17", "5.23")  # the first and the last release of transformers that compare names so

# The classes of transformers for checkpoints that are read here, and ours, for one saved by us.
READABLE = ("CompressedTensorsConfig", "GPTQConfig", "ModelpressConfig")


class _ReadableName(str):
    """The name of a class, equal to that of any readable config."""

    __slots__ = ()
    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        return other in READABLE

    def __ne__(self, other: object) -> bool:
        return other not in READABLE


class MergesWithCheckpoint(type):
    """The class of a config that transformers takes beside that of a readable checkpoint."""

    @property  # a metaclass's own, in the place of type's writeable slot
    def __name__(cls) -> str:  # type: ignore[override]
        return _ReadableName(super().__name__)
