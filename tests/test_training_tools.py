"""What people put around torch.optim optimizers works around KFACOptimizer as well."""

import inspect

import pytest
import torch
from test_checkpoints import LABELS, Network, X, assert_equal_models, train
from torch import nn
from torch.nn import functional as F
from torch.optim import lr_scheduler
from torch.optim.swa_utils import SWALR, AveragedModel, update_bn

from kfacopt import KFACLinearOperator, KFACOptimizer, KFACWarning
from kfacopt.optim.steps.update import DECAY_PER_LR

STEPS = 6
# Beside a run in float64: rounding of three steps in float32. EKFAC depends on the bases within the
# factors' null spaces (8 data, 7 and 8 dimensions), which rounding alone chooses.
MOVED_TOLERANCE = {"kfac": 1e-4, "ekfac": 1e-2}
BFLOAT16_TOLERANCE = 0.1
# Six steps of values near 1 in float64, and 1e4 for what AdamW's division makes of a difference.
ROUNDED = 6 * 2.2e-16 * 1e4


# Schedulers ---------------------------------------------------------------------------------------

SCHEDULERS = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda i: min(1, i / 3)),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda i: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [1, 3]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, total_iters=3),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, total_iters=3),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, total_iters=4),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 5),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 2),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=2),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=STEPS + 1),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1), lr_scheduler.ExponentialLR(o, 0.5)], [3]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o), lr_scheduler.ExponentialLR(o, 0.5)], optimizer=o
    ),
    "SWALR": lambda o: SWALR(o, 0.01, anneal_epochs=3),
}


def all_of_torch():
    bases = {"LRScheduler", "_LRScheduler"}
    return {
        name
        for name, kind in vars(lr_scheduler).items()
        if inspect.isclass(kind) and issubclass(kind, lr_scheduler.LRScheduler)
    } - bases


def test_no_scheduler_of_torch_is_left_out():
    assert all_of_torch() <= set(SCHEDULERS)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_set_the_learning_rates_that_steps_use(name):
    """Beside SGD's learning rates, and beside a run where they are written by hand."""
    scheduled, by_hand, reference = Network(), Network(), Network()
    settings = {"lr": 0.1, "momentum": 0.9}
    optimizers = [KFACOptimizer(m.parameters(), **settings) for m in (scheduled, by_hand)]
    sgd = torch.optim.SGD(reference.parameters(), **settings)
    schedulers = [SCHEDULERS[name](o) for o in (optimizers[0], sgd)]
    rates = []
    for i in range(STEPS):
        group, expected = optimizers[0].param_groups[0], sgd.param_groups[0]
        assert group["lr"] == pytest.approx(expected["lr"])
        assert group["momentum"] == pytest.approx(expected["momentum"])
        rates.append(group["lr"])
        optimizers[1].param_groups[0].update(lr=group["lr"], momentum=group["momentum"])
        for model, optimizer in zip((scheduled, by_hand), optimizers, strict=True):
            train(model, optimizer, 1, i)
        sgd.step()
        arguments = (1.0,) if name == "ReduceLROnPlateau" else ()
        for scheduler in schedulers:
            scheduler.step(*arguments)
    assert len(set(rates)) > 1
    assert_equal_models(scheduled, by_hand)


def test_averaged_models_are_copies_that_train_nothing():
    model, alone = Network(), Network()
    optimizer = KFACOptimizer(model.parameters())
    averaged = AveragedModel(model)
    for i in range(4):
        train(model, optimizer, 1, i)
        averaged.update_parameters(model)
        F.cross_entropy(averaged(X), LABELS).backward()
        averaged.zero_grad()
    update_bn([X], averaged)
    train(alone, KFACOptimizer(alone.parameters()), 4)
    assert_equal_models(model, alone)


# Loops --------------------------------------------------------------------------------------------


def closure_of(model, optimizer, i, late):
    def closure():
        if not late:
            optimizer.zero_grad()
        loss = F.cross_entropy(model(X * (1 + 0.1 * i)), LABELS)
        if late:
            optimizer.zero_grad()  # as Lightning does
        loss.backward()
        return loss

    return closure


@pytest.mark.parametrize("late", [False, True], ids=["zero_grad first", "zero_grad after forward"])
def test_a_closure_is_the_plain_loop(late):
    model, plain = Network(), Network()
    optimizer = KFACOptimizer(model.parameters())
    for i in range(STEPS):
        with torch.no_grad():  # the closure has to have its gradients nevertheless
            loss = optimizer.step(closure_of(model, optimizer, i, late))
        assert loss.requires_grad
    train(plain, KFACOptimizer(plain.parameters()), STEPS)
    assert_equal_models(model, plain)


def test_step_hooks_come_before_and_after():
    model = Network()
    optimizer = KFACOptimizer(model.parameters())
    seen = []
    weight = model.head.weight

    def note(hooked, args, kwargs):
        assert hooked is optimizer
        seen.append(weight.detach().clone())

    handles = [optimizer.register_step_pre_hook(note), optimizer.register_step_post_hook(note)]
    before = weight.detach().clone()
    train(model, optimizer, 1)
    assert torch.equal(seen[0], before)
    assert torch.equal(seen[1], weight)
    assert not torch.equal(*seen)
    for handle in handles:
        handle.remove()
    train(model, optimizer, 1)
    assert len(seen) == 2


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_either_way_is_the_same_training(set_to_none):
    models = Network(), Network()
    # without the unused layer, whose zero gradient is a gradient
    optimizers = [
        KFACOptimizer([p for n, p in m.named_parameters() if "unused" not in n], model=m)
        for m in models
    ]
    for i in range(STEPS):
        optimizers[0].zero_grad(set_to_none=set_to_none)
        optimizers[1].zero_grad()
        for model, optimizer in zip(models, optimizers, strict=True):
            F.cross_entropy(model(X * (1 + i)), LABELS).backward()
            optimizer.step()
    optimizers[0].zero_grad(set_to_none=set_to_none)
    assert (models[0].head.weight.grad is None) == set_to_none
    assert_equal_models(*models)


@pytest.mark.parametrize("micro_batches", [2, 4, 8])
@pytest.mark.parametrize("preconditioner", ["kfac", "ekfac"])
@pytest.mark.parametrize("fisher_type", ["type-2", "empirical"])
def test_micro_batches_are_one_batch(fisher_type, preconditioner, micro_batches, float64):
    models = Network(), Network()
    options = {"fisher_type": fisher_type, "preconditioner": preconditioner}
    optimizers = [KFACOptimizer(m.parameters(), **options) for m in models]
    for i in range(STEPS):
        x = X.double() * (1 + 0.1 * i)
        for optimizer in optimizers:
            optimizer.zero_grad()
        for part, y in zip(x.chunk(micro_batches), LABELS.chunk(micro_batches), strict=True):
            (F.cross_entropy(models[0](part), y) / micro_batches).backward()
        F.cross_entropy(models[1](x), LABELS).backward()
        for optimizer in optimizers:
            optimizer.step()
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-9)


def test_hf_style_groups():
    """Weights decay, biases and norms do not; a joint block spans two groups."""
    model, reference = Network(), Network()
    decayed = [p for n, p in model.named_parameters() if p.ndim > 1]
    others = [p for n, p in model.named_parameters() if p.ndim == 1]
    groups = [{"params": decayed, "weight_decay": 1.0}, {"params": others, "weight_decay": 0.0}]
    optimizer = KFACOptimizer(groups, lr=0.1)
    other = KFACOptimizer(reference.parameters(), lr=0.1)
    train(model, optimizer, 1)
    train(reference, other, 1)
    assert optimizer.factors("first").input_factor.shape == (7, 7)
    start = Network()
    for name in ("first.weight", "first.bias", "norm.weight", "head.weight", "head.bias"):
        share = DECAY_PER_LR * 0.1 * 1.0 if name in ("first.weight", "head.weight") else 0.0
        expected = reference.get_parameter(name) - share * start.get_parameter(name)
        assert torch.allclose(model.get_parameter(name), expected, atol=1e-6), name


# maximize, foreach, capturable, differentiable ----------------------------------------------------


@pytest.mark.parametrize("preconditioner", ["kfac", "ekfac"])
def test_maximising_the_log_likelihood_is_minimising_the_loss(preconditioner):
    models = Network(), Network()
    options = {"preconditioner": preconditioner, "weight_decay": 0.1}
    ascent = KFACOptimizer(models[0].parameters(), maximize=True, **options)
    for i in range(STEPS):
        ascent.zero_grad()
        (-F.cross_entropy(models[0](X * (1 + 0.1 * i)), LABELS)).backward()
        ascent.step()
    train(models[1], KFACOptimizer(models[1].parameters(), **options), STEPS)
    assert_equal_models(*models)


def test_groups_may_maximise():
    models = Network(), Network()
    body = [[*m.first.parameters(), *m.norm.parameters()] for m in models]
    heads = [list(m.head.parameters()) for m in models]
    start = Network()
    one = KFACOptimizer([{"params": body[0], "maximize": True}, {"params": heads[0]}])
    two = KFACOptimizer([{"params": body[1]}, {"params": heads[1]}])
    for model, optimizer in zip(models, (one, two), strict=True):
        F.cross_entropy(model(X), LABELS).backward()
        optimizer.step()
    moves = [
        [p.detach() - q.detach() for p, q in zip(m.parameters(), start.parameters(), strict=True)]
        for m in models
    ]
    for i, (a, b, p) in enumerate(zip(*moves, start.parameters(), strict=True)):
        # what rounding the new values leaves of a move
        bound = torch.finfo(p.dtype).eps * max(x.abs().max() for x in (p, p + a, p + b))
        assert (a + b if i < 4 else a - b).abs().max() <= bound


@pytest.mark.parametrize("foreach", [None, True, False])
def test_foreach_does_not_change_numbers(foreach):
    # In float64: AdamW makes steps of one size of gradients that are all but round-off, too.
    models = Network().double(), Network().double()
    for model, own in zip(models, ({"foreach": foreach}, {}), strict=True):
        optimizer = KFACOptimizer(model.parameters(), weight_decay=0.1, **own)
        for i in range(STEPS):
            optimizer.zero_grad()
            F.cross_entropy(model(X.double() * (1 + 0.1 * i)), LABELS).backward()
            optimizer.step()
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.allclose(p, q, rtol=0.0, atol=ROUNDED)


@pytest.mark.parametrize("flag", ["capturable", "differentiable"])
def test_flags_that_cannot_be_true_are_refused(flag):
    with pytest.raises(ValueError, match=f"{flag} must be False, got True: .*"):
        KFACOptimizer(Network().parameters(), **{flag: True})
    with pytest.raises(ValueError, match=f"{flag} must be True or False, got 1"):
        KFACOptimizer(Network().parameters(), **{flag: 1})


@pytest.mark.parametrize("flag", ["maximize", "foreach", "nesterov"])
def test_flags_of_groups_are_checked(flag):
    with pytest.raises(ValueError, match=f"{flag} must be True or False, got 'yes'"):
        KFACOptimizer([{"params": Network().parameters(), flag: "yes"}])


# Precision ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("preconditioner", ["kfac", "ekfac"])
@pytest.mark.parametrize("after", [torch.float64, torch.bfloat16])
def test_a_model_moved_to_another_dtype_goes_on(after, preconditioner):
    """Steps after the move are those of a model that had the new dtype from the start, nearly.

    EKFAC's basis of a null space is arbitrary; a large damping makes it matter little.
    """
    model, reference = Network(), Network().to(after)
    options = {"fisher_type": "type-2", "preconditioner": preconditioner, "damping": 0.03}
    optimizers = [KFACOptimizer(m.parameters(), **options) for m in (model, reference)]
    for i in range(8):
        if i == 3:  # between two updates of the factors
            model.to(after)
        for m, optimizer in zip((model, reference), optimizers, strict=True):
            optimizer.zero_grad()
            dtype = m.head.weight.dtype
            F.cross_entropy(m(X.to(dtype) * (1 + 0.1 * i)), LABELS).backward()
            optimizer.step()
    wide = torch.float64 if after == torch.float64 else torch.float32
    state = optimizers[0].state[model.head.weight]
    assert state["input_factor"].dtype == wide
    assert state["momentum_buffer"].dtype == after
    tolerance = MOVED_TOLERANCE[preconditioner] if after == torch.float64 else BFLOAT16_TOLERANCE
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        assert p.dtype == after
        assert torch.allclose(p.double(), q.double(), atol=tolerance)
    saved = optimizers[0].state_dict()
    optimizers[0].load_state_dict(saved)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_parameters_of_every_precision_train(dtype):
    model = Network().to(dtype)
    optimizer = KFACOptimizer(model.parameters(), fisher_type="type-2")
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(X.to(dtype)), LABELS)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert optimizer.factors("first").grad_output_factor.dtype == expected


def test_sparse_gradients_are_refused_by_name():
    model = nn.Sequential(nn.Embedding(3, 4, sparse=True), nn.Linear(4, 3))
    optimizer = KFACOptimizer(model.parameters())
    F.cross_entropy(model(LABELS), LABELS).backward()
    with pytest.raises(RuntimeError, match=r"0\.weight: sparse gradients are unsupported"):
        optimizer.step()


# Modules that are not what they seem --------------------------------------------------------------


def test_a_parametrised_weight_gets_the_fallback_and_its_bias_its_block(caplog, float64):
    model = Network()
    torch.nn.utils.parametrizations.weight_norm(model.first)
    with caplog.at_level("INFO", "kfacopt"):
        options = {"fisher_type": "type-2", "factor_update_interval": 1, "ema_decay": 0.0}
        optimizer = KFACOptimizer(model.parameters(), lr=0.0, **options)
    assert "first.parametrizations.weight.original0" in caplog.text
    F.cross_entropy(model(X.double()), LABELS).backward()
    optimizer.step()
    assert "exp_avg" in optimizer.state[model.first.parametrizations.weight.original1]
    bias = optimizer.factors("first")
    assert torch.equal(bias.input_factor, torch.ones(1, 1))
    plain = Network()  # weight_norm is the identity at first
    data = [(X.double(), LABELS)]
    params = list(plain.first.parameters())
    kfac = KFACLinearOperator(
        plain, nn.CrossEntropyLoss(), params, data, fisher_type="type-2"
    ).factors("first")
    assert torch.allclose(bias.grad_output_factor, kfac.grad_output_factor)


def test_in_place_activations():
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(inplace=True), nn.Linear(8, 3))
    plain = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    plain.load_state_dict(model.state_dict())
    optimizers = [KFACOptimizer(m.parameters()) for m in (model, plain)]
    for m, optimizer in zip((model, plain), optimizers, strict=True):
        train(m, optimizer, STEPS)
    assert_equal_models(model, plain)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # by torch.func.jvp itself
def test_a_users_own_functional_transforms_leave_no_trace():
    model, alone = Network(), Network()
    optimizer = KFACOptimizer(model.parameters())
    for i in range(STEPS):
        params = {n: p.detach() for n, p in model.named_parameters()}

        def loss(params, x=X):
            return F.cross_entropy(torch.func.functional_call(model, params, (x,)), LABELS)

        torch.func.grad(loss)(params)
        torch.func.jvp(loss, (params,), (params,))
        torch.func.jvp(torch.func.grad(loss), (params,), (params,))
        torch.func.vmap(model)(X)
        value = F.cross_entropy(model(X), LABELS)
        grads = torch.autograd.grad(value, model.head.weight, create_graph=True)
        torch.autograd.grad(grads[0].square().sum(), model.head.weight)
        train(model, optimizer, 1, i)
    train(alone, KFACOptimizer(alone.parameters()), STEPS)
    assert_equal_models(model, alone)


def test_a_warning_is_given_once():
    model = Network()
    optimizer = KFACOptimizer(model.parameters())
    train(model, optimizer, 1)
    for warns in (True, False):
        for p in model.parameters():
            p.grad = torch.full_like(p, torch.nan)
        if warns:
            with pytest.warns(KFACWarning, match="skipped") as caught:
                optimizer.step()
            assert caught[0].filename == __file__
        else:
            optimizer.step()
