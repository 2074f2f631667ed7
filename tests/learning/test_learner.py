"""StageLearner: one stage's forward and backward against plain PyTorch, and what it keeps and lets go."""

from __future__ import annotations

import gc
import weakref
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from aiotime.errors import InputError
from aiotime.learning import Delayed
from aiotime.learning.learner import Passage, Site, StageLearner
from aiotime.learning.ticket import Ticket

SGD = partial(torch.optim.SGD, lr=0.1)


def rule(loss: Any = functional.mse_loss, **settings: Any) -> Delayed:
    return Delayed(loss=loss, optimizer=settings.pop("optimizer", SGD), **settings)


def site(module: nn.Module, index: int = 0, stages: int = 1, **options: Any) -> Site:
    return Site(index, stages, f"s{index}", module, [("", module)], **options)


def learner(module: nn.Module, index: int = 0, stages: int = 1, *, given: Delayed | None = None, **options: Any) -> Any:
    return (given or rule()).stage(site(module, index, stages, passes_down=index > 0, **options))


def ticket(index: int = 0, stages: int = 1, **options: Any) -> Ticket:
    return Ticket(index, stages, learn=True, **options)


def chain(*modules: nn.Module, given: Delayed | None = None) -> list[StageLearner]:
    return [learner(module, k, len(modules), given=given) for k, module in enumerate(modules)]


def forward(stages: list[StageLearner], of: Ticket, x: torch.Tensor) -> Any:
    for stage in stages:
        x = stage.forward(of, x)
    return x


def backward(stages: list[StageLearner], of: Ticket) -> Any:
    message = None
    for stage in reversed(stages):
        message = stage.backward(of, message)
    return message


def layers(seed: int = 0) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh()), nn.Linear(4, 2)


@pytest.mark.parametrize("optimizer", [SGD, partial(torch.optim.Adam, lr=0.01)], ids=["sgd", "adam"])
def test_stage_by_stage_it_is_back_propagation(optimizer: Any) -> None:
    """Losses and weights of two stages over ten samples are bit for bit those of plain training."""
    mine = chain(*layers(), given=rule(optimizer=optimizer))
    low, high = layers()
    plain = nn.Sequential(low, high)
    own = [optimizer(low.parameters()), optimizer(high.parameters())]
    for i in range(10):
        x, y = torch.randn(1, 3), torch.randn(1, 2)
        of = ticket(i, 2, target=y)
        _, loss = forward(mine, of, x)
        backward(mine, of)
        expected = functional.mse_loss(plain(x), y)
        for each in own:
            each.zero_grad()
        expected.backward()  # type: ignore[no-untyped-call]
        for each in own:
            each.step()
        assert torch.equal(loss, expected.detach())
    masters = [master for stage in mine for master in stage.weights.masters]
    assert all(torch.equal(a, b) for a, b in zip(masters, plain.parameters(), strict=True))


@pytest.mark.parametrize("stash", [True, False], ids=["stashed", "current"])
def test_delayed_gradients_take_the_weights_they_are_meant_to(stash: bool) -> None:
    """Frame 1's gradient, taken after frame 0 moved the weights, by hand: y = w2 w1 x, loss y; dw1 = w2 x, dw2 = w1 x.

    Both frames went forward with w1 = 2, w2 = 3. After frame 0 (x = 1, rate 0.1): w1 = 2 - 0.3, w2 = 3 - 0.2.
    """
    modules = [nn.Linear(1, 1, bias=False) for _ in range(2)]
    nn.init.constant_(modules[0].weight, 2.0)
    nn.init.constant_(modules[1].weight, 3.0)
    given = rule(lambda output: output.sum(), weights="stashed" if stash else "current")
    mine = chain(*modules, given=given)
    frames = [ticket(i, 2) for i in range(2)]
    for of, x in zip(frames, (1.0, 5.0), strict=True):
        forward(mine, of, torch.tensor([[x]]))
    for of in frames:
        backward(mine, of)
    # below the top: the message dL/dh = w2, old or new; the top's own gradient is h, kept from the forward: w1 x = 10
    w2 = 3.0 if stash else 3.0 - 0.2
    assert mine[0].weights.masters[0].item() == pytest.approx(2 - 0.3 - 0.1 * w2 * 5)
    assert mine[1].weights.masters[0].item() == pytest.approx(3 - 0.2 - 0.1 * 10)


def test_a_frame_without_a_target_changes_nothing() -> None:
    """Dropout is off, statistics stay, no graph is kept, and the modules are in training mode again afterwards."""
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
    mine = learner(module)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    x = torch.randn(5, 3)
    (one, loss), (other, _) = mine.predict(x), mine.predict(x)
    assert torch.equal(one, other) and loss is None
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
    assert all(part.training for part in module.modules())
    assert not one.requires_grad and not mine.kept


def test_only_modules_that_were_in_training_mode_are_switched() -> None:
    """One that the user put into eval mode stays there, also while it learns."""
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4).eval())
    mine = learner(module)
    mine.predict(torch.randn(2, 3))
    assert not module[1].training
    statistics = module[1]
    assert isinstance(statistics, nn.BatchNorm1d) and statistics.running_mean is not None
    mean = statistics.running_mean.clone()
    forward([mine], ticket(target=torch.zeros(2, 4)), torch.randn(2, 3))
    assert torch.equal(statistics.running_mean, mean)


def test_a_prediction_that_fails_leaves_training_mode() -> None:
    """The next frame with a target is learned from with dropout."""
    module = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5))
    mine = learner(module)
    with pytest.raises(RuntimeError):
        mine.predict(torch.randn(2, 7))
    assert all(part.training for part in module.modules())


def test_batch_statistics_move_once_per_learned_frame() -> None:
    """Forward once, backward once: as plain PyTorch counts."""
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    mine = learner(module)
    for i in range(3):
        of = ticket(i, target=torch.zeros(2, 4))
        forward([mine], of, torch.randn(2, 3))
        backward([mine], of)
    assert module.state_dict()["1.num_batches_tracked"] == 3


def test_batch_norm_may_run_ahead_of_its_backwards() -> None:
    """Statistics written by later forwards do not spoil an earlier backward."""
    torch.manual_seed(0)
    mine = learner(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)))
    frames = [ticket(i, target=torch.zeros(2, 4)) for i in range(3)]
    for of in frames:
        forward([mine], of, torch.randn(2, 3))
    for of in frames:
        backward([mine], of)
    assert mine.learned == 3


def test_nothing_of_a_frame_is_kept_after_its_backward() -> None:
    """Activations, graph and old weights go; the ticket that goes on living holds none of them."""
    mine = chain(*layers())
    of, later = ticket(0, 2, target=torch.zeros(1, 2)), ticket(1, 2, target=torch.zeros(1, 2))
    x = torch.randn(1, 3)
    forward(mine, of, x)
    forward(mine, later, x)
    refs = [weakref.ref(t) for stage in mine for t in (*stage.kept[of].outputs, *stage.kept[of].weights)]
    backward(mine, of)
    backward(mine, later)
    assert of.loss is not None and of.loss.grad_fn is None
    gc.collect()
    assert not any(stage.kept for stage in mine)
    assert [ref() for ref in refs[:1]] == [None]
    working = {id(tensor) for stage in mine for tensor in stage.weights.working}
    assert all(ref() is None or id(ref()) in working for ref in refs)


def test_a_dropped_frame_goes_at_once() -> None:
    """Where there will be no backward the graph dies with the drop, although the ticket lives."""
    mine = chain(*layers())
    of = ticket(0, 2, target=torch.zeros(1, 2))
    forward(mine, of, torch.randn(1, 3))
    refs = [weakref.ref(t) for stage in mine for t in stage.kept[of].outputs]
    for stage in mine:
        stage.drop(of)
        stage.drop(of)  # twice does no harm
    gc.collect()
    assert [ref() for ref in refs] == [None] * len(refs)
    assert of.loss is not None


def test_a_forward_that_fails_keeps_nothing() -> None:
    """Neither where the module raises nor where the loss does."""
    mine = learner(nn.Linear(3, 2))
    with pytest.raises(RuntimeError):
        mine.forward(ticket(target=torch.zeros(1, 2)), torch.randn(1, 7))
    with pytest.raises(InputError, match=r"output.*\(1, 2\).*against target.*\(1, 3, 5\)"):
        mine.forward(ticket(target=torch.zeros(1, 3, 5)), torch.randn(1, 3))
    assert not mine.kept


def test_old_weights_are_copied_only_while_frames_are_in_flight() -> None:
    """With none in flight an update writes in place: stashing costs nothing at the top stage."""
    module = nn.Linear(3, 2)
    mine = learner(module)
    place = module.weight.data_ptr()
    for i in range(2):
        of = ticket(i, target=torch.zeros(1, 2))
        forward([mine], of, torch.randn(1, 3))
        backward([mine], of)
    assert module.weight.data_ptr() == place
    frames = [ticket(i, target=torch.zeros(1, 2)) for i in range(2)]
    for of in frames:
        forward([mine], of, torch.randn(1, 3))
    assert mine.kept_nbytes() == 2 * (12 + 8)
    backward([mine], frames[0])
    assert module.weight.data_ptr() != place
    assert mine.kept_nbytes() == 12 + 8 + mine.weights.nbytes()
    backward([mine], frames[1])


def test_several_tensors_and_other_things_cross_a_cut() -> None:
    """One gradient per tensor in the order of the pytree, None where there is none; text and integers pass."""

    class Low(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.tensor([2.0]))

        def forward(self, x: torch.Tensor) -> dict[str, Any]:
            return {"a": self.w * x, "b": (torch.tensor([1]), "text"), "c": self.w + x}

    class High(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.tensor([3.0]))

        def forward(self, value: dict[str, Any]) -> torch.Tensor:
            assert value["b"][1] == "text"
            y: torch.Tensor = self.w * value["a"]
            return y

    mine = chain(Low(), High(), given=rule(lambda output: output.sum()))
    of = ticket(0, 2)
    forward(mine, of, torch.tensor([5.0]))
    message = mine[1].backward(of, None)
    assert [None if grad is None else grad.item() for grad in message] == [3.0, None, None]  # type: ignore[union-attr]
    mine[0].backward(of, message)
    assert mine[0].weights.masters[0].item() == pytest.approx(2.0 - 0.1 * 3.0 * 5.0)


def test_a_late_target_gives_its_loss_with_the_backward() -> None:
    """The forward keeps the output; the loss is computed when the target is there, and is readable on the host."""
    mine = learner(nn.Linear(3, 2))
    of = ticket(late=True)
    output, loss = mine.forward(of, torch.randn(1, 3))
    assert loss is None
    of.target = torch.zeros(1, 2)
    mine.backward(of, None)
    assert float(of.loss) == pytest.approx(float(functional.mse_loss(output, of.target)))
    assert of.loss.grad_fn is None


def test_a_stage_that_only_computes_keeps_the_mode_of_the_frame() -> None:
    """Below the first that learns: dropout in frames that are learned from, none in those that are predicted."""
    module = nn.Dropout(0.5)
    mine = Passage(site(module, 0, 2), rule())
    x = torch.ones(1, 1000)
    assert 0 < (mine.forward(ticket(0, 2), x) == 0).sum() < 1000
    assert torch.equal(mine.predict(x), x)
    assert not mine.learns and not mine.kept and mine.updater is None


def test_a_frozen_stage_passes_gradients_on() -> None:
    """It has no optimizer, and what is below learns through it."""
    low, high = layers()
    high.requires_grad_(False)
    mine = chain(low, high)
    before = mine[0].weights.snapshot()
    of = ticket(0, 2, target=torch.ones(1, 2))
    forward(mine, of, torch.randn(1, 3))
    backward(mine, of)
    assert mine[1].updater is None
    assert not torch.equal(mine[0].weights.masters[0], before[0])


def test_gradients_wait_until_enough_are_there() -> None:
    """update_every: the delay counts them, and a new opening keeps them."""
    mine = learner(nn.Linear(3, 2), given=rule(update_every=3))
    before = mine.weights.snapshot()[0]
    for i in range(2):
        of = ticket(i, target=torch.ones(1, 2))
        forward([mine], of, torch.randn(1, 3))
        backward([mine], of)
    assert mine.pending_updates() == 2
    assert torch.equal(mine.weights.masters[0], before)
    mine.reset()
    of = ticket(2, target=torch.ones(1, 2))
    forward([mine], of, torch.randn(1, 3))
    backward([mine], of)
    assert mine.pending_updates() == 0
    assert not torch.equal(mine.weights.masters[0], before)


def test_inference_tensors_from_another_device_can_be_learned_from() -> None:
    """A frame that a decoder made in inference mode, on a thread that is in inference mode itself."""
    mine = learner(nn.Linear(3, 2))
    with torch.inference_mode():
        x, y = torch.randn(1, 3), torch.zeros(1, 2)
        for i in range(2):
            of = ticket(i, target=y)
            mine.forward(of, x)
            mine.backward(of, None)
    assert mine.learned == 2
    assert not any(master.is_inference() for master in mine.weights.masters)


def test_on_an_accelerator_memory_of_other_streams_is_not_relied_on() -> None:
    """What comes in, a gradient that is the message itself, and what an earlier opening made: copied, or held.

    Nothing here runs on one: a site that says so is enough.
    """

    class Shift(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.b = nn.Parameter(torch.zeros(1, 2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.b

    given = rule(update_every=2)
    mine = given.stage(site(Shift(), 1, 3, passes_down=True, device=torch.device("cuda")))
    mine.reset()
    storage = mine.weights.masters[0].data_ptr()
    message = torch.ones(1, 2)
    for i in range(3):
        x = torch.randn(1, 2)
        of = ticket(i, 3)
        mine.forward(of, x)
        assert mine.kept[of].entry[0].data_ptr() != x.data_ptr()
        mine.forward(later := ticket(9 + i, 3), x)  # so that the update keeps the old weights
        mine.backward(of, [message])
        assert mine.updater is not None
        assert all(grad is None or grad.data_ptr() != message.data_ptr() for grad in mine.updater._sum)
        mine.drop(later)
    assert mine.weights.masters[0].data_ptr() != storage
    assert storage in [tensor.data_ptr() for tensor in mine._anchor]
