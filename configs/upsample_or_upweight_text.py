"""Upsample or upweight, on real text: nine methods, two learning rates, five seeds, two CPU cores.

The questions of Li et al., 2025 (arXiv 2410.04579) put to a small multilingual decoder on the
messages of GCC (Debian's gcc-12-locales), whose six languages here differ 152-fold in size.

Expected: 90 runs, 15 minutes of CPU time (25 by the clock on two shared cores). Final test loss
of fr, es, fi / hr, eo, ca in nats per byte: temperature 5 2.11 / 2.13, scalarization 2.42 / 2.48,
Cooldown 2.10 / 2.51, proportional 2.12 / 2.68. The claims and verdicts are in
experiments/upsample_or_upweight/README.md.

  apt-get install --no-install-recommends gcc-12-locales
  python -m balance_jax.main --config=configs/upsample_or_upweight_text.py --workdir=runs/upsample
  python experiments/upsample_or_upweight/text.py runs/upsample
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
  config = ml_collections.ConfigDict()
  config.title = "Upsample or upweight? Real text"
  config.task = "language_model"

  config.data = ml_collections.ConfigDict()
  config.data.source = "gcc_catalogues"  # a name in data.SOURCES, tfds:NAME, or a folder
  # Largest first. Smaller ones exist (el, 438 times smaller than fr), but with only two or three
  # held-out rows their loss cannot be measured.
  config.data.languages = ("fr", "es", "fi", "hr", "eo", "ca")
  config.data.directory = ""  # of prepared data; "" for the default cache
  config.data.group_key = "language"  # feature that names the group of an example
  config.data.text_key = "text"  # feature that holds the text
  config.data.window = 32  # bytes predicted per row
  config.data.eval_rows = 96  # held-out rows per language, at most
  config.data.reader = "memory"  # or "threads", "processes": rows are read from disk as needed
  config.data.workers = 4  # threads or processes that read
  config.data.max_corrupt = 0  # rows that may be unreadable; others take their place

  config.model = ml_collections.ConfigDict()
  config.model.width = 32
  config.model.depth = 2  # blocks
  config.model.heads = 2
  config.model.mlp_ratio = 4  # hidden units of the MLP per unit of width
  config.model.qk_norm = "none"  # or "per_head"
  config.model.dtype = "float32"  # of the computation; parameters are float32

  config.optimizer = ml_collections.ConfigDict()
  config.optimizer.learning_rate = 1e-2  # peak; swept below
  config.optimizer.warmup_fraction = 0.05  # share of the steps
  config.optimizer.end_fraction = 0.1  # last learning rate, share of the peak
  config.optimizer.weight_decay = 0.0  # the paper has none
  config.optimizer.b1 = 0.9
  config.optimizer.b2 = 0.98  # as in the paper
  config.optimizer.eps = 1e-6  # as in the paper
  config.optimizer.clip_norm = float("inf")  # clipping would bias the upweighted gradients

  config.train = ml_collections.ConfigDict()
  config.train.steps = 1000
  config.train.batch_size = 32  # rows
  config.train.allocation = "multinomial"  # the language of every row is drawn, as in the paper
  config.train.micro_batches = 1
  config.train.chunk = 50  # steps between two looks of the host
  config.train.eval_every = 50
  config.train.checkpoint_every = 250
  config.train.max_rollbacks = 0  # returns to the last checkpoint after a NaN, with other batches
  config.train.max_skips = 0  # steps of a run that may be not finite; they change nothing
  config.train.measure_every = 50  # steps between measurements for draw = "optimal"
  config.train.measure_examples = 4  # examples per group in one
  config.train.variance_every = 250  # steps between two reports of the gradient variance
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
    "optimal_5",
    "cooldown",
    "increasing",
    "order_matters",
    "unimax",
  )
  # Differences and variance ratios of the report are against this method. A swept number is part of
  # a method's name there.
  config.reference = "temperature_5 learning_rate=0.01"
  config.seeds = (0, 1, 2, 3, 4)
  config.sweep = ml_collections.ConfigDict()
  # The same grid for every method; the experiment's table takes, for each, the value with the
  # lowest mean validation loss over languages and seeds.
  config.sweep.axes = ml_collections.ConfigDict()
  config.sweep.axes.learning_rate = (5e-3, 1e-2)
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
