"""The recipe of `task: sequence-classification`: labelled rows, their splits, and how the classifier is measured."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from kit.recipe.data import Origin
from kit.recipe.models import Recipe, TrainedTokenizer
from kit.recipe.section import Section, Text, non_empty, sequence, text_or_mapping

BASELINES = ("majority", "tfidf_logreg", "zero_shot")
# The sets that every run has, beside those that a recipe names.
SETS = ("validation", "test", "train_sample")


class LabeledSource(Origin):
    """One source of labelled rows.

    A text file holds lines of a label and a text, with a tab between them or, where there is none, the first space.
    The builtin `docstrings` are labelled with the package that they belong to.
    """

    label_column: Text | None = None
    """The column that holds the label, or a list of labels; by default `label`, else `labels`."""
    label_columns: sequence(Text) | None = None
    """Columns of 0 and 1, one for each label: a row has any number of them."""
    label_separator: str | None = Field(default=None, min_length=1)
    """What separates the labels of a row in `label_column`, such as "|": a row has any number of them."""
    label: Text | None = None
    """The label of every row of the source, such as where each class has a file of its own."""
    text_pair_column: Text | None = None
    """A second text that is classified together with the first, such as premise and hypothesis."""
    group_column: Text | None = None
    """Rows with the same value stay on one side of the split, such as those of one patient or article."""
    on_bad_label: Literal["error", "skip"] = "error"
    """Where a row's label is missing or empty: end the run, or leave the row out and count it."""

    column_keys: ClassVar = (
        *Origin.column_keys, "label_column", "label_columns", "label_separator", "text_pair_column", "group_column",
        "on_bad_label",
    )  # fmt: skip
    contradicting: ClassVar = (
        *Origin.contradicting, ("label", "label_column"), ("label", "label_columns"), ("label", "label_separator"),
        ("label_columns", "label_column"), ("label_columns", "label_separator"),
    )  # fmt: skip

    @model_validator(mode="after")
    def _has_labels(self) -> "LabeledSource":
        if self.builtin == "python-reference" and self.label is None:
            raise ValueError("`builtin: python-reference` has no labels: give `label`, or `docstrings` of `packages`")
        return self


class Split(Section):
    """How the rows of `data.train` are divided. Classes are spread alike over the parts.

    Rows with the same text, and those of one group, stay on one side.
    """

    validation: float = Field(default=0.1, ge=0, lt=1)
    """Share of the rows for validation, which chooses the model; not used where `data.validation` names sources."""
    test: float = Field(default=0.2, ge=0, lt=1)
    """Share of the rows for the test, measured once, at the end; not used where `data.test` names sources."""
    seed: int = 0
    """Another seed holds out other rows."""
    stratify: bool = True
    """Give each part the classes in the same proportions."""

    @model_validator(mode="after")
    def _something_trains(self) -> "Split":
        if self.validation + self.test >= 1:
            raise ValueError(f"`validation` and `test` add up to {self.validation + self.test:g}; nothing would train")
        return self


class Balance(Section):
    """What is done about classes of different size."""

    method: Literal["undersample", "oversample", "class-weights"]
    """`undersample`: as many rows of each class as the smallest has; `oversample`: rows are repeated until each class
    has as many as the largest; `class-weights`: a row counts in the loss in inverse proportion to its class."""
    rows: Literal["train", "all"] = "train"
    """`train`: the training rows alone, so that the model is measured on classes as they occur; `all`: every row,
    before the split (`undersample` only)."""
    seed: int = 0
    """Seed of which rows are kept or repeated."""
    weights: dict[str, Annotated[float, Field(gt=0)]] | None = None
    """With `class-weights`: the weight of each class; by default rows / (classes × rows of the class), and with any
    number of labels, for the rows that have a label, rows without it / rows with it."""

    @model_validator(mode="after")
    def _goes_together(self) -> "Balance":
        if self.rows == "all" and self.method != "undersample":
            raise ValueError(
                f"`rows: all` goes with `undersample`, not with `{self.method}`: it changes training alone"
            )
        if self.weights is not None and self.method != "class-weights":
            raise ValueError(f"`weights` goes with `class-weights`, not with `{self.method}`")
        if self.method == "class-weights" and "seed" in self.written():
            raise ValueError("`seed` says nothing about `class-weights`")
        return self


class Augment(Section):
    """Noisy copies of training rows, never of others."""

    copies: int = Field(default=1, ge=1)
    """Noisy copies of each training row, beside the row itself."""
    characters: float = Field(default=0.0, ge=0, le=1)
    """Share of a text's words in which a character is changed, left out, doubled or swapped."""
    words: float = Field(default=0.0, ge=0, le=1)
    """Share of a text's words that are left out or swapped with a neighbour."""
    seed: int = 0
    """Seed of the noise."""

    @model_validator(mode="after")
    def _does_something(self) -> "Augment":
        if not (self.characters or self.words):
            raise ValueError("`characters` or `words` says how much noise; without either the copies would be equal")
        return self


class LabeledDataSection(Section):
    """Where labelled rows come from, how they are split and balanced, and what of a long text is read."""

    length_key: ClassVar = "max_length"

    train: non_empty(LabeledSource)
    """The sources of labelled rows; `split` takes validation and test from them unless these have their own."""
    validation: non_empty(LabeledSource) | None = None
    """Sources for validation, which chooses the model."""
    test: non_empty(LabeledSource) | None = None
    """Sources for the test, measured once, at the end."""
    split: Split = Split()
    """How the rows of `train` are divided."""
    label_names: dict[str, Text] = {}
    """What labels of the data are to be called, such as `{"0": negative, "1": positive}`; several labels of one name
    are one class."""
    min_rows_per_label: int = Field(default=1, ge=1)
    """Leave out the rows of a class with fewer rows in `train`, and count them."""
    balance: (
        Annotated[
            Annotated[Literal["undersample", "oversample", "class-weights"], Tag("text")]
            | Annotated[Balance, Tag("mapping")],
            Discriminator(text_or_mapping),
        ]
        | None
    ) = None
    """What is done about classes of different size: a method, or a mapping with more."""
    augment: Augment | None = None
    """Noisy copies of training rows."""
    exact_duplicates: Literal["keep", "drop"] = "keep"
    """What becomes of a row whose text and labels occurred before; equal texts are on one side of the split anyway."""
    max_length: int | None = Field(default=None, ge=2)
    """Tokens of a text that are read, special tokens included; by default as many as the model has positions."""
    truncation: Literal["head", "tail", "head+tail"] = "head"
    """What is kept of a longer text: its beginning, its end, or half of each."""
    group_by_length: bool = False
    """Make micro-batches of rows of similar length, so that next to nothing is padded; where length tells of the class,
    the rows of a step then resemble each other."""
    max_tokens_per_batch: int | None = Field(default=None, ge=1)
    """With `group_by_length`: a micro-batch has at most so many positions, padding included, and at most
    `per_device_train_batch_size` rows."""
    store_dir: Text = "runs/.store"
    """Folder of what is worked out once for all runs, keyed by what it was made from."""

    @model_validator(mode="after")
    def _budget_goes_with_groups(self) -> "LabeledDataSection":
        if self.max_tokens_per_batch and not self.group_by_length:
            raise ValueError("`max_tokens_per_batch` goes with `group_by_length: true`: random rows have any length")
        return self

    @model_validator(mode="before")
    @classmethod
    def _sources_leave_no_share(cls, values: Any) -> Any:
        # As a value, not a default: what is written out is read again, with sources of a part beside `split`.
        if isinstance(values, dict) and isinstance(split := values.get("split") or {}, dict):
            shares = {part: 0 for part in ("validation", "test") if values.get(part) and split.get(part) is None}
            if shares:
                return {**values, "split": {**split, **shares}}
        return values

    @model_validator(mode="after")
    def _one_origin_of_each_part(self) -> "LabeledDataSection":
        for part in ("validation", "test"):
            if getattr(self, part) is not None and part in self.split.written() and getattr(self.split, part):
                raise ValueError(f"`{part}` names sources of its own: leave out `split.{part}`")
        balance = self.balancing
        if balance and balance.rows == "all" and (self.validation or self.test):
            raise ValueError(
                "`balance.rows: all` goes with one set of sources that is split, not with sources of parts"
            )
        return self

    @property
    def balancing(self) -> Balance | None:
        """`balance` as a mapping."""
        return Balance(method=self.balance) if isinstance(self.balance, str) else self.balance


class ZeroShot(Section):
    """How a causal LM is asked for a label without any training: by the likelihood of each label's words."""

    prompt: Text | None = None
    """The prompt, with `{text}` where the text stands; by default a question that lists the labels."""
    words: dict[str, Text] = {}
    """The words that stand for a label; by default its name."""
    max_rows: int = Field(default=2000, ge=1)
    """Rows of a set that are asked for; of more, a seeded sample."""

    @model_validator(mode="after")
    def _holds_text(self) -> "ZeroShot":
        if self.prompt is not None and self.prompt.count("{text}") != 1:
            raise ValueError("`prompt` needs `{text}` once, where the text is to stand")
        return self


class LabeledEvaluationSection(Section):
    """What is measured: validation and a sample of the training rows on the way, the test once, at the end."""

    sets: dict[Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_-]*$")], LabeledSource] = {}
    """Further sets, each a source of its own, measured at the end like the test."""
    train_sample: int = Field(default=500, ge=0)
    """Training rows, the same at each evaluation, that are measured too, as `train_sample`; 0 for none."""
    baselines: sequence(Literal["majority", "tfidf_logreg", "zero_shot"]) = BASELINES
    """What the classifier is compared with, on the same rows: the most frequent class, a logistic regression on
    TF-IDF, and the untrained model asked for the label (causal LMs only)."""
    zero_shot: ZeroShot = ZeroShot()
    """How the untrained model is asked."""
    temperature_scaling: bool = False
    """Divide the logits by a temperature that fits validation best; it becomes a part of the saved model."""
    bootstrap_resamples: int = Field(default=1000, ge=100)
    """Resamples of the 95 % confidence intervals."""
    mistakes: int = Field(default=50, ge=0)
    """How many of the most confident mistakes on validation are saved, in `mistakes.jsonl`: likely label errors."""
    examples: sequence(Text) = ()
    """Texts that the model classifies before and after training."""

    @model_validator(mode="after")
    def _own_names(self) -> "LabeledEvaluationSection":
        if taken := sorted(set(self.sets) & {*SETS, "train"}):
            raise ValueError(f"`sets.{taken[0]}`: that name is taken by the set of every run; choose another")
        return self


class ClassificationRecipe(Recipe):
    """A recipe of `task: sequence-classification`: a model learns to tell classes of texts apart."""

    task: Literal["sequence-classification"]
    """The kind of model and objective."""
    data: LabeledDataSection
    evaluation: LabeledEvaluationSection = LabeledEvaluationSection()

    @model_validator(mode="after")
    def _tokenizer_is_there(self) -> "ClassificationRecipe":
        if isinstance(self.model.tokenizer, TrainedTokenizer):
            raise ValueError("model.tokenizer one is trained on running text, in a `causal-lm` recipe; name one here")
        return self

    @model_validator(mode="after")
    def _words_learn_elsewhere(self) -> "ClassificationRecipe":
        if self.vocabulary is not None:
            raise ValueError(
                "vocabulary does not go with `task: sequence-classification`: new words learn from running text; add "
                "them in a `causal-lm` recipe, and give its model as `model.name_or_path`"
            )
        return self
