import subprocess
import sys

HEAVY = ("torch", "onnx", "onnxruntime", "polygraphy", "scipy", "librosa")


def test_importing_the_runtime_is_light_and_fast():
    code = (
        "import time; t = time.perf_counter(); import clapsep.runtime; t = time.perf_counter() - t; import sys;"
        f"print(t, *[m for m in {HEAVY} if m in sys.modules])"
    )
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split() for _ in range(5)]
    assert all(len(words) == 1 for words in runs), runs
    assert min(float(words[0]) for words in runs) < 0.2


def test_no_heavy_import_below_the_export_floor():
    """Nor is torch, onnx or polygraphy imported when the runtime separates."""
    from pathlib import Path

    import clapsep.runtime

    root = Path(clapsep.runtime.__file__).parents[1]
    for room in ("engines", "runtime"):
        for path in (root / room).rglob("*.py"):
            text = path.read_text()
            assert not any(f"import {name}" in text or f"from {name}" in text for name in ("torch", "onnx\n", "polygraphy")), path
            assert "..export" not in text, path
