"""Learning-rate sensitivity on one GPU: widths 256 to 1024, with and without qk-norm.

The middle of the range between the laptop's models and those of Wortsman et al., 2023 (arXiv
2309.14322), on the source of Python's standard library, as bytes.

  python -m balance_jax.main --config=configs/lr_sensitivity_gpu.py --workdir=runs/gpu
  python -m balance_jax.main --config=configs/lr_sensitivity_gpu.py --dry_run

Has not been run. `--dry_run` gives parameters, operations and memory of every arm.
"""

import pathlib
import runpy

import ml_collections

HERE = pathlib.Path(__file__).parent


def get_config() -> ml_collections.ConfigDict:
  config = runpy.run_path(str(HERE / "lr_sensitivity.py"))["base"]()
  config.title = "Learning-rate sensitivity, widths 256 to 1024"
  config.data.source = "python_library"
  config.data.window = 512
  config.sizes = ((256, 3, 4), (512, 6, 8), (1024, 12, 16))  # heads of 64
  config.mup.base_width = 256
  config.model.dtype = "bfloat16"
  config.train.update(
    steps=10_000,
    batch_size=64,
    micro_batches=4,
    chunk=100,
    eval_every=2_000,
    checkpoint_every=1_000,
  )
  config.probe_step = 2_000
  config.seeds = (0,)
  config.parallel = "map"  # the wide models do not fit seven times; see --dry_run
  return config
