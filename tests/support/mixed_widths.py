"""Recipes with a budget in the middle of what is possible, and the widths that a file has.

recipe = with_budget(folder, "budget", 0.5, allocate={"average_bits": 4, "importance": "position"})
assert widths_in_file(press(recipe)) == plan_of(recipe).allocation.bits()
"""

from pathlib import Path

from compress.allocation.allocate import find_units
from compress.checkpoint.packed_formats import planned_bytes
from compress.models.skeleton import Skeleton
from compress.pipeline.inputs import RunInputs
from compress.pipeline.plan import allocated_plan, make_plan
from support.tiny_checkpoints import WINDOWS, read_tensors, recipe_for

DEPTH = 4
QUICK = {"clip_search": "none", "refine_sweeps": 0}  # where the solver is not the subject


def with_budget(folder: Path, kind: str, share: float, **sections):
    """The recipe's budget, somewhere between all units at the narrowest and at the widest."""
    recipe = recipe_for(folder, **sections)
    if kind == "average_bits":
        widths = recipe.allocate.widths
        value = min(widths) + share * (max(widths) - min(widths))
    else:
        skeleton = Skeleton(folder)
        inputs = RunInputs.of(recipe, skeleton)
        plan, dtype = make_plan(inputs), inputs.dtype
        units = find_units(recipe.allocate, recipe.quantize, skeleton, plan.modules, dtype)
        least, most = (sum(f(u.bytes.values()) for u in units) for f in (min, max))
        free = {name for unit in units for name in unit.modules}
        changing = [module for module in plan.modules if module.name in free]
        own = sum(planned_bytes(changing, dtype).values())
        value = f"{(plan.file_bytes - own + least + share * (most - least)) / 1000:.3f}KB"
    section = sections["allocate"] | {"average_bits": None, kind: value}
    return recipe_for(folder, **sections | {"allocate": section})


def plan_of(recipe, windows=WINDOWS):
    return allocated_plan(RunInputs.open(recipe), windows)


def widths_in_file(folder: Path) -> dict[str, int]:
    """The width of every packed linear, by the shapes of its tensors alone."""
    tensors = read_tensors(folder)
    packed = [name for name in tensors if name.endswith(".weight_packed")]
    return {
        name.removesuffix(".weight_packed"): tensors[name].shape[1] * 32
        // int(tensors[name.replace("packed", "shape")][1])
        for name in packed
    }  # fmt: skip
