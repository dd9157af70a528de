"""Upsample or upweight at full scale, for an accelerator. NOT RUN: no results exist for it.

The language-model part of Li et al., 2025 (arXiv 2410.04579, section 4): English, Italian, Chinese
and Swahili, whose sizes there are 2733, 162, 39 and 1 billion tokens; 100k steps, Cooldown from
tau = 5 to 1 at 50k. The paper gives neither model nor optimizer: both are a choice made here.

Data: any TFDS data set of records {"language", "text"}, prepared as array_record under the name in
`data.source`; mC4 subsets are not downloaded by this library. The table lies in device memory, one
byte a token, so cut the languages in proportion until it fits (60 GB of English, 22 MB of Swahili).

  python -m balance_jax.main --config=configs/upsample_or_upweight_gpu.py --workdir=DIR

Expected time, an estimate from 1e13 floating-point operations a step: about an hour a run on one
H100-class device, 35 runs one after another. `--config.parallel=shard` spreads them over devices.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
  config = ml_collections.ConfigDict()
  config.title = "Upsample or upweight? Full scale"
  config.task = "language_model"

  config.data = ml_collections.ConfigDict()
  config.data.source = "tfds:mc4_subset"  # a name in data.SOURCES, tfds:NAME, or a folder
  config.data.languages = ("en", "it", "zh", "sw")
  config.data.directory = ""  # of prepared data; "" for the default cache
  config.data.group_key = "language"  # feature that names the group of an example
  config.data.text_key = "text"  # feature that holds the text
  config.data.window = 512  # bytes predicted per row
  config.data.eval_rows = 2048  # held-out rows per language, at most
  config.data.reader = "memory"  # or "threads", "processes": rows are read from disk as needed
  config.data.workers = 4  # threads or processes that read
  config.data.max_corrupt = 0  # rows that may be unreadable; others take their place

  config.model = ml_collections.ConfigDict()
  config.model.width = 512
  config.model.depth = 8  # blocks
  config.model.heads = 8
  config.model.mlp_ratio = 4  # hidden units of the MLP per unit of width
  config.model.qk_norm = "per_head"  # or "none"
  config.model.dtype = "bfloat16"  # of the computation; parameters are float32

  config.optimizer = ml_collections.ConfigDict()
  config.optimizer.learning_rate = 1e-3  # peak; swept below
  config.optimizer.warmup_fraction = 0.04  # share of the steps
  config.optimizer.end_fraction = 0.1  # last learning rate, share of the peak
  config.optimizer.weight_decay = 0.0  # the paper has none
  config.optimizer.b1 = 0.9
  config.optimizer.b2 = 0.98  # as in the paper
  config.optimizer.eps = 1e-6  # as in the paper
  config.optimizer.clip_norm = float("inf")  # clipping would bias the upweighted gradients

  config.train = ml_collections.ConfigDict()
  config.train.steps = 100_000
  config.train.batch_size = 128  # rows
  config.train.allocation = "multinomial"  # the language of every row is drawn, as in the paper
  config.train.micro_batches = 1
  config.train.chunk = 500  # steps between two looks of the host
  config.train.eval_every = 1000
  config.train.checkpoint_every = 5000
  config.train.max_rollbacks = 0  # returns to the last checkpoint after a NaN, with other batches
  config.train.max_skips = 0  # steps of a run that may be not finite; they change nothing
  config.train.measure_every = 500  # steps between measurements for draw = "optimal"
  config.train.measure_examples = 4  # examples per group in one
  config.train.variance_every = 25_000  # steps between two reports of the gradient variance
  config.train.variance_examples = 16  # examples per group for the prediction
  config.train.variance_batches = 16  # mini-batches for the observation

  # Every method that can be named in `methods`: a mixer of balance_jax.mixing.MIXERS and its
  # arguments. draw: target = upsample, natural = upweight, optimal = least variance.
  # delay: steps by which a draw that adapts is known before; a reader needs 2 * train.chunk.
  half = config.train.get_ref("steps") // 2
  config.mixers = ml_collections.ConfigDict()
  config.mixers.proportional = {"mixer": "proportional", "draw": "target"}
  config.mixers.temperature_5 = {"mixer": "temperature", "tau": 5.0, "draw": "target"}
  config.mixers.temperature_100 = {"mixer": "temperature", "tau": 100.0, "draw": "target"}
  config.mixers.scalarization_5 = {"mixer": "temperature", "tau": 5.0, "draw": "natural"}
  config.mixers.optimal_5 = {"mixer": "temperature", "tau": 5.0, "draw": "optimal", "delay": 1}
  config.mixers.cooldown = {"mixer": "cooldown", "tau_hi": 5.0, "tau_lo": 1.0, "draw": "target"}
  config.mixers.cooldown.switch_step = half
  config.mixers.increasing = {"mixer": "cooldown", "tau_hi": 1.0, "tau_lo": 5.0, "draw": "target"}
  config.mixers.increasing.switch_step = half
  config.mixers.order_matters = {"mixer": "order_matters", "tau": 5.0, "draw": "target"}
  config.mixers.order_matters.switch_step = half
  # "online" is the form the paper compares with: uniform, without a language seen five times.
  config.mixers.unimax = {"mixer": "unimax", "max_epochs": 5.0, "mode": "online", "draw": "target"}
  config.methods = (
    "proportional",
    "temperature_5",
    "temperature_100",
    "scalarization_5",
    "cooldown",
    "increasing",
    "order_matters",
    "unimax",
  )
  # Differences and variance ratios of the report are against this method.
  config.reference = "temperature_5"
  config.seeds = (0, 1, 2, 3, 4)
  config.sweep = ml_collections.ConfigDict()
  # With several values, a method's name gets the value behind it, in `reference` too.
  config.sweep.axes = ml_collections.ConfigDict()
  config.sweep.axes.learning_rate = (1e-3,)
  config.sweep.parts = 1  # into how many the list of runs is cut, to train apart
  config.sweep.shard = ""  # or "i/n": only part i of n, from 0, for job arrays; see docs/scale.md
  config.sweep.engine = "local"  # or "ray": all parts on a Ray cluster; needs balance_jax[ray]
  config.sweep.address = ""  # of the cluster; "" for RAY_ADDRESS, else one of this machine alone
  config.sweep.resources = ml_collections.ConfigDict({"CPU": 1.0, "GPU": 0.0})  # of a part
  config.sweep.retries = 3  # times that a part whose process was lost is begun again
  config.parallel = "map"  # or "shard": batching the runs by "vmap" would not fit the memory
  config.mesh = ml_collections.ConfigDict()  # the devices that work on each run together
  config.mesh.data = 1  # parts of a batch; -1 for all devices
  config.mesh.model = 1  # parts of a matrix of the decoder
  config.mesh.shard_parameters = False  # along the parts of a batch too, to save memory
  config.tensorboard = False  # event files too; needs balance_jax[tensorboard]
  config.profile = ""  # steps to trace, such as "100:110"; see docs/metrics.md
  return config
