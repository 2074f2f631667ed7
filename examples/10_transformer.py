"""A GPT-like model over two CPU threads: causal mask in a buffer, tied weights, outputs equal to the model's own.

Nothing in the model knows about pipelines. It is traced, cut in its graph, and its state_dict keeps its keys; the
embedding, tied to the head, is used by both stages. Prints the plan, how many parameters the pipeline has under the
model's own names, and for how many of 32 sequences its logits equal the model's.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import aiotime

VOCABULARY, WIDTH, HEADS, LAYERS, LENGTH = 256, 64, 4, 4, 32


class Block(nn.Module):
    """Causal self-attention and a feed-forward net, each behind a norm and beside a skip."""

    mask: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.feed = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))
        self.register_buffer("mask", torch.full((LENGTH, LENGTH), -torch.inf).triu(1))

    def forward(self, x: Tensor) -> Tensor:
        """(1, time, width) -> the same."""
        split = (1, LENGTH, HEADS, WIDTH // HEADS)
        q, k, v = (part.view(split).transpose(1, 2) for part in self.qkv(self.norm1(x)).chunk(3, dim=-1))
        weights = (q @ k.transpose(-2, -1) * (WIDTH // HEADS) ** -0.5 + self.mask).softmax(-1)  # (1, heads, time, time)
        x = x + self.out((weights @ v).transpose(1, 2).reshape(1, LENGTH, WIDTH))
        fed: Tensor = self.feed(self.norm2(x))
        return x + fed


class Gpt(nn.Module):
    """Tokens (1, time) -> logits (1, time, vocabulary)."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.tokens.weight  # tied

    def forward(self, tokens: Tensor) -> Tensor:
        """The logits of each next token."""
        x = self.tokens(tokens) + self.places.weight
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


async def main() -> int:
    """Stream 32 sequences; for how many the logits equal the model's."""
    torch.manual_seed(0)
    model = Gpt().eval()
    sequences = torch.randint(VOCABULARY, (32, 1, LENGTH))
    pipeline = aiotime.Pipeline(model, example=sequences[0], devices=["cpu:0", "cpu:1"], balance="even")
    print(pipeline.plan)
    with torch.inference_mode():
        expected = [model(tokens) for tokens in sequences]
    logits = [pred.output async for pred in pipeline.run(sequences)]
    same = sum(torch.allclose(mine, own) for mine, own in zip(logits, expected, strict=True))
    keys = pipeline.state_dict().keys()
    assert keys == model.state_dict().keys()
    print(f"keys of the state_dict: {len(keys)}, the model's own")
    print(f"sequences with equal logits: {same} of {len(sequences)}")
    return same


if __name__ == "__main__":
    torch.set_num_threads(1)
    aiotime.run(main())
