"""TinyImageNet at 1/255 as published: CNN-7, 80 epochs, IBP (arXiv 2103.17268).

  python -m balance_jax.main --config=configs/certified_tinyimagenet_gpu.py --workdir=runs/tiny
  python -m balance_jax.main --config=configs/certified_tinyimagenet_gpu.py --dry_run

Expects a TFDS image set of 64 x 64 x 3 pixels and 200 classes with the splits train and
validation; the latter is tested on, as published, and the end of train is held out. Published
(standard / verified error in %): 74.29 / 82.36, vanilla IBP 74.68 / 82.84. Has not been run: it
takes a GPU.
"""

import pathlib
import runpy

HERE = pathlib.Path(__file__).parent


def get_config():
  digits = runpy.run_path(str(HERE / "certified_digits.py"))
  config = digits["base"]()
  digits["two_ends"](config)
  config.title = "TinyImageNet at 1/255"
  config.data.update(source="tfds:tiny_imagenet", image_shape=(64, 64, 3), num_classes=200)
  config.data.update(normalize="train", validation_from_train=5000, test_split="validation")
  config.data.train_examples = 95_000  # of 100,000
  config.data.augment.update(flip=True, crop_padding=4)
  config.model.update(width=64, dense=512)
  config.model.convs = ((1, 1), (1, 1), (2, 2), (2, 1), (2, 2))
  config.objective.lambda_0 = 0.2
  config.train.update(epochs=80, natural_epochs=1, ramp_epochs=20, batch_size=128)
  config.train.update(eval_every=10, checkpoint_every=10)
  config.optimizer.update(learning_rate=5e-4, decay_epochs=(60, 70))
  config.evaluation.update(attack_steps=50, batch_size=200)
  config.eps = (1 / 255,)
  config.seeds = (0, 1, 2)
  return config
