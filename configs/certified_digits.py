"""Certified training on digits: the ablation of fast certified training, and methods compared.

Repeats tables of Shi et al., 2021 (arXiv 2103.17268) and the comparison of CTBench (arXiv
2406.04848) on the 8x8 digits of scikit-learn. The part after the colon names the figure.

  python -m balance_jax.main --config=configs/certified_digits.py --workdir=runs/certified_digits
  python -m balance_jax.main --config=configs/certified_digits.py:methods --workdir=runs/methods

Expected (experiments/fast_certified). Ablation, 4 minutes on two CPU cores: a verified error of
29 % with batch normalisation alone, 21 to 22 % with the initialisation, 32 % without normalisation.
`methods`: all certified methods but EXP-IBP within 2 points of IBP at either radius; more natural
accuracy for MTL-, EXP- and CC-IBP. `ramp`: at 15 epochs of ramp the recipe ends at 24 %, batch
normalisation alone at 67 %.
"""

import ml_collections


def base() -> ml_collections.ConfigDict:
  """The published recipe at the size of a laptop: the CNN-7 with 8 channels, radius 0.1."""
  config = ml_collections.ConfigDict()
  config.title = "Certified training on digits"
  config.task = "robust"

  config.data = ml_collections.ConfigDict()
  config.data.source = "digits"  # or "fashion_mnist", "npz_jpeg", "tfds:NAME"
  config.data.path = ""  # of the archive of "npz_jpeg"
  config.data.directory = ""  # of "fashion_mnist" or TFDS; "" for the default
  config.data.image_shape = (8, 8, 1)
  config.data.num_classes = 10
  config.data.normalize = "none"  # or "train": mean and deviation of its channels
  # So many, or 0 for all; without the data, --dry_run counts the steps of so many.
  config.data.train_examples = 1200
  config.data.validation_examples = 0
  config.data.test_examples = 0
  config.data.validation_from_train = 0  # examples of train held out, where there is no split
  config.data.test_split = "test"
  config.data.augment = ml_collections.ConfigDict()
  config.data.augment.flip = False
  config.data.augment.crop_padding = 0  # pixels
  config.data.augment.mode = "edge"  # or "constant"

  config.model = ml_collections.ConfigDict()
  config.model.name = "cnn7"  # or "wide_resnet8", "resnext", "mlp"
  config.model.width = 8  # channels of cnn7; widening of wide_resnet8; base width of resnext
  config.model.convs = ((1, 1), (1, 1), (2, 2), (2, 1), (2, 1))  # (multiple of width, stride)
  config.model.dense = 128  # units of the hidden dense layer
  config.model.features = (128, 128)  # hidden layers of mlp
  config.model.batch_norm = "all"  # or "conv", "none"
  config.model.initialization = "ibp"  # or "default"
  config.model.suffix_blocks = 0  # of the convolutions, those that TAPS attacks with the rest

  config.objective = ml_collections.ConfigDict()
  config.objective.method = "ibp"  # a name in balance_jax.robust.METHODS
  config.objective.regularizer = "both"  # in the warm-up; or "tight", "relu", "none"
  config.objective.lambda_0 = 0.5  # weight of the regularisers at radius 0
  config.objective.tau = 0.5
  config.objective.kappa_start = 1.0  # robust weight against the natural loss, at radius 0
  config.objective.kappa_end = 1.0  # at the target
  config.objective.l1 = 0.0  # coefficient of the sum of absolute kernel entries
  config.objective.alpha = 0.5  # of mtl-ibp, exp-ibp, cc-ibp
  config.objective.shrinkage = 0.4  # lambda of sabr and staps
  config.objective.relu_shrinkage = 1.0  # of sabr
  config.objective.taps_weight = 1.0
  config.objective.beta = 6.0  # of trades
  config.objective.attack_steps = 8
  config.objective.attack_scale = 1.0  # radius of the attack over that of the bounds
  config.objective.relu_lower = "adaptive"  # of CROWN

  config.train = ml_collections.ConfigDict()
  config.train.epochs = 50
  config.train.natural_epochs = 1  # at radius 0
  config.train.ramp_epochs = 30
  config.train.eps_factor = 1.0  # radius of training over that of evaluation
  config.train.batch_size = 32
  config.train.micro_batches = 1
  config.train.eval_every = 50  # epochs
  config.train.checkpoint_every = 25  # epochs

  config.optimizer = ml_collections.ConfigDict()
  config.optimizer.learning_rate = 1e-3
  config.optimizer.decay_epochs = (36, 43)
  config.optimizer.decay_factor = 0.2
  config.optimizer.clip_norm = 10.0
  config.optimizer.b1 = 0.9
  config.optimizer.b2 = 0.999
  config.optimizer.epsilon = 1e-8

  config.evaluation = ml_collections.ConfigDict()
  config.evaluation.methods = ("ibp", "crown-ibp")  # certified if one of them verifies
  config.evaluation.directed = True  # bounds rounded outwards
  config.evaluation.attack_steps = 20
  config.evaluation.restarts = 1
  config.evaluation.batch_size = 200
  config.evaluation.curve = (0.5, 1.0, 1.5)  # radii of the curve over the target
  config.evaluation.statistics = "running"  # or "precise", recomputed from training images
  config.evaluation.precise_batches = 10
  config.evaluation.precise_batch_size = 100

  # Changes of the sections above that need a program of their own; "settings" replaces those below.
  config.arms = ml_collections.ConfigDict({"all": {}})
  config.baseline = "all"  # the arm that the others are compared with
  # Numbers of the objective, and "learning_rate", that share a program.
  config.settings = ml_collections.ConfigDict({"default": {}})
  config.eps = (0.1,)  # radii, in pixels of [0, 1]
  config.seeds = (10, 11, 12, 13)
  config.selection = "certified"  # what chooses a setting on validation data; or "mean"
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


def ablation(config):
  """What of the recipe matters, on the deep network."""

  def parts(norm, init, regularizer):
    return {
      "model": {"batch_norm": norm, "initialization": init},
      "objective": {"regularizer": regularizer},
    }

  config.arms = ml_collections.ConfigDict(
    {
      "BN": parts("all", "default", "none"),
      "no BN": parts("none", "default", "none"),
      "+ init": parts("all", "ibp", "none"),
      "+ init + tight": parts("all", "ibp", "tight"),
      "+ init + relu": parts("all", "ibp", "relu"),
      "all": parts("all", "ibp", "both"),
    }
  )
  config.baseline = "BN"
  config.seeds = (20, 21, 22, 23, 24, 25)  # a first run, which suggested the claims, had others


def two_ends(config):
  """The ablation's two ends: batch normalisation alone, and the whole recipe."""
  ablation(config)
  config.arms = ml_collections.ConfigDict(
    {name: config.arms[name].to_dict() for name in ("BN", "all")}
  )


def methods(config):
  """Methods against each other as Pareto fronts, on the shallow network; settings on validation."""
  config.model.width, config.model.dense = 8, 64
  config.model.convs = ((1, 1), (2, 2), (2, 1))
  config.train.update(epochs=30, natural_epochs=1, ramp_epochs=15, eval_every=30)
  config.train.update(checkpoint_every=30, batch_size=64)
  config.optimizer.learning_rate = 2e-3
  config.optimizer.decay_epochs = (22, 26)
  config.eps = (0.1, 0.2)
  config.seeds = (0, 1, 2, 3)

  def arm(method, number, values, **more):
    # In per cent, because a name in a config holds no dot.
    settings = {f"{number} {100 * value:.0f} %": {number: value} for value in values}
    return {"objective": {"method": method, **more}, "settings": settings}

  config.arms = ml_collections.ConfigDict(
    {
      "ibp": arm("ibp", "kappa_end", (0.5, 1.0)),
      "crown-ibp": arm("crown-ibp", "kappa_end", (0.5, 1.0)),
      "sabr": arm("sabr", "shrinkage", (0.4, 0.8)),
      "mtl-ibp": arm("mtl-ibp", "alpha", (0.2, 0.6), attack_steps=1),
      "exp-ibp": arm("exp-ibp", "alpha", (0.2, 0.6), attack_steps=1),
      "cc-ibp": arm("cc-ibp", "alpha", (0.2, 0.6), attack_steps=1),
      "taps": arm("taps", "taps_weight", (1.0, 4.0)),
      "pgd-at": arm("pgd-at", "attack_scale", (0.7, 1.0)),
    }
  )
  config.baseline = "ibp"


def ramp(config):
  """How short the ramp of the radius may be, with and without the recipe."""
  recipe = {
    "all": {"model": {"initialization": "ibp"}, "objective": {"regularizer": "both"}},
    "BN": {"model": {"initialization": "default"}, "objective": {"regularizer": "none"}},
  }
  config.arms = ml_collections.ConfigDict(
    {
      f"{name}, ramp {epochs}": {**parts, "train": {"ramp_epochs": epochs}}
      for name, parts in recipe.items()
      for epochs in (5, 15, 30)
    }
  )
  config.baseline = "BN, ramp 30"


def tiny(config):
  """A few steps of two arms, to see that everything runs."""
  two_ends(config)
  config.model.update(width=2, dense=8, convs=((1, 1), (2, 2)))
  config.data.update(train_examples=64, validation_examples=20, test_examples=20)
  config.train.update(epochs=3, natural_epochs=1, ramp_epochs=1, eval_every=3, checkpoint_every=3)
  config.evaluation.update(attack_steps=2, batch_size=20)
  config.seeds = (0, 1)


FIGURES = {"ablation": ablation, "methods": methods, "ramp": ramp, "tiny": tiny}


def get_config(figure: str = "ablation") -> ml_collections.ConfigDict:
  if figure not in FIGURES:
    raise ValueError(f"figure is {figure!r}; allowed: {', '.join(sorted(FIGURES))}")
  config = base()
  FIGURES[figure](config)
  what = FIGURES[figure].__doc__.rstrip(".")
  config.title = f"Certified training on digits: {what[0].lower()}{what[1:]}"
  return config
