"""Certified training on a subset of Fashion-MNIST: CNN-7 with 16 channels, with and without recipe.

  python -m balance_jax.main --config=configs/certified_fashion.py --workdir=runs/fashion

Needs the Debian package dataset-fashion-mnist. Expected (experiments/fast_certified), 13 minutes on
two CPU cores: a verified error of 71 % with batch normalisation alone, 46 % with the recipe.
"""

import pathlib
import runpy

HERE = pathlib.Path(__file__).parent


def get_config():
  digits = runpy.run_path(str(HERE / "certified_digits.py"))
  config = digits["base"]()
  digits["two_ends"](config)
  config.title = "Certified training on Fashion-MNIST"
  config.data.update(source="fashion_mnist", image_shape=(28, 28, 1))
  config.data.update(train_examples=2000, validation_examples=200, test_examples=400)
  config.model.update(width=16, dense=512)
  config.train.update(epochs=20, natural_epochs=1, ramp_epochs=12, batch_size=64)
  config.train.update(eval_every=20, checkpoint_every=10)
  config.optimizer.update(learning_rate=5e-4, decay_epochs=(15, 18))
  config.evaluation.curve = (1.0,)  # each of its radii costs as much as the test itself
  config.seeds = (0, 1, 2)
  return config
