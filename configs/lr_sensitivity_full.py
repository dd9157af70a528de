"""Learning-rate sensitivity at the paper's scale: 2.4M to 1.2B parameters, 1e5 steps.

The recipe of Wortsman et al., 2023 (arXiv 2309.14322): batch 256 of 512 tokens, warm-up of 5000
steps, independent decay 1e-4, z-loss 1e-4, clip 1. Depths and widths are inferred from the
parameter counts they give. Differs in the tokens: bytes instead of a vocabulary of 32,101.

  python -m balance_jax.main --config=configs/lr_sensitivity_full.py --dry_run

Needs the English part of C4, prepared for TFDS as array_record; any TFDS data set with a text
feature does. Has not been run.
"""

import pathlib
import runpy

import ml_collections

HERE = pathlib.Path(__file__).parent


def get_config() -> ml_collections.ConfigDict:
  config = runpy.run_path(str(HERE / "lr_sensitivity.py"))["base"]()
  config.title = "Learning-rate sensitivity at the scale of the paper"
  config.data.source = "tfds:c4/en"
  config.data.group_key = "content-type"
  config.data.window = 512
  config.data.eval_rows = 4096
  # 2.4M, 9.4M, 38M, 151M, 1.2B parameters without embeddings; heads of 64.
  config.sizes = ((256, 3, 4), (512, 3, 8), (1024, 3, 16), (1024, 12, 16), (2048, 24, 32))
  config.mup.base_width = 256
  config.model.dtype = "bfloat16"
  config.train.update(
    steps=100_000,
    batch_size=256,
    micro_batches=64,
    chunk=100,
    eval_every=5_000,
    checkpoint_every=1_000,
  )
  config.probe_step = 2_000
  config.seeds = (0,)
  config.parallel = "map"  # the wide models do not fit seven times; see --dry_run
  return config
