"""Each token strategy of RSQ against QuaRot on a real model: runs, records and prints the table.

    python tests/interop/board/strategies.py MODEL TEXT OUT --seeds 0,1,2,3,4

It runs in the project's environment. MODEL is the 16-bit model, TEXT the folder that cut.py wrote.
Results go to OUT, and what is there is kept. strategies.json gets, of each strategy and seed, the
NLL and KL of each window: enough to pair any two again. The table is of all that is recorded;
paired differences are in nats a token, ± as `modelpress compare` has it, over windows and seeds.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import yaml

from compress.comparison.compare import compare
from compress.comparison.pairs import differences_of
from compress.recipe.recipe import Recipe, shipped_folder

FILE = Path(__file__).with_name("strategies.json")
BASE = "uniform"  # QuaRot
STRATEGIES = (
    "attention_concentration",
    "activation_norm",
    "activation_difference",
    "token_frequency",
    "token_similarity",
    "first_n",
    "first_last_n",
    "dot",
    "cluster",
    "position",
)


def recipe(strategy: str, model: Path, text: Path) -> Recipe:
    """QuaRot for `uniform`, otherwise RSQ with that strategy."""
    name = "quarot" if strategy == BASE else "rsq"
    settings: dict[str, Any] = yaml.safe_load(
        (shipped_folder() / f"smollm2/{name}.yaml").read_text()
    )
    settings |= {"name": strategy, "model": str(model.absolute())}
    settings["calibration"]["dataset"] = str((text / "calibration.txt").absolute())
    settings["evaluate"]["perplexity"]["dataset"] = str((text / "measured.txt").absolute())
    settings["quantize"]["token_importance"] = strategy
    return Recipe.of(settings)


def rounded(values: list[float]) -> list[float]:
    return [round(value, 3) for value in values]


def recorded() -> dict[str, Any]:
    return json.loads(FILE.read_text()) if FILE.exists() else {"tokens": [], "runs": {}}


def record(runs: list[Any]) -> None:
    """Adds the windows' totals of these runs; one line for each."""
    known = recorded()
    for run in runs:
        windows = run["evaluation"]["windows"]
        if known["tokens"] not in ([], windows["tokens"]):
            raise SystemExit(f"{FILE}: was measured on other windows")
        known["tokens"] = windows["tokens"]
        row = {key: rounded(windows[key]) for key in ("nll", "kl")}
        known["runs"][f"{run['name']} {run['seed']}"] = row
    rows = ",\n".join(
        f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in sorted(known["runs"].items())
    )
    FILE.write_text(f'{{"tokens": {json.dumps(known["tokens"])},\n "runs": {{\n{rows}\n }}}}\n')


def table() -> str:
    """Of all that is recorded, each strategy minus QuaRot."""
    known = recorded()
    runs = []
    for key, row in known["runs"].items():
        name, seed = key.split(" ")
        windows = {"tokens": known["tokens"], **row}
        runs.append({"name": name, "seed": int(seed), "evaluation": {"windows": windows}})
    differences: dict[str, dict[str, Any]] = {}
    for found in differences_of(runs, BASE):
        differences.setdefault(found.name, {})[found.of] = found
    lines = [
        "| strategy | seeds | NLL minus QuaRot's | KL minus QuaRot's |",
        "|---|---:|---:|---:|",
    ]
    for name in sorted(differences, key=lambda name: differences[name]["kl"].value):
        of = differences[name]
        shown = [
            f"{of[k].value:+.4f} ± {of[k].stderr:.4f}".replace("-", "−") for k in ("nll", "kl")
        ]
        lines.append(f"| `{name}` | {of['kl'].seeds} | {' | '.join(shown)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for folder in ("model", "text", "out"):
        parser.add_argument(folder, type=Path)
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--strategies", default=",".join(STRATEGIES))
    asked = parser.parse_args()
    for seed in map(int, asked.seeds.split(",")):
        for strategy in asked.strategies.split(","):
            recipes = [recipe(name, asked.model, asked.text) for name in (BASE, strategy)]
            record(compare(recipes, asked.out, seeds=(seed,)).runs)
            print(table(), flush=True)


if __name__ == "__main__":
    main()
