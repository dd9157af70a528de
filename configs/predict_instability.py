"""Which size breaks at which learning rate? Read off smaller models, then checked on a larger one.

Attention logits are recorded early in training for a ladder of sizes, a line is fitted to
log10(largest logit) over log10(parameters) for each learning rate, and extended to the largest
size, which is held back. Above 1e4 every run of Wortsman et al., 2023 (arXiv 2309.14322, section
3.3) diverged. The second architecture has squared-ReLU attention in place of the softmax.

  python -m balance_jax.main --config=configs/predict_instability.py --workdir=runs/predict

Expected, on two idle CPU cores in three minutes: the largest logit rises with size at every rate;
at rate 0.1 the line from three sizes puts the fourth above 1e4 (1.2e4), and so it is (1.5e4).
"""

import pathlib
import runpy

import ml_collections

HERE = pathlib.Path(__file__).parent


def get_config() -> ml_collections.ConfigDict:
  config = runpy.run_path(str(HERE / "lr_sensitivity.py"))["base"]()
  config.title = "Predicting instability from smaller models"
  config.sizes = ((32, 1, 2), (48, 2, 3), (64, 2, 4), (96, 3, 6))
  config.hold_back_largest = True
  config.train.update(steps=80, chunk=10, eval_every=80, checkpoint_every=80, batch_size=8)
  config.optimizer.total_steps = 300  # the runs stop early in this schedule
  config.probe_step = 80
  config.architectures = ml_collections.ConfigDict(
    {"softmax": {}, "squared_relu": {"model": {"attention": "squared_relu"}}}
  )
  return config
