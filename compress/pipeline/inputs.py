"""What a run reads, settled once at its start, so that the code below asks no recipe again.

inputs = RunInputs.open(recipe, "cpu")
plan = make_plan(inputs)
"""

from dataclasses import dataclass

import torch

from compress.data.source import CalibrationSource
from compress.models.skeleton import Skeleton
from compress.recipe.recipe import Recipe
from compress.rotation.model import RotatedModel, storage_dtype


@dataclass(frozen=True)
class RunInputs:
    """A recipe, and what it means for the model that it names.

    Attributes:
        skeleton: the opened source model.
        source: where calibration data lies.
        dtype: of unquantised tensors and scales in the output.
        device: where layers are computed.
    """

    recipe: Recipe
    skeleton: Skeleton
    source: CalibrationSource
    dtype: torch.dtype
    device: str = "cpu"

    @classmethod
    def open(cls, recipe: Recipe, device: str = "cpu", *, given: bool = False) -> "RunInputs":
        """Opens the recipe's model. Raises UsageError for one that cannot be opened.

        `given`: whether the calibration data are there, and not to be read.
        """
        skeleton = Skeleton.open(recipe.model_location(), recipe.model.revision)
        return cls.of(recipe, skeleton, device, given=given)

    @classmethod
    def foretell(cls, recipe: Recipe, device: str = "cpu") -> "RunInputs":
        """The same for a plan: weights need not be there, nor are they fetched."""
        skeleton = Skeleton.foretell(recipe.model_location(), recipe.model.revision)
        return cls.of(recipe, skeleton, device)

    @classmethod
    def of(
        cls, recipe: Recipe, skeleton: Skeleton, device: str = "cpu", *, given: bool = False
    ) -> "RunInputs":
        """The same for a model that is open already."""
        pruning = recipe.prune_visual_tokens
        source = CalibrationSource(
            recipe.calibration,
            recipe.resolve_path,
            used=recipe.calibrates,
            sees=skeleton.spec.vision is not None,
            answers=pruning is None or not pruning.ranks_by_language_attention,
            given=given,
        )
        return cls(recipe, skeleton, source, storage_dtype(recipe.model, skeleton), device)

    def rotated_model(self) -> RotatedModel:
        """The model that is quantised."""
        return RotatedModel(self.skeleton, self.recipe.rotate, self.dtype, self.device)
