"""Compares what is done with experts that few tokens reach, on a small mixture trained on the spot.

    python recipes/demo/expert_policies.py --output outputs/experts       # 10 minutes of one core

For each seed a Qwen3-MoE (4 layers, 16 experts, 2 of them for a token) is trained on the standard
library's sources with the demo model's tokenizer, without a loss that balances experts. Then it is
quantised by every policy, on little text and on more, and its perplexity on held-out modules is
taken. One JSON line for each result goes to OUTPUT/results.jsonl.
"""

import argparse
import json
import math
import time
from pathlib import Path

import torch
from transformers import AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM

import compress
from compress.data.stdlib import python_stdlib

TOKENIZER = Path(__file__).parent / "lm"
POLICIES = ("all_tokens", "rtn", "shared_hessian")


def tokens_of(split: str, limit: int) -> torch.Tensor:
    """Token ids of one split of the standard library, the first so many."""
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER, trust_remote_code=False)
    found: list[int] = []
    texts = python_stdlib(split)
    for text in texts[:: max(1, len(texts) * 3500 // max(1, limit))]:
        found += tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        if len(found) >= limit:
            break
    return torch.tensor(found[:limit])


def train(seed: int, stream: torch.Tensor, steps: int, length: int = 256) -> Qwen3MoeForCausalLM:
    """A small mixture after so many steps of 8 windows."""
    torch.manual_seed(seed)
    config = Qwen3MoeConfig(
        vocab_size=2048,
        hidden_size=96,
        intermediate_size=192,
        moe_intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=24,
        num_experts=16,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = Qwen3MoeForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    for step in range(steps):
        rate = min(1.0, (step + 1) / 20) * min(1.0, 2.5 * (steps - step) / steps)
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * rate
        starts = torch.randint(len(stream) - length, (8,)).tolist()
        batch = torch.stack([stream[start : start + length] for start in starts])
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.eval()


@torch.no_grad()
def perplexity(model: torch.nn.Module, stream: torch.Tensor, length: int = 256) -> float:
    """On windows that follow one another, no BOS, the tail dropped."""
    windows = stream[: len(stream) // length * length].view(-1, length)
    losses = [model(input_ids=w[None], labels=w[None]).loss.double() for w in windows]
    return math.exp(torch.stack(losses).mean().item())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("outputs/experts"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--samples", type=int, nargs="+", default=[4, 32])
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    stream, held_out = tokens_of("train", 1_500_000), tokens_of("held_out", 25_600)
    with (args.output / "results.jsonl").open("a") as results:
        for seed in range(args.seeds):
            folder, started = args.output / f"model-{seed}", time.perf_counter()
            if not folder.exists():
                model = train(seed, stream, args.steps)
                model.save_pretrained(folder)
                tokenizer = AutoTokenizer.from_pretrained(TOKENIZER, trust_remote_code=False)
                tokenizer.save_pretrained(folder)
            plain, _ = compress.load(folder)
            facts = {"seed": seed, "seconds": time.perf_counter() - started}
            facts |= {"bits": 16, "perplexity": perplexity(plain, held_out)}
            write(results, facts)
            for samples in args.samples:
                for policy in POLICIES:
                    found = quantised(args, folder, seed, samples, policy, held_out)
                    write(results, {"seed": seed, "samples": samples, "policy": policy} | found)


def quantised(
    args: argparse.Namespace,
    folder: Path,
    seed: int,
    samples: int,
    policy: str,
    held_out: torch.Tensor,
) -> dict[str, float]:
    """One run: its perplexity, and how many experts were reached by few tokens."""
    recipe = {
        "model": str(folder),
        "calibration": {
            "dataset": "python-stdlib",
            "samples": samples,
            "length": 256,
            "seed": seed,
        },
        "quantize": {
            "bits": args.bits,
            "group_size": 32,
            "experts": {"policy": policy, "least_rows": 64},
        },
    }
    place = args.output / f"out-{seed}-{samples}-{policy}"
    result = compress.run(recipe, place, overwrite=True, self_check=False, check_source=False)
    model, _ = compress.load(place)
    scarce = sum(len(layer.get("scarce_experts", [])) for layer in result.layers)
    return {"bits": args.bits, "perplexity": perplexity(model, held_out), "scarce": scarce}


def write(results, facts: dict) -> None:
    print(json.dumps(facts), file=results, flush=True)
    print(json.dumps(facts), flush=True)


if __name__ == "__main__":
    main()
