"""Pages in a browser: how soon a run's page is there, how smoothly it moves; and the pictures of the docs.

    python benchmarks/pages.py            # 8 ranks x 256 microbatches, and a hundred thousand spans
    python benchmarks/pages.py docs/      # draw docs/run_page.png and docs/playground.png instead

The browser is headless Chromium, which draws on the processor. Frames are counted while the timeline is
dragged to and fro, zoomed in so far that half of it can be seen; there are at most 60 a second.
"""

import argparse
import statistics
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from chromium import page as opened
from playwright.sync_api import Page

import evenflow
from evenflow.bill import bills, of_timeline
from evenflow.cli.play import address_of, serving
from evenflow.ir.costs import Costs
from evenflow.ir.flow import Flow
from evenflow.ir.op import Forward, Op, Payload, Send
from evenflow.ir.timeline import Lane, Timeline
from evenflow.journal.folder import read_last_step, read_plan_of, read_run, read_steps
from evenflow.journal.last_step import EdgeRecord, HeldStage, LaneRecord, LastStep, lane_record
from evenflow.journal.page import run_page
from evenflow.journal.run import RankRecord, Run, Spread, StageRecord, Step
from evenflow.memory import memory_curve
from evenflow.schedules import catalog
from evenflow.simulate import simulate

_NUM_LOADS = 5
_DRAG_SECONDS = 3.0
_ACTIVATION_BYTES = 2.0**27
_SENDING_SECONDS = 2e-4


def page_of(schedule: str, num_ranks: int, num_microbatches: int) -> tuple[str, int]:
    """The page of a run that was simulated twice, the second time with unequal stages; and its spans."""
    made = catalog.make(
        schedule,
        num_ranks=num_ranks,
        stages_per_rank=catalog.default_stages_per_rank(schedule),
        num_microbatches=num_microbatches,
        costs_on=lambda placement: Costs.uniform(placement.num_stages),
    )
    rank_of = made.placement.rank_of
    stages, flow = range(len(rank_of)), Flow.chain(len(rank_of))
    slower = tuple(0.010 * (1 + 0.1 * (stage % 3)) for stage in stages)
    costs = Costs(slower, slower, slower, activation_bytes=(_ACTIVATION_BYTES,) * len(rank_of))
    predicted = simulate(made, flow, Costs.uniform(len(rank_of), 0.01, 0.01, 0.01))
    measured = simulate(made, flow, costs)
    last_step = LastStep(
        tuple(
            lane_record([(op, start, start, end) for op, start, end in _rows(lane)])
            for lane in predicted.lanes
        ),
        tuple(_measured(measured, costs, rank) for rank in range(num_ranks)),
        bills(of_timeline(predicted), flow, predicted),
        bills(of_timeline(measured), flow, predicted),
        tuple(
            HeldStage(rank_of[stage], (f"blocks.{stage}",), 10, 7_000_000, 1 / len(stages))
            for stage in stages
        ),
        (
            *(EdgeRecord(stage, stage + 1, "F", 1, 2**24) for stage in stages[:-1]),
            *(EdgeRecord(stage + 1, stage, "B", 1, 2**24) for stage in stages[:-1]),
        ),
        (8 * 2.0**30,) * num_ranks,
    )
    run = _run(schedule, num_microbatches, measured, rank_of)
    steps = [Step(number, run.step.median, 0.0, 6 / (1 + number / 300) ** 0.5) for number in range(1, 1001)]
    num_spans = sum(len(lane.ops) for lane in (*last_step.predicted, *last_step.measured))
    return run_page(run, steps, last_step, None), num_spans


def _rows(lane: Lane) -> Iterator[tuple[Op, float, float]]:
    return zip(lane.ops, lane.start_seconds, lane.end_seconds, strict=True)


def _measured(timeline: Timeline, costs: Costs, rank: int) -> LaneRecord:
    """A lane with what it sends, waits for and holds."""
    curve = memory_curve(timeline, costs, rank)
    rows: list[tuple[Op, float, float, float]] = []
    held: list[int] = []
    came, at = 0.0, 0
    for op, start, end in _rows(timeline.lanes[rank]):
        while at + 1 < len(curve) and curve[at + 1][0] <= end:
            at += 1
        computed = end - _SENDING_SECONDS
        rows.append((op, came, start, computed))
        came = computed
        if isinstance(op, Forward) and op.stage + 1 < costs.num_stages:
            sent = Send(op.stage, op.stage + 1, op.microbatch, Payload.ACTIVATION)
            rows.append((sent, computed, computed, end))
            came = end
        held += [int(curve[at][1])] * (len(rows) - len(held))
    return lane_record(rows, held_bytes=held)


def _run(schedule: str, num_microbatches: int, measured: Timeline, rank_of: Sequence[int]) -> Run:
    spread = Spread(*(measured.makespan_seconds,) * 3)
    return Run(
        name="a big step",
        started="2026-11-23T12:00:00+00:00",
        machine="simulated",
        evenflow=evenflow.__version__,
        schedule=schedule,
        num_microbatches=num_microbatches,
        item="tok",
        items_per_batch=num_microbatches * 4096,
        num_steps=1000,
        num_timed=998,
        step=spread,
        pipeline=spread,
        feed_seconds=0.0,
        simulated_seconds=measured.makespan_seconds,
        stages=tuple(
            StageRecord(rank, f"blocks.{stage}", 0.01, 0.02, None, None) for stage, rank in enumerate(rank_of)
        ),
        ranks=(RankRecord(0.1, None),) * measured.num_ranks,
    )


def loaded_seconds(page: Page, address: str) -> float:
    """From the navigation's start until all is drawn."""
    page.goto(address)
    return float(
        page.evaluate(
            """() => new Promise(done => requestAnimationFrame(
                () => setTimeout(() => done(performance.now() / 1000))))"""
        )
    )


def frames_per_second(page: Page) -> tuple[float, float]:
    """(frames a second, seconds of the slowest tenth of frames) while the timeline is dragged to and fro."""
    page.locator('button[data-by="0.5"]').first.click()
    box = page.locator(".lanes .u-over").bounding_box()
    assert box is not None, "it is shown"
    # The pointer is moved inside of the browser, once a frame: how fast it can follow is what counts.
    frames = page.evaluate(
        """async ([x, y, width, seconds]) => {
            const over = document.querySelector(".lanes .u-over"), frames = [];
            const send = (type, x) =>
                over.dispatchEvent(new PointerEvent(type, {clientX: x, clientY: y, pointerId: 1}));
            over.setPointerCapture = () => {};
            send("pointerdown", x);
            const first = performance.now();
            let last = first;
            while (last - first < 1000 * seconds) {
                await new Promise(requestAnimationFrame);
                const now = performance.now();
                frames.push((now - last) / 1000);
                last = now;
                send("pointermove", x + width / 4 * Math.sin((now - first) / 300));
            }
            send("pointerup", x);
            return frames;
        }""",
        [box["x"] + box["width"] / 2, box["y"] + 10, box["width"], _DRAG_SECONDS],
    )
    slowest = sorted(frames)[-max(1, len(frames) // 10) :]
    return len(frames) / sum(frames), statistics.median(slowest)


def measure(page: Page, folder: Path) -> None:
    """Print a line for each size."""
    for schedule, num_ranks, num_microbatches in (("1f1b", 8, 256), ("zb-h1", 8, 1750)):
        text, num_spans = page_of(schedule, num_ranks, num_microbatches)
        path = folder / "page.html"
        path.write_text(text, encoding="utf-8")
        loads = [loaded_seconds(page, path.as_uri()) for _ in range(_NUM_LOADS)]
        rate, slow = frames_per_second(page)
        print(
            f"{schedule}, {num_ranks} ranks x {num_microbatches} microbatches: {num_spans:,} spans, "
            f"{len(text) / 2**20:.1f} MiB; loaded in {statistics.median(loads):.2f} s ({min(loads):.2f} to "
            f"{max(loads):.2f}); dragged at {rate:.0f} frames/s, the slowest tenth {1000 * slow:.0f} ms"
        )


def draw(page: Page, folder: Path, run: Path) -> None:
    """Write the pictures of the docs: a run's page with an op under the pointer, and the playground."""
    made, steps = read_run(run), read_steps(run)
    text = run_page(made, steps, read_last_step(run, made), read_plan_of(run, made))
    page.set_viewport_size({"width": 1280, "height": 1410})
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "page.html"
        path.write_text(text, encoding="utf-8")
        page.goto(path.as_uri())
        page.wait_for_timeout(500)
        box = page.locator(".lanes .u-over").bounding_box()
        assert box is not None, "it is shown"
        page.mouse.move(box["x"] + 0.42 * box["width"], box["y"] + 18)
        page.wait_for_timeout(200)
        page.screenshot(path=folder / "run_page.png")
    page.set_viewport_size({"width": 1280, "height": 780})
    with serving(0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        page.goto(address_of(server))
        page.wait_for_function("document.body.dataset.answered")
        page.fill("[name=cap]", "5")
        page.wait_for_function("document.getElementById('command').textContent.includes('--cap 5')")
        page.wait_for_timeout(300)
        page.screenshot(path=folder / "playground.png")
        server.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("docs", nargs="?", type=Path, help="a folder to draw the documentation's pictures to")
    parser.add_argument(
        "--run", type=Path, default=Path("runs/train_gpt"), help="the run whose page is drawn"
    )
    arguments = parser.parse_args()
    with opened(1280, 900) as page, tempfile.TemporaryDirectory() as folder:
        if arguments.docs is None:
            measure(page, Path(folder))
        else:
            draw(page, arguments.docs, arguments.run)


if __name__ == "__main__":
    main()
