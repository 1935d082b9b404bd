"""LLaDA in PyTorch, for the PyTorch loops that ours are timed against."""

import numpy as np
import torch
import torch.nn.functional as F

from llada_jax.models.llada import ModelConfig

_LINEAR = ("q_proj", "k_proj", "v_proj", "attn_out", "ff_proj", "up_proj", "ff_out")

# The rotated keys and the values [b, k, l, d] of each layer, of a text of l positions.
Cache = list[tuple[torch.Tensor, torch.Tensor]]


def _rms_norm(x, scale, eps):
    return F.rms_norm(x, (x.shape[-1],), scale, eps)


class TorchLLaDA(torch.nn.Module):
    """LLaDA (models/llada.py) in PyTorch. Copies `params` to float32, with matrices [out, in]."""

    def __init__(self, config: ModelConfig, params):
        super().__init__()
        self.config = config

        def parameter(x):
            return torch.nn.Parameter(torch.from_numpy(np.array(x, np.float32)))

        def stacked(name, kind):
            x = np.asarray(params["blocks"][name][kind])
            return [parameter(layer.T if kind == "kernel" else layer) for layer in x]

        self.wte = parameter(params["wte"]["embedding"])
        columns = {name: stacked(name, "kernel") for name in _LINEAR}
        columns |= {name: stacked(name, "scale") for name in ("attn_norm", "ff_norm")}
        self.blocks = torch.nn.ModuleList(
            torch.nn.ParameterDict({name: column[i] for name, column in columns.items()})
            for i in range(config.n_layers)
        )
        self.ln_f = parameter(params["ln_f"]["scale"])
        self.head = (
            self.wte if config.weight_tying else parameter(np.asarray(params["ff_out"]["kernel"]).T)
        )

    def new_cache(self, batch: int, length: int) -> Cache:
        """An empty cache for texts of `batch` rows and `length` positions."""
        shape = (batch, self.config.n_kv_heads, length, self.config.head_size)
        return [(torch.zeros(shape), torch.zeros(shape)) for _ in self.blocks]

    def forward(self, tokens, mask=None, cache: Cache | None = None, start: int = 0):
        """Returns logits [b, w, v] of tokens [b, w].

        `mask` [b, 1, 1, w] is True at keys that are attended to; None attends to all. With a
        `cache` the tokens are the part of its text that begins at `start`: their keys and values
        are written into the cache, and they attend to all that it has.
        """
        c = self.config
        b, length = tokens.shape
        half = c.head_size // 2
        places = torch.arange(start, start + length)
        angles = places[:, None] * c.rope_theta ** (-torch.arange(half) / half)
        cos, sin = torch.cos(angles), torch.sin(angles)

        def split(y, heads):
            return y.view(b, length, heads, c.head_size).transpose(1, 2)

        def rotate(y):
            first, second = y.chunk(2, -1)
            return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)

        x = F.embedding(tokens, self.wte)
        for i, p in enumerate(self.blocks):
            y = _rms_norm(x, p["attn_norm"], c.rms_norm_eps)
            q = rotate(split(F.linear(y, p["q_proj"]), c.n_heads))
            k = rotate(split(F.linear(y, p["k_proj"]), c.n_kv_heads))
            v = split(F.linear(y, p["v_proj"]), c.n_kv_heads)
            if cache is not None:
                for kept, fresh in zip(cache[i], (k, v), strict=True):
                    kept[:, :, start : start + length] = fresh
                k, v = cache[i]
            y = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, enable_gqa=c.n_heads != c.n_kv_heads
            )
            x = x + F.linear(y.transpose(1, 2).reshape(b, length, -1), p["attn_out"])
            y = _rms_norm(x, p["ff_norm"], c.rms_norm_eps)
            x = x + F.linear(
                F.silu(F.linear(y, p["ff_proj"])) * F.linear(y, p["up_proj"]), p["ff_out"]
            )
        return F.linear(_rms_norm(x, self.ln_f, c.rms_norm_eps), self.head)
