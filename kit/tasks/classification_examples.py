"""A row of every part of a classifier's corpus, as the model sees it."""

from transformers import PreTrainedTokenizerBase

from kit.console import say
from kit.data.labeled_corpus import LabeledCorpus


def print_examples(corpus: LabeledCorpus, tokenizer: PreTrainedTokenizerBase) -> None:
    """Print the first row of each part as the model sees it."""
    for name, part in {"train": corpus.train, **corpus.sets}.items():
        ids = part.rows[0]["input_ids"][:32].tolist()
        shown = "│".join(tokenizer.decode([number]).replace("\n", "⏎") for number in ids)
        labels = ", ".join(corpus.labels.names_of(part.labels[0])) or "no label"
        say(f"\n{name}: {len(part):,} rows; its first, `{labels}`, with `│` between tokens:\n  {shown}")
