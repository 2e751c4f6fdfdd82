"""What the tests are made of: text of our own, tiny models of several architectures."""

import random

WORDS = (
    "the kit reads a corpus and cuts it into documents each one ends with a token that the model learns to say "
    "tensor gradient optimizer layer attention embedding vocabulary checkpoint scheduler loss batch epoch naïve Größe"
).split()

# Sizes that every architecture understands under the names of its own configuration.
ARCHITECTURES = {
    "gpt2": {
        "n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 64, "resid_pdrop": 0.0, "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    },
    "llama": {
        "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "hidden_size": 32,
        "intermediate_size": 64, "max_position_embeddings": 64,
    },
    "gpt_neox": {
        "num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 32, "intermediate_size": 64,
        "max_position_embeddings": 64,
    },
    "qwen3": {
        "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "hidden_size": 32,
        "intermediate_size": 64, "max_position_embeddings": 64,
    },
}  # fmt: skip


def documents(number: int, seed: int, longest: int = 80) -> list[str]:
    """Return ragged documents of 1 to `longest` words, no two alike."""
    rng = random.Random(seed)
    texts = set()
    while len(texts) < number:
        texts.add(" ".join(rng.choice(WORDS) for _ in range(rng.randint(1, longest))))
    return sorted(texts)


def make_tokenizer(vocab_size: int = 320):
    """Return a byte-level BPE tokenizer trained on `documents`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<eos>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    backend.train_from_iterator(documents(200, seed=0), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")


def make_model(architecture: str = "gpt2", vocab_size: int = 320, seed: int = 0, **config):
    """Return a tiny randomly initialised causal LM."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    values = {**ARCHITECTURES[architecture], "vocab_size": vocab_size, "bos_token_id": 0, "eos_token_id": 0, **config}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **values))


def save_tiny_model(folder, architecture: str = "gpt2", **config):
    """Save a tiny model and its tokenizer; return the folder."""
    tokenizer = make_tokenizer()
    make_model(architecture, len(tokenizer), **config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
