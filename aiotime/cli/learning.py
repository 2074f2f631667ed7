"""``aiotime demo learn``: a CNN learns handwritten digits from a stream that it sees once."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from aiotime.cli.factory import parse_devices
from aiotime.observe.tables import count

if TYPE_CHECKING:
    import torch
    from torch import nn

    from aiotime.frame import Sample
    from aiotime.learning import Rule
    from aiotime.observe.trace import Trace
    from aiotime.pipeline import Balance, Pipeline

RECENT = 200  # frames that the shown accuracy is the mean of
BLEND = 16  # frames from one digit to the next in the smooth stream
REDRAW = 0.2  # seconds
CUT = (7, 3, 3, 6)  # layers of the four stages, one large convolution each; for other numbers they are shared out
BARS = " ▁▂▃▄▅▆▇█"


@dataclass(slots=True)
class Curve:
    """How one rule does on one stream.

    Attributes:
        right: for each frame whether its prediction, made before it was learned from, was correct.
        seconds: that the stream took.
    """

    rule: str
    stream: str
    total: int
    right: list[bool] = field(default_factory=list)
    seconds: float = 0.0
    delay: tuple[int, ...] = ()
    state: str = "waits"
    _recent: deque[bool] = field(default_factory=lambda: deque(maxlen=RECENT))

    def add(self, right: bool) -> None:
        """One more prediction."""
        self.right.append(right)
        self._recent.append(right)

    @property
    def recent(self) -> float:
        """Accuracy over the newest `RECENT` frames."""
        return sum(self._recent) / max(1, len(self._recent))

    @property
    def second_half(self) -> float:
        """Accuracy over the second half of the stream."""
        half = self.right[len(self.right) // 2 :]
        return sum(half) / max(1, len(half))

    def points(self) -> list[tuple[float, float]]:
        """(frames seen, accuracy over the newest `RECENT` of them)."""
        sums = [0, *accumulate(self.right)]
        return [(at, (sums[at] - sums[max(0, at - RECENT)]) / min(at, RECENT)) for at in range(1, len(sums))]

    def bars(self, columns: int = 16) -> str:
        """The accuracy over time as a row of bars."""
        step = max(1, self.total // columns)
        shares = [
            sum(self.right[at : at + step]) / len(self.right[at : at + step]) for at in range(0, len(self.right), step)
        ]
        return "".join(BARS[round(share * (len(BARS) - 1))] for share in shares)


def show_learning(console: Console, *, frames: int | None, devices: str, seed: int, out: Path) -> None:
    """Every rule on every stream, live; then a table, the curves and a timeline."""
    import aiotime
    from aiotime.cli.predicting import draw

    places = parse_devices(devices) or []
    data = {"unrelated digits": unrelated, "smooth stream": smooth}
    rules = contenders()
    curves = [Curve(rule, stream, 0) for stream in data for rule in rules]
    trace: Trace | None = None
    console.print(
        f"a CNN that knows nothing sees each frame once: predicts it, then learns from it; {len(places)} stages on "
        f"{', '.join(dict.fromkeys(places))}"
    )
    with Live(table(curves), console=console, auto_refresh=False, transient=True) as live:
        for curve in curves:
            samples = data[curve.stream](seed, frames)
            curve.total, curve.state = len(samples), "learns"
            pipeline = build(rules[curve.rule](), places, seed=seed)

            def redraw() -> None:
                live.update(table(curves), refresh=True)

            with pipeline.tracing(limit=4_000) as recorded:
                aiotime.run(follow(pipeline, samples, curve, redraw))
            if curve.rule.startswith("Delayed"):
                trace = recorded
            curve.state = "done"
            redraw()
            if not console.is_terminal:  # nobody sees the live table
                console.print(f"  {curve.stream}, {curve.rule}: {curve.second_half:.1%} in the second half")
    console.print(table(curves))
    out.mkdir(parents=True, exist_ok=True)
    try:
        from aiotime.observe.curves import draw_panels
    except ImportError as error:
        console.print(f'curves    not drawn: they need {error.name}: pip install "aiotime[plot]"')
    else:
        panels = {name: {curve.rule: curve.points() for curve in curves if curve.stream == name} for name in data}
        draw_panels(panels, out / "curves.png", x="frames seen", y=f"accuracy before learning, last {RECENT}")
        console.print(f"curves    {out / 'curves.png'}")
    if trace is not None:
        draw(trace, out, console, title="learning handwritten digits online")


def contenders() -> dict[str, Callable[[], Rule]]:
    """The rules, all with one optimizer: RMSprop without momentum, which suits one continuous stream."""
    import torch
    from torch.nn.functional import cross_entropy

    from aiotime import learning

    settings: dict[str, Any] = {"loss": cross_entropy, "optimizer": partial(torch.optim.RMSprop, lr=3e-4)}
    return {
        "Exact (one frame in flight)": lambda: learning.Exact(**settings),
        "Sideways (PARTIME's rule)": lambda: learning.Sideways(**settings),
        "Delayed (the default)": lambda: learning.Delayed(**settings),
        "Delayed, local heads": lambda: learning.Delayed(**settings, local=1.0),
    }


def network(*, seed: int) -> nn.Sequential:
    """A CNN of 108,000 weights: [1, 1, 8, 8] -> enlarged to 16 x 16 -> 5 convolutions -> [1, 10] logits."""
    import torch
    from torch import nn

    torch.manual_seed(seed)
    layers: list[nn.Module] = [nn.Upsample(scale_factor=2, mode="bilinear")]
    channels = 1
    for _ in range(5):
        convolution = nn.Conv2d(channels, 32, 5, padding=2)
        nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")
        layers += [convolution, nn.GroupNorm(4, 32), nn.ReLU()]  # batch norm has no batch here
        channels = 32
    layers += [nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(512, 10)]
    return nn.Sequential(*layers)


def build(rule: Rule, devices: list[str], *, seed: int) -> Pipeline:
    """The same network, cut the same way, under ``rule``."""
    import torch

    import aiotime

    model = network(seed=seed)
    balance: Balance = list(CUT) if len(devices) == len(CUT) else "even"
    return aiotime.Pipeline(model, example=torch.zeros(1, 1, 8, 8), devices=devices, balance=balance, learner=rule)


async def follow(pipeline: Pipeline, samples: list[Sample], curve: Curve, redraw: Callable[[], None]) -> None:
    """Run the stream through; what came out is scored as it comes."""
    labels = [int(sample.target) for sample in samples]
    shown = start = time.perf_counter()
    async with pipeline, pipeline.run(samples) as run:
        async for prediction in run:
            curve.add(int(prediction.output.argmax()) == labels[prediction.index])
            curve.delay = prediction.delay or ()
            now = time.perf_counter()
            curve.seconds = now - start
            if now - shown > REDRAW:
                shown = now
                redraw()
    curve.seconds = time.perf_counter() - start


def table(curves: list[Curve]) -> Table:
    """How far each rule is, and how good."""
    shown = Table(box=None, pad_edge=False)
    for name in ("stream", "rule", "accuracy over time", "last 200", "second half", "frames/s", "delay"):
        left = name in ("stream", "rule", "accuracy over time")
        shown.add_column(name, justify="left" if left else "right", no_wrap=left)
    before = ""
    for curve in curves:
        done = bool(curve.right)
        shown.add_row(
            curve.stream if curve.stream != before else "",
            curve.rule,
            curve.bars() if done else curve.state,
            f"{curve.recent:.1%}" if done else "",
            f"{curve.second_half:.1%}" if curve.state == "done" else "",
            count(round(len(curve.right) / curve.seconds)) if curve.seconds else "",
            " ".join(map(str, curve.delay)) if curve.state == "done" else "",
        )
        before = curve.stream
    return shown


# ---------------------------------------------------------------------- the streams


def unrelated(seed: int, frames: int | None) -> list[Sample]:
    """Every digit once, in random order."""
    from aiotime import Sample

    return [Sample(image, target=label) for image, label in _shuffled(seed, frames)]


def smooth(seed: int, frames: int | None) -> list[Sample]:
    """A digit turns into another over `BLEND` frames, then a cut to two others; the label is the nearer one's."""
    from aiotime import Sample

    samples: list[Sample] = []
    pairs = _shuffled(seed, None)
    while True:
        for (first, label), (second, other) in zip(pairs[::2], pairs[1::2], strict=False):
            for step in range(BLEND):
                share = step / (BLEND - 1)
                blended = (1 - share) * first + share * second
                samples.append(Sample(blended, target=label if share < 0.5 else other))
                if len(samples) == (frames or len(pairs)):
                    return samples


def _shuffled(seed: int, frames: int | None) -> list[tuple[torch.Tensor, torch.Tensor]]:
    from aiotime.cli.digits import load

    digits = load(seed=seed)
    pairs = [
        *_singly(digits.train_images, digits.train_labels),
        *_singly(digits.test_images, digits.test_labels),
    ]
    return pairs[:frames]


def _singly(images: torch.Tensor, labels: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for at in range(len(images)):
        yield images[at : at + 1], labels[at : at + 1]
