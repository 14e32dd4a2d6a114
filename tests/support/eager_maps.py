"""Token weights beside the attention maps that transformers gives in its plainest form."""

from pathlib import Path

import torch
from torch import Tensor

from compress.importance.weighting import mean_one, normalise
from compress.models.skeleton import Skeleton
from compress.quantization.token_weights import TokenWeigher
from compress.recipe.token_importance import TokenImportance
from support.tiny_checkpoints import load_whole


def compare_with_eager_maps(folder: Path, ids: Tensor) -> None:
    """Weights by attention concentration in every layer are the maps' column sums, normalised.

    Where a layer has no map tokens weigh the same, and its windows are counted.
    """
    model, skeleton = load_whole(folder, attn_implementation="eager"), Skeleton(folder)
    everything = torch.ones_like(ids, dtype=torch.bool)
    counts = torch.bincount(ids.flatten(), minlength=skeleton.config.vocab_size)
    section = TokenImportance(name="attention_concentration", minimum=0.01)
    with torch.no_grad():
        result = model(ids, output_attentions=True, output_hidden_states=True)
    maps = iter(a for a in result.attentions if a is not None)
    for index in range(skeleton.num_layers):
        spec = skeleton.spec.layer(index)
        x = result.hidden_states[index]
        weigher = TokenWeigher(section, [(ids, everything)], counts)
        with torch.no_grad(), skeleton.layer(index, skeleton.read_layer(index)) as layer:
            normed = layer.get_submodule(spec.input_norm)(x) if spec.input_norm else x
            inputs = skeleton.layer_inputs(index, x)
            found = weigher.weights(0, x, normed, layer, spec, inputs)
        if not spec.attends:
            assert found is None
            assert weigher.facts() == {"windows_without_map": len(ids)}
            continue
        sums = next(maps).double().sum(dim=(1, 2))
        expected = mean_one(normalise(sums, 0.01, 1.0, everything), everything)
        assert (found - expected).abs().max() < 2e-4 * expected.max()
