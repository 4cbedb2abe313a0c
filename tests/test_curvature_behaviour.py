"""How the exact operators treat parameters, columns, caches, and the world around them."""

import weakref

import dense_curvature as dense
import pytest
import torch
from curvature_cases import (
    DTYPE,
    RISK_OPERATORS,
    TOLERANCE,
    close,
    columns_for,
    make_data,
    make_model,
    params_of,
)
from torch import nn

import kfacopt


@pytest.fixture(params=RISK_OPERATORS, ids=lambda c: c.__name__)
def risk_operator(request):
    return request.param


@pytest.fixture
def problem():
    """Return a model, its loss and a data set of two unequal batches."""
    return make_model("mlp"), nn.CrossEntropyLoss(), make_data("mlp", "ce", (4, 3))


class TestParameters:
    def test_subset_and_order(self, risk_operator, problem):
        model, loss_func, data = problem
        params = params_of(model)
        full = risk_operator(model, loss_func, params, data) @ torch.eye(43, dtype=DTYPE)
        owner = torch.cat([torch.full((p.numel(),), i) for i, p in enumerate(params)])
        order = [3, 0, 2]
        rows = torch.cat([(owner == i).nonzero()[:, 0] for i in order])
        part = risk_operator(model, loss_func, [params[i] for i in order], data)
        close(part @ torch.eye(len(rows), dtype=DTYPE), full[rows][:, rows])

    def test_dict_of_other_tensors(self, risk_operator, problem):
        model, loss_func, data = problem
        other = make_model("mlp", seed=7)
        tensors = {"2.bias": other[2].bias.detach(), "0.weight": other[0].weight.detach()}
        actual = risk_operator(model, loss_func, tensors, data)
        mixed = make_model("mlp")
        with torch.no_grad():
            mixed[2].bias.copy_(other[2].bias)
            mixed[0].weight.copy_(other[0].weight)
        expected = risk_operator(mixed, loss_func, [mixed[2].bias, mixed[0].weight], data)
        V = columns_for(actual, 9)
        close(actual @ V, expected @ V)
        tensors["0.weight"].mul_(2)
        with torch.no_grad():
            mixed[0].weight.mul_(2)
        close(actual @ V, expected @ V)

    def test_plain_function(self, risk_operator, problem):
        model, loss_func, data = problem
        params = params_of(model)
        expected = risk_operator(model, loss_func, params, data)
        actual = risk_operator(lambda X: model(X), loss_func, params, data)
        V = columns_for(actual, 9)
        close(actual @ V, expected @ V)

    def test_parameter_without_influence_has_zero_rows(self, risk_operator, problem):
        model, loss_func, data = problem
        stranger = nn.Parameter(torch.ones(2, dtype=DTYPE))
        model.register_parameter("stranger", stranger)
        operator = risk_operator(model, loss_func, params_of(model), data)
        assert next(model.parameters()) is stranger
        product = operator @ columns_for(operator)
        assert bool((product[:2] == 0).all())
        assert bool((product[2:] != 0).any())

    def test_parameter_that_the_module_no_longer_has(self, risk_operator, problem):
        model, loss_func, data = problem
        operator = risk_operator(model, loss_func, params_of(model), data)
        model[2].bias = nn.Parameter(model[2].bias.detach() + 1)
        V = columns_for(operator, 10)
        assert bool(((operator @ V)[-3:] == 0).all())
        close((operator @ V)[:, :2], operator @ V[:, :2])

    def test_tied_parameters(self, risk_operator):
        class Tied(nn.Module):
            def __init__(self):
                super().__init__()
                self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
                self.b.weight = self.a.weight

            def forward(self, X):
                return self.b(self.a(X).tanh())

        model, data = Tied().to(DTYPE), [(torch.rand(4, 3, dtype=DTYPE), torch.arange(4) % 3)]
        params = params_of(model)
        operator = risk_operator(model, nn.CrossEntropyLoss(), params, data)
        expected = risk_operator(lambda X: model(X), nn.CrossEntropyLoss(), params, data)
        V = columns_for(operator, 9)
        close(operator @ V, expected @ V)

    @pytest.mark.parametrize(
        ("params", "message"),
        [
            pytest.param(lambda m: [], "at least one parameter", id="empty"),
            pytest.param(lambda m: [m[0].bias, m[0].bias], "stands there twice", id="repeated"),
            pytest.param(lambda m: [m[0].bias.detach()], "does not require gradients", id="frozen"),
            pytest.param(lambda m: {"9.bias": m[0].bias}, "'9.bias' is not in", id="unknown"),
            pytest.param(lambda m: {"0.bias": torch.ones(2)}, "must have the shape", id="shape"),
            pytest.param(
                lambda m: [m[0].bias, nn.Parameter(torch.ones(1))], "one dtype", id="dtypes"
            ),
            pytest.param(
                lambda m: [nn.Parameter(torch.ones(1, dtype=DTYPE))],
                "no parameters of model_func",
                id="foreign",
            ),
        ],
    )
    def test_refused(self, problem, params, message):
        model, loss_func, data = problem
        with pytest.raises(ValueError, match=message):
            kfacopt.GGNLinearOperator(model, loss_func, params(model), data)

    def test_dict_with_a_plain_function_is_refused(self, problem):
        model, loss_func, data = problem
        with pytest.raises(ValueError, match=r"needs an nn\.Module"):
            kfacopt.GGNLinearOperator(model.forward, loss_func, {"0.bias": model[0].bias}, data)


class TestLosses:
    def test_none_is_refused(self, risk_operator, problem):
        model, _, data = problem
        with pytest.raises((ValueError, NotImplementedError), match="loss_func"):
            risk_operator(model, None, params_of(model), data)

    def test_nll_has_no_ggn(self, problem):
        model, _, data = problem
        with pytest.raises(ValueError, match="NLLLoss is linear"):
            kfacopt.GGNLinearOperator(model, nn.NLLLoss(), params_of(model), data)

    def test_mc_fisher_refuses_losses_without_curvature_by_name(self, problem):
        model, _, data = problem
        data = [(X, torch.zeros_like(model(X))) for X, _ in data]
        operator = kfacopt.FisherMCLinearOperator(model, nn.L1Loss(), params_of(model), data)
        with pytest.raises(NotImplementedError, match="L1Loss has no curvature"):
            operator @ columns_for(operator)

    def test_several_batches_need_a_reduction(self, problem):
        model, _, data = problem
        loss = nn.functional.cross_entropy
        operator = kfacopt.HessianLinearOperator(model, loss, params_of(model), data)
        with pytest.raises(ValueError, match="reduction"):
            operator @ columns_for(operator)
        with pytest.raises(ValueError, match="reduction"):
            kfacopt.EFLinearOperator(model, loss, params_of(model), data)

    def test_a_loss_that_is_no_scalar_is_refused(self, problem):
        model, _, data = problem
        loss = nn.CrossEntropyLoss(reduction="none")
        operator = kfacopt.HessianLinearOperator(model, loss, params_of(model), data)
        with pytest.raises(ValueError, match="scalar"):
            operator @ columns_for(operator)

    def test_rows_that_belong_to_no_datum_are_refused(self):
        class Pooled(nn.Module):
            def __init__(self):
                super().__init__()
                self.layer = nn.Linear(4, 3, dtype=DTYPE)

            def forward(self, X):
                return self.layer(X)[:2]

        model, data = Pooled(), [(torch.rand(3, 4, dtype=DTYPE), torch.tensor([0, 1]))]
        operator = kfacopt.EFLinearOperator(model, nn.CrossEntropyLoss(), params_of(model), data)
        with pytest.raises(ValueError, match="not a multiple of the 3 data"):
            operator @ columns_for(operator)

    def test_shape_is_checked(self, problem):
        model, loss_func, data = problem
        with pytest.raises(ValueError, match="shape must be"):
            kfacopt.EFLinearOperator(model, loss_func, params_of(model), data, shape=(3, 3))


class TestColumns:
    @pytest.mark.parametrize("model_name", ["mlp", "grouped-cnn", "attention", "lstm"])
    def test_chunks_give_the_same_product(self, risk_operator, model_name):
        model, data = make_model(model_name), make_data(model_name, "ce", (3, 2))
        args = model, nn.CrossEntropyLoss(), params_of(model), data
        # 1: no vectorisation; 3: double backward; 16: forward mode
        products = []
        for chunk_size in (1, 3, 16):
            operator = risk_operator(*args, chunk_size=chunk_size, check_deterministic=False)
            products.append(operator @ columns_for(operator, 10))
        close(products[0], products[1])
        close(products[0], products[2])

    def test_encoder_layers_in_evaluation_mode(self, risk_operator):
        """Their fast path has no derivatives; torch would take it in forward mode."""
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(4, 2, 5, 0.0, batch_first=True)
        model = nn.Sequential(layer, nn.Flatten(), nn.Linear(12, 3)).to(DTYPE)
        data = make_data("attention", "ce", (3,))
        operator = risk_operator(model, nn.CrossEntropyLoss(), params_of(model), data)
        V = columns_for(operator, 10)
        training = operator @ V
        model.eval()
        close(operator @ V, training)
        close(operator @ V, training)

    @pytest.mark.parametrize("chunk_size", [0, 2.0])
    def test_chunk_size_is_checked(self, problem, chunk_size):
        model, loss_func, data = problem
        with pytest.raises(ValueError, match="chunk_size"):
            kfacopt.EFLinearOperator(
                model, loss_func, params_of(model), data, chunk_size=chunk_size
            )

    def test_an_operation_that_cannot_be_vectorised(self, risk_operator):
        """A custom function without a vmap rule: columns are taken one by one instead."""

        class Square(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                ctx.save_for_backward(x)
                return x * x

            @staticmethod
            def backward(ctx, g):
                (x,) = ctx.saved_tensors
                if torch._C._functorch.is_batchedtensor(g):
                    raise RuntimeError("not under vmap")
                return 2 * x * g

        class Model(nn.Module):
            def __init__(self, square):
                super().__init__()
                torch.manual_seed(0)
                self.layer, self.square = nn.Linear(4, 3, dtype=DTYPE), square

            def forward(self, X):
                return self.square(self.layer(X))

        data = make_data("mlp", "ce", (3,))
        actual, expected = (
            risk_operator(m, nn.CrossEntropyLoss(), params_of(m), data)
            for m in (Model(Square.apply), Model(torch.square))
        )
        V = columns_for(actual, 10)
        close(actual @ V, expected @ V)

    def test_one_pass_over_the_data(self, risk_operator, problem):
        model, loss_func, data = problem

        class Counting:
            passes = 0

            def __iter__(self):
                self.passes += 1
                return iter(data)

        counting = Counting()
        operator = risk_operator(
            model, loss_func, params_of(model), counting, check_deterministic=False
        )
        operator @ columns_for(operator, 40)
        assert counting.passes == 1


class TestNoTrace:
    def test_gradients_buffers_mode_and_generators(self, risk_operator):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)).to(DTYPE)
        data = make_data("mlp", "ce", (4, 3))
        loader = torch.utils.data.DataLoader(
            list(zip(*data[0], strict=True)), batch_size=2, shuffle=False
        )
        buffers = {k: v.clone() for k, v in model.state_dict().items()}
        state = torch.get_rng_state()
        for source in (data, loader):
            operator = risk_operator(model, nn.CrossEntropyLoss(), params_of(model), source)
            operator @ columns_for(operator)
        assert torch.equal(torch.get_rng_state(), state)
        assert all(torch.equal(v, buffers[k]) for k, v in model.state_dict().items())
        assert all(p.grad is None for p in model.parameters())
        assert model.training

    def test_active_dropout_is_the_same_in_all_parts_of_a_product(self, risk_operator):
        """Without the check, a random model is one sample of itself, in J as in its transpose."""
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5), nn.Linear(6, 3)).to(DTYPE)
        data = make_data("mlp", "ce", (4,))
        operator = risk_operator(
            model, nn.CrossEntropyLoss(), params_of(model), data, check_deterministic=False
        )
        matrix = operator @ torch.eye(operator.shape[1], dtype=DTYPE)
        close(matrix, matrix.T)

    def test_graphs_are_kept_from_the_second_product_on(self, problem):
        model, loss_func, data = problem
        operator = kfacopt.HessianLinearOperator(model, loss_func, params_of(model), data)
        V = columns_for(operator)
        alive = []
        model.register_forward_hook(lambda m, args, out: alive.append(weakref.ref(out)))
        operator @ V
        assert all(ref() is None for ref in alive)
        alive.clear()
        operator @ V
        assert all(ref() is not None for ref in alive)
        del operator
        assert all(ref() is None for ref in alive)


class TestFisherMC:
    def test_seeds(self, problem):
        model, loss_func, data = problem
        args = model, loss_func, params_of(model), data
        first, again, other = (
            kfacopt.FisherMCLinearOperator(*args, seed=seed) for seed in (1, 1, 2)
        )
        V = columns_for(first)
        assert torch.equal(first @ V, again @ V)
        assert torch.equal(first @ V, first @ V)
        assert not torch.allclose(first @ V, other @ V)

    @pytest.mark.parametrize("case", ["mlp-ce", "mlp-mse", "mlp-bce", "sequence-ce"])
    def test_converges_to_the_fisher(self, case):
        """The mean over seeds lies within 5 standard errors, entry by entry along a vector.

        With 43 entries at most, a right estimator fails with a probability below 2e-4.
        """
        model_name, loss_name = case.split("-")
        losses = {"ce": nn.CrossEntropyLoss, "mse": nn.MSELoss, "bce": nn.BCEWithLogitsLoss}
        model, loss_func = make_model(model_name), losses[loss_name]()
        data = make_data(model_name, loss_name, (3, 2))
        params = params_of(model)
        exact = dense.ggn(model, loss_func, params, data)
        v = columns_for(kfacopt.GGNLinearOperator(model, loss_func, params, data), 1)[:, 0]
        samples = torch.stack(
            [
                kfacopt.FisherMCLinearOperator(
                    model, loss_func, params, data, False, False, seed, 12
                )
                @ v
                for seed in range(100)
            ]
        )
        error = (samples.mean(0) - exact @ v).abs()
        standard_error = samples.std(0) / len(samples) ** 0.5
        assert bool((error <= 5 * standard_error + TOLERANCE).all())

    @pytest.mark.parametrize("option", [{"mc_samples": 0}, {"seed": 1.5}])
    def test_options_are_checked(self, problem, option):
        model, loss_func, data = problem
        with pytest.raises(ValueError, match=next(iter(option))):
            kfacopt.FisherMCLinearOperator(model, loss_func, params_of(model), data, **option)
