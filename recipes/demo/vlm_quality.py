"""How well the demo multimodal model answers, and the card that says so.

exact_match(model, tokenizer, seed=0, count=1024)["corner"]["exact_match"]
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from compress.recipes.demo import scenes
from compress.recipes.demo.vlm_model import IMAGE, VISUAL, Packing, answer_loss

GENERATED = 20 * len(scenes.TYPES)  # prompts given to the saved model


@torch.no_grad()
def exact_match(model: Any, tokenizer: Any, seed: int, count: int) -> dict[str, dict[str, float]]:
    """Of held-out scenes, per question type: asked, share answered exactly, best constant answer.

    Exactly means that the greedy continuation is the answer's word and then the end.
    """
    packing = Packing(tokenizer, len(scenes.TYPES))
    rights, answers = [], []
    for index in range(0, count, 64):
        rng = scenes.generator("held_out", seed, index)
        batch = scenes.draw(rng, min(64, count - index))
        table = scenes.answer_table(batch)
        chosen = scenes.one_of_each_type(rng, table)
        ids, labels = packing.pack(table, chosen)
        with torch.autocast("cpu", torch.bfloat16):
            logits = packing.logits(model, batch.images, ids)
        rights.append(answer_loss(logits, labels, len(scenes.TYPES))[1].numpy())
        answer = np.take_along_axis(table, np.maximum(chosen, 0), axis=1)
        answers.append(np.where(chosen >= 0, answer, -1))
    right, answer = np.concatenate(rights), np.concatenate(answers)
    result = {}
    for i, name in enumerate(scenes.TYPES):
        asked = answer[:, i] >= 0
        commonest = np.bincount(answer[asked, i]).max() / asked.sum()
        result[name] = {
            "asked": int(asked.sum()),
            "exact_match": round(float(right[asked, i].mean()), 4),
            "constant_answer": round(float(commonest), 4),
        }
    return result


@torch.no_grad()
def generated_match(folder: Path, seed: int, count: int) -> dict[str, float]:
    """Exact match per type of the saved model, one question a prompt, through `generate`."""
    processor = transformers.AutoProcessor.from_pretrained(folder, trust_remote_code=False)
    model = transformers.LlavaForConditionalGeneration.from_pretrained(
        folder, dtype=torch.bfloat16, trust_remote_code=False
    )
    items = list(scenes.examples("held_out", seed, count))
    right: dict[str, list[bool]] = {name: [] for name in scenes.TYPES}
    for start in range(0, count, 28):
        part = items[start : start + 28]
        inputs = processor(
            images=[item["image"] for item in part],
            text=[f"{IMAGE} {item['question']}" for item in part],
            padding=True,
            return_tensors="pt",
        ).to(torch.bfloat16)
        said = model.generate(**inputs, max_new_tokens=3, do_sample=False)
        texts = processor.batch_decode(
            said[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
        for item, text in zip(part, texts, strict=True):
            right[item["type"]].append(text.strip() == item["answer"])
    return {name: round(sum(x) / len(x), 4) for name, x in right.items()}


CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: image-text-to-text
---

# A small multimodal model of drawn scenes

The demo multimodal model of modelpress: LLaVA architecture, {millions:.2f} million parameters in
bf16, {VISUAL} visual tokens (pictures of {SIDE} x {SIDE} pixels, patches of {PATCH}), SigLIP tower
of {tower_layers} layers, Llama of {layers}, both {width} wide. It is trained to be compressed, not
to be used.

**Data.** Scenes of two to five coloured digits and shapes on noisy striped backgrounds, drawn by
`recipes/demo/scenes.py`; training and held-out scenes are separate random streams. A prompt is
`<image> what is top left ?`, the answer one word.

**Training.** `recipes/demo/train_vlm.py`, seed {seed}, {questions} questions about each picture.
{steps} `training.json` has the settings and the curve.

**Quality.** Exact match on {held_out:,} held-out scenes, one question of each type where it can be
asked; beside it the best constant answer, and the saved model through `generate` on {GENERATED}
other questions.

{table}
"""


def card(facts: dict[str, Any]) -> str:
    """The model card, from what `training.json` holds."""
    done = facts["stages"]
    header = ["question type", "constant answer", *(f"after {s['stage']}" for s in done)]
    rows = [[*header, "saved, through generate"], ["---"] * (len(header) + 1)]
    for name in scenes.TYPES:
        cells = [s["held_out"][name] for s in done]
        shares = [cells[0]["constant_answer"], *(c["exact_match"] for c in cells)]
        rows.append([name, *(f"{100 * x:.1f} %" for x in (*shares, facts["generated"][name]))])
    steps = [f"Stage {s['stage']}: {s['steps']:,} steps, {s['scenes']:,} scenes." for s in done]
    return CARD.format(
        **facts["arguments"],
        millions=facts["parameters"] / 1e6,
        steps=" ".join(steps),
        table="\n".join("| " + " | ".join(row) + " |" for row in rows),
        VISUAL=VISUAL,
        SIDE=scenes.SIDE,
        PATCH=scenes.PATCH,
        GENERATED=GENERATED,
    )
