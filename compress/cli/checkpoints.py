"""`modelpress` on what exists already: checkpoints, and the recipes that come with it.

Every import that needs torch is inside a command.
"""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from compress.cli.common import Answer
from compress.cli.console import (
    console,
    headed_table,
    module_table,
    pairs_table,
    print_lines,
    size_rows,
)
from compress.cli.options import (
    ActivationBitsOption,
    DeviceOption,
    ModelArgument,
    PackingOption,
    SeedOption,
)
from compress.errors import UsageError, unknown
from compress.eval.report import format_bytes
from compress.memory import chosen_device


def export(
    model: Annotated[Path, typer.Argument(help="A finished result, packed.")],
    format_: Annotated[str, typer.Option("--format", help="gptq or gguf.")],
    output: Annotated[Path, typer.Option(help="Folder of the export.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")] = False,
    round_scales: Annotated[
        bool, typer.Option("--round-scales", help="Round scales that are no fp16 numbers.")
    ] = False,
    requantise: Annotated[
        bool, typer.Option("--requantise", help="Store what has no place there in the nearest.")
    ] = False,
    keep_embeddings: Annotated[
        bool,
        typer.Option("--keep-embeddings", help="gguf: leave a 16-bit embedding and head as it is."),
    ] = False,
    shard_size: Annotated[str, typer.Option(help="Most that one file of weights holds.")] = "5GB",
) -> Answer:
    """Write a result in another format: the same codes and scales, packed otherwise."""
    from compress.pipeline.publishing import export as export_folder

    made = export_folder(
        model,
        format_,
        output,
        overwrite=overwrite,
        round_scales=round_scales,
        requantise=requantise,
        keep_embeddings=keep_embeddings,
        shard_size=shard_size,
    )
    notes = [("note", note) for note in made.notes]
    rows = [("format", made.format), *size_rows(made.bytes), *notes, ("output", str(made.path))]
    return Answer(made.as_dict(), lambda out: out.print(pairs_table(rows)))


def inspect(
    model: Annotated[Path, typer.Argument(help="A model folder, or a GGUF file.")],
) -> Answer:
    """Show what a checkpoint holds: bits, format, bytes, recipe."""
    from compress.checkpoint.inspect import inspect as inspect_folder

    found = inspect_folder(model)

    def draw(out: Console) -> None:
        out.print(module_table(found["modules"]))
        rows = [("format", found["format"]), *size_rows(found["bytes"])]
        if found["average_bits"] is not None:
            average = f"{found['average_bits']:.2f} over the quantised weights"
            rows.insert(1, ("average bits", average))
        if found["recipe"]:
            recipe = (model.parent if model.is_file() else model) / "recipe.yaml"
            rows.append(("recipe", f"{found['recipe'].get('name')} ({recipe})"))
        if found["provenance"]:
            versions = found["provenance"].get("versions")
            made = versions.items() if isinstance(versions, dict) else ()
            rows.append(("made with", ", ".join(f"{name} {version}" for name, version in made)))
        out.print(pairs_table(rows))

    return Answer(found, draw)


def generate(
    model: ModelArgument,
    text: Annotated[
        str | None, typer.Argument(metavar="[PROMPT]", help="What to ask, or to continue.")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="The same, as an option.")] = None,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--raw",
            help="Ask in the model's chat template, or continue the text as it is; what the model "
            "has if absent.",
        ),
    ] = None,
    system: Annotated[str | None, typer.Option(help="A system prompt, in the template.")] = None,
    messages: Annotated[
        Path | None,
        typer.Option(help="Turns before the prompt: a FILE.json or .jsonl of role and content."),
    ] = None,
    image: Annotated[
        list[Path] | None, typer.Option(help="For a multimodal model; may be given again.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="At most so many new tokens.")] = 64,
    temperature: Annotated[float, typer.Option(min=0, help="0: the likeliest token.")] = 0.0,
    dense: PackingOption = None,
    activation_bits: ActivationBitsOption = None,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
) -> None:
    """Ask a model, or continue a text; what is new is printed as it comes."""
    if text is not None and prompt is not None:
        raise UsageError(f"two prompts: {text[:40]!r} and --prompt {prompt[:40]!r}: give one")
    asked = prompt if text is None else text
    if asked is None and messages is None:
        raise UsageError("no prompt: give some text, or --messages with a user's turn at its end")
    import torch
    from transformers import TextStreamer

    from compress.data.samples import open_image
    from compress.loading.load import fastest_packing, load
    from compress.pipeline.asking import Question, question_inputs, room_for

    device = chosen_device(device)
    pictures = [open_image(path, f"image {path}") for path in image or ()]
    question = Question.of(asked, system, messages, pictures, chat)
    packed = None if dense is None else not dense
    if dense is None:
        packed = fastest_packing(model, device, activation_bits)
        if packed is not None:
            how = "packed" if packed else "dense, which is faster here (--packed keeps them)"
            print_lines(console(stderr=True), f"quantised linears run {how}")
    loaded, processor = load(model, device=device, packed=packed, activation_bits=activation_bits)
    tokenizer: Any = getattr(processor, "tokenizer", processor)  # of a multimodal model
    inputs, templated = question_inputs(processor, question, model)
    if templated and chat is None:
        said = "asked in the model's chat template (--raw continues the text as it is)"
        print_lines(console(stderr=True), said)
    room = room_for(loaded.config, inputs, max_tokens)
    if room < max_tokens:
        said = f"at most {room} new tokens: no more fit into the model's context"
        print_lines(console(stderr=True), said)
    greedy = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    sampled = {"do_sample": True, "temperature": temperature}
    torch.manual_seed(seed)
    write: Any = loaded.generate  # a mixin's, which torch's stubs take for a tensor
    write(
        **{name: value.to(device) for name, value in inputs.items()},
        **(sampled if temperature > 0 else greedy),
        max_new_tokens=room,
        pad_token_id=tokenizer.eos_token_id,
        streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
    )


def recipes(
    name: Annotated[str | None, typer.Argument(help="Print this one's YAML.")] = None,
) -> None:
    """List the recipes that come with modelpress, or print one."""
    from compress.recipe.recipe import shipped_recipes  # --help is quicker without

    shipped = shipped_recipes()
    if name is None:
        console().print(pairs_table([(found, line) for found, line, _ in shipped]))
        return
    files = {found: file for found, _, file in shipped}
    if name not in files:
        raise UsageError(unknown("shipped recipe", name, files))
    print(files[name].read_text(encoding="utf-8"), end="")


def families(
    as_markdown: Annotated[
        bool, typer.Option("--markdown", help="As docs/families.md has the table.")
    ] = False,
) -> Answer:
    """List the model families, and what each can be put through."""
    from compress.models.family_table import HEADINGS, family_rows, markdown

    rows = family_rows()

    def draw(out: Console) -> None:
        if as_markdown:
            out.print(markdown(rows), end="", soft_wrap=True)
            return
        out.print(headed_table(HEADINGS, [tuple(row.as_dict().values()) for row in rows]))

    return Answer({"families": [row.as_dict() for row in rows]}, draw)


def push(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A finished result or export.")],
    repo_id: Annotated[str, typer.Argument(help="owner/name on the hub.")],
    private: Annotated[bool, typer.Option("--private", help="Create it as a private one.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List what would be sent; no network.")
    ] = False,
    revision: Annotated[str | None, typer.Option(help="A branch; main if absent.")] = None,
    create_pr: Annotated[
        bool, typer.Option("--create-pr", help="As a pull request, not a commit.")
    ] = False,
    base_model: Annotated[
        str | None, typer.Option(help="Hub id of the 16-bit model, for the card.")
    ] = None,
    license: Annotated[str | None, typer.Option(help="Of the model, for the card.")] = None,
    language: Annotated[str | None, typer.Option(help="Of the model, for the card.")] = None,
    any_folder: Annotated[
        bool, typer.Option("--any", help="Also a folder that is not compressed.")
    ] = False,
) -> Answer:
    """Publish a result on the Hugging Face hub, as whoever `hf auth login` has logged in."""
    from compress.pipeline.publishing import push as push_folder

    report = push_folder(
        folder,
        repo_id,
        private=private,
        dry_run=dry_run,
        revision=revision,
        create_pr=create_pr,
        base_model=base_model,
        license=license,
        language=language,
        any_folder=any_folder,
    )

    def draw(out: Console) -> None:
        files = [(file["path"], format_bytes(file["bytes"])) for file in report["files"]]
        out.print(pairs_table([*files, ("total", format_bytes(report["bytes"]))]))
        if report["card_edited"]:
            print_lines(out, "README.md was edited by hand and stays as it is")
        if foreign := report["foreign"]:
            more = f" and {len(foreign) - 8} more" if len(foreign) > 8 else ""
            told = f"warning: sent too, though no result has such files: {', '.join(foreign[:8])}"
            print_lines(out, told + more)
        if report["unquoted"]:
            print_lines(out, "left out: the excerpt of your calibration text in report.html")
        if paths := report["rewritten"]["paths"]:
            files = report["rewritten"]["files"]
            own = ": a recipe that finds no file of yours" if "recipe.yaml" in files else ""
            told = f"{paths} local paths are sent as names alone, in {', '.join(files)}{own}"
            print_lines(out, f"{told}; the folder here keeps them")
        if dry_run:
            print_lines(out, "", *report["card"], "", f"dry run: nothing was sent to {repo_id}")
        else:
            print_lines(out, report["url"])

    return Answer(report, draw)
