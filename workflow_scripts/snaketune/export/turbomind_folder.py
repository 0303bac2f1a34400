"""Reads a TurboMind workspace back: raw 16-bit files in the engine's layout, as matrices and in Hugging Face's layout.

Written from the engine's side, without lmdeploy, so that `turbomind_proof.py` can check lmdeploy's converter with it.
A weight is stored (in, out), the transpose of a linear layer's. A file of rank r holds that rank's share: columns of
`w_qkv`, `w1`, `w3`, `output` and the embedding, rows of `wo` and `w2`. A rank's `w_qkv` is its q heads, then its k
heads, then its v heads. The rotary kernel rotates adjacent dimensions, so dimension i of a q or k head is stored next
to i + size / 2. A mixture has a folder of `w1`, `w2` and `w3` for each expert, and a router that every rank keeps whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from snaketune.common.cli import UserError
from snaketune.export.turbomind_config import MIXTURES, WEIGHTS, dense_size
from snaketune.serving.lmdeploy_engines import architecture_of

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class FeedForward:
    """A feed-forward block or one expert: `gate` and `up` (hidden, inner), `down` (inner, hidden), padding included."""

    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor


@dataclass(frozen=True)
class Layer:
    """One layer in the engine's layout, all ranks joined; matrices are (in, out).

    Attributes:
        q, k, v: (hidden, heads x size), q and k with rotary pairs adjacent; k and v with all copies.
        o: (heads x size, hidden).
        dense: The feed-forward block of every token: the only one, or a mixture's shared expert; None without.
        router: (hidden, experts), if the layer is a mixture; see `TurboMindFolder.expert`.
        shared_gate: (hidden, 1) of the shared expert, if the model has one.
        attention_norm, ffn_norm: (hidden,).
        biases: Of q, k, v and o, if the model has them.
        q_norm, k_norm: (size,) with rotary pairs adjacent, if the model has them.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    o: torch.Tensor
    dense: FeedForward | None
    router: torch.Tensor | None
    shared_gate: torch.Tensor | None
    attention_norm: torch.Tensor
    ffn_norm: torch.Tensor
    biases: dict[str, torch.Tensor]
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None


class TurboMindFolder:
    """A workspace's config and weights.

    Args:
        folder: The workspace, or its folder of weights.

    Raises:
        UserError: The folder is not a workspace with 16-bit weights.
    """

    def __init__(self, folder: Path):
        self.weights = folder / WEIGHTS if (folder / WEIGHTS).is_dir() else folder
        path = self.weights / "config.yaml"
        if not path.is_file():
            raise UserError(
                f"{folder} is not a TurboMind workspace", expected=f"a file {WEIGHTS}/config.yaml"
            )
        self.config: dict[str, Any] = yaml.safe_load(path.read_text())
        model = self.config["model_config"]
        if model["weight_type"] not in DTYPES:
            raise UserError(
                f"{folder} has quantised weights, which cannot be compared exactly",
                found=model["weight_type"],
                expected=" or ".join(DTYPES),
                fix="set parity.enabled: false for quantised models",
            )
        self.dtype = DTYPES[model["weight_type"]]
        self.tp: int = model["attn_tp_size"]
        self.heads, self.kv_heads, self.head_size = (
            model["head_num"],
            model["kv_head_num"],
            model["size_per_head"],
        )
        self.hidden, self.vocab, self.layers = (
            model["hidden_units"],
            model["vocab_size"],
            model["num_layer"],
        )
        self.session_len: int = model["session_len"]
        self.inner_sizes: list[int] = model["inter_size"]
        self.experts: list[int] = list(model["expert_num"]) or [0] * self.layers
        self.expert_size: int = model["expert_inter_size"]
        self.read: set[str] = set()

    def layer(self, number: int) -> Layer:
        """Returns layer `number`, memory-mapped unless shares have to be joined.

        Raises:
            UserError: A file is missing or its size does not match the config.
        """
        prefix = f"layers.{number}"
        q, k, v = self._qkv(f"{prefix}.attention.w_qkv", "weight", self.hidden)
        size = self.heads * self.head_size
        inner, experts = self.inner_sizes[number], self.experts[number]
        biases = {}
        if self.weights.joinpath(f"{prefix}.attention.w_qkv.0.bias").is_file():
            rows = self._qkv(f"{prefix}.attention.w_qkv", "bias", 1)
            biases = {letter: row[0] for letter, row in zip("qkv", rows, strict=True)}
            biases["o"] = self._copies(f"{prefix}.attention.wo", "bias", self.hidden)
        return Layer(
            q=q,
            k=k,
            v=v,
            o=self._joined(f"{prefix}.attention.wo", size, self.hidden, dim=0),
            dense=self._feed_forward(f"{prefix}.feed_forward", inner) if inner else None,
            router=self._file(f"{prefix}.moe_ffn.gate.weight", self.hidden, experts) if experts else None,
            shared_gate=self._optional(f"{prefix}.moe_ffn.shared_gate.weight", self.hidden, 1),
            attention_norm=self._file(f"{prefix}.attention_norm.weight", self.hidden),
            ffn_norm=self._file(f"{prefix}.ffn_norm.weight", self.hidden),
            biases=biases,
            q_norm=self._optional(f"{prefix}.attention.q_norm", self.head_size),
            k_norm=self._optional(f"{prefix}.attention.k_norm", self.head_size),
        )

    def expert(self, number: int, expert: int) -> FeedForward:
        """Returns an expert of layer `number`; a caller that keeps one at a time needs little memory.

        Raises:
            UserError: A file is missing or its size does not match the config.
        """
        return self._feed_forward(f"layers.{number}.moe_ffn.experts.{expert}", self.expert_size)

    def embedding(self) -> torch.Tensor:
        """Returns the embedding (rows, hidden); rows past the vocabulary are padding."""
        return self._joined("tok_embeddings", self._rows, self.hidden, dim=1)

    def output(self) -> torch.Tensor:
        """Returns the head (hidden, rows); columns past the vocabulary are padding."""
        return self._joined("output", self.hidden, self._rows, dim=1)

    def norm(self) -> torch.Tensor:
        """Returns the weights of the last norm (hidden,)."""
        return self._file("norm.weight", self.hidden)

    def hf_tensors(self, hf_config: dict[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields every weight with Hugging Face's name and layout, layer by layer.

        Args:
            hf_config: The parsed config.json. The engine's sizes may be padded to a multiple of tp, and with more GPUs
                than KV heads, the engine has copies.

        Raises:
            UserError: Padding is not zero, or copies of a KV head differ.
        """
        kv_heads = hf_config.get("num_key_value_heads") or hf_config["num_attention_heads"]
        mixture = MIXTURES.get(architecture_of(hf_config))
        yield "model.embed_tokens.weight", self._unpadded("tok_embeddings", self.embedding(), 0, self.vocab)
        for number in range(self.layers):
            layer, name = self.layer(number), f"model.layers.{number}"
            yield f"{name}.input_layernorm.weight", layer.attention_norm
            yield from self._hf_attention(f"{name}.self_attn", layer, kv_heads)
            yield f"{name}.post_attention_layernorm.weight", layer.ffn_norm
            if layer.dense is not None:
                block = f"{name}.mlp" if mixture is None else f"{name}.{mixture.block}.shared_expert"
                yield from self._hf_feed_forward(block, layer.dense, dense_size(hf_config))
            if layer.router is None or mixture is None:
                continue
            block = f"{name}.{mixture.block}"
            yield f"{block}.gate.weight", layer.router.T
            if layer.shared_gate is not None:
                yield f"{block}.shared_expert_gate.weight", layer.shared_gate.T
            for each in range(self.experts[number]):
                expert, size = self.expert(number, each), hf_config[mixture.inner_size]
                yield from self._hf_feed_forward(f"{block}.experts.{each}", expert, size, mixture.parts)
        yield "model.norm.weight", self.norm()
        yield "lm_head.weight", self._unpadded("output", self.output(), 1, self.vocab).T

    def unread(self) -> list[str]:
        """Returns the weight files that have not been read."""
        names = {path.name for path in self.weights.iterdir()} - {"config.yaml"}
        return sorted(names - self.read)

    @property
    def _rows(self) -> int:
        return -(-self.vocab // self.tp) * self.tp

    def _hf_attention(self, name: str, layer: Layer, kv_heads: int) -> Iterator[tuple[str, torch.Tensor]]:
        for letter in "qkvo":
            matrix, bias = getattr(layer, letter), layer.biases.get(letter)
            if letter in "qk":
                matrix, bias = self._apart(matrix), None if bias is None else self._apart(bias)
            if letter in "kv":
                matrix, bias = (self._once(f"{name} {letter}", each, kv_heads) for each in (matrix, bias))
            yield f"{name}.{letter}_proj.weight", matrix.T
            if bias is not None:
                yield f"{name}.{letter}_proj.bias", bias
        for letter in "qk":
            norm = getattr(layer, f"{letter}_norm")
            if norm is not None:
                yield f"{name}.{letter}_norm.weight", self._apart(norm)

    def _hf_feed_forward(
        self,
        name: str,
        block: FeedForward,
        size: int,
        parts: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
    ) -> Iterator[tuple[str, torch.Tensor]]:
        for part, matrix, dim in zip(parts, (block.gate, block.up, block.down), (1, 1, 0), strict=True):
            yield f"{name}.{part}.weight", self._unpadded(f"{name} {part}", matrix, dim, size).T

    def _feed_forward(self, prefix: str, inner: int) -> FeedForward:
        return FeedForward(
            gate=self._joined(f"{prefix}.w1", self.hidden, inner, dim=1),
            up=self._joined(f"{prefix}.w3", self.hidden, inner, dim=1),
            down=self._joined(f"{prefix}.w2", inner, self.hidden, dim=0),
        )

    def _qkv(self, name: str, kind: str, rows: int) -> list[torch.Tensor]:
        size = self.head_size
        widths = [self.heads // self.tp * size, *[self.kv_heads // self.tp * size] * 2]
        ranks = [
            self._file(f"{name}.{rank}.{kind}", rows, sum(widths)).split(widths, dim=1)
            for rank in range(self.tp)
        ]
        return [torch.cat(parts, dim=1) if self.tp > 1 else parts[0] for parts in zip(*ranks, strict=True)]

    def _joined(self, name: str, rows: int, columns: int, dim: int) -> torch.Tensor:
        shape = [rows, columns]
        shape[dim] //= self.tp
        parts = [self._file(f"{name}.{rank}.weight", *shape) for rank in range(self.tp)]
        return torch.cat(parts, dim=dim) if self.tp > 1 else parts[0]

    def _copies(self, name: str, kind: str, size: int) -> torch.Tensor:
        first, *others = (self._file(f"{name}.{rank}.{kind}", size) for rank in range(self.tp))
        if not all(same_bits(first, other) for other in others):
            raise UserError(f"the ranks' copies of {name}.{kind} differ", fix="convert again")
        return first

    def _optional(self, name: str, *shape: int) -> torch.Tensor | None:
        return self._file(name, *shape) if (self.weights / name).is_file() else None

    def _file(self, name: str, *shape: int) -> torch.Tensor:
        path, expected = self.weights / name, 2 * int(np.prod(shape))
        found = path.stat().st_size if path.is_file() else None
        if found != expected:
            raise UserError(
                f"TurboMind's {name} does not match config.yaml",
                found="no such file" if found is None else f"{found} bytes",
                expected=f"{expected} bytes, {' x '.join(map(str, shape))} {self.dtype}",
                fix="convert again",
            )
        self.read.add(name)
        data = np.memmap(path, dtype=np.int16, mode="c")  # private pages: torch needs writable memory
        return torch.from_numpy(data).view(self.dtype).view(shape)

    def _apart(self, matrix: torch.Tensor) -> torch.Tensor:
        """Moves rotary pairs in the last axis from adjacent places back to i and i + size / 2."""
        pairs = matrix.reshape(*matrix.shape[:-1], -1, self.head_size // 2, 2)
        return pairs.transpose(-1, -2).reshape(matrix.shape)

    def _once(self, name: str, matrix: torch.Tensor | None, kv_heads: int) -> torch.Tensor | None:
        """Returns one copy of each KV head."""
        if matrix is None or kv_heads == self.kv_heads:
            return matrix
        copies = matrix.reshape(*matrix.shape[:-1], kv_heads, self.kv_heads // kv_heads, self.head_size)
        first = copies[..., :1, :]
        if not same_bits(copies, first.expand_as(copies)):
            raise UserError(f"the copies of a KV head differ in {name}", fix="convert again")
        return first.reshape(*matrix.shape[:-1], -1)

    def _unpadded(self, name: str, matrix: torch.Tensor, dim: int, size: int) -> torch.Tensor:
        padding = matrix.narrow(dim, size, matrix.shape[dim] - size)
        if padding.count_nonzero():
            raise UserError(f"the padding of {name} is not zero", fix="convert again")
        return matrix.narrow(dim, 0, size)


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """True if two 16-bit tensors of the same shape have the same bits. NaN equals itself, -0 differs from 0."""
    return torch.equal(one.contiguous().view(torch.int16), other.contiguous().view(torch.int16))
