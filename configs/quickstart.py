"""Upsample or upweight? Eight languages, six methods, three seeds, on a laptop.

Repeats the question of Li et al., 2025 (arXiv 2410.04579) on the translation catalogues of
plone.app.locales, whose languages here differ 48-fold in size.

  python -m balance_jax.main --config=configs/quickstart.py --workdir=runs/quickstart

Expected, in three to four minutes on two idle CPU cores: scalarization_5 has 20 to 60 times the
gradient noise of temperature_5 and ends about 0.2 nats/byte above it in both halves; proportional
is best for the large languages and worst for the small; cooldown ends near proportional in the
large languages, and gives back about two thirds of what temperature_5 gained in the small ones.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
  config = ml_collections.ConfigDict()
  config.title = "Upsample or upweight?"
  config.task = "language_model"

  config.data = ml_collections.ConfigDict()
  config.data.source = "plone_catalogues"  # a name in data.SOURCES, tfds:NAME, or a folder
  config.data.languages = ("es", "fr", "nl", "pl", "hu", "hr", "lv", "rm")  # () for all
  config.data.directory = ""  # of prepared data; "" for the default cache
  config.data.group_key = "language"  # feature that names the group of an example
  config.data.text_key = "text"  # feature that holds the text
  config.data.window = 64  # bytes predicted per row
  config.data.eval_rows = 48  # held-out rows per language, at most
  config.data.reader = "memory"  # or "threads", "processes": rows are read from disk as needed
  config.data.workers = 4  # threads or processes that read
  config.data.max_corrupt = 0  # rows that may be unreadable; others take their place

  config.model = ml_collections.ConfigDict()
  config.model.width = 48
  config.model.depth = 2  # blocks
  config.model.heads = 3
  config.model.mlp_ratio = 4  # hidden units of the MLP per unit of width
  config.model.qk_norm = "none"  # or "per_head"
  config.model.dtype = "float32"  # of the computation; parameters are float32

  config.optimizer = ml_collections.ConfigDict()
  config.optimizer.learning_rate = 1e-2  # peak
  config.optimizer.warmup_fraction = 0.05  # share of the steps
  config.optimizer.end_fraction = 0.1  # last learning rate, share of the peak
  config.optimizer.weight_decay = 1e-4
  config.optimizer.b1 = 0.9
  config.optimizer.b2 = 0.95
  config.optimizer.eps = 1e-8
  config.optimizer.clip_norm = float("inf")  # clipping would bias the upweighted gradients

  config.train = ml_collections.ConfigDict()
  config.train.steps = 400
  config.train.batch_size = 32  # rows
  config.train.allocation = "stratified"  # or "systematic", "multinomial"
  config.train.micro_batches = 1
  config.train.chunk = 50  # steps between two looks of the host
  config.train.eval_every = 50
  config.train.checkpoint_every = 200
  config.train.max_rollbacks = 0  # returns to the last checkpoint after a NaN, with other batches
  config.train.max_skips = 0  # steps of a run that may be not finite; they change nothing
  config.train.measure_every = 50  # steps between measurements for draw = "optimal"
  config.train.measure_examples = 4  # examples per group in one
  config.train.variance_every = 200  # steps between two reports of the gradient variance
  config.train.variance_examples = 16  # examples per group for the prediction
  config.train.variance_batches = 16  # mini-batches for the observation

  # Every method that can be named in `methods`: a mixer of balance_jax.mixing.MIXERS and its
  # arguments. draw: target = upsample, natural = upweight, optimal = least variance.
  # delay: steps by which a draw that adapts is known before; a reader needs 2 * train.chunk.
  config.mixers = ml_collections.ConfigDict()
  config.mixers.proportional = {"mixer": "proportional", "draw": "target"}
  config.mixers.uniform = {"mixer": "uniform", "draw": "target"}
  config.mixers.temperature_5 = {"mixer": "temperature", "tau": 5.0, "draw": "target"}
  config.mixers.scalarization_5 = {"mixer": "temperature", "tau": 5.0, "draw": "natural"}
  config.mixers.optimal_5 = {"mixer": "temperature", "tau": 5.0, "draw": "optimal", "delay": 1}
  config.mixers.cooldown = {"mixer": "cooldown", "tau_hi": 5.0, "tau_lo": 1.0, "draw": "target"}
  config.mixers.cooldown.switch_step = config.train.get_ref("steps") // 2
  config.methods = (
    "proportional",
    "temperature_5",
    "scalarization_5",
    "optimal_5",
    "cooldown",
    "uniform",
  )
  config.reference = "temperature_5"  # differences and variance ratios are against this method
  config.seeds = (0, 1, 2)
  config.sweep = ml_collections.ConfigDict()
  # Numbers of the optimizer to sweep, such as {"learning_rate": (3e-3, 1e-2)}; one program for all.
  config.sweep.axes = ml_collections.ConfigDict()
  config.sweep.parts = 1  # into how many the list of runs is cut, to train apart
  config.sweep.shard = ""  # or "i/n": only part i of n, from 0, for job arrays; see docs/scale.md
  config.sweep.engine = "local"  # or "ray": all parts on a Ray cluster; needs balance_jax[ray]
  config.sweep.address = ""  # of the cluster; "" for RAY_ADDRESS, else one of this machine alone
  config.sweep.resources = ml_collections.ConfigDict({"CPU": 1.0, "GPU": 0.0})  # of a part
  config.sweep.retries = 3  # times that a part whose process was lost is begun again
  config.parallel = "auto"  # or "vmap", "map", "shard": how the runs share the machine
  config.mesh = ml_collections.ConfigDict()  # the devices that work on each run together
  config.mesh.data = 1  # parts of a batch; -1 for all devices
  config.mesh.model = 1  # parts of a matrix of the decoder
  config.mesh.shard_parameters = False  # along the parts of a batch too, to save memory
  config.tensorboard = False  # event files too; needs balance_jax[tensorboard]
  config.profile = ""  # steps to trace, such as "100:110"; see docs/metrics.md
  return config
