"""VFlowOpt on the demo model: one picture, one question, a quarter of its visual tokens.

python examples/prune_a_picture.py
"""

import torch

import compress
from compress.data.samples import read_samples


def main(keep: float = 0.25) -> tuple[int, list[int]]:
    """Visual tokens of the picture, and how many are left at each decoder layer."""
    model, processor = compress.load("recipes/demo/vlm")
    inputs = read_samples("demo-scenes", processor, count=1, seed=0)[0]
    layers = model.config.get_text_config().num_hidden_layers
    strategy = compress.PruneStrategy.for_budget("vflowopt", keep, layers, vit_layer=1)
    with torch.no_grad(), compress.prune_visual_tokens(model, strategy, processor) as pruning:
        model(**inputs)
    visual = int((inputs["input_ids"] == model.config.image_token_id).sum())
    text = inputs["input_ids"].shape[1] - visual
    return visual, [int(pruning.last.kept(layer).sum()) - text for layer in range(layers)]


if __name__ == "__main__":
    visual, left = main()
    print(f"{visual} visual tokens; left at each layer: {left}")
