"""The plain loop: which curvature the optimizer sees in training loops as people write them."""

import dataclasses
import gc
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from kfacopt import KFACLinearOperator, KFACOptimizer, KFACWarning

pytestmark = pytest.mark.usefixtures("float64")

TOLERANCE = 1e-10
X = torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(6, 4).sin()
LABELS = torch.tensor([0, 2, 1, 0, 2, 2])
TARGETS = torch.linspace(0, 1, 18, dtype=torch.float64).reshape(6, 3)
WEIGHT = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)


def mlp(inplace=True):
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=inplace), nn.Linear(5, 3))


def make(params, **options):
    """An optimizer that moves nothing, so that only its factors are looked at."""
    defaults = {"lr": 0.0, "fisher_type": "type-2", "factor_update_interval": 1, "ema_decay": 0.0}
    return KFACOptimizer(params, **(defaults | options))


def assert_factors(optimizer, model, loss, data, *, scale=1.0, names=("0", "2"), **options):
    """Compare with KFACLinearOperator, whose factors have oracles of their own."""
    params = [p for name in names for p in model.get_submodule(name).parameters()]
    average = None if loss.reduction == "sum" else "batch"
    options = {"fisher_type": "type-2", "loss_average": average} | options
    options.setdefault("separate_weight_and_bias", False)
    expected = KFACLinearOperator(model, loss, params, data, **options)
    for name in names:
        got, want = optimizer.factors(name), expected.factors(name)
        assert torch.allclose(got.input_factor, want.input_factor, atol=TOLERANCE), name
        G = scale * want.grad_output_factor
        assert torch.allclose(got.grad_output_factor, G, atol=TOLERANCE), name


def step(optimizer, loss):
    loss.backward()
    optimizer.step()


# Losses -----------------------------------------------------------------------------------------

CE, NLL, MSE, BCE = nn.CrossEntropyLoss, nn.NLLLoss, nn.MSELoss, nn.BCEWithLogitsLoss
LOSSES = {
    "ce": (CE(), LABELS, lambda z: F.cross_entropy(z, LABELS)),
    "ce-sum": (CE(reduction="sum"), LABELS, lambda z: F.cross_entropy(z, LABELS, reduction="sum")),
    "ce-options": (
        CE(WEIGHT, ignore_index=1, label_smoothing=0.2),
        LABELS,
        lambda z: F.cross_entropy(z, LABELS, WEIGHT, ignore_index=1, label_smoothing=0.2),
    ),
    "ce-slice": (CE(), LABELS, lambda z: F.cross_entropy(z[:, :], LABELS)),
    "mse": (MSE(), TARGETS, lambda z: F.mse_loss(z, TARGETS)),
    "mse-swapped": (MSE(), TARGETS, lambda z: F.mse_loss(TARGETS, z)),
    "mse-reshaped": (MSE(), TARGETS, lambda z: F.mse_loss(z.view(-1, 3).float().double(), TARGETS)),
    "mse-sum-over-n": (MSE(), TARGETS, lambda z: F.mse_loss(z, TARGETS, reduction="sum") / 18),
    "mse-unreduced": (MSE(), TARGETS, lambda z: F.mse_loss(z, TARGETS, reduction="none").mean()),
    "bce": (BCE(), TARGETS, lambda z: F.binary_cross_entropy_with_logits(z, TARGETS)),
    "bce-pos-weight": (
        BCE(pos_weight=WEIGHT, reduction="sum"),
        TARGETS,
        lambda z: F.binary_cross_entropy_with_logits(
            z, TARGETS, pos_weight=WEIGHT, reduction="sum"
        ),
    ),
    "nll": (
        CE(WEIGHT, ignore_index=1),
        LABELS,
        lambda z: F.nll_loss(F.log_softmax(z, -1), LABELS, WEIGHT, ignore_index=1),
    ),
}


@pytest.mark.parametrize("form", ["module", "function"])
@pytest.mark.parametrize("name", LOSSES)
def test_losses(name, form):
    loss, y, function = LOSSES[name]
    model = mlp()
    optimizer = make(model.parameters())
    step(optimizer, loss(model(X), y) if form == "module" else function(model(X)))
    assert_factors(optimizer, model, loss, [(X, y)])


@pytest.mark.parametrize("approx", ["expand", "reduce"])
@pytest.mark.parametrize("separate", [True, False])
@pytest.mark.parametrize("fisher_type", ["mc", "type-2", "empirical"])
def test_curvatures(fisher_type, approx, separate):
    model = nn.Sequential(nn.Conv2d(1, 4, 2), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(4, 3))
    data = [(X.reshape(6, 1, 2, 2), LABELS)]
    options = {
        "fisher_type": fisher_type,
        "kfac_approx": approx,
        "separate_weight_and_bias": separate,
        "mc_samples": 3 if fisher_type == "mc" else 1,
    }
    optimizer = make(model.parameters(), **options)
    step(optimizer, F.cross_entropy(model(data[0][0]), LABELS))
    assert_factors(optimizer, model, CE(), data, names=("0", "3"), **options)


def test_sequence_logits_are_counted_by_tokens():
    model = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 3))
    tokens, y = X.reshape(4, 3, 2), torch.randint(3, (4, 3))
    y[0, :2] = -100
    optimizer = make(model.parameters())
    logits = model(tokens)
    step(optimizer, F.cross_entropy(logits[:, :2].reshape(-1, 3), y[:, :2].flatten()))
    # the same tokens as data of their own; A has the positions that the loss reaches
    flat = tokens[:, :2].reshape(-1, 2)
    expected = KFACLinearOperator(
        model, CE(), list(model.parameters()), [(flat, y[:, :2].flatten())], fisher_type="type-2"
    )
    G = optimizer.factors("2").grad_output_factor
    assert torch.allclose(G, expected.factors("2").grad_output_factor, atol=TOLERANCE)
    inputs = torch.cat([tokens[1:, :2].reshape(-1, 2), torch.ones(6, 1)], dim=1)
    assert torch.allclose(optimizer.factors("0").input_factor, inputs.T @ inputs / 6)


# Objectives -------------------------------------------------------------------------------------


@pytest.mark.parametrize("fisher_type", ["type-2", "empirical"])
def test_accumulated_micro_batches_are_one_batch(fisher_type):
    model = mlp()
    optimizer = make(model.parameters(), fisher_type=fisher_type)
    for part in (slice(0, 3), slice(3, 6)):
        (F.cross_entropy(model(X[part]), LABELS[part]) / 2).backward()
    optimizer.step()
    assert_factors(optimizer, model, CE(), [(X, LABELS)], fisher_type=fisher_type)


def test_several_losses_add_up_with_their_weights():
    model = mlp()
    optimizer = make(model.parameters())
    z = model(X)
    step(optimizer, 0.3 * F.cross_entropy(z, LABELS) + 0.7 * F.mse_loss(z, TARGETS))
    parts = [
        KFACLinearOperator(
            model, loss, list(model.parameters()), [(X, y)], fisher_type="type-2"
        ).factors("0")
        for loss, y in ((CE(), LABELS), (MSE(), TARGETS))
    ]
    G = 0.3 * parts[0].grad_output_factor + 0.7 * parts[1].grad_output_factor
    assert torch.allclose(optimizer.factors("0").grad_output_factor, G, atol=TOLERANCE)
    A = optimizer.factors("0").input_factor[:4, :4]
    assert torch.allclose(A, parts[0].input_factor, atol=TOLERANCE)


@pytest.mark.parametrize("fisher_type", ["type-2", "empirical"])
def test_several_forwards_before_one_backward(fisher_type):
    model = mlp()
    optimizer = make(model.parameters(), fisher_type=fisher_type)
    outputs = [model(X[:3]), model(X[3:])]
    losses = [F.cross_entropy(outputs[0], LABELS[:3]), F.cross_entropy(outputs[1], LABELS[3:])]
    step(optimizer, (losses[0] + losses[1]) / 2)
    assert_factors(optimizer, model, CE(), [(X, LABELS)], fisher_type=fisher_type)


def test_one_loss_on_two_forwards():
    model = mlp()
    optimizer = make(model.parameters())
    step(optimizer, F.mse_loss(torch.cat([model(X[:3]), model(X[3:])]), TARGETS))
    assert_factors(optimizer, model, MSE(), [(X, TARGETS)])


def test_a_loss_that_is_only_looked_at_leaves_no_trace():
    model = mlp()
    optimizer = make(model.parameters())
    z = model(X)
    loss = F.cross_entropy(z, LABELS)
    F.mse_loss(z, TARGETS)  # never differentiated
    F.cross_entropy(model(X * 3), LABELS)
    with torch.no_grad():
        F.cross_entropy(model(X * 3), LABELS)
    step(optimizer, loss)
    assert_factors(optimizer, model, CE(), [(X, LABELS)])


def test_zero_grad_drops_the_statistics_with_the_gradients():
    model = mlp()
    optimizer = make(model.parameters())
    F.cross_entropy(model(X * 3), LABELS).backward()
    optimizer.zero_grad()
    step(optimizer, F.cross_entropy(model(X), LABELS))
    assert_factors(optimizer, model, CE(), [(X, LABELS)])


# Models -----------------------------------------------------------------------------------------


class Reused(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.b(self.a(self.a(x).relu()))


@pytest.mark.parametrize("approx", ["expand", "reduce"])
@pytest.mark.parametrize("fisher_type", ["type-2", "empirical"])
def test_a_layer_used_twice(fisher_type, approx):
    model = Reused()
    options = {"fisher_type": fisher_type, "kfac_approx": approx}
    optimizer = make(model.parameters(), **options)
    step(optimizer, F.cross_entropy(model(X), LABELS))
    assert_factors(optimizer, model, CE(), [(X, LABELS)], names=("a", "b"), **options)


def test_a_model_called_in_parts():
    model = mlp()
    backbone, head = model[:2], model[2]
    optimizer = make(model.parameters())
    step(optimizer, F.cross_entropy(head(backbone(X)), LABELS))
    assert_factors(optimizer, model, CE(), [(X, LABELS)])


def test_separate_models_in_one_optimizer():
    backbone, head = nn.Linear(4, 5), nn.Linear(5, 3)
    optimizer = make([*backbone.parameters(), *head.parameters()])
    step(optimizer, F.cross_entropy(head(torch.tanh(backbone(X) * 2)), LABELS))
    whole = nn.Sequential(backbone, nn.Module(), head)
    whole[1].forward = lambda x: torch.tanh(x * 2)
    expected = KFACLinearOperator(
        whole, CE(), list(whole.parameters()), [(X, LABELS)], fisher_type="type-2"
    )
    for layer, name in ((backbone, "0"), (head, "2")):
        got = optimizer.factors(layer.weight).grad_output_factor
        assert torch.allclose(got, expected.factors(name).grad_output_factor, atol=TOLERANCE)


@dataclasses.dataclass
class Output:
    loss: torch.Tensor | None
    logits: torch.Tensor


class WithLoss(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.body, self.criterion = body, CE()

    def forward(self, x, labels=None):
        logits = self.body(x)
        return Output(None if labels is None else self.criterion(logits, labels), logits)


def test_loss_inside_the_model():
    model = WithLoss(mlp())
    optimizer = make(model.parameters())
    step(optimizer, model(X, labels=LABELS).loss)
    assert_factors(Renamed(optimizer), model.body, CE(), [(X, LABELS)])


class Renamed:
    """The optimizer under the layer names of the inner model."""

    def __init__(self, optimizer):
        self._optimizer = optimizer

    def factors(self, name):
        return self._optimizer.factors(f"body.{name}")


@pytest.mark.parametrize("kind", ["dataclass", "dict", "tuple"])
def test_outputs_in_containers(kind):
    body = mlp()

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = body

        def forward(self, x):
            z = self.body(x)
            extra = {"dataclass": Output(None, z), "dict": {"z": z, "n": 3}, "tuple": (z, "text")}
            return extra[kind]

    model = Model()
    optimizer = make(model.parameters())
    out = model(X)
    z = {"dataclass": lambda: out.logits, "dict": lambda: out["z"], "tuple": lambda: out[0]}[kind]()
    step(optimizer, F.cross_entropy(z, LABELS))
    assert_factors(Renamed(optimizer), body, CE(), [(X, LABELS)])


def test_an_exception_in_forward_leaves_no_trace():
    model = WithLoss(mlp())
    optimizer = make(model.parameters())
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        model(X[:, :2], LABELS)
    step(optimizer, F.cross_entropy(model(X).logits, LABELS))
    assert_factors(Renamed(optimizer), model.body, CE(), [(X, LABELS)])
    assert torch.overrides._get_current_function_mode() is None  # no public name tells


def test_outputs_behave_as_tensors():
    model = mlp()
    make(model.parameters())
    z = model(X)
    assert isinstance(z, torch.Tensor)
    assert torch.equal(z.detach().argmax(1), torch.as_tensor(z.detach().numpy().argmax(1)))
    assert type(z.detach()) is torch.Tensor
    assert type(F.cross_entropy(z, LABELS)) is torch.Tensor
    z += 1
    assert z[:2].tolist() == z.tolist()[:2]
    (z**2).mean().backward()
    assert model[0].weight.grad is not None


@pytest.mark.parametrize("fisher_type", ["mc", "type-2", "empirical"])
def test_gradients_are_untouched(fisher_type):
    model, plain = mlp(), mlp()
    plain.load_state_dict(model.state_dict())
    make(model.parameters(), fisher_type=fisher_type)
    F.cross_entropy(model(X), LABELS).backward()
    F.cross_entropy(plain(X), LABELS).backward()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


def test_explicit_model_and_stated_loss():
    model = mlp()
    for loss, y in (
        (CE(), LABELS),
        (MSE(), TARGETS),
        (BCE(), TARGETS),
        (MSE(reduction="sum"), TARGETS),
    ):
        optimizer = make(model.parameters(), model=model, loss_func=loss)
        z = model(X)
        other = (z - 1).abs().sum()  # not what is stated, and not looked at
        step(optimizer, other)
        assert_factors(optimizer, model, loss, [(X, y)])


def test_a_stated_loss_on_a_model_called_in_parts():
    model = mlp()
    optimizer = make(model.parameters(), loss_func=MSE())
    step(optimizer, ((model[2](model[:2](X)) - TARGETS) ** 2).mean())
    assert_factors(optimizer, model, MSE(), [(X, TARGETS)])


def test_a_frozen_backbone_is_not_captured():
    model = mlp()
    for p in model[0].parameters():
        p.requires_grad_(False)
    optimizer = make(model[2].parameters(), model=model)
    step(optimizer, F.cross_entropy(model(X), LABELS))
    assert_factors(optimizer, model, CE(), [(X, LABELS)], names=("2",))
    with pytest.raises(KeyError, match="no such layer"):
        optimizer.factors("0")


# What is not recognised --------------------------------------------------------------------------


class Opaque:
    """No container that anybody looks into."""

    def __init__(self, logits):
        self.logits = logits


class Hiding(WithLoss):
    def forward(self, x):
        return Opaque(self.body(x))


def test_outputs_that_nobody_sees_are_an_error_that_says_what_to_do():
    model = Hiding(mlp())
    optimizer = make(model.parameters())
    F.l1_loss(model(X).logits, TARGETS).backward()
    with pytest.raises(RuntimeError, match=r"no containers.*Return the outputs in.*loss_func="):
        optimizer.step()


def test_outputs_that_nobody_sees_later_warn_once_and_training_goes_on():
    model = Hiding(mlp())
    optimizer = make(model.parameters())
    step(optimizer, F.cross_entropy(model.body(X), LABELS))
    F.l1_loss(model(X).logits, TARGETS).backward()
    with pytest.warns(KFACWarning, match="no backward pass.*curvature of earlier steps"):
        optimizer.step()
    step(optimizer, F.l1_loss(model.body(X), TARGETS))


@pytest.mark.parametrize("forward", [False, True])
def test_gradients_set_by_hand(forward):
    model = mlp()
    optimizer = make(model.parameters())
    if forward:
        model(X)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with pytest.raises(
        RuntimeError, match=r"set by hand \(p.grad = \.\.\.\), .* call backward\(\)"
    ):
        optimizer.step()


def test_gradients_set_by_hand_later_warn_once():
    model = mlp()
    optimizer = make(model.parameters())
    step(optimizer, F.cross_entropy(model(X), LABELS))
    with pytest.warns(KFACWarning, match="set by hand .*curvature of earlier steps"):
        optimizer.step()  # with the gradients of before
    optimizer.step()


def test_a_forward_pass_before_the_optimizer_was_made():
    model = mlp()
    loss = F.cross_entropy(model(X), LABELS)
    optimizer = make(model.parameters())
    loss.backward()
    with pytest.raises(RuntimeError, match="Make the optimizer before the forward pass whose"):
        optimizer.step()
    optimizer.zero_grad()
    step(optimizer, F.cross_entropy(model(X), LABELS))


def test_options_without_a_likelihood_are_like_any_loss():
    """Cross entropy with a target that has a gradient is no likelihood; its H at z is the same."""
    model = mlp()
    optimizer = make(model.parameters())
    soft = TARGETS.softmax(1)
    step(optimizer, F.cross_entropy(model(X), soft.clone().requires_grad_()))
    assert_factors(optimizer, model, CE(), [(X, soft)])
    optimizer.zero_grad()
    empirical = make(model.parameters(), fisher_type="empirical")
    step(empirical, F.cross_entropy(model(X), LABELS, reduction="none").mean())
    assert_factors(empirical, model, CE(), [(X, LABELS)], fisher_type="empirical")


def test_parameters_without_a_model():
    with pytest.raises(ValueError, match=r"no nn\.Module alive in this process owns any"):
        KFACOptimizer([nn.Parameter(torch.rand(3))])
    model = mlp()
    with pytest.raises(ValueError, match=r"no nn\.Module in model owns"):
        KFACOptimizer(mlp().parameters(), model=model)


def test_layers_outside_the_named_model_are_refused():
    model = mlp()
    message = r"Linear\.bias \(3,\), Linear\.weight .* leave model= out"
    with pytest.raises(ValueError, match=message):
        KFACOptimizer(model.parameters(), model=model[0])
    # What AdamW would train in any case may be anywhere.
    others = [nn.Parameter(torch.ones(3)), *nn.LayerNorm(2).parameters()]
    kept = nn.ParameterList([torch.ones(2)])
    others += [*kept, *model[0].parameters()]
    model[0].requires_grad_(False)
    assert (
        len(KFACOptimizer([*model[2].parameters(), *others], model=model[2:])._curvature.layers)
        == 1
    )


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_a_model_with_other_parameters_is_refused_by_name(steps):
    """Also where the next step's factors are not due, as nothing would ever move again."""
    model = mlp()
    optimizer = make(model.parameters(), factor_update_interval=2, inverse_update_interval=2)
    optimizer.step()  # without gradients, as torch's optimizers allow it
    for _ in range(steps):
        step(optimizer, F.cross_entropy(model(X), LABELS))
    values = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(values, assign=True)
    optimizer.zero_grad()
    F.cross_entropy(model(X), LABELS).backward()
    with pytest.raises(RuntimeError, match=r"0\.weight, .* no longer in the model.*afterwards"):
        optimizer.step()


def test_a_refused_group_leaves_no_trace():
    model, head = mlp(), nn.Linear(3, 2)
    optimizer = make(model.parameters(), model=model)
    with pytest.raises(ValueError, match=r"leave model= out"):
        optimizer.add_param_group({"params": head.parameters()})
    with pytest.raises(ValueError, match="momentum must be"):
        optimizer.add_param_group({"params": head.parameters(), "momentum": -1})
    assert len(optimizer.param_groups) == 1
    step(optimizer, F.cross_entropy(model(X), LABELS))
    assert_factors(optimizer, model, CE(), [(X, LABELS)])
    model.append(head)
    optimizer.add_param_group({"params": head.parameters()})
    assert len(optimizer._curvature.layers) == 3


def test_a_module_whose_constructor_failed_is_passed_over():
    class Unfinished(nn.Module):
        def __init__(self):
            kept.append(self)
            self.layer = nn.Linear(2, 2)

    kept = []
    with pytest.raises(AttributeError):
        Unfinished()
    model = mlp()
    parameters = [*model.parameters()]
    assert len(KFACOptimizer(parameters)._curvature.layers) == 2
    loose = nn.Parameter(torch.ones(2))
    assert len(KFACOptimizer([*parameters, loose], model=model)._curvature.layers) == 2


def test_other_parameters_are_trained_by_the_fallback_and_named(caplog):
    model = nn.Sequential(nn.Embedding(5, 4), nn.LayerNorm(4), nn.Linear(4, 3))
    scale = nn.Parameter(torch.ones(3))
    with caplog.at_level("INFO", "kfacopt"):
        optimizer = KFACOptimizer([*model.parameters(), scale], fallback_lr=1e-2)
    lines = [r.getMessage() for r in caplog.records]
    assert len(lines) == 1
    for name in ("0.weight", "1.weight", "1.bias", "parameter 5 of shape (3,)"):
        assert name in lines[0]
    assert "2.weight" not in lines[0]
    reference = [p.detach().clone() for p in (model[0].weight, model[1].weight, scale)]
    adamw = torch.optim.AdamW(reference, lr=1e-2, weight_decay=0.0)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(LABELS) * scale, LABELS).backward()
        for mine, r in zip((model[0].weight, model[1].weight, scale), reference, strict=True):
            r.grad = mine.grad.clone()
        optimizer.step()
        adamw.step()
    for mine, r in zip((model[0].weight, model[1].weight, scale), reference, strict=True):
        assert torch.allclose(mine, r, atol=TOLERANCE)


def test_a_layer_that_no_hook_sees_is_named_once():
    class Bypass(nn.Module):
        def __init__(self):
            super().__init__()
            self.seen, self.unseen = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x):
            W = self.unseen.weight * 1.0  # no product has the parameter itself as its operand
            return self.seen(x) + F.linear(x, W, self.unseen.bias)

    model = Bypass()
    optimizer = KFACOptimizer(model.parameters())
    before = model.unseen.weight.detach().clone()
    F.cross_entropy(model(X), LABELS).backward()
    with pytest.warns(KFACWarning, match="layer 'unseen': the loss depends on its parameters"):
        optimizer.step()
    assert not torch.equal(before, model.unseen.weight)
    F.cross_entropy(model(X), LABELS).backward()
    optimizer.step()


def test_attention_projections_have_blocks_from_the_second_step_on(caplog):
    model = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
    with caplog.at_level("INFO", "kfacopt"):
        optimizer = KFACOptimizer(model.parameters())
    assert "self_attn.out_proj.weight" in caplog.text
    for number_of_fallbacks in (8, 4):  # then: the scales and shifts of two norms
        before = model.self_attn.in_proj_weight.detach().clone()
        optimizer.zero_grad()
        step(optimizer, F.mse_loss(model(X.reshape(2, 3, 4)), torch.zeros(2, 3, 4)))
        assert not torch.equal(before, model.self_attn.in_proj_weight)
        assert optimizer.statistics()["fallback_parameters"] == number_of_fallbacks
    assert optimizer.factors("self_attn.out_proj.weight").input_factor.trace() > 0


def test_a_model_without_supported_layers_warns():
    model = nn.Sequential(nn.LayerNorm(4))
    with pytest.warns(KFACWarning, match="all are trained by the AdamW fallback"):
        KFACOptimizer(model.parameters())


def test_data_parallel_is_refused():
    model = mlp()
    optimizer = KFACOptimizer(model.parameters())
    replica = model._replicate_for_data_parallel()
    with pytest.raises(RuntimeError, match="DistributedDataParallel"):
        replica(X)
    del optimizer


# Steps without factors, copies, memory ---------------------------------------------------------


def test_hooks_do_nothing_on_steps_without_factors():
    model = mlp()
    optimizer = make(model.parameters(), factor_update_interval=3)
    kinds = []
    for i in range(4):
        optimizer.zero_grad()
        z = model(X * (i + 1))
        kinds.append(type(z) is torch.Tensor)
        # steps without factors run modules as if there were no optimizer
        hooked = any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
        assert hooked != kinds[-1]
        step(optimizer, F.cross_entropy(z, LABELS))
        if i == 2:
            assert_factors(optimizer, model, CE(), [(X, LABELS)])
    assert kinds == [False, True, True, False]
    assert_factors(optimizer, model, CE(), [(X * 4, LABELS)])


def test_evaluations_and_copies_are_not_training():
    import copy
    import io

    model = mlp()
    optimizer = make(model.parameters())
    twin = copy.deepcopy(model)
    assert type(twin(X)) is torch.Tensor
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    assert type(torch.load(buffer, weights_only=False)(X)) is torch.Tensor
    loss = F.cross_entropy(model(X), LABELS)
    KFACLinearOperator(model, CE(), list(model.parameters()), [(X * 3, LABELS)]).trace()
    params = {k: v * 2 for k, v in model.named_parameters()}
    torch.func.functional_call(model, params, (X,))
    torch.func.vmap(model)(X)
    step(optimizer, loss)
    assert_factors(optimizer, model, CE(), [(X, LABELS)])


@dataclasses.dataclass(eq=False)
class Box:
    """What a graph keeps alive."""

    tensor: torch.Tensor


def tensors_kept_by(model):
    """How many tensors the graphs of forward passes, all deleted, keep alive, without gc."""
    alive = []

    def pack(tensor):
        box = Box(tensor)
        alive.append(weakref.ref(box))
        return box

    for _ in range(20):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda box: box.tensor):
            z = model(X)
            loss = F.mse_loss(z, TARGETS)
        del z, loss
    assert len(alive) >= 20
    return sum(ref() is not None for ref in alive)


def count_tensors():
    gc.collect()
    return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())


@pytest.mark.parametrize("stated", [None, MSE()], ids=["recognised", "stated"])
@pytest.mark.parametrize("fisher_type", ["mc", "empirical"])
def test_forwards_without_a_step_keep_nothing(fisher_type, stated):
    model = mlp()
    optimizer = make(model.parameters(), fisher_type=fisher_type, loss_func=stated)
    gc.collect()
    gc.disable()
    try:
        assert tensors_kept_by(model) <= tensors_kept_by(mlp())
    finally:
        gc.enable()
    step(optimizer, F.mse_loss(model(X), TARGETS))
    optimizer.zero_grad()
    counts = []
    for _ in range(3):
        for _ in range(5):
            step(optimizer, F.mse_loss(model(X), TARGETS))
            optimizer.zero_grad()
        counts.append(count_tensors())
    assert counts[0] == counts[-1]


def test_hooks_do_not_keep_the_optimizer_alive():
    model = mlp()
    optimizer = make(model.parameters())
    step(optimizer, F.cross_entropy(model(X), LABELS))
    ref = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert ref() is None
    assert type(model(X)) is torch.Tensor
    assert not model._forward_hooks
    assert not model[0]._forward_pre_hooks
    model_ref = weakref.ref(model[0])
    optimizer = make(model.parameters())
    del model
    gc.collect()
    assert model_ref() is None
    del optimizer
