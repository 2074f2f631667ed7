"""The parts graphs and exit of benchmarks/dynamic: their stories, their networks beside plain PyTorch, and toy runs."""

from __future__ import annotations

import importlib
import random
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The modules of both; the benchmarks are no installed package."""
    monkeypatch.syspath_prepend(str(ROOT))
    names = ("exit", "exit_flow", "exit_net", "graph_net", "graph_stories", "graphs", "ways")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield SimpleNamespace(**{name: importlib.import_module(f"benchmarks.dynamic.{name}") for name in names})
    torch.set_num_threads(threads)


# ---------------------------------------------------------------------- stories


def deduced(story: Any) -> str:
    """The answer, read off the sentences alone."""
    *sentences, question = str(story).split(". ")
    about = question.removeprefix("What is ").removesuffix(" afraid of?")
    kind = next(words[3] for words in map(str.split, sentences) if words[:2] == [about, "is"])
    many = {"mouse": "Mice", "sheep": "Sheep", "wolf": "Wolves", "cat": "Cats"}
    feared = next(words[4] for words in map(str.split, sentences) if words[0] == many[kind])
    return next(one for one, several in many.items() if several.lower() == feared)


def test_a_story_says_what_its_answer_is(parts: Any) -> None:
    """By two sentences, in any order; every species is afraid of another one; sizes and answers differ."""
    rng = random.Random(0)
    stories = [parts.graph_stories.tell(rng) for _ in range(200)]
    assert [deduced(story) for story in stories] == [story.answer for story in stories]
    assert {story.answer for story in stories} == {"mouse", "sheep", "wolf", "cat"}
    assert {len(story.statements) for story in stories} == set(range(5, 13))
    assert all(each.subject != each.thing for story in stories for each in story.statements)
    assert len({str(story) for story in stories}) == 200


def test_a_graph_is_its_story_without_names(parts: Any) -> None:
    """From the marked node along is and has_fear one comes to the answer; the same story is numbered anew each time."""
    rng, kinds = random.Random(1), parts.graph_stories.KINDS
    story = parts.graph_stories.tell(rng)
    answers = set()
    for _ in range(50):
        graph, answer = parts.graph_stories.as_graph(story, rng)
        answers.add(answer)
        nodes = len(graph.marked)
        edges = graph.adjacency.view(nodes, nodes, len(kinds))  # [to, from, kind]
        here = graph.marked[:, 0]
        for relation in ("is", "has_fear"):
            forwards, backwards = (edges[..., kinds[relation, against]] for against in (False, True))
            assert torch.equal(forwards, backwards.T)
            here = forwards @ here
        assert here.nonzero().tolist() == [[answer]]
        assert edges.sum() == 2 * len(story.statements)
    assert len(answers) > 1


def test_a_story_takes_as_many_steps_as_it_needs(parts: Any) -> None:
    """One fewer, and there is a node that has not heard of the marked one though it could."""
    for sample in islice(parts.graph_stories.samples(2), 50):
        graph = sample.input
        nodes = len(graph.marked)
        near = graph.adjacency.view(nodes, nodes, -1).sum(2).clamp(max=1)
        heard, counts = graph.marked[:, 0], []
        for _ in range(nodes):
            heard = (heard + near @ heard).clamp(max=1)
            counts.append(int(heard.sum()))
        assert counts.index(counts[-1]) + 1 == graph.steps


# ---------------------------------------------------------------------- the networks and the plain loops


def weights(way: Any) -> list[torch.Tensor]:
    """In the order of their names."""
    state = (way.network if hasattr(way, "network") else way.model).state_dict()
    return [state[key] for key in sorted(state)]


def test_a_story_at_a_time_is_the_plain_loop(parts: Any) -> None:
    """Graphs: with one instance in flight, all weights after some laps are those of plain PyTorch."""
    made = parts.graphs.ways(5)
    plain, one = made[parts.graphs.PLAIN](), made[parts.graphs.ONE]()
    stories = list(islice(parts.graph_stories.samples(5), 44))
    try:
        for way in (plain, one):
            way.learn(stories[:20])
            way.learn(stories[20:])  # 4 are left over from the first lap
        torch.testing.assert_close(weights(one), weights(plain))
        first = parts.graph_net.modules(5)["update"].cell.weight_hh
        assert not torch.equal(plain.model.update.cell.weight_hh, first)
        asked = [story.input for story in stories]
        torch.testing.assert_close(one.outputs(asked), plain.outputs(asked))
    finally:
        one.close()


def test_a_digit_at_a_time_is_the_plain_loop(parts: Any) -> None:
    """Exit: likewise, with all exits learned and another optimizer half way."""
    training, _ = parts.exit.digits(parts.exit.QUICK)
    plain = parts.exit.ways(parts.exit_net.blocks(3, channels=4))[parts.exit.PLAIN]()
    one = parts.exit.ways(parts.exit_net.blocks(3, channels=4))[parts.exit.ONE]()
    try:
        for way in (plain, one):
            way.learn(training[:8])
            way.use(parts.exit.Finer)
            way.learn(training[8:16])
        torch.testing.assert_close(weights(one), weights(plain), rtol=1e-4, atol=1e-5)
    finally:
        one.close()


def taught(blocks: list[Any], training: list[Any]) -> list[Any]:
    """A little, all digits at once, so that answers differ."""
    optimizer = torch.optim.Adam([parameter for block in blocks for parameter in block.parameters()], lr=1e-2)
    images, labels = (torch.stack([getattr(sample, what) for sample in training]) for what in ("input", "target"))
    for _ in range(20):
        h, loss = images, torch.zeros(())
        for block in blocks:
            h, said = block(h)
            loss = loss + torch.nn.functional.cross_entropy(said, labels)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return blocks


@pytest.mark.parametrize("leaving", ["nobody can", "all", "some", "none"])
def test_exits_are_those_of_plain_pytorch(parts: Any, leaving: str) -> None:
    """The same answers after as many calls, whoever shares the batches; nobody leaves below the threshold."""
    training, test = parts.exit.digits(parts.exit.Sizes(training=200, test=24))
    images = [sample.input for sample in test]
    blocks, inline = taught(parts.exit_net.blocks(4, channels=8), training), ["inline"] * 4
    if leaving == "nobody can":
        plain, network = parts.exit_net.PlainWhole(blocks), parts.exit_net.WholeNet(blocks, devices=inline, max_batch=8)
    else:
        with torch.no_grad():
            first = sorted(parts.exit_net.confidence(blocks[0](image[None])[1]) for image in images)
        threshold = {"all": 0.0, "some": (first[11] + first[12]) / 2, "none": 2.0}[leaving]
        plain = parts.exit_net.PlainExits(blocks, threshold=threshold)
        network = parts.exit_net.ExitNet(blocks, threshold=threshold, devices=inline, max_batch=8)
    expected = parts.exit_flow.one_by_one(plain, images, blocks=4)
    for clients, ordered in ((1, True), (8, True), (8, False)):
        found = parts.exit_flow.through(network, images, clients=clients, ordered=ordered)
        assert (found.answers, found.calls) == (expected.answers, expected.calls)
        assert all(seconds > 0 for seconds in found.latencies)
    assert len(set(expected.answers)) > 1
    least, most = {"all": (24, 24), "some": (24 + 12, 12 + 4 * 12)}.get(leaving, (4 * 24, 4 * 24))
    assert least <= expected.calls <= most


# ---------------------------------------------------------------------- what they say


def test_until_right_is_the_first_check_without_a_mistake(parts: Any) -> None:
    """Stories, and the seconds of the laps so far; None where there was none."""
    learned = parts.graphs.Learned(seconds=[1.0, 2.0, 4.0, 8.0], right=[0.5, 0.9, 1.0, 0.99])
    assert learned.until(80) == (240, 7.0)
    assert parts.graphs.Learned(seconds=[1.0], right=[0.99]).until(80) is None


@pytest.mark.parametrize("part", ["graphs", "exit"])
def test_a_toy_run_reports_and_draws(parts: Any, part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every way has its row, every target its verdict, and where results are saved there is a picture."""
    harness = importlib.import_module("benchmarks._harness")
    (tmp_path / "dynamic").mkdir()
    arguments = harness.parser("").parse_args(["--quick", "--save", "toy"])
    module = getattr(parts, part)
    report = harness.Report(
        str(tmp_path / "dynamic" / "__main__.py"),
        question="Does it run?",
        setup=module.setup(arguments),
        arguments=arguments,
    )
    module.main(arguments, report)
    report.finish()
    printed = capsys.readouterr().out
    made = module.ways(0) if part == "graphs" else module.ways(parts.exit_net.blocks(0))
    assert all(f"| {name} " in printed for name in made)
    assert "| met " in printed or "| not met " in printed
    written = {path.name for path in (tmp_path / "dynamic" / "results").iterdir()}
    assert written == {"toy.json", "toy.md", "toy.png"}
