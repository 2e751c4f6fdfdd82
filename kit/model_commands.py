"""The commands on models and checkpoints, as opposed to recipes; nothing heavy is imported until one runs."""

from typing import Annotated

import typer


def merge(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A run directory, or a folder with an adapter.")],
    output: Annotated[
        str | None, typer.Option("--output", "-o", help="The folder to write; else `merged` in the run directory.")
    ] = None,
) -> None:
    """Merge a run's adapter into its base model: a plain model, with the same logits."""
    from kit.merge import merge as merge_run

    merge_run(run, output)


def convert(
    source: Annotated[str, typer.Argument(metavar="SRC", help="A checkpoint: a file or a folder.")],
    target: Annotated[str, typer.Argument(metavar="DST", help="What to write.")],
    source_layout: Annotated[str, typer.Option("--from", help="Layout of SRC; `auto` recognises it.")] = "auto",
    target_layout: Annotated[str, typer.Option("--to", help="Layout of DST.")] = "hf",
    given: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="A setting that no tensor tells.")
    ] = None,
    config: Annotated[str | None, typer.Option(help="The config.json of SRC, if it does not lie beside it.")] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="The tokenizer's folder, if it does not lie beside SRC.")
    ] = None,
    vocab_size: Annotated[int | None, typer.Option(min=1, help="Rows of the vocabulary to write.")] = None,
    allow: Annotated[
        list[str] | None, typer.Option(metavar="PATTERN", help="Tensors that may be missing or too many.")
    ] = None,
    no_verify: Annotated[bool, typer.Option("--no-verify", help="Do not compare logits.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace DST.")] = False,
) -> None:
    """Convert a checkpoint between layouts, such as nanoGPT's and Hugging Face's, and prove it by its logits."""
    from kit.convert import convert as convert_checkpoint

    convert_checkpoint(
        source,
        target,
        source_layout=source_layout,
        target_layout=target_layout,
        given=given or (),
        config=config,
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        allow=allow or (),
        verify=not no_verify,
        overwrite=overwrite,
    )


def verify(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model folder, a run directory or a Hub model.")],
    text: Annotated[str | None, typer.Option(metavar="FILE", help="Text that the model should know.")] = None,
    prompt: Annotated[str | None, typer.Option(help="What the sample continues.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub model.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Tell whether a model is sound: its loss, blocks, tensors, vocabulary; exit with 1 where a check fails."""
    from kit.verify import verify as verify_model

    if not verify_model(model, text=text, prompt=prompt, revision=revision, as_json=as_json):
        raise typer.Exit(1)


def export(
    run: Annotated[str, typer.Argument(metavar="RUN", help="A finished run's directory.")],
    to: Annotated[str, typer.Option("--to", metavar="DIR", help="The folder to write.")],
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")] = None,
    push_to_hub: Annotated[str | None, typer.Option(metavar="NAME", help="Also push it to this repository.")] = None,
    public: Annotated[bool, typer.Option("--public", help="Let everybody see the repository.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what an export wrote.")] = False,
) -> None:
    """Write a run's model to hand on: weights, tokenizer, generation settings and a model card."""
    from kit.export import export as export_run

    export_run(run, to, dtype=dtype, push_to_hub=push_to_hub, public=public, overwrite=overwrite)


def inspect(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model folder, a run directory or a Hub model.")],
    values: Annotated[str | None, typer.Option(metavar="NAME", help="Show the values of this tensor instead.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub model.")] = None,
    show_all: Annotated[bool, typer.Option("--all", help="Print a row for every tensor, alike or not.")] = False,
) -> None:
    """Show a model's architecture, tensors and tokenizer; its weights are not loaded."""
    from kit.model.inspection import inspect_model

    inspect_model(model, revision=revision, values=values, show_all=show_all)


COMMANDS = (merge, convert, verify, export, inspect)
