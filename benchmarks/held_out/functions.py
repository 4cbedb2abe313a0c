"""An operator between functions, a density, pairs of views, and a game's best moves."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import cache

import torch
from sklearn.datasets import make_s_curve, make_swiss_roll
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from benchmarks.architectures import mlp
from benchmarks.problems.problem import DATA_SEED, Batch, Problem, Task, shuffled

SOURCES, TEST_SOURCES, SENSORS, TIMES = 600, 60, 40, 40
POINTS, TEST_POINTS = 10_000, 2000
FIGURES, TEST_FIGURES, SIDE, TRACE = 4000, 400, 16, 32
LINES = ((0, 1, 2), (3, 4, 5), (6, 7, 8), (0, 3, 6), (1, 4, 7), (2, 5, 8), (0, 4, 8), (2, 4, 6))
TEST_BOARDS = 900


def _generator() -> Generator:
    return Generator().manual_seed(DATA_SEED)


# An operator -------------------------------------------------------------------------------------


@cache
def reaction() -> tuple[Tensor, Tensor]:
    """Return sources `[N, SENSORS]` and solutions `[N, TIMES, SENSORS]` of a reaction.

    u_t = u_xx / 100 + u² / 100 + f(x) on the unit interval, u = 0 first and at the ends, Lu et al.
    (2021); f is a Gaussian process of length 0.2. Central differences and explicit steps of 1/400.
    """
    x = torch.linspace(0, 1, SENSORS, dtype=torch.float64)
    kernel = (-((x[:, None] - x) ** 2) / (2 * 0.2**2)).exp() + 1e-8 * torch.eye(SENSORS)
    noise = torch.randn(SOURCES + TEST_SOURCES, SENSORS, generator=_generator()).double()
    source = noise @ torch.linalg.cholesky(kernel).mT
    u, found, step = torch.zeros_like(source), [], 1 / 400
    for count in range(400):
        if count % (400 // TIMES) == 0:
            found.append(u)
        second = (u[:, 2:] - 2 * u[:, 1:-1] + u[:, :-2]) * (SENSORS - 1) ** 2
        inner = u[:, 1:-1]
        change = 0.01 * (second + inner**2) + source[:, 1:-1]
        u = F.pad(inner + step * change, (1, 1))
    return source.float(), torch.stack(found, 1).float()


class DeepONet(nn.Module):
    """Lu et al. (2021): the product of a network of the source and one of the place."""

    def __init__(self) -> None:
        super().__init__()
        self.branch, self.trunk = mlp((SENSORS, 64, 64, 48)), mlp((2, 64, 64, 48))
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, source: Tensor, place: Tensor) -> Tensor:
        """Map sources `[..., SENSORS]` and places `[..., 2]` to values `[...]`."""
        return (self.branch(source) * self.trunk(place).tanh()).sum(-1) + self.bias


def _operator() -> Task:
    source, u = reaction()
    axes = torch.arange(TIMES) / TIMES, torch.linspace(0, 1, SENSORS)
    grid = torch.cartesian_prod(*axes)
    values = u.flatten(1)

    def batches(generator: Generator) -> Iterator[Batch]:
        while True:
            who = torch.randint(SOURCES, (512,), generator=generator)
            where = torch.randint(len(grid), (512,), generator=generator)
            yield source[who], grid[where], values[who, where]

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return F.mse_loss(model(*batch[:2]), batch[2])

    def error(model: nn.Module) -> float:
        some = slice(None, None, 7)
        found = model(source[SOURCES:, None], grid[None, some])
        exact = values[SOURCES:, some]
        return float((found - exact).norm() / exact.norm())

    return Task(DeepONet(), loss, batches, error)


# A density ---------------------------------------------------------------------------------------


@cache
def rolls() -> tuple[Tensor, Tensor]:
    """Return points `[N, 6]` of a Swiss roll and an S with noise, turned, standardised; others."""
    count = POINTS + TEST_POINTS
    roll, _ = make_swiss_roll(count, noise=0.5, random_state=DATA_SEED)
    curve, _ = make_s_curve(count, noise=0.1, random_state=DATA_SEED + 1)
    x = torch.cat([torch.tensor(roll), torch.tensor(curve)], 1).float()
    turn, _ = torch.linalg.qr(torch.randn(6, 6, generator=_generator()))
    x = ((x - x.mean(0)) / x.std(0)) @ turn
    return x[:POINTS], x[POINTS:]


class Coupling(nn.Module):
    """Dinh et al.'s (2017) affine coupling: half of the entries scale and move the others."""

    def __init__(self, width: int, flipped: bool) -> None:
        super().__init__()
        self.flipped = flipped
        self.network = nn.Sequential(
            *(nn.Linear(3, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()),
            nn.Linear(width, 6),
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the points, and the logarithm of the determinant for each."""
        known, other = x.chunk(2, 1)[:: -1 if self.flipped else 1]
        scale, shift = self.network(known).chunk(2, 1)
        scale = 2 * (scale / 2).tanh()
        other = other * scale.exp() + shift
        parts = (other, known) if self.flipped else (known, other)
        return torch.cat(parts, 1), scale.sum(1)


class Flow(nn.Module):
    """Couplings onto a normal distribution."""

    def __init__(self, couplings: int, width: int) -> None:
        super().__init__()
        self.couplings = nn.ModuleList(Coupling(width, bool(i % 2)) for i in range(couplings))

    def forward(self, x: Tensor) -> Tensor:
        """Return the log density `[N]`."""
        logs = torch.zeros(len(x))
        for coupling in self.couplings:
            x, log = coupling(x)
            logs = logs + log
        return logs - (x**2 / 2 + math.log(2 * math.pi) / 2).sum(1)


def _flow() -> Task:
    train, test = rolls()

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return -model(batch[0]).mean()

    model = Flow(6, 48)
    return Task(model, loss, shuffled((train,), 256), lambda m: float(loss(m, (test,))))


# Pairs of views ----------------------------------------------------------------------------------


@cache
def figures() -> tuple[Batch, Batch]:
    """Return Lissajous figures as images `[N, 1, 16, 16]` and as noisy traces `[N, 2, TRACE]`.

    Each is turned and has frequencies of 1 to 3, random phase and size.
    """
    generator = _generator()
    count = FIGURES + TEST_FIGURES
    frequency = torch.randint(1, 4, (2, count, 1), generator=generator)
    phase, turn, wide, high = torch.rand(4, count, 1, generator=generator)

    def path(t: Tensor) -> Tensor:
        x = (0.4 + 0.5 * wide) * (frequency[0] * t + 2 * torch.pi * phase).sin()
        y = (0.4 + 0.5 * high) * (frequency[1] * t).sin()
        cos, sin = (torch.pi * turn).cos(), (torch.pi * turn).sin()
        return torch.stack([x * cos - y * sin, x * sin + y * cos], 2)

    axis = (torch.arange(SIDE) + 0.5) * 2.4 / SIDE - 1.2
    pixels = torch.cartesian_prod(axis, axis)
    points = path(torch.arange(64) * torch.pi / 32)
    distance = torch.cat([torch.cdist(pixels, own).amin(-1) for own in points.split(200)])
    images = (-((distance / 0.1) ** 2) / 2).exp()
    images = images + 0.1 * torch.randn(images.shape, generator=generator)
    begin = 2 * torch.pi * torch.rand(count, 1, generator=generator)
    traces = path(begin + torch.arange(TRACE) * 2 * torch.pi / TRACE).mT
    traces = traces + 0.1 * torch.randn(traces.shape, generator=generator)
    data = images.unflatten(1, (1, SIDE, SIDE)), traces.contiguous()
    return tuple(t[TEST_FIGURES:] for t in data), tuple(t[:TEST_FIGURES] for t in data)


class TwoTowers(nn.Module):
    """Radford et al.'s (2021) towers: an image's and a trace's code, and a learnt temperature."""

    def __init__(self, code: int) -> None:
        super().__init__()
        self.images = nn.Sequential(
            *(nn.Conv2d(1, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, code)),
        )
        self.traces = nn.Sequential(
            *(nn.Flatten(), nn.Linear(2 * TRACE, 128), nn.LayerNorm(128), nn.ReLU()),
            *(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, code)),
        )
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(self, images: Tensor, traces: Tensor) -> Tensor:
        """Return the scaled cosines `[N, N]` of all pairs."""
        a, b = F.normalize(self.images(images), dim=1), F.normalize(self.traces(traces), dim=1)
        return self.log_scale.clamp(max=math.log(100)).exp() * a @ b.mT


def _pairs() -> Task:
    train, test = figures()

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        scores, own = model(*batch), torch.arange(len(batch[0]))
        return (F.cross_entropy(scores, own) + F.cross_entropy(scores.mT, own)) / 2

    def error(model: nn.Module) -> float:
        return float((model(*test).argmax(1) != torch.arange(TEST_FIGURES)).float().mean())

    return Task(TwoTowers(24), loss, shuffled(train, 128), error)


# A game ------------------------------------------------------------------------------------------


def _value(board: tuple[int, ...], known: dict[tuple[int, ...], tuple[int, list[int]]]) -> int:
    """Return what the player to move reaches, 1, 0 or −1, and note it with the best moves.

    Args:
        board: 1 where the player to move is, −1 where the other one is, else 0.
        known: By board.
    """
    if any(all(board[i] == -1 for i in line) for line in LINES):
        return -1
    if all(board):
        return 0
    if board not in known:
        values = {}
        for move in range(9):
            if not board[move]:
                after = tuple(-(1 if i == move else p) for i, p in enumerate(board))
                values[move] = -_value(after, known)
        best = max(values.values())
        known[board] = best, [move for move, value in values.items() if value == best]
    return known[board][0]


@cache
def boards() -> tuple[Batch, Batch]:
    """Return tic-tac-toe's boards `[N, 18]`, the shares of the best moves, and values; and others.

    All positions that can be reached and in which the game goes on, in random order.
    """
    known: dict[tuple[int, ...], tuple[int, list[int]]] = {}
    _value((0,) * 9, known)
    order = torch.randperm(len(known), generator=_generator())
    places = torch.tensor(sorted(known))[order]
    moves = torch.zeros(len(known), 9)
    for row, board in enumerate(places.tolist()):
        best = known[tuple(board)][1]
        moves[row, best] = 1 / len(best)
    value = torch.tensor([float(known[tuple(b)][0]) for b in places.tolist()])
    X = torch.cat([places == 1, places == -1], 1).float()
    data = (X, moves, value)
    return tuple(t[TEST_BOARDS:] for t in data), tuple(t[:TEST_BOARDS] for t in data)


class PolicyAndValue(nn.Module):
    """A trunk with two heads, as Silver et al. (2017) train."""

    def __init__(self, width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before in (18, width, width):
            layers += [nn.Linear(before, width), nn.LayerNorm(width), nn.ReLU()]
        self.trunk = nn.Sequential(*layers)
        self.heads = nn.ModuleList(nn.Linear(width, n) for n in (9, 1))

    def forward(self, boards: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits of moves `[N, 9]` and values `[N]`."""
        code = self.trunk(boards)
        policy, value = (head(code) for head in self.heads)
        return policy, value[:, 0].tanh()


def _game() -> Task:
    train, (X, moves, _) = boards()

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        logits, value = model(batch[0])
        return F.cross_entropy(logits, batch[1]) + F.mse_loss(value, batch[2])

    def error(model: nn.Module) -> float:
        chosen = model(X)[0].argmax(1, keepdim=True)
        return float((moves.gather(1, chosen) == 0).float().mean())

    return Task(PolicyAndValue(128), loss, shuffled(train, 128), error)


# Graphs ------------------------------------------------------------------------------------------

GRAPHS, TEST_GRAPHS, FEWEST, MOST, RADIUS = 1500, 200, 10, 18, 0.45
Graph = tuple[Tensor, Tensor, Tensor]  # edges [2, E], their lengths, degrees


@cache
def graphs() -> tuple[list[Graph], Tensor]:
    """Return graphs of random points in the square, and a number of each, standardised.

    Points nearer than RADIUS are joined, by a resistance as long as the edge. The number is the
    logarithm of the mean over pairs of the resistance between them, parts of the graph being joined
    by a weak conductance of all pairs.
    """
    generator = _generator()
    found, targets = [], []
    for _ in range(GRAPHS + TEST_GRAPHS):
        count = int(torch.randint(FEWEST, MOST + 1, (1,), generator=generator))
        points = torch.rand(count, 2, generator=generator)
        distance = torch.cdist(points, points)
        edges = ((distance < RADIUS) & (distance > 0)).nonzero().mT
        lengths = distance[edges[0], edges[1]]
        weights = torch.full((count, count), 0.01).index_put(tuple(edges), 1 / (lengths + 0.05))
        laplacian = torch.diag(weights.fill_diagonal_(0).sum(1)) - weights
        targets.append(float((1 / torch.linalg.eigvalsh(laplacian.double())[1:]).sum().log()))
        degrees = torch.bincount(edges[0], minlength=count).float()
        found.append((edges, lengths[:, None], degrees[:, None] / 5))
    y = torch.tensor(targets)
    return found, (y - y.mean()) / y.std()


def joined(graphs: list[Graph], targets: Tensor) -> Batch:
    """Return graphs as one: edges, lengths, degrees, the graph of each node, and the targets."""
    sizes = torch.tensor([len(g[2]) for g in graphs])
    offsets = (sizes.cumsum(0) - sizes).tolist()
    edges = torch.cat([g[0] + offset for g, offset in zip(graphs, offsets, strict=True)], 1)
    owner = torch.repeat_interleave(torch.arange(len(graphs)), sizes)
    return (
        edges,
        torch.cat([g[1] for g in graphs]),
        torch.cat([g[2] for g in graphs]),
        owner,
        targets,
    )


def _two_layers(before: int, width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(before, width), nn.SiLU(), nn.Linear(width, width))


class MessagePassing(nn.Module):
    """Gilmer et al. (2017): sums of messages along edges, and a mean over the nodes."""

    def __init__(self, width: int, rounds: int) -> None:
        super().__init__()
        self.width = width
        self.start = nn.Linear(1, width)
        self.messages = nn.ModuleList(_two_layers(2 * width + 1, width) for _ in range(rounds))
        self.updates = nn.ModuleList(_two_layers(2 * width, width) for _ in range(rounds))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(rounds))
        self.readout = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1))

    def forward(self, edges: Tensor, lengths: Tensor, degrees: Tensor, owner: Tensor) -> Tensor:
        """Return a number for each graph."""
        h = self.start(degrees)
        for message, update, norm in zip(self.messages, self.updates, self.norms, strict=True):
            sent = message(torch.cat([h[edges[0]], h[edges[1]], lengths], 1))
            arrived = torch.zeros_like(h).index_add(0, edges[1], sent)
            h = norm(h + update(torch.cat([h, arrived], 1)))
        count = torch.bincount(owner).float()[:, None]
        mean = torch.zeros(len(count), self.width).index_add(0, owner, h) / count
        found: Tensor = self.readout(mean)[:, 0]
        return found


def _graphs() -> Task:
    found, y = graphs()
    test = joined(found[GRAPHS:], y[GRAPHS:])

    def batches(generator: Generator) -> Iterator[Batch]:
        while True:
            for index in torch.randperm(GRAPHS, generator=generator)[: GRAPHS // 32 * 32].split(32):
                yield joined([found[i] for i in index.tolist()], y[index])

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return F.l1_loss(model(*batch[:-1]), batch[-1])

    return Task(MessagePassing(32, 3), loss, batches, lambda m: float(loss(m, test)))


def _problem(name: str, text: str, metric: str, make: Callable[[], Task]) -> Problem:
    return Problem(name, text, metric, make, budget=4)


PROBLEMS = (
    _problem(
        "deeponet",
        "DeepONet of two tanh MLPs 64-64-48; 600 sources of a reaction–diffusion equation; MSE; "
        "512 pairs of source and place",
        "relative L2 error for 60 other sources",
        _operator,
    ),
    _problem(
        "flow",
        "RealNVP of 6 couplings, MLPs 3-48-48-6, ReLU; 10,000 points of a Swiss roll and an S in 6 "
        "dimensions; negative log likelihood; batch 256",
        "negative log likelihood of 2,000 others",
        _flow,
    ),
    _problem(
        "image-trace-clip",
        "a small convolutional and an MLP tower with a learnt temperature; 4,000 Lissajous figures "
        "as images and as traces; symmetric InfoNCE; batch 128",
        "error in finding the trace among 400 others'",
        _pairs,
    ),
    _problem(
        "tic-tac-toe",
        "MLP of 3 layers of 128 with LayerNorm, heads of policy and value; solved boards of "
        "tic-tac-toe; cross entropy with the best moves + MSE of the value; batch 128",
        "share of 900 other boards with a losing choice",
        _game,
    ),
    _problem(
        "message-passing",
        "3 rounds of messages, width 32, SiLU; 1,500 geometric graphs of 10 to 18 nodes, the mean "
        "resistance; L1; batch 32",
        "mean absolute error on 200 others, in standard deviations",
        _graphs,
    ),
)
