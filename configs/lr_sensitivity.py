"""Learning-rate sensitivity of small Transformers: the LR-loss curve over sizes and remedies.

Repeats figures of Wortsman et al., 2023 (arXiv 2309.14322) on the help topics of Python, as bytes.
The part after the colon names the figure; see FIGURES below for what each varies.

  python -m balance_jax.main --config=configs/lr_sensitivity.py --workdir=runs/lr_sensitivity
  python -m balance_jax.main --config=configs/lr_sensitivity.py:depth_width --workdir=runs/depth

Expected of the first, on two idle CPU cores in three minutes: at the largest size a sensitivity of
0.43 without qk-norm and 0.36 with it; the largest attention logit at rate 0.3 is above 1e4 without
(5e4), below 100 with. All figures: experiments/small_scale_proxies.
"""

import ml_collections

SMALL, MIDDLE, LARGE = (32, 1, 2), (48, 2, 3), (64, 3, 4)  # (width, depth, heads), heads of 16
QK_NORM = {"model": {"qk_norm": "per_head"}}


def base() -> ml_collections.ConfigDict:
  """The paper's recipe at the size of a laptop."""
  config = ml_collections.ConfigDict()
  config.title = "Learning-rate sensitivity"
  config.task = "stability"

  config.data = ml_collections.ConfigDict()
  config.data.source = "python_topics"  # a name in data.SOURCES, tfds:NAME, or a folder
  config.data.languages = ()  # one group; () where the source has no other
  config.data.directory = ""  # of prepared data; "" for the default cache
  config.data.group_key = "language"  # feature that names the group of an example
  config.data.text_key = "text"  # feature that holds the text
  config.data.window = 64  # bytes predicted per row
  config.data.eval_rows = 256  # held-out rows
  config.data.reader = "memory"  # or "threads", "processes": rows are read from disk as needed
  config.data.workers = 4  # threads or processes that read
  config.data.max_corrupt = 0  # rows that may be unreadable; others take their place

  config.model = ml_collections.ConfigDict()
  config.model.mlp_ratio = 4  # hidden units of the MLP per unit of width
  config.model.qk_norm = "none"  # or "per_head", "model", "rms", "l2"
  config.model.attention = "softmax"  # or "squared_relu"
  config.model.attention_scale = "sqrt"  # or "mup"
  config.model.logit_soft_cap = 0.0  # of attention logits; 0 for none
  config.model.tied_embeddings = False
  config.model.position = "rotary"  # or "learned"
  config.model.dtype = "float32"  # of the computation; parameters are float32
  config.sizes = (SMALL, MIDDLE, LARGE)  # (width, depth, heads) of each model

  config.mup = ml_collections.ConfigDict()
  config.mup.variant = "none"  # or "simple", "intermediate", "full", "tensor_programs"
  config.mup.base_width = 32  # width at which muP changes nothing

  config.loss = ml_collections.ConfigDict()
  config.loss.z_coefficient = 1e-4

  config.train = ml_collections.ConfigDict()
  config.train.steps = 400
  config.train.batch_size = 16  # rows
  config.train.micro_batches = 1  # parts of a batch, one after another, for less memory
  config.train.chunk = 20  # steps between two looks of the host; also of one record
  config.train.eval_every = 400
  config.train.checkpoint_every = 200

  config.optimizer = ml_collections.ConfigDict()
  config.optimizer.rule = "adamw"  # or "stable_adamw", "adam_atan2"
  config.optimizer.total_steps = 0  # length of the schedule; 0 for train.steps
  config.optimizer.warmup_fraction = 0.05  # share of the schedule
  config.optimizer.end_learning_rate = 1e-5  # absolute, as in the paper
  config.optimizer.weight_decay = 1e-4
  config.optimizer.weight_decay_mode = "independent"  # of the learning rate; or "coupled"
  config.optimizer.b1 = 0.9
  config.optimizer.b2 = 0.95
  config.optimizer.eps = 1e-8
  config.optimizer.clip_norm = 1.0

  # Changes of entries above that need a program of their own: name -> section -> entry.
  config.architectures = ml_collections.ConfigDict({"plain": {}, "qk_norm": QK_NORM})
  # Numbers that share a program: of the optimizer, "z_coefficient", "kappa".
  config.interventions = ml_collections.ConfigDict({"default": {}})
  config.learning_rates = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
  config.window = (3e-4, 3e-1)  # over which the sensitivity is taken
  config.seeds = (0, 1, 2)
  config.statistics = True  # attention logits and entropy, log Z, gradient and block sizes
  config.probe_step = 0  # step at which attention logits are compared; 0 for the last
  config.hold_back_largest = False  # predict the largest model from the others
  config.sweep = ml_collections.ConfigDict()
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


def _steps(config, steps: int):
  config.train.update(steps=steps, chunk=20, eval_every=steps, checkpoint_every=steps)


def quick(config):
  """Sizes with and without qk-norm, short."""
  _steps(config, 120)
  config.sizes = (SMALL, MIDDLE, (64, 2, 4))


def qk_norm(config):
  """Sizes with and without qk-norm."""
  _steps(config, 400)
  config.seeds = (10, 11, 12, 13, 14)  # seeds 0 to 2 did not decide; these are new


def remedies(config):
  """What changes the architecture or the rule, the paper's and later ones."""
  _steps(config, 120)
  config.sizes = (MIDDLE,)
  config.architectures = ml_collections.ConfigDict(
    {
      "plain": {},
      "qk_norm": QK_NORM,
      "qk_norm, whole width": {"model": {"qk_norm": "model"}},
      "qk_norm, rms (later)": {"model": {"qk_norm": "rms"}},
      "qk_norm, l2 (later)": {"model": {"qk_norm": "l2"}},
      "soft-cap 50 (later)": {"model": {"logit_soft_cap": 50.0}},
      "stable_adamw (later)": {"optimizer": {"rule": "stable_adamw"}},
      "adam_atan2 (later)": {"optimizer": {"rule": "adam_atan2"}},
    }
  )


def interventions(config):
  """Everything that is a number, with and without qk-norm."""
  _steps(config, 120)
  config.sizes = (SMALL, MIDDLE)
  config.interventions = ml_collections.ConfigDict(
    {
      "default": {},
      "no z-loss": {"z_coefficient": 0.0},
      "no decay": {"weight_decay": 0.0},
      "no z-loss, no decay": {"z_coefficient": 0.0, "weight_decay": 0.0},
      "warm-up 1 %": {"warmup_fraction": 0.01},
      "warm-up 25 %": {"warmup_fraction": 0.25},
      "eps 1e-6": {"eps": 1e-6},
      "eps 1e-15": {"eps": 1e-15},
      "higher beta2": {"b2": 0.99},
      "no clipping": {"clip_norm": 1e9},
    }
  )


def decay_kind(config):
  """Decay independent of the learning rate, or multiplied by it; as published, and ten times it."""
  _steps(config, 100)
  config.sizes = (SMALL, MIDDLE)

  def decay(mode, strength):
    return {**QK_NORM, "optimizer": {"weight_decay": strength, "weight_decay_mode": mode}}

  config.architectures = ml_collections.ConfigDict(
    {
      "independent": decay("independent", 1e-4),
      "coupled": decay("coupled", 0.1),
      "independent, more": decay("independent", 1e-3),
      "coupled, more": decay("coupled", 1.0),
    }
  )
  # One point more, for the better of two windows, as the paper has it for coupled decay.
  config.learning_rates = (1e-4, *config.learning_rates)
  config.window = (1e-4, 3e-1)


def mup(config):
  """muP variants over widths, base width 32."""
  _steps(config, 120)
  config.sizes = ((32, 1, 2), (64, 1, 4), (128, 1, 8))
  variants = ("simple", "intermediate", "full", "tensor_programs")
  arms = {name: {**QK_NORM, "mup": {"variant": name}} for name in variants}
  arms["full"] = {
    "model": {"qk_norm": "per_head", "attention_scale": "mup"},
    "mup": {"variant": "full"},
  }
  config.architectures = ml_collections.ConfigDict({"standard": QK_NORM, **arms})


def depth_width(config):
  """Deeper against wider."""
  _steps(config, 100)
  config.sizes = (
    (48, 1, 3),
    (48, 2, 3),
    (48, 4, 3),
    (48, 6, 3),
    (32, 2, 2),
    (64, 2, 4),
    (96, 2, 6),
  )
  config.architectures = ml_collections.ConfigDict({"qk_norm": QK_NORM})


def batch_steps(config):
  """Batch size at a fixed number of tokens, and number of steps."""
  _steps(config, 120)
  config.sizes = (MIDDLE,)

  def run(batch, steps):
    train = {"batch_size": batch, "steps": steps, "eval_every": steps, "checkpoint_every": steps}
    return {**QK_NORM, "train": train}

  config.architectures = ml_collections.ConfigDict(
    {
      "batch 16, 120 steps": run(16, 120),
      "batch 8, 240 steps": run(8, 240),
      "batch 32, 60 steps": run(32, 60),
      "batch 16, 60 steps": run(16, 60),
      "batch 16, 240 steps": run(16, 240),
    }
  )


def kappa(config):
  """Attention logits of size kappa, forced upon a model; and a model without blocks."""
  _steps(config, 120)
  config.sizes = (LARGE, (64, 0, 4))
  config.model.kappa = 1.0
  config.architectures = ml_collections.ConfigDict({"forced logits": {}})
  config.interventions = ml_collections.ConfigDict(
    {f"kappa 1e{power}": {"kappa": 10.0**power} for power in range(5)}
  )
  config.learning_rates = (1e-3, 3e-3, 1e-2)
  config.window = (1e-3, 1e-2)


FIGURES = {
  figure.__name__: figure
  for figure in (
    quick, qk_norm, remedies, interventions, decay_kind, mup, depth_width, batch_steps, kappa,
  )
}  # fmt: skip


def get_config(figure: str = "quick") -> ml_collections.ConfigDict:
  if figure not in FIGURES:
    raise ValueError(f"figure is {figure!r}; allowed: {', '.join(sorted(FIGURES))}")
  config = base()
  FIGURES[figure](config)
  config.title = f"Learning-rate sensitivity: {FIGURES[figure].__doc__.rstrip('.').lower()}"
  return config
