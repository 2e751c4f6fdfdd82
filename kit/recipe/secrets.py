"""Keep credentials out of recipes, which are shared and copied into runs: refuse them, and never print them."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from kit.errors import UserError
from kit.recipe.yaml import Document, Keys

ADVICE = "a recipe is shared and copied: keep it in the environment (HF_TOKEN, WANDB_API_KEY) and remove it here"

# Formats that nothing else has; they are searched for in the whole text, comments included.
_FORMATS = re.compile(
    r"""(?<![A-Za-z0-9]) (?:
        hf_[A-Za-z0-9]{16,} | api_org_[A-Za-z0-9]{16,}             # Hugging Face
      | wandb_v\d+_[A-Za-z0-9_]{16,} | local-[0-9a-fA-F]{40}       # Weights & Biases, hosted and local
      | sk-(?=[\w-]*[A-Za-z0-9]{16})[\w-]{20,}                     # OpenAI, Anthropic and others
      | gh[pousr]_[A-Za-z0-9]{16,} | github_pat_\w{16,}            # GitHub
      | (?:AKIA|ASIA)[A-Z0-9]{16}(?![A-Za-z0-9])                   # Amazon
      | xox[abeoprs]-[A-Za-z0-9-]{10,}                             # Slack
    ) | -----BEGIN\ [A-Z ]*PRIVATE\ KEY
      | [a-z][a-z0-9+.-]*://[^/\s:@]+:[^/\s@]+@                    # https://user:password@host
    """,
    re.VERBOSE,
)
# A Weights & Biases key looks like a git commit, so only a whole value counts, and not where commits belong.
_FORTY_HEX = re.compile(r"^[0-9a-fA-F]{40}$")
_COMMIT_KEY = re.compile(r"(?:^|_)(?:revision|commit|commit_hash|sha)$")

# `special_tokens`, `max_new_tokens`, `pad_token` and their like are no secrets, hence no general `_token`.
_SECRET_KEY = re.compile(
    r"^(?:token|secret|password|passwd|passphrase|credentials?|private_key|secret_key|bearer)$"
    r"|(?:^|_)(?:api_?key|api_?token|access_?token|auth_?token|refresh_?token|bearer_?token|hub_?token|hf_?token"
    r"|access_key|access_key_id|client_secret|password|passwd)$"
)

# The tokens of a vocabulary are words: `token` there is a wrong name for `content`, to be told as such.
_ABOUT_WORDS = "vocabulary"


def refuse_secrets_in_text(text: str, source: str) -> None:
    """Raise UserError when a line of the text, comments included, holds something in the format of a credential."""
    lines = [number for number, line in enumerate(text.splitlines(), 1) if _FORMATS.search(line)]
    if lines:
        raise UserError("\n".join(f"{source}:{number}: this line holds a secret; {ADVICE}" for number in lines))


def refuse_secrets(document: Document) -> None:
    """Raise UserError when a value of the document is a credential by its format or by the name of its key."""
    found = [keys for keys, value in _scalars(document.data, ()) if _is_secret(keys, value)]
    if found:
        lines = [f"{document.place(keys)}: {'.'.join(map(str, keys))}: holds a secret; {ADVICE}" for keys in found]
        raise UserError("\n".join(lines))


def refuse_secret_override(override: str) -> None:
    """Raise UserError, naming only the key, when `section.key=value` holds a credential.

    The text is searched, not the data: messages quote an override, also one that is not even YAML.
    """
    dotted, _, value = override.partition("=")
    lone = _is_secret(tuple(dotted.strip().split(".")), value.strip().strip("\"'"))
    section = dotted.strip().split(".")[0]
    names = re.findall(r"([\w-]+)[\"']?\s*:\s", f"{value} ")
    inner_keys = any(_names_a_secret((section, name)) for name in names)
    inner_hex = re.search(r"(?<![\w/])[0-9a-fA-F]{40}(?!\w)", value) and not re.search("revision|commit|sha", override)
    if lone or inner_keys or inner_hex or _FORMATS.search(override):
        shown = "(not shown)" if _FORMATS.search(dotted) else dotted.strip()
        raise UserError(f"command line: {shown}=…: holds a secret; {ADVICE}")


def mask_secrets(words: Sequence[str], environment: Mapping[str, str]) -> list[str]:
    """Return a command with what is or may be a credential in it replaced by asterisks.

    Args:
        words: of the command.
        environment: whose credentials, told by their names, may stand in it.
    """
    kept = [value for name, value in environment.items() if _names_a_secret(("", name)) and len(value) >= 6]
    masked, follows = [], False
    for word in words:
        name, equals, _ = word.partition("=")
        named = _names_a_secret(("", name.lstrip("-").rpartition(".")[2]))
        if follows or _FORMATS.search(word) or _FORTY_HEX.match(word) or any(value in word for value in kept):
            word = "***"
        elif named and equals:
            word = f"{name}=***"
        follows = named and not equals and name.startswith("-")
        masked.append(word)
    return masked


def _normal(name: str) -> str:
    return name.lower().replace("-", "_")


def _is_secret(keys: Keys, value: Any) -> bool:
    names = [_normal(k) for k in keys if isinstance(k, str)]
    name = names[-1] if names else ""
    text = str(value)
    if _FORMATS.search(text) or (_FORTY_HEX.match(text) and not _COMMIT_KEY.search(name)):
        return True
    given = value is not None and not isinstance(value, bool) and text not in ("", "null", "~", "true", "false")
    return given and _names_a_secret((*keys[:1], name))


def _names_a_secret(keys: Keys) -> bool:
    """Tell whether the last of some keys is the name of a secret, in the section that the first one is."""
    name = _normal(str(keys[-1]))
    return bool(_SECRET_KEY.search(name)) and (keys[0], name) != (_ABOUT_WORDS, "token")


def _scalars(data: Any, keys: Keys) -> list[tuple[Keys, Any]]:
    if not isinstance(data, (dict, list)):
        return [(keys, data)]
    children = data.items() if isinstance(data, dict) else enumerate(data)
    return [pair for key, child in children for pair in _scalars(child, (*keys, key))]
