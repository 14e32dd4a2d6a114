"""Layer-wise widths: score the demo model's layers, then spend a budget of 3.25 bits.

python examples/layer_widths.py
"""

import compress


def main(importance: str = "outlier_weight_count") -> dict[str, int]:
    """Decoder layer -> bits, the more important layers at the wider width."""
    recipe = compress.Recipe.load(
        "demo-layerwise",
        overrides=[f"allocate.importance={importance}", "calibration.samples=4", "evaluate=null"],
    )
    allocation = compress.plan(recipe).allocation
    assert allocation is not None
    return allocation.widths


if __name__ == "__main__":
    for layer, bits in main().items():
        print(f"{layer:20} {bits}")
