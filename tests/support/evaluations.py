"""An evaluation and layers in small, for tables and pages."""

EVALUATION = {
    "results": {"demo_code": {"acc": 0.525, "acc_stderr": 0.0251}},
    "perplexity": {
        "value": 9.3172,
        "value_stderr": 0.213,
        "mean_nll": 2.2319,
        "stderr": 0.0229,
        "line": "perplexity 9.3172 with 512 tokens",
    },
    "kl": {"mean": 0.0831, "stderr": 0.0012, "line": "KL 0.0831"},
    "baseline": {
        "results": {"demo_code": {"acc": 0.6, "acc_stderr": 0.0245}},
        "perplexity": {"value": 8.75, "value_stderr": 0.2, "mean_nll": 2.169, "stderr": 0.0228},
    },
    "difference": {
        "results": {"demo_code": {"acc": {"value": -0.075, "stderr": 0.012, "count": 400}}},
        "mean_nll": {"value": 0.0629, "stderr": 0.0031, "count": 90},
    },
    "conditions": {"limit": None, "samples": {"demo_code": 400}},
}
LAYERS = [
    {
        "name": f"model.layers.{i}.{part}",
        "bits": bits,
        "group_size": 64,
        "error": 0.001 * (i + 1) * bits,
        "effective_sample_size": 812.5,
        "seconds": 0.25,
    }
    for i in range(20)
    for part, bits in (("self_attn.q_proj", 3), ("mlp.down_proj", 4))
]
