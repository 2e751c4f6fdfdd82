"""Names folded into one line."""

from kit.names import fold_names


def test_names_that_differ_in_one_number_become_one():
    assert fold_names([f"h.{n}.attn.bias" for n in (0, 1, 2, 5)]) == "h.{0–2,5}.attn.bias"


def test_a_number_that_does_not_vary_stays():
    assert fold_names(["b.0.ff.2.bias", "b.1.ff.2.bias"]) == "b.{0,1}.ff.2.bias".replace("0,1", "0–1")
    assert fold_names(["b.0.ff.0.bias", "b.0.ff.2.bias"]) == "b.0.ff.{0,2}.bias"


def test_names_that_vary_in_two_numbers_are_counted():
    assert fold_names([f"b.{n}.ff.{m}.bias" for n in (0, 1) for m in (0, 2)]) == "b.*.ff.*.bias (4 of them)"
    assert fold_names(["one"]) == "one"
