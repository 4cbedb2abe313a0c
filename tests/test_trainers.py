"""Lightning, Hugging Face's Trainer and Accelerate drive KFACOptimizer as any other optimizer.

These are no dependencies of kfacopt; where they are missing, the tests are skipped and say so.
"""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

from kfacopt import KFACOptimizer

pytestmark = pytest.mark.filterwarnings("ignore")  # theirs

X = torch.linspace(-2, 2, 48 * 4).reshape(32, 6).sin()
LABELS = torch.arange(32) % 3
EPOCHS = 2


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 3))


def batches():
    return DataLoader(TensorDataset(X, LABELS), batch_size=8)


def plain_loop(accumulate=1, clip=None, **options):
    model = network()
    optimizer = KFACOptimizer(model.parameters(), **options)
    for _ in range(EPOCHS):
        for i, (x, y) in enumerate(batches()):
            if i % accumulate == 0:
                optimizer.zero_grad()
            (F.cross_entropy(model(x), y) / accumulate).backward()
            if (i + 1) % accumulate == 0:
                if clip is not None:
                    nn.utils.clip_grad_norm_(model.parameters(), clip)
                optimizer.step()
    return model


def assert_close_models(one, two):
    for p, q in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-6)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("fisher_type", ["mc", "type-2", "empirical"])
def test_lightning(fisher_type, accumulate, tmp_path):
    lightning = pytest.importorskip("lightning", reason="lightning is not installed")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = network()

        def training_step(self, batch, _):
            x, y = batch
            return F.cross_entropy(self.net(x), y)

        def configure_optimizers(self):
            return KFACOptimizer(self.parameters(), fisher_type=fisher_type)

    module = Module()
    trainer = lightning.Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        accumulate_grad_batches=accumulate,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(module, batches())
    assert_close_models(module.net, plain_loop(accumulate, 1.0, fisher_type=fisher_type))
    trainer.save_checkpoint(tmp_path / "saved.ckpt")
    saved = torch.load(tmp_path / "saved.ckpt", weights_only=False)["optimizer_states"][0]
    twin = network()
    KFACOptimizer(twin.parameters()).load_state_dict(saved)


@pytest.mark.parametrize("fisher_type", ["mc", "type-2", "empirical"])
def test_accelerate(fisher_type):
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = network()
    optimizer = KFACOptimizer(model.parameters(), fisher_type=fisher_type)
    wrapped, prepared, loader = accelerator.prepare(model, optimizer, batches())
    for _ in range(EPOCHS):
        for x, y in loader:
            with accelerator.accumulate(wrapped):
                accelerator.backward(F.cross_entropy(wrapped(x), y))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(wrapped.parameters(), 1.0)
                prepared.step()
                prepared.zero_grad()
    assert_close_models(model, plain_loop(2, 1.0, fisher_type=fisher_type))


@pytest.mark.parametrize("fisher_type", ["mc", "empirical"])
def test_gpt2_of_transformers(fisher_type):
    """It has no nn.Linear but a tied head, and returns its loss."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=50, n_positions=16)
    model = transformers.GPT2LMHeadModel(config)
    optimizer = KFACOptimizer(model.parameters(), fisher_type=fisher_type)
    tokens = torch.randint(50, (4, 12))
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        losses.append(f"{loss:.3f}")
    assert float(losses[-1]) < 0.7 * float(losses[0])


class Examples(Dataset):
    def __len__(self):
        return len(X)

    def __getitem__(self, i):
        return {"x": X[i], "labels": LABELS[i]}


class WithLoss(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = network()

    def forward(self, x, labels=None):
        logits = self.net(x)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def test_hugging_face_trainer(tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("accelerate", reason="accelerate is not installed")

    def trainer_of(model, epochs, **options):
        decayed = [p for p in model.parameters() if p.ndim > 1]
        others = [p for p in model.parameters() if p.ndim == 1]
        groups = [{"params": decayed, "weight_decay": 0.01}, {"params": others}]
        optimizer = KFACOptimizer(groups)
        arguments = transformers.TrainingArguments(
            tmp_path,
            num_train_epochs=epochs,
            per_device_train_batch_size=8,
            lr_scheduler_type="constant",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            save_strategy="epoch",
            seed=1,
        )
        return transformers.Trainer(
            model, arguments, train_dataset=Examples(), optimizers=(optimizer, None)
        )

    whole, resumed = WithLoss(), WithLoss()
    trainer_of(whole, EPOCHS).train()
    start = network()
    assert not torch.equal(whole.net[0].weight, start[0].weight)
    first = sorted(tmp_path.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))[0]
    trainer_of(resumed, EPOCHS).train(resume_from_checkpoint=str(first))
    for p, q in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q)


class Logits(nn.Module):
    config = None  # which the trainer asks for where it smooths labels

    def __init__(self):
        super().__init__()
        self.net = network()

    def forward(self, x, labels=None):
        return {"logits": self.net(x)}


def smoothed(logits, labels):
    return F.cross_entropy(logits, labels, label_smoothing=0.1)


def distances(logits, labels):
    return F.huber_loss(logits, F.one_hot(labels, 3).to(logits))


@pytest.mark.parametrize("own_loss", [False, True], ids=["label smoothing", "compute_loss"])
def test_hugging_face_trainer_with_any_loss(own_loss, tmp_path):
    """Its own label smoothing, and a loss that a subclass computes: the steps of a plain loop."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("accelerate", reason="accelerate is not installed")

    class Own(transformers.Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, **_):
            labels = inputs.pop("labels")
            outputs = model(**inputs)
            loss = distances(outputs["logits"], labels)
            return (loss, outputs) if return_outputs else loss

    model, steps = Logits(), 3
    arguments = transformers.TrainingArguments(
        tmp_path,
        max_steps=steps,
        per_device_train_batch_size=len(X),
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        label_smoothing_factor=0.0 if own_loss else 0.1,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        save_strategy="no",
    )
    options = {"fisher_type": "type-2", "factor_update_interval": 1}
    optimizer = KFACOptimizer(model.parameters(), **options)
    kind = Own if own_loss else transformers.Trainer
    kind(model, arguments, train_dataset=Examples(), optimizers=(optimizer, None)).train()
    plain = network()
    optimizer = KFACOptimizer(plain.parameters(), **options)
    for _ in range(steps):
        optimizer.zero_grad()
        (distances if own_loss else smoothed)(plain(X), LABELS).backward()
        optimizer.step()
    assert_close_models(model.net, plain)
