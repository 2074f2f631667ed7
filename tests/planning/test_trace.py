"""Tests of aiotime.planning.trace: every model, cut anywhere, is still the model."""

from __future__ import annotations

import random
import sys
import traceback
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from aiotime.errors import ConfigurationError, InputError, PlanError, TraceError
from aiotime.planning import Piece, Traced, trace


def sizes_of(layers: int, pieces: int, seed: int) -> list[int]:
    """A random division."""
    cuts = sorted(random.Random(seed).sample(range(1, layers), pieces - 1))
    return [stop - first for first, stop in zip([0, *cuts], [*cuts, layers], strict=True)]


def through(pieces: list[Piece], example: Any) -> Any:
    """What the pieces make of a frame, one after the other.

    What crosses a cut is copied, tensor by tensor, as on its way to another device.
    """
    value = example
    with torch.inference_mode():
        for piece in pieces:
            if value is not example:
                value = tuple(item.clone() if isinstance(item, Tensor) else item for item in value)
            value = piece(value)
    return value


def assert_same(got: Any, expected: Any) -> None:
    """The same structure, types and values."""
    assert type(got) is type(expected)
    assert pytree.tree_structure(got) == pytree.tree_structure(expected)
    for one, other in zip(pytree.tree_leaves(got), pytree.tree_leaves(expected), strict=True):
        if isinstance(other, Tensor):
            torch.testing.assert_close(one, other)
        else:
            assert one == other


def expected_of(case: Any) -> Any:
    """What the model itself returns."""
    with torch.no_grad():
        return case()


@pytest.mark.parametrize("pieces", [1, 2, 3, 5])
def test_every_cut_gives_the_models_own_output(case: Any, pieces: int) -> None:
    """However the layers are divided, what comes out is what the model itself returns."""
    expected = expected_of(case)
    traced = trace(case.model, case.example)
    pieces = min(pieces, len(traced.layers))
    for seed in range(3):
        cut = traced.cut(sizes_of(len(traced.layers), pieces, seed))
        assert_same(through(cut, case.example), expected)


def test_a_cut_after_every_layer_works(case: Any) -> None:
    """Also with each layer a piece of its own; between pieces travels a flat tuple."""
    expected = expected_of(case)
    traced = trace(case.model, case.example)
    value = case.example
    with torch.inference_mode():
        for piece in traced.cut([1] * len(traced.layers))[:-1]:
            value = piece(value)
            assert type(value) is tuple
            assert all(not isinstance(item, dict | list) for item in value)
    assert_same(through(traced.cut([1] * len(traced.layers)), case.example), expected)


def test_the_keys_are_the_models_own(case: Any) -> None:
    """The pieces' keys together are the state_dict's, and their state is the model's own tensors."""
    traced = trace(case.model, case.example)
    state: dict[str, Any] = {}
    for piece in traced.cut([1] * len(traced.layers)):
        assert set(piece.keys.values()) <= set(piece.module.state_dict())
        state.update(piece.state())
    assert state.keys() == case.model.state_dict().keys()
    for key, tensor in case.model.state_dict().items():
        assert state[key].data_ptr() == tensor.data_ptr()


def test_loading_makes_the_pieces_another_model_and_leaves_the_model_alone(
    case: Any, make: Callable[[str], Any]
) -> None:
    """After load() the pieces compute with the new weights; the model, whose tensors they shared, does not."""
    expected = expected_of(case)
    traced = trace(case.model, case.example)
    cut = traced.cut(sizes_of(len(traced.layers), min(3, len(traced.layers)), 0))
    before = {key: tensor.clone() for key, tensor in case.model.state_dict().items()}
    new = {
        key: tensor + 0.5 if tensor.is_floating_point() else tensor for key, tensor in case.model.state_dict().items()
    }
    for piece in cut:
        piece.load(new)
    assert_same(expected_of(case), expected)
    for key, tensor in case.model.state_dict().items():
        assert torch.equal(tensor, before[key])
    case.model.load_state_dict(new)
    assert_same(through(cut, case.example), expected_of(case))
    torch.testing.assert_close({key: t for piece in cut for key, t in piece.state().items()}, new)
    loaded = {key: tensor.clone() for key, tensor in new.items()}
    for tensor in new.values():
        tensor.zero_()  # whoever handed the state in goes on using it
    torch.testing.assert_close({key: t for piece in cut for key, t in piece.state().items()}, loaded)


def test_the_model_is_left_as_it_was(case: Any) -> None:
    """Tracing changes no weight, no mode, no attribute of the model, and not the example."""
    attributes = {name: dict(vars(module)) for name, module in case.model.named_modules()}
    state = {key: tensor.clone() for key, tensor in case.model.state_dict().items()}
    example = pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, case.example)
    trace(case.model, case.example)
    for name, module in case.model.named_modules():
        assert vars(module).keys() == attributes[name].keys()
        assert all(vars(module)[key] is value for key, value in attributes[name].items())
    torch.testing.assert_close(dict(case.model.state_dict()), state, rtol=0, atol=0)
    assert_same(case.example, example)


@pytest.mark.parametrize(
    ("name", "how"), [("sequential", "sequential"), ("residual", "fx"), ("unet", "fx"), ("encoder-decoder", "export")]
)
def test_modules_are_kept_where_possible(make: Callable[[str], Any], name: str, how: str) -> None:
    """Between children, else by torch.fx, else by torch.export."""
    case = make(name)
    assert trace(case.model, case.example).how == how


def test_layers_have_the_models_names(make: Callable[[str], Any]) -> None:
    """A layer is called as the module that does its work."""
    case = make("sequential")
    assert [layer.name for layer in trace(case.model, case.example).layers] == [
        "0", "1.0", "1.1", "1.2.0", "1.2.1", "2", "3",
    ]  # fmt: skip
    case = make("residual")
    names = [layer.name for layer in trace(case.model, case.example).layers]
    assert "blocks.1.conv2" in names
    assert len(set(names)) == len(names)


def test_bytes_are_those_of_the_tensors(make: Callable[[str], Any]) -> None:
    """Parameter bytes per layer, bytes across each cut, bytes of the output."""
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).double()
    traced = trace(model, torch.randn(3, 4, dtype=torch.float64))
    assert [layer.parameter_bytes for layer in traced.layers] == [(4 * 8 + 8) * 8, 0, (8 * 2 + 2) * 8]
    assert traced.cut_bytes == (3 * 4 * 8, 3 * 8 * 8, 3 * 8 * 8)
    assert traced.output_bytes == 3 * 2 * 8


def test_hooks_of_submodules_are_called(make: Callable[[str], Any]) -> None:
    """Also one registered after the cut, and no more once it is removed."""
    case = make("residual")
    calls: list[str] = []
    case.model.blocks[1].register_forward_hook(lambda *_: calls.append("early"))
    [piece] = (traced := trace(case.model, case.example)).cut([len(trace(case.model, case.example).layers)])
    assert traced.how == "fx"
    calls.clear()
    handle = case.model.blocks[0].conv1.register_forward_hook(lambda *_: calls.append("late"))
    piece(case.example)
    assert calls == ["late", "early"]
    handle.remove()
    piece(case.example)
    assert calls == ["late", "early", "early"]


def test_hooks_on_the_model_itself_are_refused() -> None:
    """No stage could call them."""
    model = nn.Sequential(nn.Linear(2, 2))
    model.register_forward_hook(lambda *_: None)
    with pytest.raises(TraceError, match="hooks on the model itself"):
        trace(model, torch.randn(1, 2))


@pytest.mark.parametrize("sizes", [[], [1], [4, 0], [2, 3], [-1, 5]])
def test_sizes_that_do_not_divide_the_layers_are_refused(sizes: list[int]) -> None:
    """Each at least one, and together all."""
    traced = trace(nn.Sequential(*[nn.Linear(2, 2) for _ in range(4)]), torch.randn(1, 2))
    with pytest.raises(PlanError, match="4 layers"):
        traced.cut(sizes)


class Branches(nn.Module):
    def forward(self, x: Tensor) -> Any:
        if x.sum() > 0:  # the place
            return x
        return -x


class Holder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.inner = Branches()

    def forward(self, x: Tensor) -> Any:
        return self.inner(self.first(x))


def test_what_cannot_be_traced_is_named_with_the_way_out(capfd: pytest.CaptureFixture[str]) -> None:
    """The module, the line, what torch said, and code that builds the pipeline without tracing."""
    with pytest.raises(TraceError) as caught:
        trace(Holder(), torch.randn(2, 3))
    message = str(caught.value)
    assert "Branches at 'inner'" in message
    assert "test_trace.py" in message
    assert "if x.sum() > 0:" in message
    assert "aiotime.Pipeline.from_stages([" in message
    assert "aiotime.Stage(model.first" in message
    assert caught.value.__cause__ is not None
    assert capfd.readouterr().err == ""


def test_a_model_that_fails_on_its_example_says_so() -> None:
    """The model's own error is the cause."""
    with pytest.raises(TraceError, match="does not run on its example") as caught:
        trace(nn.Sequential(nn.Linear(3, 3)), torch.randn(2, 4))
    assert isinstance(caught.value.__cause__, RuntimeError)


@pytest.mark.parametrize("example", [[1, 2], "text", 3, None])
def test_an_example_that_is_no_payload_is_refused(example: Any) -> None:
    """A tensor, a tuple or a dict."""
    with pytest.raises(TraceError, match="a tuple"):
        trace(nn.Linear(3, 3), example)


def test_a_compiled_model_and_an_empty_one_are_refused() -> None:
    """With what to do instead."""
    with pytest.raises(TraceError, match="no children"):
        trace(nn.Sequential(), torch.randn(1))
    with pytest.raises(TraceError, match="compiled"):
        trace(cast("nn.Module", torch.compile(nn.Linear(1, 1), backend="eager")), torch.randn(1))


class Counter(nn.Module):
    """A running mean over frames, read in one place and written in another."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)
        self.register_buffer("mean", torch.zeros(3))
        self.mean: Tensor

    def forward(self, x: Tensor) -> Any:
        x = self.a(x) - self.mean
        x = self.b(x)
        self.mean.mul_(0.9).add_(x.mean(0), alpha=0.1)
        return self.c(x)


class Slot(Counter):
    """The same, by giving the buffer another tensor."""

    def forward(self, x: Tensor) -> Any:
        x = self.a(x) - self.mean
        x = self.b(x)
        self.mean = self.mean * 0.9 + x.mean(0) * 0.1
        return self.c(x)


@pytest.mark.parametrize("kind", [Counter, Slot])
def test_a_buffer_that_frames_change_stays_in_one_layer(kind: type[Counter]) -> None:
    """Its readers and its writer are never apart, frames see it in order, and tracing does not change it."""
    torch.manual_seed(0)
    model = kind().eval()
    frames = [torch.randn(2, 3) for _ in range(4)]
    traced = trace(model, frames[0])
    assert traced.has_state
    assert torch.equal(model.mean, torch.zeros(3))
    assert traced.layers[0].name == "a"
    assert traced.layers[-1].name == "c"  # what comes after the writer can be cut off
    cut = traced.cut([1] * len(traced.layers))
    values: list[Any] = list(frames)
    with torch.no_grad():
        for piece in cut:  # the first piece is done with all frames before the second has seen one
            values = [piece(value) for value in values]
    got = values
    model.mean = torch.zeros(3)
    with torch.no_grad():
        for frame, output in zip(frames, got, strict=True):
            torch.testing.assert_close(output, model(frame))


def test_batch_norm_in_training_mode_is_not_changed_by_tracing(make: Callable[[str], Any]) -> None:
    """Nor is it by a piece that was asked for apart; a piece otherwise keeps the model's statistics up to date."""
    case = make("residual")
    case.model.train()
    before = case.model.stem[1].running_mean.clone()
    traced = trace(case.model, case.example)
    traced.piece(0, len(traced.layers), apart=True)(case.example)
    assert torch.equal(case.model.stem[1].running_mean, before)
    traced.piece(0, len(traced.layers))(case.example)
    assert not torch.equal(case.model.stem[1].running_mean, before)


class Leaky(Counter):
    def forward(self, x: Tensor) -> Any:
        self.mean.add_(x.mean(0))
        return self.mean


def test_a_changing_buffer_as_output_is_refused() -> None:
    """The next frame would change what the consumer holds."""
    with pytest.raises(TraceError, match="'mean'"):
        trace(Leaky(), torch.randn(2, 3))


class Forgetful(nn.Module):
    """Keeps a tensor from call to call as a plain attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)
        self.last = torch.zeros(1, 3)

    def forward(self, x: Tensor) -> Any:
        y = self.fc(x) + self.last
        self.last = y
        return y


def test_state_outside_of_buffers_is_refused() -> None:
    """A traced model would forget it."""
    model = Forgetful()
    with pytest.raises(TraceError, match="'last'"):
        trace(model, torch.randn(1, 3))
    assert torch.equal(model.last, torch.zeros(1, 3))


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Any:
        return self.fc(x) + torch.randn(3)


def test_random_numbers_are_drawn_anew_for_each_frame() -> None:
    """A tracer that runs the model once would have kept the first."""
    traced = trace(Noisy(), torch.zeros(1, 3))
    [piece] = traced.cut([len(traced.layers)])
    assert not torch.equal(piece(torch.zeros(1, 3)), piece(torch.zeros(1, 3)))


def test_tracing_uses_up_no_random_numbers(make: Callable[[str], Any]) -> None:
    """Who seeded the generator gets the numbers expected."""
    case = make("residual")
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    trace(case.model, case.example)
    assert torch.equal(torch.rand(1), expected)


def test_a_value_fixed_by_the_trace_is_checked(make: Callable[[str], Any]) -> None:
    """A flag decided the path; a frame with another one is refused, not computed wrongly."""
    case = make("keywords")
    traced = trace(case.model, case.example)
    first = traced.cut([1, len(traced.layers) - 1])[0]
    with pytest.raises(InputError, match="negate"):
        first({**case.example, "negate": False})
    with pytest.raises(InputError, match="expected a dict"):
        first({"left": case.example["left"]})


def test_keywords_may_come_in_any_order(make: Callable[[str], Any]) -> None:
    """Arguments are found by name."""
    case = make("keywords")
    traced = trace(case.model, case.example)
    cut = traced.cut([1] * len(traced.layers))
    turned = dict(reversed(case.example.items()))
    assert_same(through(cut, turned), expected_of(case))


@pytest.mark.parametrize(
    ("name", "dynamic", "resize"),
    [
        ("gpt", (0, 1), lambda ids: ids[:1, :4]),
        ("encoder-decoder", (1,), lambda pair: (pair[0][:, :3], pair[1])),
        ("unet", (2, 3), lambda pair: tuple(image[:, :, :8, :12] for image in pair)),
        ("residual", (0,), lambda image: image.repeat(3, 1, 1, 1)),
    ],
)
def test_dynamic_dimensions_take_other_sizes(
    make: Callable[[str], Any], name: str, dynamic: tuple[int, ...], resize: Callable[[Any], Any]
) -> None:
    """What was traced at one size runs at another, also where sizes cross a cut."""
    case = make(name)
    traced = trace(case.model, case.example, dynamic=dynamic)
    cut = traced.cut([1] * len(traced.layers))
    case.example = resize(case.example)
    assert_same(through(cut, case.example), expected_of(case))


def test_a_dynamic_dimension_of_size_one_is_not_taken_for_a_constant(make: Callable[[str], Any]) -> None:
    """A batch of one is the usual example."""
    case = make("encoder-decoder")
    case.example = tuple(ids[:1] for ids in case.example)
    traced = trace(case.model, case.example, dynamic=(0,))
    cut = traced.cut([1] * len(traced.layers))
    assert_same(through(cut, case.example), expected_of(case))
    case.example = tuple(ids.repeat(3, 1) for ids in case.example)
    assert_same(through(cut, case.example), expected_of(case))


def test_a_dynamic_dimension_that_a_buffer_fixes_is_told() -> None:
    """An example as long as the causal mask; the message says so, and names no place inside of torch."""

    class Masked(nn.Module):
        mask: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mask", torch.ones(6, 6).tril())

        def forward(self, x: Tensor) -> Tensor:
            return self.mask[: x.shape[1], : x.shape[1]] @ x.transpose(0, 1)

    trace(Masked(), torch.ones(2, 5), dynamic=(1,))
    with pytest.raises(TraceError, match="give a smaller example") as caught:
        trace(Masked(), torch.ones(2, 6), dynamic=(1,))
    assert "specialized it to be a constant (6)" in str(caught.value)
    assert "Masked cannot be traced: UserError" in str(caught.value)


def test_other_sizes_than_a_traced_branch_allows_are_refused() -> None:
    """A choice made by a size is checked on each frame where sizes vary."""

    class Sized(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return x * 2 if x.shape[0] > 3 else x * 3

    traced = trace(Sized(), torch.ones(5, 2), dynamic=(0,))
    [piece] = traced.cut([len(traced.layers)])
    assert torch.equal(piece(torch.ones(6, 2)), torch.full((6, 2), 2.0))
    with pytest.raises(AssertionError, match="Guard failed"):
        piece(torch.ones(2, 2))


def test_a_large_model_has_a_readable_number_of_layers() -> None:
    """Hundreds of operations, and not more layers than a person can look at."""

    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([nn.Linear(8, 8) for _ in range(400)])

        def forward(self, x: Tensor) -> Any:
            for block in self.blocks:
                x = x + torch.tanh(block(x))
            return x

    model = Deep().eval()
    traced = trace(model, torch.randn(1, 8))
    assert 100 < len(traced.layers) < 400
    cut = traced.cut([len(traced.layers) // 2, len(traced.layers) - len(traced.layers) // 2])
    with torch.inference_mode():
        torch.testing.assert_close(through(cut, torch.ones(1, 8)), model(torch.ones(1, 8)))


def test_tied_weights_in_two_pieces_part_when_one_is_loaded(make: Callable[[str], Any]) -> None:
    """Each piece replaces its own; a frame between two swaps sees whole weights in every stage."""
    case = make("gpt")
    traced: Traced = trace(case.model, case.example)
    first, last = traced.cut([1, len(traced.layers) - 1])
    shared = {"tokens.weight", "head.weight"}
    assert shared <= first.keys.keys()
    assert shared <= last.keys.keys()
    first.load({key: tensor + 1 for key, tensor in case.model.state_dict().items()})
    assert not torch.equal(first.state()["head.weight"], last.state()["head.weight"])
    assert torch.equal(last.state()["head.weight"], case.model.head.weight)
    first.module.to(torch.float64)
    assert case.model.tokens.weight.dtype == torch.float32


def test_load_refuses_what_does_not_fit_and_changes_nothing(make: Callable[[str], Any]) -> None:
    """A missing key, another shape."""
    case = make("residual")
    traced = trace(case.model, case.example)
    [piece] = traced.cut([len(traced.layers)])
    state = {key: tensor + 1 for key, tensor in case.model.state_dict().items()}
    with pytest.raises(ConfigurationError, match="lacks"):
        piece.load({})
    with pytest.raises(ConfigurationError, match="shape"):
        piece.load({**state, "head.bias": torch.zeros(1)})
    assert_same(through([piece], case.example), expected_of(case))


def test_an_activation_dies_after_its_last_use() -> None:
    """Inside a piece nothing is held that no later layer needs."""
    alive: list[int] = []

    class Watch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Any:
            alive.append(sys.getrefcount(x))
            return self.fc(x)

    model = nn.Sequential(Watch(), Watch(), Watch())
    direct: list[int] = []
    with torch.no_grad():
        model(torch.randn(1, 2))
        direct.extend(alive)
        [piece] = trace(model, torch.randn(1, 2)).cut([3])
        alive.clear()
        piece(torch.randn(1, 2))
    assert all(0 < here <= there for here, there in zip(alive[1:], direct[1:], strict=True))


def test_layers_are_called_without_looking_for_hooks_until_there_is_one() -> None:
    """A layer's forward is called directly; hooks added later, for it or for all, and its own ``__call__`` count."""

    class Doubled(nn.Linear):
        def __call__(self, *args: Any) -> Any:
            return 2 * super().__call__(*args)

    called: list[str] = []
    model = nn.Sequential(nn.Linear(2, 2), Doubled(2, 2), nn.Linear(2, 2))
    x = torch.randn(1, 2)
    with torch.no_grad():
        [piece] = trace(model, x).cut([3])
        assert torch.equal(piece(x), model(x))
        assert piece.module.bound() is not piece.module.bind()
        handle = model[2].register_forward_hook(lambda *_: called.append("own"))
        piece(x)
        handle.remove()
        everywhere = nn.modules.module.register_module_forward_hook(lambda *_: called.append("all"))
        piece(x)
        everywhere.remove()
        assert called == ["own", "all", "all", "all"]
        assert torch.equal(piece(x), model(x))
        assert len(called) == 4


class Positions(nn.Module):
    """Makes tensors of its own, some of them in a block that torch.export keeps as a graph inside the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Any:
        places = torch.arange(x.shape[1], device=x.device)
        with torch.no_grad():
            inner = torch.arange(x.shape[1], device=x.device) + self.fc(x).argmax()
        return self.fc(x), places, torch.ones(2, device=x.device), inner


def test_constants_of_the_traced_device_follow_the_piece() -> None:
    """A moved piece makes its tensors where it is now (tried on the device without memory), and comes back."""
    model, x = Positions(), torch.randn(2, 3)
    [piece] = (traced := trace(model, x)).cut([len(trace(model, x).layers)])
    assert traced.how == "export"
    piece.module.to("meta")
    assert [leaf.device.type for leaf in piece(x.to("meta"))] == ["meta"] * 4
    assert [leaf.device.type for leaf in piece.module(x.to("meta"))] == ["meta"] * 4
    [other] = traced.cut([len(traced.layers)])
    assert [leaf.device.type for leaf in other(x)] == ["cpu"] * 4


@pytest.mark.parametrize("name", ["gpt", "encoder-decoder", "precise", "recurrent"])
def test_a_moved_piece_leaves_the_model_where_it_is(make: Callable[[str], Any], name: str) -> None:
    """The piece is moved, with everything in it; the model, whose tensors it shared, is not."""
    case = make(name)
    traced = trace(case.model, case.example)
    value = pytree.tree_map(lambda leaf: leaf.to("meta"), case.example)
    with torch.no_grad():
        for piece in traced.cut(sizes_of(len(traced.layers), 3, 0)):
            piece.module.to("meta")
            value = piece(value)
    for leaf in pytree.tree_leaves(value):
        assert leaf.device.type == "meta"
    assert all(tensor.device.type == "cpu" for tensor in case.model.state_dict().values())


def test_the_module_of_a_piece_computes_the_same(case: Any) -> None:
    """Slower, reading every tensor from the module: for torch.func, which swaps tensors there."""
    traced = trace(case.model, case.example)
    cut = traced.cut(sizes_of(len(traced.layers), min(2, len(traced.layers)), 0))
    value = case.example
    with torch.no_grad():
        for piece in cut:
            value = piece.module(value)
    assert_same(value, expected_of(case))


def test_weights_can_be_swapped_by_torch_func(make: Callable[[str], Any]) -> None:
    """A learning rule computes with other weights than the piece holds."""
    case = make("gpt")
    traced = trace(case.model, case.example)
    [piece] = traced.cut([len(traced.layers)])
    zeros = {key: torch.zeros_like(tensor) for key, tensor in piece.module.state_dict().items()}
    out = torch.func.functional_call(piece.module, zeros, (case.example,))
    assert torch.equal(out, torch.zeros_like(out))


def test_gradients_reach_the_models_own_parameters(make: Callable[[str], Any]) -> None:
    """Through every piece, as through the model itself."""
    case = make("unet")
    case.model.zero_grad()
    case()["mask"].square().sum().backward()
    expected = {name: parameter.grad for name, parameter in case.model.named_parameters()}
    case.model.zero_grad()
    traced = trace(case.model, case.example)
    value = case.example
    for piece in traced.cut(sizes_of(len(traced.layers), 3, 0)):
        value = piece(value)
    value["mask"].square().sum().backward()
    for name, parameter in case.model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name])


def test_an_error_in_a_piece_shows_the_line() -> None:
    """The code of a piece is written for it; a traceback finds it all the same."""
    traced = trace(nn.Sequential(nn.Linear(3, 3)), torch.randn(1, 3))
    [piece] = traced.cut([1])
    with pytest.raises(RuntimeError) as caught:
        piece(torch.randn(1, 4))
    assert "a0(value)" in "".join(traceback.format_exception(caught.value))
