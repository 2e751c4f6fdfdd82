"""YAML as recipes read it: values, places, and every part of YAML that is refused with its line."""

import math

import pytest

from kit.errors import UserError
from kit.recipe.loading import load_recipe
from kit.recipe.yaml import parse_yaml, write_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5),
        ("2E-5", 2e-5),
        ("5e5", 500000.0),
        ("1.0e-5", 1e-5),
        ("-.5", -0.5),
        ("1_000", 1000),
        ("0x10", 16),
        ("0", 0),
        ("-7", -7),
        ("1.10", 1.1),
        (".inf", math.inf),
        ("no", False),
        ("on", True),
        ("~", None),
        ("010", "010"),  # 8 in YAML 1.1
        ("1:30", "1:30"),  # 90 in YAML 1.1
        ("2024-01-01", "2024-01-01"),
        ("=", "="),
        ("1e", "1e"),
        ("'1e-5'", "1e-5"),
        ("!!str 12", "12"),
        ("[a, {b: 1}]", ["a", {"b": 1}]),
    ],
)
def test_scalars_are_read_as_written(text, value):
    read = parse_yaml(text, "x").data
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize(
    "value",
    [
        "no",
        "1e-5",
        "5E5",
        "010",
        "1:30",
        "2024-01-01",
        "=",
        "<<",
        "",
        " a",
        "a: b",
        "# c",
        "\u2028",
        "\ufeff",
        "\x85",
        "é😀",
        "a\nb\n",
        "\t",
        "*x",
        1e-5,
        1e300,
        0.1,
        3,
        True,
        None,
        [],
        {},
        {"a": [1, {"b": None}]},
    ],
)
def test_what_is_written_is_read_back(value):
    assert parse_yaml(write_yaml({"key": value}), "x").data == {"key": value}


def test_places_remember_line_text_and_quotes():
    document = parse_yaml('a:\n  b: no\n  c: ["1.10", x]\n', "f.yaml")
    assert str(document.place(("a",))) == "f.yaml:1"
    plain, quoted = document.place(("a", "b")), document.place(("a", "c", 0))
    assert (plain.line, plain.text, plain.plain) == (2, "no", True)
    assert (quoted.line, quoted.text, quoted.plain) == (3, "1.10", False)
    assert document.place(("a", "missing", "deeper")) == document.place(("a",))


def test_aliases_are_copies():
    data = parse_yaml("a: &x [1]\nb: *x\n", "f").data
    data["a"].append(2)
    assert data["b"] == [1]


BOMB = "a: &a [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{new}: &{new} [{','.join([f'*{old}'] * 10)}]\n" for old, new in zip("abcdef", "bcdefg", strict=True)
)


@pytest.mark.parametrize(
    ("text", "line", "parts"),
    [
        ("task: x\nmodel:\n  a: 1\n  b: 2\n  a: 3\n", 5, ["`a`", "twice", "recipe.yaml:3"]),
        ("task: x\nmodel:\n\tname: y\n", 3, ["spaces", "tabs"]),
        ("task: x\n  model: y\n", 2, ["not valid YAML", "indentation"]),
        ("task: x\nmodel:\n   a: 1\n  b: 2\n", 4, ["not valid YAML", "indentation"]),
        ("task: x\npath: *.txt\n", 2, ["`*`", "quotes"]),
        ("task: x\npath: @home\n", 2, ["quotes"]),
        ("task: x\nnote: a: b\n", 2, ["`: `", "quotes"]),
        ("task: [x\n", 2, ["not valid YAML"]),
        ("task: x\n---\ntask: y\n", 2, ["one document"]),
        (
            "task: x\nmodel: !!python/object/apply:os.system [ls]\n",
            2,
            ["!!python/object/apply:os.system", "not allowed"],
        ),
        ("task: x\nmodel: !secret y\n", 2, ["`!secret`", "not allowed"]),
        ("task: x\nmodel: !!set {a, b}\n", 2, ["`!!set`", "not allowed"]),
        ("task: x\nmodel: !!binary aGk=\n", 2, ["`!!binary`", "not allowed"]),
        ("task: x\nmodel: !!int ten\n", 2, ["`!!int`"]),
        ("task: x\nno: y\n", 2, ["`no`", "a boolean", '"no"']),
        ("task: x\n1: y\n", 2, ["`1`", "a number", '"1"']),
        ("task: x\n~: y\n", 2, ["`~`", "null"]),
        ("task: x\n? [a]\n: y\n", 2, ["key"]),
        ("base: &b {a: 1}\nmodel:\n  <<: *b\n", 3, ["<<", "extends"]),
        ("task: &t\n  again: *t\n", 2, ["alias", "inside"]),
        (BOMB, None, ["100,000", "alias"]),
        ("task: x\nmodel: *nothing\n", 2, ["undefined alias"]),
        ("task: x\nmodel: \x07\n", 2, ["#x0007"]),
        ("", 1, ["holds no recipe", "`task`"]),
        ("# only a comment\n", 1, ["holds no recipe"]),
        ("---\n", 1, ["holds no recipe"]),
        ("- task: x\n", 1, ["found a list", "mapping"]),
        ("causal-lm\n", 1, ['"causal-lm"', "mapping"]),
        ("a: " + "[" * 5000, None, ["nested too deeply"]),
    ],
)
def test_refused_yaml_names_file_and_line(tmp_path, text, line, parts):
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as error:
        load_recipe(path)
    message = str(error.value)
    assert message.startswith(f"{path}:{line}: " if line else str(path))
    for part in parts:
        assert part in message


def test_invalid_utf8_names_the_line(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"task: x\nmodel: caf\xe9\n")
    with pytest.raises(UserError, match=r"recipe.yaml:2: not UTF-8 text \(byte 0xe9\)"):
        load_recipe(path)


def test_a_byte_order_mark_is_accepted(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"\xef\xbb\xbftask: causal-lm\nmodel: {name_or_path: gpt2}\ndata: {train: [{path: a}]}\n")
    assert load_recipe(path).task == "causal-lm"


def test_a_missing_file_suggests_its_neighbour(tmp_path):
    (tmp_path / "medical.yaml").touch()
    with pytest.raises(UserError, match=r"medcal.yaml: no such file; did you mean `.*medical.yaml`"):
        load_recipe(tmp_path / "medcal.yaml")


@pytest.mark.parametrize(
    ("path", "part"), [(".", "is a folder"), ("no/such/folder.yaml", "no such file"), ("a\0b", "cannot be read")]
)
def test_what_is_no_file(path, part):
    with pytest.raises(UserError, match=part):
        load_recipe(path)
