"""The report: schema, verdict both ways, files that appear whole, and cases measured on a real tiny pipeline."""

import io
import json
from contextlib import contextmanager

import pytest
import torch
from PIL import Image
from rich.console import Console

from modules.pipelines import PixArtDriver
from tests.tiny import PIXART_CALL, tiny_pixart_pipeline
from trainers import report as reports
from trainers.diffusion_cases import first_block_case, hold_case, taylor_case
from trainers.image_quality import psnr_db
from trainers.plots import save_grid
from trainers.rows import Case, Row
from trainers.verdict import equal_latency_verdict, lossless_verdict, verdict_text

CALL = {name: value for name, value in PIXART_CALL.items() if name not in ("output_type", "clean_caption")}
INPUTS = ["a red circle", "blue square on grey", "green circle"]


def row(name, kind, latency_s, psnr, group="", **quality):
    speedup = 1.0 / latency_s
    return Row(
        name=name,
        kind=kind,
        group=group,
        speedup=speedup,
        speedup_range=(0.9 * speedup, 1.1 * speedup),
        latency_s=latency_s,
        work={"blocks": 100 * latency_s},
        memory_bytes=3 * 2**20,
        quality={"psnr_db": psnr, **quality},
        samples=torch.zeros(2, 3, 8, 8),
    )


def table(adapter_psnr=34.0, plain_slower=33.0):
    return [
        row("20 steps", "baseline", 1.0, 44.0),
        row("ilf", "adapter", 0.5, adapter_psnr),
        row("10 steps", "plain", 0.45, 31.0, "fewer steps"),
        row("11 steps", "plain", 0.51, plain_slower, "fewer steps"),
        row("16 steps", "plain", 0.8, 41.0, "fewer steps"),
        row("hold", "untrained", 0.55, 28.0),
    ]


def rivals(verdict):
    return {rival["name"]: rival["closer"] for rival in verdict["rivals"]}


def test_adapter_wins_when_closer_than_the_nearest_slower_row_of_every_group():
    verdict = equal_latency_verdict(table())
    assert verdict["wins"] and rivals(verdict) == {"11 steps": True, "hold": True}
    assert "closer to the reference than every rival" in verdict_text(verdict)


def test_adapter_loses_and_the_text_says_to_what():
    verdict = equal_latency_verdict(table(plain_slower=34.5))
    assert not verdict["wins"] and rivals(verdict) == {"11 steps": False, "hold": True}
    text = verdict_text(verdict)
    assert "It loses to 11 steps: use that instead" in text and "0.50 dB farther than 11 steps" in text


def test_a_tie_is_no_win():
    assert not equal_latency_verdict(table(plain_slower=34.0))["wins"]


def test_a_faster_row_that_is_closer_beats_the_adapter():
    verdict = equal_latency_verdict(
        [*table(), row("quick", "untrained", 0.3, 35.0), row("quick", "untrained", 0.6, 20.0)]
    )
    assert not verdict["wins"] and "It loses to quick" in verdict_text(verdict)


def test_a_row_within_one_percent_counts_as_equally_slow():
    rows = [row("a", "adapter", 0.5, 30.0), row("b", "plain", 0.4951, 31.0)]
    assert [rival["faster"] for rival in equal_latency_verdict(rows)["rivals"]] == [False]


def test_a_group_without_a_slower_row_is_no_win_and_is_named():
    verdict = equal_latency_verdict([*table(), row("cache", "peer", 0.3, 20.0)])
    assert verdict["unmatched"] == ["cache"] and not verdict["wins"]
    assert "No row of cache takes as long as the adapter" in verdict_text(verdict)


def test_without_adapter_there_is_no_verdict():
    assert equal_latency_verdict(table()[:1]) is None and "no adapter" in verdict_text(None)


def decoded(name, kind, speedup, exact=1.0, group=""):
    work = {"tokens_per_step": 2.0, "tokens_per_s": 100.0, "overhead": 2.0 / speedup}
    quality = {"exact_match": exact}
    own = {"speedup": speedup, "speedup_range": (0.9 * speedup, 1.1 * speedup), "latency_s": 1 / speedup}
    return Row(name=name, kind=kind, group=group, work=work, memory_bytes=2**20, quality=quality, **own)


def test_without_loss_the_faster_one_wins():
    rows = [decoded("plain", "baseline", 1.0), decoded("medusa", "adapter", 1.8), decoded("trie", "untrained", 1.4)]
    verdict = lossless_verdict(rows)
    assert verdict["wins"] and "trie is slower at 1.40x" in verdict_text(verdict)
    assert "faster than every rival with the same output" in verdict_text(verdict)
    two = lossless_verdict([*rows, decoded("medusa and lookup", "adapter", 2.0)])
    assert two["adapter"] == "medusa" and "variant medusa and lookup is faster at 2.00x" in verdict_text(two)
    lost = lossless_verdict([*rows, decoded("lookup", "untrained", 1.9)])
    assert not lost["wins"] and "It loses to lookup: use that instead" in verdict_text(lost)
    assert not lossless_verdict([decoded("medusa", "adapter", 0.9)])["wins"]
    assert "no faster than plain" in verdict_text(lossless_verdict([decoded("medusa", "adapter", 0.9)]))
    assert lossless_verdict(rows[:1]) is None


def test_a_faster_rival_that_says_something_else_does_not_count():
    rows = [decoded("medusa", "adapter", 1.8), decoded("typical", "peer", 2.5, exact=0.3)]
    verdict = lossless_verdict(rows)
    assert verdict["wins"] and "with the same tokens in 30.0%" in verdict_text(verdict)


def test_tables_by_kind_of_input_stand_in_the_markdown():
    rows = [decoded("plain", "baseline", 1.0), decoded("medusa", "adapter", 1.8)]
    one = {"speedup": 1.5, "tokens_per_step": 2.25}
    report = build(rows) | {"categories": {"code": {"plain": one, "medusa": one}}, "repeated_trigrams": {"code": 0.25}}
    text = reports.markdown(report)
    assert "| medusa | 1.50x, 2.25 |" in text and "| repeated trigrams in plain text | 25% |" in text


def build(rows):
    return reports.build_report(
        rows,
        method="ilf",
        backbone="embedded:x",
        device="cpu: it",
        commit="abc",
        seed=3,
        verdict=equal_latency_verdict(rows),
        inputs=3,
        reference="50 steps",
    )


def test_report_files_hold_the_schema_and_the_verdict(tmp_path):
    rows = table()
    reports.write_report(tmp_path / "run", build(rows), rows)
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert {"method", "backbone", "device", "commit", "seed", "rows"} <= set(report)
    keys = {"name", "kind", "speedup", "speedup_range", "latency_s", "work", "memory_bytes", "quality"}
    assert all(set(one) == keys for one in report["rows"]) and len(report["rows"]) == len(rows)
    assert report["verdict"]["wins"] and report["inputs"] == 3
    markdown = (tmp_path / "run" / "report.md").read_text()
    assert all(one.name in markdown for one in rows) and verdict_text(report["verdict"]) in markdown
    for name in ("report.png", "samples/grid.png"):
        assert Image.open(tmp_path / "run" / name).getextrema() != ((255, 255),) * 3
    assert not list((tmp_path / "run").rglob("*.tmp"))


def test_a_report_that_fails_leaves_the_old_one(tmp_path, monkeypatch):
    rows = table()
    reports.write_report(tmp_path, build(rows), rows)
    before = (tmp_path / "report.json").read_bytes()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        reports.write_report(tmp_path, build(rows[:2]), rows[:2])
    assert (tmp_path / "report.json").read_bytes() == before and not list(tmp_path.glob(".report*"))


def test_numbers_that_json_lacks_are_refused(tmp_path):
    rows = [row("20 steps", "baseline", 1.0, float("inf"))]
    with pytest.raises(ValueError):
        reports.write_report(tmp_path, build(rows), rows)


def test_table_fits_a_terminal_of_80_columns():
    console = Console(file=io.StringIO(), width=80)
    reports.print_table([*table(), row("TaylorSeer every 2, warm-up 3", "untrained", 0.6, 30.0, accuracy=0.5)], console)
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= 80 and any("34.00"[:2] in line and "ilf" in line for line in lines)
    assert "…" not in console.file.getvalue()


def test_grid_enlarges_small_images_without_smoothing(tmp_path):
    rows = [torch.rand(4, channels, 8, 8) * 2 - 1 for channels in (3, 1)]
    save_grid(tmp_path / "grid.png", rows, ["20 steps", "ilf"])
    picture = Image.open(tmp_path / "grid.png")
    assert picture.height > 2 * 96 and picture.width > 4 * 96
    corner = picture.crop((picture.width - 4 - 12, 4 + 96 - 12, picture.width - 4, 4 + 96))
    want = tuple(rows[0][3, :, 7, 7].add(1).div(2).mul(255).round().int().tolist())
    assert corner.getextrema() == tuple((value, value) for value in want)


def test_grid_needs_a_label_per_row(tmp_path):
    with pytest.raises(ValueError, match="one label per row"):
        save_grid(tmp_path / "grid.png", [torch.zeros(1, 3, 8, 8)], [])


def case(name, kind, steps, log=None):
    @contextmanager
    def enter():
        yield {"num_inference_steps": steps}
        if log is not None:
            log.append(name)

    return Case(name=name, kind=kind, enter=enter)


@pytest.fixture(scope="module")
def driver():
    return PixArtDriver(tiny_pixart_pipeline(layers=2), CALL)


def measure(driver, cases, **changed):
    seeds = list(range(len(INPUTS)))
    reference = driver.generate(INPUTS, seeds, num_inference_steps=8)
    settings = {"repeats": 5, "batch_size": 2, "timing_batch": 1, "quality_fns": {"psnr_db": quality, "none": nothing}}
    return reports.measure_cases(driver, cases, INPUTS, seeds, reference, **settings | changed)


def quality(images, reference, inputs):
    assert len(images) == len(reference) == len(inputs) == 3
    return psnr_db(images, reference)


def nothing(images, reference, inputs):
    return None


def test_measured_rows_count_what_ran(driver):
    log = []
    rows = measure(driver, [case("8 steps", "baseline", 8), case("2 steps", "plain", 2, log)])
    assert [one.name for one in rows] == ["8 steps", "2 steps"] and len(log) == 1 + 1 + 1 + 5
    full, short = rows
    assert (full.work["blocks"], short.work["blocks"]) == (16, 4) and full.work["submodules"] == 48
    assert full.work["macs"] > 3 * short.work["macs"] > 0 and min(full.memory_bytes, short.memory_bytes) > 0
    assert full.speedup == 1 and short.speedup > 1.3 and short.speedup_range[0] <= short.speedup
    assert (
        full.quality == {"psnr_db": pytest.approx(100, abs=40)} and full.quality["psnr_db"] > short.quality["psnr_db"]
    )
    assert full.samples.shape == (3, 3, 16, 16)
    assert not driver.transformer._forward_pre_hooks and not any(
        module._forward_pre_hooks for module in driver.transformer.modules()
    )


def test_what_a_cache_holds_is_counted_per_image(driver):
    cases = [
        case("8 steps", "baseline", 8),
        hold_case(driver, 2, 1, 8),
        taylor_case(driver, 2, 1, 8),
        first_block_case(driver, 0.5, 8),
    ]
    rows = measure(driver, cases)
    feature = 2 * 16 * 16 * 4  # halves of guidance, tokens, width, bytes
    assert "cache_bytes" not in rows[0].work  # nobody knows what other libraries hold, and the plain sampler holds none
    held, differences, first_block = (one.work["cache_bytes"] / feature for one in rows[1:])
    assert held == 2 * 3 and differences == 2 * 2 * 3  # blocks and their sub-modules; value and difference of each
    assert first_block == 2  # what is added, and the first block's residual that the test compares with
    header, body = reports._header_and_cells([one.as_json() for one in rows])
    assert [cells[header.index("bytes")] for cells in body] == ["", "12288", "24576", "4096"]


@pytest.mark.parametrize(
    ("cases", "words"),
    [
        ([case("a", "baseline", 1), case("a", "plain", 2)], "a repeats"),
        ([case("a", "plain", 1)], "found 0 among a"),
        ([case("a", "baseline", 1), case("b", "baseline", 2)], "found 2 among a, b"),
    ],
)
def test_wrong_sets_of_cases_are_refused(driver, cases, words):
    with pytest.raises(ValueError, match=words):
        measure(driver, cases)
