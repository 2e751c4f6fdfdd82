"""What the values of tensors tell of a model: NaN, constants, entries in no order."""

import pytest
import torch

from kit.model.sanity import compare_blocks, compare_neighbours, examine


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def trained(rows=48, columns=64, seed=0):
    """A matrix as training leaves it: noise, and a few directions that stand out."""
    return random(rows, columns, seed=seed) + random(rows, 2, seed=seed + 50) @ random(2, columns, seed=seed + 99)


def shuffled(matrix, seed=7):
    order = torch.randperm(matrix.numel(), generator=torch.Generator().manual_seed(seed))
    return matrix.flatten()[order].view_as(matrix)


def blocks(make, number=4):
    names = ("attn.weight", "mlp.weight")
    return {f"h.{n}.{name}": make(seed=10 * n + k) for n in range(number) for k, name in enumerate(names)}


def compare(tensors):
    return compare_blocks([examine(name, tensor) for name, tensor in tensors.items()])


def test_values_that_are_not_finite_are_counted():
    tensor = random(20, 20)
    tensor[0, :3], tensor[5, 5] = torch.nan, torch.inf
    facts = examine("x", tensor)
    assert (facts.bad, facts.order, facts.constant) == (4, None, None)


@pytest.mark.parametrize("value", [0.0, 1.5])
def test_a_tensor_of_one_value_is_constant(value):
    assert examine("x", torch.full((20, 20), value)).constant == value
    nearly = torch.full((20, 20), value)
    nearly[3, 3] += 1
    assert examine("x", nearly).constant is None


def test_a_scalar_is_not_constant_as_it_could_be_nothing_else():
    assert examine("x", torch.tensor([3.0])).constant is None


@pytest.mark.parametrize("shape", [(48, 64), (64, 48), (700, 600), (3, 40, 40)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_trained_matrix_stands_out_of_its_own_entries_shuffled(shape, dtype):
    rows, columns = shape[-2] * (shape[0] if len(shape) == 3 else 1), shape[-1]
    matrix = trained(rows, columns).reshape(shape).to(dtype)
    assert examine("x", matrix).errors > 20
    assert abs(examine("x", shuffled(matrix)).errors) < 4
    assert abs(examine("x", random(*shape).to(dtype)).errors) < 4


def test_single_large_entries_are_no_order():
    """Outliers alone make singular values unequal, which shuffling them leaves as it is."""
    matrix = random(64, 64)
    matrix[torch.arange(5), torch.tensor([3, 17, 40, 8, 60])] = 30
    assert abs(examine("x", matrix).order) < 0.2


def test_vectors_and_small_matrices_have_no_spectrum_to_speak_of():
    assert examine("x", random(100)).order is None
    assert examine("x", random(15, 100)).order is None


def test_a_matrix_is_measured_alike_each_time_and_at_any_scale():
    matrix = trained()
    assert examine("x", matrix) == examine("x", matrix.clone())
    assert examine("x", matrix * 2.0**-60).order == examine("x", matrix).order


def test_trained_blocks_have_nothing_to_tell():
    found = compare(blocks(trained))
    assert found.trained
    assert found.blocks == []
    assert found.matrices == []


@pytest.mark.parametrize("number", [2, 4])
@pytest.mark.parametrize("at", [0, 1])
def test_a_block_of_shuffled_matrices_is_named(number, at):
    tensors = blocks(trained, number)
    tensors |= {name: shuffled(t) for name, t in tensors.items() if name.startswith(f"h.{at}.")}
    found = compare(tensors)
    assert found.blocks == [f"h.{at}"]
    assert found.matrices == []


def test_one_shuffled_matrix_is_named():
    tensors = blocks(trained)
    tensors["h.2.mlp.weight"] = shuffled(tensors["h.2.mlp.weight"])
    found = compare(tensors)
    assert found.blocks == []
    assert found.matrices == ["h.2.mlp.weight"]


def test_a_kind_of_matrix_that_stands_out_nowhere_is_not_held_against_any_block():
    tensors = blocks(trained) | {f"h.{n}.v.weight": random(48, 64, seed=n) for n in range(4)}
    found = compare(tensors)
    assert found.blocks == []
    assert found.matrices == []


def test_untrained_blocks_are_told_as_such_and_none_is_named():
    found = compare(blocks(lambda seed: random(48, 64, seed=seed)))
    assert not found.trained
    assert found.blocks == []
    assert found.matrices == []


def test_one_block_alone_cannot_be_compared():
    assert compare(blocks(trained, 1)) is None
    assert compare({"wte.weight": trained()}) is None


def _stack(blocks, seed=0):
    """Blocks of a model in which some channels are large throughout, and what each block does is its own."""
    generator = torch.Generator().manual_seed(seed)
    channels = torch.rand(96, generator=generator) ** 3 + 0.05
    tensors = {}
    for number in range(blocks):
        for name, shape, scale in (
            ("attn.qkv.weight", (288, 96), channels),
            ("attn.out.weight", (96, 96), channels[:, None]),
            ("mlp.up.weight", (384, 96), channels),
            ("norm.one.weight", (96,), channels),
            ("norm.two.weight", (96,), channels),
        ):
            noise = torch.randn(shape, generator=generator)
            tensors[f"model.layers.{number}.{name}"] = noise * scale if len(shape) > 1 else 1 + noise * 0.1 + scale
    return tensors


def _strange(tensors):
    found = compare_neighbours([examine(name, tensor) for name, tensor in tensors.items()])
    return {each.block: len(each.strange) / each.judged for each in found}


def test_blocks_agree_on_which_channels_are_large():
    assert _strange(_stack(6)) == {f"model.layers.{number}": 0 for number in (1, 2, 3, 4)}


@pytest.mark.parametrize("damaged", [1, 2, 3, 4])
def test_rows_in_another_order_are_seen_by_the_neighbours(damaged):
    tensors = _stack(6)
    generator = torch.Generator().manual_seed(1)
    for name in [name for name in tensors if name.startswith(f"model.layers.{damaged}.")]:
        for axis in range(tensors[name].dim()):
            order = torch.randperm(tensors[name].shape[axis], generator=generator)
            tensors[name] = tensors[name].index_select(axis, order)
    found = _strange(tensors)
    assert found.pop(f"model.layers.{damaged}") >= 0.8
    assert set(found.values()) == {0}


def test_what_never_agreed_is_not_judged():
    """Weights at random, three blocks, and the layers of a head, which are no blocks."""
    random = {f"model.layers.{n}.mlp.up.weight": torch.randn(64, 96) for n in range(6)}
    assert _strange(random) == {}
    assert _strange(_stack(3)) == {}
    head = {f"classifier.{n}.weight": torch.randn(64, 64) for n in (0, 3)}
    assert compare_blocks([examine(name, tensor) for name, tensor in head.items()]) is None


def test_a_row_of_zeros_is_a_vector():
    """RoBERTa has the embeddings of one token type."""
    facts = examine("embeddings.token_type_embeddings.weight", torch.zeros(1, 32))
    assert (facts.dim, facts.constant) == (1, 0)
