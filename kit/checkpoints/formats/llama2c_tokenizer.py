r"""llama2.c's tokenizer (`tok512.bin`, `tokenizer.bin`): SentencePiece's BPE as a list of tokens with scores.

A file is int32 of the longest token's bytes, then of each token float32 of its score, int32 of its bytes, and these.
Of all pairs that could be merged, the one of the highest score is. Spaces are written as such. Token 0 is unknown, 1
and 2 are begin and end, written `\n<s>\n` and `\n</s>\n`, 3 to 258 are single bytes, for what no other token spells.
https://github.com/karpathy/llama2.c (`tokenizer.py`, `run.c`).
"""

import json
import struct
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, processors
from transformers import PreTrainedTokenizerFast

from kit.checkpoints.writing import replaced_file
from kit.errors import UserError

_SPACE = "▁"
_SPECIAL = {"<unk>": "<unk>", "<s>": "\n<s>\n", "</s>": "\n</s>\n"}  # in the model, in the file
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
_FIRST = [*_SPECIAL, *_BYTES]
_ENTRY = struct.Struct("<fi")
# Where a tokenizer of the same merges may differ from llama2.c's: at the beginning, at spaces, at what is no token.
_PROBES = ("", "a", " a", "  a  b ", "a\nb\t", "Él ñ", "▁a", "数 🙂", "\u200b<s>a</s>", "Once upon a time. 12")


def recognises(path: Path) -> bool:
    """Tell whether a file begins as llama2.c's tokenizers do."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        start = file.read(64)
    entries = (_ENTRY.pack(0.0, len(token)) + token for token in (t.encode() for t in _SPECIAL.values()))
    return start[4:].startswith(b"".join(entries))


def read_tokenizer(path: Path) -> Tokenizer:
    """Return a tokenizer that encodes as SentencePiece does, and decodes to the text.

    Raises:
        UserError: the file is cut off, or does not begin with a Llama's special tokens and bytes.
    """
    return _build(path, *_entries(path))


def save_tokenizer(path: Path, folder: Path, model_max_length: int) -> None:
    """Write tokenizer.json and tokenizer_config.json of a file into a folder.

    Args:
        path: llama2.c's file.
        folder: there already.
        model_max_length: the model's positions.

    Raises:
        UserError: see `read_tokenizer`.
    """
    unk, bos, eos = _SPECIAL
    PreTrainedTokenizerFast(
        tokenizer_object=read_tokenizer(path),
        unk_token=unk,
        bos_token=bos,
        eos_token=eos,
        model_max_length=model_max_length,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)


def write_tok_bin(folder: Path, path: Path) -> None:
    """Write the tokenizer of a folder as llama2.c's file, with the scores that SentencePiece gives: ranks.

    Raises:
        UserError: the folder has no tokenizer.json, or a tokenizer that encodes otherwise than llama2.c would.
    """
    source = folder / "tokenizer.json"
    if not source.is_file():
        raise UserError(f"{folder}: no tokenizer.json; expected the tokenizer of a Llama")
    tokenizer = Tokenizer.from_file(str(source))
    model = json.loads(tokenizer.to_str())["model"]
    if model["type"] != "BPE" or not model.get("byte_fallback"):
        raise UserError(f"{source}: {model['type']} without byte fallback; llama2.c's tokenizer is SentencePiece's BPE")
    if added := sorted(tokenizer.get_vocab().keys() - model["vocab"].keys()):
        raise UserError(f"{source}: llama2.c's tokenizer has no place for added tokens: {', '.join(added[:12])}")
    pieces = sorted(model["vocab"], key=model["vocab"].__getitem__)
    if [model["vocab"][piece] for piece in pieces] != list(range(len(pieces))):
        raise UserError(f"{source}: its ids have gaps; llama2.c numbers tokens by their place")
    # SentencePiece's: the first merge has rank 0, and -0.0 as its score; single characters go on counting.
    scores = [0.0] * len(_FIRST) + [-float(rank) for rank in range(len(pieces) - len(_FIRST))]
    again = _build(source, pieces, scores)
    merges = [list(merge) for merge in json.loads(again.to_str())["model"]["merges"]]
    if merges != [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]:
        raise UserError(f"{source}: its merges are not in the order of its ids, and llama2.c's file keeps no other")
    plain = {"add_special_tokens": False}  # llama2.c puts the first token before a text itself
    for text in _PROBES:
        if (ours := again.encode(text, **plain).ids) != (theirs := tokenizer.encode(text, **plain).ids):
            raise UserError(f"{source}: {text!r} is {theirs} by it, and would be {ours} by llama2.c's tokenizer")
    tokens = [_SPECIAL.get(piece, piece.replace(_SPACE, " ")).encode() for piece in pieces]
    entries = (_ENTRY.pack(score, len(token)) + token for score, token in zip(scores, tokens, strict=True))
    with replaced_file(path) as file:
        file.write(struct.pack("<i", max(map(len, tokens))) + b"".join(entries))


def _entries(path: Path) -> tuple[list[str], list[float]]:
    """Return the tokens of a file as SentencePiece names them, and their scores."""
    data, at = path.read_bytes(), 4
    pieces: list[str] = []
    scores: list[float] = []
    while at < len(data):
        if at + _ENTRY.size > len(data):
            raise UserError(f"{path}: cut off in the header of token {len(pieces):,}")
        score, size = _ENTRY.unpack_from(data, at)
        at += _ENTRY.size
        if not 0 < size <= len(data) - at:
            raise UserError(
                f"{path}: token {len(pieces):,} would have {size:,} bytes, where {len(data) - at:,} are left"
            )
        try:
            text = data[at : at + size].decode()
        except UnicodeDecodeError:
            raise UserError(f"{path}: token {len(pieces):,} is not UTF-8: {data[at : at + size]!r}") from None
        pieces.append(text.strip("\n") if text in _SPECIAL.values() else text.replace(" ", _SPACE))
        scores.append(score)
        at += size
    return pieces, scores


def _build(path: Path, pieces: Sequence[str], scores: Sequence[float]) -> Tokenizer:
    """Return the tokenizer; a token's merges are all pairs of tokens that it can be cut into."""
    for number, (expected, found) in enumerate(zip(_FIRST, [*pieces, *[None] * len(_FIRST)], strict=False)):
        if found != expected:
            what = "there is none" if found is None else f"it is {found!r}"
            raise UserError(f"{path}: expected a Llama's tokens: token {number} to be {expected!r}; {what}")
    ids = {piece: number for number, piece in enumerate(pieces)}
    if len(ids) < len(pieces):
        twice = [piece for number, piece in enumerate(pieces) if ids[piece] != number]
        raise UserError(f"{path}: tokens that occur more than once: {', '.join(map(repr, twice[:12]))}")
    merges: list[tuple[float, int, int]] = []
    for piece, score in list(zip(pieces, scores, strict=True))[len(_FIRST) :]:
        cuts = ((ids.get(piece[:at]), ids.get(piece[at:])) for at in range(1, len(piece)))
        merges += sorted((-score, one, other) for one, other in cuts if one is not None and other is not None)
    merges.sort(key=lambda merge: merge[0])
    unk, bos, _ = _SPECIAL
    pairs = [(pieces[one], pieces[other]) for _, one, other in merges]
    tokenizer = Tokenizer(models.BPE(ids, pairs, unk_token=unk, fuse_unk=True, byte_fallback=True))
    tokenizer.add_special_tokens(list(_SPECIAL))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), normalizers.Replace(" ", _SPACE)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos}:0 $A:0", pair=f"{bos}:0 $A:0 {bos}:0 $B:0", special_tokens=[(bos, ids[bos])]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer
