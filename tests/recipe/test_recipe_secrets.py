"""Credentials in a recipe or an override are refused, and their value is never shown."""

import pytest

from kit.recipe.loading import load_recipe

# Put together here, so that no scanner takes this file for a leak.
SECRETS = [
    "hf_" + "AbCdEfGhIjKlMnOpQrStUvWxYz01234567",
    "0123456789abcdef" * 2 + "01234567",
    "local-" + "0123456789abcdef" * 2 + "01234567",
    "sk-" + "proj-AbCdEfGhIjKlMnOpQrSt12345",
    "sk-" + "ant-api03-AbCdEfGhIjKlMnOpQrSt12345",
    "ghp_" + "AbCdEfGhIjKlMnOpQrStUvWxYz0123456789",
    "github_pat_" + "11AAAAAAA0aaaaaaaaaaaa_bbbbbbbbb",
    "AKIA" + "IOSFODNN7EXAMPLE",
    "xoxb-" + "123456789012-abcdefghijkl",
    "-----BEGIN " + "RSA PRIVATE KEY-----",
    "https://user:" + "hunter2secret@example.org/x.git",
]


@pytest.mark.parametrize("secret", SECRETS)
@pytest.mark.parametrize("place", ["run: {resume: '%s'}", "evaluation: {prompts: [ok, '%s']}", "zzz: {'deep': ['%s']}"])
def test_formats_are_found_anywhere(message, place, secret):
    found = message(f"\n{place % secret}\n")
    assert "r.yaml:6: " in found
    assert "secret" in found
    assert "HF_TOKEN" in found
    assert "WANDB_API_KEY" in found
    assert secret not in found


@pytest.mark.parametrize("secret", SECRETS)
def test_overrides_are_searched_too(message, secret):
    found = message(overrides=[f"run.resume={secret}"])
    assert found.startswith("command line: run.resume=…: holds a secret")
    assert secret not in found


@pytest.mark.parametrize("text", ["# %s\n", "run: [\n  %s\n", 'run: {resume: "%s"\n', "%s: 1\n"])
def test_neither_comments_nor_broken_yaml_leak(message, text):
    found = message(text % SECRETS[0])
    assert "holds a secret" in found
    assert SECRETS[0] not in found


def test_an_escaped_secret_is_found(message):
    escaped = "\\x68" + SECRETS[0][1:]
    assert "r.yaml:5: run.resume: holds a secret" in message(f'run: {{resume: "{escaped}"}}\n')


@pytest.mark.parametrize(
    "key",
    [
        "token",
        "hub_token",
        "api_key",
        "apikey",
        "api-key",
        "password",
        "passwd",
        "secret",
        "access_token",
        "auth_token",
        "wandb_api_key",
        "WANDB_API_KEY",
        "client_secret",
        "private_key",
        "aws_secret_access_key",
    ],
)
@pytest.mark.parametrize("section", ["training", "tracking", "model"])
def test_key_names_give_secrets_away(message, section, key):
    value = "plain-looking"
    text = f"task: causal-lm\n{section}:\n  {key}: {value}\n"
    found = message(text, whole=True)
    assert f"r.yaml:3: {section}.{key}: holds a secret" in found
    assert value not in found
    found = message(overrides=[f"{section}.{key}={value}"])
    assert f"command line: {section}.{key}=…: holds a secret" in found
    assert value not in found


@pytest.mark.parametrize(
    "text", ["{api_key: %s}", '{"api_key": %s}', "{project: p, password: %s", "{tags: [a, {token: %s}]}"]
)
def test_key_names_give_secrets_away_inside_an_override(message, text):
    found = message(overrides=[f"tracking.wandb={text % 'plain-looking'}"])
    assert found.startswith("command line: tracking.wandb=…: holds a secret")
    assert "plain-looking" not in found


@pytest.mark.parametrize("entry", ["{token: kinase}", "{token: kinase, description: an enzyme}"])
def test_a_word_of_the_vocabulary_under_a_wrong_name_is_no_secret(message, entry):
    found = message(f"vocabulary: {{special_tokens: [a, {entry}]}}\n")
    assert "vocabulary.special_tokens.1.token: unknown key" in found
    assert "secret" not in found
    for override in (f"vocabulary.tokens=[{entry}]", f"vocabulary={{tokens: [{entry}]}}", "vocabulary.token=kinase"):
        found = message(overrides=[override])
        assert "unknown key" in found
        assert "secret" not in found


@pytest.mark.parametrize("secret", SECRETS)
def test_a_secret_among_the_words_of_a_vocabulary_is_found(message, secret):
    for text in (f"{{tokens: [{{token: '{secret}'}}]}}", f"{{tokens: ['{secret}']}}", "{tokens: [{hf_token: plain}]}"):
        assert "holds a secret" in (found := message(f"vocabulary: {text}\n"))
        assert secret not in found
    assert "holds a secret" in message(overrides=[f"vocabulary.tokens=[{{token: '{secret}'}}]"])
    assert "holds a secret" in message(overrides=["vocabulary.password=plain"])
    assert "holds a secret" in message("run: {vocabulary: {token: plain}}\n")


def test_a_wandb_key_in_a_list_is_found_in_an_override(message):
    assert "tracking.wandb.tags=…: holds a secret" in message(overrides=[f"tracking.wandb.tags=[{SECRETS[1]}]"])


def test_a_secret_in_an_inherited_file_is_found(message, write):
    write(f"run: {{resume: {SECRETS[0]}}}\n", "base.yaml")
    assert "base.yaml:5: " in message("extends: base.yaml\n", whole=True)


@pytest.mark.parametrize(
    "model",
    [
        "{name_or_path: g, revision: 0123456789abcdef0123456789abcdef01234567}",
        "{name_or_path: /hub/models--gpt2/snapshots/0123456789abcdef0123456789abcdef01234567}",
        "{name_or_path: g, config: {special_tokens: [a], max_new_tokens: 5, trainable_tokens: x, pad_token: '<pad>'}}",
        "{name_or_path: g, config: {token: null, tokens: abc, use_auth_token: false}}",
        "{name_or_path: data/sk-corpus-of-medical-abstracts-2024}",
        "{name_or_path: 'http://localhost:8080/a@b'}",
        "{name_or_path: hf_internal_testing/tiny_random_gpt2}",
        "{name_or_path: disk-0123456789abcdefghij0123456789}",
    ],
)
def test_what_is_no_secret_is_accepted(write, model):
    load_recipe(write(f"task: causal-lm\nmodel: {model}\ndata: {{train: [{{path: a}}]}}\n", whole=True))


def test_a_commit_is_accepted_as_an_override(write):
    commit = "0123456789abcdef0123456789abcdef01234567"
    assert load_recipe(write(), [f"model.revision={commit}"]).model.revision == commit
