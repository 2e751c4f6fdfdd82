"""Fixtures that the tests of every room share: small corpora, tiny models, recipes on disk."""

import os

# Before torch is imported anywhere: the tests stay off the network, and bit-identical needs a fixed thread count.
os.environ.update(HF_HUB_OFFLINE="1", WANDB_MODE="offline", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")

import pytest
import yaml

from tests.material import documents, save_tiny_model


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _nothing_told_yet():
    """Each test is a command of its own: what one has told once, the next may tell again."""
    from kit.data.columns import tell_once

    tell_once.cache_clear()


@pytest.fixture(scope="session")
def corpus_file(tmp_path_factory):
    """A file of ragged documents, separated by two blank lines."""
    path = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    path.write_text("\n\n\n".join(documents(150, seed=1)), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory):
    """A function from an architecture to the folder of a tiny, randomly initialised model of it with its tokenizer."""
    folders = {}

    def get(architecture="gpt2", **config):
        key = (architecture, *sorted(config.items()))
        if key not in folders:
            folders[key] = save_tiny_model(tmp_path_factory.mktemp(architecture), architecture, **config)
        return folders[key]

    return get


@pytest.fixture
def write_recipe(tmp_path, corpus_file, tiny_models):
    """A function that writes a small causal-LM recipe, changed by the sections it is given, and returns its path."""

    def write(name="recipe", **sections):
        recipe = {
            "task": "causal-lm",
            "model": {"name_or_path": str(tiny_models())},
            "data": {
                "train": [{"path": str(corpus_file), "separator": "\n\n\n"}],
                "validation": {"fraction": 0.1},
                "block_size": 32,
                "store_dir": str(tmp_path / "store"),
            },
            "training": {"max_steps": 2, "per_device_train_batch_size": 4, "bf16": False, "learning_rate": 1e-3},
            "run": {"output_dir": str(tmp_path / "run")},
        }
        for section, values in sections.items():
            recipe[section] = {**recipe.get(section, {}), **values} if isinstance(values, dict) else values
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(recipe))
        return path

    return write
