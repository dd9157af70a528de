"""CIFAR-10 at 8/255 as published: CNN-7, short warm-up, IBP (arXiv 2103.17268); 70 or 160 epochs.

  python -m balance_jax.main --config=configs/certified_cifar10_gpu.py:160 --workdir=runs/cifar10 \
    --config.data.path=CIFAR10.npz
  python -m balance_jax.main --config=configs/certified_cifar10_gpu.py:160 --dry_run

Any TFDS image set works in place of the archive: --config.data.source=tfds:cifar10. Published
(five runs, standard / verified error in %): 70 epochs 56.64 / 68.81, vanilla IBP 58.72 / 69.88; 160
epochs 51.72 / 65.58, vanilla 53.80 / 67.01. Has not been run: it takes a GPU.
"""

import pathlib
import runpy

SCHEDULES = {  # epochs, ramp, epochs of decay
  "70": (70, 20, (50, 60)),
  "160": (160, 80, (120, 140)),
}


HERE = pathlib.Path(__file__).parent


def get_config(epochs: str = "160"):
  if epochs not in SCHEDULES:
    raise ValueError(f"epochs is {epochs!r}; allowed: {', '.join(SCHEDULES)}")
  total, ramp, decay = SCHEDULES[epochs]
  digits = runpy.run_path(str(HERE / "certified_digits.py"))
  config = digits["base"]()
  digits["two_ends"](config)
  config.title = f"CIFAR-10 at 8/255, {epochs} epochs"
  config.data.update(source="npz_jpeg", image_shape=(32, 32, 3), normalize="train")
  config.data.train_examples = 45_000  # 1 in 10 is validation
  config.data.augment.update(flip=True, crop_padding=2)
  config.model.update(width=64, dense=512)
  config.train.update(epochs=total, natural_epochs=1, ramp_epochs=ramp, batch_size=128)
  config.train.update(eval_every=10, checkpoint_every=10)
  config.optimizer.update(learning_rate=5e-4, decay_epochs=decay)
  config.evaluation.update(attack_steps=50, batch_size=500)
  config.eps = (8 / 255,)
  config.seeds = (0, 1, 2, 3, 4)
  return config
