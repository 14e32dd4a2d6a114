"""Pictures of what was pruned: the image with kept, pruned and recycled patches, a panel per stage.

Kept patches are shown as they are, pruned ones dimmed, and those whose token holds a mean of others
are tinted. Each grid of an image (the whole image; with LLaVA-NeXT and LLaVA-OneVision its tiles
too, as one) has a row of panels; tiles that are pruned apart (Idefics3, InternVL) are images of
their own; patches that were merged 2x2 into a token are one patch here.

    with compress.prune_visual_tokens(model, strategy, processor) as pruning:
        with watching(model, pruning) as watched:
            model.generate(**inputs)
    watched.draw("pictures", processor)                                  # the first prompt's images
    draw_pruning(picture, pruning.last, number=0).save("pruned.png")     # any prompt's
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from compress.errors import UsageError
from compress.models.vision import Inputs
from compress.pruning.costs import CostTotals, PruningStats
from compress.pruning.engine import VisualTokenPruning
from compress.pruning.per_thread import PerThread
from compress.pruning.prompt import PromptImage, PrunedPrompt
from compress.pruning.saved import KEY
from compress.pruning.tower import Processor

if TYPE_CHECKING:  # of the extra `vision`, as in the functions below
    from PIL.Image import Image

DIMMED = 0.25  # of a pruned patch's brightness
TINT, TINTED = (230, 159, 0), 0.55  # orange of Okabe and Ito; how much of it
PANEL = 288  # pixels of a panel's longer side, about
MARGIN, CAPTION = 6, 16  # pixels between panels, and for the text below each


def draw_pruning(picture: "Image", prompt: PrunedPrompt, number: int = 0) -> "Image":
    """One image of a pruned prompt: a panel for each stage, a row of them for each grid.

    Args:
        picture: what the model saw (`pictures_seen`); its grids are laid over the whole of it.
        prompt: `pruning.last`.
        number: of the image, in the order of the batch.

    Raises:
        UsageError: there is no such image, or its tokens form no full grid.
    """
    if not 0 <= number < len(prompt.images):
        raise UsageError(f"image {number}: the prompt has {len(prompt.images)} images, from 0 on")
    image = prompt.images[number]
    rows = []
    for segment in image.tokens.segment.unique().tolist():
        if segment < 0:  # newline tokens, which show nothing
            continue
        here = image.tokens.segment == segment
        grid = _grid(image, here, number)
        stages = ((_kept(prompt, image, layer), layer) for layer, _ in image.kept)
        rows.append([_panel(picture, image, here, grid, *stage) for stage in stages])
    return _sheet(rows)


def pictures_seen(inputs: Inputs, processor: Processor) -> list["Image"]:
    """The pictures of a forward's inputs as the vision tower sees them: cropped, resized, in RGB.

    Args:
        inputs: with `pixel_values`, and for Qwen2-VL `image_grid_thw`, for Pixtral `image_sizes`.
        processor: the model's; its mean and deviation turn the values back into 8-bit pixels.

    Raises:
        UsageError: values in a layout that is not one of the supported families'.
    """
    from PIL import Image  # slow to import

    images = getattr(processor, "image_processor", processor)
    mean, std = (np.array(getattr(images, name)) for name in ("image_mean", "image_std"))
    planes = _planes(inputs, getattr(images, "merge_size", 1))
    pictures = []
    for plane in planes:
        values = plane.float().cpu().numpy().transpose(1, 2, 0) * std + mean
        pictures.append(Image.fromarray(np.rint(values.clip(0, 1) * 255).astype(np.uint8)))
    return pictures


def _planes(inputs: Inputs, merge: int) -> list[Tensor]:
    """[3, H, W] of each image, normalised."""
    pixels: Tensor = inputs["pixel_values"]
    sizes = inputs.get("image_sizes")
    if pixels.ndim == 4:  # images or crops [n, 3, H, W]
        if sizes is None or [int(max(n)) for n in zip(*sizes, strict=True)] != [*pixels.shape[2:]]:
            return list(pixels)
        # Pixtral's, each padded to the largest.
        return [x[:, :h, :w] for x, (h, w) in zip(pixels, sizes, strict=True)]
    if pixels.ndim == 5 and sizes is None:  # Idefics3: crops [prompts, n, 3, H, W], padded with 0
        return [crop for crop in pixels.flatten(0, 1) if bool(crop.any())]
    if pixels.ndim == 5:  # crops [images, crops, 3, H, W]; the first is the whole image
        return list(pixels[:, 0])
    grids = inputs.get("image_grid_thw")
    if pixels.ndim != 2 or grids is None:
        raise UsageError(
            f"expected pixel values of LLaVA or Qwen2-VL models, found {list(pixels.shape)}"
        )
    planes = []
    for (frames, height, width), part in zip(
        grids.tolist(), pixels.split(grids.prod(-1).tolist()), strict=True
    ):
        # Patches in merge units, each two frames deep: the first frame of the first pair.
        units = (frames, height // merge, width // merge, merge, merge, 3, -1)
        side = _patch_side(part.shape[1])
        patches = part.view(*units).unflatten(-1, (-1, side, side))[0, ..., 0, :, :]
        plane = patches.permute(4, 0, 2, 5, 1, 3, 6)  # [3, rows, m, side, columns, m, side]
        planes.append(plane.reshape(3, height * side, width * side))
    return planes


def _patch_side(values: int) -> int:
    """Of values = 3 channels x 2 frames x side x side."""
    side = round((values / 6) ** 0.5)
    if 6 * side**2 != values:
        raise UsageError(f"expected patches of two frames in three channels, found {values} values")
    return side


def _grid(image: PromptImage, here: Tensor, number: int) -> tuple[int, int]:
    """Rows and columns of the grid of the tokens `here`."""
    row, column = image.tokens.row[here], image.tokens.column[here]
    height, width = int(row.max()) + 1, int(column.max()) + 1
    if height * width != len(row) or len((row * width + column).unique()) != len(row):
        raise UsageError(
            f"image {number}: {len(row)} tokens do not fill a grid of {height} x {width}: it "
            "cannot be drawn"
        )
    return height, width


def _kept(prompt: PrunedPrompt, image: PromptImage, layer: int) -> Tensor:
    """Which of the image's tokens decoder layer `layer` sees: [n] bool."""
    return prompt.kept(layer)[image.row, image.positions]


def _panel(
    picture: "Image",
    image: PromptImage,
    here: Tensor,
    grid: tuple[int, int],
    kept: Tensor,
    layer: int,
) -> "Image":
    """The picture with the state of each patch of one grid, and a line of text below."""
    from PIL import Image, ImageDraw  # slow to import

    height, width = grid
    side = max(1, round(PANEL / max(grid)))
    pixels = np.asarray(
        picture.convert("RGB").resize((width * side, height * side), Image.Resampling.BICUBIC),
        dtype=np.float32,
    )
    merged = torch.zeros_like(kept)
    if image.merged is not None:
        merged[image.merged] = True
    merged &= kept
    place = (image.tokens.row * width + image.tokens.column)[here].cpu()
    states = []
    for state in (kept, merged):
        field = torch.zeros(height * width, dtype=torch.bool).scatter(0, place, state[here].cpu())
        blown = field.view(height, width).numpy().repeat(side, 0).repeat(side, 1)
        states.append(blown[..., None])
    shown, tinted = states
    pixels = np.where(shown, pixels, pixels * DIMMED)
    pixels = np.where(tinted, pixels * (1 - TINTED) + np.array(TINT) * TINTED, pixels)
    panel = Image.new("RGB", (width * side, height * side + CAPTION), "white")
    panel.paste(Image.fromarray(np.rint(pixels).astype(np.uint8)))
    where = f"layer {layer}" if layer else "stage 0"
    text = f"{where}: {int(kept[here].sum())} of {int(here.sum())}"
    if count := int(merged[here].sum()):
        text += f", {count} recycled"
    ImageDraw.Draw(panel).text((2, height * side + 2), text, fill="black")
    return panel


def _sheet(rows: list[list["Image"]]) -> "Image":
    from PIL import Image  # slow to import

    heights = [max(panel.height for panel in row) + MARGIN for row in rows]
    widths = [sum(panel.width + MARGIN for panel in row) for row in rows]
    sheet = Image.new("RGB", (max(widths) + MARGIN, sum(heights) + MARGIN), "white")
    top = MARGIN
    for row, height in zip(rows, heights, strict=True):
        left = MARGIN
        for panel in row:
            sheet.paste(panel, (left, top))
            left += panel.width + MARGIN
        top += height
    return sheet


class WatchedFigures(CostTotals):
    """Costs, and the settings of the strategy that they are of."""

    strategy: dict[str, object]


class Watched:
    """What `watching` saw: the costs of all prompts, and the first prompt with an image."""

    def __init__(self, pruning: VisualTokenPruning):
        self.pruning, self.before = pruning, len(pruning.stats.prompts)
        self.inputs: Inputs | None = None
        self.prompt: PrunedPrompt | None = None

    def figures(self) -> WatchedFigures:
        """`PruningStats.as_dict` of the prompts since, and the strategy."""
        stats = PruningStats(self.pruning.stats.prompts[self.before :])
        return {**stats.as_dict(), "strategy": self.pruning.strategy.model_dump(mode="json")}

    def draw(self, folder: str | Path, processor: Processor, count: int = 3) -> list[str]:
        """Writes visual-tokens-N.png of the first prompt's first images; gives the files' paths.

        None were seen: none are written. Raises UsageError as `draw_pruning` does.
        """
        if self.prompt is None or self.inputs is None:
            return []
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        paths = []
        pictures = pictures_seen(self.inputs, processor)
        for number in range(min(count, len(pictures))):
            path = folder / f"visual-tokens-{number}.png"
            draw_pruning(pictures[number], self.prompt, number).save(path)
            paths.append(str(path))
        return paths


@contextmanager
def watching(
    model: PreTrainedModel, pruning: VisualTokenPruning | None = None
) -> Iterator[Watched | None]:
    """Watches a model prune; None if it does not.

    `pruning`: the open context; None: the one of the strategy that the checkpoint came with.
    """
    pruning = pruning or getattr(model, KEY, None)
    if not isinstance(pruning, VisualTokenPruning):
        yield None
        return
    watched, base = Watched(pruning), pruning.base
    inputs = PerThread[Inputs | None](lambda: None)
    encode = base.get_image_features  # the pruning context's, on this one model

    @wraps(encode)
    def get_image_features(*args: object, **kwargs: object) -> object:
        if watched.prompt is None:
            inputs.value = dict(signature(encode).bind_partial(*args, **kwargs).arguments)
        return encode(*args, **kwargs)

    def after(module: torch.nn.Module, args: tuple, output: object) -> None:
        if watched.prompt is None and pruning.last is not None and pruning.last.images:
            # Both of this thread: another's pictures would not be this prompt's.
            watched.inputs, watched.prompt = inputs.value, pruning.last

    earlier = pruning.last
    pruning.last = None
    base.get_image_features = get_image_features
    handle = base.register_forward_hook(after)
    try:
        yield watched
    finally:
        handle.remove()
        base.get_image_features = encode
        pruning.last = pruning.last or earlier
