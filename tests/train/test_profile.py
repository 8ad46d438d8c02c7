"""A profile of the tiny run, as it is shown and written."""

import io
import json

import pytest
from rich.console import Console

from dsjax.parallel import build_mesh
from dsjax.train import profile_report, runtime
from dsjax.train.kinds import COPY, KINDS
from dsjax.train.memory import Memory
from dsjax.train.peak import Peak
from dsjax.train.profile import Profile, profile
from dsjax.train.profile_picture import draw
from dsjax.train.profile_report import headlines, print_report, write_json
from dsjax.train.trace import Operation, Timeline

MEMORY = Memory(2**32, 2**32, 60, 1024, 2**32, 2**33, 900, 0, 2**35)


@pytest.fixture(scope="module")
def measured(tiny_run, step_cache):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runtime, "build_mesh", lambda config: build_mesh(config, devices=1))
        patch.setattr(runtime, "build_step", step_cache.build)
        said = []
        found = profile(tiny_run(), 2, said.append)
    assert said == ["compiling the step", "timing 2 steps", "tracing 2 steps"]
    return found


def made_up(run, operations) -> Profile:
    busy = sum(operation.seconds for operation in operations)
    return Profile(run, 3, 1000, 0.5, MEMORY, Timeline(busy * 1.25, operations, 1))


@pytest.fixture
def card(tiny_run, monkeypatch) -> Profile:
    """Of a card whose peaks are known, with a long name and a copy of known bytes."""
    for module in ("profile", "profile_report", "peak"):
        monkeypatch.setattr(f"dsjax.train.{module}.device_peak", lambda: Peak(1e12, 2e12))
    return made_up(tiny_run(), [
        Operation("n" * 70, "dense matmul", "s" * 50, 2.0, 0.3, None, False),
        Operation("MemcpyD2D", COPY, "", 4.0, 0.1, 2e9, False),
    ])  # fmt: skip


def shown(found: Profile, top: int = 20) -> str:
    out = io.StringIO()
    print_report(Console(file=out, width=80), found, top)
    return out.getvalue()


def test_shares_of_kinds_and_idle_add_up(measured):
    line = measured.timeline
    assert 0 < line.busy <= line.seconds
    assert sum(row.seconds for row in measured.kinds) == pytest.approx(line.busy)
    assert sum(row.share for row in measured.kinds) == pytest.approx(line.busy / line.seconds)
    order = [KINDS.index(row.kind) for row in measured.kinds]
    assert order == sorted(order)
    assert measured.tokens == 8 * 32
    assert measured.tokens_per_second == measured.tokens / measured.seconds


def test_matmuls_of_experts_and_of_attention_are_found(measured):
    found = {row.kind: row for row in measured.kinds}
    assert found["experts, grouped matmul"].rate > 0
    assert any("mla_attention" in each.scope for each in measured.timeline.operations)


def test_every_operation_runs_a_whole_number_of_times_a_step(measured):
    assert all(each.calls == round(each.calls) for each in measured.timeline.operations)


def test_json_has_all_operations_and_blanks_for_what_is_not_known(measured, tmp_path):
    found = json.loads(write_json(tmp_path / "profile.json", measured).read_text())
    assert set(found) == {
        "run", "environment", "peak_tflops", "steps", "tokens", "step_ms", "tokens_per_second",
        "model_flops_per_second", "mfu", "mfu_causal", "memory", "traced", "kinds", "operations",
    }  # fmt: skip
    assert found["run"]["name"] == "tiny"
    assert found["mfu"] is None
    assert set(found["memory"]) == {*vars(measured.memory), "planned"}
    assert len(found["operations"]) == len(measured.timeline.operations)
    assert set(found["operations"][0]) == {
        "name", "kind", "scope", "calls", "ms", "share", "gbytes_per_s",
    }  # fmt: skip
    assert set(found["kinds"][0]) == {"kind", "calls", "ms", "share", "tflops", "share_of_peak"}
    total = sum(each["ms"] for each in found["operations"])
    assert total == pytest.approx(found["traced"]["busy_ms"])


def test_tables_have_a_line_for_everything(measured):
    text = shown(measured, top=4)
    for row in measured.kinds:
        assert row.kind in text
    for what, _, _ in measured.memory.rows():
        assert what in text
    assert "the 4 longest operations" in text
    assert "no MFU" in text
    assert "GB/s" not in text


def test_a_cards_report_has_mfu_and_shares_of_its_peak(card):
    text = shown(card)
    assert "MFU" in headlines(card)[1]
    assert "Peak: 1 in bf16, 2 in FP8" in text
    assert "32 GiB" in text
    assert f"{'n' * 41}..." in text
    assert f"{'s' * 31}..." in text
    copy = next(line for line in text.splitlines() if "MemcpyD2D" in line)
    assert copy.split()[-1] == "20"
    assert "nothing runs" in text


def test_a_profile_without_operations_says_so(tiny_run, tmp_path):
    bare = made_up(tiny_run(), [])
    assert profile_report.NO_TRACE in shown(bare).replace("\n", " ").replace("  ", " ")
    assert json.loads(write_json(tmp_path / "p.json", bare).read_text())["operations"] == []
    assert draw(bare, tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_the_picture_is_drawn(measured, card, tmp_path):
    for name, found in (("measured", measured), ("card", card)):
        assert draw(found, tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_no_steps_are_refused(tiny_run):
    with pytest.raises(ValueError, match="steps is 0: time at least 1"):
        profile(tiny_run(), 0)
