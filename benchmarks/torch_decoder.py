"""The PyTorch counterpart of `balance_jax.models.Decoder`, for benchmarks/decoder_step.py.

Same architecture and numbers of parameters; written as one would for speed on a CPU: one matrix
for query, key and value, fused causal attention, precomputed rotary tables, fused AdamW.
"""

import torch
import torch.nn.functional as F
from torch import nn


class TorchDecoder(nn.Module):
  """tokens, int64 (B, T), to logits, float32 (B, T, V)."""

  def __init__(self, vocab_size: int, width: int, depth: int, heads: int, length: int):
    super().__init__()
    self.embedding = nn.Embedding(vocab_size, width)
    self.blocks = nn.ModuleList(TorchBlock(width, heads) for _ in range(depth))
    self.final_norm = nn.LayerNorm(width, eps=1e-6, bias=False)
    self.head = nn.Linear(width, vocab_size, bias=False)
    nn.init.normal_(self.embedding.weight, std=width**-0.5)
    for name, weight in self.named_parameters():
      if weight.ndim == 2 and name != "embedding.weight":
        nn.init.trunc_normal_(weight, std=weight.shape[1] ** -0.5)
    half = width // heads // 2
    angle = torch.outer(torch.arange(length), 10_000.0 ** (-torch.arange(half) / half))
    self.register_buffer("cos", torch.cat([angle.cos()] * 2, dim=-1))
    self.register_buffer("sin", torch.cat([-angle.sin(), angle.sin()], dim=-1))

  def forward(self, tokens: torch.Tensor) -> torch.Tensor:
    x = self.embedding(tokens)
    for block in self.blocks:
      x = block(x, self.cos, self.sin)
    return self.head(self.final_norm(x))


class TorchBlock(nn.Module):
  """Attention and MLP, both after a layer norm and added to the input."""

  def __init__(self, width: int, heads: int):
    super().__init__()
    self.heads = heads
    self.attention_norm = nn.LayerNorm(width, eps=1e-6, bias=False)
    self.qkv = nn.Linear(width, 3 * width, bias=False)
    self.out = nn.Linear(width, width, bias=False)
    self.mlp_norm = nn.LayerNorm(width, eps=1e-6, bias=False)
    self.up = nn.Linear(width, 4 * width, bias=False)
    self.down = nn.Linear(4 * width, width, bias=False)

  def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    batch, length, width = x.shape
    qkv = self.qkv(self.attention_norm(x)).view(batch, length, 3, self.heads, -1)
    query, key, value = qkv.permute(2, 0, 3, 1, 4)
    mixed = F.scaled_dot_product_attention(
      turn(query, cos, sin), turn(key, cos, sin), value, is_causal=True
    )
    x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
    return x + self.down(F.gelu(self.up(self.mlp_norm(x)), approximate="tanh"))


def turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
  """Rotary positions for x (B, H, T, D)."""
  return x * cos + x.roll(x.shape[-1] // 2, dims=-1) * sin


class TorchTrainer:
  """Takes train steps on the windows of a token array that stays in memory."""

  def __init__(self, windows: torch.Tensor, *, batch: int, compiled: bool, **sizes):
    torch.manual_seed(0)
    self.model = TorchDecoder(length=windows.shape[1] - 1, **sizes)
    self.optimizer = torch.optim.AdamW(
      self.model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    self.windows, self.batch = windows, batch
    self.loss = torch.compile(self._loss) if compiled else self._loss

  def _loss(self, rows: torch.Tensor) -> torch.Tensor:
    logits = self.model(rows[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())

  def run(self, steps: int) -> float:
    """Takes steps; returns the last loss."""
    for _ in range(steps):
      rows = self.windows[torch.randint(len(self.windows), (self.batch,))]
      self.optimizer.zero_grad(set_to_none=True)
      loss = self.loss(rows)
      loss.backward()
      nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
      self.optimizer.step()
    return loss.item()
