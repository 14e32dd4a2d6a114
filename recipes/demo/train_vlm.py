"""Trains the demo multimodal model, `recipes/demo/vlm/`: a small LLaVA that answers about scenes.

    python recipes/demo/train_vlm.py --output recipes/demo/vlm         # continues if interrupted

The scenes and questions are drawn by `scenes.py`. End to end from scratch such a model stays at
the blind prior for long, so it learns in three stages, each with its own optimiser:

1. tower: the SigLIP tower alone, which says of every patch what it holds (linear heads, discarded);
2. language: projector and Llama, the tower frozen, many questions about each picture in one
   sequence. The questions share the visual tokens and do not see each other (a block-diagonal
   mask), and all begin at the same position, as if each were asked alone. Here the visual tokens
   also have to name what they hold, a small extra loss that ties features to words early;
3. joint: everything together, at a lower rate, answers only.

Optimiser: Muon for the matrices inside layers and projector, AdamW for the rest; warm-up, constant
rate, then a linear fall to zero over the last 40 % of a stage. Matrix products run in bf16.

The state is written every few minutes, safetensors only, to `<output>-training.safetensors`, and
found there by the next run. Batches depend on the seed, the stage and the step alone, so a
continued run sees what an uninterrupted one would have seen. The steps of unfinished stages may be
changed between runs, and a finished last stage goes on if it is given more.
"""

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from compress.errors import CompressError, UsageError
from compress.recipes.demo import scenes
from compress.recipes.demo.train_lm import optimisers_of, rate_factor
from compress.recipes.demo.vlm_model import (
    VISUAL,
    Packing,
    answer_loss,
    build_model,
    build_processor,
    normalise,
)
from compress.recipes.demo.vlm_quality import GENERATED, card, exact_match, generated_match

NAMING = 0.1  # weight of the visual tokens' extra loss in the language stage
SAVE_SECONDS = 180
# What a patch is asked for in the first stage, and the number of classes.
HEADS = {
    "kind": len(scenes.KINDS) + 1,
    "colour": len(scenes.COLOURS) + 1,
    "centre": len(scenes.KINDS) + 1,
    "row": scenes.GRID,
    "column": scenes.GRID,
}


@dataclass(frozen=True)
class Stage:
    """One stage: `scenes` pictures in a step, and the parts of the model that it trains."""

    name: str
    steps: int
    scenes: int
    rate: float
    parts: tuple[str, ...]


def stages(args: argparse.Namespace) -> list[Stage]:
    language = ("model.multi_modal_projector", "model.language_model", "lm_head")
    return [
        Stage("tower", args.tower_steps, 64, 3e-3, ("model.vision_tower", "heads")),
        Stage("language", args.language_steps, 16, 2e-3, language),
        Stage("joint", args.joint_steps, 16, 5e-4, ("model.vision_tower", *language)),
    ]


def patch_loss(model: Any, heads: nn.ModuleDict, batch: scenes.Scenes) -> tuple[Tensor, float]:
    """Mean cross-entropy of the five heads, and the share of object patches with kind right."""
    hidden = model.model.vision_tower(normalise(batch.images)).last_hidden_state
    labels = {name: torch.from_numpy(x) for name, x in scenes.patch_labels(batch).items()}
    logits = {name: head(hidden).float() for name, head in heads.items()}
    losses = [cross_entropy(logits[n].flatten(0, 1), labels[n].flatten()) for n in heads]
    held = labels["kind"] < len(scenes.KINDS)
    right = (logits["kind"].argmax(-1) == labels["kind"])[held].float().mean().item()
    return torch.stack(losses).sum(), right


def naming_loss(logits: Tensor, batch: scenes.Scenes, packing: Packing) -> Tensor:
    """A visual token names the kind and the colour of what its patch holds, or "nothing"."""
    labels = scenes.patch_labels(batch)
    nothing = scenes.ANSWERS.index("nothing")
    colours = len(scenes.KINDS) + labels["colour"]
    kind = np.where(labels["kind"] < len(scenes.KINDS), labels["kind"], nothing)
    colour = np.where(labels["colour"] < len(scenes.COLOURS), colours, nothing)
    words = [packing.answers[torch.from_numpy(x)].flatten() for x in (kind, colour)]
    flat = logits[:, :VISUAL].flatten(0, 1)
    return (cross_entropy(flat, words[0]) + cross_entropy(flat, words[1])) / 2


class Training:
    """The model, the heads, the stage's optimisers, and how far they are."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.plan = args, stages(args)
        self.processor = build_processor()
        self.packing = Packing(self.processor.tokenizer, args.questions)
        torch.manual_seed(args.seed)
        self.model = build_model(args.width, args.tower_layers, args.layers)
        self.heads = nn.ModuleDict({n: nn.Linear(args.width, c) for n, c in HEADS.items()})
        self.stage = self.step = 0
        self.facts: list[dict[str, Any]] = []  # of finished stages
        self.curve: list[dict[str, float]] = []  # of the current stage
        self.seconds = 0.0  # of the current stage
        self.saved_at = time.monotonic()
        self.path = args.output.with_name(f"{args.output.name}-training.safetensors")

    def parameters(self) -> dict[str, nn.Parameter]:
        named = dict(self.model.named_parameters())
        return named | {f"heads.{name}": p for name, p in self.heads.named_parameters()}

    def build_optimisers(self, stage: Stage) -> None:
        named = self.parameters()
        trained = {name: p for name, p in named.items() if name.startswith(stage.parts)}
        for name, p in named.items():
            p.requires_grad_(name in trained)
        self.trained = list(trained.values())
        matrices, others = [], []
        for name, p in trained.items():
            inner = p.ndim == 2 and (".layers." in name or "projector" in name)
            (matrices if inner else others).append(p)
        self.optimisers = optimisers_of(matrices, others, stage.rate)

    def settings(self) -> dict[str, Any]:
        return {k: v for k, v in vars(self.args).items() if k != "output"}

    def check_settings(self, earlier: dict[str, Any]) -> None:
        """Raises UsageError if the state file's settings are not this run's."""
        free = {f"{stage.name}_steps" for stage in self.plan[self.stage :]}
        free.add(f"{self.plan[-1].name}_steps")
        now = self.settings()
        other = [k for k in now if k not in free and earlier.get(k) != now[k]]
        if other:
            found = ", ".join(f"{k} {earlier.get(k)} (now {now[k]})" for k in other)
            raise UsageError(
                f"{self.path} belongs to a run with {found}: use the same settings, or remove it "
                "to begin anew"
            )

    def save(self) -> None:
        """Everything that a continued run needs, in one file, replaced as a whole."""
        tensors = {f"parameter.{name}": p.detach() for name, p in self.parameters().items()}
        for i, optimiser in enumerate(self.optimisers):
            for k, entry in optimiser.state_dict()["state"].items():
                tensors |= {f"optimiser.{i}.{k}.{name}": x for name, x in entry.items()}
        place = {"stage": self.stage, "step": self.step, "seconds": self.seconds}
        place |= {"facts": self.facts, "curve": self.curve, "settings": self.settings()}
        part = self.path.with_suffix(".part")
        contiguous = {name: x.contiguous() for name, x in tensors.items()}
        save_file(contiguous, part, metadata={"training": json.dumps(place)})
        part.replace(self.path)
        self.saved_at = time.monotonic()

    def resume(self) -> None:
        """Continues from the state file if there is one. Raises UsageError for other settings."""
        if not self.path.exists():
            self.build_optimisers(self.plan[0])
            return
        with safe_open(self.path, "pt") as file:
            place = json.loads(file.metadata()["training"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        self.stage, self.step, self.seconds = place["stage"], place["step"], place["seconds"]
        self.facts, self.curve = place["facts"], place["curve"]
        self.check_settings(place["settings"])
        if self.stage == len(self.plan) and self.facts[-1]["steps"] < self.plan[-1].steps:
            last = self.facts.pop()
            self.stage, self.step = self.stage - 1, last["steps"]
            self.seconds, self.curve = last["seconds"], last["curve"]
        with torch.no_grad():
            for name, p in self.parameters().items():
                p.copy_(tensors[f"parameter.{name}"])
        self.build_optimisers(self.plan[min(self.stage, len(self.plan) - 1)])
        for i, optimiser in enumerate(self.optimisers):
            state: dict[int, dict[str, Tensor]] = {}
            for key, tensor in tensors.items():
                if key.startswith(f"optimiser.{i}."):
                    _, _, k, name = key.split(".")
                    state.setdefault(int(k), {})[name] = tensor
            groups = optimiser.state_dict()["param_groups"]
            optimiser.load_state_dict({"state": state, "param_groups": groups})
        print(f"continues in stage {self.stage + 1} at step {self.step}", flush=True)

    def loss(self, stage: Stage) -> tuple[Tensor, float]:
        """Of this step's batch: the loss, and the share of patches or answers that are right."""
        rng = scenes.generator("train", self.args.seed, self.stage, self.step)
        batch = scenes.draw(rng, stage.scenes)
        with torch.autocast("cpu", torch.bfloat16):
            if stage.name == "tower":
                return patch_loss(self.model, self.heads, batch)
            table = scenes.answer_table(batch)
            chosen = scenes.choose(rng, table, self.args.questions)
            ids, labels = self.packing.pack(table, chosen)
            logits = self.packing.logits(self.model, batch.images, ids)
            loss, right = answer_loss(logits, labels, self.args.questions)
            if stage.name == "language":
                loss = loss + NAMING * naming_loss(logits, batch, self.packing)
        return loss, right.float().mean().item()

    def exact_match(self, count: int) -> dict[str, dict[str, float]]:
        return exact_match(self.model, self.processor.tokenizer, self.args.seed, count)

    def run_stage(self, stage: Stage) -> None:
        started, before, fall = time.monotonic(), self.seconds, 0.4
        while self.step < stage.steps:
            factor = rate_factor(self.step, stage.steps, min(200, stage.steps), fall)
            for optimiser in self.optimisers:
                for group in optimiser.param_groups:
                    group["lr"] = stage.rate * factor
            loss, right = self.loss(stage)
            if not loss.isfinite():
                raise CompressError(
                    f"the loss of stage {stage.name} is {loss.item()} at step {self.step}: lower "
                    f"its rate ({stage.rate}) and continue from {self.path}"
                )
            loss.backward()
            nn.utils.clip_grad_norm_(self.trained, 1.0)
            for optimiser in self.optimisers:
                optimiser.step()
                optimiser.zero_grad()
            self.step += 1
            self.seconds = before + time.monotonic() - started
            if self.step % 50 == 0 or self.step == stage.steps:
                print(
                    f"{stage.name} {self.step}/{stage.steps} loss {loss.item():.3f} "
                    f"right {right:.3f} {self.seconds:.0f} s",
                    flush=True,
                )
            if self.step % 1000 == 0 and stage.name != "tower":
                match = self.exact_match(256)
                point = {name: m["exact_match"] for name, m in match.items()}
                self.curve.append({"step": self.step, **point})
                print(f"held out at {self.step}: {json.dumps(point)}", flush=True)
            if time.monotonic() - self.saved_at > SAVE_SECONDS:
                self.save()

    def run(self) -> None:
        """All stages that are left; the model and its card are written after each."""
        self.args.output.mkdir(parents=True, exist_ok=True)
        self.resume()
        while self.stage < len(self.plan):
            stage = self.plan[self.stage]
            self.run_stage(stage)
            match = self.exact_match(self.args.held_out)
            print(stage.name, json.dumps({n: m["exact_match"] for n, m in match.items()}))
            fact = {"stage": stage.name, "steps": stage.steps, "scenes": stage.scenes * stage.steps}
            fact |= {"seconds": round(self.seconds), "curve": self.curve, "held_out": match}
            self.facts.append(fact)
            self.stage, self.step, self.seconds, self.curve = self.stage + 1, 0, 0.0, []
            if self.stage < len(self.plan):
                self.build_optimisers(self.plan[self.stage])
            self.save()
            self.write()

    def write(self) -> None:
        """The model folder as it stands: weights in bf16, processor, `training.json`, the card."""
        output = self.args.output
        weights = {name: x.to(torch.bfloat16) for name, x in self.model.state_dict().items()}
        self.model.config.dtype = torch.bfloat16
        self.model.save_pretrained(output, state_dict=weights)
        self.processor.save_pretrained(output)
        facts = {
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "arguments": self.settings(),
            "stages": self.facts,
            "generated": generated_match(output, self.args.seed + 1, GENERATED),
        }
        (output / "training.json").write_text(json.dumps(facts, indent=1) + "\n")
        (output / "README.md").write_text(card(facts))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--tower-steps", type=int, default=1500)
    parser.add_argument("--language-steps", type=int, default=2600)
    parser.add_argument("--joint-steps", type=int, default=300)
    parser.add_argument("--questions", type=int, default=12, help="about each picture")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--tower-layers", type=int, default=4)
    parser.add_argument("--layers", type=int, default=12, help="of the language model")
    parser.add_argument("--held-out", type=int, default=1024, help="scenes in an evaluation")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    try:
        Training(args).run()
    except CompressError as error:
        parser.exit(error.exit_code, f"{error}\n")


if __name__ == "__main__":
    main()
