"""Recurrent modules as loops of products with their matrices; who looks at these is elsewhere.

A fused kernel (cuDNN's, or oneDNN's LSTM) is one node in autograd's graph, which has neither inputs
nor gradients of the products in it. The loops here compute the same with `F.linear`: W_ih x for all
times at once, W_hh h at each time. Values differ by round-off. That takes longer, so it is meant
for forward passes whose curvature is due. Most functions of torch on the CPU are such loops
themselves, and are left as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence

from kfacopt.data import is_evaluating

State = tuple[Tensor, ...]


def _lstm(from_input: Tensor, from_hidden: Tensor, state: State) -> State:
    i, f, g, o = (from_input + from_hidden).chunk(4, dim=-1)
    c = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def _gru(from_input: Tensor, from_hidden: Tensor, state: State) -> State:
    r, z, n = from_input.chunk(3, dim=-1)
    r_hidden, z_hidden, n_hidden = from_hidden.chunk(3, dim=-1)
    n = (n + (r + r_hidden).sigmoid() * n_hidden).tanh()
    return (n + (z + z_hidden).sigmoid() * (state[0] - n),)


def _rnn_tanh(from_input: Tensor, from_hidden: Tensor, state: State) -> State:
    return ((from_input + from_hidden).tanh(),)


def _rnn_relu(from_input: Tensor, from_hidden: Tensor, state: State) -> State:
    return ((from_input + from_hidden).relu(),)


# How gates make the next state (h, or h and c) of W_ih x + b_ih, W_hh h + b_hh and the last one.
_GATES = {"lstm": _lstm, "gru": _gru, "rnn_tanh": _rnn_tanh, "rnn_relu": _rnn_relu}
_LAYERS = {getattr(torch._C._VariableFunctions, name): name for name in _GATES}
_CELLS = {getattr(torch._C._VariableFunctions, f"{name}_cell"): name for name in _GATES}
_FORWARDS = {
    kind.forward for kind in (nn.RNN, nn.LSTM, nn.GRU, nn.RNNCell, nn.LSTMCell, nn.GRUCell)
}


class _Matrices:
    """The parameters of one layer in one direction, in torch's order."""

    def __init__(self, kind: str, tensors: Sequence[Tensor], biases: bool) -> None:
        self._gates = _GATES[kind]
        self._w_ih, self._w_hh = tensors[:2]
        self._b_ih: Tensor | None = tensors[2] if biases else None
        self._b_hh: Tensor | None = tensors[3] if biases else None
        self._w_hr: Tensor | None = next(iter(tensors[4 if biases else 2 :]), None)

    def from_input(self, x: Tensor) -> Tensor:
        return F.linear(x, self._w_ih, self._b_ih)

    def next_state(self, from_input: Tensor, state: State) -> State:
        state = self._gates(from_input, F.linear(state[0], self._w_hh, self._b_hh), state)
        return state if self._w_hr is None else (F.linear(state[0], self._w_hr), *state[1:])


def _over_time(
    matrices: _Matrices, rows: Tensor, sizes: Sequence[int], first: State, backwards: bool
) -> tuple[Tensor, State]:
    """Return the outputs `[Σ_t N_t, d]` of one layer in one direction, and the last states.

    Args:
        matrices: The layer.
        rows: Its inputs `[Σ_t N_t, d_in]`, time by time.
        sizes: N_t, how many sequences there are at each time; they do not grow.
        first: The states at the start, `[N_0, d]` each.
        backwards: Whether time runs backwards: sequences then begin one after the other.
    """
    pieces = matrices.from_input(rows).split(list(sizes))
    times = list(range(len(sizes)))[:: -1 if backwards else 1]
    state = tuple(h[: sizes[times[0]]] for h in first)
    outputs, over = {}, []
    for t in times:
        size, running = sizes[t], len(state[0])
        if size < running:
            over.append(tuple(h[size:] for h in state))
            state = tuple(h[:size] for h in state)
        elif size > running:
            begun = (h[running:size] for h in first)
            state = tuple(torch.cat(pair) for pair in zip(state, begun, strict=True))
        state = matrices.next_state(pieces[t], state)
        outputs[t] = state[0]
    over.append(state)
    last = tuple(torch.cat(parts) for parts in zip(*reversed(over), strict=True))
    return torch.cat([outputs[t] for t in sorted(times)]), last


def unrolled_layers(kind: str, x: Tensor, *arguments: Any) -> State:
    """Compute what `torch.lstm`, `gru`, `rnn_tanh` or `rnn_relu` does, from plain products.

    Dropout between layers draws the random numbers that torch's functions draw on the CPU; cuDNN
    has numbers of its own.

    Args:
        kind: The function's name.
        x: Its first argument: `[T, N, d_in]`, `[N, T, d_in]`, or packed `[Σ_t N_t, d_in]`.
        *arguments: All others: the sizes N_t first if x is packed; h₀, for an LSTM (h₀, c₀), each
            `[layers · directions, N, d]`; the parameters; and the options.

    Returns:
        The outputs in the layout of x, and the last h, for an LSTM h and c, in that of h₀.
    """
    packed = _is_packed(arguments)
    batch_first = not packed and arguments[-1]
    states, params, biases, layers, dropout, training, bidirectional = (
        arguments[1:] if packed else arguments[:-1]
    )
    x = x.transpose(0, 1) if batch_first else x
    sizes = arguments[0].tolist() if packed else [x.shape[1]] * x.shape[0]
    directions = 2 if bidirectional else 1
    last: list[State] = []

    def compute(x: Tensor, params: Sequence[Tensor], *states: Tensor) -> Tensor:
        rows, own = x.reshape(-1, x.shape[-1]), len(params) // (layers * directions)
        for layer in range(layers):
            outputs = []
            for direction in range(directions):
                k = layer * directions + direction
                matrices = _Matrices(kind, params[k * own : (k + 1) * own], biases)
                first = tuple(h[k] for h in states)
                output, state = _over_time(matrices, rows, sizes, first, direction == 1)
                outputs.append(output)
                last.append(state)
            rows = torch.cat(outputs, dim=-1) if bidirectional else outputs[0]
            if layer < layers - 1:
                rows = F.dropout(rows, dropout, training)
        return rows

    rows = _in_one_precision(compute, x, params, *_as_tuple(states))
    if not packed:
        rows = rows.view(len(sizes), sizes[0], rows.shape[-1])
        rows = rows.transpose(0, 1) if batch_first else rows
    return rows, *(torch.stack(h) for h in zip(*last, strict=True))


def unrolled_cell(
    kind: str, x: Tensor, states: Tensor | State, *params: Tensor | None
) -> Tensor | State:
    """Compute what `torch.lstm_cell`, `gru_cell` or `rnn_…_cell` does, from plain products.

    Args:
        kind: The function's name without `_cell`.
        x: `[N, d_in]`.
        states: h `[N, d]`, for an LSTM (h, c).
        *params: W_ih, W_hh and, or `None`, b_ih, b_hh.

    Returns:
        The next h, for an LSTM (h, c).
    """
    given = [p for p in params if p is not None]

    def compute(x: Tensor, params: Sequence[Tensor], *states: Tensor) -> State:
        matrices = _Matrices(kind, params, biases=len(params) == 4)
        return matrices.next_state(matrices.from_input(x), states)

    result: State = _in_one_precision(compute, x, given, *_as_tuple(states))
    return result if kind == "lstm" else result[0]


def _as_tuple(states: Any) -> State:
    return (states,) if isinstance(states, Tensor) else tuple(states)


def _in_one_precision(
    compute: Callable[..., Any], x: Tensor, params: Sequence[Tensor], *states: Tensor
) -> Any:
    """Call a function as autocast calls fused kernels: with all tensors in its dtype."""
    device = x.device.type
    if not torch.is_autocast_enabled(device) or x.dtype == torch.float64:
        return compute(x, params, *states)
    dtype = torch.get_autocast_dtype(device)
    params = [p.to(dtype) for p in params]
    return compute(x.to(dtype), params, *(state.to(dtype) for state in states))


# In the place of torch's functions -----------------------------------------------------------


def _is_packed(arguments: Sequence[Any]) -> bool:
    return not isinstance(arguments[2], bool)  # else it tells whether there are biases


def _has_own_node(function: Any, x: Tensor, arguments: Sequence[Any]) -> bool:
    """Tell whether a call of one of torch's functions hides products with matrices.

    On the CPU all of them are loops of products, but for oneDNN's LSTM: in single precision or
    less, without projections, not packed.
    """
    if x.device.type != "cpu":
        return True
    if _LAYERS.get(function) != "lstm" or _is_packed(arguments) or x.dtype == torch.float64:
        return False
    _, params, biases, layers, _, _, bidirectional, _ = arguments
    return bool(len(params) == (4 if biases else 2) * layers * (2 if bidirectional else 1))


def _call(function: Any, x: Tensor, *arguments: Any) -> Any:
    """Call a function of torch, or the loop for it where it hides its products."""
    if x.numel() == 0 or not _has_own_node(function, x, arguments):  # torch refuses no times
        return function(x, *arguments)
    if function in _CELLS:
        return unrolled_cell(_CELLS[function], x, *arguments)
    return unrolled_layers(_LAYERS[function], x, *arguments)


class _ToUnroll(Tensor):
    """An input of a recurrent module, which makes torch's function in it a loop of products.

    So nothing has to be undone after an exception, and calls within a backward pass (activation
    checkpointing) are no special case. When the function is called it becomes a plain tensor again.
    """

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle and copy as a plain tensor."""
        with torch._C.DisableTorchFunctionSubclass():
            return self.as_subclass(Tensor).__reduce_ex__(protocol)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call `func`; the results are plain tensors but for that of adding a batch axis."""
        with torch._C.DisableTorchFunctionSubclass():
            if func in _LAYERS or func in _CELLS:
                args[0].__class__ = Tensor
                return _call(func, *args, **(kwargs or {}))
            result = func(*args, **(kwargs or {}))
            if func is Tensor.unsqueeze:
                args[0].__class__ = Tensor
                result = result.as_subclass(cls)
            return result


def is_recurrent(module: nn.Module) -> bool:
    """Tell whether a module's forward pass is one of torch's that can be unrolled."""
    return getattr(type(module), "forward", None) in _FORWARDS and "forward" not in vars(module)


def unroll(module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
    """Return other arguments for a recurrent module, with which it computes a loop of products.

    A hook before the module's forward pass. Transforms of `torch.func`, traces, and inputs of a
    subclass of tensors are left alone.

    Args:
        module: One of which `is_recurrent` holds.
        args: Its positional arguments.
        kwargs: Its keyword arguments.

    Returns:
        Both with another input; `None` where nothing needs to be changed.
    """
    if (
        torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
        or torch.compiler.is_compiling()
        or not (is_evaluating() or any(p.requires_grad for p in module.parameters()))
    ):
        return None
    x = args[0] if args else kwargs.get("input")
    data = x.data if isinstance(x, PackedSequence) else x
    if type(data) not in (Tensor, Parameter):
        return None
    marked: Any = data.as_subclass(_ToUnroll)
    if isinstance(x, PackedSequence):
        marked = x._replace(data=marked)
    return ((marked, *args[1:]), kwargs) if args else (args, {**kwargs, "input": marked})


@contextmanager
def unrolled(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Compute the recurrent ones of some modules as loops of products within the context."""
    handles = [
        m.register_forward_pre_hook(unroll, with_kwargs=True) for m in modules if is_recurrent(m)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
