"""Coordinate check of the decoder: do activations keep their size as the model gets wider?

Repeats the check of Yang et al., 2022 (arXiv 2203.03466, appendix D.1) for the standard
parametrisation and for the variants of muP in Wortsman et al., 2023 (arXiv 2309.14322).

  python -m balance_jax.main --config=configs/coordinate_check.py --workdir=runs/coordinate_check

Expected, on two idle CPU cores in a minute: the standard parametrisation fails (the MLP grows like
width^1.3), "tensor_programs" and "intermediate" pass, "full" misses by a little (0.18).
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
  config = ml_collections.ConfigDict()
  config.title = "Coordinate check"
  config.task = "coordinate_check"

  config.data = ml_collections.ConfigDict()
  config.data.source = "python_topics"  # a name in data.SOURCES, tfds:NAME, or a folder
  config.data.languages = ()  # () for all
  config.data.directory = ""  # of prepared data; "" for the default cache
  config.data.group_key = "language"  # feature that names the group of an example
  config.data.text_key = "text"  # feature that holds the text
  config.data.window = 32  # bytes predicted per row

  config.model = ml_collections.ConfigDict()
  config.model.depth = 2  # blocks
  config.model.mlp_ratio = 4  # hidden units of the MLP per unit of width
  config.model.qk_norm = "none"  # or "per_head", "model", "rms", "l2"
  config.model.dtype = "float32"

  config.widths = (64, 128, 256)  # the first is the base width
  config.head_dim = 16  # the same at all widths
  config.variants = ("standard", "simple", "intermediate", "full", "tensor_programs")
  config.tolerance = 0.15  # largest slope of log mean |x| on log width that passes
  config.train = ml_collections.ConfigDict()
  # Forward passes, with an update between two. The output of a correct muP starts with slope -1/2
  # and needs some updates to forget it: -0.32 after two, -0.12 after four.
  config.train.steps = 5
  config.train.batch_size = 8  # rows
  # Large, as a model that does not move passes; from 0.01 on training jumps and slopes scatter.
  config.train.learning_rate = 0.005
  config.seeds = (0, 1, 2)
  config.sweep = ml_collections.ConfigDict()
  config.sweep.parts = 1  # into how many the list of runs is cut, to train apart
  config.sweep.shard = ""  # or "i/n": only part i of n, from 0, for job arrays; see docs/scale.md
  config.sweep.engine = "local"  # or "ray": all parts on a Ray cluster; needs balance_jax[ray]
  config.sweep.address = ""  # of the cluster; "" for RAY_ADDRESS, else one of this machine alone
  config.sweep.resources = ml_collections.ConfigDict({"CPU": 1.0, "GPU": 0.0})  # of a part
  config.sweep.retries = 3  # times that a part whose process was lost is begun again
  config.tensorboard = False
  config.profile = ""  # steps to trace, such as "100:110"; see docs/metrics.md
  return config
