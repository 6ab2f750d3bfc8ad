"""Floors 1 to 5 start without torch, and without matplotlib until a picture is drawn."""

import subprocess
import sys

MODULES = (
    "evenflow.ir, evenflow.cluster.read, evenflow.rules, evenflow.soundness, evenflow.schedules, "
    "evenflow.schedules.catalog, "
    "evenflow.simulate, evenflow.lower, evenflow.validate, evenflow.view.text, evenflow.view.picture, "
    "evenflow.journal.deviation, evenflow.journal.folder, evenflow.torch_schedule"
)


def test_planning_imports_neither_torch_nor_matplotlib() -> None:
    code = f"import {MODULES}, sys; print(sorted({{'torch', 'numpy', 'matplotlib'}} & set(sys.modules)))"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert result.stdout.strip() == "[]"


def test_a_plan_is_exported_without_torch() -> None:
    code = "import evenflow.cli.main, evenflow.cli.export, sys; print('torch' in sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert result.stdout.strip() == "False"
