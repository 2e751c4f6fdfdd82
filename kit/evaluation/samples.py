"""Sample continuations of prompts, drawn with a seed of their own."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kit.console import say
from kit.errors import UserError
from kit.evaluation.inference import inference


@torch.no_grad()
def continue_prompts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    seed: int,
    num_return_sequences: int = 1,
    max_new_tokens: int | None = None,
    max_length: int | None = None,
    do_sample: bool = True,
    top_k: int = 50,
    temperature: float = 1.0,
) -> list[list[str]]:
    """Return the continuations of each prompt, prompt included; random numbers outside stay as they are.

    Args:
        model: a causal LM.
        tokenizer: its tokenizer.
        prompts: one or more texts to continue.
        seed: of the sampling, set anew for each prompt, so that a prompt's samples do not depend on the others.
        num_return_sequences: continuations of each prompt.
        max_new_tokens: tokens to add.
        max_length: tokens in total, the prompt's included; instead of `max_new_tokens`.
        do_sample: sample, or take the most probable token each time.
        top_k: sample among the most probable tokens; 0 among all.
        temperature: divisor of the logits.

    Raises:
        UserError: several greedy continuations are asked for, or a prompt leaves no room for one.
    """
    if num_return_sequences > 1 and not do_sample:
        raise UserError(f"num_return_sequences: found {num_return_sequences}; without sampling there is only one")
    # As in `inference`: processes of which each has a part of the weights go through the model equally often.
    first = next(model.parameters())
    synced = isinstance(model, FSDPModule) or hasattr(first, "ds_id") or None
    device = torch.device(first.device_mesh.device_type) if isinstance(first, DTensor) else first.device
    sampling = {"top_k": top_k, "temperature": temperature} if do_sample else {}
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    results = []
    with inference(model):
        for prompt in prompts:
            inputs = _encode(tokenizer, prompt).to(device)
            new_tokens = _count_new_tokens(model, inputs.shape[1], max_new_tokens, max_length)
            with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
                torch.manual_seed(seed)
                output = model.generate(
                    inputs,
                    attention_mask=torch.ones_like(inputs),
                    num_return_sequences=num_return_sequences,
                    eos_token_id=_ends(model, tokenizer),
                    pad_token_id=pad,
                    use_cache=True,
                    # Not `max_length`: a `max_new_tokens` in the model's own generation settings would win over it.
                    max_new_tokens=new_tokens,
                    do_sample=do_sample,
                    synced_gpus=synced,
                    **sampling,
                )
            results.append([_shown(tokenizer, ids) for ids in output.tolist()])
    return results


def check_prompts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_new_tokens: int | None = None,
    max_length: int | None = None,
    **others: Any,
) -> None:
    """Check that prompts and their continuations have room, as `continue_prompts` does, without continuing any.

    Raises:
        UserError: one has not.
    """
    for prompt in prompts:
        _count_new_tokens(model, _encode(tokenizer, prompt).shape[1], max_new_tokens, max_length)


def _ends(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens that end a text: the tokenizer's, and those of the model, which may have others for a turn."""
    of_model = model.generation_config.eos_token_id
    of_model = of_model if isinstance(of_model, list) else [of_model]
    return sorted({number for number in (tokenizer.eos_token_id, *of_model) if number is not None})


def _shown(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Return the text of tokens without those that begin, end and fill up texts.

    Other special tokens show: without the markers of a chat nobody could tell question and answer apart.
    """
    hidden = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    return tokenizer.decode([number for number in ids if number not in hidden], skip_special_tokens=False)


def _count_new_tokens(model: PreTrainedModel, prompt: int, max_new_tokens: int | None, max_length: int | None) -> int:
    total = max_length if max_length is not None else prompt + max_new_tokens
    if total <= prompt:
        raise UserError(
            f"max_length: found {max_length}, but the prompt alone has {prompt} tokens; "
            f"`max_new_tokens` counts without it"
        )
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions and total > positions:
        raise UserError(
            f"a prompt of {prompt} tokens and its continuation would take {total} positions; the model has "
            f"{positions}: "
            + (f"ask for at most {positions - prompt} new tokens" if prompt < positions else "shorten the prompt")
        )
    return total - prompt


def _encode(tokenizer: PreTrainedTokenizerBase, prompt: str) -> torch.Tensor:
    """Encode a prompt as documents are encoded: a context token, then the text."""
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    # GPT-2 users' prompts never begin with its end-of-text token, which doubles as BOS; Llama's begin with BOS.
    has_own_bos = tokenizer.bos_token_id is not None and tokenizer.bos_token_id != tokenizer.eos_token_id
    context = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    # A chat, which begins with the token of a role, is written as it was trained on.
    is_chat = bool(ids) and ids[0] in tokenizer.all_special_ids and ids[0] != context
    return torch.tensor([[context, *ids] if has_own_bos or not ids or is_chat else ids])


def print_samples(samples: Sequence[Mapping[str, Any]]) -> None:
    """Print what each prompt was continued with before and after training."""
    for sample in samples:
        say(f"\nprompt: {sample['prompt']!r}", style="bold")
        for when in ("before", "after"):
            for text in sample[when]:
                say(f"  {when}: " + text.replace("\n", "\n    "))
