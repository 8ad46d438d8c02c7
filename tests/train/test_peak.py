"""MFU in both counts, against the peak of all devices."""

import jax
import pytest

from dsjax.model.sizes import Work
from dsjax.train import peak
from dsjax.train.peak import PEAKS, Peak, device_peak, utilisation

WORK = Work(causal=2e9, full=3e9)


def test_both_counts_are_shares_of_all_devices_bf16_peak(monkeypatch):
    monkeypatch.setattr(peak, "device_peak", lambda: Peak(1e12, 2e12))
    figures = utilisation(1000.0, WORK)
    assert figures["model_flops_per_second"] == 2e12
    assert figures["mfu"] == pytest.approx(3 / jax.device_count())
    assert figures["mfu_causal"] == pytest.approx(2 / jax.device_count())


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="a GPU has a peak")
def test_a_device_of_unknown_peak_has_no_mfu():
    assert device_peak() is None
    assert set(utilisation(1000.0, WORK)) == {"model_flops_per_second"}


def test_fp8_is_twice_as_fast_where_there_is_fp8():
    for name, (bf16, fp8) in PEAKS.items():
        assert fp8 is None or fp8 == pytest.approx(2 * bf16, rel=0.01), name
    assert PEAKS["NVIDIA A100-SXM4-80GB"].fp8 is None
