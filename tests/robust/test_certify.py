import importlib
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from balance_jax.bounds import UnsupportedPrimitive
from balance_jax.robust import certify_cascade
from balance_jax.robust.certify import SoundnessError, accuracy_curve, certify
from balance_jax.robust.margin_bounds import bound_margins

QUICK = {"batch_size": 8, "attack_steps": 10}


def linear(w, x):
  return (x - 0.5) @ w


def traced_anew():
  """The same network as a function of its own, for which no program is compiled yet."""
  return lambda w, x: linear(w, x)


def linear_problem(count=29, dim=5, classes=4, seed=0):
  """(w, images, labels, eps -> lowest margins in the box, by the closed form in float64)."""
  rng = np.random.default_rng(seed)
  w = rng.normal(0, 1, (dim, classes)).astype(np.float32)
  images = rng.uniform(0, 1, (count, dim)).astype(np.float32)
  logits = linear(w, images)
  # One in five has a wrong label.
  labels = np.where(np.arange(count) % 5, logits.argmax(axis=1), rng.integers(0, classes, count))

  def worst(eps):
    wide = images.astype(np.float64)
    low, high = np.clip(wide - eps, 0, 1), np.clip(wide + eps, 0, 1)
    margins = np.full(count, np.inf)
    for j in range(classes):
      d = w.astype(np.float64)[:, labels] - w.astype(np.float64)[:, [j]]  # (dim, count)
      value = (np.where(d.T > 0, low, high) * d.T).sum(axis=1) - 0.5 * d.sum(axis=0)
      margins = np.where(labels == j, margins, np.minimum(margins, value))
    return margins

  return w, images, labels, worst


def mlp(weights, x):
  first, last = weights
  return jax.nn.relu((x - 0.5) @ first) @ last


def mlp_problem(count=23, dim=6, width=12, classes=3):
  rng = np.random.default_rng(0)
  weights = [
    rng.normal(0, 1, shape).astype(np.float32) for shape in ((dim, width), (width, classes))
  ]
  images = rng.uniform(0, 1, (count, dim)).astype(np.float32)
  return weights, images, np.asarray(mlp(weights, images)).argmax(axis=1)


def verdicts(result):
  return [(o.index, o.status, o.by, o.errors, o.digest) for o in result.outcomes]


def test_linear_network_is_decided_as_by_the_closed_form():
  w, images, labels, worst = linear_problem()
  eps = 0.06
  truth, clean = worst(eps) > 0, worst(0.0) > 0
  assert 3 < truth.sum() < clean.sum() - 3 < len(labels) - 6
  result = certify(linear, w, (images, labels), eps, **QUICK)
  assert [o.status == "certified" for o in result.outcomes] == truth.tolist()
  assert [o.status == "attacked" for o in result.outcomes] == (~truth).tolist()
  assert [o.by == "clean" for o in result.outcomes] == (~clean).tolist()
  margins = [o.margin for o in result.outcomes if o.by != "clean"]
  assert np.all(margins <= worst(eps)[clean])
  # The slack of directed bounds: about 100 roundings of numbers near 1.
  np.testing.assert_allclose(margins, worst(eps)[clean], atol=2e-5)
  summary = result.summary()
  assert summary["clean_accuracy"] == pytest.approx(clean.mean())
  assert summary["certified_accuracy"] == pytest.approx(truth.mean())
  assert summary["adversarial_accuracy"] == pytest.approx(truth.mean())
  assert summary["certified_by"] == {"ibp": truth.sum()}
  assert summary["unknown"] == summary["error"] == 0
  # Batches of any length and the cheap order give the same verdicts.
  batches = [(images[:3], labels[:3]), (images[:0], labels[:0]), (images[3:], labels[3:])]
  again = certify(linear, w, iter(batches), eps, check_certified=False, **QUICK)
  assert [o.status for o in again.outcomes] == [o.status for o in result.outcomes]


def test_tighter_methods_certify_what_loose_ones_leave_open():
  weights, images, labels = mlp_problem(count=40)
  options = {"attacks": ("pgd",), **QUICK}
  both = certify(
    mlp, weights, (images, labels), 0.05, methods=("ibp", "crown"), **options
  ).summary()
  assert min(both["certified_by"]["ibp"], both["certified_by"]["crown"], both["attacked"]) > 0
  assert both["certified"] + both["attacked"] + both["unknown"] == 40
  assert both["certified_accuracy"] <= both["adversarial_accuracy"] <= both["clean_accuracy"] == 1
  loose = certify(mlp, weights, (images, labels), 0.05, methods=("ibp",), attacks=(), **QUICK)
  assert loose.summary()["certified_by"] == {"ibp": both["certified_by"]["ibp"]}
  assert (loose.summary()["attacked"], loose.summary()["error"]) == (0, 0)


def test_search_depends_on_key_and_position_alone():
  w, images, labels, _ = linear_problem()

  def waves(w, x):
    return jnp.sin(30 * x) @ w

  labels = np.asarray(waves(w, images)).argmax(axis=1)
  # One step from a random start: what it finds depends on the start.
  options = {"methods": (), "attacks": ("pgd",), "attack_steps": 1}
  found = [certify(waves, w, (images, labels), 0.02, batch_size=b, **options) for b in (5, 8)]
  assert verdicts(found[0]) == verdicts(found[1])
  assert 0 < found[0].summary()["attacked"] < len(labels)
  other = certify(waves, w, (images, labels), 0.02, key=jax.random.key(1), batch_size=8, **options)
  assert verdicts(other) != verdicts(found[0])
  twice = np.concatenate([images, images]), np.concatenate([labels, labels])
  statuses = [o.status for o in certify(waves, w, twice, 0.02, batch_size=8, **options).outcomes]
  assert statuses[:29] == [o.status for o in found[1].outcomes] != statuses[29:]


@pytest.mark.parametrize("crash", ["data", "torn", "torn header"])
def test_resumed_run_equals_the_uninterrupted_one(tmp_path, crash):
  weights, images, labels = mlp_problem()
  log = tmp_path / "new" / "log.jsonl"
  data = images, labels

  def run(data, log):
    return certify(mlp, weights, data, 0.08, methods=("ibp",), attacks=("pgd",), log=log, **QUICK)

  whole = run(data, tmp_path / "whole.jsonl")
  if crash == "data":

    def failing():
      yield images[:18], labels[:18]
      raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
      run(failing(), log)
    assert 1 < len(log.read_bytes().splitlines()) < 19
  else:
    run(data, log)
    content = log.read_bytes()
    lines = content.splitlines(keepends=True)
    keep = b"".join(lines[:10]) + lines[10][:20] if crash == "torn" else lines[0][:30]
    log.write_bytes(keep)
  kept = log.read_bytes().rpartition(b"\n")[0]
  resumed = run(data, log)
  assert verdicts(resumed) == verdicts(whole)
  assert log.read_bytes().startswith(kept)
  records = [json.loads(line) for line in log.read_bytes().splitlines()][1:]
  assert sorted(record["index"] for record in records) == list(range(len(labels)))
  finished = log.read_bytes()
  assert verdicts(run(iter([data]), log)) == verdicts(whole)
  assert log.read_bytes() == finished


def test_log_of_another_call_is_refused(tmp_path):
  w, images, labels, _ = linear_problem(count=6)
  log = tmp_path / "log.jsonl"

  def run(w=w, data=(images, labels), eps=0.05, log=log, **options):
    return certify(linear, w, data, eps, methods=("ibp",), attacks=(), log=log, **QUICK, **options)

  run()
  before = log.read_bytes()
  with pytest.raises(ValueError, match=r"eps was '0.05', now '0.06'; give"):
    run(eps=0.06)
  with pytest.raises(ValueError, match=r"another call: variables was '\w+', now '\w+'; give"):
    run(w + 1)
  with pytest.raises(ValueError, match="another order of them: example 0"):
    run(data=(images[::-1], labels[::-1]))
  with pytest.raises(ValueError, match="it has example 5, data has 4"):
    run(data=(images[:4], labels[:4]))
  assert log.read_bytes() == before
  log.write_bytes(before.replace(b'"status"', b'"state"', 1))
  with pytest.raises(ValueError, match=r"line 2 is no outcome"):
    run()
  log.write_bytes(before[:-60] + b"\n" + before[-60:])
  with pytest.raises(ValueError, match=r"line 7 is damaged"):
    run()
  for other in (b"my notes", b"{}\n"):
    log.write_bytes(other)
    with pytest.raises(ValueError, match="no log of a certification"):
      run()
    assert log.read_bytes() == other
  with pytest.raises(OSError, match="directory"):
    run(log=tmp_path)


def broken_bounds(*args, **kwargs):
  bounds = bound_margins(*args, **kwargs)
  return bounds._replace(lower=bounds.lower + 10)


def test_unsound_bound_is_an_error_and_no_result(tmp_path, monkeypatch):
  w, images, labels, worst = linear_problem()
  apply_fn = traced_anew()
  first = int(np.flatnonzero((worst(0.06) <= 0) & (worst(0.0) > 0))[0])
  monkeypatch.setattr(certify_cascade, "bound_margins", broken_bounds)
  log, options = tmp_path / "log.jsonl", {"methods": ("ibp",), "attacks": ("pgd",), **QUICK}
  for _ in range(2):  # the log does not hide it
    with pytest.raises(SoundnessError, match="certified by 'ibp' and broken by 'pgd'") as caught:
      certify(apply_fn, w, (images, labels), 0.06, log=log, **options)
    assert (caught.value.index, caught.value.method, caught.value.attack) == (first, "ibp", "pgd")
  with pytest.raises(SoundnessError):
    accuracy_curve(apply_fn, w, (images, labels), [0.06], **QUICK)


def test_search_that_leaves_the_box_is_no_counterexample(monkeypatch):
  w, images, labels, worst = linear_problem()
  apply_fn = traced_anew()

  def outside(logits_fn, key, box, labels, **_):
    return 5 - 10 * box.center

  monkeypatch.setitem(certify_cascade.ATTACKS, "pgd", outside)
  result = certify(apply_fn, w, (images, labels), 0.06, methods=(), attacks=("pgd",), **QUICK)
  assert result.summary()["attacked_by"] == {"clean": int((worst(0.0) <= 0).sum())}


def out_of_memory(problem, batch):
  if isinstance(batch.images, np.ndarray):  # at run time, not when it is traced
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")
  return jnp.zeros(len(batch.images), bool), None


def failing_stage(names):
  def stage(apply_fn, name, *options):
    made = certify_cascade.method_stage(apply_fn, name, *options)
    return made._replace(program=out_of_memory) if name in names else made

  return stage


def test_failed_stage_is_no_verdict(tmp_path, monkeypatch):
  w, images, labels, worst = linear_problem()
  log = tmp_path / "log.jsonl"
  options = {"methods": ("crown", "ibp"), "attacks": ("pgd",), "log": log, **QUICK}
  # By its name: the package may hold the function in place of the module.
  module = importlib.import_module("balance_jax.robust.certify")
  monkeypatch.setattr(module, "method_stage", failing_stage({"crown", "ibp"}))
  result = certify(linear, w, (images, labels), 0.06, **options)
  truth, clean = worst(0.06) > 0, worst(0.0) > 0
  assert [o.status == "error" for o in result.outcomes] == truth.tolist()
  assert [o.status == "attacked" for o in result.outcomes] == (~truth).tolist()
  summary = result.summary()
  assert (summary["certified"], summary["unknown"], summary["error"]) == (0, 0, truth.sum())
  assert summary["stage_errors"] == {"crown": clean.sum(), "ibp": clean.sum()}
  undecided = result.outcomes[int(np.flatnonzero(truth)[0])]
  assert undecided.errors["crown"].startswith("JaxRuntimeError: ")
  assert undecided.by is None
  # Decided by another stage: a verdict, with the failure still visible. Errors are tried again.
  monkeypatch.setattr(module, "method_stage", failing_stage({"crown"}))
  retried = certify(linear, w, (images, labels), 0.06, **options)
  assert [o.status == "certified" for o in retried.outcomes] == truth.tolist()
  assert retried.summary()["certified_by"] == {"ibp": truth.sum()}
  assert retried.summary()["stage_errors"]["crown"] == clean.sum()
  assert verdicts(certify(linear, w, (images, labels), 0.06, **options)) == verdicts(retried)


def test_bound_that_is_not_finite_certifies_nothing(monkeypatch):
  w, images, labels, _ = linear_problem(count=8)

  def infinite(*args, **kwargs):
    bounds = bound_margins(*args, **kwargs)
    return bounds._replace(lower=bounds.lower.at[::2].set(jnp.inf).at[1::2].set(jnp.nan))

  monkeypatch.setattr(certify_cascade, "bound_margins", infinite)
  apply_fn = traced_anew()
  result = certify(apply_fn, w, (images, labels), 0.0, methods=("ibp",), attacks=(), **QUICK)
  assert result.summary()["certified"] == 0
  assert result.summary()["unknown"] > 0
  assert all(o.margin is None for o in result.outcomes)


def test_curve_of_linear_network_is_the_closed_form():
  w, images, labels, worst = linear_problem()
  radii, traces = [0.0, 0.03, 0.06, 0.3], []

  def counted(w, x):
    traces.append(x)
    return linear(w, x)

  curve = accuracy_curve(counted, w, (images, labels), radii, **QUICK)
  count = len(traces)
  accuracy_curve(counted, w, (images, labels), [0.01, 0.02], **QUICK)
  assert len(traces) <= count + 3  # by the checks of the network; no radius is compiled in
  for name in ("certified", "adversarial"):
    np.testing.assert_allclose(curve[name], [(worst(eps) > 0).mean() for eps in radii])
  np.testing.assert_allclose(curve["clean"], np.full(4, (worst(0.0) > 0).mean()))
  np.testing.assert_array_equal(curve["eps"], radii)


class Normalised(nn.Module):
  running: bool = True

  @nn.compact
  def __call__(self, x):
    return nn.Dense(4)(nn.BatchNorm(use_running_average=self.running)(x))


def test_batch_statistics_are_refused():
  _, images, labels, _ = linear_problem(count=9)
  net, training = Normalised(), Normalised(running=False)
  variables = net.init(jax.random.key(0), images)

  def run(apply_fn, variables):
    options = {"methods": ("ibp",), "attacks": (), **QUICK}
    return certify(apply_fn, variables, (images, labels), 0.01, **options)

  assert run(net.apply, variables).summary()["examples"] == 9
  for broken in ({"params": variables["params"]}, {**variables, "batch_stats": {}}):
    with pytest.raises(ValueError, match=r"needs running statistics.*pass batch_stats"):
      run(net.apply, broken)
  with pytest.raises(ValueError, match="inference mode"):
    run(training.apply, variables)
  with pytest.raises(ValueError, match=r"change by .* with the rest of its batch"):
    run(lambda v, x: training.apply(v, x, mutable=["batch_stats"])[0], variables)
  infinite = jax.tree.map(jnp.array, variables)
  infinite["params"]["Dense_0"]["bias"] = jnp.array([0, jnp.nan, 0, 0])
  with pytest.raises(ValueError, match=r"variables\['params'\]\['Dense_0'\]\['bias'\] holds"):
    run(net.apply, infinite)


def test_bad_input_comes_before_the_file(tmp_path):
  w, images, labels, _ = linear_problem(count=9)
  log = tmp_path / "log.jsonl"

  def refused(match, *, error=ValueError, apply_fn=linear, data=None, eps=0.05, **options):
    data = (images, labels) if data is None else data
    with pytest.raises(error, match=match):
      certify(apply_fn, w, data, eps, log=log, **{"batch_size": 4, **options})
    assert not log.exists()

  changed = images.copy()
  changed[8, 0] = np.nan
  refused("eps is -0.1; allowed", eps=-0.1)
  refused("eps is nan", eps=float("nan"))
  refused("hi is 0.0; allowed", lo=1.0, hi=0.0)
  refused("from 8 on: x holds values that are not finite", data=(changed, labels))
  refused("outside the valid range", hi=0.5)
  refused("labels holds 4; allowed: 0 to 3", data=(images, np.full(9, 4)))
  refused("labels has dtype float", data=(images, labels.astype(float)))
  refused(r"labels of shape \(8,\)", data=(images, labels[:8]))
  refused("dtype uint8; expected float32", data=((images > 0.5).astype(np.uint8), labels))
  refused("no example", data=(images[:0], labels[:0]))
  refused("no example", data=iter([]))
  refused("data yields ndarray", data=[images, labels])
  refused(r"methods is 'crwn' .*'crown'", methods=("crwn",))
  refused(r"methods is 'ibp'; expected several", methods="ibp")
  refused("each name once", attacks=("pgd", "pgd"))
  refused("attack_steps is 0", attack_steps=0)
  refused("batch_size is 0", batch_size=0)
  refused("chunk", chunk=0)
  refused("expected logits", apply_fn=lambda w, x: (x @ w)[:, 0])
  refused(
    "4 classes or more",
    apply_fn=lambda w, x: (x @ w)[:, :2],
    attacks=("apgd-dlr",),
    data=(images, labels % 2),
  )
  refused("cannot be bounded", error=UnsupportedPrimitive, apply_fn=lambda w, x: jnp.sort(x @ w))
  with pytest.raises(ValueError, match="eps_values is"):
    accuracy_curve(linear, w, (images, labels), [0.1, 0.1])


def test_later_batches_are_checked_when_they_come(tmp_path):
  w, images, labels, _ = linear_problem(count=16)
  batches = iter([(images[:8], labels[:8]), (images[8:, :4], labels[8:])])
  options = {"methods": ("ibp",), "attacks": (), "log": tmp_path / "log.jsonl", **QUICK}
  with pytest.raises(ValueError, match=r"from 8 on: images have shape \(8, 4\)"):
    certify(linear, w, batches, 0.05, **options)
