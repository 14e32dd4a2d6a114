"""Trains the demo language model, `recipes/demo/lm/`: a 3M-parameter Llama on Python's own sources.

    python recipes/demo/train_lm.py --output recipes/demo/lm                 # about 2 h on 2 cores
    python recipes/demo/train_lm.py --layers 12 --hidden 128 --mlp 384 --tokens 16e6 --bf16 \
        --output recipes/demo/lm-deep                                         # 1 to 2 h on 1 core

Data: the standard library of the running interpreter (`compress.data.stdlib`): one module
in twenty is held out by a hash of its path and never seen here. Byte-level BPE of 2,048 tokens.

Optimiser: Muon for the matrices of the decoder layers (its update has an AdamW-like RMS, so one
learning rate serves both), AdamW for embeddings, head and norms. The learning rate is constant
after a warm-up and falls linearly to zero over the last 40 % of the steps: the state before the
fall is kept, so that `--resume` can train longer from it without paying for the first part again.
"""

import argparse
import json
import math
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from compress.data.stdlib import python_stdlib

END_OF_TEXT = "<|endoftext|>"


def train_tokenizer(texts: list[str], size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer without any automatic special token."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=size,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=sorted(alphabet),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT
    )


def token_stream(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """All documents, each behind one end-of-text token: [tokens]."""
    encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return torch.tensor([i for ids in encoded for i in (tokenizer.eos_token_id, *ids)])


@torch.no_grad()
def held_out_perplexity(model: LlamaForCausalLM, stream: torch.Tensor, length: int) -> float:
    """Perplexity on non-overlapping windows of `length` tokens, no BOS, the tail dropped."""
    model.eval()
    windows = stream[: stream.numel() // length * length].view(-1, length)
    losses = [
        model(input_ids=batch, labels=batch).loss * batch.shape[0] for batch in windows.split(16)
    ]
    model.train()
    return math.exp(torch.stack(losses).sum().item() / windows.shape[0])


def build_model(args: argparse.Namespace) -> LlamaForCausalLM:
    heads = args.hidden // 32
    config = LlamaConfig(
        vocab_size=args.vocabulary,
        hidden_size=args.hidden,
        intermediate_size=args.mlp,
        num_hidden_layers=args.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 3 if heads % 3 == 0 else heads // 2,
        max_position_embeddings=args.context,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    return LlamaForCausalLM(config)


def build_optimisers(model: LlamaForCausalLM, rate: float) -> list[torch.optim.Optimizer]:
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    inside = {id(p) for p in matrices}
    return optimisers_of(matrices, [p for p in model.parameters() if id(p) not in inside], rate)


def optimisers_of(
    matrices: list[torch.nn.Parameter], others: list[torch.nn.Parameter], rate: float
) -> list[torch.optim.Optimizer]:
    """Muon for the matrices, AdamW for the others."""
    return [
        torch.optim.Muon(matrices, lr=rate, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def rate_factor(step: int, steps: int, warmup: int, fall: float) -> float:
    """Linear warm-up, constant, then linear to zero over the last `fall` of the steps."""
    return min(1.0, (step + 1) / warmup, (steps - step) / (fall * steps))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--tokens", type=float, default=20e6, help="training tokens in all")
    parser.add_argument("--vocabulary", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=192)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--mlp", type=int, default=512)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--batch", type=int, default=8, help="windows of `context` tokens a step")
    parser.add_argument("--rate", type=float, default=4e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bf16", action="store_true", help="matrix products in bf16")
    parser.add_argument("--state", type=Path, help="folder for the state that --resume needs")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--max-steps", type=int, help="stop early (a trial)")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    train_texts, test_texts = python_stdlib("train"), python_stdlib("held_out")
    tokenizer = train_tokenizer(train_texts, args.vocabulary)
    train, test = token_stream(tokenizer, train_texts), token_stream(tokenizer, test_texts)
    model = build_model(args)
    optimisers = build_optimisers(model, args.rate)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters:,} parameters, {train.numel():,} + {test.numel():,} tokens", flush=True)

    steps = int(args.tokens) // (args.batch * args.context)
    first, fall = 0, 0.4
    saved = args.state / "before_fall.pt" if args.state else None
    if args.resume:
        # weights_only: tensors and plain containers, no pickled code
        state = torch.load(saved, weights_only=True)
        model.load_state_dict(state["model"])
        for optimiser, part in zip(optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(part)
        first = state["step"]

    curve, started = [], time.time()
    for step in range(first, min(steps, args.max_steps or steps)):
        if saved and step == int(steps * (1 - fall)):
            saved.parent.mkdir(parents=True, exist_ok=True)
            parts = [optimiser.state_dict() for optimiser in optimisers]
            torch.save({"model": model.state_dict(), "optimisers": parts, "step": step}, saved)
        for optimiser in optimisers:
            for group in optimiser.param_groups:
                group["lr"] = args.rate * rate_factor(step, steps, warmup=100, fall=fall)
        # A step's windows depend on the seed and the step alone: a resumed run sees the same.
        draw = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        starts = torch.randint(train.numel() - args.context, (args.batch,), generator=draw)
        batch = torch.stack([train[s : s + args.context] for s in starts.tolist()])
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad()
        if step % 50 == 0:
            speed = (step - first + 1) * args.batch * args.context / (time.time() - started)
            print(f"step {step}/{steps} loss {loss.item():.3f} {speed:,.0f} tokens/s", flush=True)
        if step % 500 == 499 or step == steps - 1:
            perplexity = held_out_perplexity(model, test, 256)
            curve.append({"step": step + 1, "held_out_perplexity": round(perplexity, 3)})
            print(f"step {step + 1} held-out perplexity {perplexity:.3f}", flush=True)

    args.output.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    facts = {
        "parameters": parameters,
        "training_tokens": steps * args.batch * args.context,
        "training_bytes": sum(len(t.encode()) for t in train_texts),
        "held_out_bytes": sum(len(t.encode()) for t in test_texts),
        "arguments": {k: v for k, v in vars(args).items() if not isinstance(v, Path)},
        "seconds": round(time.time() - started),
        "curve": curve,
    }
    (args.output / "training.json").write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
