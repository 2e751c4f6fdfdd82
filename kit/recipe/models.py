"""The recipe as frozen pydantic models: one section, one model; one default, in one place.

Field names are Hugging Face's own wherever one exists. The descriptions document each key: the JSON Schema and the
recipe reference are generated from them. `training` is a plain mapping of `TrainingArguments` names, checked against
the installed dataclass in `kit.recipe.training_arguments`.
"""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from kit.recipe.adapter import AdapterSection
from kit.recipe.data import DATA_SPLITS, DataSection, Source, ValidationFraction
from kit.recipe.freezing import OF_THE_CACHE, FreezingSection
from kit.recipe.running import RunSection
from kit.recipe.section import Section, Text, sequence, text_or_mapping
from kit.recipe.tracking import TrackingSection
from kit.recipe.vocabulary import VocabularySection

# Of the attention kernels those that packed rows alone go through.
PACKED_ATTENTION = ("flex_attention", "flash_attention_2", "flash_attention_3")


class TrainedTokenizer(Section):
    """A byte-level BPE tokenizer to train on the training documents."""

    vocab_size: int = Field(ge=257)
    """Number of tokens, the end-of-text token and the 256 bytes included."""


class ModelSection(Section):
    """The model to start from, and its tokenizer."""

    name_or_path: Text | None = None
    """A model on the Hub or a local folder, as `from_pretrained` takes it."""
    revision: str | None = None
    """Branch, tag or commit of a Hub model."""
    from_config: dict[str, Any] | None = None
    """A fresh, randomly initialised model: `model_type` and the attributes of its configuration class."""
    tokenizer: (
        Annotated[
            Annotated[str, Tag("text")] | Annotated[TrainedTokenizer, Tag("mapping")], Discriminator(text_or_mapping)
        ]
        | None
    ) = None
    """A tokenizer by name or folder (default: the model's own), or one to train on the training documents."""
    eos_token: Text | None = None
    """A token of the tokenizer that is to end documents; by default its EOS, or what comes nearest to one."""
    config: dict[str, Any] = {}
    """Attributes of the model's configuration to override, such as `attn_pdrop: 0.0`."""
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """Precision in which the weights are held and trained; `training.bf16` decides how they are multiplied."""
    attn_implementation: Literal["eager", "sdpa", *PACKED_ATTENTION] | None = None
    """Attention kernel, under its name in `from_pretrained`. FlexAttention and flash-attention are for packed rows in
    training on GPUs, and keep documents apart without a mask. By default the best of these that can be used there, and
    for all else the model's own choice."""
    load_in_4bit: bool = False
    """Hold the weights of the linear layers in 4 bits (NF4, as in QLoRA), which only an `adapter` can train beside;
    needs a CUDA device and bitsandbytes."""
    trust_remote_code: bool = False
    """Run code that comes with the model; demands a pinned `revision`."""

    @model_validator(mode="after")
    def _one_origin(self) -> "ModelSection":
        if (self.name_or_path is None) == (self.from_config is None):
            raise ValueError("a model has either `name_or_path` or `from_config`")
        if self.from_config is not None:
            if "model_type" not in self.from_config:
                raise ValueError("`from_config` needs `model_type`, such as `gpt2`")
            if self.tokenizer is None:
                raise ValueError("`from_config` needs a `tokenizer`: a name, a folder, or `{vocab_size: …}` for one")
            if self.config or self.revision or self.trust_remote_code:
                raise ValueError("`config`, `revision`, `trust_remote_code` go with `name_or_path`, not `from_config`")
            if self.load_in_4bit:
                raise ValueError("`load_in_4bit` goes with `name_or_path`: a fresh model has nothing to be rounded")
        elif isinstance(self.tokenizer, TrainedTokenizer):
            raise ValueError("a tokenizer is trained only for a fresh model (`from_config`), not a pretrained one")
        if self.trust_remote_code and not _is_commit(self.revision):
            raise ValueError("`trust_remote_code: true` demands a `revision` pinned to a full commit hash")
        return self


def _is_commit(revision: str | None) -> bool:
    return revision is not None and len(revision) == 40 and all(c in "0123456789abcdef" for c in revision)


class EvaluationSet(Source):
    """A named set of documents to measure on: a split of the recipe's data, or a source of its own."""

    split: Text | None = None
    """Without a source: `validation` or `train` of `data`, or `replay` (what of `data.replay` is held out). Of a
    `dataset`: its own split."""
    fraction: float | None = Field(default=None, gt=0, lt=1)
    """Of a source: only the documents that `data.validation` with this fraction and `seed` holds out, such as those
    that the base model was not trained on."""
    seed: int = 0
    """Seed that goes with `fraction`."""
    max_documents: int | None = Field(default=None, ge=1)
    """Measure on at most this many documents, chosen by their hash; of a dataset the first ones."""

    @property
    def data_split(self) -> str | None:
        """The split of `data` that the set names instead of a source."""
        return None if self.dataset else self.split

    @model_validator(mode="after")
    def _one_kind(self) -> "EvaluationSet":
        if self.data_split is None:
            return super()._one_kind()
        if self.split not in DATA_SPLITS:
            raise ValueError(f"`split` is `{self.split}`; expected one of {', '.join(DATA_SPLITS)}, or a `dataset`")
        if self.written() - {"split", "max_documents"}:
            raise ValueError("`split` names documents of `data`: the keys that describe a source do not go with it")
        return self

    @model_validator(mode="after")
    def _seed_goes_with_fraction(self) -> "EvaluationSet":
        if self.fraction is None and "seed" in self.written():
            raise ValueError("`seed` goes with `fraction`")
        return self


class Generation(Section):
    """How sample continuations are drawn, under the names of `generate`."""

    max_new_tokens: int = Field(default=40, ge=1)
    """Number of tokens to add to each prompt."""
    do_sample: bool = True
    """Sample; `false` takes the most probable token each time."""
    top_k: int = Field(default=50, ge=0)
    """Sample among this many most probable tokens; 0 among all."""
    temperature: float = Field(default=1.0, gt=0)
    """Divisor of the logits before sampling."""
    seed: int = 42
    """Seed of the sampling."""


class EvaluationSection(Section):
    """What is measured before, during and after training."""

    sets: dict[Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_-]*$")], EvaluationSet] = {}
    """Named evaluation sets; by default `domain`, the validation split."""
    prompts: sequence(Text) = ()
    """Prompts that the model continues before and after training."""
    generation: Generation = Generation()
    """How the prompts are continued."""


class Recipe(Section):
    """A whole recipe: what to adapt, to which domain, and how; what every task has in common.

    Each task has a model of its own that extends this one: see `kit.recipe.tasks`.
    """

    task: Literal["causal-lm", "sequence-classification"]
    """The kind of model and objective."""
    model: ModelSection
    data: Section
    vocabulary: VocabularySection | None = None
    """Tokens that are added to the tokenizer, and what their rows of the embeddings begin as."""
    freezing: FreezingSection | None = None
    """Which parameters train; without this section all of them."""
    adapter: AdapterSection | None = None
    """Small weights of peft that train in place of the model's own. Beside `type` it takes every key of the peft
    configuration of that type, under peft's own name; unknown keys are refused with the nearest one. Without
    `target_modules` LoRA and its kin go into every linear layer of the blocks."""
    training: dict[str, Any] = {}
    """`TrainingArguments` under their own names."""
    evaluation: Section
    run: RunSection = RunSection()
    tracking: TrackingSection = TrackingSection()

    @model_validator(mode="after")
    def _one_eos(self) -> "Recipe":
        role = self.vocabulary.roles.eos_token if self.vocabulary else None
        if role and self.model.eos_token:
            raise ValueError(
                f"`model.eos_token` is `{self.model.eos_token}` and `vocabulary.roles.eos_token` is `{role}`: leave "
                f"out one of the two"
            )
        return self

    @model_validator(mode="after")
    def _attention_has_packed_rows(self) -> "Recipe":
        kernel = self.model.attn_implementation
        if kernel in PACKED_ATTENTION and not getattr(self.data, "packing", False):
            raise ValueError(
                f"model.attn_implementation `{kernel}` is for packed rows (`data.packing`), and there are none; leave "
                f"the key out: SDPA needs no mask for rows of one document"
            )
        return self

    @model_validator(mode="after")
    def _adapter_trains_alone(self) -> "Recipe":
        if self.adapter is None:
            if self.model.load_in_4bit:
                raise ValueError(
                    "model.load_in_4bit such weights cannot train: give `adapter`, which trains beside them"
                )
            return self
        if self.model.from_config is not None:
            raise ValueError(
                "adapter needs a pretrained model (`model.name_or_path`): it would freeze a fresh one's random weights"
            )
        if self.freezing is not None:
            for key in sorted(self.freezing.written() - {"trainable", *OF_THE_CACHE}):
                raise ValueError(
                    f"freezing.{key} does not go with `adapter`, which trains alone, from the first step to the last; "
                    f"only `freezing.trainable.new_tokens` goes with it"
                )
            for key in sorted(self.freezing.trainable.named() - {"new_tokens"}):
                raise ValueError(
                    f"freezing.trainable.{key} does not go with `adapter`, which freezes the model's own weights; "
                    f"`adapter.modules_to_save` trains whole modules beside it"
                )
        return self

    @model_validator(mode="after")
    def _new_tokens_learn(self) -> "Recipe":
        adds = self.vocabulary is not None and (self.vocabulary.special_tokens or self.vocabulary.tokens)
        freezing = self.freezing
        if self.adapter and adds and not freezing and not self.adapter.options().get("modules_to_save"):
            raise ValueError(
                "adapter freezes the embeddings: the tokens that `vocabulary` adds would never learn; set "
                "`freezing.trainable.new_tokens: true`"
            )
        if freezing is None:
            return self
        key = next((name for name in ("frozen", "trainable", "schedule") if getattr(freezing, name)), None)
        if adds and key and not (freezing.new_tokens or freezing.may_train_embeddings):
            raise ValueError(
                f"freezing.{key} freezes the embeddings: the tokens that `vocabulary` adds would never learn; set "
                f"`freezing.trainable.new_tokens: true`"
            )
        if freezing.new_tokens and not adds:
            raise ValueError("freezing.trainable.new_tokens there are none: `vocabulary` adds no token")
        return self


class CausalLmRecipe(Recipe):
    """A recipe of `task: causal-lm`: a decoder learns to predict the text of a domain."""

    task: Literal["causal-lm"]
    """The kind of model and objective."""
    data: DataSection
    evaluation: EvaluationSection = EvaluationSection()

    @model_validator(mode="after")
    def _consistent(self) -> "CausalLmRecipe":
        needs_validation = [name for name, s in self.evaluation.sets.items() if s.data_split == "validation"]
        if needs_validation and self.data.validation is None:
            wanted = f"evaluation.sets.{needs_validation[0]} names the split `validation`"
            raise ValueError(f"{wanted}, but `data.validation` is missing")
        needs_replay = [name for name, s in self.evaluation.sets.items() if s.data_split == "replay"]
        if needs_replay and not (self.data.replay and isinstance(self.data.validation, ValidationFraction)):
            wanted = f"evaluation.sets.{needs_replay[0]} names the split `replay`"
            raise ValueError(
                f"{wanted}, which needs `data.replay`, and `data.validation` with a `fraction` to hold out"
            )
        if self.evaluation.sets and not needs_validation and isinstance(self.data.validation, tuple):
            raise ValueError("`data.validation` gives files, but no set of `evaluation.sets` has `split: validation`")
        return self
