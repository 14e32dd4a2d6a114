"""Why configs of ours have a name that equals others: transformers compares names.

Once a test here fails with a newer transformers, see whether compress/loading/config_merge.py can
go.
"""

import pytest
import transformers
from packaging.version import Version
from transformers.quantizers.auto import AutoHfQuantizer
from transformers.utils.quantization_config import AwqConfig, CompressedTensorsConfig, GPTQConfig

import compress
from compress.loading.config_merge import SEEN
from support.refusals import refused

# transformers says so of every argument beside a quantised checkpoint's own config.
pytestmark = pytest.mark.filterwarnings("ignore:You passed `quantization_config`")


class Plain(CompressedTensorsConfig):
    """What ours would be without its metaclass."""


def merged(checkpoint, argument):
    return AutoHfQuantizer.merge_quantization_configs(checkpoint, argument)


def test_transformers_is_one_of_the_releases_that_this_was_seen_with():
    first, last = (Version(release).release for release in SEEN)
    assert first <= Version(transformers.__version__).release[:2] <= last


@pytest.mark.parametrize("checkpoint", [CompressedTensorsConfig(), GPTQConfig(bits=4)])
def test_transformers_refuses_a_config_of_another_name(checkpoint):
    with refused(ValueError, "Plain"):
        merged(checkpoint, Plain())


@pytest.mark.parametrize("checkpoint", [CompressedTensorsConfig(), GPTQConfig(bits=4)])
def test_ours_goes_with_every_checkpoint_that_is_read_here(checkpoint):
    found = merged(checkpoint, compress.ModelpressConfig(packed=True, activation_bits=8))
    assert found is checkpoint
    assert found.quant_method == "modelpress"
    assert (found.packed, found.activation_bits) == (True, 8)


def test_ours_goes_with_no_other():
    with refused(ValueError, "ModelpressConfig"):
        merged(AwqConfig(bits=4), compress.ModelpressConfig())
