"""Compares torch_certified.py with dense matrices in NumPy, sampled points and finite differences.

Bounds here are lower and upper ends instead of centre and radius, CROWN goes neuron by neuron, and
batch normalisation is folded into the matrices.

Command: python benchmarks/torch_certified_check.py
"""

import pathlib
import sys

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from torch_certified import BATCH_NORM_EPS, published_step


def dense_matrix(kernel, size: int, stride: int) -> tuple[np.ndarray, int]:
  """Matrix (h w in, h' w' out) of a padded 3x3 convolution, by loops; and h' = w'."""
  height, width, channels, features = kernel.shape
  new = -(-size // stride)
  matrix = np.zeros((size, size, channels, new, new, features))
  for i, j, di, dj in np.ndindex(new, new, height, width):
    row, column = i * stride + di - 1, j * stride + dj - 1
    if 0 <= row < size and 0 <= column < size:
      matrix[row, column, :, i, j, :] = kernel[di, dj]
  return matrix.reshape(size * size * channels, -1), new


def numpy_layers(params, x, size, convs):
  """Per block a matrix and a bias, batch normalisation of the batch x included; then the head."""
  layers = []
  for i in range(len(convs) + 1):
    name = f"conv_{i}" if i < len(convs) else "dense"
    weight, bias, norm = params[name]["kernel"], params[name]["bias"], params[f"{name}_norm"]
    copies = 1
    if weight.ndim == 4:
      weight, size = dense_matrix(weight, size, convs[i][1])
      copies = size * size
    h = (x @ weight + np.tile(bias, copies)).reshape(-1, len(bias))
    a = norm["scale"] / np.sqrt(h.var(axis=0) + BATCH_NORM_EPS)
    d = norm["bias"] + a * (bias - h.mean(axis=0))
    layers.append((weight * np.tile(a, copies), np.tile(d, copies)))
    x = np.maximum(x @ layers[-1][0] + layers[-1][1], 0)
  return layers, (params["head"]["kernel"], params["head"]["bias"])


def numpy_step(params, images, labels, eps, *, convs, lam, mix, tau=0.5) -> dict:
  """`published_loss` with dense matrices, in lower and upper ends instead of centre and radius."""
  x = images.reshape(len(images), -1)
  layers, (head, head_bias) = numpy_layers(params, x, images.shape[1], convs)
  low, high = np.maximum(x - eps, 0), np.minimum(x + eps, 1)
  ends, preacts = (low, high), []
  for weight, bias in layers:
    up, down = np.maximum(weight, 0), np.minimum(weight, 0)
    lower = ends[0] @ up + ends[1] @ down + bias
    upper = ends[1] @ up + ends[0] @ down + bias
    preacts.append((lower, upper))
    ends = np.maximum(lower, 0), np.maximum(upper, 0)
  ibp, crown = [], []
  for i, label in enumerate(labels):
    spec = np.delete(np.eye(len(head_bias))[label] - np.eye(len(head_bias)), label, axis=0)
    rows, bias = spec @ head.T, spec @ head_bias
    ibp.append(np.maximum(rows, 0) @ ends[0][i] + np.minimum(rows, 0) @ ends[1][i] + bias)
    for (weight, shift), (lower, upper) in zip(layers[::-1], preacts[::-1], strict=True):
      for column, (low_end, high_end) in enumerate(zip(lower[i], upper[i], strict=True)):
        below, above, offset = relu_lines(low_end, high_end)
        positive = rows[:, column] > 0
        bias = bias + np.where(positive, 0.0, rows[:, column] * offset)
        rows[:, column] *= np.where(positive, below, above)
      rows, bias = rows @ weight.T, bias + rows @ shift
    crown.append(np.maximum(rows, 0) @ low[i] + np.minimum(rows, 0) @ high[i] + bias)
  ibp, crown = np.array(ibp), np.array(crown)
  tight = balance = 0.0
  for lower, upper in preacts:
    center = (lower + upper) / 2
    tight += max(0.0, tau - (high - low).mean() / (upper - lower).mean())
    active, inactive = center[lower > 0], center[upper < 0]
    if active.size and inactive.size:
      mean = center.mean()
      ratios = (
        active.sum() / -inactive.sum(),
        ((active - mean) ** 2).sum() / ((inactive - mean) ** 2).sum(),
      )
      balance += sum(max(0.0, tau - min(t, 1 / t)) for t in ratios)
  tight, balance = tight / (tau * len(preacts)), balance / (tau * len(preacts))
  margins = mix * crown + (1 - mix) * ibp
  loss = np.log1p(np.exp(-margins).sum(axis=1)).mean() + lam * (tight + balance)
  margins = {"ibp_margins": ibp, "crown_margins": crown}
  return {**margins, "tight": tight, "balance": balance, "loss": loss}


def relu_lines(low: float, high: float) -> tuple[float, float, float]:
  """Slope of the line below the ReLU; slope and offset of the one above."""
  if low >= 0:
    return 1.0, 1.0, 0.0
  if high <= 0:
    return 0.0, 0.0, 0.0
  return float(high > -low), high / (high - low), -low * high / (high - low)


def random_params(rng, channels, num_classes, width, dense, convs, size) -> dict:
  """A tree like that of `balance_jax.models.CNN7`; scales of either sign, shifts not zero."""
  shapes = {}
  for i, (multiple, stride) in enumerate(convs):
    shapes[f"conv_{i}"] = (3, 3, channels, multiple * width)
    channels, size = multiple * width, -(-size // stride)
  shapes |= {"dense": (size * size * channels, dense), "head": (dense, num_classes)}
  params = {}
  for name, shape in shapes.items():
    std = np.prod(shape[:-1]) ** -0.5
    params[name] = {"kernel": rng.normal(0, std, shape), "bias": rng.normal(0, 0.1, shape[-1])}
    if name != "head":
      norm = {"scale": rng.normal(0.5, 0.5, shape[-1]), "bias": rng.normal(0, 0.5, shape[-1])}
      params[f"{name}_norm"] = norm
  return params


def check() -> None:
  """Raises unless bounds, regularisers and gradients are those of `numpy_step`, and sound."""
  rng = np.random.default_rng(0)
  # An odd size, so that the stride of the second convolution leaves a row out.
  convs, size, classes = ((1, 1), (2, 2), (2, 2)), 6, 4
  params = random_params(rng, 2, classes, width=2, dense=7, convs=convs, size=size)
  images, labels = rng.uniform(0, 1, (5, size, size, 2)), np.array([0, 3, 1, 2, 3])
  options = {"eps": 0.02, "convs": convs, "lam": 0.7, "mix": 0.4}
  found = published_step(params, images, labels, **options)
  want = numpy_step(params, images, labels, **options)
  for name, value in want.items():
    np.testing.assert_allclose(found[name], value, rtol=1e-9, atol=1e-12, err_msg=name)
    print(f"{name}: equal; {np.ravel(value)[:4].round(4)}")

  def loss():
    return numpy_step(params, images, labels, **options)["loss"]

  print(f"gradient: within {worst_slope(params, found['grads'], loss, rng):.0e} of differences")
  best = sampled_margins(params, images, labels, options["eps"], convs, rng)
  for name in ("ibp_margins", "crown_margins"):
    gap = best - found[name]
    assert gap.min() >= -1e-9, (name, gap.min())
    print(f"{name}: sound on sampled points, gap {gap.min():.4f} to {gap.max():.4f}")


def worst_slope(params, grads, loss, rng, entries=6, step=1e-6) -> float:
  """Largest difference of a few entries of each gradient; raises above 1e-6."""
  worst = 0.0
  for module, arrays in params.items():
    for name, array in arrays.items():
      for flat_index in rng.choice(array.size, min(entries, array.size), replace=False):
        index = np.unravel_index(flat_index, array.shape)
        kept, ends = array[index], []
        for sign in (1, -1):
          array[index] = kept + sign * step
          ends.append(loss())
        array[index] = kept
        difference = abs((ends[0] - ends[1]) / (2 * step) - grads[module][name][index])
        assert difference < 1e-6, (module, name, index, difference)
        worst = max(worst, difference)
  return worst


def sampled_margins(params, images, labels, eps, convs, rng, samples=2000) -> np.ndarray:
  """Lowest margins (B, K - 1) at random corners and points of the box."""
  x = images.reshape(len(images), -1)
  layers, (head, head_bias) = numpy_layers(params, x, images.shape[1], convs)
  offsets = rng.choice([-eps, eps], (samples, *x.shape))
  offsets[::2] = rng.uniform(-eps, eps, offsets[::2].shape)
  points = np.clip(x + offsets, 0, 1)
  for weight, bias in layers:
    points = np.maximum(points @ weight + bias, 0)
  logits = points @ head + head_bias
  lowest = [
    np.delete(logits[:, i, [label]] - logits[:, i], label, axis=1).min(axis=0)
    for i, label in enumerate(labels)
  ]
  return np.array(lowest)


if __name__ == "__main__":
  check()
