"""Will a model of yours break at a larger learning rate? Measured on a network of your own.

Any flax.linen network: here one with flax's attention. All learning rates and seeds train in one
compiled program; the sensitivity is one number, the probes say what goes wrong.

  python examples/will_it_break.py
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from balance_jax import stability
from balance_jax.losses import cross_entropy_with_z_loss


class Network(nn.Module):
  """Next-token logits (B, T, 8) of tokens int (B, T)."""

  normalize_qk: bool = False

  @nn.compact
  def __call__(self, tokens):
    x = nn.Embed(8, 32)(tokens)
    attend = nn.MultiHeadDotProductAttention(2, normalize_qk=self.normalize_qk, name="attention")
    x = x + attend(nn.LayerNorm()(x), mask=nn.make_causal_mask(tokens))
    return nn.Dense(8)(nn.LayerNorm()(x))


def trainer(model, rows, steps: int):
  """train(learning_rate, key) -> (final loss, loss at the start, parameters)."""

  def loss(params):
    logits = model.apply(params, rows[:, :-1])
    return cross_entropy_with_z_loss(logits, rows[:, 1:])[0].mean()

  def train(learning_rate, key):
    params = model.init(key, rows[:1, :-1])
    schedule = stability.warmup_cosine(1.0, 0.1 * steps, steps, end=0.0)
    adam = stability.adamw(learning_rate, schedule)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), adam)

    def step(carry, _):
      params, opt_state = carry
      updates, opt_state = optimizer.update(jax.grad(loss)(params), opt_state, params)
      return (optax.apply_updates(params, updates), opt_state), None

    after, _ = jax.lax.scan(step, (params, optimizer.init(params)), None, length=steps)
    return loss(after[0]), loss(params), after[0]

  return train


def main(steps: int = 150) -> dict[bool, dict]:
  """Trains with and without qk-norm; returns S and the largest logit at the highest rate."""
  rng = np.random.default_rng(0)
  rows = jnp.asarray(np.cumsum(rng.integers(0, 3, size=(16, 17)), axis=1) % 8)
  rates = stability.lr_grid(1e-3, 1.0)
  keys = jax.random.split(jax.random.key(0), 2)
  found = {}
  for normalize_qk in (False, True):
    model = Network(normalize_qk)
    final, start, params = stability.sweep_learning_rates(trainer(model, rows, steps), rates, keys)
    worst = jax.tree.map(lambda x: x[-1, 0], params)  # highest rate, first seed
    stats = stability.probe_attention(model, worst, rows[:, :-1])["attention"]
    report = stability.StabilityReport(
      max_logit=float(stats.max_logit.max()), attention_entropy=float(stats.entropy.mean(0).min())
    )
    found[normalize_qk] = {
      "sensitivity": float(stability.lr_sensitivity(final.T, start[0]).mean()),
      "report": report,
    }
  return found


if __name__ == "__main__":
  for normalize_qk, result in main().items():
    print(f"qk-norm {normalize_qk}: sensitivity {result['sensitivity']:.3f}")
    print(result["report"].table(), "\n")
