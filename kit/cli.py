"""The commands. Nothing heavy is imported until a command runs, so that `--help` answers at once."""

import logging
import os
import sys
import time
import traceback
from typing import Annotated

import typer

from kit.model_commands import COMMANDS

_FIRST_WORD_S = 5.0  # what process 0 may be slower by than another one, for reading the same modules

app = typer.Typer(
    help="Adapt pretrained Hugging Face models to a domain, driven by YAML recipes.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

vocabulary = typer.Typer(
    help="Prepare the tokens that a recipe's `vocabulary` adds.", no_args_is_help=True, rich_markup_mode=None
)
app.add_typer(vocabulary, name="vocabulary")

RecipeFile = Annotated[str, typer.Argument(metavar="RECIPE", help="The recipe, a YAML file.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="Values that replace the recipe's.")
]


@app.command()
def train(
    recipe: RecipeFile,
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only check the recipe, as `kit check` does.")] = False,
) -> None:
    """Adapt a model, from raw text to scorecard; the same command goes on with an interrupted run."""
    from kit import check, run

    (check.check if dry_run else run.train)(recipe, overrides or [])


@app.command()
def check(
    recipe: RecipeFile,
    overrides: Overrides = None,
    probe: Annotated[
        bool, typer.Option("--probe", help="Also train two steps, evaluate, save, reload, and time what was chosen.")
    ] = False,
    compiles: Annotated[
        bool, typer.Option("--compile", help="Probe, and say from which step on `training.torch_compile` pays.")
    ] = False,
) -> None:
    """Find everything that is wrong with a recipe, and show what it is going to do, without training."""
    from kit.check import check as check_recipe

    check_recipe(recipe, overrides or [], probe or compiles, compiles)


@app.command()
def prepare(recipe: RecipeFile, overrides: Overrides = None) -> None:
    """Do all of a run that needs no training: tokenizer, token stores, ledger, the base model's scores."""
    from kit import run

    run.prepare(recipe, overrides or [])


@app.command()
def evaluate(
    target: Annotated[str, typer.Argument(metavar="RUN_OR_RECIPE", help="A run directory, or a recipe file.")],
    overrides: Overrides = None,
    model: Annotated[str | None, typer.Option(help="Model to measure instead of the run's or the recipe's.")] = None,
    output: Annotated[str | None, typer.Option("--output", "-o", help="Write the figures to this JSON file.")] = None,
) -> None:
    """Measure a model on a recipe's evaluation sets."""
    from kit import run

    run.evaluate(target, overrides or [], model, output)


@app.command()
def generate(
    model: Annotated[
        str, typer.Argument(metavar="RUN_OR_MODEL", help="A run directory, a model folder or a Hub model.")
    ],
    prompt: Annotated[str, typer.Option(help="The text to continue.")],
    num_return_sequences: Annotated[int, typer.Option(min=1, help="How many continuations.")] = 1,
    max_length: Annotated[int | None, typer.Option(min=1, help="Tokens in total, the prompt's included.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Tokens to add; 50 unless either is given.")] = None,
    top_k: Annotated[int, typer.Option(min=0, help="Sample among the most probable tokens; 0 among all.")] = 50,
    temperature: Annotated[float, typer.Option(min=1e-6, help="Divisor of the logits.")] = 1.0,
    greedy: Annotated[bool, typer.Option("--greedy", help="Take the most probable token each time.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 42,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub model.")] = None,
) -> None:
    """Continue a prompt."""
    from kit.generate import generate as continue_prompt

    continue_prompt(
        model,
        prompt,
        revision=revision,
        num_return_sequences=num_return_sequences,
        max_length=max_length,
        max_new_tokens=max_new_tokens,
        top_k=top_k,
        temperature=temperature,
        do_sample=not greedy,
        seed=seed,
    )


@app.command()
def predict(
    model: Annotated[
        str, typer.Argument(metavar="RUN_OR_MODEL", help="A run directory, a model folder or a Hub model.")
    ],
    file: Annotated[
        str,
        typer.Argument(metavar="FILE", help="CSV, TSV, JSON lines, Parquet, or a text a line; `-`: standard input."),
    ],
    output: Annotated[
        str | None,
        typer.Option("--output", "-o", help="A file, .csv, .tsv or .jsonl; else CSV to the terminal or a pipe."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file that is there.")] = False,
    text_column: Annotated[
        str | None, typer.Option(help="The text, in place of the run's column or template; else `text`.")
    ] = None,
    text_pair_column: Annotated[str | None, typer.Option(help="The second text, in place of the run's.")] = None,
    format: Annotated[
        str | None, typer.Option(help="text, jsonl, csv, tsv or parquet, where the name says another or none.")
    ] = None,
    delimiter: Annotated[str | None, typer.Option(help="Of CSV and TSV; else found out.")] = None,
    quoting: Annotated[
        bool | None, typer.Option("--quoting/--no-quoting", help='Whether `"` quotes fields; else found out.')
    ] = None,
    encoding: Annotated[str | None, typer.Option(help="Such as latin-1; else UTF-8.")] = None,
    column_names: Annotated[
        str | None, typer.Option(help="Of CSV and TSV without a header: the columns, with commas between.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts at once.")] = 64,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub model.")] = None,
) -> None:
    """Classify each row of a file: its columns, `predicted_label` and a `probability_…` of each label.

    CSV is written as RFC 4180 says; TSV is quoted like it, where a text holds a tab, a quote or a line break.
    """
    from kit.predict import predict as predict_file

    predict_file(
        model,
        file,
        output=output,
        overwrite=overwrite,
        batch_size=batch_size,
        revision=revision,
        text_column=text_column,
        text_pair_column=text_pair_column,
        format=format,
        delimiter=delimiter and delimiter.replace("\\t", "\t"),
        quoting=quoting,
        encoding=encoding,
        column_names=column_names and column_names.split(","),
    )


@vocabulary.command()
def mine(
    recipe: RecipeFile,
    overrides: Overrides = None,
    output: Annotated[
        str | None,
        typer.Option("--output", "-o", help="The file; else `vocabulary.tokens.from_file`, else <recipe>_words.txt."),
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="The most words to write.")] = 200,
    min_occurrences: Annotated[int, typer.Option(min=1, help="Leave out words that occur less often.")] = 5,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file where mining wrote it.")] = False,
) -> None:
    """Find the words of the training text that would save the most tokens, and write them to a file to review."""
    from kit.vocabulary import mine as mine_recipe

    mine_recipe(
        recipe,
        overrides or [],
        output=output,
        count=count,
        min_occurrences=min_occurrences,
        overwrite=overwrite,
    )


@app.command()
def interpolate(
    base: Annotated[str, typer.Argument(metavar="BASE", help="The model that training began with.")],
    tuned: Annotated[str, typer.Argument(metavar="TUNED", help="What it became: a run directory or a model.")],
    recipe: RecipeFile,
    overrides: Overrides = None,
    alphas: Annotated[str, typer.Option(help="Shares of TUNED, as from:to:step or a list.")] = "0:1:0.1",
    limit: Annotated[float | None, typer.Option(help="What the general set may lose, in its unit.")] = None,
    domain: Annotated[str | None, typer.Option(metavar="SET", help="The set to be good at.")] = None,
    general: Annotated[str | None, typer.Option(metavar="SET", help="The set to keep.")] = None,
    output: Annotated[
        str | None, typer.Option("--output", "-o", help="The folder; else `interpolated` in TUNED's run.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the folder.")] = False,
) -> None:
    """Measure averages of two models' weights on a recipe's sets, and save the best that keeps general text."""
    from kit.interpolate import interpolate as interpolate_models

    interpolate_models(
        base,
        tuned,
        recipe,
        overrides or [],
        alphas=alphas,
        limit=limit,
        domain=domain,
        general=general,
        output=output,
        overwrite=overwrite,
    )


@app.command()
def schema(
    output: Annotated[
        str | None, typer.Option("--output", "-o", help="Write to this file, not to the terminal.")
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the reference of all keys instead.")] = False,
) -> None:
    """Print the JSON Schema of recipes, for editors."""
    from kit.files import write_text
    from kit.recipe.reference import reference_text
    from kit.recipe.schema import schema_text

    text = reference_text() if markdown else schema_text()
    if output:
        write_text(output, text)
    else:
        sys.stdout.write(text)


@app.command()
def recipes(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="Print this one, such as lm_gpt2_full.")] = None,
    copy: Annotated[
        str | None, typer.Option(metavar="FILE", help="Copy it, and what it extends, to start from; or a folder.")
    ] = None,
) -> None:
    """List the recipes that come with the kit, print one, or copy one."""
    from kit.recipe.shipped import show_recipes

    typer.echo(show_recipes(name, copy), nl=False)


@app.command()
def env() -> None:
    """Show versions, devices and threads; what to paste into a bug report."""
    from kit.environment import print_environment

    print_environment()


@app.command()
def status(recipe: RecipeFile, overrides: Overrides = None) -> None:
    """Print how a recipe's run stands, and exit with the run's own code; for scripts behind a launcher."""
    from kit.training.resolving import status as run_status
    from kit.training.run_directory import RunDirectory, exit_code

    folder, found, checkpoint = run_status(recipe, overrides or [])
    typer.echo(f"{folder}: {found}{f', {checkpoint} is saved' if checkpoint else ''}")
    manifest = RunDirectory(folder).read_manifest()
    message = manifest.get("refused", manifest).get("message")
    if message and found in ("user-error", "failed", "killed"):
        typer.echo(message)  # once more: behind a launcher's lines the run's own are far above
    raise typer.Exit(exit_code(found))


for _command in COMMANDS:
    app.command()(_command)


def main() -> None:
    """Run a command; exit with 0 (done), 1 (our fault), 2 (the user's mistake) or 143 (preempted, start again)."""
    code = _run()
    sys.stdout.flush()
    sys.stderr.flush()
    if "WORLD_SIZE" in os.environ:
        # Now and then a gloo process aborts in the interpreter's finalisation although all its work is done.
        os._exit(code)
    sys.exit(code)


def _run() -> int:
    from kit.errors import UserError

    # Where it is installed, peft imports it, and it then tells of kernels for CPUs that it misses.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        # Not `app()`, which takes an interruption for a code that a command has chosen.
        command = typer.main.get_command(app)
        with command.make_context("kit", sys.argv[1:]) as context:
            command.invoke(context)
        return 0
    except UserError as error:
        _complain_once(f"error: {error}")
        return 2
    except typer.Exit as stop:
        return stop.exit_code
    except SystemExit as end:  # rich's, where whoever reads standard output has seen enough
        return int(end.code or 0)
    except (typer.Abort, KeyboardInterrupt):
        _complain("interrupted; the same command starts again, `kit train` from its last checkpoint")
        return 130
    except BaseException as error:
        # Preempted and click's errors are recognised by name: importing their modules here would slow `--help` down.
        if type(error).__name__ == "Preempted":
            _complain("preempted: the same command goes on from here")
            return 143
        if hasattr(error, "format_message"):
            error.show()
            return 2
        from kit.files import disk_fault  # imports numpy

        if fault := disk_fault(error):
            _complain_once(f"error: {fault}")
            return 2
        traceback.print_exc()
        return 1


def _complain_once(message: str) -> None:
    """Tell a mistake that is found before the processes know of each other, by all of them or by one alone."""
    if rank := int(os.environ.get("RANK", "0")):
        # The launcher ends all once one has ended: process 0 would die before it has told what they all found.
        time.sleep(_FIRST_WORD_S)
        print(f"process {rank}: {message}", file=sys.stderr)
    else:
        _complain(message)


def _complain(message: str) -> None:
    if int(os.environ.get("RANK", "0")) == 0:
        print(message, file=sys.stderr)
