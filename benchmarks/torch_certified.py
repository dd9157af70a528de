"""The PyTorch counterpart of certified training, for benchmarks/certified_step.py and cross-checks.

Written from the formulas of Shi et al., "Fast Certified Robust Training with Short Warmup", 2021
(arXiv 2103.17268), and Zhang et al., 2020 (arXiv 1906.06316), as one would for speed on a CPU:
channels last, bounds as centre and radius, the last layer merged with the margins. The network is
`balance_jax.models.CNN7`; weights in its tree of parameters can be loaded, and `published_step`
gives bounds, regularisers, loss and gradients for them in the same tree. torch_certified_check.py
compares it with NumPy. Needs torch 2.13.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

CNN7 = ((1, 1), (1, 1), (2, 2), (2, 1), (2, 1))
BATCH_NORM_EPS = 1e-5


class Block(nn.Module):
  """Convolution 3x3 or dense layer, and batch normalisation by statistics that are handed out."""

  def __init__(self, affine: nn.Conv2d | nn.Linear):
    super().__init__()
    self.affine = affine
    features = len(affine.weight)
    self.scale, self.shift = nn.Parameter(torch.ones(features)), nn.Parameter(torch.zeros(features))
    self.register_buffer("running_mean", torch.zeros(features))
    self.register_buffer("running_var", torch.ones(features))
    # U(-1/sqrt(n), 1/sqrt(n)) of the framework stays for biases; difference gain 1 for weights.
    nn.init.normal_(affine.weight, std=math.sqrt(2 * math.pi) / affine.weight[0].numel())

  def linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None):
    if weight.ndim == 2:
      return F.linear(flat(x), weight, bias)
    return F.conv2d(x, weight, bias, self.affine.stride, self.affine.padding)

  def transposed(self, x: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Rows x (N, ...) of linear functions of the output to those of the input, one of `shape`."""
    if self.affine.weight.ndim == 2:
      x = x @ self.affine.weight
      return x if len(shape) == 2 else x.unflatten(1, (*shape[2:], shape[1])).movedim(3, 1)
    stride = self.affine.stride
    # Rows and columns at the end that no window of a strided convolution starts from.
    lost = [(size - 1) % step for size, step in zip(shape[2:], stride, strict=True)]
    return F.conv_transpose2d(
      x, self.affine.weight, stride=stride, padding=self.affine.padding, output_padding=lost
    )

  def affine_of_batch(self, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """a, d such that the layer is h -> a h + d on this batch; gradients pass; running update."""
    # On rows of channels, in two passes: several times faster than torch.var_mean on CPUs.
    rows = h.movedim(1, -1).flatten(0, -2)
    mean = rows.mean(0)
    variance = (rows - mean).square().mean(0)
    with torch.no_grad():
      count = len(rows)
      self.running_mean.lerp_(mean, 0.1)
      self.running_var.lerp_(variance * (count / (count - 1)), 0.1)
    a = self.scale * torch.rsqrt(variance + BATCH_NORM_EPS)
    d = self.shift - mean * a
    return per_channel(a, h), per_channel(d, h)


class TorchCNN7(nn.Module):
  """Blocks with ReLU behind, then the classifier; images (B, C, H, W), features in NHWC order."""

  def __init__(self, image=(28, 28, 1), num_classes=10, width=64, dense=512, convs=CNN7):
    super().__init__()
    height, _, channels = image
    blocks = []
    for multiple, stride in convs:
      conv = nn.Conv2d(channels, multiple * width, 3, stride, padding=1)
      blocks.append(Block(conv))
      channels, height = multiple * width, -(-height // stride)
    blocks.append(Block(nn.Linear(channels * height**2, dense)))
    self.blocks = nn.ModuleList(blocks)
    self.head = nn.Linear(dense, num_classes)

  def clean(self, x: torch.Tensor) -> tuple[torch.Tensor, list]:
    """Logits (B, K), and (a, d) of every batch normalisation."""
    norms = []
    for block in self.blocks:
      h = block.linear(x, block.affine.weight, block.affine.bias)
      norms.append(block.affine_of_batch(h))
      x = F.relu(torch.addcmul(norms[-1][1], h, norms[-1][0]))
    return self.head(x), norms

  def bounds(self, center: torch.Tensor, radius: torch.Tensor, norms: list) -> tuple:
    """IBP: centre and radius before the classifier, and (lower, upper) before every ReLU."""
    preacts = []
    for block, (a, d) in zip(self.blocks, norms, strict=True):
      weight = block.affine.weight
      center = torch.addcmul(d, block.linear(center, weight, block.affine.bias), a)
      radius = block.linear(radius, weight.abs()) * a.abs()
      preacts.append((center - radius, center + radius))
      lower, upper = (F.relu(end) for end in preacts[-1])
      center, radius = (lower + upper) / 2, (upper - lower) / 2
    return center, radius, preacts

  def margin_rows(self, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights (B, K - 1, d) and biases (B, K - 1) of z_y - z_j, j != y ascending."""
    others = torch.arange(len(self.head.bias) - 1)[None]
    others = others + (others >= labels[:, None])
    weight, bias = self.head.weight, self.head.bias
    return weight[labels, None] - weight[others], bias[labels, None] - bias[others]


def flat(x: torch.Tensor) -> torch.Tensor:
  """(B, C, H, W) to (B, H W C); a view where channels are last."""
  return x if x.ndim == 2 else x.permute(0, 2, 3, 1).flatten(1)


def per_channel(a: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
  return a.view(1, -1, *[1] * (like.ndim - 2))


def ibp_margins(model: TorchCNN7, center, radius, labels) -> torch.Tensor:
  """Lower bounds (B, K - 1) of the margins, the last layer elided."""
  weight, bias = model.margin_rows(labels)
  return (weight @ center[..., None] - weight.abs() @ radius[..., None])[..., 0] + bias


def crown_margins(model: TorchCNN7, center, radius, norms, preacts, labels) -> torch.Tensor:
  """The same by one backward pass through the given ReLU bounds, adaptive lower slopes."""
  rows, bias = model.margin_rows(labels)
  batch, specs = bias.shape
  inputs = [center.shape] + [lower.shape for lower, _ in preacts[:-1]]
  for block, (a, d), (lower, upper), shape in reversed(
    list(zip(model.blocks, norms, preacts, inputs, strict=True))
  ):
    # Rows are (B, S, ...) at the ReLU, whose lines differ by example, and (B S, ...) below.
    rows = rows.view(batch, specs, *lower.shape[1:])
    low_slope, high_slope, high_offset = relu_lines(lower, upper)
    positive, negative = rows.clamp(min=0), rows.clamp(max=0)
    bias = bias + inner(negative, high_offset)
    rows = positive * low_slope[:, None] + negative * high_slope[:, None]
    a, d = a.flatten(), d.flatten()
    total = rows if rows.ndim == 3 else rows.sum((3, 4))
    bias = bias + total @ (d + a * block.affine.bias)
    rows = block.transposed(rows.flatten(0, 1) * per_channel(a, lower), shape)
  rows = rows.view(batch, specs, *center.shape[1:])
  return bias + inner(rows, center) - inner(rows.abs(), radius)


def inner(rows: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
  """Sums of rows (B, S, ...) times x (B, ...): (B, S)."""
  return (rows.movedim(2, -1).flatten(2) @ x.movedim(1, -1).flatten(1)[..., None])[..., 0]


def relu_lines(lower, upper) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
  """Slope of the line below the ReLU, and slope and offset of the one above."""
  unstable = (lower < 0) & (upper > 0)
  active = (lower >= 0).to(lower.dtype)
  width = torch.where(unstable, upper - lower, 1.0)
  high_slope = torch.where(unstable, upper / width, active)
  high_offset = torch.where(unstable, -lower * upper / width, 0.0)
  low_slope = torch.where(unstable, (upper > -lower).to(lower.dtype), active)
  return low_slope, high_slope, high_offset


def regularizers(radius, preacts, tau=0.5) -> tuple[torch.Tensor, torch.Tensor]:
  """L_tight and L_relu of the warm-up."""
  tight = balance = torch.zeros((), dtype=radius.dtype)
  for lower, upper in preacts:
    center, mean_radius = (lower + upper) / 2, ((upper - lower) / 2).mean()
    tight = tight + F.relu(tau - radius.mean() / mean_radius.clamp(min=1e-12))
    active, inactive = (lower > 0).to(center.dtype), (upper < 0).to(center.dtype)
    if not (active.any() and inactive.any()):
      continue
    delta = (center - center.mean()).square()
    alpha = (center * active).sum() / -(center * inactive).sum()
    beta = (delta * active).sum() / (delta * inactive).sum()
    for ratio in (alpha, beta):
      balance = balance + F.relu(tau - torch.minimum(ratio, 1 / ratio.clamp(min=1e-12)))
  return tight / (tau * len(preacts)), balance / (tau * len(preacts))


def margin_cross_entropy(margins: torch.Tensor) -> torch.Tensor:
  return torch.logsumexp(F.pad(-margins, (1, 0)), dim=1).mean()


def published_loss(model: TorchCNN7, x, labels, eps, *, lam=0.0, mix=0.0, tau=0.5) -> dict:
  """Everything of one training step on pixels x (B, C, H, W) in [0, 1].

  `mix` is the weight of the CROWN bound; at 0 its backward pass is left out. "loss" is the cross
  entropy of the mixed margins plus lam times both regularisers.
  """
  logits, norms = model.clean(x)
  low, high = (x - eps).clamp(min=0), (x + eps).clamp(max=1)
  center, radius = (low + high) / 2, (high - low) / 2
  last_center, last_radius, preacts = model.bounds(center, radius, norms)
  margins = {"ibp_margins": ibp_margins(model, last_center, last_radius, labels)}
  mixed = margins["ibp_margins"]
  if mix >= 1e-5:
    margins["crown_margins"] = crown_margins(model, center, radius, norms, preacts, labels)
    mixed = mix * margins["crown_margins"] + (1 - mix) * mixed
  tight, balance = regularizers(radius, preacts, tau) if lam else torch.zeros(2, dtype=x.dtype)
  loss = margin_cross_entropy(mixed) + lam * (tight + balance)
  values = {"logits": logits, "tight": tight, "balance": balance, "loss": loss, "preacts": preacts}
  return values | margins


class TorchCertifiedTrainer:
  """Takes training steps: published loss, global gradient norm clipped at 10, Adam."""

  def __init__(self, *, learning_rate=5e-4, compiled=False, **sizes):
    torch.manual_seed(0)
    self.model = TorchCNN7(**sizes).to(memory_format=torch.channels_last)
    self.optimizer = torch.optim.Adam(self.model.parameters(), lr=learning_rate, fused=True)
    self.loss = torch.compile(published_loss) if compiled else published_loss

  def step(self, images: np.ndarray, labels: np.ndarray, eps: float, **options) -> float:
    """One step on images (B, H, W, C); options are those of `published_loss`."""
    x = torch.from_numpy(images).permute(0, 3, 1, 2)
    self.optimizer.zero_grad(set_to_none=True)
    loss = self.loss(self.model, x, torch.from_numpy(labels), eps, **options)["loss"]
    loss.backward()
    nn.utils.clip_grad_norm_(self.model.parameters(), 10.0)
    self.optimizer.step()
    return loss.item()

  def clean_step(self, images: np.ndarray, labels: np.ndarray) -> float:
    """The same step on the cross entropy of the clean logits."""
    x = torch.from_numpy(images).permute(0, 3, 1, 2)
    self.optimizer.zero_grad(set_to_none=True)
    loss = F.cross_entropy(self.model.clean(x)[0], torch.from_numpy(labels))
    loss.backward()
    nn.utils.clip_grad_norm_(self.model.parameters(), 10.0)
    self.optimizer.step()
    return loss.item()


def load_flax(params: dict, image: tuple[int, int, int], convs=CNN7, dtype=torch.float64):
  """The model with the parameters of `balance_jax.models.CNN7`."""
  width = np.shape(params["conv_0"]["bias"])[0] // convs[0][0]
  num_classes, dense = (np.shape(params[name]["bias"])[0] for name in ("head", "dense"))
  model = TorchCNN7(image, num_classes, width, dense, convs).to(dtype)
  with torch.no_grad():
    for parameter, path, axes in flax_layout(model):
      value = np.asarray(params[path[0]][path[1]])
      parameter.copy_(torch.tensor(value.transpose(axes)))
  return model.to(memory_format=torch.channels_last)


def flax_layout(model: TorchCNN7) -> list:
  """(parameter, (module, name), axes that transpose the flax array) of every parameter."""
  layout = []

  def add_affine(name, layer):
    axes = (1, 0) if layer.weight.ndim == 2 else (3, 2, 0, 1)
    layout.extend([(layer.weight, (name, "kernel"), axes), (layer.bias, (name, "bias"), (0,))])

  for i, block in enumerate(model.blocks):
    name = "dense" if i == len(model.blocks) - 1 else f"conv_{i}"
    add_affine(name, block.affine)
    for parameter, kind in ((block.scale, "scale"), (block.shift, "bias")):
      layout.append((parameter, (f"{name}_norm", kind), (0,)))
  add_affine("head", model.head)
  return layout


def published_step(params: dict, images, labels, eps, *, convs=CNN7, dtype="float64", **options):
  """`published_loss` for given weights, with its gradient.

  Args:
    params: the "params" of `balance_jax.models.CNN7` without normalisation of pixels.
    images: float (B, H, W, C) in [0, 1].
    labels: int (B,).
    eps: radius.
    convs: those of the model.
    dtype: of the computation, "float64" or "float32".
    **options: lam, mix and tau of `published_loss`.

  Returns:
    Dict of NumPy arrays: "logits", "ibp_margins", with mix also "crown_margins", "tight", "balance"
    (0 with lam 0), "loss", "preacts" as a list of (lower, upper), channels last, and "grads", of
    "loss", in the tree of params.
  """
  dtype = getattr(torch, dtype)
  model = load_flax(params, np.shape(images)[1:], convs, dtype)
  x = torch.tensor(np.asarray(images), dtype=dtype).permute(0, 3, 1, 2)
  result = published_loss(model, x, torch.tensor(np.asarray(labels)).long(), eps, **options)
  result["loss"].backward()
  grads = {}
  for parameter, (module, name), axes in flax_layout(model):
    grad = parameter.grad.numpy().transpose(np.argsort(axes))
    grads.setdefault(module, {})[name] = grad
  preacts = [tuple(channels_last(end) for end in layer) for layer in result.pop("preacts")]
  values = {name: value.detach().numpy() for name, value in result.items()}
  return {**values, "preacts": preacts, "grads": grads}


def channels_last(x: torch.Tensor) -> np.ndarray:
  return x.detach().movedim(1, -1).numpy()
