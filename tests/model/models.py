"""Tiny models of the kinds that differ in how they embed tokens: tied or not, scaled, with a bias in the head."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, BertConfig

from tests.material import make_model

MODELS = {
    "gpt2": lambda **c: make_model("gpt2", **c),
    "gpt2-untied": lambda **c: make_model("gpt2", tie_word_embeddings=False, **c),
    "gpt_neox": lambda **c: make_model("gpt_neox", tie_word_embeddings=False, **c),
    "llama": lambda **c: make_model("llama", tie_word_embeddings=False, **c),
    "llama-tied": lambda **c: make_model("llama", tie_word_embeddings=True, **c),
    "qwen3": lambda **c: make_model("qwen3", tie_word_embeddings=True, **c),
    "gemma3": lambda vocab_size=320, **c: gemma("gemma3_text", vocab_size, **c),
    "gemma2": lambda vocab_size=320, **c: gemma("gemma2", vocab_size, **c),
    "bert": lambda **c: bert(**c),
    "bert-untied": lambda **c: bert(tie_word_embeddings=False, **c),
}  # fmt: skip


def gemma(kind, vocab_size, **config):
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 16,
        "num_key_value_heads": 1, "max_position_embeddings": 64, "vocab_size": vocab_size,
    }  # fmt: skip
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes, **config))


def bert(vocab_size=320, **config):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = AutoModelForMaskedLM.from_config(BertConfig(vocab_size=vocab_size, **sizes, **config))
    with torch.no_grad():
        model.get_output_embeddings().bias.normal_()
    return model
