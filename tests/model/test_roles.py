"""Roles of tokens are the tokenizer's own, before and after it is saved; chats are written as data templates write."""

import json

import pytest
from pydantic import ValidationError
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from kit.errors import UserError
from kit.model.roles import apply_roles, compare_with_chat
from kit.model.tokenizer import special_tokens
from kit.model.vocabulary import extend_tokenizer
from kit.recipe.vocabulary import VocabularySection
from kit.tasks.causal_lm import token_coding
from tests.material import make_tokenizer

SPEAKERS = {"user": "<|user|>", "assistant": "<|assistant|>"}
ALL = {**SPEAKERS, "system": "<|system|>", "bos_token": "<|begin|>", "eos_token": "<|end|>", "pad_token": "<|pad|>"}
CHAT = [
    {"role": "user", "content": " What is the model?\n"},
    {"role": "assistant", "content": "the kinase\n\n"},
    {"role": "user", "content": "gradients"},
    {"role": "assistant", "content": "in the corpus"},
]


def section(roles=SPEAKERS, **values):
    values.setdefault("special_tokens", list(roles.values()))
    return VocabularySection(roles=roles, **values)


def make(roles=SPEAKERS, tokenizer=None, **values):
    """Return a tokenizer with these tokens and roles."""
    tokenizer = tokenizer or make_tokenizer()
    extend_tokenizer(tokenizer, section(roles, **values))
    apply_roles(tokenizer, section(roles, **values))
    return tokenizer


def refusal(*args, **values):
    with pytest.raises(UserError) as error:
        make(*args, **values)
    return str(error.value)


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


# ---- the tokenizer's own


def test_roles_are_registered_under_their_ids():
    tokenizer = make_tokenizer()
    extend_tokenizer(tokenizer, section(ALL))
    vocabulary, before = tokenizer.get_vocab(), ids_of(tokenizer, "the model<|user|> of <eos>")
    apply_roles(tokenizer, section(ALL))
    assert tokenizer.get_vocab() == vocabulary
    assert ids_of(tokenizer, "the model<|user|> of <eos>") == before
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<|begin|>", "<|end|>", "<|pad|>")
    assert tokenizer.eos_token_id == vocabulary["<|end|>"]
    chosen = special_tokens(tokenizer)
    assert [each.token for each in (chosen.context, chosen.eos, chosen.pad)] == ["<|begin|>", "<|end|>", "<|pad|>"]
    ids = [vocabulary[token] for token in ("<|end|>", "<eos>", "<|user|>")]
    assert tokenizer.decode([*before, *ids], skip_special_tokens=True) == "the model of "


@pytest.mark.parametrize("loader", [AutoTokenizer, PreTrainedTokenizerFast])
@pytest.mark.parametrize("roles", [SPEAKERS, ALL], ids=["speakers", "all"])
def test_saved_tokenizer_has_the_same_roles(tmp_path, roles, loader):
    tokenizer = make(roles, tokens=["kinase"])
    tokenizer.save_pretrained(tmp_path)
    loaded = loader.from_pretrained(tmp_path)
    assert loaded.chat_template == tokenizer.chat_template
    assert loaded.special_tokens_map == tokenizer.special_tokens_map
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert loaded.apply_chat_template(CHAT) == tokenizer.apply_chat_template(CHAT)
    assert loaded("the kinase <|end|>") == tokenizer("the kinase <|end|>")
    assert special_tokens(loaded).eos.id == special_tokens(tokenizer).eos.id


def test_a_token_that_is_special_already_needs_no_declaration(capsys):
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    roles = {"user": "<|im_start|>", "assistant": "<|im_end|>", "pad_token": "<eos>"}
    apply_roles(tokenizer, VocabularySection(roles=roles))
    assert tokenizer.apply_chat_template(CHAT[:1], tokenize=False).startswith("<eos><|im_start|> What")
    assert tokenizer.pad_token == "<eos>"
    assert capsys.readouterr().out == ""


def test_a_word_of_the_vocabulary_becomes_special_by_declaration():
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<think>"])
    number, size = tokenizer.convert_tokens_to_ids("<think>"), len(tokenizer)
    roles = {"pad_token": "<think>"}
    assert "is an ordinary token" in refusal(roles, tokenizer, special_tokens=())
    make(roles, tokenizer)
    assert (tokenizer.pad_token_id, len(tokenizer)) == (number, size)
    assert tokenizer.decode([number], skip_special_tokens=True) == ""


@pytest.mark.parametrize(
    ("roles", "words"),
    [
        ({"user": "<|usr|>"}, ["vocabulary.roles.user", "no token `<|usr|>`", "mean `<|user|>`", "special_tokens"]),
        ({"eos_token": "STOP"}, ["vocabulary.roles.eos_token", "no token `STOP`", "valid: <eos>, <|assistant|>"]),
        ({"pad_token": "e"}, ["vocabulary.roles.pad_token", "`e` is an ordinary token", "special_tokens"]),
        ({"user": "<eos>"}, ["vocabulary.roles.user", "`<eos>` is the tokenizer's eos_token"]),
    ],
)
def test_tokens_that_cannot_have_the_role(roles, words):
    message = refusal({**SPEAKERS, **roles}, special_tokens=list(SPEAKERS.values()))
    assert all(word in message for word in words), message


def test_a_token_that_texts_would_not_be_read_with():
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": [AddedToken("<|user|>", special=True, single_word=True)]})
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|assistant|>"]}, replace_extra_special_tokens=False)
    with pytest.raises(UserError, match=r"vocabulary\.roles\.user: .* splits `<\|user\|>`"):
        apply_roles(tokenizer, VocabularySection(roles=SPEAKERS))


@pytest.mark.parametrize(
    "roles",
    [
        {"user": "<|a|>", "assistant": "<|a|>"},
        {**SPEAKERS, "eos_token": "<|user|>"},
        {**SPEAKERS, "system": "<|assistant|>"},
    ],
)
def test_one_token_cannot_open_two_kinds_of_messages(roles):
    with pytest.raises(ValidationError, match="are the same token"):
        section(roles)
    assert section({**SPEAKERS, "bos_token": "<eos>", "eos_token": "<eos>", "pad_token": "<eos>"})


def test_a_tokenizer_that_goes_on_adding_its_old_token(capsys):
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing("$A <eos>", None, [("<eos>", 0)])
    make({"pad_token": "<|pad|>"}, tokenizer)
    assert "warning" not in capsys.readouterr().out
    make({"eos_token": "<|end|>"}, tokenizer)
    assert "goes on adding <eos>" in capsys.readouterr().out


# ---- the template that the kit writes


@pytest.mark.parametrize("roles", [SPEAKERS, ALL], ids=["speakers", "all"])
def test_chat_is_the_text_of_a_data_template(roles):
    """What a recipe trains on and what the model is asked with later are the same tokens."""
    tokenizer = make(roles)
    [question, answer] = [message["content"] for message in CHAT[:2]]
    begin = "<|begin|>" if "bos_token" in roles else "<eos>"  # what the kit puts before each document
    of_data = f"<|user|>{question}<|assistant|>{answer}"
    text = tokenizer.apply_chat_template(CHAT[:2], tokenize=False)
    assert text == begin + of_data + tokenizer.eos_token
    ids = tokenizer.apply_chat_template(CHAT[:2])["input_ids"]
    assert ids == [*ids_of(tokenizer, begin), *ids_of(tokenizer, of_data), tokenizer.eos_token_id]
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
    prompt = tokenizer.apply_chat_template(CHAT[:1], tokenize=False, add_generation_prompt=True)
    assert prompt == f"{begin}<|user|>{question}<|assistant|>"
    unfinished = tokenizer.apply_chat_template(CHAT[:2], tokenize=False, continue_final_message=True)
    assert unfinished == begin + of_data


def test_each_role_is_one_token():
    tokenizer = make(ALL)
    ids = tokenizer.apply_chat_template([{"role": "system", "content": "a"}, *CHAT])["input_ids"]
    counts = {role: ids.count(tokenizer.convert_tokens_to_ids(token)) for role, token in ALL.items()}
    assert counts == {"user": 2, "assistant": 2, "system": 1, "bos_token": 1, "eos_token": 2, "pad_token": 0}


def gpt2_like():
    tokenizer = make_tokenizer()
    tokenizer.bos_token = "<eos>"
    return tokenizer


def llama_like():
    """One that writes BOS of its own accord, reads spaces as `▁` and puts one before each piece of a text."""
    alphabet = ["<unk>", "<s>", "</s>", "▁", *sorted(set("What is the kinase?\n") - {" "})]
    backend = Tokenizer(models.BPE({token: number for number, token in enumerate(alphabet)}, [], unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    backend.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


TOKENIZERS = {gpt2_like: "<eos>", llama_like: "<s>", make_tokenizer: "<eos>"}


@pytest.mark.parametrize("build", TOKENIZERS, ids=lambda build: build.__name__)
@pytest.mark.parametrize("data_template", ["<|user|>{}<|assistant|>{}", "<|user|> {} <|assistant|> {}\n"])
def test_chat_is_a_document_as_the_kit_makes_it(build, data_template, tmp_path):
    """The context token before it and EOS after it included, whatever the tokenizer does of its own accord."""
    tokenizer = make(tokenizer=build())
    texts = data_template.format("What is", "the kinase").split("<|assistant|>")
    contents = [texts[0].removeprefix("<|user|>"), texts[1]]
    coding = token_coding(tokenizer)
    [ids] = coding.encode(["<|assistant|>".join(texts)])
    document = [coding.context_token_id, *ids, coding.eos_token_id]
    chat = [{"role": role, "content": text} for role, text in zip(SPEAKERS, contents, strict=True)]
    assert tokenizer.convert_ids_to_tokens(document[0]) == TOKENIZERS[build]
    tokenizer.save_pretrained(tmp_path)
    for each in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        text = each.apply_chat_template(chat, tokenize=False)
        assert each(text, add_special_tokens=False)["input_ids"] == document
        assert each.apply_chat_template(chat)["input_ids"] == document
        prompt = each.apply_chat_template(chat[:1], add_generation_prompt=True)["input_ids"]
        assert prompt == document[: len(prompt)]
        assert each.decode(prompt[-1]) == "<|assistant|>"


def test_a_context_token_without_a_role_is_written_out():
    """What the kit chose by its name where the tokenizer names no end of its own."""
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    assert special_tokens(tokenizer).context.token == "<eos>"
    assert make(tokenizer=tokenizer).apply_chat_template(CHAT[:1], tokenize=False).startswith("<eos><|user|>")


def test_answers_and_their_ends_are_marked_for_training():
    tokenizer = make(ALL, tokens=["kinase"])
    encoded = tokenizer.apply_chat_template(CHAT, return_dict=True, return_assistant_tokens_mask=True)
    pairs = list(zip(encoded["input_ids"], encoded["assistant_masks"], strict=True))
    text = tokenizer.decode([number for number, marked in pairs if marked], clean_up_tokenization_spaces=False)
    assert text == "the kinase\n\n<|end|>in the corpus<|end|>"


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ({"role": "system", "content": "a"}, "no token for the role `system`; it has one for user, assistant"),
        ({"role": "tool", "content": "a"}, "no token for the role `tool`"),
        ({"role": "user", "content": [{"type": "text", "text": "a"}]}, "whose `content` is text"),
        ({"role": "assistant"}, "whose `content` is text"),
    ],
)
def test_chats_that_the_template_has_no_place_for(message, words):
    tokenizer = make()
    with pytest.raises(Exception, match=words):
        tokenizer.apply_chat_template([message], tokenize=False)
    with pytest.raises(Exception, match="no place for tools"):
        tokenizer.apply_chat_template(CHAT, tools=[{"name": "search"}], tokenize=False)


@pytest.mark.parametrize("token", ['<"quoted">', "<\\n>", "{{ user }}", "{% if %}", "<🧪é>", "<a'b>", "[user]"])
def test_tokens_that_mean_something_to_jinja(token, tmp_path):
    tokenizer = make({**SPEAKERS, "user": token})
    text = tokenizer.apply_chat_template(CHAT[:1], tokenize=False, add_generation_prompt=True)
    assert text == f"<eos>{token}{CHAT[0]['content']}<|assistant|>"
    tokenizer.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(CHAT) == tokenizer.apply_chat_template(CHAT)


def test_a_role_without_a_chat_writes_no_template():
    assert make({"pad_token": "<|pad|>"}).chat_template is None


def test_the_recipe_wins_over_the_tokenizers_own_template(capsys):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    make({"pad_token": "<|pad|>"}, tokenizer)
    assert tokenizer.chat_template == "{{ messages[0]['content'] }}"
    assert "chat template" not in capsys.readouterr().out
    make(tokenizer=tokenizer)
    assert "<|user|>" in tokenizer.chat_template
    assert "the recipe's, in the place of the tokenizer's own" in capsys.readouterr().out
    make(tokenizer=tokenizer)
    assert "chat template" not in capsys.readouterr().out


# ---- a template of the recipe's


TEMPLATE = "{% for m in messages %}{{ '<|' + m.role + '|>' }}\n{{ m.content }}\n{% endfor %}{{ eos_token }}"


def test_template_of_the_recipe(tmp_path):
    file = tmp_path / "chat.jinja"
    file.write_bytes(b"\xef\xbb\xbf" + TEMPLATE.replace("\n", "\r\n").encode())
    tokenizers = [make(chat_template=TEMPLATE), make(chat_template={"from_file": str(file)})]
    for number, tokenizer in enumerate(tokenizers):
        assert tokenizer.chat_template == TEMPLATE
        text = tokenizer.apply_chat_template(CHAT[2:], tokenize=False)
        assert text == "<|user|>\ngradients\n<|assistant|>\nin the corpus\n<eos>"
        tokenizer.save_pretrained(tmp_path / str(number))
        loaded = AutoTokenizer.from_pretrained(tmp_path / str(number))
        assert loaded.apply_chat_template(CHAT, tokenize=False) == tokenizer.apply_chat_template(CHAT, tokenize=False)


def test_template_without_roles():
    tokenizer = make_tokenizer()
    apply_roles(tokenizer, VocabularySection(chat_template=TEMPLATE))
    assert tokenizer.chat_template == TEMPLATE


BAD_TEMPLATES = [
    ("{% for m in messages %}\n{{ m.content }}\n{% endfr %}", ["line 3", "TemplateSyntaxError", "endfr"]),
    ("{{ messages[0].content }}\n{{ messages[0].name.first }}", ["line 2", "UndefinedError", "'name'"]),
    ("a\n{{ raise_exception('only alternating roles') }}", ["line 2", "TemplateError: only alternating roles"]),
    ("a\n\n{{ 1 / 0 }}", ["line 3", "ZeroDivisionError"]),
    ("{{ messages[0].__class__.__mro__ }}", ["line 1", "SecurityError"]),
    ("<|user|><|assistant|>", ["leaves out the text of the role `user`"]),
    (TEMPLATE.replace("m.role", "'user'"), ["does not write `<|assistant|>`", "vocabulary.roles.assistant"]),
]


@pytest.mark.parametrize(("template", "words"), BAD_TEMPLATES)
def test_bad_templates(template, words, tmp_path):
    message = refusal(chat_template=template)
    assert message.startswith("vocabulary.chat_template")
    file = tmp_path / "chat.jinja"
    file.write_text(template)
    of_file = refusal(chat_template={"from_file": str(file)})
    assert of_file == message.replace("vocabulary.chat_template", str(file))
    assert all(word in message for word in words), message
    assert "\n" not in message


def test_a_template_without_a_system_message():
    """Gemma's refuses them: that is a mistake where the recipe names a token for them, and else none."""
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + TEMPLATE
    make(chat_template=template)
    roles = {**SPEAKERS, "system": "<|system|>"}
    assert "fails on a chat of system, user, assistant: TemplateError: no system" in refusal(
        roles, chat_template=template
    )


@pytest.mark.parametrize(
    ("content", "words"), [(None, "no such file"), (b"\xff\xfe", "no UTF-8"), (b" \n", "is empty")]
)
def test_template_files_that_cannot_be_read(tmp_path, content, words):
    file = tmp_path / "chat.jinja"
    if content is not None:
        file.write_bytes(content)
    message = refusal(chat_template={"from_file": str(file)})
    assert str(file) in message
    assert words in message


def test_bos_of_a_class_that_adds_it(tmp_path):
    """Such a class builds what it adds from its BOS when it is loaded; in memory it has to do so too."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(make_tokenizer().backend_tokenizer.to_str()),
        bos_token="<eos>", eos_token="<eos>", add_bos_token=True,
    )  # fmt: skip
    make({"bos_token": "<|begin|>"}, tokenizer)
    assert tokenizer("the")["input_ids"][0] == tokenizer.bos_token_id
    tokenizer.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["bos_token"] == "<|begin|>"
    assert AutoTokenizer.from_pretrained(tmp_path)("the") == tokenizer("the")


# ---- the data template beside the chat template


@pytest.mark.parametrize(
    ("template", "chat_template"),
    [
        ("<|user|>{q}<|assistant|>{a}", None),
        ("<|user|>{a b}<|assistant|>{{{c}}}", "{% for m in messages %}{{ '<|' + m.role + '|>' }}"
         "{{ '{' + m.content + '}' if m.role == 'assistant' else m.content }}{% endfor %}"),
        ("<|user|>\n{q}\n<|assistant|>\n{a}\n", TEMPLATE),
        ("<|user|>\n{q}\n<|assistant|>\n{a}\n", "{{ bos_token }}" + TEMPLATE + "\n"),  # nothing reads what follows EOS
        # Nothing to compare with.
        ("{q}: {a}", None),
        ("<|user|>{q}", None),
        ("<|user|> {q}<|assistant|>", None),
        ("<|user|> {title} {q}<|assistant|>{a}", None),
        ("<|user|>{title} {q}<|assistant|>yes", None),
        ("<|system|>Be brief.<|user|>{q}<|assistant|>{a}", None),
        ("<|user|> {q}<|assistant|>{a}", "{% if messages[0].role != 'system' %}{{ raise_exception('no system') }}"
         "{% endif %}{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}{% endfor %}"),
    ],
)  # fmt: skip
def test_data_templates_that_nothing_is_said_of(template, chat_template, capsys):
    roles = {**SPEAKERS, "system": "<|system|>", "bos_token": "<|begin|>"}
    values = {"chat_template": chat_template} if chat_template else {}
    tokenizer = make(roles, **values)
    compare_with_chat(tokenizer, section(roles, **values).roles, template)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("build", TOKENIZERS, ids=lambda build: build.__name__)
@pytest.mark.parametrize(
    "template",
    [
        "<|user|> {q} <|assistant|> {a}",
        "<|user|>{q}<|assistant|>{a}\n",
        "<|user|>Question: {q}<|assistant|>{a}",
        "<|assistant|>{a}<|user|>{q}",
        "<|user|>{q}{{}}<|assistant|>{a}",
        "<|user|>{q}<|assistant|>{a}END",  # the kit writes one after each document
    ],
)
def test_a_data_template_of_another_form_is_warned_of(build, template, capsys):
    tokenizer = make(tokenizer=build())
    template = template.replace("END", tokenizer.eos_token)
    capsys.readouterr()
    compare_with_chat(tokenizer, section().roles, template)
    out = capsys.readouterr().out
    first, second = ("a", "q") if template.startswith("<|assistant|>") else ("q", "a")
    assert out.count("warning: data.train: the template writes") == 1
    assert repr(template.replace("{{", "{").replace("}}", "}")) in out
    assert f"the chat template '<|user|>{{{first}}}<|assistant|>{{{second}}}'" in out


def test_without_speakers_data_templates_are_not_compared(capsys):
    roles = {"pad_token": "<|pad|>"}
    compare_with_chat(make(roles), section(roles).roles, "<|user|> {q} <|assistant|> {a}")
    assert capsys.readouterr().out == ""
