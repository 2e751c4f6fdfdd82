"""New rows train as they would in a matrix that trains whole; the old rows, and all else, keep every bit."""

import copy
import multiprocessing
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from kit.errors import UserError
from kit.model.embeddings import resize_and_initialise
from kit.model.new_rows import is_new_rows, new_row_ids, train_new_rows
from kit.model.vocabulary import extend_tokenizer
from kit.recipe.vocabulary import VocabularySection
from tests.material import make_model
from tests.model.models import MODELS

DATA = Path(__file__).parents[3] / "shared" / "data"
NAMES = ["gpt2", "gpt2-untied", "gpt_neox", "llama", "llama-tied", "gemma3", "bert", "bert-untied"]
NEW = range(310, 317)  # of 320
IDS = torch.tensor([[1, 5, 310, 311, 312, 7, 316], [312, 312, 3, 4, 314, 9, 2]])


@pytest.fixture(params=NAMES)
def build(request):
    return MODELS[request.param]


def loss_of(model, ids=IDS):
    logits = model(input_ids=ids).logits
    return F.cross_entropy(logits.flatten(0, 1).float().to(logits.dtype), ids.roll(-1, 1).flatten())


def whole(model):
    """Let the whole embeddings train, and nothing else."""
    model.requires_grad_(False)
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        module.requires_grad_(True)
    return model


def rows_only(model, ids=NEW):
    model.requires_grad_(False)
    train_new_rows(model, ids)
    return model


def pairs(model):
    """Return (frozen matrix or bias, its part that trains), a tied matrix once."""
    inputs, head = model.get_input_embeddings(), model.get_output_embeddings()
    found = [(inputs.weight, inputs.new_rows)]
    if head.weight is not inputs.weight:
        found.append((head.weight, head.new_rows))
    if head.bias is not None:
        found.append((head.bias, head.new_bias))
    return found


def whole_matrices(model):
    inputs, head = model.get_input_embeddings(), model.get_output_embeddings()
    found = [inputs.weight, head.weight, head.bias]
    return [p for i, p in enumerate(found) if p is not None and not any(p is other for other in found[:i])]


def copies(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_old_values_kept(model, before, new=NEW, names=()):
    """Everything but the new rows is bit for bit what it was; each new row moved."""
    inputs, head = model.get_input_embeddings(), model.get_output_embeddings()
    extended = {p.data_ptr() for p in (inputs.weight, head.weight, head.bias) if p is not None}
    old = torch.ones(len(inputs.weight), dtype=torch.bool)
    old[new.start : new.stop] = False
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() in extended:
            assert torch.equal(tensor[old], before[name][old]), name
            moved = (tensor != before[name])[~old]
            assert (moved.any(1) if moved.dim() > 1 else moved).all(), name
        elif not any(part in name for part in names):
            assert torch.equal(tensor, before[name]), name


def logits(model, ids=IDS):
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


# ---- the gradient


def assert_same_gradients(build, ids=IDS, **config):
    reference, model = whole(build(**config).double()).eval(), rows_only(build(**config).double()).eval()
    assert torch.equal(logits(model, ids), logits(reference, ids))
    for each in (reference, model):
        loss_of(each, ids).backward()
    for matrix, (frozen, part) in zip(whole_matrices(reference), pairs(model), strict=True):
        assert frozen.grad is None
        torch.testing.assert_close(part.grad, matrix.grad[NEW.start : NEW.stop], rtol=1e-12, atol=1e-15)
        assert part.grad.any()


def test_gradient_is_that_of_the_whole_matrix(build):
    assert_same_gradients(build)
    assert_same_gradients(build, ids=IDS[:1, :5])


def test_no_gradient_for_a_padding_row(build):
    model = build()
    if model.config.model_type == "gpt2":
        pytest.skip("GPT-2's embeddings know no padding row")
    assert_same_gradients(build, pad_token_id=312)


def test_embedding_with_a_padding_row():
    """Whatever the head adds: tied, its gradient would hide a wrong one of the embedding."""
    for padding in (None, 311, 3):
        model = rows_only(make_model("llama", tie_word_embeddings=False))
        embedding = model.get_input_embeddings()
        embedding.padding_idx = padding
        (embedding(IDS) * torch.randn(2, 7, 32)).sum().backward()
        zero = set(NEW) - set(IDS.flatten().tolist()) | {padding}
        assert {NEW[i] for i in range(len(NEW)) if not embedding.new_rows.grad[i].any()} == zero & set(NEW)


def test_batch_without_new_tokens(build):
    """DistributedDataParallel waits for a gradient of every parameter."""
    model = rows_only(build())
    loss_of(model, IDS % 300).backward()
    for _, part in pairs(model):
        assert part.grad is not None
    embedding = rows_only(build()).get_input_embeddings()
    embedding(IDS % 300).sum().backward()
    assert not embedding.new_rows.grad.any()


def test_gradient_of_other_parameters_is_unchanged(build):
    reference, model = build().double().eval(), build().double().eval()
    train_new_rows(model, NEW)
    for each in (reference, model):
        loss_of(each).backward()
    expected = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not is_new_rows(name):
            torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-12, atol=1e-15)


def test_what_follows_may_change_embeddings_and_logits_in_place():
    model = rows_only(make_model("llama", tie_word_embeddings=False).double())
    reference = whole(make_model("llama", tie_word_embeddings=False).double())
    for each in (reference, model):
        hidden = each.get_input_embeddings()(IDS)
        hidden.mul_(3.0)
        scores = each.get_output_embeddings()(hidden)
        scores.add_(1.0).mul_(0.5)
        scores.square().sum().backward()
    for matrix, (_, part) in zip(whole_matrices(reference), pairs(model), strict=True):
        torch.testing.assert_close(part.grad, matrix.grad[NEW.start : NEW.stop], rtol=1e-12, atol=1e-15)


def test_autocast(build):
    """The input rows' gradient is float32's own; the head's is rounded like the whole head's."""
    reference, model = whole(build()).eval(), rows_only(build()).eval()
    for each in (reference, model):
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(each)
        loss.backward()
    for matrix, (_, part) in zip(whole_matrices(reference), pairs(model), strict=True):
        assert part.grad.dtype == torch.float32
        expected = matrix.grad[NEW.start : NEW.stop]
        assert (part.grad - expected).abs().max() < 0.02 * expected.abs().max()


def test_weights_in_bfloat16(build):
    """Many small gradients of one row would be lost if they were summed in bfloat16."""
    model = rows_only(build().to(torch.bfloat16)).eval()
    loss_of(model).backward()
    assert all(part.grad.dtype == torch.bfloat16 for _, part in pairs(model))
    embedding = model.get_input_embeddings()
    embedding.new_rows.grad = None
    embedding(torch.full((1, 4096), 312)).sum().backward()
    expected = torch.full((32,), 4096.0) * getattr(embedding, "embed_scale", 1.0)
    torch.testing.assert_close(embedding.new_rows.grad[2].float(), expected, rtol=0.01, atol=0)


@pytest.mark.parametrize("kind", ["gemma2", "gemma3"])
def test_gemmas_scale_is_rounded_as_its_forward_pass_rounds_it(kind):
    """It may be kept in float32 where the weights are in bfloat16."""
    model = MODELS[kind]().to(torch.bfloat16)
    model.get_input_embeddings().embed_scale = torch.tensor(32**0.5)
    reference, model = whole(copy.deepcopy(model)), rows_only(model)
    gradient = torch.randn(1, len(NEW), 32, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    for each in (reference, model):
        each.get_input_embeddings()(torch.tensor([list(NEW)])).backward(gradient)
    expected = reference.get_input_embeddings().weight.grad[NEW.start : NEW.stop]
    assert torch.equal(model.get_input_embeddings().new_rows.grad, expected)


def test_gradient_checkpointing(build):
    model, other = rows_only(build()), rows_only(build())
    other.gradient_checkpointing_enable({"use_reentrant": False})
    for each in (model, other):
        torch.manual_seed(0)
        loss_of(each.train()).backward()
    for (_, part), (_, again) in zip(pairs(model), pairs(other), strict=True):
        torch.testing.assert_close(part.grad, again.grad, rtol=1e-5, atol=1e-8)


def test_inputs_that_were_made_to_require_grad(build):
    """As transformers and peft do for reentrant checkpointing, before or after."""
    for first in (True, False):
        model = build().double().eval()
        if first:
            model.enable_input_require_grads()
        rows_only(model)
        if not first:
            model.enable_input_require_grads()
        reference = whole(build().double()).eval()
        for each in (model, reference):
            loss_of(each).backward()
        for matrix, (_, part) in zip(whole_matrices(reference), pairs(model), strict=True):
            torch.testing.assert_close(part.grad, matrix.grad[NEW.start : NEW.stop], rtol=1e-12, atol=1e-15)


# ---- steps


def batches(number, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(number):
        yield torch.randint(290, 320, (4, 12), generator=generator)


def train(model, optimizer, steps=20, accumulation=1):
    model.train()
    torch.manual_seed(0)
    for number, ids in enumerate(batches(steps * accumulation), start=1):
        (loss_of(model, ids) / accumulation).backward()
        if number % accumulation == 0:
            nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
            optimizer.step()
            optimizer.zero_grad()


def adamw(model, **options):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, **options)


@pytest.mark.parametrize("options", [{}, {"fused": True}, {"foreach": True}], ids=str)
def test_old_values_keep_every_bit(build, options):
    model = rows_only(build())
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    before, optimizer = copies(model), adamw(model, weight_decay=0.1, **options)
    train(model, optimizer, accumulation=2)
    assert_old_values_kept(model, before)
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied
    for matrix, part in pairs(model):
        assert torch.equal(matrix[NEW.start : NEW.stop], part)
    sizes = sorted(p.numel() for p in optimizer.state)
    assert sizes == sorted(len(NEW) * (1 if p.dim() == 1 else 32) for _, p in pairs(model))
    for state in optimizer.state.values():
        assert state["exp_avg"].numel() <= len(NEW) * 32


def test_equals_the_whole_matrix_with_masked_gradients(build):
    """Without decay, which would move old rows there."""
    model, reference = rows_only(build().double()), whole(build().double())
    mask = torch.zeros(320).double()
    mask[NEW.start : NEW.stop] = 1
    for parameter in reference.parameters():
        if parameter.requires_grad:
            parameter.register_hook(lambda grad: grad * (mask[:, None] if grad.dim() > 1 else mask))
    for each in (model, reference):
        train(each, adamw(each, weight_decay=0.0))
    for name, tensor in reference.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor, rtol=0, atol=1e-6)


def test_blocks_may_train_beside(build):
    model = build()
    rows_only(model)
    before = copies(model)
    block = model.base_model.layers if hasattr(model.base_model, "layers") else None
    block = block or getattr(model.base_model, "h", None) or model.base_model.encoder.layer
    block[-1].requires_grad_(True)
    train(model, adamw(model, weight_decay=0.1), 5)
    assert_old_values_kept(model, before, names=(".1.",))
    assert any(not torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items() if ".1." in name)


# ---- saving and loading


def test_saved_model_is_a_plain_one(build, tmp_path, caplog):
    plain, model = build(), rows_only(build())
    assert list(model.state_dict()) == list(plain.state_dict())
    train(model, adamw(model), 5)
    model.save_pretrained(tmp_path)
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(logits(loaded), logits(model))
    assert "shared" not in caplog.text
    assert (loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight) == (
        model.get_output_embeddings().weight is model.get_input_embeddings().weight
    )


def test_the_rows_follow_what_is_loaded(build):
    trained, model = rows_only(build()), rows_only(build())
    train(trained, adamw(trained), 5)
    for strict in (True, False):
        result = model.load_state_dict(trained.state_dict(), strict=strict)
        assert not result.missing_keys
        assert not result.unexpected_keys
    for matrix, part in pairs(model):
        assert torch.equal(matrix[NEW.start : NEW.stop], part)
    assert torch.equal(logits(model), logits(trained))
    train(model, adamw(model), 2)
    assert torch.equal(model.get_input_embeddings().weight[NEW.start : NEW.stop], model.get_input_embeddings().new_rows)


def test_a_copy_trains_on_its_own(build):
    """Python copies parameters one by one, so that the copy's rows are its matrix's no more, until it trains."""
    model = rows_only(build())
    before, twin = copies(model), copy.deepcopy(model)
    train(model, adamw(model), 5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in twin.state_dict().items())
    assert torch.equal(logits(twin), logits(build()))
    train(twin, adamw(twin), 5)
    assert all(torch.equal(tensor, copies(model)[name]) for name, tensor in twin.state_dict().items())


def test_what_is_loaded_counts_when_the_memory_was_apart(build):
    trained, model = rows_only(build()), rows_only(build())
    train(trained, adamw(trained), 5)
    for matrix, part in pairs(model):
        part.data = part.data.clone()
        assert matrix.shape[1:] == part.shape[1:]
    model.load_state_dict(trained.state_dict())
    train(model, adamw(model), 2)
    for matrix, part in pairs(model):
        assert torch.equal(matrix[NEW.start : NEW.stop], part)


def test_trainer_resumes(build, tmp_path):
    """Trainer's own saving and resuming, which load non-strictly and look at shared memory."""
    if build().config.model_type == "gpt_neox":
        pytest.skip("stock Trainer loses its head `embed_out`; the kit's does not: see test_vocabulary_run")
    values = {"use_cpu": True, "max_steps": 6, "save_steps": 3, "per_device_train_batch_size": 4, "bf16": False}
    args = TrainingArguments(str(tmp_path), report_to=[], disable_tqdm=True, **values)
    config = {"attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0}
    data = [{"input_ids": ids[0], "labels": ids[0]} for ids in batches(32)]
    weights = []
    for checkpoint in (None, str(tmp_path / "checkpoint-3")):
        model = rows_only(build(**(config if build().config.model_type == "bert" else {})))
        before = copies(model)
        Trainer(model=model, args=args, train_dataset=data).train(resume_from_checkpoint=checkpoint)
        assert_old_values_kept(model, before)
        weights.append(copies(model))
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


# ---- misuse


@pytest.mark.parametrize("ids", [[310, 312], [], [319, 320]])
def test_ids_that_are_no_rows_together(ids):
    with pytest.raises(RuntimeError, match=r"gaps|out of range"):
        train_new_rows(make_model(), ids)


def test_twice():
    model = rows_only(make_model())
    assert new_row_ids(model) == NEW
    with pytest.raises(RuntimeError, match="train already"):
        train_new_rows(model, NEW)


def test_the_order_of_ids_does_not_matter():
    assert new_row_ids(rows_only(make_model(), [312, 310, 311, 312])) == range(310, 313)
    assert new_row_ids(make_model()) is None


@pytest.mark.parametrize("head", [False, True])
def test_memory_that_is_no_longer_shared(head):
    model = rows_only(make_model("llama", tie_word_embeddings=False))
    module = model.get_output_embeddings() if head else model.get_input_embeddings()
    module.weight.data = module.weight.data.clone()
    logits(model)
    model.train()(input_ids=IDS)  # equal still, and shared again
    assert module.new_rows.untyped_storage().data_ptr() == module.weight.untyped_storage().data_ptr()
    module.weight.data = module.weight.data + 1
    with pytest.raises(RuntimeError, match="apart from their matrix"):
        model.train()(input_ids=IDS)


def test_cast_model_trains():
    model = rows_only(make_model()).double()
    before = copies(model)
    train(model, adamw(model), 3)
    assert_old_values_kept(model, before)


def test_embeddings_that_are_computed_in_another_way():
    class Normed(nn.Embedding):
        def forward(self, ids):
            return F.normalize(super().forward(ids), dim=-1)

    class Capped(nn.Linear):
        def forward(self, hidden):
            return super().forward(hidden).tanh()

    for kind, module in (("input", Normed(320, 32)), ("output", Capped(32, 320, bias=False))):
        model = make_model("llama", tie_word_embeddings=False)
        getattr(model, f"set_{kind}_embeddings")(module)
        with pytest.raises(UserError, match=rf"{type(module).__name__}.*embeddings: true"):
            train_new_rows(model, NEW)


# ---- beside LoRA


@pytest.mark.parametrize("targets", ["all-linear", "embeddings"])
def test_lora(build, targets, tmp_path):
    from peft import LoraConfig, get_peft_model

    base = build()
    if targets == "embeddings":
        if base.get_input_embeddings().weight is base.get_output_embeddings().weight:
            pytest.skip("peft itself merges into one of two tied matrices, and so into both")
        targets = [name for name, m in base.named_modules() if m is base.get_input_embeddings()]
    adapted = get_peft_model(base, LoraConfig(r=4, target_modules=targets, lora_dropout=0.0))
    train_new_rows(base, NEW)
    before = copies(adapted)
    optimizer = adamw(adapted, weight_decay=0.1)
    train(adapted, optimizer, 10)
    after = copies(adapted)
    lora = [name for name in after if "lora_" in name]
    assert all(not torch.equal(after[name], before[name]) for name in lora)
    assert len(optimizer.state) > len(lora)
    old = [*range(NEW.start), *range(NEW.stop, 320)]
    for name in after.keys() - lora:
        rows = after[name].shape[0] == 320
        assert torch.equal(after[name][old], before[name][old]) if rows else torch.equal(after[name], before[name])
    expected = logits(adapted)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=1e-5)
    merged.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(type(merged).from_pretrained(tmp_path)), expected, rtol=0, atol=1e-5)


# ---- several processes


def test_two_processes_equal_one(tmp_path):
    context = multiprocessing.get_context("forkserver")
    processes = [context.Process(target=_one_of_two, args=(rank, str(tmp_path))) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(240)
    assert [process.exitcode for process in processes] == [0, 0]
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for name in NAMES:
        model = rows_only(MODELS[name]().eval())
        before = copies(model)
        _steps(model, model, [0, 1])
        for state in found:
            for key, tensor in model.state_dict().items():
                torch.testing.assert_close(state[name][key], tensor, rtol=0, atol=1e-6)
                assert torch.equal(state[name][key], found[0][name][key])
        model.load_state_dict(found[0][name])
        assert_old_values_kept(model, before)


def _steps(model, wrapped, ranks):
    """Make six steps; the second process's rows hold no new id in the first one."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5, momentum=0.9)
    for step, ids in enumerate(batches(6)):
        shards = [ids[:2], ids[2:] % 300 if step == 0 else ids[2:]]
        (sum(loss_of(wrapped, shards[rank]) for rank in ranks) / len(ranks)).backward()
        optimizer.step()
        optimizer.zero_grad()


def _one_of_two(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    states = {}
    for name in NAMES:
        model = rows_only(MODELS[name]().eval())
        _steps(model, DistributedDataParallel(model, find_unused_parameters=False), [rank])
        states[name] = model.state_dict()
    torch.save(states, Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


# ---- real models


@pytest.mark.parametrize("name", ["stories260K/hf", "base_novels"])
def test_real_model(name, tmp_path):
    folder, corpus = DATA / name, DATA / "pubmedqa" / "abstracts.txt"
    if not folder.is_dir() or not corpus.is_file():
        pytest.skip(f"{folder} or {corpus} is not on this machine")
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    text = corpus.read_text(encoding="utf-8")[:60_000]
    section = VocabularySection(tokens=["patients", "treatment", "clinical"], special_tokens=["<|abstract|>"])
    extension = extend_tokenizer(tokenizer, section)
    size = max(row.id for row in extension.rows) + 1
    resize_and_initialise(model, extension, size, section.initialize, section.pad_to_multiple_of, 0)
    new = range(min(row.id for row in extension.rows), size)
    rows_only(model, new)
    before = copies(model)
    ids = torch.tensor(tokenizer("<|abstract|>" + text)["input_ids"])[: 20 * 4 * 128].view(20, 4, 128)
    assert {row.id for row in extension.rows if row.text.startswith(" ")} <= set(ids.flatten().tolist())
    optimizer = adamw(model, weight_decay=0.1)
    losses = []
    for batch in ids:
        loss = model.train()(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    assert_old_values_kept(model, before, new)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path), ids[0]), logits(model, ids[0]))
