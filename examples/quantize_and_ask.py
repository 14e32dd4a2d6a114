"""Compress the demo model at 3 bits, load the result with its weights packed, and let it write.

python examples/quantize_and_ask.py [OUTPUT]
"""

import sys

import compress


def main(output: str = "outputs/example-rsq") -> str:
    recipe = compress.Recipe.load(
        "demo-lm", overrides=["calibration.samples=8", "calibration.length=128", "evaluate=null"]
    )
    result = compress.run(recipe, output, overwrite=True)
    print(f"{result.plan.average_bits:.2f} bits a weight, {result.plan.bytes['total']:,} bytes")

    model, tokenizer = compress.load(output)
    inputs = tokenizer("import os\n\ndef ", return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    return tokenizer.decode(tokens[0])


if __name__ == "__main__":
    print(main(*sys.argv[1:]))
