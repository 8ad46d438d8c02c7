"""Learning rate, bias speed and MTP weight at the borders of their phases."""

import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.config import Balance, Mtp, Optimizer
from dsjax.train.schedule import bias_speed, learning_rate, mtp_weight

STEPS = 1000
CONFIG = Optimizer(
    peak_lr=1.0,
    final_lr=0.1,
    last_lr=0.03,
    warmup_fraction=0.02,
    constant_fraction=0.5,
    cosine_fraction=0.4,
    last_fraction=0.01,
)
# Warm-up to 20, constant to 520, cosine to 920, final to 990, last to 1000.


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, 1 / 20),
        (9, 10 / 20),
        (19, 1.0),
        (20, 1.0),
        (519, 1.0),
        (520, 1.0),
        (620, 0.1 + 0.9 * (1 + np.cos(np.pi / 4)) / 2),
        (720, 0.55),
        (920, 0.1),
        (989, 0.1),
        (990, 0.03),
        (999, 0.03),
    ],
)
def test_learning_rate_at_the_borders_of_its_phases(step, expected):
    np.testing.assert_allclose(learning_rate(CONFIG, STEPS)(step), expected, rtol=1e-5)


def test_learning_rate_changes_at_once_only_into_the_last_phase():
    rates = np.asarray(learning_rate(CONFIG, STEPS)(jnp.arange(STEPS)))
    jumps = np.flatnonzero(np.abs(np.diff(rates)) > 0.051) + 1
    assert jumps.tolist() == [990]


def test_learning_rate_without_warm_up_starts_at_the_peak():
    config = Optimizer(peak_lr=0.5, final_lr=0.1, warmup_fraction=0.0)
    assert learning_rate(config, STEPS)(0) == 0.5


def test_learning_rate_without_last_phase_ends_at_the_final_rate():
    config = Optimizer(peak_lr=0.5, final_lr=0.1, last_lr=0.3, last_fraction=0.0)
    assert learning_rate(config, STEPS)(STEPS - 1) == pytest.approx(0.1)


@pytest.mark.parametrize("steps", [1, 2, 5, 40])
def test_learning_rate_of_a_short_run_stays_within_its_bounds(steps):
    rates = np.asarray([learning_rate(CONFIG, steps)(step) for step in range(steps)])
    assert (rates > 0).all()
    assert (rates <= 1).all()


def test_bias_speed_rests_from_its_share_of_the_steps_on():
    config = Balance(bias_speed=0.01, bias_until=0.9)
    speeds = [float(bias_speed(config, jnp.int32(step), 100)) for step in (0, 89, 90, 99)]
    assert speeds == pytest.approx([0.01, 0.01, 0.0, 0.0])


def test_mtp_weight_switches_at_its_share_of_the_steps():
    config = Mtp(weight=0.3, late_weight=0.1, late_from=0.6)
    weights = [float(mtp_weight(config, jnp.int32(step), 100)) for step in (0, 59, 60, 99)]
    assert weights == pytest.approx([0.3, 0.3, 0.1, 0.1])
