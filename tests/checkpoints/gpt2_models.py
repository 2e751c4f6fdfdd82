"""Random GPT-2 models of Hugging Face, and the two best-known classes of other code, written anew from their papers.

The classes are an opinion of their own on each layout: their parameters have the names that the files have, and
PyTorch's own layers do the arithmetic.
"""

from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from kit.checkpoints.checkpoint import Checkpoint, LazyTensor
from kit.checkpoints.conversion import from_hf

VOCABULARY, POSITIONS = 23, 12


def make_model(n_layer=2, n_embd=16, n_head=2, *, tied=True, biases=True, dtype=torch.float32, std=0.2, **config):
    """Return a GPT-2 in which no tensor is what initialisation makes of it; without biases, all of them are zero."""
    sizes = {"vocab_size": VOCABULARY, "n_positions": POSITIONS, "bos_token_id": None, "eos_token_id": None, **config}
    made = GPT2Config(n_layer=n_layer, n_embd=n_embd, n_head=n_head, tie_word_embeddings=tied, **sizes)
    model = GPT2LMHeadModel(made).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0, std, generator=generator)
            if name.endswith(".bias") and not biases:
                parameter.zero_()
    return model.to(dtype)


def tensors_of(model):
    """Return what a model is saved with: a tied head is no tensor of its own."""
    tied = model.config.tie_word_embeddings
    return {name: tensor for name, tensor in model.state_dict().items() if not (tied and name == "lm_head.weight")}


def lazy(tensors):
    return {name: LazyTensor(tuple(t.shape), t.dtype, lambda t=t: t) for name, t in tensors.items()}


def checkpoint_of(tensors, settings=None):
    return Checkpoint(Path("model.pt"), "in memory", lazy(tensors), settings or {})


def converted(model, layout, **given):
    """Return a model in a layout: tensors, and what its file says beside them."""
    own, settings, _ = from_hf(lazy(tensors_of(model)), model.config, layout, given)
    return {name: tensor.read() for name, tensor in own.items()}, settings


def random_ids(vocab_size=VOCABULARY, time=POSITIONS):
    return torch.randint(vocab_size, (2, time), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def logits_of(model, ids):
    return model.float()(input_ids=ids, use_cache=False).logits


@torch.no_grad()
def logits_of_tensors(tensors, config, ids):
    """Return the logits of Hugging Face's code with these tensors; each must be there."""
    model = GPT2LMHeadModel(config).eval()
    missing, unexpected = model.load_state_dict({n: t.read() for n, t in tensors.items()}, strict=False)
    assert not unexpected
    assert set(missing) <= ({"lm_head.weight"} if config.tie_word_embeddings else set())
    return model(input_ids=ids, use_cache=False).logits


class NanoGPT(nn.Module):
    """nanoGPT's GPT, with the exact GELU (https://github.com/karpathy/nanoGPT)."""

    def __init__(self, block_size, vocab_size, n_layer, n_head, n_embd, dropout, bias):  # noqa: D107
        super().__init__()
        assert dropout == 0

        class Mix(nn.Module):
            def __init__(self):
                super().__init__()
                self.c_attn = nn.Linear(n_embd, 3 * n_embd, bias=bias)
                self.c_proj = nn.Linear(n_embd, n_embd, bias=bias)

            def forward(self, x):
                q, k, v = (y.unflatten(-1, (n_head, -1)).transpose(1, 2) for y in self.c_attn(x).split(n_embd, dim=2))
                mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
                return self.c_proj(mixed.transpose(1, 2).flatten(2))

        class Mlp(nn.Module):
            def __init__(self):
                super().__init__()
                self.c_fc = nn.Linear(n_embd, 4 * n_embd, bias=bias)
                self.c_proj = nn.Linear(4 * n_embd, n_embd, bias=bias)

            def forward(self, x):
                return self.c_proj(F.gelu(self.c_fc(x)))

        class Block(nn.Module):
            def __init__(self):
                super().__init__()
                self.ln_1, self.ln_2 = nn.LayerNorm(n_embd, bias=bias), nn.LayerNorm(n_embd, bias=bias)
                self.attn, self.mlp = Mix(), Mlp()

            def forward(self, x):
                x = x + self.attn(self.ln_1(x))
                return x + self.mlp(self.ln_2(x))

        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(vocab_size, n_embd),
                "wpe": nn.Embedding(block_size, n_embd),
                "h": nn.ModuleList(Block() for _ in range(n_layer)),
                "ln_f": nn.LayerNorm(n_embd, bias=bias),
            }
        )
        self.lm_head = nn.Linear(n_embd, vocab_size, bias=False)
        self.transformer["wte"].weight = self.lm_head.weight

    def forward(self, ids):
        x = self.transformer["wte"](ids) + self.transformer["wpe"].weight[: ids.shape[1]]
        for block in self.transformer["h"]:
            x = block(x)
        return self.lm_head(self.transformer["ln_f"](x))


class BookNorm(nn.Module):
    """Its LayerNorm."""

    def __init__(self, width):  # noqa: D107
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x):
        spread = torch.sqrt(x.var(dim=-1, keepdim=True, unbiased=False) + 1e-5)
        return self.scale * (x - x.mean(dim=-1, keepdim=True)) / spread + self.shift


class BookAttention(nn.Module):
    """Its MultiHeadAttention."""

    def __init__(self, cfg):  # noqa: D107
        super().__init__()
        width, time = cfg["emb_dim"], cfg["context_length"]
        self.heads = cfg["n_heads"]
        self.W_query, self.W_key, self.W_value = (nn.Linear(width, width, bias=cfg["qkv_bias"]) for _ in range(3))
        self.out_proj = nn.Linear(width, width)
        self.register_buffer("mask", torch.triu(torch.ones(time, time), diagonal=1))

    def forward(self, x):
        q, k, v = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.W_query, self.W_key, self.W_value)
        )
        scores = (q @ k.transpose(2, 3)).masked_fill(self.mask.bool()[: x.shape[1], : x.shape[1]], -torch.inf)
        mixed = torch.softmax(scores / k.shape[-1] ** 0.5, dim=-1) @ v
        return self.out_proj(mixed.transpose(1, 2).flatten(2))


class BookBlock(nn.Module):
    """Its TransformerBlock."""

    def __init__(self, cfg):  # noqa: D107
        super().__init__()
        width = cfg["emb_dim"]
        self.att = BookAttention(cfg)
        self.ff = nn.Module()
        self.ff.layers = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width)
        )
        self.norm1, self.norm2 = BookNorm(width), BookNorm(width)

    def forward(self, x):
        x = x + self.att(self.norm1(x))
        return x + self.ff.layers(self.norm2(x))


class BookModel(nn.Module):
    """The GPTModel of LLMs-from-scratch, made from its dictionary (https://github.com/rasbt/LLMs-from-scratch)."""

    def __init__(self, cfg):  # noqa: D107
        super().__init__()
        self.tok_emb = nn.Embedding(cfg["vocab_size"], cfg["emb_dim"])
        self.pos_emb = nn.Embedding(cfg["context_length"], cfg["emb_dim"])
        self.trf_blocks = nn.Sequential(*(BookBlock(cfg) for _ in range(cfg["n_layers"])))
        self.final_norm = BookNorm(cfg["emb_dim"])
        self.out_head = nn.Linear(cfg["emb_dim"], cfg["vocab_size"], bias=False)

    def forward(self, ids):
        x = self.tok_emb(ids) + self.pos_emb(torch.arange(ids.shape[1]))
        return self.out_head(self.final_norm(self.trf_blocks(x)))
